"""Pruning that keeps shapes and writes zeros: single weights, or M of every N neighbours in a row.

One global threshold on the cost of a weight, or of the M cheapest of a group (LLM Surgeon, section 3.3). No list of all
costs of a model fits anywhere, so a survey leaves a histogram of each linear's, fine enough that the counts it gives
meet the budget exactly: which weights of a linear go is decided again where its costs are at hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..errors import ConfigError, NumericalError
from ..maths.kfac import pattern_costs, pattern_mask
from ..maths.refit import all_finite
from ..model.site import Site
from .allocation import Budget, check_budget
from .plan import Plan, SitePlan, units_only
from .recipe import Findings, Survey
from .settings import UNITS, UNSTRUCTURED

_BITS = 12
"""Of a float32's mantissa and sign that a histogram leaves out: 11 of the mantissa's 23 bits stay."""
_BINS = 1 << (31 - _BITS)
_LINEARS = 0.9
"""Share of the blocks' parameters that the linears' weights hold at the least."""


def pattern(structure: str) -> tuple[int, int]:
    """(M, N): so many of every N weights in a row go together; single weights are 1:1."""
    if structure == UNSTRUCTURED:
        return 1, 1
    m, _, n = structure.partition(":")
    return int(m), int(n)


class Structured(Protocol):
    """Settings with a structure."""

    @property
    def structure(self) -> str:
        """One of `STRUCTURES`."""


def check_structure(settings: Structured, sites: Sequence[Site], budget: Budget) -> None:
    """Refuse what a structure cannot give.

    Raises:
        ConfigError: a ratio above what the pattern leaves to go, or widths that it does not divide.
    """
    structure = settings.structure
    if structure == UNITS:
        check_budget(sites, budget)
        return
    m, n = pattern(structure)
    if n > 1 and budget.ratio > m / n:
        raise ConfigError(
            f"ratio is {budget.ratio:g}; structure {structure} makes at most {m / n:g} of the weights zero"
        )
    _check_widths(structure, sites)
    most = sum(weights // n * m for site in sites for weights in site.linears)
    # The pattern's own ratio asks for the pattern everywhere: what it then falls short by is norms and biases.
    if most < budget.target * (_LINEARS if budget.ratio == m / n else 1):
        raise ConfigError(
            f"ratio is {budget.ratio:g}; structure {structure} can make at most {most / budget.parameters:.3f} "
            "of what the ratio counts zero"
        )
    if budget.target < m:
        raise ConfigError(
            f"ratio is {budget.ratio:g}; the smallest step is {m / budget.parameters:.2g} of what it counts"
        )


def check_plan(settings: Structured, sites: Sequence[Site], plan: Plan, where: str) -> None:
    """Refuse a plan, which fits the model, that a structure cannot follow.

    Raises:
        ConfigError: units that go where weights should become zero or the other way round, counts that the
            pattern cannot give, or widths that it does not divide.
    """
    structure = settings.structure
    if structure == UNITS:
        units_only(sites, plan, where)
        return
    m, n = pattern(structure)
    for site in sites:
        entry = plan[site.name]
        if entry.keep < site.units:
            raise ConfigError(
                f"{where}: {site.name} keeps {entry.keep} of {site.units}; structure {structure} keeps all units"
            )
        for zeros, weights in zip(entry.zeros or (), site.linears, strict=False):
            if zeros % m or zeros > weights // n * m:
                raise ConfigError(
                    f"{where}: {site.name} has {zeros} zeros in a linear of {weights} weights; structure {structure} "
                    f"makes multiples of {m} zero, at most {weights // n * m}"
                )
    _check_widths(structure, sites)


def _check_widths(structure: str, sites: Sequence[Site]) -> None:
    _, n = pattern(structure)
    for site in sites:
        for width in (site.columns, site.outputs):
            if width % n:
                raise ConfigError(
                    f"structure {structure} needs widths that are multiples of {n}; {site.name} has one of {width}"
                )


def histograms(costs: Iterable[Tensor], structure: str, place: str) -> dict[str, Tensor]:
    """What a survey keeps of a site's linears: which bins of cost hold how many weights, or groups, (2, bins) int64.

    Args:
        costs: of each weight of each linear, (rows, columns), the producers' in order and the consumer's last;
            taken one at a time.

    Raises:
        NumericalError: they hold NaN or Inf.
    """
    return {f"histogram.{i}": _histogram(_checked(cost, place), structure) for i, cost in enumerate(costs)}


def findings(structure: str, site: Site) -> int:
    """Numbers of a site's histograms, at the most: an int64 counts as two."""
    if structure == UNITS:
        return 0
    _, n = pattern(structure)
    return sum(2 * 2 * min(_BINS, weights // n) for weights in site.linears)


def _checked(costs: Tensor, place: str) -> Tensor:
    if not all_finite(costs):
        raise NumericalError(f"{place}: the weights' costs hold NaN or Inf")
    return costs


def _histogram(costs: Tensor, structure: str) -> Tensor:
    m, n = pattern(structure)
    flat = (costs if n == 1 else pattern_costs(costs, m, n)).float().flatten().clamp_min(0)
    # The bits of a positive float32 are ascending with its value.
    counts = torch.bincount(flat.view(torch.int32) >> _BITS).cpu()
    (filled,) = counts.nonzero(as_tuple=True)
    return torch.stack([filled, counts[filled]])


def count_zeros(sites: Sequence[Site], survey: Survey, budget: Budget, structure: str) -> Plan:
    """One global threshold: how many weights of each linear become zero.

    A pattern's own share of the linears' weights is the most that can go: 2:4 at a ratio of one half falls short of it by
    the norms and biases, which the ratio counts.
    """
    m, _ = pattern(structure)
    total = torch.zeros(_BINS, dtype=torch.int64)
    for site in sites:
        for bins, counts in _read(survey[site.name]):
            total.index_add_(0, bins, counts)
    wanted = min(budget.target // m, int(total.sum()))
    below = total.cumsum(dim=0) - total
    edge = int((below <= wanted).nonzero()[-1])
    left = wanted - int(below[edge])
    kept = {}
    for site in sites:
        zeros = []
        for bins, counts in _read(survey[site.name]):
            # The bin that the threshold falls into goes first come, first served.
            part = min(left, int(counts[bins == edge].sum()))
            left -= part
            zeros.append(m * (int(counts[bins < edge].sum()) + part))
        kept[site.name] = SitePlan(site.units, zeros=tuple(zeros))
    return Plan(kept, budget.ratio)


def _read(findings: Findings) -> Iterator[tuple[Tensor, Tensor]]:
    for i in range(sum(name.startswith("histogram.") for name in findings)):
        bins, counts = findings[f"histogram.{i}"]
        yield bins, counts


def mask(costs: Tensor, zeros: int, structure: str, place: str) -> Tensor:
    """The weights (rows, columns) that go, True, so many as the plan says: the cheapest, or the cheapest groups'.

    Of equal ones the first go.

    Raises:
        NumericalError: the costs hold NaN or Inf.
    """
    _checked(costs, place)
    m, n = pattern(structure)
    if n == 1:
        return _cheapest(costs, zeros)
    groups = _cheapest(pattern_costs(costs, m, n), zeros // m)
    return pattern_mask(costs, m, n) & groups.repeat_interleave(n, dim=1)


def _cheapest(costs: Tensor, count: int) -> Tensor:
    if not count:
        return torch.zeros_like(costs, dtype=torch.bool)
    flat = costs.flatten()
    # Selecting takes a ninth of what sorting does.
    threshold = flat.kthvalue(count).values
    chosen = flat < threshold
    equal = (flat == threshold).nonzero()[:, 0]
    chosen[equal[: count - int(chosen.sum())]] = True
    return chosen.view_as(costs)
