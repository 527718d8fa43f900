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
KEYS = ("results", "documents", "samples", "fingerprints", "fewshot", "model")
"""Entries of a file of scores that are read; see `TaskScores`."""


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
    after: Interval | None
    """None if only the dense model has it."""
    before: Interval | None
    """Of the dense model; None if it was not scored."""
    change: Interval | None
    """None if either is missing, or the models were not scored on the same tasks and this is a group, which may have other members."""
    paired: bool
    """Whether the interval of `change` is that of the mean of the documents' differences. Otherwise both are taken as independent."""


def read_scores(path: Path) -> dict[str, Any]:
    """Read the task scores that ``eval --tasks --json`` has printed. Raises ConfigError if the file holds none."""
    if not path.is_file():
        raise ConfigError(
            f"scores are {path}, which is not a file; streamprune eval --tasks ... --json > FILE writes one"
        )
    found = read_json(path).get("tasks")
    if not isinstance(found, dict) or not {*KEYS} <= {*found}:
        raise ConfigError(
            f"scores are {path}, which this version's streamprune eval --tasks ... --json did not print; run it again"
        )
    return found


def compare_scores(after: Mapping[str, Any], before: Mapping[str, Any] | None) -> list[Row]:
    """Compare the scores of a model (see `TaskScores`) with those of the dense model, metric by metric.

    The interval of a value is lm_eval's standard error times `ERRORS`. That of a difference is σ/√n times `ERRORS`, with the
    standard deviation σ of the differences of n documents; √(σ₁² + σ₂²) from both standard errors if these are not known.

    Tasks and metrics of one model only have no difference. Those of the dense model come last.

    Raises:
        ConfigError: the documents of a task, or its number of examples, differ.
    """
    dense: Mapping[str, Any] = {key: {} for key in KEYS} if before is None else before
    for task in after["fingerprints"].keys() & dense["fingerprints"].keys():
        if dense["fingerprints"][task] != after["fingerprints"][task]:
            raise ConfigError(
                f"the scores of {task!r} before and after are of different documents; use the same --tasks and --limit"
            )
        if (then := dense["fewshot"][task]) != (now := after["fewshot"][task]):
            raise ConfigError(
                f"the scores of {task!r} are with {then} examples before and {now} after; use the same --num-fewshot"
            )
    same = after["fingerprints"].keys() == dense["fingerprints"].keys()
    rows = []
    for task in {**after["results"], **dense["results"]}:
        result, of_dense = (scores["results"].get(task, {}) for scores in (after, dense))
        documents = after["documents"].get(task, dense["documents"].get(task))
        for metric in dict.fromkeys((*_metrics(result), *_metrics(of_dense))):
            now, then = _interval(result, metric), _interval(of_dense, metric)
            each, each_dense = (scores["samples"].get(task, {}).get(metric) for scores in (after, dense))
            change, paired = _change(now, then, each, each_dense) if same or documents is not None else (None, False)
            rows.append(Row(task, metric.removesuffix(",none"), documents, now, then, change, paired))
    return rows


def _metrics(result: Mapping[str, Any]) -> list[str]:
    """Return the metrics that have a value."""
    return [name for name, value in result.items() if _is_number(value) and "," in name and "_stderr," not in name]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _interval(result: Mapping[str, Any], metric: str) -> Interval | None:
    if not _is_number(result.get(metric)):
        return None
    name, _, kind = metric.partition(",")
    error = result.get(f"{name}_stderr,{kind}")
    return Interval(result[metric], ERRORS * error if isinstance(error, (int, float)) else None)


def _change(
    after: Interval | None, before: Interval | None, each: Sequence[float] | None, dense: Sequence[float] | None
) -> tuple[Interval | None, bool]:
    """Return the difference, and whether it is paired; `each` and `dense` are the documents' scores, if they are known."""
    if after is None or before is None:
        return None, False
    value = after.value - before.value
    if each and dense and len(each) > 1:
        differences = [now - then for now, then in zip(each, dense, strict=True)]
        return Interval(fmean(differences), ERRORS * stdev(differences) / math.sqrt(len(differences))), True
    if after.half is None or before.half is None:
        return Interval(value, None), False
    return Interval(value, math.hypot(after.half, before.half)), False
