"""Inference speed of pruned checkpoints in transformers: achieved and theoretical speed-up, prefill and decoding.

A random llama checkpoint of 320 million parameters is pruned by weight magnitude at several ratios and in both layouts.
Each result is timed against the dense checkpoint as in `streamprune bench`: alternating, median over rounds of the
ratio. The theoretical speed-up follows from the removed operations for prefill, and from the bytes no longer read for
decoding one sequence. The last table shows what other values of `--round-to` would give.

    python benchmarks/inference.py                         about 2 minutes on an idle core, 2.5 GB of temporary disk, 3 GB of memory
    python benchmarks/inference.py --threads 8 --prompt-tokens 1024 --repetitions 9
    python benchmarks/inference.py --device cuda --dtype bfloat16 --hidden 4096 --ffn 11008 --heads 32 --batch 1
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from make_checkpoint import Shape, make_checkpoint

import streamprune


def measure(dense: Path, out: Path, ratio: float, layout: Any, sizes: dict[str, Any]) -> dict[str, Any]:
    """Prune and time once."""
    streamprune.prune(streamprune.Config(model=dense, out=out, ratio=ratio, recipe="magnitude", layout=layout))
    timed = streamprune.bench(out, dense, **sizes)
    print(f"{ratio:.0%} {layout} done", file=sys.stderr, flush=True)
    return {"ratio": ratio, "layout": layout, **asdict(timed)}


def report(rows: list[dict[str, Any]], widths: list[streamprune.Width]) -> str:
    """Return both tables as text."""
    lines = ["ratio  layout   phase     dense t/s  pruned t/s  speed-up     rounds  fastest  allowed  achieved"]
    for row in rows:
        for phase, limit in (("prefill", "by_operations"), ("decode", "by_bytes")):
            gain = row[phase]
            spread = f"{min(gain['rounds']):.2f}–{max(gain['rounds']):.2f}"
            lines.append(
                f"{row['ratio']:5.0%}  {row['layout']:7}  {phase:7}  {row['against'][phase]['tokens_per_second']:10.1f}"
                f"{row['model'][phase]['tokens_per_second']:12.1f}{gain['median']:10.2f}  {spread:>10}{gain['fastest']:9.2f}"
                f"{gain[limit]:9.2f}{gain['achieved']:10.0%}"
            )
    lines += [f"({rows[0]['protocol']})", "", "FFN width  round-to            operations  prefill  decode"]
    for each in widths:
        given = ", ".join(map(str, each.round_to))
        name = f"{given} (its own)" if each.own else given
        lines.append(f"{each.width:9}  {name:20}{each.operations:10.3f}{each.prefill:9.3f}{each.decode:8.3f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.3, 0.5], help="default: 0.3 0.5")
    parser.add_argument("--layouts", nargs="+", default=["free", "uniform"], help="default: free uniform")
    parser.add_argument("--blocks", type=int, default=24, help="default: %(default)s")
    for name in ("hidden", "ffn", "heads"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Shape, name), help="default: %(default)s")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--new-tokens", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--repetitions", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--device", default="auto", help="default: %(default)s")
    parser.add_argument("--dtype", default="auto", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    sizes = {
        name: getattr(options, name) for name in ("prompt_tokens", "batch", "repetitions", "threads", "device", "dtype")
    }
    shape = Shape(
        blocks=options.blocks,
        hidden=options.hidden,
        ffn=options.ffn,
        heads=options.heads,
        kv_heads=options.heads,
        dtype="bfloat16",
    )
    with tempfile.TemporaryDirectory(prefix="streamprune-inference-") as temporary:
        folder = Path(temporary)
        dense = folder / "dense"
        make_checkpoint(dense, shape)
        rows = [
            measure(dense, folder / f"{layout}-{ratio}", ratio, layout, {**sizes, "new_tokens": options.new_tokens})
            for layout in options.layouts
            for ratio in options.ratios
        ]
        widths = streamprune.bench_widths(folder / f"{options.layouts[0]}-{options.ratios[0]}", **sizes)
    if options.json:
        print(json.dumps({"rows": rows, "widths": [asdict(each) for each in widths]}))
    else:
        print(report(rows, widths))


if __name__ == "__main__":
    main()
