"""Render the report as one HTML page of text, charts and tables. It has no scripts and fetches nothing.

Every value is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from ...system.units import format_bytes, format_passes, format_seconds
from ...system.version import __version__
from ..evaluate import Evaluation
from . import charts
from .account import Account, BlockAccount, CompareAccount, CompareRow, SiteAccount
from .charts import Frame, escape
from .samples import Sample

KINDS = {
    "attention": ("Attention", "key/value groups, which go with their query heads"),
    "ffn": ("FFN", "channels"),
}
"""Title of each kind of site, and the description of its units."""
LINES = 96
"""Largest number of curves per chart."""
DOTS = 40
"""Number of dots in a chart above which they are drawn small."""
SERIES = 8
"""Number of colours in a comparison; further series repeat them with dashed lines."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""Content security policy: the browser runs and fetches nothing, whatever a value contains."""


@dataclass(frozen=True)
class Contents:
    """The contents of a page."""

    account: Account
    dense: str | None
    """Name of the model to compare with."""
    is_source: bool
    """Whether `dense` is exactly the checkpoint that the job read."""
    perplexity: Evaluation | None
    dense_perplexity: Evaluation | None
    samples: Sequence[Sample]
    comparison: CompareAccount | None


@dataclass(frozen=True)
class _Section:
    anchor: str
    link: str
    title: str
    intro: str
    body: str


def render(contents: Contents) -> str:
    """Return the page's HTML."""
    account = contents.account
    lacks: list[str] = []
    found = [
        make(contents, lacks)
        for make in (_budget, _errors, _curves, _spent, _comparison, _samples, _recovery, _sites, _settings)
    ]
    sections = [section for section in found if section is not None]
    if lacks:
        rows = "".join(f"<li>{lack}</li>" for lack in lacks)
        sections.append(_Section("missing", "Missing", "Not on this page", "", f'<ul class="lacks card">{rows}</ul>'))
    links = "".join(f'<a href="#{section.anchor}">{section.link}</a>' for section in sections)
    style = (resources.files("streamprune") / "data" / "report.css").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">
