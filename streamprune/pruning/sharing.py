"""Surveys that several jobs share: one job's sweep also sums what the others need, and leaves it in a common folder.

Jobs of one comparison that differ only in recipe or settings would run the same sweep. The first one to survey does it
for all of them that ask (see `Job.alongside`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import DiskError
from ..jobs.journal import Entry
from ..jobs.meter import OWN, as_entry, share_of
from ..maths.flops import KINDS, Kind
from ..maths.sums import Statistic
from ..system import files
from ..system.strict_json import read_json, write_json
from ..system.units import format_bytes
from .job import Job
from .shot import Shot

COST, DIGESTS = "cost.json", "sha256"
"""File beside a shared survey that says what it cost, and the entry in it with the digests of the other files."""


@dataclass(frozen=True)
class Asker:
    """A job whose first survey comes from another job's sweep."""

    job: Job
    shared: Path
    """The folder where it will look for its survey."""
    maker: Job
    """The job that surveys."""

    @property
    def folder(self) -> Path:
        """Where the survey lies until it is whole."""
        return self.shared.with_name(f"{self.shared.name}-{self.maker.own}{files.TEMPORARY}")

    def findings(self, index: int) -> Path:
        """File with the findings of a block."""
        return self.folder / f"survey-{index:04}.safetensors"


@dataclass
class Part:
    """One job's part of one block's survey."""

    job: Job
    path: Path
    """File for its findings."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Its findings by their names in the file; on the first rank only."""
    operations: dict[Kind, int] = field(default_factory=lambda: dict.fromkeys(("sums", "solving"), 0))
    """Floating-point operations by kind: of its sums and of its digest."""
    seconds: float = 0.0
    """Of its digest."""

    def as_entry(self, digest: str) -> Entry:
        """For the journal, with the digest of its file: see `meter.share_of`."""
        return {"operations_by_kind": self.operations, "seconds": round(self.seconds, 3), "sha256": digest}


class Sharing:
    """What one shot's survey takes from other jobs and makes for them; only a first shot does either."""

    def __init__(self, shot: Shot) -> None:
        self.shot, self.job = shot, shot.job
        self.shared = self.job.shared_survey(self.job.sizes) if shot.number == 1 else None
        """Folder for this job's survey; None if it is not shared."""

    @cached_property
    def asking(self) -> list[Asker]:
        """Jobs to survey for in passing: those to which this sweep gives, to the last bit, what their own would.

        If memory cannot hold the sums for all of them, those that exceed it will survey by themselves.
        """
        job = self.job
        if self.shared is None or not job.statistics or job.writes_text:
            return []
        found: list[Asker] = []
        sweep_of_all, needs, taken = job.first_sweep(job.sizes), job.needs, {self.shared}
        for config in job.alongside:
            other = Job(config, None)
            sizes = other.forecast().sizes
            shared = other.shared_survey(sizes) if other.statistics else None
            if shared is None or shared in taken or shared.is_dir() or other.first_sweep(sizes) != sweep_of_all:
                continue
            taken.add(shared)
            together = needs.surveying_with(other.needs)
            needed, limit = job.peak(together, job.sizes)
            if needed > limit:
                self.shot.progress.say(
                    f"{config.out.name} will survey by itself: to sum for it too would need {format_bytes(needed)}, and the "
                    f"memory limit is {format_bytes(limit)}"
                )
                continue
            needs = together
            found.append(Asker(other, shared, job))
        return found

    @property
    def statistics(self) -> frozenset[Statistic]:
        """What the survey sums: for this job and for those that ask."""
        return self.job.statistics.union(*(asker.job.statistics for asker in self.asking))

    def parts(self, index: int) -> dict[str, Part]:
        """Whom a block's survey is for: this job as `OWN`, those that ask by the names of their folders."""
        own = {OWN: Part(self.job, self.shot.survey_path(index))}
        return own | {asker.shared.name: Part(asker.job, asker.findings(index)) for asker in self.asking}

    def take(self) -> None:
        """Take this job's findings from another one that made them, if they are intact; remove them if they are not."""
        shot, shared = self.shot, self.shared
        if shared is None or shot.steps("forward/") or not shared.is_dir():
            return
        cost = read_json(shared / COST)
        digests = cost.pop(DIGESTS)
        for index, digest in enumerate(digests):
            if not files.has_digest(shared / shot.survey_path(index).name, digest):
                files.remove_tree(shared)
                return
            files.link(shared / shot.survey_path(index).name, shot.survey_path(index))
        shot.record("surveyed", spared=cost, sha256=digests)

    def make_folders(self) -> None:
        """Make the folders of those that ask, empty if the survey is only beginning."""
        for asker in self.asking:
            if not self.shot.steps("forward/"):
                files.remove_tree(asker.folder)
            files.make_folder(asker.folder)

    def share(self) -> None:
        """Leave the finished survey to other jobs: this job's own findings, and those of the jobs that asked."""
        if self.shared is None:
            return
        own = Asker(self.job, self.shared, self.job)
        self._link(own)
        for asker in (own, *self.asking):
            self._publish(asker)

    def _link(self, own: Asker) -> None:
        """Have this job's own findings among those that are shared."""
        files.remove_tree(own.folder)
        files.make_folder(own.folder)
        for index in range(len(self.shot.skeleton)):
            files.link(self.shot.survey_path(index), own.findings(index))

    def _publish(self, asker: Asker) -> None:
        """Give a survey its final name, if it is whole: an interrupted process may have made a part of it for fewer jobs."""
        shot = self.shot
        lines = [line for part in ("forward/", "head", "backward/") for line in shot.steps(part)]
        whose = OWN if asker.job is self.job else asker.shared.name
        if not all(asker.findings(index).exists() for index in range(len(shot.skeleton))) or not all(
            whose in line["parts"] for line in lines if "parts" in line
        ):
            return
        digests = [line["parts"][whose]["sha256"] if "parts" in line else line["sha256"] for line in shot.survey_lines]
        write_json(asker.folder / COST, {**_cost(lines, whose), DIGESTS: digests})
        try:
            files.publish(asker.folder, asker.shared)
        except DiskError:
            if not asker.shared.is_dir():
                raise
            files.remove_tree(asker.folder)  # another job was first


def _cost(lines: list[Entry], whose: str) -> dict[str, Any]:
    """What a survey's journal lines cost one job: operations by kind, and seconds."""
    spent = [share_of(line, whose) for line in lines]
    kinds = {kind: sum(each["operations_by_kind"][kind] for each in spent) for kind in KINDS}
    return {**as_entry(kinds), "seconds": sum(each["seconds"] for each in spent)}
