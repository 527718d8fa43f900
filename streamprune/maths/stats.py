"""Running sums of one site: fed micro-batch by micro-batch, mergeable, savable.

Two workers' halves of the same site add up by `merge`; `tensors` and `from_tensors` go through a file.
"""

from __future__ import annotations

import torch
from torch import Tensor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Gram:
    """``H = X̂ X̂ᵀ`` and, where a second stream is fed too, ``C = X X̂ᵀ``; sums over tokens, not means.

    X is a linear's input on the dense model, X̂ the same input on the model pruned so far.
    """

    def __init__(self, columns: int, *, cross: bool, device: torch.device, dtype: torch.dtype) -> None:
        self.tokens = 0
        self.h = torch.zeros(columns, columns, device=device, dtype=dtype)
        self.c = torch.zeros_like(self.h) if cross else None

    def add(self, pruned: Tensor, dense: Tensor | None = None) -> None:
        """Add one micro-batch.

        Args:
            pruned: X̂, (..., n), any float dtype.
            dense: X, same shape; given exactly when the sum was made with ``cross``.
        """
        assert (dense is None) == (self.c is None)
        x_hat = pruned.reshape(-1, pruned.shape[-1]).to(self.h.dtype)
        self.h.addmm_(x_hat.T, x_hat)
        if dense is not None and self.c is not None:
            self.c.addmm_(dense.reshape(x_hat.shape).to(self.h.dtype).T, x_hat)
        self.tokens += x_hat.shape[0]

    def merge(self, other: Gram) -> None:
        """Add another worker's sums."""
        self.h += other.h
        if self.c is not None and other.c is not None:
            self.c += other.c
        self.tokens += other.tokens

    def mean(self) -> tuple[Tensor, Tensor | None]:
        """(H, C) per token, in place: the sums are gone after it."""
        return self.h.div_(self.tokens), None if self.c is None else self.c.div_(self.tokens)


class MaskGradient:
    """``g_u = ∂loss/∂m_u`` for a mask `m_u` that multiplies unit `u` of the consumer's input.

    The loss is one sequence's mean negative log-likelihood a predicted token, so `g` is per sequence;
    kept are the sums over sequences of `g²` and of `|g|`.
    """

    def __init__(self, units: int, width: int) -> None:
        self.width = width
        self.sequences = 0
        self.squares = torch.zeros(units, dtype=torch.float64)
        self.magnitudes = torch.zeros(units, dtype=torch.float64)

    def add(self, x: Tensor, gradient: Tensor, scale: float) -> None:
        """Add a micro-batch of sequences.

        Args:
            x: the consumer's input, (sequences, tokens, units·width).
            gradient: ∂(loss·scale)/∂x, same shape.
            scale: what the loss was multiplied by.
        """
        dtype = accumulator(x.dtype)
        products = (x.to(dtype) * gradient.to(dtype)).sum(dim=1)  # (sequences, n)
        g = products.view(products.shape[0], -1, self.width).sum(dim=2).double().cpu() / scale  # (sequences, units)
        self.squares += g.square().sum(dim=0)
        self.magnitudes += g.abs().sum(dim=0)
        self.sequences += g.shape[0]

    def merge(self, other: MaskGradient) -> None:
        """Add another worker's sums."""
        self.squares += other.squares
        self.magnitudes += other.magnitudes
        self.sequences += other.sequences

    def tensors(self) -> dict[str, Tensor]:
        """What a file needs to hold."""
        counts = torch.tensor([self.sequences, self.width])
        return {"squares": self.squares, "magnitudes": self.magnitudes, "counts": counts}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> MaskGradient:
        """The inverse of `tensors`."""
        sequences, width = tensors["counts"].tolist()
        stats = cls(tensors["squares"].numel(), width)
        stats.sequences, stats.squares, stats.magnitudes = sequences, tensors["squares"], tensors["magnitudes"]
        return stats
