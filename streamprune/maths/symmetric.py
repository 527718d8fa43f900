"""Symmetric matrices of which only the lower half is kept up to date: half the work, and no second buffer.

What lies above the diagonal is never read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .blocked import panels

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
