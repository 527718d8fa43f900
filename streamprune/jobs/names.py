"""Names of the files and folders that a job creates beside OUT, and checks that identify its result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

JOURNAL, LOCK, STAGING, REPLACED = "journal.jsonl", "lock", "out", "replaced"
WORK = ".streamprune"
"""Suffix of the name of a job's folder."""
ROWS = "rows"
"""Folder with the results of a comparison's rows."""
SURVEYS = "surveys"
"""Folder with the surveys that its rows share."""
ASKED = "asked"
"""Name of the line in a comparison's journal that lists its rows."""
FIGURES = (
    "recipe",
    "ratio_requested",
    "ratio_blocks",
    "ratio_model",
    "parameters_before",
    "parameters_after",
    "zeros",
    "operations",
    "forward_equivalents",
)
"""Fields of a report that describe the whole model."""


def job_folder(out: Path) -> Path:
    """Return the folder for a job's journal, its finished shards and, by default, its activations."""
    return out.absolute().parent / f"{out.absolute().name}{WORK}"


def is_report(report: Any) -> bool:
    """Return whether a JSON value is the report of a pruning job."""
    return isinstance(report, dict) and all(key in report for key in (*FIGURES, "job", "plan", "plan_given", "sites"))


def is_tuning(report: Any) -> bool:
    """Return whether a JSON value is the report of a tuning job."""
    return isinstance(report, dict) and all(key in report for key in ("tuning", "parameters_after", "job", "source"))
