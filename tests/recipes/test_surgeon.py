"""LLM Surgeon and the masks: against a plain implementation in memory, across shots and kills, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from conftest import STRUCTURES, contents
from safetensors.torch import load_file
from stopping import Stop, stopping_after, windows
from streamprune_cli import main
from torch import Tensor

import streamprune
from streamprune import Config
from streamprune.errors import ConfigError
from streamprune.jobs.journal import Journal
from streamprune.jobs.names import job_folder
from streamprune.maths.sums import GRADIENTS
from streamprune.model.site import Site
from streamprune.model.skeleton import open_skeleton
from streamprune.pruning.job import Job
from streamprune.recipes import masks, surgeon
from streamprune.recipes.allocation import Budget
from streamprune.recipes.plan import Plan, SitePlan
from streamprune.recipes.settings import SurgeonSettings
from streamprune.recipes.surgeon import Surgeon

Make = Callable[..., Config]
Tiny = Callable[..., Path]
DAMPING = 0.01
BIN = 2.0**-11
"""Relative width of a histogram's bins: 11 bits of the mantissa tell costs apart."""


@dataclass
class Linear:
    """One linear of a model in memory; `w` is a view into it."""

    site: Site
    consumer: bool
    w: Tensor
    inputs: Tensor
    """(tokens, columns)."""
    gradients: Tensor
    """(tokens, rows): of every sequence's summed loss."""
    curvature: str = "full"

    def factors(self) -> tuple[Tensor, Tensor]:
        """Damped G and A: K-OBD's are diagonal, and L-OBD's G is the identity."""
        g, a = self.gradients.T @ self.gradients / self.reached, self.inputs.T @ self.inputs / len(self.inputs)
        if self.curvature != "full":
            g, a = (torch.diag(each.diagonal()) for each in (g, a))
        g = torch.eye(len(g), dtype=g.dtype) if self.curvature == "l-obd" else g
        return reference.ridge(g, DAMPING), reference.ridge(a, DAMPING)

    def loss(self, left: Tensor, right: Tensor) -> float:
        """``tr(G L A Rᵀ)`` of two changes, without damping: with one twice, double the loss it adds."""
        return float(((self.gradients @ left) * (self.gradients @ right @ self.inputs.T @ self.inputs)).sum()) / (
            self.reached * len(self.inputs)
        )

    @property
    def reached(self) -> int:
        """Tokens that reach an expert: the inputs of the others are zero."""
        return len(self.inputs) if self.site.expert is None else int(self.inputs.any(dim=1).sum())

    def element_costs(self) -> Tensor:
        """Eq. 10, first term."""
        g, a = self.factors()
        return self.w.square() / (2 * torch.outer(torch.linalg.inv(g).diagonal(), torch.linalg.inv(a).diagonal()))

    def unit_costs(self, joint: bool) -> Tensor:
        """Eq. 7 for all columns or rows of a unit together, or the sums of eq. 10 over them."""
        g, a = self.factors()
        # A producer's rows are columns of its transpose, its factors changing places.
        w, g, a = (self.w, g, a) if self.consumer else (self.w.T, a, g)
        inverse, costs = torch.linalg.inv(a), []
        for own in torch.arange(w.shape[1]).view(self.site.units, -1):
            sets = [own] if joint else list(own[:, None])
            blocks = [torch.linalg.inv(inverse[s][:, s]) @ w[:, s].T @ g @ w[:, s] for s in sets]
            costs.append(sum(float(block.trace()) / 2 for block in blocks))
        return torch.tensor(costs, dtype=torch.float64)

    def without(self, units: Tensor) -> Tensor:
        """Eq. 12."""
        g, a = self.factors()
        w, a = (self.w, a) if self.consumer else (self.w.T, g)
        gone = torch.arange(w.shape[1]).view(self.site.units, -1)[units].flatten()
        inverse = torch.linalg.inv(a)
        w = w - w[:, gone] @ torch.linalg.inv(inverse[gone][:, gone]) @ inverse[gone]
        return w if self.consumer else w.T


def all_sites(path: Path) -> list[Site]:
    return open_skeleton(path, torch.device("cpu"), "float64").all_sites()


def views(model: Any, sites: Sequence[Site]) -> list[tuple[Site, bool, str, list[Tensor]]]:
    """Of each linear module: its site, whether it is the consumer, its name, and its weight (out, in) in its parts."""
    found = []
    for place in reference.places(model, sites):
        for i, name in enumerate((*place.producers, place.consumer)):
            weight = reference.weight_of(model.get_submodule(name)).detach()
            consumer = name == place.consumer
            found.append((place.site, consumer, name, [weight] if consumer else list(place.split(weight, i))))
    return found


