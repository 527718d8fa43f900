"""Generate greedy answers to prompts of any lengths, streamed or, if the model fits, in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache

from ...errors import ConfigError
from ...jobs.forecast.resources import Answering, answering
from ...model.proof import prove
from ...model.skeleton import Skeleton
from ...stream import generate
from ...stream.generate import Draft, KeysAndValues, Part, Writing
from ...system import files, machine
from ...system.progress import Progress, rest

SPREAD = 16
"""Most tokens by which prompts of one micro-batch differ in length: each takes a sweep in which some sequences only read."""


@dataclass(frozen=True)
class Question:
    """A prompt to continue."""

    prompt: tuple[int, ...]
    """Token ids: at least one."""
    most: int
    """Most tokens of the answer, at least 1; together with the prompt at most the model's context."""
    complete: Callable[[Tensor], bool]
    """Whether the token ids (n,) int64 complete the answer before `most`."""


def check_answers(skeleton: Skeleton) -> None:
    """Raise a ConfigError if the model cannot generate text here."""
    if module := skeleton.stateful:
        raise ConfigError(
            f"{module} may keep more than its own keys and values, with which text is generated; with the model in memory: "
            "lm_eval --model hf"
        )


def answer(
    skeleton: Skeleton,
    questions: Sequence[Question],
    *,
    progress: Progress,
    memory: int | None = None,
    cache: Path | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """Yield the number and the answer's token ids of each question, in any order: those that greedy decoding gives.

    Args:
        memory: bytes that the device may use; None allows all free memory.
        cache: folder for keys and values of a streamed model; None takes the system's temporary folder.

    Raises:
        ConfigError: see `check_answers`.
        ResourceError: there is too little memory or disk.
        NumericalError: the computation produces NaN or Inf.
        Stopped: `progress` asked to stop.
    """
    if not questions:
        return
    check_answers(skeleton)
    prove(skeleton)
    parent = cache or Path(tempfile.gettempdir())
    files.make_folder(parent)
    how = answering(
        skeleton,
        len(questions),
        max(len(each.prompt) + each.most for each in questions),
        **machine.memory_limits(skeleton.device, memory),
        disk_limit=files.free_bytes(parent),
    )
    progress.phase("answer", len(questions))
    with (
        machine.limit_memory(skeleton.device, memory),
        files.scratch(parent, "streamprune-eval-") as folder,
        generate.in_memory(skeleton) if how.in_memory else nullcontext(generate.streamed(skeleton)) as weights,
    ):
        for wave in _waves(questions, how):
            place, drafts = folder / "answers", [_draft(skeleton, questions, numbers) for numbers in wave]
            files.make_folder(place)
            parts = []
            for number, (draft, numbers) in enumerate(zip(drafts, wave, strict=True)):
                kept = DynamicCache() if how.in_memory else KeysAndValues(place, number, {})
                parts.append(Part(draft, [(slice(0, len(numbers)), kept)]))
            while parts:
                before = [int((part.draft.answered > 0).sum()) for part in parts]
                generate.advance(skeleton, weights, parts, how.chunk)
                for part, done in zip(parts, before, strict=True):
                    for _ in range(int((part.draft.answered > 0).sum()) - done):
                        progress.step()
                parts = [part for part in parts if not part.draft.finished]
                rest(progress)
            files.remove_tree(place)
            for draft, numbers in zip(drafts, wave, strict=True):
                yield from ((number, draft.answer(row)) for row, number in enumerate(numbers))


def _waves(questions: Sequence[Question], how: Answering) -> Iterator[list[list[int]]]:
    """Yield the questions that are answered at a time, by micro-batch: their numbers, in the order of the prompts' lengths."""
    wave: list[list[int]] = []
    for number in sorted(range(len(questions)), key=lambda number: len(questions[number].prompt)):
        if sum(map(len, wave)) == how.samples:
            yield wave
            wave = []
        shortest = len(questions[wave[-1][0]].prompt) if wave else 0
        if not wave or len(wave[-1]) == how.batch or len(questions[number].prompt) > shortest + SPREAD:
            if wave and how.in_memory:  # one micro-batch at a time
                yield wave
                wave = []
            wave.append([])
        wave[-1].append(number)
    yield wave


def _draft(skeleton: Skeleton, questions: Sequence[Question], numbers: Sequence[int]) -> Draft:
    asked = [questions[number] for number in numbers]

    def complete(row: int, tokens: Tensor) -> bool:
        return len(tokens) >= asked[row].most or asked[row].complete(tokens)

    how = Writing(
        samples=len(asked),
        length=max(len(each.prompt) + each.most for each in asked),
        seed=0,
        prompts=lambda row: torch.tensor(asked[row].prompt),
        complete=complete,
        temperature=0.0,
    )
    return Draft(how, skeleton.vocabulary)
