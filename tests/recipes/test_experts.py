"""Mixtures of experts: each expert is a separate site, and the router is unchanged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import contents
from safetensors.torch import load_file
from stopping import windows
from streamprune_cli import main

import streamprune
from streamprune import Config, TuneConfig
from streamprune.commands.tune import lora
from streamprune.errors import CalibrationError
from streamprune.jobs.forecast import memory as forecast_memory
from streamprune.jobs.forecast.memory import Memory
from streamprune.jobs.forecast.workload import Workload
from streamprune.jobs.names import job_folder
from streamprune.model.skeleton import open_skeleton
from streamprune.pruning import block as pruning_block

Make = Callable[..., Config]
Tiny = Callable[..., Path]


def scarcely(configured: Make, path: Path, **changes: Any) -> Config:
    """A job whose few tokens are enough for some experts, and not for others."""
    return configured(path, ratio=0.15, samples=2, round_to=1, **changes)


def sent(path: Path, tokens: torch.Tensor) -> list[list[int]]:
    """How many of the tokens transformers' own router sends each expert of each block."""
    model: Any = streamprune.load(path, dtype=torch.float32, experts_implementation="eager")
    with torch.no_grad():
        logits = model(tokens, output_router_logits=True).router_logits
    return [block.topk(2, dim=-1).indices.flatten().bincount(minlength=4).tolist() for block in logits]


def test_a_survey_counts_what_transformers_own_router_sends(tiny: Tiny, configured: Make) -> None:
    path = tiny("olmoe")
    config = scarcely(configured, path, recipe="default")
    streamprune.plan_only(config)
    counts = sent(path, windows(config, path))
    for index, file in enumerate(sorted(job_folder(config.out).glob("survey-*"))):
        found = load_file(file)
        assert [int(found[f"ffn.{number}.seen"]) for number in range(4)] == counts[index]
    assert {count < 24 for block in counts for count in block} == {False, True}


@pytest.mark.parametrize("recipe", ["default", "sobp", "wanda-sp"])
def test_an_expert_that_saw_too_few_tokens_is_left_alone(recipe: str, tiny: Tiny, configured: Make) -> None:
    path = tiny("olmoe")
    config = scarcely(configured, path, recipe=recipe)
    said: list[str] = []
    result = streamprune.prune(config, progress=streamprune.Callback(lambda event: said.append(event.message)))
    report = json.loads((config.out / "report.json").read_text())
    dense, pruned = (open_skeleton(p, torch.device("cpu"), "float32") for p in (path, config.out))
    alone = [site for site in report["sites"] if site.get("left_alone")]
    assert 0 < len(alone) < 12
    for site in report["sites"]:
        if ".ffn." not in site["site"]:
            continue
        block, number = (int(part) for part in site["site"].split(".")[1::2])
        assert bool(site.get("left_alone")) == (site["tokens"] < 24)
        if site in alone:
            assert site["kept"] == 24
            assert f"{site['site']} saw {site['tokens']} tokens and is left alone" in said
            name = f"model.layers.{block}.mlp.experts.{number}.down_proj.weight"
            assert torch.equal(dense.checkpoint.read(name), pruned.checkpoint.read(name))
    assert "were left alone" in (config.out / "README.md").read_text()
    assert f"{len(alone)} experts saw too few" in streamprune.report(config.out).read_text()
    assert f"{len(alone)} experts saw too few" in CliRunner().invoke(main, ["inspect", str(config.out)]).stdout
    # A survey knows beforehand, and the others lose what is to go; without one, less goes than was asked for.
    if recipe == "wanda-sp":
        assert result.ratio_blocks < 0.14
    else:
        assert result.ratio_blocks == pytest.approx(0.15, abs=0.012)
    assert streamprune.load(config.out).num_parameters() == result.parameters_after
    for block in range(3):
        router = f"model.layers.{block}.mlp.gate.weight"
        assert torch.equal(dense.checkpoint.read(router), pruned.checkpoint.read(router))


@pytest.mark.parametrize("recipe", ["default", "wanda-sp"])
def test_the_uniform_layout_cannot_leave_one_alone(recipe: str, tiny: Tiny, configured: Make) -> None:
    config = scarcely(configured, tiny("olmoe"), recipe=recipe, layout="uniform")
    with pytest.raises(CalibrationError, match=r"ffn\.\d saw \d+ tokens, fewer than its 24 channels.*--layout free"):
        streamprune.prune(config)
    assert not config.out.exists()


