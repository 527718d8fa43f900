"""`streamprune verify`."""

from __future__ import annotations

from pathlib import Path

import click

import streamprune
from streamprune.system.units import format_bytes

from . import options, show


@click.command()
@click.argument("out", type=options.PATH)
@options.output_options
def verify(out: Path, as_json: bool, quiet: bool) -> None:
    """Check that a checkpoint is complete and undamaged.

    OUT is a checkpoint directory or a hub name. Every file in its SHA256SUMS must have that checksum. Every tensor must
    exist, have the shape that the config gives, and contain no NaN or Inf. A checkpoint without SHA256SUMS, such as a
    source model, is checked against its config only. What transformers ignores, such as tensors that the model has no
    place for, is a warning.

    Exit code 0: sound. 1: damaged, with one line per fault.

    Example:

      streamprune verify llama-2-5b
    """
    options.begin(out)
    with show.watched(quiet) as progress:
        found = streamprune.verify(out, progress=progress)
    show.result(found.as_dict(), as_json, _lines(found))
    click.get_current_context().exit(0 if found.sound else 1)


def _lines(found: streamprune.Verification) -> list[str]:
    read = f"{found.files} files, {found.tensors} tensors, {format_bytes(found.bytes)}"
    faults = f"{len(found.faults)} fault{'s' * (len(found.faults) > 1)}"
    lines = [f"{found.path}: {'sound' if found.sound else f'damaged, {faults}'} ({read})"]
    lines += [f"fault: {fault}" for fault in found.faults]
    lines += [f"warning: {extra}" for extra in found.extra]
    lines += [f"warning: SHA256SUMS does not name {name}" for name in found.unlisted]
    if not found.manifest:
        lines.append("warning: there is no SHA256SUMS, so checksums cannot be checked")
    return lines
