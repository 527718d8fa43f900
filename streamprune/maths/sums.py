"""Running sums over the tokens of one site, updated per micro-batch. The `across` methods add the sums of other workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from ..errors import NumericalError
from .flops import counted, kind
from .refit import accumulator, advice, all_finite
from .triangular import mirror_, panels

Statistic = Literal[
    "mask-gradient",
    "gram",
    "gradient-gram",
    "factors",
    "divergence",
    "inputs",
    "second-moment",
    "output-norm",
    "removal",
]
"""Statistics that a survey can collect at a site.

mask-gradient: `MaskGradient` of the units.
gram: `H`, the Gram of the consumer's input.
gradient-gram: `G`, the Gram of the gradients of the consumer's output.
factors: both K-FAC factors of every linear of the site, including `H` and `G`.
divergence: `HeadDivergence` of the attention maps.
inputs: the Gram of the producers' input.
second-moment: for attention `H`; for an FFN the Gram of the producers' input.
output-norm: `OutputNorm` of what an expert adds.
removal: some tokens of each mixture, for what its experts cost as a whole (`pruning.experts`).
"""
GRADIENTS = frozenset[Statistic]({"mask-gradient", "gradient-gram", "factors"})  # statistics that need a backward sweep


PANEL = {"cpu": 256, "cuda": 1024}
"""Rows of `H` per matrix product, by device type. Each product stops at the diagonal: n² (1 + PANEL / n) operations per row of x.

Time relative to the full product, on one thread of a 2-core AMD CPU with AVX-512 and 1024 rows of x: 0.78 at n = 512, 0.67 at
1024, 0.58 at 2048, 0.54 at 4096. Panels of 256 take a quarter less time than panels of 1024. For n up to PANEL there is a single
product. GPUs need larger panels.
"""


class Gram:
    """``H = Σ x xᵀ`` (n, n) and, if `cross` is given, ``C = Σ y xᵀ`` (cross, n): unnormalised sums over tokens until `mean`.

    `columns` is n; `dtype` is float32 or float64. Until `mean`, only the lower half of H, including the panels on the diagonal,
    is valid.
    """

    def __init__(self, columns: int, *, cross: int = 0, device: torch.device, dtype: torch.dtype) -> None:
        self.tokens = 0
        self.rows = 0  # rows of x added so far
        self.fed = dtype  # dtype of the last x given to `add`
        self.h = torch.zeros(columns, columns, device=device, dtype=dtype)
        self.c = torch.zeros(cross, columns, device=device, dtype=dtype) if cross else None

    def add(self, x: Tensor, y: Tensor | None = None, *, tokens: int | None = None) -> None:
        """Add one micro-batch.

        Half-precision factors are multiplied directly and accumulated in float32 if the device supports it; products of halves
        are exact in float32. Otherwise they are converted first, which is equally exact.

        Args:
            x: (..., n), any float dtype.
            y: (..., cross), any float dtype; required if the Gram has a cross sum, forbidden otherwise.
            tokens: number of tokens the micro-batch counts as; None for its number of rows.
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
        self.rows += flat.shape[0]
        self.tokens += flat.shape[0] if tokens is None else tokens

    def _factor(self, x: Tensor) -> Tensor:
        """Return `x` as (rows, n) in the dtype of the multiplication."""
        flat = x.reshape(-1, x.shape[-1])
        halves = flat.dtype in (torch.bfloat16, torch.float16) and self.h.dtype == torch.float32
        return flat if halves and _multiplies_halves(flat.device, flat.dtype) else flat.to(self.h.dtype)

    def park(self) -> None:
        """Move H to host memory while its site is solved."""
        self.h = self.h.cpu()

    def across(self, add_up: AddUp) -> None:
        add_up(self.h)
        if self.c is not None:
            add_up(self.c)
        self.tokens, self.rows = add_counts(add_up, self.tokens, self.rows)

    def mean(self, place: str) -> tuple[Tensor, Tensor | None]:
        """Normalise the sums per token, in place, and return H (n, n) and C (cross, n) or None. H is exactly symmetric.

        The sums count as one token afterwards, so a second call changes nothing; without any token they stay zero. Raises a
        NumericalError if they hold NaN or Inf.
        """
        # An input that is not finite, or too large to be squared and summed, shows on the diagonal.
        if not all_finite(self.h.diagonal()) or not (self.c is None or all_finite(self.c)):
            raise NumericalError(f"{place}: the Gram holds NaN or Inf{advice(self.fed)}")
        tokens, self.tokens = self.tokens or 1, 1
        return mirror_(self.h.div_(tokens)), None if self.c is None else self.c.div_(tokens)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += leftᵀ right``. Computed on the device of the factors, added on that of the sum; halves accumulate in float32."""
    if left.dtype != total.dtype:
        total += torch.mm(left.T, right, out_dtype=total.dtype).to(total.device)
    elif left.device != total.device:
        total += (left.T @ right).to(total.device)
    else:
        total.addmm_(left.T, right)


@cache
def _multiplies_halves(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the device multiplies this dtype with a float32 result. torch 2.8 and later can on CUDA."""
    one = torch.ones(8, 8, device=device, dtype=dtype)
    try:
        torch.mm(one, one, out_dtype=torch.float32)
    except (RuntimeError, TypeError):  # not on this device; not known to this torch
        return False
    return True


