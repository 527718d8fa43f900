"""A disk that fails, tears a write or stops at a chosen operation, in place of the real one.

A *stop* leaves what SIGKILL leaves: nothing reaches the disk afterwards, not even from `finally` blocks. A *power cut* also undoes
what was not durable: bytes after a file's last sync, and all or the later half of the names that changed in folders that were
not synced. A full disk stays full; an input/output error occurs once.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Literal, get_args

from streamprune.system.disk import Disk, Mode

Fault = Literal["stop", "tear", "cut", "half cut", "full", "error"]
FAULTS: tuple[Fault, ...] = get_args(Fault)
GROWING = ("create", "write", "link", "make_folder")
"""Operations that a full disk refuses."""
CHANGING = (*GROWING, "truncate", "rename", "unlink", "remove_folder")
"""A stop between two of these leaves the same wherever it comes."""
AT: dict[Fault, tuple[str, ...]] = {
    "stop": CHANGING,
    "tear": ("write",),
    "cut": (*CHANGING, "sync", "sync_folder"),
    "half cut": (*CHANGING, "sync", "sync_folder"),
    "full": GROWING,
    "error": (*CHANGING, "sync", "sync_folder", "open", "read", "lock"),
}
"""Operations before which a fault makes a difference."""


class Stopped(BaseException):
    """Stands for the end of the process: the project never swallows it."""


class FaultyDisk(Disk):
    """Counts operations and fails at one of them.

    Args:
        folder: contains all files; without a fault, its largest size is recorded as `most`.
        graveyard: a folder on the same file system for files that a power cut may bring back.
        fault: None for none.
        at: number of the operation that fails, from 1.
    """

    def __init__(self, folder: Path, graveyard: Path, fault: Fault | None = None, at: int = 0) -> None:
        self.folder, self.graveyard, self.fault, self.at = folder, graveyard, fault, at
        self.count, self.most = 0, 0
        self.operations: list[str] = []
        self.happened = False
        self._over = False
        self._guard = threading.RLock()
        self._graves = 0
        self._synced: dict[int, int] = {}
        """Durable bytes of files that have more, by inode."""
        self._names: list[tuple[Path, Callable[[], None]]] = []
        """Folders with names that are not durable, and functions that undo these, in order."""

    # The operations.

    def open(self, path: Path, mode: Mode) -> FileIO:
        with self._guard:
            new = mode in ("wb", "ab") and not path.exists()
            self._reach("create" if new else "open", path)
            file = super().open(path, mode)
            if new:
                self._named(path.parent, lambda: path.unlink(missing_ok=True))
            if mode == "wb" or new:
                self._synced[os.fstat(file.fileno()).st_ino] = 0
            return file

    def read(self, file: FileIO, buffer: memoryview) -> int:
        with self._guard:
            self._reach("read", Path(str(file.name)))
        return super().read(file, buffer)

    def write(self, file: FileIO, data: memoryview) -> None:
        with self._guard:
            self._synced.setdefault(os.fstat(file.fileno()).st_ino, os.fstat(file.fileno()).st_size)
            self._reach(
                "write", Path(str(file.name)), tear=lambda: super(FaultyDisk, self).write(file, data[: len(data) // 2])
            )
            super().write(file, data)
            self._weigh()

    def truncate(self, file: FileIO, length: int) -> None:
        with self._guard:
            self._reach("truncate", Path(str(file.name)))
            super().truncate(file, length)

    def sync(self, file: FileIO) -> None:
        with self._guard:
            self._reach("sync", Path(str(file.name)))
            self._synced.pop(os.fstat(file.fileno()).st_ino, None)

    def sync_folder(self, path: Path) -> None:
        with self._guard:
            self._reach("sync_folder", path)
            self._names = [(folder, undo) for folder, undo in self._names if folder != path]

    def lock(self, file: FileIO, *, shared: bool = False) -> None:
        with self._guard:
            self._reach("lock", Path(str(file.name)))
            super().lock(file, shared=shared)

    def rename(self, source: Path, target: Path) -> None:
        with self._guard:
            self._reach("rename", target)
            grave = self._bury(target) if target.is_file() and not os.path.samefile(source, target) else None
            super().rename(source, target)

            def undo() -> None:
                if target.exists():
                    os.rename(target, source)
                if grave is not None:
                    os.rename(grave, target)

            self._named(target.parent, undo)

    def link(self, source: Path, target: Path) -> None:
        with self._guard:
            self._reach("link", target)
            super().link(source, target)
            self._named(target.parent, lambda: target.unlink(missing_ok=True))

    def unlink(self, path: Path) -> None:
        with self._guard:
            self._reach("unlink", path)
            grave = self._bury(path) if path.is_file() else None
            super().unlink(path)
            if grave is not None:
                self._named(path.parent, lambda: os.rename(grave, path))

    def make_folder(self, path: Path) -> None:
        with self._guard:
            self._reach("make_folder", path)
            super().make_folder(path)
            self._named(path.parent, lambda: shutil.rmtree(path, ignore_errors=True))

    def remove_folder(self, path: Path) -> None:
        with self._guard:
            self._reach("remove_folder", path)
            super().remove_folder(path)
            self._named(path.parent, lambda: path.mkdir(exist_ok=True))

    # The fault.

    def _reach(self, operation: str, path: Path, tear: Callable[[], None] | None = None) -> None:
        if self._over:
            raise Stopped
        self.count += 1
        self.operations.append(f"{operation} {path.name}")
        if self.fault is None or self.count < self.at:
            return
        if self.fault == "full":
            if operation in GROWING:
                self.happened = True
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        elif self.count == self.at:
            self.happened = True
            if self.fault == "error":
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            if self.fault == "tear" and tear is not None:
                tear()
            self._over = True
            if self.fault in ("cut", "half cut"):
                self._cut(len(self._names) if self.fault == "cut" else len(self._names) // 2)
            raise Stopped

    def _cut(self, names: int) -> None:
        for path in self.folder.rglob("*"):
            if path.is_file() and (length := self._synced.get(path.stat().st_ino)) is not None:
                os.truncate(path, min(length, path.stat().st_size))
        for folder, undo in list(reversed(self._names))[:names]:
            if folder.is_dir():  # else it is gone, with all its names
                undo()

    def _named(self, folder: Path, undo: Callable[[], None]) -> None:
        self._names.append((folder, undo))

    def _bury(self, path: Path) -> Path:
        self._graves += 1
        grave = self.graveyard / f"{id(self):x}-{self._graves}"
        os.link(path, grave)
        return grave

    def _weigh(self) -> None:
        if self.fault is None:
            sizes: dict[int, int] = {}
            for path in self.folder.rglob("*"):
                if path.is_file() and not path.is_symlink():
                    sizes[path.stat().st_ino] = path.stat().st_size
            self.most = max(self.most, sum(sizes.values()))
