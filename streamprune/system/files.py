"""Every durable write, rename and removal of the project.

The rule: temporary name → write → fsync → rename → fsync of the folder. The operations themselves are `disk`'s, and nothing
but this file asks for them.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any, Literal

from ..errors import DiskError, ResumeError
from .disk import Mode, disk
from .timing import spent

TEMPORARY = ".tmp"
LOCK = ".lock"
LOCK_TRIES = 4
SCRATCH_LOCK = "lock"
SYNC_BYTES = 32 << 20
"""Of a long durable file, so many are sent to the disk at once."""
COPY_BYTES = 1 << 20
"""Of a file that is copied or digested, so many are in memory at once."""

Append = Callable[[Any], None]
"""Takes bytes, or whatever has a buffer of them."""


@contextmanager
def _told(does: Literal["read", "write", "make", "remove", "lock"], path: Path) -> Iterator[None]:
    """A context whose OSErrors say what could not be done; what is not there cannot be read or removed, and is its user's to tell."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError) and does in ("read", "remove"):
            raise
        raise DiskError(f"cannot {does} {path}: {error.strerror or error}") from error


@contextmanager
def _opened(path: Path, mode: Mode) -> Iterator[FileIO]:
    file = disk().open(path, mode)
    try:
        yield file
    finally:
        file.close()


def sync(path: Path) -> None:
    """Make a file's bytes, or a folder's names, durable.

    Raises:
        DiskError: it cannot be done.
    """
    with spent("write"), _told("write", path):
        if not path.is_dir():
            with _opened(path, "rb") as file:
                disk().sync(file)
            return
        try:
            disk().sync_folder(path)
        except OSError as error:
            # Some network file systems refuse to fsync a folder; their renames are durable by themselves.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
                raise


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[Append]:
    """Write a file piece after piece, from any thread; when all is there it takes the place of `path` at once.

    On an exception `path` is as it was and the temporary file is gone. With ``durable=False`` the
    replacement is atomic but not fsynced, for data that no journal line will speak of.

    Raises:
        DiskError: it cannot be written.
    """
    with replacing_file(path, durable=durable) as temporary:
        with _told("write", path):
            file = disk().open(temporary, "wb")
        waits = 0

        def append(data: Any) -> None:
            nonlocal waits
            view = memoryview(data).cast("B")
            with spent("write"), _told("write", path):
                disk().write(file, view)
                waits += len(view)
                # What shall be durable goes to the disk as it comes, so that little is left to do at the end.
                if durable and waits >= SYNC_BYTES:
                    disk().sync(file)
                    waits = 0

        with file:
            yield append


