"""`streamprune report`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import streamprune
from streamprune.commands.status import check_finished
from streamprune.errors import ConfigError

from . import options, show


@click.command()
@click.argument("out", type=options.PATH)
@click.option(
    "--against", type=options.PATH, metavar="MODEL", help="Dense model to compare samples and perplexity with."
)
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="Prompt to continue; may be repeated.")
@click.option(
    "--tokens", type=int, help="Tokens per sample, at most.  [default: 48, or what the prompt leaves of the context]"
)
@options.text_option
@options.seq_len_option(of=" of --text")
@options.bos_option
@click.option(
    "--scores",
    type=options.PATH,
    metavar="FILE",
    help="Output of eval OUT --tasks A,B --json: scores of tasks to show.",
)
@click.option(
    "--scores-against",
    type=options.PATH,
    metavar="FILE",
    help="The same of the dense model, to compare the scores with.",
)
@click.option(
    "--comparison",
    type=options.PATH,
    metavar="DIR",
    help="Result of streamprune compare to show: its folder or compare.json.",
)
@click.option(
    "--out", "--html", "html", type=options.PATH, metavar="FILE", help="Page to write.  [default: OUT/report.html]"
)
@options.device_options
@options.output_options
def report(out: Path, against: Path | None, text: str | None, as_json: bool, quiet: bool, **chosen: Any) -> None:
    """Write one HTML page about OUT, a result of `run` or `tune`.

    OUT must be finished. The page shows how to run OUT and what it weighs, budget and errors over depth, importance curves,
    time and memory, settings and digests. It has no scripts and fetches nothing. Samples need the whole model in memory, one model at a time.

    Examples:

      streamprune report llama-2-5b

      streamprune report llama-2-5b --scores after.json --scores-against before.json

      streamprune report llama-2-5b --against llama-2-7b --prompt "The sea is" --text wiki-test.txt --out 5b.html
    """
    if text is None:
        if chosen["seq_len"] is not None:
            raise ConfigError(f"--seq-len {chosen['seq_len']} needs --text")
        if chosen["bos"] != "auto" and not chosen["prompts"]:
            raise ConfigError(f"--bos {chosen['bos']} needs --text or --prompt")
    if chosen["tokens"] is not None and not chosen["prompts"]:
        raise ConfigError(f"--tokens {chosen['tokens']} needs --prompt")
    check_finished(out)
    options.begin(against, texts=[text])
    with show.watched(quiet) as progress:
        page = streamprune.report(out, against=against, text=text, progress=progress, **chosen)
    show.result({"html": str(page)}, as_json, [f"written to {page}"])
