"""Looking at a result again, later or elsewhere: is it still what was written?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from . import manifest
from .errors import DiskError
from .hub import resolve_model
from .progress import Progress, Silent
from .verification import Fault, Verification, check


def verify(path: str | Path, *, progress: Progress | None = None) -> Verification:
    """Whether a checkpoint directory is sound: files as its `SHA256SUMS` says, tensors as its config says, values finite.

    Everything is read once, from the disk; nothing is changed. Any checkpoint will do, a source model or what another
    tool wrote; without a manifest it is held against its config only.

    Args:
        path: a checkpoint directory, or a name on the hub.

    Raises:
        CheckpointError: `path` is neither.
    """
    progress = progress or Silent()
    folder = resolve_model(path, progress)
    digests, wrong = None, list[str]()
    if (folder / manifest.NAME).exists():
        try:
            digests, wrong = manifest.read(folder)
        except DiskError as error:
            wrong = [f"{manifest.NAME} cannot be read: {error}"]
    found = check(folder, digests, progress)
    own = tuple(Fault("file", manifest.NAME, None, message) for message in wrong)
    return replace(found, path=str(path), faults=(*own, *found.faults))