def surveyed(path: Path, tokens: Tensor, sites: Sequence[Site]) -> tuple[Any, list[Linear]]:
    """The dense model in float64 with what hooks and autograd see at all of its linears."""
    model = reference.load(path).requires_grad_(True)
    places = views(model, sites)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = []
    for _, _, place, _ in places:

        def keep(module: Any, inputs: Any, output: Tensor, place: str = place) -> None:
            seen[place] = inputs[0], output

        hooks.append(model.get_submodule(place).register_forward_hook(keep))
    logits = model(tokens).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    gradients = torch.autograd.grad(loss, [seen[place][1] for _, _, place, _ in places])
    for handle in hooks:
        handle.remove()
    model.requires_grad_(False)
    linears = []
    for (site, consumer, place, parts), gradient in zip(places, gradients, strict=True):
        flat = seen[place][0].detach().flatten(0, -2)
        each = gradient.flatten(0, -2).split([len(part) for part in parts], dim=1)
        linears += [Linear(site, consumer, w, flat, g) for w, g in zip(parts, each, strict=True)]
    return model, linears


def cheapest_units(sites: Sequence[Site], costs: dict[str, Tensor], target: int) -> dict[str, list[int]]:
    """Units that go under one threshold; a site whose next unit no longer fits is left alone."""
    order = sorted((float(costs[s.name][u]) / s.unit_parameters, s.name, u) for s in sites for u in range(s.units))
    gone: dict[str, list[int]] = {site.name: [] for site in sites}
    of, closed = {site.name: site for site in sites}, set()
    for _, name, unit in order:
        if name in closed or len(gone[name]) == of[name].units - 1 or of[name].choices:
            continue
        if of[name].unit_parameters > target:
            closed.add(name)
            continue
        target -= of[name].unit_parameters
        gone[name].append(unit)
    return gone


