"""Kernels that a GPU would start for each expert of a mixture, per block and micro-batch of a whole job, counted on the CPU.

Tiny random mixtures (qwen3_moe) with 8 and 24 experts are pruned with 1 and with 4 micro-batches. What grows with the number of
experts and of micro-batches is counted, by operation and place; views and allocations are not. With --grouped, experts of one
width are multiplied at once, as on a GPU that has a kernel for it (`block.has_grouped_products`).

    python benchmarks/launches.py                        half a minute on 2 cores
    python benchmarks/launches.py --recipe sobp --grouped
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig

import streamprune
from streamprune.jobs.forecast import resources
from streamprune.maths import sums
from streamprune.model import block as model_block

ROOT = Path(__file__).parent.parent
PACKAGE = Path(streamprune.__file__).parent
EXPERTS, BLOCKS, SAMPLES, LENGTH = (8, 24), 2, 8, 64
BATCHES = (SAMPLES, SAMPLES // 4)
FREE = {"detach", "alias", "lift_fresh", "is_pinned", "unbind", "split", "split_with_sizes"}


class Launches(TorchDispatchMode):
    """Counts operations that compute something, by name and place in the package."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if not (func.is_view or name in FREE or "empty" in name):
            self.found[name, _place(sys._getframe(1))] += 1
        return func(*args, **(kwargs or {}))


def _place(frame: FrameType | None) -> str:
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if PACKAGE in path.parents and path.name != "flops.py":
            return f"{path.relative_to(PACKAGE)}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "?"


def mixture(out: Path, experts: int) -> None:
    """Write a random mixture with the example's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "docs-llama-7m")
    tokenizer.save_pretrained(out)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=experts,
        num_experts_per_tok=4,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(out)


def job(model: Path, out: Path, recipe: str, batch: int, *, grouped: bool) -> Counter[tuple[str, str]]:
    """Return what a whole job starts with `batch` windows per micro-batch."""
    text = ROOT / "examples" / "text" / "calibration.txt"
    config = streamprune.Config(
        model=model, out=out, recipe=recipe, ratio=0.3, calibration=text, samples=SAMPLES, seq_len=LENGTH, effort="low"
    )
    able = mock.patch.object(model_block, "has_grouped_products", return_value=grouped)
    sized = mock.patch.dict(resources.BATCH_TOKENS, {"cpu": batch * LENGTH})
    # The counter of operations would hide what it counts by itself.
    shown = mock.patch.object(sums, "counted", side_effect=lambda operations: nullcontext())
    with able, sized, shown, Launches() as launches:
        streamprune.prune(config)
    return launches.found


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--grouped", action="store_true", help="multiply the experts of one width at once")
    options = parser.parse_args()
    found: dict[tuple[int, int], Counter[tuple[str, str]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for experts in EXPERTS:
            mixture(folder / f"{experts}", experts)
            for batch in BATCHES:
                out = folder / f"{experts}-{batch}"
                found[experts, batch] = job(folder / f"{experts}", out, options.recipe, batch, grouped=options.grouped)
    few, many = EXPERTS
    more = (many - few) * (SAMPLES // BATCHES[1] - SAMPLES // BATCHES[0]) * BLOCKS
    rows = []
    for key in set().union(*found.values()):
        grown = (found[many, BATCHES[1]][key] - found[many, BATCHES[0]][key]) - (
            found[few, BATCHES[1]][key] - found[few, BATCHES[0]][key]
        )
        if grown:
            rows.append((grown / more, *key))
    print(f"{sum(count for count, *_ in rows):.1f} per expert, block and micro-batch")
    for count, name, place in sorted(rows, reverse=True):
        print(f"{count:8.2f} {name:24} {place}")


if __name__ == "__main__":
    main()
