"""Read and validate what a finished job recorded about itself. The files are untrusted: they may come from anywhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, ConfigError
from ...jobs.names import FIGURES, is_report, is_tuning
from ...model.names import CURVES, REPORT
from ...pruning.curves import FORMAT
from ...system.strict_json import read_json
from ..compare.table import JSON
from ..status import check_finished


@dataclass(frozen=True)
class SiteAccount:
    """Result of pruning one site."""

    name: str
    block: int
    kind: str
    kept: int
    """Units kept or, if weights were zeroed, the number of nonzero weights."""
    whole: int
    """Units or weights before pruning."""
    zeros: bool
    """Whether weights were zeroed instead of units removed."""
    error: float | None
    """Share of the consumer's output energy that was lost; None if it was not measured."""
    damping: float | None
    seconds: float | None
    left_alone: bool
    """Whether the site is an expert left unpruned because too few tokens reached it."""

    @property
    def share(self) -> float:
        """Share kept, in [0, 1]."""
        return self.kept / self.whole if self.whole else 1.0


@dataclass(frozen=True)
class BlockAccount:
    """Cost of one block."""

    block: int
    survey_seconds: float
    prune_seconds: float
    host_bytes: int | None
    """Peak bytes of host memory while the block was surveyed and pruned."""
    device_bytes: int | None
    """Peak bytes of device memory while the block was surveyed and pruned."""
    own_peak: bool
    """Whether `host_bytes` is the peak of this block alone, not of the process so far."""


@dataclass(frozen=True)
class TuningAccount:
    """Result of a tuning job after pruning."""

    method: str
    rank: int
    steps: int
    loss_first: float
    loss_last: float
    parameters: int


@dataclass(frozen=True)
class CompareRow:
    """One model of a comparison."""

    label: str
    ratio: float
    ratio_blocks: float
    perplexity: float | None
    """None if it is not finite."""
    parameters: int
    seconds: float
    forward_equivalents: float


@dataclass(frozen=True)
class CompareAccount:
    """A comparison; the first row is the dense model."""

    model: str
    protocol: str
    rows: tuple[CompareRow, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Account:
    """Everything that a finished checkpoint records about the jobs that produced it."""

    name: str
    source: Mapping[str, Any] | None
    """`identity` of the checkpoint that the first job read."""
    model: str | None
    """Name of the model that was pruned."""
    recipe: str | None
    """None for a tuned model that streamprune did not prune."""
    figures: Mapping[str, float]
    """Numeric top-level fields of the report."""
    operations: Mapping[str, int]
    """FLOPs of pruning by kind; empty if the report has none."""
    sites: tuple[SiteAccount, ...]
    blocks: tuple[BlockAccount, ...]
    curve_label: str | None
    curves: Mapping[str, tuple[tuple[int, float], ...]]
    """Cost curves by site name, as (units removed so far, cost of the next unit)."""
    tunings: tuple[TuningAccount, ...]
    """Tuning jobs, the last one first."""
    settings: Mapping[str, Mapping[str, Any]]
    """Flattened settings, inputs and versions of this job and the jobs before it, by title."""


def read_account(out: Path) -> Account:
    """Read the records of a finished OUT.

    Raises:
        ConfigError: OUT is unfinished, or streamprune did not write it.
        CheckpointError: the report is damaged.
    """
    path = out / REPORT
    check_finished(out)
    whole = read_json(path)
    if not is_report(whole) and not is_tuning(whole):
        raise ConfigError(f"{path} is not a report of streamprune run or tune")
    read = _Reader(path)
    tunings: list[TuningAccount] = []
    settings: dict[str, dict[str, Any]] = {}
    report: Any = whole
    first = whole
    while is_tuning(report):
        first = report["source"] or report
        tuning = read.object(report, "tuning")
        tunings.append(
            TuningAccount(
                method=read.text(tuning, "method"),
                rank=read.whole(tuning, "rank"),
                steps=read.whole(tuning, "steps"),
                loss_first=read.number(tuning, "loss_first"),
                loss_last=read.number(tuning, "loss_last"),
                parameters=read.whole(report, "parameters_after"),
            )
        )
        which = "Recovery" if len(tunings) == 1 else f"Recovery before it ({len(tunings)})"
        settings |= {f"{which}: {part}": dict(_flat(value)) for part, value in read.object(report, "job").items()}
        report = report["source"] or {}
    if report:
        if not is_report(report):
            raise CheckpointError(f"{path}: what it says of the model before is not a report")
        settings |= {f"Pruning: {part}": dict(_flat(value)) for part, value in read.object(report, "job").items()}
        rest = {key: report[key] for key in report if key not in ("job", "sites", "blocks")}
        settings["Result"] = dict(_flat(rest))
        if any(read.number(report, name) <= 0 for name in ("parameters_before", "parameters_after")):
            raise CheckpointError(f"{path}: a model has no parameters")
        for name in (name for name in FIGURES if name != "recipe"):
            read.number(report, name)
    label, curves = _curves(out / CURVES)
    inputs = read.object(first, "job").get("inputs")
    kinds = read.object(report, "operations_by_kind") if "operations_by_kind" in report else {}
    return Account(
        name=out.resolve().name,
        source=inputs.get("model") if isinstance(inputs, dict) else None,
        model=read.text(read.object(report, "model"), "name") if "model" in report else None,
        recipe=read.text(report, "recipe") if report else None,
        figures={key: float(v) for key, v in report.items() if _is_number(v)},
        operations={name: read.whole(kinds, name) for name in kinds},
        sites=tuple(_site(read, site) for site in read.objects(report, "sites")),
        blocks=tuple(_block(read, block) for block in read.objects(report, "blocks")),
        curve_label=label,
        curves=curves,
        tunings=tuple(tunings),
        settings=settings,
    )


def read_comparison(path: Path) -> CompareAccount:
    """Read a comparison from its folder or its compare.json.

    Raises:
        ConfigError: the file does not exist or is not from a comparison.
        CheckpointError: the file is damaged.
    """
    path = path / JSON if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"comparison is {path}, which is not there; streamprune compare writes it when it is done")
    read, table = _Reader(path), read_json(path)
    if not isinstance(table.get("rows"), list) or not table["rows"]:
        raise ConfigError(f"comparison is {path}, which is not what streamprune compare writes")
    rows = [
        CompareRow(
            label=read.text(row, "label"),
            ratio=read.number(row, "ratio"),
            ratio_blocks=read.number(row, "ratio_blocks"),
            perplexity=read.maybe(row, "perplexity"),
            parameters=read.whole(row, "parameters"),
            seconds=read.number(row, "seconds"),
            forward_equivalents=read.number(row, "forward_equivalents"),
        )
        for row in read.objects(table, "rows")
    ]
    notes = table.get("notes")
    return CompareAccount(
        model=read.text(table, "model"),
        protocol=read.text(table, "protocol"),
        rows=tuple(rows),
        notes=tuple(str(note) for note in notes) if isinstance(notes, list) else (),
    )


