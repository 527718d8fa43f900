"""`streamprune report`."""

from __future__ import annotations

from pathlib import Path

import click

from . import options, show


@click.command()
@click.argument("out", type=options.DIRECTORY)
@click.option(
    "--against", type=options.DIRECTORY, metavar="MODEL", help="The dense model, for what follows side by side."
)
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="A text to go on with; may be repeated.")
@click.option("--tokens", default=48, show_default=True, help="Tokens of each sample, at most.")
@click.option("--text", metavar=options.TEXT, help="Text to measure perplexity on, streamed, whole and in order.")
@click.option("--seq-len", type=int, help="Tokens a window of it.  [default: 2048, or the model's context if shorter]")
@click.option(
    "--comparison",
    type=options.DIRECTORY,
    metavar="DIR",
    help="What streamprune compare wrote: its folder or compare.json.",
)
@click.option("--html", type=options.FILE, metavar="FILE", help="Where to write.  [default: OUT/report.html]")
@options.device_options
@options.output_options
def report(
    out: Path,
    against: Path | None,
    prompts: tuple[str, ...],
    tokens: int,
    text: str | None,
    seq_len: int | None,
    comparison: Path | None,
    html: Path | None,
    device: str,
    memory: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write a page that shows what was done to OUT, a finished result of run or tune.

    Budget and errors over depth, importance curves, time and memory, settings and fingerprints: one HTML file without
    scripts, which fetches nothing. Samples hold each model whole in memory, one after the other.

    Examples:

      streamprune report llama-2-5b

      streamprune report llama-2-5b --against llama-2-7b --prompt "The sea is" --text wiki-test.txt --html 5b.html
    """
    import streamprune

    options.begin()

    with show.watched(quiet) as progress:
        page = streamprune.report(
            out,
            against=against,
            prompts=prompts,
            tokens=tokens,
            text=text,
            seq_len=seq_len,
            comparison=comparison,
            html=html,
            device=device,
            memory=options.size(memory, "--memory"),
            progress=progress,
        )
    show.result({"html": str(page)}, as_json, [f"written to {page}"])
