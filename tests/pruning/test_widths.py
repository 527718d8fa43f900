"""`--round-to auto`, and `--tensor-parallel N`: whatever stays in a block can be split over N devices."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY

import streamprune
from streamprune.errors import ConfigError
from streamprune.model.site import Site
from streamprune.model.skeleton import open_skeleton
from streamprune.pruning.request import Request, idle
from streamprune.recipes.allocation import COARSER, ROUND_TO, steps
from streamprune.recipes.plan import Plan

Make = Callable[..., streamprune.Config]
CPU = torch.device("cpu")


def sites_of(path: Path) -> list[Site]:
    return open_skeleton(path, CPU, "auto").all_sites()


def test_auto_keeps_multiples_that_quantise(tiny: Callable[..., Path], configured: Make) -> None:
    wide = tiny("llama", intermediate_size=512)
    config = configured(wide, recipe="default", round_to="auto")
    budget = Request(config).budget()
    assert (budget.round_to, budget.coarser) == (ROUND_TO, COARSER)
    plan = Plan.read(streamprune.plan_only(config))
    widths = [plan[site.name].keep for site in sites_of(wide) if site.kind == "ffn"]
    assert min(widths) < 512
    assert not any(width % 32 for width in widths)
    # An FFN of 48 channels would have only one smaller width.
    assert Request(configured(tiny("llama"), round_to="auto")).budget().round_to == 8
    # Two devices have half the channels each: 192 are six times 32, but three of them on a device.
    for channels, devices, least in ((192, 1, 32), (192, 2, 8), (256, 2, 32)):
        shared = configured(tiny("llama", intermediate_size=channels), round_to="auto", tensor_parallel=devices)
        assert Request(shared).budget().round_to == least
    given = Request(configured(wide, round_to=24)).budget()
    assert (given.round_to, given.coarser) == (24, ())
    with pytest.raises(ConfigError, match="round_to is 'some'; it must be a whole number or auto"):
        configured(wide, round_to="some")


@pytest.mark.parametrize(
    ("name", "layout"),
    [*((name, "free") for name in sorted(TINY)), *((name, "uniform") for name in ("llama", "gpt2", "mixtral", "phi3"))],
)
def test_devices_divide_what_stays(name: str, layout: str, tiny: Callable[..., Path], configured: Make) -> None:
    model = tiny(name)
    ratio = 0.1 if name == "nemotron_h" else 0.25
    wanted = {"recipe": "magnitude", "layout": layout, "tensor_parallel": 2, "round_to": 4, "ratio": ratio}
    plan = Plan.read(streamprune.plan_only(configured(model, **wanted)))
    kept = [(site, plan[site.name].keep) for site in sites_of(model)]
    assert any(keep < site.units for site, keep in kept)
    for site, keep in kept:
        left = site.keeping(keep) if keep else site
        assert left.heads % 2 == 0
        if site.units > 1:  # the only key/value head of multi-query attention is copied
            assert keep % 2 == 0
        if site.kind == "ffn" and keep < site.units:
            assert keep % 8 == 0


def test_sublayers_that_go_whole_are_ffns(tiny: Callable[..., Path], configured: Make) -> None:
    for devices, whole in ((1, {"attention", "linear", "ffn"}), (2, {"ffn"})):
        request = Request(configured(tiny("qwen3_5"), recipe="default", tensor_parallel=devices, ratio=0.1))
        gone = {site.kind for site in request.sites if steps(site, request.budget())[-1] == site.units}
        assert gone == whole


@pytest.mark.parametrize(
    ("name", "devices", "said"),
    [
        ("llama", 4, r"blocks\.0\.attention of .* has 2 key/value heads, which 4 does not divide"),
        ("opt", 3, r"blocks\.0\.attention of .* has 4 heads, which 3 does not divide"),
        ("falcon-7b", 8, r"blocks\.0\.attention of .* has 4 heads, which 8 does not divide"),
        ("falcon-rw", 5, r"blocks\.0\.ffn of .* has 48 channels, which 5 does not divide"),
    ],
)
def test_a_model_that_devices_cannot_share_is_refused(
    name: str, devices: int, said: str, tiny: Callable[..., Path], configured: Make
) -> None:
    config = configured(tiny(name), tensor_parallel=devices)
    with pytest.raises(ConfigError, match=f"tensor_parallel is {devices}; {said}"):
        streamprune.prune(config)
    assert not config.out.exists()


def plan_of(model: Path, path: Path, **keeps: int) -> Path:
    """Write a plan by which sites of block 1 keep so many units, by kind, and all others everything."""
    entries = {s.name: {"keep": keeps.get(s.kind, s.units) if s.block == 1 else s.units} for s in sites_of(model)}
    path.write_text(json.dumps({"format": "streamprune-plan-1", "ratio": 0.3, "sites": entries}))
    return path


def test_a_model_that_has_lost_attention_is_refused(
    tiny: Callable[..., Path], configured: Make, tmp_path: Path
) -> None:
    model = tiny("llama")
    for kind, refused in (("attention", True), ("ffn", False)):
        given: dict[str, Any] = {"ratio": None, "plan": plan_of(model, tmp_path / "plan.json", **{kind: 0})}
        without = configured(model, kind, recipe="magnitude", **given).out
        streamprune.prune(configured(model, kind, recipe="magnitude", **given))
        Request(configured(without, recipe="magnitude"))
        wanted = configured(without, recipe="magnitude", tensor_parallel=2)
        if refused:
            said = f"tensor_parallel is 2; block 1 of {without} has lost its attention, and servers"
            with pytest.raises(ConfigError, match=re.escape(said)):
                Request(wanted)
        else:
            Request(wanted)


def test_masks_do_not_depend_on_devices(tiny: Callable[..., Path], configured: Make) -> None:
    found = []
    for devices in (1, 3):  # three divide neither heads nor channels
        masks = {"recipe": "magnitude", "settings": {"structure": "2:4"}, "tensor_parallel": devices}
        config = configured(tiny("llama"), f"devices-{devices}", **masks)
        assert idle(config)["tensor_parallel"] == "shapes stay"
        streamprune.prune(config)
        found.append({path.name: path.read_bytes() for path in config.out.glob("*.safetensors")})
    assert found[0] == found[1]


def test_a_plan_is_checked(tiny: Callable[..., Path], configured: Make, tmp_path: Path) -> None:
    model = tiny("llama")

    def given(**keeps: int) -> Path:
        return plan_of(model, tmp_path / "plan.json", **keeps)

    cases: list[tuple[dict[str, int], str]] = [
        ({"ffn": 45}, r"blocks\.1\.ffn of .*plan\.json has 45 channels, which 2 does not divide"),
        ({"attention": 1}, r"blocks\.1\.attention of .*plan\.json has 1 key/value heads, which"),
        ({"attention": 0}, r"blocks\.1\.attention goes in .*plan\.json, and servers"),
    ]
    for keeps, said in cases:
        fields: dict[str, Any] = {"recipe": "magnitude", "ratio": None, "tensor_parallel": 2, "plan": given(**keeps)}
        with pytest.raises(ConfigError, match=said):
            streamprune.prune(configured(model, **fields))
    fields = {"recipe": "magnitude", "ratio": None, "tensor_parallel": 2, "plan": given(ffn=0)}
    assert streamprune.prune(configured(model, **fields)).parameters_after
