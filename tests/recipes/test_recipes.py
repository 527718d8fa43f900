"""Recipes on whole models: against plain float64 implementations in memory, and shot by shot."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import reference
import torch
from conftest import TINY, contents
from safetensors.torch import load_file
from torch import Tensor

import streamprune
from streamprune import Config
from streamprune.errors import ConfigError
from streamprune.jobs.journal import Journal
from streamprune.jobs.names import job_folder
from streamprune.maths.divergence import redundant
from streamprune.maths.sums import MaskGradient
from streamprune.model.site import Site
from streamprune.model.skeleton import open_skeleton
from streamprune.pruning.job import Job
from streamprune.recipes.allocation import Budget, largest_unit
from streamprune.recipes.greedy_output import GreedyOutput, candidates, rising_thresholds
from streamprune.recipes.plan import Plan
from streamprune.recipes.settings import GreedyOutputSettings, SobpSettings
from streamprune.recipes.slimgpt import incremental_ratios
from streamprune.recipes.sobp import Sobp

pytestmark = pytest.mark.usefixtures("float64_norms")
Make = Callable[..., Config]
Tiny = Callable[..., Path]


def calibrated(config: Config) -> Tensor:
    """The tokens that a job reads."""
    return Job(config, None).tokens


def sites_of(path: Path) -> list[Site]:
    return open_skeleton(path, torch.device("cpu"), "float64").all_sites()


def planned(config: Config) -> tuple[Plan, dict[str, Tensor]]:
    """The plan, and the survey's findings by ``site.name``, before anything is pruned."""
    plan = Plan.read(streamprune.plan_only(config))
    found: dict[str, Tensor] = {}
    for path in sorted(job_folder(config.out).glob("survey-*.safetensors")):
        block = int(path.stem.removeprefix("survey-"))
        found |= {f"blocks.{block}.{name}": tensor for name, tensor in load_file(path).items()}
    return plan, found


def kept_columns(config: Config, twins: reference.Twins) -> None:
    """The consumers' widths, and by the producers' first rows the very units, are those of the reference."""
    report = json.loads((config.out / "report.json").read_text())
    last = {site["site"]: site["kept"] for site in report["sites"]}
    assert last == {name: len(units) for name, units in twins.kept.items()}


def same_logits(config: Config, expected: Any, tokens: Tensor, tolerance: float = 1e-7) -> None:
    pruned = streamprune.load(config.out, dtype=torch.float64)
    with torch.no_grad():
        found, wanted = pruned(tokens).logits, expected(tokens).logits
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


# Our own recipe.


@pytest.mark.check("default = plain float64 implementation")
@pytest.mark.parametrize("name", TINY)
def test_default_is_the_plain_implementation(name: str, tiny: Tiny, configured: Make) -> None:
    path = tiny(name, torch.float64)
    config = configured(path, recipe="default", dtype="float64", ratio=0.35)
    tokens, sites = calibrated(config), sites_of(path)
    twins, (costs,) = reference.default(path, tokens, sites, ratio=0.35, round_to=4)
    plan, found = planned(config)
    for site in sites:
        torch.testing.assert_close(found[f"{site.name}.costs"], costs[site.name], rtol=1e-7, atol=0)
        assert bool((found[f"{site.name}.costs"].diff() >= 0).all())
        assert plan[site.name].keep == len(twins.kept[site.name])
    streamprune.prune(config)
    kept_columns(config, twins)
    same_logits(config, twins.pruned, tokens)