def test_grams_of_experts_in_turn_are_the_same(tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    together, apart = (configured(tiny("mixtral"), out, recipe="default") for out in ("together", "apart"))
    streamprune.prune(together)
    monkeypatch.setattr(forecast_memory, "GRAMS_AT_ONCE", 24 * 24 * 4 * 3)
    streamprune.prune(apart)
    assert contents(together.out) == contents(apart.out)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe"])
def test_experts_of_one_block_may_differ_in_width(name: str, tiny: Tiny, configured: Make, tmp_path: Path) -> None:
    config = configured(tiny(name), recipe="default", ratio=0.4, round_to=1)
    streamprune.prune(config)
    written = json.loads((config.out / "config.json").read_text())
    ((where, blocks),) = written["streamprune"]["experts"].items()
    assert where == "mlp.experts"
    assert any(len(set(widths)) > 1 for widths in blocks if widths)
    # As the source's files have it, tensor by tensor.
    index = json.loads((config.out / "model.safetensors.index.json").read_text())["weight_map"]
    stem = "block_sparse_moe.experts.1.w1" if name == "mixtral" else "mlp.experts.1.gate_proj"
    assert f"model.layers.0.{stem}.weight" in index


@pytest.mark.skipif(not lora.installed(), reason="peft is not installed")
@pytest.mark.parametrize("pruned", [False, True])
def test_experts_are_tuned_too(pruned: bool, tiny: Tiny, text: Path, configured: Make, tmp_path: Path) -> None:
    path = tiny("mixtral")
    if pruned:
        config = configured(path, recipe="default", ratio=0.3)
        streamprune.prune(config)
        path = config.out
    tuned = streamprune.tune(
        TuneConfig(
            model=path, out=tmp_path / "tuned", text=text, method="lora", samples=8, seq_len=24, steps=6, rate=1e-2
        )
    )
    assert tuned.loss_last < tuned.loss_first
    before, after = (open_skeleton(p, torch.device("cpu"), "float32") for p in (path, tmp_path / "tuned"))
    changed = {
        name for name in before.checkpoint if not torch.equal(before.checkpoint.read(name), after.checkpoint.read(name))
    }
    assert any(".w1." in name for name in changed)
    assert not any(".gate." in name for name in changed)


def test_experts_that_do_not_change_count_among_the_grams(
    tiny: Tiny, configured: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny("qwen3_moe")
    sites = open_skeleton(path, torch.device("cpu"), "float32").all_sites()
    kept = {site.name: {"keep": 8 if site.place == "ffn.3" else site.units} for site in sites}
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"format": "streamprune-plan-1", "ratio": 0.1, "sites": kept}))
    most, real = 0, pruning_block.BlockPruner._sum_h

    def measured(self: Any, *arguments: Any) -> Any:
        nonlocal most
        sums = real(self, *arguments)
        most = max(most, *(len(sums), 0))
        return sums

    monkeypatch.setattr(pruning_block.BlockPruner, "_sum_h", measured)
    monkeypatch.setattr(forecast_memory, "GRAMS_AT_ONCE", 24 * 24 * 4 * 3)
    streamprune.prune(configured(path, recipe="wanda-sp", ratio=0.1, plan=plan))
    assert most == 3


@pytest.mark.parametrize("layout", ["free", "uniform"])
def test_zeros_too_leave_an_expert_alone(layout: Any, tiny: Tiny, configured: Make) -> None:
    path = tiny("olmoe")
    settings = {"structure": "unstructured", "shots": "1"}
    config = scarcely(configured, path, recipe="surgeon", settings=settings, layout=layout)
    result = streamprune.prune(config)
    assert result.ratio_blocks == pytest.approx(0.15, abs=0.001)
    dense, pruned = (open_skeleton(p, torch.device("cpu"), "float32") for p in (path, config.out))
    sites = json.loads((config.out / "report.json").read_text())["sites"]
    experts = [site for site in sites if ".ffn." in site["site"]]
    assert {bool(site.get("left_alone")) for site in experts} == {False, True}
    for site in experts:
        assert bool(site.get("left_alone")) == (site["tokens"] < 24)
        assert bool(site["zeros"]) == (site["tokens"] >= 24)
        block, number = (int(part) for part in site["site"].split(".")[1::2])
        name = f"model.layers.{block}.mlp.experts.{number}.up_proj.weight"
        same = torch.equal(dense.checkpoint.read(name), pruned.checkpoint.read(name))
        assert same == (site["tokens"] < 24)


def test_a_tokens_activations_are_those_of_the_experts_it_reaches(tiny: Tiny) -> None:
    workload, grown = Workload(samples=8, length=64, text=True, rank=8), []
    for experts in (4, 16):
        path = tiny("olmoe", num_experts=experts)
        memory = Memory(open_skeleton(path, torch.device("cpu"), "float32"), workload)
        grown.append(memory.in_memory(2) - memory.in_memory(1))
    assert grown[0] == grown[1]


def test_what_experts_become_counts_beside_what_they_are(tiny: Tiny) -> None:
    skeleton = open_skeleton(tiny("olmoe", num_experts=16), torch.device("cpu"), "float32")
    experts = sum(site.units * site.unit_parameters for site in skeleton.sites(0) if site.expert is not None)
    workload = Workload(samples=1, length=2, text=True, gram=True)
    assert Memory(skeleton, workload).device_peak(1, 1) > 4 * (skeleton.block_parameters(0) + experts)


def test_experts_that_a_plan_keeps_whole_may_see_no_tokens(tiny: Tiny, configured: Make, tmp_path: Path) -> None:
    path = tiny("qwen3_moe")
    sites = open_skeleton(path, torch.device("cpu"), "float32").all_sites()
    kept: dict[str, Any] = {site.name: {"keep": site.units} for site in sites}
    kept |= {site.name: {"keep": 1, "units": [0]} for site in sites if site.kind == "attention"}
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"format": "streamprune-plan-1", "ratio": 0.1, "sites": kept}))
    config = configured(path, recipe="surgeon", ratio=0.1, plan=plan, layout="uniform", samples=2, seq_len=8)
    streamprune.prune(config)
    found = json.loads((config.out / "report.json").read_text())["sites"]
    assert all(site["tokens"] < 24 and site["left_alone"] for site in found if ".ffn." in site["site"])


def test_bench_counts_experts_before_and_after(tiny: Tiny, configured: Make) -> None:
    """transformers' own experts take one grouped product, ours one a linear."""
    path = tiny("mixtral")
    config = configured(path, ratio=0.3, recipe="magnitude", round_to=1)
    result = streamprune.prune(config)
    found = streamprune.bench(config.out, path, prompt_tokens=16, new_tokens=2, repetitions=1)
    assert found.prefill is not None
    assert 1 < found.prefill.by_operations < 1 / (1 - 1.5 * result.ratio_blocks)
