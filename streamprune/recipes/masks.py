"""Pruning that keeps shapes and writes zeros: single weights, M of every N neighbours in a row, or whole rows and columns.

One global threshold applies to the cost of a weight, or of the M cheapest weights of a group (LLM Surgeon,
section 3.3). The costs of a whole model do not fit in memory, so the survey stores one histogram per linear. The plan
counts the zeros of each linear from these histograms and meets the budget exactly. The weights themselves are chosen
later, when the costs of their linear are computed again. Rows and columns of a linear are few: the survey keeps their
costs, and the cheapest per weight go first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import ConfigError, NumericalError
from ..maths.kfac import pattern_costs, pattern_mask
from ..maths.order import any_kernel
from ..maths.refit import all_finite
from ..model.site import Site
from .allocation import Budget
from .plan import Plan, SitePlan
from .recipe import Findings, Recipe, Survey
from .settings import LINES, UNITS, UNSTRUCTURED

S = TypeVar("S", bound=Any)
_BITS = 12
"""Low mantissa bits of a float32 cost that a histogram drops; 11 of the 23 mantissa bits stay. The sign bit is 0."""
_BINS = 1 << (31 - _BITS)
_LINEARS = 0.9
"""Least share of the blocks' parameters that are weights of linears."""


def pattern(structure: str) -> tuple[int, int]:
    """Return (M, N): M of every N neighbouring weights in a row are removed together. All other structures are 1:1."""
    if structure in (UNSTRUCTURED, LINES):
        return 1, 1
    m, _, n = structure.partition(":")
    return int(m), int(n)


