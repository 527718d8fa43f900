"""Batched greedy pruning (SlimGPT): units by an estimated cost, removed with the exact update.

Notation of `refit`; the paper's ``H⁻¹`` is our `P`. What goes is chosen by a cheap estimate of its cost;
the update that follows is the joint one, so that what is left is always the optimum for what was removed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import NumericalError
from .refit import all_finite, cholesky, cholesky_blocks, enough, inverse, unit_columns
from .triangular import add_product, diagonal_blocks, shrink, shrink_rows, whole_rows


def workspace(columns: int, outputs: int, most: int) -> int:
    """Numbers that removing `most` columns at a time holds beside `w` and `h`, and beside what inverting takes by itself:
    P, a copy of W, and rows of both."""
    return columns * (columns + outputs) + most * (5 * columns + outputs + most)


def batched_group_removal(
    w: Tensor, h: Tensor, *, width: int, count: int, damping: float, place: str
) -> tuple[Tensor, Tensor]:
    """Remove `count` heads one at a time, by one batched Cholesky a step (SlimGPT, batched greedy pruning).

    ::

        P_uu = L Lᵀ for every head u,   estimate_u = Σ_j ‖W_:j‖² / L_jj²        → remove the cheapest u

    ``L_jj²`` is what ``P_jj`` comes to once the head's columns before `j` are gone; that `W_:j` moves with
    them too is what the estimate leaves out and `greedy.greedy_removal` does not. A dead column (zero
    diagonal of H) carries nothing: its weights count as zero.

    Args:
        w: (d_out, n), float32 or float64.
        h: (n, n), mean Gram, same dtype.
        width: columns a head; n = heads·width.
        count: heads to remove, fewer than there are.

    Returns:
        removed heads in order (count,) int64, and the output energy that each one took (count,), on the CPU.
        The energies are those of the updates, not the estimates, and add up to ``err(S)``.

    Raises:
        NumericalError: W or H hold NaN or Inf, or no damping up to 10 was enough.
    """
    heads = h.shape[0] // width
    assert 0 <= count < heads
    assert w.shape[1] == h.shape[0] == heads * width

    def attempt(damping: float) -> tuple[Tensor, Tensor]:
        rows, p = _begin(w, h, damping, place)
        left = torch.arange(heads)
        order = torch.empty(count, dtype=torch.int64)
        energies = torch.empty(count, dtype=p.dtype)
        for step in range(count):
            factors, _ = cholesky_blocks(diagonal_blocks(p, width), place)  # (left, width, width)
            denominators = factors.diagonal(dim1=-2, dim2=-1).square()  # (left, width)
            estimates = (_energies(rows).view(-1, width) / denominators).sum(dim=1)
            best = int(estimates.argmin())
            order[step] = left[best]
            rows, p, energy = _remove(rows, p, unit_columns(torch.tensor([best], device=p.device), width), place)
            energies[step] = energy.sum()
            left = torch.cat([left[:best], left[best + 1 :]])
        return order, energies

    return enough(damping, attempt)


def dynamic_group_removal(
    w: Tensor, h: Tensor, *, count: int, damping: float, place: str, first: int = 1024, last: int = 8
) -> tuple[Tensor, Tensor]:
    """Remove `count` columns in groups that get smaller as the target nears (SlimGPT, dynamic group size).

    ::

        estimate_j = ‖W_:j‖² / P_jj        → remove the cheapest `take` columns S at once
        W ← W − W_S (P_SS)⁻¹ P_S:          P ← P − P_:S (P_SS)⁻¹ P_S:

    The group size starts at `first` and ends at `last`: half of what is still to go, between the two, in
    multiples of `last` (the halving is ours; the paper gives the two ends). A dead column (zero diagonal of
    H) carries nothing, so its weights count as zero and it goes first.

    Args:
        w: (d_out, n), float32 or float64.
        h: (n, n), mean Gram, same dtype.
        count: columns to remove, fewer than there are.
        first: most columns removed at once.
        last: fewest, but for the last group.

    Returns:
        removed columns in order (count,) int64, and the output energy that each one took (count,), on the CPU.
        The energies are those of the updates, not the estimates, and add up to ``err(S)``.

    Raises:
        NumericalError: W or H hold NaN or Inf, or no damping up to 10 was enough.
    """
    n = h.shape[0]
    assert 0 <= count < n
    assert w.shape[1] == n
    assert 1 <= last <= first

    def attempt(damping: float) -> tuple[Tensor, Tensor]:
        rows, p = _begin(w, h, damping, place)
        left = torch.arange(n, device=p.device)
        order, energies = [left[:0]], [rows[:0, 0]]
        to_go = count
        while to_go > 0:
            take = min(to_go, max(last, min(first, to_go // 2 // last * last)))
            estimates = _energies(rows) / p.diagonal()
            cheapest = estimates.argsort(stable=True)[:take]
            order.append(left[cheapest])
            left = left[_others(cheapest, len(left))]
            rows, p, energy = _remove(rows, p, cheapest, place)
            energies.append(energy)
            to_go -= take
        return torch.cat(order).cpu(), torch.cat(energies).cpu()

    return enough(damping, attempt)


def _begin(w: Tensor, h: Tensor, damping: float, place: str) -> tuple[Tensor, Tensor]:
    """Wᵀ (n, d_out) without its dead columns' weights, and P."""
    p, _ = inverse(h, damping, place, device=w.device)
    rows = w.T.clone(memory_format=torch.contiguous_format)
    rows.index_fill_(0, (h.diagonal() <= 0).nonzero()[:, 0].to(w.device), 0)
    if not all_finite(_energies(rows)):
        raise NumericalError(f"{place}: the weights hold NaN or Inf, or what {w.dtype} cannot square")
    return rows, p


def _energies(rows: Tensor) -> Tensor:
    """``‖W_:j‖²`` of every column."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms.square()


def _others(columns: Tensor, n: int) -> Tensor:
    return torch.ones(n, dtype=torch.bool, device=columns.device).index_fill_(0, columns, False).nonzero()[:, 0]


def _remove(rows: Tensor, p: Tensor, columns: Tensor, place: str) -> tuple[Tensor, Tensor, Tensor]:
    """Wᵀ and P of the columns that stay, in the same memory, and the output energy of each that goes, given those before it."""
    # With P_SS = L Lᵀ, Y = L⁻¹ P_SK and Z = L⁻¹ W_Sᵀ:   W_K ← W_K − Zᵀ Y,   P_KK ← P_KK − Yᵀ Y.
    stay = _others(columns, len(p))
    p_s = whole_rows(p, columns)  # (take, n)
    factor, _ = cholesky(p_s.index_select(1, columns), 0.0, place)
    y = torch.linalg.solve_triangular(factor, p_s.index_select(1, stay), upper=False)  # (take, k)
    z = torch.linalg.solve_triangular(factor, rows.index_select(0, columns), upper=False)  # (take, d_out)
    p = shrink(p, stay)
    add_product(p, y, y, alpha=-1)
    rows = shrink_rows(rows, stay).addmm_(y.T, z, alpha=-1)
    return rows, p, z.square().sum(dim=1)
