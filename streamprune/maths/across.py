"""Sums over several workers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

AddUp = Callable[[Tensor], None]
"""Makes a tensor the sum over all workers, in place."""


def add_counts(add_up: AddUp, *counts: int) -> list[int]:
    """Counts, added up over the workers."""
    found = torch.tensor(counts)
    add_up(found)
    total: list[int] = found.tolist()
    return total
