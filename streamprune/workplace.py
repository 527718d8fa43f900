"""Where a command works that makes a checkpoint directory OUT: the folder beside it, with lock, journal and staging.

OUT appears by one rename when all is done; what it held before goes only then, and only if it is ours.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from . import files, output
from .config import format_bytes
from .errors import CheckpointError, ConfigError, ResourceError, ResumeError, Stopped
from .journal import Entry, Journal
from .log import NAME as LOG
from .log import Log
from .model.checkpoint import Checkpoint, read_json
from .model.skeleton import Skeleton
from .progress import STOPPED, Progress, Silent
from .ranks import ALONE, Ranks
from .text import Text

JOURNAL, LOCK, STAGING = "journal.jsonl", "lock", "out"
KNOWN = {JOURNAL, LOCK, STAGING, LOG, "cache", "replaced"}
"""What every job's folder may hold."""


def job_folder(out: Path) -> Path:
    """Where a job keeps its journal, its finished shards and, unless told otherwise, its activations."""
    return out.absolute().parent / f"{out.absolute().name}.streamprune"


class Workplace:
    """Folders, lock and journal of one job.

    Args:
        out: the directory to make, absolute.
        cache: folder for activations; None keeps them in the job's own.
        is_ours: whether a `report.json` is of this kind of job.
        progress: who is told, besides the log.
        ranks: those that share the job. The first holds its lock, journal and log, and alone changes what is for all.
    """

    def __init__(
        self,
        out: Path,
        cache: Path | None,
        is_ours: Callable[[Any], bool],
        progress: Progress | None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks = ranks
        self._log = Log(progress)
        self._asked = self._log.stopping
        self.progress: Progress = self._log if ranks.first else Silent()
        self._out, self._cache, self._is_ours = out, cache, is_ours
        self.folder = job_folder(out)
        self.staging = self.folder / STAGING
        self.journal_path = self.folder / JOURNAL
        self.resumed = False
        self.journal: Journal
        """Set once the job is opened."""

    @property
    def header(self) -> dict[str, Any]:
        """What must be the same for a job to go on."""
        raise NotImplementedError

    def differs(self, report: Entry) -> str | None:
        """How a finished result is not the one asked for; None if it is."""
        difference = first_difference(report["job"], self.header)
        return f"of another job: {difference}" if difference else None

    def start(self, restart: bool) -> None:
        """Begin, or find out where an earlier process stopped; called with the lock held."""
        raise NotImplementedError

    @property
    def cache(self) -> Path:
        """Where activations go: a folder of this job's own."""
        if self._cache is None:
            return self.folder / "cache"
        return self._cache.absolute() / f"{self.folder.name}-{self.own}"

    @property
    def own_cache(self) -> Path:
        """Where this rank's own go."""
        return self.cache if self.ranks.size == 1 else self.cache / f"rank-{self.ranks.rank}"

    @property
    def own(self) -> str:
        """What tells this job's files from another's where both lie in one folder."""
        return hashlib.sha256(str(self.folder).encode()).hexdigest()[:8]

    @property
    def places(self) -> dict[str, Path]:
        """What the job will make on the disk, by how the user calls it."""
        return {"OUT": self.folder.absolute(), "cache": self.cache}

    @property
    def cache_given(self) -> str | None:
        """For the journal: the activations' folder, if it is not the job's own."""
        return str(self._cache.absolute()) if self._cache else None

    def result_there(self, restart: bool) -> Entry | None:
        """The report of a finished OUT that this very job made, or None when there is work to do.

        Raises:
            ConfigError: OUT holds something else.
        """
        report = self.report_in_out()
        if report is None or restart or self._replacing():
            return None
        if difference := self.differs(report):
            raise ConfigError(f"OUT is {self._out}, a finished result {difference}; --restart replaces it")
        try:
            Skeleton(Checkpoint(self._out), device=torch.device("cpu"), dtype=torch.float32)
        except CheckpointError as error:
            raise ConfigError(
                f"OUT is {self._out}, a finished result that was damaged: {error}; --restart replaces it"
            ) from None
        if self.folder.is_dir():
            with files.locked(self.folder / LOCK):
                self.clear()
        self.resumed = True
        return report

    def report_in_out(self) -> Entry | None:
        """The report of a result of ours in OUT; None when OUT is empty or not there.

        Raises:
            ConfigError: OUT holds something else.
        """
        out = self._out
        if out.is_symlink() or (out.exists() and not out.is_dir()):
            raise ConfigError(f"OUT is {out}, which is not a directory")
        if not out.is_dir() or not any(out.iterdir()):
            return None
        report = read_json(out / output.REPORT) if (out / output.REPORT).is_file() else {}
        if not self._is_ours(report):
            raise ConfigError(f"OUT is {out}, which exists and holds something else")
        return report

    def _replacing(self) -> bool:
        """Whether a job with these very settings is under way that was told to replace what OUT holds."""
        if not self.journal_path.is_file():
            return False
        start = Journal(self.journal_path, repair=False).header
        return start is not None and start["replaces"] and first_difference(start["job"], self.header) is None

    @contextmanager
    def opened(self, restart: bool) -> Iterator[None]:
        """A context in which this process, and no other, works on the job."""
        for name, path in self.places.items():
            parent = next(parent for parent in path.parents if parent.exists())
            if not parent.is_dir():
                raise ConfigError(f"{name} cannot be below {parent}, which is not a directory")
        for place in (self.folder, self.cache):
            if link := files.first_link(place):
                raise ConfigError(f"{link} is a symbolic link, where the work would lie; a job follows none")
        first, rank = self.ranks.first, self.ranks.rank
        new = first and not self.folder.exists()
        with ExitStack() as locks:
            for _ in self.ranks.in_turn():
                files.make_folder(self.folder)
                locks.enter_context(files.locked(self.folder / (LOCK if first else f"{LOCK}-{rank}")))
            try:
                self.start(restart)
                self.journal.rest = self._rest
                with self._log.opened(self.folder, resumed=self.resumed) if first else nullcontext():
                    yield
            finally:
                if new and not self.journal_path.exists() and self.folder.is_dir():
                    files.remove_tree(self.folder)  # refused before it began: leave nothing behind

    def _rest(self) -> None:
        """Where all ranks rest if one was asked to."""
        if any(self.ranks.gather(self._asked())):
            raise Stopped(STOPPED)

    def check_same(self, start: Entry) -> None:
        """Hold what the job was started with against what is asked now.

        Raises:
            ResumeError: other settings, inputs or versions, or another cache.
        """
        if difference := first_difference(start["job"], self.header):
            raise ResumeError(f"{self.folder} holds a job started otherwise: {difference}; --restart starts over")
        if start["cache"] != self.cache_given:
            raise ResumeError(
                f"cache is {self.cache_given or 'not given'}; this job was started with {start['cache'] or 'none'}; "
                "--restart starts over"
            )

    def check_disk(self, result: int, activations: int) -> None:
        """The result's room in bytes, with the activations' where both lie on one file system."""
        free = files.free_bytes(self.folder)
        shared = files.same_file_system(self.folder, self.cache)
        needed = result + (activations if shared else 0)
        if needed > free:
            what = "the result and the activations" if shared and activations else "the result"
            raise ResourceError(
                f"{what} may need {format_bytes(needed)}; {self.folder.parent} has {format_bytes(free)} free"
            )

    def publish(self) -> Entry:
        """Have the finished result appear as OUT, if it has not, and clear up; returns its report.

        Raises:
            ConfigError: OUT holds something that was not there, or not ours, when the job began.
        """
        report = self.ranks.told(self._publish)
        for _ in self.ranks.in_turn():
            files.remove_tree(self.cache)  # each machine may have a disk of its own
        if self.ranks.first:
            self.clear()
        return report

    def _publish(self) -> Entry:
        there = self.staging.is_dir()
        report = read_json((self.staging if there else self._out) / output.REPORT)
        if there:
            self._make_way()
            self._log.finish(self.staging)
            files.publish(self.staging, self._out)
        return report

    def _make_way(self) -> None:
        """Move an older result of ours aside, if this job was told to replace it."""
        if self.report_in_out() is None:
            return
        start = self.journal.header
        assert start is not None
        if not start["replaces"]:
            raise ConfigError(f"OUT is {self._out}, where another result has appeared meanwhile")
        files.remove_tree(self.folder / "replaced")
        files.move_aside(self._out, self.folder / "replaced")

    def clear(self) -> None:
        """Remove the job's folder and its activations."""
        files.remove_tree(self.cache)
        files.remove_tree(self.folder)


def text_identity(text: Text, model: Path) -> dict[str, Any]:
    """What tells a text and its tokenizer from others: digests.

    Raises:
        CalibrationError: the text cannot be read.
    """
    parts = ("token", "chat_template", "vocab.", "merges.")
    found = {name: model / name for name in output.COMPANIONS if any(part in name for part in parts)}
    return {
        "calibration": text.identity(),
        "tokenizer": {name: files.sha256(path) for name, path in found.items() if path.is_file()},
    }


def first_difference(then: Any, now: Any, place: str = "") -> str | None:
    """The first field in which two JSON values differ, with both values; None if they are equal."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted(then.keys() | now.keys()):
            inner = f"{place}.{key}" if place else key
            if found := first_difference(then.get(key), now.get(key), inner):
                return found
        return None
    # Through JSON, so that what was read back compares equal to what was written.
    if json.dumps(then) == json.dumps(now):
        return None
    return f"{place} is {_short(now)} and was {_short(then)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
