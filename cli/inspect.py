"""`streamprune inspect`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

import streamprune
from streamprune.commands.report.records import flat
from streamprune.jobs.extents import experts_gone
from streamprune.model.hub import is_name
from streamprune.system.units import format_bytes

from . import options, show

STEPS = 16
"""Characters of a curve."""
DECADES = 6
"""Decades of a curve's scale, at most."""


@click.command()
@click.argument("model", type=options.PATH)
@options.json_option
def inspect(model: Path, as_json: bool) -> None:
    """Show the blocks, sites and widths of MODEL, and its job.

    For a pruned model this includes budget, errors and importance curves over depth, time and memory, settings and
    fingerprints. `streamprune report` shows the same on a page.

    Example:

      streamprune inspect llama-2-5b
    """
    options.check_alone()
    if is_name(model):  # a job's folder needs no torch
        options.begin(model)
    with show.watched() as progress:
        found = streamprune.inspect(model, progress=progress)
    parts = [lines(found[name]) for name, lines in (("model", _model), ("job", _job)) if found[name] is not None]
    show.result(found, as_json, _paragraphs(parts))


def _paragraphs(parts: list[list[str]]) -> list[str]:
    """Lines of the parts, separated by empty lines."""
    return [line for part in parts if part for line in ("", *part)][1:]


def _model(model: dict[str, Any]) -> list[str]:
    kinds = list(dict.fromkeys(_kind(site) for block in model["blocks"] for site in block["sites"]))
    rows = [["block", "parameters", "heads", *kinds]]
    for block in model["blocks"]:
        heads = [f"{site['heads']} × {site['head_dim']}" for site in block["sites"] if "heads" in site]
        units = [_units([site["units"] for site in block["sites"] if _kind(site) == kind]) for kind in kinds]
        units = [
            "gone" if f"blocks.{block['block']}.{kind}" in block["gone"] else n
            for kind, n in zip(kinds, units, strict=True)
        ]
        rows.append([str(block["block"]), f"{block['parameters']:,}", " ".join(heads), *units])
    return [
        _support(model),
        f"{model['path']}: {model['model_type']}, {model['parameters']:,} parameters in {', '.join(model['dtypes'])}, "
        f"{model['block_parameters']:,} of them in {len(model['blocks'])} blocks",
        f"width {model['width']}, vocabulary {model['vocabulary']}, context {model['context']}, "
        + ("tied head" if model["tied"] else "untied head"),
        *show.table(rows),
        "attention: key/value groups, removed with their query heads; ffn: channels",
    ]


def _support(model: dict[str, Any]) -> str:
    """Say whether all of a model's blocks can be pruned."""
    depth, sites = len(model["blocks"]), [site for block in model["blocks"] for site in block["sites"]]
    left = [f"{each['module'] or 'everything'} of {each['count']} of {depth} blocks" for each in model["unpruned"]]
    if not sites:
        return f"refused: nothing in the blocks of {model['model_type']} models can be pruned"
    kinds = ", ".join(dict.fromkeys(_kind(site) for site in sites))
    carried = f"; {model['carried']:,} parameters outside the text model are carried over" if model["carried"] else ""
    if left:
        return f"works in part: {kinds} can be pruned; {', '.join(left)} stay as they are{carried}"
    return f"works: {kinds} can be pruned{carried}"


def _kind(site: Mapping[str, Any]) -> str:
    return str(site["site"].split(".")[2])


def _units(each: list[int]) -> str:
    """Unit counts of a block's sites of one kind: ``12``, or ``8 × 20-24`` for eight experts."""
    if len(each) < 2:
        return "".join(map(str, each))
    low, high = min(each), max(each)
    return f"{len(each)} × {low}" + f"-{high}" * (high > low)


