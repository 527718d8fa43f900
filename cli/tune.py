"""`streamprune tune`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

import streamprune
from streamprune.system.units import format_bytes

from . import options, show


@click.command()
@click.argument("model", type=options.PATH)
@click.argument("out", type=options.PATH)
@click.option(
    "--text", required=True, multiple=True, metavar=options.SOURCE, help="Text to train on; repeat for several sources."
)
@click.option(
    "--method",
    type=click.Choice(["auto", "lora", "distil"]),
    default="auto",
    help="lora: end to end with the whole model in memory; needs peft. distil: block by block, streamed; needs --teacher; the "
    "loss shown is the last block's, in nats. "
    "auto: lora if it fits into memory.",
)
@click.option(
    "--teacher",
    type=options.PATH,
    metavar="MODEL",
    help="Dense model whose outputs, block by block, are the target of distil.",
)
@click.option("--rank", default=8, help="Largest rank of the change of each linear.")
@click.option("--steps", default=200, help="Training steps, for the whole model (lora) or for each block (distil).")
@click.option(
    "--rate",
    type=float,
    help="Highest learning rate; it decays to zero.  [default: 1e-3 (lora), 3e-3 (distil)]",
)
@click.option("--batch", default=8, help="Windows per step of lora.")
@click.option("--warmup", default=0, metavar="STEPS", help="Steps of lora in which the learning rate rises from zero.")
@click.option("--dropout", default=0.0, help="Dropout of the inputs of lora's changes.")
@click.option(
    "--epochs", type=int, help="Times that lora takes the whole text, instead of --samples windows for --steps steps."
)
@options.windows_options("training")
@options.machine_options
@options.restart_option
@options.output_options
def tune(model: Path, out: Path, restart: bool, as_json: bool, quiet: bool, **chosen: Any) -> None:
    """Train low-rank changes of MODEL and absorb them into OUT.

    MODEL is a checkpoint directory, a GGUF file or a hub name, pruned or not. OUT has the same shape, and appears complete or not at
    all. After an interruption, run the same command again to resume; until it finishes, its work is in OUT.streamprune.

    Examples:

      streamprune tune llama-2-5b tuned --text wiki.txt

      streamprune tune llama-2-5b tuned --text wiki.txt --method lora --epochs 1 --batch 64 --rate 1e-4 --warmup 100 --dropout 0.05

      streamprune tune llama-2-49b tuned --text wiki.txt --method distil --teacher llama-2-70b --memory 24GiB
    """
    config = streamprune.TuneConfig(model=model, out=out, **chosen)
    options.begin(model, config.teacher, texts=[config.text])
    with show.progress(quiet) as progress:
        tuned = streamprune.tune(config, restart=restart, progress=progress)
    lines = [
        f"{tuned.out}: tuned by {tuned.method}, rank {tuned.rank}, loss {tuned.loss_first:.4g} → {tuned.loss_last:.4g}",
        f"{tuned.seconds:.1f} s, {tuned.operations / 1e12:.3f} TFLOP, peak {format_bytes(tuned.peak_host_bytes)} of host memory"
        + (", resumed" if tuned.resumed else ""),
    ]
    show.result(asdict(tuned), as_json, lines)
