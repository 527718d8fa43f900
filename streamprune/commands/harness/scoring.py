"""Compute log-likelihoods of given tokens: one sweep over the blocks for any number of sequences of any lengths."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...errors import NumericalError
from ...jobs.forecast.needs import Needs
from ...jobs.forecast.resources import forecast
from ...maths.refit import accumulator, advice
from ...model.skeleton import Skeleton
from ...stream import sweep
from ...stream.store import ActivationStore
from ...system import files, machine
from ...system.progress import Progress, rest

OCTAVE = 8
"""Number of padded lengths between one power of two and the next. Padding adds at most an eighth of the tokens."""


@dataclass(frozen=True)
class Query:
    """Tokens to score."""

    inputs: tuple[int, ...]
    """Token ids that the model reads."""
    targets: tuple[int, ...]
    """Token ids that the last positions should predict: at least one, at most as many as there are inputs."""


@dataclass(frozen=True)
class Score:
    """Result of a query."""

    loglikelihood: float
    """Log-likelihood of all targets together, in nats."""
    greedy: bool
    """Whether each target is the model's most likely token."""


@dataclass(frozen=True)
class Bucket:
    """Sequences of similar length, padded on the right; a causal model does not attend to the padding."""

    tokens: Tensor
    """(sequences, length) int64."""
    store: ActivationStore
    batch: int
    """Sequences per micro-batch."""


