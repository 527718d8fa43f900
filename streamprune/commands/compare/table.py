"""What a comparison found: rows, the ratio at which a perplexity is reached, tables and files."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ...system import files
from ...system.strict_json import finite
from ...system.units import format_bytes

DENSE = "dense"
JSON, CSV, MARKDOWN, PLOT = "compare.json", "compare.csv", "compare.md", "compare.png"


@dataclass(frozen=True)
class Variant:
    """A recipe with settings of its own, under a label.

    Raises:
        ConfigError: the label is not letters, digits, - and _, or is taken by the dense model.
    """

    label: str
    recipe: str
    settings: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", self.label):
            raise ConfigError(f"label is {self.label!r}; it must be of letters, digits, - and _")
        if self.label == DENSE:
            raise ConfigError(f"label is {self.label!r}, which is the unpruned model's")

    @classmethod
    def parse(cls, text: str) -> Variant:
        """``"recipe"`` or ``"label=recipe"``."""
        label, equals, recipe = text.partition("=")
        return cls(label, recipe if equals else label)


@dataclass(frozen=True)
class Row:
    """One model: the dense one first, then every recipe at every ratio."""

    label: str
    recipe: str | None
    """None for the dense model."""
    settings: Mapping[str, str]
    ratio: float
    """Share of the blocks' parameters that was to go."""
    ratio_blocks: float
    """Share that went or became zero."""
    parameters: int
    """Of the whole model, afterwards, zeros too."""
    perplexity: float
    log_gap: float
    """Log-perplexity above the dense model's."""
    seconds: float
    """To prune, over all processes that worked on it."""
    operations: int
    """To prune, floating-point."""
    forward_equivalents: float
    """The same in dense forward passes over the calibration set."""
    peak_host_bytes: int | None
    """While pruning, of the process that finished it; None for the dense model."""
    peak_device_bytes: int | None
    out: str | None
    """The checkpoint, where it was kept."""


@dataclass(frozen=True)
class Reached:
    """Where a recipe's line, log-perplexity over ratio, reaches a perplexity."""

    label: str
    perplexity: float
    ratio: float | None
    """None outside of what was measured."""
    text: str
    """The ratio, or which side it lies on."""


