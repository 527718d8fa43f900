"""The exact solutions that the stages share.

Notation of METHODS: a consumer ``y = W x`` with `W` (d_out, n); `H` (n, n) the mean Gram of its inputs;
``H_λ = H + λ·mean(diag H)·I``; `P` the inverse of ``H_λ``; `K` kept and `S` removed columns. The papers'
Hessian is ``2 X Xᵀ``: same minimiser. `H` may lie on another device than `W`, where it waits while there is no room for
it beside what is made of it: results are on W's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import NumericalError, SingularError
from .triangular import PANEL, TILE, cholesky_, invert_, panels, solve_

Result = TypeVar("Result")

_MOST_DAMPING = 10.0
SKETCH = 512
"""Rows from which output energies of a wider layer are estimated."""
_TRIED = 8
"""Rows on which a re-fit of a wider layer is tried."""


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit_columns(units: Tensor, width: int) -> Tensor:
    """Columns (units·width,) that `units` (units,) own, in order."""
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()


def all_finite(x: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor Inf. A sum shows both at a fifth of the cost; it may overflow by itself."""
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())


def advice(dtype: torch.dtype) -> str:
    """What a message about NaN or Inf adds where numbers computed in `dtype` end early."""
    return "; float16 ends at 65504, and --dtype bfloat16 or float32 far beyond" if dtype == torch.float16 else ""


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
        NumericalError: H holds NaN or Inf.
        SingularError: no damping up to 10 was enough.
    """
    where = h.device if device is None else device
    scale = float(h.diagonal().mean()) if scale is None else scale
    if not all_finite(h):
        raise NumericalError(f"{place}: the Gram holds NaN or Inf")
    return _factored(lambda: h.to(where, copy=True, memory_format=torch.contiguous_format), damping, scale, place)


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
        damping = raised(damping)
    raise SingularError(f"{place}: the Gram could not be factored with damping up to {_MOST_DAMPING:g}")


def raised(damping: float) -> float:
    """The damping to try where `damping` was too little."""
    return max(10 * damping, 1e-6)


def enough(damping: float, attempt: Callable[[float], Result]) -> Result:
    """What `attempt` gives with `damping`, or with the least of its tenfolds with which it finds no matrix singular.

    Raises:
        SingularError: it does up to 10.
    """
    while True:
        try:
            return attempt(damping)
        except SingularError:
            damping = raised(damping)
            if damping > _MOST_DAMPING:
                raise


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
    return w[:, kept].add_(solve_(factor, right).T), used


def refit_as_stored(
    w: Tensor, h: Tensor, kept: Tensor, damping: float, stored: torch.dtype, place: str
) -> tuple[Tensor, float | None]:
    """`refit` with the damping, or more, with which the weights that are stored are better than those of `w`.

    Beside a channel that is far larger than others, rounding can cost more than a re-fit gains.

    Returns:
        W'_K (d_out, k), and the damping that it took; None where none was enough, and W'_K is W_K.
    """
    while damping <= _MOST_DAMPING:
        fitted, used = refit(w, h, kept, damping, place)
        if lowers_error(w, h, fitted, kept, stored):
            return fitted, used
        damping = raised(used)
    return w[:, kept], None


def lowers_error(w: Tensor, h: Tensor, fitted: Tensor, kept: Tensor, stored: torch.dtype) -> bool:
    """Whether re-fitted weights leave no more output error than the kept columns of `w` do, both as they are stored.

    With δ the difference of the two and `E` the change of W by removal alone, the error's energy changes by
    ``tr(δ H δᵀ) + 2 tr(E H δᵀ)``. The exact solution takes away ``tr(δ H δᵀ)`` and more, row by row and in any sum of rows,
    so a few such sums tell it from one that rounding has spoilt.

    Args:
        fitted: W'_K (d_out, k).
        stored: the dtype that it will be rounded to.
    """
    mixing = signs(_TRIED, w)
    lost = (mixing @ w).index_fill_(1, kept, 0)  # −E
    change = torch.zeros_like(lost)
    for panel in panels(len(w), PANEL):
        plain = w[panel][:, kept]
        before, after = (each.to(stored).to(w.dtype) for each in (plain, fitted[panel]))
        lost[:, kept] += mixing[:, panel] @ (plain - before)
        change[:, kept] += mixing[:, panel] @ (after - before)
    gained = torch.cat([lost @ h[:, panel].to(w.device) for panel in panels(h.shape[1], TILE)], dim=1).mul_(change)
    return _energy(change, h) <= 2 * float(gained.sum(dtype=torch.float64))


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
    for panel in panels(len(w), PANEL):
        aim[panel] = w[panel] + solve_(factor, aim[panel].T.contiguous()).T
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
    return solve_(factor, (c - h).T.contiguous()).T


def output_error(w: Tensor, h: Tensor, w_kept: Tensor, kept: Tensor) -> float:
    """``tr(E H Eᵀ) / tr(W H Wᵀ)``, E the change of W: the share of output energy lost on this input.

    Exact for up to `SKETCH` rows. More of them are mixed into so many sums of random signs first (Hutchinson's estimate of a
    trace): both energies keep their expectation, with a relative standard deviation of at most ``√(2 / SKETCH)``, 6 %; done in
    full, this figure would take more work than all that makes the weights.
    """
    d = len(w)
    if d > SKETCH:
        mixing = signs(SKETCH, w)
        w, w_kept = mixing @ w, mixing @ w_kept
    change = w.clone()
    change[:, kept] -= w_kept
    before, after = _energy(w, h), _energy(change, h)
    return 0.0 if before <= 0 else max(after, 0.0) / before


def output_error_work(d: int, n: float, k: float) -> float:
    """Operations of `output_error` with W (d, n), of which `k` columns stay."""
    rows = min(d, SKETCH)
    mixing = 2 * rows * d * (n + k) if d > SKETCH else 0
    return mixing + 2 * rows * n * (n + min(n, PANEL))


def signs(count: int, rows: Tensor) -> Tensor:
    """(count, d) of ±1 to mix `rows` (d, n) with, the same ones every time; where they are no more than that, the identity (d, d)."""
    if len(rows) <= count:
        return torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 2, (count, len(rows)), generator=generator).to(rows) * 2 - 1


def _energy(w: Tensor, h: Tensor) -> float:
    """``tr(W H Wᵀ)`` by the lower half of H: what lies below the diagonal counts twice."""
    total = 0.0
    for panel in panels(h.shape[1], PANEL):
        product = w[:, panel] @ h[panel, panel].to(w.device)
        if panel.stop < len(h):
            product.addmm_(w[:, panel.stop :], h[panel.stop :, panel].to(w.device), alpha=2)
        total += float(product.mul_(w[:, panel]).sum(dtype=torch.float64))
    return total


def cholesky_blocks(blocks: Tensor, place: str) -> tuple[Tensor, float]:
    """Lower factors (batch, m, m) of positive definite `blocks` (batch, m, m), by one batched call, and the largest ridge taken.

    A block that its dtype cannot factor takes the least relative ridge that `cholesky` finds for it.

    Raises:
        NumericalError: a block holds NaN or Inf, or no ridge up to 10 was enough.
    """
    factors: Tensor
    factors, info = torch.linalg.cholesky_ex(blocks)
    most = 0.0
    for b in info.nonzero()[:, 0].tolist():
        factors[b], ridge = cholesky(blocks[b], 0.0, place)
        most = max(most, ridge)
    return factors, most
