"""The same command gives the same bytes, in the same process and in another: docs/reproducible.md."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import contents, edit_tensors, make_tiny

import streamprune
from streamprune import Config, TuneConfig
from streamprune.commands.tune import lora

pytestmark = pytest.mark.slow

RECIPES: list[dict[str, Any]] = [
    {"recipe": "default", "settings": {"shots": "2"}, "refine": 3},
    {"recipe": "default", "layout": "uniform"},
    {"recipe": "default", "layout": "decilm", "model": "wide"},
    {"recipe": "default", "calibration": "self", "samples": 3, "seq_len": 8},
    {"recipe": "sobp"},
    {"recipe": "sobp", "layout": "uniform", "refine": 3},
    {"recipe": "slimgpt"},
    {"recipe": "slimgpt", "layout": "uniform"},
    {"recipe": "greedy-output"},
    {"recipe": "greedy-output", "layout": "uniform"},
    {"recipe": "greedy-output", "calibration": "self", "metric_text": "random-tokens", "metric_samples": 3},
    {"recipe": "surgeon", "settings": {"shots": "3", "lora_steps": "2"}},
    {"recipe": "surgeon", "settings": {"shots": "2"}, "layout": "uniform"},
    {"recipe": "surgeon", "settings": {"shots": "2", "structure": "2:4"}},
    {"recipe": "random", "layout": "uniform"},
    {"recipe": "magnitude"},
    {"recipe": "wanda-sp", "layout": "uniform"},
    {"recipe": "default", "model": "mixtral"},
    {"recipe": "sobp", "activations": "float8", "memory_host": 1 << 20},
]


def make_all(folder: Path, given: Path, every: int = 1) -> None:
    """Run every job, or every n-th, once into `folder`; `given` has models of all kinds and a text."""
    text, small = given / "text.txt", {"samples": 10, "seq_len": 24, "round_to": 4}
    for number, changes in list(enumerate(RECIPES))[::every]:
        model = given / changes.get("model", "llama")
        fields: dict[str, Any] = {"ratio": 0.3, "calibration": text, **small, **changes, "model": model}
        streamprune.prune(Config(out=folder / f"run-{number}", **fields))
    tuning: dict[str, Any] = {"model": given / "student", "text": text, "samples": 10, "seq_len": 16, "steps": 4}
    streamprune.tune(TuneConfig(out=folder / "distil", method="distil", teacher=given / "llama", **tuning))
    if lora.installed():
        streamprune.tune(TuneConfig(out=folder / "lora", method="lora", **tuning))
    compared = streamprune.compare(
        given / "llama",
        ratios=[0.2, 0.4],
        recipes=["sobp", "default"],
        text=text,
        eval_seq_len=24,
        out=folder / "compare",
        calibration=text,
        **small,
    )
    found = [(row.label, row.ratio, row.ratio_blocks, row.perplexity) for row in compared.rows]
    (folder / "compare" / "found.txt").write_text(repr(found))


def made(folder: Path) -> dict[str, bytes]:
    """What must be equal: everything except what was spent."""
    found = {}
    for out in sorted(folder.iterdir()):
        files = contents(out)
        chosen = ["found.txt"] if out.name == "compare" else files
        found |= {f"{out.name}/{name}": files[name] for name in chosen}
    return found


def test_again_and_in_another_process(tmp_path: Path, text: Path) -> None:
    given = tmp_path / "given"
    given.mkdir()
    (given / "text.txt").write_text(text.read_text())
    for name in ("llama", "mixtral"):
        make_tiny(given / name, name)
    make_tiny(given / "wide", "llama", intermediate_size=768, num_hidden_layers=2)
    make_tiny(given / "student", "llama")
    noise = torch.Generator().manual_seed(3)

    def perturb(tensors: dict[str, torch.Tensor]) -> None:
        for tensor in tensors.values():
            tensor += 0.05 * torch.randn(tensor.shape, generator=noise)

    edit_tensors(given / "student", perturb)
    results = []
    for life, every in enumerate((1, 5)):
        torch.manual_seed(life)  # whose state no result may rest on
        make_all(tmp_path / f"life-{life}", given, every)
        results.append(made(tmp_path / f"life-{life}"))
    code = f"from pathlib import Path; import conftest, test_same_bytes as t; t.make_all(Path({str(tmp_path / 'other')!r}), Path({str(given)!r}))"
    program = [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}; {code}"]
    subprocess.run(program, check=True, capture_output=True, timeout=600)
    results.append(made(tmp_path / "other"))
    assert len(results[0]) > 10 * len(RECIPES)
    assert len(results[1]) > 20
    assert results[0].keys() == results[2].keys() > results[1].keys()
    for again in results[1:]:
        assert [name for name in again if again[name] != results[0][name]] == []


def test_what_does_not_decide_the_bytes(tmp_path: Path, text: Path) -> None:
    """Places for Grams and activations, and memory limits, with the same micro-batches."""
    path = make_tiny(tmp_path / "model", "llama")

    def job(out: str, **changes: Any) -> dict[str, bytes]:
        config = Config(
            model=path, out=tmp_path / out, ratio=0.3, calibration=text, samples=10, seq_len=24, round_to=4, **changes
        )
        streamprune.prune(config)
        return contents(config.out)

    plain = job("plain")
    assert job("held", memory_host=1 << 20) == plain
    assert job("cached", cache=tmp_path / "elsewhere") == plain
    assert job("room", memory=8 << 30) == plain
