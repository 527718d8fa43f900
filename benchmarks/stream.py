"""Speed of the streamed forward pass, compared with the whole model in memory and with accelerate's disk offload.

One random llama checkpoint in float32, with the same tokens, micro-batches and loss, in three ways:

- streamed: embedding, blocks and head through streamprune's sweep, as in `streamprune eval`: weights are read from the
  shards, activations are written to disk and read back;
- in memory: transformers' forward pass of the whole model, with its weights loaded beforehand;
- offload: the same, with weights on disk by `accelerate.disk_offload`, read again for every micro-batch.

All three use one device, each in its own process. Each repetition runs all three, in a different order; the first
repetition does not count. Opening the model is not timed. The files are in the page cache, so the benchmark measures
the work of streaming, not the disk. It runs with micro-batches of one window, as on a machine with little memory, and
with those that `streamprune eval` would choose here. A pass takes 16384 tokens; with fewer, reading a block takes a
larger share of the time (--samples 8: a quarter of the tokens).

Targets, for the median of the repetitions' ratios: speed streamed / in memory at least 0.85, streamed / offload above
1. The ratio of least seconds is printed too; it is less sensitive to other processes. The three losses must agree to a
relative 1e-5 (bfloat16: 1e-2), otherwise the exit code is 1. If a core is busy with other work, torch's threads wait
for each other at every operation and the figures mean little: exclude that core with --threads.

    python benchmarks/stream.py            about 7 minutes on 2 idle cores, 1 GB of temporary disk
    python benchmarks/stream.py --json
    python benchmarks/stream.py --model FOLDER --device cuda --dtype bfloat16 --memory 24GiB --samples 64 --seq-len 2048

--model uses an existing llama checkpoint. --memory limits only the streamed way, whose micro-batches the others use
too.

Needs accelerate: pip install -e '.[bench]'
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from make_checkpoint import Shape, make_checkpoint
from torch import Tensor

from streamprune.jobs.forecast.resources import forecast
from streamprune.jobs.forecast.workload import Workload
from streamprune.model.skeleton import Skeleton, open_skeleton
from streamprune.stream import sweep
from streamprune.stream.store import ActivationStore
from streamprune.system.host import configure_malloc
from streamprune.system.machine import limit_memory, memory_limits, resolve_device
from streamprune.system.units import parse_bytes

WAYS = ["streamed", "in memory", "offload"]
TARGETS = {"in memory": 0.85, "offload": 1.0}
AGREEMENT = {"float32": 1e-5, "bfloat16": 1e-2}

Way = Callable[[Tensor, int], float]
"""Windows (samples, tokens) and the windows per micro-batch → mean loss in nats."""


def streamed(skeleton: Skeleton, folder: Path, windows: Tensor, size: int) -> float:
    """Return the mean loss in nats from streamprune's sweep, with activations in `folder`."""
    shape = windows.shape[0], windows.shape[1], skeleton.width
    depth = len(skeleton)
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        store = ActivationStore(Path(cache), shape, skeleton.dtype, skeleton.device, durable=False)
        sweep.embed(skeleton, windows, store, sweep.boundary("dense", 0), size)
        for index in sweep.forward(skeleton, store, "dense", 0, depth, size):
            store.remove(sweep.boundary("dense", index))
        total, count = sweep.losses(skeleton, store, sweep.boundary("dense", depth), windows, size)
    return total / count


@torch.no_grad()
def whole(model: Any, windows: Tensor, size: int) -> float:
    """Return the mean loss in nats from the model's own forward pass."""
    total, count = 0.0, 0
    for batch in torch.split(windows, size):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        targets = batch[:, 1:].reshape(-1)
        total += float(F.cross_entropy(logits.reshape(len(targets), -1), targets, reduction="sum").double())
        count += len(targets)
    return total / count


@dataclass(frozen=True)
class Job:
    """The inputs shared by all ways."""

    model: Path
    folder: Path
    """Folder for written files."""
    device: torch.device
    dtype: str
    memory: int | None
    """Memory limit of the streamed way in bytes."""


