"""Removal costs and updates under Kronecker-factored curvature (LLM Surgeon, sections 3.2 to 3.4).

Notation of the paper: `W` (R, C) with entries ``θ`` in row-major order; the curvature of the loss is ``F = G ⊗ A``, with `G`
(R, R) the Gram of the output gradients and `A` (C, C) the Gram of the inputs. Unless noted otherwise, `G` and `A` are damped
(see `damped`), and `G⁻¹` and `A⁻¹` come from `refit.inverse`. Each update is then the exact minimum of ``½ δᵀ F δ`` over all
changes `δ` that remove the chosen weights (eqs. 7 and 8). All tensors are float32 or float64. Updates return W (R, C), with the
removed weights exactly zero, and the largest relative ridge that a factorisation needed; they raise a NumericalError if none
up to 10 sufficed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import ConfigError
from .refit import cholesky, cholesky_blocks, signs

_BATCH_BYTES = 64 << 20  # limit on the matrices of one batch of subsets, in bytes
_SKETCH = 64  # random row combinations from which `best_step` estimates


def damped(h: Tensor, damping: float, *, device: torch.device | None = None) -> Tensor:
    """Return ``H + damping·mean(diag H)·I`` for `h` (n, n), on `device` or h's own. The mean of an all-zero H counts as 1."""
    ridge = damping * (float(h.diagonal().mean()) or 1.0)
    result = h.to(h.device if device is None else device, copy=True)
    result.diagonal().add_(ridge)
    return result


def row_costs(w: Tensor, a: Tensor, g_inverse: Tensor) -> Tensor:
    """``L_r = ½ θ_rᵀ A θ_r / [G⁻¹]_rr`` (R,): loss added by removing row `r` alone (eq. 10)."""
    return (w @ a).mul_(w).sum(dim=1) / (2 * g_inverse.diagonal())


def column_costs(w: Tensor, g: Tensor, a_inverse: Tensor) -> Tensor:
    """``L_c = ½ θ_cᵀ G θ_c / [A⁻¹]_cc`` (C,): loss added by removing column `c` alone (eq. 10)."""
    return row_costs(w.T, g, a_inverse)


def group_costs(w: Tensor, g: Tensor, a_inverse: Tensor, groups: int) -> Tensor:
    """``½ tr(W_uᵀ G W_u ([A⁻¹]_uu)⁻¹)`` (groups,): loss added by jointly removing C/groups consecutive columns (eq. 7)."""
    width = w.shape[1] // groups
    index = torch.arange(groups, device=w.device)
    columns = w.reshape(len(w), groups, width).transpose(0, 1)  # (groups, R, width)
    energy = columns.transpose(1, 2) @ (g @ columns)
    blocks = a_inverse.view(groups, width, groups, width)[index, :, index]
    costs: Tensor = torch.linalg.solve(blocks, energy).diagonal(dim1=-2, dim2=-1).sum(-1) / 2
    return costs


def element_costs(w: Tensor, g_inverse: Tensor, a_inverse: Tensor) -> Tensor:
    """``L_k = ½ θ_k² / [G⁻¹ ⊗ A⁻¹]_kk`` (R, C): loss added by removing element `k` alone (eq. 10)."""
    return w.square() / (2 * g_inverse.diagonal()[:, None] * a_inverse.diagonal())


def remove_columns(w: Tensor, a_inverse: Tensor, removed: Tensor, place: str) -> tuple[Tensor, float]:
    """Remove columns `S` (k,) int64 jointly: ``W − W_S ([A⁻¹]_SS)⁻¹ [A⁻¹]_S:`` (eq. 12, by a Cholesky solve).

    To remove rows, pass Wᵀ and G⁻¹ in place of W and A⁻¹.
    """
    if not len(removed):
        return w.clone(), 0.0
    a_s = a_inverse[removed]  # (k, C)
    factor, ridge = cholesky(a_s[:, removed], 0.0, place)
    multipliers = torch.cholesky_solve(w[:, removed].T, factor).T  # (R, k)
    return torch.addmm(w, multipliers, a_s, alpha=-1).index_fill_(1, removed, 0), ridge


