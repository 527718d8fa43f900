"""Which units of a site stay: what several recipes share."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import NumericalError
from ..maths.greedy import greedy_removal, workspace
from ..maths.refit import refit_as_stored, unit_columns
from ..maths.triangular import TILE, inverse_work, inverse_workspace, product_work
from ..model.site import Site
from .recipe import Problem, Refit


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


def kept_columns(problem: Problem, kept: Tensor) -> Refit:
    """The kept columns as they are."""
    return Refit(problem.w[:, unit_columns(kept.to(problem.w.device), problem.site.width)])


def obs_workspace(site: Site, keep: int) -> int:
    """Numbers that `obs` holds: the factor, what goes of W, the right-hand side, which becomes the solution, and the sum with W."""
    n, d, k = site.columns, site.outputs, keep * site.width
    return k * k + (n + k) * d + 2 * TILE * n


def obs_work(site: Site, keep: float) -> float:
    """Operations of `obs` that keeps so many units."""
    n, d, k = site.columns, site.outputs, keep * site.width
    return k**3 / 3 + 2 * d * k * (n - k) + 2 * d * k**2


def obs(problem: Problem, kept: Tensor, damping: float) -> Refit:
    """The OBS update of the kept columns, by one Cholesky factorisation."""
    columns = unit_columns(kept.to(problem.w.device), problem.site.width)
    return Refit(*refit_as_stored(problem.w, problem.gram, columns, damping, problem.stored, problem.site.name))