@pytest.mark.parametrize(
    ("name", "target", "weighted"),
    [
        ("llama-biased", "dense", True),
        ("opt", "dense", True),
        ("llama-biased", "own", True),
        ("gpt2", "residual", False),
    ],
)
def test_default_with_other_settings(name: str, target: str, weighted: bool, tiny: Tiny, configured: Make) -> None:
    path = tiny(name, torch.float64)
    drawn = target == "residual"
    settings = {"target": target, "weighted": "on" if weighted else "off", "labels": "drawn" if drawn else "text"}
    config = configured(path, recipe="default", dtype="float64", ratio=0.35, settings=settings)
    tokens = calibrated(config)
    twins, _ = reference.default(
        path, tokens, sites_of(path), ratio=0.35, round_to=4, target=target, weighted=weighted, drawn=drawn
    )
    streamprune.prune(config)
    kept_columns(config, twins)
    same_logits(config, twins.pruned, tokens)


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_default_in_two_shots(name: str, tiny: Tiny, configured: Make) -> None:
    path = tiny(name, torch.float64)
    config = configured(path, recipe="default", dtype="float64", ratio=0.4, settings={"shots": "2"})
    tokens = calibrated(config)
    twins, _ = reference.default(path, tokens, sites_of(path), ratio=0.4, round_to=4, shots=2)
    streamprune.prune(config)
    kept_columns(config, twins)
    same_logits(config, twins.pruned, tokens)


@pytest.mark.parametrize(
    ("name", "shots"), [("llama-biased", 1), ("falcon", 1), ("gemma2", 1), ("opt", 1), ("qwen3_5", 2)]
)
def test_default_lets_sublayers_go_whole(name: str, shots: int, tiny: Tiny, configured: Make) -> None:
    path = tiny(name, torch.float64)
    settings = {"shots": str(shots)}
    config = configured(path, recipe="default", dtype="float64", ratio=0.8, settings=settings, samples=6)
    tokens, sites = calibrated(config), sites_of(path)
    twins, _ = reference.default(path, tokens, sites, ratio=0.8, round_to=4, shots=shots)
    streamprune.prune(config)
    kept_columns(config, twins)
    assert any(len(units) == 0 for units in twins.kept.values())
    same_logits(config, twins.pruned, tokens)
    kept = configured(path, "kept", recipe="default", ratio=0.6, settings={"sublayers": "off"})
    streamprune.prune(kept)
    assert all(site["kept"] for site in json.loads((kept.out / "report.json").read_text())["sites"])


# Shots.


