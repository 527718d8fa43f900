"""Which units of a site stay: what several recipes share."""

from __future__ import annotations

import torch
from torch import Tensor

from ..maths.blocked import inverse_work
from ..maths.greedy import greedy_removal
from ..site import Site
from .recipe import Problem


def others(units: int, removed: Tensor) -> Tensor:
    """The units (k,), ascending, that are not among `removed`."""
    stays = torch.ones(units, dtype=torch.bool)
    stays[removed] = False
    return stays.nonzero()[:, 0]


def best(scores: Tensor, keep: int) -> Tensor:
    """The `keep` units of the highest scores (units,), ascending; of equal ones the first."""
    return scores.cpu().argsort(descending=True, stable=True)[:keep].sort().values


def greedy_workspace(site: Site) -> int:
    """Numbers that `greedy` holds: P and WᵀW."""
    return 2 * site.columns**2


def greedy_work(site: Site, count: float) -> float:
    """Operations of `greedy` that removes so many columns."""
    n, d, k = site.columns, site.outputs, site.columns - count
    half = (1 + min(1, 512 / n)) / 2  # of symmetric products, what is computed
    steps = count * (n + k) / 2 * (3 * 64 + 12 * site.width)
    updates = 6 * max(0.0, count - 64) * (n * n + n * k + k * k) / 3 * half  # of P and V, as far as they are left
    return inverse_work(n) + 2 * d * n * n * half + steps + updates


def greedy(problem: Problem, keep: int, damping: float) -> Tensor:
    """What exact greedy removal on the site's own Gram leaves: (keep,) ascending."""
    site = problem.site
    removed, _ = greedy_removal(
        problem.w, problem.gram, width=site.width, count=site.units - keep, damping=damping, place=site.name
    )
    return others(site.units, removed)
