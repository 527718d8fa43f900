"""The folder of a job that creates a checkpoint directory OUT: it lies beside OUT, with lock, journal and staging.

OUT appears by one rename when the job is complete. An earlier result in OUT is removed only then, and only if
streamprune wrote it.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..errors import CheckpointError, ConfigError, DiskError, ResourceError, ResumeError, Stopped, one_line
from ..model import manifest
from ..model.checkpoint import Checkpoint
from ..model.names import REPORT
from ..model.skeleton import Skeleton
from ..stream.store import ActivationStore
from ..stream.sweep import check_weights
from ..system import files, machine
from ..system.log import NAME as LOG
from ..system.log import Log
from ..system.progress import STOPPED, Progress, Silent
from ..system.ranks import ALONE, Ranks
from ..system.strict_json import read_json
from ..system.units import format_bytes
from . import caches, resume
from .caches import Caches
from .config import JobConfig
from .journal import Entry, Journal
from .meter import metered
from .names import JOURNAL, LOCK, REPLACED, STAGING, job_folder
from .schedule import Schedule

PROBE = "probe"
SMALLER = "smaller-batches"
"""Name of the journal's line of micro-batches that were halved; see `JobFolder.smaller_batches`."""
OTHER_OUT = "fix that or choose another OUT"
OTHER_CACHE = "fix that or choose another --cache"


