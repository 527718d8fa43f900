"""Compute log-likelihoods of given tokens: one sweep over the blocks for any number of sequences of any lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import NumericalError
from ...maths.refit import accumulator, advice
from ...model.skeleton import Skeleton
from ...stream import sweep
from ...system.progress import Progress
from ..evaluate import Bucket, through_blocks

OCTAVE = 8
"""Number of padded lengths between one power of two and the next. Padding adds at most an eighth of the tokens."""


@dataclass(frozen=True)
class Query:
    """Tokens to score."""

    inputs: tuple[int, ...]
    """Token ids that the model reads."""
    targets: tuple[int, ...]
    """Token ids that the last positions should predict: at least one, at most as many as there are inputs."""


def padded(length: int, context: int | None) -> int:
    """Return the length to which a sequence is padded, within the model's context."""
    step = max(1, (1 << (length - 1).bit_length()) // (2 * OCTAVE))
    full = -(-length // step) * step
    return full if context is None else max(length, min(full, context))


def score(
    skeleton: Skeleton, queries: Sequence[Query], *, progress: Progress, **machine: Any
) -> list[tuple[float, bool]]:
    """Score all queries. Queries with equal inputs are computed once.

    Args:
        machine: other options of `through_blocks`.

    Returns:
        Per query, the log-likelihood of all targets together in nats, and whether each target is the model's most
        likely token.

    Raises:
        ConfigError, ResourceError, NumericalError, Stopped: as in `evaluate`.
    """
    if not queries:
        return []
    groups = grouped(queries, skeleton.context)
    # A causal model does not attend to padding on the right.
    tokens = [
        torch.tensor([inputs + (0,) * (length - len(inputs)) for inputs in rows]) for length, rows in groups.items()
    ]
    with through_blocks(skeleton, tokens, "score", progress, **machine) as buckets:
        scores = _scores(skeleton, queries, buckets, [list(rows.values()) for rows in groups.values()])
        progress.step("head")
    return scores


def grouped(queries: Sequence[Query], context: int | None) -> dict[int, dict[tuple[int, ...], list[int]]]:
    """Return, by padded length, the distinct inputs, each with the numbers of its queries."""
    groups: dict[int, dict[tuple[int, ...], list[int]]] = {}
    for number, query in enumerate(queries):
        group = groups.setdefault(padded(len(query.inputs), context), {})
        group.setdefault(query.inputs, []).append(number)
    return groups


@torch.no_grad()
def _scores(
    skeleton: Skeleton, queries: Sequence[Query], buckets: Sequence[Bucket], asked: Sequence[list[list[int]]]
) -> list[tuple[float, bool]]:
    """Compute the scores from the last block's output, in chunks of targets that bound the logits' memory.

    `asked` lists, by bucket and sequence, the numbers of the queries.
    """
    total = torch.zeros(len(queries), dtype=torch.float64)
    missed = torch.zeros(len(queries), dtype=torch.int64)
    chunk = max(1, sweep.LOGIT_BYTES // (4 * skeleton.vocabulary))
    with skeleton.head() as head:
        for bucket, sequences in zip(buckets, asked, strict=True):
            for batch, (hidden,) in bucket.store.each(bucket.batch, sweep.boundary("dense", len(skeleton))):
                wanted = []
                for row, numbers in enumerate(sequences[batch]):
                    for number in numbers:
                        targets = queries[number].targets
                        begin = len(queries[number].inputs) - len(targets)
                        wanted += [(row, begin + k, target, number) for k, target in enumerate(targets)]
                for start in range(0, len(wanted), chunk):
                    rows, positions, expected, owners = torch.tensor(wanted[start : start + chunk]).unbind(1)
                    logits = head(hidden[rows.to(hidden.device), positions.to(hidden.device)])
                    likely = torch.log_softmax(logits, -1, dtype=accumulator(logits.dtype))
                    first = likely.argmax(-1).cpu()
                    found = likely.gather(1, expected.to(likely.device).unsqueeze(1)).squeeze(1)
                    total.index_add_(0, owners, found.double().cpu())
                    missed.index_add_(0, owners, (first != expected).long())
    if not bool(torch.isfinite(total).all()):
        raise NumericalError(f"the head gives NaN or Inf{advice(skeleton.dtype)}")
    return [(value, not misses) for value, misses in zip(total.tolist(), missed.tolist(), strict=True)]
