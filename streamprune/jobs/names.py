"""Names of the files and folders that a job makes beside OUT, and what tells its result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

JOURNAL, LOCK, STAGING, REPLACED = "journal.jsonl", "lock", "out", "replaced"


WORK = ".streamprune"
"""The end of the name of a job's folder."""


ROWS, SURVEYS = "rows", "surveys"
"""Folders of a comparison: its rows' results, and surveys that they share."""


ASKED = "asked"
"""The line in a comparison's journal that lists its rows."""


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
"""What a report says of the whole."""


def job_folder(out: Path) -> Path:
    """Where a job keeps its journal, its finished shards and, unless told otherwise, its activations."""
    return out.absolute().parent / f"{out.absolute().name}{WORK}"


def is_report(report: Any) -> bool:
    """Whether a JSON value is the report of a pruning."""
    return isinstance(report, dict) and all(key in report for key in (*FIGURES, "job", "plan", "plan_given", "sites"))


def is_tuning(report: Any) -> bool:
    """Whether a JSON value is the report of a tuning."""
    return isinstance(report, dict) and all(key in report for key in ("tuning", "parameters_after", "job", "source"))
