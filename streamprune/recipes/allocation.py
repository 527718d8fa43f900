"""How many units each site loses: a 0/1 knapsack over all units of the model."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError
from ..model.site import Site


@dataclass(frozen=True)
class Budget:
    """What is to be removed, and in what steps."""

    ratio: float
    """Share of `parameters`, in (0, 1)."""
    parameters: int
    """Parameters that the ratio counts, before anything went."""
    round_to: int
    """FFN widths that are changed become multiples of this."""
    alike: frozenset[str] = frozenset()
    """Families of sites that keep the same width in all blocks."""
    gone: int = 0
    """Parameters that earlier shots removed."""

    @property
    def target(self) -> int:
        """Parameters to remove."""
        return round(self.ratio * self.parameters) - self.gone


@dataclass(frozen=True)
class _Bundle:
    """Sites that lose units together: one site, or all of a family that is to be alike."""

    sites: tuple[Site, ...]
    density: Tensor  # (units,) float64: cost a parameter of each further unit, ascending
    steps: tuple[int, ...]  # units that may be gone, ascending, from 0

    def parameters(self, step: int) -> int:
        """Parameters that go with the step after `step`."""
        return (self.steps[step + 1] - self.steps[step]) * sum(site.unit_parameters for site in self.sites)

    def cost(self, step: int) -> float:
        """Mean density of the units that go with the step after `step`."""
        return float(self.density[self.steps[step] : self.steps[step + 1]].mean())


def allocate(sites: Sequence[Site], densities: Mapping[str, Tensor], budget: Budget) -> dict[str, int]:
    """Units to keep per site, so that what goes costs least.

    With units of equal size inside a site the density order is optimal to within one unit: the steps of
    all sites are taken cheapest first, those that no longer fit are passed over, and smaller ones fill
    the gap. Every site keeps one unit (or one multiple of ``round_to``).

    Args:
        densities: per site (units,), what each further removed unit costs a parameter, ascending.

    Returns:
        What is kept; everything where not one unit fits.
    """
    bundles = _bundles(sites, densities, budget)
    left = budget.target
    taken = [0] * len(bundles)
    heap = [(bundle.cost(0), number) for number, bundle in enumerate(bundles) if len(bundle.steps) > 1]
    heapq.heapify(heap)
    while heap:
        _, number = heapq.heappop(heap)
        bundle = bundles[number]
        # A step that does not fit ends its bundle: the later ones cost more and are no smaller.
        if bundle.parameters(taken[number]) > left:
            continue
        left -= bundle.parameters(taken[number])
        taken[number] += 1
        if taken[number] + 1 < len(bundle.steps):
            heapq.heappush(heap, (bundle.cost(taken[number]), number))
    return {
        site.name: site.units - bundle.steps[step]
        for bundle, step in zip(bundles, taken, strict=True)
        for site in bundle.sites
    }


def check_budget(sites: Sequence[Site], budget: Budget) -> None:
    """See that a budget can be met, before any work.

    Raises:
        ConfigError: the sites cannot lose that much, or so little was asked that not one unit fits.
    """
    bundles = _bundles(sites, even_densities(sites), budget)
    largest = sum(bundle.parameters(step) for bundle in bundles for step in range(len(bundle.steps) - 1))
    if largest < budget.target:
        raise ConfigError(
            f"ratio is {budget.ratio:g}; this model can lose at most {largest / budget.parameters:.3f} "
            "of its blocks' parameters while every site keeps a unit"
        )
    smallest = min((bundle.parameters(0) for bundle in bundles if len(bundle.steps) > 1), default=0)
    if budget.target < smallest or not smallest:
        raise ConfigError(
            f"ratio is {budget.ratio:g}; the smallest step is {smallest / budget.parameters:.4f} of the blocks' parameters"
        )


def largest_step(sites: Sequence[Site], budget: Budget) -> int:
    """Parameters of the largest step that `allocate` can take: how far two plans of one budget may lie apart."""
    bundles = _bundles(sites, even_densities(sites), budget)
    return max(bundle.parameters(step) for bundle in bundles for step in range(len(bundle.steps) - 1))


def _bundles(sites: Sequence[Site], densities: Mapping[str, Tensor], budget: Budget) -> list[_Bundle]:
    families: dict[str, list[Site]] = {}
    bundles = []
    for site in sites:
        if site.family in budget.alike:
            families.setdefault(site.family, []).append(site)
        else:
            bundles.append(_Bundle((site,), densities[site.name].double(), _steps(site, budget.round_to)))
    for family, alike in families.items():
        if len({(site.units, site.width, site.choices) for site in alike}) > 1:
            raise ConfigError(f"the layout needs blocks of equal widths; {family} widths of this model differ")
        mean = sum(densities[site.name].double() for site in alike) / len(alike)
        assert isinstance(mean, Tensor)
        bundles.append(_Bundle(tuple(alike), mean, _steps(alike[0], budget.round_to)))
    return bundles


def _steps(site: Site, round_to: int) -> tuple[int, ...]:
    fewer = range(site.units - 1, 0, -1) if site.choices is None else sorted(site.choices, reverse=True)
    multiple = 1 if site.kind == "attention" else round_to
    return (0, *(site.units - keep for keep in fewer if keep < site.units and keep % multiple == 0))


def even_densities(sites: Sequence[Site], shares: Mapping[int, float] | None = None) -> dict[str, Tensor]:
    """Densities under which every site loses the same share: the k-th unit of n costs (k + ½)/n.

    Args:
        shares: by block, the share it shall lose relative to the others; positive.
    """
    return {
        site.name: (torch.arange(site.units, dtype=torch.float64) + 0.5)
        / (site.units * (shares[site.block] if shares else 1.0))
        for site in sites
    }
