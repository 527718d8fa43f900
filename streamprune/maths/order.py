"""The order of sums on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def any_kernel() -> Iterator[None]:
    """Let torch take any kernel, for operations whose result does not depend on it.

    Jobs make torch raise an error for operations whose order of sums may vary (see `machine.deterministic`). It decides by the
    operation, not by its use, so that it refuses these too. Ordered kernels may also be too large: for cumulative sums, some versions of
    torch take memory that is quadratic in the length.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
