"""Every durable write, rename and removal of the project, and file locks. Failures raise DiskError.

The crash rule: write under a temporary name → fsync → rename → fsync the folder. `disk` performs the operations; only this
module calls it. Locks are `flock`s: the kernel releases them when a process dies, and a folder can be removed with its lock.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ..errors import DiskError, ResumeError
from .disk import disk
from .timing import waiting

TEMPORARY = ".tmp"
LOCKED = "lock"
"""Name of the lock file in a folder of `scratch`."""
LOCK_TRIES = 4
SYNC_BYTES = 32 << 20
"""Bytes written to a durable file between two fsyncs, so that little is left to flush at the end."""
COPY_BYTES = 1 << 20
"""Bytes held in memory at a time while a file is copied or hashed."""

Append = Callable[[Any], None]
"""Appends bytes, or any object that supports the buffer protocol."""


@contextmanager
def _disk_errors(does: Literal["read", "write", "make", "remove", "lock"], path: Path) -> Iterator[None]:
    """Turn OSErrors into DiskErrors that say what failed. When reading or removing, FileNotFoundError propagates to the caller."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError) and does in ("read", "remove"):
            raise
        raise DiskError(f"cannot {does} {path}: {error.strerror or error}") from error


def sync(path: Path) -> None:
    """Flush the contents of a file, or the entries of a folder, to disk."""
    with waiting("write"), _disk_errors("write", path):
        if not path.is_dir():
            with disk().open(path, "rb") as file:
                disk().sync(file)
            return
        try:
            disk().sync_folder(path)
        except OSError as error:
            # Some network file systems reject fsync on a folder; renames there are durable without it.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
                raise


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[Append]:
    """Write a file in pieces, from any thread; at the end it replaces `path` atomically.

    On an exception `path` is unchanged and the temporary file is removed. With ``durable=False`` the
    replacement is atomic but not fsynced; use it for data that no journal line refers to.
    """
    with replacing_file(path, durable=durable) as temporary:
        with _disk_errors("write", path):
            file = disk().open(temporary, "wb")
        unsynced = 0

        def append(data: Any) -> None:
            nonlocal unsynced
            view = memoryview(data).cast("B")
            with waiting("write"), _disk_errors("write", path):
                disk().write(file, view)
                unsynced += len(view)
                if durable and unsynced >= SYNC_BYTES:
                    disk().sync(file)
                    unsynced = 0

        with file:
            yield append


