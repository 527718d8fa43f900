"""The whole job: each shot surveys, allocates, prunes, corrects and writes; then the result is published."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from ..errors import ConfigError
from ..jobs.config import REFINE_SEQUENCES, Config
from ..jobs.extents import extents
from ..jobs.forecast.memory import Memory
from ..jobs.forecast.resources import Resources, generation_batch
from ..jobs.journal import Entry
from ..jobs.reports import pruning_card
from ..jobs.resume import check_tokens, rewind_to_existing
from ..maths.flops import kind
from ..model import hub, write
from ..model.block import Block
from ..model.checkpoint import load_shard, write_shard
from ..model.names import CURVES
from ..recipes.plan import Plan
from ..recipes.recipe import Correction
from ..stream import sweep
from ..stream.generate import generate
from ..system import files
from ..system.progress import Progress
from ..system.ranks import ALONE, Ranks
from ..system.threads import Behind
from .aim import accepted
from .allocate import allocate
from .block import BlockPruner
from .correct import correct_blocks
from .curves import write_curves
from .job import GENERATED, WRITING, Job
from .refine import Refinement, refinement_rate
from .required import required_files
from .result import Result
from .shot import Shot
from .survey import survey


def prune(
    config: Config,
    *,
    restart: bool = False,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Result:
    """Prune a checkpoint directory into another one. An interrupted job resumes.

    Args:
        restart: discard the files of an earlier job with the same `out`, its result included.
        ranks: processes that share the job; all of them call this (see `joined`). The first one reports progress.

    Raises:
        StreamPruneError: see `errors`; `out` is then unchanged.
    """
    job = Job(config, progress, ranks)
    finished = ranks.broadcast(lambda: job.finished_report(restart))
    if finished is None:
        with job.opened(restart):
            finished = Run(job).work()
    else:
        job.tidy()
    return Result.of(job, finished)


def plan_only(config: Config, *, restart: bool = False, progress: Progress | None = None, ranks: Ranks = ALONE) -> Path:
    """Survey and allocate, then stop; return the path of the plan file, inside the job's folder.

    `prune` with the same config resumes from there. With `plan` set to an edited copy, it prunes by that copy.
    """
    job = Job(config, progress, ranks)
    if job.request.shots > 1:
        raise ConfigError(
            f"recipe {job.recipe.name} takes {job.request.shots} shots with these settings, each with its own "
            "plan; --plan-only needs one shot"
        )
    if ranks.broadcast(lambda: job.finished_report(restart)) is not None:
        raise ConfigError(f"{config.out} is finished; --restart starts over")
    with job.opened(restart):
        Run(job).prepare()
    return job.plan_path


def forecast_job(config: Config, *, progress: Progress | None = None) -> Resources:
    """Estimate what the job would take, and whether it fits. Only a model from the hub is written to disk."""
    return Job(config, progress).forecast()


class Run:
    """An opened job, from wherever its journal ends: survey, allocate, prune, correct and write, shot after shot."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def work(self) -> Entry:
        """Do everything up to the finished OUT; return the report."""
        while True:
            with self.job.smaller_batches():
                return self._work()

    def _work(self) -> Entry:
        job = self.job
        self._rewind()
        if job.journal.find("complete") is None:
            if job.request.kept is not None:
                job.progress.say(f"{job.config.layout} layout: {job.request.kept}")
            self._get_text()
            for number in range(1, job.request.shots + 1):
                shot = Shot(job, number)
                if shot.finished is None and job.request.shots > 1:
                    job.progress.say(f"shot {number} of {job.request.shots}")
                while shot.finished is None:
                    self._prune_once(shot)
                    shot = Shot(job, number)
                if number > 1 and job.ranks.first:
                    files.remove_tree(job.shot_folder(number - 1))
            finished = Shot(job, job.request.shots).finished
            assert finished is not None
            job.complete(finished["sha256"])
        return job.publish()

    def prepare(self) -> None:
        """Do what comes before the prune sweep."""
        while True:
            with self.job.smaller_batches():
                self._rewind()
                self._get_text()
                self._plan(Shot(self.job, 1))
                return

    def _rewind(self) -> None:
        rewind_to_existing(self.job.journal, lambda: required_files(self.job), self.job.progress)
        self.job.use(self.job.resources)

    # One shot.

    def _prune_once(self, shot: Shot) -> None:
        """Take a shot from wherever the journal ends to its finished directory, or to where an aim refuses the result."""
        plan = self._plan(shot)
        if not shot.journalled("pruned"):
            self._prune_blocks(shot, plan)
            shot.record("pruned", sha256=self._write(shot, plan, shot.pruned, shot.shards))
        pruned = shot.journalled("pruned")
        assert pruned is not None
        if not accepted(shot):
            return
        if shot.journalled("held-out") and shot.correction is None:  # the report says what it found
            pruned = {"sha256": self._write(shot, plan, shot.pruned, shot.shards)}
        digests = pruned["sha256"] if shot.correction is None else self._correct(shot, plan, shot.correction)
        shot.record("finished", removed=shot.removed, sha256=digests)
        if shot.correction is not None and shot.ranks.first:
            files.remove_tree(shot.pruned)
            files.remove_tree(shot.corrections)

    def _plan(self, shot: Shot) -> Plan:
        """Survey and allocate, as far as that is not done."""
        if self.job.request.needs_text and not shot.journalled("embed"):
            shot.embed()
            shot.record("embed")
        if self.job.request.surveys and not shot.journalled("allocate"):
            survey(shot)
        return allocate(shot)

    # The prune sweep.

    def _prune_blocks(self, shot: Shot, plan: Plan) -> None:
        """Prune the blocks that are not pruned yet."""
        skeleton, depth, done = shot.skeleton, len(shot.skeleton), len(shot.steps("prune/"))
        pruner = self._pruner(shot, plan)
        stock = _stock(shot, plan)
        if shot.ranks.first:
            if not done:
                files.remove_tree(shot.pruned)  # what an aim refused
            files.make_folder(shot.pruned)
        shot.progress.phase("prune", depth, done)
        if shot.streams is not None:
            shot.prepare_streams(done)
        store = "auto" if shot.correction else shot.store

        def begin(shard: Behind[str], index: int, pruned: Block) -> None:
            if shot.ranks.first:
                shard.start(partial(write.write_block, skeleton, index, pruned.weights, shot.pruned, store, stock))

        for index, block in sweep.blocks(skeleton, range(done, depth)):
            # The shard is hashed and made durable while the streams pass the block.
            with Behind[str](skeleton.device) as shard:
                pruned, reports = pruner.prune(block, index, partial(begin, shard, index))
                digest = shard.result()
            shot.record(f"prune/{index}", sites=reports, sha256=digest)
            del block, pruned, shard
            if shot.streams is not None:
                shot.streams.drop(index)
            for report in reports:
                if report.get("left_alone"):
                    shot.progress.say(f"{report['site']} saw {report['tokens']} tokens and is left alone")
            shares = ", ".join(f"{part:,} of {whole:,}" for part, whole in extents(reports))
            shot.progress.step(f"block {index}: {shares}")

    def _pruner(self, shot: Shot, plan: Plan) -> BlockPruner:
        """What prunes each block of the shot."""
        job, refinement, counts = self.job, None, None
        if shot.last and job.config.refinement_steps:
            zeros, counts = job.recipe.writes_zeros, sweep.predicting(job.windows.labels[job.part])
            refinement = Refinement(
                job.config.refinement_steps,
                job.config.seed,
                job.backward_batch,
                keeps_zeros=zeros,
                rate=refinement_rate(shot.skeleton.width),
                warmup=job.config.refinement_steps // 10,
                decay="cosine",
                sequences=REFINE_SEQUENCES,
            )
        return BlockPruner(
            skeleton=shot.skeleton,
            recipe=job.recipe,
            plan=plan,
            survey=shot.survey,
            window=job.request.window,
            streams=shot.streams,
            refinement=refinement,
            counts=counts,
            seed=job.config.seed,
            experts_alike=shot.experts_alike,
            grams=job.grams,
            ranks=shot.ranks,
        )

    # What follows it.

    @kind("training")
    def _correct(self, shot: Shot, plan: Plan, how: Correction) -> dict[str, str]:
        """Correct the pruned checkpoint into the shot's result; return the digests of all its files."""
        return self._write(shot, plan, shot.folder, correct_blocks(shot, how, _stock(shot, plan)))

    def _write(self, shot: Shot, plan: Plan, folder: Path, shards: Mapping[str, str]) -> dict[str, str]:
        """Complete a checkpoint around the blocks' shards, given as digests by name; return the digests of all files."""
        if not shot.ranks.first:
            return {}
        job, reports = self.job, shot.reports
        losses = [line["loss"] for line in shot.steps("correct/") if line["loss"] is not None]
        report = job.report(plan, reports, shot.removed, losses)
        stock = _stock(shot, plan)
        digests = {**shards, **write.write_outside(shot.skeleton, folder, stock)}
        card = partial(pruning_card, report, hub.title(job.config.model), len(shot.skeleton))
        if shot.last and job.request.surveys and job.recipe.curve_label is not None:
            dense = {site.name: site.units for site in job.request.sites}
            digests[CURVES] = write_curves(
                folder / CURVES, job.recipe, job.request.changeable(shot.sites), shot.survey, plan, dense
            )
        return write.finish(
            shot.skeleton, folder, shot.after, report, card, shot.skeleton.layout, digests, shot.progress, stock
        )

    # The text.

    def _get_text(self) -> None:
        """Say which text is used if none was given, and have the model write it if it was asked to."""
        if self.job.request.needs_text and self.job.config.calibration is None:
            self.job.progress.say(
                "no --calibration given: using the built-in English sample; text of your own domain does better"
            )
        if self.job.request.needs_text and not self.job.request.writes_text:
            assert self.job.journal.header is not None
            check_tokens(self.job.journal.header, self.job.windows.fingerprint)
        if self.job.request.writes_text and not self.job.journal.find("calibrate"):
            self._write_text()
        if self.job.request.writes_text and self.job.ranks.first:
            files.remove_tree(self.job.cache / WRITING)
            self._remove_generated()

    @kind("writing")
    def _write_text(self) -> None:
        """Generate the calibration tokens. A single generator draws them, so the first rank does it alone."""
        job, ranks = self.job, self.job.ranks

        def save(state: dict[str, Tensor]) -> None:
            path = job.folder / f"{GENERATED}{int(state['past']):06}.safetensors"
            line = path.stem, write_shard(path, state)
            ranks.broadcast(lambda: line)
            job.journal.append(line[0], sha256=line[1])
            self._remove_generated(path)

        if not ranks.first:
            while (line := ranks.broadcast(lambda: ("", ""))) != ("", ""):
                job.journal.append(line[0], sha256=line[1])
            job.journal.append("calibrate", sha256=None)
            return
        samples, length, last = job.config.samples, job.request.length, job.generated
        batch = generation_batch(Memory(job.skeleton, job.request.workload), job.batch, job.backward_batch)
        draft = generate(
            job.skeleton,
            job.request.writing,
            job.cache / WRITING,
            batch,
            job.progress,
            # Half of what a forward pass may hold: keys and values take the other half.
            chunk=max(1, job.batch * length // (2 * samples)),
            state=None if last is None else load_shard(*last),
            save=save,
        )
        # Tokens of prompts, if there are any.
        written = {} if job.config.prompts is None else {"written": draft.written.long()}
        digest = write_shard(job.written_path, {"tokens": draft.tokens, **written})
        ranks.broadcast(lambda: ("", ""))
        job.journal.append("calibrate", sha256=digest)

    def _remove_generated(self, but: Path | None = None) -> None:
        """Remove the states of the text that the model is writing, all or all but one."""
        for path in {*self.job.folder.glob(f"{GENERATED}*")} - {but}:
            files.remove(path)


def _stock(shot: Shot, plan: Plan) -> bool:
    """Return whether the plan gives a stock checkpoint. Blocks are written before it is known which sites are left alone."""
    return write.fits_stock(shot.skeleton, [site.keeping(plan[site.name].keep) for site in shot.sites])
