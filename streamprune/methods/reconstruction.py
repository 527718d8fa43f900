"""What becomes of the weights that stay: what several recipes share."""

from __future__ import annotations

from torch import Tensor

from ..maths.linalg import refit, unit_columns
from .recipe import Problem, Refit


def kept_columns(problem: Problem, kept: Tensor) -> Refit:
    """The kept columns as they are."""
    return Refit(problem.w[:, unit_columns(kept.to(problem.w.device), problem.site.width)])


def obs(problem: Problem, kept: Tensor, damping: float) -> Refit:
    """The OBS update of the kept columns, by one Cholesky factorisation."""
    columns = unit_columns(kept.to(problem.w.device), problem.site.width)
    return Refit(*refit(problem.w, problem.gram, columns, damping, problem.site.name))
