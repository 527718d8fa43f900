"""The examples that train a pruned model with other libraries, a few steps on the example model."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EXAMPLE, EXAMPLE_TEXT, ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

import streamprune
from streamprune import Config

TEXT = EXAMPLE_TEXT / "calibration.txt"


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example model without a part of its units, differing by block; not to be written to."""
    folder = tmp_path_factory.mktemp("pruned")
    kept: dict[str, Any] = {f"blocks.{b}.attention": {"keep": 3 + b % 2} for b in range(8)}
    kept |= {f"blocks.{b}.ffn": {"keep": 400 + 8 * b} for b in range(8)}
    plan = folder / "plan.json"
    plan.write_text(json.dumps({"format": "streamprune-plan-1", "ratio": 0.3, "sites": kept}))
    streamprune.prune(Config(model=EXAMPLE, out=folder / "out", recipe="magnitude", plan=plan))
    return folder / "out"


def example(name: str) -> dict[str, Any]:
    """The names that a script defines; its library must be installed."""
    return runpy.run_path(str(ROOT / "examples/training" / f"{name}.py"))


def check_trained(out: Path, before: Path) -> None:
    """Whether `out` is a pruned model of the same widths and other weights, with its tokenizer."""
    old, new = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (before, out))
    assert type(new).__name__ == "PrunedLlamaForCausalLM"
    assert new.config.streamprune == old.config.streamprune
    assert (out / "modeling_streamprune.py").is_file()
    assert not torch.equal(new.model.layers[3].mlp.up_proj.weight, old.model.layers[3].mlp.up_proj.weight)
    words = "def words(text):"
    assert (
        AutoTokenizer.from_pretrained(out)(words)["input_ids"]
        == AutoTokenizer.from_pretrained(before)(words)["input_ids"]
    )


@pytest.mark.slow
def test_distillation_lowers_the_divergence(pruned: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    text = tmp_path / "text.txt"
    text.write_text(TEXT.read_text()[:40_000])
    before, after = example("distil")["main"](str(pruned), str(EXAMPLE), str(text), str(tmp_path / "out"), "3")
    assert 0 < after < 0.97 * before
    check_trained(tmp_path / "out", pruned)


def test_the_loss_of_distillation_is_the_divergence_per_token(pruned: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    distillation = example("distil")["Distillation"]
    trainer = object.__new__(distillation)
    trainer.teacher, model = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (EXAMPLE, pruned)
    )
    ids = torch.randint(2, 4096, (2, 12), generator=torch.Generator().manual_seed(0))
    loss = trainer.compute_loss(model, {"input_ids": ids, "labels": ids})
    with torch.no_grad():
        p, q = (each(ids).logits.double().softmax(-1) for each in (trainer.teacher, model))
    torch.testing.assert_close(loss.double(), (p * (p / q).log()).sum(-1).mean(), rtol=1e-5, atol=0)
    loss.backward()
    assert all(parameter.grad is None for parameter in trainer.teacher.parameters())


@pytest.mark.slow
def test_lora(pruned: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="the example needs peft")
    assert 0 < example("lora")["main"](str(pruned), str(TEXT), str(tmp_path / "out"), "3") < 10
    check_trained(tmp_path / "out", pruned)


def conversations(folder: Path, **fields: str) -> str:
    lines = TEXT.read_text().splitlines()
    path = folder / "data.jsonl"
    rows = ({name: f"{lines[row]} {value}" for name, value in fields.items()} for row in range(24))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.slow
def test_supervised_fine_tuning(pruned: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="the example needs TRL")
    data = conversations(tmp_path, prompt="What?", completion="This.")
    assert 0 < example("sft")["main"](str(pruned), data, str(tmp_path / "out"), "2") < 20
    check_trained(tmp_path / "out", pruned)


@pytest.mark.slow
def test_preference_optimisation_loads_its_reference_by_path(pruned: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="it is about TRL")
    from datasets import load_dataset

    data = conversations(tmp_path, prompt="Which?", chosen="This one.", rejected="That one.")
    tokenizer = AutoTokenizer.from_pretrained(pruned)
    tokenizer.pad_token = tokenizer.eos_token
    trainer = trl.DPOTrainer(
        str(pruned),
        args=trl.DPOConfig(str(tmp_path / "out"), max_steps=1, bf16=False, save_strategy="no", report_to="none"),
        train_dataset=load_dataset("json", data_files=data, split="train"),
        processing_class=tokenizer,
    )
    assert type(trainer.ref_model).__name__ == "PrunedLlamaForCausalLM"
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    check_trained(tmp_path / "out", pruned)
