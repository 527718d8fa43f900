"""`streamprune inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from . import options, show


@click.command()
@click.argument("model", type=options.DIRECTORY)
@options.json_option
def inspect(model: Path, as_json: bool) -> None:
    """Blocks, sites, units and widths of MODEL; what is done of the job that makes or made it.

    Example:

      streamprune inspect llama-2-5b
    """
    import streamprune

    found = streamprune.inspect(model, progress=show.Shown())
    lines = []
    if found["model"] is not None:
        lines += _model(found["model"])
    if found["job"] is not None:
        lines += _job(found["job"])
    show.result(found, as_json, lines)


def _model(model: dict[str, Any]) -> list[str]:
    rows = [["block", "parameters", "attention", "heads", "ffn"]]
    for block in model["blocks"]:
        attention, ffn = block["sites"]
        heads = f"{attention['heads']} × {attention['head_dim']}"
        rows.append(
            [str(block["block"]), f"{block['parameters']:,}", str(attention["units"]), heads, str(ffn["units"])]
        )
    return [
        f"{model['path']}: {model['model_type']}, {model['parameters']:,} parameters in {', '.join(model['dtypes'])}, "
        f"{model['block_parameters']:,} of them in {len(model['blocks'])} blocks",
        f"width {model['width']}, vocabulary {model['vocabulary']}, context {model['context']}, "
        + ("tied head" if model["tied"] else "own head"),
        *show.table(rows),
        "attention: key/value groups, removed with their query heads; ffn: channels",
    ]


def _job(job: dict[str, Any]) -> list[str]:
    lines = ["", f"job: {job['state']}"]
    report = job.get("report") or {}
    while "tuning" in report:
        tuning = report["tuning"]
        lines.append(
            f"tuned by {tuning['method']}, rank {tuning['rank']}, {tuning['steps']} steps: "
            f"loss {tuning['loss_first']:.4g} → {tuning['loss_last']:.4g}"
        )
        report = report["source"] or {}
    if "recipe" in report:
        lines.append(
            f"{report['recipe']}: {report['ratio_blocks']:.2%} of the blocks' and {report['ratio_model']:.2%} of the "
            f"model's parameters {'made zero' if report['zeros'] else 'removed'}, {report['ratio_requested']:.2%} asked for"
        )
    elif "finished" in job:
        lines.append(f"finished steps: {', '.join(job['finished']) or 'none'}")
    sites = report.get("sites", job.get("sites", []))
    if sites:
        done, whole = ("zeros", "weights") if "zeros" in sites[0] else ("kept", "units")
        rows = [["site", done, "of", "error", "damping", "seconds"]]
        for site in sites:
            error = "" if site["error"] is None else f"{site['error']:.4f}"
            damping = "" if site["damping"] is None else f"{site['damping']:g}"
            extent = [f"{site[done]:,}", f"{site[whole]:,}"]
            rows.append([site["site"], *extent, error, damping, f"{site['seconds']:.2f}"])
        lines += show.table(rows)
    return lines
