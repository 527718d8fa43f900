"""Windows of blocks: blocks outside stay unchanged, blocks inside are pruned as if there were no others."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import reference
import torch
from conftest import contents

import streamprune
from streamprune import Config
from streamprune.errors import ConfigError
from streamprune.jobs.names import job_folder
from streamprune.model.checkpoint import Checkpoint
from streamprune.model.skeleton import Skeleton, open_skeleton
from streamprune.pruning.job import Job
from streamprune.recipes.allocation import Budget, allocate, largest_unit
from streamprune.recipes.plan import Plan

pytestmark = pytest.mark.usefixtures("float64_norms")
Make = Callable[..., Config]
Tiny = Callable[..., Path]
DEPTH = 4


def skeleton_of(path: Path) -> Skeleton:
    return open_skeleton(path, torch.device("cpu"), "float64")


def outside_is_untouched(source: Path, out: Path, window: range) -> None:
    """Check that each tensor outside the window has the source's bytes, and that some inside differ."""
    before, after = Checkpoint(source), Checkpoint(out)
    blocks = skeleton_of(source).architecture.blocks
    inside = tuple(f"{blocks}.{index}." for index in window)
    changed = set()
    for name in before:
        old, new = before.read(name), after.read(name)
        if old.dtype == new.dtype and torch.equal(old, new):
            continue
        assert name.startswith(inside), name
        changed.add(name.split(".")[blocks.count(".") + 1])
    assert changed <= {str(index) for index in window}
    assert changed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("recipe", ["default", "sobp", "slimgpt", "greedy-output", "wanda-sp", "magnitude"])
def test_blocks_outside_keep_their_bytes(recipe: str, name: str, tiny: Tiny, configured: Make) -> None:
    path = tiny(name, torch.bfloat16, num_hidden_layers=DEPTH)
    config = configured(path, recipe=recipe, blocks=(1, 3), ratio=0.2)
    streamprune.prune(config)
    outside_is_untouched(path, config.out, range(1, 3))
    report = json.loads((config.out / "report.json").read_text())
    for site in report["sites"]:
        if int(site["site"].split(".")[1]) not in (1, 2):
            assert site["kept"] == site["units"]


@pytest.mark.parametrize("ratio_of", ["blocks", "window", "model"])
def test_the_ratio_counts_what_it_is_of(ratio_of: str, tiny: Tiny, configured: Make) -> None:
    path = tiny("llama-biased", num_hidden_layers=DEPTH)
    config = configured(path, recipe="slimgpt", blocks=(1, 4), ratio_of=ratio_of, ratio=0.3)
    result = streamprune.prune(config)
    model = reference.load(path)
    counted = {
        "blocks": reference.block_parameters(model),
        "window": sum(p.numel() for block in model.model.layers[1:4] for p in block.parameters()),
        "model": model.num_parameters(),
    }
    assert len(set(counted.values())) == 3
    removed = result.parameters_before - result.parameters_after
    sites = [site for site in skeleton_of(path).all_sites() if site.block in range(1, 4)]
    budget = Budget(0.3, counted[ratio_of], 4)
    assert 0 <= round(0.3 * counted[ratio_of]) - removed < largest_unit(sites, budget)
    assert result.ratio_blocks == removed / counted["blocks"]
    assert result.ratio_model == removed / counted["model"]
    assert model.num_parameters() - streamprune.load(config.out).num_parameters() == removed


def test_the_models_ratio_needs_no_window(tiny: Tiny, configured: Make) -> None:
    path = tiny("llama-biased")
    result = streamprune.prune(configured(path, recipe="magnitude", ratio_of="model", ratio=0.3))
    assert result.ratio_model == pytest.approx(0.3, abs=0.02)
    assert result.ratio_blocks > 0.32
    with pytest.raises(ConfigError, match="this model can lose at most"):
        streamprune.prune(configured(path, "more", recipe="magnitude", ratio_of="window", blocks=(0, 1), ratio=0.99))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": (0, 5)}, r"blocks is 0:5; .* has 4 blocks, so it must end by 4"),
        ({"blocks": (4, 5)}, r"blocks is 4:5; .* has 4 blocks"),
        ({"blocks": (1, 3), "layout": "uniform"}, r"blocks is 1:3; the uniform layout keeps blocks alike"),
        ({"blocks": (1, 2), "ratio": 0.3}, r"ratio is 0\.3; .*can lose at most"),
    ],
)
def test_windows_that_cannot_be_are_refused(
    change: dict[str, object], message: str, tiny: Tiny, configured: Make
) -> None:
    config = configured(tiny("llama", num_hidden_layers=DEPTH), **change)
    with pytest.raises(ConfigError, match=message):
        streamprune.prune(config)
    assert not config.out.exists()
    assert not job_folder(config.out).exists()


@pytest.mark.parametrize("blocks", [(2, 2), (3, 1), (-1, 2)])
def test_windows_that_are_none_are_refused(blocks: tuple[int, int], configured: Make) -> None:
    with pytest.raises(ConfigError, match=rf"blocks is {blocks[0]}:{blocks[1]}; it must be A:B"):
        configured(Path("nowhere"), blocks=blocks)


