"""Write the report of a finished checkpoint as one self-contained HTML file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ...errors import ConfigError
from ...model.checkpoint import Checkpoint
from ...model.hub import resolve_model, title
from ...system import files, machine
from ...system.progress import Progress, Silent
from ...text.source import Spec
from ..evaluate import evaluate
from .account import read_account, read_comparison
from .page import Contents, render
from .samples import check_samples, write_samples

PAGE = "report.html"


def report(
    out: str | Path,
    *,
    against: str | Path | None = None,
    prompts: Sequence[str] = (),
    tokens: int | None = None,
    text: Spec | None = None,
    seq_len: int | None = None,
    comparison: str | Path | None = None,
    html: str | Path | None = None,
    device: str = "auto",
    memory: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write the report of a finished OUT; return the path of the page.

    Budget by depth, reconstruction errors, importance curves, time and memory per block, settings and fingerprints come
    from the job's records. Samples and perplexity are computed now, if requested.

    Args:
        out: a checkpoint directory that `prune` or `tune` wrote.
        against: the dense model, to compare samples and perplexity with.
        prompts: texts that both models continue greedily. One model at a time is in memory, as a whole.
        tokens: largest number of tokens per sample; None takes 48, or what a prompt leaves of the shorter context.
        text: one source (see `text.source.Source`) to measure perplexity on, streamed.
        seq_len: tokens per window of `text`; see `evaluate`.
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
    account = read_account(out)
    _check_page(page)
    table = None if comparison is None else read_comparison(Path(comparison))
    dense = None if against is None else resolve_model(against, progress)
    if dense is not None and not prompts and text is None:
        raise ConfigError(f"against is {dense}; it needs prompts to go on with, or a text to measure perplexity on")
    for name, value, needed, what in (
        ("tokens", tokens, prompts, "prompts to go on with"),
        ("seq_len", seq_len, text is not None, "a text to measure perplexity on"),
    ):
        if value is not None and not needed:
            raise ConfigError(f"{name} is {value}; it needs {what}")
    identity = None if dense is None else json.loads(json.dumps(Checkpoint(dense).identity()))
    dense_name = None if dense is None else title(dense)
    models = {} if dense is None else {f"{dense_name} (dense)": dense}
    models[f"{out.resolve().name} (pruned)"] = out
    where = machine.resolve_device(device)
    limits = check_samples(models, prompts, tokens, where) if prompts else []
    measured = [
        None
        if text is None or path is None
        else evaluate(path, text, seq_len=seq_len, device=device, memory=memory, progress=progress)
        for path in (dense, out)
    ]
    contents = Contents(
        account=account,
        dense=dense_name,
        is_source=identity is not None and identity == account.source,
        dense_perplexity=measured[0],
        perplexity=measured[1],
        samples=write_samples(models, prompts, limits, where, progress) if prompts else (),
        comparison=table,
    )
    files.write_text(page, render(contents))
    return page


def _check_page(page: Path) -> None:
    if page.suffix not in (".html", ".htm"):
        raise ConfigError(f"html is {page}; its name must end in .html")
    wrong = page if page.is_dir() else page.absolute().parent
    if page.is_dir() or not wrong.is_dir():
        raise ConfigError(f"html is {page}; {wrong} is {'' if page.is_dir() else 'not '}a folder")
