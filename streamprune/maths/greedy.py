"""Exact greedy removal, one unit at a time, with most of the work in matrix products.

Notation and arguments of `refit`. Removing unit `u` changes

::

    W ← W − W_u (P_uu)⁻¹ P_u:             P ← P − P_:u (P_uu)⁻¹ P_u:

and the loop needs only `P` and ``V = WᵀW``. With ``P_uu = L Lᵀ``, ``E = L⁻¹ V_uu L⁻ᵀ`` and the rows

::

    C = L⁻¹ P_u:          Z = L⁻¹ V_u: − ½ E C
    P ← P − CᵀC           V ← V − CᵀZ − ZᵀC           cost_u = tr((P_uu)⁻¹ V_uu) = tr E

so a step needs the full rows of the removed unit only, and the diagonal blocks of all others. As in a blocked, pivoted
Cholesky factorisation, `C` and `Z` of recent steps are buffered and applied together: after every `block` columns by matrix products to
all of `P` and `V`, to the lower halves only and without the removed units. Before, the rows that a step reads are updated alone; units of
one column take even these steps together (see `_Columns`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from itertools import takewhile

import numpy as np
import torch
from torch import Tensor

from ..errors import NumericalError, SingularError
from .flops import counted
from .refit import all_finite, cholesky_blocks, dampings, inverse, unit_columns
from .triangular import add_product, diagonal_blocks, invert_, shrink, whole_rows

_CANDIDATES = 4
"""Units of one column among which the host takes steps, for each step."""
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
    state: _State = _Columns(p, v, place) if width == 1 else _Blocks(p, v, width, place)
    order, costs = torch.empty(count, dtype=torch.int64, device=p.device), p.new_empty(count)
    start, steps = 0, max(1, block // width)
    while start < count:
        most = min(steps, count - start)
        late = p.new_empty(3, most * width, len(state.p))  # C, Z, C: the copy turns CᵀZ + ZᵀC into one product
        done = state.remove(late[:2], order[start : start + most], costs[start : start + most])
        gone = order[start : start + done]
        gone.copy_(state.units.index_select(0, gone))
        start += done
        if start < count:
            state.settle(late[:, : done * width], done)
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
    def remove(self, late: Tensor, units: Tensor, paid: Tensor) -> int:
        """Remove up to as many units as `units` (steps,) has places, and at least one; return how many.

        Writes the removed units' positions in `units`, their costs to `paid` (steps,), and their rows C and Z to `late`
        (2, steps · width, n).
        """

    @abstractmethod
    def live(self) -> Tensor:
        """Return the positions of the units that are not removed, ascending."""

    def settle(self, late: Tensor, steps: int) -> None:
        """Apply C and Z of the last `steps` steps, ``late[:2]`` of (3, ·, n), to all of `P` and `V`."""
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
    """Units of any number of columns, one step after the other."""

    def __init__(self, p: Tensor, v: Tensor, width: int, place: str) -> None:
        super().__init__(p, v, width)
        self.place = place
        self.gone = torch.zeros_like(self.units, dtype=torch.bool)
        self.identity = torch.eye(width, dtype=p.dtype, device=p.device)

    def remove(self, late: Tensor, units: Tensor, paid: Tensor) -> int:
        steps, rows, columns = len(units), late.shape[1], late.shape[2]
        with counted(rows * self.width * columns * (3 * steps + 12)):
            for step in range(steps):
                self._step(late, step * self.width, units[step : step + 1], paid[step : step + 1])
        return steps

    def _step(self, late: Tensor, rows: int, unit: Tensor, paid: Tensor) -> None:
        """Remove one unit, written to `unit` (1,) and `paid` (1,). The first `rows` rows of `late` are those of the steps before."""
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
    """Units of one column, many steps at a time: on a GPU each operation is a kernel launch, and launches would dominate.

    The host takes the steps among the cheapest units, on the rows and columns of `P` and `V` that these have, in float64. With the
    rows S that it removes, in order, and the lower triangles ``L_st = C_ts`` and ``M_st = Z_ts`` (t ≤ s) that it found,

    ::

        P_S: = L C        V_S: = L Z + M C

    give C and Z for all columns at once, and these the costs of all units before each step. Steps are taken up to the first
    at which another unit would have been cheaper.

    A removed column has `V` = ∞ and the largest `P`, so that its cost is ∞. Costs are rounded otherwise than by `_Blocks`: near ties may be broken
    differently.
    """

    def __init__(self, p: Tensor, v: Tensor, place: str) -> None:
        super().__init__(p, v, 1)
        self.place = place

    def remove(self, late: Tensor, units: Tensor, paid: Tensor) -> int:
        p, v = self.p_blocks.view(-1), self.v_blocks.view(-1)
        candidates = self._cheapest(v.clamp_min(0).div_(p), _CANDIDATES * len(units))
        order, costs, lower = _among(*self._panel(candidates, p, v), len(units), self.place)
        torch.index_select(candidates, 0, order.to(p.device), out=units)
        paid.copy_(costs)
        factor, cross = lower.to(p.device, p.dtype)
        c, z = late
        torch.linalg.solve_triangular(factor, whole_rows(self.p, units), upper=False, out=c)
        torch.linalg.solve_triangular(factor, whole_rows(self.v, units).addmm_(cross, c, alpha=-1), upper=False, out=z)
        # Diagonals after each step: a product with ones has a fixed order on every device, which `cumsum` does not promise.
        ones = torch.ones_like(factor).tril_()
        p_after = torch.addmm(p, ones, c * c, alpha=-1)
        v_after = torch.addmm(v, ones, c * z, alpha=-2)
        done = 1
        if len(units) > 1:
            others = v_after[:-1].clamp_min(0).div_(p_after[:-1]).index_fill_(1, candidates, torch.inf).amin(dim=1)
            done += len(list(takewhile(bool, (others >= paid[1:]).tolist())))
        gone = units[:done]
        p.copy_(p_after[done - 1]).index_fill_(0, gone, torch.finfo(p.dtype).max)
        v.copy_(v_after[done - 1]).index_fill_(0, gone, torch.inf)
        return done

    def _cheapest(self, cost: Tensor, number: int) -> Tensor:
        """Return the positions of the `number` cheapest units, ascending; the lower ones of those that cost the same."""
        return cost.argsort(stable=True)[:number].sort().values

    def _panel(self, candidates: Tensor, p: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows and columns `candidates` of `P` and `V`, of which the lower halves are valid, with the diagonals p and v."""
        at = candidates[:, None] * len(self.p) + candidates
        found = []
        for whole, diagonal in ((self.p, p), (self.v, v)):
            part = whole.view(-1).index_select(0, at.view(-1)).view(at.shape)
            part.diagonal().copy_(diagonal.index_select(0, candidates))
            found.append(part)
        return found[0], found[1]

    def live(self) -> Tensor:
        return (self.v_blocks.view(-1) != torch.inf).nonzero()[:, 0]


