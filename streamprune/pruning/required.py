"""The files that the next step of a pruning job reads; `jobs.resume` repeats the steps whose files are missing or altered.

Each file that a journal line mentions has its digest in that line; boundaries carry their own checksums. Files that only
the same process reads are checked as they are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ..errors import ConfigError
from ..jobs.resume import RequiredFile
from ..model import write
from ..model.checkpoint import load_shard
from ..recipes.plan import Plan
from ..stream import generate, sweep
from ..system import files
from . import correct
from .job import GENERATED, WRITING, Job
from .shot import GRADIENT, Shot
from .streams import DENSE


def required_files(job: Job) -> Iterator[RequiredFile]:
    """Iterate over the files that this rank reads to resume: its own boundaries and, on the first, what it wrote for all.

    The input of a block is not required if it can be embedded, or computed from the inputs of earlier blocks.
    """
    shots = job.request.shots
    number = next((n for n in range(1, shots + 1) if Shot(job, n).finished is None), shots + 1)
    if job.ranks.first:
        yield from _written(job, number)
    if number <= shots:
        yield from _boundaries(Shot(job, number))


def _written(job: Job, number: int) -> Iterator[RequiredFile]:
    """Files that earlier steps wrote for shot `number`; one more than there are shots asks for the finished result."""
    shards = [write.block_shard(job.skeleton, index) for index in range(len(job.skeleton))]

    def written(path: Path, digest: str, step: str) -> RequiredFile:
        return RequiredFile(path, step, partial(files.has_digest, path, digest))

    if (line := job.journal.find("calibrate")) is not None:
        yield written(job.written_path, line["sha256"], "calibrate")
    elif (last := job.generated) is not None:
        yield written(*last, GENERATED)
        folder = job.cache / WRITING
        yield RequiredFile(folder, GENERATED, lambda: generate.intact(folder, load_shard(*last)))
    if number > 1 and not (number > job.request.shots and job.published):
        done = Shot(job, number - 1)
        entry = done.finished
        assert entry is not None
        for name, digest in entry["sha256"].items():
            # With several shots, its source has been removed too.
            step = "" if job.request.shots > 1 else "prune/" if name in shards else "pruned"
            yield written(done.folder / name, digest, done.named(step))
    if number > job.request.shots:
        return
    shot = Shot(job, number)
    if shot.journalled("allocate") is not None:
        yield RequiredFile(job.plan_path, shot.named("allocate"), partial(_is_plan, job.plan_path))
    for line in [*shot.steps("forward/"), *shot.steps("backward/")] if job.request.surveys else ():
        if "sha256" in line:
            yield written(
                shot.survey_path(int(line["step"].rpartition("/")[2])), line["sha256"], shot.named("forward/")
            )
    for name, digest in (shot.journalled("surveyed") or {}).get("sha256", {}).items():
        yield written(job.folder / name, digest, shot.named("surveyed"))
    made = dict(zip(shards, (line["sha256"] for line in shot.steps("prune/")), strict=False))
    for name, digest in (shot.journalled("pruned") or {"sha256": made})["sha256"].items():
        yield written(shot.pruned / name, digest, shot.named("prune/" if name in shards else "pruned"))
    if corrected := shot.steps("correct/"):
        state = correct.state(shot.corrections, len(corrected))
        for name, digest in corrected[-1]["sha256"].items():
            yield written(state / name, digest, shot.named("correct/"))


def _is_plan(path: Path) -> bool:
    """Whether a file can be read as a plan. An edited plan is not discarded here: the shot refuses it."""
    try:
        Plan.read(path)
    except ConfigError:
        return False
    return True


def _boundaries(shot: Shot) -> Iterator[RequiredFile]:
    """Activations that the next block reads."""
    job, depth = shot.job, len(shot.job.skeleton)
    wanted: list[tuple[str, str]] = []
    store = job.store
    forward, backward, pruned = (len(shot.steps(f"{name}/")) for name in ("forward", "backward", "prune"))
    if shot.journalled("allocate") is None and shot.journalled("surveyed") is None:
        if shot.journalled("head") is None and forward and job.request.statistics:
            store = job.survey_store
            every = job.boundary_every if job.request.workload.gradients else forward
            stored = (i for i in reversed(range(0, forward, every)) if i == 0 or store.intact(sweep.boundary(DENSE, i)))
            wanted = [(sweep.boundary(DENSE, forward), f"forward/{next(stored)}")]
        elif shot.journalled("head") is not None and backward < depth:
            wanted = [(sweep.boundary(GRADIENT, depth - backward), "forward/")]
    elif shot.journalled("pruned") is None and pruned and shot.streams is not None:
        wanted = [(sweep.boundary(stream, pruned), "prune/") for stream in shot.streams.into(pruned)]
    for name, step in wanted:
        yield RequiredFile(store.path(name), shot.named(step), partial(store.intact, name))
