"""How alike attention heads are (greedy output approximation, section 3.2.2).

Notation of the paper: `D` (heads, heads), the mean Jensen-Shannon divergence between the attention
distributions of every two heads; natural logarithm, so that ``0 ≤ D ≤ log 2``.
"""

from __future__ import annotations

from torch import Tensor


def redundant(d: Tensor, tau: float) -> list[int]:
    """Candidates for removal (algorithm 2): heads nearer than `tau` to one that is none.

    Pairs are gone through row by row; of two that are near, and neither a candidate yet, the first becomes
    one. So at least one head is never a candidate, however large `tau` is.

    Args:
        d: D (heads, heads).
        tau: divergence threshold; D below it counts as near.

    Returns:
        the candidates, in the order in which they were found (ascending).
    """
    candidates: list[int] = []
    for i, j in (d < tau).nonzero().tolist():
        if i != j and i not in candidates and j not in candidates:
            candidates.append(i)
    return candidates


def between_units(d: Tensor, rep: int) -> Tensor:
    """Divergence of key/value groups: the mean over all pairs of their query heads *(ours)*.

    Args:
        d: D (heads, heads).
        rep: query heads a key/value head; consecutive heads are one group.

    Returns:
        (heads/rep, heads/rep), symmetric, zero diagonal.
    """
    units = d.shape[0] // rep
    assert d.shape[0] == units * rep
    return d.view(units, rep, units, rep).mean(dim=(1, 3)).fill_diagonal_(0)
