"""Compare several recipes at several ratios, on the same text and with the same budget, in one table.

One folder holds the work: a journal of finished rows and, under `rows`, one ordinary pruning job per row, which can
itself be resumed. Each row is pruned, measured and, unless `keep` is set, removed. Rows whose surveys are the same share one,
which stays under `surveys` for ratios that are added later.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError, DiskError
from ...jobs import caches
from ...jobs.caches import Caches
from ...jobs.config import Config
from ...jobs.folder import OTHER_CACHE, OTHER_OUT, PROBE
from ...jobs.journal import Entry, Journal
from ...jobs.names import ASKED, JOURNAL, LOCK, ROWS, SURVEYS, WORK
from ...jobs.resume import refuse_difference
from ...jobs.schedule import Phase
from ...model import hub
from ...model.names import REPORT
from ...model.verify import verify
from ...pruning import archive
from ...pruning.job import Job
from ...pruning.run import prune
from ...recipes.allocation import largest_unit
from ...system import files, machine
from ...system.host import return_freed_memory
from ...system.log import NAME as LOG
from ...system.log import Log
from ...system.progress import Progress
from ...system.strict_json import read_json
from ...text.source import Source, Spec, Text, source
from ..evaluate import evaluate, read_windows
from .table import CSV, DENSE, JSON, MARKDOWN, PLOT, Comparison, Row, Variant, reach, require_plotting

FIGURES = ("ratio_blocks", "operations", "forward_equivalents", "peak_host_bytes", "peak_device_bytes")
"""Figures of a `Result` that its `Row` has, too."""
KNOWN = {JOURNAL, LOCK, LOG, ROWS, SURVEYS, PROBE, caches.RECORD, "cache", JSON, CSV, MARKDOWN, PLOT}
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
        common: fields of `Config` for all rows, such as `calibration` and `samples`. `bos` also holds for `text`.

    Raises:
        StreamPruneError: see `errors`. Errors that can be detected in advance are raised before any work starts.
    """
    variants = [Variant.parse(given) if isinstance(given, str) else given for given in recipes]
    _check(variants, ratios, perplexities)
    if plot:
        require_plotting()
    model = hub.resolve_model(model, progress)
    name = os.path.abspath(model) if hub.commit(model) is None else hub.title(model)
    folder = Path(f"{Path(name).name}-compare" if out is None else out)
    candidates = [_Candidate(variant, ratio, model, folder, common) for variant in variants for ratio in ratios]
    for candidate in candidates:
        candidate.job.forecast().require()
    reader = next((c.job for c in candidates if c.job.request.needs_text and not c.job.request.writes_text), None)
    if reader is not None:
        _ = reader.tokens
    first = candidates[0].job
    windows, bos = read_windows(first.skeleton, source(text), eval_seq_len, first.config.bos)
    _refuse_others(folder)
    work = _Work(folder, candidates, source(text), windows.tokens, bos is not None, keep, _RowLog(progress))
    with work.opened(restart):
        work.log.say(f"the table and the pruned checkpoints go to {folder.absolute()}")
        found = work.table(perplexities)
        found.write(folder, plotted=plot)
    return found


class _Candidate:
    """A row to produce: a variant at a ratio, with its pruning job."""

    def __init__(self, variant: Variant, ratio: float, model: Path, folder: Path, common: dict[str, Any]) -> None:
        self.variant, self.ratio, self.title = variant, ratio, f"{variant.label} at {ratio:g}"
        self.name = f"{variant.label}-{ratio}"
        self.out = folder / ROWS / self.name
        given = {"recipe": variant.recipe, "settings": variant.settings, "ratio": ratio, **common}
        self.job = Job(Config(model=model, out=self.out, **given), None)
        self.config = self.job.config
        """The pruning job's config. Its survey is kept for the other rows, unless it is large (`Workload.findings`)."""
        request = self.job.request
        if self.config.survey is None and request.statistics and not request.workload.findings:
            survey = json.dumps([archive.FORMAT, archive.identity(request)], sort_keys=True)
            path = folder / SURVEYS / hashlib.sha256(survey.encode()).hexdigest()[:16]
            self.config = replace(self.config, survey=path)


class _RowLog(Log):
    """A log that prefixes every phase with the current row, and tells what is the same for all rows only once."""

    def __init__(self, progress: Progress | None) -> None:
        super().__init__(progress)
        self.row = ""
        self._said: set[str] = set()

    def phase(self, name: str, total: int, done: int = 0) -> None:
        super().phase(f"{self.row}: {name}", total, done)

    def say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            super().say(message)