@contextmanager
def replacing_file(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """`replacing` for somebody who writes a file by himself: yields its temporary path."""
    temporary = path.with_name(path.name + TEMPORARY)
    if os.path.lexists(temporary):
        remove(temporary)  # it may be a link to somebody else's file
    try:
        yield temporary
        with _told("write", path):
            if durable:
                sync(temporary)
            disk().rename(temporary, path)
            if durable:
                sync(path.parent)
    except BaseException:
        with suppress(OSError):
            disk().unlink(temporary)
        raise


def write(path: Path, pieces: Iterable[Any]) -> str:
    """Durably replace `path` by pieces of bytes, one after the other.

    Returns:
        The SHA-256 in hex of what was to be written, taken before the disk has it.
    """
    digest = hashlib.sha256()
    with replacing(path) as append:
        for piece in pieces:
            digest.update(piece)
            append(piece)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> str:
    """Durably replace `path` by `text` in UTF-8; returns the digest, see `write`."""
    return write(path, [text.encode()])


def copy(source: Path, target: Path) -> str:
    """Durably copy one file's bytes, links followed; permissions and times are not copied. Returns the digest, see `write`."""
    return write(target, _pieces(source))


def link(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system has no hard links; an older target goes at once."""
    temporary = target.with_name(target.name + TEMPORARY)
    remove(temporary)
    try:
        disk().link(source, temporary)
    except FileNotFoundError:
        raise
    except OSError:
        copy(source, target)
        return
    with _told("write", target):
        disk().rename(temporary, target)
    remove(temporary)  # a rename between two names of one file does nothing
    sync(target.parent)


def append_line(path: Path, line: str) -> None:
    """Durably append one line."""
    new = not path.exists()
    with spent("write"), _told("write", path), _opened(path, "ab") as file:
        disk().write(file, memoryview(line.encode() + b"\n"))
        disk().sync(file)
    if new:
        sync(path.parent)


def append_bytes(path: Path, data: Any) -> None:
    """Append to a file that nothing rests on: what a power cut takes of it is not missed."""
    with _told("write", path), _opened(path, "ab") as file:
        disk().write(file, memoryview(data).cast("B"))


def truncate(path: Path, length: int) -> None:
    """Durably cut a file to its first `length` bytes."""
    with _told("write", path), _opened(path, "r+b") as file:
        disk().truncate(file, length)
        disk().sync(file)


def remove(path: Path) -> None:
    """Remove a file that may be gone already."""
    with suppress(FileNotFoundError), _told("remove", path):
        disk().unlink(path)


def remove_tree(path: Path) -> None:
    """Remove a folder that may be gone already; a power cut does not bring it back."""
    if path.is_symlink() or path.exists():
        _remove_all(path)
        sync(path.parent)


def _remove_all(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        remove(path)
        return
    with suppress(FileNotFoundError), _told("remove", path):
        for entry in sorted(path.iterdir()):
            _remove_all(entry)
        disk().remove_folder(path)


def empty(path: Path, keep: str | None = None) -> None:
    """Remove whatever is in a folder that may be gone already; a power cut does not bring it back.

    The folder stays, for `remove_empty`: NFS and FUSE keep a hidden name in it for a removed file that somebody has open, such
    as a lock.

    Args:
        keep: but for what has a name that begins with this.
    """
    if path.is_dir():
        for entry in sorted(path.iterdir()):
            if keep is None or not entry.name.startswith(keep):
                _remove_all(entry)
        sync(path)


def empty_locked(folder: Path, lock: str) -> None:
    """Remove whatever is in a folder of which this process holds the lock: the lock last, since whoever finds none may begin there.

    Args:
        lock: name of the lock's file; those of other processes at the same work have names that begin with it.
    """
    empty(folder, lock)
    empty(folder)


def remove_empty(path: Path) -> None:
    """Remove a folder that may be gone already, or into which somebody may have put something."""
    with suppress(FileNotFoundError), _told("remove", path):
        for left in reversed(range(LOCK_TRIES)):
            try:
                disk().remove_folder(path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                if left:
                    time.sleep(0.05)  # FUSE lets go of a closed file a little later
            else:
                sync(path.parent)
                break


def make_folder(path: Path) -> None:
    """Create a folder and its parents; the new names are durable."""
    if path.is_dir():
        return
    if path.parent != path:
        make_folder(path.parent)
    with _told("make", path):
        try:
            disk().make_folder(path)
        except FileExistsError:
            if not path.is_dir():
                raise
        sync(path.parent)


def publish(staging: Path, target: Path) -> None:
    """Rename a finished folder to its final name, where nothing but an empty folder may stand."""
    for path in sorted(staging.rglob("*")):
        sync(path)
    sync(staging)
    move_aside(staging, target)


def move_aside(path: Path, target: Path) -> None:
    """Durably rename a folder to where nothing but an empty one may be."""
    with _told("make", target):
        disk().rename(path, target)
        sync(target.parent)


def read_into(path: Path, offset: int, buffer: memoryview) -> int:
    """Fill `buffer` from a file's bytes at `offset`; returns how many there were."""
    done = 0
    with spent("read"), _told("read", path), _opened(path, "rb") as file:
        file.seek(offset)
        while done < len(buffer) and (count := disk().read(file, buffer[done:])):
            done += count
    return done


def read_bytes(path: Path) -> bytes:
    """A regular file's bytes: no waiting for the other end of a pipe, no reading of a device for ever.

    Raises:
        DiskError: it cannot be read, or is no regular file.
        FileNotFoundError: it is not there.
    """
    return b"".join(_pieces(path))


def _pieces(path: Path) -> Iterator[bytes]:
    with _told("read", path), _opened(path, "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "Not a regular file")
        buffer = bytearray(COPY_BYTES)
        while count := disk().read(file, memoryview(buffer)):
            yield bytes(buffer[:count])


def announce(path: Path, offset: int, length: int) -> None:
    """Tell the kernel what will be read soon, where it listens; a file that is not there is the reader's to report."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError), _opened(path, "rb") as file:
            # In pieces, since Linux takes no more than a device's own read-ahead of each.
            for begin in range(offset, offset + length, 1 << 17):
                os.posix_fadvise(file.fileno(), begin, min(1 << 17, offset + length - begin), os.POSIX_FADV_WILLNEED)


def forget(path: Path) -> None:
    """Have the kernel drop what it keeps of a file, where it listens, so that what is read next comes from the disk.

    It drops what is on the disk already, and what no process has mapped.
    """
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError), _opened(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


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
    for piece in _pieces(path):
        digest.update(piece)
    return digest.hexdigest()


def holds(path: Path, digest: str) -> bool:
    """Whether a file is there and has that SHA-256."""
    return path.is_file() and sha256(path) == digest


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`; a process that died holds none.

    Raises:
        ResumeError: another live process holds it.
        DiskError: it cannot be locked.
    """
    with ExitStack() as stack:
        with _told("lock", path):
            try:
                file = stack.enter_context(_opened(path, "ab"))
            except FileNotFoundError:  # its folder has just been removed
                raise _finished(path) from None
            for left in reversed(range(LOCK_TRIES)):
                try:
                    disk().lock(file)
                    break
                except BlockingIOError:
                    if not left:
                        raise ResumeError(f"another process is working on this job ({path} is locked)") from None
                    time.sleep(0.05)  # it may be somebody who only looks
        there = False
        with suppress(FileNotFoundError):
            there = path.stat().st_ino == os.fstat(file.fileno()).st_ino
        if not there:
            raise _finished(path)
        yield


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold a lock beside a file that is to be made; the lock's file goes at the end, a killed process's with the next one's.

    Raises:
        ResumeError: another live process is making it.
        DiskError: it cannot be locked.
    """
    lock = path.with_name(path.name + LOCK)
    with locked(lock):
        try:
            yield
        finally:
            remove(lock)


def _finished(lock: Path) -> ResumeError:
    return ResumeError(f"another process has just finished this job ({lock} is gone)")


def is_locked(path: Path) -> bool:
    """Whether a live process holds that lock; false where there is no such file."""
    try:
        with _told("read", path), _opened(path, "rb") as file:
            try:
                # Shared and for an instant, so that those who look are not in each other's way.
                disk().lock(file, shared=True)
            except BlockingIOError:
                return True
    except FileNotFoundError:
        pass
    return False


def probe(folder: Path, name: str, remedy: str) -> None:
    """See that a folder's file system does what the crash rule rests on, by doing it there.

    Hard links are not asked for, since `link` copies where there are none.

    Args:
        folder: need not be there yet; then the nearest parent that is.
        name: what is made in it and removed again is called so, and so is what a killed process left of this.
        remedy: what the user shall do about it.

    Raises:
        DiskError: what the file system does not do.
    """
    place = _existing(folder) / name
    one, full, empty = place / "file", place / "full", place / "empty"
    tried = partial(trying, folder=place.parent, remedy=remedy)
    try:
        with tried("making a folder"):
            remove_tree(place)
            make_folder(place)
        with tried("writing a file and syncing it"):
            write_text(one, "older")
        with tried("replacing a file by a rename"):
            write_text(one, "newer")
            if read_bytes(one) != b"newer":
                raise OSError("the older one is still there")
        with tried("renaming a folder to where an empty one is"):
            make_folder(full)
            make_folder(empty)
            write_text(full / one.name, "full")
            publish(full, empty)
        with tried("locking a file"), locked(one):
            if not is_locked(one):
                raise OSError("another process would not see it")
        with tried("removing a folder"):
            remove_tree(place)
    except BaseException:
        with suppress(OSError, DiskError):
            remove_tree(place)
        raise


@contextmanager
def trying(operation: str, folder: Path, remedy: str) -> Iterator[None]:
    """A context in which a failure is one of the file system that holds `folder`, told with what to do about it.

    Raises:
        DiskError: instead of any other and of any OSError.
    """
    try:
        yield
    except (OSError, DiskError) as error:
        reason = getattr(error.__cause__ or error, "strerror", None) or error
        raise DiskError(f"{folder}: {operation} fails there ({reason}); {remedy}") from error


@contextmanager
def scratch(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder below `parent`, gone at the end; what killed processes of this user left of such goes first.

    Args:
        parent: is there, and may be anybody's, such as the system's temporary folder.
        prefix: of the name, by which they are known.

    Raises:
        DiskError: it cannot be made.
    """
    for path in parent.glob(f"{prefix}*"):
        with suppress(OSError, DiskError, ResumeError):
            found = path.lstat()
            # A link or a folder of somebody else's would have the lock made, and files removed, where it likes.
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid():
                with locked(path / SCRATCH_LOCK):
                    empty_locked(path, SCRATCH_LOCK)
                remove_empty(path)
    with ExitStack() as stack:
        while True:
            folder = parent / f"{prefix}{secrets.token_hex(4)}"
            with _told("make", folder):
                disk().make_folder(folder, 0o700)
            stack.callback(remove_empty, folder)
            with suppress(ResumeError):  # another process took it for one that was left, and removes it
                try:
                    stack.enter_context(locked(folder / SCRATCH_LOCK))
                except DiskError:
                    empty(folder)
                    raise
                break
        stack.callback(empty_locked, folder, SCRATCH_LOCK)
        yield folder


def first_link(folder: Path) -> Path | None:
    """The folder itself if it is a symbolic link, or the first one in it, however deep; None where there is none."""
    if folder.is_symlink():
        return folder
    for place, folders, names in os.walk(folder):
        for name in sorted((*folders, *names)):
            if os.path.islink(os.path.join(place, name)):
                return Path(place, name)
    return None
