"""Exact greedy removal, one unit at a time, with most of the work in matrix products.

Notation and arguments of `refit`. Removing unit `u` changes

::

    W ← W − W_u (P_uu)⁻¹ P_u:             P ← P − P_:u (P_uu)⁻¹ P_u:

and the loop needs only `P` and ``V = WᵀW``. With ``P_uu = L Lᵀ``, ``E = L⁻¹ V_uu L⁻ᵀ`` and the rows

::

    C = L⁻¹ P_u:          Z = L⁻¹ V_u: − ½ E C
    P ← P − CᵀC           V ← V − CᵀZ − ZᵀC           cost_u = tr((P_uu)⁻¹ V_uu) = tr E

so a step needs the full rows of the removed unit only, and the diagonal blocks of all others. As in a blocked, pivoted
Cholesky factorisation, `C` and `Z` of recent steps are buffered. Each step first updates the rows of its unit with them. After
every `block` columns they are applied to all of `P` and `V` by matrix products, to the lower halves only and without the
removed units.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from ..errors import NumericalError, SingularError
from .flops import counted
from .refit import all_finite, cholesky_blocks, dampings, inverse, unit_columns
from .triangular import add_product, diagonal_blocks, invert_, shrink, whole_rows

_SPARSE = 16
"""P and V are compacted once one in this many of their units is removed. Compacting costs as much as one update."""


def greedy_removal(
    w: Tensor,
    h: Tensor,
    *,
    width: int,
    count: int,
    damping: float,
    place: str,
    block: int = 64,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Remove `count` units one at a time, always the one with the lowest removal cost (SoBP, stage 2).

    ::

        cost_u = tr((P_uu)⁻¹ W_uᵀ W_u)        → remove the cheapest u

    The order is exactly that of this loop; ties go to the lower index. If rounding makes the diagonal of `P` non-positive,
    the loop restarts with ten times the damping. A dead column (zero diagonal of H) carries no signal: its weights count
    as zero, and it is removed first.

    Besides `w` and `h` this needs two (n, n) matrices and several of (n, max(`width`, `block`)); see `workspace`.

    Args:
        width: columns per unit; n = units·width.
        block: columns removed between two updates of all of P and V; at least `width` are.
        factor: (n, n), the factor that `refit.cholesky` returned for `h` and `damping`, if available; overwritten.

    Returns:
        The removed units in order (count,) int64, and the cost of each in output energy per token (count,), on the CPU.
    """
    units = h.shape[0] // width
    assert 0 <= count <= units
    assert w.shape[1] == h.shape[0] == units * width
    ready = [] if factor is None else [factor]
    del factor

    def attempt(ridge: float) -> tuple[Tensor, Tensor]:
        v = _energies(w, h, place)
        p = invert_(ready.pop()) if ready else inverse(h, ridge, place, device=w.device)[0]
        order, costs = removal(p, v, width=width, count=count, block=block, place=place)
        # If rounding made a diagonal entry of P non-positive, costs are negative, infinite or NaN.
        if not bool((costs >= 0).all()) or not all_finite(costs):
            raise SingularError(place)
        return order, costs

    return until_regular(attempt, damping, place)


def until_regular(
    attempt: Callable[[float], tuple[Tensor, Tensor]], damping: float, place: str
) -> tuple[Tensor, Tensor]:
    """Return the result of `attempt` at the first of the `dampings` where it raises no SingularError."""
    for ridge in dampings(damping):
        with suppress(SingularError):
            return attempt(ridge)  # a function, so that P and V of a failed attempt are freed before the next
    raise SingularError(f"{place}: the units' costs could not be computed with damping up to 10")


def _energies(w: Tensor, h: Tensor, place: str) -> Tensor:
    """Return the lower half of ``V = WᵀW`` (n, n), with the rows and columns of dead columns zero."""
    v = w.new_zeros(h.shape)
    add_product(v, w, w)
    dead = (h.diagonal() <= 0).nonzero()[:, 0].to(w.device)
    v.index_fill_(0, dead, 0).index_fill_(1, dead, 0)
    if not all_finite(v.diagonal()):
        raise NumericalError(f"{place}: the weights hold NaN or Inf, or what {v.dtype} cannot square")
    return v


