"""A paper's table, with what is measured here beside what was published. See README.md in this folder.

python benchmarks/papers/run.py surgeon --as OPT-125m --model opt-125m --calibration train.txt --text test.txt
    --commands   only prints what it would run
    --as any     takes the same ratios and settings for a model that no paper has
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from streamprune_cli import options, show

import streamprune
from streamprune.errors import ConfigError

HERE = Path(__file__).parent
TABLES = sorted(path.stem for path in HERE.glob("*.json"))
ANY = "any"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One cell of a paper's table: a model, pruned by a recipe at a ratio."""

    model: str
    layers: int
    """Blocks of that model."""
    dense: float | None
    """Perplexity before, as published."""
    label: str
    recipe: str
    settings: Mapping[str, str]
    ratio: float
    ratio_of: str
    blocks: tuple[int, int] | None = None
    calibration: str
    """What the paper calibrated on; ``self`` for tokens that the model writes."""
    samples: int
    seq_len: int
    eval_seq_len: int
    published: float | None
    """Perplexity after; None where the project has no figure."""
    source: str

    @property
    def folder(self) -> str:
        """Rows of one folder have everything but recipe and ratio in common."""
        window = "" if self.blocks is None else "-{}-{}".format(*self.blocks)
        written = "-self" if self.calibration == "self" else ""
        return f"{self.samples}x{self.seq_len}{written}-{self.ratio_of}{window}-{self.eval_seq_len}"

    def common(self, calibration: Path) -> dict[str, Any]:
        """Fields of `Config` that all rows of the folder share."""
        return {
            "calibration": "self" if self.calibration == "self" else calibration,
            "samples": self.samples,
            "seq_len": self.seq_len,
            "ratio_of": self.ratio_of,
            "blocks": self.blocks,
        }

    def commands(self, model: Path, calibration: Path, text: Path, out: Path) -> list[list[str]]:
        """The row's `run` and `eval`, as arguments."""
        common = self.common(calibration)
        result = str(out / f"{self.label}-{self.ratio:g}")
        run = ["streamprune", "run", str(model), result, "--ratio", f"{self.ratio:g}", "--recipe", self.recipe]
        for name, value in self.settings.items():
            run += ["--set", f"{name}={value}"]
        run += [
            "--calibration",
            str(common["calibration"]),
            "--samples",
            f"{self.samples}",
            "--seq-len",
            f"{self.seq_len}",
        ]
        run += ["--ratio-of", self.ratio_of]
        if self.blocks is not None:
            run += ["--blocks", "{}:{}".format(*self.blocks)]
        return [run, ["streamprune", "eval", result, "--text", str(text), "--seq-len", f"{self.eval_seq_len}"]]


@dataclass(frozen=True)
class Table:
    """One protocol's rows."""

    title: str
    models: tuple[str, ...]
    rows: tuple[Row, ...] = field(repr=False)

    @classmethod
    def read(cls, name: str) -> Table:
        """By the name of its data file."""
        data = json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))
        rows = []
        for entry in data["series"]:
            series = {**data["defaults"], **entry}
            if "blocks" in series:
                series["blocks"] = tuple(series["blocks"])
            for model, figures in series.pop("published").items():
                for ratio, figure in figures.items():
                    own = {**series, **data["models"][model]}
                    rows.append(Row(model=model, ratio=float(ratio), published=figure, **own))
        return cls(data["title"], tuple(data["models"]), tuple(rows))


def chosen(table: Table, asked: argparse.Namespace) -> list[Row]:
    """The rows asked for.

    Raises:
        ConfigError: there are none.
    """
    name = table.models[0] if asked.as_model == ANY else asked.as_model
    rows = [row for row in table.rows if row.model == name]
    labels, ratios = list(dict.fromkeys(row.label for row in rows)), sorted({row.ratio for row in rows})
    found = [
        row
        for row in rows
        if (asked.only is None or row.label in asked.only) and (asked.ratios is None or row.ratio in asked.ratios)
    ]
    if not found:
        raise ConfigError(
            f"no row of {name} is asked for; it has {', '.join(labels)} at {', '.join(f'{ratio:g}' for ratio in ratios)}"
        )
    return [adapted(row, asked.model) for row in found] if asked.as_model == ANY else found


def adapted(row: Row, model: Path) -> Row:
    """The row for another model: no figures, windows within its context, the same share of its depth."""
    inside = streamprune.inspect(model)["model"]
    depth, context = len(inside["blocks"]), inside["context"] or row.seq_len
    blocks = None
    if row.blocks is not None:
        start, stop = (round(edge * depth / row.layers) for edge in row.blocks)
        blocks = start, max(stop, start + 1)
    return replace(
        row,
        model=str(model),
        layers=depth,
        dense=None,
        published=None,
        blocks=blocks,
        seq_len=min(row.seq_len, context),
        eval_seq_len=min(row.eval_seq_len, context),
    )


