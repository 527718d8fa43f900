"""Drawing tokens, the same ones wherever the arithmetic is cut into pieces."""

from __future__ import annotations

import torch
from torch import Tensor


def sample(logits: Tensor, uniform: Tensor) -> Tensor:
    """One token a row from softmax(logits), by inverting its distribution function.

    Args:
        logits: (rows, vocabulary).
        uniform: (rows,) float64, numbers drawn evenly from [0, 1); on the same device.

    Returns:
        (rows,) int64: the first token at which the distribution function exceeds `uniform`.
    """
    precise = logits if logits.dtype == torch.float64 else logits.float()
    distribution = precise.softmax(-1).cumsum(-1, dtype=torch.float64)
    # It ends near 1, not at it.
    return torch.searchsorted(distribution, uniform[:, None] * distribution[:, -1:], right=True)[:, 0]
