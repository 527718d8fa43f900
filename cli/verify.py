"""`streamprune verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import options, show

if TYPE_CHECKING:
    from streamprune import Verification


@click.command()
@click.argument("out", type=options.DIRECTORY)
@options.output_options
def verify(out: Path, as_json: bool, quiet: bool) -> None:
    """Read OUT, a checkpoint directory or a name on the hub, and say whether it is sound.

    Every file that its SHA256SUMS names must have that checksum, every tensor must be there in the shape that the config
    says, and hold numbers only. A checkpoint without SHA256SUMS, such as a source model, is held against its config.

    Exit code 0: nothing is wrong. 1: it is damaged, a line for each fault.

    Example:

      streamprune verify llama-2-5b
    """
    import streamprune

    options.begin()

    with show.watched(quiet) as progress:
        found = streamprune.verify(out, progress=progress)
    show.result(found.as_dict(), as_json, _lines(found))
    click.get_current_context().exit(0 if found.sound else 1)


def _lines(found: Verification) -> list[str]:
    from streamprune.config import format_bytes

    read = f"{found.files} files, {found.tensors} tensors, {format_bytes(found.bytes)}"
    faults = f"{len(found.faults)} fault{'s' * (len(found.faults) > 1)}"
    lines = [f"{found.path}: {'sound' if found.sound else f'damaged, {faults}'} ({read})"]
    lines += [f"fault: {fault}" for fault in found.faults]
    lines += [f"warning: SHA256SUMS does not name {name}" for name in found.unlisted]
    if not found.manifest:
        lines.append("warning: there is no SHA256SUMS: bytes cannot be held against what they were meant to be")
    return lines
