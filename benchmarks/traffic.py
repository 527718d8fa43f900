"""Count the passes of a job over stored activations: how often the sweeps read and write a boundary, block by block.

One pass reads or writes all samples of one boundary. The counts are those of a job that is not interrupted, in which every site loses
units and no sublayer goes whole, without a window of blocks (``--blocks``: its first block counts as block 0 does here, blocks before
it move one stream, those after it none) and without a text for the survey alone. `tests/test_traffic.py` compares them with jobs
that run; cost.py uses them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from streamprune.jobs.forecast.memory import in_turn
from streamprune.jobs.forecast.workload import Shapes, Sublayer


@dataclass(frozen=True)
class Passes:
    """Passes over boundaries. `passing` of the written ones are read by the same block only, so that they need not be durable."""

    read: float = 0
    written: float = 0
    passing: float = 0

    def __add__(self, other: Passes) -> Passes:
        return Passes(self.read + other.read, self.written + other.written, self.passing + other.passing)


def passes(shapes: Shapes, every: int = 1) -> dict[str, list[Passes]]:
    """Return the passes of one shot by step, one entry per block; those outside the blocks have one entry.

    Steps are named as in the journal: ``embed``, ``forward``, ``head``, ``backward``, ``prune``.

    Args:
        every: the survey keeps the boundary of every `every`-th block.
    """
    work, depth = shapes.workload, len(shapes.blocks)
    found: dict[str, list[Passes]] = {}
    if not work.text:
        return found
    found["embed"] = [Passes(written=1)]
    if work.survey or not work.prunes:
        found["forward"] = [Passes(1, 1) for _ in range(depth)]
    if work.gradients:
        found["head"] = [Passes(1, 1)]
        # Inputs that were not kept are computed again, each from the one before.
        found["backward"] = [Passes(2, 1) + (Passes(1, 1) if index % every else Passes()) for index in range(depth)]
    if work.prunes and (work.gram or work.compensates or work.wants_inputs or work.dense_stream):
        found["prune"] = [sum(_pruned(shapes, index), Passes()) for index in range(depth)]
    return found


def _pruned(shapes: Shapes, index: int) -> Iterator[Passes]:
    """Yield the passes of the prune sweep at one block: those of `pruning.block.BlockPruner.prune`, in order."""
    work, sublayers, last = shapes.workload, shapes.sublayers[index], index == len(shapes.blocks) - 1
    if not shapes.blocks[index]:
        yield Passes(work.streams, work.streams) if not last else Passes()
        return
    anything_parallel = any(sub.entry.parallel for sub in sublayers)
    carried = False  # whether the pass before has summed the inputs
    for position, sub in enumerate(sublayers):
        final = position == len(sublayers) - 1
        # A parallel sublayer also reads what entered the block.
        reads = 1 + (sub.entry.parallel and position > 0)
        summed = _summed_inputs(shapes, sub, index, position)
        if summed and not carried:
            yield Passes(read=reads * summed)
        continues = not (final and last) or work.refines > 0
        aims = work.has_target and sub.entry.takes_target and (index > 0 or position > 0)
        passing = int(not final)
        if aims:
            yield Passes(2 * reads, int(continues), passing * continues)
        elif work.gram and sub.sites:
            yield Passes(reads * sum(1 for _ in in_turn([site.columns for site in sub.sites], shapes.sum_item)))
        carried = False
        if not continues:
            continue
        # A refined block moves the pruned stream after its refinement.
        moving = work.streams - aims - (final and work.refines > 0)
        reads = 1 + (anything_parallel and position > 0)
        yield Passes(reads * moving, moving, moving * passing)
        following = 0 if final else _summed_inputs(shapes, sublayers[position + 1], index, position + 1)
        carried = bool(following)
        if following > 1 and aims:
            yield Passes(read=1 + anything_parallel)
    if work.refines:
        rows = work.refines * min(work.refine_sequences, work.samples)
        yield Passes(read=2 * rows / work.samples)
        if not last:
            yield Passes(1, 1)


def _summed_inputs(shapes: Shapes, sub: Sublayer, index: int, position: int) -> int:
    """Return the number of streams over which the inputs of a sublayer's producers are summed; 0 if they are not."""
    work = shapes.workload
    apart = index > 0 or (position > 0 and not sub.entry.parallel)
    if work.compensates and apart and any(site.linears[:-1] for site in sub.sites):
        return 2
    return int(work.wants_inputs and bool(sub.sites))
