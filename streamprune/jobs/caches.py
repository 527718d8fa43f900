"""Where a job's activations lie: in its own folder or, noted there before anything is, in one that jobs may share."""

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
    """What tells a job from others of its name, however the path to its folder is spelled."""
    return hashlib.sha256(str(folder.parent.resolve() / folder.name).encode()).hexdigest()[:8]


class Caches:
    """The activations of one job, and those that earlier processes at it left in folders they were given.

    Args:
        folder: the job's own.
        given: a folder that jobs may share; None keeps activations in the job's own.
    """

    def __init__(self, folder: Path, given: Path | None) -> None:
        self._folder, self._given = folder, given
        self._note = folder / NOTE

    @property
    def own(self) -> Path:
        """Where activations go."""
        return self._folder / "cache" if self._given is None else self._within(self._given)

    def note(self) -> None:
        """Durably write down where activations are about to go, so that they can be found without being told."""
        noted = self._noted()
        if self._given is not None and (given := str(self._given.absolute())) not in noted:
            files.write_text(self._note, json.dumps({FOLDERS: [*noted, given]}) + "\n")

    def everywhere(self) -> list[Path]:
        """Every folder where activations of this job may lie.

        Raises:
            ResumeError: the note is damaged.
        """
        return list(dict.fromkeys([self._folder / "cache", *map(self._within, map(Path, self._noted())), self.own]))

    def remove(self) -> None:
        """Remove them all, the note last."""
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
