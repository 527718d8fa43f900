"""Encode activations for storage: as computed, rounded to a smaller dtype, or in 8 bits with one scale per token."""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
"""4 exponent and 3 mantissa bits. A value's error is at most 1/16 of the value, or 2⁻¹⁰ of its token's scale."""
_SCALE = torch.float32


class Encoding:
    """Encode tokens of `width` values in the `computing` dtype as bytes of the `stored` dtype, and decode them.

    In `FLOAT8`, a token is stored as its values divided by a scale, so that the largest magnitude becomes 448, followed
    by the scale in float32. This also suffices for gradients, whose tokens differ by orders of magnitude.
    """

    def __init__(self, width: int, computing: torch.dtype, stored: torch.dtype) -> None:
        self.width, self.computing, self.stored = width, computing, stored
        self.token_bytes = token_bytes(width, stored)

    def encode(self, x: Tensor) -> Tensor:
        """Encode (..., width) as (..., token_bytes) uint8, on the device of `x`, without a copy where possible."""
        x = x.detach()
        if self.stored != FLOAT8:
            return x.to(self.stored).contiguous().view(torch.uint8)
        largest = x.abs().amax(-1, keepdim=True).to(_SCALE)
        scale = (largest / torch.finfo(FLOAT8).max).clamp(min=torch.finfo(_SCALE).tiny)
        values = (x / scale).to(FLOAT8).view(torch.uint8)
        return torch.cat((values, scale.view(torch.uint8)), dim=-1)

    def decode(self, raw: Tensor) -> Tensor:
        """Decode (..., token_bytes) uint8 from `encode` to (..., width) in the computing dtype."""
        if self.stored != FLOAT8:
            return raw.view(self.stored).to(self.computing)
        # A scale may underflow in the computing dtype, so multiply in float32.
        values = raw[..., : self.width].view(FLOAT8).to(_SCALE)
        return (values * self.telling(raw)).to(self.computing)

    def telling(self, raw: Tensor) -> Tensor:
        """Return a view of the encoded bytes that is finite exactly if all encoded values are finite and within range.

        These are the values (..., width) in the stored dtype or, for `FLOAT8`, the scales (..., 1) float32.
        """
        if self.stored != FLOAT8:
            return raw.view(self.stored)
        return raw[..., self.width :].contiguous().view(_SCALE)


def token_bytes(width: int, stored: torch.dtype) -> int:
    return width * stored.itemsize + (_SCALE.itemsize if stored == FLOAT8 else 0)
