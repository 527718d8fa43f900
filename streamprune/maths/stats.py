"""Running sums of one site: fed micro-batch by micro-batch, mergeable, savable.

Two workers' halves of the same site add up by `merge`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .across import AddUp, add_counts
from .divergence import HeadDivergence
from .linalg import accumulator

Statistic = Literal["mask-gradient", "gram", "gradient-gram", "factors", "divergence"]
"""What a survey can sum at a site.

mask-gradient: `MaskGradient` of the units.
gram: `H` of the consumer's input.
gradient-gram: `G` of the consumer's output.
factors: both K-FAC factors of every linear of the site, `H` and `G` among them.
divergence: `HeadDivergence` of the attention maps.
"""
GRADIENTS = frozenset[Statistic]({"mask-gradient", "gradient-gram", "factors"})
"""Those that need a backward sweep."""


class Gram:
    """``H = Σ x xᵀ`` and, where ``cross`` rows are fed too, ``C = Σ y xᵀ``; sums over tokens until `mean`.

    Args:
        columns: n, length of x.
        cross: length of y; 0 for no cross sum.
    """

    def __init__(self, columns: int, *, cross: int = 0, device: torch.device, dtype: torch.dtype) -> None:
        self.tokens = 0
        self.rows = 0
        """As they were fed."""
        self.h = torch.zeros(columns, columns, device=device, dtype=dtype)
        self.c = torch.zeros(cross, columns, device=device, dtype=dtype) if cross else None

    def add(self, x: Tensor, y: Tensor | None = None, *, tokens: int | None = None) -> None:
        """Add one micro-batch.

        Args:
            x: (..., n), any float dtype.
            y: (..., cross); given exactly when the sum was made with ``cross``.
            tokens: what the micro-batch counts as; None for as many as there are rows. Where a router sends a site only
                some of them, `mean` is still one of all tokens, so that sites compare.
        """
        assert (y is None) == (self.c is None)
        flat = x.reshape(-1, x.shape[-1]).to(self.h.dtype)
        self.h.addmm_(flat.T, flat)
        if y is not None and self.c is not None:
            self.c.addmm_(y.reshape(-1, y.shape[-1]).to(self.h.dtype).T, flat)
        self.rows += flat.shape[0]
        self.tokens += flat.shape[0] if tokens is None else tokens

    def merge(self, other: Gram) -> None:
        """Add another worker's sums."""
        self.h += other.h
        if self.c is not None and other.c is not None:
            self.c += other.c
        self.tokens += other.tokens
        self.rows += other.rows

    def across(self, add_up: AddUp) -> None:
        """Take in the other workers' sums."""
        add_up(self.h)
        if self.c is not None:
            add_up(self.c)
        self.tokens, self.rows = add_counts(add_up, self.tokens, self.rows)

    def mean(self) -> tuple[Tensor, Tensor | None]:
        """(H, C) per token, in place: they count as one token from then on."""
        tokens, self.tokens = self.tokens, 1
        return self.h.div_(tokens), None if self.c is None else self.c.div_(tokens)


@dataclass(frozen=True)
class Origin:
    """Where the rows of a micro-batch are from, where a router sends a site only some of the tokens."""

    sequence: Tensor
    """Of each row, (rows,) int64."""
    sequences: int
    tokens: int
    """Of all sequences together."""

    def sum(self, x: Tensor) -> Tensor:
        """(rows, n) summed by sequence: (sequences, n)."""
        return x.new_zeros(self.sequences, x.shape[1]).index_add_(0, self.sequence, x)


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

    def add(self, x: Tensor, gradient: Tensor, scale: float, origin: Origin | None = None) -> None:
        """Add a micro-batch of sequences.

        Args:
            x: the consumer's input, (sequences, tokens, units·width), or (rows, units·width) with an `origin`.
            gradient: ∂(loss·scale)/∂x, same shape.
            scale: what the loss was multiplied by.
        """
        dtype = accumulator(x.dtype)
        each = x.to(dtype) * gradient.to(dtype)
        products = each.sum(dim=1) if origin is None else origin.sum(each)  # (sequences, n)
        g = products.view(products.shape[0], -1, self.width).sum(dim=2).double().cpu() / scale  # (sequences, units)
        self.squares += g.square().sum(dim=0)
        self.magnitudes += g.abs().sum(dim=0)
        self.sequences += g.shape[0]

    def merge(self, other: MaskGradient) -> None:
        """Add another worker's sums."""
        self.squares += other.squares
        self.magnitudes += other.magnitudes
        self.sequences += other.sequences

    def across(self, add_up: AddUp) -> None:
        """Take in the other workers' sums."""
        add_up(self.squares)
        add_up(self.magnitudes)
        (self.sequences,) = add_counts(add_up, self.sequences)


