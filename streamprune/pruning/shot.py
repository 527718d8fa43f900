"""One shot: the journal's names for its steps, its folders, the model that it begins with, and its findings.

A shot takes a checkpoint directory and gives a smaller one: survey → allocate → prune → correct → write (see `run`). A
step is finished once the journal has its line. Files that a step needs are removed only after the line that makes them
unneeded. A job that is killed at any moment therefore resumes after the last line and ends with the same bytes.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from ..jobs.journal import Entry
from ..jobs.resume import ensure
from ..model import write
from ..model.site import Site
from ..model.skeleton import Skeleton, open_skeleton
from ..recipes.allocation import Budget
from ..recipes.recipe import Survey
from ..stream import sweep
from .archive import SurveyFiles, survey_name
from .job import Job
from .streams import DENSE, PRUNED, Streams

GRADIENT = "gradient"


class Shot:
    """One shot of an opened job: what its steps share. Shots are numbered from 1."""

    def __init__(self, job: Job, number: int) -> None:
        self.job, self.number = job, number
        self.ranks = job.ranks
        self.progress = job.progress
        self.last = number == job.request.shots
        self.folder = job.shot_folder(number)
        """Where the result goes."""
        self.store = job.config.store if self.last else "auto"
        """How the result's blocks are stored. What later shots read keeps its dtype."""
        self.correction = job.request.correction(number)
        self.pruned = job.folder / f"shot-{number:02}-pruned" if self.correction else self.folder
        """Where blocks go that are pruned but not yet corrected."""
        self.corrections = job.folder / f"shot-{number:02}-corrections"
        """Where the correction keeps its states."""

    # The model.

    @cached_property
    def skeleton(self) -> Skeleton:
        """The model that the shot begins with. Once the shot is finished, the model may be removed."""
        if self.number == 1:
            return self.job.skeleton
        source = self.job.shot_folder(self.number - 1)
        config = self.job.config
        skeleton = open_skeleton(
            source, self.job.request.device, config.dtype, layout=self.job.skeleton.layout, text_only=config.text_only
        )
        skeleton.copies_ahead = self.job.skeleton.copies_ahead
        return skeleton

    @cached_property
    def sites(self) -> list[Site]:
        return self.skeleton.all_sites()

    @property
    def budget(self) -> Budget:
        """What has to be removed after this shot: every shot removes an equal part of the whole."""
        gone = self.job.skeleton.block_parameters() - self.skeleton.block_parameters()
        return self.job.request.budget(self.number / self.job.request.shots, gone)

    @property
    def experts_alike(self) -> bool:
        """Whether all experts must end with the same width."""
        return "experts" in self.skeleton.layout.alike and not self.job.recipe.writes_zeros

    # The streams.

    @cached_property
    def streams(self) -> Streams | None:
        """Streams of the prune sweep; None if it needs no activations."""
        job, recipe = self.job, self.job.recipe
        if not job.request.streams:
            return None
        apart = (
            recipe.compensation is not None
            or recipe.target is not None
            or (self.last and job.config.refinement_steps > 0)
        )
        moving = (PRUNED, DENSE) if apart else (PRUNED,)
        return Streams(self.skeleton, job.store, job.batch, moving, job.request.window)

    def prepare_streams(self, done: int) -> None:
        """Keep only what the next block to prune reads; before the first one, the pruned stream begins as the dense one."""
        assert self.streams is not None
        store = self.job.store
        first = {sweep.boundary(DENSE, 0)} if done == 0 else set()
        store.keep_only(first | {sweep.boundary(stream, done) for stream in self.streams.into(done)})
        if done == 0:
            self.ensure_embedded()
            store.link(sweep.boundary(DENSE, 0), sweep.boundary(PRUNED, 0))

    def embed(self) -> None:
        """Write the first block's input."""
        job = self.job
        sweep.embed(self.skeleton, job.tokens[job.part], job.store, sweep.boundary(DENSE, 0), job.batch)

    def ensure_embedded(self) -> None:
        """Write the first block's input unless it is usable (see `ActivationStore.usable`)."""
        ensure(self.job.store, sweep.boundary(DENSE, 0), self.embed)

    def ensure_survey_embedded(self) -> None:
        """Write the first block's input for the survey's text unless it is usable."""
        job, name = self.job, sweep.boundary(DENSE, 0)
        tokens, store = job.survey_tokens[job.survey_part], job.survey_store
        ensure(store, name, lambda: sweep.embed(self.skeleton, tokens, store, name, job.batch))

    # The journal.

    def named(self, step: str) -> str:
        return f"shot-{self.number}/{step}"

    def record(self, step: str, **data: Any) -> Entry:
        return self.job.journal.append(self.named(step), **data)

    def journalled(self, step: str) -> Entry | None:
        """The entry of a finished step of this shot; None if the step is not finished."""
        return self.job.journal.find(self.named(step))

    def steps(self, prefix: str) -> list[Entry]:
        """All finished steps of this shot whose name begins with `prefix`."""
        return list(self.job.journal.steps(self.named(prefix)))

    @property
    def finished(self) -> Entry | None:
        """The journal's entry for the whole shot, with the number of removed parameters and the result's digests."""
        return self.journalled("finished")

    @property
    def shards(self) -> dict[str, str]:
        """The digests of the pruned blocks' shards, by file name."""
        lines = enumerate(self.steps("prune/"))
        return {write.block_shard(self.skeleton, index): line["sha256"] for index, line in lines}

    @property
    def reports(self) -> list[dict[str, Any]]:
        """The report of each site, as far as blocks are pruned."""
        return [report for step in self.steps("prune/") for report in step["sites"]]

    @property
    def after(self) -> list[Site]:
        """The sites once all blocks are pruned."""
        return [site.keeping(report["kept"]) for site, report in zip(self.sites, self.reports, strict=True)]

    @property
    def removed(self) -> int:
        """Parameters removed or zeroed so far, by earlier shots too."""
        gone = self.job.skeleton.block_parameters() - self.skeleton.block_parameters()
        for site, report in zip(self.sites, self.reports, strict=True):
            gone += site.removed(report["kept"]) + report.get("zeros", 0)
        return gone

    # The findings.

    def survey_path(self, index: int) -> Path:
        return self.job.folder / survey_name(index)

    @property
    def survey(self) -> Survey:
        """The findings on the disk; empty without a survey."""
        return SurveyFiles(self.job.folder, self.sites) if self.job.request.surveys else {}
