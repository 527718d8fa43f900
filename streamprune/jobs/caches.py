"""A job's activations: where they lie, and their removal.

They lie in the job's folder or in a folder that jobs may share. The job's folder records a shared folder before anything is
written there. `stream.store.ActivationStore` creates the folders and the files in them.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from ..errors import ResumeError
from ..system import files
from ..system.ranks import ALONE, Ranks
from ..system.strict_json import read_json

RECORD = "caches.json"
FOLDERS = "folders"


class Caches:
    """Folders with activations of one job, including those that earlier processes of the job used.

    Args:
        folder: the job's folder.
        given: a folder that jobs may share; None keeps activations in the job's folder.
    """

    def __init__(self, folder: Path, given: Path | None) -> None:
        self._folder, self._given = folder, given
        self._record = folder / RECORD
        self.own = folder / "cache" if given is None else self._within(given)
        """Folder to which this process writes activations."""

    def record(self) -> None:
        """Durably record the folder for activations before its first use, so that a later process finds it."""
        recorded = self._recorded()
        if self._given is not None and (given := str(self._given.absolute())) not in recorded:
            files.write_text(self._record, json.dumps({FOLDERS: [*recorded, given]}) + "\n")

    def remove(self, ranks: Ranks = ALONE) -> None:
        """Remove the activations of all ranks, which may have separate disks. Raises ResumeError if their record is damaged."""
        for _ in ranks.in_turn():
            recorded = map(self._within, map(Path, self._recorded()))
            for path in dict.fromkeys([self._folder / "cache", *recorded, self.own]):
                files.remove_tree(path)
        if ranks.first:
            files.remove(self._record)

    def _within(self, given: Path) -> Path:
        """Return the job's folder in a shared one. A hash of the resolved path distinguishes jobs of the same name."""
        resolved = self._folder.parent.resolve() / self._folder.name
        return given.absolute() / f"{self._folder.name}-{hashlib.sha256(str(resolved).encode()).hexdigest()[:8]}"

    def _recorded(self) -> list[str]:
        if not self._record.is_file():
            return []
        folders = read_json(self._record).get(FOLDERS)
        if not isinstance(folders, list) or not all(isinstance(folder, str) for folder in folders):
            raise ResumeError(f"{self._record} is damaged: {FOLDERS!r} is not a list of folders")
        return folders
