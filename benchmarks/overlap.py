"""How busy the bottleneck is: the computation where arithmetic is the lower bound, the disk where reading is.

A random llama checkpoint, 8 blocks of 50 MB in float32, is evaluated and pruned by several recipes: first with its
files in the page cache, then with a simulated disk. The simulated disk delivers weights at a constant rate, one request
after another, as if nothing were ever cached. By default the rate is half of that at which the evaluation consumed
them, so reading is its lower bound and everything else has to be hidden behind it.

The computation counts as busy whenever the main thread does not wait for reads or writes (including fsync and the
journal); those that the main thread does itself count as waiting. This measure is for the CPU. On a GPU the
main thread runs ahead of the device, and benchmarks/gpu.py measures rates instead. The simulated disk counts the
seconds that its rate takes. The figure printed is the share of the whole command, from opening the model to the
published result. Target: at least 90 % for the busier of the two.

    python benchmarks/overlap.py            about 4 minutes on 2 idle cores, 1 GB of temporary disk
    python benchmarks/overlap.py --json --recipes wanda-sp --disk-rate 100MB
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from make_checkpoint import Shape, make_checkpoint, make_text

import streamprune
from streamprune.system import files
from streamprune.system.host import configure_malloc
from streamprune.system.timing import waited, waiting
from streamprune.system.units import format_bytes, parse_bytes

TARGET = 0.9


class Disk:
    """A simulated disk: `rate` bytes per second, one request after another; announced ranges arrive in the background."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.busy = 0.0
        self._lock = threading.Lock()
        self._free_at = 0.0
        self._arrives: dict[tuple[Path, int], float] = {}

    def request(self, path: Path, offset: int, length: int) -> None:
        """Queue a range behind all earlier requests."""
        with self._lock:
            self.busy += length / self.rate
            self._free_at = max(time.perf_counter(), self._free_at) + length / self.rate
            self._arrives[path, offset] = self._free_at

    def wait(self, path: Path, offset: int, length: int) -> None:
        """Wait until a range has arrived."""
        if (path, offset) not in self._arrives:
            self.request(path, offset, length)
        with self._lock:
            due = self._arrives.pop((path, offset))
        time.sleep(max(0.0, due - time.perf_counter()))


@contextmanager
def reading_from(disk: Disk | None) -> Iterator[None]:
    """Read weights from `disk` inside the context; None changes nothing."""
    read, announce = files.read_into, files.advise_read

    def slow_read(path: Path, offset: int, buffer: memoryview) -> int:
        assert disk is not None
        with waiting("read"):
            if path.suffix == ".safetensors":
                disk.wait(path, offset, len(buffer))
            return read(path, offset, buffer)

    def slow_announce(path: Path, offset: int, length: int) -> None:
        assert disk is not None
        if path.suffix == ".safetensors":
            disk.request(path, offset, length)
        else:
            announce(path, offset, length)

    if disk is not None:
        files.read_into, files.advise_read = slow_read, slow_announce
    try:
        yield
    finally:
        files.read_into, files.advise_read = read, announce


def measured(name: str, disk: Disk | None, work: Callable[[], object]) -> dict[str, Any]:
    """Run one command; return its seconds and the shares in which computation and simulated disk were busy."""
    started, before = time.perf_counter(), waited()
    with reading_from(disk):
        work()
    seconds = time.perf_counter() - started
    waits = {kind: total - before[kind] for kind, total in waited().items()}
    shares = {"computing": 1 - sum(waits.values()) / seconds}
    if disk is not None:
        shares["disk"] = disk.busy / seconds
    row = {
        "command": name,
        "disk_rate": None if disk is None else disk.rate,
        "seconds": seconds,
        "waited": waits,
        "shares": shares,
        "bottleneck": max(shares, key=lambda each: shares[each]),
        "met": max(shares.values()) >= TARGET,
    }
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure all rows."""
    shape = Shape(blocks=options.blocks, hidden=options.hidden, ffn=options.ffn)
    model, text, tokens = folder / "model", folder / "text.txt", options.samples * options.seq_len
    make_checkpoint(model, shape)
    make_text(text, shape.vocabulary, tokens)

    def evaluate() -> object:
        return streamprune.evaluate(model, text, seq_len=options.seq_len, cache=folder)

    def run(recipe: str, number: int) -> Callable[[], object]:
        config = streamprune.Config(
            model=model,
            out=folder / f"out-{recipe}-{number}",
            ratio=0.3,
            recipe=recipe,
            effort="low",
            calibration=text,
            samples=options.samples,
            seq_len=options.seq_len,
        )
        return lambda: streamprune.prune(config)

    evaluate()  # imports and other one-time work
    rows = [measured("eval", None, evaluate)]
    rows += [measured(f"run {recipe}", None, run(recipe, 0)) for recipe in options.recipes]
    weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    rate = parse_bytes(options.disk_rate) if options.disk_rate else weights / rows[0]["seconds"] / 2
    rows.append(measured("eval", Disk(rate), evaluate))
    rows += [measured(f"run {recipe}", Disk(rate), run(recipe, 1)) for recipe in options.slow_recipes]
    return {
        "blocks": shape.blocks,
        "block_bytes": shape.block_bytes,
        "tokens": tokens,
        "seq_len": options.seq_len,
        "target": TARGET,
        "rows": rows,
    }


def report(result: dict[str, Any]) -> str:
    """Return the table as text."""
    lines = [
        f"{result['blocks']} blocks of {result['block_bytes'] / 1e6:.1f} MB, {result['tokens']} tokens",
        f"{'command':20}{'disk':>14}{'seconds':>9}{'computing':>11}{'disk':>7}   waited: read, write",
    ]
    for row in result["rows"]:
        rate = "page cache" if row["disk_rate"] is None else f"{format_bytes(row['disk_rate'])}/s"
        disk = "" if "disk" not in row["shares"] else f"{row['shares']['disk']:.1%}"
        waits = ", ".join(f"{seconds:.2f} s" for seconds in row["waited"].values())
        lines.append(
            f"{row['command']:20}{rate:>14}{row['seconds']:9.1f}{row['shares']['computing']:11.1%}{disk:>7}   {waits}; "
            f"{row['bottleneck']} busy {row['shares'][row['bottleneck']]:.1%}: {'met' if row['met'] else 'MISSED'}"
        )
    return "\n".join([*lines, f"target: the bottleneck busy at least {result['target']:.0%}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--hidden", type=int, default=Shape.hidden, help="residual width; default: %(default)s")
    parser.add_argument("--ffn", type=int, default=Shape.ffn, help="FFN width; default: %(default)s")
    parser.add_argument("--samples", type=int, default=16, help="windows; default: %(default)s")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens per window; default: %(default)s")
    parser.add_argument("--recipes", nargs="+", default=["default", "sobp", "wanda-sp"], metavar="NAME")
    parser.add_argument(
        "--slow-recipes", nargs="*", default=["wanda-sp"], metavar="NAME", help="those for the simulated disk"
    )
    parser.add_argument("--disk-rate", metavar="SIZE", help="bytes per second; default: half of what eval consumed")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that the temporary folder is removed
    configure_malloc()
    with tempfile.TemporaryDirectory(prefix="streamprune-overlap-") as folder:
        result = measure(Path(folder), options)
    print(json.dumps(result) if options.json else report(result))


if __name__ == "__main__":
    main()
