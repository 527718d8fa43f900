"""The steps of a job from beginning to end, and how long those to come may take."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .journal import Entry, Journal


@dataclass(frozen=True)
class Stretch:
    """Steps of one kind in a row."""

    name: str
    """What their journal lines are called, or what these begin with: ``shot-1/prune``."""
    steps: int = 1
    operations: int = 0
    """Forecast for all of them; only proportions count."""
    spared_by: str | None = None
    """A line after which those that are missing will not come."""

    @property
    def kind(self) -> str:
        """What they have in common with those of other shots or rows: ``prune``."""
        return re.sub(r"^shot-\d+/", "", self.name).partition("/")[0]

    @property
    def shot(self) -> int | None:
        """The shot that they belong to."""
        found = re.match(r"shot-(\d+)/", self.name)
        return int(found[1]) if found else None

    @property
    def weight(self) -> float:
        """Of one step, against others of its kind."""
        return self.operations / self.steps or 1.0


class Schedule:
    """A job's stretches in order, held against what its journal has."""

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
        """Steps, finished and to come; what was spared counts as finished."""
        return sum(stretch.steps for stretch in self.stretches)

    @property
    def done(self) -> int:
        """Steps that are finished."""
        return self.total - sum(self._left.values())

    @property
    def under_way(self) -> Stretch | None:
        """The first that is not finished."""
        return next((stretch for stretch in self.stretches if self._left[stretch.name]), None)

    def seconds_left(self, since: float = 0.0, known: Mapping[str, float] | None = None) -> float | None:
        """What the steps to come may take; None before anything was measured that tells.

        A kind of step that was measured takes as long as it took, scaled by the forecast's operations where they
        differ; another one is weighed against all that was measured, by the forecast alone.

        Args:
            since: seconds since the last line, which the step under way has had.
            known: of stretches by name, where somebody knows better.
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
    """What all lines took together."""
    return float(sum(line.get("seconds", 0.0) for line in journal.steps()))


def as_entries(stretches: Sequence[Stretch]) -> list[Entry]:
    """For the journal."""
    return [asdict(stretch) for stretch in stretches]


def from_entries(entries: Sequence[Mapping[str, Any]]) -> list[Stretch]:
    """Back from the journal."""
    return [Stretch(**entry) for entry in entries]


def _lines(stretch: Stretch, journal: Journal) -> list[Entry]:
    return [line for line in journal.steps(stretch.name) if line["step"][len(stretch.name) :][:1] in ("", "/")]
