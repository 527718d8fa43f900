"""The journal: an append-only record of a job's finished steps, and the only record that resuming trusts.

Each step is one line: the CRC-32 of the JSON text in hex, a space, the JSON text. The first line is the header, with the
format of the journal and the settings and inputs of the job. An incomplete last line (from a kill during an append) is cut
off. A damaged line before the last one is an error.
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

FORMAT = 11
"""Number of the format, in the header as `format`. Raise it when the steps of a job or their data change."""
RESTART = "start over with --restart"


class Journal:
    """The journal at `path`, which need not exist yet.

    Args:
        repair: cut off an incomplete last line. False only ignores it, to inspect a job that may be running.
        restart: ignore the lines of an earlier job, whose file is removed before the first append.
        remedy: what to do about a damaged journal, for the message.
        ranks: ranks that share the journal. All of them open it and append to it together; the first one reads and
            writes the file.
    """

    def __init__(
        self, path: Path, *, repair: bool = True, restart: bool = False, remedy: str = RESTART, ranks: Ranks = ALONE
    ) -> None:
        self.path, self.repair, self.remedy, self.ranks = path, repair, remedy, ranks
        self.meter: Callable[[], Entry] = dict
        """Returns additional data for each new line."""
        self.after_append: Callable[[], None] = lambda: None
        """Called once a line is durable; may raise to stop the work there."""
        self._entries: list[Entry] = [] if restart else ranks.broadcast(self._read)

    @property
    def header(self) -> Entry | None:
        """The first line, with the job's settings and inputs; None before it is written."""
        return self._entries[0] if self._entries else None

    def append(self, step: str, **data: Any) -> Entry:
        """Durably record `step` as finished. Everything that the line refers to must be durable on every rank."""
        self.ranks.barrier()
        entry = {"step": step, **({} if self._entries else {"format": FORMAT}), **data, **self.meter()}
        self._entries.append(self.ranks.broadcast(lambda: self._write(entry)))
        self.after_append()
        return self._entries[-1]

    def rewind(self, prefix: str) -> None:
        """Durably remove the first step whose name begins with `prefix`, and all later steps."""
        kept = next(number for number, entry in enumerate(self._entries) if entry["step"].startswith(prefix))
        self.ranks.barrier()
        if self.ranks.first:
            lines = files.read_bytes(self.path).splitlines(keepends=True)
            files.truncate(self.path, sum(map(len, lines[:kept])))
        self.ranks.barrier()
        del self._entries[kept:]

    def find(self, step: str) -> Entry | None:
        """Return the last entry of a step, or None if the step is not finished."""
        return next((entry for entry in reversed(self._entries) if entry["step"] == step), None)

    def steps(self, prefix: str = "") -> Iterator[Entry]:
        """Iterate over the finished steps whose name begins with `prefix`, in order, without the header."""
        return (entry for entry in self._entries[1:] if entry["step"].startswith(prefix))

    def _write(self, entry: Entry) -> Entry:
        text = json.dumps(entry)
        files.append(self.path, f"{zlib.crc32(text.encode()):08x} {text}\n".encode(), durable=True)
        # Round-trip through JSON, so that an uninterrupted job sees the same values as a resumed one.
        return dict(json.loads(text))

    def _read(self) -> list[Entry]:
        good, entries = 0, list[Entry]()
        data = files.read_bytes(self.path) if self.path.exists() else b""
        for number, line in enumerate(data.splitlines(keepends=True), start=1):
            entry = _decode(line)
            if entry is None:
                if good + len(line) < len(data):
                    raise ResumeError(f"{self.path}: line {number} is damaged; {self.remedy}")
                if self.repair:
                    files.truncate(self.path, good)
                break
            entries.append(entry)
            good += len(line)
        if entries and entries[0].get("format") != FORMAT:
            raise ResumeError(
                f"{self.path} was written by another version of streamprune; finish the job with that version, or {self.remedy}"
            )
        return entries


@contextmanager
def as_written(journal: str, remedy: str = RESTART) -> Iterator[None]:
    """Turn errors from unexpected content of a journal, whose checksums are valid, into ResumeError; `journal` names it."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise ResumeError(f"{journal} has unexpected content ({one_line(error)}); {remedy}") from error


def _decode(line: bytes) -> Entry | None:
    check, _, text = line.rstrip(b"\n").partition(b" ")
    if not line.endswith(b"\n") or check != f"{zlib.crc32(text):08x}".encode():
        return None
    try:
        entry = json.loads(text.decode())
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), str) else None
