"""`streamprune tune`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from . import options, show


@click.command()
@click.argument("model", type=options.DIRECTORY)
@click.argument("out", type=options.DIRECTORY)
@click.option(
    "--text",
    required=True,
    multiple=True,
    metavar=options.SOURCE,
    help="Text to train on; repeat it for several sources.",
)
@click.option(
    "--method",
    type=click.Choice(["auto", "lora", "distil"]),
    default="auto",
    show_default=True,
    help="lora: end to end, in memory, needs peft; distil: block by block, streamed, needs --teacher; auto: lora where it can be.",
)
@click.option(
    "--teacher", type=options.DIRECTORY, metavar="MODEL", help="The dense model, whose block outputs distil aims at."
)
@click.option("--rank", default=8, show_default=True, help="Of each linear's change, at the most.")
@click.option("--steps", default=200, show_default=True, help="Of the whole model (lora) or of each block (distil).")
@click.option(
    "--rate",
    type=float,
    help="Learning rate at the first step; it falls to zero.  [default: 1e-3 (lora), 3e-3 (distil)]",
)
@click.option("--samples", default=128, show_default=True, help="Training windows.")
@click.option("--seq-len", type=int, help="Tokens a window.  [default: 2048, or the model's context if shorter]")
@click.option("--seed", default=0, show_default=True, help="Seed of everything that is drawn.")
@options.machine_options
@click.option("--restart", is_flag=True, help="Throw away what an earlier job left in OUT, finished or not.")
@options.output_options
def tune(model: Path, out: Path, restart: bool, as_json: bool, quiet: bool, **chosen: Any) -> None:
    """Train low-rank changes of MODEL, pruned or not, a checkpoint directory or a name on the hub, into OUT.

    OUT appears complete or not at all, the changes absorbed into its weights. Interrupted, the same command goes on
    where it stopped; until then the work lies in OUT.streamprune.

    Examples:

      streamprune tune llama-2-5b tuned --text wiki.txt

      streamprune tune llama-2-49b tuned --text wiki.txt --method distil --teacher llama-2-70b --memory 24GiB
    """
    import streamprune
    from streamprune.config import format_bytes

    options.begin()

    config = streamprune.TuneConfig(model=model, out=out, **options.machine(**chosen))
    with show.progress(quiet) as progress:
        tuned = streamprune.tune(config, restart=restart, progress=progress)
    lines = [
        f"{tuned.out}: tuned by {tuned.method}, rank {tuned.rank}, loss {tuned.loss_first:.4g} → {tuned.loss_last:.4g}",
        f"{tuned.seconds:.1f} s, {tuned.operations / 1e12:.3f} TFLOP, peak {format_bytes(tuned.peak_host_bytes)} of host memory"
        + (", resumed" if tuned.resumed else ""),
    ]
    show.result(asdict(tuned), as_json, lines)
