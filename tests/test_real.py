"""benchmarks/real: what is measured again, and how questions are read."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import ROOT

REAL = ROOT / "benchmarks" / "real"


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(REAL))
    spec = importlib.util.spec_from_file_location("real_main", REAL / "__main__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "real_main", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def options(tmp_path: Path) -> argparse.Namespace:
    for folder in ("cells", "pruned"):
        (tmp_path / folder).mkdir()
    given = {"out": tmp_path, "model": tmp_path / "model", "calibration": "c", "test": "t", "dtype": "float32"}
    return argparse.Namespace(**given, samples=4, seq_len=8, eval_seq_len=8, limit=None, keep=False)


def test_only_what_was_not_asked_before_is_measured(
    real: ModuleType, options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []

    def command(what: str, *words: Any) -> Any:
        called.append("questions" if "--tasks" in words else what)
        if what == "run":
            words[1].mkdir(parents=True)
            (words[1] / "report.json").write_text(json.dumps({"surveyed_before": False}))
            return {"seconds": 1.0}
        return {"tasks": {"results": {"arc": {"acc,none": 0.5}}}, "perplexity": 7.0}

    monkeypatch.setattr(real, "streamprune", command)

    def measured(row: str, ratio: float, *tasks: str) -> list[str]:
        called.clear()
        cell = real.measure(options, row, ratio, tasks)
        assert cell["perplexity"] == 7
        assert cell.get("accuracy") == ({"arc": 0.5} if tasks else None)
        return [*called]

    assert measured("sobp", 0.3) == ["run", "eval"]
    assert measured("sobp", 0.3) == []
    assert measured("sobp", 0.3, "arc") == ["run", "questions"]  # the checkpoint was not kept
    assert measured("sobp", 0.3, "arc") == []
    options.keep = True
    assert measured("sobp", 0.2) == ["run", "eval"]
    assert measured("sobp", 0.2, "arc") == ["questions"]
    options.samples = 5
    assert measured("sobp", 0.5, "arc") == ["run", "eval", "questions"]
    assert measured("dense", 0.0) == ["eval"]
    assert measured("dense", 0.0, "arc") == ["questions"]
