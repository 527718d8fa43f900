"""The default recipe (ours): loss-based greedy cost paths, targets from the dense model, residual correction.

*Survey*: sum two Grams at every site of the dense model: `H` (n, n) of the consumer's input and `G` (d_out, d_out)
of the gradient of its output. By default the gradients are those of predicting tokens drawn from the model itself.
The curvature of the loss in `W` is about ``G ⊗ H``. Removing columns `S` and refitting the rest therefore costs
``½ tr(W_Sᵀ G W_S ([H_λ⁻¹]_SS)⁻¹)``. One greedy path per site gives the marginal cost of every further unit, down to the
last: with it the sublayer goes as a whole, at ``½ tr(Wᵀ G W H)`` in all. These costs are comparable between sites,
because all of them estimate the loss.

*Allocation*: one threshold on the marginal cost per parameter. Routed experts can go as a whole in it, at what they add to the loss
although the router's next choices do their work (`pruning.experts`); units then cost more than predicted (`with_whole`).
*Compensation*: refit the producers to read the pruned stream.
*Target*: fit each consumer to its dense output plus the current residual error (dense minus pruned stream).
*Selection and reconstruction*: exact greedy removal and the OBS update, on the pruned stream.

With several shots, each shot surveys the model that the previous shot produced.

docs/methods.md gives the measured effect of each part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..maths.greedy import greedy_removal
from ..maths.refit import cholesky
from ..maths.sums import Statistic
from ..model.site import Site
from .allocation import Budget, allocate
from .obs import ObsRecipe, greedy_workspace
from .plan import Plan, SitePlan
from .recipe import LOSS, OVERLAP, WHOLE, Findings, Survey, Surveyed, Target
from .settings import DefaultSettings

_RIDGE = 1e-6
"""Ridge of G, relative to its mean diagonal: in small jobs G sums fewer tokens than it has rows."""
_UNITS = 1.6
"""What units cost, measured, by what is predicted (docs/methods.md). What whole experts cost is predicted."""
_COLUMNS, _MOST = 0.5, 0.1
"""The ridge of fits is this times columns per token, at most `_MOST`."""


def with_whole(site: Site, costs: Tensor, findings: Findings, factor: float) -> tuple[Site, Tensor]:
    """Let an expert go as a whole at its own price, or not at all if it has none; return it with steps to match, and its costs.

    The first units go by themselves as long as a parameter of them costs less than one of all that would be left; the others go
    together. The errors that units leave in the experts of a token add up as the experts' outputs do (`recipe.OVERLAP`). A site
    that is no expert stays as it is.

    Args:
        costs: cost per parameter of each further removed unit, (units,) float64, ascending.
        findings: hold what the expert costs as a whole (see `recipe.WHOLE`).
        factor: what units of all sites cost, by what is predicted.
    """
    if site.expert is None:
        return site, costs
    costs = costs * float(findings[OVERLAP])
    if WHOLE not in findings:
        return replace(site, stays=True), costs
    whole = float(findings[WHOLE]) / factor
    sizes = torch.full_like(costs, site.unit_parameters)
    sizes[-1] += site.rest or 0
    spent, gone = (torch.cat([costs.new_zeros(1), total.cumsum(0)]) for total in (costs * sizes, sizes))
    rising = (whole - spent[:-1]) / (gone[-1] - gone[:-1])
    alone = int(rising.argmax())
    able = range(1, site.units + 1) if site.choices is None else site.choices
    found = replace(site, choices=tuple(units for units in able if units >= site.units - alone))
    return found, torch.cat([costs[:alone], rising[alone].expand(site.units - alone)])


class Default(ObsRecipe[DefaultSettings]):
    name = "default"
    ranks_experts = True
    expert_statistics: frozenset[Statistic] = frozenset({"removal"})
    prices_experts = True
    summary = "greedy cost paths in units of loss, one threshold, fits to the dense output with residual correction"

    after_survey = frozenset({"shots", "target", "compensate", "sublayers", "fit_damping"})

    def __init__(self, settings: DefaultSettings) -> None:
        super().__init__(settings)
        self.statistics = frozenset({"gram", "gradient-gram"} if settings.weighted else {"gram"})
        self.draws_labels = settings.labels == "drawn"
        self.curve_label = LOSS if settings.weighted else "squared output error per parameter"
        self.sublayers = settings.sublayers
        self.compensation = settings.damping if settings.compensate else None
        if settings.target != "own":
            self.target = Target(settings.damping, residual=settings.target == "residual")

    def digest(self, surveyed: Surveyed) -> dict[str, Tensor]:
        """Estimate the cost per parameter of each further removed unit.

        Args:
            surveyed: its statistics hold the Gram H (n, n) and, if `weighted`, G (d_out, d_out); both are sums until
                `mean` normalises them (see `SiteStatistics`).

        Returns:
            ``costs`` (units,) float64, ascending. The last entry repeats the one before if the last unit has to stay.
        """
        site, statistics, damping = surveyed.site, surveyed.statistics, self.settings.damping
        assert statistics.gram is not None
        h, w = statistics.gram.mean(site.name)[0].to(surveyed.w.dtype), surveyed.w
        if self.settings.weighted:
            assert statistics.gradient is not None
            place = f"{site.name}, output gradients"
            g = statistics.gradient.mean(place)[0].to(w.dtype)
            # With G = L Lᵀ, tr(Wᵀ G W) = tr((Lᵀ W)ᵀ (Lᵀ W)): run the unweighted loop on Lᵀ W.
            w = cholesky(g, _RIDGE, place, device=w.device)[0].T @ w
        stays = site.rest is None
        _, costs = greedy_removal(w, h, width=site.width, count=site.units - stays, damping=damping, place=site.name)
        costs = (torch.cat([costs, costs[-1:]]) if stays else costs).double()
        sizes = torch.full_like(costs, site.unit_parameters)
        if not stays:
            sizes[-1] += site.rest or 0
        # A unit may become cheaper once others are removed. It then goes with them, so take the running maximum.
        return {"costs": torch.cummax(costs / (2 * sizes), dim=0).values if len(costs) else costs}

    def ridge(self, damping: float, columns: int, tokens: int) -> float:
        """Return the setting `fit_damping`, or where that is 0 the damping by tokens per column.

        A fit to few tokens follows their noise, and more so the fewer tokens there are for a column: the best ridge is
        about inversely proportional to their ratio.
        """
        return self.settings.fit_damping or max(damping, min(_COLUMNS * columns / max(tokens, 1), _MOST))

    def digest_workspace(self, site: Site) -> int:
        weighting = site.outputs * (site.outputs + site.columns) if self.settings.weighted else 0
        return greedy_workspace(site) + weighting

    def allocate(self, sites: Sequence[Site], survey: Survey, budget: Budget) -> Plan:
        """Allocate by one threshold on marginal cost for all sites."""
        costs = {site.name: survey[site.name]["costs"] for site in sites}
        if budget.experts:
            factor = _UNITS if self.settings.weighted else 1.0
            given = [with_whole(site, costs[site.name], survey[site.name], factor) for site in sites]
            sites, costs = [site for site, _ in given], {site.name: each for site, each in given}
        keep = allocate(sites, costs, budget)
        return Plan({name: SitePlan(units) for name, units in keep.items()}, budget.ratio)

    def shots(self, ratio: float) -> int:
        return self.settings.shots

    def curve(self, site: Site, findings: Findings) -> Tensor:
        return findings["costs"]