@contextmanager
def replacing_file(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Like `replacing`, for callers that write the file themselves: yields the temporary path."""
    temporary = path.with_name(path.name + TEMPORARY)
    if os.path.lexists(temporary):
        remove(temporary)  # may be a link to an unrelated file
    try:
        yield temporary
        with _disk_errors("write", path):
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
    """Durably replace `path` with the concatenation of `pieces`; return the SHA-256 in hex of the bytes in memory."""
    digest = hashlib.sha256()
    with replacing(path) as append:
        for piece in pieces:
            digest.update(piece)
            append(piece)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> str:
    """Durably replace `path` with `text` in UTF-8. Returns the digest, see `write`."""
    return write(path, [text.encode()])


def copy(source: Path, target: Path) -> str:
    """Durably copy the contents of a file, following links; not its permissions or times. Returns the digest, see `write`."""
    return write(target, _pieces(source))


def link(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it where the file system has no hard links. Replaces an existing target atomically."""
    temporary = target.with_name(target.name + TEMPORARY)
    remove(temporary)
    try:
        disk().link(source, temporary)
    except FileNotFoundError:
        raise
    except OSError:
        copy(source, target)
        return
    with _disk_errors("write", target):
        disk().rename(temporary, target)
    remove(temporary)  # renaming between two links to the same file does nothing
    sync(target.parent)


def append(path: Path, data: Any, *, durable: bool = False) -> None:
    """Append bytes. Without `durable`, a power cut may take them."""
    new = durable and not path.exists()
    with waiting("write"), _disk_errors("write", path), disk().open(path, "ab") as file:
        disk().write(file, memoryview(data).cast("B"))
        if durable:
            disk().sync(file)
    if new:
        sync(path.parent)


def truncate(path: Path, length: int) -> None:
    """Durably truncate a file to its first `length` bytes."""
    with _disk_errors("write", path), disk().open(path, "r+b") as file:
        disk().truncate(file, length)
        disk().sync(file)


def remove(path: Path) -> None:
    """Remove a file, if it exists."""
    with suppress(FileNotFoundError), _disk_errors("remove", path):
        disk().unlink(path)


def remove_tree(path: Path) -> None:
    """Durably remove a folder and its contents, if it exists."""
    if path.is_symlink() or path.exists():
        _remove_all(path)
        sync(path.parent)


def _remove_all(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        remove(path)
        return
    with suppress(FileNotFoundError), _disk_errors("remove", path):
        for entry in sorted(path.iterdir()):
            _remove_all(entry)
        disk().remove_folder(path)


def empty_folder(path: Path, keep: str | None = None) -> None:
    """Durably remove the contents of a folder, if it exists, but not the folder, and no names that begin with `keep`."""
    if path.is_dir():
        for entry in sorted(path.iterdir()):
            if keep is None or not entry.name.startswith(keep):
                _remove_all(entry)
        sync(path)


def remove_empty_folder(path: Path) -> None:
    """Remove a folder if it exists and is empty."""
    with suppress(FileNotFoundError), _disk_errors("remove", path):
        for left in reversed(range(LOCK_TRIES)):
            try:
                disk().remove_folder(path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                if left:
                    time.sleep(0.05)  # FUSE releases closed files with a short delay
            else:
                sync(path.parent)
                break


def make_folder(path: Path) -> None:
    """Durably create a folder and its parents."""
    if path.is_dir():
        return
    if path.parent != path:
        make_folder(path.parent)
    with _disk_errors("make", path):
        try:
            disk().make_folder(path)
        except FileExistsError:  # another process was first
            if not path.is_dir():
                raise
        sync(path.parent)


def publish(staging: Path, target: Path) -> None:
    """Flush a finished folder to disk and rename it to its final name, which must be free or an empty folder."""
    for path in sorted(staging.rglob("*")):
        sync(path)
    sync(staging)
    rename_folder(staging, target)


def rename_folder(path: Path, target: Path) -> None:
    """Durably rename a folder to a name that must be free or an empty folder."""
    with _disk_errors("make", target):
        disk().rename(path, target)
        sync(target.parent)


def read_into(path: Path, offset: int, buffer: memoryview) -> int:
    """Fill `buffer` from a file, starting at byte `offset`. Returns the number of bytes read, fewer at the end of the file."""
    done = 0
    with waiting("read"), _disk_errors("read", path), disk().open(path, "rb") as file:
        file.seek(offset)
        while done < len(buffer) and (count := disk().read(file, buffer[done:])):
            done += count
    return done


def read_bytes(path: Path) -> bytes:
    """Return the contents of a regular file. Pipes and devices are rejected, since reading them might never end.

    Raises:
        FileNotFoundError: the file does not exist.
    """
    return b"".join(_pieces(path))


def _pieces(path: Path) -> Iterator[bytes]:
    with _disk_errors("read", path), disk().open(path, "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "Not a regular file")
        buffer = bytearray(COPY_BYTES)
        while count := disk().read(file, memoryview(buffer)):
            yield bytes(buffer[:count])


def advise_read(path: Path, offset: int, length: int) -> None:
    """Ask the kernel to read ahead, where it supports that. A missing file is ignored here; the reader reports it."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError), disk().open(path, "rb") as file:
            # In pieces: Linux caps each request at the device's read-ahead size.
            for begin in range(offset, offset + length, 1 << 17):
                os.posix_fadvise(file.fileno(), begin, min(1 << 17, offset + length - begin), os.POSIX_FADV_WILLNEED)


def drop_cached(path: Path) -> None:
    """Ask the kernel to drop a file from the page cache, where it supports that, so that the next read comes from the disk."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError), disk().open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def free_bytes(folder: Path) -> int:
    """Return the free bytes on the file system of `folder`, or of its nearest existing parent."""
    return shutil.disk_usage(_existing(folder)).free


def same_file_system(one: Path, other: Path) -> bool:
    """Return whether two folders are on the same file system. They need not exist yet."""
    return _existing(one).stat().st_dev == _existing(other).stat().st_dev


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    for piece in _pieces(path):
        digest.update(piece)
    return digest.hexdigest()


def has_digest(path: Path, digest: str) -> bool:
    """Return whether a file exists and has this SHA-256 (hex)."""
    return path.is_file() and sha256(path) == digest


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`. The lock of a process that dies is released.

    Raises:
        ResumeError: another process holds the lock, or has just finished the job and removed the lock file.
    """
    finished = ResumeError(f"another process has just finished this job ({path} is gone)")
    with ExitStack() as stack:
        with _disk_errors("lock", path):
            try:
                file = stack.enter_context(disk().open(path, "ab"))
            except FileNotFoundError:  # its folder was just removed
                raise finished from None
            for left in reversed(range(LOCK_TRIES)):
                try:
                    disk().lock(file)
                    break
                except BlockingIOError:
                    if not left:
                        raise ResumeError(f"another process is working on this job ({path} is locked)") from None
                    time.sleep(0.05)  # perhaps `is_locked` in another process
        if not path.exists() or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
            raise finished
        yield


@contextmanager
def locked_for_writing(path: Path) -> Iterator[None]:
    """Hold a lock file beside a file that is being written, then remove it. Raises ResumeError if it is held already."""
    lock = path.with_name(f"{path.name}.lock")
    with locked(lock):
        try:
            yield
        finally:
            remove(lock)


def is_locked(path: Path) -> bool:
    """Return whether a process holds this lock; false if the lock file does not exist."""
    with suppress(FileNotFoundError), _disk_errors("read", path), disk().open(path, "rb") as file:
        try:
            disk().lock(file, shared=True)  # shared, so that concurrent checks do not conflict
        except BlockingIOError:
            return True
    return False


def check_file_system(folder: Path, name: str, remedy: str) -> None:
    """Check that a folder's file system supports the operations of the crash rule, by performing them there.

    Hard links are not checked, since `link` falls back to copying.

    Args:
        folder: the folder to check; if it does not exist, its nearest existing parent.
        name: of the temporary folder for the check; one left by a killed process is removed.
        remedy: what the user should do on failure, for the message.
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
    """Turn OSErrors and DiskErrors into a DiskError that blames the file system of `folder` and names the remedy."""
    try:
        yield
    except (OSError, DiskError) as error:
        reason = getattr(error.__cause__ or error, "strerror", None) or error
        raise DiskError(f"{folder}: {operation} fails there ({reason}); {remedy}") from error


@contextmanager
def scratch(parent: Path, prefix: str) -> Iterator[Path]:
    """Create a temporary folder below `parent` and remove it at the end. First remove those left by killed processes of this user.

    Args:
        parent: must exist; may be shared with other users, such as the system's temporary folder.
        prefix: start of the folder's name, by which left-over folders are recognised.
    """
    for path in parent.glob(f"{prefix}*"):
        with suppress(OSError, DiskError, ResumeError):
            found = path.lstat()
            # Skip links and other users' folders: they could redirect the lock and the removal to any place.
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid():
                with locked(path / LOCKED):
                    _empty_last(path)
                remove_empty_folder(path)
    with ExitStack() as stack:
        while True:
            with _disk_errors("make", parent / prefix):
                folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            stack.callback(_left_for_later, remove_empty_folder, folder)
            with suppress(ResumeError):  # another process took it for a left-over one and is removing it
                try:
                    stack.enter_context(locked(folder / LOCKED))
                except DiskError:
                    empty_folder(folder)
                    raise
                break
        # While the lock is held: otherwise another process would take the folder for a left-over one.
        stack.callback(_left_for_later, _empty_last, folder)
        yield folder


def _empty_last(folder: Path) -> None:
    """Remove the contents of a folder whose lock is held, the lock last."""
    empty_folder(folder, keep=LOCKED)
    empty_folder(folder)


def _left_for_later(remove: Callable[[Path], None], folder: Path) -> None:
    """Remove what can be removed: NFS and FUSE keep a name for a mapped file. The next `scratch` takes the rest."""
    with suppress(OSError, DiskError):
        remove(folder)


def find_symlink(folder: Path) -> Path | None:
    """Return `folder` if it is a symbolic link, else the first symbolic link at any depth below it, else None."""
    if folder.is_symlink():
        return folder
    for place, folders, names in os.walk(folder):
        for name in sorted((*folders, *names)):
            if os.path.islink(os.path.join(place, name)):
                return Path(place, name)
    return None
