"""Implement the model interface of lm-evaluation-harness for a streamed model. Needs `lm_eval` to be installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.models.utils_hf import stop_sequences_criteria
from lm_eval.utils import get_rolling_token_windows
from torch import Tensor

from ...errors import CalibrationError, ConfigError, check_least
from ...model.skeleton import Skeleton
from ...model.tokenizer import Bos, encode, end_tokens
from ...system.progress import Progress
from ...text.windows import DEFAULT_LENGTH
from .answers import Question, answer
from .scoring import Query, score

MOST = 256
"""Most tokens of an answer if the task does not say, as in `HFLM`."""
GREEDY = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "num_beams"}
"""Settings of generation that greedy decoding follows or does not use."""


def check_generation(name: str, settings: Mapping[str, Any] | None) -> int:
    """Return the most tokens that a task generates. Raises a ConfigError unless its settings mean greedy decoding of one or more."""
    found = normalize_gen_kwargs(dict(settings or {}), MOST)
    for key, value in found.items():
        if (
            key not in GREEDY
            or (key == "do_sample" and value)
            or (key == "temperature" and value and found.get("do_sample") is not False)
            or (key == "num_beams" and value != 1)
        ):
            raise ConfigError(
                f"task {name!r} generates with {key}: {value!r}; a streamed model decodes greedily. With the model in memory: "
                "lm_eval --model hf"
            )
    most = int(found["max_gen_toks"])
    check_least(1, **{f"max_gen_toks of task {name!r}": most})
    return most


class StreamedModel(TemplateLM):  # type: ignore[misc]
    """Answer requests. One sweep scores all log-likelihoods of a call; text is generated greedily.

    Inputs are prepared as by lm_eval's `HFLM`. The tokenizer adds special tokens, unless the text begins with BOS. BOS
    precedes an empty context, whatever `bos` is. Inputs that are too long are truncated on the left. Everything after the
    model is computed in float32 or better.

    `bos` is ``auto`` for the defaults of `HFLM`, ``on`` or ``off`` for its option ``add_bos_token``. `memory`, `cache`
    and `resume` are those of `score` and `answer`; `machine` are other options of `score`.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        tokenizer: Any,
        *,
        progress: Progress,
        bos: Bos = "auto",
        memory: int | None = None,
        cache: Path | None = None,
        resume: Path | None = None,
        **machine: Any,
    ) -> None:
        super().__init__()
        self.skeleton, self.tokenizer, self.bos = skeleton, tokenizer, bos
        self.progress, self._machine = progress, machine
        self._limits: dict[str, Any] = {"memory": memory, "cache": cache}
        self._resume = resume
        self.max_length = skeleton.context or DEFAULT_LENGTH

    @property
    def eot_token_id(self) -> int | None:
        token: int | None = self.tokenizer.eos_token_id
        return token

    @property
    def prefix_token_id(self) -> int:
        """The token before an empty context."""
        first: int | None = self.tokenizer.bos_token_id
        token = self.eot_token_id if first is None else first
        if token is None:
            raise CalibrationError("an empty context needs a bos or eos token, and the tokenizer has neither")
        return token

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **ignored: Any) -> list[int]:
        """Tokenize a text. None adds special tokens as `bos` says, unless the text already begins with one."""
        if add_special_tokens is None:
            first = self.tokenizer.bos_token or self.tokenizer.eos_token
            add_special_tokens = not first or not string.startswith(first)
        return encode(
            self.tokenizer, string, self.bos if add_special_tokens else "off", self.skeleton.checkpoint.directory
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **ignored: Any
    ) -> list[tuple[float, bool]]:
        queries = [self._query(context, continuation) for _, context, continuation in requests]
        return score(self.skeleton, queries, progress=self.progress, **self._limits, **self._machine)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """Compute log-likelihoods of whole texts, in windows of the model's context that predict each token once."""
        owners, queries = [], []
        for number, request in enumerate(requests):
            (text,) = request.args
            for inputs, predicted in get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
            ):
                owners.append(number)
                queries.append(self._query(inputs[: len(inputs) - len(predicted) + 1], predicted))
        totals = [0.0] * len(requests)
        scores = score(self.skeleton, queries, progress=self.progress, **self._limits, **self._machine)
        for number, (value, _) in zip(owners, scores, strict=True):
            totals[number] += value
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Continue prompts greedily until a stop sequence, the end of the text or the most tokens.

        As in `HFLM`, a prompt is truncated on the left to leave room for all tokens of the answer, and the text before the
        first stop sequence is returned.
        """
        ends = end_tokens(self.skeleton.checkpoint.directory, self.tokenizer)
        end = None if self.eot_token_id is None else self.tokenizer.decode(self.eot_token_id)
        questions, stops = [], []
        for prompt, settings in (request.args for request in requests):
            most = check_generation("", settings)
            self.check_room(most)
            until = settings.get("until") or []
            stops.append(handle_stop_sequences([until] if isinstance(until, str) else [*until], eos=end))
            tokens = self.tok_encode(prompt)[-(self.max_length - most) :] or [self.prefix_token_id]
            self._check_tokens(tokens)
            stopping = stop_sequences_criteria(self.tokenizer, stops[-1], 0, 1)

            def complete(answer: Tensor, stopping: Any = stopping) -> bool:
                return int(answer[-1]) in ends or bool(stopping(answer[None], None))

            known = (*stops[-1], *(str(each) for each in sorted(ends)))
            questions.append(Question(tuple(tokens), most, complete, known))
        found = [""] * len(requests)
        for number, tokens in answer(
            self.skeleton, questions, progress=self.progress, resume=self._resume, **self._limits
        ):
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            found[number] = postprocess_generated_text(text, stops[number], None)
        return found

    def check_room(self, most: int) -> None:
        """Raise a ConfigError if the model's context has no room for a prompt beside an answer of `most` tokens."""
        if most >= self.max_length:
            raise ConfigError(
                f"answers have up to {most:,} tokens; the model's context of {self.max_length:,} leaves no room for a prompt"
            )

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Write a conversation as the model's chat template does; without a generation prompt, the last turn is left open."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def _query(self, context: list[int], continuation: list[int]) -> Query:
        """Join context and continuation without the last token, and truncate on the left to the model's limit."""
        whole = (context + continuation)[-(self.max_length + 1) :]
        if not context or not 0 < len(continuation) <= self.max_length:
            raise CalibrationError(
                f"a request has {len(context)} tokens of context and {len(continuation)} to score; neither may be empty, "
                f"and the model's context is {self.max_length}"
            )
        self._check_tokens(whole)
        return Query(tuple(whole[:-1]), tuple(continuation))

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        if max(tokens) >= self.skeleton.vocabulary:
            raise CalibrationError(
                f"a request contains token {max(tokens)}, but the model's vocabulary has {self.skeleton.vocabulary}"
            )