def _site(read: _Reader, site: Mapping[str, Any]) -> SiteAccount:
    name = read.text(site, "site")
    parts = name.split(".")
    if len(parts) < 3 or not parts[1].isdecimal():
        raise CheckpointError(f"{read.path}: {name!r} is not the name of a site")
    zeros = "zeros" in site
    whole = read.whole(site, "weights" if zeros else "units")
    kept = whole - read.whole(site, "zeros") if zeros else read.whole(site, "kept")
    if not 0 <= kept <= whole:
        raise CheckpointError(f"{read.path}: {name} keeps {kept} of {whole}")
    return SiteAccount(
        name=name,
        block=int(parts[1]),
        kind=parts[2],
        kept=kept,
        whole=whole,
        zeros=zeros,
        error=read.maybe(site, "error"),
        damping=read.maybe(site, "damping"),
        seconds=read.maybe(site, "seconds"),
        left_alone=site.get("left_alone") is True,
    )


def _block(read: _Reader, block: Mapping[str, Any]) -> BlockAccount:
    host, device = read.maybe(block, "host_bytes"), read.maybe(block, "device_bytes")
    return BlockAccount(
        block=read.whole(block, "block"),
        survey_seconds=read.number(block, "survey_seconds"),
        prune_seconds=read.number(block, "prune_seconds"),
        host_bytes=None if host is None else int(host),
        device_bytes=None if device is None else int(device),
        own_peak=block.get("own_peak") is True,
    )


def _curves(path: Path) -> tuple[str | None, dict[str, tuple[tuple[int, float], ...]]]:
    if not path.is_file():
        return None, {}
    read, found = _Reader(path), read_json(path)
    if found.get("format") != FORMAT:
        raise CheckpointError(f'{path}: format is {found.get("format")!r}; it must be "{FORMAT}"')
    curves = {}
    for name, points in read.object(found, "sites").items():
        if not isinstance(points, list) or not all(
            isinstance(p, list) and len(p) == 2 and all(map(_is_number, p)) for p in points
        ):
            raise CheckpointError(f"{path}: {name} must be a list of pairs of numbers")
        curves[name] = tuple((int(k), float(cost)) for k, cost in points)
    return read.text(found, "label"), curves


@dataclass(frozen=True)
class _Reader:
    """Read fields of JSON objects and check their types; raise CheckpointError for a wrong one."""

    path: Path

    def number(self, entry: Mapping[str, Any], name: str) -> float:
        value = entry.get(name)
        if not _is_number(value):
            raise CheckpointError(f"{self.path}: {name} is {str(value)[:40]!r}; it must be a number")
        assert value is not None
        return float(value)

    def maybe(self, entry: Mapping[str, Any], name: str) -> float | None:
        return None if entry.get(name) is None else self.number(entry, name)

    def whole(self, entry: Mapping[str, Any], name: str) -> int:
        return int(self.number(entry, name))

    def text(self, entry: Mapping[str, Any], name: str) -> str:
        value = entry.get(name)
        if not isinstance(value, str):
            raise CheckpointError(f"{self.path}: {name} is {str(value)[:40]!r}; it must be a text")
        return value

    def object(self, entry: Mapping[str, Any], name: str) -> Mapping[str, Any]:
        value = entry.get(name)
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.path}: {name} must be an object")
        return value

    def objects(self, entry: Mapping[str, Any], name: str) -> Sequence[Mapping[str, Any]]:
        """Return the objects of a list; none if the field is missing."""
        value = entry.get(name, [])
        if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
            raise CheckpointError(f"{self.path}: {name} must be a list of objects")
        return value


def _is_number(value: Any) -> bool:
    # Compare instead of `math.isfinite`, which raises for an integer beyond the range of floats.
    return not isinstance(value, bool) and isinstance(value, (int, float)) and abs(value) <= sys.float_info.max


def _flat(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every leaf of a JSON value with its dotted path; lists are leaves."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{place}.{key}" if place else str(key))
    else:
        yield place, value