def padded(length: int, context: int | None) -> int:
    """Return the length to which a sequence is padded, within the model's context."""
    step = max(1, (1 << (length - 1).bit_length()) // (2 * OCTAVE))
    full = -(-length // step) * step
    return full if context is None else max(length, min(full, context))


def score(
    skeleton: Skeleton,
    queries: Sequence[Query],
    *,
    memory: int | None = None,
    cache: Path | None = None,
    activations: str | None = None,
    memory_host: int | None = None,
    progress: Progress,
) -> list[Score]:
    """Score all queries; return scores in the same order. Queries with equal inputs are computed once.

    Args:
        memory: bytes that the device may use; None allows all free memory.
        cache: folder for activations during the run; None takes the system's temporary folder.
        activations, memory_host: as in `evaluate`.

    Raises:
        ResourceError: there is too little memory or disk.
        NumericalError: the computation produces NaN or Inf.
        Stopped: `progress` asked to stop. Nothing is kept.
    """
    if not queries:
        return []
    places, groups = _grouped(queries, skeleton.context)
    longest = max(groups)
    stored = None
    if activations is not None:
        stored = machine.resolve_activations(activations, skeleton.dtype, skeleton.checkpoint.dtype)
    parent, held = cache or Path(tempfile.gettempdir()), memory_host or 0
    tokens_in_all = sum(length * len(rows) for length, rows in groups.items())
    resources = forecast(
        skeleton,
        Needs(
            samples=-(-tokens_in_all // longest),
            length=longest,
            text=True,
            prunes=False,
            scores=True,
            activations=stored,
        ),
        **machine.memory_limits(skeleton.device, memory, held),
        disk_limit=files.free_bytes(parent),
    ).require()
    skeleton.copies_ahead = resources.copies_ahead
    if cache is not None:
        files.make_folder(cache)
    with machine.limit_memory(skeleton.device, memory), files.scratch(parent, "streamprune-score-") as folder:
        buckets = {}
        for length, rows in groups.items():
            tokens = torch.zeros(len(rows), length, dtype=torch.int64)
            for row, inputs in enumerate(rows):
                tokens[row, : len(inputs)] = torch.tensor(inputs)
            shape = (len(rows), length, skeleton.width)
            store = ActivationStore(
                folder / str(length),
                shape,
                skeleton.dtype,
                skeleton.device,
                durable=False,
                stored=stored,
                memory=held * length * len(rows) // tokens_in_all,
            )
            # As many tokens per micro-batch as for the longest sequences, which the forecast assumes.
            buckets[length] = Bucket(tokens, store, max(1, resources.batch * longest // length))
        _sweep(skeleton, list(buckets.values()), progress)
        scores = _scores(skeleton, queries, places, buckets)
        progress.step("head")
    return scores


def _grouped(
    queries: Sequence[Query], context: int | None
) -> tuple[list[tuple[int, int]], dict[int, list[tuple[int, ...]]]]:
    """Return the (padded length, row) of every query, and the distinct inputs by padded length."""
    known: dict[tuple[int, ...], tuple[int, int]] = {}
    groups: dict[int, list[tuple[int, ...]]] = {}
    for query in queries:
        if query.inputs not in known:
            rows = groups.setdefault(padded(len(query.inputs), context), [])
            known[query.inputs] = padded(len(query.inputs), context), len(rows)
            rows.append(query.inputs)
    return [known[query.inputs] for query in queries], groups


def _sweep(skeleton: Skeleton, buckets: list[Bucket], progress: Progress) -> None:
    """Run all buckets through the model, from their tokens to the last block's output."""
    progress.phase("score", len(skeleton) + 2)
    with skeleton.embedding() as embedding:
        for bucket in buckets:
            with bucket.store.writing(sweep.boundary("dense", 0), "the embedding") as write:
                for batch in bucket.store.batches(bucket.batch):
                    write(embedding(bucket.tokens[batch].to(skeleton.device)))
    progress.step("embedding")
    for index, block in sweep.blocks(skeleton, range(len(skeleton))):
        for bucket in buckets:
            sweep.advance(skeleton, block, index, bucket.store, "dense", bucket.batch)
            bucket.store.remove(sweep.boundary("dense", index))
        del block
        progress.step(f"block {index}")
        rest(progress)


@torch.no_grad()
def _scores(
    skeleton: Skeleton, queries: Sequence[Query], places: list[tuple[int, int]], buckets: dict[int, Bucket]
) -> list[Score]:
    """Compute the scores from the last block's output, in chunks of targets that bound the logits' memory."""
    asked: dict[tuple[int, int], list[int]] = {}
    for number, place in enumerate(places):
        asked.setdefault(place, []).append(number)
    total = torch.zeros(len(queries), dtype=torch.float64)
    missed = torch.zeros(len(queries), dtype=torch.int64)
    chunk = max(1, sweep.LOGIT_BYTES // (4 * skeleton.vocabulary))
    with skeleton.head() as head:
        for length, bucket in buckets.items():
            for batch, (hidden,) in bucket.store.each(bucket.batch, sweep.boundary("dense", len(skeleton))):
                wanted = [
                    (row - batch.start, position, target, number)
                    for row in range(batch.start, batch.stop)
                    for number in asked[length, row]
                    for position, target in _predictions(queries[number])
                ]
                for start in range(0, len(wanted), chunk):
                    rows, positions, targets, numbers = torch.tensor(wanted[start : start + chunk]).unbind(1)
                    logits = head(hidden[rows.to(hidden.device), positions.to(hidden.device)])
                    likely = torch.log_softmax(logits, -1, dtype=accumulator(logits.dtype))
                    first = likely.argmax(-1).cpu()
                    found = likely.gather(1, targets.to(likely.device).unsqueeze(1)).squeeze(1)
                    total.index_add_(0, numbers, found.double().cpu())
                    missed.index_add_(0, numbers, (first != targets).long())
    if not bool(torch.isfinite(total).all()):
        raise NumericalError(f"the head gives NaN or Inf{advice(skeleton.dtype)}")
    return [Score(value, not misses) for value, misses in zip(total.tolist(), missed.tolist(), strict=True)]


def _predictions(query: Query) -> list[tuple[int, int]]:
    """Return pairs of a position among the inputs and the token that it should predict."""
    first = len(query.inputs) - len(query.targets)
    return [(first + offset, target) for offset, target in enumerate(query.targets)]
