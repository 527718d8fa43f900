"""Factorisations in place, a panel at a time: one n × n matrix of memory where LAPACK's way round holds two or three.

All of the work is matrix products and triangular solves with panels, so it runs at their speed, on a GPU as well. Golub &
Van Loan, *Matrix Computations*, sections 4.2 (blocked Cholesky) and 3.1 (blocked triangular inverse).
"""

from __future__ import annotations

import torch
from torch import Tensor

PANEL = 512
"""Columns that are factored at a time."""
TILE = 2048
"""Of a symmetric or triangular product, only tiles on one side of the diagonal are computed; columns a tile."""


def panels(n: int, size: int) -> list[slice]:
    """``0 … n`` in stretches of `size`, the last one perhaps shorter."""
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def inverse_work(n: int) -> float:
    """Operations of a factorisation and an inverse, in leading terms: n³ where it is cut into many panels and tiles."""
    return n**3 * (1 + 2 * min(1, PANEL / n))


def cholesky_(a: Tensor) -> bool:
    """Overwrite a symmetric matrix with its lower factor, ``A = L Lᵀ``, zeros above the diagonal.

    Args:
        a: (n, n), float32 or float64; only its lower triangle is read.

    Returns:
        Whether `a` was positive definite to its dtype; if not, what is left of it is of no use.
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
    """Overwrite a lower factor `L` with the whole inverse ``(L Lᵀ)⁻¹``; returns it.

    Args:
        factor: (n, n), zeros above the diagonal.
    """
    _invert_triangle_(factor)
    _square_(factor)
    mirror_(factor)
    return factor


def inverse_workspace(n: int) -> int:
    """Numbers that a factorisation and inverse take beside the matrix: panels, and as many that the heap keeps of them."""
    return 8 * min(PANEL, n) * n


def solve_(factor: Tensor, b: Tensor) -> Tensor:
    """Overwrite `b` (n, m) with ``(L Lᵀ)⁻¹ b``, a panel of columns at a time; returns it.

    `torch.cholesky_solve` copies the factor and all of `b`.
    """
    for panel in panels(b.shape[1], PANEL):
        half = torch.linalg.solve_triangular(factor, b[:, panel], upper=False)
        b[:, panel] = torch.linalg.solve_triangular(factor.mT, half, upper=True)
    return b


def mirror_(a: Tensor) -> Tensor:
    """Copy the lower triangle over the upper one; returns `a` (n, n)."""
    for panel in panels(len(a), TILE):
        a[panel, panel.stop :] = a[panel.stop :, panel].mT
        corner = a[panel, panel]
        corner.copy_(corner.tril() + corner.tril(-1).mT)
    return a


def _invert_triangle_(a: Tensor) -> None:
    """``L → L⁻¹``, from the last panel to the first: ``[L⁻¹]₂₁ = −L₂₂⁻¹ L₂₁ L₁₁⁻¹``, with L₂₂⁻¹ in its place already."""
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
    """``M → MᵀM`` for a lower triangle M, its lower triangle: block row by block row, which those behind do not need."""
    for panel in panels(len(a), PANEL):
        rest = a[panel.start :]  # M's rows from here on
        a[panel, : panel.stop] = rest[:, panel].mT @ rest[:, : panel.stop]


_PRODUCT_ROWS = 512
"""Of a tile row of products: long enough for full speed, short enough to leave out nearly half."""
_COPY_ROWS = 64
"""Moved at once: what a copy of them takes is all that `shrink` needs beside the matrix."""


def add_product(s: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> None:
    """``S ← S + alpha·Aᵀ B`` in place, where ``Aᵀ B`` is symmetric.

    Args:
        s: (n, n).
        a: (k, n), same dtype and device.
        b: (k, n), likewise.
    """
    for tile in panels(len(s), _PRODUCT_ROWS):
        s[tile, : tile.stop].addmm_(a[:, tile].T, b[:, : tile.stop], alpha=alpha)


def product_work(n: float, k: float) -> float:
    """Operations of `add_product`."""
    return k * n * (n + min(n, _PRODUCT_ROWS))


def whole_rows(s: Tensor, index: Tensor) -> Tensor:
    """The rows (k, n) of `s` (n, n) at `index` (k,) int64: up to the diagonal as they lie, the rest from the columns."""
    lower = torch.arange(len(s), device=s.device) <= index[:, None]
    return torch.where(lower, s.index_select(0, index), s.T.index_select(0, index))


def diagonal_blocks(s: Tensor, width: int) -> Tensor:
    """A copy (n // width, width, width) of the blocks on the diagonal of `s` (n, n)."""
    number = len(s) // width
    blocks = s.view(number, width, number, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    return blocks.tril() + blocks.tril(-1).mT


def shrink(s: Tensor, kept: Tensor) -> Tensor:
    """`s` (n, n), contiguous, without the rows and columns that are not `kept` (k,) int64 ascending, as (k, k).

    The result takes the place of `s` in memory, whose contents are lost.
    """
    k = len(kept)
    flat = s.view(-1)
    for tile in panels(k, _COPY_ROWS):
        # Row i lands before row kept[i] began, so nothing that is still to be read is overwritten.
        rows = s.index_select(0, kept[tile]).index_select(1, kept[: tile.stop])
        flat[tile.start * k : tile.stop * k].view(-1, k)[:, : tile.stop] = rows
    return flat[: k * k].view(k, k)


def shrink_rows(a: Tensor, kept: Tensor) -> Tensor:
    """The rows of `a` (n, m) that are `kept` (k,) int64 ascending, moved up to be its first."""
    for tile in panels(len(kept), _COPY_ROWS):
        a[tile] = a.index_select(0, kept[tile])
    return a[: len(kept)]
