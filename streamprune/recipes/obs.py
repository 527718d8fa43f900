"""Unit selection and OBS refitting that several recipes share."""

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
    """Return the units that stay, (units − r,) int64 ascending, given the removed ones (r,) int64."""
    stays = torch.ones(units, dtype=torch.bool)
    stays[removed] = False
    return stays.nonzero()[:, 0]


def best(scores: Tensor, keep: int, place: str) -> Tensor:
    """Return the `keep` units with the highest scores. Ties go to the lower index.

    Args:
        scores: (units,) float; a score may be −∞.

    Returns:
        (keep,) int64, ascending, on the CPU.

    Raises:
        NumericalError: a score is NaN or +∞, which would rank highest.
    """
    if not bool((scores < torch.inf).all()):
        raise NumericalError(f"{place}: the units' scores hold NaN or Inf")
    return scores.cpu().argsort(descending=True, stable=True)[:keep].sort().values


def greedy_workspace(site: Site) -> int:
    """Count the tensor elements that `greedy` holds at its peak."""
    return workspace(site.columns, site.width) + inverse_workspace(site.columns)


def greedy_work(site: Site, count: float) -> float:
    """Count the FLOPs of `greedy` when it removes `count` columns."""
    n, d, k = site.columns, site.outputs, site.columns - count
    left = (n**2 - n * count + count**2 / 3) ** 0.5  # remaining columns, root mean square over the removals
    steps = count * (n + k) / 2 * (3 * 64 + 12 * site.width)
    return inverse_work(n) + product_work(n, d) + steps + 3 * product_work(left, max(0.0, count - 64))


def greedy(problem: Problem, keep: int, damping: float) -> Tensor:
    """Select units by exact greedy removal on the site's own mean Gram H (n, n): (keep,) int64, ascending."""
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
    """Copy the columns of the kept units (k,) int64 without refitting: W becomes (d_out, k·width)."""
    return Refit(problem.w[:, unit_columns(kept.to(problem.w.device), problem.site.width)])


def obs_workspace(site: Site, keep: int) -> int:
    """Count the tensor elements that `obs` holds at its peak.

    They are the Cholesky factor, the removed columns of W, the right-hand side (overwritten by the solution), and its
    sum with W.
    """
    n, d, k = site.columns, site.outputs, keep * site.width
    return k * k + (n + k) * d + 2 * TILE * n


def obs_work(site: Site, keep: float) -> float:
    """Count the FLOPs of `obs` when it keeps `keep` units."""
    n, d, k = site.columns, site.outputs, keep * site.width
    return k**3 / 3 + 2 * d * k * (n - k) + 2 * d * k**2


def obs(problem: Problem, kept: Tensor, damping: float) -> Refit:
    """Refit the columns of the kept units (k,) int64 by the OBS update, with one Cholesky factorisation.

    Reads W (d_out, n) and the mean Gram H (n, n); returns W as (d_out, k·width).
    """
    columns = unit_columns(kept.to(problem.w.device), problem.site.width)
    return Refit(*refit_as_stored(problem.w, problem.gram, columns, damping, problem.stored, problem.site.name))