def _among(p: Tensor, v: Tensor, steps: int, place: str) -> tuple[Tensor, Tensor, Tensor]:
    """Take `steps` steps among units of one column, on the host. Of `p` and `v` (units, units) only the lower halves are read.

    Returns:
        The removed units in order (steps,) int64, their costs (steps,), and the triangles L and M of `_Columns` (2, steps, steps).

    Raises:
        SingularError: a cost is negative or NaN.
    """
    whole = np.stack([x.cpu().double().numpy() for x in (p, v)])  # P and V
    whole = np.tril(whole) + np.tril(whole, -1).transpose(0, 2, 1)
    left = whole.diagonal(axis1=1, axis2=2).copy()
    left[1] /= 2  # so that what a step takes from both is c times [c, z]
    late, cost = np.empty((steps, 2, len(p))), np.empty(len(p))  # c and z of each step
    order, costs = np.empty(steps, dtype=np.int64), np.empty(steps)
    with np.errstate(all="ignore"), counted(3 * steps**2 * len(p)):
        for s in range(steps):
            np.divide(np.maximum(left[1], 0, out=cost), left[0], out=cost)
            u = int(cost.argmin())
            order[s], costs[s] = u, 2 * cost[u]
            if not costs[s] >= 0:
                raise SingularError(place)
            earlier, (c, z) = late[:s], late[s]
            # Not products of BLAS, whose sums may depend on the number of threads.
            np.subtract(whole[0, u], np.einsum("s,sm->m", earlier[:, 0, u], earlier[:, 0]), out=c)
            np.subtract(whole[1, u], np.einsum("sk,skm->m", earlier[:, ::-1, u], earlier), out=z)
            late[s] *= 1 / np.sqrt(left[0, u])
            z -= cost[u] * c
            left -= late[s] * c
            left[:, u] = np.finfo(np.float64).max, np.inf
    lower = np.tril(late[:, :, order].transpose(1, 2, 0))
    return torch.from_numpy(order), torch.from_numpy(costs), torch.from_numpy(lower)
