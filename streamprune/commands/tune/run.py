"""Recover a pruned checkpoint by low-rank training: LoRA in memory, or distillation block by block from a dense model.

As in pruning, a step is finished once the journal has its line, and files that a step needs are removed only after the
line that makes them unnecessary. The same code writes the result, and it appears in one rename.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from importlib.metadata import version
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import ConfigError, ResourceError
from ...jobs.config import TuneConfig, TuneMethod
from ...jobs.folder import JobFolder
from ...jobs.forecast.memory import Memory
from ...jobs.forecast.resources import forecast, training_batch
from ...jobs.forecast.workload import Workload
from ...jobs.journal import Entry, Journal
from ...jobs.meter import peaks, totals
from ...jobs.names import is_report, is_tuning
from ...jobs.reports import tuning_card
from ...jobs.resume import RequiredFile, check_tokens, ensure, rewind_to_existing
from ...jobs.schedule import Phase
from ...maths.descent import steps_per_epoch
from ...maths.flops import kind
from ...model import hub, write
from ...model.block import Block
from ...model.checkpoint import Checkpoint, load_shard, write_shard
from ...model.names import CURVES, REPORT
from ...model.skeleton import Skeleton, open_skeleton
from ...model.tokenizer import check_companions, find_bos, load_tokenizer
from ...pruning.correct import write_blocks
from ...pruning.refine import Refinement, ends, refine
from ...stream import sweep
from ...stream.store import ActivationStore
from ...system import files, machine
from ...system.progress import Progress
from ...system.strict_json import read_json
from ...system.units import format_bytes
from ...text.source import Text
from ...text.windows import Windows, sample, text_identity, whole, window_length
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
    """Mean over the first tenth of the steps, in nats per token: cross-entropy (`lora`), or the divergence of the last block (`distil`)."""
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
    """Train low-rank updates of a checkpoint's linears and write the result to a new directory. An interrupted job resumes.

    Args:
        restart: discard an earlier job with the same `out`, including its result.

    Raises:
        StreamPruneError: see `errors`. `out` is then unchanged.
    """
    job = Tuning(config, progress, restart)
    report = job.finished_report(restart)
    if report is None:
        with job.opened(restart):
            report = job.work()
    else:
        job.tidy()
    tuning = report["tuning"]
    return Tuned(
        out=str(config.out),
        **{name: tuning[name] for name in ("method", "rank", "steps", "loss_first", "loss_last")},
        parameters=report["parameters_after"],
        tokens=report.get("tokens"),
        operations=report["operations"],
        **job.spent(),
    )


class Tuning(JobFolder):
    """One tuning job, which resumes from its journal. Raises all errors that can be detected before any work starts."""

    known_prefixes: ClassVar = (*JobFolder.known_prefixes, STATE)

    def __init__(self, config: TuneConfig, progress: Progress | None, restart: bool) -> None:
        started = time.monotonic()
        teacher = config.teacher and hub.resolve_model(config.teacher, progress)
        model = hub.resolve_model(config.model, progress)
        self.config = config = replace(config, model=model, teacher=teacher, out=config.out.absolute())
        super().__init__(config, machine.resolve_device(config.device), started, is_tuning, progress)
        self.student = student = open_skeleton(config.model, self.device, config.dtype)
        self.activations = machine.resolve_activations(config.activations, student.dtype, student.checkpoint.dtype)
        self.source = self._source()
        if config.rank > student.width:
            raise ConfigError(f"rank is {config.rank}; the model's width is {student.width}")
        self.length = window_length(config.seq_len, student.context)
        self.teacher: Skeleton | None = None
        self.method: TuneMethod = self._method(restart)
        self.rate = config.rate or RATES[self.method]
        if self.method == "distil":
            self.teacher = self._teacher()

    @property
    def sources(self) -> list[Skeleton]:
        return [self.student] if self.teacher is None else [self.student, self.teacher]

    def _source(self) -> Entry | None:
        """Read the report of the model to tune, if it has one. Refuses a model with zeroed weights."""
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
        method, teacher, lacking = self.config.method, self.config.teacher, ""
        if method == "auto" and not restart:
            begun = Journal(self.journal_path, repair=False).header or self.existing_report()
            method = begun["job"]["settings"].get("method", method) if begun is not None else method
        if method == "auto":
            limit, least = self.room["device_limit"], self.needed
            if not lora.installed():
                lacking = "peft is not installed (pip install 'streamprune[tune]')"
            elif least > limit:
                lacking = (
                    f"training the model in memory needs {format_bytes(least)} and the limit is {format_bytes(limit)}"
                )
            if lacking and teacher is None:
                raise ConfigError(
                    f"method lora is not possible: {lacking}; distil needs the dense model: --teacher DIR"
                )
            method = "distil" if lacking else "lora"
            self.progress.say(f"method {method}: {lacking or 'the model with its gradients fits into memory'}")
        if method == "lora" and not lora.installed():
            raise ConfigError("method is 'lora', which needs peft: pip install 'streamprune[tune]'")
        only_lora = {"batch": lora.Schedule.batch, "warmup": 0, "dropout": 0.0, "epochs": None}
        for name, default in only_lora.items() if method == "distil" else ():
            if (value := getattr(self.config, name)) != default:
                raise ConfigError(f"{name} is {value}; method distil has none: take lora")
        if method == "distil" and teacher is None:
            raise ConfigError("method is 'distil', which needs the dense model: --teacher DIR")
        if method == "distil" and self.config.loss_on != "all":
            raise ConfigError(
                f"loss_on is {self.config.loss_on!r}; method distil fits the outputs of blocks and has no labels: take lora"
            )
        return method

    def _teacher(self) -> Skeleton:
        assert self.config.teacher is not None
        student, path = self.student, self.config.teacher
        # Compute in the student's dtype, whatever the stored dtype: the outputs are compared with the student's.
        teacher = Skeleton(Checkpoint(path), device=self.device, dtype=student.dtype)
        for name, ours, theirs in (
            ("blocks", len(student), len(teacher)),
            ("width of the stream", student.stream_width, teacher.stream_width),
            ("vocabulary", student.vocabulary, teacher.vocabulary),
        ):
            if ours != theirs:
                raise ConfigError(f"teacher {path} does not match {self.config.model}: {name} {theirs}, not {ours}")
        window_length(self.length, teacher.context)
        return teacher

    # Settings, text and resources.

    @cached_property
    def header(self) -> dict[str, Any]:
        import transformers

        settings = {
            "method": self.method,
            **self.config.fixed(),
            "bos": self.bos is not None,
            "rate": self.rate,
            "dtype": machine.dtype_name(self.student.dtype),
            "activations": machine.activations_name(self.activations, self.student.dtype),
        }
        inputs = {"model": self.student.checkpoint.identity(), **text_identity(self.text, self.config.model)}
        versions = {"torch": str(torch.__version__), "transformers": transformers.__version__}
        if self.teacher is not None:
            inputs["teacher"] = self.teacher.checkpoint.identity()
        else:
            versions["peft"] = version("peft")
        return {"settings": settings, "inputs": inputs, "versions": versions}

    @cached_property
    def text(self) -> Text:
        return Text.of(self.config.text)

    @cached_property
    def bos(self) -> int | None:
        """The token that every window begins with, if any."""
        return find_bos(self.config.model, self.config.bos, self.student.vocabulary)

    @cached_property
    def windows(self) -> Windows:
        """Training windows."""
        config, vocabulary = self.config, self.student.vocabulary
        tokenizer = load_tokenizer(config.model, vocabulary)
        if config.epochs is not None:
            return whole(
                tokenizer,
                self.text,
                vocabulary,
                self.length,
                bos=self.bos,
                loss_on=config.loss_on,
                cut=config.windows,
            )
        samples, length, seed = config.samples, self.length, config.seed
        return sample(
            tokenizer,
            self.text,
            vocabulary,
            samples,
            length,
            seed,
            self.progress,
            bos=self.bos,
            loss_on=config.loss_on,
            cut=config.windows,
        )

    @property
    def steps(self) -> int:
        """Number of training steps."""
        if self.config.epochs is None:
            return self.config.steps
        return self.config.epochs * steps_per_epoch(len(self.windows.tokens), self.config.batch)

    def _workload(self, skeleton: Skeleton) -> Workload:
        config = self.config
        return Workload(
            samples=config.samples,
            length=self.length,
            text=True,
            refines=config.steps if skeleton is self.student else 0,
            rank=config.rank,
            prunes=False,
            activations=self.activations,
        )

    def peak(self, resources: Entry) -> int:
        batch, micro = resources["batch"], resources["micro"]
        memories = [Memory(skeleton, self._workload(skeleton)) for skeleton in self.sources]
        if self.teacher is None:
            return self.held + memories[0].in_memory(micro)
        return self.held + max(memory.device_peak(batch, micro) for memory in memories)

    @property
    def needed(self) -> int:
        """The least memory limit, in bytes, for training the model in memory."""
        memory = Memory(self.student, self._workload(self.student))
        return self.held + memory.limit_for(memory.in_memory(1))

    def _batches(self) -> dict[str, int]:
        """Return the sequences per micro-batch, forward (``batch``) and training (``micro``), that fit into memory."""
        limit, limits = self.room["device_limit"], {**self.room, "disk_limit": files.free_bytes(self.cache)}
        if self.teacher is not None:
            ours, theirs = (forecast(each, self._workload(each), **limits).require() for each in self.sources)
            self.check_disk(ours.output_bytes, ours.disk_bytes)
            return {"batch": min(ours.batch, theirs.batch), "micro": ours.backward_batch}
        memory = Memory(self.student, self._workload(self.student))
        micro = training_batch(memory, memory.plannable(limit) - self.held)
        if micro is None:
            raise ResourceError(
                f"the memory limit is {format_bytes(limit)}; training the model in memory needs "
                f"{format_bytes(self.needed)}; --method distil with --teacher needs only a block at a time"
            )
        self.check_disk(memory.beside_out() + memory.states(self.config.rank), 0)
        return {"batch": 1, "micro": micro}

    # Opening and resuming.

    def use(self, resources: Entry) -> None:
        self.batch: int = resources["batch"]
        self.micro: int = resources["micro"]
        self.how = Refinement(self.steps, self.config.seed, self.micro, rate=self.rate, rank=self.config.rank)
        for skeleton in self.sources if self.method == "distil" else ():
            workload, limit = self._workload(skeleton), self.room["device_limit"]
            skeleton.copies_ahead = Memory(skeleton, workload).copies_ahead((self.batch, self.micro, "device"), limit)

    def begin(self) -> Entry:
        batches = self._batches()
        tokens = self.windows.fingerprint
        check_companions(self.config.model, self.student.vocabulary, self.progress, required=True)
        if self.config.warmup >= self.steps:
            raise ConfigError(f"warmup is {self.config.warmup}; the training has {self.steps} steps")
        work = [Phase("steps", math.ceil(self.steps / lora.SAVE_EVERY))]
        if self.method == "distil":
            work = [Phase("embed"), Phase("block", len(self.student))]
        schedule = [asdict(phase) for phase in (*work, Phase("complete"))]
        return self.write_start(stores=self.method == "distil", tokens=tokens, resources=batches, schedule=schedule)

    def _required_files(self) -> Iterator[RequiredFile]:
        """Iterate over the files that the next step reads. The first block's inputs can be embedded again."""
        complete, shards = self.journal.find("complete"), self._distilled()
        if complete is not None and not self.staging.is_dir():
            return  # published
        written = [(self.staging, "block/", shards), (self.folder, "steps/", self._saved)]
        if complete is not None:
            written = [(self.staging, "complete", complete["sha256"])]
        for folder, step, digests in written:
            for name, digest in digests.items():
                yield RequiredFile(folder / name, step, partial(files.has_digest, folder / name, digest))
        for stream in (STUDENT, TEACHER) if complete is None and 0 < len(shards) < len(self.student) else ():
            name = sweep.boundary(stream, len(shards))
            yield RequiredFile(self._store.path(name), "block/", partial(self._store.intact, name))

    # The work.

    def work(self) -> Entry:
        """Train, write and publish; return the report."""
        while True:
            with self.smaller_batches():
                return self._work()

    def _work(self) -> Entry:
        assert self.journal.header is not None
        check_tokens(self.journal.header, self.windows.fingerprint)
        rewind_to_existing(self.journal, self._required_files, self.progress)
        self.use(self.resources)
        if self.journal.find("complete") is None:
            files.make_folder(self.staging)
            figures, shards = self._lora() if self.method == "lora" else self._distil()
            self.complete(self._write(figures, shards))
        return self.publish()

    @cached_property
    def _stock(self) -> bool:
        """Whether the result is a stock checkpoint."""
        return write.fits_stock(self.student, self.student.all_sites())

    @cached_property
    def _store(self) -> ActivationStore:
        return self.open_store(self.config.samples, self.length, self.activations)

    def _distil(self) -> tuple[Entry, dict[str, str]]:
        """Fit each block from the tuned stream's input to the teacher's output; return figures and shards' digests."""
        assert self.teacher is not None
        student, teacher, store, depth = self.student, self.teacher, self._store, len(self.student)
        done, counts = len(self._distilled()), sweep.predicting(self.windows.labels)
        for stream, skeleton in ((STUDENT, student), (TEACHER, teacher)):
            if not done:
                name = sweep.boundary(stream, 0)
                ensure(store, name, partial(sweep.embed, skeleton, self.windows.tokens, store, name, self.batch))
        if self.journal.find("embed") is None:
            self.journal.append("embed")
        store.keep_only({sweep.boundary(stream, done) for stream in (STUDENT, TEACHER)})
        self.progress.phase("distil", depth, done)
        # Hold one block at a time: the teacher's block is freed before the student's is read.
        dense = sweep.forward(teacher, store, TEACHER, done, depth, self.batch)
        tuned = sweep.blocks(student, range(done, depth))
        for index in range(done, depth):
            next(dense)
            _, block = next(tuned)
            source, target = sweep.boundary(STUDENT, index), sweep.boundary(TEACHER, index + 1)
            losses = refine(student, block, index, store, source, target, self.how, counts=counts)["refinement"]
            if index + 1 < depth:
                sweep.advance(student, block, index, store, STUDENT, self.batch)
            digest = write.write_block(student, index, block.weights, self.staging, stock=self._stock)
            del block
            self.journal.append(f"block/{index}", losses=losses, sha256=digest)
            for stream in (STUDENT, TEACHER):
                store.remove(sweep.boundary(stream, index))
            self.progress.step(f"block {index}: {losses[0]:.3g} → {losses[1]:.3g}")
        blocks = [line["losses"] for line in self.journal.steps("block/")]
        first, last = blocks[-1]
        return {"loss_first": first, "loss_last": last, "blocks": blocks}, self._distilled()

    def _distilled(self) -> dict[str, str]:
        """Digests of the shards of all distilled blocks, by name."""
        lines = enumerate(self.journal.steps("block/"))
        return {write.block_shard(self.student, index): line["sha256"] for index, line in lines}

    @kind("training")
    def _lora(self) -> tuple[Entry, dict[str, str]]:
        """Train end to end in memory, then add the updates block by block; return figures and digests of the shards."""

        def save(state: dict[str, Tensor], losses: list[float]) -> None:
            done = int(state["step"])
            path = self.folder / f"{STATE}{done:06}.safetensors"
            self.journal.append(f"steps/{done}", losses=losses, sha256={path.name: write_shard(path, state)})
            for other in {*self.folder.glob(f"{STATE}*")} - {path}:
                files.remove(other)

        def absorb(block: Block, index: int) -> None:
            names = [f"{name}.{leaf}" for name in self.student.linears(index) for leaf in "uv"]
            block.absorb({name: updates[f"{index}.{name}"].to(self.device) for name in names})

        state = self._state()
        done = 0 if state is None else int(state["step"])
        if done < self.steps:
            config = self.config
            schedule = lora.Schedule(config.batch, config.warmup, config.dropout, config.epochs is not None)
            self.progress.phase("lora", self.steps, done)
            for loss in lora.train(self.student, self.windows, self.how, state, save, schedule):
                self.progress.step(f"loss {loss:.4f}")
        del state
        updates = self._state() or {}
        shards = write_blocks(self.student, self.staging, absorb, self.progress, stock=self._stock)
        losses = [loss for line in self.journal.steps("steps/") for loss in line["losses"]]
        first, last = ends(losses)
        return {"loss_first": first, "loss_last": last, "losses": losses}, shards

    @property
    def _saved(self) -> dict[str, str]:
        """Name and digest of the last saved LoRA state; empty before the first."""
        lines = [*self.journal.steps("steps/")]
        return lines[-1]["sha256"] if lines else {}

    def _state(self) -> dict[str, Tensor] | None:
        return next((load_shard(self.folder / name, digest) for name, digest in self._saved.items()), None)

    def _write(self, figures: Mapping[str, Any], shards: Mapping[str, str]) -> dict[str, str]:
        """Write everything but the blocks' shards, whose digests are given; return the digests of all files."""
        student, config = self.student, self.config
        report = {
            "tuning": {
                "method": self.method,
                "rank": config.rank,
                "steps": self.steps,
                "rate": self.rate,
                "micro_batch": self.micro,
                **figures,
            },
            "parameters_after": student.parameters(),
            "job": self.header,
            "model": hub.origin(config.model),
            "tokens": self.windows.fingerprint,
            "source": self.source,
            **totals(self.journal),
            **peaks(self.journal),
        }
        sites, layout = student.all_sites(), write.layout_of(student)
        digests = {**shards, **write.write_outside(student, self.staging, self._stock)}
        if (config.model / CURVES).is_file():
            digests[CURVES] = files.copy(config.model / CURVES, self.staging / CURVES)
        card = partial(tuning_card, report, hub.title(config.model))
        return write.finish(student, self.staging, sites, report, card, layout, digests, self.progress, self._stock)
