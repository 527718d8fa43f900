"""Names of the files of a checkpoint, and of what a job makes beside OUT while it runs.

`status` reads these without loading torch; so nothing here imports it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
ADAPTER = "adapter_config.json"
JOURNAL, LOCK, STAGING, REPLACED = "journal.jsonl", "lock", "out", "replaced"
WORK = ".streamprune"
"""The end of the name of a job's folder."""
ROWS, SURVEYS = "rows", "surveys"
"""Folders of a comparison: its rows' results, and surveys that they share."""
ASKED = "asked"
"""The line in a comparison's journal that lists its rows."""
REPORT, CARD, CURVES = "report.json", "README.md", "curves.json"
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
KERNELS = {
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "_attn_implementation_autoset",
    "experts_implementation",
    "_experts_implementation",
    "_experts_implementation_internal",
}
"""Fields of a config that say by which kernels somebody once ran the model."""
RUN_TIME = KERNELS | {"output_attentions", "_output_attentions", "transformers_weights"}
"""Fields that say how, or from which file, somebody once ran the model: no part of a checkpoint, and another machine may not
have what they ask for."""
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
COMPANIONS = (
    "generation_config.json",
    *TOKENIZER_FILES,
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
    "NOTICE.txt",
    "USE_POLICY.md",
)
"""Files of a checkpoint that are copied unchanged."""


def job_folder(out: Path) -> Path:
    """Where a job keeps its journal, its finished shards and, unless told otherwise, its activations."""
    return out.absolute().parent / f"{out.absolute().name}{WORK}"


def is_report(report: Any) -> bool:
    """Whether a JSON value is the report of a pruning."""
    return isinstance(report, dict) and all(key in report for key in (*FIGURES, "job", "plan", "plan_given", "sites"))


def is_tuning(report: Any) -> bool:
    """Whether a JSON value is the report of a tuning."""
    return isinstance(report, dict) and all(key in report for key in ("tuning", "parameters_after", "job", "source"))
