"""Measure what a job spends. Each journal line records FLOPs by kind, seconds and peak memory since the previous line.

The sum over all lines is the cost of the job, however many processes it ran in; the maximum is its peak memory. What a
process did after its last line is not counted, and that work is lost too.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..maths.flops import KINDS, FlopCounter
from ..system.machine import Peaks
from ..system.ranks import ALONE, Ranks
from ..system.timing import waited
from .journal import Entry, Journal


@contextmanager
def metered(journal: Journal, started: float, peaks: Peaks, ranks: Ranks = ALONE) -> Iterator[None]:
    """Make `journal.append` record FLOPs, `seconds`, `memory` (bytes), and the seconds `waited` for disk.

    With several ranks, FLOPs are summed, memory is the largest of any rank, and seconds are those of the first rank.
    The first line counts from the monotonic time `started`.
    """
    last = dict.fromkeys(KINDS, 0), waited(), started
    peaks.lap()
    with FlopCounter() as counter:

        def since_last_line() -> Entry:
            nonlocal last
            (flops, blocked, then), last = last, (dict(counter.kinds), waited(), time.monotonic())
            ours = {kind: last[0][kind] - flops[kind] for kind in KINDS}
            all_flops, laps = zip(*ranks.gather((ours, peaks.lap())), strict=True)
            total = {kind: sum(each[kind] for each in all_flops) for kind in KINDS}
            return {
                "operations": sum(total.values()),
                "operations_by_kind": total,
                "seconds": round(last[2] - then, 3),
                "memory": {**_largest(laps), "own": all(lap["own"] for lap in laps)},
                "waited": {kind: round(last[1][kind] - blocked[kind], 3) for kind in blocked},
            }

        journal.meter = since_last_line
        yield


def _largest(entries: Sequence[Entry]) -> Entry:
    """Return the largest memory of any entry, in bytes; None where no entry has a measurement."""
    return {
        name: max((each[name] for each in entries if each.get(name) is not None), default=None)
        for name in ("host_bytes", "device_bytes")
    }


_BLOCK = re.compile(r"shot-\d+/(forward|backward|prune)/(\d+)")


def by_block(journal: Journal) -> list[Entry]:
    """Return the cost of each block over all shots: seconds of survey and prune sweep, peak bytes of both together."""
    found: dict[int, Entry] = {}
    for step in journal.steps():
        if (match := _BLOCK.fullmatch(step["step"])) is None:
            continue
        block = int(match[2])
        entry = found.setdefault(block, {"block": block, "survey_seconds": 0.0, "prune_seconds": 0.0})
        name = "prune_seconds" if match[1] == "prune" else "survey_seconds"
        entry[name] = round(entry[name] + step.get("seconds", 0.0), 3)
        if (memory := step.get("memory")) is not None:
            entry |= _largest([entry, memory])
            entry["own_peak"] = entry.get("own_peak", True) and memory["own"]
    return [found[block] for block in sorted(found)]


def peaks(journal: Journal) -> Entry:
    """Return the peak memory of any step, in bytes; None if no line records it."""
    largest = _largest([step["memory"] for step in journal.steps() if "memory" in step])
    return {f"peak_{name}": size for name, size in largest.items()}


def totals(journal: Journal) -> Entry:
    """Sum FLOPs, seconds and waiting of all finished steps."""
    steps = list(journal.steps())

    def summed(field: str, kinds: Sequence[str]) -> dict[str, Any]:
        return {kind: sum(step.get(field, {}).get(kind, 0) for step in steps) for kind in kinds}

    flops = summed("operations_by_kind", KINDS)
    return {
        "operations": sum(flops.values()),
        "operations_by_kind": flops,
        "seconds": round(sum(step.get("seconds", 0.0) for step in steps), 3),
        "waited": {kind: round(seconds, 3) for kind, seconds in summed("waited", ("read", "write")).items()},
    }