@pytest.mark.usefixtures("float64_norms")
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, {}) for name in STRUCTURES),
        ("llama", {"joint": "off"}),
        ("llama", {"update_rows": "on"}),
        ("gpt2", {"update_rows": "on", "joint": "off"}),
        ("llama-biased", {"update_rows": "on"}),
        ("llama", {"curvature": "k-obd", "update_rows": "on"}),
        ("llama", {"curvature": "l-obd"}),
    ],
)
def test_units_are_the_plain_implementations(name: str, settings: dict[str, str], tiny: Tiny, configured: Make) -> None:
    path = tiny(name, torch.float64)
    given = {"shots": "1", **settings}
    config = configured(path, recipe="surgeon", settings=given, dtype="float64", ratio=0.35, round_to=1)
    plan = Plan.read(streamprune.plan_only(config))
    findings = [load_file(path) for path in sorted(job_folder(config.out).glob("survey-*"))]
    streamprune.prune(config)

    sites, tokens = all_sites(path), windows(config, path)
    model, linears = surveyed(path, tokens, sites)
    linears = [replace(linear, curvature=settings.get("curvature", "full")) for linear in linears]
    costs = {site.name: torch.zeros(site.units, dtype=torch.float64) for site in sites}
    for linear in linears:
        costs[linear.site.name] += linear.unit_costs(joint=settings.get("joint") != "off")
    for site in sites:
        torch.testing.assert_close(findings[site.block][f"{site.place}.costs"], costs[site.name], rtol=1e-8, atol=0)
    gone = cheapest_units(sites, costs, round(0.35 * reference.block_parameters(model)))
    # Of some others' heads, none is among the cheapest.
    both = name.partition("-")[0] in ("llama", "mistral", "qwen2", "qwen3", "gpt2", "opt", "phi3", "granite")
    assert {site.kind for site in sites if gone[site.name]} >= ({"attention", "ffn"} if both else {"ffn"})
    for site in sites:
        assert set(range(site.units)) - set(gone[site.name]) == set(plan[site.name].units or range(site.units))
    for linear in linears:
        units = gone[linear.site.name]
        if settings.get("curvature", "full") != "full":  # the others' weights stay as they are
            kept = torch.tensor([u not in units for u in range(linear.site.units)])
            weights = (
                linear.w.view(len(linear.w), linear.site.units, -1) if linear.consumer else linear.w.view(len(kept), -1)
            )
            weights *= kept[:, None]
        elif units and (linear.consumer or settings.get("update_rows") == "on"):
            linear.w.copy_(linear.without(torch.tensor(units)))
    for place in reference.places(model, sites):
        reference.forget(model, place, [u for u in range(place.site.units) if u not in gone[place.site.name]])
    pruned = streamprune.load(config.out, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(pruned(tokens).logits, model(tokens).logits, rtol=1e-6, atol=1e-8)


def test_without_gradients_there_is_no_backward_sweep() -> None:
    assert not GRADIENTS & (Surgeon(SurgeonSettings(curvature="l-obd")).statistics or set())
    assert GRADIENTS & (Surgeon(SurgeonSettings(curvature="k-obd")).statistics or set())


# Masks.


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def parts_of(path: Path, sites: Sequence[Site]) -> list[Tensor]:
    """The linears' weights of a stock checkpoint, fused ones in their parts."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    assert type(model).__module__.startswith("transformers.")
    return [part for _, _, _, parts in views(model, sites) for part in parts]


def expected_zeros(path: Path, ratio: float, structure: str) -> int:
    m, _ = masks.pattern(structure)
    return round(ratio * open_skeleton(path, torch.device("cpu"), "float64").block_parameters()) // m * m


def check_threshold(costs: Sequence[Tensor], gone: Sequence[Tensor], structure: str, zeros: int) -> None:
    """What is guaranteed: the number is exact; in each linear it is the cheapest that go; and between linears costs are
    told apart up to one bin, so that whatever is cheaper than the exact threshold by more goes and nothing dearer does.
    """
    m, n = masks.pattern(structure)
    assert sum(int(each.sum()) for each in gone) == zeros
    if n > 1:
        grouped = [(c.reshape(-1, n), g.reshape(-1, n)) for c, g in zip(costs, gone, strict=True)]
        for c, g in grouped:
            assert set(g.sum(dim=1).tolist()) <= {0, m}
            for cheap, marks in zip(c[g.any(dim=1)], g[g.any(dim=1)], strict=True):
                assert sorted(cheap[marks].tolist()) == sorted(cheap.tolist())[:m]
        costs = [c.sort(dim=1).values[:, :m].sum(dim=1) for c, _ in grouped]
        gone = [g.any(dim=1) for _, g in grouped]
    exact = float(torch.cat([c.flatten() for c in costs]).sort().values[zeros // m - 1])
    for c, g in zip(costs, gone, strict=True):
        assert bool(g[c < exact * (1 - BIN)].all())
        assert not bool(g[c > exact * (1 + BIN)].any())
        if bool(g.any()) and not bool(g.all()):
            assert float(c[g].max()) <= float(c[~g].min())


@pytest.mark.parametrize("structure", ["unstructured", "2:4", "4:8"])
@pytest.mark.parametrize("name", ["llama-biased", "gpt2"])
@pytest.mark.parametrize("recipe", ["magnitude", "magnitude-l1", "surgeon", "surgeon-k-obd", "surgeon-l-obd"])
def test_masks_are_one_threshold_and_stock(
    recipe: str, name: str, structure: str, tiny: Tiny, configured: Make
) -> None:
    path = tiny(name, torch.float64)
    # All weights of a linear jointly: then the update is the optimum.
    recipe, _, variant = recipe.partition("-")
    settings = {"structure": structure} | ({"shots": "1", "correlated": "8192"} if recipe == "surgeon" else {})
    if variant:
        settings["norm" if recipe == "magnitude" else "curvature"] = variant
    config = configured(path, recipe=recipe, settings=settings, dtype="float64", ratio=0.3)
    plan = Plan.read(streamprune.plan_only(config))
    result = streamprune.prune(config)

    sites = all_sites(path)
    zeros = expected_zeros(path, 0.3, structure)
    model, linears = surveyed(path, windows(config, path), sites)
    linears = [replace(linear, curvature=settings.get("curvature", "full")) for linear in linears]
    before, after = [linear.w for linear in linears], parts_of(config.out, sites)
    gone = [w == 0 for w in after]
    planned = [count for site in sites for count in plan[site.name].zeros or ()]
    assert [int(each.sum()) for each in gone] == planned
    costs = [linear.element_costs() if recipe == "surgeon" else linear.w.abs() for linear in linears]
    if settings == {"structure": structure}:  # magnitude with its default norm
        costs = [cost.square() for cost in costs]
    check_threshold(costs, gone, structure, zeros)
    for linear, w, new, zero in zip(linears, before, after, gone, strict=True):
        if recipe != "surgeon" or variant:  # without off-diagonal entries nothing else is updated
            assert torch.equal(new, w.masked_fill(zero, 0))
        else:
            # At the minimum of ½ δᵀ F δ no change of what stays lowers it further.
            g, a = linear.factors()
            slope = g @ (new - w) @ a
            assert float(slope[~zero].abs().max()) < 1e-9 * float((g @ w @ a).abs().max())

    ours, source = stored(config.out), stored(path)
    assert {name: (t.shape, t.dtype) for name, t in ours.items()} == {n: (t.shape, t.dtype) for n, t in source.items()}
    changed = {f"{place}.weight" for _, _, place, _ in views(model, sites)}
    assert {name for name in ours if not torch.equal(ours[name], source[name])} <= changed
    assert json.loads((config.out / "config.json").read_text()) == json.loads((path / "config.json").read_text())
    assert not list(config.out.glob("*.py"))

    report = json.loads((config.out / "report.json").read_text())
    skeleton = open_skeleton(path, torch.device("cpu"), "float64")
    assert report["zeros"] == result.zeros == zeros == sum(site["zeros"] for site in report["sites"])
    assert result.parameters_after == result.parameters_before == skeleton.parameters()
    assert result.ratio_blocks == zeros / skeleton.block_parameters()
    assert result.ratio_model == zeros / skeleton.parameters()
    assert [site["weights"] for site in report["sites"]] == [sum(site.linears) for site in sites]
    index = json.loads((config.out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_parameters"] == skeleton.parameters()


def test_a_bounded_number_of_weights_is_compensated_jointly(tiny: Tiny, configured: Make) -> None:
    path = tiny("qwen3", torch.float64)
    settings = {"structure": "unstructured", "shots": "1", "correlated": "7"}
    config = configured(path, recipe="surgeon", settings=settings, dtype="float64", ratio=0.3)
    streamprune.prune(config)
    sites = all_sites(path)
    _, linears = surveyed(path, windows(config, path), sites)
    steps = []
    for linear, new in zip(linears, parts_of(config.out, sites), strict=True):
        g, a = (torch.linalg.inv(factor) for factor in linear.factors())
        w, zero = linear.w, new == 0
        expected = w.clone()
        r, c = zero.nonzero(as_tuple=True)
        for s in torch.arange(len(r)).split(7):
            multipliers = torch.linalg.solve(g[r[s]][:, r[s]] * a[c[s]][:, c[s]], w[r[s], c[s]])
            expected -= g[:, r[s]] * multipliers @ a[c[s]]
        # Subsets that know nothing of each other do too much together: what lowers the loss most is taken.
        zeroed = w.masked_fill(zero, 0)
        change = expected.masked_fill(zero, 0) - zeroed
        slope, curvature = linear.loss(zeroed - w, change), linear.loss(change, change)
        steps.append(min(1.0, -slope / curvature) if 2 * slope + curvature > 0 else 1.0)
        torch.testing.assert_close(new, zeroed + steps[-1] * change, rtol=1e-8, atol=1e-10)
    told = {
        site["site"]: site.get("step", 1.0) for site in json.loads((config.out / "report.json").read_text())["sites"]
    }
    own = {
        site.name: [step for step, linear in zip(steps, linears, strict=True) if linear.site == site] for site in sites
    }
    assert told == pytest.approx({name: min(each) for name, each in own.items()})
    assert min(steps) < 0.5
    assert max(steps) == 1


def test_producers_share_the_inverse_of_what_they_read(
    tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, places = surgeon.inverse, []

    def inverse(h: Tensor, damping: float, place: str, **options: Any) -> tuple[Tensor, float]:
        places.append(place)
        return real(h, damping, place, **options)

    monkeypatch.setattr(surgeon, "inverse", inverse)
    config = configured(
        tiny("llama"), recipe="surgeon", settings={"structure": "unstructured", "shots": "1"}, samples=2
    )
    streamprune.prune(config)
    # G of q, k, v and o, A of what the three read and of o's input; gate, up and down likewise. To cost and to update.
    assert places.count("blocks.1.attention") == 2 * (4 + 2)
    assert places.count("blocks.1.ffn") == 2 * (3 + 2)


@pytest.mark.usefixtures("float64_norms")
@pytest.mark.parametrize("curvature", ["full", "k-obd", "l-obd"])
@pytest.mark.parametrize("name", ["llama-biased", "gpt2"])
def test_rows_and_columns_go_apart_under_one_threshold(name: str, curvature: str, tiny: Tiny, configured: Make) -> None:
    path = tiny(name, torch.float64)
    settings = {"structure": "rows-columns", "shots": "1", "curvature": curvature}
    config = configured(path, recipe="surgeon", settings=settings, dtype="float64", ratio=0.4)
    plan = Plan.read(streamprune.plan_only(config))
    result = streamprune.prune(config)
    sites = all_sites(path)
    model, linears = surveyed(path, windows(config, path), sites)
    before, after = [linear.w for linear in linears], parts_of(config.out, sites)

    lines, gone = [], [torch.zeros_like(w, dtype=torch.bool) for w in before]
    for number, linear in enumerate(replace(each, curvature=curvature) for each in linears):
        (g, a), (rows, columns) = linear.factors(), linear.w.shape
        for r, cost in enumerate(((linear.w @ a) * linear.w).sum(dim=1) / torch.linalg.inv(g).diagonal() / 2):
            lines.append((float(cost) / columns, number, (r, slice(None))))
        for c, cost in enumerate(((g @ linear.w) * linear.w).sum(dim=0) / torch.linalg.inv(a).diagonal() / 2):
            lines.append((float(cost) / rows, number, (slice(None), c)))
    target = left = round(0.4 * reference.block_parameters(model))
    closed = set()
    for _, number, line in sorted(lines, key=lambda each: each[0]):
        more = int((~gone[number][line]).sum())
        if more > left:
            closed.add(number)
        if number not in closed:
            gone[number][line] = True
            left -= more
    assert 0 <= left < 48
    assert result.zeros == target - left
    assert [count for site in sites for count in plan[site.name].zeros or ()] == [int(each.sum()) for each in gone]
    assert any(bool(each.all(dim=0).any()) for each in gone)
    assert any(bool(each.all(dim=1).any()) for each in gone)
    for linear, w, new, zero in zip(linears, before, after, gone, strict=True):
        assert torch.equal(new == 0, zero)
        if curvature != "full":
            assert torch.equal(new, w.masked_fill(zero, 0))
        else:
            # At the minimum of ½ δᵀ F δ no change of what stays lowers it further.
            g, a = linear.factors()
            slope = (g @ (new - w) @ a).masked_fill(zero, 0)
            assert float(slope.abs().max()) < 1e-9 * float((g @ w @ a).abs().max())


def test_a_plan_of_rows_and_columns_that_cannot_be(tiny: Tiny, configured: Make, tmp_path: Path) -> None:
    path, settings = tiny("llama"), {"structure": "rows-columns", "shots": "1"}
    config = configured(path, recipe="surgeon", settings=settings, ratio=0.4)
    plan = Plan.read(streamprune.plan_only(config))
    entry = plan["blocks.1.ffn"]
    assert entry.zeros is not None
    plan["blocks.1.ffn"] = replace(entry, zeros=(entry.zeros[0] + 1, *entry.zeros[1:]))
    (tmp_path / "plan.json").write_text(plan.to_json())
    given = configured(path, "given", recipe="surgeon", settings=settings, ratio=None, plan=tmp_path / "plan.json")
    with pytest.raises(ConfigError, match=r"blocks\.1\.ffn: the plan makes \d+ weights of a linear zero"):
        streamprune.prune(given)


@pytest.mark.parametrize("ratio", [0.0001, 0.9999])
def test_a_ratio_that_rows_and_columns_cannot_meet(ratio: float, tiny: Tiny, configured: Make) -> None:
    with pytest.raises(ConfigError, match=f"ratio is {ratio:g}; the (smallest row or column|weights of linears)"):
        Job(configured(tiny("llama"), recipe="surgeon", settings={"structure": "rows-columns"}, ratio=ratio), None)


@pytest.mark.parametrize(("structure", "m", "n"), [("2:4", 2, 4), ("4:8", 4, 8)])
def test_at_the_patterns_own_ratio_every_group_is_full(
    structure: str, m: int, n: int, tiny: Tiny, configured: Make
) -> None:
    path = tiny("opt")
    config = configured(path, recipe="magnitude", settings={"structure": structure}, ratio=0.5)
    result = streamprune.prune(config)
    for w in parts_of(config.out, all_sites(path)):
        assert bool(((w == 0).view(len(w), -1, n).sum(dim=2) == m).all())
    # Norms and biases, which the ratio counts, cannot go.
    assert 0.45 < result.ratio_blocks < 0.5


def test_refinement_keeps_the_zeros(tiny: Tiny, configured: Make) -> None:
    path = tiny("llama")
    settings = {"structure": "2:4"}
    plain = configured(path, recipe="magnitude", settings=settings, ratio=0.4)
    streamprune.prune(plain)
    refined = configured(path, "refined", recipe="magnitude", settings=settings, ratio=0.4, refine=3)
    streamprune.prune(refined)
    pairs = list(zip(*(parts_of(config.out, all_sites(path)) for config in (plain, refined)), strict=True))
    assert all(torch.equal(a == 0, b == 0) for a, b in pairs)
    assert not any(torch.equal(a, b) for a, b in pairs)


def test_of_equal_costs_the_first_go_and_the_number_is_exact() -> None:
    costs = torch.tensor([[1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 2.0, 1.0]])
    for zeros in range(9):
        chosen = masks.mask(costs, zeros, "unstructured", "here").flatten().nonzero()[:, 0]
        assert chosen.tolist() == sorted(costs.flatten().argsort(stable=True)[:zeros].tolist())


@pytest.mark.parametrize("structure", ["unstructured", "2:4"])
def test_equal_costs_everywhere_still_meet_the_budget(structure: str) -> None:
    sites = [Site(block, "ffn", 8, 1, 8, 16, linears=(64, 64)) for block in range(3)]
    survey = {site.name: masks.histograms([torch.full((8, 8), 0.1)] * 2, structure, site.name) for site in sites}
    for target in (1, 2, 63, 64, 100, 191, 192, 300):
        plan = masks.count_zeros(sites, survey, Budget(target / 384, 384, 1), structure)
        m, n = masks.pattern(structure)
        assert sum(sum(plan[site.name].zeros or ()) for site in sites) == min(target // m, 384 // n) * m


# Shots.


@pytest.fixture
def journalled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any], dict[str, Tensor]]]:
    """Every journal line of a job; with a "finished" one, the weights that the shot gave."""
    lines: list[tuple[str, dict[str, Any], dict[str, Tensor]]] = []
    real = Journal.append

    def append(self: Journal, step: str, **data: Any) -> Any:
        weights: dict[str, Tensor] = {}
        if step.endswith("/finished"):
            number = int(step.removeprefix("shot-").partition("/")[0])
            folder = self.path.parent / f"shot-{number:02}"
            weights = stored(folder if any(folder.glob("*.safetensors")) else self.path.parent / "out")
        lines.append((step, data, weights))
        return real(self, step, **data)

    monkeypatch.setattr(Journal, "append", append)
    return lines


Lines = list[tuple[str, dict[str, Any], dict[str, Tensor]]]


def test_shots_of_units_follow_the_linear_schedule(tiny: Tiny, configured: Make, journalled: Lines) -> None:
    path = tiny("llama", num_hidden_layers=2)
    config = configured(path, recipe="surgeon", settings={"shots": "4"}, ratio=0.4, round_to=1)
    result = streamprune.prune(config)
    skeleton = open_skeleton(path, torch.device("cpu"), "float32")
    whole, unit = skeleton.block_parameters(), max(site.unit_parameters for site in skeleton.all_sites())
    removed = [data["removed"] for step, data, _ in journalled if step.endswith("/finished")]
    assert [0 <= round(0.4 * t / 4 * whole) - gone < unit for t, gone in enumerate(removed, 1)] == [True] * 4
    assert result.ratio_blocks == removed[-1] / whole
    left = streamprune.load(config.out).num_parameters()
    assert skeleton.parameters() - left == removed[-1] == result.parameters_before - result.parameters_after
    # Curvature is estimated anew for every shot.
    assert sum(step.endswith("/surveyed") for step, _, _ in journalled) == 4


@pytest.mark.parametrize("structure", ["unstructured", "4:8"])
def test_shots_of_masks_are_exact_and_zeros_stay(
    structure: str, tiny: Tiny, configured: Make, journalled: Lines
) -> None:
    path = tiny("mistral", num_hidden_layers=2)
    config = configured(path, recipe="surgeon", settings={"structure": structure, "shots": "4"}, ratio=0.45)
    streamprune.prune(config)
    finished = [(data["removed"], weights) for step, data, weights in journalled if step.endswith("/finished")]
    assert len(finished) == 4
    assert [gone for gone, _ in finished] == [expected_zeros(path, 0.45 * t / 4, structure) for t in range(1, 5)]
    zero = [{name: tensor == 0 for name, tensor in weights.items()} for _, weights in finished]
    for gone, marks in zip((gone for gone, _ in finished), zero, strict=True):
        assert sum(int(mark.sum()) for mark in marks.values()) == gone
    for earlier, later in pairwise(zero):
        assert all(bool(later[name][mark].all()) for name, mark in earlier.items())
    source = stored(path)
    for name, tensor in finished[-1][1].items():
        assert torch.equal(tensor, source[name]) == (tensor.dim() == 1 or "embed" in name or "head" in name)


def test_rows_and_columns_of_earlier_shots_stay_gone(tiny: Tiny, configured: Make, journalled: Lines) -> None:
    path = tiny("llama")
    config = configured(path, recipe="surgeon", settings={"structure": "rows-columns", "shots": "3"}, ratio=0.45)
    streamprune.prune(config)
    finished = [(data["removed"], weights) for step, data, weights in journalled if step.endswith("/finished")]
    zero = [{name: tensor == 0 for name, tensor in weights.items()} for _, weights in finished]
    for earlier, later in pairwise(zero):
        assert all(bool(later[name][mark].all()) for name, mark in earlier.items())
    zeros = [count for count, _ in finished]
    parameters = open_skeleton(path, torch.device("cpu"), "float32").block_parameters()
    assert [0 <= round(0.45 * shot / 3 * parameters) - count < 48 for shot, count in enumerate(zeros, start=1)] == [
        True
    ] * 3


@pytest.mark.parametrize(
    ("ratio", "structure", "given", "expected"),
    [
        (0.5, "units", 0, 40),
        (0.3, "units", 0, 24),
        (0.004, "units", 0, 1),
        (0.5, "rows-columns", 0, 40),
        (0.5, "2:4", 0, 5),
        (0.5, "2:4", 2, 2),
    ],
)
def test_shots_by_default(ratio: float, structure: str, given: int, expected: int) -> None:
    assert Surgeon(SurgeonSettings(structure=structure, shots=given)).shots(ratio) == expected


@pytest.mark.slow
@pytest.mark.parametrize(("structure", "lines"), [("units", 2), ("2:4", 3)])
def test_stopped_in_and_between_shots_the_bytes_are_the_same(
    structure: str, lines: int, tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny("llama", num_hidden_layers=2)
    shared = {"recipe": "surgeon", "settings": {"structure": structure, "shots": "2"}, "samples": 4}
    whole = configured(path, "whole", **shared)
    streamprune.prune(whole)
    config, lives = configured(path, "stopped", **shared), 0
    while not config.out.exists():
        lives += 1
        with stopping_after(lines, monkeypatch):
            try:
                streamprune.prune(config)
            except Stop:
                continue
    assert lives >= 24 // lines - 1
    assert contents(config.out) == contents(whole.out)


# Plans.


@pytest.mark.parametrize("structure", ["units", "unstructured"])
def test_a_plan_is_followed_in_one_shot_with_its_survey(
    structure: str, tiny: Tiny, configured: Make, tmp_path: Path
) -> None:
    path = tiny("llama")
    settings = {"structure": structure, "shots": "1"}
    planned = configured(path, "planned", recipe="surgeon", settings=settings)
    plan = tmp_path / "plan.json"
    plan.write_bytes(streamprune.plan_only(planned).read_bytes())
    streamprune.prune(planned)
    # Without "shots": a plan is for one shot.
    given = configured(path, "given", recipe="surgeon", settings={"structure": structure}, ratio=None, plan=plan)
    streamprune.prune(given)
    a, b = (stored(config.out) for config in (planned, given))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def written(path: Path, out: Path, change: Callable[[dict[str, SitePlan]], Any]) -> Path:
    entries = {site.name: SitePlan(site.units, zeros=(4,) * len(site.linears)) for site in all_sites(path)}
    change(entries)
    out.write_text(Plan(entries, 0.3).to_json())
    return out


@pytest.mark.parametrize(
    ("recipe", "structure", "entry", "message"),
    [
        (
            "surgeon",
            "2:4",
            SitePlan(48, zeros=(4, 4)),
            r'"zeros" of blocks.1.ffn has 2 numbers; the site has 3 linears',
        ),
        ("surgeon", "2:4", SitePlan(48, zeros=(4, -2, 4)), r"says -2; that linear has 1536 weights"),
        ("magnitude", "unstructured", SitePlan(48, zeros=(4, 1537, 4)), r"says 1537; that linear has 1536 weights"),
        ("magnitude", "2:4", SitePlan(48, zeros=(4, 3, 4)), r"3 zeros in a linear of 1536 weights; .*multiples of 2"),
        ("surgeon", "4:8", SitePlan(48, zeros=(4, 772, 4)), r"772 zeros in a linear .* at most 768"),
        ("surgeon", "unstructured", SitePlan(40), r"blocks.1.ffn keeps 40 of 48; structure unstructured keeps all"),
        ("magnitude", "units", SitePlan(40, zeros=(4, 4, 4)), r'has "zeros"; with these settings whole units go'),
        ("wanda-sp", None, SitePlan(40, zeros=(4, 4, 4)), r'has "zeros"; with these settings whole units go'),
    ],
)
def test_a_plan_that_cannot_be_followed_is_refused(
    recipe: str, structure: str | None, entry: SitePlan, message: str, tiny: Tiny, configured: Make, tmp_path: Path
) -> None:
    path = tiny("llama")
    plan = written(path, tmp_path / "plan.json", lambda entries: entries.update({"blocks.1.ffn": entry}))
    settings = {"structure": structure} if structure else {}
    with pytest.raises(ConfigError, match=message):
        streamprune.prune(configured(path, recipe=recipe, settings=settings, plan=plan))
    assert not job_folder(tmp_path / "out").exists()


def test_zeros_outside_the_window_are_refused(tiny: Tiny, configured: Make, tmp_path: Path) -> None:
    path = tiny("llama")
    plan = written(path, tmp_path / "plan.json", lambda entries: None)
    config = configured(path, recipe="magnitude", settings={"structure": "2:4"}, plan=plan, blocks=(1, 2))
    with pytest.raises(ConfigError, match=r"blocks.0.attention has 16 zeros; it lies outside blocks 1:2"):
        Job(config, None)


# What is refused.


@pytest.mark.parametrize("recipe", ["surgeon", "magnitude"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratio": 0.51, "structure": "2:4"}, r"ratio is 0\.51; structure 2:4 makes at most 0\.5 of the weights zero"),
        ({"ratio": 0.499, "structure": "4:8"}, r"ratio is 0\.499; structure 4:8 can make at most 0\.4\d+ of what"),
        ({"ratio": 0.999, "structure": "unstructured"}, r"structure unstructured can make at most 0\.9\d+"),
        ({"ratio": 0.4, "structure": "2:4", "blocks": (0, 1)}, r"structure 2:4 can make at most 0\.1\d+"),
        ({"ratio": 1e-5, "structure": "4:8"}, r"ratio is 1e-05; the smallest step is 0\.0001\d"),
    ],
)
def test_budgets_that_no_mask_meets_are_refused_before_any_work(
    recipe: str, change: dict[str, Any], message: str, tiny: Tiny, configured: Make, tmp_path: Path
) -> None:
    settings = {"structure": change["structure"]}
    others = {name: value for name, value in change.items() if name != "structure"}
    with pytest.raises(ConfigError, match=message):
        streamprune.prune(configured(tiny("llama"), recipe=recipe, settings=settings, **others))
    assert not job_folder(tmp_path / "out").exists()


def test_widths_that_a_pattern_does_not_divide_are_refused(tiny: Tiny, configured: Make, tmp_path: Path) -> None:
    path = tiny("llama", intermediate_size=44)
    settings = {"structure": "4:8"}
    with pytest.raises(ConfigError, match=r"multiples of 8; blocks.0.ffn has one of 44"):
        streamprune.prune(configured(path, recipe="magnitude", settings=settings))
    plan = written(path, tmp_path / "plan.json", lambda entries: None)
    with pytest.raises(ConfigError, match=r"multiples of 8; blocks.0.ffn has one of 44"):
        streamprune.prune(configured(path, recipe="magnitude", settings=settings, plan=plan))
    assert not job_folder(tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "surgeon", "--plan-only"], "recipe surgeon takes 24 shots .*--plan-only needs one shot"),
        (["--recipe", "sobp", "--structure", "2:4"], "recipe sobp has no setting 'structure'; it has"),
        (["--recipe", "random", "--structure", "2:4"], "recipe random has no setting 'structure'; it has none"),
        (["--recipe", "magnitude", "--structure", "2:4", "--set", "structure=4:8"], "--set structure is given twice"),
    ],
)
def test_refusals_are_one_line(arguments: list[str], message: str, tiny: Tiny, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    common = ["--ratio", "0.3", "--calibration", str(text), "--samples", "4", "--seq-len", "24"]
    done = CliRunner().invoke(main, ["run", str(tiny("llama")), str(out), *common, *arguments])
    assert done.exit_code == 2, done.output
    assert len(done.stderr.splitlines()) == 1
    assert re.search(message, done.stderr), done.stderr
    assert list(tmp_path.iterdir()) == []


# What is said.


def test_what_people_read_of_a_mask_is_true(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = ["--ratio", "0.5", "--recipe", "magnitude", "--structure", "2:4"]
    done = CliRunner().invoke(main, ["run", str(tiny("llama")), str(out), *given])
    assert done.exit_code == 0, done.output
    report = json.loads((out / "report.json").read_text())
    zeros, parameters = report["zeros"], report["parameters_before"]
    assert f"{zeros:,} of {parameters:,} parameters made zero" in done.stdout
    assert "removed" not in done.stdout
    assert "block 2: 1,536 of 3,072, 2,304 of 4,608" in done.stderr

    card = (out / "README.md").read_text()
    assert f"{zeros:,} weights made zero" in card
    assert "| 0 | 1,536 / 3,072 | 2,304 / 4,608 |" in card
    assert f"{parameters:,}\nparameters as before" in card
    assert "stock checkpoint" in card
    assert "Units kept" not in card

    shown = CliRunner().invoke(main, ["inspect", str(out)]).stdout
    assert "parameters made zero, 50.00% requested" in shown
    row = next(line for line in shown.splitlines() if line.startswith("blocks.0.attention"))
    assert row.split()[1:3] == ["1,536", "3,072"]


def test_masks_and_units_of_one_ratio_are_one_budget(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    found = streamprune.compare(
        tiny("llama"),
        ratios=[0.4],
        recipes=["magnitude", streamprune.Variant("zeros", "magnitude", {"structure": "2:4"})],
        text=text,
        eval_seq_len=24,
        out=tmp_path / "compared",
        calibration=text,
        samples=2,
        seq_len=24,
        round_to=4,
    )
    assert found.notes == ()
    dense, units, zeros = found.rows
    assert zeros.parameters == dense.parameters > units.parameters
    assert abs(zeros.ratio_blocks - 0.4) < 1e-3


def test_a_site_keeping_fewer_units_has_fewer_weights(tiny: Tiny) -> None:
    for site in all_sites(tiny("gpt2")):
        assert len(site.linears) == (4 if site.kind == "attention" else 2)
        half = site.keeping(site.units // 2)
        assert half.linears == tuple(weights // 2 for weights in site.linears)
        assert replace(half, units=site.units, heads=site.heads, linears=site.linears) == site


@pytest.mark.parametrize("name", ["llama-biased", "gpt2"])
@pytest.mark.parametrize(
    "settings", [{}, {"update_rows": "on"}, {"structure": "unstructured"}, {"structure": "2:4"}], ids=str
)
def test_what_waits_on_the_disk_is_what_the_updates_need(
    settings: dict[str, str], name: str, tiny: Tiny, configured: Make
) -> None:
    config = configured(tiny(name), recipe="surgeon", settings={"shots": "1", **settings})
    streamprune.plan_only(config)
    kept = histograms = 0
    for path in job_folder(config.out).glob("survey-*"):
        found = load_file(path)
        kept += sum(t.numel() for n, t in found.items() if n.split(".")[1] in ("a", "g"))
        histograms += sum(2 * t.numel() for n, t in found.items() if n.split(".")[1] == "histogram")
    job = Job(config, None)
    most = sum(masks.MaskRecipe.findings(job.recipe, site) for site in job.request.sites)
    assert (
        job.request.workload.findings == sum(job.recipe.findings(site) for site in job.request.sites) == kept + most > 0
    )
    assert most / 3 <= histograms <= most
    streamprune.prune(config)  # and it is enough
