"""Results of a comparison: rows, the ratio at which a perplexity is reached, tables and files."""

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
EXPLANATION = (
    "`removed` is the share of the blocks' parameters that were removed or zeroed; `log gap` is the log-perplexity minus "
    "that of the dense model; `forwards` is the FLOPs of pruning, in dense forward passes over the calibration set."
)


@dataclass(frozen=True)
class Variant:
    """A recipe with its settings, under a label.

    Raises:
        ConfigError: the label is reserved, or has characters other than letters, digits, - and _.
    """

    label: str
    recipe: str
    settings: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", self.label):
            raise ConfigError(f"label is {self.label!r}; it must consist of letters, digits, - and _")
        if self.label == DENSE:
            raise ConfigError(f"label is {self.label!r}, which is reserved for the unpruned model")

    @classmethod
    def parse(cls, text: str) -> Variant:
        """Parse ``"recipe"`` or ``"label=recipe"``."""
        label, equals, recipe = text.partition("=")
        return cls(label, recipe if equals else label)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model of a comparison: a recipe at a ratio or, by default, the dense model."""

    label: str = DENSE
    recipe: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    ratio: float = 0.0
    """Share of the blocks' parameters to remove, as requested."""
    ratio_blocks: float = 0.0
    """Share of the blocks' parameters removed or zeroed."""
    parameters: int
    """Parameters of the whole model after pruning, including zeros."""
    perplexity: float
    log_gap: float = 0.0
    """Log-perplexity minus that of the dense model."""
    seconds: float = 0.0
    """Seconds of pruning, over all processes that worked on it."""
    operations: int = 0
    """FLOPs of pruning."""
    forward_equivalents: float = 0.0
    """FLOPs of pruning, in dense forward passes over the calibration set."""
    peak_host_bytes: int | None = None
    """Peak bytes of the process that finished the pruning."""
    peak_device_bytes: int | None = None
    """Peak bytes on the device during pruning."""
    surveyed: bool = False
    """Whether an earlier row had taken the first survey, which costs and peaks then leave out."""
    out: str | None = None
    """Path of the checkpoint, if it was kept."""

    @property
    def more(self) -> str:
        """What follows costs in the table."""
        return " +" if self.surveyed else ""


@dataclass(frozen=True)
class Reached:
    """Ratio at which a recipe reaches a perplexity, by linear interpolation of log-perplexity over ratio."""

    label: str
    perplexity: float
    ratio: float | None
    """None outside the measured range."""
    text: str
    """The ratio or, outside the measured range, its bound."""