def _job(job: dict[str, Any]) -> list[str]:
    head = [f"job: {job['state']}"]
    report = job.get("report") or {}
    made = report.get("job") or {"settings": job.get("settings", {})}
    while "tuning" in report:
        tuning = report["tuning"]
        head.append(
            f"tuned by {tuning['method']}, rank {tuning['rank']}, {tuning['steps']} steps: "
            f"loss {tuning['loss_first']:.4g} → {tuning['loss_last']:.4g}"
        )
        report = report["source"] or {}
    if "recipe" in report:
        head.append(
            f"{report['recipe']}: {report['ratio_blocks']:.2%} of the blocks' and {report['ratio_model']:.2%} of the "
            f"model's parameters {'made zero' if report['zeros'] else 'removed'}, "
            f"{report['ratio_requested']:.2%} requested"
        )
        head += [report["ratio_missed"]] if report["ratio_missed"] else []
    elif "finished" in job:
        head.append(f"finished steps: {', '.join(job['finished']) or 'none'}")
    if sites := report.get("sites", job.get("sites")):
        head += _sites(sites, job.get("curves"))
    return _paragraphs([head, _blocks(report.get("blocks", [])), _settings(made)])


def _sites(sites: list[dict[str, Any]], curves: dict[str, Any] | None) -> list[str]:
    done, total = ("zeros", "weights") if "zeros" in sites[0] else ("kept", "units")
    drawn = {} if curves is None else _drawn(sites, curves["sites"])
    cost = ["cost".ljust(STEPS + 1)] if drawn else []
    rows = [["site", done, "of", "share".ljust(16), "error", "damping", "seconds", *cost]]
    for site in sites:
        measured = (("error", ".4f"), ("damping", "g"), ("seconds", ".2f"))
        figures = ["" if site.get(name) is None else format(site[name], form) for name, form in measured]
        extent = [f"{site[done]:,}", f"{site[total]:,}", show.bar(site[done] / site[total])]
        curve = [drawn.get(site["site"], "").ljust(STEPS + 1)] if drawn else []
        rows.append([site["site"], *extent, *figures, *curve])
    notes = [gone] if (gone := experts_gone(sites)) else []
    if alone := sum(site.get("left_alone", False) for site in sites):
        notes.append(f"{alone} experts saw too few tokens and were not pruned")
    if curves is not None and drawn:
        notes.append(
            f"cost: {curves['label']} of each further unit, cheapest first, logarithmic; | is where the site was cut"
        )
    return [*show.table(rows), *notes]


def _drawn(sites: list[dict[str, Any]], curves: Mapping[str, list[tuple[int, float]]]) -> dict[str, str]:
    """Curves by site name as block characters, on one logarithmic scale, each with its cut."""
    costs = [cost for points in curves.values() for _, cost in points if cost > 0]
    if not costs:
        return {}
    high = max(costs)
    low = max(min(costs), high / 10**DECADES)
    drawn = {}
    for site in sites:
        if points := curves.get(site["site"]):
            places = [site["units"] * (step + 0.5) / STEPS for step in range(STEPS)]
            values = [next((cost for k, cost in points if k >= place), points[-1][1]) for place in places]
            line = show.steps(values, low, high)
            cut = round(STEPS * (site["units"] - site["kept"]) / site["units"])
            drawn[site["site"]] = f"{line[:cut]}|{line[cut:]}"
    return drawn


def _blocks(blocks: list[dict[str, Any]]) -> list[str]:
    if not blocks:
        return []
    most = max(block["survey_seconds"] + block["prune_seconds"] for block in blocks) or 1.0
    places = [name for name in ("host", "device") if blocks[0][f"{name}_bytes"]]
    rows = [["block", "survey s", "prune s", "time".ljust(16), *(f"{name} peak" for name in places)]]
    for block in blocks:
        survey, prune = block["survey_seconds"], block["prune_seconds"]
        peaks = [format_bytes(block[f"{name}_bytes"]) for name in places]
        rows.append([str(block["block"]), f"{survey:.2f}", f"{prune:.2f}", show.bar((survey + prune) / most), *peaks])
    shared = not all(block["own_peak"] for block in blocks)
    return show.table(rows) + ["host peaks include earlier work of the same process"] * shared


def _settings(job: Mapping[str, Any]) -> list[str]:
    """Settings, inputs and versions of a job, one line each."""
    lines = []
    for part, values in job.items():
        lines.append(f"{part}:")
        for name, value in flat(values):
            text = " ".join(map(str, value)) if isinstance(value, list) else "-" if value is None else value
            lines.append(f"  {name} {text}")
    return lines if len(lines) > len(job) else []
