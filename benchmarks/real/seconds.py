"""Where `streamprune run` spends its time on a CPU, and how many of transformers' own bfloat16 forward passes that is.

    python benchmarks/real OUT --rows default-low --ratios 0.3 --no-questions   # once: writes the model and its texts into OUT
    python benchmarks/real/seconds.py OUT --threads 1                           # half an hour on one core

Transformers' forward passes over the calibration windows, one at a time, are timed before and after the run, in both dtypes. The run is
profiled by function, and torch's operations by name and by the kind that they are counted as: cProfile does not see them, since jobs
count them inside torch's dispatch. Grams and greedy steps, which are counted as a whole, show by function. A function's own seconds are
without those of the functions it calls. Target: without refinement, fewer than 8 forward passes in bfloat16.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import streamprune
from streamprune.maths import flops
from streamprune.maths.flops import FlopCounter
from streamprune.model.tokenizer import load_tokenizer
from streamprune.text.source import Text
from streamprune.text.windows import sample

STAGES = {
    "check of the weights": ("sweep.py", "check_weights"),
    "survey and allocation": ("run.py", "_plan"),
    "- survey": ("survey.py", "survey"),
    "prune sweep": ("run.py", "_prune_blocks"),
    "- sites solved": ("block.py", "_solve"),
    "- refinement": ("refine.py", "refine"),
    "writing": ("run.py", "_write"),
}
"""Stages by the file and the function that hold them; a dash: part of the one above."""


def forward(model: Path, windows: torch.Tensor, dtype: torch.dtype) -> float:
    """Return the seconds of transformers' forward pass over windows (samples, length) int64, one after another."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    with torch.inference_mode():
        loaded(windows[:1], use_cache=False)
        started = time.perf_counter()
        for window in windows:
            loaded(window[None], use_cache=False)
    return time.perf_counter() - started


@contextmanager
def timed_operations() -> Iterator[Counter[tuple[str, str]]]:
    """Add up the seconds of torch's operations by kind and name."""
    found, real = Counter[tuple[str, str]](), FlopCounter.__torch_dispatch__

    def dispatch(self: FlopCounter, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        started = time.perf_counter()
        result = real(self, func, types, args, kwargs)
        found[flops._kinds[-1], str(func.overloadpacket)] += time.perf_counter() - started  # type: ignore[assignment]
        return result

    with mock.patch.object(FlopCounter, "__torch_dispatch__", dispatch):
        yield found


def table(profile: cProfile.Profile, operations: Mapping[tuple[str, str], float], seconds: float, lines: int) -> str:
    """Return the seconds of stages, then those of the operations and of the functions that take most by themselves."""
    stats: dict[tuple[str, int, str], tuple[int, int, float, float, object]] = vars(pstats.Stats(profile))["stats"]
    rows = ["| stage | s | share |", "|---|--:|--:|"]
    for stage, (file, name) in STAGES.items():
        spent = sum(
            each[3]
            for (path, _, function), each in stats.items()
            if function == name and Path(path).name == file and "streamprune" in Path(path).parts
        )
        rows.append(f"| {stage} | {spent:.0f} | {spent / seconds:.0%} |")
    rows += ["", "| kind | operation | s | share |", "|---|---|--:|--:|"]
    for (kind, name), spent in sorted(operations.items(), key=lambda item: -item[1])[:lines]:
        rows.append(f"| {kind} | `{name}` | {spent:.1f} | {spent / seconds:.1%} |")
    rows.append(f"| | all operations | {sum(operations.values()):.0f} | {sum(operations.values()) / seconds:.0%} |")
    rows += ["", "| function | calls | own s | share |", "|---|--:|--:|--:|"]
    for (path, _, function), each in sorted(stats.items(), key=lambda item: -item[1][2])[:lines]:
        name = function if path == "~" else f"{Path(path).name}: {function}"
        rows.append(f"| `{name}` | {each[1]:,} | {each[2]:.1f} | {each[2] / seconds:.1%} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="OUT of `python benchmarks/real`")
    parser.add_argument("--ratio", type=float, default=0.3, help="default: %(default)s")
    parser.add_argument("--effort", default="low", help="default: %(default)s")
    parser.add_argument("--dtype", default="float32", help="of the run; default: %(default)s")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows; default: %(default)s")
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens of a window; default: %(default)s")
    parser.add_argument("--threads", type=int, help="default: torch's own number")
    parser.add_argument("--lines", type=int, default=16, help="functions shown; default: %(default)s")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    model, calibration = options.folder / "model", options.folder / "calibration.txt"
    vocabulary = AutoConfig.from_pretrained(model).vocab_size
    windows = sample(
        load_tokenizer(model), Text.of(str(calibration)), vocabulary, options.samples, options.seq_len, 0
    ).tokens
    timed = {dtype: [forward(model, windows, dtype)] for dtype in (torch.bfloat16, torch.float32)}
    profile = cProfile.Profile()
    with tempfile.TemporaryDirectory(prefix="streamprune-benchmark-") as folder:
        config = streamprune.Config(
            model=model,
            out=Path(folder) / "out",
            ratio=options.ratio,
            effort=options.effort,
            dtype=options.dtype,
            calibration=calibration,
            samples=options.samples,
            seq_len=options.seq_len,
        )
        started = time.perf_counter()
        with timed_operations() as operations:
            profile.runcall(streamprune.prune, config)
        seconds = time.perf_counter() - started
    for dtype, found in timed.items():
        found.append(forward(model, windows, dtype))
    print(table(profile, operations, seconds, options.lines))
    print(f"\nrun: {seconds:.0f} s, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for dtype, found in timed.items():
        mean = sum(found) / len(found)
        name, times = str(dtype).removeprefix("torch."), " and ".join(f"{each:.0f}" for each in found)
        print(f"transformers' forward pass in {name}: {times} s; the run takes {seconds / mean:.1f} of them")


if __name__ == "__main__":
    main()
