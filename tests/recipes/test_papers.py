"""The papers' tables: their data, the commands they become, and one run on a tiny checkpoint."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
from conftest import ROOT, shared
from streamprune_cli import main as commands
from streamprune_cli import options

import streamprune
from streamprune.recipes.settings import parse

Tiny = Callable[..., Path]


def load() -> ModuleType:
    """benchmarks/papers/run.py as a module."""
    spec = importlib.util.spec_from_file_location("papers_run", ROOT / "benchmarks" / "papers" / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


papers = load()
TABLES = {name: papers.Table.read(name) for name in papers.TABLES}
ROWS = [pytest.param(row, id=f"{row.model}-{row.label}-{row.ratio:g}") for t in TABLES.values() for row in t.rows]


def parsed(command: list[str]) -> dict[str, Any]:
    """What the command line makes of the arguments; it must know them all."""
    program, name, *arguments = command
    assert program == "streamprune"
    found = commands.commands[name]
    assert isinstance(found, click.Command)
    return found.make_context(name, arguments).params


@pytest.mark.parametrize("row", ROWS)
def test_every_row_says_where_it_is_from_and_its_commands_do_what_the_library_is_told(row: Any) -> None:
    assert 0 < row.ratio < 1
    assert row.source.startswith(
        ("FANG, table", "LLM Surgeon, table", "Greedy Output Approximation, table", "SlimGPT;")
    )
    assert row.dense > 1
    # Pruned a little, some are better than before.
    assert row.published is None or row.published > 0.85 * row.dense
    parse(row.recipe, row.settings)
    run, evaluate = (parsed(c) for c in row.commands(Path("m"), Path("c.txt"), Path("t.txt"), Path("out")))
    jobs = {"plan_only", "restart", "strict", "as_json", "quiet"}
    config = options.config(**{name: value for name, value in run.items() if name not in jobs})
    expected = streamprune.Config(
        model=Path("m"),
        out=Path("out") / f"{row.label}-{row.ratio:g}",
        ratio=row.ratio,
        recipe=row.recipe,
        settings=row.settings,
        **row.common("c.txt"),
    )
    assert config == expected
    assert evaluate["model"] == config.out
    assert evaluate["seq_len"] == row.eval_seq_len


@pytest.mark.parametrize(
    ("source", "place"),
    [
        ("FANG", ("PEERS.md",)),
        ("LLM Surgeon", ("papers", "llm-surgeon.txt")),
        ("Greedy Output", ("papers", "greedy-output-approximation.txt")),
    ],
)
def test_the_figures_stand_in_their_source(source: str, place: tuple[str, ...]) -> None:
    found = {float(figure) for figure in re.findall(r"\d+(?:\.\d+)?", shared(*place).read_text(encoding="utf-8"))}
    rows = [row for table in TABLES.values() for row in table.rows if row.source.startswith(source)]
    assert rows
    for row in rows:
        assert row.published in found, row
        assert row.dense in found, row


def test_no_row_is_there_twice_and_every_model_has_one() -> None:
    for table in TABLES.values():
        keys = [(row.model, row.label, row.ratio) for row in table.rows]
        assert len(set(keys)) == len(keys)
        assert {row.model for row in table.rows} == set(table.models)


def test_the_default_recipe_stands_beside_the_lowest_figure() -> None:
    rows = TABLES["llama-2048"].rows
    for best in (row for row in rows if row.label == "default"):
        others = [r.published for r in rows if (r.model, r.ratio) == (best.model, best.ratio) and r is not best]
        assert best.published <= min(others)


def test_the_windows_are_the_papers() -> None:
    windows = {(row.model, row.blocks) for row in TABLES["tokens-128"].rows if row.recipe == "greedy-output"}
    llamas = {(name, (4, 30)) for name in ("LLaMA-7B", "Llama-2-7B", "Llama-3.1-8B", "Vicuna-7B")}
    assert windows == llamas | {("GPT-2", None)}


def test_gaps_are_of_log_perplexity() -> None:
    row = next(row for row in TABLES["llama-2048"].rows if row.model == "Llama-2-7B" and row.ratio == 0.3)

    class Line:
        ratio_blocks, perplexity, log_gap = 0.3, 8.0, math.log(8 / 5)

    found = papers.entry(row, 5.0, Line())
    assert found["published gap"] == pytest.approx(math.log(7.58 / 5.47))
    assert found["difference"] == pytest.approx(math.log(8 / 5) - math.log(7.58 / 5.47))


def test_a_model_that_no_paper_has(
    tiny: Tiny, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [
        "tokens-128",
        "--as",
        "any",
        "--model",
        str(tiny("llama")),
        "--calibration",
        str(text),
        "--text",
        str(text),
    ]
    given += ["--only", "greedy-output,wanda-sp", "--out", str(tmp_path / "work")]
    papers.main([*given, "--commands"])
    # Blocks 4 to 30 of 32 are 0 to 3 of 3, and the context is 64.
    assert "--samples 16 --seq-len 64 --ratio-of window --blocks 0:3" in capsys.readouterr().out
    assert not (tmp_path / "work").exists()
    papers.main([*given, "--json"])
    found = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["recipe"], row["ratio"]) for row in found] == [
        (label, ratio) for label in ("greedy-output", "wanda-sp") for ratio in (0.25, 0.5)
    ]
    for row in found:
        assert row["published"] is row["difference"] is None
        assert row["gap"] == pytest.approx(math.log(row["measured"] / row["dense"]))
    # The second time nothing is pruned again.
    monkeypatch.setattr(
        sys.modules["streamprune.commands.compare.run"], "prune", lambda *a, **k: pytest.fail("pruned again")
    )
    papers.main(given)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["recipe", "ratio", "ratio", "of", "removed", "dense", "measured", "gap"]
    assert len(lines) == 7


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["surgeon", "--as", "LLaMA-7B"], "table surgeon has OPT-125m"),
        (["surgeon", "--as", "OPT-125m", "--only", "sobp"], "it has surgeon, surgeon-rows"),
        (["surgeon", "--as", "OPT-125m", "--ratios", "0.25"], "at 0.1, 0.2, 0.3, 0.4, 0.5"),
        (["surgeon", "--as", "OPT-125m", "--ratios", "much"], "invalid"),
        (["surgeon", "--as", "any"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        papers.main([*given, "--model", "nowhere", "--calibration", "c", "--text", "t"])
    assert stopped.value.code in (1, 2)
    assert message in capsys.readouterr().err.splitlines()[-1]
