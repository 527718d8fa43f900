"""Every durable write, rename and removal of the project.

The rule: temporary name → write → fsync → rename → fsync of the folder. Nothing else in the
project renames, links or fsyncs, so a fault can be injected here and nowhere else.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import ResumeError
from .occupancy import spent

TEMPORARY = ".tmp"
LOCK_TRIES = 4
SYNC_BYTES = 32 << 20
"""Of a long durable file, so many are sent to the disk at once."""


def sync(path: Path) -> None:
    """Make a file's bytes, or a folder's entries, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with spent("write"):
            os.fsync(descriptor)
    except OSError as error:
        # Some network file systems refuse to fsync a folder; their renames are durable by themselves.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP, errno.EBADF)):
            raise
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path to write to; on success it takes the place of `path` at once.

    On an exception `path` is as it was and the temporary file is gone. With ``durable=False`` the
    replacement is atomic but not fsynced, for data that no journal line will speak of.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    temporary.unlink(missing_ok=True)  # what stands there may be a link to somebody else's file
    try:
        yield temporary
        if durable:
            sync(temporary)
        os.replace(temporary, path)
        if durable:
            sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def appending(path: Path, *, durable: bool) -> Iterator[Callable[[memoryview], None]]:
    """Write a new file piece after piece, from any thread.

    What shall be durable goes to the disk as it comes, so that whoever syncs the whole at the end finds little left to do.
    """
    with path.open("wb", buffering=0) as file:
        waits = 0

        def append(data: memoryview) -> None:
            nonlocal waits
            with spent("write"):
                done = 0
                while done < len(data):
                    done += file.write(data[done:])
                waits += len(data)
                if durable and waits >= SYNC_BYTES:
                    os.fsync(file.fileno())
                    waits = 0

        yield append


def write_text(path: Path, text: str) -> None:
    """Durably replace `path` by `text` in UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def copy(source: Path, target: Path) -> None:
    """Durably copy one file's bytes, links followed; permissions and times are not copied."""
    with replacing(target) as temporary:
        shutil.copyfile(source, temporary)


def link(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system has no hard links; an older target goes at once."""
    temporary = target.with_name(target.name + TEMPORARY)
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        copy(source, target)
        return
    os.replace(temporary, target)
    temporary.unlink(missing_ok=True)  # a rename between two names of one file does nothing
    sync(target.parent)


def append_line(path: Path, line: str) -> None:
    """Durably append one line."""
    new = not path.exists()
    with spent("write"), path.open("ab") as file:
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    if new:
        sync(path.parent)


def truncate(path: Path, length: int) -> None:
    """Durably cut a file to its first `length` bytes."""
    with path.open("r+b") as file:
        file.truncate(length)
        file.flush()
        os.fsync(file.fileno())


def remove(path: Path) -> None:
    """Remove a file that may be gone already."""
    path.unlink(missing_ok=True)


def remove_tree(path: Path) -> None:
    """Remove a folder that may be gone already."""
    if path.exists():
        shutil.rmtree(path)


def make_folder(path: Path) -> None:
    """Create a folder and its parents; the new entry is durable."""
    if not path.is_dir():
        path.mkdir(parents=True, exist_ok=True)
        sync(path.parent)


def publish(staging: Path, target: Path) -> None:
    """Rename a finished folder to its final name, where nothing but an empty folder may stand."""
    for path in sorted(staging.rglob("*")):
        sync(path)
    sync(staging)
    os.rename(staging, target)
    sync(target.parent)


def move_aside(path: Path, target: Path) -> None:
    """Rename a folder out of the way."""
    os.rename(path, target)
    sync(target.parent)


def read_into(path: Path, offset: int, buffer: memoryview) -> int:
    """Fill `buffer` from a file's bytes at `offset`; returns how many there were."""
    done = 0
    with spent("read"), path.open("rb", buffering=0) as file:
        file.seek(offset)
        while done < len(buffer) and (count := file.readinto(buffer[done:])):
            done += count
    return done


def announce(path: Path, offset: int, length: int) -> None:
    """Tell the kernel what will be read soon, where it listens; a file that is not there is the reader's to report."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError), path.open("rb", buffering=0) as file:
            # In pieces, since Linux takes no more than a device's own read-ahead of each.
            for begin in range(offset, offset + length, 1 << 17):
                os.posix_fadvise(file.fileno(), begin, min(1 << 17, offset + length - begin), os.POSIX_FADV_WILLNEED)


def free_bytes(folder: Path) -> int:
    """Free bytes on the file system that holds `folder` or, if it is not there yet, its nearest parent."""
    return shutil.disk_usage(_existing(folder)).free


def same_file_system(one: Path, other: Path) -> bool:
    """Whether two folders, which need not be there yet, lie on one file system."""
    return _existing(one).stat().st_dev == _existing(other).stat().st_dev


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`; a process that died holds none.

    Raises:
        ResumeError: another live process holds it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        for left in reversed(range(LOCK_TRIES)):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not left:
                    raise ResumeError(f"another process is working on this job ({path} is locked)") from None
                time.sleep(0.05)  # it may be somebody who only looks
        if not path.exists() or os.fstat(descriptor).st_ino != path.stat().st_ino:
            raise ResumeError(f"another process has just finished this job ({path} is gone)")
        yield
    finally:
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Whether a live process holds that lock; false where there is no such file."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        # Shared and for an instant, so that those who look are not in each other's way.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def append_text(path: Path, text: str) -> None:
    """Append to a file that nothing rests on: what a power cut takes of it is not missed."""
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def read_bytes(path: Path) -> bytes:
    """A regular file's bytes: no waiting for the other end of a pipe, no reading of a device for ever.

    Raises:
        OSError: not there, not readable, or no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Not a regular file", str(path))
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def first_link(folder: Path) -> Path | None:
    """The folder itself if it is a symbolic link, or the first one in it, however deep; None where there is none."""
    if folder.is_symlink():
        return folder
    for place, folders, names in os.walk(folder):
        for name in sorted((*folders, *names)):
            if os.path.islink(os.path.join(place, name)):
                return Path(place, name)
    return None
