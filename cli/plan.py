"""`streamprune plan`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

import streamprune
from streamprune.system.units import format_bytes

from . import options, show

GRAMS = {
    "device": "summed and solved with on the device",
    "parked": "waiting on the host while sites are solved",
    "host": "summed and solved with on the host",
}
PARTS = ("weights", "sums", "solving", "activations", "slack", "device_bytes", "host_bytes")


@click.command()
@click.argument("model", type=options.PATH)
@options.job_options
@options.json_option
@click.option("--quiet", "-q", is_flag=True, help="Print only what does not fit; nothing if all fits.")
def plan(model: Path, as_json: bool, quiet: bool, **chosen: Any) -> None:
    """Estimate memory, disk, I/O and compute for `run`.

    The estimate says whether the job fits on this machine. It reads no weights and writes nothing. The exit code is 0 if
    the job fits and 1 if not.

    A table says what other ratios would give: the weights in several formats, the cache of --context tokens, the speed of
    decoding by a table of matrix products measured on this device and, with --survey, the predicted loss.

    Example:

      streamprune plan llama-2-70b --ratio 0.3 --memory 24GiB
    """
    config = options.config(model, Path(f"{Path(os.path.abspath(model)).name}-pruned"), **chosen)
    options.begin(model, texts=[config.calibration, config.metric_text, config.prompts], shared=True)
    with show.watched(quiet) as progress:
        needs = streamprune.forecast_job(config, progress=progress)
        outlook = None if quiet or _keeps_shapes(config) else streamprune.preview(config, progress=progress)
    kinds = ", ".join(f"{n / 1e12:.3f} in {kind}" for kind, n in needs.operations_by_kind.items() if n)
    rows = [
        [
            "device peak",
            format_bytes(needs.device_bytes),
            f"on {needs.device}, limit {format_bytes(needs.device_limit)}",
        ],
        ["host peak", format_bytes(needs.host_bytes), "includes the device peak" if needs.device == "cpu" else ""],
        ["held in host memory", format_bytes(needs.held_bytes), "activations; included in the host peak"],
        [
            "disk for activations",
            format_bytes(needs.disk_bytes),
            f"in {needs.activations}, limit {format_bytes(needs.disk_limit)}",
        ],
        ["disk beside OUT", f"≤ {format_bytes(needs.output_bytes)}", "the result and temporary files"],
        ["to read", format_bytes(needs.bytes_to_read), ""],
        ["operations", f"{needs.operations / 1e12:.3f} TFLOP", kinds],
        ["training", *_efforts(needs.refinement_operations)],
        ["steps", str(needs.steps), ""],
        ["micro-batch", f"{needs.batch} sequences", f"backward {needs.backward_batch}"],
        ["Grams", GRAMS[needs.grams], ""],
        ["boundaries kept", f"every {needs.boundary_every}", ""],
    ]
    moments = [["at once in", *(part.removesuffix("_bytes") for part in PARTS)]]
    for name, each in sorted(needs.demands.items(), key=lambda item: -item[1]["device_bytes"]):
        moments.append([name, *(format_bytes(each[part]) for part in PARTS)])
    problems = [f"does not fit: {problem}" for problem in needs.problems]
    missed = [] if needs.ratio_missed is None else [f"misses its ratio: {needs.ratio_missed}"]
    verdict = [*(problems or ["it fits"]), *missed]
    ratios = [] if outlook is None else [*_ratios(outlook), ""]
    kept = [] if needs.kept is None else [f"{config.layout} layout: {needs.kept}"]
    lines = problems if quiet else [*show.table(rows), "", *show.table(moments), "", *ratios, *kept, *verdict]
    show.result({**needs.as_dict(), "preview": outlook and asdict(outlook)}, as_json, lines)
    options.note_idle(quiet, config, used=["context"])
    if needs.problems:
        click.get_current_context().exit(1)


def _keeps_shapes(config: streamprune.Config) -> bool:
    from streamprune.recipes.registry import RECIPES
    from streamprune.recipes.settings import parse

    return bool(RECIPES[config.recipe](parse(config.recipe, config.settings)).writes_zeros)


def _ratios(outlook: streamprune.Preview) -> list[str]:
    formats = list(outlook.outcomes[0].weights)
    rows = [["ratio", "parameters", *formats, "cache", "decoding", "loss"]]
    for each in outlook.outcomes:
        sizes = ["–" if size is None else format_bytes(size) for size in (*each.weights.values(), each.cache)]
        loss = "–" if each.loss is None else f"+{each.loss:.3f}"
        chosen = " (chosen)" * (each.ratio == outlook.chosen)
        rows.append([f"{each.ratio:g}{chosen}", f"{each.parameters:,}", *sizes, f"× {each.speedup:.2f}", loss])
    widths = (
        ""
        if outlook.surveyed
        else "; widths as if all sites lost the same share, since no kept survey prices them (--survey)"
    )
    return [
        *show.table(rows),
        f"bytes of weights; cache of {outlook.context} tokens; decoding: matrix products of one token on this device; "
        f"loss: predicted, in nats per token{widths}",
    ]


def _efforts(operations: Mapping[str, int]) -> tuple[str, str]:
    """Say what each effort costs."""
    return "", ", ".join(f"{count / 1e12:.3f} TFLOP with --effort {effort}" for effort, count in operations.items())
