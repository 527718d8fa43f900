"""What a job keeps for itself and has no longer, or not as it was written: found before it goes on, to be made anew.

Every file that a journal line speaks of has its digest in that line; boundaries carry their own checksums. What is only
read in the same process is checked as it is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..errors import ConfigError
from ..jobs.folder import Lost
from ..model import write
from ..recipes.plan import Plan
from ..stream import sweep
from ..system import files
from . import correct
from .block import DENSE
from .job import Job
from .shot import GRADIENT, Shot


def lost(job: Job) -> Lost | None:
    """The first thing that is not there as it was; None if the job may go on from where its journal ends.

    Of several ranks each looks at its own boundaries, the first one at what it wrote for all. A block's input that is
    embedded, or computed from those before it, is never missed.
    """
    number = next((n for n in range(1, job.shots + 1) if Shot(job, n).finished is None), job.shots + 1)
    shot = Shot(job, min(number, job.shots))
    candidates = [*_files(job, number)] if job.ranks.first else []
    job.progress.phase("look over", len(candidates))
    for path, digest, step in candidates:
        if not (_is_plan(path) if digest is None else files.holds(path, digest)):
            return Lost(path, step)
        job.progress.step(path.name)
    return _boundary(shot) if number <= job.shots else None


def _files(job: Job, number: int) -> Iterator[tuple[Path, str | None, str]]:
    """What is needed before shot `number` goes on: its digest, None for a plan, and how the step begins that it comes from."""
    shards = [write.block_shard(job.skeleton, index) for index in range(len(job.skeleton))]
    if (written := job.journal.find("calibrate")) is not None:
        yield job.written_path, written["sha256"], "calibrate"
    if number > 1 and not (number > job.shots and job.published):
        done = Shot(job, number - 1)
        entry = done.finished
        assert entry is not None
        for name, digest in entry["sha256"].items():
            # With more shots, what it was made from is gone as well.
            step = "" if job.shots > 1 else "prune/" if name in shards else "pruned"
            yield done.folder / name, digest, done.named(step)
    if number > job.shots:
        return
    shot = Shot(job, number)
    allocated, surveyed = shot.journalled("allocate"), shot.journalled("surveyed")
    if allocated is not None:
        yield job.plan_path, None, shot.named("allocate")
    if surveyed is not None and "sha256" in surveyed:
        for index, digest in enumerate(surveyed["sha256"]):
            yield shot.survey_path(index), digest, shot.named("surveyed")
    for line in shot.survey_lines if job.surveys else ():
        yield shot.survey_path(int(line["step"].rpartition("/")[2])), line["sha256"], shot.named("forward/")
    made = dict(zip(shards, (line["sha256"] for line in shot.steps("prune/")), strict=False))
    for name, digest in (shot.journalled("pruned") or {"sha256": made})["sha256"].items():
        yield shot.pruned / name, digest, shot.named("prune/" if name in shards else "pruned")
    if corrected := shot.steps("correct/"):
        state = correct.state(shot.corrections, len(corrected))
        for name, digest in corrected[-1]["sha256"].items():
            yield state / name, digest, shot.named("correct/")


def _is_plan(path: Path) -> bool:
    """Whether it can be read at all: one that was edited is for the shot to refuse, and not to be thrown away."""
    try:
        Plan.read(path)
    except ConfigError:
        return False
    return True


def _boundary(shot: Shot) -> Lost | None:
    """The inputs that the next block needs."""
    job, depth = shot.job, len(shot.job.skeleton)
    wanted: list[tuple[str, str]] = []
    forward, backward, pruned = (len(shot.steps(f"{name}/")) for name in ("forward", "backward", "prune"))
    if shot.journalled("allocate") is None and shot.journalled("surveyed") is None:
        if shot.journalled("head") is None and forward and job.statistics:
            there = [i for i in range(forward) if i % job.boundary_every == 0] if job.needs.gradients else [0]
            intact = (i for i in reversed(there) if i == 0 or job.store.intact(sweep.boundary(DENSE, i)))
            wanted = [(sweep.boundary(DENSE, forward), f"forward/{next(intact)}")]
        elif shot.journalled("head") is not None and backward < depth:
            wanted = [(sweep.boundary(GRADIENT, depth - backward), "forward/")]
    elif shot.journalled("pruned") is None and pruned:
        wanted = [(sweep.boundary(stream, pruned), "prune/") for stream in shot.streams.into(pruned)]
    for name, step in wanted:
        if not job.store.intact(name):
            return Lost(job.store.path(name), shot.named(step))
    return None
