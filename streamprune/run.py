"""The steps of a job: survey → allocate → prune sweep → write, from wherever its journal says.

A step counts once it is journalled, and what a step needs is removed only after the line that makes it
unneeded. So a job killed at any instant goes on from the last line and ends with the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from . import files, machine, output
from .config import Config
from .errors import ConfigError, NumericalError, ResumeError
from .host import return_freed_memory
from .job import Job
from .journal import Entry
from .maths.stats import MaskGradient
from .memory import Resources
from .meter import metered, totals
from .methods.plan import Plan
from .model.checkpoint import read_json, write_shard
from .progress import Progress
from .stream import sweep
from .surgery import DENSE, PRUNED, Surgeon

GRADIENT = "gradient"


@dataclass(frozen=True)
class Result:
    """What a job did."""

    out: str
    recipe: str
    ratio_requested: float
    ratio_blocks: float
    """Share of the blocks' parameters that went."""
    ratio_model: float
    """Share of the whole model's parameters that went."""
    parameters_before: int
    parameters_after: int
    operations: int
    """Floating-point operations of the whole job, as `maths.operations` counts them."""
    forward_equivalents: float
    """The same in dense forward passes over the calibration set."""
    seconds: float
    """Of this process."""
    peak_device_bytes: int
    peak_host_bytes: int
    bytes_read: int
    """From the checkpoint, by this process."""
    resumed: bool
    """Whether an earlier process had done some of the work."""


def prune(config: Config, *, restart: bool = False, progress: Progress | None = None) -> Result:
    """Prune a checkpoint directory into another one; a job that was interrupted goes on.

    Args:
        restart: throw away what an earlier job of the same `out` left, its result too.

    Raises:
        StreamPruneError: see `errors`; `out` is then as it was.
    """
    started = time.monotonic()
    job = Job(config, progress)
    finished = job.result_there(restart)
    if finished is None:
        with job.opened(restart), metered(job.journal, started):
            finished = Run(job).work()
    return _result(job, finished, time.monotonic() - started)


def plan_only(config: Config, *, restart: bool = False, progress: Progress | None = None) -> Path:
    """Do what comes before the prune sweep and stop: returns the plan file, inside the job's folder.

    `prune` with the same config goes on from there; with `plan` set to an edited copy, by that.
    """
    started = time.monotonic()
    job = Job(config, progress)
    if job.result_there(restart) is not None:
        raise ConfigError(f"{config.out} is finished; --restart starts over")
    with job.opened(restart), metered(job.journal, started):
        Run(job).prepare()
    return job.plan_path


def forecast_job(config: Config) -> Resources:
    """What the job would take, and whether it fits; nothing is written."""
    return Job(config, None).forecast()


def _result(job: Job, report: Mapping[str, Any], seconds: float) -> Result:
    """The report's figures with this process's own."""
    return Result(
        out=job.out_given,
        **{name: report[name] for name in output.FIGURES},
        seconds=round(seconds, 3),
        peak_device_bytes=machine.peak_device_bytes(job.device),
        peak_host_bytes=machine.peak_host_bytes(),
        bytes_read=job.skeleton.checkpoint.bytes_read,
        resumed=job.resumed,
    )


