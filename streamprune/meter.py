"""What a job spends, told by its journal: every line carries operations, seconds and peaks of memory since the one before.

So the sum over all lines is what the job took, in however many processes it ran, and their maximum what it held; what a
process did between its last line and its end is lost, like the work itself.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

from .journal import Entry, Journal
from .machine import Peaks
from .maths.operations import counting
from .ranks import ALONE, Ranks


@contextmanager
def metered(journal: Journal, started: float, peaks: Peaks, ranks: Ranks = ALONE) -> Iterator[None]:
    """A context in which `journal.append` adds `operations`, `seconds`, from `started` (monotonic), and `memory`.

    Of several ranks it is all their operations, and the most memory that one of them held.
    """
    told_operations, told_seconds = 0, started
    peaks.lap()
    with counting() as counter:

        def spent() -> Entry:
            nonlocal told_operations, told_seconds
            operations, now = counter.total, time.monotonic()
            since = {"operations": operations - told_operations, "seconds": round(now - told_seconds, 3)}
            told_operations, told_seconds = operations, now
            return _together(ranks.gather({**since, "memory": peaks.lap()}))

        journal.meter = spent
        yield


def _together(spent: list[Entry]) -> Entry:
    """What all ranks spent on a step."""
    held = [each["memory"] for each in spent]
    memory = {
        name: max((each[name] for each in held if each[name] is not None), default=None)
        for name in ("host_bytes", "device_bytes")
    }
    return {
        "operations": sum(each["operations"] for each in spent),
        "seconds": max(each["seconds"] for each in spent),
        "memory": {**memory, "own": all(each["own"] for each in held)},
    }


_BLOCK = re.compile(r"shot-\d+/(forward|backward|prune)/(\d+)")


def by_block(journal: Journal) -> list[Entry]:
    """What each block took, over all shots: seconds of the survey and of the prune sweep, and peaks of both."""
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
    """The most memory that any step held, in bytes; None where no line says."""
    held = [step["memory"] for step in journal.steps() if "memory" in step]
    found = {}
    for name in ("host_bytes", "device_bytes"):
        found[f"peak_{name}"] = max((each[name] for each in held if each[name] is not None), default=None)
    return found


def totals(journal: Journal, prefix: str = "") -> Entry:
    """Operations and seconds of all finished steps whose name begins with `prefix`, and of what they were spared.

    A step that took over another job's work says under "spared" what that work had cost: whoever compares methods
    wants to know what a method takes, not which of them came first.
    """
    steps = list(journal.steps(prefix))
    spent = [*steps, *(step["spared"] for step in steps if "spared" in step)]
    return {
        "operations": sum(each.get("operations", 0) for each in spent),
        "seconds": round(sum(each.get("seconds", 0.0) for each in spent), 3),
    }
