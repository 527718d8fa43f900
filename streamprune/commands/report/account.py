"""What a finished job wrote down of itself, read back and checked: a report may come from anywhere."""

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
    """What happened at one site."""

    name: str
    block: int
    kind: str
    kept: int
    """Units; where weights became zero, weights that did not."""
    whole: int
    zeros: bool
    """Whether weights became zero, and no unit went."""
    error: float | None
    """Share of the consumer's output energy that was lost; None where nothing was measured."""
    damping: float | None
    seconds: float | None
    left_alone: bool
    """Whether it is an expert that too few tokens reached."""

    @property
    def share(self) -> float:
        """What it kept, in [0, 1]."""
        return self.kept / self.whole if self.whole else 1.0


@dataclass(frozen=True)
class BlockAccount:
    """What one block took."""

    block: int
    survey_seconds: float
    prune_seconds: float
    host_bytes: int | None
    """Held at most while it was pruned."""
    device_bytes: int | None
    own_peak: bool
    """Whether the host's figure is of this block alone, not of all until then."""


@dataclass(frozen=True)
class TuningAccount:
    """A recovery that came after pruning."""

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
    """None where it is not finite."""
    parameters: int
    seconds: float
    forward_equivalents: float


@dataclass(frozen=True)
class CompareAccount:
    """A comparison; the dense model's row is the first."""

    model: str
    protocol: str
    rows: tuple[CompareRow, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Account:
    """All that a finished checkpoint says of how it was made."""

    name: str
    source: Mapping[str, Any] | None
    """What tells the model that the first of its jobs read: the checkpoint's `identity`."""
    model: str | None
    """The name of the model that was pruned."""
    recipe: str | None
    """None for a tuned model that was not pruned here."""
    figures: Mapping[str, float]
    """What the report says of the whole, as far as it is a number."""
    operations: Mapping[str, int]
    """Of pruning, by what they were for; empty where the report does not say."""
    sites: tuple[SiteAccount, ...]
    blocks: tuple[BlockAccount, ...]
    curve_label: str | None
    curves: Mapping[str, tuple[tuple[int, float], ...]]
    """By site name: with so many units gone, what the next costs."""
    tunings: tuple[TuningAccount, ...]
    """The last one first."""
    settings: Mapping[str, Mapping[str, Any]]
    """Settings, inputs and versions of the job, and of those before it, by what they are of; each flat."""


def read_account(out: Path) -> Account:
    """What lies in a finished OUT.

    Raises:
        ConfigError: it is not finished, or not a result of ours.
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
    """A comparison: its folder or its compare.json.

    Raises:
        ConfigError: there is none.
        CheckpointError: it is damaged.
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
    """Fields of JSON objects, of the type they must have."""

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
        """Those of a list; none where there is no such field."""
        value = entry.get(name, [])
        if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
            raise CheckpointError(f"{self.path}: {name} must be a list of objects")
        return value


def _is_number(value: Any) -> bool:
    # Compared, since a whole number may be larger than any that `math.isfinite` takes.
    return not isinstance(value, bool) and isinstance(value, (int, float)) and abs(value) <= sys.float_info.max


def _flat(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of a JSON value by its dotted place; lists are leaves."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{place}.{key}" if place else str(key))
    else:
        yield place, value