<title>{escape(account.name)}: streamprune report</title>
<style>
{style}</style>
</head>
<body>
<div class="wrap">
<header>
<p class="eyebrow">Pruning report</p>
<h1>{escape(account.name)}</h1>
<p class="lede">{_lede(contents)}</p>
{_facts(contents)}
<nav aria-label="On this page">{links}</nav>
</header>
<main>
{"".join(map(_html, sections))}
</main>
<footer>Made by streamprune {escape(__version__)}. One file: no scripts, nothing is fetched.</footer>
</div>
</body>
</html>
"""


def _html(section: _Section) -> str:
    intro = f'<p class="intro">{section.intro}</p>' if section.intro else ""
    return (
        f'<section id="{section.anchor}" aria-labelledby="{section.anchor}-title">'
        f'<h2 id="{section.anchor}-title">{section.title}</h2>{intro}{section.body}</section>\n'
    )


# The head.


def _lede(contents: Contents) -> str:
    account = contents.account
    figures, text = account.figures, []
    if account.recipe is not None:
        before, zeros = figures["parameters_before"], figures["zeros"]
        went = zeros or before - figures["parameters_after"]
        did = "made zero" if zeros else "removed"
        text.append(
            f"{f'<strong>{escape(account.model)}</strong>, pruned' if account.model else 'Pruned'} by the recipe "
            f"<strong>{escape(account.recipe)}</strong>: {went:,.0f} of {before:,.0f} parameters {did}, "
            f"<strong>{figures['ratio_blocks']:.1%}</strong> of the blocks’ and {figures['ratio_model']:.1%} of the model’s."
        )
    if account.tunings:
        text.append(f"Then tuned by {escape(account.tunings[0].method)}." if text else "Tuned, not pruned here.")
    if contents.dense is not None:
        which = "the very checkpoint that was" if contents.is_source else "not the checkpoint that was"
        did = "tuned" if account.recipe is None else "pruned"
        text.append(f"Held against <strong>{escape(contents.dense)}</strong>, by its digests {which} {did}.")
    return " ".join(text)


def _facts(contents: Contents) -> str:
    figures = contents.account.figures
    facts: list[tuple[str, str, str]] = []
    if "parameters_before" in figures:
        before, after = figures["parameters_before"], figures["parameters_after"]
        kept = "zeros among them" if figures["zeros"] else f"{after / before:.1%} of {_count(before)}"
        facts.append(("Parameters", _count(after), kept))
        asked = f"{figures['ratio_requested']:.2%} asked for"
        facts.append(
            (
                "Made zero in blocks" if figures["zeros"] else "Removed from blocks",
                f"{figures['ratio_blocks']:.2%}",
                asked,
            )
        )
    if contents.perplexity is not None:
        measured, dense = contents.perplexity.perplexity, contents.dense_perplexity
        more = "" if dense is None else f"{dense.perplexity:.2f} before, {measured / dense.perplexity - 1:+.1%}"
        facts.append(("Perplexity", f"{measured:.2f}", more))
    if "seconds" in figures:
        passes = figures.get("forward_equivalents")
        facts.append(
            (
                "Time to prune",
                format_seconds(figures["seconds"]),
                format_passes(passes, contents.account.operations) if passes else "",
            )
        )
    for name, where in (("peak_device_bytes", "of the device"), ("peak_host_bytes", "of the host, torch included")):
        if name in figures:
            facts.append(("Peak memory", format_bytes(figures[name]), where))
    tiles = "".join(
        f"<div><dt>{name}</dt><dd>{escape(value)}</dd><dd>{escape(more)}</dd></div>" for name, value, more in facts
    )
    return f'<dl class="facts">{tiles}</dl>' if tiles else ""


# The sections. A section without data adds the reason to `lacks`.


def _budget(contents: Contents, lacks: list[str]) -> _Section | None:
    sites = contents.account.sites
    if not sites:
        return None
    unit = "weights that did not become zero" if sites[0].zeros else "units"
    figures = []
    for kind, by_block in _by_kind(sites).items():
        title, units = KINDS.get(kind, (kind, "units"))
        frame = Frame(_depth(by_block), charts.share(f"{unit.split()[0]} kept"))
        marks = []
        for at, (block, group) in enumerate(by_block.items()):
            kept, whole = sum(site.kept for site in group), sum(site.whole for site in group)
            part = kept / whole if whole else 1.0
            marks += [charts.bar(frame, at, 0, 1, "track"), charts.bar(frame, at, 0, part, _class(kind))]
            note = f"block {block}: {kept:,} of {whole:,} kept, {part:.1%}"
            if len(group) > 1:
                least, most = min(site.share for site in group), max(site.share for site in group)
                marks.append(charts.range_mark(frame, at, least, most, "spread"))
                note += f"; {len(group)} sites from {least:.1%} to {most:.1%}"
            marks.append(charts.hover(frame, at, note))
        mean = _kept_share([site for group in by_block.values() for site in group])
        # Draw the mean below the last block's tooltip, and on an outline so that it is visible on bars.
        marks[-1:-1] = [charts.level(frame, mean, "outline"), charts.level(frame, mean, "mean")]
        several = any(len(group) > 1 for group in by_block.values())
        legend = [
            (_class(kind), "kept"),
            ("track", "removed" if not sites[0].zeros else "zero"),
            ("dash", f"all blocks: {mean:.1%}"),
        ]
        summary = f"{title}: share kept by block, {mean:.1%} in all"
        caption = "" if sites[0].zeros else f"Units are {escape(units)}."
        caption += " The thin line spans a block’s sites." if several else ""
        figures.append(_figure(title, charts.svg(frame, summary, marks), _legend(legend), caption))
    return _Section(
        "budget",
        "Budget",
        "Where the budget went",
        f"What each block kept of its {unit}: the recipe spends the budget where it expects to lose least.",
        _pair(figures),
    )


def _errors(contents: Contents, lacks: list[str]) -> _Section | None:
    sites = contents.account.sites
    measured = [site.error for site in sites if site.error]
    if sites and not measured:
        lacks.append("<strong>Reconstruction error</strong>: the recipe measures none.")
    if not measured:
        return None
    y = charts.logarithmic("output energy lost", measured, _share_text)
    figures = []
    for kind, by_block in _by_kind(sites).items():
        title, _ = KINDS.get(kind, (kind, ""))
        frame, marks = Frame(_depth(by_block), y), []
        radius = 4.0 if sum(map(len, by_block.values())) <= DOTS else 2.5
        path = [
            (float(at), max(site.error or 0.0 for site in group))
            for at, group in enumerate(by_block.values())
            if any(site.error for site in group)
        ]
        marks.append(charts.line(frame, path, f"fine {_class(kind)}"))
        for at, group in enumerate(by_block.values()):
            for site in group:
                if site.error:
                    note = f"{site.name}: {_share_text(site.error)} of the output energy lost"
                    marks.append(charts.dot(frame, at, site.error, _class(kind), note, radius=radius))
                else:
                    why = (
                        "too few tokens"
                        if site.left_alone
                        else "not measured"
                        if site.error is None
                        else "nothing removed"
                    )
                    note = f"{site.name}: {why}"
                    marks.append(charts.dot(frame, at, y.low, f"none {_class(kind)}", note, radius=radius))
        legend = [(f"round {_class(kind)}", "error")]
        if any(not site.error for group in by_block.values() for site in group):
            legend.append((f"ring {_class(kind)}", "nothing removed or measured"))
        worst = max((site for group in by_block.values() for site in group), key=lambda site: site.error or 0.0)
        summary = f"{title}: reconstruction error by block, the largest {_share_text(worst.error or 0)} at {worst.name}"
        caption = f"Largest: {_share_text(worst.error)} at {escape(worst.name)}." if worst.error else ""
        figures.append(_figure(title, charts.svg(frame, summary, marks), _legend(legend), caption))
    return _Section(
        "errors",
        "Errors",
        "Reconstruction error",
        "The share of its output energy that a site lost on the calibration text, after what stays was re-fitted.",
        _pair(figures),
    )


def _curves(contents: Contents, lacks: list[str]) -> _Section | None:
    account = contents.account
    curves = {name: points for name, points in account.curves.items() if points}
    if account.sites and not curves:
        lacks.append(
            "<strong>Importance curves</strong>: nothing was weighed (the recipe does not ask, or a plan was given), "
            "or the job ran before they were kept."
        )
    if not curves:
        return None
    values = [cost for points in curves.values() for _, cost in points]
    y = charts.logarithmic(
        account.curve_label or "", values, lambda value: f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    )
    figures = []
    for kind, by_block in _by_kind(account.sites).items():
        sites = [site for group in by_block.values() for site in group if site.name in curves]
        if not sites:
            continue
        title, _ = KINDS.get(kind, (kind, ""))
        shown = sites[:: -(-len(sites) // LINES)]
        frame = Frame(charts.share("share of the site’s units gone"), y)
        last = max(max(by_block), 1)
        lines, cuts = [], []
        for site in shown:
            points, gone = curves[site.name], site.whole - site.kept
            style = f"--t:{100 * site.block / last:.0f}%"
            cut = next((cost for k, cost in points if k >= gone), points[-1][1])
            note = f"{site.name}: cut at {gone:,} of {site.whole:,}, where the next unit costs {cut:.3g}"
            lines.append(charts.line(frame, [(k / site.whole, cost) for k, cost in points], "fine depth", note, style))
            cuts.append(charts.dot(frame, gone / site.whole, cut, "depth", note, style))
        legend = [("ramp", "first to last block"), ("round", "where it was cut")]
        caption = "" if len(shown) == len(sites) else f"{len(shown)} of {len(sites):,} sites are drawn."
        summary = f"{title}: {account.curve_label} of each further unit, one line a site, with the place of its cut"
        figures.append(_figure(title, charts.svg(frame, summary, [*lines, *cuts]), _legend(legend), caption))
    if not figures:
        return None
    return _Section(
        "curves",
        "Importance",
        "Importance curves",
        "What each further unit of a site costs, the cheapest first, as the recipe weighed it. A site whose curve stays low "
        "gives more; cuts at one height are what a single threshold looks like.",
        _pair(figures),
    )


def _spent(contents: Contents, lacks: list[str]) -> _Section | None:
    blocks = contents.account.blocks
    if not blocks:
        if contents.account.sites:
            lacks.append("<strong>Time and memory</strong>: the job ran before they were kept by block.")
        return None
    names = [str(block.block) for block in blocks]
    x = charts.positions("block", names)
    frame = Frame(
        x, charts.linear("seconds", max(b.survey_seconds + b.prune_seconds for b in blocks), lambda v: f"{v:g}")
    )
    marks = []
    for at, block in enumerate(blocks):
        both = block.survey_seconds + block.prune_seconds
        marks += [
            charts.bar(frame, at, 0, block.survey_seconds, "survey"),
            charts.bar(frame, at, block.survey_seconds, both, "prune"),
            charts.hover(
                frame,
                at,
                f"block {block.block}: {block.survey_seconds:.2f} s survey, {block.prune_seconds:.2f} s prune sweep",
            ),
        ]
    surveyed, pruned = sum(b.survey_seconds for b in blocks), sum(b.prune_seconds for b in blocks)
    legend = [("survey", f"survey, {format_seconds(surveyed)}"), ("prune", f"prune sweep, {format_seconds(pruned)}")]
    summary = f"Seconds a block: survey {format_seconds(surveyed)}, prune sweep {format_seconds(pruned)} over {len(blocks)} blocks"
    figures = [_figure("Time", charts.svg(frame, summary, marks), _legend(legend), "")]
    if any(block.host_bytes for block in blocks):
        figures.append(_memory(blocks, x))
    return _Section(
        "spent",
        "Time and memory",
        "Time and memory",
        "By block: streaming holds one block at a time, so memory should not grow with depth.",
        _pair(figures),
    )


def _memory(blocks: Sequence[BlockAccount], x: charts.Axis) -> str:
    series = [("host", "memory", [block.host_bytes or 0 for block in blocks])]
    if any(block.device_bytes for block in blocks):
        series.append(("device", "device", [block.device_bytes or 0 for block in blocks]))
    most = max(max(sizes) for _, _, sizes in series)
    unit, size = next((name, 1 << bits) for name, bits in (("GiB", 30), ("MiB", 20), ("KiB", 10)) if most >= 1 << bits)
    frame = Frame(x, charts.linear(unit, most / size, lambda value: f"{value:g}"))
    marks, width = [], 0.72 / len(series)
    for number, (_, kind, sizes) in enumerate(series):
        place = (number - (len(series) - 1) / 2) * width
        marks += [charts.bar(frame, at + place, 0, each / size, kind, width=width) for at, each in enumerate(sizes)]
    for at, block in enumerate(blocks):
        held = ", ".join(f"{format_bytes(sizes[at])} {name}" for name, _, sizes in series)
        marks.append(charts.hover(frame, at, f"block {block.block}: {held}"))
    own = all(block.own_peak for block in blocks)
    caption = (
        "Held at most while each block was surveyed and pruned, the interpreter and torch included."
        if own
        else "Held at most by the process until then: this system does not tell blocks apart."
    )
    legend = [(kind, f"{name}, at most {format_bytes(max(sizes))}") for name, kind, sizes in series]
    return _figure(
        "Peak memory",
        charts.svg(frame, f"Peak memory by block, at most {format_bytes(most)}", marks),
        _legend(legend),
        caption,
    )


def _comparison(contents: Contents, lacks: list[str]) -> _Section | None:
    table = contents.comparison
    if table is None:
        lacks.append(
            "<strong>Comparison</strong>: none was given. <code>streamprune compare MODEL --ratios … --recipes … --text FILE</code> "
            "makes one, <code>--comparison DIR</code> shows it here."
        )
        return None
    dense, others = table.rows[0], table.rows[1:]
    by_label: dict[str, list[CompareRow]] = {}
    for row in others:
        by_label.setdefault(row.label, []).append(row)
    values = [row.perplexity for row in table.rows if row.perplexity is not None]
    frame = Frame(
        charts.linear(
            "share of the blocks’ parameters gone",
            max((row.ratio_blocks for row in others), default=0.5),
            lambda v: f"{v:.0%}",
        ),
        charts.logarithmic("perplexity", values, lambda value: f"{value:g}"),
    )
    marks, legend = [], []
    for number, (label, rows) in enumerate(by_label.items()):
        kind = f"s{number % SERIES}" + (" dashed" if number >= SERIES else "")
        points = [(row.ratio_blocks, row.perplexity) for row in rows if row.perplexity is not None]
        start = [] if dense.perplexity is None else [(dense.ratio_blocks, dense.perplexity)]
        marks.append(charts.line(frame, start + sorted(points), kind, label))
        marks += [
            charts.dot(frame, x, y, kind, f"{label}: perplexity {y:.2f} with {x:.1%} gone", radius=4)
            for x, y in sorted(points)
        ]
        legend.append((f"round s{number % SERIES}", label))
    if dense.perplexity is not None:
        marks.append(charts.level(frame, dense.perplexity, "mean", f"dense: {dense.perplexity:.2f}"))
        legend.append(("dash", "dense"))
    summary = f"Perplexity over the share removed, {len(by_label)} recipes against the dense model"
    body = _pair(
        [
            _figure("Perplexity by share removed", charts.svg(frame, summary, marks), _legend(legend), ""),
            _compare_table(table),
        ]
    )
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes)
    return _Section(
        "comparison",
        "Comparison",
        "Stages and recipes compared",
        f"Of {escape(table.model)}, pruned on the same text under the same budgets.",
        f'{body}<p class="note">Perplexity: {escape(table.protocol)}.</p>{notes}',
    )


def _compare_table(table: CompareAccount) -> str:
    best: dict[float, float] = {}
    for row in table.rows[1:]:
        if row.perplexity is not None:
            best[row.ratio] = min(best.get(row.ratio, row.perplexity), row.perplexity)
    rows = []
    for row in table.rows:
        said = "∞" if row.perplexity is None else f"{row.perplexity:.2f}"
        mark = ' class="best"' if row.perplexity is not None and best.get(row.ratio) == row.perplexity else ""
        rows.append(
            f'<tr><th scope="row">{escape(row.label)}</th><td>{row.ratio_blocks:.1%}</td><td{mark}>{said}</td>'
            f"<td>{_count(row.parameters)}</td><td>{format_seconds(row.seconds) if row.seconds else '—'}</td></tr>"
        )
    head = "<tr><th>recipe</th><th>gone</th><th>perplexity</th><th>parameters</th><th>time</th></tr>"
    return f'<div class="card">{_table("Comparison", head, rows)}</div>'


def _samples(contents: Contents, lacks: list[str]) -> _Section | None:
    if not contents.samples:
        lacks.append(
            "<strong>Samples</strong>: none were made. <code>--against MODEL --prompt TEXT</code> has both models go on with a text."
        )
        return None
    cards = []
    for sample in contents.samples:
        texts = [
            _said(label, said, sample.alike if len(sample.texts) > 1 else len(said))
            for label, said in sample.texts.items()
        ]
        same = (
            f'<p class="note">The same for {sample.same} of {sample.tokens} tokens.</p>'
            if len(sample.texts) > 1
            else ""
        )
        cards.append(
            f'<article class="card"><p class="prompt">{escape(sample.prompt)}</p><div class="said">{"".join(texts)}</div>{same}</article>'
        )
    marked = " What is marked differs from the other." if contents.dense is not None else ""
    return _Section(
        "samples",
        "Samples",
        "Samples, side by side" if contents.dense is not None else "Samples",
        f"How each model goes on, always with its likeliest token.{marked}",
        f'<div class="stack">{"".join(cards)}</div>',
    )


def _said(label: str, text: str, alike: int) -> str:
    """Return one model's continuation with everything after the first `alike` characters highlighted."""
    shared, apart = text[:alike].lstrip(" "), text[alike:]
    marked = f'<span class="apart">{escape(apart)}</span>' if apart else ""
    return f"<div><h3>{escape(label)}</h3><p>{escape(shared)}{marked}</p></div>"