class MaskRecipe(Recipe[S]):
    """A recipe whose setting `structure` can keep shapes and zero weights instead of removing units."""

    def __init__(self, settings: S) -> None:
        super().__init__(settings)
        self.writes_zeros = settings.structure != UNITS

    def check(self, sites: Sequence[Site], budget: Budget) -> None:
        """Raise ConfigError for a ratio outside the pattern's range, or a pattern that does not divide a width."""
        structure = self.settings.structure
        if structure == UNITS:
            super().check(sites, budget)
            return
        if structure == LINES:
            _check_lines(sites, budget)
            return
        m, n = pattern(structure)
        if n > 1 and budget.ratio > m / n:
            raise ConfigError(
                f"ratio is {budget.ratio:g}; structure {structure} makes at most {m / n:g} of the weights zero"
            )
        _check_widths(structure, sites)
        most = sum(weights // n * m for site in sites for weights in site.linears)
        # A ratio of exactly M/N asks for the pattern everywhere. It falls short by the norms and biases only.
        if most < budget.target * (_LINEARS if budget.ratio == m / n else 1):
            raise ConfigError(
                f"ratio is {budget.ratio:g}; structure {structure} can make at most {most / budget.parameters:.3f} "
                "of what the ratio counts zero"
            )
        if budget.target < m:
            raise ConfigError(
                f"ratio is {budget.ratio:g}; the smallest step is {m / budget.parameters:.2g} of what it counts"
            )

    def check_plan(self, sites: Sequence[Site], plan: Plan, where: str) -> None:
        """Raise ConfigError for a plan that removes units where weights are zeroed (or the reverse) or misfits the pattern."""
        structure = self.settings.structure
        if structure == UNITS:
            super().check_plan(sites, plan, where)
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

    def findings(self, site: Site) -> int:
        """Return the largest possible size of a site's histograms, in float32 elements; an int64 counts as two."""
        if not self.writes_zeros:
            return 0
        if self.settings.structure == LINES:
            return sum(weights // site.outputs + site.outputs for weights in site.linears)
        _, n = pattern(self.settings.structure)
        return sum(2 * 2 * min(_BINS, weights // n) for weights in site.linears)


def _check_lines(sites: Sequence[Site], budget: Budget) -> None:
    most = sum(sum(site.linears) for site in sites)
    if most < budget.target:
        raise ConfigError(
            f"ratio is {budget.ratio:g}; the weights of linears are {most / budget.parameters:.3f} of what it counts"
        )
    least = min(min(site.outputs, weights // site.outputs) for site in sites for weights in site.linears)
    if budget.target < least:
        raise ConfigError(
            f"ratio is {budget.ratio:g}; the smallest row or column is {least / budget.parameters:.2g} of what it counts"
        )


def _check_widths(structure: str, sites: Sequence[Site]) -> None:
    _, n = pattern(structure)
    for site in sites:
        for width in (site.columns, site.outputs):
            if width % n:
                raise ConfigError(
                    f"structure {structure} needs widths that are multiples of {n}; {site.name} has one of {width}"
                )


def histograms(costs: Iterable[Tensor], structure: str, place: str) -> dict[str, Tensor]:
    """Build one cost histogram for each linear of a site.

    Args:
        costs: for each linear (rows, columns) float: cost of each weight. The producers come first, in order, then the
            consumer. One tensor is taken at a time.

    Returns:
        ``histogram.i`` for linear i, (2, bins) int64: indices of the non-empty bins, and how many weights (or groups)
        each of them holds.

    Raises:
        NumericalError: a cost is NaN or Inf.
    """
    return {f"histogram.{i}": _histogram(_checked(cost, place), structure) for i, cost in enumerate(costs)}


def _checked(costs: Tensor, place: str) -> Tensor:
    if not all_finite(costs):
        raise NumericalError(f"{place}: the weights' costs hold NaN or Inf")
    return costs


def _histogram(costs: Tensor, structure: str) -> Tensor:
    m, n = pattern(structure)
    flat = (costs if n == 1 else pattern_costs(costs, m, n)).float().flatten().clamp_min(0)
    # As an integer, the bit pattern of a non-negative float32 ascends with its value.
    counts = torch.bincount(flat.view(torch.int32) >> _BITS).cpu()
    (filled,) = counts.nonzero(as_tuple=True)
    return torch.stack([filled, counts[filled]])


def count_zeros(sites: Sequence[Site], survey: Survey, budget: Budget, structure: str) -> Plan:
    """Plan how many weights of each linear become zero, by one global threshold on cost.

    A pattern M:N can zero at most M/N of the linears' weights. The ratio also counts norms and biases, so 2:4 at a
    ratio of one half falls short of that ratio by them.
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
            # In the bin of the threshold, the earlier linears take what is left of the budget.
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
    """Choose the weights of one linear to zero: the cheapest, or the M cheapest of the cheapest groups.

    Ties go to the first in row-major order.

    Args:
        costs: (rows, columns) float: cost of each weight.
        zeros: how many weights to zero, as the plan says.

    Returns:
        (rows, columns) bool, True where a weight becomes zero.

    Raises:
        NumericalError: a cost is NaN or Inf.
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
    # Selection takes a ninth of the time of a sort. Only which of equal values it finds depends on the kernel.
    with any_kernel():
        threshold = flat.kthvalue(count).values
    chosen = flat < threshold
    equal = (flat == threshold).nonzero()[:, 0]
    chosen[equal[: count - int(chosen.sum())]] = True
    return chosen.view_as(costs)


# Whole rows and columns.


def line_zeros(densities: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Order the rows and columns of a linear by their cost per weight, and count the weights that are zero after each.

    Args:
        densities: (R + C,) float: cost per weight of each row, then of each column.
        rows: R.

    Returns:
        The rows (below R) and columns (R + c for column c) in order, and the zeros once each of them is gone too, both
        (R + C,) int64.
    """
    columns = len(densities) - rows
    order = densities.argsort(stable=True)
    gone_rows = (order < rows).cumsum(dim=0)
    gone_columns = torch.arange(1, len(order) + 1, device=order.device) - gone_rows
    return order, gone_rows * columns + gone_columns * rows - gone_rows * gone_columns


def count_lines(sites: Sequence[Site], survey: Survey, budget: Budget) -> Plan:
    """Plan how many weights of each linear become zero as whole rows and columns, by one threshold on the cost per weight.

    A row and a column share a weight, which counts once. The cheapest go first; a linear whose next row or column does
    not fit the budget keeps what is left of it.

    Args:
        survey: ``lines.i`` of every linear of a site, as `line_zeros` takes them.
    """
    costs, zeros, where = list[Tensor](), list[Tensor](), list[Tensor]()
    for site in sites:
        for i, weights in enumerate(site.linears):
            densities = survey[site.name][f"lines.{i}"]
            rows = site.outputs if i == len(site.linears) - 1 else weights // site.outputs
            order, counts = line_zeros(densities, rows)
            costs.append(densities[order])
            zeros.append(counts)
            where.append(torch.full_like(order, len(where)))
    owner = torch.cat(where)[torch.cat(costs).argsort(stable=True)].tolist()
    left, taken, closed = budget.target, [0] * len(zeros), set[int]()
    totals = [counts.tolist() for counts in zeros]
    for linear in owner:
        now = totals[linear][taken[linear]]
        more = now - (totals[linear][taken[linear] - 1] if taken[linear] else 0)
        if more > left:
            closed.add(linear)
        if linear not in closed:
            left -= more
            taken[linear] += 1
    counted = iter(totals[i][count - 1] if count else 0 for i, count in enumerate(taken))
    kept = {site.name: SitePlan(site.units, zeros=tuple(next(counted) for _ in site.linears)) for site in sites}
    return Plan(kept, budget.ratio)


def lines_to_go(densities: Tensor, rows: int, zeros: int, place: str) -> tuple[Tensor, Tensor]:
    """Return the rows and the columns, ascending int64, that make exactly `zeros` weights of a linear zero.

    Raises:
        ConfigError: no number of the cheapest rows and columns does; the plan was edited.
    """
    order, counts = line_zeros(_checked(densities, place), rows)
    taken = int((counts <= zeros).sum())
    if (int(counts[taken - 1]) if taken else 0) != zeros:
        raise ConfigError(f"{place}: the plan makes {zeros} weights of a linear zero, which no rows and columns have")
    gone = order[:taken].sort().values
    return gone[gone < rows], gone[gone >= rows] - rows
