"""Compare several recipes at several ratios, on the same text and with the same budget, in one table.

One folder holds the work: a journal of finished rows and, under `rows`, one ordinary pruning job per row, which can
itself be resumed. Each row is pruned, measured and, unless `keep` is set, removed.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ...errors import ConfigError, DiskError, ResumeError
from ...jobs import caches
from ...jobs.caches import Caches
from ...jobs.config import Config
from ...jobs.folder import OTHER_CACHE, OTHER_OUT, PROBE, first_difference
from ...jobs.journal import Entry, Journal
from ...jobs.names import ASKED, JOURNAL, LOCK, ROWS, WORK
from ...jobs.schedule import Phase, seconds_spent
from ...model import hub
from ...model.names import REPORT
from ...model.verify import verify
from ...pruning.job import Job
from ...pruning.run import prune
from ...recipes.allocation import largest_step
from ...system import files, machine
from ...system.host import return_freed_memory
from ...system.log import NAME as LOG
from ...system.log import Log
from ...system.progress import Progress
from ...system.strict_json import read_json
from ...text.source import Source, Spec, Text, source
from ..evaluate import evaluate, read_windows
from .table import CSV, DENSE, JSON, MARKDOWN, PLOT, Comparison, Row, Variant, reach, require_plotting

KNOWN = {
    *(JOURNAL, LOCK, LOG, ROWS, PROBE, caches.RECORD, "cache"),
    *(JSON, CSV, MARKDOWN, PLOT),
}
"""Names that the folder of a comparison may contain."""


def compare(
    model: str | Path,
    *,
    ratios: Sequence[float],
    recipes: Sequence[str | Variant],
    text: Spec,
    out: str | Path | None = None,
    eval_seq_len: int | None = None,
    perplexities: Sequence[float] = (),
    keep: bool = False,
    plot: bool = False,
    restart: bool = False,
    progress: Progress | None = None,
    **common: Any,
) -> Comparison:
    """Prune a checkpoint with every recipe at every ratio and measure each result. Resumes an interrupted comparison.

    Rows with the same settings that `out` already contains are reused, so ratios and recipes can be added later.

    Args:
        ratios: shares of the blocks' parameters to remove, each in (0, 1).
        recipes: recipe names, ``"label=name"``, or `Variant`s.
        text: one source (see `text.source.Source`) to measure perplexity on.
        out: folder for the table and the work; None takes the model's name with ``-compare`` appended, in the
            current folder.
        eval_seq_len: tokens per window of `text`; None takes 2048, or the model's context if that is shorter.
        perplexities: for each of these, report the ratio at which every recipe reaches it (see `Comparison.reached`).
        keep: keep the pruned checkpoints under `out`.
        plot: also plot the table, which needs matplotlib.
        restart: discard an earlier comparison in `out`.
        common: fields of `Config` for all rows, such as `calibration` and `samples`.

    Raises:
        StreamPruneError: see `errors`. Errors that can be detected in advance are raised before any work starts.
    """
    variants = _variants(recipes)
    _check(ratios, perplexities)
    if plot:
        require_plotting()
    model = hub.resolve_model(model, progress)
    folder = Path(out) if out is not None else _default_folder(model)
    candidates = [
        _Candidate(variant, _config(model, folder, variant, ratio, common)) for variant in variants for ratio in ratios
    ]
    for candidate in candidates:
        candidate.job.forecast().require()
    reader = next((c.job for c in candidates if c.job.needs_text and not c.job.writes_text), None)
    if reader is not None:
        _ = reader.tokens
    evaluation = _Evaluation(candidates[0].job, source(text), eval_seq_len)
    _refuse_others(folder)
    work = _Work(folder, candidates, evaluation, keep=keep, progress=_Counted(Log(progress), len(candidates) + 1))
    with work.opened(restart):
        work.progress.say(f"the table and the work go to {folder.absolute()}")
        found = work.table(perplexities)
        found.write(folder, plot=plot)
    return found


class _Candidate:
    """A row to produce: a variant at a ratio, with its pruning job."""

    def __init__(self, variant: Variant, config: Config) -> None:
        self.variant, self.config = variant, config
        self.job = Job(config, None)
        self.name = config.out.name


class _Evaluation:
    """The evaluation that all rows share.

    Raises:
        StreamPruneError: the text is unusable.
    """

    def __init__(self, job: Job, text: Source, seq_len: int | None) -> None:
        import transformers

        self.text, self.config = text, job.config
        windows = read_windows(job.skeleton, text, seq_len)
        self.length = windows.shape[1]
        self.header = {
            "model": job.skeleton.checkpoint.identity(),
            "text": Text((text,)).identity(),
            "eval_seq_len": self.length,
            "tokens": hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
            "dtype": machine.dtype_name(job.skeleton.dtype),
            "versions": {"torch": str(torch.__version__), "transformers": transformers.__version__},
        }

    def measure(self, model: Path, cache: Path, progress: Progress) -> Entry:
        """Measure a model; return perplexity and protocol. Activations go to `cache`."""
        config = self.config
        measured = evaluate(
            model,
            self.text,
            seq_len=self.length,
            device=config.device,
            dtype=config.dtype,
            memory=config.memory,
            cache=cache,
            memory_host=config.memory_host,
            progress=progress,
        )
        return {"perplexity": measured.perplexity, "protocol": measured.protocol}


class _Counted:
    """Progress that prefixes every phase with the row and the number of rows."""

    def __init__(self, log: Log, total: int) -> None:
        self.log, self._total = log, total
        self._place = ""
        self._said: set[str] = set()

    def row(self, number: int, name: str) -> None:
        """Start a row."""
        self._place = f"row {number} of {self._total}, {name}"

    def phase(self, name: str, total: int, done: int = 0) -> None:
        self.log.phase(f"{self._place}: {name}", total, done)

    def step(self, note: str = "") -> None:
        self.log.step(note)

    def say(self, message: str) -> None:
        # Report a message that is the same for all rows only once.
        if message not in self._said:
            self._said.add(message)
            self.log.say(message)

    def stopping(self) -> bool:
        return self.log.stopping()


class _Work:
    """The comparison's folder and journal. Produces the rows one after another."""

    def __init__(
        self, folder: Path, candidates: Sequence[_Candidate], evaluation: _Evaluation, *, keep: bool, progress: _Counted
    ) -> None:
        self.folder, self.candidates, self.evaluation = folder, candidates, evaluation
        self.keep, self.progress = keep, progress
        self.caches = Caches(folder, candidates[0].config.cache)
        self.journal: Journal

    @contextmanager
    def opened(self, restart: bool) -> Iterator[None]:
        """Hold the comparison exclusively: no other process works on it inside this context.

        Raises:
            ConfigError: a path that the work uses is a symbolic link.
            DiskError: a file system lacks an operation that the work needs.
            ResumeError: a requested row was started with other settings, inputs or versions.
        """
        for place in (*map(self.folder.joinpath, sorted(KNOWN)), self.caches.own):
            if link := files.find_symlink(place):
                raise ConfigError(f"{link} is a symbolic link, where the work would lie; a comparison follows none")
        with self._claimed():
            if restart:
                self._let_go()
            self.journal = Journal(self.folder / JOURNAL)
            if self.journal.header is None:
                self.journal.append("start", evaluation=self.evaluation.header)
            self._compare_with_before()
            files.remove_tree(self.caches.own)  # left by a killed evaluation
            for path in self.folder.glob(f"*{files.TEMPORARY}"):
                files.remove(path)
            self.caches.record()
            resumed = any(self.journal.steps())
            schedule = [asdict(phase) for phase in self._schedule()]
            asked = self.journal.find(ASKED)
            if asked is None or asked["schedule"] != schedule:
                self.journal.append(ASKED, schedule=schedule)
            files.make_folder(self.folder / ROWS)
            with self.progress.log.opened(self.folder, resumed=resumed):
                yield
                self.progress.log.finish()
            self.caches.remove()
            if not any((self.folder / ROWS).iterdir()):
                files.remove_tree(self.folder / ROWS)
            files.remove(self.folder / LOCK)

    @contextmanager
    def _claimed(self) -> Iterator[None]:
        """Create the folder, hold its lock and check the file systems. On failure, leave no new files behind."""
        lock = self.folder / LOCK
        new_folder, new_lock = not self.folder.exists(), not lock.exists()
        try:
            with ExitStack() as held:
                try:
                    with files.trying("making a folder and locking a file in it", self.folder.parent, OTHER_OUT):
                        files.make_folder(self.folder)
                        held.enter_context(files.locked(lock))
                    files.check_file_system(self.folder, PROBE, OTHER_OUT)
                    if self.candidates[0].config.cache is not None:
                        files.check_file_system(self.caches.own, f"{self.caches.own.name}-{PROBE}", OTHER_CACHE)
                except DiskError:
                    if new_lock:
                        files.remove(lock)
                    raise
                yield
        except DiskError:
            if new_folder and self.folder.is_dir() and not any(self.folder.iterdir()):
                files.remove_empty_folder(self.folder)
            raise

    def _let_go(self) -> None:
        """Remove an earlier comparison.

        The journal goes first, because rows without it are ignored. Activations go before the record of their folders.
        """
        files.remove(self.folder / JOURNAL)
        files.sync(self.folder)
        for job in (self.folder / ROWS).glob(f"*{WORK}"):
            Caches(job, None).remove()
        self.caches.remove()
        files.empty_folder(self.folder, LOCK)

    def _compare_with_before(self) -> None:
        header = self.journal.header
        assert header is not None
        then_and_now = [(header["evaluation"], self.evaluation.header, "")]
        for candidate in self.candidates:
            begun = self.journal.find(f"begin/{candidate.name}")
            if begun is not None:
                then_and_now.append((begun["job"], candidate.job.header, candidate.name))
        for then, now, place in then_and_now:
            if found := first_difference(then, now, place):
                raise ResumeError(f"{self.folder} holds a comparison made otherwise: {found}; --restart starts over")

    def _schedule(self) -> list[Phase]:
        """Return the phases of all rows, in order."""
        rows = [Phase(f"{step}/{each.name}") for each in self.candidates for step in ("prune", "eval")]
        return [Phase(f"eval/{DENSE}"), *rows]

    def table(self, perplexities: Sequence[float]) -> Comparison:
        """Produce the missing rows; return all of them."""
        job = self.candidates[0].job
        self.progress.row(1, DENSE)
        dense = self._measured(DENSE, job.config.model)
        level = math.log(dense["perplexity"])
        rows = [
            Row(
                label=DENSE,
                recipe=None,
                settings={},
                ratio=0.0,
                ratio_blocks=0.0,
                parameters=job.skeleton.parameters(),
                perplexity=dense["perplexity"],
                log_gap=0.0,
                seconds=0.0,
                operations=0,
                forward_equivalents=0.0,
                peak_host_bytes=None,
                peak_device_bytes=None,
                out=None,
            )
        ]
        shared_peaks, notes = [], []
        for number, candidate in enumerate(self.candidates, start=2):
            self.progress.row(number, f"{candidate.variant.label} at {candidate.config.ratio:g}")
            line = self._pruned(candidate)
            measured = self._measured(candidate.name, candidate.config.out)
            if not measured["keep"]:
                files.remove_tree(candidate.config.out)
            there = candidate.config.out.is_dir()
            if self.keep and not there:
                self.progress.say(f"{candidate.name} was measured and removed before; --restart prunes it again")
            rows.append(
                Row(
                    label=candidate.variant.label,
                    recipe=candidate.variant.recipe,
                    settings=dict(candidate.variant.settings),
                    ratio=candidate.job.ratio,
                    perplexity=measured["perplexity"],
                    log_gap=math.log(measured["perplexity"]) - level,
                    out=str(candidate.config.out) if there else None,
                    **line["figures"],
                )
            )
            shared_peaks += [] if line["own_peak"] else [candidate.name]
            if missed := line.get("ratio_missed"):
                notes.append(f"{candidate.variant.label} at {candidate.config.ratio:g} {missed}.")
        notes += self._budget_notes(rows)
        if shared_peaks:
            notes.append(
                f"Host peaks of all that the process had done until then, not of one row: {', '.join(shared_peaks)}."
            )
        return Comparison(
            model=hub.shown(job.config.model),
            out=str(self.folder),
            protocol=dense["protocol"],
            settings=self._settings(),
            rows=tuple(rows),
            reached=reach(rows, perplexities),
            notes=tuple(notes),
        )

    def _pruned(self, candidate: _Candidate) -> Entry:
        """Prune a row unless that is done; return its journal line.

        The line has the row's figures, whether its peak of host memory is its own, and why a ratio is missed, if it is.
        """
        line = self.journal.find(f"prune/{candidate.name}")
        if line is not None and self.journal.find(f"eval/{candidate.name}") is None:
            self._hold(candidate)
        if line is None:
            if self.journal.find(f"begin/{candidate.name}") is None:
                self.journal.append(f"begin/{candidate.name}", job=candidate.job.header)
            return_freed_memory()
            own_peak = machine.reset_peaks(candidate.job.device)
            started = time.monotonic() - _spent_before(candidate)
            result = prune(candidate.config, progress=self.progress)
            line = self.journal.append(
                f"prune/{candidate.name}",
                figures={
                    "ratio_blocks": result.ratio_blocks,
                    "parameters": result.parameters_after,
                    "seconds": read_json(candidate.config.out / REPORT)["seconds"],
                    "operations": result.operations,
                    "forward_equivalents": result.forward_equivalents,
                    "peak_host_bytes": result.peak_host_bytes,
                    "peak_device_bytes": result.peak_device_bytes,
                },
                own_peak=own_peak,
                ratio_missed=result.ratio_missed,
                seconds=round(time.monotonic() - started, 3),
            )
        return line

    def _hold(self, candidate: _Candidate) -> None:
        """Verify a checkpoint that an earlier process pruned but did not measure; prune again if it is damaged."""
        out = candidate.config.out
        if not out.is_dir() or not verify(out, progress=self.progress).sound:
            self.progress.say(f"{out} is missing, or not what was written there; pruning again")
            files.remove_tree(out)
            prune(candidate.config, progress=self.progress)

    def _measured(self, name: str, model: Path) -> Entry:
        """Measure a row unless that is done; return perplexity, protocol, and whether to keep the checkpoint."""
        line = self.journal.find(f"eval/{name}")
        if line is None:
            started = time.monotonic()
            measured = self.evaluation.measure(model, self.caches.own, self.progress)
            seconds = round(time.monotonic() - started, 3)
            line = self.journal.append(f"eval/{name}", **measured, keep=self.keep, seconds=seconds)
        return line

    def _settings(self) -> dict[str, Any]:
        job = self.candidates[0].job
        length = max(candidate.job.length for candidate in self.candidates)
        return {
            "calibration": ("built-in sample" if job.config.calibration is None else str(job.text)) if length else None,
            "samples": job.config.samples,
            "seq_len": length or None,
            "seed": job.config.seed,
            "layout": job.config.layout,
            "round_to": job.config.round_to,
            "dtype": machine.dtype_name(job.skeleton.dtype),
            "device": str(job.device),
            "text": str(self.evaluation.text),
        }

    def _budget_notes(self, rows: Sequence[Row]) -> list[str]:
        """Return a note for each ratio at which the recipes' removals differ by more than one step of the widths."""
        job, notes = self.candidates[0].job, []
        step, blocks = largest_step(job.sites, job.budget()), job.skeleton.block_parameters()
        for ratio in dict.fromkeys(row.ratio for row in rows[1:]):
            gone = [round(row.ratio_blocks * blocks) for row in rows[1:] if row.ratio == ratio]
            if max(gone) - min(gone) > step:
                notes.append(
                    f"At ratio {ratio:g} the recipes removed from {min(gone):,} to {max(gone):,} parameters, "
                    f"further apart than the largest step, {step:,}."
                )
        return notes