def test_a_ratio_of_something_else_is_refused(configured: Make) -> None:
    with pytest.raises(ConfigError, match="ratio_of is 'heads'; it must be one of blocks, window, model"):
        configured(Path("nowhere"), ratio_of="heads")


def test_all_blocks_are_the_window_of_all(tiny: Tiny, configured: Make) -> None:
    path = tiny("llama", num_hidden_layers=DEPTH)
    for out, blocks in (("all", None), ("window", (0, DEPTH))):
        streamprune.prune(configured(path, out, recipe="default", blocks=blocks))
    streamprune.prune(configured(path, "uniform", layout="uniform", blocks=(0, DEPTH)))
    one, other = (
        {name: data for name, data in contents(configured(path, out).out).items() if "safetensors" in name}
        for out in ("all", "window")
    )
    assert one == other


def test_a_plan_that_goes_beyond_the_window_is_refused(tiny: Tiny, configured: Make, tmp_path: Path) -> None:
    path = tiny("llama", num_hidden_layers=DEPTH)
    plan = tmp_path / "plan.json"
    plan.write_bytes(streamprune.plan_only(configured(path, "planned")).read_bytes())
    lost = [site for site in skeleton_of(path).all_sites() if site.block == 3]
    name = next(site.name for site in lost if Plan.read(plan)[site.name].keep < site.units)
    config = configured(path, plan=plan, blocks=(0, 3))
    with pytest.raises(ConfigError, match=rf"{name} keeps \d+ of \d+; it lies outside blocks 0:3"):
        streamprune.prune(config)
    assert not config.out.exists()


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt-350m"])
@pytest.mark.parametrize("window", [range(1, 3), range(2, 4)])
def test_default_in_a_window_is_the_plain_implementation(
    name: str, window: range, tiny: Tiny, configured: Make
) -> None:
    path = tiny(name, torch.float64, num_hidden_layers=DEPTH)
    config = configured(
        path, recipe="default", dtype="float64", ratio=0.2, blocks=(window.start, window.stop), samples=8
    )
    tokens, sites = Job(config, None).tokens, skeleton_of(path).all_sites()
    twins, _ = reference.default(path, tokens, sites, ratio=0.2, round_to=4, window=window)
    streamprune.prune(config)
    same_result(config, twins, tokens)


@pytest.mark.slow
@pytest.mark.parametrize("shots", [1, 2])
def test_default_in_a_window_over_shots(shots: int, tiny: Tiny, configured: Make) -> None:
    path = tiny("llama-biased", torch.float64, num_hidden_layers=DEPTH)
    settings = {"shots": str(shots), "target": "dense"}
    config = configured(path, recipe="default", dtype="float64", ratio=0.2, blocks=(1, 3), settings=settings)
    tokens, sites = Job(config, None).tokens, skeleton_of(path).all_sites()
    twins, _ = reference.default(
        path, tokens, sites, ratio=0.2, round_to=4, window=range(1, 3), shots=shots, target="dense"
    )
    streamprune.prune(config)
    same_result(config, twins, tokens)


def test_sobp_in_a_window_is_the_plain_implementation(tiny: Tiny, configured: Make) -> None:
    path = tiny("qwen3", torch.float64, num_hidden_layers=DEPTH)
    config = configured(path, recipe="sobp", dtype="float64", ratio=0.2, blocks=(1, 3))
    tokens = Job(config, None).tokens
    twins = reference.Twins(path, skeleton_of(path).all_sites())
    gradients = reference.mask_gradients(twins.dense, twins.places, tokens)
    inside = [site for site in twins.sites if site.block in (1, 2)]
    densities = {
        site.name: (gradients[site.name].square().mean(dim=0) / site.unit_parameters).sort().values for site in inside
    }
    twins.prune(allocate(inside, densities, Budget(0.2, twins.parameters, 4)), tokens)
    streamprune.prune(config)
    same_result(config, twins, tokens)


def same_result(config: Config, twins: reference.Twins, tokens: torch.Tensor) -> None:
    report = json.loads((config.out / "report.json").read_text())
    assert {site["site"]: site["kept"] for site in report["sites"]} == {
        name: len(units) for name, units in twins.kept.items()
    }
    pruned = streamprune.load(config.out, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(pruned(tokens).logits, twins.pruned(tokens).logits, rtol=1e-7, atol=1e-7)


def test_without_refitting_a_window_is_a_plan_that_keeps_the_rest(tiny: Tiny, configured: Make, tmp_path: Path) -> None:
    """wanda-sp moves the pruned stream through every block and changes only those that lose units: bytes are equal."""
    path = tiny("llama", num_hidden_layers=DEPTH)
    window = configured(path, "window", recipe="wanda-sp", blocks=(1, 3), ratio=0.2)
    plan = tmp_path / "plan.json"
    plan.write_bytes(streamprune.plan_only(window).read_bytes())
    streamprune.prune(window)
    streamprune.prune(replace(window, out=tmp_path / "plan", blocks=None, plan=plan))
    one, other = (
        {name: data for name, data in contents(tmp_path / out).items() if "safetensors" in name}
        for out in ("window", "plan")
    )
    assert one == other
