"""What a job spends, told by its journal: every line carries operations by kind, seconds and peaks of memory since the one before.

So the sum over all lines is what the job took, in however many processes it ran, and their maximum what it held; what a
process did between its last line and its end is lost, like the work itself.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ..maths.flops import KINDS, Kind, counting
from ..system.machine import Peaks
from ..system.ranks import ALONE, Ranks
from ..system.timing import difference, total, watching
from .journal import Entry, Journal


@contextmanager
def metered(journal: Journal, started: float, peaks: Peaks, ranks: Ranks = ALONE) -> Iterator[None]:
    """A context in which `journal.append` adds operations, `seconds`, from `started` (monotonic), `memory`, and in seconds
    how long the work `waited` for what, and how long each was `busy` (see `timing`).

    Of several ranks it is all their operations, the most memory that one of them held, and the first one's seconds.
    """
    told, told_seconds = dict.fromkeys(KINDS, 0), started
    peaks.lap()
    with counting() as counter, watching() as occupancy:
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
    """The most memory that any rank held on a step."""
    held = {
        name: max((lap[name] for lap in laps if lap[name] is not None), default=None)
        for name in ("host_bytes", "device_bytes")
    }
    return {**held, "own": all(lap["own"] for lap in laps)}


def as_entry(kinds: Mapping[Kind, int]) -> Entry:
    """Operations for the journal: the whole, and by kind."""
    return {"operations": sum(kinds.values()), "operations_by_kind": dict(kinds)}


OWN = "own"


def share_of(line: Entry, whose: str = OWN) -> Entry:
    """What a journal line says was spent, as it would be had the step been made for one job alone.

    A survey that several recipes share says under "parts" what was for each: the operations of its own sums and its
    digest, and the digest's seconds. The sweep itself counts for each as a whole, and so does the time of all sums, which
    is not told apart.
    """
    if "parts" not in line:
        return line
    part = line["parts"][whose]
    others = sum(each["seconds"] for each in line["parts"].values())
    kinds = {**line["operations_by_kind"], **part["operations_by_kind"]}
    return {**as_entry(kinds), "seconds": line["seconds"] - others + part["seconds"]}


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
    """Operations, seconds and occupancy of all finished steps whose name begins with `prefix`, and of what they were spared.

    A step that several jobs had a part in counts with what was for this one (see `share_of`). A step that took over another job's work says under "spared" what that work had cost: whoever compares methods
    wants to know what a method takes, not which of them came first.
    """
    steps = list(journal.steps(prefix))
    spent = [*map(share_of, steps), *(step["spared"] for step in steps if "spared" in step)]
    kinds = [each.get("operations_by_kind", {}) for each in spent]
    return {
        **as_entry({kind: sum(each.get(kind, 0) for each in kinds) for kind in KINDS}),
        "seconds": round(sum(each.get("seconds", 0.0) for each in spent), 3),
        **total(spent),
    }
