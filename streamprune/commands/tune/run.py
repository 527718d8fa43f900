"""Recover a pruned checkpoint by low-rank training: LoRA in memory, or distillation block by block from a dense model.

As in pruning, a step is finished once the journal has its line, and files that a step needs are removed only after the
line that makes them unnecessary. The same code writes the result, and it appears in one rename.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import ConfigError, ResourceError
from ...jobs.config import TuneConfig, TuneMethod
from ...jobs.folder import JobFolder, MissingFile
from ...jobs.forecast.memory import SLACK, Memory, copies_ahead, device_peak, in_memory_peak
from ...jobs.forecast.needs import REFINE_SEQUENCES, Needs
from ...jobs.forecast.resources import Resources, forecast
from ...jobs.journal import Entry, Journal
from ...jobs.meter import metered, peaks, totals
from ...jobs.names import is_report, is_tuning
from ...jobs.reports import tuning_card
from ...jobs.schedule import Phase
from ...maths.flops import kind
from ...model import hub, write
from ...model.block import Block
from ...model.checkpoint import Checkpoint, load_shard, write_shard
from ...model.names import CURVES, REPORT
from ...model.skeleton import Skeleton, open_skeleton
from ...model.tokenizer import check_companions, load_tokenizer
from ...pruning.refine import Refinement, ends, refine
from ...stream import sweep
from ...stream.store import ActivationStore
from ...system import files, machine
from ...system.progress import Progress, rest
from ...system.strict_json import read_json
from ...system.units import format_bytes
from ...text import windows
from ...text.source import Text
from ...text.windows import text_identity
from . import lora

STUDENT, TEACHER = "student", "teacher"
STATE = "adapter-"
RATES = {"lora": 1e-3, "distil": 3e-3}
"""Default learning rates by method."""


@dataclass(frozen=True)
class Tuned:
    """Result of a tuning job."""

    out: str
    method: str
    rank: int
    steps: int
    parameters: int
    loss_first: float
    """Mean over the first tenth of the steps: nats per token for `lora`; mean squared error, averaged over the blocks,
    for `distil`."""
    loss_last: float
    """The same mean over the last tenth of the steps."""
    tokens: str | None
    """Fingerprint of the training windows."""
    operations: int
    """FLOPs of the whole job, as `maths.flops` counts them."""
    seconds: float
    """Seconds that this process took."""
    peak_device_bytes: int
    peak_host_bytes: int
    bytes_read: int
    """Bytes that this process read from the checkpoints, block by block."""
    resumed: bool
    """Whether earlier processes did part of the work."""


def tune(config: TuneConfig, *, restart: bool = False, progress: Progress | None = None) -> Tuned:
    """Train low-rank updates of a checkpoint's linears and write the result to a new directory.

    Resumes an interrupted job.

    Args:
        restart: discard an earlier job with the same `out`, including its result.

    Raises:
        StreamPruneError: see `errors`. `out` is then unchanged.
    """
    started = time.monotonic()
    job = Tuning(config, progress, restart)
    report = job.finished_report(restart)
    if report is None:
        with (
            job.opened(restart),
            machine.limit_memory(job.device, config.memory),
            metered(job.journal, started, job.peaks),
        ):
            report = job.work()
    else:
        job.tidy()
    tuning = report["tuning"]
    host, device = job.peaks.most()
    return Tuned(
        out=str(config.out),
        **{name: tuning[name] for name in ("method", "rank", "steps", "loss_first", "loss_last")},
        parameters=report["parameters_after"],
        tokens=report.get("tokens"),
        operations=report["operations"],
        seconds=round(time.monotonic() - started, 3),
        peak_device_bytes=device,
        peak_host_bytes=host,
        bytes_read=sum(skeleton.checkpoint.bytes_read for skeleton in job.sources),
        resumed=job.resumed,
    )


class Tuning(JobFolder):
    """One tuning job, which resumes from its journal.

    Raises:
        StreamPruneError: an error that can be detected before any work starts.
    """

    known_prefixes: ClassVar = (*JobFolder.known_prefixes, STATE)

    def __init__(self, config: TuneConfig, progress: Progress | None, restart: bool) -> None:
        teacher = config.teacher and hub.resolve_model(config.teacher, progress)
        model = hub.resolve_model(config.model, progress)
        self.config = config = replace(config, model=model, teacher=teacher, out=config.out.absolute())
        super().__init__(config.out, config.cache, is_tuning, progress)
        self.device = machine.resolve_device(config.device)
        self.peaks = machine.Peaks(self.device)
        self.student: Skeleton = open_skeleton(config.model, self.device, config.dtype)
        self.activations = machine.resolve_activations(
            config.activations, self.student.dtype, self.student.checkpoint.dtype
        )
        self.source = self._source()
        if config.rank > self.student.width:
            raise ConfigError(f"rank is {config.rank}; the model's width is {self.student.width}")
        self.length = windows.window_length(config.seq_len, self.student.context)
        self.method: TuneMethod = self._method(restart)
        self.rate = config.rate or RATES[self.method]
        self.teacher = self._teacher() if self.method == "distil" else None

    @property
    def sources(self) -> list[Skeleton]:
        """All models that the job reads."""
        return [self.student] if self.teacher is None else [self.student, self.teacher]

    def _source(self) -> Entry | None:
        """Read the report of the model to tune, if it has one.

        Raises:
            ConfigError: the model has zeroed weights, which a low-rank update would fill.
        """
        path = self.config.model / REPORT
        report = read_json(path) if path.is_file() else None
        if is_report(report) and report is not None and report["zeros"]:
            raise ConfigError(
                f"{self.config.model} has {report['zeros']:,} weights that pruning made zero; "
                "a low-rank change would fill them"
            )
        return report

    def _method(self, restart: bool) -> TuneMethod:
        """Return the method. ``auto`` keeps the method of an existing job, or takes one that fits into memory."""
        config, method = self.config, self.config.method
        if method == "auto":
            method = (None if restart else self._begun()) or self._fitting()
        if method == "lora" and not lora.installed():
            raise ConfigError("method is 'lora', which needs peft: pip install 'streamprune[tune]'")
        if method == "distil" and config.teacher is None:
            raise ConfigError("method is 'distil', which needs the dense model: --teacher DIR")
        return method

    def _begun(self) -> TuneMethod | None:
        """Return the method of the unfinished job or of the finished result; None without either."""
        if self.journal_path.is_file():
            start = Journal(self.journal_path, repair=False).header
            begun = start["job"]["settings"] if start is not None else {}
        else:
            report = self.existing_report()
            begun = report["job"]["settings"] if report is not None else {}
        method: TuneMethod | None = begun.get("method")
        return method

    def _fitting(self) -> TuneMethod:
        limit, least = self._room["device_limit"], self._lora_peak(1) + self._held
        if not lora.installed():
            lacking = "peft is not installed (pip install 'streamprune[tune]')"
        elif least > limit:
            lacking = f"training the model in memory needs {format_bytes(least)} and the limit is {format_bytes(limit)}"
        else:
            self.progress.say("method lora: the model with its gradients fits into memory")
            return "lora"
        if self.config.teacher is None:
            raise ConfigError(f"method lora is out, since {lacking}; distil needs the dense model: --teacher DIR")
        self.progress.say(f"method distil: {lacking}")
        return "distil"

    def _teacher(self) -> Skeleton:
        assert self.config.teacher is not None
        student, path = self.student, self.config.teacher
        # Compute in the student's dtype, whatever the stored dtype: the outputs are compared with the student's.
        teacher = Skeleton(Checkpoint(path), device=self.device, dtype=student.dtype)
        for name, ours, theirs in (
            ("blocks", len(student), len(teacher)),
            ("width", student.width, teacher.width),
            ("vocabulary", student.vocabulary, teacher.vocabulary),
        ):
            if ours != theirs:
                raise ConfigError(
                    f"the teacher {path} does not belong to {self.config.model}: {name} {theirs}, not {ours}"
                )
        windows.window_length(self.length, teacher.context)
        return teacher

    # Definition of the job.

    @cached_property
    def header(self) -> dict[str, Any]:
        """Settings, inputs, and versions that affect the numbers. They must be unchanged on resume."""
        import transformers

        teacher = {} if self.teacher is None else {"teacher": self.teacher.checkpoint.identity()}
        peft = {"peft": version("peft")} if self.method == "lora" else {}
        return {
            "settings": {
                "method": self.method,
                **self.config.fixed(),
                "rate": self.rate,
                "dtype": machine.dtype_name(self.student.dtype),
                "activations": machine.activations_name(self.activations, self.student.dtype),
            },
            "inputs": {
                "model": self.student.checkpoint.identity(),
                **teacher,
                **text_identity(self.text, self.config.model),
            },
            "versions": {"torch": str(torch.__version__), "transformers": transformers.__version__, **peft},
        }

    @cached_property
    def text(self) -> Text:
        """The text to train on."""
        return Text.of(self.config.text)

    @cached_property
    def tokens(self) -> Tensor:
        """Training windows (samples, length) int64."""
        config, vocabulary = self.config, self.student.vocabulary
        tokenizer = load_tokenizer(config.model, vocabulary)
        return windows.sample(tokenizer, self.text, vocabulary, config.samples, self.length, config.seed, self.progress)

    @cached_property
    def _room(self) -> dict[str, int]:
        return machine.memory_limits(self.device, self.config.memory, self.config.memory_host or 0)

    @property
    def _held(self) -> int:
        """Bytes of the memory limit that are taken before any work."""
        return self._room["base"] + self._room["memory_host"] if self.device.type == "cpu" else 0

    def _needs(self, *, trains: bool = True) -> Needs:
        config = self.config
        return Needs(
            samples=config.samples,
            length=self.length,
            text=True,
            refines=config.steps if trains else 0,
            rank=config.rank,
            prunes=False,
            activations=self.activations,
        )

    def _lora_peak(self, micro: int) -> int:
        return in_memory_peak(self.student, self._needs(), micro)

    def _peak(self, batch: int, micro: int) -> int:
        """Return the peak bytes on the device, given the sequences per micro-batch, forward and training."""
        if self.teacher is None:
            return self._lora_peak(micro)
        teacher = device_peak(self.teacher, self._needs(trains=False), batch, 1)
        return max(teacher, device_peak(self.student, self._needs(), batch, micro))

    def _forecast(self) -> Resources:
        """Forecast the job's resources within what this machine has free."""
        limits = {**self._room, "disk_limit": files.free_bytes(self.cache)}
        limit, work = self._room["device_limit"], self._room["device_limit"] - self._held
        found = forecast(self.student, self._needs(), **limits)
        if self.teacher is not None:
            teacher = forecast(self.teacher, self._needs(trains=False), **limits).require()
            return replace(found, batch=min(found.batch, teacher.batch))
        least = self._lora_peak(1)
        if least > work:
            raise ResourceError(
                f"the memory limit is {format_bytes(limit)}; training the model in memory needs {format_bytes(least + self._held)}; "
                "--method distil with --teacher needs only a block at a time"
            )
        most = min(REFINE_SEQUENCES, self.config.samples)
        micro = max(size for size in range(1, most + 1) if self._lora_peak(size) <= work)
        states = Memory(self.student, self._needs()).states(self.config.rank)
        return replace(found, backward_batch=micro, disk_bytes=0, output_bytes=found.output_bytes + states, problems=())

    # Opening and resuming.

    def start(self, restart: bool) -> None:
        """Start the job, or find the point where an earlier process stopped.

        Raises:
            ResumeError: the job was started with other settings, inputs or versions.
        """
        self.journal = Journal(self.journal_path)
        start = self.journal.header
        if start is None or restart:
            start = self._begin()
        else:
            self.check_same(start)
            needed = self._held + self._peak(**start["resources"])
            if self.config.memory is not None and self.config.memory * SLACK < needed:
                raise ResourceError(
                    f"the memory limit is {format_bytes(self.config.memory)}; this job was started with micro-batches "
                    f"that need {format_bytes(needed)}; --restart starts over"
                )
            self.resumed = len(list(self.journal.steps())) > 0
        self.batch: int = start["resources"]["batch"]
        self.micro: int = start["resources"]["micro"]
        for skeleton in self.sources if self.method == "distil" else ():
            needs = self._needs(trains=skeleton is self.student)
            skeleton.copies_ahead = copies_ahead(
                skeleton, needs, (self.batch, self.micro, "device"), self._room["device_limit"]
            )

    def _begin(self) -> Entry:
        """Check everything that can be checked in advance; only then discard an earlier job."""
        self.check_folder()
        resources = self._forecast().require()
        self.check_disk(resources.output_bytes, resources.disk_bytes)
        _ = self.tokens
        check_companions(self.config.model, self.student.vocabulary, self.progress, required=True)
        header = self.header
        sources = self.read_sources()
        self.let_go()
        files.make_folder(self.staging)
        if self.method == "distil":
            self.make_cache()
        self.journal = Journal(self.journal_path)
        return self.journal.append(
            "start",
            job=header,
            sources=sources,
            cache=self.given_cache,
            replaces=self.existing_report() is not None,
            resources={"batch": resources.batch, "micro": resources.backward_batch},
            schedule=[asdict(phase) for phase in self._schedule()],
        )

    def _schedule(self) -> list[Phase]:
        """Return the steps of the job."""
        if self.method == "lora":
            work = [Phase("steps", math.ceil(self.config.steps / lora.SAVE_EVERY))]
        else:
            work = [Phase("embed"), Phase("block", len(self.student))]
        return [*work, Phase("complete")]

    # The work.

    def work(self) -> Entry:
        """Train, write and publish; return the report."""
        self.rewind_to_existing(self._lost)
        if self.journal.find("complete") is None:
            figures, shards = self._lora() if self.method == "lora" else self._distil()
            assert self.journal.header is not None
            self.check_sources(self.journal.header)
            self.journal.append("complete", sha256=self._write(figures, shards))
        return self.publish()

    def _lost(self) -> MissingFile | None:
        """Find a missing or damaged file of a finished step; missing inputs of the first block are embedded again."""
        complete = self.journal.find("complete")
        if complete is not None and not self.staging.is_dir():
            return None
        for name, digest in (complete or {"sha256": {}})["sha256"].items():
            if not files.has_digest(self.staging / name, digest):
                return MissingFile(self.staging / name, "complete")
        blocks, states = (list(self.journal.steps(name)) for name in ("block/", "steps/"))
        for index, line in enumerate(blocks):
            shard = self.staging / write.block_shard(self.student, index)
            if not files.has_digest(shard, line["sha256"]):
                return MissingFile(shard, "block/")
        if states:
            state = self._state_path(int(states[-1]["step"].removeprefix("steps/")))
            if not files.has_digest(state, states[-1]["sha256"]):
                return MissingFile(state, "steps/")
        for stream in (STUDENT, TEACHER) if 0 < len(blocks) < len(self.student) else ():
            if not self._store.intact(name := sweep.boundary(stream, len(blocks))):
                return MissingFile(self._store.path(name), "block/")
        return None

    @cached_property
    def _store(self) -> ActivationStore:
        """The student's and teacher's streams of a distillation."""
        shape = self.config.samples, self.length, self.student.width
        return ActivationStore(
            self.cache,
            shape,
            self.student.dtype,
            self.device,
            durable=True,
            stored=self.activations,
            memory=self.config.memory_host or 0,
        )

    def _distil(self) -> tuple[Entry, dict[str, str]]:
        """Fit each block from the tuned stream's input to the teacher's output; return figures and shards' digests."""
        assert self.teacher is not None
        student, teacher, store, depth = self.student, self.teacher, self._store, len(self.student)
        done = len(list(self.journal.steps("block/")))
        for stream, skeleton in ((STUDENT, student), (TEACHER, teacher)):
            if not done and not store.intact(name := sweep.boundary(stream, 0)):
                sweep.embed(skeleton, self.tokens, store, name, self.batch)
        if self.journal.find("embed") is None:
            self.journal.append("embed")
        store.keep_only({sweep.boundary(stream, done) for stream in (STUDENT, TEACHER)})
        self.progress.phase("distil", depth, done)
        how = Refinement(
            self.config.steps, self.config.seed, self.micro, keeps_zeros=False, rate=self.rate, rank=self.config.rank
        )
        # Hold one block at a time: the teacher's block is freed before the student's is read.
        dense = sweep.forward(teacher, store, TEACHER, done, depth, self.batch)
        tuned = sweep.blocks(student, range(done, depth))
        for index in range(done, depth):
            next(dense)
            _, block = next(tuned)
            source, target = sweep.boundary(STUDENT, index), sweep.boundary(TEACHER, index + 1)
            losses = refine(student, block, index, store, source, target, how)["refinement"]
            if index + 1 < depth:
                sweep.advance(student, block, index, store, STUDENT, self.batch)
            digest = self._write_block(block, index)
            del block
            self.journal.append(f"block/{index}", losses=losses, sha256=digest)
            for stream in (STUDENT, TEACHER):
                store.remove(sweep.boundary(stream, index))
            self.progress.step(f"block {index}: {losses[0]:.3g} → {losses[1]:.3g}")
        blocks = [step["losses"] for step in self.journal.steps("block/")]
        lines = enumerate(self.journal.steps("block/"))
        shards = {write.block_shard(student, index): line["sha256"] for index, line in lines}
        first, last = (sum(each) / depth for each in zip(*blocks, strict=True))
        return {"loss_first": first, "loss_last": last, "blocks": blocks}, shards

    @kind("training")
    def _lora(self) -> tuple[Entry, dict[str, str]]:
        """Train end to end in memory, then add the updates block by block; return figures and digests of the shards."""
        config = self.config
        saved = [step["step"].removeprefix("steps/") for step in self.journal.steps("steps/")]
        done = int(saved[-1]) if saved else 0
        self._keep_state(done)

        def save(state: dict[str, Tensor], losses: list[float]) -> None:
            reached = int(state["step"])
            digest = write_shard(self._state_path(reached), state)
            self.journal.append(f"steps/{reached}", losses=losses, sha256=digest)
            self._keep_state(reached)

        if done < config.steps:
            how = lora.Lora(config.rank, config.steps, self.rate, config.seed, REFINE_SEQUENCES, self.micro)
            state = self._state(done) if done else None
            self.progress.phase("lora", config.steps, done)
            for loss in lora.train(self.student, self.tokens, how, state, save):
                self.progress.step(f"loss {loss:.4f}")
        updates, shards = self._state(config.steps), {}
        self.progress.phase("write", len(self.student))
        for index, block in sweep.blocks(self.student, range(len(self.student))):
            prefix = f"{index}."
            block.absorb(
                {n.removeprefix(prefix): t.to(self.device) for n, t in updates.items() if n.startswith(prefix)}
            )
            shards[write.block_shard(self.student, index)] = self._write_block(block, index)
            del block
            self.progress.step(f"block {index}")
            rest(self.progress)
        losses = [loss for step in self.journal.steps("steps/") for loss in step["losses"]]
        first, last = ends(losses)
        return {"loss_first": first, "loss_last": last, "losses": losses}, shards

    def _state(self, step: int) -> dict[str, Tensor]:
        line = self.journal.find(f"steps/{step}")
        assert line is not None
        return load_shard(self._state_path(step), line["sha256"])

    def _state_path(self, step: int) -> Path:
        return self.folder / f"{STATE}{step:06}.safetensors"

    def _keep_state(self, step: int) -> None:
        """Remove all states but that of `step`, and incomplete files from killed processes."""
        for path in self.folder.glob(f"{STATE}*"):
            if path != self._state_path(step):
                files.remove(path)

    def _write_block(self, block: Block, index: int) -> str:
        """Write a block's shard; return its digest."""
        names = self.student.block_names(index)
        shard = self.staging / write.block_shard(self.student, index)
        return write_shard(shard, {full: block.weights[name] for name, full in names.items()})

    def _write(self, figures: Mapping[str, Any], shards: Mapping[str, str]) -> dict[str, str]:
        """Write everything but the blocks' shards, whose digests are given; return the digests of all files."""
        student, config = self.student, self.config
        report = {
            "tuning": {
                "method": self.method,
                "rank": config.rank,
                "steps": config.steps,
                "rate": self.rate,
                "micro_batch": self.micro,
                **figures,
            },
            "parameters_after": student.parameters(),
            "job": self.header,
            "model": hub.origin(config.model),
            "tokens": windows.fingerprint(self.tokens),
            "source": self.source,
            **totals(self.journal),
            **peaks(self.journal),
        }
        digests = {**shards, **write.write_outside(student, self.staging)}
        if (config.model / CURVES).is_file():
            digests[CURVES] = files.copy(config.model / CURVES, self.staging / CURVES)
        card = tuning_card(report, hub.title(config.model))
        sites, layout = student.all_sites(), write.layout_of(student)
        return write.finish(student, self.staging, sites, report, card, layout, digests, self.progress)
