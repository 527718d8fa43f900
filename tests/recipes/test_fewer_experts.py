"""Whole experts that go: against transformers' model with their logits at minus infinity, REAP against brute force, refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from conftest import contents
from safetensors.torch import load_file
from stopping import Stop, stopping_after, windows
from streamprune_cli import main
from torch import Tensor
from transformers import AutoModelForCausalLM

import streamprune
from streamprune import Config
from streamprune.errors import CheckpointError, ConfigError
from streamprune.jobs.names import job_folder
from streamprune.maths import sums
from streamprune.model.checkpoint import Shard
from streamprune.model.site import Site, routed
from streamprune.model.sizes import Sizes
from streamprune.model.skeleton import open_skeleton
from streamprune.pruning.experts import positions, removal_costs
from streamprune.pruning.preview import preview
from streamprune.pruning.speed import Decoding
from streamprune.recipes.allocation import Budget, allocate
from streamprune.recipes.default import Default, with_whole
from streamprune.recipes.experts import Experts, leaving
from streamprune.recipes.plan import Plan, SitePlan
from streamprune.recipes.recipe import OVERLAP, WHOLE
from streamprune.recipes.settings import DefaultSettings

Make = Callable[..., Config]
Tiny = Callable[..., Path]
CPU = torch.device("cpu")
EIGHT = {"n_routed_experts": 8}
KINDS = [
    ("mixtral", {}, (1,)),
    ("qwen3_moe", {}, (0, 3)),
    ("olmoe", {}, (3,)),
    ("qwen2_moe", {}, (0, 1)),
    ("gpt_oss", {}, (2,)),
    ("deepseek_v3", EIGHT, (0, 6)),  # one of each group
    ("llama4", {}, (1,)),
    ("gemma4-moe", {}, (0,)),
    # Their files have other names than the models: w1 to w3 for each expert, and input_linear for all of them.
    ("mixtral", {"model_type": "minimax_m2", "num_experts_per_tok": 2}, (3,)),
    ("mixtral", {"model_type": "granitemoe"}, (0, 2)),
]
FIELDS = ("num_local_experts", "num_experts", "n_routed_experts")


def plan_without(path: Path, gone: Sequence[int], file: Path) -> Path:
    sites = open_skeleton(path, CPU, "auto").all_sites()
    kept = {site.name: SitePlan(0 if site.expert in gone else site.units) for site in sites}
    file.write_text(Plan(kept, 0.1).to_json())
    return file


def opened(path: Path, dtype: torch.dtype = torch.float64) -> Any:
    """transformers' own class, without streamprune."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, experts_implementation="eager").eval()


def names(path: Path) -> set[str]:
    """Names of the tensors in a checkpoint's files."""
    return {name for file in path.glob("*.safetensors") for name in Shard(file)}


