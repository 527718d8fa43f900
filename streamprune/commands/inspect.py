"""Describe the structure of a checkpoint, and the progress or report of its job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..jobs.journal import as_written
from ..jobs.names import is_report, is_tuning, job_folder
from ..model import hub
from ..model.names import CONFIG, CURVES, REPORT
from ..model.site import Site
from ..system.progress import Progress
from ..system.strict_json import read_json
from .compare.table import JSON, MARKDOWN
from .status import read_journal, status


def inspect(path: str | Path, *, progress: Progress | None = None) -> dict[str, Any]:
    """Describe a checkpoint's blocks, sites, units and widths, and the job that writes or wrote it.

    Args:
        path: a checkpoint directory, its name on the hub, or the OUT of an unfinished job.

    Returns:
        ``{"model": {...} or None, "job": {...} or None}``, JSON-ready. A finished job has its report and the cost curves
        of its sites (`curves`); an unfinished one has its settings, finished steps and sites.

    Raises:
        CheckpointError: `path` is neither a checkpoint nor a job.
    """
    path = Path(path)
    if hub.is_name(path) and not job_folder(path).is_dir():
        path = hub.resolve_model(path, progress)
    job = _unfinished_job(path)
    is_model = (path / CONFIG).is_file() or hub.find_gguf(path) is not None
    if not is_model and (path / JSON).is_file():
        raise CheckpointError(f"{path} contains a comparison (see {MARKDOWN}), not a checkpoint")
    model = _model(path) if is_model or job is None else None
    if job is None and (path / REPORT).is_file():
        report = read_json(path / REPORT)
        if is_report(report) or is_tuning(report):
            job = {"state": "finished", "report": report}
            if (path / CURVES).is_file():
                job["curves"] = read_json(path / CURVES)
    return {"model": model, "job": job}


def _model(path: Path) -> dict[str, Any]:
    import torch

    from ..model.skeleton import open_skeleton
    from ..system.machine import dtype_name

    skeleton = open_skeleton(path, torch.device("cpu"), "auto")
    entries = skeleton.checkpoint
    blocks = [
        {
            "block": index,
            "parameters": sum(entries[name].numel for name in skeleton.block_names(index).values()),
            "sites": [_site(site) for site in skeleton.sites(index)],
            "gone": [f"blocks.{index}.{entry.kind}" for entry in skeleton.entries[index] if entry.gone],
        }
        for index in range(len(skeleton))
    ]
    return {
        "path": str(path),
        "model_type": skeleton.checkpoint.config["model_type"],
        "dtypes": sorted({dtype_name(entry.dtype) for entry in entries.values()}),
        "parameters": skeleton.parameters(),
        "block_parameters": skeleton.block_parameters(),
        "width": skeleton.width,
        "vocabulary": skeleton.vocabulary,
        "context": skeleton.context,
        "tied": skeleton.outside.tied,
        "unpruned": [
            {"module": name, "blocks": indices, "count": len(indices)} for name, indices in skeleton.unpruned.items()
        ],
        "carried": sum(entries[name].numel for name in skeleton.carried_names()),
        "blocks": blocks,
    }


def _site(site: Site) -> dict[str, Any]:
    found = {name: getattr(site, name) for name in ("units", "columns", "unit_parameters")}
    heads = {"heads": site.heads, "head_dim": site.head_width} if site.heads else {}
    return {"site": site.name, **found, **heads}


def _unfinished_job(out: Path) -> dict[str, Any] | None:
    journal = read_journal(out)
    if journal is None:
        if not out.exists() and not job_folder(out).is_dir():
            raise CheckpointError(f"{out} does not exist, and no job is writing it")
        return None
    if journal.header is None:
        return {"state": "starting"}
    with as_written(f"the journal of {out}"):
        steps = list(journal.steps())
        pruned = [step for step in steps if "/prune/" in step["step"]]
        shot = pruned[-1]["step"].partition("/")[0] if pruned else ""
        return {
            "state": status(out).state,
            "settings": journal.header["job"]["settings"],
            "finished": [step["step"] for step in steps],
            "sites": [site for step in pruned if step["step"].startswith(f"{shot}/") for site in step["sites"]],
        }
