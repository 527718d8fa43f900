"""How long the disk, the copies and those who wait for them are busy, measured while work runs.

Cheap enough to be always on: a clock read twice around each call that moves megabytes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

KINDS = ("read", "write", "copy")
"""Reading from the disk, writing to it, and copies between host and device."""

_running: list[Occupancy] = []
_adding = threading.Lock()
_here = threading.local()


class Occupancy:
    """Adds up while it is watched, see `watching`."""

    def __init__(self) -> None:
        self.waited = dict.fromkeys(KINDS, 0.0)
        """Seconds in which the thread that watches stood still for it, by kind: all the rest it computed."""
        self.busy = dict.fromkeys(KINDS, 0.0)
        """Seconds of work of all threads, by kind; where two work at once, both count."""
        self._thread = threading.get_ident()

    def add(self, kind: str, seconds: float, *, waited: bool, busy: bool) -> None:
        """Count seconds of the calling thread."""
        if waited and threading.get_ident() == self._thread:
            self.waited[kind] += seconds
        if busy:
            self.busy[kind] += seconds

    def so_far(self) -> Tables:
        """Both tables."""
        return {"waited": dict(self.waited), "busy": dict(self.busy)}


@contextmanager
def watching() -> Iterator[Occupancy]:
    """A context whose occupancy is what happens inside it; contexts nest."""
    occupancy = Occupancy()
    with _adding:
        _running.append(occupancy)
    try:
        yield occupancy
    finally:
        with _adding:
            _running.remove(occupancy)


@contextmanager
def spent(kind: str) -> Iterator[None]:
    """A context that is work of that kind: whoever does it is kept from computing meanwhile."""
    with _measured(kind, busy=True):
        yield


@contextmanager
def waiting(kind: str) -> Iterator[None]:
    """A context that waits for another thread's work of that kind."""
    with _measured(kind, busy=False):
        yield


def copied(seconds: float) -> None:
    """Count a copy that nobody waited for on the host."""
    with _adding:
        for occupancy in _running:
            occupancy.add("copy", seconds, waited=False, busy=True)


@contextmanager
def _measured(kind: str, *, busy: bool) -> Iterator[None]:
    # What happens inside such a context is part of it.
    inside, _here.inside = getattr(_here, "inside", False), True
    started = time.perf_counter()
    try:
        yield
    finally:
        _here.inside = inside
        if not inside:
            seconds = time.perf_counter() - started
            with _adding:
                for occupancy in _running:
                    occupancy.add(kind, seconds, waited=True, busy=busy)


Tables = dict[str, dict[str, float]]
"""``"waited"`` and ``"busy"``, each seconds by kind."""


def difference(now: Tables, before: Tables) -> Tables:
    """What was added between."""
    return {
        table: {kind: round(seconds - before[table][kind], 3) for kind, seconds in sums.items()}
        for table, sums in now.items()
    }


def total(parts: Sequence[Mapping[str, Any]]) -> Tables:
    """The sum of what several entries say; those that say nothing of it count nothing."""
    found = Occupancy().so_far()
    for part in parts:
        for table, sums in found.items():
            for kind in KINDS:
                sums[kind] = round(sums[kind] + part.get(table, {}).get(kind, 0.0), 3)
    return found