def opened(name: str, job: Job) -> Way:
    """Prepare one way up to its forward pass, as a separate process would."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    if name == "streamed":
        configure_malloc()
        skeleton = open_skeleton(job.model, job.device, job.dtype)

        def run(windows: Tensor, size: int) -> float:
            with limit_memory(job.device, job.memory):
                return streamed(skeleton, job.folder, windows, size)

        return run
    disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(
        job.model, dtype=getattr(torch, job.dtype), attn_implementation="sdpa"
    ).eval()
    if name == "offload":
        from accelerate import disk_offload

        model = disk_offload(model, str(job.folder / "offload"), execution_device=job.device)
    else:
        model = model.to(job.device)
    return lambda windows, size: whole(model, windows.to(job.device), size)


def work(name: str, job: Job, windows: Tensor, threads: int, connection: Connection) -> None:
    """Serve one way in a process: receive micro-batch sizes, send seconds and loss, until the other end closes."""
    torch.set_num_threads(threads)
    way = opened(name, job)
    with suppress(EOFError, ConnectionError):
        while True:
            size = connection.recv()
            started = time.perf_counter()
            loss = way(windows, size)
            connection.send((time.perf_counter() - started, loss))


@contextmanager
def workers(job: Job, windows: Tensor, threads: int) -> Iterator[dict[str, Connection]]:
    """Start one process per way; each waits for its turn."""
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        ends = {}
        for name in WAYS:
            ends[name], other = context.Pipe()
            process = context.Process(target=work, args=(name, job, windows, threads, other), daemon=True)
            process.start()
            other.close()
            stack.callback(process.join)
            stack.callback(ends[name].close)
        yield ends


def own_size(job: Job, windows: Tensor) -> int:
    """Return the windows per micro-batch that `streamprune eval` would choose."""
    needs = Workload(samples=len(windows), length=windows.shape[1], text=True, prunes=False, scores=True)
    skeleton = open_skeleton(job.model, job.device, job.dtype)
    return forecast(skeleton, needs, **memory_limits(job.device, job.memory), disk_limit=1 << 50).require().batch


def measure(ends: dict[str, Connection], size: int, repetitions: int, agreement: float) -> dict[str, Any]:
    """Measure one micro-batch size: seconds of each repetition and loss by way, and the ratios."""
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    losses: dict[str, float] = {}
    for repetition in range(repetitions + 1):
        first = repetition % len(WAYS)
        for name in WAYS[first:] + WAYS[:first]:
            try:
                ends[name].send(size)
                taken, losses[name] = ends[name].recv()
            except (EOFError, OSError):
                sys.exit(f"the process of {name!r} has died")
            if repetition:
                seconds[name].append(taken)
    least = {name: min(times) for name, times in seconds.items()}
    right = losses["in memory"]
    return {
        "micro_batch": size,
        "seconds": seconds,
        "losses": losses,
        "losses_differ": max(abs(loss - right) / right for loss in losses.values()),
        "losses_agree": all(abs(loss - right) <= agreement * right for loss in losses.values()),  # false for NaN
        "speed_ratios": {
            name: statistics.median(a / b for a, b in zip(seconds[name], seconds["streamed"], strict=True))
            for name in TARGETS
        },
        "speed_ratios_of_least": {name: least[name] / least["streamed"] for name in TARGETS},
    }


def report(result: dict[str, Any]) -> str:
    """Return the table as text."""
    lines = [
        f"{result['blocks']} blocks of {result['block_bytes'] / 1e6:.1f} MB, {result['tokens']} tokens, "
        f"{result['threads']} threads, median of {result['repetitions']} repetitions"
    ]
    for row in result["rows"]:
        lines += ["", f"micro-batches of {row['micro_batch'] * result['seq_len']} tokens"]
        lines.append(f"{'':10}{'seconds':>9}{'least':>8}{'most':>8}{'tokens/s':>10}{'loss':>12}")
        for name, times in row["seconds"].items():
            median = statistics.median(times)
            figures = f"{median:9.2f}{min(times):8.2f}{max(times):8.2f}{result['tokens'] / median:10.0f}"
            lines.append(f"{name:10}{figures}{row['losses'][name]:12.7f}")
        for name, target in TARGETS.items():
            ratio, of_least = row["speed_ratios"][name], row["speed_ratios_of_least"][name]
            met = ratio >= target if target < 1 else ratio > target
            wanted = f"target {'at least' if target < 1 else 'above'} {target:g}: {'met' if met else 'MISSED'}"
            lines.append(f"speed, streamed / {name}: {ratio:.3f} (of least seconds: {of_least:.3f}; {wanted})")
        lines.append(f"losses agree to {row['losses_differ']:.1e}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--hidden", type=int, default=Shape.hidden, help="residual width; default: %(default)s")
    parser.add_argument("--ffn", type=int, default=Shape.ffn, help="FFN width; default: %(default)s")
    parser.add_argument("--samples", type=int, default=32, help="windows; default: %(default)s")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens per window; default: %(default)s")
    parser.add_argument(
        "--batch", type=int, nargs="+", metavar="N", help="windows per micro-batch; default: 1 and eval's"
    )
    parser.add_argument("--repetitions", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="threads of torch; default: its own choice")
    parser.add_argument(
        "--model", type=Path, metavar="FOLDER", help="directory of a llama checkpoint; default: write a random one"
    )
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--dtype", choices=AGREEMENT, default="float32", help="default: %(default)s")
    parser.add_argument("--memory", metavar="SIZE", help="memory limit of the streamed way; default: all free memory")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that the temporary folder is removed
    try:
        import accelerate  # noqa: F401 - only checks that it is installed
    except ImportError:
        sys.exit("benchmarks/stream.py needs accelerate: pip install -e '.[bench]'")
    threads = options.threads or torch.get_num_threads()
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="streamprune-stream-") as name:
        model = options.model
        if model is None:
            model = Path(name) / "model"
            make_checkpoint(model, Shape(blocks=options.blocks, hidden=options.hidden, ffn=options.ffn))
        memory = None if options.memory is None else parse_bytes(options.memory)
        job = Job(model, Path(name), resolve_device(options.device), options.dtype, memory)
        skeleton = open_skeleton(model, job.device, options.dtype)
        windows = torch.randint(skeleton.vocabulary, (options.samples, options.seq_len), generator=generator)
        sizes = options.batch or [1, own_size(job, windows)]
        with workers(job, windows, threads) as ends:
            rows = [measure(ends, size, options.repetitions, AGREEMENT[options.dtype]) for size in sizes]
    result = {
        "blocks": len(skeleton),
        "block_bytes": sum(skeleton.checkpoint[name].nbytes for name in skeleton.block_names(0).values()),
        "device": str(job.device),
        "dtype": options.dtype,
        "forward_operations": skeleton.forward_operations(options.samples, options.seq_len),
        "tokens": windows.numel(),
        "seq_len": options.seq_len,
        "threads": threads,
        "repetitions": options.repetitions,
        "rows": rows,
        "targets": TARGETS,
    }
    print(json.dumps(result) if options.json else report(result))
    if not all(row["losses_agree"] for row in rows):
        sys.exit("the losses disagree")


if __name__ == "__main__":
    main()
