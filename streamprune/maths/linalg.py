"""The exact solutions that the stages share.

Notation of METHODS: a consumer ``y = W x`` with `W` (d_out, n); `H` (n, n) the mean Gram of its inputs;
``H_λ = H + λ·mean(diag H)·I``; `P` the inverse of ``H_λ``; `K` kept and `S` removed columns. The papers'
Hessian is ``2 X Xᵀ``: same minimiser. `H` may lie on another device than `W`, where it waits while there is no room for
it beside what is made of it: results are on W's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import NumericalError
from .blocked import TILE, cholesky_, invert_, panels
from .operations import counted

_MOST_DAMPING = 10.0


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit_columns(units: Tensor, width: int) -> Tensor:
    """Columns (units·width,) that `units` (units,) own, in order."""
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()


def all_finite(x: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor Inf. A sum shows both at a fifth of the cost; it may overflow by itself."""
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())


def cholesky(
    h: Tensor, damping: float, place: str, *, scale: float | None = None, device: torch.device | None = None
) -> tuple[Tensor, float]:
    """Lower factor of ``H + damping·scale·I`` and the damping that it took.

    `scale` is mean(diag H) unless given, which makes it the factor of ``H_λ``; an all-zero H counts as 1.
    Where float arithmetic cannot factor it, the damping is raised tenfold until it can, and returned, so
    that the report says so.

    Args:
        h: (n, n), float32 or float64; only its lower triangle is read.
        device: where the factor is to be; None for where `h` lies.

    Raises:
        NumericalError: H holds NaN or Inf, or no damping up to 10 was enough.
    """
    where = h.device if device is None else device
    scale = float(h.diagonal().mean()) if scale is None else scale
    if not all_finite(h):
        raise NumericalError(f"{place}: the Gram holds NaN or Inf")
    return _factored(lambda: h.to(where, copy=True), damping, scale, place)


def inverse(h: Tensor, damping: float, place: str, *, device: torch.device | None = None) -> tuple[Tensor, float]:
    """`P`, the inverse of ``H_λ`` (n, n), and the damping that it took: see `cholesky`."""
    factor, used = cholesky(h, damping, place, device=device)
    return invert_(factor), used


def _factored(copy: Callable[[], Tensor], damping: float, scale: float, place: str) -> tuple[Tensor, float]:
    """The factor of what `copy` gives, a matrix to be overwritten, with a ridge that is enough."""
    scale = scale or 1.0
    while damping <= _MOST_DAMPING:
        damped = copy()
        damped.diagonal().add_(damping * scale)
        if cholesky_(damped):
            return damped, damping
        del damped
        damping = max(10 * damping, 1e-6)
    raise NumericalError(f"{place}: the Gram could not be factored with damping up to {_MOST_DAMPING:g}")