def measured(rows: Sequence[Row], model: Path, calibration: Path, text: Path, out: Path) -> list[dict[str, Any]]:
    """Every row as `entry` has it; an interrupted table goes on where it stopped."""
    ratios: dict[tuple[str, str], tuple[float, ...]] = {}
    for row in rows:
        ratios[row.folder, row.label] = (*ratios.get((row.folder, row.label), ()), row.ratio)
    # Recipes with the same ratios go into one comparison, whose rows share their surveys.
    together: dict[tuple[str, tuple[float, ...]], dict[str, Row]] = {}
    for row in rows:
        together.setdefault((row.folder, ratios[row.folder, row.label]), {})[row.label] = row
    found: dict[tuple[str, str, float], tuple[float, Any]] = {}
    for (folder, shared), recipes in together.items():
        first = next(iter(recipes.values()))
        with show.progress(quiet=False) as progress:
            comparison = streamprune.compare(
                model,
                ratios=shared,
                recipes=[streamprune.Variant(row.label, row.recipe, row.settings) for row in recipes.values()],
                text=text,
                out=out / folder,
                eval_seq_len=first.eval_seq_len,
                progress=progress,
                **first.common(calibration),
            )
        dense, *pruned = comparison.rows
        found |= {(folder, line.label, line.ratio): (dense.perplexity, line) for line in pruned}
    return [entry(row, *found[row.folder, row.label, row.ratio]) for row in rows]


def entry(row: Row, dense: float, line: Any) -> dict[str, Any]:
    """Published and measured; gaps are of log-perplexity over the dense model.

    Args:
        dense: perplexity measured before pruning.
        line: the row of the comparison.
    """
    published_gap = math.log(row.published / row.dense) if row.published and row.dense else None
    return {
        "recipe": row.label,
        "ratio": row.ratio,
        "ratio of": row.ratio_of,
        "removed": line.ratio_blocks,
        "published dense": row.dense,
        "dense": dense,
        "published": row.published,
        "measured": line.perplexity,
        "published gap": published_gap,
        "gap": line.log_gap,
        "difference": None if published_gap is None else line.log_gap - published_gap,
        "settings": dict(row.settings),
        "source": row.source,
    }


def finite(entry: Mapping[str, Any]) -> dict[str, Any]:
    """For JSON, which has no infinity: None stands for it."""
    return {name: None if value in (math.inf, -math.inf) else value for name, value in entry.items()}


HEADINGS = ["recipe", "ratio", "ratio of", "removed"]
PAPER = ["published dense", "dense", "published", "measured", "published gap", "gap", "difference"]
ALONE = ["dense", "measured", "gap"]
FORMS = {"ratio": "g", "removed": ".4f", "published gap": ".4f", "gap": ".4f", "difference": "+.4f"}


def cells(entries: Sequence[Mapping[str, Any]], headings: Sequence[str]) -> list[list[str]]:
    """A table of them, its heading first."""

    def cell(name: str, value: Any) -> str:
        if value is None:
            return "–"
        return value if isinstance(value, str) else format(value, FORMS.get(name, ".2f"))

    return [list(headings)] + [[cell(name, entry[name]) for name in headings] for entry in entries]


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("table", choices=TABLES)
    parser.add_argument(
        "--as", dest="as_model", required=True, metavar="MODEL", help=f"which of the table's models this is, or {ANY}"
    )
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory")
    parser.add_argument("--calibration", type=Path, required=True, help="text to calibrate on")
    parser.add_argument("--text", type=Path, required=True, help="text to measure perplexity on")
    parser.add_argument("--only", type=lambda text: text.split(","), metavar="LABEL,…", help="these recipes' rows")
    parser.add_argument("--ratios", type=lambda text: [float(part) for part in text.split(",")], metavar="R,…")
    parser.add_argument("--out", type=Path, help="folder for the work (default: TABLE-MODEL, here)")
    parser.add_argument("--commands", action="store_true", help="print the rows' commands and do nothing")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of the table")
    return parser


def main(given: Sequence[str] | None = None) -> None:
    parser = arguments()
    asked = parser.parse_args(given)
    table = Table.read(asked.table)
    if asked.as_model not in (*table.models, ANY):
        parser.error(f"--as {asked.as_model}: table {asked.table} has {', '.join(table.models)}; others are {ANY}")
    out = asked.out or Path(f"{asked.table}-{asked.model.name if asked.as_model == ANY else asked.as_model}")
    try:
        rows = chosen(table, asked)
        if asked.commands:
            for row in rows:
                figures = "" if row.published is None else f": {row.published:g}, dense {row.dense:g}"
                print(f"# {row.source}{figures}" if asked.as_model != ANY else f"# {row.label} at {row.ratio:g}")
                for command in row.commands(asked.model, asked.calibration, asked.text, out):
                    print(shlex.join(command))
            return
        options.begin()
        entries = measured(rows, asked.model, asked.calibration, asked.text, out)
    except streamprune.StreamPruneError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    known = asked.as_model != ANY
    show.result(
        {"table": asked.table, "model": asked.as_model, "rows": [finite(entry) for entry in entries]},
        asked.json,
        [
            table.title if known else f"{asked.model}, by the rows of: {table.title}",
            "",
            *show.table(cells(entries, HEADINGS + (PAPER if known else ALONE))),
        ],
    )


if __name__ == "__main__":
    main()
