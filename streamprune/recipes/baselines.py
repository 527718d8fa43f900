"""Baselines: uniform allocation, a local score, no refitting."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..model.site import Site
from . import masks
from .allocation import Budget, allocate, even_densities
from .obs import best, kept_columns
from .plan import Plan, SitePlan
from .recipe import Problem, Recipe, Refit, Survey, Surveyed
from .settings import UNITS, MagnitudeSettings, NoSettings

Score = Callable[[Problem], Tensor]


def random_score(problem: Problem) -> Tensor:
    """Draw uniform noise from the site's own seed: (units,) float64."""
    return torch.rand(problem.site.units, generator=problem.generator, dtype=torch.float64)


def magnitude_score(problem: Problem) -> Tensor:
    """Sum each unit's squared weights over its consumer columns and producer rows: (units,), dtype of W."""
    units = problem.site.units
    score = problem.w.square().sum(dim=0).view(units, -1).sum(dim=1)
    for producer in problem.producers:
        score = score + producer.square().sum(dim=1).view(units, -1).sum(dim=1)
    return score


def wanda_score(problem: Problem) -> Tensor:
    """Score units by structured Wanda, ``Σ_j∈u ‖x_j‖ · Σ_i |W_ij|``: (units,), dtype of W.

    ``‖x_j‖`` is the square root of the diagonal of the mean Gram H (n, n).
    """
    columns = problem.w.abs().sum(dim=0) * problem.gram.diagonal().clamp_min(0).sqrt().to(problem.w)
    return columns.view(problem.site.units, -1).sum(dim=1)


def _uniform(settings: object, sites: Sequence[Site], survey: Survey, budget: Budget) -> Plan:
    keep = allocate(sites, even_densities(sites), budget)
    return Plan({site.name: SitePlan(keep[site.name]) for site in sites}, budget.ratio)


def _squares(surveyed_or_problem: Surveyed | Problem) -> Iterator[Tensor]:
    return (w.square() for w in (*surveyed_or_problem.producers, surveyed_or_problem.w))


def _magnitude_plan(settings: MagnitudeSettings, sites: Sequence[Site], survey: Survey, budget: Budget) -> Plan:
    if settings.structure == UNITS:
        return _uniform(settings, sites, survey, budget)
    return masks.count_zeros(sites, survey, budget, settings.structure)


def _magnitude_weights(settings: MagnitudeSettings, problem: Problem, kept: Tensor) -> Refit:
    if problem.zeros is None:
        return kept_columns(problem, kept)
    gone = [
        masks.mask(costs, zeros, settings.structure, problem.site.name)
        for costs, zeros in zip(_squares(problem), problem.zeros, strict=True)
    ]
    *producers, w = (w.masked_fill(m, 0.0) for w, m in zip((*problem.producers, problem.w), gone, strict=True))
    return Refit(w, producers=tuple(producers))


def _baseline(name: str, summary: str, score: Score, *, gram: bool = False, seeded: bool = False) -> Recipe[NoSettings]:
    def select(settings: NoSettings, problem: Problem, keep: int) -> Tensor:
        return best(score(problem), keep, problem.site.name)

    return Recipe(
        name=name,
        summary=summary,
        allocate=_uniform,
        select=select,
        reconstruct=lambda settings, problem, kept: kept_columns(problem, kept),
        wants_gram=lambda settings: gram,
        seeded=seeded,
    )


RANDOM = _baseline("random", "random units, the same share everywhere", random_score, seeded=True)
MAGNITUDE = Recipe(
    name="magnitude",
    summary="units of least squared weight, the same share everywhere; or weights, by one threshold",
    statistics=lambda settings: None if settings.structure == UNITS else frozenset(),
    digest=lambda settings, surveyed: masks.histograms(_squares(surveyed), settings.structure, surveyed.site.name),
    findings=lambda settings, site: masks.findings(settings.structure, site),
    allocate=_magnitude_plan,
    select=lambda settings, problem, keep: best(magnitude_score(problem), keep, problem.site.name),
    reconstruct=_magnitude_weights,
    workspace=lambda settings, site, keep: sum(site.linears) if settings.structure == UNITS else 3 * sum(site.linears),
    digest_workspace=lambda settings, site: 3 * sum(site.linears),
    check=masks.check_structure,
    check_plan=masks.check_plan,
    writes_zeros=lambda settings: settings.structure != UNITS,
)
WANDA_SP = _baseline(
    "wanda-sp", "units of least |weight| × input norm, the same share everywhere", wanda_score, gram=True
)
