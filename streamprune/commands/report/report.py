"""A page that shows what was done to a finished checkpoint: one HTML file, which needs nothing else."""

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
    """Write the page of a finished OUT; returns where it is.

    Budget over depth, reconstruction errors, importance curves, time and memory a block, settings and fingerprints come
    from what the job wrote down. The rest is made now, where it is asked for.

    Args:
        out: a checkpoint directory that `prune` or `tune` made.
        against: the dense model, for samples and perplexity side by side.
        prompts: texts that both models go on with, greedily, each model whole in memory, one after the other.
        tokens: of each sample, at most; None takes 48, or what a prompt leaves of the shorter context.
        text: one source (see `text.Source`) to measure perplexity on, streamed.
        seq_len: tokens a window of it; see `evaluate`.
        comparison: the folder of a `compare`, or its compare.json.
        html: where to write; None takes ``report.html`` in `out`.
        memory: bytes the device may use to measure perplexity; None takes what is free.

    Raises:
        ConfigError: `out` is not a finished result, or what was asked for makes no page.
        CheckpointError: a file in it, or the model it is held against, is damaged.
        ResourceError: samples are asked of a model that does not fit into the free memory.
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
