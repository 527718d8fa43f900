"""Write the report of a finished checkpoint as one self-contained HTML file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import ConfigError, one_line
from ...jobs.reports import describe
from ...model.checkpoint import Checkpoint
from ...model.hub import resolve_model, title
from ...model.tokenizer import Bos
from ...system import files, machine
from ...system.progress import Progress, Silent
from ...system.units import format_bytes, format_passes, format_seconds
from ...system.version import __version__
from ...text.source import Spec
from ..evaluate import evaluate
from . import charts, figures
from .records import read_comparison, read_records
from .samples import check_samples, write_samples
from .scores import Interval, compare_scores, read_scores

PAGE = "report.html"


def report(
    out: str | Path,
    *,
    against: str | Path | None = None,
    prompts: Sequence[str] = (),
    tokens: int | None = None,
    text: Spec | None = None,
    seq_len: int | None = None,
    bos: Bos = "auto",
    scores: str | Path | None = None,
    scores_against: str | Path | None = None,
    comparison: str | Path | None = None,
    html: str | Path | None = None,
    device: str = "auto",
    memory: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write the report of a finished OUT; return the path of the page.

    How to run the result and what it weighs come from the checkpoint. Budget by depth, reconstruction errors, importance curves,
    time and memory per block, settings and fingerprints come from the job's records. Samples and perplexity are computed now, if requested.

    Args:
        out: a checkpoint directory that `prune` or `tune` wrote.
        against: the dense model, to compare samples and perplexity with.
        prompts: texts that both models continue greedily. One whole model at a time is in memory.
        tokens: largest number of tokens per sample; None takes 48, or what a prompt leaves of the shorter context.
        text: one source (see `text.source.Source`) to measure perplexity on, streamed.
        seq_len: tokens per window of `text`; see `evaluate`.
        bos: whether prompts and windows of `text` begin with BOS; ``auto`` does as the tokenizer does.
        scores: task scores of `out`, a file with the output of ``eval --tasks ... --json``.
        scores_against: the same of the dense model, to compare with.
        comparison: the folder of a `compare`, or its compare.json.
        html: path of the page; None takes ``report.html`` in `out`.
        memory: bytes that the device may use to measure perplexity; None allows all free memory.

    Raises:
        ConfigError: `out` is not a finished result, or the arguments do not fit together.
        CheckpointError: a file in `out`, or the model to compare with, is damaged.
        ResourceError: samples are requested from a model that does not fit into free memory.
    """
    out, progress = Path(out), progress or Silent()
    page = out / PAGE if html is None else Path(html)
    records = read_records(out)
    if page.suffix not in (".html", ".htm"):
        raise ConfigError(f"html is {page}; its name must end in .html")
    if page.is_dir() or not page.absolute().parent.is_dir():
        raise ConfigError(f"html is {page}; it must be a file in an existing directory")
    table = None if comparison is None else read_comparison(Path(comparison))
    sites, source = records.sites, (records.pruning or records.tunings[-1])["job"]["inputs"]["model"]
    if scores_against is not None and scores is None:
        raise ConfigError(f"scores_against is {scores_against}; it needs the scores of {out} to compare with")
    found, before = (None if path is None else read_scores(Path(path)) for path in (scores, scores_against))
    if found is not None and found["model"] != json.loads(json.dumps(Checkpoint(out).identity())):
        raise ConfigError(f"scores are {scores}, of another checkpoint than {out}")
    try:
        tasks = [] if found is None else compare_scores(found, before)
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise ConfigError(f"scores have unexpected content ({one_line(error)}): write the files again") from error
    dense = None if against is None else resolve_model(against, progress)
    if dense is not None and not prompts and text is None:
        raise ConfigError(f"against is {dense}; it needs prompts to continue or a text to measure perplexity on")
    if tokens is not None and not prompts:
        raise ConfigError(f"tokens is {tokens}; it needs prompts to continue")
    if seq_len is not None and text is None:
        raise ConfigError(f"seq_len is {seq_len}; it needs a text to measure perplexity on")
    models = {} if dense is None else {f"{title(dense)} (dense)": dense}
    models[f"{records.name} (pruned)"] = out
    where = machine.resolve_device(device)
    limits = check_samples(models, prompts, tokens, where, bos) if prompts else []
    dense_perplexity, perplexity = (
        None
        if text is None or path is None
        else evaluate(path, text, seq_len=seq_len, bos=bos, device=device, memory=memory, progress=progress)
        for path in (dense, out)
    )
    html_text = _render(
        records=records,
        dense=None if dense is None else title(dense),
        is_source=dense is not None and json.loads(json.dumps(Checkpoint(dense).identity())) == source,
        perplexity=perplexity,
        dense_perplexity=dense_perplexity,
        samples=write_samples(models, prompts, limits, where, progress, bos) if prompts else [],
        tasks=tasks,
        description=describe(records.tunings[0] if records.tunings else records.pruning or {}, out),
        protocols=list(dict.fromkeys(each["protocol"] for each in (before, found) if each)),
        scored_source=before is not None and before["model"] == source,
        comparison=table,
        comparison_chart=None if table is None else figures.comparison(table),
        best=[] if table is None else _best(table["rows"][1:]),
        budget=figures.budget(sites) if sites else [],
        errors=figures.errors(sites),
        curves=figures.curves(records.curves, sites) if records.curves else [],
        spent=figures.time_and_memory(records.pruning["blocks"]) if records.pruning else [],
    )
    files.write_text(page, html_text)
    return page


def _render(**contents: Any) -> str:
    """Fill in the page; every value is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"amount": _amount, "bytes": format_bytes, "duration": format_seconds, "plain": _plain}
    environment.filters |= {"interval": _interval, "code": _code}
    environment.globals |= {"charts": charts, "passes": format_passes, "version": __version__}
    return environment.get_template("page.html.j2").render(contents)


def _best(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows with the lowest perplexity of their ratio."""
    finite = [row for row in rows if row["perplexity"] is not None]
    return [
        row for row in finite if row["perplexity"] == min(r["perplexity"] for r in finite if r["ratio"] == row["ratio"])
    ]


def _amount(number: float) -> str:
    """Format a number with a unit: 6951168 → ``"6.95 M"``."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:.0f}"


def _code(text: str) -> Any:
    """Escape a text and mark what is between backticks as code."""
    from markupsafe import Markup, escape

    pieces = str(escape(text)).split("`")
    return Markup("".join(f"<code>{piece}</code>" if number % 2 else piece for number, piece in enumerate(pieces)))


def _interval(interval: Interval | None, sign: str = "") -> str:
    if interval is None:
        return "—"
    return f"{interval.value:{sign}.4g}" + ("" if interval.half is None else f" ± {interval.half:.2g}")


def _plain(value: object) -> str:
    """Format a JSON value that is not an object."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return " · ".join(map(_plain, value))
    return "—" if value is None else str(value)