def _default_folder(model: Path) -> Path:
    """Return the default folder for the work: in the current folder, named after the model."""
    name = os.path.abspath(model) if hub.commit(model) is None else hub.title(model)
    return Path(f"{Path(name).name}-compare")


def _spent_before(candidate: _Candidate) -> float:
    """Return the seconds that earlier processes spent on an unfinished row."""
    path = candidate.job.journal_path
    return seconds_spent(Journal(path, repair=False)) if path.is_file() else 0.0


def _config(model: Path, folder: Path, variant: Variant, ratio: float, common: Mapping[str, Any]) -> Config:
    """Return the configuration of one row's pruning job."""
    return Config(
        model=model,
        out=folder / ROWS / f"{variant.label}-{ratio}",
        ratio=ratio,
        recipe=variant.recipe,
        settings=variant.settings,
        **common,
    )


def _variants(recipes: Sequence[str | Variant]) -> list[Variant]:
    variants = [Variant.parse(given) if isinstance(given, str) else given for given in recipes]
    if not variants:
        raise ConfigError("no recipes were given")
    labels = [variant.label for variant in variants]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"recipe {label} is given twice; give one of them a label of its own: other={label}")
    return variants


def _check(ratios: Sequence[float], perplexities: Sequence[float]) -> None:
    if not ratios:
        raise ConfigError("no ratios were given")
    for ratio in ratios:
        if list(ratios).count(ratio) > 1:
            raise ConfigError(f"ratio {ratio:g} is given twice")
    for perplexity in perplexities:
        if not 1 < perplexity < math.inf:
            raise ConfigError(f"perplexity is {perplexity:g}; it must be above 1 and finite")


def _refuse_others(folder: Path) -> None:
    """Check that the folder can be created or belongs to a comparison.

    Raises:
        ConfigError: it cannot be created, or contains other files.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ConfigError(f"out is {folder}; {existing} is not a directory")
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.name.removesuffix(files.TEMPORARY) not in KNOWN:
            raise ConfigError(f"out is {folder}, which holds something else: {path.name}")
