"""The finished steps of a job, append-only: the only record that resuming trusts.

One line a step: the CRC-32 of the JSON text in hex, a space, the JSON text. The first line is the
header: what the job was started with. A torn last line (a kill in the middle of an append) is cut off;
a damaged line with others after it is an error.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import ResumeError, one_line
from ..system import files
from ..system.ranks import ALONE, Ranks

Entry = dict[str, Any]


class Journal:
    """The journal at `path`, which need not exist yet.

    Args:
        repair: cut off a torn last line; False only passes over it, for looking at a job that may be running.
        ranks: those that work by it, all of which open it and append to it together: the first reads and writes the file.
    """

    def __init__(self, path: Path, *, repair: bool = True, ranks: Ranks = ALONE) -> None:
        self.path, self.repair, self.ranks = path, repair, ranks
        self.meter: Callable[[], Entry] = dict
        """What every further line carries besides its own data."""
        self.rest: Callable[[], None] = lambda: None
        """Called when a line is durable; may raise to end the work there."""
        self._entries: list[Entry] = ranks.told(self._read)

    @property
    def header(self) -> Entry | None:
        """What the job was started with; None before the first line."""
        return self._entries[0] if self._entries else None

    def append(self, step: str, **data: Any) -> Entry:
        """Record `step` as finished, durably. Whatever it speaks of must be durable before, on every rank."""
        self.ranks.barrier()
        entry = {"step": step, **data, **self.meter()}
        self._entries.append(self.ranks.told(lambda: self._write(entry)))
        self.rest()
        return self._entries[-1]

    def rewind(self, prefix: str) -> None:
        """Take back, durably, the first step whose name begins with `prefix` and all that came behind it."""
        kept = next(number for number, entry in enumerate(self._entries) if entry["step"].startswith(prefix))
        self.ranks.barrier()
        if self.ranks.first:
            lines = files.read_bytes(self.path).splitlines(keepends=True)
            files.truncate(self.path, sum(map(len, lines[:kept])))
        self.ranks.barrier()
        del self._entries[kept:]

    def find(self, step: str) -> Entry | None:
        """The last entry of that step, or None if it is not finished."""
        return next((entry for entry in reversed(self._entries) if entry["step"] == step), None)

    def steps(self, prefix: str = "") -> Iterator[Entry]:
        """All finished steps whose name begins with `prefix`, in order, the header left out."""
        return (entry for entry in self._entries[1:] if entry["step"].startswith(prefix))

    def _write(self, entry: Entry) -> Entry:
        files.append_line(self.path, _encode(entry))
        # Through JSON and back, so that a job that never stopped sees what a resumed one reads.
        written: Entry = json.loads(json.dumps(entry))
        return written

    def _read(self) -> list[Entry]:
        good, entries = 0, list[Entry]()
        data = files.read_bytes(self.path) if self.path.exists() else b""
        for number, line in enumerate(data.splitlines(keepends=True), start=1):
            entry = _decode(line)
            if entry is None:
                if good + len(line) < len(data):
                    raise ResumeError(f"{self.path}: line {number} is damaged; start over with --restart")
                if self.repair:
                    files.truncate(self.path, good)
                break
            entries.append(entry)
            good += len(line)
        return entries


@contextmanager
def as_written(out: Path) -> Iterator[None]:
    """A context that reads the lines of a job of `out` for what jobs write into them.

    Raises:
        ResumeError: they hold something else. Each has its checksum, so that no accident can have done it.
    """
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        message = f"{out}: its journal holds what no job writes ({one_line(error)}); start over with --restart"
        raise ResumeError(message) from error


def _encode(entry: Entry) -> str:
    text = json.dumps(entry)
    return f"{zlib.crc32(text.encode()):08x} {text}"


def _decode(line: bytes) -> Entry | None:
    check, _, text = line.rstrip(b"\n").partition(b" ")
    if not line.endswith(b"\n") or check != f"{zlib.crc32(text):08x}".encode():
        return None
    try:
        entry = json.loads(text.decode())
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), str) else None
