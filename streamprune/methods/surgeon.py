"""The LLM Surgeon (van der Ouderaa et al., ICLR 2024).

*Curvature*: both Kronecker factors of every linear, ``F ≈ G ⊗ A``, by one forward and one backward sweep (section 3.1).
*Costs* of rows and columns, or of elements (eq. 10), and one global threshold on cost a parameter (3.3); a unit costs its
consumer columns and its producer rows (ours: the columns of a head together, by eq. 7). *Correlated updates* of what
stays (eqs. 11 and 12). *Multi-shot*: a linear
schedule, curvature estimated anew for each shot (3.5). Structures: units, single weights, M:N.

The factors of all blocks wait on the disk until the threshold is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..maths.kfac import (
    column_costs,
    damped,
    element_costs,
    group_costs,
    inverse,
    remove_columns,
    remove_elements,
    remove_rows,
)
from ..maths.linalg import unit_columns
from ..site import Site
from . import masks
from .allocation import Budget, allocate
from .plan import Plan, SitePlan
from .recipe import Correction, Findings, Problem, Recipe, Refit, Survey, Surveyed, setting
from .selection import best, others


@dataclass(frozen=True)
class SurgeonSettings:
    """What `--set` reaches."""

    structure: str = setting(
        "units", "what goes: units, single weights, or M of N neighbours", choices=masks.STRUCTURES
    )
    shots: int = setting(
        0, "shots of the linear schedule; 0 is the paper's: 40 for half of all units, 5 for weights", limits=(0, 1000)
    )
    correlated: int = setting(256, "weights at most whose removal is compensated jointly (m)", limits=(1, 8192))
    joint: bool = setting(True, "a unit's columns cost what removing them together costs; off adds up single ones'")
    update_rows: bool = setting(
        False, "correlated updates of the producers too (eq. 12), where the consumer's have made good the same loss"
    )
    lora_steps: int = setting(
        0, "low-rank corrections: Adam steps on the text after each shot, absorbed", limits=(0, 1e6)
    )
    lora_rank: int = setting(8, "their rank", limits=(1, 4096))
    lora_rate: float = setting(1e-3, "their rate, falling to zero within a shot", limits=(0.0, 1.0))
    damping: float = setting(0.01, "ridge of every factor, relative to its mean diagonal", limits=(0.0, 1.0))


def shots(settings: SurgeonSettings, ratio: float) -> int:
    """How many shots."""
    if settings.shots:
        return settings.shots
    return max(1, round(80 * ratio)) if settings.structure == masks.UNITS else 5


def digest(settings: SurgeonSettings, surveyed: Surveyed) -> dict[str, Tensor]:
    """The site's factors, and what the threshold needs: the units' costs, or a histogram of the weights'."""
    site, statistics = surveyed.site, surveyed.statistics
    grams = {"a": statistics.inputs, "a.consumer": statistics.gram, "g.consumer": statistics.gradient}
    grams |= {f"g.{i}": gram for i, gram in enumerate(statistics.producers)}
    factors = {}
    for name, gram in grams.items():
        assert gram is not None
        factors[name] = gram.mean()[0]
    linears = _linears(factors, surveyed.w, surveyed.producers)
    if settings.structure != masks.UNITS:
        costs = (element_costs(w, _inverse(settings, g, site), _inverse(settings, a, site)) for w, g, a in linears)
        return {**factors, **masks.histograms(costs, settings.structure)}
    *producers, (w, g, a) = linears
    price = group_costs if settings.joint else _single_costs
    cost = price(w, damped(g, settings.damping), _inverse(settings, a, site), site.units)
    for w, g, a in producers:
        cost = cost + price(w.T, damped(a, settings.damping), _inverse(settings, g, site), site.units)
    return {**factors, "costs": cost.double()}


def _single_costs(w: Tensor, g: Tensor, a_inverse: Tensor, units: int) -> Tensor:
    return column_costs(w, g, a_inverse).view(units, -1).sum(dim=1)


def threshold(settings: SurgeonSettings, sites: Sequence[Site], survey: Survey, budget: Budget) -> Plan:
    """One global threshold."""
    if settings.structure != masks.UNITS:
        return masks.count_zeros(sites, survey, budget, settings.structure)
    costs = {site.name: survey[site.name]["costs"] for site in sites}
    densities = {site.name: costs[site.name].sort().values / site.unit_parameters for site in sites}
    keep = allocate(sites, densities, budget)
    return Plan(
        {name: SitePlan(units, tuple(best(costs[name], units).tolist())) for name, units in keep.items()}, budget.ratio
    )


def update(settings: SurgeonSettings, problem: Problem, kept: Tensor) -> Refit:
    """The correlated updates of all linears of the site."""
    site, damping = problem.site, settings.damping
    factors = {name: problem.findings[name].to(problem.w) for name in problem.findings if name[0] in "ag"}
    linears = _linears(factors, problem.w, problem.producers)
    if problem.zeros is not None:
        weights = []
        for (w, g, a), zeros in zip(linears, problem.zeros, strict=True):
            g_inverse, a_inverse = _inverse(settings, g, site), _inverse(settings, a, site)
            gone = masks.mask(element_costs(w, g_inverse, a_inverse), zeros, settings.structure)
            weights.append(remove_elements(w, g_inverse, a_inverse, gone, at_most=settings.correlated, place=site.name))
        *producers, consumer = weights
        return Refit(consumer, damping, tuple(producers))
    removed = others(site.units, kept).to(problem.w.device)
    *sources, (w, _, a) = linears
    columns = unit_columns(removed, site.width)
    consumer = remove_columns(w, _inverse(settings, a, site), columns, site.name)
    producers = []
    for w, g, _ in sources:
        rows = unit_columns(removed, len(w) // site.units)
        producers.append(remove_rows(w, _inverse(settings, g, site), rows, site.name) if settings.update_rows else w)
    stays = unit_columns(kept.to(problem.w.device), site.width)
    return Refit(consumer[:, stays], damping, tuple(producers))


def _linears(
    factors: Findings | dict[str, Tensor], consumer: Tensor, producers: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(W, G, A) of each linear, the consumer last."""
    each = [(w, factors[f"g.{i}"], factors["a"]) for i, w in enumerate(producers)]
    linears = [*each, (consumer, factors["g.consumer"], factors["a.consumer"])]
    return [(w, g.to(w.dtype), a.to(w.dtype)) for w, g, a in linears]


def _inverse(settings: SurgeonSettings, h: Tensor, site: Site) -> Tensor:
    return inverse(h, settings.damping, site.name)[0]


SURGEON = Recipe(
    name="surgeon",
    summary="LLM Surgeon: K-FAC curvature, one global threshold, correlated updates, many shots; units or weights",
    settings=SurgeonSettings,
    statistics=lambda settings: frozenset({"factors"}),
    digest=digest,
    allocate=threshold,
    select=lambda settings, problem, keep: torch.arange(keep),
    reconstruct=update,
    shots=shots,
    correction=lambda settings: (
        Correction(settings.lora_steps, settings.lora_rank, settings.lora_rate) if settings.lora_steps else None
    ),
    plans_units=lambda settings, site: settings.structure == masks.UNITS,
    keeps_findings=lambda settings: True,
    check=masks.check_structure,
    check_plan=masks.check_plan,
    writes_zeros=lambda settings: settings.structure != masks.UNITS,
)
