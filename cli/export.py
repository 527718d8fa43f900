"""`streamprune export`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

import streamprune
from streamprune.commands.export.quantiser import check
from streamprune.errors import ConfigError
from streamprune.system.units import format_bytes

from . import options, show


@click.command()
@click.argument("model", type=options.PATH)
@click.argument("out", type=options.PATH, metavar="OUT.gguf")
@click.option(
    "--dtype",
    default="f16",
    metavar="NAME",
    help="Type of the matrices: f32, f16, bf16, q8_0, or one of llama.cpp's quantised types, such as q4_k_m, q5_k_m, q6_k and q4_0.",
)
@click.option(
    "--imatrix-text",
    metavar=options.TEXT,
    help="With a quantised type: text over which the importance of each column is measured, for llama.cpp's quantiser.",
)
@options.device_options
@options.output_options
def export(
    model: Path,
    out: Path,
    dtype: str,
    imatrix_text: str | None,
    device: str,
    memory: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write MODEL as a GGUF file for llama.cpp.

    MODEL is a checkpoint directory, a GGUF file or a hub name, dense or pruned. The file includes the tokenizer. A model that llama.cpp
    cannot express is refused before anything is written. Quantised types need `pip install 'streamprune[llama]'`.

    Examples:

      streamprune export llama-2-5b llama-2-5b.gguf --dtype q8_0

      streamprune export llama-2-5b llama-2-5b.gguf --dtype q4_k_m --imatrix-text calibration.txt
    """
    for name, given in (("device", device != "auto"), ("memory", memory is not None)):
        if given and imatrix_text is None:
            raise ConfigError(f"--{name} needs --imatrix-text")
    check(dtype, imatrix_text is not None)
    options.begin(model, texts=[imatrix_text])
    with show.watched(quiet) as progress:
        done = streamprune.export_gguf(
            model, out, dtype=dtype, imatrix_text=imatrix_text, device=device, memory=memory, progress=progress
        )
    line = f"{out}: {done.architecture} in {done.dtype}, {done.parameters:,} parameters, {format_bytes(done.size)}"
    sizes = ", ".join(f"{format_bytes(n)} in {name}" for name, n in done.weights.items() if n is not None)
    lines = [f"{line}, context {done.context}", f"weights: {sizes}"]
    show.result({**asdict(done), "path": str(out)}, as_json, lines)
