"""Generate greedy answers to prompts of any lengths, streamed or, if the model fits, in memory."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict, astuple, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ...errors import ConfigError, DamageError, ResourceError
from ...jobs.forecast.memory import SLACK
from ...jobs.forecast.resources import Answering, answering, answering_bytes
from ...jobs.journal import Journal, as_written
from ...model.checkpoint import load_shard, write_shard
from ...model.proof import prove
from ...model.skeleton import Skeleton
from ...stream import generate
from ...stream.generate import Draft, KeysAndValues, Part, Weights, Writing
from ...system import files, machine
from ...system.progress import Progress, rest
from ...system.units import format_bytes

SPREAD = 16
"""Most tokens by which prompts of one micro-batch differ in length: each takes a sweep in which some sequences only read."""

KEPT = "answers.jsonl"
"""Journal of kept answers."""
STATE = ".safetensors"
"""End of the name of a saved state's file, which begins with its step in the journal."""
REMEDY = "give --resume another folder"
"""What to do about a journal that is damaged."""


@dataclass(frozen=True)
class Question:
    """A prompt to continue."""

    prompt: tuple[int, ...]
    """Token ids: at least one."""
    most: int
    """Most tokens of the answer, at least 1; together with the prompt at most the model's context."""
    complete: Callable[[Tensor], bool]
    """Whether the token ids (n,) int64 complete the answer before `most`."""
    stops: tuple[str, ...] = ()
    """What `complete` looks for, to recognise the question."""


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
    resume: Path | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """Yield the number and the answer's token ids of each question, in any order: those that greedy decoding gives.

    Args:
        memory: bytes that the device may use; None allows all free memory.
        cache: folder for keys and values of a streamed model; None takes the system's temporary folder.
        resume: folder in which answers are kept, and the state of a streamed model, instead of `cache`. A later call with the same
            model and questions resumes there, with the micro-batches of the first.

    Raises:
        ConfigError: see `check_answers`; `resume` has answers to other questions, or of another model.
        ResourceError: there is too little memory or disk. A resumed call checks memory only, for what the first call chose.
        ResumeError: another process uses `resume`, or its journal is damaged.
        NumericalError: the computation produces NaN or Inf.
        Stopped: `progress` asked to stop.
    """
    if not questions:
        return
    check_answers(skeleton)
    prove(skeleton)
    parent = resume or cache or Path(tempfile.gettempdir())
    files.make_folder(parent)
    with ExitStack() as stack:
        kept = how = None
        if resume is None:
            folder = stack.enter_context(files.scratch(parent, "streamprune-eval-"))
        else:
            folder = resume
            _check_folder(folder)
            stack.enter_context(files.locked(resume / files.LOCKED))
            kept = Journal(resume / KEPT, remedy=REMEDY)
            how = _agreed(kept, skeleton, questions)
        longest = max(len(each.prompt) + each.most for each in questions)
        limits, resumed = machine.memory_limits(skeleton.device, memory), how is not None
        if how is None:
            how = answering(skeleton, len(questions), longest, **limits, disk_limit=files.free_bytes(parent))
            if kept is not None:
                kept.append("answers", job=_job(skeleton, questions), how=asdict(how))
        waves = [*_waves(questions, how)]
        earlier = {} if kept is None else _earlier(kept, waves, skeleton.vocabulary)
        if kept is not None:
            _clear(folder, _last_state(kept, earlier))
        if resumed and len(earlier) < len(waves):
            _check_memory(skeleton, folder, answering_bytes(skeleton, how, longest), limits)
        progress.phase("answer", len(questions))
        for number, found in earlier.items():
            for _ in found:
                progress.step("answered earlier")
            yield from zip(chain.from_iterable(waves[number]), found, strict=True)
        if len(earlier) == len(waves):
            return
        stack.enter_context(machine.limit_memory(skeleton.device, memory))
        weights = stack.enter_context(
            generate.in_memory(skeleton) if how.in_memory else nullcontext(generate.streamed(skeleton))
        )
        for number, wave in enumerate(waves):
            if number in earlier:
                continue
            run = _Wave(skeleton, questions, wave, how, folder, None if kept is None else (kept, number))
            found = run.answers(weights, progress)
            if kept is not None:
                kept.append(f"wave-{number}", answers=found)
                _clear(folder)
            yield from zip(chain.from_iterable(wave), found, strict=True)


def _check_folder(folder: Path) -> None:
    """Raise a ConfigError if a folder has files, but none of an earlier call."""
    found = {path.name for path in folder.iterdir()} - {files.LOCKED}
    if found and KEPT not in found:
        raise ConfigError(f"resume is {folder}, which contains {min(found)} and no answers; give a new folder")


def _job(skeleton: Skeleton, questions: Sequence[Question]) -> dict[str, Any]:
    """Return what must be unchanged on resume, in JSON values."""
    asked = hashlib.sha256(json.dumps([(each.prompt, each.most, each.stops) for each in questions]).encode())
    job = {
        "model": skeleton.checkpoint.identity(),
        "device": skeleton.device.type,
        "dtype": machine.dtype_name(skeleton.dtype),
        "questions": asked.hexdigest(),
    }
    return dict(json.loads(json.dumps(job)))