def remove_elements(
    w: Tensor, g_inverse: Tensor, a_inverse: Tensor, mask: Tensor, *, at_most: int, place: str
) -> tuple[Tensor, float]:
    """Remove the elements marked in `mask` (R, C) bool, up to `at_most` of them jointly (eq. 11 and the text after it).

    ::

        λ_K = (E_K F⁻¹ E_Kᵀ)⁻¹ θ_K,   [E_K F⁻¹ E_Kᵀ]_ij = [G⁻¹]_{r_i r_j} [A⁻¹]_{c_i c_j}
        W ← W − G⁻¹ M A⁻¹,            M holds the multipliers λ at the removed elements, zero elsewhere

    The mask must include all elements removed earlier. They are split in row-major order into subsets of `at_most`. Each subset
    is solved separately, with one Cholesky factorisation, and the updates are added: all subsets fill one M, which is multiplied
    once. `G⁻¹` and `A⁻¹` are first scaled to unit diagonals, so that the ridge of a nearly singular subset (see `cholesky_blocks`)
    is relative to each of its elements.
    """
    assert mask.shape == w.shape
    assert at_most >= 1
    columns = w.shape[1]
    g_scale, a_scale = g_inverse.diagonal().rsqrt(), a_inverse.diagonal().rsqrt()
    g_unit = g_inverse * g_scale[:, None] * g_scale
    a_unit = a_inverse * a_scale[:, None] * a_scale
    scaled = (w * g_scale[:, None] * a_scale).flatten()
    multipliers, most = torch.zeros_like(scaled), 0.0
    for elements in _subsets(mask, at_most, w.element_size()):  # (batch, m)
        r, c = elements // columns, elements % columns
        blocks = g_unit[r[:, :, None], r[:, None, :]].mul_(a_unit[c[:, :, None], c[:, None, :]])
        factors, ridge = cholesky_blocks(blocks, place)
        most = max(most, ridge)
        multipliers[elements] = torch.cholesky_solve(scaled[elements][:, :, None], factors)[:, :, 0]
    m = multipliers.view_as(w).mul_(g_scale[:, None]).mul_(a_scale)
    return torch.addmm(w, g_inverse @ m, a_inverse, alpha=-1).masked_fill_(mask, 0), most


def best_step(w: Tensor, updated: Tensor, mask: Tensor, g: Tensor, a: Tensor) -> tuple[Tensor, float]:
    """Scale an update to minimise the loss. The full update is kept if it adds no more loss than zeroing alone.

    Each subset of `remove_elements` compensates its own loss as if the others stayed, so together the updates may
    overshoot. With `E` the change of W by zeroing alone and `D` the further change by the update,
    ``½ tr(G (E + sD) A (E + sD)ᵀ)`` is minimal at ``s = − tr(G E A Dᵀ) / tr(G D A Dᵀ)``; s is clamped to [0, 1]. Both traces are
    estimated from random-sign combinations of rows (Hutchinson).

    Args:
        w: before the removal.
        updated: result of `remove_elements` for `w` and `mask`.
        g, a: G and A, undamped, on any device.

    Returns:
        W (R, C), with the marked elements zero, and s.
    """
    zeroed = w.masked_fill(mask, 0)
    change = updated - zeroed
    z = signs(_SKETCH, w)
    weighted, moved = z @ g.to(w.device), z @ change
    slope, curvature = (
        float((weighted @ each @ a.to(w.device)).mul_(moved).sum(dtype=torch.float64)) for each in (zeroed - w, change)
    )
    if 2 * slope + curvature <= 0:
        return updated, 1.0
    step = min(max(-slope / curvature, 0.0), 1.0) if curvature > 0 else 0.0
    return zeroed.add_(change, alpha=step), step


def _subsets(mask: Tensor, at_most: int, itemsize: int) -> Iterator[Tensor]:
    """Yield row-major indices of marked elements (batch, m); the three matrices of a batch fit into `_BATCH_BYTES`."""
    marked = mask.flatten().nonzero()[:, 0]
    if not len(marked):
        return
    m = min(at_most, len(marked))
    whole = len(marked) // m * m
    subsets = marked[:whole].view(-1, m)
    batch = max(1, _BATCH_BYTES // (3 * m * m * itemsize))
    for start in range(0, len(subsets), batch):
        yield subsets[start : start + batch]
    if whole < len(marked):
        yield marked[None, whole:]


def pattern_mask(costs: Tensor, m: int, n: int) -> Tensor:
    """Mark the `m` cheapest of every `n` consecutive columns in each row (M:N pruning, section 3.3); ties go to the lower column.

    Returns:
        (R, C) bool, true for elements to remove.

    Raises:
        ConfigError: C is not a multiple of n.
    """
    groups = _groups(costs, m, n)
    cheapest = groups.argsort(dim=-1, stable=True)[..., :m]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, cheapest, True).view(costs.shape)


def pattern_costs(costs: Tensor, m: int, n: int) -> Tensor:
    """Return the cost of each group of `pattern_mask` (R, C/n): the sum of its `m` lowest `costs` (R, C) (section 3.3)."""
    return _groups(costs, m, n).sort(dim=-1).values[..., :m].sum(dim=-1)


def _groups(costs: Tensor, m: int, n: int) -> Tensor:
    assert 0 < m < n
    rows, columns = costs.shape
    if columns % n:
        raise ConfigError(f"pattern {m}:{n} needs a multiple of {n} columns; a weight has {columns}")
    return costs.reshape(rows, columns // n, n)