class Run:
    """The steps of an opened job, from wherever its journal says."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.journal, self.skeleton, self.progress = job.journal, job.skeleton, job.progress

    def work(self) -> Entry:
        """Everything from wherever the journal says to the finished OUT; returns the report."""
        complete = self.journal.find("complete")
        if complete is None:
            plan = self.prepare()
            self._prune(plan)
            report = self._finish(plan)
            self.journal.append("complete")
        else:
            folder = self.job.staging if self.job.staging.is_dir() else self.job.config.out
            report = read_json(folder / output.REPORT)
        if self.job.staging.is_dir():
            self.job.make_way()
            files.publish(self.job.staging, self.job.config.out)
        self.job.clear()
        return report

    def prepare(self) -> Plan:
        """Survey and allocate, as far as that is not done."""
        if self.job.needs_text and self.job.config.calibration is None:
            self.progress.say(
                "no --calibration given: using the built-in English sample; text of your own domain does better"
            )
        if self.job.needs_text and not self.journal.find("embed"):
            store, size = self.job.store, self.job.batch
            sweep.embed(self.skeleton, self.job.tokens, store, sweep.boundary(DENSE, 0), size)
            self.journal.append("embed")
        return self._allocate()

    def _survey(self) -> dict[str, MaskGradient]:
        """Mask gradients of every site of the dense model, by a forward and a backward sweep."""
        skeleton, store, journal, depth = self.skeleton, self.job.store, self.journal, len(self.skeleton)
        forward = len(list(journal.steps("forward/")))
        backward = len(list(journal.steps("backward/")))
        self.progress.phase("survey", 2 * depth, forward + backward)
        if not journal.find("head"):
            store.keep_only(
                {
                    sweep.boundary(DENSE, i)
                    for i in range(forward + 1)
                    if i % self.job.boundary_every == 0 or i == forward
                }
            )
            for index in sweep.forward(skeleton, store, DENSE, forward, depth, self.job.batch):
                journal.append(f"forward/{index}")
                if index % self.job.boundary_every:
                    store.remove(sweep.boundary(DENSE, index))
                self.progress.step(f"forward, block {index}")
            sweep.head_gradient(skeleton, store, self.job.tokens, self.job.batch)
            journal.append("head")
        first = depth - 1 - backward
        inputs = {sweep.boundary(DENSE, index) for index in range(max(first, 0) + 1)}
        store.keep_only({sweep.boundary(GRADIENT, first + 1)} | inputs)
        while first >= 0:
            lowest = self._recompute(first)
            for index, block in sweep.blocks(skeleton, range(first, lowest - 1, -1)):
                stats = [MaskGradient(site.units, site.width) for site in skeleton.sites(index)]
                sweep.backward_block(skeleton, block, index, store, stats, self.job.backward_batch)
                del block
                return_freed_memory()
                self._save_survey(index, stats)
                journal.append(f"backward/{index}")
                store.remove(sweep.boundary(GRADIENT, index + 1))
                if index:
                    store.remove(sweep.boundary(DENSE, index))
                self.progress.step(f"backward, block {index}")
            first = lowest - 1
        return self._load_survey()

    def _recompute(self, index: int) -> int:
        """See that a block's input is there; returns the lowest block down to which all inputs are."""
        skeleton, store = self.skeleton, self.job.store
        there = index
        while sweep.boundary(DENSE, there) not in store:
            there -= 1
            if there < 0:
                raise ResumeError(f"{self.job.cache} has lost its activations; start over with --restart")
        for _ in sweep.forward(skeleton, store, DENSE, there, index, self.job.batch):
            pass
        while there and sweep.boundary(DENSE, there - 1) in store:
            there -= 1
        return there

    def _survey_path(self, index: int) -> Path:
        return self.job.folder / f"survey-{index:04}.safetensors"

    def _save_survey(self, index: int, stats: list[MaskGradient]) -> None:
        tensors = {f"{position}.{name}": t for position, stat in enumerate(stats) for name, t in stat.tensors().items()}
        for tensor in tensors.values():
            if not bool(torch.isfinite(tensor).all()):
                raise NumericalError(f"block {index}: a mask gradient is NaN or Inf")
        write_shard(self._survey_path(index), tensors)

    def _load_survey(self) -> dict[str, MaskGradient]:
        survey = {}
        for index in range(len(self.skeleton)):
            tensors = load_file(self._survey_path(index))
            for position, site in enumerate(self.skeleton.sites(index)):
                prefix = f"{position}."
                own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
                survey[site.name] = MaskGradient.from_tensors(own)
        return survey

    def _allocate(self) -> Plan:
        """The plan that holds: the one journalled, the one given, or a new one."""
        chosen = self.journal.find("allocate")
        begun = any(True for _ in self.journal.steps("prune/"))
        if self.job.given_plan is not None:
            if chosen is None or chosen["plan"] != self.job.given_plan.digest():
                if chosen is not None and begun:
                    raise ResumeError(
                        f"plan is {self.job.given_plan.digest()}; this job is pruning by {chosen['plan']}; --restart starts over"
                    )
                return self._choose(self.job.given_plan, given=True)
        elif chosen is not None and chosen["given"]:
            raise ResumeError(f"plan is not given; this job goes by the plan {chosen['plan']}; --restart starts over")
        elif chosen is None:
            survey = self._survey() if self.job.surveys else {}
            return self._choose(
                self.job.recipe.allocate(self.job.settings, self.job.sites, survey, self.job.budget), given=False
            )
        plan = Plan.read(self.job.plan_path)
        if plan.digest() != chosen["plan"]:
            raise ResumeError(f"{self.job.plan_path} was changed; pass a copy of it with --plan")
        return plan

    def _choose(self, plan: Plan, *, given: bool) -> Plan:
        plan.check(self.job.sites, "the plan")
        files.write_text(self.job.plan_path, plan.to_json())
        self.journal.append("allocate", plan=plan.digest(), given=given)
        return plan

    def _prune(self, plan: Plan) -> None:
        skeleton, journal, depth = self.skeleton, self.journal, len(self.skeleton)
        done = len(list(journal.steps("prune/")))
        surgeon = Surgeon(
            skeleton=skeleton,
            recipe=self.job.recipe,
            settings=self.job.settings,
            plan=plan,
            store=self.job.store if self.job.streams else None,
            batch=self.job.batch,
            seed=self.job.config.seed,
        )
        self.progress.phase("prune", depth, done)
        if surgeon.store is not None:
            first = {sweep.boundary(DENSE, 0)} if done == 0 else set()
            surgeon.store.keep_only(first | {sweep.boundary(stream, done) for stream in surgeon.streams})
            if done == 0:
                surgeon.store.link(sweep.boundary(DENSE, 0), sweep.boundary(PRUNED, 0))
        for index, block in sweep.blocks(skeleton, range(done, depth)):
            pruned, reports = surgeon.operate(block, index)
            names = skeleton.block_names(index)
            shard = self.job.staging / output.block_shard(skeleton, index)
            write_shard(shard, {full: pruned.weights[name] for name, full in names.items()})
            journal.append(f"prune/{index}", sites=reports)
            del block, pruned
            return_freed_memory()
            for stream in (DENSE, PRUNED) if surgeon.store is not None else ():
                self.job.store.remove(sweep.boundary(stream, index))
            self.progress.step(f"block {index}: " + ", ".join(f"{r['kept']} of {r['units']}" for r in reports))

    def _finish(self, plan: Plan) -> Entry:
        skeleton = self.skeleton
        reports = [report for step in self.journal.steps("prune/") for report in step["sites"]]
        after = [site.keeping(plan[site.name].keep) for site in self.job.sites]
        removed = plan.removed_parameters(self.job.sites)
        before = skeleton.parameters()
        spent = totals(self.journal)
        report: dict[str, Any] = {
            "recipe": self.job.recipe.name,
            "ratio_requested": self.job.ratio,
            "ratio_blocks": removed / skeleton.block_parameters(),
            "ratio_model": removed / before,
            "parameters_before": before,
            "parameters_after": before - removed,
            "batch": self.job.batch,
            "plan": plan.digest(),
            "plan_given": plan.digest() if self.job.given_plan else None,
            "job": self.job.header,
            "sites": reports,
            "forward_equivalents": round(spent["operations"] / self.job.forward_operations, 4),
            **spent,
        }
        output.write_outside(skeleton, self.job.staging)
        output.finish(skeleton, self.job.staging, after, report, self.job.config.model.resolve().name)
        return report
