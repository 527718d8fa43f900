"""Peak memory against depth: `streamprune run` and `streamprune eval` on a shallow and a deep checkpoint.

Random llama checkpoints of equal blocks, 8 and 32 of them, each block at least 50 MB. Every command runs in its own
process. The peak of `run` is the one in its --json output (it resets the kernel's high-water mark at every step, to
measure each block separately); the peak of `eval` is the kernel's figure when the process ends. "above start" subtracts
what `streamprune inspect` holds (interpreter, libraries, the model without weights), which would make the ratio look
better. Target: deeper / shallower at most 1.05.

    python benchmarks/memory.py            about 6 minutes on 2 cores, 4 GB of temporary disk
    python benchmarks/memory.py --json
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TARGET = 1.05
HERE = Path(__file__).parent

# No torch in this process: Linux keeps the peak of a process across exec, so a child would start with the
# parent's peak.


def measured(*words: object) -> tuple[dict[str, Any], int]:
    """Run a streamprune command; return its --json object and the peak memory of its process in bytes."""
    return child("-m", "streamprune_cli", *words, "--json")


def child(*words: object) -> tuple[dict[str, Any], int]:
    """Run Python with these arguments; return the JSON object it prints and its peak memory in bytes."""
    command = [sys.executable, *map(str, words)]
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=output, stderr=errors)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            sys.exit(f"{' '.join(command)}: exit {process.returncode}\n{errors.read().decode()}")
        return json.loads(output.read()), usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(folder: Path, blocks: int, options: argparse.Namespace) -> dict[str, Any]:
    """Make a checkpoint of this depth, prune, evaluate and remove it; return its figures."""
    model, out, text = folder / f"model-{blocks}", folder / f"out-{blocks}", folder / "text.txt"
    shape = ("--blocks", blocks, "--hidden", options.hidden, "--ffn", options.ffn, "--dtype", options.dtype)
    tokens = options.samples * options.seq_len
    writer = [HERE / "make_checkpoint.py", model, *shape, "--text", text, "--tokens", tokens]
    subprocess.run([sys.executable, *map(str, writer)], check=True, stdout=subprocess.DEVNULL)
    weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))

    _, start = measured("inspect", model)
    job = ("--samples", options.samples, "--seq-len", options.seq_len, "--calibration", text)
    pruned, _ = measured("run", model, out, "--ratio", 0.3, "--recipe", "sobp", *job)
    _, evaluation = measured("eval", model, "--text", text, "--seq-len", options.seq_len)
    for path in (*model.iterdir(), *out.iterdir()):
        path.unlink()
    return {
        "blocks": blocks,
        "weights_bytes": weights,
        "start_bytes": start,
        "run_peak_host_bytes": pruned["peak_host_bytes"],
        "run_seconds": pruned["seconds"],
        "eval_peak_kernel_bytes": evaluation,
    }


def compare(shallow: dict[str, Any], deep: dict[str, Any]) -> dict[str, Any]:
    """Return the ratios deeper / shallower of both commands' peaks, in full and above the start."""
    ratios = {}
    for command, key in (("run", "run_peak_host_bytes"), ("eval", "eval_peak_kernel_bytes")):
        ratios[command] = deep[key] / shallow[key]
        ratios[f"{command}_above_start"] = (deep[key] - deep["start_bytes"]) / (shallow[key] - shallow["start_bytes"])
    return ratios


def report(rows: list[dict[str, Any]], ratios: dict[str, Any]) -> str:
    """Return the table as text."""
    lines = ["peak memory, MiB" + "".join(f"{row['blocks']:>8} blocks" for row in rows) + "    ratio  above start"]
    for name, key, ratio in (
        ("weights on disk", "weights_bytes", None),
        ("inspect (start)", "start_bytes", None),
        ("run, its --json", "run_peak_host_bytes", "run"),
        ("eval, the kernel", "eval_peak_kernel_bytes", "eval"),
    ):
        line = f"{name:16}" + "".join(f"{row[key] / 2**20:15.1f}" for row in rows)
        if ratio is not None:
            line += f"{ratios[ratio]:9.3f}{ratios[f'{ratio}_above_start']:13.3f}"
        lines.append(line)
    met = all(ratios[command] <= TARGET for command in ("run", "eval"))
    return "\n".join([*lines, f"ratio at most {TARGET}: {'met' if met else 'MISSED'}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs=2, default=[8, 32], metavar="N", help="default: 8 32")
    parser.add_argument("--hidden", type=int, default=1024, help="residual width; default: %(default)s")
    parser.add_argument("--ffn", type=int, default=2944, help="FFN width; default: %(default)s")
    parser.add_argument("--dtype", default="float32", help="of the checkpoints; default: %(default)s")
    parser.add_argument("--samples", type=int, default=8, help="windows; default: %(default)s")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens per window; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that the temporary folder is removed
    with tempfile.TemporaryDirectory(prefix="streamprune-memory-") as folder:
        rows = [measure(Path(folder), blocks, options) for blocks in sorted(options.blocks)]
    ratios = compare(*rows)
    print(json.dumps({"rows": rows, "ratios": ratios, "target": TARGET}) if options.json else report(rows, ratios))


if __name__ == "__main__":
    main()
