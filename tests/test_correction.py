"""Low-rank corrections against full autograd, and across kills."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, contents
from test_run import interrupted

import streamprune
from streamprune.correction import Corrector
from streamprune.methods.recipe import Correction
from streamprune.model.skeleton import open_skeleton

Make = Callable[..., streamprune.Config]
Tiny = Callable[..., Path]


def plain_lora(path: Path, tokens: torch.Tensor, corrector: Corrector, how: Correction) -> dict[str, torch.Tensor]:
    """The same steps on the whole model in memory: every corrected weight by its full name."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    model.requires_grad_(False)
    skeleton = corrector.skeleton
    pairs: dict[str, tuple[torch.nn.Parameter, torch.nn.Parameter]] = {}
    base = {}
    for index in range(len(skeleton)):
        block = skeleton.build_block(index, skeleton.read_block(index))
        state = corrector._read(0, index, block)
        for name, full in skeleton.block_names(index).items():
            if f"u.{name}" in state:
                pairs[full] = (torch.nn.Parameter(state[f"u.{name}"]), torch.nn.Parameter(state[f"v.{name}"]))
                base[full] = model.get_parameter(full).detach().clone()
    optimiser = torch.optim.Adam([p for pair in pairs.values() for p in pair], lr=how.rate)
    for step in range(how.steps):
        for group in optimiser.param_groups:
            group["lr"] = how.rate * (1 - step / how.steps)
        generator = torch.Generator().manual_seed(corrector.seed * 1_000_003 + step)
        rows = tokens[torch.randperm(len(tokens), generator=generator)[:8]]
        weights = {full: base[full] + u @ v for full, (u, v) in pairs.items()}
        logits = torch.func.functional_call(model, weights, (rows,)).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return {full: (base[full] + u @ v).detach() for full, (u, v) in pairs.items()}


@pytest.mark.usefixtures("float64_norms")
@pytest.mark.parametrize("name", TINY)
def test_steps_are_those_of_full_autograd(name: str, tiny: Tiny, tmp_path: Path) -> None:
    path = tiny(name, torch.float64)
    skeleton = open_skeleton(path, torch.device("cpu"), "float64")
    tokens = torch.randint(skeleton.vocabulary, (11, 12), generator=torch.Generator().manual_seed(5))
    how = Correction(steps=3, rank=2, rate=1e-2)
    corrector = Corrector(skeleton, tokens, tmp_path / "work", how, seed=3, batch=3, keep_zeros=False)
    assert list(corrector.steps(0)) == [0, 1, 2]
    expected = plain_lora(path, tokens, corrector, how)
    moved = 0
    for index in range(len(skeleton)):
        block = skeleton.build_block(index, skeleton.read_block(index))
        before = dict(block.weights)
        weights = corrector.corrected(block, index)
        for inner, full in skeleton.block_names(index).items():
            if full in expected:
                torch.testing.assert_close(weights[inner], expected[full], rtol=1e-6, atol=1e-9)
                assert torch.linalg.matrix_rank(weights[inner] - before[inner], rtol=1e-8) <= 2
                moved += not torch.equal(weights[inner], before[inner])
            else:
                assert torch.equal(weights[inner], before[inner])
    assert moved == len(expected) > 0


def test_zeros_stay_zero(tiny: Tiny, configured: Make) -> None:
    settings = {"structure": "2:4", "shots": "2", "lora_steps": "2"}
    config = configured(tiny("llama"), recipe="surgeon", ratio=0.5, settings=settings)
    streamprune.prune(config)
    model = streamprune.load(config.out)
    for name, parameter in model.named_parameters():
        if "proj" in name:
            assert bool(((parameter.view(-1, 4) == 0).sum(dim=1) == 2).all()), name


@pytest.mark.parametrize("steps", [1, 9, 17, 24, 30])
def test_an_interrupted_correction_ends_with_the_same_bytes(
    steps: int, tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"shots": "2", "lora_steps": "3"}
    config = configured(tiny("llama"), recipe="surgeon", settings=settings)
    whole = replace(config, out=config.out.with_name("whole"))
    streamprune.prune(whole)
    interrupted(config, monkeypatch, steps)
    streamprune.prune(config)
    assert contents(config.out) == contents(whole.out)
    assert json.loads((config.out / "report.json").read_text())["shots"] == 2
