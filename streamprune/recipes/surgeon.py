"""The LLM Surgeon (van der Ouderaa et al., ICLR 2024).

*Curvature*: both Kronecker factors of every linear, ``F ≈ G ⊗ A``, by one forward and one backward sweep (section 3.1).
*Costs* of rows and columns, or of elements (eq. 10), and one global threshold on the cost per parameter (section 3.3).
The cost of a unit is that of its consumer columns plus its producer rows (ours: a head's columns together, by eq. 7).
*Correlated updates* of the remaining weights (eqs. 11 and 12).
*Multi-shot*: a linear schedule; the curvature is estimated again for each shot (section 3.5).
Structures: units, single weights, M:N, and rows and columns of every linear apart, as zeros.
With only the diagonal of the curvature, no other weight is updated: K-OBD, and L-OBD without gradients (section 4).

The factors that the updates need are kept on disk until the threshold is known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..maths.kfac import (
    best_step,
    column_costs,
    damped,
    element_costs,
    group_costs,
    remove_columns,
    remove_elements,
    row_costs,
)
from ..maths.refit import inverse, lowers_error, others, refit_as_stored, unit_columns
from ..maths.sums import Statistic
from ..model.site import Site
from .allocation import Budget, allocate
from .masks import MaskRecipe, count_lines, count_zeros, histograms, lines_to_go, mask
from .obs import best
from .plan import Plan, SitePlan
from .recipe import LOSS, Correction, Findings, Problem, Refit, Survey, Surveyed
from .settings import LINES, SurgeonSettings


def _single_costs(w: Tensor, g: Tensor, a_inverse: Tensor, units: int) -> Tensor:
    return column_costs(w, g, a_inverse).view(units, -1).sum(dim=1)


def _linears(
    factors: Mapping[str, Tensor], consumer: Tensor, producers: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return (W (rows, columns), G (rows, rows), A (columns, columns)) of each linear, the consumer last."""
    factors = {name: factor.to(consumer.dtype) for name, factor in factors.items()}
    each = [(w, factors[f"g.{i}"], factors["a"]) for i, w in enumerate(producers)]
    return [*each, (consumer, factors["g.consumer"], factors["a.consumer"])]


