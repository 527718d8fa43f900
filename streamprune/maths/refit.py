"""Closed-form solutions shared by the recipes: refit, fit, compensation, and the Cholesky factorisations behind them.

Notation of docs/methods.md: a consumer ``y = W x`` with `W` (d_out, n); `H` (n, n) is the mean Gram of its inputs per token;
``H_λ = H + λ·mean(diag H)·I``; `P` is the inverse of ``H_λ``; `K` are the kept and `S` the removed columns. The papers' Hessian
is ``2 X Xᵀ``, which has the same minimiser.

Arguments of the same name mean the same in all of `maths`: `w` is W and `h` is H, float32 or float64, the same dtype throughout;
`kept` is K (k,) int64, ascending, on w's device; `damping` is λ; `place` is the name of the site, for messages. `H` may be on
another device than `W`: it stays on the host when the device has no room for it. Results are on W's device.

Raises:
    NumericalError: a matrix holds NaN or Inf, or (SingularError) cannot be factored with any damping up to 10.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..errors import NumericalError, SingularError
from .triangular import PANEL, TILE, cholesky_, invert_, panels, solve_

_MOST_DAMPING = 10.0  # limit on the relative ridge λ
SKETCH = 512  # random row combinations from which output energies are estimated, for layers with more rows
_TRIED = 8  # random row combinations on which `lowers_error` checks a refit, for layers with more rows


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the accumulation dtype: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit_columns(units: Tensor, width: int) -> Tensor:
    """Return the columns (k·width,) int64 of `units` (k,) int64, in the order of `units`."""
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()


def all_finite(x: Tensor) -> bool:
    """Return whether `x` is free of NaN and Inf. The sum is checked first, at a fifth of the cost; it may overflow."""
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())


def advice(dtype: torch.dtype) -> str:
    """Return a hint for messages about NaN or Inf if `dtype` overflows easily (float16); else an empty string."""
    return "; float16 ends at 65504, and --dtype bfloat16 or float32 far beyond" if dtype == torch.float16 else ""


def cholesky(
    h: Tensor, damping: float, place: str, *, scale: float | None = None, device: torch.device | None = None
) -> tuple[Tensor, float]:
    """Factor ``H + damping·scale·I`` and return the lower Cholesky factor (n, n) and the damping used.

    If the factorisation fails in floating point, the damping is raised tenfold until it succeeds.

    Args:
        h: only its lower triangle is read.
        scale: mean(diag H) if None, which gives the factor of ``H_λ``. A scale of zero counts as 1.
        device: device of the factor; None for that of `h`.
    """
    where = h.device if device is None else device
    scale = float(h.diagonal().mean()) if scale is None else scale
    if not all_finite(h):
        raise NumericalError(f"{place}: the Gram holds NaN or Inf")
    return _factored(lambda: h.to(where, copy=True, memory_format=torch.contiguous_format), damping, scale, place)


def inverse(h: Tensor, damping: float, place: str, *, device: torch.device | None = None) -> tuple[Tensor, float]:
    """Return `P`, the inverse of ``H_λ`` (n, n), and the damping used. Arguments are those of `cholesky`."""
    factor, used = cholesky(h, damping, place, device=device)
    return invert_(factor), used


def _factored(copy: Callable[[], Tensor], damping: float, scale: float, place: str) -> tuple[Tensor, float]:
    """Factor the matrix that `copy` returns, in place, with a sufficient ridge. Returns the factor and the damping used."""
    scale = scale or 1.0
    for ridge in dampings(damping):
        damped = copy()
        damped.diagonal().add_(ridge * scale)
        if cholesky_(damped):
            return damped, ridge
        del damped
    raise SingularError(f"{place}: the Gram could not be factored with damping up to {_MOST_DAMPING:g}")


def dampings(damping: float) -> Iterator[float]:
    """Yield `damping`, then ten times the last value (at least 1e-6) while that is at most 10."""
    while damping <= _MOST_DAMPING:
        yield damping
        damping = raised(damping)


def raised(damping: float) -> float:
    return max(10 * damping, 1e-6)


def others(index: Tensor, n: int) -> Tensor:
    """Return the numbers below `n` that are not in `index` (k,) int64: (n − k,) int64 ascending, on its device."""
    return torch.ones(n, dtype=torch.bool, device=index.device).index_fill_(0, index, False).nonzero()[:, 0]


def refit(w: Tensor, h: Tensor, kept: Tensor, damping: float, place: str) -> tuple[Tensor, float]:
    """Refit the kept columns: ``W'_K = W H_λ[:,K] (H_λ[K,K])⁻¹`` (SoBP, stage 3; the OBS update).

    Computed as ``W'_K = W_K + W_S H[S,K] (H_λ[K,K])⁻¹``, with one Cholesky factorisation of the kept block. The ridge of
    ``H_λ`` is that of the full H. Returns W'_K (d_out, k) and the damping used.
    """
    stays = kept.to(h.device)
    goes = others(stays, len(h))
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
    """Like `refit`, but raise the damping until the refitted weights, rounded to `stored`, give a lower error than those of `w`.

    If one channel is much larger than the others, rounding can cost more than a refit gains. Returns W_K and None if no
    damping up to 10 helps.
    """
    while damping <= _MOST_DAMPING:
        fitted, used = refit(w, h, kept, damping, place)
        if lowers_error(w, h, fitted, kept, stored):
            return fitted, used
        damping = raised(used)
    return w[:, kept], None


def lowers_error(w: Tensor, h: Tensor, fitted: Tensor, kept: Tensor, stored: torch.dtype) -> bool:
    """Return whether the refitted weights leave no more output error than the kept columns of `w`, both rounded to `stored`.

    With δ the difference of the two and `E` the change of W by removal alone, the error energy changes by
    ``tr(δ H δᵀ) + 2 tr(E H δᵀ)``. The exact solution lowers it by at least ``tr(δ H δᵀ)``, in each row and in any combination of
    rows, so a few random combinations suffice to detect a solution that rounding has spoilt. `fitted` is W'_K (d_out, k).
    """
    mixing = signs(_TRIED, w)
    lost = (mixing @ w).index_fill_(1, kept, 0)  # −E
    change = torch.zeros_like(lost)
    for panel in panels(len(w), PANEL):
        plain = w[panel][:, kept]
        before, after = (each.to(stored).to(w.dtype) for each in (plain, fitted[panel]))
        lost[:, kept] += mixing[:, panel] @ (plain - before)
        change[:, kept] += mixing[:, panel] @ (after - before)
    # Rows of H, which is symmetric, are in one piece, also in host memory.
    gained = torch.cat([lost @ h[panel].to(w.device).T for panel in panels(len(h), TILE)], dim=1).mul_(change)
    return _energy(change, h) <= 2 * float(gained.sum(dtype=torch.float64))


def fit(w: Tensor, h: Tensor, aim: Tensor, factor: Tensor) -> Tensor:
    """Fit all of `w` to a target `t`: ``W' = W + (B − W H) H_λ⁻¹``, which minimises ``E‖t − W' x̂‖² + λ·mean(diag H)·‖W' − W‖²``.

    If the target is the dense output of a consumer, this is the recovery step of greedy output approximation (algorithm 1).

    Args:
        aim: B (d_out, n), mean of ``t x̂ᵀ`` per token; overwritten with the result.
        factor: (n, n), the factor of H_λ by `cholesky`.
    """
    for panel in panels(h.shape[1], TILE):
        aim[:, panel].addmm_(w, h[panel].to(w.device).T, alpha=-1)
    for panel in panels(len(w), PANEL):
        aim[panel] = w[panel] + solve_(factor, aim[panel].T.contiguous()).T
    return aim


def compensation(h: Tensor, c: Tensor, factor: Tensor) -> Tensor:
    """Return `M` (d, d), which adapts any linear trained on `x` to read `x̂` instead: ``W' = W + W M`` (input compensation, SoBP).

    Equals `fit` with ``B = W C``, for all linears with the same input: ``M = (C − H) H_λ⁻¹``.

    Args:
        h: (d, d), mean Gram of x̂ per token.
        c: C (d, d), mean of ``x x̂ᵀ`` per token.
        factor: (d, d), the factor of H_λ by `cholesky`.
    """
    return solve_(factor, (c - h).T.contiguous()).T


def output_error(w: Tensor, h: Tensor, w_kept: Tensor, kept: Tensor) -> float:
    """Return ``tr(E H Eᵀ) / tr(W H Wᵀ)``, with E the change of W to `w_kept` (d_out, k): the fraction of output energy lost.

    Exact for up to `SKETCH` rows. More rows are first mixed into `SKETCH` random-sign combinations (Hutchinson's trace
    estimator). Both energies keep their expectation, with a relative standard deviation of at most ``√(2 / SKETCH)``, 6 %.
    The exact value would take more work than computing the weights.
    """
    d = len(w)
    if d > SKETCH:
        mixing = signs(SKETCH, w)
        w, w_kept = mixing @ w, mixing @ w_kept
    change = w.clone()
    change[:, kept] -= w_kept
    before, after = _energy(w, h), _energy(change, h)
    return 0.0 if before <= 0 else max(after, 0.0) / before


def signs(count: int, rows: Tensor) -> Tensor:
    """Return a fixed matrix of random signs ±1 (count, d) to mix `rows` (d, n) with; the identity (d, d) if ``d ≤ count``."""
    if len(rows) <= count:
        return torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 2, (count, len(rows)), generator=generator).to(rows) * 2 - 1


def _energy(w: Tensor, h: Tensor) -> float:
    """Return ``tr(W H Wᵀ)`` from the blocks of H on and below the diagonal; those below count twice."""
    total = 0.0
    for panel in panels(h.shape[1], PANEL):
        product = w[:, panel] @ h[panel, panel].to(w.device)
        if panel.stop < len(h):
            product.addmm_(w[:, panel.stop :], h[panel.stop :, panel].to(w.device), alpha=2)
        total += float(product.mul_(w[:, panel]).sum(dtype=torch.float64))
    return total


def cholesky_blocks(blocks: Tensor, place: str) -> tuple[Tensor, float]:
    """Factor a batch of symmetric positive definite matrices (batch, m, m); return the factors and the largest relative ridge used.

    A block that cannot be factored in its dtype gets the smallest ridge that `cholesky` finds.
    """
    factors: Tensor
    factors, info = torch.linalg.cholesky_ex(blocks)
    most = 0.0
    for b in info.nonzero()[:, 0].tolist():
        factors[b], ridge = cholesky(blocks[b], 0.0, place)
        most = max(most, ridge)
    return factors, most
