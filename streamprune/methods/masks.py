"""Pruning that keeps shapes and writes zeros: single weights, or M of every N neighbours in a row.

One global threshold on the cost of a weight, or of the M cheapest of a group (LLM Surgeon, section 3.3). No list of all
costs of a model fits anywhere, so a survey leaves a histogram of each linear's, fine enough that the counts it gives
meet the budget exactly: which weights of a linear go is decided again where its costs are at hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..errors import ConfigError
from ..maths.kfac import pattern_costs, pattern_mask
from ..site import Site
from .allocation import Budget, check_budget
from .plan import Plan, SitePlan
from .recipe import Findings, Survey

UNITS, UNSTRUCTURED = "units", "unstructured"
STRUCTURES = (UNITS, UNSTRUCTURED, "2:4", "4:8")
_BITS = 12
"""Of a float32's mantissa and sign that a histogram leaves out: 11 of the mantissa's 23 bits stay."""
_BINS = 1 << (31 - _BITS)


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
        ConfigError: a ratio above the pattern's own, or widths that it does not divide.
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
    for site in sites:
        for width in (site.columns, site.outputs):
            if width % n:
                raise ConfigError(
                    f"structure {structure} needs widths that are multiples of {n}; {site.name} has one of {width}"
                )


def histograms(costs: Sequence[Tensor], structure: str) -> dict[str, Tensor]:
    """What a survey keeps of a site's linears: how many weights, or groups, fall into each bin of cost.

    Args:
        costs: of each weight of each linear, (rows, columns), the producers' in order and the consumer's last.
    """
    return {f"histogram.{i}": _histogram(cost, structure) for i, cost in enumerate(costs)}


def _histogram(costs: Tensor, structure: str) -> Tensor:
    m, n = pattern(structure)
    flat = (costs if n == 1 else pattern_costs(costs, m, n)).float().flatten().clamp_min(0)
    # The bits of a positive float32 are ascending with its value.
    bins = flat.view(torch.int32) >> _BITS
    return torch.bincount(bins, minlength=_BINS).cpu()


def count_zeros(sites: Sequence[Site], survey: Survey, budget: Budget, structure: str) -> Plan:
    """One global threshold: how many weights of each linear become zero.

    A pattern's own share of the linears' weights is the most that can go: 2:4 at a ratio of one half falls short of it by
    the norms and biases, which the ratio counts.
    """
    m, _ = pattern(structure)
    total = torch.zeros(_BINS, dtype=torch.int64)
    for site in sites:
        for histogram in _read(survey[site.name]):
            total += histogram
    wanted = min(budget.target // m, int(total.sum()))
    below = total.cumsum(dim=0) - total
    edge = int((below <= wanted).nonzero()[-1])
    left = wanted - int(below[edge])
    kept = {}
    for site in sites:
        zeros = []
        for histogram in _read(survey[site.name]):
            # The bin that the threshold falls into goes first come, first served.
            part = min(left, int(histogram[edge]))
            left -= part
            zeros.append(m * (int(histogram[:edge].sum()) + part))
        kept[site.name] = SitePlan(site.units, zeros=tuple(zeros))
    return Plan(kept, budget.ratio)


def _read(findings: Findings) -> Iterator[Tensor]:
    count = sum(name.startswith("histogram.") for name in findings)
    return (findings[f"histogram.{i}"] for i in range(count))


def mask(costs: Tensor, zeros: int, structure: str) -> Tensor:
    """The weights (rows, columns) that go, True, so many as the plan says: the cheapest, or the cheapest groups'."""
    m, n = pattern(structure)
    groups = zeros // m
    each = costs if n == 1 else pattern_costs(costs, m, n)
    chosen = torch.zeros(each.numel(), dtype=torch.bool, device=costs.device)
    chosen[each.flatten().argsort(stable=True)[:groups]] = True
    if n == 1:
        return chosen.view_as(costs)
    return pattern_mask(costs, m, n) & chosen.view_as(each).repeat_interleave(n, dim=1)
