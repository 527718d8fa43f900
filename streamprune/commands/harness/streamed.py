"""Implement the model interface of lm-evaluation-harness for a streamed model. Needs `lm_eval` to be installed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows

from ...errors import CalibrationError, ConfigError
from ...model.skeleton import Skeleton
from ...model.tokenizer import Bos, encode
from ...system.progress import Progress
from ...text.windows import DEFAULT_LENGTH
from .scoring import Query, score


class StreamedModel(TemplateLM):  # type: ignore[misc]
    """Answer log-likelihood requests. One sweep scores all requests of a call.

    Inputs are prepared as by lm_eval's `HFLM`. The tokenizer adds special tokens, unless the text begins with BOS. BOS
    precedes an empty context, whatever `bos` is. Inputs that are too long are truncated on the left. Everything after the
    model is computed in float32 or better.

    `bos` is ``auto`` for the defaults of `HFLM`, ``on`` or ``off`` for its option ``add_bos_token``. `machine` are other
    options of `score`.
    """

    def __init__(
        self, skeleton: Skeleton, tokenizer: Any, *, progress: Progress, bos: Bos = "auto", **machine: Any
    ) -> None:
        super().__init__()
        self.skeleton, self.tokenizer, self.bos = skeleton, tokenizer, bos
        self.progress, self._machine = progress, machine
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
        return score(self.skeleton, queries, progress=self.progress, **self._machine)

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
        scores = score(self.skeleton, queries, progress=self.progress, **self._machine)
        for number, (value, _) in zip(owners, scores, strict=True):
            totals[number] += value
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Reject generation, which `find_tasks` rejects earlier: every token would need a sweep over all blocks."""
        raise ConfigError("a streamed model only scores given text; with the model in memory: lm_eval --model hf")

    def _query(self, context: list[int], continuation: list[int]) -> Query:
        """Join context and continuation without the last token, and truncate on the left to the model's limit."""
        whole = (context + continuation)[-(self.max_length + 1) :]
        if not context or not 0 < len(continuation) <= self.max_length:
            raise CalibrationError(
                f"a request has {len(context)} tokens of context and {len(continuation)} to score; neither may be empty, "
                f"and the model's context is {self.max_length}"
            )
        if max(whole) >= self.skeleton.vocabulary:
            raise CalibrationError(
                f"a request contains token {max(whole)}, but the model's vocabulary has {self.skeleton.vocabulary}"
            )
        return Query(tuple(whole[:-1]), tuple(continuation))
