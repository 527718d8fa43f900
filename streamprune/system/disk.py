"""All file operations of the project, one method per operation. Nothing else changes file contents or names.

`files` orders these operations so that a crash loses nothing; this module only performs them. Tests substitute a disk that
fails, tears a write or stops at any operation (see `using`).

File access inside other libraries does not go through here: transformers reading configs and tokenizers, pyarrow reading
tables, gguf writing its output.
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
    """The real file system. OSErrors propagate."""

    def open(self, path: Path, mode: Mode) -> FileIO:
        """Open an unbuffered file. Opening a pipe does not block."""
        return FileIO(path, mode, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK, 0o666))

    def read(self, file: FileIO, buffer: memoryview) -> int:
        """Read up to ``len(buffer)`` bytes; return how many were read."""
        return file.readinto(buffer) or 0

    def write(self, file: FileIO, data: memoryview) -> None:
        done = 0
        while done < len(data):
            done += file.write(data[done:]) or 0

    def truncate(self, file: FileIO, length: int) -> None:
        file.truncate(length)

    def sync(self, file: FileIO) -> None:
        os.fsync(file.fileno())

    def sync_folder(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def lock(self, file: FileIO, *, shared: bool = False) -> None:
        """Take an exclusive or shared lock until the file is closed; BlockingIOError if another process holds a conflicting one."""
        fcntl.flock(file.fileno(), (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)

    def rename(self, source: Path, target: Path) -> None:
        """Rename a file, replacing any existing target, or a folder to a free name or over an empty folder."""
        os.replace(source, target)

    def link(self, source: Path, target: Path) -> None:
        os.link(source, target)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def make_folder(self, path: Path) -> None:
        """Create a folder, which must not exist yet, in an existing one."""
        os.mkdir(path)

    def remove_folder(self, path: Path) -> None:
        os.rmdir(path)


_disks = [Disk()]


def disk() -> Disk:
    return _disks[-1]


@contextmanager
def using(other: Disk) -> Iterator[None]:
    """Send the file operations of all threads to another disk, while the context is open."""
    _disks.append(other)
    try:
        yield
    finally:
        _disks.remove(other)
