"""Costs and updates under Kronecker-factored curvature (LLM Surgeon, sections 3.2 to 3.4).

Notation of the paper: `W` (R, C), ``θ`` its entries row by row, and the loss's curvature ``F = G ⊗ A``, `G`
(R, R) of the output gradients, `A` (C, C) of the inputs. `G` and `A` are damped ones throughout (`damped`),
and `G⁻¹`, `A⁻¹` come from `refit.inverse`: then every update is the exact minimum of ``½ δᵀ F δ`` over the changes
`δ` that remove what is to go (eqs. 7 and 8).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import ConfigError
from .refit import cholesky, cholesky_blocks, signs

_BATCH_BYTES = 64 << 20
_SKETCH = 64
"""Sums of rows from which `best_step` estimates."""


def damped(h: Tensor, damping: float, *, device: torch.device | None = None) -> Tensor:
    """``H + damping·mean(diag H)·I`` (n, n), on the device given or its own; the mean of an all-zero H counts as 1."""
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
    """``½ tr(W_uᵀ G W_u ([A⁻¹]_uu)⁻¹)`` (groups,): loss added by removing a group of columns together (eq. 7).

    With one column a group it is `column_costs`.
    """
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
    """Remove columns `S` jointly: ``W − W_S ([A⁻¹]_SS)⁻¹ [A⁻¹]_S:`` (eq. 12, by a Cholesky solve).

    With Wᵀ and G⁻¹ in the place of W and A⁻¹ it removes rows.

    Args:
        w: (R, C), float32 or float64.
        a_inverse: (C, C), same dtype.
        removed: (k,) int64.

    Returns:
        W (R, C), the removed columns exactly zero, and the relative ridge that `[A⁻¹]_SS` took to be factored.

    Raises:
        NumericalError: `[A⁻¹]_SS` could not be factored, even with a ridge.
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
    """Remove the elements `mask` marks, at most `at_most` of them jointly (eq. 11 and what follows it).

    ::

        λ_K = (E_K F⁻¹ E_Kᵀ)⁻¹ θ_K,   [E_K F⁻¹ E_Kᵀ]_ij = [G⁻¹]_{r_i r_j} [A⁻¹]_{c_i c_j}
        W ← W − G⁻¹ M A⁻¹,            M the multipliers λ at their elements' places, zero elsewhere

    The marked elements are taken row by row, `at_most` at a time; each such subset is solved for on its own,
    and their updates add up, so that M is filled by all of them and multiplied once. The work is that of a
    Cholesky factorisation a subset: ``at_most² / 3`` multiplications an element.

    `G⁻¹` and `A⁻¹` are scaled to unit diagonals first, so the ridge that a subset takes where it is too
    near singular to be factored (`cholesky_blocks`) is relative to each of its elements.

    Args:
        w: (R, C), float32 or float64.
        g_inverse: (R, R), same dtype.
        a_inverse: (C, C), same dtype.
        mask: (R, C) bool, true where an element is to go. Elements that went before must be marked too.
        at_most: most elements in one subset, at least 1.

    Returns:
        W (R, C), the marked elements exactly zero, and the largest ridge that a subset took.

    Raises:
        NumericalError: a subset could not be factored, even with a ridge.
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
    """As much of an update as adds least to the loss, and how much that is: all of it where it adds no more than none does.

    Each subset of `remove_elements` makes good its own loss as if the others stayed, so that together they may do too much. With `E`
    the change of W by zeros alone and `D` what the update adds to it, ``½ tr(G (E + sD) A (E + sD)ᵀ)`` is least at
    ``s = − tr(G E A Dᵀ) / tr(G D A Dᵀ)``. Both are estimated from sums of rows with random signs (Hutchinson).

    Args:
        updated: what `remove_elements` made of `w` (R, C) and `mask`.
        g: G (R, R), not damped, on any device.
        a: A (C, C), likewise.
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
    """Row-major indices of marked elements, (batch, m), a batch's three matrices within `_BATCH_BYTES`."""
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
    """The `m` cheapest of every `n` consecutive columns of each row (M:N pruning, section 3.3).

    Args:
        costs: (R, C); of equal ones the first goes.
        m: how many of a group go, ``0 < m < n``.
        n: columns a group.

    Returns:
        (R, C) bool, true where an element is to go.

    Raises:
        ConfigError: C is not a multiple of n.
    """
    groups = _groups(costs, m, n)
    cheapest = groups.argsort(dim=-1, stable=True)[..., :m]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, cheapest, True).view(costs.shape)


def pattern_costs(costs: Tensor, m: int, n: int) -> Tensor:
    """What each group of `pattern_mask` costs: the sum of its `m` lowest, (R, C/n) (section 3.3)."""
    return _groups(costs, m, n).sort(dim=-1).values[..., :m].sum(dim=-1)


def _groups(costs: Tensor, m: int, n: int) -> Tensor:
    assert 0 < m < n
    rows, columns = costs.shape
    if columns % n:
        raise ConfigError(f"pattern {m}:{n} needs a multiple of {n} columns; a weight has {columns}")
    return costs.reshape(rows, columns // n, n)