class SiteStatistics:
    """What a survey sums at one site: whatever is wanted of `Statistic`, and nothing else.

    Args:
        units, width: of the site.
        heads: query heads; 0 for an FFN, which has no attention maps.
        inputs: d, what the producers read.
        outputs: rows of the consumer.
        rows: output rows of each producer; a fused one counts as its parts.
    """

    def __init__(
        self,
        wanted: frozenset[Statistic],
        *,
        units: int,
        width: int,
        heads: int,
        inputs: int,
        outputs: int,
        rows: Sequence[int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        def gram(columns: int, *names: Statistic) -> Gram | None:
            return Gram(columns, device=device, dtype=dtype) if wanted & {*names} else None

        self.seen = 0
        """Tokens that reached the site."""
        self.mask = MaskGradient(units, width) if "mask-gradient" in wanted else None
        self.gram = gram(units * width, "gram", "factors")
        self.gradient = gram(outputs, "gradient-gram", "factors")
        self.inputs = gram(inputs, "factors")
        self.producers = [gram(each, "factors") for each in rows]
        self.divergence = HeadDivergence(heads) if "divergence" in wanted and heads else None

    def across(self, add_up: AddUp) -> None:
        """Take in the other workers' sums of this site."""
        for part in (self.mask, self.gram, self.gradient, self.inputs, *self.producers, self.divergence):
            if part is not None:
                part.across(add_up)
        (self.seen,) = add_counts(add_up, self.seen)

    @property
    def wants_producers(self) -> bool:
        """Whether gradients of the producers' outputs are wanted."""
        return any(gram is not None for gram in self.producers)

    @property
    def wants_maps(self) -> bool:
        """Whether attention maps are wanted."""
        return self.divergence is not None

    def add(self, inputs: Tensor, z: Tensor, maps: Tensor | None, origin: Origin | None = None) -> None:
        """Add a micro-batch of the forward pass.

        Args:
            inputs: what the producers read, (sequences, tokens, d).
            z: the consumer's input, (sequences, tokens, n).
            maps: attention maps (sequences, heads, tokens, tokens), where wanted.
            origin: given where the site got only some tokens; then inputs and z are (rows, d) and (rows, n).
        """
        tokens = None if origin is None else origin.tokens
        self.seen += z.numel() // z.shape[-1]
        if self.gram is not None:
            self.gram.add(z, tokens=tokens)
        if self.inputs is not None:
            self.inputs.add(inputs, tokens=tokens)
        if self.divergence is not None:
            assert maps is not None
            self.divergence.add(maps)

    def add_gradients(
        self,
        z: Tensor,
        dz: Tensor,
        dy: Tensor,
        dp: Sequence[Tensor],
        scale: float,
        origin: Origin | None = None,
    ) -> None:
        """Add a micro-batch of the backward pass; gradients are those of loss·scale, `z` of any sequence its own.

        Args:
            dz, dy: of the consumer's input and output, (sequences, tokens, n) and (sequences, tokens, d_out).
            dp: of each producer's output, where wanted; fused ones in their parts.
            origin: given where the site got only some tokens; then all of these have their rows only.
        """
        tokens = None if origin is None else origin.tokens
        if self.mask is not None:
            self.mask.add(z, dz, scale, origin)
        if self.gradient is not None:
            self.gradient.add(dy, tokens=tokens)
        for gram, gradient in zip(self.producers, dp, strict=False):
            if gram is not None:
                gram.add(gradient, tokens=tokens)
