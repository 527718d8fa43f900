"""Try every text model type and multimodal wrapper of the installed transformers; write docs/architectures.md.

    scripts/architectures                       all that have no row yet, failed or were not built, each in its own process
    scripts/architectures --only llama qwen3_5  these alone
    scripts/architectures --redo                all again
    scripts/architectures --count               totals of the rows there are, nothing else

Rows are kept in build/architectures/rows.jsonl, one line per type, so that an interrupted run resumes. Rows of other
versions of transformers, torch, streamprune or these scripts do not count. The log of a type that failed or was not
built is build/architectures/TYPE.log. A type takes some seconds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

# Before transformers is imported: it reads them once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
import transformers

from . import page, scope
from .trial import Row, trial

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "architectures.md"
FORK = multiprocessing.get_context("fork")
RETRIED = ("failed", "unbuilt")


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/architectures", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="model types to try, again if they have a row")
    parser.add_argument("--redo", action="store_true", help="try all again")
    parser.add_argument("--count", action="store_true", help="print totals of the rows there are")
    parser.add_argument("--jobs", type=int, default=2, help="types at once, one thread each (default: 2)")
    parser.add_argument("--limit", type=float, default=120, help="seconds per type (default: 120)")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "architectures", help="folder for rows and logs")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints")
    options = parser.parse_args()

    listed = scope.listed()
    if unknown := set(options.only or ()) - set(listed):
        reasons = [f"{name} ({scope.left_out(name) or 'no model type'})" for name in sorted(unknown)]
        parser.error(f"not listed: {', '.join(reasons)}")
    path = options.work / "rows.jsonl"
    rows = {name: row for name, row in read(path).items() if name in listed}
    if options.count:
        print(page.counts(rows, listed))
        return
    wanted = options.only or [
        name for name in listed if options.redo or name not in rows or rows[name]["status"] in RETRIED
    ]
    rows |= run(wanted, path, options)
    print(page.counts(rows, listed))
    if missing := set(listed) - set(rows):
        print(
            f"{len(missing)} types have no row yet; docs/architectures.md is written when all have one", file=sys.stderr
        )
        return
    PAGE.write_text(page.page(rows, listed, time.strftime("%Y-%m-%d")), encoding="utf-8")


@cache
def versions() -> dict[str, str]:
    """Return the versions of the libraries, and a digest of the code of streamprune and of these scripts as ``code``."""
    digest = hashlib.sha256()
    for path in sorted([*(ROOT / "streamprune").rglob("*.py"), *Path(__file__).parent.glob("*.py")]):
        digest.update(f"{path.relative_to(ROOT)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return {
        "transformers": transformers.__version__,
        "torch": torch.__version__.partition("+")[0],
        "code": digest.hexdigest()[:16],
    }


def read(path: Path) -> dict[str, Row]:
    """Return the last row of each type that was made with the present `versions`. Torn lines are skipped."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return {row["type"]: row for row in rows if row["versions"] == versions()}


def run(names: list[str], path: Path, options: argparse.Namespace) -> dict[str, Row]:
    """Try types, each in its own process, and append their rows to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        with path.open("a") as file:
            file.write("\n")  # after a torn line
    waiting, running, rows = list(names), dict[str, Any](), dict[str, Row]()
    try:
        while waiting or running:
            while waiting and len(running) < options.jobs:
                name = waiting.pop(0)
                folder = options.work / name
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                process = FORK.Process(target=_child, args=(name, folder))
                process.start()
                running[name] = process, folder, time.monotonic() + options.limit
            time.sleep(0.05)
            for name, (process, folder, end) in list(running.items()):
                late = time.monotonic() > end
                if process.is_alive() and not late:
                    continue
                row = {**_finished(name, process, folder, late, options.limit), "versions": versions()}
                del running[name]
                rows[name] = row
                with path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                why = f" ({row['step']}: {row['error']})" if "error" in row else ""
                print(f"{len(rows)}/{len(names)} {name}: {row['status']}{why}"[:200], flush=True)
                if not options.keep:
                    shutil.rmtree(folder)
                    if row["status"] not in RETRIED:
                        _log(folder).unlink()
    finally:
        for process, _, _ in running.values():
            _kill(process)
    return rows


def _log(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


def _kill(process: Any) -> None:
    """End a process and those that it started."""
    with suppress(ProcessLookupError):  # it has ended, or has no process group yet
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def _child(name: str, folder: Path) -> None:
    """Try one type, with its output in a log."""
    os.setsid()
    log = os.open(_log(folder), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ["HF_MODULES_CACHE"] = str(folder / "modules")

    def record(row: Row) -> None:
        temporary = folder / "row.tmp"
        temporary.write_text(json.dumps(row))
        temporary.rename(folder / "row.json")

    trial(name, folder, record)


def _finished(name: str, process: Any, folder: Path, late: bool, limit: float) -> Row:
    """Return the row of a process that ended, was killed or ran out of time."""
    if process.is_alive():
        _kill(process)
    process.join()
    found = folder / "row.json"
    row: Row = json.loads(found.read_text()) if found.exists() else {"type": name, "step": "start"}
    if late or process.exitcode:
        ended = f"took longer than {limit:g} s" if late else f"the process ended with {process.exitcode}"
        row |= {"status": "failed", "error": ended}
    return row


if __name__ == "__main__":
    main()
