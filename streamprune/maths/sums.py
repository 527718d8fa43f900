"""Running sums of one site: fed micro-batch by micro-batch.

Several workers' sums of the same site add up by `across`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from ..errors import NumericalError
from .flops import counted, kind
from .refit import accumulator, advice, all_finite
from .triangular import mirror_, panels

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


PANEL = {"cpu": 256, "cuda": 1024}
"""Rows of `H` that are summed together, down to its diagonal and no further: n² (1 + PANEL / n) operations a row of x.

A 2-core AMD with AVX-512, one thread, 1024 rows of x: 0.78 of the time of the whole product at n = 512, 0.67 at 1024, 0.58 at
2048, 0.54 at 4096, a quarter less in panels of 256 than of 1024. Up to one panel there is one product. A GPU wants larger ones.
"""


class Gram:
    """``H = Σ x xᵀ`` and, where ``cross`` rows are fed too, ``C = Σ y xᵀ``; sums over tokens until `mean`.

    Until then only what lies below H's diagonal, or in one panel with it, is summed.

    Args:
        columns: n, length of x.
        cross: length of y; 0 for no cross sum.
    """

    def __init__(self, columns: int, *, cross: int = 0, device: torch.device, dtype: torch.dtype) -> None:
        self.tokens = 0
        self.rows = 0
        """As they were fed."""
        self.operations = 0
        """What adding them took."""
        self.fed = dtype
        """What `add` was given last."""
        self.h = torch.zeros(columns, columns, device=device, dtype=dtype)
        self.c = torch.zeros(cross, columns, device=device, dtype=dtype) if cross else None

    def add(self, x: Tensor, y: Tensor | None = None, *, tokens: int | None = None) -> None:
        """Add one micro-batch.

        Where the device can, half-precision factors are multiplied as they are and summed in float32: their products are
        exact in it. Elsewhere they are converted first, which is as exact.

        Args:
            x: (..., n), any float dtype.
            y: (..., cross); given exactly when the sum was made with ``cross``.
            tokens: what the micro-batch counts as; None for as many as there are rows. Where a router sends a site only
                some of them, `mean` is still one of all tokens, so that sites compare.
        """
        assert (y is None) == (self.c is None)
        self.fed = x.dtype
        flat = self._factor(x)
        rows = panels(flat.shape[1], PANEL.get(x.device.type, PANEL["cuda"]))
        products = sum((panel.stop - panel.start) * panel.stop for panel in rows)
        products += 0 if self.c is None else self.c.numel()
        with kind("sums"), counted(2 * len(flat) * products):
            for panel in rows:
                _add_product(self.h[panel, : panel.stop], flat[:, panel], flat[:, : panel.stop])
            if y is not None and self.c is not None:
                _add_product(self.c, self._factor(y), flat)
        self.operations += 2 * len(flat) * products
        self.rows += flat.shape[0]
        self.tokens += flat.shape[0] if tokens is None else tokens

    def _factor(self, x: Tensor) -> Tensor:
        """(rows, n) in the dtype that it is multiplied in."""
        flat = x.reshape(-1, x.shape[-1])
        halves = flat.dtype in (torch.bfloat16, torch.float16) and self.h.dtype == torch.float32
        return flat if halves and _multiplies_halves(flat.device, flat.dtype) else flat.to(self.h.dtype)

    def copy(self) -> Gram:
        """One of its own, for somebody who may use it up."""
        other = copy(self)
        other.h, other.c = self.h.clone(), None if self.c is None else self.c.clone()
        return other

    def park(self) -> None:
        """Have H wait on the host, so that the device has room for what is made of it."""
        self.h = self.h.cpu()

    def across(self, add_up: AddUp) -> None:
        """Take in the other workers' sums."""
        add_up(self.h)
        if self.c is not None:
            add_up(self.c)
        self.tokens, self.rows, self.operations = add_counts(add_up, self.tokens, self.rows, self.operations)

    def mean(self, place: str) -> tuple[Tensor, Tensor | None]:
        """(H, C) per token, H symmetric to the last bit, in place: they count as one token from then on.

        Args:
            place: where the sums are from, for messages.

        Raises:
            NumericalError: they hold NaN or Inf.
        """
        # An input that is neither finite, or too large to be squared and summed, shows on the diagonal.
        if not all_finite(self.h.diagonal()) or not (self.c is None or all_finite(self.c)):
            raise NumericalError(f"{place}: the Gram holds NaN or Inf{advice(self.fed)}")
        tokens, self.tokens = self.tokens, 1
        return mirror_(self.h.div_(tokens)), None if self.c is None else self.c.div_(tokens)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += leftᵀ right``: computed where the factors are, added where the sum is; halves are summed in float32."""
    if left.dtype != total.dtype:
        total += torch.mm(left.T, right, out_dtype=total.dtype).to(total.device)
    elif left.device != total.device:
        total += (left.T @ right).to(total.device)
    else:
        total.addmm_(left.T, right)


@cache
def _multiplies_halves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device multiplies that dtype into float32; torch can on CUDA, from 2.8 on."""
    one = torch.ones(8, 8, device=device, dtype=dtype)
    try:
        torch.mm(one, one, out_dtype=torch.float32)
    except (RuntimeError, TypeError):  # not on this device; not known to this torch
        return False
    return True


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

    def across(self, add_up: AddUp) -> None:
        """Take in the other workers' sums."""
        add_up(self.squares)
        add_up(self.magnitudes)
        (self.sequences,) = add_counts(add_up, self.sequences)


