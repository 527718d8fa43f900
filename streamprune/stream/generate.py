"""Generate text: calibration text with the model itself (Greedy Output Approximation, section 4.1; RESP), answers to tasks.

Streamed batch decoding: each sweep over the blocks produces the next token of every sequence. Keys and values are on
disk between sweeps. If the model fits into memory, its weights, keys and values stay there instead. Positions, masks and
attention are those of transformers.

With prompts, every sequence begins with one. Calibration text has the next prompt where the model ends its answer, so that
sequences need no padding. Tokens that all sequences know, as at the beginning, pass the blocks together. While some still
read their prompts, others already answer.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import NumericalError
from ..maths.refit import accumulator, advice, all_finite
from ..maths.sampling import sample
from ..model.block import Block
from ..model.skeleton import Skeleton
from ..model.upstream import cache_argument
from ..system import files
from ..system.host import host_buffer, tensor_bytes
from ..system.progress import Progress, rest
from . import sweep

SAVE_SECONDS = 30.0
"""Seconds between two saved states."""
PREFIX = "file."
"""Prefix of a state's entries for the files of keys and values: each has its size in bytes and its CRC-32."""


@dataclass(frozen=True)
class Writing:
    """What is to be generated.

    Args:
        length: tokens per sequence; at least 2 and at most the model's context.
        seed: seed of the single generator used for all draws.
        bos: the token that every sequence begins with; None draws it uniformly from the vocabulary. Not for prompts.
        prompts: returns the token ids (n,) int64 of a prompt by its number from 0; those below `samples` must have
            n < length. Sequence i begins with prompt i, and continues after its k-th answer with prompt i + k·samples.
        ends: tokens after which the next prompt follows; unused without prompts.
        temperature: divides the logits; 0 takes the likeliest token.
        complete: returns whether a sequence, by its number, has answered its prompt with these tokens. Each then has one answer,
            and the text is finished with the last of them. None: sequences are as long as `length`.
    """

    samples: int
    length: int
    seed: int
    bos: int | None = None
    prompts: Callable[[int], Tensor] | None = None
    ends: Collection[int] = ()
    temperature: float = 1.0
    complete: Callable[[int, Tensor], bool] | None = None


