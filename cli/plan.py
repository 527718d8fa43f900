"""`streamprune plan`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from . import options, show

WHERE = {
    "device": "summed and solved with on the device",
    "parked": "waiting on the host while sites are solved",
    "host": "summed and solved with on the host",
}


@click.command()
@click.argument("model", type=options.DIRECTORY)
@options.job_options
@options.json_option
@click.option("--quiet", "-q", is_flag=True, help="Print only what does not fit; nothing if all fits.")
def plan(model: Path, as_json: bool, quiet: bool, **chosen: Any) -> None:
    """Estimate memory, disk, I/O and compute for `run`.

    The estimate says whether the job fits on this machine. It reads no weights and writes nothing. The exit code is 0 if
    the job fits and 1 if not.

    Example:

      streamprune plan llama-2-70b --ratio 0.3 --memory 24GiB
    """
    import streamprune
    from streamprune.system.units import format_bytes

    config = options.config(model, Path(f"{Path(os.path.abspath(model)).name}-pruned"), **chosen)
    options.begin(model, texts=[config.calibration], shared=True)
    with show.watched(quiet) as progress:
        resources = streamprune.forecast_job(config, progress=progress)
    rows = [
        [
            "device peak",
            format_bytes(resources.device_bytes),
            f"on {resources.device}, limit {format_bytes(resources.device_limit)}",
        ],
        [
            "host peak",
            format_bytes(resources.host_bytes),
            "includes the device peak" if resources.device == "cpu" else "",
        ],
        ["held in host memory", format_bytes(resources.held_bytes), "activations; included in the host peak"],
        [
            "disk for activations",
            format_bytes(resources.disk_bytes),
            f"in {resources.activations}, limit {format_bytes(resources.disk_limit)}",
        ],
        [
            "disk beside OUT",
            f"≤ {format_bytes(resources.output_bytes)}",
            "the result and temporary files",
        ],
        ["to read", format_bytes(resources.bytes_to_read), ""],
        [
            "operations without solving",
            f"{resources.operations / 1e12:.3f} TFLOP",
            ", ".join(f"{n / 1e12:.3f} in {kind}" for kind, n in resources.operations_by_kind.items() if n),
        ],
        ["steps", str(resources.steps), ""],
        ["micro-batch", f"{resources.batch} sequences", f"backward {resources.backward_batch}"],
        ["Grams", WHERE[resources.grams], ""],
        ["boundaries kept", f"every {resources.boundary_every}", ""],
    ]
    steps = [["at once in", "weights", "sums", "solving", "activations", "slack", "device", "host"]]
    for name, each in sorted(resources.demands.items(), key=lambda item: -item[1]["device_bytes"]):
        parts = ("weights", "sums", "solving", "activations", "slack", "device_bytes", "host_bytes")
        steps.append([name, *(format_bytes(each[part]) for part in parts)])
    problems = [f"does not fit: {problem}" for problem in resources.problems]
    tables = [*show.table([["", "", ""], *rows])[1:], "", *show.table(steps), ""]
    missed = [] if resources.ratio_missed is None else [f"misses its ratio: {resources.ratio_missed}"]
    lines = problems if quiet else [*tables, *(problems or ["it fits"]), *missed]
    show.result(resources.as_dict(), as_json, lines)
    options.note_idle(quiet, config)
    if resources.problems:
        click.get_current_context().exit(1)
