"""A job: its request, its folder, and whether it may start, resume or finish.

`Job` owns the folder beside OUT with its lock and journal. `run` has the steps.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..jobs.config import EFFORTS, Config, DataFree, Effort
from ..jobs.folder import JobFolder
from ..jobs.forecast.memory import GramPlace, Memory, Sizes
from ..jobs.forecast.resources import Resources, forecast, training_operations
from ..jobs.forecast.workload import Workload
from ..jobs.journal import Entry
from ..jobs.meter import by_block, peaks, totals
from ..jobs.names import is_report
from ..jobs.resume import Terms, first_difference
from ..model import hub
from ..model.checkpoint import load_shard
from ..model.skeleton import Skeleton
from ..model.tokenizer import IGNORED, check_companions, load_tokenizer
from ..recipes.plan import Plan
from ..stream.store import ActivationStore
from ..system import files, machine
from ..system.progress import Progress, Silent
from ..system.ranks import ALONE, Ranks
from ..text.source import Text
from ..text.windows import Windows, random_windows, sample
from . import aim, archive
from .block import GONE
from .held_out import DRAWN, disjoint, others
from .refine import ends
from .request import Request

PLAN, WRITTEN = "plan.json", "calibration.safetensors"
APART = 1_000_003
"""Added to the seed for the metric's windows, so that they are others than calibration's, also of the same text."""
WRITING = "generate"
"""Folder of keys and values in the cache while the model writes text."""
GENERATED = "generated-"
"""Prefix of the states of text that the model is writing."""


class Job(JobFolder):
    """One job: everything that a first and a resumed process need to know. Raises all errors found before the work starts."""

    known: ClassVar = JobFolder.known | {PLAN, WRITTEN}
    known_prefixes: ClassVar = (*JobFolder.known_prefixes, "survey-", "shot-", GENERATED)

    def __init__(self, config: Config, progress: Progress | None, ranks: Ranks = ALONE) -> None:
        started = time.monotonic()
        self.request = request = Request(config, progress, ranks)
        self.out_given = str(config.out)
        self.config, self.recipe, self.skeleton = request.config, request.recipe, request.skeleton
        super().__init__(self.config, request.device, started, is_report, progress, ranks)
        self.plan_path = self.folder / PLAN
        self.written_path = self.folder / WRITTEN

    @property
    def header(self) -> dict[str, Any]:
        return self.request.header

    @property
    def sources(self) -> list[Skeleton]:
        return [self.skeleton]

    @cached_property
    def terms(self) -> Terms:
        plan = self.request.given_plan
        return {
            **super().terms,
            "plan": plan.digest() if plan else None,
            "shots": self.request.shots,
            "ranks": self.ranks.size,
        }

    @property
    def _holds_by_itself(self) -> bool:
        """Whether the job itself decides how much host memory activations take: on a GPU, without --memory-host."""
        return self.config.memory_host is None and self.device.type == "cuda"

    def _spare(self) -> int:
        """Bytes of host memory that are free now, beside what the steps need: other jobs may have taken some since the start.

        A lower bound: what the steps already hold is no longer free, and is subtracted again.
        """
        free = machine.available_memory(torch.device("cpu")) // self.ranks.local_size
        return free - self._needed

    def _with(self, effort: Effort) -> Workload:
        """The job's workload, with an effort's training in place of its own."""
        # A recipe's own correction takes the place of an effort's.
        imitation = None if self.request.recipe.correction else self.request.imitation(effort)
        return replace(
            self.request.workload,
            refines=self.config.effort_steps(effort),
            corrects=imitation.steps if imitation else 0,
            correction_rank=None,
            correction_sequences=imitation.sequences if imitation else 0,
            correction_samples=self.request.together(effort),
            corrected_shots=int(imitation is not None),
            imitates=imitation is not None,
        )

    def forecast(self) -> Resources:
        """Estimate what the job takes on this machine. With several ranks: what each takes, given what the poorest has free.

        Neither sizes of micro-batches nor disk space are planned with host memory that activations take by themselves.
        """
        aim.check(self.request)
        disk = files.free_bytes(self.cache)
        disk = (min(disk, self.config.disk) if self.config.disk else disk) // self.ranks.local_size
        asked = {"memory_host": self.config.memory_host or 0}
        rooms = self.ranks.gather({**self.room, **asked, "disk_limit": disk})
        room = {name: (max if name == "base" else min)(each[name] for each in rooms) for name in rooms[0]}
        found = forecast(self.skeleton, self.request.workload, **room)
        if self._holds_by_itself:
            needed = self.memory.host_peak(found.batch, found.backward_batch, found.grams)
            found = found.holding(min(_left(room, needed), self.memory.boundaries(room["disk_limit"], 0)[1]))
        return replace(
            found,
            steps=sum(phase.steps for phase in self.request.schedule()),
            refinement_operations={
                effort: training_operations(self.skeleton, self._with(effort)) for effort in EFFORTS
            },
            ratio_missed=None
            if self.request.ratio is None or self.request.experts
            else self.request.goal.foreseen(self.request.planned, self.request.counted_tokens),
            kept=self.request.kept,
        )

    @property
    def generated(self) -> tuple[Path, str] | None:
        """The last saved state of the text that the model is writing, with its digest; None before the first."""
        lines = [*self.journal.steps(GENERATED)]
        return (self.folder / f"{lines[-1]['step']}.safetensors", lines[-1]["sha256"]) if lines else None

    def shot_folder(self, number: int) -> Path:
        return self.staging if number == self.request.shots else self.folder / f"shot-{number:02}"

    @property
    def memory(self) -> Memory:
        """What the steps hold."""
        return Memory(self.skeleton, self.request.workload)

    # Opening and resuming.

    def use(self, resources: Entry) -> None:
        self.batch: int = resources["batch"]
        self.backward_batch: int = resources["backward_batch"]
        self.grams: GramPlace = resources["grams"]
        self.sizes: Sizes = (self.batch, self.backward_batch, self.grams)
        self.boundary_every: int = resources["boundary_every"]
        memory = self.memory
        self.skeleton.copies_ahead = memory.copies_ahead(self.sizes, self.room["device_limit"])
        if self._holds_by_itself:
            self._needed = memory.host_peak(*self.sizes)
            self.room["memory_host"] = _left(self.room, self._needed)

    def begin(self) -> Entry:
        resources = self.forecast().require()
        archive.find(self.request)
        if self.request.config.perplexity_at_most is not None:
            _ = self.held_out
        self.check_disk(resources.output_bytes, resources.disk_bytes * self.ranks.local_size)
        tokens: Entry = {}
        if self.request.writes_text:
            _ = self.request.writing
        elif self.request.needs_text:
            tokens = {"tokens": self.windows.fingerprint}
        if self.request.metric_text is not None:
            _ = self.survey_tokens
        check_companions(
            self.config.model, self.skeleton.vocabulary, self.progress, required=self.request.may_need_loader
        )
        if difference := first_difference(self.ranks.broadcast(lambda: self.header), self.header):
            raise ConfigError(f"rank {self.ranks.rank} does not agree with rank 0: {difference} there")
        return self.write_start(
            stores=self.request.needs_text,
            **tokens,
            resources={
                name: getattr(resources, name) for name in ("batch", "backward_batch", "grams", "boundary_every")
            },
            schedule=[asdict(phase) for phase in self.request.schedule()],
        )

    def peak(self, resources: Entry) -> int:
        sizes = resources["batch"], resources["backward_batch"], resources["grams"]
        return self.held + self.memory.device_peak(*sizes)

    def report(self, plan: Plan, sites: Sequence[Mapping[str, Any]], removed: int, losses: Sequence[float]) -> Entry:
        """The contents of `report.json`.

        Args:
            sites: the report of each site, from the last shot. Sites that earlier shots removed as a whole are added.
            removed: parameters removed or zeroed so far.
            losses: of the steps that trained all blocks together towards the dense model's predictions, in nats per token.
        """
        before = self.skeleton.parameters()
        found = {site["site"]: site for site in sites}
        zeros = sum(site.get("zeros", 0) for site in sites)
        spent = totals(self.journal)
        return {
            "recipe": self.recipe.name,
            "ratio_requested": self.request.ratio,
            "aim": self.aim,
            "ratio_blocks": removed / self.skeleton.block_parameters(),
            "ratio_model": removed / before,
            "ratio_missed": self.request.goal.missed(removed, sites),
            "parameters_before": before,
            "parameters_after": before - removed + zeros,
            "zeros": zeros,
            "batch": self.batch,
            "shots": self.request.shots,
            "ranks": self.ranks.size,
            "plan": plan.digest(),
            "plan_given": self.terms["plan"],
            "job": self.header,
            "model": hub.origin(self.config.model),
            "tokens": self.windows.fingerprint if self.request.needs_text else None,
            "surveyed_before": self.surveyed_before,
            "imitation": ends(losses) if losses else None,
            "sites": [
                {**found.get(site.name, {"site": site.name, **GONE}), "units": site.units}
                for site in self.request.sites
            ],
            "blocks": by_block(self.journal),
            "forward_equivalents": round(spent["operations"] / self.request.forward_operations, 4),
            "sweeps_per_shot": round(
                spent["operations_by_kind"]["sweeps"] / self.request.forward_operations / self.request.shots, 4
            ),
            **spent,
            **peaks(self.journal),
        }

    @property
    def surveyed_before(self) -> bool:
        """Whether the first survey, or a part of it, was taken by another job, which had kept it."""
        parts = [*self.journal.steps("shot-1/forward/"), *self.journal.steps("shot-1/backward/")]
        own = sum("sha256" in part for part in parts)
        return "sha256" in (self.journal.find("shot-1/surveyed") or {}) and own < len(self.skeleton)

    @property
    def aim(self) -> Entry | None:
        """What the aim has chosen: the ratio, and the figures that decided; None without an aim."""
        line, held_out = self.journal.find("shot-1/ratio"), self.journal.find("shot-1/held-out")
        return line and {"ratio": line["ratio"], **line["figures"], **(held_out["figures"] if held_out else {})}

    @property
    def tokens(self) -> Tensor:
        """Calibration tokens (samples, length) int64."""
        return self.windows.tokens

    @cached_property
    def windows(self) -> Windows:
        """Calibration windows; those that the model writes exist once they are journalled."""
        config = self.config
        if self.request.text == "self":
            line = self.journal.find("calibrate")
            assert line is not None
            found = load_shard(self.written_path, line["sha256"])
            tokens = found["tokens"]
            return Windows(
                tokens, tokens if config.loss_on == "all" else tokens.where(found["written"].bool(), IGNORED)
            )
        return self._sample(self.request.text, self.config.samples, self.config.seed)

    @cached_property
    def survey_tokens(self) -> Tensor:
        """The windows that the survey reads, (samples, length) int64: the calibration windows, or those of the metric's text."""
        text, config = self.request.metric_text, self.config
        return (self.windows if text is None else self._sample(text, config.metric_samples, config.seed + APART)).tokens

    def _sample(self, text: Text | DataFree, samples: int, seed: int, progress: Progress | None = None) -> Windows:
        config, vocabulary, bos, length = self.config, self.skeleton.vocabulary, self.request.bos, self.request.length
        if not isinstance(text, Text):
            return Windows.of(random_windows(vocabulary, samples, length, seed, bos))
        tokenizer = load_tokenizer(config.model, vocabulary)
        return sample(
            tokenizer,
            text,
            vocabulary,
            samples,
            length,
            seed,
            progress or self.progress,
            bos=bos,
            loss_on="all" if text is self.request.metric_text else config.loss_on,
            cut=config.windows,
        )

    @cached_property
    def held_out(self) -> Windows:
        """Windows that share few passages with the calibration windows: one for eight of those, 4 at least."""
        # Another seed in its low 32 bits: torch's generator for CPUs ignores the others.
        count, seed = max(4, self.config.samples // 8), self.config.seed ^ 0x2545F491
        return disjoint(self._sample(self.request.text, DRAWN * count, seed), self.windows, count, self.request.text)

    @cached_property
    def other_windows(self) -> Windows:
        """What all blocks are trained together on: other windows than were calibrated on, at most `IMITATIONS` for each of these.

        At least as many as these, with the same ones if the text has too few others.
        """
        count, seed = self.config.samples, self.config.seed ^ 0x51ED270B
        if self.request.text == "self":
            return self.windows
        most = self.request.together(self.config.chosen_effort)
        found = others(self._sample(self.request.text, DRAWN * most, seed, Silent()), self.windows, most)
        if (lacking := count - len(found.tokens)) > 0:
            self.progress.say(
                f"{lacking} of the {count} windows for training all blocks together are calibration windows, since {self.request.text} "
                "has too little other text"
            )
        parts = zip((found.tokens, found.labels), (self.windows.tokens, self.windows.labels), strict=True)
        return Windows(*(torch.cat(part)[: max(count, len(found.tokens))] for part in parts))

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
        return self._open_store(self.part)

    @property
    def survey_part(self) -> slice:
        """This rank's samples of the survey's."""
        return self.part if self.request.metric_text is None else self.ranks.samples(self.config.metric_samples)

    @cached_property
    def survey_store(self) -> ActivationStore:
        """Inputs of blocks for this rank's samples of the survey's: `store`, unless the metric has a text of its own."""
        return self.store if self.request.metric_text is None else self._open_store(self.survey_part, "metric")

    def _open_store(self, part: slice, folder: str = "") -> ActivationStore:
        spare = self._spare if self._holds_by_itself else None
        return self.open_store(part.stop - part.start, self.request.length, self.request.activations, folder, spare)


def _left(room: Mapping[str, int], needed: int) -> int:
    """Half of the free host memory, as far as steps that take `needed` bytes leave it; `room` is that of `JobFolder.room`."""
    free = room["host_limit"] - room["base"]
    return max(0, min(free // 2, free - needed))
