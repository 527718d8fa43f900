"""Exact greedy removal, one unit at a time, at the speed of matrix products.

Notation of `linalg`. Removing unit `u` changes

::

    W ← W − W_u (P_uu)⁻¹ P_u:             P ← P − P_:u (P_uu)⁻¹ P_u:

and the loop needs `P` and ``V = WᵀW`` only. With ``P_uu = L Lᵀ``, ``E = L⁻¹ V_uu L⁻ᵀ`` and the rows

::

    C = L⁻¹ P_u:          Z = L⁻¹ V_u: − ½ E C
    P ← P − CᵀC           V ← V − CᵀZ − ZᵀC           cost_u = tr((P_uu)⁻¹ V_uu) = tr E

so that a step needs whole rows of the removed unit alone, and of all others the blocks on the diagonal. As in a
pivoted Cholesky factorisation, `C` and `Z` of the last steps are kept aside: a step brings its unit's rows up to date
with them, and every `block` columns they are applied to all of `P` and `V` by matrix products, lower half only, from
which what has gone is left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import NumericalError
from .batched import cholesky_blocks
from .linalg import inverse, unit_columns
from .operations import counted
from .symmetric import add_product, diagonal_blocks, shrink, whole_rows

_SPARSE = 16
"""P and V are made smaller when one in so many of their units has gone: it costs as much as one update."""


def greedy_removal(
    w: Tensor, h: Tensor, *, width: int, count: int, damping: float, place: str, block: int = 64
) -> tuple[Tensor, Tensor]:
    """Remove `count` units one at a time, each time the one whose removal costs least (SoBP, stage 2).

    ::

        cost_u = tr((P_uu)⁻¹ W_uᵀ W_u)        → remove the cheapest u
        W ← W − W_u (P_uu)⁻¹ P_u:             P ← P − P_:u (P_uu)⁻¹ P_u:

    The order is that of this loop as written; of equal costs the first unit goes. A dead column (zero diagonal of H)
    carries nothing, so its weights count as zero and it goes first.

    Beside `w` and `h` it takes two (n, n) matrices and some ten of (n, max(`width`, `block`)).

    Args:
        w: (d_out, n), float32 or float64. The work is done on its device.
        h: (n, n), mean Gram, same dtype.
        width: columns a unit; n = units·width.
        count: units to remove, fewer than there are.
        block: columns removed between two updates of all of P and V, at least a unit's.

    Returns:
        removed units in order (count,) int64, and each one's cost in output energy (count,), on the CPU.

    Raises:
        NumericalError: H holds NaN or Inf, cannot be factored, or the costs are no numbers.
    """
    units = h.shape[0] // width
    assert 0 <= count < units
    assert w.shape[1] == h.shape[0] == units * width
    v = w.new_zeros(h.shape)
    add_product(v, w, w)
    dead = (h.diagonal() <= 0).nonzero()[:, 0].to(w.device)
    v.index_fill_(0, dead, 0).index_fill_(1, dead, 0)
    p, _ = inverse(h, damping, place, device=w.device)
    order, costs = removal(p, v, width=width, count=count, block=block, place=place)
    if not bool(torch.isfinite(costs).all()):
        raise NumericalError(f"{place}: the costs of the greedy removal are no numbers; its weights hold NaN or Inf")
    return order, costs


def removal(p: Tensor, v: Tensor, *, width: int, count: int, block: int, place: str) -> tuple[Tensor, Tensor]:
    """The loop on `P` and `V` (n, n), of which only the lower halves are read, and whose contents are lost."""
    device = p.device
    left = torch.arange(len(p) // width, device=device)
    gone = torch.zeros_like(left, dtype=torch.bool)
    order, costs = torch.empty(count, dtype=left.dtype, device=device), torch.empty(count, dtype=p.dtype, device=device)
    p_blocks, v_blocks = diagonal_blocks(p, width), diagonal_blocks(v, width)
    identity = torch.eye(width, dtype=p.dtype, device=device)[None]
    steps = max(1, block // width)
    since = 0
    for start in range(0, count, steps):
        stop = min(start + steps, count)
        columns = (stop - start) * width
        late = p.new_empty(3, columns, len(p))  # C, Z, C: with the third, CᵀZ + ZᵀC is one product
        with counted(columns * width * len(p) * (3 * (stop - start) + 12)):
            for step in range(start, stop):
                c, z = late[:2, : (step - start) * width]
                factors, energies = _whitened(p_blocks, v_blocks, place)
                cost = energies.diagonal(dim1=1, dim2=2).sum(dim=1).clamp_min_(0).masked_fill_(gone, torch.inf)
                u = cost.argmin().view(1)
                order[step], costs[step] = left.index_select(0, u)[0], cost.index_select(0, u)[0]
                at = unit_columns(u, width)
                c_u, z_u = late[:2, len(c) : len(c) + width]
                _new_rows(p, v, c, z, at, factors.index_select(0, u)[0], energies.index_select(0, u)[0], c_u, z_u)
                cb, zb = (x.view(width, -1, width).transpose(0, 1) for x in (c_u, z_u))
                p_blocks.baddbmm_(cb.mT, cb, alpha=-1)
                changed = cb.mT @ zb
                v_blocks.sub_(changed).sub_(changed.mT)
                gone.index_fill_(0, u, True)
                p_blocks.index_copy_(0, u, identity)
        since += stop - start
        if stop < count:
            if since * _SPARSE >= len(left):
                live = (~gone).nonzero()[:, 0]
                kept = unit_columns(live, width)
                p, v, late = shrink(p, kept), shrink(v, kept), late.index_select(2, kept)
                p_blocks, v_blocks, left, gone = (x.index_select(0, live) for x in (p_blocks, v_blocks, left, gone))
                since = 0
            late[2] = late[0]
            add_product(p, late[0], late[0], alpha=-1)
            add_product(v, late[:2].flatten(0, 1), late[1:].flatten(0, 1), alpha=-1)
    return order.cpu(), costs.cpu()


def _whitened(p: Tensor, v: Tensor, place: str) -> tuple[Tensor, Tensor]:
    """``L⁻¹`` and ``E`` of every unit, from its blocks of P and V; all (units, width, width)."""
    if p.shape[-1] == 1:
        return p.rsqrt(), v / p
    factors = torch.linalg.solve_triangular(
        cholesky_blocks(p, place), torch.eye(p.shape[-1], dtype=p.dtype, device=p.device), upper=False
    )
    return factors, factors @ v @ factors.mT


def _new_rows(
    p: Tensor, v: Tensor, c: Tensor, z: Tensor, at: Tensor, factor: Tensor, energy: Tensor, c_u: Tensor, z_u: Tensor
) -> None:
    """Writes the rows `c_u`, `z_u` (width, n) of the unit with the columns `at`, given those before, `c`, `z` (k, n)."""
    c_at, z_at = c.index_select(1, at).T, z.index_select(1, at).T  # (width, k)
    p_u = whole_rows(p, at).addmm_(c_at, c, alpha=-1)
    v_u = whole_rows(v, at).addmm_(z_at, c, alpha=-1).addmm_(c_at, z, alpha=-1)
    torch.mm(factor, p_u, out=c_u)
    torch.mm(factor, v_u, out=z_u).addmm_(energy, c_u, alpha=-0.5)
