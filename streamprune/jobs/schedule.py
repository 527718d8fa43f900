"""The schedule: all steps of a job in order, and an estimate of the remaining time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from .journal import Journal


@dataclass(frozen=True)
class Phase:
    """Consecutive steps of one kind."""

    name: str
    """Name of the steps' journal lines, or a prefix of it: ``shot-1/prune``."""
    steps: int = 1
    skipped_after: str | None = None
    """Name of a journal line after which missing steps are skipped."""

    @property
    def kind(self) -> str:
        """Kind of the steps, shared with other shots or rows: ``prune``."""
        return re.sub(r"^shot-\d+/", "", self.name).partition("/")[0]

    @property
    def shot(self) -> int | None:
        """Number of the shot that the steps belong to; None outside shots."""
        found = re.match(r"shot-(\d+)/", self.name)
        return int(found[1]) if found else None


class Schedule:
    """A job's phases in order, as the journal stores their fields, matched with the journal's lines."""

    def __init__(self, phases: Iterable[Mapping[str, Any]], journal: Journal) -> None:
        self.phases = [Phase(**phase) for phase in phases]
        self.total = sum(phase.steps for phase in self.phases)
        """Number of all steps, including skipped ones."""
        self._left: dict[Phase, int] = {}
        self._seconds: dict[str, list[float]] = {}
        for phase in self.phases:
            lines = [line for line in journal.steps(phase.name) if line["step"][len(phase.name) :][:1] in ("", "/")]
            skipped = phase.skipped_after is not None and journal.find(phase.skipped_after)
            self._left[phase] = 0 if skipped else max(0, phase.steps - len(lines))
            self._seconds.setdefault(phase.kind, []).extend(line.get("seconds", 0.0) for line in lines)

    @property
    def done(self) -> int:
        """Number of finished or skipped steps."""
        return self.total - sum(self._left.values())

    @property
    def current(self) -> Phase | None:
        """The first unfinished phase; None if all are finished."""
        return next((phase for phase, left in self._left.items() if left), None)

    @property
    def begun(self) -> bool:
        """Whether a step of the current phase is finished."""
        return self.current is not None and self._left[self.current] < self.current.steps

    def seconds_left(self, since: float = 0.0, step: float | None = None) -> float | None:
        """Estimate the remaining time in seconds; None before the first step is finished.

        A step takes the mean time of the finished steps of its kind or, without any, of all finished steps.

        Args:
            since: seconds spent on the current step so far.
            step: seconds that the current step takes in total, if there is a better estimate.
        """
        current, seconds = self.current, dict(self._seconds)
        if current is not None and step is not None:
            seconds[current.kind] = [*seconds[current.kind], step]
        measured = [each for steps in seconds.values() for each in steps]
        if current is None or not measured:
            return 0.0 if current is None else None
        means = {kind: fmean(steps or measured) for kind, steps in seconds.items()}
        left = sum(count * means[phase.kind] for phase, count in self._left.items())
        mean = means[current.kind]
        return left - mean + max(0.0, (mean if step is None else step) - since)


def seconds_spent(journal: Journal) -> float:
    """Return the total seconds of all journal lines."""
    return float(sum(line.get("seconds", 0.0) for line in journal.steps()))
