"""Locate a job's activations: in the job's folder, or in a folder that jobs may share.

The job's folder records a shared folder before anything is written there.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from ..errors import ResumeError
from ..system import files
from ..system.strict_json import read_json

NOTE = "caches.json"
FOLDERS = "folders"


def key(folder: Path) -> str:
    """Return a hash of the resolved path of a job's folder, which distinguishes jobs of the same name."""
    return hashlib.sha256(str(folder.parent.resolve() / folder.name).encode()).hexdigest()[:8]


class Caches:
    """Folders with activations of one job, including those that earlier processes of the job used.

    Args:
        folder: the job's folder.
        given: a folder that jobs may share; None keeps activations in the job's folder.
    """

    def __init__(self, folder: Path, given: Path | None) -> None:
        self._folder, self._given = folder, given
        self._note = folder / NOTE

    @property
    def own(self) -> Path:
        """Folder to which this process writes activations."""
        return self._folder / "cache" if self._given is None else self._within(self._given)

    def note(self) -> None:
        """Durably record the folder for activations before its first use, so that a later process finds it."""
        noted = self._noted()
        if self._given is not None and (given := str(self._given.absolute())) not in noted:
            files.write_text(self._note, json.dumps({FOLDERS: [*noted, given]}) + "\n")

    def everywhere(self) -> list[Path]:
        """Return every folder that may hold activations of this job.

        Raises:
            ResumeError: the record is damaged.
        """
        return list(dict.fromkeys([self._folder / "cache", *map(self._within, map(Path, self._noted())), self.own]))

    def remove(self) -> None:
        """Remove all activations, then the record of their folders."""
        for path in self.everywhere():
            files.remove_tree(path)
        files.remove(self._note)

    def _within(self, given: Path) -> Path:
        return given.absolute() / f"{self._folder.name}-{key(self._folder)}"

    def _noted(self) -> list[str]:
        if not self._note.is_file():
            return []
        folders = read_json(self._note).get(FOLDERS)
        if not isinstance(folders, list) or not all(isinstance(folder, str) for folder in folders):
            raise ResumeError(f"{self._note} is damaged: {FOLDERS!r} is not a list of folders")
        return folders