def greedy_removal(
    w: Tensor, h: Tensor, *, width: int, count: int, damping: float, place: str, block: int = 64
) -> tuple[Tensor, Tensor]:
    """Remove `count` units one at a time, each time the one whose removal costs least (SoBP, stage 2).

    ::

        cost_u = tr((P_uu)⁻¹ W_uᵀ W_u)        → remove the cheapest u
        W ← W − W_u (P_uu)⁻¹ P_u:             P ← P − P_:u (P_uu)⁻¹ P_u:

    The loop needs only `P` and ``V = WᵀW``. With single columns (`width` 1) both are brought up to date
    lazily: a step forms just the pivot's columns, and every `block` steps all of them at once by matrix
    products. The order is that of the plain loop.

    A dead column (zero diagonal of H) carries nothing, so its weights count as zero and it goes first.

    Args:
        w: (d_out, n), float32 or float64.
        h: (n, n), mean Gram, same dtype.
        width: columns a unit; n = units·width.
        count: units to remove, fewer than there are.

    Returns:
        removed units in order (count,) int64, and each one's cost in output energy (count,), on the CPU.
    """
    units = h.shape[0] // width
    assert 0 <= count < units
    assert w.shape[1] == h.shape[0] == units * width
    alive = (h.diagonal() > 0).to(w)
    p, _ = inverse(h, damping, place, device=w.device)
    live = w * alive
    v = live.T @ live
    if width == 1:
        n = len(p)
        # A step: three products with up to `block` vectors; a block of steps: three updates of an n × n matrix.
        with counted(6 * n * count * (n + block // 2)):
            return _greedy_columns(p, v, count, block)
    return _greedy_groups(p, v, width, count)


def _greedy_columns(p: Tensor, v: Tensor, count: int, block: int) -> tuple[Tensor, Tensor]:
    # Removing s maps W to W(I − e_s rᵀ), r = P_s:/p_ss. Hence, with z = v_s − ½ v_ss r,
    #     V ← V − r zᵀ − z rᵀ      P ← P − c cᵀ,   c = P_:s/√p_ss
    # C, R, Z hold the last steps' vectors, which P and V do not have in them yet.
    n = p.shape[0]
    c, r, z = (torch.zeros(block, n, dtype=p.dtype, device=p.device) for _ in range(3))
    p_diagonal, v_diagonal = p.diagonal().clone(), v.diagonal().clone()
    gone = torch.zeros(n, dtype=torch.bool, device=p.device)
    order = torch.empty(count, dtype=torch.int64, device=p.device)
    costs = torch.empty(count, dtype=p.dtype, device=p.device)
    for step in range(count):
        t = step % block
        cost = (v_diagonal.clamp_min(0) / p_diagonal).masked_fill_(gone, torch.inf)
        s = cost.argmin()
        order[step], costs[step] = s, cost[s]
        p_s = p[s] - c[:t, s] @ c[:t]
        v_s = v[s] - z[:t, s] @ r[:t] - r[:t, s] @ z[:t]
        c[t] = p_s / p_s[s].sqrt()
        r[t] = p_s / p_s[s]
        z[t] = v_s - v_s[s] / 2 * r[t]
        p_diagonal -= c[t].square()
        v_diagonal -= 2 * r[t] * z[t]
        gone[s] = True
        p_diagonal[s] = 1.0
        if t == block - 1:
            p.addmm_(c.T, c, alpha=-1)
            v.addmm_(r.T, z, alpha=-1).addmm_(z.T, r, alpha=-1)
    return order.cpu(), costs.cpu()


def _greedy_groups(p: Tensor, v: Tensor, width: int, count: int) -> tuple[Tensor, Tensor]:
    units = p.shape[0] // width
    left = list(range(units))
    order, costs = [], []
    for _ in range(count):
        index = torch.tensor(left, device=p.device)
        blocks = p.view(units, width, units, width)[index, :, index]  # (left, width, width)
        energy = v.view(units, width, units, width)[index, :, index]
        cost = torch.linalg.solve(blocks, energy).diagonal(dim1=-2, dim2=-1).sum(-1)
        best = int(cost.argmin())
        u = left.pop(best)
        order.append(u)
        costs.append(cost[best])
        columns = slice(u * width, (u + 1) * width)
        r = torch.linalg.solve(p[columns, columns], p[columns])  # (width, n)
        v_u = v[columns].clone()  # (width, n)
        z = v_u - v_u[:, columns] @ r / 2
        p -= p[columns].T.clone() @ r
        v -= r.T @ z + z.T @ r
    return torch.tensor(order), torch.stack(costs).cpu() if costs else torch.empty(0, dtype=p.dtype)


def refit(w: Tensor, h: Tensor, kept: Tensor, damping: float, place: str) -> tuple[Tensor, float]:
    """Re-fit what stays: ``W'_K = W H_λ[:,K] (H_λ[K,K])⁻¹`` (SoBP, stage 3; the OBS update).

    The columns are rearranged, kept first and removed last, and one Cholesky factorisation of the kept
    block gives ``W'_K = W_K + W_S H[S,K] (H_λ[K,K])⁻¹``. The ridge of ``H_λ`` is that of the whole H.

    Args:
        w: (d_out, n).
        h: (n, n), mean Gram, same dtype.
        kept: (k,) int64, ascending, on w's device.

    Returns:
        W'_K (d_out, k), and the damping that it took.
    """
    stays = kept.to(h.device)
    goes = torch.ones(h.shape[0], dtype=torch.bool, device=h.device).index_fill_(0, stays, False).nonzero()[:, 0]
    if not all_finite(h):
        raise NumericalError(f"{place}: the Gram holds NaN or Inf")
    factor, used = _factored(lambda: h[stays[:, None], stays].to(w.device), damping, float(h.diagonal().mean()), place)
    w_s = w[:, goes.to(w.device)].T  # (s, d_out)
    right = w.new_empty(len(kept), w.shape[0])
    for panel in panels(len(kept), TILE):
        right[panel] = h[stays[panel, None], goes].to(w.device) @ w_s
    return w[:, kept] + torch.cholesky_solve(right, factor).T, used


def fit(w: Tensor, h: Tensor, aim: Tensor, factor: Tensor) -> Tensor:
    """Fit all of `w` to what it should give on the input it has: ``W' = W + (B − W H) H_λ⁻¹``, a ridge pulling to W.

    It minimises ``E‖t − W' x̂‖² + λ̄ ‖W' − W‖²`` for a target `t`. With a consumer's dense output as the target it is
    the recovery of greedy output approximation (algorithm 1).

    Args:
        w: (rows, d).
        h: (d, d), mean Gram of x̂.
        aim: B (rows, d), mean of ``t x̂ᵀ``; overwritten.
        factor: of H_λ, by `cholesky`.

    Returns:
        W' (rows, d), in the place of `aim`.
    """
    for panel in panels(h.shape[1], TILE):
        aim[:, panel].addmm_(w, h[:, panel].to(w.device), alpha=-1)
    for panel in panels(len(w), TILE):
        aim[panel] = w[panel] + torch.cholesky_solve(aim[panel].T, factor).T
    return aim


def compensation(h: Tensor, c: Tensor, factor: Tensor) -> Tensor:
    """Input compensation (SoBP): the fit of any layer that reads `x̂` where it was trained to read `x`, as a product.

    That is `fit` with ``B = W C``, for all linears that read the same: ``W' = W + W M`` with ``M = (C − H) H_λ⁻¹``.

    Args:
        h: (d, d), mean Gram of x̂.
        c: C (d, d), mean of ``x x̂ᵀ``.
        factor: of H_λ, by `cholesky`.

    Returns:
        M (d, d).
    """
    return torch.cholesky_solve((c - h).T, factor).T


def output_error(w: Tensor, h: Tensor, w_kept: Tensor, kept: Tensor) -> float:
    """``tr(E H Eᵀ) / tr(W H Wᵀ)``, E the change of W: the share of output energy lost on this input."""
    change = w.clone()
    change[:, kept] -= w_kept
    before, after = 0.0, 0.0
    for panel in panels(h.shape[1], TILE):
        columns = h[:, panel].to(w.device)
        before += float((w @ columns).mul_(w[:, panel]).sum(dtype=torch.float64))
        after += float((change @ columns).mul_(change[:, panel]).sum(dtype=torch.float64))
    return max(after, 0.0) / before if before > 0 else 0.0
