"""SoBP: Structured Optimal Brain Pruning for Large Language Models (Wei et al., EMNLP 2024).

Stage 1, *global importance-aware selection*: put a mask on every unit and compute its gradient by a backward
sweep. Normalise by the unit's parameters and weight heads by λ. Solve a knapsack under the parameter capacity.
Stage 2, *local greedy refinement*: keep the number of units that each site loses, but choose the units again by
exact greedy removal on the site's own Gram.
Stage 3, *module-wise reconstruction*: solve the rearranged system with one Cholesky factorisation, and apply *input
weights error compensation* to the linears that read the pruned stream.

Each stage can be switched off, which gives the paper's ablation.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..model.site import Site
from .allocation import Budget, allocate
from .obs import best, greedy, greedy_work, greedy_workspace, kept_columns, obs, obs_work, obs_workspace
from .plan import Plan, SitePlan
from .recipe import Curve, Problem, Recipe, Refit, Survey, Surveyed
from .settings import SobpSettings


def importance(settings: SobpSettings, surveyed: Surveyed) -> dict[str, Tensor]:
    """Return the importance of each unit: mean of `g²` or `|g|` over sequences, divided by the unit's parameters.

    `g` is the gradient of a sequence's mean loss with respect to the unit's mask.

    Returns:
        ``importance`` (units,) float.
    """
    site, gradient = surveyed.site, surveyed.statistics.mask
    assert gradient is not None
    sums = gradient.squares if settings.gradient == "fisher" else gradient.magnitudes
    weight = settings.head_weight if site.kind == "attention" else 1.0
    return {"importance": weight * sums / gradient.sequences / site.unit_parameters}


def global_selection(settings: SobpSettings, sites: Sequence[Site], survey: Survey, budget: Budget) -> Plan:
    """Allocate by stage 1: one global knapsack on importance."""
    scores = {site.name: survey[site.name]["importance"] for site in sites}
    keep = allocate(sites, {name: score.sort().values for name, score in scores.items()}, budget)
    kept = {}
    for site in sites:
        # With refinement, the plan sets how many units stay and the site's own Gram decides which.
        units = None if settings.refine else tuple(best(scores[site.name], keep[site.name], site.name).tolist())
        kept[site.name] = SitePlan(keep[site.name], units)
    return Plan(kept, budget.ratio)


def reconstruct(settings: SobpSettings, problem: Problem, kept: Tensor) -> Refit:
    """Refit the consumer for the kept units (k,) int64: its part of stage 3."""
    return obs(problem, kept, settings.damping) if settings.reconstruct else kept_columns(problem, kept)


SOBP = Recipe(
    name="sobp",
    summary="structured optimal brain pruning: global mask gradients, greedy refinement, Cholesky reconstruction",
    allocate=global_selection,
    select=lambda settings, problem, keep: greedy(problem, keep, settings.damping),  # stage 2
    reconstruct=reconstruct,
    statistics=lambda settings: frozenset({"mask-gradient"}),
    digest=importance,
    curve=lambda settings: Curve("importance a parameter", lambda site, findings: findings["importance"].sort().values),
    wants_gram=lambda settings: settings.refine or settings.reconstruct,
    compensation=lambda settings: settings.compensation_damping if settings.compensate else None,
    plans_units=lambda settings, site: not settings.refine,
    work=lambda settings, site, keep: (
        settings.refine * greedy_work(site, (site.units - keep) * site.width)
        + settings.reconstruct * obs_work(site, keep)
    ),
    workspace=lambda settings, site, keep: max(
        settings.refine * greedy_workspace(site), settings.reconstruct * obs_workspace(site, keep)
    ),
)
