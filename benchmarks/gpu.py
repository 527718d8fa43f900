"""A 70B model on one card: prune blocks of its real shape under device limits, and project the time of 80 of them.

A random llama of 70B-shaped blocks (width 8192, FFN 28672, 64 heads, 8 key/value heads, bfloat16; as many as fit on the
disk) goes through these steps, each in its own processes:

1. rates.py: the rates of this machine (products, pinned copies, disk).
2. For each limit: `plan`, `run --plan-only` (the survey, whose journal has seconds and operations of each step) and
   `run`, which resumes it. Peak device memory is reported as torch counts it and as nvidia-smi does (including the
   driver and other processes).
3. The sweeps alone: `run --plan-only --recipe sobp`, forward and backward with almost nothing summed or solved.
4. stream.py: the streamed forward pass, compared with transformers' own on the device and with accelerate's disk
   offload.

"achieved" is the least time that the counted operations could have taken, divided by the time they took. Model passes
and Grams count at the measured rate of products in the computing dtype, solving at that of float32.

The projection keeps the achieved fraction of survey and pruning. It is the least time of the operations that `plan`
counts for the whole model (80 blocks of the real shape, 128 × 2048 tokens, the same recipe), divided by the achieved
fraction, plus one read of all weights to check them. On the target card, products run at --card TFLOP/s and float32
products at half of that. How well the same sizes fill that card compared with this device is not known. The line below
the projection gives the disk time for everything the job reads, at the measured rate.

    python benchmarks/gpu.py --folder /disk/gpu                 meant for some 8 minutes on an H200, never run on one; the checkpoint stays
    python benchmarks/gpu.py --device cpu                       a sixteenth of the widths: about 5 minutes on 2 idle cores
    python benchmarks/gpu.py --samples 32 --limits 24GiB --skip forward --json

Step 4 needs accelerate: pip install -e '.[bench]'
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from memory import HERE, child, measured

# No torch in this process (see memory.py).

BLOCKS = 80
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "cuda": {"hidden": 8192, "ffn": 28672, "heads": 64, "head_dim": 128, "vocabulary": 32000, "samples": 128}
    | {"seq_len": 2048, "limits": ["24GiB", "12GiB"]},
    "cpu": {"hidden": 512, "ffn": 1792, "heads": 8, "head_dim": 64, "vocabulary": 2000, "samples": 16}
    | {"seq_len": 256, "limits": ["2GiB", "1GiB"]},
}
KV_SHARE = 8
"""Query heads per key/value head."""
PARTS = ("runs", "sweeps", "forward")
TFLOP = 1e12
FORECAST = ("device_bytes", "host_bytes", "batch", "backward_batch", "grams", "bytes_to_read")
"""Fields of the JSON of `plan` to report."""


def device_kind() -> str:
    """Return ``cuda`` if torch finds a GPU, otherwise ``cpu``."""
    asked = "import torch; print(torch.cuda.is_available())"
    found = subprocess.run([sys.executable, "-c", asked], check=True, capture_output=True, text=True)
    return "cuda" if found.stdout.strip() == "True" else "cpu"


def blocks_that_fit(folder: Path, options: argparse.Namespace) -> int:
    """Return the number of blocks, 2 to 8, whose checkpoint, result, activations and accelerate copy fit on the disk."""
    attention = 2 * options.hidden * options.head_dim * (options.heads + options.heads // KV_SHARE)
    block = 2 * (attention + 3 * options.hidden * options.ffn)
    boundary = 2 * options.hidden * options.samples * options.seq_len
    outside = 4 * options.vocabulary * options.hidden
    free = shutil.disk_usage(folder).free
    # The survey needs one boundary per block and up to six more; later the offloaded copy takes their place.
    return max(2, min(8, int((0.95 * free - 3 * outside - 6 * boundary) / (3 * block + boundary))))


@contextmanager
def watched(device: str) -> Iterator[dict[str, Any]]:
    """Sample nvidia-smi during the context: peak ``memory_bytes`` and mean ``busy`` share; empty without nvidia-smi."""
    found: dict[str, Any] = {}
    query = ["nvidia-smi", "--query-gpu=memory.used,utilization.gpu", "--format=csv,noheader,nounits", "-lms", "200"]
    if not device.startswith("cuda") or shutil.which(query[0]) is None:
        yield found
        return
    with tempfile.TemporaryFile("w+") as output:
        index = device.partition(":")[2] or "0"
        process = subprocess.Popen([*query, "-i", index], stdout=output, stderr=subprocess.DEVNULL)
        try:
            yield found
        finally:
            process.terminate()
            process.wait()
            output.seek(0)
            rows = []
            for line in output:
                with suppress(ValueError):
                    memory, busy = (float(field) for field in line.split(","))
                    rows.append((memory, busy))
            if rows:
                found["memory_bytes"] = int(max(memory for memory, _ in rows)) << 20
                found["busy"] = sum(busy for _, busy in rows) / len(rows) / 100


def journal(out: Path) -> list[dict[str, Any]]:
    """Return the lines of an unfinished job's journal without the header."""
    path = out.with_name(f"{out.name}.streamprune") / "journal.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line.partition(" ")[2]) for line in lines[1:]]


