"""The charts of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...system.units import format_bytes, format_seconds
from . import charts
from .charts import Chart
from .records import SiteRecord

KINDS = {
    "attention": ("Attention", "key/value groups with their query heads"),
    "linear": ("Linear attention", "key heads or groups with their value heads"),
    "ffn": ("FFN", "channels"),
}
"""Title of each kind of site, and its units."""
LINES = 96
"""Largest number of curves per chart."""
DOTS = 40
"""Number of dots in a chart above which they are drawn small."""
SERIES = 8
"""Number of colours in a comparison; further series repeat them with dashed lines."""


def budget(sites: Sequence[SiteRecord]) -> list[Chart]:
    """Draw the share that each block kept, one chart per kind of site."""
    unit, rest = ("weights", "zero") if sites[0].zeroed else ("units", "removed")
    figures = []
    for kind, by_block in _by_kind(sites).items():
        title, units = KINDS[kind]
        mean = _share([site for group in by_block.values() for site in group])
        summary = f"{title}: share kept by block, {mean:.1%} overall"
        chart = Chart(title, charts.positions("block", by_block), charts.share(f"{unit} kept"), summary)
        for at, (block, group) in enumerate(by_block.items()):
            kept, total, share = sum(site.kept for site in group), sum(site.total for site in group), _share(group)
            chart.bar(at, 0, 1, "track")
            chart.bar(at, 0, share, kind)
            tooltip = f"block {block}: {kept:,} of {total:,} kept, {share:.1%}"
            if len(group) > 1:
                shares = [site.share for site in group]
                chart.line([(at, min(shares)), (at, max(shares))], "spread")
                tooltip += f"; {len(group)} sites from {min(shares):.1%} to {max(shares):.1%}"
            chart.hover(at, tooltip)
        chart.level(mean, "outline")
        chart.level(mean, "mean")
        chart.legend = [(kind, "kept"), ("track", rest), ("dash", f"all blocks: {mean:.1%}")]
        chart.caption = "" if sites[0].zeroed else f"Units are {units}."
        if any(len(group) > 1 for group in by_block.values()):
            chart.caption += " The thin line spans the sites of a block."
        figures.append(chart)
    return figures


def errors(sites: Sequence[SiteRecord]) -> list[Chart]:
    """Draw the reconstruction error of each site over depth; empty if none was measured."""
    measured = [site.error for site in sites if site.error]
    y = charts.logarithmic("output energy lost", measured, percent)
    figures = []
    for kind, by_block in _by_kind(sites).items() if measured else ():
        worst = max((site for group in by_block.values() for site in group), key=lambda site: site.error or 0.0)
        largest = f"{percent(worst.error or 0)} at {worst.name}"
        title, _ = KINDS[kind]
        summary = f"{title}: reconstruction error by block, the largest {largest}"
        chart = Chart(title, charts.positions("block", by_block), y, summary)
        peaks = [max(site.error or 0.0 for site in group) for group in by_block.values()]
        chart.line([(at, peak) for at, peak in enumerate(peaks) if peak], f"fine {kind}")
        chart.legend = [(f"round {kind}", "error")]
        for at, site in ((at, site) for at, group in enumerate(by_block.values()) for site in group):
            radius = 4.0 if sum(map(len, by_block.values())) <= DOTS else 2.5
            if site.error:
                tooltip = f"{site.name}: {percent(site.error)} of the output energy lost"
                chart.dot(at, site.error, kind, tooltip, radius=radius)
            else:
                reason = "not measured" if site.error is None else "nothing removed"
                tooltip = f"{site.name}: {'too few tokens' if site.left_alone else reason}"
                chart.dot(at, y.low, f"none {kind}", tooltip, radius=radius)
        if any(not site.error for group in by_block.values() for site in group):
            chart.legend.append((f"ring {kind}", "nothing removed or measured"))
        chart.caption = f"Largest: {largest}." if worst.error else ""
        figures.append(chart)
    return figures


def curves(found: Mapping[str, Any], sites: Sequence[SiteRecord]) -> list[Chart]:
    """Draw the cost of each further unit, one line per site; `found` is the content of curves.json."""
    points = found["sites"]
    y = charts.logarithmic(found["label"], [cost for each in points.values() for _, cost in each])
    figures = []
    for kind, (title, _) in KINDS.items():
        drawn = [site for site in sites if site.kind == kind and site.name in points]
        if not drawn:
            continue
        summary = f"{title}: {found['label']} of each further unit, one line per site, with a dot where it was cut"
        chart = Chart(title, charts.share("share of the site’s units removed"), y, summary)
        shown = drawn[:: -(-len(drawn) // LINES)]
        last = max(site.block for site in sites) or 1
        cuts = []
        for site in shown:
            gone = site.total - site.kept
            cut = next((cost for k, cost in points[site.name] if k >= gone), points[site.name][-1][1])
            tooltip = f"{site.name}: cut at {gone:,} of {site.total:,}, where the next unit costs {cut:.3g}"
            style = f"--t:{100 * site.block / last:.0f}%"
            chart.line([(k / site.total, cost) for k, cost in points[site.name]], "fine depth", tooltip, style)
            cuts.append((gone / site.total, cut, tooltip, style))
        for x, cost, tooltip, style in cuts:
            chart.dot(x, cost, "depth", tooltip, style)
        chart.legend = [("ramp", "first to last block"), ("round", "where it was cut")]
        chart.caption = "" if len(shown) == len(drawn) else f"{len(shown)} of {len(drawn):,} sites are drawn."
        figures.append(chart)
    return figures


def time_and_memory(blocks: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Draw seconds and peak memory of each block (see `jobs.meter.by_block`)."""
    x = charts.positions("block", [block["block"] for block in blocks])
    both = [block["survey_seconds"] + block["prune_seconds"] for block in blocks]
    surveyed, pruned = (format_seconds(sum(b[f"{name}_seconds"] for b in blocks)) for name in ("survey", "prune"))
    summary = f"Seconds per block: survey {surveyed}, prune sweep {pruned} over {len(blocks)} blocks"
    chart = Chart("Time", x, charts.linear("seconds", max(both)), summary)
    for at, block in enumerate(blocks):
        survey, prune = block["survey_seconds"], block["prune_seconds"]
        chart.bar(at, 0, survey, "survey")
        chart.bar(at, survey, survey + prune, "prune")
        chart.hover(at, f"block {block['block']}: {survey:.2f} s survey, {prune:.2f} s prune sweep")
    chart.legend = [("survey", f"survey, {surveyed}"), ("prune", f"prune sweep, {pruned}")]
    return [chart, _memory(blocks, x)]


