"""Time spent on disk I/O and host-device copies, and time spent waiting for them.

Always on: the cost is two clock reads around each call, and each call moves megabytes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

KINDS = ("read", "write", "copy")
"""Disk reads, disk writes, and copies between host and device."""

_running: list[Occupancy] = []
_adding = threading.Lock()
_here = threading.local()


class Occupancy:
    """Times added up while `watching` is open, in seconds."""

    def __init__(self) -> None:
        self.waited = dict.fromkeys(KINDS, 0.0)
        """Seconds that the watching thread was blocked, by kind. The rest of the time it computed."""
        self.busy = dict.fromkeys(KINDS, 0.0)
        """Seconds of I/O work of all threads, by kind. Concurrent work counts once per thread."""
        self._thread = threading.get_ident()

    def add(self, kind: str, seconds: float, *, waited: bool, busy: bool) -> None:
        """Add seconds of the calling thread."""
        if waited and threading.get_ident() == self._thread:
            self.waited[kind] += seconds
        if busy:
            self.busy[kind] += seconds

    def so_far(self) -> Tables:
        """Return copies of both tables."""
        return {"waited": dict(self.waited), "busy": dict(self.busy)}


@contextmanager
def watching() -> Iterator[Occupancy]:
    """Measure what happens while the context is open. Contexts nest."""
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
    """Count the time in this context as I/O work of `kind`, which also blocks the calling thread."""
    with _measured(kind, busy=True):
        yield


@contextmanager
def waiting(kind: str) -> Iterator[None]:
    """Count the time in this context as waiting for another thread's work of `kind`."""
    with _measured(kind, busy=False):
        yield


def copied(seconds: float) -> None:
    """Count a copy, in seconds, that no host thread waited for."""
    with _adding:
        for occupancy in _running:
            occupancy.add("copy", seconds, waited=False, busy=True)


@contextmanager
def _measured(kind: str, *, busy: bool) -> Iterator[None]:
    # Nested contexts count only once, as part of the outermost.
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
"""``"waited"`` and ``"busy"``, each in seconds by kind."""


def difference(now: Tables, before: Tables) -> Tables:
    """Return ``now - before``, in seconds rounded to milliseconds."""
    return {
        table: {kind: round(seconds - before[table][kind], 3) for kind, seconds in sums.items()}
        for table, sums in now.items()
    }


def total(parts: Sequence[Mapping[str, Any]]) -> Tables:
    """Sum the tables of several entries, in seconds; missing tables and kinds count as zero."""
    found = Occupancy().so_far()
    for part in parts:
        for table, sums in found.items():
            for kind in KINDS:
                sums[kind] = round(sums[kind] + part.get(table, {}).get(kind, 0.0), 3)
    return found
