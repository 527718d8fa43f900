"""The log of a job, `log.txt`: every progress line with its time, and how each process ended.

Resuming does not depend on it. `status` reads the message of the last failure from it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import DiskError, Stopped, StreamPruneError
from . import files
from .progress import Callback, Progress, Silent
from .version import __version__

NAME = "log.txt"
FAILED = "failed: "


class Log:
    """Progress that writes to the log and passes every call on. Lines are buffered until the log is opened."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress or Silent()
        self._lines = Callback(self._write)
        self._waiting: list[bytes] = []
        self._path: Path | None = None

    def phase(self, name: str, total: int, done: int = 0) -> None:
        self._lines.phase(name, total, done)
        self._progress.phase(name, total, done)

    def step(self, note: str = "") -> None:
        self._lines.step(note)
        self._progress.step(note)

    def say(self, message: str) -> None:
        self._lines.say(f"note: {message}")
        self._progress.say(message)

    def stopping(self) -> bool:
        return self._progress.stopping()

    @contextmanager
    def opened(self, folder: Path, *, resumed: bool) -> Iterator[None]:
        """Append to the log in `folder` while the context is open, and record the error that ends the process, if any."""
        self._path = folder / NAME
        begin = f"streamprune {__version__} {'resumes' if resumed else 'starts'}"
        files.append(self._path, b"".join([*self._waiting, _line(begin)]))
        self._waiting = []
        try:
            yield
        except Stopped as error:
            self._write(error)
            raise
        except Exception as error:
            message = str(error) if isinstance(error, StreamPruneError) else f"{type(error).__name__}: {error}"
            with suppress(DiskError):  # the error may be a full disk
                self._write(f"{FAILED}{message}")
            raise
        finally:
            self._path = None

    def finish(self) -> None:
        self._write("finished")

    def _write(self, text: object) -> None:
        if self._path is None:
            self._waiting.append(_line(text))
        else:
            files.append(self._path, _line(text))


def last_line(path: Path) -> str | None:
    """Return the last line of a log without its time; None without one."""
    lines = files.read_bytes(path).decode().splitlines() if path.is_file() else []
    return lines[-1].partition(" ")[2] if lines else None


def failure(path: Path) -> str | None:
    """Return the message of the error that ended the last process; None if no error did."""
    line = last_line(path)
    return line.removeprefix(FAILED) if line is not None and line.startswith(FAILED) else None


def _line(text: object) -> bytes:
    line = f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {' '.join(str(text).split())}\n"
    return line.encode(errors="backslashreplace")  # file names need not be UTF-8
