"""benchmarks/matrix.py: the runtimes that need no further environment, and what it makes of results that are not as expected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EXAMPLE
from streamprune_cli.run import run

import streamprune


@pytest.fixture(scope="module", params=["uniform", "free"])
def result(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = streamprune.Config(
        model=EXAMPLE,
        out=tmp_path_factory.mktemp("result") / request.param,
        ratio=0.3,
        recipe="magnitude",
        layout=request.param,
        blocks=(2, 6) if request.param == "free" else None,
    )
    return Path(streamprune.prune(config).out)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "package"), [("transformers", "torch"), ("llama.cpp", "xllamacpp"), ("peft", "peft")])
def test_runtimes_write_what_transformers_writes(name: str, package: str, result: Path, matrix: Any) -> None:
    pytest.importorskip(package, reason=f"the {package} package is not here")
    if name == "llama.cpp":
        pytest.importorskip("gguf", reason="the gguf package is not here")
    cell = matrix.RUNTIMES[name][2](result)
    assert cell["of"] == 96
    assert matrix.outcome(cell) == "equal", cell


@pytest.mark.slow
def test_a_runtime_that_computes_something_else_is_different(result: Path, matrix: Any) -> None:
    model = matrix.loaded(result, dtype=torch.float32)
    assert matrix.outcome(matrix.compared(result, matrix.scores_of(model))) == "equal"
    model.model.layers[2].mlp.down_proj.weight.data *= 1.02
    assert matrix.outcome(matrix.compared(result, matrix.scores_of(model))) == "nearer"
    model.model.layers[2].mlp.down_proj.weight.data *= -50
    assert matrix.outcome(matrix.compared(result, matrix.scores_of(model))) == "different"


def test_the_table_replaces_the_last_one_and_names_surprises(
    tmp_path: Path, matrix: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = tmp_path / "deploy.md"
    document.write_text(f"before\n{matrix.BEGIN}\nold\n{matrix.END}\nafter\n")
    good, bad = {"equal": 96, "of": 96, "difference": 2e-6}, {"refused": "ValueError: no"}
    cells = dict.fromkeys(matrix.LAYOUTS, good)
    monkeypatch.setattr(matrix, "EXPECTED", {"vllm": {"free": "refused"}})
    for name, changed in (("peft", {}), ("vllm", {"free": bad})):
        found = {"title": name, "version": "1.2", "transformers": "5", "cells": cells | changed}
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    assert matrix.table(tmp_path, document, "2026-11-29") == []
    text = document.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "Made on 2026-11-29." in text
    assert "| vllm 1.2 | 96 of 96, 2.0e-06 | 96 of 96, 2.0e-06 | refused |" in text
    assert "| CTranslate2 | not run | not run |" in text
    assert "- vllm, free: `ValueError: no`" in text
    cells["free"] = {"equal": 95, "of": 96, "difference": 2e-6}
    (tmp_path / "peft.json").write_text(json.dumps({**found, "title": "peft", "cells": cells}))
    (tmp_path / "vllm.json").write_text(json.dumps({**found, "title": "vllm", "cells": cells | {"2:4": bad}}))
    assert [fault.split(" (")[0] for fault in matrix.table(tmp_path, document, "2026-11-30")] == [
        "peft, free: nearer",
        "vllm, free: nearer",
        "vllm, 2:4: refused",
    ]


@pytest.mark.parametrize(
    ("difference", "found", "accepted"),
    [
        (1e-6, "equal", {"nearer", "near"}),
        (0.49, "nearer", {"nearer", "near"}),
        (0.51, "near", {"near"}),
        (1.49, "near", {"near"}),
        (1.51, "different", set()),
    ],
)
def test_a_runtime_that_quantises_may_be_nearer_than_expected(
    difference: float, found: str, accepted: set[str], tmp_path: Path, matrix: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = {"equal": 96, "of": 96, "difference": difference}
    assert matrix.outcome(cell) == found
    document = tmp_path / "deploy.md"
    document.write_text(f"{matrix.BEGIN}\n{matrix.END}\n")
    of_all = {"title": "peft", "version": "1", "transformers": "5", "cells": {"free": cell}}
    (tmp_path / "peft.json").write_text(json.dumps(of_all))
    monkeypatch.setattr(matrix, "LAYOUTS", {"free": None})
    for expected in ("nearer", "near"):
        monkeypatch.setattr(matrix, "EXPECTED", {"peft": {"free": expected}})
        assert (matrix.table(tmp_path, document, "2026-11-29") == []) == (expected in accepted)


def test_layouts_are_options_of_run(matrix: Any) -> None:
    for options in filter(None, matrix.LAYOUTS.values()):
        run.make_context("run", [str(EXAMPLE), "OUT", *options.split()])


def test_a_cell_that_fails_is_refused_with_its_error(
    tmp_path: Path, matrix: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrix, "LAYOUTS", {"dense": None})
    (tmp_path / "dense").mkdir()
    matrix.attempt(tmp_path, "transformers")
    cell = json.loads((tmp_path / "transformers.json").read_text())["cells"]["dense"]
    assert "Error" in cell["refused"]
