"""Prune and evaluate once: what the quality benchmarks share."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import streamprune

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Protocol:
    """Model, texts and sizes that all rows of a table share."""

    model: Path
    calibration: Path
    validation: Path
    samples: int
    seq_len: int

    def perplexity(self, path: Path) -> float:
        """Return the perplexity on the validation text."""
        return streamprune.evaluate(path, self.validation, seq_len=self.seq_len).perplexity

    def measure(
        self, recipe: str, ratio: float | None, settings: dict[str, str] | None = None, **changes: Any
    ) -> dict[str, Any]:
        """Prune into a temporary folder and evaluate the result, without refinement; `changes` are additional fields of `Config`."""
        with tempfile.TemporaryDirectory(prefix="streamprune-benchmark-") as folder:
            config = streamprune.Config(
                model=self.model,
                out=Path(folder) / "out",
                ratio=ratio,
                recipe=recipe,
                settings=settings or {},
                calibration=self.calibration,
                samples=self.samples,
                seq_len=self.seq_len,
                **{"effort": "low", **changes},
            )
            result = streamprune.prune(config)
            row = {
                "recipe": recipe,
                "settings": settings or {},
                **changes,
                "ratio": ratio,
                "ratio_blocks": result.ratio_blocks,
                "perplexity": self.perplexity(config.out),
                "seconds": result.seconds,
            }
        print(json.dumps(row), file=sys.stderr, flush=True)
        return row


def arguments(description: str) -> argparse.ArgumentParser:
    """Return a parser with the protocol's options; the defaults are the bundled example model and its text."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "docs-llama-7m")
    parser.add_argument("--calibration", type=Path, default=ROOT / "examples" / "text" / "calibration.txt")
    parser.add_argument("--validation", type=Path, default=ROOT / "examples" / "text" / "validation.txt")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of the table")
    return parser


def protocol(options: argparse.Namespace) -> Protocol:
    """Return the protocol that the options select."""
    return Protocol(options.model, options.calibration, options.validation, options.samples, options.seq_len)