def workspace(columns: int, width: int, block: int = 64) -> int:
    """Return the peak number of elements that `greedy_removal` holds besides `w`, `h` and the workspace of the inversion."""
    return 2 * columns**2 + 12 * columns * max(width, block)


def removal(p: Tensor, v: Tensor, *, width: int, count: int, block: int, place: str) -> tuple[Tensor, Tensor]:
    """Run the greedy loop on `P` and `V` (n, n), contiguous, which it overwrites; only their lower halves are read.

    Arguments and results are those of `greedy_removal`.
    """
    state: _State = _Columns(p, v) if width == 1 else _Blocks(p, v, width, place)
    order, costs = torch.empty(count, dtype=torch.int64, device=p.device), p.new_empty(count)
    steps = max(1, block // width)
    for start in range(0, count, steps):
        stop = min(start + steps, count)
        rows, columns = (stop - start) * width, len(state.p)
        late = p.new_empty(3, rows, columns)  # C, Z, C: the copy turns CᵀZ + ZᵀC into one product
        with counted(rows * width * columns * (3 * (stop - start) + 12)):
            for step in range(start, stop):
                state.remove(late[:2], (step - start) * width, order[step : step + 1], costs[step : step + 1])
            order[start:stop] = state.units.index_select(0, order[start:stop])
        if stop < count:
            state.settle(late, stop - start)
    return order.cpu(), costs.cpu()


class _State(ABC):
    """`P` and `V` as of the last full update, and their diagonal blocks as of the current step.

    Units removed since the last compaction still have rows and columns in both matrices; they are skipped.
    """

    def __init__(self, p: Tensor, v: Tensor, width: int) -> None:
        self.p, self.v, self.width = p, v, width
        self.p_blocks, self.v_blocks = (
            diagonal_blocks(p, width),
            diagonal_blocks(v, width),
        )  # (units, width, width), current
        self.units = torch.arange(len(self.p_blocks), device=p.device)
        self.number_gone = 0

    @abstractmethod
    def remove(self, late: Tensor, rows: int, unit: Tensor, paid: Tensor) -> None:
        """Remove one unit. The first `rows` rows of `late` (2, ·, n) are C and Z of the buffered steps; append those of this unit.

        Writes the removed unit's position in `units`, and its cost, to `unit` (1,) and `paid` (1,).
        """

    @abstractmethod
    def live(self) -> Tensor:
        """Return the positions of the units that are not removed, ascending."""

    def settle(self, late: Tensor, steps: int) -> None:
        """Apply the buffered C and Z of the last `steps` steps, ``late[:2]`` of (3, ·, n), to all of `P` and `V`."""
        self.number_gone += steps
        if self.number_gone * _SPARSE >= len(self.units):
            live = self.live()
            kept = unit_columns(live, self.width)
            late = late.index_select(2, kept)
            self.p, self.v = shrink(self.p, kept), shrink(self.v, kept)
            self.compact(live)
            self.number_gone = 0
        late[2] = late[0]
        add_product(self.p, late[0], late[0], alpha=-1)
        add_product(self.v, late[:2].flatten(0, 1), late[1:].flatten(0, 1), alpha=-1)

    def compact(self, live: Tensor) -> None:
        """Keep of what there is for each unit the entries `live`."""
        for name in ("p_blocks", "v_blocks", "units"):
            setattr(self, name, getattr(self, name).index_select(0, live))


class _Blocks(_State):
    """Units of any number of columns."""

    def __init__(self, p: Tensor, v: Tensor, width: int, place: str) -> None:
        super().__init__(p, v, width)
        self.place = place
        self.gone = torch.zeros_like(self.units, dtype=torch.bool)
        self.identity = torch.eye(width, dtype=p.dtype, device=p.device)

    def remove(self, late: Tensor, rows: int, unit: Tensor, paid: Tensor) -> None:
        factors, cost = self._costs()
        u = torch.argmin(cost.masked_fill_(self.gone, torch.inf), dim=0, keepdim=True, out=unit)
        torch.index_select(cost, 0, u, out=paid)
        factor = factors.index_select(0, u)[0]
        del factors
        energy = factor @ self.v_blocks.index_select(0, u)[0] @ factor.mT  # E
        at = unit_columns(u, self.width)
        c, z = late[:, :rows]
        c_at, z_at = c.index_select(1, at).T, z.index_select(1, at).T  # (width, rows)
        c_u, z_u = late[:, rows : rows + self.width]
        torch.mm(factor, whole_rows(self.p, at).addmm_(c_at, c, alpha=-1), out=c_u)
        v_u = whole_rows(self.v, at).addmm_(z_at, c, alpha=-1).addmm_(c_at, z, alpha=-1)
        torch.mm(factor, v_u, out=z_u).addmm_(energy, c_u, alpha=-0.5)
        del v_u
        c_u, z_u = (x.view(self.width, -1, self.width).transpose(0, 1) for x in (c_u, z_u))  # (units, width, width)
        self.p_blocks.baddbmm_(c_u.mT, c_u, alpha=-1).index_copy_(0, u, self.identity[None])
        change = c_u.mT @ z_u
        self.v_blocks.sub_(change).sub_(change.mT)
        self.gone.index_fill_(0, u, True)

    def live(self) -> Tensor:
        return (~self.gone).nonzero()[:, 0]

    def compact(self, live: Tensor) -> None:
        super().compact(live)
        self.gone = self.gone.index_select(0, live)

    def _costs(self) -> tuple[Tensor, Tensor]:
        """Return ``L⁻¹`` (units, width, width) and the removal cost (units,) of every unit."""
        chol = cholesky_blocks(self.p_blocks, self.place)[0]
        factors = torch.linalg.solve_triangular(chol, self.identity, upper=False)
        cost = (factors @ self.v_blocks).mul_(factors).sum(dim=(1, 2))
        return factors, cost.clamp_min_(0)


class _Columns(_State):
    """Units of one column. A step takes half as many operations as in `_Blocks`: on a GPU each is a kernel launch, and launches dominate.

    A removed column has `V` = ∞ and the largest `P`, so that its cost is ∞. There is no device synchronisation. Costs are rounded
    otherwise than by `_Blocks`: in float32, near ties may be broken differently.
    """

    def __init__(self, p: Tensor, v: Tensor) -> None:
        super().__init__(p, v, 1)
        self.numbers = torch.arange(len(p), device=p.device)

    def remove(self, late: Tensor, rows: int, unit: Tensor, paid: Tensor) -> None:
        p, v = self.p_blocks.view(-1), self.v_blocks.view(-1)
        cost = v.clamp_min(0).div_(p)
        u = torch.argmin(cost, dim=0, keepdim=True, out=unit)
        energy = torch.index_select(cost, 0, u, out=paid)
        factor = p.index_select(0, u).rsqrt_()
        both = late[:, rows]
        # Entries of the lower half: row max(u, j), column min(u, j).
        at = torch.add(torch.minimum(self.numbers, u), torch.maximum(self.numbers, u), alpha=len(self.numbers))
        torch.index_select(self.p.view(-1), 0, at, out=both[0])
        torch.index_select(self.v.view(-1), 0, at, out=both[1])
        if rows:
            c_z = late[:, :rows].index_select(2, u)[..., 0]  # (2, rows)
            both.addmm_(c_z, late[0, :rows], alpha=-1)
            both[1:].addmm_(c_z[:1], late[1, :rows], alpha=-1)
        c_u, z_u = both.mul_(factor)
        z_u.addcmul_(c_u, energy, value=-0.5)
        p.addcmul_(c_u, c_u, value=-1).index_fill_(0, u, torch.finfo(p.dtype).max)
        v.addcmul_(c_u, z_u, value=-2).index_fill_(0, u, torch.inf)

    def live(self) -> Tensor:
        return (self.v_blocks.view(-1) != torch.inf).nonzero()[:, 0]

    def compact(self, live: Tensor) -> None:
        super().compact(live)
        self.numbers = self.numbers[: len(live)]
