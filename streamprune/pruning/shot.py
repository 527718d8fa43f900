"""One shot: a checkpoint directory in, a smaller checkpoint directory out; survey → allocate → prune sweep → write.

A step counts once it is journalled, and what a step needs is removed only after the line that makes it unneeded. So a
job killed at any instant goes on from the last line and ends with the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DiskError, NumericalError, ResumeError
from ..jobs.journal import Entry
from ..jobs.meter import OWN, as_entry, share_of
from ..jobs.reports import extents, pruning_card
from ..maths.flops import KINDS, Kind, counting, kind
from ..maths.refit import all_finite
from ..maths.sums import GRADIENTS, SiteStatistics, Statistic
from ..model import hub, write
from ..model.block import Block, Prunable
from ..model.checkpoint import Shard, write_shard
from ..model.names import CURVES
from ..model.site import Site
from ..model.skeleton import Skeleton, open_skeleton
from ..recipes.allocation import Budget
from ..recipes.plan import Plan
from ..recipes.recipe import Correction, Findings, Survey, Surveyed
from ..stream import sweep
from ..system import files
from ..system.host import return_freed_memory
from ..system.progress import rest
from ..system.strict_json import read_json, write_json
from ..system.units import format_bytes
from .block import DENSE, PRUNED, BlockPruner, Streams
from .correct import Corrector
from .curves import write_curves
from .job import Job
from .refine import Refinement
from .solve import CPU, SEEN, SiteSolver, left_alone, tokens_seen

GRADIENT = "gradient"
COST, DIGESTS = "cost.json", "sha256"
"""Beside a survey that is shared: what it took, and the files' digests among that."""


@dataclass(frozen=True)
class Asker:
    """A job that has its first survey from another one's sweep."""

    job: Job
    shared: Path
    """Where it will look."""
    maker: Job

    @property
    def folder(self) -> Path:
        """Where it is made."""
        return self.shared.with_name(f"{self.shared.name}-{self.maker.own}{files.TEMPORARY}")

    def findings(self, index: int) -> Path:
        """Of a block."""
        return self.folder / f"survey-{index:04}.safetensors"