class Draft:
    """Sequences of which the beginning is known.

    Attributes:
        tokens: (samples, length) int64; zero where nothing is known.
        written: (samples, length) bool: tokens that the model has generated.
        known: (samples,) int64: number of tokens known of each sequence.
        used: (samples,) int64: number of prompts used for each sequence.
        past: number of tokens whose keys and values are stored.
        begins, answered: (samples,) int64: where the first prompt's answer begins, and where it ends once it is complete, else 0.
    """

    def __init__(self, how: Writing, vocabulary: int, state: Mapping[str, Tensor] | None = None) -> None:
        self.how, shape = how, (how.samples, how.length)
        self._generator = torch.Generator().manual_seed(how.seed)
        self.tokens = torch.zeros(shape, dtype=torch.int64)
        self.written = torch.zeros(shape, dtype=torch.bool)
        self.known, self.used = (torch.zeros(how.samples, dtype=torch.int64) for _ in range(2))
        self.past, self.answered = 0, torch.zeros(how.samples, dtype=torch.int64)
        if how.prompts is not None:
            for row in range(how.samples):
                self._ask(row)
        elif how.bos is None:
            self.tokens[:, 0] = torch.randint(vocabulary, (how.samples,), generator=self._generator)
            self.known += 1
        else:
            self.tokens[:, 0] = how.bos
            self.known += 1
        self.begins = self.known.clone()
        if state is not None:
            names = "tokens", "known", "used", "answered"
            self.tokens, self.known, self.used, self.answered = (state[name] for name in names)
            self.written = state["written"].bool()
            self._uniform(int(state["past"]))
            self.past = int(state["past"])

    def state(self) -> dict[str, Tensor]:
        found = {name: getattr(self, name) for name in ("tokens", "known", "used")}
        return {**found, "written": self.written.long(), "answered": self.answered, "past": torch.tensor(self.past)}

    @property
    def finished(self) -> bool:
        """Whether nothing that counts is missing."""
        return self.past >= self.how.length - 1 or (self.how.complete is not None and bool(self.answered.all()))

    def answer(self, row: int) -> list[int]:
        """Return the tokens that answer a sequence's first prompt; see `Writing.complete`."""
        found: list[int] = self.tokens[row, self.begins[row] : self.answered[row]].tolist()
        return found

    def next(self, most: int) -> int:
        """Return the end of the tokens to process next: at most `most`, known of all sequences, and not the last one."""
        return min(int(self.known.min()), self.past + most, self.how.length - 1)

    def go_on(self, end: int, draw: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Take over that tokens before `end` are processed, and add the token there to sequences that do not know it.

        Args:
            draw: returns tokens (rows,), given the rows and a uniform number for each, (rows,) float64.
        """
        uniform = self._uniform(end - self.past)
        self.past = end
        rows = (self.known == end).nonzero()[:, 0]
        if not len(rows):
            return
        drawn = draw(rows, uniform[rows])
        self.tokens[rows, end], self.written[rows, end] = drawn, True
        self.known[rows] += 1
        for row, token in zip(rows.tolist(), drawn.tolist(), strict=True):
            if self.how.complete is not None:
                answer = self.tokens[row, self.begins[row] : end + 1]
                if not self.answered[row] and self.how.complete(row, answer):
                    self.answered[row] = end + 1
            elif self.how.prompts is not None and token in self.how.ends:
                self._ask(row)

    def _ask(self, row: int) -> None:
        """Add the next prompt to a sequence, cut off at its end."""
        assert self.how.prompts is not None
        begin, number = int(self.known[row]), row + int(self.used[row]) * self.how.samples
        prompt = self.how.prompts(number)[: self.how.length - begin]
        self.tokens[row, begin : begin + len(prompt)] = prompt
        self.known[row] += len(prompt)
        self.used[row] += 1

    def _uniform(self, tokens: int) -> Tensor:
        """Draw the uniform numbers of the next `tokens` tokens; return those of the last one, (samples,) float64."""
        found = torch.empty(0)
        for _ in range(tokens):
            found = torch.rand(self.how.samples, generator=self._generator, dtype=torch.float64)
        return found


@torch.no_grad()
def generate(
    skeleton: Skeleton,
    how: Writing,
    folder: Path,
    batch: int,
    progress: Progress,
    *,
    chunk: int = 1,
    state: Mapping[str, Tensor] | None = None,
    save: Callable[[dict[str, Tensor]], None] | None = None,
) -> Draft:
    """Generate sequences: tokens from the model's softmax, after a prompt, BOS or a token drawn uniformly.

    Args:
        folder: holds keys and values, used by nothing else. It stays, since the last state refers to it.
        batch: sequences per micro-batch of one block.
        chunk: most tokens of a sequence that pass the blocks together.
        state: the state last passed to `save`, to resume from there; see `intact`.
        save: called with the state every `SAVE_SECONDS`, once the files that it refers to are durable.

    Raises:
        NumericalError: a block or the head produces NaN or Inf.
    """
    draft, sums = Draft(how, skeleton.vocabulary, state), restore(folder, state)
    batches = [slice(start, min(start + batch, how.samples)) for start in range(0, how.samples, batch)]
    part = Part(draft, [(rows, KeysAndValues(folder, number, sums)) for number, rows in enumerate(batches)])
    weights = streamed(skeleton)
    progress.phase("generate", how.length, draft.past + bool(draft.past))
    if not draft.past:
        progress.step("first tokens")
    saved = time.monotonic()
    while not draft.finished:
        past = draft.past
        advance(skeleton, weights, [part], chunk)
        for number in range(past + 1, draft.past + 1):
            progress.step(f"token {number}")
        if save is not None and (progress.stopping() or time.monotonic() - saved >= SAVE_SECONDS):
            save({**draft.state(), **durable(folder, sums)})
            saved = time.monotonic()
        rest(progress)
    return draft


@dataclass(frozen=True)
class Part:
    """Sequences that pass the blocks together: a draft, and the keys and values of each of its micro-batches."""

    draft: Draft
    batches: Sequence[tuple[slice, Any]]
    """Sequences, and their cache: `KeysAndValues` or transformers' `DynamicCache`."""


@dataclass(frozen=True)
class Weights:
    """Where a sweep finds a model's weights: each returns what the skeleton's function or `sweep.blocks` returns."""

    embedding: Callable[[], AbstractContextManager[Callable[..., Tensor]]]
    blocks: Callable[[], Iterable[tuple[int, Block]]]
    head: Callable[[], AbstractContextManager[Callable[[Tensor], Tensor]]]


def streamed(skeleton: Skeleton) -> Weights:
    """Read the weights anew for each sweep, one block at a time."""
    return Weights(skeleton.embedding, partial(sweep.blocks, skeleton, range(len(skeleton))), skeleton.head)


@contextmanager
def in_memory(skeleton: Skeleton) -> Iterator[Weights]:
    """Keep all weights on the device inside the context."""
    with skeleton.embedding() as embedding, skeleton.head() as head:
        held = [(index, block.release()) for index, block in sweep.blocks(skeleton, range(len(skeleton)))]
        yield Weights(lambda: nullcontext(embedding), lambda: held, lambda: nullcontext(head))


@torch.no_grad()
def advance(skeleton: Skeleton, weights: Weights, parts: Sequence[Part], chunk: int) -> None:
    """Process the next tokens of all parts in one sweep, each from its own position; add one to sequences that know no more.

    Args:
        chunk: most tokens of a sequence that pass the blocks together.

    Raises:
        NumericalError: a block or the head produces NaN or Inf.
    """
    ends = [part.draft.next(chunk) for part in parts]
    with weights.embedding() as embedding:
        hidden = [
            embedding(part.draft.tokens[:, part.draft.past : end].to(skeleton.device), part.draft.past)
            for part, end in zip(parts, ends, strict=True)
        ]
    batches = [
        (x, rows, cache, skeleton.arguments(rows.stop - rows.start, x.shape[1], part.draft.past))
        for part, x in zip(parts, hidden, strict=True)
        for rows, cache in part.batches
    ]
    for index, block in weights.blocks():
        name = cache_argument(type(skeleton.block(index)).forward)
        for x, rows, cache, arguments in batches:
            x[rows] = block(x[rows], {**arguments[index], name: cache})
        del block
        if not all(all_finite(x) for x in hidden):
            raise NumericalError(f"block {index} gives NaN or Inf{advice(skeleton.dtype)}")
    with weights.head() as head:
        for part, end, x in zip(parts, ends, hidden, strict=True):
            temperature = part.draft.how.temperature

            def draw(rows: Tensor, uniform: Tensor, x: Tensor = x, temperature: float = temperature) -> Tensor:
                return _next_tokens(head, x[rows.to(x.device), -1], uniform, temperature, skeleton.vocabulary)

            part.draft.go_on(end, draw)


def _stored(state: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Return the size in bytes and CRC-32 of each file of keys and values, by name."""
    found = {name: value.tolist() for name, value in state.items() if name.startswith(PREFIX)}
    return {name.removeprefix(PREFIX): (size, check) for name, (size, check) in found.items()}


def restore(folder: Path, state: Mapping[str, Tensor] | None) -> dict[str, tuple[int, int]]:
    """Return a folder's files of keys and values to a state, by default to none; return `KeysAndValues.sums`."""
    if state is None:
        files.remove_tree(folder)
        files.make_folder(folder)
    sums = _stored(state or {})
    for name, (size, _) in sums.items():
        files.truncate(folder / name, size)
    return sums


def durable(folder: Path, sums: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
    """Make the files of keys and values durable; return the entries of a state for them."""
    for name in sums:
        files.sync(folder / name)
    files.sync(folder)
    return {f"{PREFIX}{name}": torch.tensor(each) for name, each in sums.items()}


def intact(folder: Path, state: Mapping[str, Tensor]) -> bool:
    """Whether the keys and values that a state refers to are in the folder. What was added to them later is ignored."""
    for name, (size, check) in _stored(state).items():
        found, done, piece = 0, 0, memoryview(bytearray(min(size, 1 << 20)))
        while done < size and (folder / name).is_file():
            count = files.read_into(folder / name, done, piece[: size - done])
            if not count:
                break
            found, done = zlib.crc32(piece[:count], found), done + count
        if (done, found) != (size, check):
            return False
    return True


class KeysAndValues:
    """Keys and values of one micro-batch, appended to one file per block: the part of a cache that attention uses.

    `sums` has the size in bytes and the CRC-32 of each file, by name.
    """

    def __init__(self, folder: Path, number: int, sums: dict[str, tuple[int, int]]) -> None:
        self.folder, self.number, self.sums = folder, number, sums

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *others: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Append tokens (sequences, heads, tokens, head_dim); return all tokens (sequences, heads, tokens, head_dim).

        Keys and values may differ in head_dim. Further arguments differ between releases of transformers and serve other kinds of
        cache.
        """
        new = torch.cat((key_states, value_states), dim=-1).permute(2, 0, 1, 3)
        path, data = self.folder / f"{layer_idx:04}-{self.number}", tensor_bytes(new.contiguous().cpu())
        files.append(path, data)
        size, check = self.sums.get(path.name, (0, 0))
        size += len(data)
        self.sums[path.name] = size, zlib.crc32(data, check)
        buffer = host_buffer(size, new.device)
        files.read_into(path, 0, buffer.numpy().data)
        tokens = buffer.to(new.device, non_blocking=True).view(new.dtype).view(-1, *new.shape[1:])
        k, v = torch.split(tokens.permute(1, 2, 0, 3), [key_states.shape[-1], value_states.shape[-1]], dim=-1)
        return k, v


def _next_tokens(
    head: Callable[[Tensor], Tensor], hidden: Tensor, uniform: Tensor, temperature: float, vocabulary: int
) -> Tensor:
    """Draw one token per sequence from the last block's output (rows, d): (rows,). Chunks bound the logits."""
    chunk = max(1, sweep.LOGIT_BYTES // (4 * vocabulary))
    found = []
    for start in range(0, len(hidden), chunk):
        rows = slice(start, start + chunk)
        logits = head(hidden[rows]).cpu()
        if temperature == 0 and all_finite(logits.amax(-1)):
            found.append(logits.argmax(-1))
            continue
        if temperature not in (0, 1):
            logits = logits.to(accumulator(logits.dtype)) / temperature
        found.append(sample(logits, uniform[rows]))  # which refuses logits that are not finite
    return torch.cat(found)
