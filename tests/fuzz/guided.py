"""Coverage-guided fuzzing with atheris: `scripts/fuzz`.

Every target runs in a process of its own, which goes on after a fault and keeps the input that did it.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from random import Random
from typing import Any

SPACE = 16 << 30
"""Bytes of addresses for a target, so that a bomb ends itself and not the machine."""
OWN, AFRESH = 0.7, 0.5
"""Of the inputs, those that a target's own form makes, and of these, those made of a valid file and not of an input that
reached something; libFuzzer's bytes are the rest."""


def main() -> int:
    """Fuzz the named targets, or all; 1 if there was a fault."""
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=main.__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="all by default")
    parser.add_argument("--inputs", type=int, help="of each target; without it, 140,000 in all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", type=Path, default=Path(tempfile.gettempdir()) / "streamprune-faults")
    parser.add_argument("--home", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.home is not None:
        return fuzz(arguments.targets[0], arguments.inputs, arguments.seed, arguments.home, arguments.faults)
    # Only now: what is imported before atheris listens is not followed.
    from targets import TARGETS

    if unknown := set(arguments.targets) - TARGETS.keys():
        parser.error(f"no target {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    arguments.faults.mkdir(parents=True, exist_ok=True)
    print(f"{'target':<12}{'inputs':>9}{'taken':>9}{'edges':>8}{'features':>10}{'faults':>8}{'seconds':>9}", flush=True)
    faults = 0
    for name in arguments.targets or TARGETS:
        faults += report(name, arguments)
    return 1 if faults else 0


def report(name: str, arguments: argparse.Namespace) -> int:
    """Fuzz one target in a process of its own, print its line and its faults; how many there were."""
    import shutil

    from guard import make_home

    home = make_home()
    command = [sys.executable, __file__, name, "--seed", str(arguments.seed), "--home", str(home)]
    command += ["--faults", str(arguments.faults)]
    command += ["--inputs", str(arguments.inputs)] if arguments.inputs is not None else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        counted = home / "counted.json"
        found: dict[str, Any] = json.loads(counted.read_text()) if counted.is_file() else {}
    finally:
        shutil.rmtree(home, ignore_errors=True)
    reached = re.findall(r"cov: (\d+) ft: (\d+)", done.stderr)
    edges, features = reached[-1] if reached else ("?", "?")
    faults: dict[str, str] = found.get("faults", {})
    if not found.get("finished"):
        faults["it ended early"] = done.stderr[-2000:]
    columns = f"{found.get('inputs', 0):>9}{found.get('taken', 0):>9}{edges:>8}{features:>10}{len(faults):>8}"
    print(f"{name:<12}{columns}{found.get('seconds', 0):>9.0f}", flush=True)
    for message, place in faults.items():
        print(f"  {message}\n    {place}", flush=True)
    return len(faults)


def fuzz(name: str, inputs: int | None, seed: int, home: Path, faults: Path) -> int:
    """Fuzz one target in this process."""
    import hashlib
    import time

    import atheris

    with atheris.instrument_imports(include=["streamprune"]):
        from guard import Fault, Guard
        from targets import TARGETS
    from transformers.utils import logging

    logging.set_verbosity(logging.CRITICAL)
    (home / name).mkdir()
    (home / "corpus").mkdir()
    target, guard, started = TARGETS[name](home / name), Guard(home), time.monotonic()
    for number, valid in enumerate(target.seeds):
        target.read(valid)
        (home / "corpus" / str(number)).write_bytes(valid)
    resource.setrlimit(resource.RLIMIT_AS, (SPACE, SPACE))
    wanted = target.inputs if inputs is None else inputs
    counted: dict[str, Any] = {"inputs": 0, "taken": 0, "faults": {}, "finished": False}

    def keep() -> None:
        counted["seconds"] = time.monotonic() - started
        (home / "counted.json").write_text(json.dumps(counted))

    def run(data: bytes) -> None:
        counted["inputs"] += 1
        try:
            counted["taken"] += guard.read(target.read, data)
        except Fault as fault:
            message = re.sub(r"0x[0-9a-f]+|\d+", "N", str(fault))[:200]
            if message not in counted["faults"] and len(counted["faults"]) < 40:
                path = faults / f"{name}-{hashlib.sha256(data).hexdigest()[:12]}"
                path.write_bytes(data)
                counted["faults"][message] = f"{path}: {_place(fault)}"
                keep()
        if counted["inputs"] >= wanted and not counted["finished"]:
            counted["finished"] = True
            keep()

    def mutate(data: bytes, most: int, number: int) -> bytes:
        random = Random(number)
        if random.random() > OWN:
            return bytes(atheris.Mutate(data, most))
        start = random.choice(target.seeds) if random.random() < AFRESH else bytes(data)
        return target.form(start, random)[:most]

    options = [
        f"-runs={wanted}",
        f"-seed={seed}",
        "-max_len=65536",
        "-timeout=120",
        "-rss_limit_mb=0",
        "-detect_leaks=0",
    ]
    atheris.Setup([sys.argv[0], *options, str(home / "corpus")], run, custom_mutator=mutate)
    atheris.Fuzz()
    return 0


def _place(fault: BaseException) -> str:
    """Where a fault's own error was raised: the last line of ours on its way."""
    error: BaseException = fault.__cause__ or fault
    step, found = error.__traceback__, "?"
    while step is not None:
        path = step.tb_frame.f_code.co_filename
        if "/streamprune/" in path:
            found = f"{path.rpartition('/streamprune/')[2]}:{step.tb_lineno}"
        step = step.tb_next
    return found


if __name__ == "__main__":
    sys.exit(main())
