"""The table of `plan` against results that are really made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from stopping import Make, Tiny

import streamprune
from streamprune.errors import ConfigError
from streamprune.model.checkpoint import Shard, data_bytes
from streamprune.model.site import Site
from streamprune.pruning.curves import predicted_loss
from streamprune.recipes.registry import RECIPES
from streamprune.recipes.settings import parse


@pytest.mark.parametrize(("recipe", "kept"), [("default", True), ("magnitude", False)])
def test_rows_are_the_results(recipe: str, kept: bool, tiny: Tiny, configured: Make, tmp_path: Path) -> None:
    model, survey = tiny("llama", torch.bfloat16, hidden_size=64, intermediate_size=256), tmp_path / "survey"
    own = {"survey": survey} if kept else {}
    config = configured(model, recipe=recipe, ratio=0.35, **own)
    before = streamprune.preview(config)
    assert before.surveyed is not kept
    assert all(each.loss is None for each in before.outcomes)
    result = streamprune.prune(config)
    found = streamprune.preview(config)
    assert found.surveyed
    assert [each.ratio for each in found.outcomes] == [0, 0.1, 0.2, 0.3, 0.35, 0.4, 0.5, 0.6]
    dense, row = found.outcomes[0], next(each for each in found.outcomes if each.ratio == 0.35)
    assert row.weights["bf16"] == sum(data_bytes(path) for path in config.out.glob("*.safetensors"))
    assert (dense.parameters, row.parameters) == (result.parameters_before, result.parameters_after)
    # The others may grow where rows fall back to a larger type.
    sizes = [each.weights["bf16"] or 0 for each in found.outcomes]
    assert sizes == sorted(sizes, reverse=True)
    assert dense.weights["fp8"] is None
    if kept:
        losses = [each.loss for each in found.outcomes]
        assert losses == sorted(losses)
        assert losses[0] == 0
        assert row.loss == pytest.approx(priced(survey, config.out))


def test_a_survey_alone_fills_the_table(tiny: Tiny, configured: Make, tmp_path: Path) -> None:
    config = configured(tiny("llama"), recipe="default", ratio=0.35, survey=tmp_path / "survey")
    streamprune.plan_only(config)
    found = streamprune.preview(config)
    assert found.surveyed
    assert all(each.loss is not None for each in found.outcomes)


def test_a_sublayer_that_goes_is_priced_with_what_only_served_it() -> None:
    recipe = RECIPES["default"](parse("default", {}))
    costs = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    sites = [Site(block, "ffn", 4, 1, 8, 16, rest=10) for block in (0, 1, 2)]
    survey = {site.name: {"costs": costs} for site in sites}
    keeps = {sites[0].name: 0, sites[1].name: 1, sites[2].name: 4}
    expected = 16 * (1 + 2 + 4 + 8) + 10 * 8 + 16 * (1 + 2 + 4)
    assert predicted_loss(recipe, sites, survey, keeps) == pytest.approx(expected)


def priced(survey: Path, out: Path) -> float:
    """The sum of what each removed unit costs, from the files."""
    from streamprune.system.strict_json import read_json

    found = 0.0
    report = read_json(out / "report.json")
    for site in report["sites"]:
        block, place = site["site"].split(".", 2)[1:]
        costs = Shard(survey / f"survey-{int(block):04}.safetensors")[f"{place}.costs"]
        per_unit = {"attention": 2 * 8 * 2 * 64 + 2 * 8 * 64, "ffn": 3 * 64}[place]
        found += float(costs[: site["units"] - site["kept"]].sum()) * per_unit
    return found


def test_shapes_that_stay_have_no_table(tiny: Tiny, configured: Callable[..., streamprune.Config]) -> None:
    config = configured(tiny("llama"), recipe="magnitude", settings={"structure": "2:4"})
    with pytest.raises(ConfigError, match="keeps all shapes"):
        streamprune.preview(config)


def test_an_aim_is_in_the_table(tiny: Tiny, configured: Make) -> None:
    model = tiny("llama", torch.bfloat16, hidden_size=64, intermediate_size=256)
    dense = streamprune.preview(configured(model, recipe="magnitude")).outcomes[0]
    size = (1 << 29) + 4 * 512 * (512 + 64) + int(0.8 * (dense.weights["bf16"] or 0))
    config = configured(model, recipe="magnitude", ratio=None, fit=size)
    assert streamprune.preview(config).chosen == streamprune.prune(config).ratio_requested
