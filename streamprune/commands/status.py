"""Show the progress of a job from the files in or beside its OUT. Read-only."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..errors import ConfigError
from ..jobs.journal import Journal, as_written
from ..jobs.names import ASKED, JOURNAL, LOCK, ROWS, STAGING, is_report, is_tuning, job_folder
from ..jobs.schedule import Schedule, seconds_spent
from ..model.names import REPORT
from ..system import files, log
from ..system.strict_json import read_json
from .compare import table

State = Literal["not started", "running", "interrupted", "failed", "finished"]
EXIT_CODES: dict[State, int] = {"finished": 0, "failed": 1, "not started": 3, "running": 4, "interrupted": 75}
"""Exit codes of `streamprune status`. A stopped job itself also exits with 75."""


@dataclass(frozen=True)
class Status:
    """Status of one job. Unknown values are None."""

    out: str
    state: State  # ``running``: a live process holds the lock. ``interrupted``, ``failed``: the same command resumes the job
    phase: str | None = None  # kind of the current or next step; ``starting`` before the first
    shot: int | None = None
    done: int | None = None
    """Finished steps: journal lines; for a comparison, rows pruned and rows measured. The log is updated more often."""
    total: int | None = None
    share: float | None = None  # `done` divided by `total`
    seconds: float | None = None
    """Seconds spent on finished steps by all processes and, if the job is running, since its last journal line."""
    seconds_left: float | None = None  # estimated from the finished steps
    error: str | None = None  # message of the last process, if it failed
    log: str | None = None  # last line of the log, without its timestamp
    row: Status | None = None  # for a comparison: status of the row being pruned

    @property
    def exit_code(self) -> int:
        """Exit code of `streamprune status`, from `EXIT_CODES`."""
        return EXIT_CODES[self.state]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def status(out: str | Path) -> Status:
    """Show the progress of the pruning, tuning or comparison that writes or wrote `out`.

    Raises:
        ConfigError: `out` is not from such a job.
        ResumeError: the journal is damaged.
    """
    for _ in range(2):
        with suppress(FileNotFoundError):  # a job, or a row of a comparison, ended meanwhile and removed its folder
            return _status(Path(out))
    return _status(Path(out))


def check_finished(out: Path) -> None:
    """Raise ConfigError unless a path is the finished result of a pruning or tuning job."""
    if (out / REPORT).is_file():
        return
    if (job_folder(out) / JOURNAL).is_file():
        raise ConfigError(f"{out} is not finished; streamprune status {out} shows its progress")
    if (out / table.JSON).is_file():
        raise ConfigError(f"{out} contains a comparison (see {table.MARKDOWN}); --comparison {out} adds it to a report")
    raise ConfigError(f"{out} has no {REPORT}: it is not a result of streamprune run or tune")


def read_journal(out: Path) -> Journal | None:
    """Open the journal of an unfinished pruning or tuning job; None if there is none."""
    path = job_folder(out) / JOURNAL
    return Journal(path, repair=False) if path.is_file() else None


def _status(out: Path) -> Status:
    is_comparison = (out / JOURNAL).is_file() or (out / LOCK).is_file()
    with as_written(f"the journal of {out}"):
        return _comparison(out, str(out)) if is_comparison else _job(out, str(out))


def _job(out: Path, name: str) -> Status:
    folder = job_folder(out)
    running, journal = files.is_locked(folder / LOCK), read_journal(out)
    if journal is not None and journal.header is not None:
        published = journal.find("complete") is not None and not (folder / STAGING).is_dir()
        if running or not published:
            return _unfinished(name, folder, journal, Schedule(journal.header["schedule"], journal), running)
    elif running:
        return Status(name, "running", phase="starting")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return Status(name, "not started")
    report = read_json(out / REPORT) if (out / REPORT).is_file() else None
    if report is None or not (is_report(report) or is_tuning(report)):
        raise ConfigError(f"OUT is {name}, which is not a job's result, and no job is writing it")
    last = log.last_line(out / log.NAME)
    return Status(name, "finished", share=1.0, seconds=report.get("seconds"), seconds_left=0.0, log=last)


def _comparison(out: Path, name: str) -> Status:
    running = files.is_locked(out / LOCK)
    journal = Journal(out / JOURNAL, repair=False)
    asked = journal.find(ASKED) if journal.header is not None else None
    if asked is None:
        return Status(name, "running", phase="starting") if running else Status(name, "not started")
    schedule, row = Schedule(asked["schedule"], journal), None
    if schedule.current is not None and schedule.current.kind == "prune":
        label = schedule.current.name.partition("/")[2]
        row = _job(out / ROWS / label, label)
    found = _unfinished(name, out, journal, schedule, running, row)
    if schedule.current is None and not (out / LOCK).exists() and (out / table.JSON).is_file():
        return replace(found, state="finished", phase=None, error=None)
    return found


def _unfinished(
    name: str, folder: Path, journal: Journal, schedule: Schedule, running: bool, row: Status | None = None
) -> Status:
    """Return the status of a job with a journal."""
    current, since, step = schedule.current, 0.0, None
    if row is not None and row.seconds is not None:
        since = row.seconds
        step = None if row.seconds_left is None else row.seconds + row.seconds_left
    elif running:
        since = max(0.0, time.time() - journal.path.stat().st_mtime)
    error = None if running else log.failure(folder / log.NAME)
    left = schedule.seconds_left(since, step)
    return Status(
        name,
        "running" if running else "failed" if error is not None else "interrupted",
        phase="publish" if current is None else current.kind,
        shot=None if current is None else current.shot,
        done=schedule.done,
        total=schedule.total,
        share=round(schedule.done / schedule.total, 4),
        seconds=round(seconds_spent(journal) + since, 3),
        seconds_left=None if left is None else round(left, 3),
        error=error,
        log=log.last_line(folder / log.NAME),
        row=row,
    )
