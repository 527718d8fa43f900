"""REAP, router-weighted expert activation pruning (Lasby et al. 2025, arXiv 2510.13999): whole experts only.

``S_j = mean over the tokens routed to expert j of g_j(x) · ‖f_j(x)‖₂`` (eq. 9), `g_j` the router's weight, as the model multiplies
it, and `f_j` the expert's output. In each block the experts of least `S` go; an expert that no token reached has 0. Everything
else stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ConfigError
from ..maths.sums import Statistic
from ..model.site import Site
from .allocation import Budget
from .plan import Plan
from .recipe import Findings, Problem, Recipe, Refit, Survey, Surveyed
from .settings import NoSettings


class Reap(Recipe[NoSettings]):
    name = "reap"
    summary = "REAP: whole experts of least router weight times output norm; needs --experts"
    statistics: frozenset[Statistic] = frozenset({"output-norm"})
    ranks_experts = True
    thins = False

    def digest(self, surveyed: Surveyed) -> dict[str, Tensor]:
        """Return ``norm`` (), float64, for an expert: `S`."""
        norm = surveyed.statistics.norm
        assert norm is not None
        return {} if surveyed.site.expert is None else {"norm": norm.mean()}

    def expert_cost(self, site: Site, findings: Findings, generator: torch.Generator) -> float:
        return float(findings["norm"])

    def allocate(self, sites: Sequence[Site], survey: Survey, budget: Budget) -> Plan:
        raise NotImplementedError("only whole experts go")

    def check_plan(self, sites: Sequence[Site], plan: Plan, where: str) -> None:
        """Raise ConfigError for a plan that removes units of a site that stays."""
        super().check_plan(sites, plan, where)
        for site in sites:
            if 0 < plan[site.name].keep < site.units:
                raise ConfigError(
                    f"{where}: {site.name} keeps {plan[site.name].keep} of {site.units}; recipe reap removes whole experts only"
                )

    def select(self, problem: Problem, keep: int) -> Tensor:
        raise NotImplementedError("only whole experts go")

    def reconstruct(self, problem: Problem, kept: Tensor) -> Refit:
        raise NotImplementedError("only whole experts go")
