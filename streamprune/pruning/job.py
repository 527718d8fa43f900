"""A job: its request, its folder, and whether it may start, resume or finish.

`Job` owns the folder beside OUT with its lock and journal. `run` has the steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError, ResourceError, ResumeError
from ..jobs.config import DATA_FREE, Config, DataFree
from ..jobs.folder import JobFolder, first_difference
from ..jobs.forecast.memory import SLACK, GramPlace, Sizes, copies_ahead, device_peak
from ..jobs.forecast.needs import Needs
from ..jobs.forecast.resources import Resources, forecast
from ..jobs.journal import Entry, Journal
from ..jobs.meter import by_block, peaks, totals
from ..jobs.names import is_report
from ..jobs.schedule import Phase
from ..maths.flops import kind
from ..maths.sums import Statistic
from ..model import hub, write
from ..model.checkpoint import load_shard
from ..model.site import DECILM, LAYOUTS, UNIFORM, Site
from ..model.skeleton import Skeleton, open_skeleton
from ..model.tokenizer import check_companions, load_tokenizer
from ..recipes import RECIPES
from ..recipes.allocation import Budget
from ..recipes.plan import Plan, SitePlan
from ..recipes.recipe import Recipe, Survey
from ..recipes.settings import parse
from ..stream.store import ActivationStore
from ..system import files, machine
from ..system.progress import Progress
from ..system.ranks import ALONE, Ranks
from ..system.units import format_bytes
from ..text import windows
from ..text.source import Text, builtin_text
from ..text.windows import text_identity
from .shortfall import Goal, largest_unit

PLAN, WRITTEN = "plan.json", "calibration.safetensors"


class Job(JobFolder):
    """One job: everything that a first and a resumed process need to know.

    Args:
        ranks: processes that share the job.

    Raises:
        StreamPruneError: any error that can be found before the work starts.
    """

    known: ClassVar = JobFolder.known | {PLAN, WRITTEN}
    known_prefixes: ClassVar = (*JobFolder.known_prefixes, "survey-", "shot-")

    def __init__(self, config: Config, progress: Progress | None, ranks: Ranks = ALONE) -> None:
        # Parse.
        self.out_given = str(config.out)
        self.recipe: Recipe[Any] = RECIPES[config.recipe](parse(config.recipe, config.settings))
        if config.samples < ranks.size:
            raise ConfigError(f"samples is {config.samples}; {ranks.size} processes need one each at least")
        # Open.
        self.device = machine.resolve_device(config.device, ranks)
        model = hub.resolve_model(config.model, progress)
        self.config = config = replace(config, model=model, out=config.out.absolute())
        self.dtype = config.dtype
        self.skeleton: Skeleton = open_skeleton(config.model, self.device, self.dtype, layout=LAYOUTS[config.layout])
        stored = self.skeleton.checkpoint.dtype
        self.activations = machine.resolve_activations(config.activations, self.skeleton.dtype, stored)
        self.peaks = machine.Peaks(self.device)
        self.sites = self.skeleton.all_sites()
        # Check.
        self._check_layout()
        self.window = self._window()
        self.given_plan = self._given_plan()
        self.ratio = self._agreed_ratio()
        self.shots = 1 if self.given_plan else self.recipe.shots(self.ratio)
        self.length = windows.window_length(config.seq_len, self.skeleton.context) if self.needs_text else 0
        if self.given_plan is None:
            self.recipe.check(self.changeable(self.sites), self.budget())
        # The folder.
        super().__init__(config.out, config.cache, is_report, progress, ranks)
        self.plan_path = self.folder / PLAN
        self.written_path = self.folder / WRITTEN

    # The request.

    def budget(self, part: float = 1.0, gone: int = 0) -> Budget:
        """How many parameters to remove.

        Args:
            part: share of the whole to have removed after a shot, in (0, 1].
            gone: parameters that earlier shots removed.
        """
        blocks = self.skeleton.block_parameters()
        counted = {
            "blocks": blocks,
            "model": self.skeleton.parameters(),
            "window": sum(self.skeleton.block_parameters(index) for index in self.window),
        }[self.config.ratio_of]
        layout = self.skeleton.layout
        return Budget(
            self.ratio * part, counted, math.lcm(self.config.round_to, layout.multiple), layout.alike, gone=gone
        )

    def changeable(self, sites: Sequence[Site]) -> list[Site]:
        """Return the sites inside the window."""
        return [site for site in sites if site.block in self.window]

    @kind("solving")
    def allocate(self, sites: Sequence[Site], reached: Sequence[Site], survey: Survey, budget: Budget) -> Plan:
        """Return the recipe's plan for those of `reached` that lie inside the window; all other `sites` keep everything."""
        plan = self.recipe.allocate(self.changeable(reached), survey, budget)
        whole = {site.name: plan.get(site.name, SitePlan(site.units)) for site in sites}
        return Plan(whole, plan.ratio)

    @property
    def sources(self) -> list[Skeleton]:
        return [self.skeleton]

    @property
    def surveys(self) -> bool:
        """Whether the model is surveyed before anything is removed."""
        return _surveys(self.config, self.recipe)

    @property
    def statistics(self) -> frozenset[Statistic]:
        """What a survey sums at each site; empty without a survey, or if it reads only weights."""
        return (self.surveys and self.recipe.statistics) or frozenset()

    @property
    def streams(self) -> bool:
        """Whether the prune sweep needs activations."""
        return _streams(self.config, self.recipe)

    @property
    def needs_text(self) -> bool:
        """Whether any text is read."""
        return bool(self.statistics) or self.streams

    @cached_property
    def text(self) -> Text | DataFree:
        """The calibration text, or the name of a substitute that needs none."""
        given = self.config.calibration
        for word in DATA_FREE:
            if given == word:
                return word
        return Text.of(builtin_text() if given is None else given)

    @property
    def writes_text(self) -> bool:
        """Whether the model writes its own calibration tokens."""
        return self.needs_text and self.text == "self"

    @cached_property
    def needs(self) -> Needs:
        """What the forecast counts."""
        correction = self.recipe.correction
        # Only the first rank generates text and corrects.
        divided = not self.writes_text and correction is None
        return Needs(
            samples=self.ranks.max_samples(self.config.samples) if divided else self.config.samples,
            length=self.length,
            text=self.needs_text,
            survey=self.statistics,
            findings=sum(self.recipe.findings(site) for site in self.sites) if self.surveys else 0,
            gram=self.recipe.wants_gram or self.recipe.target is not None,
            compensates=self.recipe.compensation is not None or self.recipe.wants_inputs,
            aims=self.recipe.target is not None,
            refines=self.config.refine,
            corrects=correction.steps if correction else 0,
            correction_rank=correction.rank if correction else 0,
            shots=self.shots,
            generates=self.writes_text,
            removes=0.0 if self.recipe.writes_zeros else self.budget().target / self.skeleton.block_parameters(),
            workspace=lambda site: self.recipe.workspace(site, self.keeps.get(site.name, site.units)),
            digest_workspace=lambda site: self.recipe.digest_workspace(site),
            activations=self.activations,
        )

    @cached_property
    def keeps(self) -> Mapping[str, int]:
        """The most units that stay at each site for which that is known before the work starts."""
        if self.given_plan is not None:
            return {name: site.keep for name, site in self.given_plan.items()}
        if self.shots > 1:
            return {}
        sites = self.changeable(self.sites)
        if self.recipe.statistics is None:
            plan = self.recipe.allocate(sites, {}, self.budget())
            return {name: site.keep for name, site in plan.items()}
        return self.recipe.foresee(sites, self.budget())

    @property
    def forward_operations(self) -> int:
        """Operations of one dense forward pass over the requested text, whether or not the recipe reads it."""
        most = self.skeleton.context or windows.DEFAULT_LENGTH
        length = self.length or min(self.config.seq_len or windows.DEFAULT_LENGTH, most)
        return self.skeleton.forward_operations(self.config.samples, length)

    @cached_property
    def header(self) -> dict[str, Any]:
        """What must be unchanged on resume: settings, inputs, and versions of libraries that change numbers."""
        import transformers

        inputs: dict[str, Any] = {"model": self.skeleton.checkpoint.identity()}
        # Also if a plan makes the survey unnecessary: a job that started without a plan may resume with one.
        if self.recipe.statistics or self.streams:
            inputs |= self._text_identity()
        return {
            "settings": {
                **self.config.fixed(),
                "settings": asdict(self.recipe.settings),
                "ratio": self.ratio,
                "dtype": machine.dtype_name(self.skeleton.dtype),
                "activations": machine.activations_name(self.activations, self.skeleton.dtype),
            },
            "inputs": inputs,
            "versions": {"torch": str(torch.__version__), "transformers": transformers.__version__},
        }

    def _text_identity(self) -> dict[str, Any]:
        return (
            text_identity(self.text, self.config.model) if isinstance(self.text, Text) else {"calibration": self.text}
        )

    def forecast(self) -> Resources:
        """Estimate what the job takes on this machine. With several ranks: what each takes, given what the poorest has free."""
        disk = files.free_bytes(self.cache)
        disk = (min(disk, self.config.disk) if self.config.disk else disk) // self.ranks.local_size
        rooms = self.ranks.gather({**self._room, "disk_limit": disk})
        found = forecast(
            self.skeleton,
            self.needs,
            **{name: (max if name == "base" else min)(each[name] for each in rooms) for name in rooms[0]},
        )
        return replace(
            found,
            steps=sum(phase.steps for phase in self._schedule()),
            ratio_missed=self.goal.foreseen(self._planned, self._counted_tokens),
        )

    @cached_property
    def goal(self) -> Goal:
        """What the result is compared with: the ratio or, if none was given, the plan."""
        budget, sites, plan = self.budget(), self.changeable(self.sites), self.given_plan
        target, slack = budget.target, largest_unit(sites, budget)
        if plan is not None and self.config.ratio is None:
            target = sum(
                (site.units - plan[site.name].keep) * site.unit_parameters + sum(plan[site.name].zeros or ())
                for site in sites
            )
        zeros = self.recipe.writes_zeros
        if zeros:
            window = sum(self.skeleton.block_parameters(index) for index in self.window)
            slack = window - sum(sum(site.linears) for site in sites)
        what = {
            "blocks": "the blocks' parameters",
            "model": "the model's parameters",
            "window": f"the parameters of blocks {self.window.start}:{self.window.stop}",
        }[self.config.ratio_of]
        return Goal(sites, budget, target, slack, what, zeros, None if plan is None else str(self.config.plan))

    @property
    def _planned(self) -> Mapping[str, int] | None:
        """Units that stay at each site, if they are known before the work starts."""
        whole = self.given_plan is not None or (self.shots == 1 and self.recipe.statistics is None)
        return self.keeps if whole and not self.recipe.writes_zeros else None

    @property
    def _counted_tokens(self) -> int | None:
        """Number of calibration tokens, if the tokens that reach each expert are counted."""
        counted = self.statistics or self.recipe.wants_gram
        return self.config.samples * self.length if counted else None

    @property
    def _room(self) -> dict[str, int]:
        return machine.memory_limits(self.device, self.config.memory, self.config.memory_host or 0, self.ranks)

    def shot_folder(self, number: int) -> Path:
        """Folder for the checkpoint that a shot writes."""
        return self.staging if number == self.shots else self.folder / f"shot-{number:02}"

    # Opening, resuming, ending.

    def differs(self, report: Entry) -> str | None:
        given = self.given_plan.digest() if self.given_plan else None
        if difference := super().differs(report):
            return difference
        return None if given == report["plan_given"] else f"by plan {report['plan_given']}, not {given}"

    def start(self, restart: bool) -> None:
        """Start the job, or find the point where an earlier process stopped.

        Raises:
            ResumeError: the job was started with other settings, inputs or versions.
        """
        self.journal = Journal(self.journal_path, restart=restart, ranks=self.ranks)
        start = self.journal.header
        if start is None:
            start = self._begin()
        else:
            self.check_same(start)
            # A plan may be given later, after --plan-only; it cannot be withdrawn.
            if start["plan"] and not self.given_plan:
                raise ResumeError("plan is not given; this job was started with one; --restart starts over")
            if start["shots"] != self.shots:
                raise ResumeError(
                    f"a plan is given, which takes one shot; this job was started in {start['shots']}; --restart starts over"
                )
            if start["ranks"] != self.ranks.size:
                raise ResumeError(
                    f"{self.ranks.size} processes share the samples; this job was started with {start['ranks']}; --restart starts over"
                )
            self._check_memory(start["resources"])
            self.resumed = len(list(self.journal.steps())) > 0
        self.batch: int = start["resources"]["batch"]
        self.backward_batch: int = start["resources"]["backward_batch"]
        self.grams: GramPlace = start["resources"]["grams"]
        self.sizes: Sizes = (self.batch, self.backward_batch, self.grams)
        self.boundary_every: int = start["resources"]["boundary_every"]
        self.skeleton.copies_ahead = copies_ahead(self.skeleton, self.needs, self.sizes, self._room["device_limit"])

    def _begin(self) -> Entry:
        """Check everything that can be checked beforehand; only then remove the files of an earlier job."""
        self.check_folder()
        resources = self.forecast().require()
        self.check_disk(resources.output_bytes, resources.disk_bytes * self.ranks.local_size)
        if self.needs_text and not self.writes_text:
            _ = self.tokens
        check_companions(self.config.model, self.skeleton.vocabulary, self.progress, required=self._may_need_loader)
        header = self.header
        self._check_agreed()
        sources = self.read_sources()
        self.discard()
        if self.needs_text:
            self.record_cache()
        self.journal = Journal(self.journal_path, ranks=self.ranks)
        return self.journal.append(
            "start",
            job=header,
            sources=sources,
            cache=self.given_cache,
            plan="given" if self.given_plan else None,
            shots=self.shots,
            replaces=self.existing_report() is not None,
            ranks=self.ranks.size,
            resources={
                name: getattr(resources, name) for name in ("batch", "backward_batch", "grams", "boundary_every")
            },
            schedule=[asdict(phase) for phase in self._schedule()],
        )

    @property
    def _may_need_loader(self) -> bool:
        """Whether the result may not be a stock checkpoint, so that it must name its tokenizer's class."""
        if self.recipe.writes_zeros:
            return not write.fits_stock(self.skeleton, self.sites)
        return self.skeleton.layout is not UNIFORM

    def _check_agreed(self) -> None:
        """Check that all ranks have the same settings, model, text and versions."""
        if difference := first_difference(self.ranks.broadcast(lambda: self.header), self.header):
            raise ConfigError(f"rank {self.ranks.rank} does not agree with rank 0: {difference} there")

    def _schedule(self) -> list[Phase]:
        """The phases of the job, in order."""
        depth, correction = len(self.skeleton), self.recipe.correction
        found = [Phase("calibrate")] if self.writes_text else []
        for number in range(1, self.shots + 1):
            survey = {"forward": depth}
            if self.needs.gradients:
                survey |= {"head": 1, "backward": depth}
            shot = f"shot-{number}"
            steps = {
                "embed": int(self.needs_text),
                **(survey | {"surveyed": 1} if self.surveys else {}),
                "allocate": 1,
                "prune": depth,
                "pruned": 1,
                "correct": correction.steps if correction else 0,
                "finished": 1,
            }
            for step, count in steps.items():
                # A plan makes the rest of the survey unnecessary.
                skipped_after = f"{shot}/allocate" if step in survey or step == "surveyed" else None
                found += [Phase(f"{shot}/{step}", count, skipped_after)] if count else []
        return [*found, Phase("complete")]

    def _check_memory(self, resources: Mapping[str, Any]) -> None:
        """Compare the micro-batches of a started job, which fix the order of sums, with the current memory limit."""
        if self.config.memory is None:
            return
        sizes = resources["batch"], resources["backward_batch"], resources["grams"]
        room = self._room
        base = room["base"] + room["memory_host"] if self.device.type == "cpu" else 0
        needed, limit = base + device_peak(self.skeleton, self.needs, *sizes), room["device_limit"]
        if limit * SLACK < needed:
            raise ResourceError(
                f"the memory limit is {format_bytes(self.config.memory)}; this job was started with micro-batches of "
                f"{sizes[0]} and {sizes[1]}, which need {format_bytes(needed)}; --restart starts over"
            )

    def report(self, plan: Plan, sites: Sequence[Mapping[str, Any]], removed: int) -> Entry:
        """The contents of `report.json`.

        Args:
            sites: the report of each site, from the last shot.
            removed: parameters removed or zeroed so far.
        """
        before = self.skeleton.parameters()
        units = {site.name: site.units for site in self.sites}
        zeros = sum(site.get("zeros", 0) for site in sites)
        spent = totals(self.journal)
        return {
            "recipe": self.recipe.name,
            "ratio_requested": self.ratio,
            "ratio_blocks": removed / self.skeleton.block_parameters(),
            "ratio_model": removed / before,
            "ratio_missed": self.goal.missed(removed, sites),
            "parameters_before": before,
            "parameters_after": before - removed + zeros,
            "zeros": zeros,
            "batch": self.batch,
            "shots": self.shots,
            "ranks": self.ranks.size,
            "plan": plan.digest(),
            "plan_given": plan.digest() if self.given_plan else None,
            "job": self.header,
            "model": hub.origin(self.config.model),
            "tokens": windows.fingerprint(self.tokens) if self.needs_text else None,
            "sites": [{**site, "units": units[site["site"]]} for site in sites],
            "blocks": by_block(self.journal),
            "forward_equivalents": round(spent["operations"] / self.forward_operations, 4),
            "sweeps_per_shot": round(spent["operations_by_kind"]["sweeps"] / self.forward_operations / self.shots, 4),
            **spent,
            **peaks(self.journal),
        }

    @cached_property
    def tokens(self) -> Tensor:
        """Calibration windows (samples, length) int64; those that the model writes exist once they are journalled."""
        if self.text == "self":
            line = self.journal.find("calibrate")
            assert line is not None
            return load_shard(self.written_path, line["sha256"])["tokens"]
        vocabulary, samples, seed = self.skeleton.vocabulary, self.config.samples, self.config.seed
        if self.text == "random-tokens":
            return windows.random_windows(vocabulary, samples, self.length, seed)
        tokenizer = load_tokenizer(self.config.model, vocabulary)
        return windows.sample(tokenizer, self.text, vocabulary, samples, self.length, seed, self.progress)

    @property
    def published(self) -> bool:
        """Whether the result has its final name."""
        return not self.staging.is_dir() and self.existing_report() is not None

    @property
    def part(self) -> slice:
        """This rank's samples."""
        return self.ranks.samples(self.config.samples)

    @cached_property
    def store(self) -> ActivationStore:
        """Inputs of blocks for this rank's samples, for the sweep in progress."""
        shape = self.part.stop - self.part.start, self.length, self.skeleton.width
        return ActivationStore(
            self.rank_cache,
            shape,
            self.skeleton.dtype,
            self.device,
            durable=True,
            stored=self.activations,
            memory=self.config.memory_host or 0,
        )

    # Checks of what the user gives.

    def _check_layout(self) -> None:
        """Check that DeciLM's config can describe this model."""
        if self.skeleton.layout is not DECILM:
            return
        if self.skeleton.architecture.model_type != "llama":
            raise ConfigError(
                f"layout is decilm; {self.config.model} is of model_type {self.skeleton.architecture.model_type}, and it must be llama"
            )
        for site in self.sites:
            if site.kind == "ffn" and site.columns % DECILM.multiple:
                raise ConfigError(
                    f"layout is decilm; {site.name} is {site.columns} wide, and widths must be multiples of {DECILM.multiple}"
                )

    def _window(self) -> range:
        """The blocks that may change."""
        depth = len(self.skeleton)
        start, stop = self.config.blocks or (0, depth)
        if stop > depth:
            raise ConfigError(
                f"blocks is {start}:{stop}; {self.config.model} has {depth} blocks, so it must end by {depth}"
            )
        if self.skeleton.layout.alike and (start, stop) != (0, depth):
            raise ConfigError(
                f"blocks is {start}:{stop}; the {self.config.layout} layout keeps blocks alike, so it needs all of them"
            )
        return range(start, stop)

    def _given_plan(self) -> Plan | None:
        path = self.config.plan
        if path is None:
            return None
        plan = Plan.read(path)
        plan.check(self.sites, str(path))
        for site in self.sites:
            entry, zeros = plan[site.name], sum(plan[site.name].zeros or ())
            if site.block not in self.window and (entry.keep < site.units or zeros):
                does = f"has {zeros} zeros" if zeros else f"keeps {entry.keep} of {site.units}"
                raise ConfigError(
                    f"{path}: {site.name} {does}; it lies outside blocks {self.window.start}:{self.window.stop}"
                )
        if not plan.is_alike([site for site in self.sites if site.family in self.skeleton.layout.alike]):
            raise ConfigError(
                f"{path}: blocks keep different widths, which the {self.config.layout} layout cannot hold"
            )
        for site in self.sites:
            kept = plan[site.name]
            if self.recipe.plans_units(site) and kept.units is None and kept.keep < site.units:
                raise ConfigError(f'{path}: with these settings {site.name} needs "units", not only how many to keep')
        self.recipe.check_plan(self.sites, plan, str(path))
        return plan

    def _agreed_ratio(self) -> float:
        asked, planned = self.config.ratio, self.given_plan.ratio if self.given_plan else None
        if asked is not None and planned is not None and asked != planned:
            raise ConfigError(f"ratio is {asked:g}; the plan {self.config.plan} was made for {planned:g}")
        ratio = asked if asked is not None else planned
        assert ratio is not None
        return ratio


def idle(config: Config) -> dict[str, str]:
    """Fields of a config that have no effect, each with the reason: text options if no text is read, and what a plan decides.

    Raises:
        ConfigError: unknown recipe, or a setting that it does not have.
    """
    recipe = RECIPES[config.recipe](parse(config.recipe, config.settings))
    summed = _surveys(config, recipe) and recipe.statistics
    found = {} if config.plan is None else {"round_to": "the plan decides the widths"}
    if not summed and not _streams(config, recipe):
        names = ["calibration", "samples", "seq_len", *([] if recipe.seeded else ["seed"])]
        found |= dict.fromkeys(names, f"{config.recipe} reads no text here")
    return found


def _surveys(config: Config, recipe: Recipe[Any]) -> bool:
    spared = config.plan is not None and not recipe.keeps_findings
    return recipe.statistics is not None and not spared


def _streams(config: Config, recipe: Recipe[Any]) -> bool:
    wants = recipe.wants_gram or recipe.wants_inputs or recipe.target is not None
    return wants or recipe.compensation is not None or config.refine > 0
