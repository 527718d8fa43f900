"""`streamprune inspect`."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import click

from . import options, show

STEPS = 16
"""Characters of a curve."""
DECADES = 6
"""Decades of a curve's scale, at most."""


@click.command()
@click.argument("model", type=options.DIRECTORY)
@options.json_option
def inspect(model: Path, as_json: bool) -> None:
    """Show the blocks, sites and widths of MODEL, and its job.

    For a pruned model this includes budget, errors and importance curves over depth, time and memory, settings and
    fingerprints. `streamprune report` shows the same on a page.

    Example:

      streamprune inspect llama-2-5b
    """
    import streamprune
    from streamprune.commands.status import check_there
    from streamprune.model.hub import is_name

    if not is_name(model):
        check_there(model)
    options.begin()
    with show.watched() as progress:
        found = streamprune.inspect(model, progress=progress)
    lines = []
    if found["model"] is not None:
        lines += _model(found["model"])
    if found["job"] is not None:
        lines += ["", *_job(found["job"])] if lines else _job(found["job"])
    show.result(found, as_json, lines)


def _model(model: dict[str, Any]) -> list[str]:
    kinds = list(dict.fromkeys(_kind(site) for block in model["blocks"] for site in block["sites"]))
    rows = [["block", "parameters", "heads", *kinds]]
    for block in model["blocks"]:
        by_kind = {kind: list(sites) for kind, sites in groupby(block["sites"], _kind)}
        heads = [f"{site['heads']} × {site['head_dim']}" for site in block["sites"] if "heads" in site]
        units = [_units([site["units"] for site in by_kind.get(kind, [])]) for kind in kinds]
        rows.append([str(block["block"]), f"{block['parameters']:,}", " ".join(heads), *units])
    return [
        f"{model['path']}: {model['model_type']}, {model['parameters']:,} parameters in {', '.join(model['dtypes'])}, "
        f"{model['block_parameters']:,} of them in {len(model['blocks'])} blocks",
        f"width {model['width']}, vocabulary {model['vocabulary']}, context {model['context']}, "
        + ("tied head" if model["tied"] else "untied head"),
        *show.table(rows),
        "attention: key/value groups, removed with their query heads; ffn: channels",
    ]


def _kind(site: Mapping[str, Any]) -> str:
    kind: str = site["site"].split(".")[2]
    return kind


def _units(each: list[int]) -> str:
    """Unit counts of one site or of several, as text."""
    if len(set(each)) > 1:
        return f"{len(each)} × {min(each)}-{max(each)}"
    return "".join(f"{len(each)} × " * (len(each) > 1) + str(units) for units in each[:1])


def _job(job: dict[str, Any]) -> list[str]:
    lines = [f"job: {job['state']}"]
    report = job.get("report") or {}
    made = report.get("job") or {"settings": job.get("settings", {})}
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
            f"model's parameters {'made zero' if report['zeros'] else 'removed'}, {report['ratio_requested']:.2%} requested"
        )
        lines += [report["ratio_missed"]] if report.get("ratio_missed") else []
    elif "finished" in job:
        lines.append(f"finished steps: {', '.join(job['finished']) or 'none'}")
    if sites := report.get("sites", job.get("sites", [])):
        lines += _sites(sites, job.get("curves"))
    if blocks := report.get("blocks"):
        lines += ["", *_blocks(blocks)]
    if any(made.values()):
        lines += ["", *_made(made)]
    return lines


def _sites(sites: list[dict[str, Any]], curves: dict[str, Any] | None) -> list[str]:
    done, whole = ("zeros", "weights") if "zeros" in sites[0] else ("kept", "units")
    drawn = _drawn(sites, curves) if curves is not None else {}
    rows = [["site", done, "of", "share".ljust(16), "error", "damping", "seconds", *(["cost"] if drawn else [])]]
    for site in sites:
        error, damping, seconds = (
            "" if site.get(name) is None else format(site[name], form)
            for name, form in (("error", ".4f"), ("damping", "g"), ("seconds", ".2f"))
        )
        extent = [f"{site[done]:,}", f"{site[whole]:,}", show.bar(site[done] / max(site[whole], 1))]
        cost = [drawn.get(site["site"], "").ljust(STEPS + 1)] if drawn else []
        rows.append([site["site"], *extent, error, damping, seconds, *cost])
    notes = []
    if alone := sum(site.get("left_alone", False) for site in sites):
        notes.append(f"{alone} experts saw too few tokens and were left alone")
    if curves is not None and drawn:
        rows[0][-1] = rows[0][-1].ljust(STEPS + 1)
        notes.append(
            f"cost: {curves['label']} of each further unit, cheapest first, logarithmic; | is where the site was cut"
        )
    return [*show.table(rows), *notes]


def _drawn(sites: list[dict[str, Any]], curves: dict[str, Any]) -> dict[str, str]:
    """Curves by site name, on one scale, each with its cut."""
    points = {name: [(k, cost) for k, cost in each] for name, each in curves["sites"].items() if each}
    costs = [cost for each in points.values() for _, cost in each if cost > 0]
    if not costs:
        return {}
    high = max(costs)
    low = max(min(costs), high / 10**DECADES)
    drawn = {}
    for site in sites:
        if each := points.get(site["site"]):
            places = [site["units"] * (step + 0.5) / STEPS for step in range(STEPS)]
            values = [next((cost for k, cost in each if k >= place), each[-1][1]) for place in places]
            line = show.steps(values, low, high)
            cut = round(STEPS * (site["units"] - site["kept"]) / site["units"])
            drawn[site["site"]] = f"{line[:cut]}|{line[cut:]}"
    return drawn


def _blocks(blocks: list[dict[str, Any]]) -> list[str]:
    from streamprune.system.units import format_bytes

    most = max(block["survey_seconds"] + block["prune_seconds"] for block in blocks)
    places = [name for name in ("host", "device") if any(block.get(f"{name}_bytes") for block in blocks)]
    rows = [["block", "survey s", "prune s", "time".ljust(16), *(f"{name} peak" for name in places)]]
    for block in blocks:
        both = block["survey_seconds"] + block["prune_seconds"]
        peaks = [block.get(f"{name}_bytes") for name in places]
        rows.append(
            [
                str(block["block"]),
                f"{block['survey_seconds']:.2f}",
                f"{block['prune_seconds']:.2f}",
                show.bar(both / most if most else 0.0),
                *("" if peak is None else format_bytes(peak) for peak in peaks),
            ]
        )
    shared = not all(block.get("own_peak", True) for block in blocks)
    return [*show.table(rows), *(["host peaks include earlier work of the same process"] if shared else [])]


def _made(made: Mapping[str, Any]) -> list[str]:
    """Settings, inputs and versions, one line each."""
    lines = []
    for part, values in made.items():
        lines.append(f"{part}:")
        for name, value in _flat(values):
            lines.append(f"  {name} {'-' if value is None else value}")
    return lines


def _flat(value: Any, place: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [each for key, inner in value.items() for each in _flat(inner, f"{place}.{key}" if place else key)]
    return [(place, " ".join(map(str, value)) if isinstance(value, list) else value)]