@dataclass(frozen=True)
class Origin:
    """Origin of the rows of a micro-batch, for sites that receive only some tokens from a router."""

    sequence: Tensor  # sequence of each row, (rows,) int64
    sequences: int  # number of sequences in the micro-batch
    tokens: int  # number of tokens in all sequences together

    def sum(self, x: Tensor) -> Tensor:
        """Sum the rows of `x` (rows, n) per sequence: (sequences, n)."""
        return x.new_zeros(self.sequences, x.shape[1]).index_add_(0, self.sequence, x)


class MaskGradient:
    """``g_u = ∂loss/∂m_u`` for a mask `m_u` that multiplies unit `u` of the consumer's input.

    The loss is the mean negative log-likelihood per predicted token of one sequence, in nats, so `g` is per sequence. The sums over
    sequences of ``g``, ``g²`` and ``|g|``, (units,) float64, are kept on the device: fetching them would wait for it.
    """

    def __init__(self, units: int, width: int) -> None:
        self.width = width
        self.sequences = 0
        self.signed = torch.zeros(units, dtype=torch.float64)
        self.squares = torch.zeros(units, dtype=torch.float64)
        self.magnitudes = torch.zeros(units, dtype=torch.float64)

    def add(self, x: Tensor, gradient: Tensor, scale: float, origin: Origin | None = None) -> None:
        """Add a micro-batch of sequences.

        Args:
            x: the consumer's input, (sequences, tokens, units·width), or (rows, units·width) with an `origin`; any float dtype.
            gradient: ∂(loss·scale)/∂x, same shape.
        """
        dtype = accumulator(x.dtype)
        each = x.to(dtype) * gradient.to(dtype)
        products = each.sum(dim=1) if origin is None else origin.sum(each)  # (sequences, n)
        g = products.view(products.shape[0], -1, self.width).sum(dim=2).double() / scale  # (sequences, units)
        self.signed = self.signed.to(g.device) + g.sum(dim=0)
        self.squares = self.squares.to(g.device) + g.square().sum(dim=0)
        self.magnitudes = self.magnitudes.to(g.device) + g.abs().sum(dim=0)
        self.sequences += g.shape[0]

    def across(self, add_up: AddUp) -> None:
        add_up(self.signed)
        add_up(self.squares)
        add_up(self.magnitudes)
        (self.sequences,) = add_counts(add_up, self.sequences)


_USERS: dict[str, frozenset[Statistic]] = {
    "mask": frozenset({"mask-gradient"}),
    "gram": frozenset({"gram", "factors"}),
    "gradient": frozenset({"gradient-gram", "factors"}),
    "inputs": frozenset({"inputs", "factors"}),
    "producers": frozenset({"factors"}),
    "divergence": frozenset({"divergence"}),
    "norm": frozenset({"output-norm"}),
}
"""Statistics that need each sum of `SiteStatistics`, by attribute name."""


