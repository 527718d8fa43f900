"""Rates of a machine: matrix products, attention, copies between host and device, reading and writing a file.

Products are square, of the size of the largest Grams and linears here. Copies use pinned memory (on the CPU, ordinary
memory). Experts are 128 products of 256 rows (on the CPU, 16 of 64), one by one and, where torch has a kernel for it, at once.
Attention is its forward and backward pass, as torch chooses kernels and as a job does (`machine.deterministic`). The file's pages are dropped from the cache before it is read. Each figure is the best of several synchronised
repetitions.

    python benchmarks/rates.py                         half a minute on 2 cores
    python benchmarks/rates.py --device cuda --json
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from streamprune.model.block import has_grouped_products
from streamprune.system.machine import deterministic, resolve_device

SIZES = {"cpu": 2048, "cuda": 16384}
"""Side length of the square matrices, by device type."""
COPIED = 1 << 29
REPETITIONS = 4


def fastest(work: Callable[[], object], device: torch.device) -> float:
    """Return the least seconds of `REPETITIONS` after a warm-up."""
    seconds = []
    for _ in range(REPETITIONS + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def products(device: torch.device, dtype: torch.dtype) -> float:
    """Return operations per second of a matrix product with torch's defaults (float32 without TF32)."""
    n = SIZES[device.type]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    c = torch.empty_like(a)
    return 2 * n**3 / fastest(lambda: torch.mm(a, b, out=c), device)


def experts(device: torch.device) -> dict[str, float]:
    """Return operations per second of one linear of all experts of a mixture, in bfloat16: one by one, and at once."""
    number, rows, hidden, width = (16, 64, 256, 128) if device.type == "cpu" else (128, 256, 2048, 768)
    weights = torch.randn(number, width, hidden, device=device).bfloat16()
    x = torch.randn(number * rows, hidden, device=device).bfloat16()
    ends = torch.arange(rows, len(x) + 1, rows, device=device, dtype=torch.int32)

    def alone() -> torch.Tensor:
        return torch.cat([F.linear(own, weight) for own, weight in zip(x.split(rows), weights, strict=True)])

    operations = 2 * len(x) * hidden * width
    found = {"experts_one_by_one_operations": operations / fastest(alone, device)}
    if has_grouped_products(device, torch.bfloat16):
        together = fastest(lambda: F.grouped_mm(x, weights.transpose(1, 2), offs=ends), device)
        found["experts_at_once_operations"] = operations / together
    return found


def attention(device: torch.device) -> dict[str, float]:
    """Return operations per second of causal attention over 2048 tokens in bfloat16, forward and backward."""
    heads, length, width = (4, 512, 64) if device.type == "cpu" else (64, 2048, 128)
    parts = [
        torch.randn(1, heads, length, width, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    ]

    def work() -> None:
        F.scaled_dot_product_attention(*parts, is_causal=True).sum().backward()

    operations = 7 * heads * length**2 * width  # two products forward and five backward, half of each masked
    found = {"attention_operations": operations / fastest(work, device)}
    with deterministic(device, strict=True):
        return found | {"deterministic_attention_operations": operations / fastest(work, device)}


def copies(device: torch.device) -> dict[str, float]:
    """Return bytes per second to the device and back."""
    host = torch.ones(COPIED, dtype=torch.uint8, pin_memory=device.type == "cuda")
    there = torch.empty(COPIED, dtype=torch.uint8, device=device)
    return {
        "to_device": COPIED / fastest(lambda: there.copy_(host, non_blocking=True), device),
        "from_device": COPIED / fastest(lambda: host.copy_(there, non_blocking=True), device),
    }


def disk(folder: Path) -> dict[str, float]:
    """Return bytes per second of writing a file with fsync, and of reading it into allocated memory."""
    data = memoryview(bytearray(os.urandom(1 << 20) * (COPIED >> 20)))
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        started = time.perf_counter()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter() - started
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        started = time.perf_counter()
        assert os.preadv(file.fileno(), [data[: COPIED // 2]], 0) == COPIED // 2
        assert os.preadv(file.fileno(), [data[COPIED // 2 :]], COPIED // 2) == COPIED // 2
        read = time.perf_counter() - started
    return {"disk_write": COPIED / written, "disk_read": COPIED / read}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the system's temporary one")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    device = resolve_device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    rates = {f"{dtype}_operations": products(device, getattr(torch, dtype)) for dtype in ("bfloat16", "float32")}
    rates |= experts(device) | attention(device)
    rates |= {f"{kind}_bytes": rate for kind, rate in {**copies(device), **disk(options.folder)}.items()}
    if options.json:
        print(json.dumps({"device": name, **rates}))
        return
    print(name)
    for kind, rate in rates.items():
        unit = "TFLOP/s" if kind.endswith("operations") else "GB/s"
        print(f"{kind:36}{rate / (1e12 if unit == 'TFLOP/s' else 1e9):10.2f} {unit}")


if __name__ == "__main__":
    main()
