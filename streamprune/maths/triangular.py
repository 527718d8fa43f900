"""In-place blocked factorisations. They hold one n × n matrix where the LAPACK route holds two or three.

All work is matrix products and triangular solves on panels, so it runs at their speed on CPUs and GPUs. See Golub & Van Loan,
*Matrix Computations*, sections 4.2 (blocked Cholesky) and 3.1 (blocked triangular inverse).
"""

from __future__ import annotations

import torch
from torch import Tensor

PANEL = 512  # columns factored at a time
TILE = 2048
"""Columns per tile. Symmetric and triangular products compute only the tiles on one side of the diagonal."""


def panels(n: int, size: int) -> list[slice]:
    """Split ``range(n)`` into slices of length `size`; the last one may be shorter."""
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def cholesky_(a: Tensor) -> bool:
    """Overwrite a symmetric `a` (n, n), of which only the lower triangle is read, with its lower Cholesky factor, ``A = L Lᵀ``.

    Returns whether `a` was positive definite in its dtype; if not, its contents are undefined.
    """
    n = len(a)
    for panel in panels(n, PANEL):
        corner = a[panel, panel]
        factor, info = torch.linalg.cholesky_ex(corner)
        if int(info):
            return False
        corner.copy_(factor)
        below = a[panel.stop :, panel]
        if not len(below):
            continue
        # L₂₁ = A₂₁ L₁₁⁻ᵀ, then A₂₂ ← A₂₂ − L₂₁ L₂₁ᵀ.
        below.copy_(torch.linalg.solve_triangular(factor.mT, below, upper=True, left=False))
        a[panel, panel.stop :] = 0
        for tile in panels(len(below), TILE):
            a[panel.stop + tile.start :, panel.stop + tile.start : panel.stop + tile.stop].addmm_(
                below[tile.start :], below[tile].mT, alpha=-1
            )
    return True


def invert_(factor: Tensor) -> Tensor:
    """Overwrite a lower factor `L` (n, n), with zeros above the diagonal, with the full inverse ``(L Lᵀ)⁻¹``, and return it."""
    _invert_triangle_(factor)
    _square_(factor)
    mirror_(factor)
    return factor


def inverse_workspace(n: int) -> int:
    """Return the elements that factoring and inverting (n, n) holds besides the matrix: panels, live or retained by the heap."""
    return 8 * min(PANEL, n) * n


def solve_(factor: Tensor, b: Tensor) -> Tensor:
    """Overwrite `b` (n, m) with ``(L Lᵀ)⁻¹ b``, one panel of columns at a time, and return it. `factor` is L (n, n), lower.

    Unlike this, `torch.cholesky_solve` copies the factor and all of `b`.
    """
    for panel in panels(b.shape[1], PANEL):
        half = torch.linalg.solve_triangular(factor, b[:, panel], upper=False)
        b[:, panel] = torch.linalg.solve_triangular(factor.mT, half, upper=True)
    return b


def mirror_(a: Tensor) -> Tensor:
    """Copy the lower triangle of `a` (n, n) to the upper one, in place, and return `a`."""
    for panel in panels(len(a), TILE):
        a[panel, panel.stop :] = a[panel.stop :, panel].mT
        corner = a[panel, panel]
        corner.copy_(corner.tril() + corner.tril(-1).mT)
    return a


def _invert_triangle_(a: Tensor) -> None:
    """Overwrite L (n, n) with L⁻¹, from the last panel to the first: ``[L⁻¹]₂₁ = −L₂₂⁻¹ L₂₁ L₁₁⁻¹``, with L₂₂⁻¹ already computed."""
    for panel in reversed(panels(len(a), PANEL)):
        corner = a[panel, panel]
        identity = torch.eye(len(corner), dtype=a.dtype, device=a.device)
        corner.copy_(torch.linalg.solve_triangular(corner, identity, upper=False))
        below = a[panel.stop :, panel]
        if not len(below):
            continue
        product = below @ corner
        inverted = a[panel.stop :, panel.stop :]
        for tile in panels(len(below), TILE):
            below[tile] = (inverted[tile, : tile.stop] @ product[: tile.stop]).neg_()


def _square_(a: Tensor) -> None:
    """Overwrite a lower triangle M (n, n) with the lower triangle of MᵀM. Later block rows do not need the overwritten ones."""
    for panel in panels(len(a), PANEL):
        rest = a[panel.start :]  # rows of M from here on
        a[panel, : panel.stop] = rest[:, panel].mT @ rest[:, : panel.stop]


_PRODUCT_ROWS = 512
"""Rows per tile of `add_product`: enough for full speed, yet few enough to skip nearly half of the product."""
_COPY_ROWS = 64
"""Rows moved at a time. `shrink` needs memory for a copy of this many rows besides the matrix."""


def add_product(s: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> None:
    """Add ``alpha·Aᵀ B``, which must be symmetric, to the lower half of S (n, n), in place; A and B are (k, n)."""
    for tile in panels(len(s), _PRODUCT_ROWS):
        s[tile, : tile.stop].addmm_(a[:, tile].T, b[:, : tile.stop], alpha=alpha)


def whole_rows(s: Tensor, index: Tensor) -> Tensor:
    """Return the rows (k, n) at `index` (k,) int64 of a symmetric `s` (n, n), of which only the lower half is read."""
    lower = torch.arange(len(s), device=s.device) <= index[:, None]
    return torch.where(lower, s.index_select(0, index), s.T.index_select(0, index))


def diagonal_blocks(s: Tensor, width: int) -> Tensor:
    """Copy the diagonal blocks of a symmetric `s` (n, n), of which only the lower half is read: (n // width, width, width)."""
    number = len(s) // width
    blocks = s.view(number, width, number, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    return blocks.tril() + blocks.tril(-1).mT


def shrink(s: Tensor, kept: Tensor) -> Tensor:
    """Keep only the rows and columns `kept` (k,) int64, ascending, of a contiguous symmetric `s` (n, n), in place.

    Only the lower half is kept up to date. Returns (k, k), in the memory of `s`.
    """
    k = len(kept)
    flat = s.view(-1)
    for tile in panels(k, _COPY_ROWS):
        # New row i ends before old row kept[i] + 1 begins, so no unread entry is overwritten.
        rows = s.index_select(0, kept[tile]).index_select(1, kept[: tile.stop])
        flat[tile.start * k : tile.stop * k].view(-1, k)[:, : tile.stop] = rows
    return flat[: k * k].view(k, k)


def shrink_rows(a: Tensor, kept: Tensor) -> Tensor:
    """Keep only the rows `kept` (k,) int64, ascending, of `a` (n, m), in place. Returns (k, m), in the memory of `a`."""
    for tile in panels(len(kept), _COPY_ROWS):
        a[tile] = a.index_select(0, kept[tile])
    return a[: len(kept)]