class SiteStatistics:
    """The sums of a survey at one site; only those that `wanted` needs. `width` is columns of the consumer per unit.

    A router sends only some tokens to an expert, a share s. The mean loss of a change of its weight is
    ``½ mean (gᵀ δW z)²`` over all tokens of the model, zero for the others. It is about ``½ tr(δWᵀ G δW H)`` if s counts once:
    Grams of inputs are means over all tokens, and Grams of gradients over the tokens that reached the expert.

    Args:
        heads: query heads; 0 for an FFN, which has no attention maps.
        inputs: d, input width of the producers.
        outputs: d_out, rows of the consumer.
        rows: output rows of each producer; a fused producer is listed as its parts.
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
        if "second-moment" in wanted:
            wanted |= {"gram"} if heads else {"inputs"}

        def gram(columns: int, name: str) -> Gram | None:
            return Gram(columns, device=device, dtype=dtype) if wanted & _USERS[name] else None

        self.seen = 0  # number of tokens that reached the site
        self.mask = MaskGradient(units, width) if wanted & _USERS["mask"] else None
        self.gram = gram(units * width, "gram")
        self.gradient = gram(outputs, "gradient")
        self.inputs = gram(inputs, "inputs")
        self.producers = [gram(each, "producers") for each in rows]
        self.divergence = HeadDivergence(heads) if wanted & _USERS["divergence"] and heads else None
        self.norm = OutputNorm() if wanted & _USERS["norm"] else None
        self.sample: TokenSample | None = None
        """At the first expert of a mixture, some of the tokens that the mixture reads; see `pruning.experts.add_samples`."""

    def across(self, add_up: AddUp) -> None:
        for each in self._sums():
            each.across(add_up)
        (self.seen,) = add_counts(add_up, self.seen)

    def _sums(self) -> list[Gram | MaskGradient | HeadDivergence | OutputNorm | TokenSample]:
        sums = (
            *(self.mask, self.gram, self.gradient, self.inputs, *self.producers),
            *(self.divergence, self.norm, self.sample),
        )
        return [each for each in sums if each is not None]

    def park(self) -> None:
        for each in self._sums():
            if isinstance(each, Gram):
                each.park()

    def add(self, inputs: Tensor | None, z: Tensor, maps: Tensor | None, origin: Origin | None = None) -> None:
        """Add a micro-batch of the forward pass. Tensors may have any float dtype.

        Args:
            inputs: input of the producers, (sequences, tokens, d); required if they are collected.
            z: input of the consumer, (sequences, tokens, n).
            maps: attention maps (sequences, heads, tokens, tokens); required if divergence is collected.
            origin: required if the site received only some tokens; then inputs and z are (rows, d) and (rows, n).
        """
        tokens = None if origin is None else origin.tokens
        self.seen += z.numel() // z.shape[-1]
        if self.gram is not None:
            self.gram.add(z, tokens=tokens)
        if self.inputs is not None:
            assert inputs is not None
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
        """Add a micro-batch of the backward pass. Gradients are those of loss·scale, per sequence; `z` and `origin` as in `add`.

        Args:
            dz: gradient of the consumer's input, same shape as `z`.
            dy: gradient of the consumer's output, (sequences, tokens, d_out).
            dp: gradient of each producer's output, (sequences, tokens, rows) each, fused producers in their parts; empty if not
                needed.
        """
        if self.mask is not None:
            self.mask.add(z, dz, scale, origin)
        if self.gradient is not None:
            self.gradient.add(dy)
        for gram, gradient in zip(self.producers, dp, strict=False):
            if gram is not None:
                gram.add(gradient)


class OutputNorm:
    """``mean ‖o‖`` over the tokens that reach a site, `o` what its consumer adds: an expert's output times the router's weight."""

    def __init__(self) -> None:
        self.tokens = 0
        self.total = torch.zeros((), dtype=torch.float64)

    def add(self, o: Tensor) -> None:
        """Add a micro-batch (..., d_out), any float dtype."""
        total = o.to(accumulator(o.dtype)).norm(dim=-1).sum(dtype=torch.float64)
        self.total = self.total.to(o.device) + total
        self.tokens += o.numel() // o.shape[-1]

    def across(self, add_up: AddUp) -> None:
        add_up(self.total)
        (self.tokens,) = add_counts(add_up, self.tokens)

    def mean(self) -> Tensor:
        """Return the mean, float64 () on the host; 0 without any token."""
        return self.total.cpu() / (self.tokens or 1)


TOKENS_PER_EXPERT = 256
"""Tokens of a mixture's sample per expert, if all are chosen equally often."""
TOGETHER = 256
"""Tokens of it that run at once; each is a sequence of its own."""


