"""What reading a hostile file may do: succeed, or refuse with an error of ours. All else is a fault."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import click

from streamprune import StreamPruneError

MULTIPLE = 64
"""Bytes of memory a byte of input may cost: JSON's smallest objects take some thirty."""
FLOOR = 96 << 20
"""Bytes that any input may cost: a table of a model may take 64 MiB."""
SECONDS = 10
"""Of computing, for one input, unless told otherwise."""

_PEAK, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGING = {"os.rename", "os.link", "os.symlink", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod"}
_NEVER = {
    "pickle.find_class",
    "socket.connect",
    "socket.getaddrinfo",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
}


class Fault(AssertionError):
    """An input did what none may do."""


class _Endless(BaseException):
    """Raised where the time is up; no `except Exception` holds it."""


class Guard:
    """Watches every write, connection, process and unpickled class of this process while an input is read.

    Args:
        home: the only folder that may be written to.
        seconds: of computing, for one input.
    """

    def __init__(self, home: Path, seconds: float = SECONDS) -> None:
        self._home, self._seconds = os.path.realpath(home), seconds
        self._watching = False
        self._seen: list[str] = []
        sys.addaudithook(self._hear)
        signal.signal(signal.SIGPROF, _end)

    def read(self, function: Callable[[bytes], Any], data: bytes) -> bool:
        """Let `function` read `data`; whether it took it.

        Raises:
            Fault: another error than ours, a write elsewhere, or more time or memory than there should be.
        """
        before, mapped = _begin(), _status("RssFile")
        self._seen, self._watching = [], True
        signal.setitimer(signal.ITIMER_PROF, self._seconds)
        try:
            with mock.patch.object(tempfile, "tempdir", self._home):
                function(data)
            taken = True
        except (StreamPruneError, click.UsageError) as error:
            taken = False
            if "\n" in str(error) or not str(error):
                raise Fault(f"a message that is not one line: {str(error)!r}") from error
        except _Endless:
            raise Fault(f"more than {self._seconds} s of computing") from None
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            raise Fault(f"{type(error).__name__}: {error}") from error
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            self._watching = False
        if self._seen:
            raise Fault(self._seen[0])
        # Pages of libraries that are touched for the first time are not the input's.
        grown = _peak() - before - max(0, _status("RssFile") - mapped)
        if grown > FLOOR + MULTIPLE * len(data):
            raise Fault(f"{grown >> 20} MiB of memory for {len(data)} bytes")
        return taken

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._watching:
            return
        if event in _NEVER:
            self._seen.append(f"{event} {arguments[:2]!r}")
        elif event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & _WRITING and not isinstance(path, int):
                self._written(event, path)
        elif event in _CHANGING:
            # shutil.rmtree names what it removes by the open folder that holds it.
            folder = arguments[-1] if event in ("os.remove", "os.rmdir") else -1
            self._written(event, arguments[0], "." if folder == -1 else f"/proc/self/fd/{folder}")

    def _written(self, event: str, path: Any, folder: str = ".") -> None:
        full = os.path.realpath(os.path.join(folder, os.fsdecode(path)))
        if full != os.devnull and not full.startswith(self._home + os.sep):
            self._seen.append(f"{event} of {full}")


def make_home() -> Path:
    """A fresh folder, in memory where there is one."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="streamprune-fuzz-", dir=memory if os.access(memory, os.W_OK) else None))


def _begin() -> int:
    """Bytes of memory that are taken, from which on the peak counts."""
    _PEAK.write_text("5")
    return _peak()


def _peak() -> int:
    """The most bytes of memory since `_begin`."""
    return _status("VmHWM")


def _status(name: str) -> int:
    """A number of bytes that the kernel states of this process."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) << 10


def _end(*_: Any) -> None:
    raise _Endless
