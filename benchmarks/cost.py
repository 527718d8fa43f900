"""What a 70B job costs, counted: bytes and operations by resource and stage, and the least time they allow.

Nothing is run: the counts are those of `streamprune plan` (`jobs.forecast`), for a checkpoint of the real shape whose weights are holes.
A job reads and writes boundaries as often as traffic.py says, which `tests/test_traffic.py` compares with jobs that run.
Solving is counted by the leading terms of docs/methods.md, launches by running one chunk of greedy steps, of which the host's part is timed.

A stage takes as long as its slowest resource: products, copies, disk and the host's core work side by side. What the computing thread
does itself delays the products, so it counts with them ("computing"); the rest of the host's work is that of the store's, the reader's
and the writer's threads, which share one core here. Stages follow each other.

Rates: --card TFLOP/s in bfloat16, half of it in float32, PCIe 4.0 and an SSD as in RATES; those of a host core are measured here in the
same run, in processor time of one thread.

    python benchmarks/cost.py                              half a minute on one core
    python benchmarks/cost.py --effort normal --memory-host 24GiB --json
    python benchmarks/cost.py --host-rates copy=5e9,sha256=1e9    instead of those measured here
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gpu import BLOCKS, DEFAULTS, KV_SHARE
from make_checkpoint import Shape, make_hollow, make_text
from torch.utils._python_dispatch import TorchDispatchMode
from traffic import Passes, passes

from streamprune import Config
from streamprune.jobs.config import EFFORTS, REFINE_SEQUENCES
from streamprune.jobs.forecast.memory import Memory
from streamprune.jobs.forecast.resources import flops_by_stage, forecast
from streamprune.maths import greedy
from streamprune.pruning.request import Request
from streamprune.system.host import checksum
from streamprune.system.units import parse_bytes

RATES = {"PCIe": 25e9, "SSD read": 3e9, "SSD write": 2e9, "pageable copy": 6e9}
"""Bytes per second. The last is a copy between the device and pageable memory, which the driver stages."""
DEVICE = 1e12
"""Bytes per second of the device's own memory."""
LAUNCH = 8e-6
"""Seconds of the computing thread for one operation on small tensors, with the device idle meanwhile."""
STAGES = ("check", "survey", "prune", "refine", "verify")
GB, TFLOP = 1e9, 1e12


def host_rates() -> dict[str, float]:
    """Return bytes per second of one thread: checksums, copies, and what looks for NaN."""
    data = torch.randint(256, (1 << 26,), dtype=torch.uint8)
    weights, view, other = data.view(torch.bfloat16), data.numpy().data, torch.empty_like(data)
    torch_threads = torch.get_num_threads()
    work: dict[str, Callable[[], Any]] = {
        "checksum": lambda: checksum(view),
        "sha256": lambda: hashlib.sha256(view).digest(),
        "copy": lambda: other.copy_(data),
        "finite": lambda: weights.sum(),
    }
    torch.set_num_threads(1)
    found = {}
    for name, each in work.items():
        seconds = []
        for _ in range(4):
            started = time.thread_time()
            each()
            seconds.append(time.thread_time() - started)
        found[name] = data.nbytes / min(seconds[1:])
    torch.set_num_threads(torch_threads)
    return found


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations; views launch nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        aliases = any(a.alias_info is not None and not a.alias_info.is_write for a in func._schema.arguments)
        self.count += not aliases
        return result