def stages(lines: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return for each stage the seconds of each block and the operations by kind."""
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        name = line["step"].split("/")[1] if "/" in line["step"] else line["step"]
        stage = found.setdefault(name, {"seconds": [], "kinds": Counter()})
        stage["seconds"].append(line["seconds"])
        stage["kinds"].update(line["operations_by_kind"])
    return found


def least(kinds: Mapping[str, float], rates: Mapping[str, float], dtype: str) -> float:
    """Return the seconds that operations take at these rates."""
    solving = kinds.get("solving", 0)
    others = sum(kinds.values()) - solving
    return float(others / rates[f"{dtype}_operations"] + solving / rates["float32_operations"])


def run(model: Path, out: Path, limit: str, options: argparse.Namespace, *recipe: str) -> dict[str, Any]:
    """Forecast and run one limit, survey first; return time and memory of each."""
    job = [*recipe, "--ratio", options.ratio, "--calibration", model.with_suffix(".txt"), "--samples", options.samples]
    job += ["--seq-len", options.seq_len, "--device", options.device, "--dtype", options.dtype, "--memory", limit]
    job += ["--effort", "low"]
    forecast, _ = measured("plan", model, *job)
    with watched(options.device) as seen:
        started = time.monotonic()
        measured("run", model, out, *job, "--plan-only")
        survey = stages(journal(out))
        measured("run", model, out, *job)
        seconds = time.monotonic() - started
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    shutil.rmtree(out)
    prune = Counter(report["operations_by_kind"])
    for stage in survey.values():
        prune.subtract(stage["kinds"])
    survey["prune"] = {"seconds": [block["prune_seconds"] for block in report["blocks"]], "kinds": prune}
    return {
        "limit": limit,
        "recipe": report["recipe"],
        "forecast": {name: forecast[name] for name in FORECAST},
        "peak_device_bytes": report["peak_device_bytes"] or report["peak_host_bytes"],
        "peak_host_bytes": report["peak_host_bytes"],
        "nvidia_smi": seen,
        "seconds": report["seconds"],
        "seconds_with_starts": seconds,
        "operations": report["operations"],
        "operations_by_kind": report["operations_by_kind"],
        "forward_equivalents": report["forward_equivalents"],
        "stages": survey,
    }


def survey_alone(model: Path, out: Path, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Run the forward and backward sweeps with almost nothing else; return their stages."""
    job = ["--recipe", "sobp", "--ratio", options.ratio, "--calibration", model.with_suffix(".txt"), "--samples"]
    job += [options.samples, "--seq-len", options.seq_len, "--device", options.device, "--dtype", options.dtype]
    measured("run", model, out, *job, "--memory", options.limits[0], "--plan-only")
    found = stages(journal(out))
    shutil.rmtree(out.with_name(f"{out.name}.streamprune"))
    return found


def whole_model(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the JSON of `plan` for all blocks in their real shape and the target tokens; the weights are sparse files."""
    shape = DEFAULTS["cuda"]
    model = folder / "whole"
    words = [sys.executable, HERE / "make_checkpoint.py", model, "--hollow", *shape_options(BLOCKS, shape)]
    words += ["--text", model.with_suffix(".txt"), "--tokens", 4 * shape["seq_len"]]
    subprocess.run(list(map(str, words)), check=True, stdout=sys.stderr)
    job = ["--recipe", options.recipe, "--ratio", options.ratio, "--calibration", model.with_suffix(".txt")]
    job += [
        "--samples",
        shape["samples"],
        "--seq-len",
        shape["seq_len"],
        "--dtype",
        options.dtype,
        "--device",
        options.device,
        "--effort",
        "low",
    ]
    plan = [sys.executable, "-m", "streamprune_cli", "plan", model, *job, "--json"]
    # The exit code does not matter: the job need not fit on this machine.
    found = subprocess.run(list(map(str, plan)), capture_output=True, text=True)
    shutil.rmtree(model)
    if not found.stdout:
        sys.exit(found.stderr)
    said: dict[str, Any] = json.loads(found.stdout)
    return said


def project(
    found: dict[str, Any], whole: Mapping[str, Any], rates: Mapping[str, float], options: argparse.Namespace
) -> dict[str, Any]:
    """Project the seconds of the whole model on this machine and on the target card."""
    stages = [found["stages"][name] for name in ("forward", "backward", "prune") if name in found["stages"]]
    seconds = sum(sum(stage["seconds"]) for stage in stages)
    achieved = sum(least(stage["kinds"], rates, options.dtype) for stage in stages) / seconds
    card = {f"{options.dtype}_operations": options.card * TFLOP, "float32_operations": options.card * TFLOP / 2}
    kinds, weights = whole["operations_by_kind"], whole["output_bytes"]
    return {
        "achieved": achieved,
        "card_tflops": options.card,
        **{
            f"{name}_seconds": least(kinds, at, options.dtype) / achieved + weights / rates["disk_read_bytes"]
            for name, at in (("here", rates), ("card", card))
        },
        "reading_seconds": whole["bytes_to_read"] / rates["disk_read_bytes"],
    }


def shape_options(blocks: int, shape: Mapping[str, Any]) -> list[object]:
    """Return the shape options of make_checkpoint.py."""
    words: list[object] = ["--blocks", blocks, "--kv-heads", max(1, shape["heads"] // KV_SHARE), "--dtype", "bfloat16"]
    for name in ("hidden", "ffn", "heads", "head_dim", "vocabulary"):
        words += [f"--{name.replace('_', '-')}", shape[name]]
    return words


def table(result: dict[str, Any], options: argparse.Namespace) -> str:
    """Return the report as text."""
    rates, gib = result["rates"], 2**30
    of = f"{options.blocks} blocks, {options.hidden} wide, FFN {options.ffn}, {options.heads} heads, {options.samples} × {options.seq_len} tokens"
    lines = [f"{rates['device']}: {of}, {options.dtype}", ""]
    lines += [
        f"attainable: {options.dtype} {rates[f'{options.dtype}_operations'] / TFLOP:.2f} TFLOP/s, "
        f"float32 {rates['float32_operations'] / TFLOP:.2f} TFLOP/s, to the device {rates['to_device_bytes'] / 1e9:.1f} GB/s, "
        f"from it {rates['from_device_bytes'] / 1e9:.1f} GB/s, disk {rates['disk_read_bytes'] / 1e9:.2f} GB/s read, "
        f"{rates['disk_write_bytes'] / 1e9:.2f} GB/s written"
    ]
    for row in result["runs"]:
        smi = row["nvidia_smi"].get("memory_bytes")
        peak, forecast = row["peak_device_bytes"], row["forecast"]
        lines += [
            "",
            f"{row['recipe']}, --memory {row['limit']}: device peak {peak / gib:.2f} GiB (forecast {forecast['device_bytes'] / gib:.2f}"
            + (f", nvidia-smi {smi / gib:.2f}" if smi else "")
            + f"), host {row['peak_host_bytes'] / gib:.2f} GiB; micro-batches of {forecast['batch']} and "
            f"{forecast['backward_batch']}, Grams: {forecast['grams']}",
            f"{row['seconds']:.1f} s, {row['operations'] / TFLOP:.1f} TFLOP, {row['forward_equivalents']:.1f} dense forward passes",
            "",
            "| stage | s a block | TFLOP | TFLOP/s | achieved |",
            "|---|---|---|---|---|",
            *(stage_row(name, stage, rates, options.dtype) for name, stage in row["stages"].items()),
        ]
        p = row["projected"]
        source = "a CPU and narrower blocks" if options.kind == "cpu" else "this card"
        lines += [
            "",
            f"projected from {source}, {p['achieved']:.0%} achieved: the whole 70B model with 128 × 2048 tokens takes "
            f"{p['here_seconds'] / 60:.1f} min here, {p['card_seconds'] / 60:.1f} min at {p['card_tflops']:g} TFLOP/s (target: below 60); "
            f"reading is {p['reading_seconds'] / 60:.1f} min at the disk's rate here",
        ]
    if result["sweeps"]:
        lines += [
            "",
            "the sweeps alone (target: at least 60 % achieved)",
            "",
            "| stage | s a block | TFLOP | TFLOP/s | achieved |",
        ]
        lines += ["|---|---|---|---|---|"]
        lines += [stage_row(name, stage, rates, options.dtype) for name, stage in result["sweeps"].items()]
    if result["forward"]:
        forward = result["forward"]
        lines += [
            "",
            f"a forward pass of {forward['tokens']} tokens",
            "",
            "| | micro-batch | s | TFLOP/s | achieved |",
            "|---|---|---|---|---|",
        ]
        for row in forward["rows"]:
            for way, seconds in row["seconds"].items():
                rate = forward["forward_operations"] / min(seconds)
                share = rate / rates[f"{options.dtype}_operations"]
                lines.append(
                    f"| {way} | {row['micro_batch']} | {min(seconds):.2f} | {rate / TFLOP:.2f} | {share:.0%} |"
                )
    return "\n".join(lines)


def stage_row(name: str, stage: Mapping[str, Any], rates: Mapping[str, float], dtype: str) -> str:
    """Return one line of the table of stages."""
    seconds, count, kinds = sum(stage["seconds"]), len(stage["seconds"]), stage["kinds"]
    operations = sum(kinds.values())
    if not operations or not seconds:
        return f"| {name} | {seconds / count:.2f} | | | |"
    share = least(kinds, rates, dtype) / seconds
    return f"| {name} | {seconds / count:.2f} | {operations / TFLOP:.3f} | {operations / seconds / TFLOP:.3f} | {share:.0%} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cuda, cuda:N or cpu; default: cuda where there is one")
    parser.add_argument("--blocks", type=int, help="default: what the disk holds, 2 to 8; on a CPU 4")
    for name in ("hidden", "ffn", "heads", "head_dim", "vocabulary", "samples", "seq_len"):
        default = " or ".join(f"{DEFAULTS[kind][name]} ({kind})" for kind in DEFAULTS)
        parser.add_argument("--" + name.replace("_", "-"), type=int, help=f"default: {default}")
    parser.add_argument(
        "--limits", nargs="+", metavar="SIZE", help="device memory; default: 24GiB 12GiB, on a CPU 2GiB 1GiB"
    )
    parser.add_argument("--recipe", default="default", help="default: %(default)s")
    parser.add_argument("--ratio", type=float, default=0.3, help="default: %(default)s")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="default: %(default)s")
    parser.add_argument(
        "--card", type=float, default=150.0, metavar="TFLOP/s", help="project for; default: %(default)s"
    )
    parser.add_argument("--skip", nargs="+", choices=PARTS, default=[], help="leave these parts out")
    parser.add_argument("--folder", type=Path, help="for everything, the checkpoint is kept; default: a temporary one")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that the temporary folder is removed
    options.device = options.device or device_kind()
    options.kind = options.device.partition(":")[0]
    for name, value in DEFAULTS[options.kind].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    with tempfile.TemporaryDirectory(prefix="streamprune-gpu-") as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        options.blocks = options.blocks or (4 if options.kind == "cpu" else blocks_that_fit(folder, options))
        result = benchmark(folder, options)
    print(json.dumps(result) if options.json else table(result, options))


def benchmark(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run all parts."""
    words = shape_options(options.blocks, vars(options))
    model = folder / "-".join(["model", *map(str, words[1::2])])
    text = model.with_suffix(".txt")
    if not (model / "model.safetensors.index.json").exists():
        shutil.rmtree(model, ignore_errors=True)
        command = [sys.executable, HERE / "make_checkpoint.py", model, *words, "--text", text]
        command += ["--tokens", options.samples * options.seq_len]
        subprocess.run(list(map(str, command)), check=True, stdout=sys.stderr)
    for left in ("out", "out.streamprune", "whole"):  # left by an earlier run
        shutil.rmtree(folder / left, ignore_errors=True)
    rates, _ = child(HERE / "rates.py", "--device", options.device, "--folder", folder, "--json")
    out = folder / "out"
    result: dict[str, Any] = {"rates": rates, "options": {name: str(value) for name, value in vars(options).items()}}
    result |= {"runs": [], "sweeps": None, "forward": None}
    if "runs" not in options.skip:
        whole = whole_model(folder, options)
        for limit in options.limits:
            row = run(model, out, limit, options, "--recipe", options.recipe)
            row["projected"] = project(row, whole, rates, options)
            result["runs"].append(row)
            print(f"{limit}: {row['seconds']:.0f} s", file=sys.stderr, flush=True)
    if "sweeps" not in options.skip:
        result["sweeps"] = survey_alone(model, out, options)
        print("sweeps done", file=sys.stderr, flush=True)
    if "forward" not in options.skip:
        forward: list[object] = ["--model", model, "--device", options.device, "--dtype", options.dtype]
        forward += [
            "--memory",
            options.limits[0],
            "--samples",
            min(options.samples, 32),
            "--seq-len",
            options.seq_len,
            "--repetitions",
            1,
        ]
        result["forward"], _ = child(HERE / "stream.py", *forward, "--json")
    return result


if __name__ == "__main__":
    main()