@contextmanager
def never_routed(model: Any, gone: Sequence[int], number: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give the experts `gone` a logit of minus infinity in every router."""
    routers = {
        id(parameter)
        for name, parameter in model.named_parameters()
        if name.endswith((".gate.weight", ".router.weight", ".router.proj.weight")) and len(parameter) == number
    }
    assert routers
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    before = [bias.clone() for bias in biases]
    for bias in biases:
        bias[list(gone)] = -torch.inf
    real = F.linear

    def linear(x: Tensor, weight: Tensor, *bias: Any, **named: Any) -> Tensor:
        y = real(x, weight.to(x.dtype), *bias, **named)
        return y.index_fill(-1, torch.tensor(gone), -torch.inf) if id(weight) in routers else y

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(F, "linear", linear)
        yield
    for bias, own in zip(biases, before, strict=True):
        bias.copy_(own)


@torch.no_grad()
def streamed(path: Path, tokens: Tensor, dtype: str = "float64") -> Tensor:
    skeleton = open_skeleton(path, CPU, dtype)
    with skeleton.embedding() as embedding:
        x = embedding(tokens)
    for index in range(len(skeleton)):
        block = skeleton.build_block(index, skeleton.read_block(index))
        x = block(x, skeleton.arguments(*tokens.shape)[index])
    with skeleton.head() as head:
        return head(x)


@pytest.mark.parametrize(("name", "changes", "gone"), KINDS)
def test_without_experts_a_model_is_transformers_with_their_logits_at_minus_infinity(
    name: str,
    changes: Mapping[str, Any],
    gone: tuple[int, ...],
    tiny: Tiny,
    configured: Make,
    tmp_path: Path,
    float64_norms: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tiny(name, torch.float64, **changes)
    number = changes.get("n_routed_experts", 4)
    plan = plan_without(path, gone, tmp_path / "plan.json")
    config = configured(path, recipe="reap", ratio=None, plan=plan, dtype="float64")
    result = streamprune.prune(config)
    written = json.loads((config.out / "config.json").read_text())
    assert written["model_type"] == json.loads((path / "config.json").read_text())["model_type"]
    assert [written[field] for field in FIELDS if field in written] == [number - len(gone)]
    tokens = torch.randint(2, 20, (2, 16), generator=torch.Generator().manual_seed(3))
    dense, stock = opened(path), opened(config.out)
    with never_routed(dense, gone, number, monkeypatch):
        wanted = dense(tokens).logits
    with torch.no_grad():
        assert not torch.allclose(opened(path)(tokens).logits, wanted)
        torch.testing.assert_close(stock(tokens).logits, wanted)
    torch.testing.assert_close(streamed(config.out, tokens), wanted)
    assert stock.num_parameters() == result.parameters_after
    assert names(config.out) <= names(path)


def test_the_experts_that_stay_see_the_tokens_of_those_that_went(
    tiny: Tiny, configured: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny("olmoe")
    sites = open_skeleton(path, CPU, "float32").all_sites()
    kept = {
        site.name: SitePlan({1: 0, 2: 12}.get(-1 if site.expert is None else site.expert, site.units)) for site in sites
    }
    plan = tmp_path / "plan.json"
    plan.write_text(Plan(kept, 0.2).to_json())
    config = configured(path, recipe="wanda-sp", ratio=None, plan=plan, round_to=1)
    streamprune.prune(config)
    report = {site["site"]: site for site in json.loads((config.out / "report.json").read_text())["sites"]}
    assert [site["site"] for site in report.values()] == [site.name for site in sites]
    assert report["blocks.0.ffn.1"]["kept"] == 0
    model = opened(path, torch.float32)
    with never_routed(model, [1], 4, monkeypatch):
        logits = model(windows(config, path), output_router_logits=True).router_logits[0]
    assert report["blocks.0.ffn.2"]["tokens"] == int((logits.topk(2, dim=-1).indices == 2).sum())
    # Neither order nor numbers of the others change.
    before, after = (load(each) for each in (path, config.out))
    for old, new in ((0, 0), (3, 2)):
        name = "model.layers.1.mlp.experts.{}.down_proj.weight"
        assert torch.equal(before[name.format(old)], after[name.format(new)])
    gate = "model.layers.1.mlp.gate.weight"
    assert torch.equal(before[gate][[0, 2, 3]], after[gate])


def load(path: Path) -> dict[str, Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_reap_is_the_mean_of_router_weight_times_output_norm(tiny: Tiny, configured: Make) -> None:
    path = tiny("mixtral")
    config = configured(path, recipe="reap", ratio=None, experts=3)
    plan = Plan.read(streamprune.plan_only(config))
    found: list[list[float]] = []

    def observe(module: Any, given: Any) -> None:
        x, index, weights = given
        means = []
        for number in range(4):
            tokens, rank = torch.where(index == number)
            gate, up = F.linear(x[tokens], module.gate_up_proj[number]).chunk(2, dim=-1)
            y = F.linear(module.act_fn(gate) * up, module.down_proj[number])
            means.append(float((weights[tokens, rank] * y.norm(dim=-1)).mean()))
        found.append(means)

    model = opened(path, torch.float32)
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(observe)
    with torch.no_grad():
        model(windows(config, path))
    for index, means in enumerate(found):
        kept = load_file(job_folder(config.out) / f"survey-{index:04}.safetensors")
        assert [float(kept[f"ffn.{number}.norm"]) for number in range(4)] == pytest.approx(means, rel=1e-5)
        gone = [number for number in range(4) if plan[f"blocks.{index}.ffn.{number}"].keep == 0]
        assert gone == [means.index(min(means))]


class Beside(torch.nn.Module):
    """gemma4's mixture, which has no module of its own: the block calls its parts."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm, self.router, self.experts = block.pre_feedforward_layernorm_2, block.router, block.experts

    def forward(self, x: Tensor) -> Tensor:
        _, weights, index = self.router(x.flatten(0, 1))
        y: Tensor = self.experts(self.norm(x.flatten(0, 1)), index, weights)
        return y.view(x.shape)


def mixtures(model: Any, tokens: Tensor) -> list[tuple[Any, Tensor, Tensor]]:
    """transformers' mixtures with what each reads, and the gradients of its output: (1, tokens, d) of all tokens together."""
    read, given, found, hooks = list[Tensor](), list[Tensor](), list[Any](), []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        read.append(inputs[0].detach().view(1, -1, inputs[0].shape[-1]))

    def keep_output(module: Any, inputs: Any, output: Any) -> None:
        given.append(output[0] if isinstance(output, tuple) else output)
        given[-1].retain_grad()

    for module in model.modules():
        router = next((getattr(module, name) for name in ("gate", "router") if hasattr(module, name)), None)
        if router is not None and hasattr(module, "experts"):
            alone = not hasattr(module, "self_attn")
            found.append(module if alone else Beside(module))
            hooks.append((module if alone else router).register_forward_hook(keep))
            hooks.append((module if alone else module.experts).register_forward_hook(keep_output))
    logits = model(tokens).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    gradients = (o.grad.view(1, -1, o.shape[-1]) for o in given if o.grad is not None)
    return list(zip(found, read, gradients, strict=True))


def only(mixture: Any, x: Tensor, expert: int | None) -> Tensor:
    """A mixture's output with what one expert adds, and no other does; without any expert for None."""

    def other(module: Any, given: Any) -> Any:
        number = -1 if expert is None else expert
        if len(given) == 1:  # llama4: all tokens for each expert in turn
            own = torch.arange(len(given[0])) // (len(given[0]) // module.num_experts) == number
            return (given[0] * own[:, None],)
        states, index, weights = given
        return states, index, weights.where(index == number, 0)

    hook = mixture.experts.register_forward_pre_hook(other)
    with torch.no_grad():
        output: Any = mixture(x)
    hook.remove()
    o: Tensor = output[0] if isinstance(output, tuple) else output
    return o.view(x.shape)


@pytest.mark.parametrize(
    ("name", "changes", "recipe", "settings"),
    [
        ("mixtral", {}, "default", {"labels": "text"}),
        ("mixtral", {"tokens": 16}, "default", {"labels": "text"}),
        ("mixtral", {}, "surgeon", {"shots": "1", "curvature": "l-obd"}),
        ("gpt_oss", {}, "surgeon", {"shots": "1"}),
        pytest.param("qwen3_moe", {}, "default", {"labels": "text"}, marks=pytest.mark.slow),
        pytest.param("qwen2_moe", {}, "default", {"labels": "text"}, marks=pytest.mark.slow),
        ("olmoe", {}, "default", {"labels": "text"}),
        ("deepseek_v3", EIGHT, "default", {"labels": "text"}),
        ("llama4", {}, "default", {"labels": "text"}),
        ("gemma4-moe", {}, "default", {"labels": "text"}),
    ],
)
def test_experts_cost_what_the_loss_rises_by_once_they_are_gone_one_after_the_other(
    name: str,
    changes: Mapping[str, int],
    recipe: str,
    settings: dict[str, str],
    tiny: Tiny,
    configured: Make,
    float64_norms: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To second order, by full autograd: their tokens go to the router's next choices in transformers' own mixture."""
    changes = dict(changes)
    monkeypatch.setattr(sums, "TOKENS_PER_EXPERT", changes.pop("tokens", sums.TOKENS_PER_EXPERT))
    path, number = tiny(name, torch.float64, **changes), changes.get("n_routed_experts", 4)
    given = {"ratio": None, "experts": "0.5", "dtype": "float64", "samples": 4, "settings": settings}
    config = configured(path, recipe=recipe, **given)
    plan = Plan.read(streamprune.plan_only(config))
    model, places = opened(path), open_skeleton(path, CPU, "auto").all_sites()
    tokens = windows(config, path)
    chosen = positions((len(tokens), tokens.shape[1]), sums.sample_size(number, 2)) @ torch.tensor([tokens.shape[1], 1])
    assert (len(chosen) < tokens.numel()) == (sums.TOKENS_PER_EXPERT == 16)
    for index, (mixture, x, g) in zip(sorted(routed(places)), mixtures(model, tokens), strict=True):
        x, g = x[:, chosen], g[:, chosen]

        def run(mixture: Any = mixture, x: Tensor = x) -> Tensor:
            with torch.no_grad():
                output: Any = mixture(x)
            o: Tensor = output[0] if isinstance(output, tuple) else output
            return o.view(x.shape)

        def loss(gone: Sequence[int], dense: Tensor, g: Tensor = g, run: Any = run) -> float:
            with never_routed(model, gone, number, monkeypatch):
                change = run() - dense
            squares = change.square().sum(-1) if "curvature" in settings else (change * g).sum(-1).square()
            return float(squares.mean()) / 2

        found = load_file(job_folder(config.out) / f"survey-{index:04}.safetensors")
        costs = {expert: float(found[key]) for expert in range(number) if (key := f"ffn.{expert}.whole") in found}
        order, groups = sorted(costs, key=costs.__getitem__), routed(places)[index][0].groups
        sets = [order[start : start + groups] for start in range(0, len(order), groups)]
        assert len(order) == number - routed(places)[index][0].least
        dense, highest, before, spent = run(), 0.0, list[int](), 0.0
        apart = torch.stack([only(mixture, x, expert) - only(mixture, x, None) for expert in range(number)])

        def squares(change: Tensor, g: Tensor = g) -> Tensor:
            return change.square().sum(-1) if "curvature" in settings else (change * g).sum(-1).square()

        overlap = squares(apart.sum(0)).sum() / sum(squares(each).sum() for each in apart)
        torch.testing.assert_close(found["ffn.0.overlap"], overlap)
        if groups == 1 and name not in ("olmoe", "qwen2_moe"):  # where the weights of other tokens change too
            assert order[0] == min(range(number), key=lambda expert: loss([expert], dense))
        for each in sets:
            rise = loss([*before, *each], dense)
            highest = max(highest, (rise - spent) / groups)
            assert [costs[expert] for expert in each] == pytest.approx([highest] * groups, rel=1e-8)
            before, spent = [*before, *each], rise
        gone = [expert for expert in range(number) if plan[f"blocks.{index}.ffn.{expert}"].keep == 0]
        assert gone == sorted(order[: number // 2])


def experts(block: int, number: int, *, groups: int = 1, least: int = 2, units: int = 4) -> list[Site]:
    return [
        Site(
            block=block, kind="ffn", units=units, width=1, outputs=8, unit_parameters=10, expert=each, rest=8,
            groups=groups, least=least,
        )
        for each in range(number)
    ]  # fmt: skip


def test_by_threshold_the_cheapest_parameters_of_all_blocks_go() -> None:
    sites = [*experts(0, 4), *experts(1, 4, units=8), *experts(2, 3)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        costs = {site.name: float(torch.rand((), generator=generator)) for site in sites}
        gone = leaving(sites, costs, Experts.parse("0.3:threshold"))
        prices = {site.name: costs[site.name] / site.removed(0) for site in sites}
        allowed = [
            each
            for each in combinations(sites, 3)
            if all(len(own) - 2 >= sum(site in each for site in own) for own in routed(sites).values())
        ]
        best = min(allowed, key=lambda each: sum(prices[site.name] for site in each))
        assert {site.name for site in gone} == {site.name for site in best}


def test_by_number_each_group_keeps_its_dearest_experts() -> None:
    sites = [*experts(0, 6, groups=2), *experts(3, 4, groups=2)]
    costs = {site.name: cost for site, cost in zip(sites, (5, 1, 3, 9, 8, 7, 2, 1, 1, 2), strict=True)}
    gone = [site.name for site in leaving(sites, costs, Experts.parse("2"))]
    assert gone == [f"blocks.{place}" for place in ("0.ffn.1", "0.ffn.2", "0.ffn.5", "0.ffn.4", "3.ffn.1", "3.ffn.2")]
    assert len(leaving(sites, costs, Experts.parse("0.34"))) == 4


def test_in_one_budget_an_expert_goes_when_its_last_unit_is_the_cheapest_and_enough_others_stay() -> None:
    sites = experts(0, 3, units=2)
    prices = {"blocks.0.ffn.0": (1.0, 1.0), "blocks.0.ffn.1": (1.0, 1.5), "blocks.0.ffn.2": (100.0, 100.0)}
    densities = {name: torch.tensor(each) for name, each in prices.items()}

    def kept(parameters: int, **changes: Any) -> list[int]:
        return list(allocate(sites, densities, Budget(parameters / 84, 84, 1, **changes)).values())

    assert kept(38, experts=True) == [0, 1, 2]
    assert kept(56, experts=True) == [0, 1, 1]  # the router needs two experts
    assert kept(38, sublayers=True) == [1, 1, 1]


def test_in_one_budget_experts_and_units_go_as_their_prices_say() -> None:
    """An expert without a price of its own stays, however cheap its units are."""
    sites = experts(0, 4, least=2)  # of 48 parameters each
    one = torch.tensor(1.0, dtype=torch.float64)
    units = {"costs": torch.full((4,), 0.01, dtype=torch.float64), OVERLAP: one}  # 0.1 each
    survey = {
        site.name: units | ({WHOLE: torch.tensor(1.6 * whole)} if whole else {})
        for site, whole in zip(sites, (0.4, 0.2, 0.0, 0.0), strict=True)
    }
    recipe = Default(DefaultSettings())

    def kept(parameters: int, **changes: Any) -> list[int]:
        budget = Budget(parameters / 192, 192, 1, experts=True, **changes)
        return [entry.keep for entry in recipe.allocate(sites, survey, budget).values()]

    assert kept(48) == [4, 0, 4, 4]
    assert kept(96) == [0, 0, 4, 4]
    assert kept(116) == [0, 0, 2, 4]
    assert sorted(kept(156)) == [0, 0, 1, 1]
    cheaper = {name: dict(each) for name, each in survey.items()} | {
        sites[1].name: units | {WHOLE: torch.tensor(1.6 * 0.6)}
    }
    assert [entry.keep for entry in recipe.allocate(sites, cheaper, Budget(20 / 192, 192, 1, experts=True)).values()] == [
        4, 2, 4, 4
    ]  # fmt: skip


def test_a_job_predicts_what_its_experts_cost(tiny: Tiny, configured: Make, tmp_path: Path) -> None:
    """From a survey that other ratios and jobs without whole experts can use, but not one taken by those."""
    path, kept = tiny("mixtral"), tmp_path / "survey"
    config = configured(path, recipe="default", ratio=None, experts="0.25", samples=24, survey=kept)
    plan = Plan.read(streamprune.plan_only(config))
    own = [load_file(kept / f"survey-{index:04}.safetensors") for index in range(3)]
    gone = [site.split(".")[1:] for site, entry in plan.items() if not entry.keep]
    predicted = sum(float(own[int(block)][f"ffn.{expert}.whole"]) for block, _, expert in gone)
    assert predicted > 0
    assert preview(config).outcomes[-1].loss == pytest.approx(predicted)
    alone = configured(path, "units", recipe="default", ratio=0.2, samples=24)
    reused = configured(path, "reused", recipe="default", ratio=0.2, samples=24, survey=kept)
    assert streamprune.plan_only(alone).read_text() == streamprune.plan_only(reused).read_text()
    other = tmp_path / "other"
    streamprune.plan_only(configured(path, "third", recipe="default", ratio=0.2, samples=24, survey=other))
    with pytest.raises(ConfigError, match=r"taken otherwise: .*costs of whole experts"):
        streamprune.plan_only(
            configured(path, "last", recipe="default", ratio=None, experts="2", samples=24, survey=other)
        )


@pytest.mark.parametrize(("number", "chosen"), [(8, 2), (32, 4), (64, 8)])
def test_about_as_many_tokens_run_for_what_experts_cost_as_forecast(number: int, chosen: int) -> None:
    generator, tokens = torch.Generator().manual_seed(0), 64 * number // chosen
    logits, outputs = (torch.randn(tokens, *shape, generator=generator) for shape in ((number,), (number, 8)))
    logits[:, 0] = -torch.inf  # no token reaches this expert
    run_for = 0

    def run(rows: Tensor, among: Sequence[int] | None) -> tuple[Tensor, Tensor]:
        nonlocal run_for
        run_for += len(rows)
        gone = torch.ones(number, dtype=torch.bool)
        gone[list(range(number) if among is None else among)] = False
        weights, index = logits[rows].masked_fill(gone, -torch.inf).softmax(-1).topk(chosen, dim=-1)
        every = torch.zeros(len(rows), number).scatter(1, index, weights / weights.sum(-1, keepdim=True))
        return (every[..., None] * outputs[rows]).sum(1), every > 0

    steps = removal_costs(run, tokens, torch.randn(tokens, 8, generator=generator), least=chosen)
    assert steps[0] == (0, 0.0)
    assert len(steps) == len({expert for expert, _ in steps}) == number - chosen
    assert run_for == pytest.approx(tokens * (2 + chosen * (1 + 2 * math.log(number / chosen))), rel=0.35)


@pytest.mark.parametrize("rest", [0, 7])
def test_an_expert_goes_together_where_that_is_cheaper_than_unit_by_unit(rest: int) -> None:
    """At each price of a parameter, the units that go are those of least cost less price, of all that can go."""
    (site,) = experts(0, 1, units=6)
    site = replace(site, rest=rest)
    sizes = torch.tensor([10.0] * 5 + [10.0 + rest])
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        each = torch.rand(6, generator=generator, dtype=torch.float64).sort().values
        alone = torch.cat([torch.zeros(1), (each * sizes).cumsum(0)])
        whole = float(alone[-1] * torch.rand((), generator=generator) * 1.2)
        # The units of experts that are alike leave errors that add up; and units cost 1.6 times what is predicted.
        findings = {WHOLE: torch.tensor(1.6 * whole), OVERLAP: torch.tensor(2.0, dtype=torch.float64)}
        found, costs = with_whole(site, each / 2, findings, 1.6)
        assert found.choices is not None
        spent = torch.cat([torch.zeros(1), (costs * sizes).cumsum(0)])
        assert float(spent[-1]) == pytest.approx(whole)
        assert torch.equal(costs, costs.sort().values)
        true = torch.cat([alone[:-1], torch.tensor([whole])])
        removed = torch.cat([torch.zeros(1), sizes.cumsum(0)])
        for price in torch.linspace(0, 1.5, 40):
            best = int((true - price * removed).argmin())
            able = [gone for gone in range(7) if 6 - gone in (0, *found.choices)]
            assert all(float(spent[gone]) == pytest.approx(float(true[gone])) for gone in able)
            assert best in able


@pytest.mark.parametrize(
    ("name", "changes", "stock"),
    [
        ("mixtral", {"experts": "3"}, True),
        pytest.param("mixtral", {"experts": "0.25", "layout": "uniform"}, True, marks=pytest.mark.slow),
        pytest.param(
            "mixtral", {"experts": "3", "ratio": 0.45, "round_to": 1, "layout": "uniform"}, True, marks=pytest.mark.slow
        ),
        pytest.param("mixtral", {"experts": "0.25:threshold"}, False, marks=pytest.mark.slow),
        ("mixtral", {"experts": "0.25:threshold", "ratio": 0.4, "round_to": 1}, False),
        pytest.param("mixtral", {"experts": "threshold", "ratio": 0.6, "round_to": 1}, False, marks=pytest.mark.slow),
        pytest.param("llama4", {"experts": "0.25:threshold", "ratio": 0.4}, False, marks=pytest.mark.slow),
        pytest.param("gemma4-moe", {"experts": "0.25:threshold", "ratio": 0.4}, False, marks=pytest.mark.slow),
    ],
)
def test_results_load_again_are_pruned_again_and_resume(
    name: str,
    changes: dict[str, Any],
    stock: bool,
    tiny: Tiny,
    configured: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tiny(name)
    given = {"recipe": "default", "ratio": None, "samples": 24, **changes}
    config = configured(path, **given)
    result = streamprune.prune(config)
    written = json.loads((config.out / "config.json").read_text())
    assert (written["model_type"] == open_skeleton(path, CPU, "auto").config.model_type) == stock
    sites = json.loads((config.out / "report.json").read_text())["sites"]
    experts = {site.name for own in routed(open_skeleton(path, CPU, "auto").all_sites()).values() for site in own}
    gone = [site["site"] for site in sites if site["kept"] == 0 and site["site"] in experts]
    assert gone
    if given["ratio"]:
        assert result.ratio_blocks == pytest.approx(given["ratio"], abs=0.03)
    model = streamprune.load(config.out, dtype=torch.float32, experts_implementation="eager")
    assert model.num_parameters() == result.parameters_after
    tokens = torch.randint(2, 20, (2, 16), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(streamed(config.out, tokens, "float32"), model(tokens).logits, rtol=1e-4, atol=1e-4)
    left = routed(open_skeleton(config.out, CPU, "auto").all_sites())
    assert sum(map(len, left.values())) == len(experts) - len(gone)
    for appends in (5, 9, 11):
        again = configured(path, out=f"again-{appends}", **given)
        with pytest.raises(Stop), stopping_after(appends, monkeypatch):
            streamprune.prune(again)
        assert streamprune.prune(again).resumed
        assert contents(again.out) == contents(config.out)
    twice = configured(config.out, out="twice", recipe="reap", ratio=None, experts=2)
    result = streamprune.prune(twice)
    model = streamprune.load(twice.out, dtype=torch.float32, experts_implementation="eager")
    assert model.num_parameters() == result.parameters_after
    with torch.no_grad():
        torch.testing.assert_close(streamed(twice.out, tokens, "float32"), model(tokens).logits, rtol=1e-4, atol=1e-4)
    assert all(len(own) == 2 for own in routed(open_skeleton(twice.out, CPU, "float32").all_sites()).values())


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mixtral", {"experts": "1"}, r"experts is 1, so 1 of 4 would stay in blocks.0; its router needs 2 at least"),
        ("mixtral", {"experts": "5"}, r"experts is 5; blocks.0 has 4 experts"),
        ("mixtral", {"experts": "4"}, r"experts is 4; no expert would go"),
        ("mixtral", {"experts": "0.6:threshold"}, r"experts is 0.6:threshold; at most 6 of 12 can go"),
        ("mixtral", {"experts": "many"}, r"experts is 'many'; it must be how many stay in each block, such as 96"),
        ("mixtral", {"experts": "1.5"}, r"experts is '1.5'; it must be"),
        ("mixtral", {"experts": "threshold"}, r"give a ratio, experts by number or share, a plan file or one of fit"),
        (
            "mixtral",
            {"experts": "3", "ratio": 0.1},
            r"ratio is 0.1; the experts that go are 0.\d+ of the parameters that it counts",
        ),
        (
            "mixtral",
            {"experts": "3", "recipe": "sobp"},
            r"recipe sobp with these settings cannot decide on whole experts",
        ),
        (
            "mixtral",
            {"experts": "threshold", "ratio": 0.3, "recipe": "surgeon"},
            r"decide on whole experts in this way; default can",
        ),
        (
            "mixtral",
            {"experts": "3", "recipe": "reap", "ratio": 0.5},
            r"recipe reap removes whole experts only: drop --ratio",
        ),
        ("mixtral", {"recipe": "reap", "ratio": 0.5}, r"recipe reap removes whole experts only; give --experts"),
        (
            "mixtral",
            {"experts": "0.3:threshold", "layout": "uniform"},
            r"the uniform layout keeps the same number in all blocks",
        ),
        (
            "mixtral",
            {"experts": "3", "settings": {"shots": "2"}},
            r"whole experts go in one shot, and recipe default takes 2",
        ),
        ("llama", {"experts": "3"}, r"experts is 3; .* has no routed experts that can be pruned"),
        ("deepseek_v3", {"experts": "2"}, r"so 2 of 4 would stay in blocks.1; its router needs 4 at least"),
        ("deepseek_v3", {"experts": "3"}, r"chooses among 2 groups of experts, so a multiple of 2 must stay"),
        ("deepseek_v3", {"experts": "0.2:threshold"}, r"2 groups of experts, which must stay equal"),
    ],
)
def test_what_cannot_go_is_refused_by_name(
    name: str, changes: dict[str, Any], message: str, tiny: Tiny, configured: Make
) -> None:
    with pytest.raises(ConfigError, match=message):
        streamprune.prune(configured(tiny(name), **{"recipe": "default", "ratio": None, **changes}))


def test_a_plan_must_keep_what_the_router_needs(tiny: Tiny, configured: Make, tmp_path: Path) -> None:
    plan = plan_without(tiny("mixtral"), (0, 1, 2), tmp_path / "plan.json")
    with pytest.raises(ConfigError, match=r"plan.json: 1 of 4 experts of blocks.0 stay; its router needs 2 at least"):
        streamprune.prune(configured(tiny("mixtral"), recipe="reap", ratio=None, plan=plan))
    path = tiny("deepseek_v3", **EIGHT)
    plan = plan_without(path, (0, 1), tmp_path / "plan.json")
    with pytest.raises(ConfigError, match=r"the same number must stay in each of the 2 groups of experts of blocks.1"):
        streamprune.prune(configured(path, recipe="reap", ratio=None, plan=plan))


def test_gguf_takes_one_number_of_experts_for_all_blocks(tiny: Tiny, configured: Make, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    config = configured(tiny("mixtral"), recipe="default", ratio=None, experts="0.25:threshold")
    streamprune.prune(config)
    with pytest.raises(CheckpointError, match=r"the blocks differ in width, or in their number of experts"):
        streamprune.export_gguf(config.out, tmp_path / "x.gguf")


def test_a_random_choice_depends_on_the_seed(tiny: Tiny, configured: Make) -> None:
    def gone(out: str, seed: int) -> list[str]:
        config = configured(tiny("mixtral"), out=out, recipe="random", ratio=None, experts="0.5", seed=seed)
        result = CliRunner().invoke(
            main,
            ["run", str(config.model), str(config.out), "--recipe", "random", "--experts", "0.5", "--seed", str(seed)],
        )
        assert result.exit_code == 0, result.output
        sites = json.loads((config.out / "report.json").read_text())["sites"]
        return [site["site"] for site in sites if site["kept"] == 0]

    first, second = gone("one", 0), gone("two", 1)
    assert len(first) == len(second) == 6
    assert first != second
    assert first == gone("three", 0)


def test_an_aim_weighs_experts_and_units(tiny: Tiny, configured: Make) -> None:
    """`--fit` with `--experts threshold`: experts that are gone weigh nothing, nor do their rows of the router."""
    path = tiny("mixtral", torch.bfloat16)
    given = {"recipe": "default", "ratio": None, "samples": 24, "experts": "threshold", "round_to": 1}
    sizes = Sizes(open_skeleton(path, CPU, "auto"))
    card = sizes.size({}, "bf16", 32).total - 2 * int(0.6 * open_skeleton(path, CPU, "auto").block_parameters())
    config = configured(path, **given, fit=card, context=32)
    streamprune.prune(config)
    report = json.loads((config.out / "report.json").read_text())
    keeps = {site["site"]: site["kept"] for site in report["sites"]}
    assert [name for name in keeps if name.count(".") == 3 and not keeps[name]]
    result = Sizes(open_skeleton(config.out, CPU, "auto"))
    for format in ("bf16", "q8_0", "q4_k_m"):
        assert sizes.weights(keeps, format) == result.weights({}, format)
    held = sum(tensor.nbytes for tensor in load(config.out).values())
    assert sizes.weights(keeps, "bf16") == held
    assert result.size({}, "bf16", 32).total <= card
    found = preview(configured(path, out="none", **given, fit=card, context=32))
    assert found.chosen is not None
    with pytest.raises(ConfigError, match=r"experts is 3; fit chooses how much goes: give experts threshold"):
        configured(path, **{**given, "experts": "3"}, fit=card)


def test_experts_that_stay_decode_the_tokens_of_those_that_went(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Decoding, "_time", lambda _, shapes: float(sum(rows * columns for rows, columns in shapes)))
    decoding = Decoding(skeleton := open_skeleton(tiny("mixtral"), CPU, "float32"))
    keeps = {site.name: 0 for site in skeleton.all_sites() if site.expert in (0, 3)}
    assert decoding.seconds(keeps) == pytest.approx(decoding.seconds({}))
    assert (
        decoding.speed_up(keeps | {site.name: site.units // 2 for site in skeleton.all_sites() if site.expert == 1}) > 1
    )


@pytest.mark.parametrize(
    ("changes", "ratios"),
    [({"recipe": "reap", "experts": "3"}, 1), ({"recipe": "default", "experts": "0.25", "ratio": 0.45}, 3)],
)
def test_what_other_ratios_would_give(changes: dict[str, Any], ratios: int, tiny: Tiny, configured: Make) -> None:
    """Only ratios at which the experts that go leave something to remove; without units, only the one that is their share."""
    config = configured(tiny("mixtral"), **{"ratio": None, **changes})
    dense, *rows = preview(config, ratios=(0.1, 0.5, 0.6)).outcomes
    assert len(rows) == ratios
    result = streamprune.prune(config)
    own = next(row for row in rows if row.ratio == pytest.approx(changes.get("ratio", result.ratio_blocks)))
    assert own.parameters == pytest.approx(result.parameters_after, rel=0.02)
    assert dense.parameters == result.parameters_before