class JobFolder:
    """Folders, lock and journal of one job.

    Args:
        config: settings of the job; `out` is absolute.
        started: monotonic time in seconds at which this process began.
        is_ours: whether the content of a `report.json` is from this kind of job.
        ranks: ranks that share the job. The first holds its lock, journal and log, and alone changes shared files.
    """

    known: ClassVar[set[str]] = {JOURNAL, LOCK, STAGING, LOG, caches.RECORD, "cache", REPLACED}
    """Names that the job's folder may contain."""
    known_prefixes: ClassVar[tuple[str, ...]] = (f"{LOCK}-",)
    """Prefixes of other names that the job's folder may contain."""

    def __init__(
        self,
        config: JobConfig,
        device: torch.device,
        started: float,
        is_ours: Callable[[Any], bool],
        progress: Progress | None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks = ranks
        self._log = Log(progress)
        self._asked = self._log.stopping
        self.progress: Progress = self._log if ranks.first else Silent()
        self._config, self._out, self._cache, self._is_ours = config, config.out, config.cache, is_ours
        self.device, self.started, self.peaks = device, started, machine.Peaks(device)
        self.folder = job_folder(config.out)
        self._caches = Caches(self.folder, config.cache)
        self.cache = self._caches.own
        self._rank_cache = self.cache if ranks.size == 1 else self.cache / f"rank-{ranks.rank}"
        self._given_cache = str(config.cache.absolute()) if config.cache else None  # as the journal records it
        self.staging = self.folder / STAGING
        self.journal_path = self.folder / JOURNAL
        self.resumed = False
        self.journal: Journal
        """Set once the job is opened."""

    @property
    def header(self) -> dict[str, Any]:
        """Settings and inputs that must be unchanged on resume, JSON-ready."""
        raise NotImplementedError

    @property
    def sources(self) -> Sequence[Skeleton]:
        """The models that the job reads."""
        raise NotImplementedError

    @property
    def terms(self) -> resume.Terms:
        """What the journal's first line records and must be unchanged on resume."""
        return {"job": self.header, "cache": self._given_cache}

    def begin(self) -> Entry:
        """Check everything that can be checked in advance, then call `write_start`; return the journal's first line."""
        raise NotImplementedError

    def use(self, resources: Entry) -> None:
        """Take over the sizes that the journal's first line records under `resources`."""
        raise NotImplementedError

    def peak(self, resources: Entry) -> int:
        """Return the bytes that count towards the memory limit at the peak, with such sizes."""
        raise NotImplementedError

    @property
    def resources(self) -> Entry:
        """The sizes in force: those of the journal's first line, some of which have been halved since (see `smaller_batches`)."""
        assert self.journal.header is not None
        found = dict(self.journal.header["resources"])
        for line in self.journal.steps(SMALLER):
            found |= line["resources"]
        return found

    @contextmanager
    def smaller_batches(self) -> Iterator[None]:
        """Halve the micro-batches if a GPU runs out of memory inside the context, whose body the caller then repeats.

        It must continue where the journal ends. Sequences per micro-batch are halved once per phase of the schedule, before its
        first journal line, and the journal records it: sizes fix the order of sums, so that a resumed job computes every block
        with the size that it had. What the failed work held is freed. Processes that share a job do not retry. The error is
        passed on where nothing can be halved.
        """
        torch.cuda.empty_cache()
        try:
            yield
        except torch.OutOfMemoryError as error:
            before, phase = self.resources, self._unbegun
            smaller = self._smaller(phase)
            if not smaller:
                self.progress.say(
                    "sequences per micro-batch cannot be halved here: free memory on the GPU and run the same command again, or start "
                    "over with --restart and a smaller --memory"
                )
                raise
            sizes = ", ".join(f"{before[name]} to {size}" for name, size in smaller.items())
            self.progress.say(
                f"{self.device} ran out of memory ({one_line(error).partition('. ')[0]}); sequences per micro-batch go from "
                f"{sizes}, and the sweep starts again"
            )
            self.journal.append(SMALLER, phase=phase, resources=smaller)
            _free_frames(error)

    @property
    def _unbegun(self) -> str | None:
        """Name of the current phase of the schedule; None if a line of it is journalled, or all phases are finished."""
        assert self.journal.header is not None
        schedule = Schedule(self.journal.header["schedule"], self.journal)
        return None if schedule.current is None or schedule.begun else schedule.current.name

    def _smaller(self, phase: str | None) -> Entry:
        """Half of each micro-batch that can be halved before a phase; nothing within one (None), or the second time."""
        if phase is None or self.ranks.size > 1 or any(line["phase"] == phase for line in self.journal.steps(SMALLER)):
            return {}
        sizes = {name: size for name, size in self.resources.items() if name in ("batch", "backward_batch", "micro")}
        return {name: size // 2 for name, size in sizes.items() if size > 1}

    @cached_property
    def room(self) -> dict[str, int]:
        """Memory limits of the job in bytes (see `machine.memory_limits`)."""
        return machine.memory_limits(self.device, self._config.memory, self._config.memory_host or 0, self.ranks)

    @property
    def held(self) -> int:
        """Bytes of the memory limit that the process and activations in host memory take."""
        return self.room["base"] + self.room["memory_host"] if self.device.type == "cpu" else 0

    def open_store(
        self,
        samples: int,
        length: int,
        stored: torch.dtype | None,
        folder: str = "",
        spare: Callable[[], int] | None = None,
    ) -> ActivationStore:
        """Open the store for this rank's activations, or one in a `folder` of it; see `ActivationStore` for `stored` and `spare`."""
        skeleton = self.sources[0]
        return ActivationStore(
            self._rank_cache / folder,
            (samples, length, skeleton.stream_width),
            skeleton.dtype,
            self.device,
            durable=True,
            stored=stored,
            memory=0 if folder else self.room["memory_host"],
            spare=spare,
        )

    def spent(self) -> dict[str, Any]:
        """Return what this process took (seconds, peak bytes, bytes read from the models), and whether it resumed the job."""
        host, device = self.peaks.most()
        return {
            "seconds": round(time.monotonic() - self.started, 3),
            "peak_device_bytes": device,
            "peak_host_bytes": host,
            "bytes_read": sum(skeleton.checkpoint.bytes_read for skeleton in self.sources),
            "resumed": self.resumed,
        }

    def finished_report(self, restart: bool) -> Entry | None:
        """Return the report of OUT if this job already finished it; None if there is work to do. Raises as `existing_report`."""
        report = self.existing_report()
        if report is None or restart or resume.replaces_out(self._started(), self.terms):
            return None
        resume.refuse_other_result(self._out, report, self.terms)
        try:
            Skeleton(Checkpoint(self._out), device=torch.device("cpu"), dtype=torch.float32)
        except CheckpointError as error:
            raise ConfigError(
                f"OUT is {self._out}, a finished result that was damaged: {error}; --restart replaces it"
            ) from error
        self.resumed = True
        return report

    def tidy(self) -> None:
        """Clean up after a process that ended between publishing its result and this. All ranks call it."""
        if self.ranks.broadcast(lambda: self.folder.is_dir() and self._is_own()):
            with files.locked(self.folder / LOCK) if self.ranks.first else nullcontext():
                self.clear()
            if self.ranks.first:
                self._remove_folder()

    def _is_own(self) -> bool:
        """Whether the folder is from this job, not from one with other settings that will replace OUT."""
        start = self._started()
        return self._foreign() is None if start is None else resume.is_same(start, self.terms)

    def _started(self) -> Entry | None:
        """Return the first line of the journal; None if no job was started. It may be running."""
        return Journal(self.journal_path, repair=False).header

    def existing_report(self) -> Entry | None:
        """Return the report of streamprune's result in OUT; None if OUT is empty. Raises ConfigError for anything else."""
        out = self._out
        if out.is_symlink() or (out.exists() and not out.is_dir()):
            raise ConfigError(f"OUT is {out}, which is not a directory")
        if not out.is_dir() or not any(out.iterdir()):
            return None
        report = read_json(out / REPORT) if (out / REPORT).is_file() else {}
        if not self._is_ours(report):
            raise ConfigError(f"OUT is {out}, which already exists and was not written by streamprune")
        return report

    @contextmanager
    def opened(self, restart: bool) -> Iterator[None]:
        """Hold the job exclusively, start or resume it, and measure and limit what it takes inside this context.

        Raises:
            ResumeError: the job was started with other settings, inputs or versions, or another process works on it.
        """
        self._check_paths()
        first = self.ranks.first
        with self._claimed() as new:
            try:
                if first:
                    replaced = restart or self.existing_report() is None
                    if not replaced and not resume.replaces_out(self._started(), self.terms):
                        raise ResumeError(f"another process has just finished this job: OUT is {self._out}")
                    self._put_back()
                self._start(restart)
                self.journal.after_append = self._check_stop
                with (
                    self._log.opened(self.folder, resumed=self.resumed) if first else nullcontext(),
                    machine.limit_memory(self.device, self._config.memory),
                    machine.deterministic(self.device, strict=not any(each.stateful for each in self.sources)),
                    metered(self.journal, self.started, self.peaks, self.ranks),
                ):
                    yield
            except BaseException as error:
                if first and not self.journal_path.exists():
                    self._clean_up(new)
                elif isinstance(error, DiskError):
                    raise DiskError(f"{error}; run the same command again to resume") from error
                raise

    def _start(self, restart: bool) -> None:
        """Start the job, or find the point where an earlier process stopped."""
        self.journal = Journal(self.journal_path, restart=restart, ranks=self.ranks)
        start = self.journal.header
        if start is None:
            if (path := self._foreign()) is not None:
                raise ConfigError(
                    f"{self.folder} contains {path.name}, which no job writes; move it away or choose another OUT"
                )
            # What reads the text is loaded before memory is measured, as it is when a job resumes.
            _ = self.header
            start = self.begin()
        else:
            resume.check_same(start, self.terms, self.folder)
            resume.check_sources(start, self.sources, self.ranks)
            resume.check_memory(self._config.memory, self.room["device_limit"], self.peak(self.resources))
            self.resumed = any(self.journal.steps())
        self.use(self.resources)

    def write_start(self, *, stores: bool, **data: Any) -> Entry:
        """Read the models, remove the files of an earlier job, and write the journal's first line. All ranks call this.

        `stores` is whether the job writes activations.
        """
        sources = self._read_sources()
        if self.ranks.first:
            files.remove(self.journal_path)
            files.sync(self.folder)
        self._caches.remove(self.ranks)
        if self.ranks.first:
            files.empty_folder(self.folder, keep=LOCK)
            if stores:
                self._caches.record()
        self.journal = Journal(self.journal_path, ranks=self.ranks)
        replaces = self.existing_report() is not None
        return self.journal.append("start", **self.terms, sources=sources, replaces=replaces, **data)

    def _check_paths(self) -> None:
        """Check that the job can create its files, and that they would lie where the user means."""
        for name, path in (("OUT", self.folder), ("cache", self.cache)):
            try:
                str(path).encode()
            except UnicodeEncodeError:
                raise ConfigError(f"{name} is {path}, which is not UTF-8; choose another name") from None
            parent = next(parent for parent in path.parents if parent.exists())
            if not parent.is_dir():
                raise ConfigError(f"{name} cannot be below {parent}, which is not a directory")
        for place in (self._out, self.folder):
            if self._cache is not None and self._cache.resolve().is_relative_to(place.resolve()):
                raise ConfigError(f"cache is {self._cache}, which is inside {place}; choose a folder outside")
        for place in (self.folder, self.cache):
            if link := files.find_symlink(place):
                raise ConfigError(f"{link} is a symbolic link; a job does not write through links")
        if self._out.is_mount():
            raise ConfigError(f"OUT is {self._out}, a mount point, which cannot be replaced; choose a folder in it")

    def _clean_up(self, new: bool) -> None:
        """Clean up after a failure before the first journal line. Files that existed before stay."""
        if self.folder.is_dir() and (new or all(path.name.startswith(LOCK) for path in self.folder.iterdir())):
            self._caches.remove()
            files.empty_folder(self.folder)
        else:
            files.remove(self.folder / LOCK)

    @contextmanager
    def _claimed(self) -> Iterator[bool]:
        """Create the folder and hold this rank's lock in it; yield whether this process created the folder."""
        first, rank = self.ranks.first, self.ranks.rank
        new = first and not self.folder.exists()
        try:
            with ExitStack() as locks:
                try:
                    for _ in self.ranks.in_turn():
                        with files.trying("making a folder and locking a file in it", self.folder.parent, OTHER_OUT):
                            files.make_folder(self.folder)
                            locks.enter_context(files.locked(self.folder / (LOCK if first else f"{LOCK}-{rank}")))
                        self._probe()
                except DiskError:
                    if new:
                        files.empty_folder(self.folder)  # safe: without locks, no other process can work here
                    raise
                yield new
        finally:
            self._remove_folder()

    def _probe(self) -> None:
        """Check that the file systems support what a job needs, before any work starts."""
        if not files.same_file_system(self.folder, self.folder.parent):
            raise DiskError(f"{self.folder} and {self.folder.parent} are on different file systems; {OTHER_OUT}")
        files.check_file_system(self.folder, PROBE, OTHER_OUT)
        if self._cache is not None:
            files.check_file_system(self._rank_cache, f"{self.cache.name}-{PROBE}", OTHER_CACHE)

    def _check_stop(self) -> None:
        """Stop all ranks at the same point if any of them was asked to stop."""
        if any(self.ranks.gather(self._asked())):
            raise Stopped(STOPPED)

    def _read_sources(self) -> list[Entry]:
        """Read and check all weights. Returns file stamps and checksums of each source, to detect changes later."""
        found = []
        for skeleton in self.sources:
            stamps = skeleton.checkpoint.stamps()
            parts = self.ranks.gather(check_weights(skeleton, self.progress, self.ranks))
            found.append({"stamps": stamps, "sums": {name: check for part in parts for name, check in part.items()}})
        return found

    def _foreign(self) -> Path | None:
        """Return a file in the job's folder that is not from such a job."""
        for path in sorted(self.folder.iterdir()):
            # A killed process may have left an incomplete file.
            name = path.name.removesuffix(files.TEMPORARY)
            if name not in self.known and not name.startswith(self.known_prefixes):
                return path
        return None

    def check_disk(self, result: int, activations: int) -> None:
        """Check free disk space for the result, and for activations if they share its file system, in bytes."""
        free = files.free_bytes(self.folder)
        shared = files.same_file_system(self.folder, self.cache)
        needed = result + (activations if shared else 0)
        if needed > free:
            what = "the result and the activations" if shared and activations else "the result"
            raise ResourceError(
                f"{what} may need {format_bytes(needed)}; {self.folder.parent} has {format_bytes(free)} free"
            )

    def complete(self, digests: Mapping[str, str]) -> None:
        """Record the staged result as complete, given its digests. Raises ResumeError if a model has changed meanwhile."""
        assert self.journal.header is not None
        resume.check_sources(self.journal.header, self.sources, self.ranks)
        self.journal.append("complete", sha256=digests)

    def publish(self) -> Entry:
        """Publish the finished result as OUT, unless that is done already, and clean up; return its report."""
        report = self.ranks.broadcast(self._publish)
        self.clear()
        return report

    def _publish(self) -> Entry:
        there = self.staging.is_dir()
        report = read_json((self.staging if there else self._out) / REPORT)
        if there:
            self._log.finish()
            complete = self.journal.find("complete")
            assert complete is not None
            log = files.copy(self.folder / LOG, self.staging / LOG)
            manifest.check(self.staging / LOG, log)
            manifest.write(self.staging, {**complete["sha256"], LOG: log})
            try:
                self._make_way()
                files.publish(self.staging, self._out)
            except DiskError:
                self._put_back()
                raise
        return report

    def _make_way(self) -> None:
        """Move an earlier result in OUT aside, if this job was told to replace it."""
        if self.existing_report() is None:
            return
        start = self.journal.header
        assert start is not None
        if not start["replaces"]:
            raise ConfigError(f"OUT is {self._out}, where another result appeared during the job")
        files.remove_tree(self.folder / REPLACED)
        files.rename_folder(self._out, self.folder / REPLACED)

    def _put_back(self) -> None:
        """Restore the earlier result to OUT if the new one was not published."""
        there = self._out.is_dir() and any(self._out.iterdir())
        if (self.folder / REPLACED).is_dir() and self.staging.is_dir() and not there:
            files.rename_folder(self.folder / REPLACED, self._out)

    def clear(self) -> None:
        """Remove the job's activations, then the content of its folder. All ranks call this.

        The held lock goes last: without it, another job may start in the folder.
        """
        self._caches.remove(self.ranks)
        if self.ranks.first:
            files.empty_folder(self.folder, keep=LOCK)
            files.empty_folder(self.folder)

    def _remove_folder(self) -> None:
        """Remove the job's folder, unless it contains a job.

        This follows the release of the lock: NFS and FUSE keep a hidden name for a removed file that is still open.
        """
        if self.folder.is_dir() and not self.journal_path.exists():
            files.remove_empty_folder(self.folder)


def _free_frames(error: BaseException | None) -> None:
    """Free the local variables of the frames that an error, and the errors that it followed, were raised through."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
