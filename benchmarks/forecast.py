"""Compare the memory forecast of `streamprune plan` with the measured peak, for each recipe and under a tight limit.

The model is a random llama whose blocks are large compared with the interpreter (an FFN Gram of 256 MiB). Every command
runs in its own process. "comfortable" is without --memory. "limited" uses the least that `plan` accepts, to within
two percent above it, so that micro-batches have one sequence. Targets: forecast / measured from 0.9 to 1.1, and the limit never
exceeded.

    python benchmarks/forecast.py             about 10 minutes on 2 cores
    python benchmarks/forecast.py --json --recipes slimgpt sobp
    python benchmarks/forecast.py --device cuda     the GPU's memory: what tensors took, as torch counts it
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from memory import measured

HERE = Path(__file__).parent
RECIPES = ["default", "sobp", "slimgpt", "greedy-output", "surgeon", "wanda-sp", "magnitude"]
SETTINGS = {"surgeon": ["--set", "shots=1"]}
LOW, HIGH = 0.9, 1.1


def planned(*words: object) -> dict[str, Any]:
    """Return the JSON of `streamprune plan`; its exit code 1 means that the job does not fit."""
    command = [sys.executable, "-m", "streamprune_cli", "plan", *map(str, words), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode > 1:
        sys.exit(done.stderr)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def row(model: Path, out: Path, recipe: str, part: str, options: list[object], device: str) -> dict[str, Any]:
    """Forecast and run one job."""
    forecast = planned(model, *options)
    done, _ = measured("run", model, out, *options)
    shutil.rmtree(out)
    kind = "host" if device == "cpu" else "device"
    held, told = done[f"peak_{kind}_bytes"], forecast[f"{kind}_bytes"]
    return {
        "recipe": recipe,
        "part": part,
        "forecast_bytes": told,
        "measured_bytes": held,
        "ratio": told / held,
        "limit_bytes": forecast["device_limit"] if part == "limited" else None,
        "batch": forecast["batch"],
        "backward_batch": forecast["backward_batch"],
        "grams": forecast["grams"],
        "seconds": done["seconds"],
        "met": LOW <= told / held <= HIGH and (part != "limited" or held <= forecast["device_limit"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=RECIPES, metavar="NAME", help="default: all but random")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--ffn", type=int, default=8192)
    parser.add_argument("--dtype", default="bfloat16", help="of the computation; default: %(default)s")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of the table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="streamprune-forecast-") as name:
        folder = Path(name)
        model, text = folder / "model", folder / "text.txt"
        shape = ("--blocks", 1, "--hidden", options.hidden, "--ffn", options.ffn, "--dtype", "bfloat16")
        shape = (*shape, "--heads", options.hidden // 128, "--kv-heads", options.hidden // 128, "--vocabulary", 2048)
        tokens = ("--text", text, "--tokens", options.samples * options.seq_len)
        writer = [sys.executable, str(HERE / "make_checkpoint.py"), str(model), *map(str, (*shape, *tokens))]
        subprocess.run(writer, check=True, stdout=subprocess.DEVNULL)
        sizes = ("--samples", options.samples, "--seq-len", options.seq_len)

        def job(recipe: str) -> list[object]:
            asked: list[object] = ["--ratio", 0.3, "--recipe", recipe, "--calibration", text, *sizes]
            return [*asked, "--dtype", options.dtype, "--device", options.device, *SETTINGS.get(recipe, [])]

        rows = []
        for recipe in options.recipes:
            rows.append(row(model, folder / "out", recipe, "comfortable", job(recipe), options.device))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        recipe = options.recipes[0]
        low, high = 0, 2 * rows[0]["forecast_bytes"] + (2 << 30)
        while high - low > high // 128:  # each step starts a process
            middle = (low + high) // 2
            low, high = (low, middle) if planned(model, *job(recipe), "--memory", middle)["fits"] else (middle, high)
        limit = int(1.01 * high)
        if not planned(model, *job(recipe), "--memory", limit)["fits"]:
            sys.exit(f"{recipe} fits no limit up to {limit:,} bytes")
        rows.append(row(model, folder / "out", recipe, "limited", [*job(recipe), "--memory", limit], options.device))
    if options.json:
        print(json.dumps({"rows": rows, "target": [LOW, HIGH], "met": all(each["met"] for each in rows)}))
        return
    print(f"{'recipe':16}{'':14}{'forecast':>10}{'measured':>10}{'ratio':>8}{'limit':>9}  micro-batches, Grams (MiB)")
    for each in rows:
        limit = f"{each['limit_bytes'] / 2**20:9.0f}" if each["limit_bytes"] else " " * 9
        print(
            f"{each['recipe']:16}{each['part']:14}{each['forecast_bytes'] / 2**20:10.0f}{each['measured_bytes'] / 2**20:10.0f}"
            f"{each['ratio']:8.3f}{limit}  {each['batch']}, {each['backward_batch']}, {each['grams']}"
            + ("" if each["met"] else "  MISSED")
        )


if __name__ == "__main__":
    main()
