"""Token sampling with results that do not depend on how rows are batched."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import NumericalError
from .order import any_kernel
from .refit import accumulator, advice, all_finite


def sample(logits: Tensor, uniform: Tensor) -> Tensor:
    """Sample one token per row from softmax(logits), by inverting the cumulative distribution function.

    Args:
        logits: (rows, vocabulary), any float dtype.
        uniform: (rows,) float64, uniform random numbers in [0, 1).

    Returns:
        (rows,) int64: the first token at which the distribution function exceeds `uniform`.
    """
    probabilities = logits.to(accumulator(logits.dtype)).softmax(-1)
    with any_kernel():  # torch sums each row of several in a fixed order
        distribution = probabilities.cumsum(-1, dtype=torch.float64)
    ends = distribution[:, -1:]  # close to 1, but not exactly
    if not all_finite(ends):
        raise NumericalError(f"the head gives NaN or Inf{advice(logits.dtype)}")
    return torch.searchsorted(distribution, uniform[:, None] * ends, right=True)[:, 0]
