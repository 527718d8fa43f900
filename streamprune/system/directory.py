"""Checks on untrusted model directories: links that lead outside, and Git LFS pointers in place of files."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import CheckpointError
from . import files

_POINTER = b"version https://git-lfs.github.com/spec/v1"
"""First bytes of a Git LFS pointer, the text that stands in for a file that was not fetched."""


def check_links(directory: Path) -> None:
    """Reject symbolic links that lead out of a model directory, so that no other file of this machine is read or copied.

    Snapshots in the hub's cache are links to the blobs of their own repository. Those links are allowed.

    Raises:
        CheckpointError: a link leads elsewhere; the message names it.
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
    """Raise CheckpointError if `path` is a Git LFS pointer."""
    beginning = bytearray(len(_POINTER))
    if path.is_file() and files.read_into(path, 0, memoryview(beginning)) and beginning == _POINTER:
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the file itself; fetch it with `git lfs pull` in {path.parent}"
        )
