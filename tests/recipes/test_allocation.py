"""The knapsack against brute force, and its edges."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from streamprune.errors import ConfigError
from streamprune.model.site import UNIFORM, Site
from streamprune.recipes.allocation import (
    TOLERANCE,
    Budget,
    _Bundle,
    _bundles,
    _fill,
    allocate,
    check_budget,
    even_densities,
    largest_unit,
    step,
    steps,
)


def site(block: int, kind: str, units: int, parameters: int, **more: object) -> Site:
    return Site(block=block, kind=kind, units=units, width=1, outputs=4, unit_parameters=parameters, **more)  # type: ignore[arg-type]


def budget(sites: list[Site], ratio: float, *, round_to: int = 1, alike: frozenset[str] = frozenset()) -> Budget:
    return Budget(ratio, sum(s.units * s.unit_parameters for s in sites), round_to, alike)


@pytest.mark.parametrize("seed", range(20))
def test_within_one_unit_of_the_best_knapsack(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sites = [site(0, "ffn", 4, 10), site(1, "ffn", 4, 10)]
    densities = {s.name: torch.rand(s.units, generator=generator).sort().values.double() for s in sites}
    spent = budget(sites, 0.4)
    keep = allocate(sites, densities, spent)
    cost = sum(float(densities[s.name][: s.units - keep[s.name]].sum()) * s.unit_parameters for s in sites)
    removed = sum((s.units - keep[s.name]) * s.unit_parameters for s in sites)
    assert spent.target - 10 < removed <= spent.target
    # Brute force over all sets of units that remove as much and leave one unit a site.
    units = [(s.name, float(c) * s.unit_parameters) for s in sites for c in densities[s.name]]
    best = min(
        sum(c for _, c in chosen)
        for chosen in itertools.combinations(units, removed // 10)
        if all(sum(name == s.name for name, _ in chosen) < s.units for s in sites)
    )
    assert cost == pytest.approx(best)


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("seed", range(5))
def test_budget_is_met_to_within_the_smallest_step(ratio: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sites = [s for b in range(4) for s in (site(b, "attention", 4, 3000), site(b, "ffn", 172, 12))]
    densities = {s.name: torch.rand(s.units, generator=generator).sort().values for s in sites}
    spent = budget(sites, ratio, round_to=8)
    keep = allocate(sites, densities, spent)
    removed = sum((s.units - keep[s.name]) * s.unit_parameters for s in sites)
    # Within the smallest step that is left: eight channels, or a whole group once the channels are used up.
    step = 8 * 12 if any(keep[s.name] > 8 for s in sites if s.kind == "ffn") else 3000
    assert 0 <= spent.target - removed < step
    for s in sites:
        assert 1 <= keep[s.name] <= s.units
        if s.kind == "ffn" and keep[s.name] != s.units:
            assert keep[s.name] % 8 == 0
            assert keep[s.name] >= 8


def test_a_site_never_loses_everything() -> None:
    sites = [site(0, "attention", 2, 10), site(0, "ffn", 10, 10)]
    densities = {"blocks.0.attention": torch.zeros(2), "blocks.0.ffn": torch.ones(10)}
    keep = allocate(sites, densities, budget(sites, 0.5))
    assert keep == {"blocks.0.attention": 1, "blocks.0.ffn": 5}


def test_too_much_and_too_little_are_refused_with_the_limit() -> None:
    sites = [site(0, "attention", 2, 10), site(0, "ffn", 10, 10)]
    with pytest.raises(ConfigError, match=r"ratio is 0\.95; .* at most 0\.833"):
        check_budget(sites, budget(sites, 0.95))
    with pytest.raises(ConfigError, match=r"ratio is 0\.01; the smallest step is 0\.0833"):
        check_budget(sites, budget(sites, 0.01))


def test_uniform_keeps_blocks_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    sites = [s for b in range(3) for s in (site(b, "attention", 4, 300, choices=(2, 4)), site(b, "ffn", 64, 12))]
    densities = {s.name: torch.rand(s.units, generator=generator).sort().values for s in sites}
    keep = allocate(sites, densities, budget(sites, 0.5, round_to=8, alike=UNIFORM.alike))
    assert len({keep[f"blocks.{b}.attention"] for b in range(3)}) == 1
    assert len({keep[f"blocks.{b}.ffn"] for b in range(3)}) == 1
    assert keep["blocks.0.attention"] in (2, 4)


def test_even_densities_take_the_same_share_everywhere() -> None:
    sites = [s for b in range(4) for s in (site(b, "attention", 10, 100), site(b, "ffn", 100, 10))]
    keep = allocate(sites, even_densities(sites), budget(sites, 0.3))
    assert {keep[s.name] / s.units for s in sites} == {0.7}


def test_a_sublayer_goes_whole_at_its_own_price() -> None:
    # The last unit of attention goes with a norm of 10 parameters, at 3 a parameter of all 20: dearer than 2, cheaper than 4.
    attention, ffn = site(0, "attention", 2, 10, rest=10), site(0, "ffn", 10, 10)
    densities = {attention.name: torch.tensor([1.0, 3.0]), ffn.name: torch.tensor([2.0] * 4 + [4.0] * 6)}
    whole = Budget(0.7, 100, 1, sublayers=True)
    assert allocate([attention, ffn], densities, whole) == {attention.name: 0, ffn.name: 6}
    assert allocate([attention, ffn], densities, Budget(0.7, 100, 1)) == {attention.name: 1, ffn.name: 4}
    # Without the norm's parameters in the price, the step of two units would cost (1 + 3) / 2.
    both = _Bundle((attention,), torch.tensor([1.0, 3.0]).double(), (0, 2))
    assert both.parameters(0) == 30
    assert both.cost(0) == pytest.approx((1 * 10 + 3 * 20) / 30)
    # Rounded widths include none at all.
    rounded = [site(0, "ffn", 10, 10, rest=0), site(1, "ffn", 10, 10, rest=0)]
    costs = {rounded[0].name: torch.ones(10), rounded[1].name: torch.full((10,), 2.0)}
    assert allocate(rounded, costs, Budget(0.5, 200, 8, sublayers=True)) == {rounded[0].name: 0, rounded[1].name: 10}
    check_budget([attention, replace(ffn, rest=0)], Budget(0.95, 130, 1, sublayers=True))
    with pytest.raises(ConfigError, match=r"ratio is 0\.95; .* at most 0\.769 of its blocks' parameters while"):
        check_budget([attention, ffn], Budget(0.95, 130, 1))


def priced(sites: list[Site], keep: dict[str, int], densities: dict[str, torch.Tensor]) -> float:
    return sum(float(densities[s.name][: s.units - keep[s.name]].sum()) * s.unit_parameters for s in sites)


def curves(steepness: list[float], units: int = 1024) -> tuple[list[Site], dict[str, torch.Tensor]]:
    """FFNs whose costs rise as a power of the share that is gone; a high power is flat at first and steep at the end."""
    sites = [site(block, "ffn", units, 12) for block in range(len(steepness))]
    x = (torch.arange(units, dtype=torch.float64) + 0.5) / units
    return sites, {s.name: x**power for s, power in zip(sites, steepness, strict=True)}


@pytest.mark.parametrize("ratio", [0.2, 0.3, 0.5])
def test_coarser_multiples_are_taken_where_they_cost_little(ratio: float) -> None:
    sites, densities = curves([0.5 + block / 4 for block in range(24)])
    fine = budget(sites, ratio, round_to=32)
    auto = replace(fine, coarser=(128, 256))
    kept, rounded = allocate(sites, densities, fine), allocate(sites, densities, auto)
    costs = [priced(sites, each, densities) for each in (kept, rounded)]
    assert costs[1] <= costs[0] * (1 + TOLERANCE)
    assert not any(each % 32 for each in rounded.values())
    assert sum(each % 128 == 0 for each in rounded.values()) > sum(each % 128 == 0 for each in kept.values()) + 2
    removed = sum((s.units - rounded[s.name]) * 12 for s in sites)
    assert 0 <= auto.target - removed < largest_unit(sites, auto) == 32 * 12
    # With 256 everywhere it would cost more.
    whole = allocate(sites, densities, replace(fine, round_to=256))
    missing = auto.target - sum((s.units - whole[s.name]) * 12 for s in sites)
    price = max(float(densities[s.name][s.units - kept[s.name] - 1]) for s in sites if kept[s.name] < s.units)
    assert priced(sites, whole, densities) + price * missing > costs[0] * (1 + TOLERANCE)


def test_the_finest_multiple_stays_where_a_channel_costs_much() -> None:
    # The costs rise a thousandfold at 672 of 1024 channels that stay: neither 640 nor 768 is as good.
    sites = [site(0, "ffn", 1024, 12)]
    densities = {sites[0].name: torch.cat([torch.full((352,), 1.0), torch.full((672,), 1e3)]).double()}
    auto = replace(budget(sites, 352 / 1024, round_to=32), coarser=(128, 256))
    assert allocate(sites, densities, auto) == {sites[0].name: 672}
    flat = {sites[0].name: torch.ones(1024).double()}
    # A plan that misses the ratio by more than the step of 32 is not taken either, however little it costs.
    assert allocate(sites, flat, auto) == {sites[0].name: 672}
    assert allocate(sites, flat, replace(auto, ratio=0.25)) == {sites[0].name: 768}


@pytest.mark.parametrize("alike", [frozenset[str](), UNIFORM.alike])
def test_coarser_multiples_miss_no_more_than_a_unit(alike: frozenset[str]) -> None:
    # As above, with heads of which half can go as the only step: four units, but a plan meets its ratio to within one.
    blocks = range(2 if alike else 1)
    ffns = [site(block, "ffn", 1024, 12) for block in blocks]
    heads = [site(block, "attention", 8, 1000, choices=(4, 8)) for block in blocks]
    flat = {s.name: torch.ones(1024).double() for s in ffns}
    # Until 672 of 1024 channels stay, all cost the same, so that rounding to 768 would save as much as it misses.
    kinked = {s.name: torch.cat([torch.full((352,), 1.0), torch.full((672,), 1e3)]).double() for s in ffns}
    dear = {s.name: torch.full((8,), 1e6).double() for s in heads}
    parameters = len(blocks) * (1024 * 12 + 8 * 1000)
    auto = Budget(len(blocks) * 352 * 12 / parameters, parameters, 32, alike, coarser=(128, 256))
    assert 96 * 12 > 1000
    assert largest_unit([*ffns, *heads], auto) == len(blocks) * 1000
    for densities in (flat, kinked):
        kept = allocate([*ffns, *heads], densities | dear, auto)
        assert {kept[s.name] for s in ffns} == {672}


def test_the_price_is_that_of_the_last_step_taken() -> None:
    heads, ffn = site(0, "attention", 3, 10), site(0, "ffn", 9, 4)
    densities = {heads.name: torch.ones(3), ffn.name: torch.arange(2.0, 11.0)}
    for target, steps_taken, price in ((10, [1, 0], 1.0), (18, [1, 2], 3.0), (20, [2, 0], 1.0), (27, [2, 1], 2.0)):
        given = Budget(target / 66, 66, 1)
        # At 18, the second head does not fit, and two channels go after it.
        assert _fill(_bundles([heads, ffn], densities, given), [heads, ffn], given) == (steps_taken, price)


def test_what_rounding_costs_is_the_rise_of_the_least_priced_total() -> None:
    sites, densities = curves([2.0], units=64)
    price, name = 0.3, sites[0].name
    whole = budget(sites, 0.5)
    for multiple in (1, 8, 16):
        bundle = _Bundle(tuple(sites), densities[name], steps(sites[0], whole, multiple))
        best = min(
            float(densities[name][:gone].sum()) * 12 - price * gone * 12
            for gone in range(64)
            if gone == 0 or (64 - gone) % multiple == 0
        )
        assert bundle.least(price) == pytest.approx(best)
    # With the last unit, its norm goes at the unit's price.
    rest = replace(sites[0], rest=100)
    bundle = _Bundle((rest,), densities[name], (0, 64))
    assert bundle.least(10.0) == pytest.approx(
        float(densities[name].sum()) * 12 + float(densities[name][-1]) * 100 - 10 * (64 * 12 + 100)
    )


@pytest.mark.parametrize(
    ("units", "width", "round_to", "devices", "expected"),
    [
        (32, 128, 32, 1, 1),
        (32, 128, 256, 1, 2),
        (32, 80, 32, 1, 2),
        (8, 16, 32, 1, 2),
        (3, 192, 256, 1, 1),  # 256 divides no smaller number of heads
        (32, 128, 32, 4, 4),
        (32, 8, 32, 2, 8),
        (4, 8, 32, 2, 2),
    ],
)
def test_heads_round_where_they_can(units: int, width: int, round_to: int, devices: int, expected: int) -> None:
    heads = replace(site(0, "attention", units, 100), width=width)
    given = Budget(0.3, 10_000, round_to, devices=devices)
    assert step(heads, given) == expected
    kept = [heads.units - gone for gone in steps(heads, given)]
    assert kept == [units, *(k for k in range(units - 1, 0, -1) if k % expected == 0)]


def test_devices_share_what_stays() -> None:
    channels = site(0, "ffn", 1024, 12, rest=4)
    heads = replace(site(0, "attention", 16, 800, rest=4), width=64)
    given = Budget(0.9, 1024 * 12 + 16 * 800, 32, sublayers=True, coarser=(128, 256), devices=4)
    # A quarter of the channels is a multiple of 32 on each device.
    assert step(channels, given) == 128
    assert step(channels, given, 256) == 256
    assert step(channels, replace(given, devices=3), 256) == 768
    # An FFN may go as a whole; attention may not, since servers that split a model run no block without it.
    assert steps(channels, given)[-1] == 1024
    assert steps(heads, given) == (0, 4, 8, 12)
    assert steps(heads, replace(given, devices=1))[-1] == 16
    keep = allocate([heads, channels], even_densities([heads, channels]), given)
    assert keep[heads.name] % 4 == 0 < keep[heads.name]
    assert keep[channels.name] % 128 == 0