def _memory(blocks: Sequence[Mapping[str, Any]], x: charts.Axis) -> Chart:
    series = {
        name: sizes for name in ("host", "device") if any(sizes := [block[f"{name}_bytes"] or 0 for block in blocks])
    }
    most = max(map(max, series.values()))
    unit, size = ("GiB", 2**30) if most >= 2**30 else ("MiB", 2**20)
    summary = f"Peak memory by block, at most {format_bytes(most)}"
    chart = Chart("Peak memory", x, charts.linear(unit, most / size), summary)
    width = 0.72 / len(series)
    for number, (name, sizes) in enumerate(series.items()):
        offset = (number - (len(series) - 1) / 2) * width
        for at, each in enumerate(sizes):
            chart.bar(at + offset, 0, each / size, name, width)
        chart.legend.append((name, f"{name}, at most {format_bytes(max(sizes))}"))
    for at, block in enumerate(blocks):
        held = ", ".join(f"{format_bytes(sizes[at])} {name}" for name, sizes in series.items())
        chart.hover(at, f"block {block['block']}: {held}")
    if all(block["own_peak"] for block in blocks):
        chart.caption = "Peak while each block was surveyed and pruned, including Python and torch."
    else:
        chart.caption = "Peak of the process up to each block: this system cannot reset it."
    return chart


def comparison(table: Mapping[str, Any]) -> Chart:
    """Draw perplexity over the share removed, one line per recipe (see `Comparison.as_dict`)."""
    dense, *others = table["rows"]
    by_label: dict[str, list[tuple[float, float]]] = {}
    for row in others:
        if row["perplexity"] is not None:
            by_label.setdefault(row["label"], []).append((row["ratio_blocks"], row["perplexity"]))
    most = max((row["ratio_blocks"] for row in others), default=0.5)
    chart = Chart(
        "Perplexity by share removed",
        charts.linear("share of the blocks’ parameters removed", most, "{:.0%}".format),
        charts.logarithmic("perplexity", [row["perplexity"] for row in table["rows"] if row["perplexity"] is not None]),
        f"Perplexity over the share removed: {len(by_label)} recipes and the dense model",
    )
    start = [] if dense["perplexity"] is None else [(dense["ratio_blocks"], dense["perplexity"])]
    for number, (label, points) in enumerate(by_label.items()):
        css = f"s{number % SERIES}"
        chart.line(start + sorted(points), css + " dashed" * (number >= SERIES), label)
        for x, y in points:
            chart.dot(x, y, css, f"{label}: perplexity {y:.2f} with {x:.1%} removed", radius=4)
        chart.legend.append((f"round {css}", label))
    if start:
        chart.level(dense["perplexity"], "mean", f"dense: {dense['perplexity']:.2f}")
        chart.legend.append(("dash", "dense"))
    return chart


def percent(value: float) -> str:
    """Format a share with two significant digits: 0.0123 → ``"1.2%"``."""
    return f"{100 * value:.2g}%" if value < 0.995 else f"{value:.0%}"


def _by_kind(sites: Sequence[SiteRecord]) -> dict[str, dict[int, list[SiteRecord]]]:
    """Group sites by kind and block; a mixture of experts has several per block."""
    found: dict[str, dict[int, list[SiteRecord]]] = {}
    for site in sites:
        found.setdefault(site.kind, {}).setdefault(site.block, []).append(site)
    return found


def _share(sites: Sequence[SiteRecord]) -> float:
    return sum(site.kept for site in sites) / sum(site.total for site in sites)