class Shot:
    """The steps of one shot of an opened job, from wherever its journal says.

    Args:
        number: from 1 to `Job.shots`.
    """

    def __init__(self, job: Job, number: int) -> None:
        self.job, self.number = job, number
        self.ranks = job.ranks
        self.progress = job.progress
        self.last = number == job.shots
        self.folder = job.shot_folder(number)
        """Where the result goes."""
        self.correction = job.recipe.correction(job.settings)
        self.pruned = job.folder / f"shot-{number:02}-pruned" if self.correction else self.folder
        """Where blocks go that are pruned, but not yet corrected."""

    @cached_property
    def skeleton(self) -> Skeleton:
        """The model it begins with: of a shot that is finished, it may be gone."""
        if self.number == 1:
            return self.job.skeleton
        source = self.job.shot_folder(self.number - 1)
        skeleton = open_skeleton(source, self.job.device, self.job.dtype, layout=self.job.skeleton.layout)
        skeleton.copies_ahead = self.job.skeleton.copies_ahead
        return skeleton

    @cached_property
    def sites(self) -> list[Site]:
        """That model's sites."""
        return self.skeleton.all_sites()

    @property
    def finished(self) -> Entry | None:
        """The journal's entry, once the result is whole; what it removed is in it."""
        return self.journalled("finished")

    def work(self) -> None:
        """Everything from wherever the journal says to the finished directory."""
        plan = self.prepare()
        if not self.journalled("pruned"):
            self._prune(plan)
            lines = enumerate(self.steps("prune/"))
            shards = {write.block_shard(self.skeleton, index): line["sha256"] for index, line in lines}
            self.record("pruned", sha256=self._write(plan, self.pruned, shards))
        pruned = self.journalled("pruned")
        assert pruned is not None
        digests = pruned["sha256"] if self.correction is None else self._correct(plan, self.correction)
        self.record("finished", removed=self._removed(), sha256=digests)
        if self.correction is not None and self.ranks.first:
            files.remove_tree(self.pruned)
            files.remove_tree(self.corrections)

    def prepare(self) -> Plan:
        """Survey and allocate, as far as that is not done."""
        if self.job.needs_text and not self.journalled("embed"):
            self._embed()
            self.record("embed")
        if self.job.surveys and not self.journalled("allocate"):
            self._survey()
        return self._allocate()

    def _embed(self) -> None:
        job = self.job
        sweep.embed(self.skeleton, job.tokens[job.part], job.store, sweep.boundary(DENSE, 0), job.batch)

    def _embed_again(self) -> None:
        """See that the first block's input is there, which nothing is gone back for."""
        if not self.job.store.intact(sweep.boundary(DENSE, 0)):
            self._embed()

    @cached_property
    def streams(self) -> Streams:
        """Those of the prune sweep."""
        recipe, settings = self.job.recipe, self.job.settings
        apart = recipe.compensation(settings) is not None or recipe.target(settings) is not None
        moving = (PRUNED, DENSE) if apart or (self.last and self.job.config.refine) else (PRUNED,)
        return Streams(moving if self.job.streams else (), self.job.window)

    # The journal, as far as it speaks of this shot.

    def named(self, step: str) -> str:
        """What the journal calls a step of this shot."""
        return f"shot-{self.number}/{step}"

    def record(self, step: str, **data: Any) -> Entry:
        """Record a step of this shot as finished."""
        return self.job.journal.append(self.named(step), **data)

    def journalled(self, step: str) -> Entry | None:
        """A finished step of this shot."""
        return self.job.journal.find(self.named(step))

    def steps(self, prefix: str) -> list[Entry]:
        """All finished steps of this shot whose name begins with `prefix`."""
        return list(self.job.journal.steps(self.named(prefix)))

    # The survey.

    def _survey(self) -> None:
        """The recipe's findings at every site of the model, by a forward and, for gradients, a backward sweep."""
        job = self.job
        shared = job.shared_survey(job.sizes) if self.number == 1 else None
        if shared is not None and not self.steps("forward/") and shared.is_dir():
            self._take(shared)
        if not self.journalled("surveyed"):
            for asker in self.asking:
                if not self.steps("forward/"):
                    files.remove_tree(asker.folder)
                files.make_folder(asker.folder)
            if job.statistics & GRADIENTS:
                self._survey_backward()
            else:
                self._survey_forward()
            self.record("surveyed")
            if shared is not None:
                own = Asker(job, shared, job)
                self._link(own)
                for asker in (own, *self.asking):
                    self._share(asker)

    def _take(self, shared: Path) -> None:
        """Have another job's findings for this one's, if they are as they were written."""
        cost = read_json(shared / COST)
        digests = cost.pop(DIGESTS)
        for index, digest in enumerate(digests):
            if not files.holds(shared / self.survey_path(index).name, digest):
                files.remove_tree(shared)
                return
            files.link(shared / self.survey_path(index).name, self.survey_path(index))
        self.record("surveyed", spared=cost, sha256=digests)

    @cached_property
    def asking(self) -> list[Asker]:
        """Other jobs whose surveys are made in passing: those that this sweep would give to the last bit what their own would.

        Where the sums for all do not fit the memory, those that would be too much survey by themselves.
        """
        job = self.job
        own = job.shared_survey(job.sizes)
        if self.number > 1 or own is None or not job.statistics or job.writes_text:
            return []
        found: list[Asker] = []
        sweep_of_all, needs, taken = job.first_sweep(job.sizes), job.needs, {own}
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
                self.progress.say(
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

    def _link(self, own: Asker) -> None:
        """Have this job's own findings among those that are shared."""
        files.remove_tree(own.folder)
        files.make_folder(own.folder)
        for index in range(len(self.skeleton)):
            files.link(self.survey_path(index), own.findings(index))

    def _share(self, asker: Asker) -> None:
        """Leave a survey for other jobs, if it is whole: a process that was killed may have made some of it for fewer."""
        lines = [line for part in ("forward/", "head", "backward/") for line in self.steps(part)]
        whose = OWN if asker.job is self.job else asker.shared.name
        if not all(asker.findings(index).exists() for index in range(len(self.skeleton))) or not all(
            whose in line["parts"] for line in lines if "parts" in line
        ):
            return
        digests = [line["parts"][whose]["sha256"] if "parts" in line else line["sha256"] for line in self.survey_lines]
        spent = [share_of(line, whose) for line in lines]
        kinds = {kind: sum(each["operations_by_kind"][kind] for each in spent) for kind in KINDS}
        cost = {**as_entry(kinds), "seconds": sum(each["seconds"] for each in spent)}
        write_json(asker.folder / COST, {**cost, DIGESTS: digests})
        try:
            files.publish(asker.folder, asker.shared)
        except DiskError:
            if not asker.shared.is_dir():
                raise
            files.remove_tree(asker.folder)  # another job was first

    @property
    def survey_lines(self) -> list[Entry]:
        """The steps that left findings, a block's each, in the order of blocks."""
        lines = [line for part in ("forward/", "backward/") for line in self.steps(part) if "sha256" in line]
        return sorted(lines, key=lambda line: int(line["step"].rpartition("/")[2]))

    @property
    def survey(self) -> Survey:
        """The findings on the disk; empty where there was no survey."""
        return SurveyFiles(self.skeleton, self.survey_path) if self.job.surveys else {}

    def _survey_forward(self) -> None:
        skeleton, depth = self.skeleton, len(self.skeleton)
        store = self.job.store
        done = len(self.steps("forward/"))
        moves = bool(self.job.statistics)  # else it is the weights alone that are looked at
        self.progress.phase("survey", depth, done)
        if moves:
            store.keep_only({sweep.boundary(DENSE, 0), sweep.boundary(DENSE, done)})
            if not done:
                self._embed_again()
        for index, block in sweep.blocks(skeleton, range(done, depth)):
            stats = self._empty_statistics(index)
            if moves:
                sweep.survey_block(skeleton, block, index, store, stats, self.job.batch)
            parts = self._save_findings(index, block, stats)
            del block, stats
            self.record(f"forward/{index}", **parts)
            if moves and index:
                store.remove(sweep.boundary(DENSE, index))
            self.progress.step(f"block {index}")

    def _survey_backward(self) -> None:
        skeleton, store, depth = self.skeleton, self.job.store, len(self.skeleton)
        forward, backward = len(self.steps("forward/")), len(self.steps("backward/"))
        self.progress.phase("survey", 2 * depth, forward + backward)
        if not self.journalled("head"):
            kept = {i for i in range(forward + 1) if i % self.job.boundary_every == 0 or i == forward}
            store.keep_only({sweep.boundary(DENSE, i) for i in kept})
            if not forward:
                self._embed_again()
            for index in sweep.forward(skeleton, store, DENSE, forward, depth, self.job.batch):
                self.record(f"forward/{index}")
                if index % self.job.boundary_every:
                    store.remove(sweep.boundary(DENSE, index))
                self.progress.step(f"forward, block {index}")
            tokens = self.job.tokens[self.job.part]
            sweep.head_gradient(skeleton, store, tokens, self.job.batch, uniform=self._uniform())
            self.record("head")
        first = depth - 1 - backward
        inputs = {sweep.boundary(DENSE, index) for index in range(max(first, 0) + 1)}
        store.keep_only({sweep.boundary(GRADIENT, first + 1)} | inputs)
        while first >= 0:
            lowest = self._recompute(first)
            for index, block in sweep.blocks(skeleton, range(first, lowest - 1, -1)):
                stats = self._empty_statistics(index)
                sweep.backward_block(skeleton, block, index, store, stats, self.job.backward_batch)
                parts = self._save_findings(index, block, stats)
                del block, stats
                self.record(f"backward/{index}", **parts)
                store.remove(sweep.boundary(GRADIENT, index + 1))
                if index:
                    store.remove(sweep.boundary(DENSE, index))
                self.progress.step(f"backward, block {index}")
            first = lowest - 1

    def _empty_statistics(self, index: int) -> list[SiteStatistics]:
        return self.skeleton.statistics(index, self.statistics, CPU if self.job.grams == "host" else None)

    def _uniform(self) -> Tensor | None:
        """What the model's own labels are drawn with, where the recipe wants them."""
        if not self.job.recipe.draws_labels(self.job.settings):
            return None
        generator = torch.Generator().manual_seed(self.job.config.seed)
        return torch.rand(self.job.tokens.shape, generator=generator, dtype=torch.float64)[self.job.part]

    def _recompute(self, index: int) -> int:
        """See that a block's input is there; returns the lowest block down to which all inputs are."""
        skeleton, store = self.skeleton, self.job.store
        there = index
        while there and not store.intact(sweep.boundary(DENSE, there)):
            there -= 1
        if not there:
            self._embed_again()
        for _ in sweep.forward(skeleton, store, DENSE, there, index, self.job.batch):
            pass
        while there and store.intact(sweep.boundary(DENSE, there - 1)):
            there -= 1
        return there

    def survey_path(self, index: int) -> Path:
        """Where the findings of a block lie."""
        return self.job.folder / f"survey-{index:04}.safetensors"

    @torch.no_grad()
    @kind("solving")
    def _save_findings(self, index: int, block: Block, stats: list[SiteStatistics]) -> Entry:
        """Write what is kept of a block's sums, for this job and for those that ask; what of the step was for which."""
        for number, statistics in enumerate(stats):
            statistics.across(self.ranks.add_up(self.ranks.owner(number)))
        own = {number: statistics for number, statistics in enumerate(stats) if self.ranks.mine(number)}
        stats.clear()
        if self.job.grams == "parked":
            for statistics in own.values():
                statistics.park()
        return_freed_memory()  # of the sweep
        makers = {OWN: (self.job, self.survey_path(index))}
        makers |= {asker.shared.name: (asker.job, asker.findings(index)) for asker in self.asking}
        kinds: dict[str, dict[Kind, int]] = {name: dict.fromkeys(("sums", "solving"), 0) for name in makers}
        seconds = dict.fromkeys(makers, 0.0)

        def digest(number: int) -> tuple[list[tuple[str, str]], list[Tensor]]:
            statistics = own.pop(number)  # so that no sum outlives its site
            found: dict[tuple[str, str], Tensor] = {}
            for name, (job, _) in makers.items():
                started = time.monotonic()
                kinds[name]["sums"] += statistics.operations(job.statistics)
                with counting() as counter:
                    part = statistics.part(job.statistics) if self.asking else statistics
                    digested = self._digest(job, block.prunables[number], part)
                found |= {(name, place): tensor for place, tensor in digested.items()}
                kinds[name]["solving"] += counter.total
                seconds[name] += time.monotonic() - started
            return list(found), list(found.values())

        tensors: dict[str, dict[str, Tensor]] = {name: {} for name in makers}
        for _, names, found in self.ranks.spread(range(len(block.prunables)), digest, CPU):
            for (name, place), tensor in zip(names, found, strict=True):
                if self.ranks.first:
                    tensors[name][place] = tensor
        digests: dict[str, str] = {}
        for name, (_, path) in makers.items() if self.ranks.first else ():
            for place, tensor in tensors[name].items():
                if not all_finite(tensor):
                    raise NumericalError(f"block {index}: the survey's {place} is NaN or Inf")
            digests[name] = write_shard(path, tensors[name])
        if not self.asking:
            return {"sha256": digests.get(OWN)}
        parts = {
            name: {"operations_by_kind": kinds[name], "seconds": round(seconds[name], 3), "sha256": digests[name]}
            for name in makers
        }
        return {"parts": parts, "sha256": digests[OWN]}

    def _digest(self, job: Job, prunable: Prunable, statistics: SiteStatistics) -> dict[str, Tensor]:
        """What a job's recipe keeps of a site's sums, by its name in the file."""
        site = prunable.site
        where = CPU if self.job.grams == "host" else self.job.device
        surveyed = Surveyed(
            site=site,
            w=prunable.weight(prunable.consumer).to(where),
            read_producers=lambda: tuple(w.to(where) for w in prunable.producer_weights()),
            statistics=statistics,
        )
        findings = job.recipe.digest(job.settings, surveyed)
        if site.expert is not None and job.statistics:
            findings[SEEN] = torch.tensor(statistics.seen)
        return {f"{site.place}.{name}": tensor.cpu() for name, tensor in findings.items()}

    # The plan.

    def _allocate(self) -> Plan:
        """The plan that holds: the one journalled, the one given, or a new one."""
        job, chosen = self.job, self.journalled("allocate")
        if job.given_plan is not None:
            if chosen is None or chosen["plan"] != job.given_plan.digest():
                if chosen is not None and self.steps("prune/"):
                    raise ResumeError(
                        f"plan is {job.given_plan.digest()}; this job is pruning by {chosen['plan']}; --restart starts over"
                    )
                return self._choose(job.given_plan, given=True)
        elif chosen is not None and chosen["given"]:
            raise ResumeError(f"plan is not given; this job goes by the plan {chosen['plan']}; --restart starts over")
        elif chosen is None:
            allocated = self.ranks.told(
                lambda: job.allocate(self.sites, self._reached(), self.survey, self.budget).to_json()
            )
            return self._choose(Plan.parse(allocated, "the plan"), given=False)
        plan = Plan.read(job.plan_path)
        if plan.digest() != chosen["plan"]:
            raise ResumeError(
                f"{job.plan_path} was changed; pass a copy of it with --plan, or remove it to have it made anew"
            )
        return plan

    def _reached(self) -> list[Site]:
        """The sites but for experts that saw fewer tokens than they have channels, which keep everything."""
        survey, sites = self.survey, []
        for site in self.sites:
            seen = tokens_seen(site, survey)
            if seen is not None and left_alone(site, seen, alike=self._experts_alike):
                self.progress.say(f"{site.name} saw {seen} tokens and is left alone")
            else:
                sites.append(site)
        return sites

    @property
    def _experts_alike(self) -> bool:
        """Whether all experts must end with one width."""
        return "experts" in self.skeleton.layout.alike and not self.job.recipe.writes_zeros(self.job.settings)

    @property
    def budget(self) -> Budget:
        """What is to be gone after this shot: an equal part of the whole in every shot."""
        gone = self.job.skeleton.block_parameters() - self.skeleton.block_parameters()
        return self.job.budget(self.number / self.job.shots, gone)

    def _choose(self, plan: Plan, *, given: bool) -> Plan:
        plan.check(self.sites, "the plan")
        if self.ranks.first:
            files.write_text(self.job.plan_path, plan.to_json())
        self.record("allocate", plan=plan.digest(), given=given)
        return plan

    # The prune sweep and the result.

    def _prune(self, plan: Plan) -> None:
        job, skeleton, depth = self.job, self.skeleton, len(self.skeleton)
        done = len(self.steps("prune/"))
        refinement = None
        if self.last and job.config.refine:
            zeros = job.recipe.writes_zeros(job.settings)
            refinement = Refinement(job.config.refine, job.config.seed, job.backward_batch, keeps_zeros=zeros)
        pruner = BlockPruner(
            skeleton=skeleton,
            solver=SiteSolver(
                recipe=job.recipe,
                settings=job.settings,
                plan=plan,
                survey=self.survey,
                seed=job.config.seed,
                experts_alike=self._experts_alike,
                device=skeleton.device,
                grams=job.grams,
            ),
            store=job.store if job.streams else None,
            batch=job.batch,
            streams=self.streams,
            refinement=refinement,
            ranks=self.ranks,
        )
        if self.ranks.first:
            files.make_folder(self.pruned)
        self.progress.phase("prune", depth, done)
        if pruner.store is not None:
            first = {sweep.boundary(DENSE, 0)} if done == 0 else set()
            pruner.store.keep_only(first | {sweep.boundary(stream, done) for stream in self.streams.into(done)})
            if done == 0:
                self._embed_again()
                pruner.store.link(sweep.boundary(DENSE, 0), sweep.boundary(PRUNED, 0))
        for index, block in sweep.blocks(skeleton, range(done, depth)):
            pruned, reports = pruner.prune(block, index)
            names = skeleton.block_names(index)
            shard = self.pruned / write.block_shard(skeleton, index)
            digest = None
            if self.ranks.first:
                digest = write_shard(shard, {full: pruned.weights[name] for name, full in names.items()})
            self.record(f"prune/{index}", sites=reports, sha256=digest)
            del block, pruned
            for stream in (DENSE, PRUNED) if pruner.store is not None else ():
                job.store.remove(sweep.boundary(stream, index))
            for report in reports:
                if report.get("left_alone"):
                    self.progress.say(f"{report['site']} saw {report['tokens']} tokens and is left alone")
            shares = ", ".join(f"{part:,} of {whole:,}" for part, whole in extents(reports))
            self.progress.step(f"block {index}: {shares}")

    @property
    def corrections(self) -> Path:
        """Where the correction keeps its states."""
        return self.job.folder / f"shot-{self.number:02}-corrections"

    @kind("training")
    def _correct(self, plan: Plan, how: Correction) -> dict[str, str]:
        """The first rank's work alone, since a step takes a handful of samples; returns the digests of what it wrote."""
        job, depth = self.job, len(self.skeleton)
        if not self.ranks.first:
            for step in range(len(self.steps("correct/")), how.steps):
                self.record(f"correct/{step}")
            return {}
        files.make_folder(self.folder)
        skeleton = open_skeleton(self.pruned, job.device, job.dtype, layout=job.skeleton.layout)
        journalled = self.steps("correct/")
        corrector = Corrector(
            skeleton,
            job.tokens,
            self.corrections,
            how,
            journalled[-1]["sha256"] if journalled else {},
            window=job.window,
            seed=job.config.seed,
            micro=job.backward_batch,
            keep_zeros=job.recipe.writes_zeros(job.settings),
        )
        self.progress.phase("correct", how.steps, len(journalled))
        for step, digests in corrector.steps(len(journalled)):
            self.record(f"correct/{step}", sha256=digests)
            self.progress.step(f"step {step}")
        shards = {}
        for index, block in sweep.blocks(skeleton, range(depth)):
            names = skeleton.block_names(index)
            corrector.absorb(block, index)
            shard = write.block_shard(skeleton, index)
            tensors = {full: block.weights[name] for name, full in names.items()}
            shards[shard] = write_shard(self.folder / shard, tensors)
            del block, tensors
            rest(self.progress)
        return self._write(plan, self.folder, shards)

    @property
    def _reports(self) -> list[dict[str, Any]]:
        """What happened at each site."""
        return [report for step in self.steps("prune/") for report in step["sites"]]

    def _removed(self) -> int:
        """Parameters that are gone, or zero, by now."""
        gone = self.job.skeleton.block_parameters() - self.skeleton.block_parameters()
        for site, report in zip(self.sites, self._reports, strict=True):
            gone += (site.units - report["kept"]) * site.unit_parameters + report.get("zeros", 0)
        return gone

    def _write(self, plan: Plan, folder: Path, shards: Mapping[str, str]) -> dict[str, str]:
        """Make a folder with the blocks' shards, whose digests are given by name, a checkpoint; returns all files' digests."""
        if not self.ranks.first:
            return {}
        reports = self._reports
        after = [site.keeping(report["kept"]) for site, report in zip(self.sites, reports, strict=True)]
        report = self.job.report(plan, reports, self._removed())
        digests = {**shards, **write.write_outside(self.skeleton, folder)}
        card = pruning_card(report, hub.title(self.job.config.model), len(self.skeleton))
        curve = self.job.recipe.curve(self.job.settings) if self.last and self.job.surveys else None
        if curve is not None:
            dense = {site.name: site.units for site in self.job.sites}
            changeable = self.job.changeable(self.sites)
            digests[CURVES] = write_curves(folder / CURVES, curve, changeable, self.survey, plan, dense)
        return write.finish(self.skeleton, folder, after, report, card, self.skeleton.layout, digests, self.progress)


class SurveyFiles(Mapping[str, Findings]):
    """A survey's findings by site name, one file a block; a tensor is read when it is asked for."""

    def __init__(self, skeleton: Skeleton, path: Any) -> None:
        self._sites = {site.name: site for site in skeleton.all_sites()}
        self._path = path

    def __getitem__(self, name: str) -> Findings:
        site = self._sites[name]
        return _FindingsFile(self._path(site.block), f"{site.place}.")

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)


class _FindingsFile(Mapping[str, Tensor]):
    def __init__(self, path: Path, prefix: str) -> None:
        self._shard, self._prefix = Shard(path), prefix

    def __getitem__(self, name: str) -> Tensor:
        return self._shard[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in self._shard if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return f"{self._prefix}{name}" in self._shard
