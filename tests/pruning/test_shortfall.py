"""A result meets its ratio if it is within one unit of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import streamprune
from streamprune.model.site import Site
from streamprune.pruning.shortfall import Goal
from streamprune.recipes.allocation import Budget, largest_unit

Make = Callable[..., streamprune.Config]
BLOCKS = range(3)
FFN = [Site(block, "ffn", 48, 1, 32, 96) for block in BLOCKS]
HEADS = [Site(block, "attention", 4, 8, 32, 768, heads=4, choices=(1, 2, 4)) for block in BLOCKS]
EXPERTS = [Site(0, "ffn", 24, 1, 32, 96, expert=number, share=0.5) for number in range(4)]
FIXED = [Site(block, "attention", 1, 32, 32, 4096, heads=4, choices=(1,)) for block in BLOCKS]
UNIFORM = frozenset({"attention", "ffn", "experts"})


def goal(sites: list[Site], target: int, **changes: Any) -> Goal:
    budget = Budget(0.3, 30_000, 4, changes.pop("alike", frozenset()))
    fields = {"slack": largest_unit(sites, budget), "what": "the blocks' parameters", "zeros": False, "plan": None}
    return Goal(sites, budget, target, **{**fields, **changes})


@pytest.mark.parametrize(
    ("sites", "alike", "expected"),
    [
        (FFN, frozenset(), 4 * 96),
        ([*FFN, *HEADS], frozenset(), 768),
        ([*FFN, *HEADS], UNIFORM, 3 * 768),
        ([*FFN, *FIXED], UNIFORM, 3 * 4 * 96),
        (EXPERTS, UNIFORM, 4 * 4 * 96),
        (FIXED, frozenset(), 0),
    ],
)
def test_one_unit(sites: list[Site], alike: frozenset[str], expected: int) -> None:
    assert largest_unit(sites, Budget(0.3, 30_000, 4, alike)) == expected


def test_a_unit_more_or_less_is_no_miss() -> None:
    wanted = goal([*FFN, *HEADS], 9000)
    for gone in (9000 - 768, 9000, 9000 + 768):
        assert wanted.missed(gone, []) is None
    said = "removed 27.44% of the blocks' parameters instead of 30.00%: no further step fits; a smaller --round-to"
    assert str(wanted.missed(9000 - 769, [])).startswith(said)
    assert str(wanted.missed(9000 + 769, [])).startswith("removed 32.56%")


def test_each_reason_is_said() -> None:
    reports = [
        {"site": site.name, "kept": 24, "tokens": 5 + site.expert, "left_alone": site.expert > 1} for site in EXPERTS
    ]
    assert "2 of 4 experts keep all" in str(goal(EXPERTS, 9000).missed(5000, reports))
    assert "(blocks.0.ffn.2: 7 tokens, 24 channels)" in str(goal(EXPERTS, 9000).missed(5000, reports))
    assert "--layout free has smaller steps" in str(goal(HEADS, 9000, alike=UNIFORM).missed(5000, []))
    assert "the plan p.json decides what stays" in str(goal(HEADS, 9000, plan="p.json").missed(5000, []))
    assert str(goal(FFN, 9000, zeros=True).missed(5000, [])).startswith("made zero 16.67% of the blocks' parameters")


@pytest.mark.parametrize(("tokens", "reached"), [(None, 4), (23, 0), (24, 2), (47, 3), (48, 4)])
def test_what_is_certain_beforehand(tokens: int | None, reached: int) -> None:
    # Twice as many visits as tokens, 24 for each expert that may shrink to 4 channels.
    most = reached * 20 * 96
    assert goal(EXPERTS, most + 4 * 96).foreseen(None, tokens) is None
    said = goal(EXPERTS, most + 4 * 96 + 1).foreseen(None, tokens)
    assert str(said).startswith(f"can remove at most {most / 30_000:.2%} of the blocks' parameters instead of")
    assert (tokens is not None and f"of {tokens} calibration tokens at most {reached} of" in str(said)) == (reached < 4)


def test_a_plan_that_is_known_counts() -> None:
    keeps = {site.name: 40 for site in FFN}
    assert goal(FFN, 3 * 8 * 96 + 384).foreseen(keeps, None) is None
    assert str(goal(FFN, 3 * 8 * 96 + 385).foreseen(keeps, None)).startswith("can remove at most 7.68%")


@pytest.mark.parametrize("layout", ["free", "uniform"])
@pytest.mark.parametrize("recipe", ["default", "surgeon", "greedy-output", "random"])
def test_recipes_meet_their_ratio(recipe: str, layout: str, tiny: Callable[..., Path], configured: Make) -> None:
    settings = {"shots": "2"} if recipe == "surgeon" else {}  # instead of 24
    config = configured(tiny("llama"), recipe=recipe, layout=layout, settings=settings)
    assert streamprune.forecast_job(config).ratio_missed is None
    assert streamprune.prune(config).ratio_missed is None


@pytest.mark.parametrize(
    ("recipe", "settings", "ratio"),
    [("magnitude", {"structure": "2:4"}, 0.5), ("magnitude", {"structure": "unstructured"}, 0.9)],
)
def test_norms_and_biases_which_no_pattern_reaches_are_no_miss(
    recipe: str, settings: dict[str, str], ratio: float, tiny: Callable[..., Path], configured: Make
) -> None:
    config = configured(tiny("llama-biased"), recipe=recipe, settings=settings, ratio=ratio)
    assert streamprune.forecast_job(config).ratio_missed is None
    assert streamprune.prune(config).ratio_missed is None


def test_a_plan_counts_for_itself_unless_a_ratio_is_given(
    tiny: Callable[..., Path], configured: Make, tmp_path: Path
) -> None:
    path = streamprune.plan_only(configured(tiny("llama"), "first", recipe="magnitude"))
    edited = tmp_path / "plan.json"
    edited.write_text(path.read_text().replace('"keep": 1}', '"keep": 2}'))
    assert edited.read_text() != path.read_text()
    for ratio, said in ((None, None), (0.3, f"the plan {edited} decides what stays")):
        result = streamprune.prune(
            configured(tiny("llama"), f"out-{ratio}", recipe="magnitude", plan=edited, ratio=ratio)
        )
        assert result.ratio_blocks < 0.29
        assert (result.ratio_missed or "").endswith(said or "")
        assert (result.ratio_missed is None) == (said is None)