def greedy_step(width: int) -> tuple[float, float]:
    """Return the operations per step of a greedy path, and of what applies the steps, with 64 steps in one chunk; and the seconds that
    the host takes for a step itself, in processor time."""
    units = 300
    x = torch.randn(2 * units * width, units * width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = torch.linalg.inv(x.T @ x).contiguous()
    seconds = [0.0]

    def among(*arguments: Any) -> Any:
        seconds.clear()
        for _ in range(4):
            started = time.thread_time()
            found = real(*arguments)
            seconds.append(time.thread_time() - started)
        return found

    real = greedy._among
    with (
        mock.patch.object(greedy, "counted", return_value=nullcontext()),
        mock.patch.object(greedy, "_among", among),
        Operations() as seen,
    ):
        greedy.removal(p, torch.eye(len(p), dtype=p.dtype), width=width, count=64, block=64, place="here")
    return seen.count / 64, min(seconds) / 64


def solving(n: int, d: int, rows: int, ratio: float) -> tuple[float, float]:
    """Return the FLOPs of solving one site of `default`: for its findings, and in the prune sweep.

    Args:
        n, d: columns and rows of the consumer.
        rows: rows of all producers.
    """
    k = (1 - ratio) * n
    energies, inverse, sketch = d * n**2, n**3, 512
    digest = d**3 / 3 + 2 * d**2 * n + energies + inverse + n**3
    fitted = n**3 / 3 + 4 * d * n**2
    selected = 2 / 3 * n**3 + energies + n**3 - k**3
    refitted = k**3 / 3 + 2 * d * k * (n - k) + 2 * d * k**2 + 4 * sketch * d * n + 4 * sketch * n**2
    compensated = d**3 / 3 + 2 * d**3 + 2 * rows * d**2
    return digest, fitted + selected + refitted + compensated


Table = dict[str, dict[str, dict[str, float]]]
"""By stage and resource: items with their seconds."""


def count(model: Path, text: Path, options: argparse.Namespace, rates: Mapping[str, float]) -> dict[str, Any]:
    """Count one job; return its figures and the seconds of each item by stage and resource."""
    config = Config(
        model=model,
        out=model.with_name("out"),
        ratio=options.ratio,
        effort=options.effort,
        refine=options.refine,
        calibration=text,
        samples=options.samples,
        seq_len=options.seq_len,
        dtype="bfloat16",
        device="cpu",
    )
    request = Request(config, None)
    work = request.workload
    request.skeleton.device = torch.device("cuda")
    shapes = Memory(request.skeleton, request.workload)
    held = parse_bytes(options.memory_host)
    resources = forecast(
        request.skeleton,
        request.workload,
        device_limit=parse_bytes(options.memory),
        disk_limit=1 << 50,
        memory_host=held,
    )
    boundary = work.samples * shapes.stored_row
    table: Table = {stage: defaultdict(Counter) for stage in STAGES}
    weights, outside = shapes.stored_all, shapes.head
    output = shapes.skeleton.parameters() * 2 - work.removes * weights

    def read(stage: str, nbytes: float, of: str, *, device: bool = True) -> None:
        table[stage]["SSD read"][of] += nbytes / RATES["SSD read"]
        table[stage]["host"]["page cache"] += nbytes / rates["copy"]
        if device:
            table[stage]["PCIe"][of] += nbytes / RATES["PCIe"]

    def written(stage: str, nbytes: float, of: str) -> None:
        table[stage]["SSD write"][of] += nbytes / RATES["SSD write"]
        table[stage]["host"]["page cache"] += nbytes / rates["copy"]

    # Products.
    card = {"bfloat16": options.card * TFLOP, "float32": options.card * TFLOP / 2}
    operations: Counter[str] = Counter()
    for stage, kinds in flops_by_stage(shapes).items():
        for kind, flops in kinds.items():
            operations[kind] += round(flops)
            table[stage]["computing"][f"products, {kind}"] += flops / card["bfloat16"]
    per_step: dict[int, tuple[float, float]] = {}
    for site in request.skeleton.all_sites():
        rows = sum(weight // site.outputs for weight in site.linears[:-1])
        if site.width not in per_step:
            per_step[site.width] = greedy_step(min(site.width, 4))
        steps, (launched, alone) = site.units, per_step[site.width]
        for stage, flops, taken in zip(
            ("survey", "prune"),
            solving(site.columns, site.outputs, rows, options.ratio),
            (1.0, options.ratio),
            strict=True,
        ):
            operations["solving"] += round(flops)
            table[stage]["computing"]["products, solving"] += flops / card["float32"]
            table[stage]["computing"]["launches of greedy steps"] += steps * taken * launched * LAUNCH
            table[stage]["computing"]["greedy steps on the host"] += steps * taken * alone
        # Compensated producers, then what is kept of all linears.
        moved = sum(site.linears[:-1]) + (1 - options.ratio) * sum(site.linears)
        table["prune"]["computing"]["weights to the host"] += moved * 2 / RATES["pageable copy"]
        table["prune"]["computing"]["new weights, looked through for NaN"] += moved * 2 / rates["finite"]
        # What is kept of producers is picked on the host, from masters.
        picked = (1 - options.ratio) * sum(site.linears[:-1])
        table["prune"]["computing"]["rows picked on the host"] += picked * 2 / rates["copy"]
        table["prune"]["computing"]["new weights to the device"] += (moved + picked) * 2 / RATES["pageable copy"]

    # Weights.
    read("check", weights + outside, "weights", device=False)
    table["check"]["host"]["checksums of weights"] += (weights + outside) / rates["checksum"]
    table["check"]["computing"]["NaN in weights"] += (weights + outside) / rates["finite"]
    read("survey", 2 * weights + 2 * outside, "weights")
    read("prune", weights, "weights")
    written("prune", output, "shards")
    table["prune"]["host"]["sha256 of shards"] += output / rates["sha256"]
    read("verify", output, "shards", device=False)
    table["verify"]["host"]["sha256 of shards"] += output / rates["sha256"]
    table["verify"]["host"]["NaN in shards"] += output / rates["finite"]

    # Boundaries, then the rows of them that refinement reads.
    refined = 2 * len(request.skeleton) * config.refinement_steps * min(REFINE_SEQUENCES, options.samples)
    total, on_disk = Passes(), Passes()
    fits = held >= 6 * boundary  # two streams, before, within and behind a block
    for step, blocks in passes(shapes, resources.boundary_every).items():
        stage = "prune" if step == "prune" else "survey"
        made = sum(blocks, Passes())
        total += made
        if step == "prune":
            made += Passes(read=-refined / options.samples)
        for nbytes in (made.read * boundary, made.written * boundary):
            table[stage]["PCIe"]["boundaries"] += nbytes / RATES["PCIe"]
        # In memory, the youngest boundaries are read from there, and passing ones are not written elsewhere.
        kept = {"backward": made.read / 2, "prune": 0.0}.get(step, 0.0) if fits else made.read
        table[stage]["SSD read"]["boundaries"] += kept * boundary / RATES["SSD read"]
        stored = made.written - made.passing * fits
        on_disk += Passes(kept, stored)
        table[stage]["SSD write"]["boundaries"] += stored * boundary / RATES["SSD write"]
        table[stage]["host"]["checksums of boundaries"] += (kept + stored) * boundary / rates["checksum"]
        table[stage]["host"]["page cache"] += (kept + stored) * boundary / rates["copy"]
        if fits:
            table[stage]["host"]["boundaries held"] += (made.read - kept + made.written) * boundary / rates["copy"]
    if config.refinement_steps:
        read("refine", outside, "weights")
        nbytes = refined * shapes.stored_row
        if not fits:
            table["refine"]["SSD read"]["rows"] += nbytes / RATES["SSD read"]
            table["refine"]["host"]["checksums of rows"] += nbytes / rates["checksum"]
        table["refine"]["host"]["rows"] += nbytes / rates["copy"]
        table["refine"]["PCIe"]["rows"] += nbytes / RATES["PCIe"]
        # Weights, gradients and both moments in float32, of which three are written.
        trained = (1 - work.removes) * weights / 2 * 4
        table["refine"]["computing"]["Adam"] += config.refinement_steps * 7 * trained / DEVICE
    if work.corrects:
        # The dense model once; each step reads the pruned blocks twice and the head, and Adam's states, which it writes anew.
        read("refine", weights + work.corrects * (2 * (1 - work.removes) * weights + outside), "weights")
        states = shapes.states(work.correction_rank) / 2
        read("refine", work.corrects * 2 * states, "states of all blocks")
        written("refine", work.corrects * states, "states of all blocks")
        # Boundaries: forward one read and one written, backward two and one.
        passed = len(shapes.blocks) * (work.samples + 2 * work.corrects * work.correction_sequences) * shapes.stored_row
        read(
            "refine",
            passed + len(shapes.blocks) * work.corrects * work.correction_sequences * shapes.stored_row,
            "rows",
        )
        written("refine", passed, "rows")
    return {
        "operations": dict(operations),
        "boundary_bytes": boundary,
        "batch": resources.batch,
        "backward_batch": resources.backward_batch,
        "launches_per_step": {str(width): launched for width, (launched, _) in per_step.items()},
        "passes_per_block": {
            name: {"read": made.read / len(shapes.blocks), "written": made.written / len(shapes.blocks)}
            for name, made in (("all", total), ("on disk", on_disk))
        },
        "rates": {**RATES, **rates, "launch": LAUNCH, **card},
        "seconds": {stage: {name: dict(items) for name, items in each.items()} for stage, each in table.items()},
    }


RESOURCES = ("computing", "PCIe", "SSD read", "SSD write", "host")


def report(result: Mapping[str, Any]) -> str:
    """Return the tables as text."""
    seconds, lines = result["seconds"], []
    made = result["passes_per_block"]
    lines.append(
        f"boundaries of {result['boundary_bytes'] / GB:.2f} GB; a block takes {made['all']['read']:.1f} reads and "
        f"{made['all']['written']:.1f} writes of them, {made['on disk']['read']:.1f} and {made['on disk']['written']:.1f} on disk; "
        + ", ".join(f"{name} {count / 1e15:.1f} PFLOP" for name, count in result["operations"].items() if count > 1e12)
    )
    measured = ", ".join(f"{name} {rate / GB:.2f}" for name, rate in result["rates"].items() if 1e7 < rate < 1e12)
    lines += [
        f"rates, GB/s: {measured}",
        "",
        "| seconds | " + " | ".join(RESOURCES) + " | slowest |",
        "|---|" + "--:|" * 6,
    ]
    whole = 0.0
    for stage in STAGES:
        sums = {name: sum(seconds[stage].get(name, {}).values()) for name in RESOURCES}
        slowest = max(sums, key=lambda name: sums[name])
        whole += sums[slowest]
        if any(sums.values()):
            lines.append(
                f"| {stage} | "
                + " | ".join(f"{sums[n]:.0f}" for n in RESOURCES)
                + f" | {slowest} {sums[slowest]:.0f} |"
            )
    lines += [f"| all | | | | | | {whole:.0f} ({whole / 60:.0f} min) |", ""]
    for name in RESOURCES:
        items: Counter[str] = Counter()
        for stage in STAGES:
            items.update(seconds[stage].get(name, {}))
        lines.append(
            f"{name}: " + ", ".join(f"{what} {each:.0f} s" for what, each in items.most_common() if each >= 0.5)
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    shape = DEFAULTS["cuda"]
    parser.add_argument("--ratio", type=float, default=0.3, help="default: %(default)s")
    parser.add_argument("--effort", choices=EFFORTS, default="low", help="default: %(default)s")
    parser.add_argument(
        "--refine", type=int, metavar="STEPS", help="steps of refinement per block; default: the effort's"
    )
    parser.add_argument("--samples", type=int, default=shape["samples"], help="default: %(default)s")
    parser.add_argument("--seq-len", type=int, default=shape["seq_len"], help="default: %(default)s")
    parser.add_argument("--memory", default="23GiB", metavar="SIZE", help="of the card; default: %(default)s")
    parser.add_argument("--memory-host", default="32GiB", metavar="SIZE", help="for boundaries; default: %(default)s")
    parser.add_argument("--card", type=float, default=150.0, metavar="TFLOP/s", help="default: %(default)s")
    parser.add_argument("--host-rates", metavar="NAME=BYTES,...", help="bytes per second of a core; default: measured")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    rates = host_rates()
    for pair in options.host_rates.split(",") if options.host_rates else ():
        name, _, rate = pair.partition("=")
        if name not in rates:
            parser.error(f"--host-rates has {name!r}; it must be one of {', '.join(rates)}")
        rates[name] = float(rate)
    names = {name: shape[name] for name in ("hidden", "ffn", "heads", "head_dim", "vocabulary")}
    with tempfile.TemporaryDirectory(prefix="streamprune-cost-") as folder:
        model, text = Path(folder) / "model", Path(folder) / "text.txt"
        whole = Shape(blocks=BLOCKS, kv_heads=shape["heads"] // KV_SHARE, dtype="bfloat16", **names)
        make_hollow(model, whole)
        make_text(text, whole.vocabulary, 4 * options.seq_len)
        result = count(model, text, options, rates)
    print(json.dumps(result) if options.json else report(result))


if __name__ == "__main__":
    main()
