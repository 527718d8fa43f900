"""Read what finished jobs recorded about their result, and the table of a comparison."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ...jobs.names import is_report, is_tuning
from ...model.names import CURVES, REPORT
from ...system.strict_json import read_json
from ..compare.table import JSON
from ..status import check_finished


class SiteRecord:
    """A site in `report.json`. Counts are units or, if weights were zeroed instead, weights."""

    def __init__(self, entry: Mapping[str, Any]) -> None:
        self.name: str = entry["site"]
        _, block, self.kind, *_ = self.name.split(".")
        self.block = int(block)
        self.zeroed = "zeros" in entry
        self.total: int = entry["weights" if self.zeroed else "units"]
        self.kept: int = self.total - entry["zeros"] if self.zeroed else entry["kept"]
        self.share = self.kept / self.total
        self.error: float | None = entry.get("error")
        """Share of the consumer's output energy that was lost; None if it was not measured."""
        self.damping: float | None = entry.get("damping")
        self.seconds: float | None = entry.get("seconds")
        self.left_alone: bool = entry.get("left_alone", False)
        """Whether the site is an expert that saw too few tokens to be pruned."""


@dataclass(frozen=True)
class Records:
    """Everything that a finished checkpoint records about the jobs that produced it."""

    name: str
    pruning: dict[str, Any] | None
    """Report of the pruning job; None for a tuned model that streamprune did not prune."""
    tunings: list[dict[str, Any]]
    """Reports of the tuning jobs, the last one first."""
    curves: dict[str, Any] | None
    """Contents of curves.json (see `pruning.curves.write_curves`); None if the recipe computes no curves."""

    @property
    def sites(self) -> list[SiteRecord]:
        """The pruned sites in the order of the model."""
        return [SiteRecord(site) for site in self.pruning["sites"]] if self.pruning else []

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """Settings, inputs and versions of all jobs, and the figures of the pruning job, by title, flattened."""
        parts: dict[str, Any] = {}
        for number, tuning in enumerate(self.tunings, 1):
            title = "Recovery" if number == 1 else f"Earlier recovery ({number})"
            parts |= {f"{title}: {part}": value for part, value in tuning["job"].items()}
        if self.pruning is not None:
            parts |= {f"Pruning: {part}": value for part, value in self.pruning["job"].items()}
            parts["Result"] = {k: v for k, v in self.pruning.items() if k not in ("job", "sites", "blocks")}
        return {title: dict(flat(value)) for title, value in parts.items()}


def read_records(out: Path) -> Records:
    """Read the records of a finished OUT.

    Raises:
        ConfigError: OUT is unfinished, or streamprune did not write it.
        CheckpointError: a file cannot be read as JSON.
    """
    check_finished(out)
    report: Any = read_json(out / REPORT)
    if not is_report(report) and not is_tuning(report):
        raise ConfigError(f"{out / REPORT} is not a report of streamprune run or tune")
    tunings = []
    while is_tuning(report):
        tunings.append(report)
        report = report["source"]
    curves = read_json(out / CURVES) if (out / CURVES).is_file() else None
    # A tuned model may come from another tool, with a report of its own.
    return Records(out.resolve().name, report if is_report(report) else None, tunings, curves)


def read_comparison(path: Path) -> dict[str, Any]:
    """Read a comparison (see `Comparison.as_dict`) from its folder or compare.json. Raises ConfigError if it is neither."""
    path = path / JSON if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"comparison is {path}, which does not exist; streamprune compare writes it when it finishes")
    table = read_json(path)
    if not table.get("rows"):
        raise ConfigError(f"comparison is {path}, which streamprune compare did not write")
    return table


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every leaf of a JSON value with its dotted path; lists are leaves."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flat(inner, f"{path}.{key}" if path else key)
    else:
        yield path, value
