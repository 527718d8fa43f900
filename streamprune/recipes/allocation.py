"""Decide how many units each site loses: a 0/1 knapsack over all units of the model."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..errors import ConfigError
from ..model.site import Site, routed

ROUND_TO, COARSER = 32, (128, 256)
"""Multiples of ``--round-to auto``. Rows of Q4_0, Q5_0 and Q8_0 are quantised in blocks of 32, those of k-quants in blocks of 256;
FP8 and most 4-bit formats of servers have groups of 128."""
TOLERANCE = 0.01
"""Share of the predicted cost that coarser multiples may add."""


@dataclass(frozen=True)
class Budget:
    """How many parameters to remove, and in which steps."""

    ratio: float
    """Share of `parameters` to remove in total, in (0, 1)."""
    parameters: int
    """Number of parameters in the unpruned model that the ratio refers to."""
    round_to: int
    """Columns of a consumer that change become a multiple of this, for attention where its heads allow it (see `step`)."""
    alike: frozenset[str] = frozenset()
    """Site families that must end with the same width in every block."""
    gone: int = 0
    """Parameters that earlier shots already removed."""
    sublayers: bool = False
    """Whether sites may lose their last unit, and their sublayer with it (see `takes_last`)."""
    experts: bool = False
    """Whether the same holds for routed experts, as far as enough of them stay in the block (see `Site.least`)."""
    coarser: tuple[int, ...] = ()
    """Larger multiples, ascending, that sites take where it costs little (see `_coarser`)."""
    devices: int = 1
    """Devices over which a server splits each site: the units that stay are a multiple of this, and `round_to` holds on each."""

    def takes_last(self, site: Site) -> bool:
        """Whether a site may lose its last unit. Sites that must end alike cannot, since all would."""
        wanted = self.sublayers if site.expert is None else self.experts
        # No server that splits models runs blocks without attention.
        stays = self.devices > 1 and site.kind != "ffn"
        return wanted and site.goes and not stays and site.family not in self.alike

    @property
    def target(self) -> int:
        """Number of parameters still to remove."""
        return round(self.ratio * self.parameters) - self.gone


@dataclass(frozen=True)
class _Bundle:
    """Sites that lose units together: a single site, or all sites of a family that must keep equal widths."""

    sites: tuple[Site, ...]
    density: Tensor  # (units,) float64: cost per parameter of each further removed unit, ascending
    steps: tuple[int, ...]  # allowed numbers of removed units, ascending, starting at 0

    def parameters(self, step: int) -> int:
        """Count the parameters that the step after `step` removes."""
        before, after = (self.sites[0].units - gone for gone in self.steps[step : step + 2])
        return sum(site.removed(after) - site.removed(before) for site in self.sites)

    @cached_property
    def totals(self) -> tuple[Tensor, Tensor]:
        """For each number of taken steps, what they cost and the parameters that they remove: two of (steps,) float64."""
        site, gone = self.sites[0], torch.tensor(self.steps)
        last = gone == site.units  # its density counts for the rest too
        costs = torch.cat([self.density.new_zeros(1), self.density.cumsum(0)])[gone] * site.unit_parameters
        costs += torch.where(last, self.density[-1] * (site.rest or 0), 0.0)
        removed = torch.tensor([site.removed(site.units - each) for each in self.steps], dtype=torch.float64)
        return costs * len(self.sites), removed * len(self.sites)

    def least(self, price: float) -> float:
        """Return the least cost of any number of steps, less `price` for each parameter that they remove."""
        costs, removed = self.totals
        return float((costs - price * removed).min())

    def takes_expert(self, step: int) -> bool:
        """Return whether the step after `step` removes a routed expert as a whole."""
        return self.sites[0].expert is not None and self.steps[step + 1] == self.sites[0].units

    def cost(self, step: int) -> float:
        """Return the cost per parameter of the step after `step`."""
        before, after = self.steps[step : step + 2]
        costs, site = self.density[before:after], self.sites[0]
        if after < site.units:
            return float(costs.mean())
        # The last unit goes with more parameters than the others.
        sizes = torch.full_like(costs, site.unit_parameters)
        sizes[-1] += site.rest or 0
        return float((costs * sizes).sum() / sizes.sum())


def allocate(sites: Sequence[Site], densities: Mapping[str, Tensor], budget: Budget) -> dict[str, int]:
    """Choose how many units each site keeps, at the least total cost of the removed units.

    Units within a site have equal size, so greedy selection by density is optimal to within one unit. The
    steps of all sites are taken cheapest first. A step that no longer fits the budget is skipped, and smaller
    steps fill the remainder. Every site keeps at least one unit (or one multiple of ``round_to``), unless the budget
    lets `sublayers` go.

    Args:
        densities: for each site (units,) float: cost per parameter of each further removed unit, ascending.

    Returns:
        Units to keep, by site name. All units are kept if not even one fits the budget.
    """
    bundles = _bundles(sites, densities, budget)
    taken, price = _fill(bundles, sites, budget)
    if budget.coarser:
        bundles, taken = _coarser(bundles, taken, price, sites, budget)
    return {
        site.name: site.units - bundle.steps[step]
        for bundle, step in zip(bundles, taken, strict=True)
        for site in bundle.sites
    }


def _fill(bundles: Sequence[_Bundle], sites: Sequence[Site], budget: Budget) -> tuple[list[int], float]:
    """Return how many steps of each bundle the budget pays for, and the cost per parameter of the last one taken."""
    left, price = budget.target, 0.0
    taken = [0] * len(bundles)
    spare = {block: len(own) - own[0].least for block, own in routed(sites).items()}
    heap = [(bundle.cost(0), number) for number, bundle in enumerate(bundles) if len(bundle.steps) > 1]
    heapq.heapify(heap)
    while heap:
        cost, number = heapq.heappop(heap)
        bundle = bundles[number]
        # Drop the bundle once a step does not fit: its later steps cost more and are no smaller.
        if bundle.parameters(taken[number]) > left:
            continue
        if bundle.takes_expert(taken[number]):
            if not spare[bundle.sites[0].block]:
                continue
            spare[bundle.sites[0].block] -= 1
        price = cost
        left -= bundle.parameters(taken[number])
        taken[number] += 1
        if taken[number] + 1 < len(bundle.steps):
            heapq.heappush(heap, (bundle.cost(taken[number]), number))
    return taken, price


def _coarser(
    bundles: list[_Bundle], taken: list[int], price: float, sites: Sequence[Site], budget: Budget
) -> tuple[list[_Bundle], list[int]]:
    """Return bundles of which some have the steps of coarser multiples, and their steps.

    What rounding costs a bundle is how much the least of ``cost − price · parameters`` rises, with the `price` of the last step
    taken, which is also that of a parameter that is missed. The largest multiples go to the bundles where that is least, for
    `TOLERANCE` of the whole cost. The budget is then spent again; if that costs more after all, or misses the budget by
    `largest_unit` and by more than before, fewer bundles take them.
    """

    def spent(bundles: Sequence[_Bundle], taken: Sequence[int]) -> tuple[float, float]:
        each = [(bundle.totals, n) for bundle, n in zip(bundles, taken, strict=True)]
        return sum(float(cost[n]) for (cost, _), n in each), sum(float(gone[n]) for (_, gone), n in each)

    cost, gone = spent(bundles, taken)
    least = [bundle.least(price) for bundle in bundles]
    rises = list[list[tuple[float, int, _Bundle]]]()
    for multiple in reversed(budget.coarser):
        rounded = [replace(each, steps=steps(each.sites[0], budget, multiple)) for each in bundles]
        rises.append(
            [(each.least(price) - least[number], number, each) for number, each in enumerate(rounded) if each.steps[1:]]
        )
    allowed, missed = TOLERANCE * cost, max(largest_unit(sites, budget), budget.target - gone + 1)
    for part in (1.0, 0.5, 0.25, 0.125):
        tried, left = dict[int, _Bundle](), part * allowed
        for each in rises:
            for rise, number, bundle in sorted(each, key=lambda found: found[:2]):
                if number not in tried and rise <= left:
                    left -= rise
                    tried[number] = bundle
        others = [tried.get(number, bundle) for number, bundle in enumerate(bundles)]
        gone_on, _ = _fill(others, sites, budget)
        dearer, fewer = spent(others, gone_on)
        if dearer + price * (gone - fewer) <= cost + allowed and budget.target - fewer < missed:
            return others, gone_on
    return bundles, taken


def check_budget(sites: Sequence[Site], budget: Budget) -> None:
    """Raise ConfigError if the sites cannot lose that many parameters, or the budget is smaller than the smallest step."""
    bundles = _bundles(sites, even_densities(sites), budget)
    largest = sum(bundle.parameters(step) for bundle in bundles for step in range(len(bundle.steps) - 1))
    for own in routed(sites).values() if budget.experts else ():
        whole = [bundle.parameters(len(bundle.steps) - 2) for bundle in bundles if bundle.sites[0] in own]
        largest -= sum(sorted(whole)[: own[0].least])
    if largest < budget.target:
        raise ConfigError(
            f"ratio is {budget.ratio:g}; this model can lose at most {largest / budget.parameters:.3f} "
            f"of its blocks' parameters{'' if budget.sublayers else ' while every site keeps a unit'}"
        )
    smallest = min((bundle.parameters(0) for bundle in bundles if len(bundle.steps) > 1), default=0)
    if budget.target < smallest or not smallest:
        raise ConfigError(
            f"ratio is {budget.ratio:g}; the smallest step is {smallest / budget.parameters:.4f} of the blocks' parameters"
        )


def largest_unit(sites: Sequence[Site], budget: Budget) -> int:
    """Parameters of the largest step by which widths change (see `step`), in all blocks if they must be alike.

    A result may miss the budget by this, and two for one budget may differ by it.
    """
    sizes: dict[str, int] = {}
    for site in sites:
        if site.choices == (site.units,):
            continue
        alike = site.family if site.family in budget.alike else site.name
        size = site.unit_parameters * step(site, budget)
        size += (site.rest or 0) * budget.takes_last(site)
        sizes[alike] = sizes.get(alike, 0) + size
    return max(sizes.values(), default=0)


def _bundles(sites: Sequence[Site], densities: Mapping[str, Tensor], budget: Budget) -> list[_Bundle]:
    families: dict[str, list[Site]] = {}
    bundles = []
    for site in sites:
        if site.family in budget.alike:
            families.setdefault(site.family, []).append(site)
        else:
            bundles.append(_Bundle((site,), densities[site.name].double(), steps(site, budget)))
    for family, alike in families.items():
        if len({(site.units, site.width, site.choices) for site in alike}) > 1:
            raise ConfigError(f"the layout needs blocks of equal widths; {family} widths of this model differ")
        mean = sum(densities[site.name].double() for site in alike) / len(alike)
        assert isinstance(mean, Tensor)
        bundles.append(_Bundle(tuple(alike), mean, steps(alike[0], budget)))
    return bundles


def step(site: Site, budget: Budget, multiple: int | None = None) -> int:
    """Return the number of units of which the units that stay are a multiple, if any goes.

    The columns of the consumer are then a multiple of `round_to` on each device, or of `multiple` too. Heads for which no
    smaller number is such a multiple are only divided among the devices.
    """
    columns = budget.round_to * budget.devices
    columns = columns if multiple is None else math.lcm(columns, multiple)
    units = math.lcm(columns // math.gcd(columns, site.width), budget.devices)
    if site.kind == "ffn" or units < site.units:
        return units
    return budget.devices if multiple is None else step(site, budget)


def steps(site: Site, budget: Budget, multiple: int | None = None) -> tuple[int, ...]:
    """Return the numbers of units that can go from a site, ascending from 0; with a coarser `multiple` if one is given."""
    counts = range(1, site.units + 1) if site.choices is None else site.choices
    units = step(site, budget, multiple)
    least = [0] if budget.takes_last(site) else []
    fewer = [*least, *(keep for keep in counts if keep < site.units and keep % units == 0)]
    return (0, *(site.units - keep for keep in sorted(fewer, reverse=True)))


def even_densities(sites: Sequence[Site], shares: Mapping[int, float] | None = None) -> dict[str, Tensor]:
    """Return densities that make every site lose the same share: unit k of n (from 0) costs (k + ½)/n.

    Args:
        shares: relative share that each block loses, by block index; positive. A cost is divided by its block's share.

    Returns:
        For each site name (units,) float64, ascending.
    """
    return {
        site.name: (torch.arange(site.units, dtype=torch.float64) + 0.5)
        / (site.units * (shares[site.block] if shares else 1.0))
        for site in sites
    }