@dataclass(frozen=True)
class Comparison:
    """Result of `compare`."""

    model: str
    out: str
    protocol: str
    """How perplexity was measured."""
    settings: Mapping[str, Any]
    """Settings shared by all rows."""
    rows: tuple[Row, ...]
    """The dense model first, then every recipe at every ratio."""
    reached: tuple[Reached, ...]
    notes: tuple[str, ...]
    """Remarks for readers of the table."""

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON-ready data; None stands for infinity, which JSON lacks."""
        plain: dict[str, Any] = finite(asdict(self))
        return plain

    def cells(self) -> list[list[str]]:
        """Return the cells of the table, heading first."""
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
                f"{row.seconds:.1f}{row.more}",
                *(
                    "" if size is None else format_bytes(size) + row.more
                    for size in (row.peak_host_bytes, row.peak_device_bytes)
                ),
                f"{row.operations / 1e12:.3f}{row.more}",
                f"{row.forward_equivalents:.2f}{row.more}",
            ]
            for row in self.rows
        ]

    def reached_cells(self) -> list[list[str]]:
        """Return the table of ratios at which each recipe reaches the requested perplexities; empty without any."""
        lines: dict[str, list[str]] = {}
        for entry in self.reached:
            lines.setdefault(entry.label, [entry.label]).append(entry.text)
        asked = dict.fromkeys(entry.perplexity for entry in self.reached)
        return [["ratio at perplexity", *(f"{each:g}" for each in asked)], *lines.values()] if lines else []

    def write(self, folder: Path, *, plotted: bool) -> None:
        """Durably write the files of the table to a folder."""
        files.write_text(folder / JSON, json.dumps(self.as_dict(), indent=2) + "\n")
        files.write_text(folder / CSV, self._csv())
        files.write_text(folder / MARKDOWN, self._markdown())
        if plotted:
            with files.replacing_file(folder / PLOT) as temporary:
                plot(temporary, Path(self.model).name, self.rows)

    def _csv(self) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, [each.name for each in fields(Row)], lineterminator="\n")
        writer.writeheader()
        for row in self.as_dict()["rows"]:
            writer.writerow({**row, "settings": " ".join(f"{k}={v}" for k, v in row["settings"].items())})
        return text.getvalue()

    def _markdown(self) -> str:
        recipes = {row.label: row for row in self.rows if row.recipe is not None}
        lines = [
            f"- {label}: recipe `{row.recipe}`" + "".join(f", {name} = {value}" for name, value in row.settings.items())
            for label, row in recipes.items()
        ]
        parts = [
            f"# {Path(self.model).name}, pruned by {len(recipes)} recipes",
            *("\n".join(_pipes(table)) for table in (self.cells(), self.reached_cells()) if table),
            EXPLANATION,
            f"Perplexity: {self.protocol}.",
            "Settings: " + ", ".join(f"{name} {value}" for name, value in self.settings.items()) + ".",
            "\n".join(lines),
            *self.notes,
        ]
        return "\n\n".join(parts) + "\n"


def require_plotting() -> None:
    """Raise ConfigError unless matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("a plot needs matplotlib, which is not installed: pip install 'streamprune[plot]'")


def plot(path: Path, title: str, rows: Sequence[Row]) -> None:
    """Draw perplexity over the share removed, a line for each label, as a PNG file. `rows` starts with the dense model."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for label, line in _lines(rows).items():
        ratios, levels = zip(*line, strict=True)
        axes.plot(ratios, [math.exp(level) for level in levels], marker="o", label=label)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    axes.set_xlabel("share of the blocks' parameters removed")
    axes.set_ylabel("perplexity")
    axes.set_title(title)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    FigureCanvasAgg(figure).print_figure(path, format="png", dpi=150)


def reach(rows: Sequence[Row], perplexities: Sequence[float]) -> tuple[Reached, ...]:
    """Return the ratio at which every recipe reaches each perplexity. `rows` starts with the dense model."""
    found = []
    for label, line in _lines(rows).items():
        for perplexity in dict.fromkeys(perplexities):
            level = math.log(perplexity)
            ratio = ratio_at(line, level)
            outside = f">{line[-1][0]:.3g}" if level > line[0][1] else "<0"
            found.append(Reached(label, perplexity, ratio, outside if ratio is None else f"{ratio:.4f}"))
    return tuple(found)


def ratio_at(line: Sequence[tuple[float, float]], level: float) -> float | None:
    """Return the first ratio at which a line through points (ratio, log-perplexity) meets `level`, or None."""
    if line[0][1] == level:
        return line[0][0]
    for (left, low), (right, high) in pairwise(line):
        if min(low, high) <= level <= max(low, high) and low != high:
            return left + (level - low) / (high - low) * (right - left)
    return None


def _lines(rows: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
    """Return the points (share removed, log-perplexity) of each recipe, ascending, starting with the dense model."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows[1:]:
        lines.setdefault(row.label, []).append((row.ratio_blocks, math.log(row.perplexity)))
    return {label: [(0.0, math.log(rows[0].perplexity)), *sorted(points)] for label, points in lines.items()}


def _pipes(cells: list[list[str]]) -> list[str]:
    heading, *rows = (f"| {' | '.join(row)} |" for row in cells)
    return [heading, "|---" + "|--:" * (len(cells[0]) - 1) + "|", *rows]