def finished(config: Config, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Prune; returns what was gone after each shot."""
    removed = []
    real = Journal.append

    def append(self: Journal, step: str, **data: Any) -> Any:
        if step.endswith("/finished"):
            removed.append(data["removed"])
        return real(self, step, **data)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", append)
        streamprune.prune(config)
    return removed


def test_every_shot_removes_its_part(tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    path, shots = tiny("qwen3"), 3
    config = configured(path, recipe="default", ratio=0.5, settings={"shots": str(shots)})
    removed = finished(config, monkeypatch)
    parameters = open_skeleton(path, torch.device("cpu"), "float32").block_parameters()
    step = largest_unit(sites_of(path), Budget(0.5, parameters, 4))
    assert len(removed) == shots
    for shot, gone in enumerate(removed, start=1):
        assert 0 <= round(0.5 * shot / shots * parameters) - gone < step
    assert removed[-1] == parameters - round(
        parameters * (1 - json.loads((config.out / "report.json").read_text())["ratio_blocks"])
    )


def test_two_shots_are_two_jobs_one_after_the_other(tiny: Tiny, configured: Make) -> None:
    path = tiny("llama-biased")
    streamprune.prune(configured(path, "both", recipe="default", ratio=0.4, settings={"shots": "2"}))
    first = configured(path, "first", recipe="default", ratio=0.2)
    done = streamprune.prune(first)
    parameters = open_skeleton(path, torch.device("cpu"), "float32").block_parameters()
    left = open_skeleton(first.out, torch.device("cpu"), "float32").block_parameters()
    rest = (round(0.4 * parameters) - (done.parameters_before - done.parameters_after)) / left
    streamprune.prune(configured(first.out, "second", recipe="default", ratio=rest))
    one, other = (
        {name: data for name, data in contents(configured(path, out).out).items() if "safetensors" in name}
        for out in ("both", "second")
    )
    assert one == other


# SlimGPT.


def test_the_incremental_ratios_by_hand() -> None:
    # L = 4, r0 = 0.4: log(i+1)/log 4 is 0, ½, log₄3, 1, and the last share makes the mean 1.
    middle = math.log(3) / math.log(4)
    last = 0.4 + 0.6 * 4 / (1.5 + middle)
    by_hand = [0.4, 0.4 + (last - 0.4) * 0.5, 0.4 + (last - 0.4) * middle, last]
    assert incremental_ratios(4, 0.4) == pytest.approx(by_hand)
    assert incremental_ratios(1, 0.4) == [1.0]
    assert incremental_ratios(5, 1.0) == pytest.approx([1.0] * 5)
    # With the last share given, what counts is its proportion to the first.
    steps = [0.4 + 1.2 * step for step in (0, 0.5, middle, 1)]
    assert incremental_ratios(4, 0.4, 1.6) == pytest.approx([4 * step / sum(steps) for step in steps])
    assert incremental_ratios(4, 0.4, last) == pytest.approx(by_hand)
    for blocks, r0 in itertools.product((2, 3, 7, 32, 80), (0.0, 0.25, 0.4, 1.0)):
        ratios = incremental_ratios(blocks, r0)
        assert ratios[0] == pytest.approx(r0)
        assert sum(ratios) / blocks == pytest.approx(1)
        assert ratios == sorted(ratios)


@pytest.mark.parametrize(("r0", "r_last"), [(0.4, 0.0), (1.0, 0.0), (0.5, 2.0), (1.0, 0.5)])
def test_slimgpt_shares_follow_the_schedule(r0: float, r_last: float, tiny: Tiny, configured: Make) -> None:
    path = tiny("llama-biased", num_hidden_layers=6, intermediate_size=96)
    config = configured(path, recipe="slimgpt", ratio=0.3, settings={"r0": str(r0), "r_last": str(r_last)}, round_to=1)
    plan, _ = planned(config)
    # One ratio explains all sites, each to within a unit; it is more than 0.3, since norms and consumers' biases stay.
    lowest, highest = 0.3, 0.4
    for site in sites_of(path):
        share, gone = incremental_ratios(6, r0, r_last)[site.block], site.units - plan[site.name].keep
        lowest = max(lowest, (gone - 1) / (share * site.units))
        highest = min(highest, (gone + 1) / (share * site.units))
    assert lowest <= highest


@pytest.mark.parametrize("name", ["llama-biased", "gpt2", "opt-350m"])
def test_slimgpt_with_exact_selection_is_the_plain_implementation(name: str, tiny: Tiny, configured: Make) -> None:
    path = tiny(name, torch.float64)
    config = configured(path, recipe="slimgpt", dtype="float64", ratio=0.35, settings={"exact": "on"})
    tokens = calibrated(config)
    twins = reference.slimgpt(path, tokens, sites_of(path), shares=incremental_ratios(3, 0.4), ratio=0.35, round_to=4)
    streamprune.prune(config)
    kept_columns(config, twins)
    same_logits(config, twins.pruned, tokens)


@pytest.mark.parametrize("name", ["llama-biased", "gpt2"])
def test_slimgpt_in_batches_is_the_plain_implementation(name: str, tiny: Tiny, configured: Make) -> None:
    path = tiny(name, torch.float64)
    settings = {"first_group": "8", "last_group": "2"}
    config = configured(path, recipe="slimgpt", dtype="float64", ratio=0.35, settings=settings)
    tokens = calibrated(config)
    twins = reference.slimgpt(
        path,
        tokens,
        sites_of(path),
        shares=incremental_ratios(3, 0.4),
        ratio=0.35,
        round_to=4,
        choose=lambda problem, keep: reference.in_batches(problem, keep, first=8, last=2),
    )
    streamprune.prune(config)
    kept_columns(config, twins)
    same_logits(config, twins.pruned, tokens)


# SoBP.


@pytest.mark.parametrize("gradient", ["fisher", "abs", "mean"])
def test_sobp_combines_the_sequences_gradients_as_it_is_told(gradient: str, tiny: Tiny, configured: Make) -> None:
    path = tiny("llama-biased", torch.float64)
    settings = {"gradient": gradient, "head_weight": "3"}
    config = configured(path, recipe="sobp", dtype="float64", ratio=0.35, settings=settings)
    twins, tokens = reference.Twins(path, sites_of(path)), calibrated(config)
    each = reference.mask_gradients(twins.dense, twins.places, tokens)
    _, found = planned(config)
    for site in sites_of(path):
        g = each[site.name]  # (sequences, units)
        combined = {"fisher": g.square().mean(dim=0), "abs": g.abs().mean(dim=0), "mean": g.mean(dim=0).abs()}[gradient]
        expected = combined * (3 if site.kind == "attention" else 1) / site.unit_parameters
        torch.testing.assert_close(found[f"{site.name}.importance"], expected, rtol=1e-7, atol=0)


# Magnitude.


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_magnitude_sums_every_weight_of_a_unit(norm: str, tiny: Tiny, configured: Make) -> None:
    path = tiny("llama-biased", torch.float64)
    config = configured(path, recipe="magnitude", dtype="float64", ratio=0.4, settings={"norm": norm}, round_to=1)
    sites, power = sites_of(path), 1 if norm == "l1" else 2
    twins, (plan, _) = reference.Twins(path, sites), planned(config)
    tokens = torch.arange(24).view(2, 12)

    def choose(problem: reference.Problem, keep: int) -> Tensor:
        weights = [problem.w.T, *problem.producers]  # a unit's rows of each
        units = problem.place.site.units
        scores = [sum(float(w.chunk(units)[u].abs().pow(power).sum()) for w in weights) for u in range(units)]
        return torch.tensor(scores).argsort(descending=True)[:keep].sort().values

    keep = {name: entry.keep for name, entry in plan.items()}
    twins.prune(keep, tokens, choose=choose, compensate=False, reconstruct=False)
    streamprune.prune(config)
    same_logits(config, twins.pruned, tokens)


# Greedy output approximation.


def random_divergences(units: int, seed: int, *, ties: bool = False) -> Tensor:
    d = torch.rand(units, units, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    d = (d + d.T) / 2
    if ties:
        d = (d * 4).round() / 4
    return d.fill_diagonal_(0)


@pytest.mark.parametrize("ties", [False, True])
def test_candidates_are_those_of_a_rising_threshold(ties: bool) -> None:
    exact = 0
    for units, seed in itertools.product((1, 2, 5, 8), range(10)):
        d = random_divergences(units, seed, ties=ties)
        # In closed form: a unit goes once some later one is nearer than τ.
        assert redundant(d, 0.3) == [i for i in range(units) if any(d[i, j] < 0.3 for j in range(i + 1, units))]
        taus = rising_thresholds(d)
        assert len(taus) == units
        assert bool((taus.diff() >= 0).all())
        # Just above each divergence, and far apart from all of them.
        tried = sorted({0.0, 1.0, *d.flatten().tolist(), *(d + 1e-9).flatten().tolist()})
        found = {tau: redundant(d, tau) for tau in tried}
        for count in range(units):
            chosen = candidates(d, count)
            assert len(set(chosen)) == len(chosen) == count
            # Whatever any τ below takes is no more, and at the rising τ that many go.
            if count:
                tau = float(taus[count - 1])
                assert len(redundant(d, tau)) >= count
                assert max((len(found[t]) for t in tried if t < tau), default=0) < count
                assert set(chosen) <= set(redundant(d, tau))
            for gone in found.values():
                if len(gone) == count:
                    exact += count > 0
                    assert set(chosen) == set(gone)
    assert exact > 0


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {}),
        ("mistral", {"recover": "both"}),
        ("gpt2", {"recover": "after"}),
        ("opt-350m", {}),
        ("llama-biased", {"tau": "0.35"}),
        ("llama-biased", {"tau": "0.35", "recover": "off"}),
        ("llama-biased", {"heads": "similarity", "tau": "0", "recover": "both"}),
        ("llama-biased", {"heads": "second-moment"}),
        ("gpt2", {"heads": "second-moment", "recover": "both"}),
    ],
)
def test_greedy_output_is_the_plain_implementation(
    name: str, settings: dict[str, str], tiny: Tiny, configured: Make
) -> None:
    path = tiny(name, torch.float64)
    config = configured(path, recipe="greedy-output", dtype="float64", ratio=0.35, settings=settings)
    tokens, sites = calibrated(config), sites_of(path)
    plan, found = planned(config)
    attention = [site for site in sites if site.kind == "attention"]
    heads, tau, similar = settings.get("heads"), float(settings.get("tau", 0.16)), {}
    if heads != "second-moment":
        model = reference.load(path, attn_implementation="eager")
        with torch.no_grad():
            maps = model(tokens, output_attentions=True).attentions
        for site in attention:
            d, rep = reference.divergence(maps[site.block]), site.heads // site.units
            d = d.view(site.units, rep, site.units, rep).mean(dim=(1, 3)).fill_diagonal_(0)
            torch.testing.assert_close(found[f"{site.name}.divergence"], d, rtol=1e-5, atol=1e-7)
            gone = site.units - plan[site.name].keep
            similar[site.name] = candidates(d, gone if heads else min(gone, len(redundant(d, tau))))
            if heads:
                assert plan[site.name].units == tuple(u for u in range(site.units) if u not in similar[site.name])
    removed = {site.name: site.units - plan[site.name].keep for site in attention}
    assert any(removed.values())
    if settings.get("tau") == "0.35":  # Similarity decides some of the heads, and the second moment the others.
        assert 0 < sum(len(each) for each in similar.values()) < sum(removed.values())
    recover = settings.get("recover", "before")
    twins = reference.Twins(path, sites)

    def choose(problem: reference.Problem, keep: int) -> Tensor:
        return reference.by_second_moment(problem, keep, similar.get(problem.place.site.name, ()))

    twins.prune(
        {name: entry.keep for name, entry in plan.items()},
        tokens,
        choose=choose,
        compensate=recover in ("before", "both"),
        target="dense" if recover in ("before", "both") else "own",
        reconstruct=recover in ("after", "both"),
    )
    streamprune.prune(config)
    kept_columns(config, twins)
    same_logits(config, twins.pruned, tokens)


@pytest.mark.parametrize("name", ["llama-biased", "gpt2"])
@pytest.mark.parametrize("heads", ["similar-first", "second-moment"])
def test_units_can_be_chosen_on_a_text_of_their_own(name: str, heads: str, tiny: Tiny, configured: Make) -> None:
    path = tiny(name, torch.float64)
    config = configured(
        path,
        recipe="greedy-output",
        dtype="float64",
        ratio=0.35,
        settings={"heads": heads, "tau": "0.35"},
        metric_text="random-tokens",
        metric_samples=7,
    )
    tokens, chosen_on, twins = (
        calibrated(config),
        Job(config, None).survey_tokens,
        reference.Twins(path, sites_of(path)),
    )
    assert len(tokens) == 12
    assert len(chosen_on) == 7
    plan, found = planned(config)
    maps = reference.load(path, attn_implementation="eager")(chosen_on, output_attentions=True).attentions

    def choose(problem: reference.Problem, keep: int) -> Tensor:
        place, site, first = problem.place, problem.place.site, list[int]()
        if site.kind == "attention" and heads == "similar-first":
            d, rep = reference.divergence(maps[site.block]), site.heads // site.units
            d = d.view(site.units, rep, site.units, rep).mean(dim=(1, 3)).fill_diagonal_(0)
            torch.testing.assert_close(found[f"{site.name}.divergence"], d, rtol=1e-5, atol=1e-7)
            first = candidates(d, min(site.units - keep, len(redundant(d, 0.35))))
        inputs, z = reference.capture(twins.dense, [place.reader, place.consumer], chosen_on)
        return reference.by_second_moment(replace(problem, inputs=inputs, z=z), keep, first)

    keep = {name: entry.keep for name, entry in plan.items()}
    twins.prune(keep, tokens, choose=choose, target="dense", reconstruct=False)
    streamprune.prune(config)
    kept_columns(config, twins)
    same_logits(config, twins.pruned, tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "sobp"}, "metric-text is given; recipe sobp reads no other text than calibration"),
        ({"settings": {"recover": "off"}}, "with recover=off nothing reads calibration; give that text as calibration"),
        ({"metric_text": "self"}, "metric-text is self; only calibration can be"),
        ({"metric_text": ["random-tokens", "random-tokens"]}, "metric-text 'random-tokens' cannot be combined"),
        ({"metric_samples": 13}, "metric-samples is 13; it must be at most samples, 12"),
        ({"metric_samples": 0}, "metric_samples"),
    ],
)
def test_a_text_for_the_metric_that_cannot_be(
    changes: dict[str, Any], message: str, tiny: Tiny, configured: Make
) -> None:
    fields = {"recipe": "greedy-output", "metric_text": "random-tokens", "metric_samples": 4, **changes}
    with pytest.raises(ConfigError, match=message):
        Job(configured(tiny("llama"), **fields), None)


def test_a_threshold_takes_no_heads_where_none_can_go(tiny: Tiny, configured: Make) -> None:
    path = tiny("gpt2")
    plan, found = planned(
        configured(
            path,
            recipe="greedy-output",
            ratio=0.3,
            layout="uniform",
            settings={"heads": "similarity", "tau": "0.5"},
            round_to=1,
        )
    )
    assert any(len(redundant(d, 0.5)) for name, d in found.items() if name.endswith("divergence"))
    assert all(plan[f"blocks.{block}.attention"].keep == 4 for block in range(3))
    assert all(plan[f"blocks.{block}.ffn"].keep < 48 for block in range(3))


def test_a_threshold_prunes_ffns_of_a_model_whose_attention_is_no_site(tiny: Tiny, configured: Make) -> None:
    settings = {"heads": "similarity", "tau": "0.5"}
    config = configured(tiny("falcon-rw"), recipe="greedy-output", ratio=0.3, settings=settings, round_to=1)
    plan, found = planned(config)
    assert not any(name.endswith("divergence") for name in found)
    assert set(plan) == {f"blocks.{block}.ffn" for block in range(3)}
    assert all(entry.keep < 48 for entry in plan.values())


def test_by_similarity_linear_mixers_cannot_lose_heads(tiny: Tiny) -> None:
    sites = sites_of(tiny("nemotron_h"))
    whole = sum(site.units * site.unit_parameters for site in sites)
    most = {site: (site.units - (4 if site.kind == "ffn" else 1)) * site.unit_parameters / whole for site in sites}
    without = sum(share for site, share in most.items() if site.kind != "linear")
    budget = Budget((without + sum(most.values())) / 2, whole, round_to=4)
    GreedyOutput(GreedyOutputSettings(heads="second-moment")).check(sites, budget)
    with pytest.raises(ConfigError, match=f"this model can lose at most {without:.3f}"):
        GreedyOutput(GreedyOutputSettings(heads="similarity")).check(sites, budget)


def test_head_weight_is_for_linear_mixers_too(tiny: Tiny) -> None:
    for site in sites_of(tiny("nemotron_h")):
        mask = MaskGradient(site.units, site.width)
        mask.sequences, mask.squares = 1, mask.squares + 1
        surveyed: Any = SimpleNamespace(site=site, statistics=SimpleNamespace(mask=mask))
        plain, weighted = (Sobp(SobpSettings(head_weight=w)).digest(surveyed)["importance"] for w in (1.0, 3.0))
        torch.testing.assert_close(weighted, plain * (1 if site.kind == "ffn" else 3))


def test_greedy_output_goes_by_a_threshold_that_is_given(tiny: Tiny, configured: Make) -> None:
    path = tiny("llama-biased", torch.float64)
    config = configured(path, recipe="greedy-output", dtype="float64", ratio=0.4, round_to=1)
    _, found = planned(config)
    divergences = {name: d for name, d in found.items() if name.endswith("divergence")}
    # Between two divergences of the middle block, so that some of its heads go.
    pairs = sorted(divergences["blocks.1.attention.divergence"].triu(1).flatten().unique().tolist())
    tau = (pairs[1] + pairs[2]) / 2
    given = replace(config, out=config.out.with_name("given"), settings={"heads": "similarity", "tau": repr(tau)})
    plan, _ = planned(given)
    for name, d in divergences.items():
        gone = redundant(d, tau)
        entry = plan[name.removesuffix(".divergence")]
        assert entry.units == tuple(u for u in range(4) if u not in gone)
    assert plan["blocks.1.attention"].keep < 4
    streamprune.prune(given)
