"""What becomes of the weights that stay: what several recipes share."""

from __future__ import annotations

from torch import Tensor

from ..maths.blocked import TILE
from ..maths.linalg import refit_as_stored, unit_columns
from ..site import Site
from .recipe import Problem, Refit


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
