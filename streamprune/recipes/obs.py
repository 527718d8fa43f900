"""Unit selection and refitting that several recipes share: exact greedy removal and the OBS update."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import NumericalError
from ..maths.greedy import greedy_removal, workspace
from ..maths.refit import others, refit_as_stored, unit_columns
from ..maths.triangular import TILE, inverse_workspace
from ..model.site import Site
from .recipe import Problem, Recipe, Refit

S = TypeVar("S", bound=Any)


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


def kept_columns(problem: Problem, kept: Tensor) -> Refit:
    """Copy the columns of the kept units (k,) int64 without refitting: W becomes (d_out, k·width)."""
    return Refit(problem.w[:, unit_columns(kept.to(problem.w.device), problem.site.width)])


def greedy_workspace(site: Site) -> int:
    """Count the tensor elements that greedy removal holds at its peak."""
    return workspace(site.columns, site.width) + inverse_workspace(site.columns)


def obs_workspace(site: Site, keep: int) -> int:
    """Count the tensor elements that the OBS update holds at its peak.

    They are the Cholesky factor, the removed columns of W, the right-hand side (overwritten by the solution), and its
    sum with W.
    """
    n, d, k = site.columns, site.outputs, keep * site.width
    return k * k + (n + k) * d + 2 * TILE * n


class ObsRecipe(Recipe[S]):
    """A recipe that removes units greedily by their exact cost on the site's own Gram, and refits by the OBS update.

    Its settings have `damping`, the ridge of that Gram relative to its mean diagonal.
    """

    wants_gram = True

    def select(self, problem: Problem, keep: int) -> Tensor:
        """Select units by exact greedy removal on the mean Gram H (n, n)."""
        site, damping = problem.site, self.settings.damping
        removed, _ = greedy_removal(
            problem.w,
            problem.gram,
            width=site.width,
            count=site.units - keep,
            damping=damping,
            place=site.name,
            factor=problem.factors.pop(damping, None),
        )
        return others(removed, site.units)

    def reconstruct(self, problem: Problem, kept: Tensor) -> Refit:
        """Refit the kept columns of W (d_out, n) by the OBS update with H (n, n): W becomes (d_out, k·width)."""
        columns = unit_columns(kept.to(problem.w.device), problem.site.width)
        damping = self.ridge(self.settings.damping, problem.site.columns, problem.tokens)
        return Refit(*refit_as_stored(problem.w, problem.gram, columns, damping, problem.stored, problem.site.name))

    def workspace(self, site: Site, keep: int) -> int:
        return max(greedy_workspace(site), obs_workspace(site, keep))
