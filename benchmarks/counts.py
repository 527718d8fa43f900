"""Operations of each recipe, counted and (without solving) forecast, in dense forward passes per shot.

    python benchmarks/counts.py                                 the table of docs/methods.md, some minutes on two cores
    python benchmarks/counts.py --recipes sobp,default --json

Counts do not depend on time: every machine gives the same figures.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import streamprune

MODEL = Path(__file__).parent.parent / "examples" / "docs-llama-7m"
VARIANTS: dict[str, tuple[str, dict[str, str]]] = {
    "default": ("default", {}),
    "default, `weighted=off`": ("default", {"weighted": "off"}),
    "sobp": ("sobp", {}),
    "slimgpt": ("slimgpt", {}),
    "greedy-output": ("greedy-output", {}),
    "surgeon": ("surgeon", {"shots": "2"}),
    "surgeon, `structure=unstructured`": ("surgeon", {"shots": "1", "structure": "unstructured"}),
    "wanda-sp": ("wanda-sp", {}),
    "magnitude, random": ("magnitude", {}),
}


def count(recipe: str, settings: dict[str, str], options: argparse.Namespace) -> dict[str, Any]:
    """Return operations by kind, counted and forecast, in dense forward passes per shot."""
    with tempfile.TemporaryDirectory() as folder:
        config = streamprune.Config(
            model=options.model,
            out=Path(folder) / "out",
            ratio=options.ratio,
            recipe=recipe,
            settings=settings,
            effort="low",
            samples=options.samples,
            seq_len=options.seq_len,
            calibration=options.calibration,
        )
        expected = streamprune.forecast_job(config)
        result = streamprune.prune(config)
        shots = json.loads((config.out / "report.json").read_text())["shots"]
    a_pass = result.operations / result.forward_equivalents * shots if result.operations else 1.0
    return {
        "shots": shots,
        "counted": {kind: count / a_pass for kind, count in result.operations_by_kind.items()},
        "forecast": {kind: count / a_pass for kind, count in expected.operations_by_kind.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--calibration", type=Path, default=None, help="text file; the built-in sample if not given")
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--recipes", default="", help="only these, separated by commas")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    only = [name for name in options.recipes.split(",") if name]
    rows = {
        name: count(recipe, settings, options)
        for name, (recipe, settings) in VARIANTS.items()
        if not only or recipe in only
    }
    if options.json:
        print(json.dumps(rows))
        return
    print("| recipe | shots | sweeps | sums | solving |\n|---|--:|--:|--:|--:|")
    for name, row in rows.items():
        cells = [f"{row['counted'][kind]:.2f} ({row['forecast'][kind]:.2f})" for kind in ("sweeps", "sums")]
        print(f"| {name} | {row['shots']} | {' | '.join(cells)} | {row['counted']['solving']:.2f} |")


if __name__ == "__main__":
    main()
