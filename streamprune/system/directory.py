"""A model directory as it comes from others: what in it leads elsewhere, or stands for a file that is not there."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import CheckpointError
from . import files

_POINTER = b"version https://git-lfs.github.com/spec/v1"
"""How Git LFS begins the text that it leaves where a file was not fetched."""


def check_links(directory: Path) -> None:
    """Refuse links that lead out of a model directory, lest files of this machine be read, or copied, under its names.

    A snapshot in the hub's cache consists of links to the blobs of its own repository, which are followed.

    Raises:
        CheckpointError: a link that leads elsewhere, by its name.
    """
    root = Path(os.path.realpath(directory))
    homes = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    with os.scandir(root) as entries:
        links = sorted(entry.name for entry in entries if entry.is_symlink())
    for name in links:
        target = Path(os.path.realpath(root / name))
        if not any(target.is_relative_to(home) for home in homes):
            raise CheckpointError(
                f"{directory / name} is a link to {target}, out of the model directory; put the file itself there"
            )


def check_pointer(path: Path) -> None:
    """Refuse the text that Git LFS leaves in the place of a file.

    Raises:
        CheckpointError: `path` holds such a text.
    """
    beginning = bytearray(len(_POINTER))
    if path.is_file() and files.read_into(path, 0, memoryview(beginning)) and beginning == _POINTER:
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the file itself; fetch it with `git lfs pull` in {path.parent}"
        )
