"""The schedule: all steps of a job in order, and an estimate of the remaining time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .journal import Entry, Journal


@dataclass(frozen=True)
class Stretch:
    """Consecutive steps of one kind."""

    name: str
    """Name of the steps' journal lines, or a prefix of it: ``shot-1/prune``."""
    steps: int = 1
    """Number of steps."""
    operations: int = 0
    """Forecast FLOPs of all steps together; only proportions matter."""
    spared_by: str | None = None
    """Name of a journal line after which the missing steps are no longer needed."""

    @property
    def kind(self) -> str:
        """Kind of the steps, shared with other shots or rows: ``prune``."""
        return re.sub(r"^shot-\d+/", "", self.name).partition("/")[0]

    @property
    def shot(self) -> int | None:
        """Number of the shot that the steps belong to; None outside shots."""
        found = re.match(r"shot-(\d+)/", self.name)
        return int(found[1]) if found else None

    @property
    def weight(self) -> float:
        """Weight of one step relative to other steps of its kind."""
        return self.operations / self.steps or 1.0


class Schedule:
    """A job's stretches in order, matched with the lines of its journal."""

    def __init__(self, stretches: Iterable[Stretch], journal: Journal) -> None:
        self.stretches = list(stretches)
        self._lines = {stretch.name: _lines(stretch, journal) for stretch in self.stretches}
        self._left = {
            stretch.name: 0
            if stretch.spared_by is not None and journal.find(stretch.spared_by)
            else max(0, stretch.steps - len(self._lines[stretch.name]))
            for stretch in self.stretches
        }

    @property
    def total(self) -> int:
        """Number of all steps, finished or not, including steps no longer needed."""
        return sum(stretch.steps for stretch in self.stretches)

    @property
    def done(self) -> int:
        """Number of finished steps; a step that is no longer needed counts as finished."""
        return self.total - sum(self._left.values())

    @property
    def under_way(self) -> Stretch | None:
        """The first unfinished stretch; None if all are finished."""
        return next((stretch for stretch in self.stretches if self._left[stretch.name]), None)

    def seconds_left(self, since: float = 0.0, known: Mapping[str, float] | None = None) -> float | None:
        """Estimate the remaining time in seconds; None if no measurement allows it yet.

        A kind of step that has been measured is assumed to take the measured time, scaled by its forecast FLOPs.
        Other kinds are estimated from all measurements and the forecast FLOPs alone.

        Args:
            since: seconds since the last journal line, spent on the current step.
            known: better estimates in seconds, by name of the stretch.
        """
        spent: dict[str, float] = {}
        weight: dict[str, float] = {}
        seconds = operations = 0.0
        for stretch in self.stretches:
            lines = self._lines[stretch.name]
            took = sum(line.get("seconds", 0.0) for line in lines)
            if lines:
                spent[stretch.kind] = spent.get(stretch.kind, 0.0) + took
                weight[stretch.kind] = weight.get(stretch.kind, 0.0) + stretch.weight * len(lines)
            if lines and stretch.operations:
                seconds += took
                operations += stretch.operations / stretch.steps * len(lines)
        left = 0.0
        for stretch in self.stretches:
            count = self._left[stretch.name]
            if not count:
                continue
            if stretch.kind in spent:
                a_step = spent[stretch.kind] / weight[stretch.kind] * stretch.weight
            elif operations:
                a_step = seconds / operations * stretch.operations / stretch.steps
            elif stretch.operations and stretch.name not in (known or {}):
                return None
            else:
                a_step = 0.0
            whole = (known or {}).get(stretch.name, a_step * count)
            left += whole - (min(since, a_step) if stretch is self.under_way else 0.0)
        return left if spent else None


def seconds_spent(journal: Journal) -> float:
    """Return the total seconds of all journal lines."""
    return float(sum(line.get("seconds", 0.0) for line in journal.steps()))


def as_entries(stretches: Sequence[Stretch]) -> list[Entry]:
    """Convert stretches to entries for the journal."""
    return [asdict(stretch) for stretch in stretches]


def from_entries(entries: Sequence[Mapping[str, Any]]) -> list[Stretch]:
    """Convert entries of the journal to stretches."""
    return [Stretch(**entry) for entry in entries]


def _lines(stretch: Stretch, journal: Journal) -> list[Entry]:
    return [line for line in journal.steps(stretch.name) if line["step"][len(stretch.name) :][:1] in ("", "/")]
