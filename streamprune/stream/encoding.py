"""How activations are stored: as computed, rounded to a smaller dtype, or in 8 bits with a scale a token."""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
"""Four bits of exponent and three of fraction: a value is off by at most a sixteenth, or by 2⁻¹⁰ of its token's scale."""
_SCALE = torch.float32


class Encoding:
    """Tokens as bytes and back.

    In `FLOAT8` a token is its values divided by a scale, the largest of them becoming 448, and that scale in float32 behind
    them; gradients, whose tokens differ by orders of magnitude, need no more than that.

    Args:
        width: values a token.
        computing: what tensors are of, before and after.
        stored: what bytes are of.
    """

    def __init__(self, width: int, computing: torch.dtype, stored: torch.dtype) -> None:
        self.width, self.computing, self.stored = width, computing, stored
        self.token_bytes = token_bytes(width, stored)

    def encode(self, x: Tensor) -> Tensor:
        """(..., width) in the computing dtype → (..., token_bytes) uint8, where `x` is; without a copy if it can."""
        x = x.detach()
        if self.stored != FLOAT8:
            return x.to(self.stored).contiguous().view(torch.uint8)
        largest = x.abs().amax(-1, keepdim=True).to(_SCALE)
        scale = (largest / torch.finfo(FLOAT8).max).clamp(min=torch.finfo(_SCALE).tiny)
        values = (x / scale).to(FLOAT8).view(torch.uint8)
        return torch.cat((values, scale.view(torch.uint8)), dim=-1)

    def decode(self, raw: Tensor) -> Tensor:
        """What `encode` gave, back in the computing dtype."""
        if self.stored != FLOAT8:
            return raw.view(self.stored).to(self.computing)
        # A scale may be less than the computing dtype's smallest number.
        values = raw[..., : self.width].view(FLOAT8).to(_SCALE)
        return (values * self.telling(raw)).to(self.computing)

    def telling(self, raw: Tensor) -> Tensor:
        """Numbers among the bytes that are finite just where all that was encoded is finite and can be stored."""
        if self.stored != FLOAT8:
            return raw.view(self.stored)
        return raw[..., self.width :].contiguous().view(_SCALE)


def token_bytes(width: int, stored: torch.dtype) -> int:
    """Bytes a token."""
    return width * stored.itemsize + (_SCALE.itemsize if stored == FLOAT8 else 0)
