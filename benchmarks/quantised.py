"""What pruning buys beside quantisation alone: bytes and perplexity of GGUF files, of a dense model and of pruned results.

Every file is written by `streamprune export` and measured in llama.cpp itself (the xllamacpp wheel), over the first windows of a
text. A row is marked if a dense file is no larger and no worse: there, quantisation alone wins.

    python benchmarks/quantised.py DENSE PRUNED ... --text test.txt --imatrix-text calibration.txt
    python benchmarks/quantised.py DENSE PRUNED --text test.txt --formats q8_0,q4_k_m --windows 8 --json

A format with ``+i`` uses the importance of columns over the imatrix text. Some 30 seconds a file for a model of 135 million
parameters, 24 windows and one thread, and the time of `eval` over the imatrix text for ``+i``.

Needs `pip install 'streamprune[llama]'`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from runtime import perplexity

import streamprune
from streamprune.commands.evaluate import read_windows
from streamprune.model.skeleton import open_skeleton
from streamprune.text.source import source

FORMATS = "q8_0,q6_k,q5_k_m,q4_k_m,q4_k_m+i,q4_0+i,q3_k_m+i"


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row per file, from the largest to the smallest."""
    torch.set_num_threads(options.threads)
    skeleton = open_skeleton(options.models[0], torch.device("cpu"), "float32")
    windows = read_windows(skeleton, source(options.text), options.seq_len)[0].tokens[: options.windows]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "model.gguf"
        for model in options.models:
            for format in options.formats.split(","):
                dtype, _, weighted = format.partition("+")
                given = {"imatrix_text": options.imatrix_text} if weighted else {}
                done = streamprune.export_gguf(model, file, dtype=dtype, **given)
                row = {"model": model.name, "dense": model == options.models[0], "format": format, "bytes": done.size}
                row |= {"parameters": done.parameters, "perplexity": perplexity(file, windows, options.threads)}
                rows.append(row)
                if options.json:
                    print(json.dumps(row), flush=True)
    dense = [row for row in rows if row["dense"]]
    for row in rows:
        better = [each for each in dense if each["bytes"] <= row["bytes"] and each["perplexity"] <= row["perplexity"]]
        row["beaten"] = not row["dense"] and bool(better)
    return sorted(rows, key=lambda row: -row["bytes"])


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, help="the dense model, then pruned ones")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--imatrix-text", type=Path)
    parser.add_argument("--formats", default=FORMATS)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if "+i" in options.formats and options.imatrix_text is None:
        parser.error("+i needs --imatrix-text")
    rows = measure(options)
    if options.json:
        return
    print("| file | MB | perplexity | |\n|---|--:|--:|---|")
    for row in rows:
        name = f"{row['model']}, {row['format'].replace('+i', ' with imatrix')}"
        note = "a dense file is no larger and no worse" if row["beaten"] else ""
        print(f"| {name} | {row['bytes'] / 1e6:.1f} | {row['perplexity']:.2f} | {note} |")


if __name__ == "__main__":
    main()
