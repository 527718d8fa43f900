"""`streamprune export`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

import streamprune
from streamprune.system.units import format_bytes

from . import options, show


@click.command()
@click.argument("model", type=options.PATH)
@click.argument("out", type=options.PATH, metavar="OUT.gguf")
@click.option("--dtype", default="f16", metavar="NAME", help="Dtype of the matrices: f32, f16, bf16 or q8_0.")
@options.output_options
def export(model: Path, out: Path, dtype: str, as_json: bool, quiet: bool) -> None:
    """Write MODEL as a GGUF file for llama.cpp.

    MODEL is a checkpoint directory, a GGUF file or a hub name, dense or pruned. The file includes the tokenizer. A model that llama.cpp
    cannot express is refused before anything is written.

    Example:

      streamprune export llama-2-5b llama-2-5b.gguf --dtype q8_0
    """
    options.begin(model)
    with show.watched(quiet) as progress:
        done = streamprune.export_gguf(model, out, dtype=dtype, progress=progress)
    line = f"{out}: {done.architecture} in {done.dtype}, {done.parameters:,} parameters, {format_bytes(done.size)}"
    show.result({**asdict(done), "path": str(out)}, as_json, [f"{line}, context {done.context}"])