def _recovery(contents: Contents, lacks: list[str]) -> _Section | None:
    if not contents.account.tunings:
        return None
    rows = [
        f'<tr><th scope="row">{escape(t.method)}</th><td>{t.rank}</td><td>{t.steps:,}</td><td>{t.loss_first:.4g}</td>'
        f"<td>{t.loss_last:.4g}</td></tr>"
        for t in contents.account.tunings
    ]
    head = "<tr><th>method</th><th>rank</th><th>steps</th><th>loss at first</th><th>in the end</th></tr>"
    return _Section(
        "recovery",
        "Recovery",
        "Recovery",
        "Low-rank training after pruning, the last one first.",
        f'<div class="card">{_table("Recovery", head, rows)}</div>',
    )


def _sites(contents: Contents, lacks: list[str]) -> _Section | None:
    sites = contents.account.sites
    if not sites:
        return None
    rows = []
    for site in sites:
        error = "—" if site.error is None else f"{site.error:.6f}"
        damping = "—" if site.damping is None else f"{site.damping:g}"
        seconds = "—" if site.seconds is None else f"{site.seconds:.2f}"
        rows.append(
            f'<tr><th scope="row">{escape(site.name)}</th><td>{site.kept:,}</td><td>{site.whole:,}</td><td>{site.share:.1%}</td>'
            f"<td>{error}</td><td>{damping}</td><td>{seconds}</td></tr>"
        )
    head = "<tr><th>site</th><th>kept</th><th>of</th><th>share</th><th>error</th><th>damping</th><th>seconds</th></tr>"
    body = f"<details><summary>All {len(sites):,} sites</summary>{_table('Sites', head, rows)}</details>"
    alone = sum(site.left_alone for site in sites)
    intro = f"{alone:,} experts saw too few calibration tokens and were left alone." if alone else ""
    return _Section("sites", "Sites", "Every site", intro, body)


