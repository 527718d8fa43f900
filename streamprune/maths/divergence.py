"""Similarity of attention heads (greedy output approximation, section 3.2.2).

`D` (heads, heads) is the mean Jensen-Shannon divergence in nats between the attention distributions of each pair of heads, so
that ``0 ≤ D ≤ log 2``.
"""

from __future__ import annotations

from torch import Tensor


def redundant(d: Tensor, tau: float) -> list[int]:
    """Return, ascending, the heads whose divergence from a head that stays is below `tau` (algorithm 2).

    Pairs are visited row by row. If the two heads are close and neither is a candidate yet, the first becomes one. So
    at least one head is never a candidate, however large `tau` is.
    """
    candidates: list[int] = []
    for i, j in (d < tau).nonzero().tolist():
        if i != j and i not in candidates and j not in candidates:
            candidates.append(i)
    return candidates


def between_units(d: Tensor, rep: int) -> Tensor:
    """Average D over all pairs of query heads of two key/value groups of `rep` consecutive heads *(ours)*.

    Returns (heads/rep, heads/rep), symmetric, with a zero diagonal.
    """
    units = d.shape[0] // rep
    assert d.shape[0] == units * rep
    return d.view(units, rep, units, rep).mean(dim=(1, 3)).fill_diagonal_(0)