class Surgeon(MaskRecipe[SurgeonSettings]):
    name = "surgeon"
    summary = "LLM Surgeon: K-FAC curvature, one global threshold, correlated updates, many shots; units or weights"
    statistics: frozenset[Statistic] = frozenset({"factors"})
    keeps_findings = True
    ranks_experts = True
    expert_statistics: frozenset[Statistic] = frozenset({"removal"})

    after_survey = frozenset({"lora_steps", "lora_rank", "lora_rate"})

    def __init__(self, settings: SurgeonSettings) -> None:
        super().__init__(settings)
        if settings.curvature == "l-obd":
            self.statistics = frozenset({"gram", "inputs"})
        own = "squared output error per parameter" if settings.curvature == "l-obd" else LOSS
        self.curve_label = None if self.writes_zeros else own
        if settings.lora_steps:
            self.correction = Correction(settings.lora_steps, settings.lora_rank, settings.lora_rate)

    def shots(self, ratio: float) -> int:
        if self.settings.shots:
            return self.settings.shots
        single_weights = self.writes_zeros and self.settings.structure != LINES
        return 5 if single_weights else max(1, round(80 * ratio))

    def digest(self, surveyed: Surveyed) -> dict[str, Tensor]:
        """Return the site's Kronecker factors and what the threshold needs: unit costs, or histograms of weight costs.

        Returns:
            The factors that `reconstruct` reads (`_needed`), normalised (see `SiteStatistics`): ``a`` (d, d) of the producers' input,
            ``a.consumer`` (n, n) of the consumer's input, ``g.i`` (rows, rows) of the gradient of producer i's output,
            ``g.consumer`` (d_out, d_out) of the gradient of the consumer's output. For units, also ``costs`` (units,)
            float64; for weights ``histogram.i`` (see `masks.histograms`); for rows and columns ``lines.i`` (rows + columns,)
            float64, the cost per weight of each row, then column, of linear i.
        """
        site, statistics = surveyed.site, surveyed.statistics
        grams = {"a": statistics.inputs, "a.consumer": statistics.gram, "g.consumer": statistics.gradient}
        grams |= {f"g.{i}": gram for i, gram in enumerate(statistics.producers)}
        factors = {}
        for name, gram in grams.items():
            if gram is not None:
                factors[name] = self._simplified(gram.mean(f"{site.name}, {name}")[0])
            else:  # L-OBD
                side = site.outputs if name == "g.consumer" else site.linears[int(name[2:])] // site.outputs
                factors[name] = torch.eye(side, dtype=surveyed.w.dtype, device=surveyed.w.device)
        linears = _linears(factors, surveyed.w, surveyed.producers)
        if self.settings.structure == LINES:
            each = zip(linears, self._inverses(linears, site), strict=True)
            lines = [self._line_costs(w, g, a, g_inv, a_inv) for (w, g, a), (_, g_inv, a_inv, _) in each]
            return {**factors, **{f"lines.{i}": costs.double() for i, costs in enumerate(lines)}}
        if self.writes_zeros:
            costs = (element_costs(w, g, a) for w, g, a, _ in self._inverses(linears, site))
            return {**factors, **histograms(costs, self.settings.structure, site.name)}
        *producers, (w, g, a) = linears
        price = group_costs if self.settings.joint else _single_costs
        cost = price(w, *self._sides(w, g, a, site), site.units)
        for w, g, a in producers:
            cost = cost + price(w.T, *self._sides(w, a, g, site), site.units)
        return {**{name: factors[name] for name in self._needed(site)}, "costs": cost.double()}

    def allocate(self, sites: Sequence[Site], survey: Survey, budget: Budget) -> Plan:
        """Allocate by one global threshold on the cost per parameter."""
        if self.settings.structure == LINES:
            return count_lines(sites, survey, budget)
        if self.writes_zeros:
            return count_zeros(sites, survey, budget, self.settings.structure)
        costs = {site.name: survey[site.name]["costs"] for site in sites}
        keep = allocate(sites, {site.name: self.curve(site, survey[site.name]) for site in sites}, budget)
        return Plan(
            {name: SitePlan(units, tuple(best(costs[name], units, name).tolist())) for name, units in keep.items()},
            budget.ratio,
        )

    def curve(self, site: Site, findings: Findings) -> Tensor:
        """Return the cost per parameter of each unit, (units,) float64 ascending."""
        return findings["costs"].sort().values / site.unit_parameters

    def plans_units(self, site: Site) -> bool:
        return not self.writes_zeros

    def select(self, problem: Problem, keep: int) -> Tensor:
        """Keep all units: only weights are zeroed here, since the plan names the units to keep."""
        return torch.arange(keep)

    def reconstruct(self, problem: Problem, kept: Tensor) -> Refit:
        """Apply the correlated updates to all linears of the site.

        Args:
            kept: (k,) int64, ascending: the units that stay. Ignored when single weights are zeroed.
        """
        site = problem.site

        def factor(name: str) -> Tensor:
            return problem.findings[name].to(problem.w.dtype)

        if problem.zeros is not None:
            factors = {name: factor(name) for name in self._needed(site)}
            linears = _linears(factors, problem.w, problem.producers)
            remove = self._without_lines if self.settings.structure == LINES else self._without_elements
            return remove(problem, linears)
        consumer, damping = self._updated(problem, problem.w, factor("a.consumer"), kept)
        if not self.settings.update_rows:
            return Refit(consumer, damping)
        producers, dampings = [], [damping]
        for i, w in enumerate(problem.producers):
            rows, took = self._updated(problem, w.T, factor(f"g.{i}"), kept)
            stays = unit_columns(kept.to(w.device), len(w) // site.units)
            producers.append(torch.zeros_like(w).index_copy_(0, stays, rows.T))
            dampings.append(took)
        return Refit(consumer, max((each for each in dampings if each is not None), default=None), tuple(producers))

    def _without_elements(self, problem: Problem, linears: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Refit:
        """Zero single weights in all linears (W, G, A) of a site and apply the correlated updates."""
        assert problem.zeros is not None
        place, used, weights, steps = problem.site.name, self.settings.damping, [], []
        each = zip(linears, self._inverses(linears, problem.site), problem.zeros, strict=True)
        for (_, g, a), (w, g_inverse, a_inverse, took), zeros in each:
            gone = mask(element_costs(w, g_inverse, a_inverse), zeros, self.settings.structure, place)
            updated, ridge = remove_elements(
                w, g_inverse, a_inverse, gone, at_most=self.settings.correlated, place=place
            )
            updated, step = best_step(w, updated, gone, g, a)
            weights.append(updated)
            steps.append(step)
            used = max(used, took, ridge)
        *producers, consumer = weights
        return Refit(consumer, used, tuple(producers), step=min(steps))

    def _without_lines(self, problem: Problem, linears: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Refit:
        """Zero rows and columns in all linears (W, G, A) of a site and apply the correlated updates of both (eq. 12).

        The updates work on different sides of W, so one after the other they are the joint optimum.
        """
        assert problem.zeros is not None
        place, used, weights = problem.site.name, self.settings.damping, []
        each = zip(linears, self._inverses(linears, problem.site), problem.zeros, strict=True)
        for (_, g, a), (w, g_inverse, a_inverse, took), zeros in each:
            costs = self._line_costs(w, g, a, g_inverse, a_inverse)
            rows, columns = lines_to_go(costs, len(w), zeros, place)
            w, ridge = remove_columns(w, a_inverse, columns, place)
            w, other = remove_columns(w.T, g_inverse, rows, place)
            weights.append(w.T.contiguous())
            used = max(used, took, ridge, other)
        *producers, consumer = weights
        return Refit(consumer, used, tuple(producers))

    def _line_costs(self, w: Tensor, g: Tensor, a: Tensor, g_inverse: Tensor, a_inverse: Tensor) -> Tensor:
        """Return the cost per weight of each row, then of each column, of W (R, C): (R + C,)."""
        g, a = (damped(factor, self.settings.damping, device=w.device) for factor in (g, a))
        rows, columns = w.shape
        return torch.cat([row_costs(w, a, g_inverse) / columns, column_costs(w, g, a_inverse) / rows])

    def _simplified(self, factor: Tensor) -> Tensor:
        """Return a Kronecker factor of the curvature: for K-OBD and L-OBD, its diagonal as a matrix."""
        return factor if self.settings.curvature == "full" else torch.diag(factor.diagonal())

    def _updated(self, problem: Problem, w: Tensor, factor: Tensor, kept: Tensor) -> tuple[Tensor, float | None]:
        """Return the updated columns that stay, (rows, k·width), and the damping used.

        Args:
            w: (rows, columns); for a producer, its transpose.
            factor: (columns, columns), normalised.
            kept: (k,) int64.
        """
        site, device = problem.site, w.device
        width = len(factor) // site.units
        removed, stays = (unit_columns(each.to(device), width) for each in (others(kept, site.units), kept))
        inverted, used = inverse(factor, self.settings.damping, site.name, device=device)
        updated, ridge = remove_columns(w, inverted, removed, site.name)
        del inverted
        updated = updated[:, stays]
        if not ridge and lowers_error(w, factor, updated, stays, problem.stored):
            return updated, used
        # Compute the same update from a factor of the remaining columns, without an inverse: its rounding error is smaller.
        return refit_as_stored(w, factor, stays, used, problem.stored, site.name)

    def _inverses(
        self, linears: Sequence[tuple[Tensor, Tensor, Tensor]], site: Site
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, float]]:
        """Yield (W, G⁻¹, A⁻¹) of each linear on W's device, and the larger damping used. Producers share one A⁻¹."""
        of: Tensor | None = None
        for w, g, a in linears:
            if a is not of:
                of, (a_inverse, other) = a, inverse(a, self.settings.damping, site.name, device=w.device)
            g_inverse, one = inverse(g, self.settings.damping, site.name, device=w.device)
            yield w, g_inverse, a_inverse, max(one, other)

    def _sides(self, w: Tensor, kept: Tensor, removed: Tensor, site: Site) -> tuple[Tensor, Tensor]:
        """Return, on W's device, the damped factor of the side that stays whole and the inverse of the other side's."""
        inverted = inverse(removed, self.settings.damping, site.name, device=w.device)[0]
        return damped(kept, self.settings.damping, device=w.device), inverted

    def _needed(self, site: Site) -> list[str]:
        """Name the factors of a site that `reconstruct` reads."""
        producers = [f"g.{i}" for i in range(len(site.linears) - 1)]
        if self.writes_zeros:
            return ["a", "a.consumer", "g.consumer", *producers]
        return ["a.consumer", *(producers if self.settings.update_rows else ())]

    def findings(self, site: Site) -> int:
        """Count the elements stored on disk for a site: those of all needed factors and of the histograms."""
        return self._factor_numbers(site) + super().findings(site)

    def _factor_numbers(self, site: Site) -> int:
        d = site.outputs  # width of the residual stream, which the producers read and the consumer writes
        sides = {"a": d, "a.consumer": site.columns, "g.consumer": d}
        sides |= {f"g.{i}": weights // d for i, weights in enumerate(site.linears[:-1])}
        return sum(sides[name] ** 2 for name in self._needed(site))

    def workspace(self, site: Site, keep: int) -> int:
        """Count the elements that `reconstruct` holds at its peak.

        For weights: the factors, their inverses and scaled copies of both. For units: also rows of the inverse.
        """
        d, sides = site.outputs, [weights // site.outputs for weights in site.linears]
        if self.writes_zeros:
            return self._factor_numbers(site) + max(4 * (d * d + n * n) + 4 * n * d for n in sides)
        return max(3 * n * n + 3 * n * d for n in (sides if self.settings.update_rows else sides[-1:]))

    def digest_workspace(self, site: Site) -> int:
        """Count the elements that `digest` holds at its peak: all weights, and one linear's inverses and cost terms."""
        d, sides = site.outputs, [weights // site.outputs for weights in site.linears]
        return sum(site.linears) + max(n * n + d * d + 3 * n * d for n in sides)
