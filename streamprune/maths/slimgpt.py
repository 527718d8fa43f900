"""Batched greedy pruning (SlimGPT): choose units by estimated cost, remove them with the exact update.

Notation and arguments of `refit`; the paper's ``H⁻¹`` is our `P`. The update that follows the cheap estimate is the exact joint
one, so the remaining weights are always optimal for the removed set. A dead column (zero diagonal of H) carries no signal:
its weights count as zero.

Both functions return the removed units in order (count,) int64, and the output energy per token that each removal lost
(count,), on the CPU. The energies are those of the exact updates, not the estimates, and add up to ``err(S)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import NumericalError
from .greedy import until_regular
from .refit import all_finite, cholesky, cholesky_blocks, inverse, others, unit_columns
from .triangular import add_product, diagonal_blocks, shrink, shrink_rows, whole_rows


def workspace(columns: int, outputs: int, most: int) -> int:
    """Return the peak number of elements that removing up to `most` columns at a time holds: P, a copy of W, and rows of both.

    `w`, `h` and the workspace of the inversion are not included.
    """
    return columns * (columns + outputs) + most * (5 * columns + outputs + most)


def batched_group_removal(
    w: Tensor, h: Tensor, *, width: int, count: int, damping: float, place: str
) -> tuple[Tensor, Tensor]:
    """Remove `count` heads one at a time, with one batched Cholesky factorisation per step (SlimGPT, batched greedy pruning).

    ::

        P_uu = L Lᵀ for every head u,   estimate_u = Σ_j ‖W_:j‖² / L_jj²        → remove the cheapest u

    ``L_jj²`` is the value of ``P_jj`` after the head's columns before `j` are removed. The estimate ignores that their removal also
    changes `W_:j`; `greedy.greedy_removal` takes this into account. `width` is the number of columns per head.
    """
    heads = h.shape[0] // width
    assert 0 <= count < heads
    assert w.shape[1] == h.shape[0] == heads * width

    def attempt(ridge: float) -> tuple[Tensor, Tensor]:
        rows, p = _begin(w, h, ridge, place)
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

    return until_regular(attempt, damping, place)


def dynamic_group_removal(
    w: Tensor, h: Tensor, *, count: int, damping: float, place: str, first: int = 1024, last: int = 8
) -> tuple[Tensor, Tensor]:
    """Remove `count` columns in groups that shrink as the target approaches (SlimGPT, dynamic group size).

    ::

        estimate_j = ‖W_:j‖² / P_jj        → remove the cheapest `take` columns S at once
        W ← W − W_S (P_SS)⁻¹ P_S:          P ← P − P_:S (P_SS)⁻¹ P_S:

    Each group takes half of the columns still to be removed, rounded down to a multiple of `last` and clamped to between `last`
    and `first`; the final one may be smaller. The halving is ours; the paper gives only the first and last size.
    """
    n = h.shape[0]
    assert 0 <= count < n
    assert w.shape[1] == n
    assert 1 <= last <= first

    def attempt(ridge: float) -> tuple[Tensor, Tensor]:
        rows, p = _begin(w, h, ridge, place)
        left = torch.arange(n, device=p.device)
        order, energies = [left[:0]], [rows[:0, 0]]
        to_go = count
        while to_go > 0:
            take = min(to_go, max(last, min(first, to_go // 2 // last * last)))
            estimates = _energies(rows) / p.diagonal()
            cheapest = estimates.argsort(stable=True)[:take]
            order.append(left[cheapest])
            left = left[others(cheapest, len(left))]
            rows, p, energy = _remove(rows, p, cheapest, place)
            energies.append(energy)
            to_go -= take
        return torch.cat(order).cpu(), torch.cat(energies).cpu()

    return until_regular(attempt, damping, place)


def _begin(w: Tensor, h: Tensor, damping: float, place: str) -> tuple[Tensor, Tensor]:
    """Return Wᵀ (n, d_out) with the weights of dead columns set to zero, and P (n, n)."""
    p, _ = inverse(h, damping, place, device=w.device)
    rows = w.T.clone(memory_format=torch.contiguous_format)
    rows.index_fill_(0, (h.diagonal() <= 0).nonzero()[:, 0].to(w.device), 0)
    if not all_finite(_energies(rows)):
        raise NumericalError(f"{place}: the weights hold NaN or Inf, or what {w.dtype} cannot square")
    return rows, p


def _energies(rows: Tensor) -> Tensor:
    """Return ``‖W_:j‖²`` of every column (n,), from `rows`, which is Wᵀ (n, d_out)."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms.square()


def _remove(rows: Tensor, p: Tensor, columns: Tensor, place: str) -> tuple[Tensor, Tensor, Tensor]:
    """Remove `columns` S (take,) from Wᵀ (n, d_out) and P (n, n).

    Returns Wᵀ (k, d_out) and P (k, k) of the remaining columns, in the same memory, and the output energy per token that each
    removed column loses given those before it (take,).
    """
    # With P_SS = L Lᵀ, Y = L⁻¹ P_SK and Z = L⁻¹ W_Sᵀ:   W_K ← W_K − Zᵀ Y,   P_KK ← P_KK − Yᵀ Y.
    stay = others(columns, len(p))
    p_s = whole_rows(p, columns)  # (take, n)
    factor, _ = cholesky(p_s.index_select(1, columns), 0.0, place)
    y = torch.linalg.solve_triangular(factor, p_s.index_select(1, stay), upper=False)  # (take, k)
    z = torch.linalg.solve_triangular(factor, rows.index_select(0, columns), upper=False)  # (take, d_out)
    p = shrink(p, stay)
    add_product(p, y, y, alpha=-1)
    rows = shrink_rows(rows, stay).addmm_(y.T, z, alpha=-1)
    return rows, p, z.square().sum(dim=1)
