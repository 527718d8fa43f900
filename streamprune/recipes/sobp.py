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

from ..maths.sums import Statistic
from ..model.site import Site
from .allocation import Budget, allocate
from .obs import ObsRecipe, best, greedy_workspace, kept_columns, obs_workspace
from .plan import Plan, SitePlan
from .recipe import Findings, Problem, Refit, Survey, Surveyed
from .settings import SobpSettings


class Sobp(ObsRecipe[SobpSettings]):
    name = "sobp"
    summary = "structured optimal brain pruning: global mask gradients, greedy refinement, Cholesky reconstruction"
    statistics: frozenset[Statistic] = frozenset({"mask-gradient"})
    after_survey = frozenset({"refine", "reconstruct", "compensate", "damping", "compensation_damping"})
    curve_label = "importance per parameter"

    def __init__(self, settings: SobpSettings) -> None:
        super().__init__(settings)
        self.wants_gram = settings.refine or settings.reconstruct
        self.compensation = settings.compensation_damping if settings.compensate else None

    def digest(self, surveyed: Surveyed) -> dict[str, Tensor]:
        """Return ``importance`` (units,) float: mean of `g²` or `|g|` over sequences, or `|mean g|`, divided by the unit's parameters.

        `g` is the gradient of a sequence's mean loss with respect to the unit's mask.
        """
        site, gradient = surveyed.site, surveyed.statistics.mask
        assert gradient is not None
        sums = {"fisher": gradient.squares, "abs": gradient.magnitudes, "mean": gradient.signed.abs()}[
            self.settings.gradient
        ]
        weight = 1.0 if site.kind == "ffn" else self.settings.head_weight
        return {"importance": weight * sums / gradient.sequences / site.unit_parameters}

    def allocate(self, sites: Sequence[Site], survey: Survey, budget: Budget) -> Plan:
        """Allocate by stage 1: one global knapsack on importance."""
        scores = {site.name: survey[site.name]["importance"] for site in sites}
        keep = allocate(sites, {name: score.sort().values for name, score in scores.items()}, budget)
        kept = {}
        for site in sites:
            # With refinement, the plan sets how many units stay and the site's own Gram decides which.
            units = None if self.settings.refine else best(scores[site.name], keep[site.name], site.name)
            kept[site.name] = SitePlan(keep[site.name], None if units is None else tuple(units.tolist()))
        return Plan(kept, budget.ratio)

    def plans_units(self, site: Site) -> bool:
        return not self.settings.refine

    def reconstruct(self, problem: Problem, kept: Tensor) -> Refit:
        """Refit the consumer for the kept units (k,) int64: its part of stage 3."""
        return super().reconstruct(problem, kept) if self.settings.reconstruct else kept_columns(problem, kept)

    def workspace(self, site: Site, keep: int) -> int:
        refine = greedy_workspace(site) if self.settings.refine else 0
        return max(refine, obs_workspace(site, keep) if self.settings.reconstruct else 0)

    def curve(self, site: Site, findings: Findings) -> Tensor:
        return findings["importance"].sort().values
