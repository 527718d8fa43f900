"""Measure what a job spends. Each journal line records FLOPs by kind, seconds and peak memory since the previous line.

The sum over all lines is the cost of the job, however many processes it ran in; the maximum is its peak memory. What a
process did after its last line is not counted, and that work is lost too.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ..maths.flops import KINDS, FlopCounter, Kind
from ..system.machine import Peaks
from ..system.ranks import ALONE, Ranks
from ..system.timing import difference, total, watching
from .journal import Entry, Journal


@contextmanager
def metered(journal: Journal, started: float, peaks: Peaks, ranks: Ranks = ALONE) -> Iterator[None]:
    """Make `journal.append` record FLOPs, `seconds`, `memory` (bytes), and the seconds `waited` and `busy`.

    See `system.timing` for the last two.

    With several ranks, FLOPs are summed, memory is the largest of any rank, and seconds are those of the first rank.

    Args:
        started: monotonic time in seconds from which the first line counts.
    """
    told, told_seconds = dict.fromkeys(KINDS, 0), started
    peaks.lap()
    with FlopCounter() as counter, watching() as occupancy:
        told_occupancy = occupancy.so_far()

        def spent() -> Entry:
            nonlocal told, told_seconds, told_occupancy
            kinds, now = dict(counter.kinds), time.monotonic()
            since = {kind: count - told[kind] for kind, count in kinds.items()}
            seconds = round(now - told_seconds, 3)
            told, told_seconds = kinds, now
            before, told_occupancy = told_occupancy, occupancy.so_far()
            everyone = ranks.gather((since, peaks.lap()))
            since = {kind: sum(each[kind] for each, _ in everyone) for kind in kinds}
            memory = _most([lap for _, lap in everyone])
            return {**as_entry(since), "seconds": seconds, "memory": memory, **difference(told_occupancy, before)}

        journal.meter = spent
        yield


def _most(laps: list[Entry]) -> Entry:
    """Return the largest memory that any rank held during a step, in bytes."""
    held = {
        name: max((lap[name] for lap in laps if lap[name] is not None), default=None)
        for name in ("host_bytes", "device_bytes")
    }
    return {**held, "own": all(lap["own"] for lap in laps)}


def as_entry(kinds: Mapping[Kind, int]) -> Entry:
    """Return FLOPs as journal fields: in total and by kind."""
    return {"operations": sum(kinds.values()), "operations_by_kind": dict(kinds)}


_BLOCK = re.compile(r"shot-\d+/(forward|backward|prune)/(\d+)")


def by_block(journal: Journal) -> list[Entry]:
    """Return the cost of each block over all shots: seconds of survey and prune sweep, peak bytes of both together."""
    found: dict[int, Entry] = {}
    for step in journal.steps():
        match = _BLOCK.fullmatch(step["step"])
        if match is None:
            continue
        block = int(match[2])
        entry = found.setdefault(block, {"block": block, "survey_seconds": 0.0, "prune_seconds": 0.0})
        name = "prune_seconds" if match[1] == "prune" else "survey_seconds"
        entry[name] = round(entry[name] + step.get("seconds", 0.0), 3)
        if (memory := step.get("memory")) is not None:
            for peak in ("host_bytes", "device_bytes"):
                entry[peak] = max((size for size in (entry.get(peak), memory[peak]) if size is not None), default=None)
            entry["own_peak"] = entry.get("own_peak", True) and memory["own"]
    return [found[block] for block in sorted(found)]


def peaks(journal: Journal) -> Entry:
    """Return the peak memory of any step, in bytes; None if no line records it."""
    held = [step["memory"] for step in journal.steps() if "memory" in step]
    found = {}
    for name in ("host_bytes", "device_bytes"):
        found[f"peak_{name}"] = max((each[name] for each in held if each[name] is not None), default=None)
    return found


def totals(journal: Journal, prefix: str = "") -> Entry:
    """Sum FLOPs, seconds and occupancy of all finished steps whose name begins with `prefix`."""
    spent = list(journal.steps(prefix))
    kinds = [each.get("operations_by_kind", {}) for each in spent]
    return {
        **as_entry({kind: sum(each.get(kind, 0) for each in kinds) for kind in KINDS}),
        "seconds": round(sum(each.get("seconds", 0.0) for each in spent), 3),
        **total(spent),
    }
