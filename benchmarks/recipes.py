"""Seconds and peak memory of `streamprune run`, compared with a plain in-memory implementation of the same recipe.

The plain implementation is tests/plain.py: the whole model in transformers, statistics by hooks and autograd, the prune
sweep with both streams in memory, the textbook loops. tests/recipes/test_plain.py checks that both give the same result
in float64. Here both compute in float32 with micro-batches of 1024 tokens and write their result, each in its own
process, one after the other. Seconds are from opening the checkpoint to the written result, without imports. Memory is
the peak above what each process holds before any work (interpreter, libraries, the model without weights); for the
streamed one, that of `streamprune inspect`. Perplexities differ by rounding; for `random`, by the random draw.

There are two models: examples/docs-llama-7m on its texts, and a random llama of 160 million parameters (width 768, FFN
3072, 12 blocks, vocabulary 32000) on random text, whose perplexity only shows whether both implementations agree.

    python benchmarks/recipes.py                     on 2 idle cores about 10 minutes for the first model and 20 for the second
    python benchmarks/recipes.py --only 7m --recipes slimgpt,magnitude --json
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memory import HERE, child, measured

ROOT = HERE.parent
EXAMPLES = ROOT / "examples"
SETTINGS: Mapping[str, tuple[str, ...]] = {
    "default": ("--effort", "low", "--set", "fit_damping=0.01", "--set", "sublayers=off"),  # as tests/plain.py
    "sobp": (),
    "slimgpt": (),
    "greedy-output": (),
    "surgeon": ("--set", "shots=1"),
    "wanda-sp": (),
    "magnitude": (),
    "random": (),
}
SHAPE = {"blocks": 12, "hidden": 768, "ffn": 3072, "heads": 12, "kv-heads": 12, "head-dim": 64, "vocabulary": 32000}
MODELS = ("7m", "160m")


def measure(folder: Path, model: Path, recipe: str, job: list[str], text: Path, seq_len: int) -> dict[str, Any]:
    """Measure one recipe on one model, streamed and in memory."""
    out, weights = folder / "out", folder / "plain.safetensors"
    rounded = ["--round-to", "8"]  # as tests/plain.py
    pruned, _ = measured("run", model, out, "--recipe", recipe, *SETTINGS[recipe], *job, *rounded, "--device", "cpu")
    scored, _ = measured("eval", out, "--text", text, "--seq-len", seq_len, "--device", "cpu")
    plain, _ = child(ROOT / "tests" / "plain.py", model, weights, "--recipe", recipe, *job, "--text", text)
    shutil.rmtree(out)
    weights.unlink()
    row = {
        "recipe": recipe,
        "streamed": {
            "seconds": pruned["seconds"],
            "peak_host_bytes": pruned["peak_host_bytes"],
            "perplexity": scored["perplexity"],
        },
        "in_memory": plain,
        "forward_equivalents": pruned["forward_equivalents"],
    }
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def compare(folder: Path, name: str, recipes: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Measure all recipes on one model."""
    if name == "7m":
        model, text, calibration = (
            EXAMPLES / place for place in ("docs-llama-7m", "text/validation.txt", "text/calibration.txt")
        )
    else:
        model, text = folder / "model", folder / "text.txt"
        calibration = text
        shape = [word for option, value in SHAPE.items() for word in (f"--{option}", str(value))]
        tokens = str(options.samples * options.seq_len)
        writer = [HERE / "make_checkpoint.py", model, *shape, "--text", text, "--tokens", tokens]
        subprocess.run([sys.executable, *map(str, writer)], check=True, stdout=subprocess.DEVNULL)
    job = [
        "--ratio",
        options.ratio,
        "--calibration",
        calibration,
        "--samples",
        options.samples,
        "--seq-len",
        options.seq_len,
    ]
    _, base = measured("inspect", model)
    words = [str(word) for word in job]
    rows = [measure(folder, model, recipe, words, text, options.seq_len) for recipe in recipes]
    for row in rows:
        streamed, plain = row["streamed"], row["in_memory"]
        row["seconds_ratio"] = streamed["seconds"] / plain["seconds"]
        streamed["base_bytes"] = base
        row["memory_ratio"] = above_base(streamed) / above_base(plain)
    weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    return {"model": name, "weights_bytes": weights, "rows": rows}


def above_base(side: dict[str, Any]) -> int:
    """Return the peak above the base, in bytes."""
    return int(side["peak_host_bytes"] - side["base_bytes"])


def report(found: dict[str, Any], options: argparse.Namespace) -> str:
    """Return the table as text."""
    lines = [
        f"{found['model']}: {found['weights_bytes'] / 2**20:.0f} MiB of weights, {options.ratio:.0%} removed, {options.samples} × "
        f"{options.seq_len} tokens",
        "",
        "| recipe | s, streamed | s, in memory | ratio | MiB, streamed | MiB, in memory | ratio | perplexity | in memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        each = [row["streamed"], row["in_memory"]]
        cells = [row["recipe"], *(f"{side['seconds']:.1f}" for side in each), f"{row['seconds_ratio']:.2f}"]
        cells += [*(f"{above_base(side) / 2**20:.0f}" for side in each), f"{row['memory_ratio']:.2f}"]
        cells += [f"{side['perplexity']:.2f}" for side in each]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default=",".join(SETTINGS), metavar="A,B,...", help="default: all")
    parser.add_argument("--only", choices=MODELS, help="one of the models; default: both")
    parser.add_argument("--ratio", type=float, default=0.3, help="default: %(default)s")
    parser.add_argument("--samples", type=int, default=16, help="windows; default: %(default)s")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens per window; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    recipes = options.recipes.split(",")
    if unknown := set(recipes) - set(SETTINGS):
        parser.error(f"--recipes: there is no {', '.join(sorted(unknown))}; there are {', '.join(SETTINGS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that the temporary folder is removed
    found = []
    for name in [options.only] if options.only else MODELS:
        with tempfile.TemporaryDirectory(prefix="streamprune-recipes-") as folder:
            found.append(compare(Path(folder), name, recipes, options))
    if options.json:
        print(
            json.dumps(
                {"ratio": options.ratio, "samples": options.samples, "seq_len": options.seq_len, "models": found}
            )
        )
    else:
        print("\n\n".join(report(each, options) for each in found))


if __name__ == "__main__":
    main()
