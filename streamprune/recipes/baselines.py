"""Baselines: uniform allocation, a local score, no refitting."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..model.site import Site
from .allocation import Budget, allocate, even_densities
from .masks import MaskRecipe, count_zeros, histograms, mask
from .obs import best, kept_columns
from .plan import Plan, SitePlan
from .recipe import Findings, Problem, Recipe, Refit, S, SiteWeights, Survey, Surveyed
from .settings import MagnitudeSettings, NoSettings


class Baseline(Recipe[S]):
    """Remove the units of lowest score, the same share at every site, and keep the other weights as they are."""

    @abstractmethod
    def score(self, problem: Problem) -> Tensor:
        """Score the units: (units,) float."""

    def allocate(self, sites: Sequence[Site], survey: Survey, budget: Budget) -> Plan:
        keep = allocate(sites, even_densities(sites), budget)
        return Plan({site.name: SitePlan(keep[site.name]) for site in sites}, budget.ratio)

    def select(self, problem: Problem, keep: int) -> Tensor:
        return best(self.score(problem), keep, problem.site.name)

    def reconstruct(self, problem: Problem, kept: Tensor) -> Refit:
        return kept_columns(problem, kept)


class Random(Baseline[NoSettings]):
    name = "random"
    summary = "random units, the same share everywhere; or random experts"
    seeded = True
    ranks_experts = True

    def score(self, problem: Problem) -> Tensor:
        """Draw uniform noise from the site's own seed: (units,) float64."""
        return torch.rand(problem.site.units, generator=problem.generator, dtype=torch.float64)

    def expert_cost(self, site: Site, findings: Findings, generator: torch.Generator) -> float:
        return float(torch.rand((), generator=generator, dtype=torch.float64))


class WandaSp(Baseline[NoSettings]):
    name = "wanda-sp"
    summary = "units of least |weight| × input norm, the same share everywhere"
    wants_gram = True

    def score(self, problem: Problem) -> Tensor:
        """Score units by structured Wanda, ``Σ_j∈u ‖x_j‖ · Σ_i |W_ij|``: (units,), dtype of W.

        ``‖x_j‖`` is the square root of the diagonal of the mean Gram H (n, n).
        """
        columns = problem.w.abs().sum(dim=0) * problem.gram.diagonal().clamp_min(0).sqrt().to(problem.w)
        return columns.view(problem.site.units, -1).sum(dim=1)


class Magnitude(MaskRecipe[MagnitudeSettings], Baseline[MagnitudeSettings]):
    name = "magnitude"
    summary = "units of least squared or absolute weight, the same share everywhere; or weights, by one threshold"

    def __init__(self, settings: MagnitudeSettings) -> None:
        super().__init__(settings)
        self.statistics = frozenset() if self.writes_zeros else None

    def score(self, problem: Problem) -> Tensor:
        """Sum each unit's squared or absolute weights over its consumer columns and producer rows: (units,), dtype of W."""
        units = problem.site.units
        *producers, w = self._magnitudes(problem)
        score = w.sum(dim=0).view(units, -1).sum(dim=1)
        for producer in producers:
            score = score + producer.sum(dim=1).view(units, -1).sum(dim=1)
        return score

    def digest(self, surveyed: Surveyed) -> dict[str, Tensor]:
        return histograms(self._magnitudes(surveyed), self.settings.structure, surveyed.site.name)

    def allocate(self, sites: Sequence[Site], survey: Survey, budget: Budget) -> Plan:
        if self.writes_zeros:
            return count_zeros(sites, survey, budget, self.settings.structure)
        return super().allocate(sites, survey, budget)

    def reconstruct(self, problem: Problem, kept: Tensor) -> Refit:
        if problem.zeros is None:
            return kept_columns(problem, kept)
        gone = [
            mask(costs, zeros, self.settings.structure, problem.site.name)
            for costs, zeros in zip(self._magnitudes(problem), problem.zeros, strict=True)
        ]
        *producers, w = (w.masked_fill(m, 0.0) for w, m in zip((*problem.producers, problem.w), gone, strict=True))
        return Refit(w, producers=tuple(producers))

    def workspace(self, site: Site, keep: int) -> int:
        return (3 if self.writes_zeros else 1) * sum(site.linears)

    def digest_workspace(self, site: Site) -> int:
        return 3 * sum(site.linears)

    def _magnitudes(self, weights: SiteWeights) -> Iterator[Tensor]:
        """Yield w² or |w| of the weights of every producer, then of the consumer."""
        l1 = self.settings.norm == "l1"
        return (w.abs() if l1 else w.square() for w in (*weights.producers, weights.w))
