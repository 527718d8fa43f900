"""Which units of a site stay: what several recipes share."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import NumericalError
from ..maths.blocked import inverse_work, inverse_workspace
from ..maths.greedy import greedy_removal, workspace
from ..maths.symmetric import product_work
from ..site import Site
from .recipe import Problem


def others(units: int, removed: Tensor) -> Tensor:
    """The units (k,), ascending, that are not among `removed`."""
    stays = torch.ones(units, dtype=torch.bool)
    stays[removed] = False
    return stays.nonzero()[:, 0]


def best(scores: Tensor, keep: int, place: str) -> Tensor:
    """The `keep` units of the highest scores (units,), ascending; of equal ones the first. A score may be −∞.

    Raises:
        NumericalError: one is NaN or ∞, which would be taken for the highest.
    """
    if not bool((scores < torch.inf).all()):
        raise NumericalError(f"{place}: the units' scores hold NaN or Inf")
    return scores.cpu().argsort(descending=True, stable=True)[:keep].sort().values


def greedy_workspace(site: Site) -> int:
    """Numbers that `greedy` holds."""
    return workspace(site.columns, site.width) + inverse_workspace(site.columns)


def greedy_work(site: Site, count: float) -> float:
    """Operations of `greedy` that removes so many columns."""
    n, d, k = site.columns, site.outputs, site.columns - count
    left = (n**2 - n * count + count**2 / 3) ** 0.5  # columns, in the mean of squares
    steps = count * (n + k) / 2 * (3 * 64 + 12 * site.width)
    return inverse_work(n) + product_work(n, d) + steps + 3 * product_work(left, max(0.0, count - 64))


def greedy(problem: Problem, keep: int, damping: float) -> Tensor:
    """What exact greedy removal on the site's own Gram leaves: (keep,) ascending."""
    site = problem.site
    removed, _ = greedy_removal(
        problem.w,
        problem.gram,
        width=site.width,
        count=site.units - keep,
        damping=damping,
        place=site.name,
        factor=problem.factors.pop(damping, None),
    )
    return others(site.units, removed)
