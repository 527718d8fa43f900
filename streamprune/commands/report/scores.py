"""Compare the task scores of two models, with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ...errors import ConfigError
from ...system.strict_json import read_json

ERRORS = 1.96
"""Standard errors on each side of a value within which 95 % of a normal distribution lie."""


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % confidence interval."""

    value: float
    half: float | None
    """Half the interval's width; None if the standard error is not known."""

    @property
    def clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.half is not None and abs(self.value) > self.half


@dataclass(frozen=True)
class Row:
    """One metric of a task or group."""

    task: str
    metric: str
    documents: int | None
    """None for a group."""
    after: Interval
    before: Interval | None
    """Of the dense model; None if it was not scored."""
    change: Interval | None
    paired: bool
    """Whether the interval of `change` is that of the mean of the documents' differences. Otherwise both are taken as independent."""


def read_scores(path: Path) -> dict[str, Any]:
    """Read the task scores that ``eval --tasks --json`` has printed. Raises ConfigError if the file holds none."""
    if not path.is_file():
        raise ConfigError(
            f"scores are {path}, which is not a file; streamprune eval --tasks ... --json > FILE writes one"
        )
    found = read_json(path).get("tasks")
    if not isinstance(found, dict) or not {"results", "documents", "samples", "fingerprints", "model"} <= {*found}:
        raise ConfigError(f"scores are {path}, which streamprune eval --tasks ... --json did not print")
    return found


def compare_scores(after: Mapping[str, Any], before: Mapping[str, Any] | None) -> list[Row]:
    """Compare the scores of a model (see `TaskScores`) with those of the dense model, metric by metric.

    The interval of a value is lm_eval's standard error times `ERRORS`. That of a difference is σ/√n times `ERRORS`, with the
    standard deviation σ of the differences of n documents; √(σ₁² + σ₂²) from both standard errors if these are not known.

    Raises:
        ConfigError: a task is in one file only, or its documents differ.
    """
    for task, fingerprint in after["fingerprints"].items() if before else ():
        assert before is not None
        if before["fingerprints"].get(task) != fingerprint:
            raise ConfigError(
                f"the scores of {task!r} before and after are of different documents; use the same --tasks and --limit"
            )
    rows = []
    for task, result in after["results"].items():
        for metric, value in result.items():
            if (
                not isinstance(value, (int, float))
                or isinstance(value, bool)
                or ("_stderr," in metric)
                or "," not in metric
            ):
                continue
            now, then = _interval(result, metric), None
            if before is not None and isinstance(before["results"].get(task, {}).get(metric), (int, float)):
                then = _interval(before["results"][task], metric)
            each, dense = (
                None if scores is None else scores["samples"].get(task, {}).get(metric) for scores in (after, before)
            )
            change, paired = _change(now, then, each, dense)
            rows.append(
                Row(task, metric.removesuffix(",none"), after["documents"].get(task), now, then, change, paired)
            )
    return rows


def _interval(result: Mapping[str, Any], metric: str) -> Interval:
    name, _, kind = metric.partition(",")
    error = result.get(f"{name}_stderr,{kind}")
    return Interval(result[metric], ERRORS * error if isinstance(error, (int, float)) else None)


def _change(
    after: Interval, before: Interval | None, each: Sequence[float] | None, dense: Sequence[float] | None
) -> tuple[Interval | None, bool]:
    """Return the difference, and whether it is paired; `each` and `dense` are the documents' scores, if they are known."""
    if before is None:
        return None, False
    value = after.value - before.value
    if each and dense and len(each) > 1:
        differences = [now - then for now, then in zip(each, dense, strict=True)]
        return Interval(fmean(differences), ERRORS * stdev(differences) / math.sqrt(len(differences))), True
    if after.half is None or before.half is None:
        return Interval(value, None), False
    return Interval(value, math.hypot(after.half, before.half)), False