def _settings(contents: Contents, lacks: list[str]) -> _Section | None:
    groups = []
    for title, values in contents.account.settings.items():
        rows = [
            f'<tr><th scope="row">{escape(name)}</th><td>{escape(_value(v))}</td></tr>' for name, v in values.items()
        ]
        table = _table(title, "", rows, "values")
        groups.append(f"<details><summary>{escape(title)} <span>{len(rows)}</span></summary>{table}</details>")
    measured = contents.perplexity
    if measured is None:
        lacks.append("<strong>Perplexity</strong>: not measured. <code>--text FILE</code> does, streamed.")
        protocol = ""
    else:
        protocol = f'<p class="note">Perplexity: {escape(measured.protocol)}.</p>'
    return _Section(
        "settings",
        "Settings",
        "Settings and fingerprints",
        "What the job was asked, and what tells its inputs from others. The same values give the same bytes.",
        "".join(groups) + protocol,
    )


# Pieces.


def _by_kind(sites: Iterable[SiteAccount]) -> dict[str, dict[int, list[SiteAccount]]]:
    """Group sites by kind and block; a mixture of experts has several per block."""
    found: dict[str, dict[int, list[SiteAccount]]] = {}
    for site in sites:
        found.setdefault(site.kind, {}).setdefault(site.block, []).append(site)
    return found


