"""`streamprune eval`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from . import options, show


@click.command("eval")
@click.argument("model", type=options.DIRECTORY)
@click.option("--text", type=options.FILE, required=True, metavar="FILE", help="UTF-8 text to score.")
@click.option("--seq-len", type=int, help="Tokens a window.  [default: 2048, or the model's context if shorter]")
@options.machine_options
@options.output_options
def evaluate(
    model: Path,
    text: Path,
    seq_len: int | None,
    device: str,
    memory: str | None,
    dtype: str,
    cache: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Perplexity of the checkpoint directory MODEL, dense or pruned, streamed block by block.

    Example:

      streamprune eval llama-2-5b --text wiki-test.txt --seq-len 2048
    """
    import streamprune

    options.begin()

    with show.progress(quiet) as progress:
        measured = streamprune.evaluate(
            model,
            text,
            seq_len=seq_len,
            device=device,
            dtype=dtype,
            memory=options.size(memory, "--memory"),
            cache=cache,
            progress=progress,
        )
    show.result(asdict(measured), as_json, [f"perplexity {measured.perplexity:.4f}", f"({measured.protocol})"])