_USERS: dict[str, frozenset[Statistic]] = {
    "mask": frozenset({"mask-gradient"}),
    "gram": frozenset({"gram", "factors"}),
    "gradient": frozenset({"gradient-gram", "factors"}),
    "inputs": frozenset({"factors"}),
    "producers": frozenset({"factors"}),
    "divergence": frozenset({"divergence"}),
}
"""By the names that `SiteStatistics` has for sums: who needs them."""


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
        def gram(columns: int, name: str) -> Gram | None:
            return Gram(columns, device=device, dtype=dtype) if wanted & _USERS[name] else None

        self.seen = 0
        """Tokens that reached the site."""
        self.mask = MaskGradient(units, width) if wanted & _USERS["mask"] else None
        self.gram = gram(units * width, "gram")
        self.gradient = gram(outputs, "gradient")
        self.inputs = gram(inputs, "inputs")
        self.producers = [gram(each, "producers") for each in rows]
        self.divergence = HeadDivergence(heads) if wanted & _USERS["divergence"] and heads else None

    def part(self, wanted: frozenset[Statistic]) -> SiteStatistics:
        """What one of several recipes wants of the sums, which it may use up; `wanted` is among what is summed."""

        def own(gram: Gram | None, name: str) -> Gram | None:
            return gram.copy() if gram is not None and wanted & _USERS[name] else None

        other = copy(self)
        other.mask = self.mask if wanted & _USERS["mask"] else None
        other.gram = own(self.gram, "gram")
        other.gradient = own(self.gradient, "gradient")
        other.inputs = own(self.inputs, "inputs")
        other.producers = [own(each, "producers") for each in self.producers]
        other.divergence = self.divergence if wanted & _USERS["divergence"] else None
        return other

    def operations(self, wanted: frozenset[Statistic]) -> int:
        """What summing took of what `wanted` needs."""
        sums: list[tuple[str, Gram | HeadDivergence | None]] = [("gram", self.gram), ("gradient", self.gradient)]
        sums += [("inputs", self.inputs), *(("producers", each) for each in self.producers)]
        sums += [("divergence", self.divergence)]
        return sum(each.operations for name, each in sums if each is not None and wanted & _USERS[name])

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

    def park(self) -> None:
        """Have all Grams wait on the host."""
        for gram in (self.gram, self.gradient, self.inputs, *self.producers):
            if gram is not None:
                gram.park()

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


AddUp = Callable[[Tensor], None]
"""Makes a tensor the sum over all workers, in place."""


def add_counts(add_up: AddUp, *counts: int) -> list[int]:
    """Counts, added up over the workers."""
    found = torch.tensor(counts)
    add_up(found)
    total: list[int] = found.tolist()
    return total


class HeadDivergence:
    """Eq. 1: ``D_ij = mean over sequences and rows of JS(P_i ‖ P_j)``, `P_i` a row of head i's attention map.

    With the entropy ``E(P) = −Σ p log p`` (0 log 0 = 0): ``JS(P ‖ Q) = E((P + Q)/2) − (E(P) + E(Q))/2``.
    Kept is the sum over rows, float64, on the CPU; several workers' add up by `across`.
    """

    def __init__(self, heads: int) -> None:
        self.rows = 0
        self.operations = 0
        """What computing the maps took, for whoever adds it."""
        self.sums = torch.zeros(heads, heads, dtype=torch.float64)

    def add(self, maps: Tensor) -> None:
        """Add a micro-batch, pair by pair: beside the maps a few (sequences, tokens, tokens) are held.

        Args:
            maps: (sequences, heads, tokens, tokens), any float dtype; rows sum to 1, masked entries are 0.
        """
        heads = self.sums.shape[0]
        assert maps.shape[1] == heads
        dtype = accumulator(maps.dtype)
        entropy = torch.stack([_entropy(maps[:, i].to(dtype)) for i in range(heads)])
        sums = torch.zeros(heads, heads, dtype=torch.float64, device=maps.device)
        for i in range(heads - 1):
            p = maps[:, i].to(dtype)
            for j in range(i + 1, heads):
                sums[i, j] = _entropy((p + maps[:, j]).div_(2)) - (entropy[i] + entropy[j]) / 2
        self.sums += (sums + sums.T).cpu()
        self.rows += maps.shape[0] * maps.shape[2]

    def across(self, add_up: AddUp) -> None:
        """Take in the other workers' sums."""
        add_up(self.sums)
        (self.rows,) = add_counts(add_up, self.rows)

    def mean(self) -> Tensor:
        """D (heads, heads), float64, on the CPU: symmetric, zero diagonal, rounding below zero cut off."""
        return (self.sums / self.rows).clamp_min(0)


def _entropy(p: Tensor) -> Tensor:
    """Sum of the rows' entropies, a float64 scalar; a row is summed in p's own dtype."""
    rows: Tensor = torch.special.entr(p).sum(dim=-1)
    return rows.sum(dtype=torch.float64)
