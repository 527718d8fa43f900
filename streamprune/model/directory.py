"""A model directory as it comes from others: what in it leads elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import CheckpointError


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
