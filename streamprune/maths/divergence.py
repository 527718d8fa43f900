"""How alike attention heads are (greedy output approximation, section 3.2.2).

Notation of the paper: `D` (heads, heads), the mean Jensen-Shannon divergence between the attention
distributions of every two heads; natural logarithm, so that ``0 ≤ D ≤ log 2``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .across import AddUp, add_counts
from .linalg import accumulator


class HeadDivergence:
    """Eq. 1: ``D_ij = mean over sequences and rows of JS(P_i ‖ P_j)``, `P_i` a row of head i's attention map.

    With the entropy ``E(P) = −Σ p log p`` (0 log 0 = 0): ``JS(P ‖ Q) = E((P + Q)/2) − (E(P) + E(Q))/2``.
    Kept is the sum over rows, float64, on the CPU; several workers' add up by `across`.
    """

    def __init__(self, heads: int) -> None:
        self.rows = 0
        self.operations = 0
        """What computing the maps took, for whoever adds it."""
        self.sums = torch.zeros(heads, heads, dtype=torch.float64)

    def add(self, maps: Tensor) -> None:
        """Add a micro-batch, pair by pair: beside the maps a few (sequences, tokens, tokens) are held.

        Args:
            maps: (sequences, heads, tokens, tokens), any float dtype; rows sum to 1, masked entries are 0.
        """
        heads = self.sums.shape[0]
        assert maps.shape[1] == heads
        dtype = accumulator(maps.dtype)
        entropy = torch.stack([_entropy(maps[:, i].to(dtype)) for i in range(heads)])
        sums = torch.zeros(heads, heads, dtype=torch.float64, device=maps.device)
        for i in range(heads - 1):
            p = maps[:, i].to(dtype)
            for j in range(i + 1, heads):
                sums[i, j] = _entropy((p + maps[:, j]).div_(2)) - (entropy[i] + entropy[j]) / 2
        self.sums += (sums + sums.T).cpu()
        self.rows += maps.shape[0] * maps.shape[2]

    def across(self, add_up: AddUp) -> None:
        """Take in the other workers' sums."""
        add_up(self.sums)
        (self.rows,) = add_counts(add_up, self.rows)

    def mean(self) -> Tensor:
        """D (heads, heads), float64, on the CPU: symmetric, zero diagonal, rounding below zero cut off."""
        return (self.sums / self.rows).clamp_min(0)


def _entropy(p: Tensor) -> Tensor:
    """Sum of the rows' entropies, a float64 scalar; a row is summed in p's own dtype."""
    rows: Tensor = torch.special.entr(p).sum(dim=-1)
    return rows.sum(dtype=torch.float64)


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
