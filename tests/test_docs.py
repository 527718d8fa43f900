"""The documentation's code runs, and its tables are what the code does."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, TINY, make_tiny

import streamprune
from streamprune.commands.status import EXIT_CODES
from streamprune.errors import Stopped
from streamprune.jobs.config import Config

Tiny = Callable[..., Path]


@pytest.mark.slow
def test_the_blocks_of_python_md_run_in_order(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny(tmp_path / "llama", "llama")
    for name, part in (("text.txt", slice(0, 2500)), ("test.txt", slice(2500, 3000))):
        (tmp_path / name).write_text(text.read_text()[part])
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "python.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) > 6
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)
    assert {"smaller", "by-sobp", "watched", "in-parts", "llama-compare", "tuned"} <= {
        p.name for p in tmp_path.iterdir()
    }


def test_python_md_names_what_there_is() -> None:
    page = (ROOT / "docs" / "python.md").read_text()
    for name in ("prune", "load", "RECIPES", "Progress", "Callback", "Event", "Stopped", "status", "forecast_job"):
        assert name in streamprune.__all__
        assert name in page
    for name in re.findall(r"`?streamprune\.(\w+)", page):
        assert hasattr(streamprune, name), name


def test_the_exit_codes_are_the_tables() -> None:
    page = (ROOT / "docs" / "batch.md").read_text()
    _, first, second = re.split(r"^\| code \|", page, flags=re.MULTILINE)
    told = dict(re.findall(r"^\| (\d+) \| ([a-z ]+)", second.split("## Signals")[0], re.MULTILINE))
    for state, code in EXIT_CODES.items():
        assert told[str(code)].startswith(state)
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", first, re.MULTILINE)}
    errors = streamprune.StreamPruneError.__subclasses__()
    assert {error.exit_code for error in errors} | {0, 130} == codes
    assert Stopped.exit_code == EXIT_CODES["interrupted"]


def test_every_setting_of_config_is_an_option_by_its_name() -> None:
    from dataclasses import fields

    from streamprune_cli import main

    options = {parameter.name for parameter in main.commands["run"].params}
    assert {field.name for field in fields(Config)} <= options


def test_the_types_ship() -> None:
    assert (Path(streamprune.__file__).parent / "py.typed").is_file()
    assert '"py.typed"' in (ROOT / "pyproject.toml").read_text()


def test_the_table_of_checks_has_all_kinds_and_checks() -> None:
    """What passes is written by `scripts/test --all --checks`; a kind or a check that came since is missed here."""
    page = (ROOT / "docs" / "checks.md").read_text(encoding="utf-8")
    rows = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("|")}
    assert rows.keys() - {"kind", "---"} == set(TINY)
    assert "✗" not in page
    checks = {
        title
        for path in (ROOT / "tests").rglob("test_*.py")
        for title in re.findall(r'mark\.check\("(.*?)"\)', path.read_text())
    }
    assert {line.partition(". ")[2] for line in page.splitlines() if line[:1].isdigit()} == checks - {"(.*?)"}