def _kept_share(sites: Sequence[SiteAccount]) -> float:
    whole = sum(site.whole for site in sites)
    return sum(site.kept for site in sites) / whole if whole else 1.0


def _depth(by_block: Mapping[int, Any]) -> charts.Axis:
    return charts.positions("block", [str(block) for block in by_block])


def _class(kind: str) -> str:
    """Return the CSS class of a kind of site."""
    return kind if kind in KINDS else "other"


def _figure(title: str, chart: str, legend: str, caption: str) -> str:
    said = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f'<figure class="card"><h3>{escape(title)}</h3>{chart}{legend}{said}</figure>'


def _pair(figures: Sequence[str]) -> str:
    return f'<div class="pair">{"".join(figures)}</div>'


def _legend(keys: Iterable[tuple[str, str]]) -> str:
    items = "".join(f'<li><i class="key {kind}"></i>{escape(text)}</li>' for kind, text in keys)
    return f'<ul class="legend">{items}</ul>'


def _table(label: str, head: str, rows: Iterable[str], kind: str = "") -> str:
    top = f"<thead>{head}</thead>" if head else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">'
        f'<table class="{kind}">{top}<tbody>{"".join(rows)}</tbody></table></div>'
    )


def _share_text(value: float) -> str:
    """Format a share with two significant digits: 0.0123 → ``"1.2%"``."""
    return f"{100 * value:.2g}%" if value < 0.995 else f"{value:.0%}"


def _count(number: float) -> str:
    """Format a count with a unit: 6951168 → ``"6.95 M"``."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:.0f}"


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return " · ".join(map(_value, value))
    return "—" if value is None else str(value)
