"""Find files of a job that are missing or altered before it resumes, so that they are made again.

Each file that a journal line mentions has its digest in that line; boundaries carry their own checksums. Files that only
the same process reads are checked as they are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..errors import ConfigError
from ..jobs.folder import MissingFile
from ..model import write
from ..recipes.plan import Plan
from ..stream import sweep
from ..system import files
from . import correct
from .job import Job
from .shot import GRADIENT, Shot
from .streams import DENSE


def find_missing(job: Job) -> MissingFile | None:
    """Return the first file that is missing or altered; None if the job may resume where its journal ends.

    With several ranks, each checks its own boundaries, and the first also checks what it wrote for all. The input of a
    block is not needed if it can be embedded, or computed from the inputs of earlier blocks.
    """
    number = next((n for n in range(1, job.request.shots + 1) if Shot(job, n).finished is None), job.request.shots + 1)
    shot = Shot(job, min(number, job.request.shots))
    candidates = [*_files(job, number)] if job.ranks.first else []
    job.progress.phase("check files", len(candidates))
    for path, digest, step in candidates:
        if not (_is_plan(path) if digest is None else files.has_digest(path, digest)):
            return MissingFile(path, step)
        job.progress.step(path.name)
    return _boundary(shot) if number <= job.request.shots else None


def _files(job: Job, number: int) -> Iterator[tuple[Path, str | None, str]]:
    """Files needed to resume shot `number`: path, digest (None for a plan), and the prefix of the step that wrote it."""
    shards = [write.block_shard(job.skeleton, index) for index in range(len(job.skeleton))]
    if (written := job.journal.find("calibrate")) is not None:
        yield job.written_path, written["sha256"], "calibrate"
    if number > 1 and not (number > job.request.shots and job.published):
        done = Shot(job, number - 1)
        entry = done.finished
        assert entry is not None
        for name, digest in entry["sha256"].items():
            # With several shots, its source has been removed too.
            step = "" if job.request.shots > 1 else "prune/" if name in shards else "pruned"
            yield done.folder / name, digest, done.named(step)
    if number > job.request.shots:
        return
    shot = Shot(job, number)
    if shot.journalled("allocate") is not None:
        yield job.plan_path, None, shot.named("allocate")
    for line in [*shot.steps("forward/"), *shot.steps("backward/")] if job.request.surveys else ():
        if "sha256" in line:
            yield shot.survey_path(int(line["step"].rpartition("/")[2])), line["sha256"], shot.named("forward/")
    made = dict(zip(shards, (line["sha256"] for line in shot.steps("prune/")), strict=False))
    for name, digest in (shot.journalled("pruned") or {"sha256": made})["sha256"].items():
        yield shot.pruned / name, digest, shot.named("prune/" if name in shards else "pruned")
    if corrected := shot.steps("correct/"):
        state = correct.state(shot.corrections, len(corrected))
        for name, digest in corrected[-1]["sha256"].items():
            yield state / name, digest, shot.named("correct/")


def _is_plan(path: Path) -> bool:
    """Whether a file can be read as a plan. An edited plan is not discarded here: the shot refuses it."""
    try:
        Plan.read(path)
    except ConfigError:
        return False
    return True


def _boundary(shot: Shot) -> MissingFile | None:
    """Check the inputs that the next block needs."""
    job, depth = shot.job, len(shot.job.skeleton)
    wanted: list[tuple[str, str]] = []
    forward, backward, pruned = (len(shot.steps(f"{name}/")) for name in ("forward", "backward", "prune"))
    if shot.journalled("allocate") is None and shot.journalled("surveyed") is None:
        if shot.journalled("head") is None and forward and job.request.statistics:
            there = (
                [i for i in range(forward) if i % job.boundary_every == 0] if job.request.workload.gradients else [0]
            )
            intact = (i for i in reversed(there) if i == 0 or job.store.intact(sweep.boundary(DENSE, i)))
            wanted = [(sweep.boundary(DENSE, forward), f"forward/{next(intact)}")]
        elif shot.journalled("head") is not None and backward < depth:
            wanted = [(sweep.boundary(GRADIENT, depth - backward), "forward/")]
    elif shot.journalled("pruned") is None and pruned and shot.streams is not None:
        wanted = [(sweep.boundary(stream, pruned), "prune/") for stream in shot.streams.into(pruned)]
    for name, step in wanted:
        if not job.store.intact(name):
            return MissingFile(job.store.path(name), shot.named(step))
    return None
