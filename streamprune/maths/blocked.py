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