def _agreed(kept: Journal, skeleton: Skeleton, questions: Sequence[Question]) -> Answering | None:
    """Return how an earlier call generates the answers; None if there was none. Raises a ConfigError if that was another job."""
    if kept.header is None:
        return None
    with as_written(str(kept.path), REMEDY):
        for name, value in _job(skeleton, questions).items():
            if kept.header["job"][name] != value:
                raise ConfigError(
                    f"{kept.path.parent} has answers of another evaluation ({name} differs); resume elsewhere"
                )
        how = Answering(**kept.header["how"])
        in_memory, *sizes = astuple(how)
        if type(in_memory) is not bool or not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError(f"how is {kept.header['how']}")
    return how


def _earlier(kept: Journal, waves: Sequence[Sequence[Sequence[int]]], vocabulary: int) -> dict[int, list[list[int]]]:
    """Return the answers that earlier calls have finished, by wave. Raises a ResumeError if they are not token ids of all its prompts."""
    found: dict[int, list[list[int]]] = {}
    with as_written(str(kept.path), REMEDY):
        for number, wave in enumerate(waves):
            if (line := kept.find(f"wave-{number}")) is not None:
                found[number] = line["answers"]
                tokens = [token for each in found[number] for token in each]
                if len(found[number]) != sum(map(len, wave)) or not all(
                    type(token) is int and 0 <= token < vocabulary for token in tokens
                ):
                    raise ValueError(f"the answers of wave-{number}")
    return found


def _last_state(kept: Journal, earlier: Collection[int]) -> str | None:
    """Return the step of the last state; None if there is none, or its wave has been answered since."""
    for line in [*kept.steps("state-")][-1:]:
        with as_written(str(kept.path), REMEDY):
            if int(line["step"].split("-")[1]) not in earlier and line["sha256"]:
                return str(line["step"])
    return None


def _check_memory(skeleton: Skeleton, folder: Path, needed: int, limits: Mapping[str, int]) -> None:
    """Raise a ResourceError if an earlier call's micro-batches, which fix the order of sums, cannot fit into memory now."""
    needed += limits["base"] if skeleton.device.type == "cpu" else 0
    if limits["device_limit"] * SLACK < needed:
        raise ResourceError(
            f"{folder} was begun with micro-batches that need {format_bytes(needed)} of memory; "
            f"{format_bytes(limits['device_limit'])} may be used now: free memory, raise --memory or resume elsewhere"
        )


def _clear(folder: Path, but: str | None = None) -> None:
    """Remove the states, all or all but one, and with the last one the keys and values. A kill may have left any of them."""
    for path in folder.glob(f"state-*{STATE}*"):  # with temporary files
        if path.name != f"{but}{STATE}":
            files.remove(path)
    if but is None:
        files.remove_tree(folder / "answers")


class _Wave:
    """Questions that are answered at a time: one draft per micro-batch. `kept` is the journal, and the wave's number in it."""

    def __init__(
        self,
        skeleton: Skeleton,
        questions: Sequence[Question],
        wave: Sequence[Sequence[int]],
        how: Answering,
        folder: Path,
        kept: tuple[Journal, int] | None,
    ) -> None:
        self.skeleton, self.how, self.folder, self.kept = skeleton, how, folder, kept
        self.place = folder / "answers"
        state = self._last()
        self._sums = {} if how.in_memory else generate.restore(self.place, state)
        self.drafts, parts = [], []
        for number, numbers in enumerate(wave):
            own = {
                name.partition(":")[2]: each for name, each in (state or {}).items() if name.startswith(f"{number}:")
            }
            self.drafts.append(_draft(skeleton, questions, numbers, own or None))
            cache = DynamicCache() if how.in_memory else KeysAndValues(self.place, number, self._sums)
            parts.append(Part(self.drafts[-1], [(slice(0, len(numbers)), cache)]))
        self._parts = parts

    def answers(self, weights: Weights, progress: Progress) -> list[list[int]]:
        """Return the answers of all micro-batches in their order."""
        done, saved = 0, time.monotonic()
        while True:
            now = sum(int((draft.answered > 0).sum()) for draft in self.drafts)
            for _ in range(now - done):
                progress.step()
            done = now
            if not (parts := [part for part in self._parts if not part.draft.finished]):
                break
            generate.advance(self.skeleton, weights, parts, self.how.chunk)
            if progress.stopping() or time.monotonic() - saved >= generate.SAVE_SECONDS:
                self._save()
                saved = time.monotonic()
            rest(progress)
        return [draft.answer(row) for draft in self.drafts for row in range(draft.how.samples)]

    def _save(self) -> None:
        """Keep the state, if answers are kept and the model is streamed."""
        if self.kept is None or self.how.in_memory:
            return
        journal, wave = self.kept
        drafts = {f"{n}:{name}": each for n, draft in enumerate(self.drafts) for name, each in draft.state().items()}
        step = f"state-{wave}-{sum(draft.past for draft in self.drafts)}"
        state = {**drafts, **generate.durable(self.place, self._sums)}
        journal.append(step, sha256=write_shard(self.folder / f"{step}{STATE}", state))
        _clear(self.folder, step)

    def _last(self) -> dict[str, Tensor] | None:
        """Return the last state that was saved; None if there is none, or its files are not intact."""
        if self.kept is None:
            return None
        journal, wave = self.kept
        for line in [*journal.steps(f"state-{wave}-")][-1:]:
            with suppress(DamageError):
                state = load_shard(self.folder / f"{line['step']}{STATE}", line["sha256"])
                return state if generate.intact(self.place, state) else None
        return None


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


def _draft(
    skeleton: Skeleton, questions: Sequence[Question], numbers: Sequence[int], state: Mapping[str, Tensor] | None
) -> Draft:
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
    return Draft(how, skeleton.vocabulary, state)