@dataclass(frozen=True)
class Comparison:
    """All rows, and how they were made."""

    model: str
    out: str
    protocol: str
    """How perplexity was measured."""
    settings: Mapping[str, Any]
    """What all recipes had in common."""
    rows: tuple[Row, ...]
    reached: tuple[Reached, ...]
    notes: tuple[str, ...]
    """What a reader of the table should know besides."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: None stands for it."""
        plain: dict[str, Any] = finite(asdict(self))
        return plain

    def cells(self) -> list[list[str]]:
        """The table, its heading first."""
        heading = ["recipe", "ratio", "removed", "parameters", "perplexity", "log gap"]
        heading += ["seconds", "host peak", "device peak", "TFLOP", "forwards"]
        return [heading] + [
            [
                row.label,
                f"{row.ratio:g}",
                f"{row.ratio_blocks:.4f}",
                f"{row.parameters:,}",
                f"{row.perplexity:.4f}",
                f"{row.log_gap:.4f}",
                f"{row.seconds:.1f}",
                *("" if size is None else format_bytes(size) for size in (row.peak_host_bytes, row.peak_device_bytes)),
                f"{row.operations / 1e12:.3f}",
                f"{row.forward_equivalents:.2f}",
            ]
            for row in self.rows
        ]

    def reached_cells(self) -> list[list[str]]:
        """Recipes by perplexities asked for: the ratio at which each is reached; empty if none was asked for."""
        asked = list(dict.fromkeys(entry.perplexity for entry in self.reached))
        if not asked:
            return []
        found = {(entry.label, entry.perplexity): entry.text for entry in self.reached}
        labels = dict.fromkeys(entry.label for entry in self.reached)
        heading = ["ratio at perplexity", *(f"{perplexity:g}" for perplexity in asked)]
        return [heading] + [[label, *(found[label, perplexity] for perplexity in asked)] for label in labels]

    def write(self, folder: Path, *, plot: bool) -> None:
        """The files of the table, durably."""
        files.write_text(folder / JSON, json.dumps(self.as_dict(), indent=2) + "\n")
        files.write_text(folder / CSV, self._csv())
        files.write_text(folder / MARKDOWN, self._markdown())
        if plot:
            with files.replacing_file(folder / PLOT) as temporary:
                self._plot(temporary)

    def _csv(self) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(field.name for field in fields(Row))
        for row in self.as_dict()["rows"]:
            writer.writerow({**row, "settings": " ".join(f"{k}={v}" for k, v in row["settings"].items())}.values())
        return text.getvalue()

    def _markdown(self) -> str:
        parts = [f"# {Path(self.model).name}, pruned by {len({row.label for row in self.rows}) - 1} recipes"]
        parts += ["\n".join(_pipes(table)) for table in (self.cells(), self.reached_cells()) if table]
        parts += [
            "`removed` is the share of the blocks' parameters that went or became zero, `log gap` the log-perplexity above the dense model's, "
            "`forwards` the operations of pruning in dense forward passes over the calibration set.",
            f"Perplexity: {self.protocol}.",
            "Settings: " + ", ".join(f"{name} {value}" for name, value in self.settings.items()) + ".",
        ]
        chosen = {row.label: row for row in self.rows if row.recipe is not None}
        lines = [
            f"- {label}: recipe `{row.recipe}`" + "".join(f", {name} = {value}" for name, value in row.settings.items())
            for label, row in chosen.items()
        ]
        parts += ["\n".join(lines), *self.notes]
        return "\n\n".join(parts) + "\n"

    def _plot(self, path: Path) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogFormatter

        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.add_subplot()
        for label, line in _lines(self.rows).items():
            ratios, levels = zip(*line, strict=True)
            axes.plot(ratios, [math.exp(level) for level in levels], marker="o", label=label)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        axes.set_xlabel("share of the blocks' parameters removed")
        axes.set_ylabel("perplexity")
        axes.set_title(Path(self.model).name)
        axes.grid(alpha=0.3, which="both")
        axes.legend()
        FigureCanvasAgg(figure).print_figure(path, format="png", dpi=150)


def require_plotting() -> None:
    """See that a picture can be drawn.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("a plot needs matplotlib, which is not installed: pip install 'streamprune[plot]'")


def reach(rows: Sequence[Row], perplexities: Sequence[float]) -> tuple[Reached, ...]:
    """Where every recipe reaches every one of these perplexities; `rows` with the dense one first."""
    found = []
    for label, line in _lines(rows).items():
        for perplexity in perplexities:
            level = math.log(perplexity)
            ratio = ratio_at(line, level)
            outside = f">{line[-1][0]:.3g}" if level > line[0][1] else "<0"
            found.append(Reached(label, perplexity, ratio, outside if ratio is None else f"{ratio:.4f}"))
    return tuple(found)


def ratio_at(line: Sequence[tuple[float, float]], level: float) -> float | None:
    """The first ratio at which a line through points (ratio, log-perplexity) meets `level`; None if it never does."""
    if line[0][1] == level:
        return line[0][0]
    for (left, low), (right, high) in pairwise(line):
        if min(low, high) <= level <= max(low, high) and low != high:
            return left + (level - low) / (high - low) * (right - left)
    return None


def _lines(rows: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
    """Per recipe its points (ratio that went, log-perplexity), ascending, from the dense model's on."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.recipe is not None:
            lines.setdefault(row.label, []).append((row.ratio_blocks, math.log(row.perplexity)))
    return {label: [(0.0, math.log(rows[0].perplexity)), *sorted(points)] for label, points in lines.items()}


def _pipes(cells: list[list[str]]) -> list[str]:
    heading, *rows = (f"| {' | '.join(row)} |" for row in cells)
    return [heading, "|---" + "|--:" * (len(cells[0]) - 1) + "|", *rows]
