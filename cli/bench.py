"""`streamprune bench`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

import streamprune

from . import options, show


@click.command()
@click.argument("model", type=options.PATH)
@click.option("--against", type=options.PATH, metavar="MODEL", help="The dense model that MODEL was made from.")
@click.option(
    "--prompt-tokens", type=int, help="Tokens per prompt.  [default: 512, or what fits the context beside --new-tokens]"
)
@click.option(
    "--new-tokens",
    type=int,
    help="Decoding steps after the prompt, one token each.  [default: 64, or what fits the context]",
)
@click.option("--batch", default=1, help="Sequences per batch.")
@click.option("--repetitions", default=5, help="Rounds; the models take turns in each.")
@click.option("--threads", type=int, help="CPU threads.  [default: torch's choice]")
@click.option(
    "--widths",
    is_flag=True,
    help="Also time one FFN's matrix products at the widths that other values of --round-to would give.",
)
@options.computing_options
@options.output_options
def bench(
    model: Path, against: Path | None, widths: bool, memory: int | None, as_json: bool, quiet: bool, **chosen: Any
) -> None:
    """Measure inference speed in transformers, and what it could be.

    MODEL is a checkpoint directory, a GGUF file or a hub name. Operations limit prefill; bytes read limit decoding of a few
    sequences. A model with 70 % of both could be 1.43 times as fast. Both models must fit in memory together. They take
    turns, so that a busy machine slows both.

    Example:

      streamprune bench llama-2-5b --against llama-2-7b --threads 8
    """
    options.begin(model, against)
    with show.watched(quiet) as progress:
        measured = streamprune.bench(model, against, memory=memory, progress=progress, **chosen)
    found = asdict(measured)
    lines = _speeds(measured)
    if widths:
        del chosen["new_tokens"]
        chosen["prompt_tokens"] = measured.model.prefill.tokens // chosen["batch"]
        tried = streamprune.bench_widths(model, **chosen)
        found["widths"] = [asdict(each) for each in tried]
        lines += ["", *_widths(tried)]
    show.result(found, as_json, lines)


def _speeds(measured: streamprune.Bench) -> list[str]:
    ours, other = measured.model, measured.against
    if other is None:
        alone = [[name, f"{getattr(ours, name).tokens_per_second:.1f}"] for name in ("prefill", "decode")]
        return [*show.table([["tokens per second", ""], *alone]), f"({measured.protocol})"]
    ratios = ["speed-up", "rounds", "fastest", "by operations", "by bytes", "achieved"]
    rows = [["tokens per second", "dense", "pruned", *ratios]]
    for name in ("prefill", "decode"):
        gain = getattr(measured, name)
        rates = [f"{getattr(each, name).tokens_per_second:.1f}" for each in (other, ours)]
        span = f"{min(gain.rounds):.2f}–{max(gain.rounds):.2f}"
        limits = [f"{ratio:.2f}" for ratio in (gain.fastest, gain.by_operations, gain.by_bytes)]
        rows.append([name, *rates, f"{gain.median:.2f}", span, *limits, f"{gain.achieved:.0%}"])
    return [
        *show.table(rows),
        f"{other.parameters:,} → {ours.parameters:,} parameters; speed-up: median over rounds; fastest: of the fastest rounds; "
        "by operations, by bytes: the limits that they set; achieved: share of the limit by operations (prefill) or bytes (decode)",
        f"({measured.protocol})",
    ]


def _widths(tried: list[streamprune.Width]) -> list[str]:
    rows = [["FFN width", "round-to", "operations", "prefill", "decode"]]
    for each in tried:
        figures = [f"{figure:.3f}" for figure in (each.operations, each.prefill, each.decode)]
        rows.append([f"{each.width}{' (now)' * each.own}", ", ".join(map(str, each.round_to)), *figures])
    return [*show.table(rows), "operations and seconds of the FFN products, relative to the current width"]