class _Work:
    """The comparison's folder and journal. Measures every row on the same windows (windows, length) int64.

    `bos` says whether these windows begin with BOS.
    """

    def __init__(
        self,
        folder: Path,
        candidates: Sequence[_Candidate],
        text: Source,
        windows: Tensor,
        bos: bool,
        keep: bool,
        log: _RowLog,
    ) -> None:
        import transformers

        self.folder, self.candidates, self.text = folder, candidates, text
        self.keep, self.log = keep, log
        self.job, self.config = candidates[0].job, candidates[0].job.config
        """Those of the first row, for what all rows share."""
        self.caches = Caches(folder, self.config.cache)
        self.header: dict[str, Any] = {
            "model": self.job.skeleton.checkpoint.identity(),
            "text": Text((text,)).identity(),
            "eval_seq_len": windows.shape[1],
            "bos": bos,
            "tokens": hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
            "dtype": machine.dtype_name(self.job.skeleton.dtype),
            "versions": {"torch": str(torch.__version__), "transformers": transformers.__version__},
        }
        """The evaluation, which must be the same on resume."""
        self.journal: Journal

    @contextmanager
    def opened(self, restart: bool) -> Iterator[None]:
        """Hold the comparison exclusively: no other process works on it inside this context."""
        rows = self.folder / ROWS
        for path in (*map(self.folder.joinpath, sorted(KNOWN)), self.caches.own):
            if link := files.find_symlink(path):
                raise ConfigError(f"{link} is a symbolic link; a comparison does not write through symbolic links")
        with self._locked():
            if restart:
                self._discard()
            self.journal = Journal(self.folder / JOURNAL)
            if self.journal.header is None:
                self.journal.append("start", evaluation=self.header)
            header, what = self.journal.header, f"{self.folder} contains a comparison"
            assert header is not None
            refuse_difference(what, header["evaluation"], self.header)
            for candidate in self.candidates:
                if (begun := self.journal.find(f"begin/{candidate.name}")) is not None:
                    refuse_difference(what, begun["job"], candidate.job.header, candidate.name)
            self.caches.remove()  # left by a killed evaluation
            for path in self.folder.glob(f"*{files.TEMPORARY}"):
                files.remove(path)
            self.caches.record()
            resumed = any(self.journal.steps())
            phases = [f"{step}/{candidate.name}" for candidate in self.candidates for step in ("prune", "eval")]
            schedule = [asdict(Phase(name)) for name in (f"eval/{DENSE}", *phases)]
            asked = self.journal.find(ASKED)
            if asked is None or asked["schedule"] != schedule:
                self.journal.append(ASKED, schedule=schedule)
            files.make_folder(rows)
            with self.log.opened(self.folder, resumed=resumed):
                yield
                self.log.finish()
            self.caches.remove()
            for lock in (self.folder / SURVEYS).glob(f"*/{archive.LOCK}"):
                files.remove(lock)
            if not any(rows.iterdir()):
                files.remove_tree(rows)
            files.remove(self.folder / LOCK)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Create the folder, hold its lock and check the file systems. If a check fails, leave no new files behind."""
        lock = self.folder / LOCK
        new_folder, new_lock = not self.folder.exists(), not lock.exists()
        with ExitStack() as held:
            try:
                with files.trying("making a folder and locking a file in it", self.folder.parent, OTHER_OUT):
                    files.make_folder(self.folder)
                    held.enter_context(files.locked(lock))
                files.check_file_system(self.folder, PROBE, OTHER_OUT)
                if self.config.cache is not None:
                    files.check_file_system(self.caches.own, f"{self.caches.own.name}-{PROBE}", OTHER_CACHE)
            except DiskError:
                if new_lock:
                    files.remove(lock)
                held.close()
                if new_folder:
                    files.remove_empty_folder(self.folder)
                raise
            yield

    def _discard(self) -> None:
        """Remove an earlier comparison.

        The journal goes first, because rows without it are ignored. Activations go before the record of their folders.
        """
        files.remove(self.folder / JOURNAL)
        files.sync(self.folder)
        for job in (self.folder / ROWS).glob(f"*{WORK}"):
            Caches(job, None).remove()
        self.caches.remove()
        files.empty_folder(self.folder, LOCK)

    def table(self, perplexities: Sequence[float]) -> Comparison:
        self.log.row = f"row 1 of {len(self.candidates) + 1}, {DENSE}"
        dense = self._measured(DENSE, self.config.model)
        rows = [Row(parameters=self.job.skeleton.parameters(), perplexity=dense["perplexity"])]
        shared_peaks, notes = [], []
        for number, candidate in enumerate(self.candidates, start=2):
            variant, out = candidate.variant, candidate.out
            self.log.row = f"row {number} of {len(self.candidates) + 1}, {candidate.title}"
            line = self._pruned(candidate)
            measured = self._measured(candidate.name, out)
            if not measured["keep"]:
                files.remove_tree(out)
            kept = out.is_dir()
            if self.keep and not kept:
                self.log.say(f"{candidate.name} was measured and removed before; --restart prunes it again")
            row = Row(
                label=variant.label,
                recipe=variant.recipe,
                settings=dict(variant.settings),
                ratio=candidate.ratio,
                perplexity=measured["perplexity"],
                log_gap=math.log(measured["perplexity"]) - math.log(dense["perplexity"]),
                out=str(out) if kept else None,
                **line["figures"],
            )
            rows.append(row)
            shared_peaks += [] if line["own_peak"] else [candidate.name]
            if missed := line.get("ratio_missed"):
                notes.append(f"{candidate.title} {missed}.")
        notes += self._budget_notes(rows)
        if any(row.surveyed for row in rows):
            notes.append("Costs with a + leave out the first survey, which an earlier row had taken.")
        if shared_peaks:
            notes.append(f"Host peaks include earlier work of the same process: {', '.join(shared_peaks)}.")
        return Comparison(
            model=hub.shown(self.config.model),
            out=str(self.folder),
            protocol=dense["protocol"],
            settings=self._settings(),
            rows=tuple(rows),
            reached=reach(rows, perplexities),
            notes=tuple(notes),
        )

    def _pruned(self, candidate: _Candidate) -> Entry:
        """Prune a row unless that is done; return its journal line."""
        out, line = candidate.out, self.journal.find(f"prune/{candidate.name}")
        if line is None:
            if self.journal.find(f"begin/{candidate.name}") is None:
                self.journal.append(f"begin/{candidate.name}", job=candidate.job.header)
            return_freed_memory()
            own_peak = machine.reset_peaks(candidate.job.request.device)
            result = prune(candidate.config, progress=self.log)
            report = read_json(out / REPORT)
            return self.journal.append(
                f"prune/{candidate.name}",
                figures={
                    "parameters": result.parameters_after,
                    "seconds": report["seconds"],
                    "surveyed": report["surveyed_before"],
                    **{name: getattr(result, name) for name in FIGURES},
                },
                own_peak=own_peak,
                ratio_missed=result.ratio_missed,
                seconds=report["seconds"],
            )
        unmeasured = self.journal.find(f"eval/{candidate.name}") is None
        if unmeasured and not (out.is_dir() and verify(out, progress=self.log).sound):
            self.log.say(f"{out} is missing or damaged; pruning again")
            files.remove_tree(out)
            prune(candidate.config, progress=self.log)
        return line

    def _measured(self, name: str, model: Path) -> Entry:
        """Measure a row unless that is done; return its journal line."""
        line, started, config = self.journal.find(f"eval/{name}"), time.monotonic(), self.config
        if line is not None:
            return line
        found = evaluate(
            model,
            self.text,
            seq_len=self.header["eval_seq_len"],
            bos="on" if self.header["bos"] else "off",
            device=config.device,
            dtype=config.dtype,
            memory=config.memory,
            cache=self.caches.own,
            memory_host=config.memory_host,
            progress=self.log,
        )
        seconds = round(time.monotonic() - started, 3)
        return self.journal.append(
            f"eval/{name}", perplexity=found.perplexity, protocol=found.protocol, keep=self.keep, seconds=seconds
        )

    def _settings(self) -> dict[str, Any]:
        job, config = self.job, self.config
        length = max(candidate.job.request.length for candidate in self.candidates)
        text = "built-in sample" if config.calibration is None else str(job.request.text)
        return {
            "calibration": text if length else None,
            "samples": config.samples,
            "seq_len": length or None,
            "bos": "on" if self.header["bos"] else "off",
            "seed": config.seed,
            "layout": config.layout,
            "round_to": config.round_to,
            "tensor_parallel": config.tensor_parallel,
            "dtype": machine.dtype_name(job.skeleton.dtype),
            "device": str(job.request.device),
            "text": str(self.text),
        }

    def _budget_notes(self, rows: Sequence[Row]) -> list[str]:
        """Note each ratio at which the recipes' removals differ by more than one step of the widths."""
        notes, blocks = [], self.job.skeleton.block_parameters()
        step = largest_unit(self.job.request.sites, self.job.request.budget())
        for ratio in dict.fromkeys(row.ratio for row in rows[1:]):
            gone = [round(row.ratio_blocks * blocks) for row in rows[1:] if row.ratio == ratio]
            if max(gone) - min(gone) > step:
                notes.append(
                    f"At ratio {ratio:g} the recipes removed between {min(gone):,} and {max(gone):,} parameters, "
                    f"which differ by more than the largest step, {step:,}."
                )
        return notes


def _check(variants: Sequence[Variant], ratios: Sequence[float], perplexities: Sequence[float]) -> None:
    if not variants or not ratios:
        raise ConfigError(f"no {'ratios' if variants else 'recipes'} were given")
    label, times = Counter(variant.label for variant in variants).most_common(1)[0]
    if times > 1:
        raise ConfigError(f"recipe {label} is given twice; give one of them another label: other={label}")
    ratio, times = Counter(ratios).most_common(1)[0]
    if times > 1:
        raise ConfigError(f"ratio {ratio:g} is given twice")
    for perplexity in perplexities:
        if not 1 < perplexity < math.inf:
            raise ConfigError(f"perplexity is {perplexity:g}; it must be above 1 and finite")


def _refuse_others(folder: Path) -> None:
    """Refuse a folder that cannot be created, or that contains files that no comparison writes."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ConfigError(f"out is {folder}; {existing} is not a directory")
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.name.removesuffix(files.TEMPORARY) not in KNOWN:
            raise ConfigError(
                f"out is {folder}, which contains {path.name}, a file that streamprune compare did not write"
            )
