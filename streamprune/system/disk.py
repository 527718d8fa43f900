"""What the project asks of the operating system's files: one operation a method, and nothing else touches a file's bytes or names.

`files` says in which order operations come, so that nothing is lost; here is what each of them is. Tests put a disk in the
place of this one that fails, tears or stops at any of them (see `using`).

What other libraries do by themselves is outside: transformers reading a config or a tokenizer, pyarrow a table, gguf writing its file.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Literal

Mode = Literal["rb", "wb", "ab", "r+b"]


class Disk:
    """The machine's own. Every method raises the OSError that it meets."""

    def open(self, path: Path, mode: Mode) -> FileIO:
        """A file without a buffer; a pipe is not waited for."""
        return FileIO(path, mode, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK, 0o666))

    def read(self, file: FileIO, buffer: memoryview) -> int:
        """As many bytes as there are, up to the buffer's length."""
        return file.readinto(buffer) or 0

    def write(self, file: FileIO, data: memoryview) -> None:
        """All of the bytes."""
        done = 0
        while done < len(data):
            done += file.write(data[done:]) or 0

    def truncate(self, file: FileIO, length: int) -> None:
        """Cut to the first `length` bytes."""
        file.truncate(length)

    def sync(self, file: FileIO) -> None:
        """Make a file's bytes durable."""
        os.fsync(file.fileno())

    def sync_folder(self, path: Path) -> None:
        """Make a folder's names durable."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def lock(self, file: FileIO, *, shared: bool = False) -> None:
        """Keep other processes' locks off until the file is closed, or only exclusive ones; BlockingIOError where one is in the way."""
        fcntl.flock(file.fileno(), (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)

    def rename(self, source: Path, target: Path) -> None:
        """A file over whatever had that name, or a folder over nothing or an empty one."""
        os.replace(source, target)

    def link(self, source: Path, target: Path) -> None:
        """A second name for a file."""
        os.link(source, target)

    def unlink(self, path: Path) -> None:
        """One name less."""
        os.unlink(path)

    def make_folder(self, path: Path, mode: int = 0o777) -> None:
        """One that was not there, its parent was, with these permissions less the process's umask."""
        os.mkdir(path, mode)

    def remove_folder(self, path: Path) -> None:
        """An empty one."""
        os.rmdir(path)


_disks = [Disk()]


def disk() -> Disk:
    """The one in use."""
    return _disks[-1]


@contextmanager
def using(other: Disk) -> Iterator[None]:
    """A context in which everything, in all threads, goes to another one."""
    _disks.append(other)
    try:
        yield
    finally:
        _disks.remove(other)
