"""Drawing tokens, the same ones wherever the arithmetic is cut into pieces."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import NumericalError
from .refit import advice, all_finite


def sample(logits: Tensor, uniform: Tensor) -> Tensor:
    """One token a row from softmax(logits), by inverting its distribution function.

    Args:
        logits: (rows, vocabulary).
        uniform: (rows,) float64, numbers drawn evenly from [0, 1); on the same device.

    Returns:
        (rows,) int64: the first token at which the distribution function exceeds `uniform`.

    Raises:
        NumericalError: logits of a row are NaN or Inf.
    """
    precise = logits if logits.dtype == torch.float64 else logits.float()
    distribution = precise.softmax(-1).cumsum(-1, dtype=torch.float64)
    ends = distribution[:, -1:]  # near 1, not at it
    if not all_finite(ends):
        raise NumericalError(f"the head gives NaN or Inf{advice(logits.dtype)}")
    return torch.searchsorted(distribution, uniform[:, None] * ends, right=True)[:, 0]
