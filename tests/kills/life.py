"""A life of the command: a process that can be sent a signal at any instant."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMIT = 300.0
"""Seconds after which a life is taken to hang."""
PRELOADED = [
    "torch",
    "numpy",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.tokenization_auto",
    "peft",
    "streamprune",
    "streamprune.commands.compare.run",
    "streamprune.commands.tune.lora",
    "streamprune_cli",
]
"""What a life would spend most of its time importing, in which a kill proves nothing."""


@dataclass(frozen=True)
class Ended:
    """How a life ended: its exit code, or minus the signal, and what it wrote."""

    code: int
    out: str
    err: str


class Life:
    """The command with its working directory, its temporary folder and what it writes below `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("streams", "temporary"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self._streams = Path(tempfile.mkdtemp(dir=folder / "streams"))
        for name in ("out", "err"):  # it may be killed before it opens them
            (self._streams / name).touch()

    def ready(self) -> None:
        """Wait until signals are worth sending."""

    def targets(self) -> dict[str, list[int]]:
        """Whom a signal may be sent to, processes by what they are; nobody once it has ended."""
        raise NotImplementedError

    def ended_within(self, seconds: float) -> bool:
        """Wait for so long at the most; whether it has ended."""
        raise NotImplementedError

    def wait(self) -> Ended:
        """Its end, which has to come.

        Raises:
            TimeoutError: it hangs, and was killed.
        """
        raise NotImplementedError

    def _ended(self, code: int) -> Ended:
        return Ended(code, *((self._streams / name).read_text() for name in ("out", "err")))

    def _hangs(self) -> TimeoutError:
        for pid in processes_below(self.folder):
            send([pid], signal.SIGKILL)
        return TimeoutError(f"still alive after {LIMIT:g} s: {(self._streams / 'err').read_text()}")


class Forked(Life):
    """The command in a process forked from one that has imported everything and has no threads."""

    def __init__(self, arguments: Sequence[str], folder: Path, before: Callable[[], None] | None = None) -> None:
        super().__init__(folder)
        given = (list(arguments), folder, self._streams, before)
        self._process = _starter().Process(target=_command, args=given)
        self._process.start()

    def targets(self) -> dict[str, list[int]]:
        # Another process may have the number of one that has ended.
        pid, ended = self._process.pid, self._process.exitcode is not None
        return {} if pid is None or ended else {"process": [pid]}

    def ended_within(self, seconds: float) -> bool:
        self._process.join(seconds)
        return self._process.exitcode is not None

    def wait(self) -> Ended:
        if not self.ended_within(LIMIT):
            raise self._hangs()
        assert self._process.exitcode is not None
        return self._ended(self._process.exitcode)


class Torchrun(Life):
    """The command in two processes that torchrun starts."""

    def __init__(self, arguments: Sequence[str], folder: Path, *options: str) -> None:
        super().__init__(folder)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
        with (self._streams / "out").open("w") as out, (self._streams / "err").open("w") as err:
            self._process = subprocess.Popen(
                [*launcher, "-m", "streamprune_cli", *arguments],
                stdout=out,
                stderr=err,
                cwd=folder,
                env={**os.environ, "TMPDIR": str(folder / "temporary")},
            )
        self._lock = folder / "out.streamprune" / "lock"

    def ready(self) -> None:
        """Until a rank holds the job's lock: until then they import."""
        from streamprune.system.files import is_locked

        while not is_locked(self._lock) and self._process.poll() is None:
            time.sleep(0.02)

    def targets(self) -> dict[str, list[int]]:
        if self._process.poll() is not None:
            return {}
        launcher = self._process.pid
        ranks = children(launcher)
        named = {f"rank {number}": [rank] for number, rank in enumerate(ranks)}
        return {"launcher": [launcher], **named, "all": [launcher, *ranks]}

    def ended_within(self, seconds: float) -> bool:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return self._process.poll() is not None

    def wait(self) -> Ended:
        """The launcher's end, and that of ranks that outlive it."""
        until = time.monotonic() + LIMIT
        while not self.ended_within(0.02) or processes_below(self.folder):
            if time.monotonic() > until:
                raise self._hangs()
        return self._ended(self._process.returncode)


def send(pids: Sequence[int], number: int) -> None:
    """Send a signal to processes, some of which may be gone."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def children(pid: int) -> list[int]:
    """Of a process, oldest first."""
    found: list[int] = []
    with suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (thread / "children").read_text().split())
    return sorted(found)


def processes_below(folder: Path) -> list[int]:
    """Live processes whose working directory is in `folder`."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            with suppress(OSError):
                if (process / "cwd").readlink().is_relative_to(folder):
                    found.append(int(process.name))
    return found


def threads(pid: int) -> int:
    """How many a process has, but for that by which pyarrow gives memory back."""
    names = [task.joinpath("comm").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    return len(names) - names.count("jemalloc_bg_thd\n")


def _starter() -> Any:
    """What forks: a server process that lives as long as this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _command(arguments: list[str], folder: Path, streams: Path, before: Callable[[], None] | None) -> None:
    """In the forked process: the command as its script calls it, after `before`."""
    assert threads(os.getppid()) == 1, "a thread of the starter's is missing here"
    os.chdir(folder)
    for descriptor, name in ((1, "out"), (2, "err")):
        opened = os.open(streams / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ["TMPDIR"], tempfile.tempdir = str(folder / "temporary"), None
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from streamprune_cli import main

    if before is not None:
        before()
    command: Callable[..., None] = main
    command(arguments, prog_name="streamprune")