def sample_size(experts: int, chosen: int) -> int:
    """Return how many tokens are sampled of what a mixture reads that chooses among so many experts."""
    return -(-TOKENS_PER_EXPERT * experts // max(chosen, 1))


class TokenSample:
    """Some of the tokens that a sublayer reads and, if `outputs`, the gradients of its consumers' output there.

    Args:
        positions: sequence, ascending, and token of each, (tokens, 2) int64, over all workers.
        first: number of this worker's first sequence.
        width: width of the stream.
        outputs: d_out; 0 without a backward sweep.
    """

    def __init__(
        self, positions: Tensor, *, first: int, width: int, outputs: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._sequences, self._positions = positions[:, 0].contiguous() - first, positions.to(device)
        self._first = first
        self.x = torch.zeros(len(positions), width, device=device, dtype=dtype)
        """What was read, (tokens, width)."""
        self.g = torch.zeros(len(positions), outputs, device=device, dtype=dtype) if outputs else None
        """The gradients, (tokens, d_out)."""

    def add(self, batch: slice, x: Tensor) -> None:
        """Take from what the sequences `batch` of this worker read, (sequences, tokens, width)."""
        self._fill(self.x, batch, x)

    def add_gradients(self, batch: slice, g: Tensor) -> None:
        """Take from the gradients at the same sequences, (sequences, tokens, d_out)."""
        assert self.g is not None
        self._fill(self.g, batch, g)

    def _fill(self, into: Tensor, batch: slice, x: Tensor) -> None:
        begin, end = torch.searchsorted(self._sequences, torch.tensor([batch.start, batch.stop])).tolist()
        sequences, tokens = self._positions[begin:end].unbind(1)
        into[begin:end] = x[sequences - (self._first + batch.start), tokens]

    def across(self, add_up: AddUp) -> None:
        for each in (self.x, self.g):
            if each is not None:
                whole = each.to(accumulator(each.dtype))
                add_up(whole)
                each.copy_(whole)


AddUp = Callable[[Tensor], None]  # sums a tensor over all workers, in place


def add_counts(add_up: AddUp, *counts: int) -> list[int]:
    found = torch.tensor(counts)
    add_up(found)
    total: list[int] = found.tolist()
    return total


class HeadDivergence:
    """Eq. 1: ``D_ij = mean over sequences and rows of JS(P_i ‖ P_j)``, `P_i` a row of head i's attention map.

    With the entropy ``E(P) = −Σ p log p`` (0 log 0 = 0): ``JS(P ‖ Q) = E((P + Q)/2) − (E(P) + E(Q))/2``.
    Natural logarithms. The sum over rows, (heads, heads) float64, is kept on the device.
    """

    def __init__(self, heads: int) -> None:
        self.rows = 0
        self.sums = torch.zeros(heads, heads, dtype=torch.float64)

    def add(self, maps: Tensor) -> None:
        """Add maps (sequences, heads, tokens, tokens), one pair of heads at a time: any float dtype, rows sum to 1, masked entries are 0."""
        heads = self.sums.shape[0]
        assert maps.shape[1] == heads
        dtype = accumulator(maps.dtype)
        entropy = torch.stack([_entropy(maps[:, i].to(dtype)) for i in range(heads)])
        sums = torch.zeros(heads, heads, dtype=torch.float64, device=maps.device)
        for i in range(heads - 1):
            p = maps[:, i].to(dtype)
            for j in range(i + 1, heads):
                sums[i, j] = _entropy((p + maps[:, j]).div_(2)) - (entropy[i] + entropy[j]) / 2
        self.sums = self.sums.to(sums.device) + (sums + sums.T)
        self.rows += maps.shape[0] * maps.shape[2]

    def across(self, add_up: AddUp) -> None:
        add_up(self.sums)
        (self.rows,) = add_counts(add_up, self.rows)

    def mean(self) -> Tensor:
        """Return D (heads, heads), float64 on the host: symmetric, zero diagonal, negative rounding errors clamped to zero."""
        return (self.sums.cpu() / self.rows).clamp_min(0)


def _entropy(p: Tensor) -> Tensor:
    """Return the sum of the entropies of all rows of `p` (..., tokens), a float64 scalar. Each row is summed in p's dtype."""
    rows: Tensor = torch.special.entr(p).sum(dim=-1)
    return rows.sum(dtype=torch.float64)
