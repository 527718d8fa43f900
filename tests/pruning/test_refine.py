"""Block refinement, compared with PyTorch's Adam on transformers' own block, and within a job."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from conftest import STRUCTURES, contents
from stopping import Stop
from torch import Tensor, nn

import streamprune
from streamprune import Config
from streamprune.errors import NumericalError
from streamprune.jobs.forecast.workload import TRAIN_SEQUENCES
from streamprune.maths.descent import Descent
from streamprune.model.checkpoint import Checkpoint
from streamprune.model.skeleton import Skeleton, open_skeleton
from streamprune.model.tokenizer import IGNORED
from streamprune.pruning import block as pruning_block
from streamprune.pruning import refine as refining
from streamprune.pruning import run
from streamprune.pruning.job import Job
from streamprune.pruning.refine import Refinement, refine
from streamprune.stream import sweep
from streamprune.stream.store import ActivationStore

pytestmark = pytest.mark.usefixtures("float64_norms")
CPU = torch.device("cpu")
LENGTH = 18
Make = Callable[..., Config]
Tiny = Callable[..., Path]


def streams(
    path: Path, folder: Path, samples: int, dtype: str = "float64", index: int = 1
) -> tuple[Skeleton, ActivationStore, Tensor]:
    """A block of the model with what the dense stream gives there, and a source beside its own course; and the tokens.

    A negative index counts from the last block.
    """
    skeleton = open_skeleton(path, CPU, dtype)
    index %= len(skeleton)
    store = ActivationStore(folder, (samples, LENGTH, skeleton.stream_width), skeleton.dtype, CPU, durable=False)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(skeleton.vocabulary, (samples, LENGTH), generator=generator)
    sweep.embed(skeleton, tokens, store, sweep.boundary("dense", 0), samples)
    for _ in sweep.forward(skeleton, store, "dense", 0, index + 1, samples):
        pass
    x = store.read(sweep.boundary("dense", index), slice(0, samples))
    with store.writing("source", "here") as write:
        write(x + 0.3 * torch.randn(x.shape, generator=generator).to(x.dtype))
    return skeleton, store, tokens


def whole_block(path: Path, tokens: Tensor, index: int) -> Callable[[Tensor], Tensor]:
    """transformers' own block as (sequences, tokens, d) → same, for all of `tokens` at once; and its weights, trainable."""
    model = reference.load(path)
    block = model.get_submodule(reference.parts(model)[0])[index]
    called: list[Any] = []
    hook = block.register_forward_pre_hook(lambda m, a, k: called.append((a[1:], k)), with_kwargs=True)
    with torch.no_grad():
        model(tokens, use_cache=False)
    hook.remove()
    ((rest, arguments),) = called
    arguments = {name: value for name, value in arguments.items() if name != "hidden_states"}

    def call(x: Tensor) -> Tensor:
        y = block(x, *rest, **arguments)
        return y[0] if isinstance(y, tuple) else y

    call.block = block  # type: ignore[attr-defined]
    return call


@pytest.mark.parametrize("name", STRUCTURES)
def test_steps_are_plain_adams_on_transformers_own_block(name: str, tiny: Tiny, tmp_path: Path) -> None:
    path = tiny(name, torch.float64)
    # As many sequences as a step takes at most, so that every step takes all; in micro-batches of unequal sizes.
    skeleton, store, tokens = streams(path, tmp_path, 6)
    assert TRAIN_SEQUENCES >= 6
    ((_, block),) = sweep.blocks(skeleton, [1])
    report = refine(skeleton, block, 1, store, "source", sweep.boundary("dense", 2), Refinement(2, seed=3, batch=4))
    call = whole_block(path, tokens, 1)
    weights = dict(call.block.named_parameters())  # type: ignore[attr-defined]
    for entry in skeleton.entries[1]:
        if entry.router:
            weights = {name: weight for name, weight in weights.items() if not name.startswith(f"{entry.router}.")}
    # Routers and buffers.
    untrained = {n: t for n, t in call.block.state_dict().items() if n not in weights}  # type: ignore[attr-defined]
    for weight in weights.values():
        weight.requires_grad_()
    hidden = skeleton.side_inputs[1].hidden
    x, y = (hidden(store.read(at, slice(0, 6))) for at in ("source", sweep.boundary("dense", 2)))
    losses = []
    optimiser = torch.optim.Adam(weights.values(), lr=3e-4, betas=(0.9, 0.95))
    for rate in (3e-4, 1.5e-4):
        optimiser.param_groups[0]["lr"] = rate
        loss = (call(x) - y).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert report["refinement"] == pytest.approx(losses, rel=1e-10)
    assert {*weights, *untrained} == block.weights.keys()
    assert all(torch.equal(block.weights[leaf], tensor) for leaf, tensor in untrained.items())
    before = {name: skeleton.checkpoint.read(full) for name, full in skeleton.block_names(1).items()}
    for leaf, weight in weights.items():
        torch.testing.assert_close(block.weights[leaf], weight.detach(), rtol=0, atol=1e-9)
        # Weights, norms and biases: the first two steps of Adam move all that has any gradient by their rates.
        if "k_proj.bias" not in leaf:  # a key's bias changes no attention
            assert float((block.weights[leaf] - before[leaf]).abs().max()) > 3e-4
    # The block computes with the values of its masters.
    with torch.no_grad():
        arguments = skeleton.arguments(6, LENGTH)[1]
        torch.testing.assert_close(block(x, arguments), call(x), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", STRUCTURES)
def test_the_last_block_learns_transformers_own_predictions(
    name: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny(name, torch.float64)
    skeleton, store, tokens = streams(path, tmp_path, 6, index=-1)
    last = len(skeleton) - 1
    monkeypatch.setattr(sweep, "LOGIT_BYTES", 4 * skeleton.vocabulary * 7)  # of 7 tokens at a time
    ((_, block),) = sweep.blocks(skeleton, [last])
    target = sweep.boundary("dense", last + 1)
    report = refine(skeleton, block, last, store, "source", target, Refinement(1, seed=3, batch=4))
    model = reference.load(path)
    theirs = model.get_submodule(reference.parts(model)[0])[last]
    hidden = skeleton.side_inputs[last].hidden
    x, y = (hidden(store.read(at, slice(0, 6))) for at in ("source", target))

    def predictions(entering: Tensor | None, leaving: Tensor | None) -> Tensor:
        """Log-probabilities of the whole model, given what enters or leaves its last block."""

        def enter(module: Any, given: Any, named: Any) -> Any:
            if given:
                return (entering, *given[1:]), named
            return given, {**named, "hidden_states": entering}

        def leave(module: Any, given: Any, found: Any) -> Any:
            return (leaving, *found[1:]) if isinstance(found, tuple) else leaving

        hooks = [] if entering is None else [theirs.register_forward_pre_hook(enter, with_kwargs=True)]
        hooks += [] if leaving is None else [theirs.register_forward_hook(leave)]
        found = model(tokens, use_cache=False).logits.log_softmax(-1)
        for hook in hooks:
            hook.remove()
        return found  # type: ignore[no-any-return]

    routers = tuple(f"{entry.router}." for entry in skeleton.entries[last] if entry.router)
    weights = {leaf: weight for leaf, weight in theirs.named_parameters() if not leaf.startswith(routers)}
    for weight in weights.values():
        weight.requires_grad_()
    with torch.no_grad():
        wanted = predictions(None, y)
    found = predictions(x, None)
    loss = (wanted.exp() * (wanted - found)).sum(-1).mean()
    gradients = torch.autograd.grad(loss, [*weights.values()], allow_unused=True)
    assert report["refinement"] == pytest.approx([float(loss.detach())] * 2, rel=1e-9)
    compared = 0
    for (leaf, weight), gradient in zip(weights.items(), gradients, strict=True):
        if gradient is not None and gradient.abs().max() > 1e-9:
            compared += 1
            step = -3e-4 * gradient / (gradient.abs() + 1e-8)  # Adam's first
            torch.testing.assert_close(block.weights[leaf], weight.detach() + step, rtol=0, atol=1e-7)
    assert compared > len(weights) / 2


@pytest.mark.parametrize(("index", "assistant"), [(1, False), (2, False), (2, True)])
def test_gradients_are_those_of_the_loss(index: int, assistant: bool, tiny: Tiny) -> None:
    """Their scale too, on which Adam does not depend; and of the tokens that predict what the assistant says alone."""
    skeleton, generator = open_skeleton(tiny("gemma2", torch.float64), CPU, "float64"), torch.Generator().manual_seed(0)
    given, wanted = (torch.randn(2, 5, skeleton.width, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.tensor([[3, IGNORED, 3, 3, IGNORED], [IGNORED, 3, 3, 3, 3]])
    counts = sweep.predicting(labels)
    assert counts.tolist() == [[False, True, True, False, False], [True] * 5]
    with refining._loss(skeleton, index) as loss:
        found, gradient = loss(given, wanted, counts if assistant else None)
        assert [float(loss(wanted, wanted)[0]), int(loss(wanted, wanted)[1].count_nonzero())] == [0, 0]
    given.requires_grad_()
    with skeleton.head() as head:
        if index == 2:
            logits, target = (head(each).log_softmax(-1).flatten(0, 1) for each in (given, wanted))
            each = F.kl_div(logits, target, reduction="none", log_target=True).sum(-1)
            expected = each[counts.flatten()].mean() if assistant else each.mean()
        else:
            expected = F.mse_loss(given, wanted)
        (slope,) = torch.autograd.grad(expected, given)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(gradient, slope, rtol=1e-9, atol=1e-12)


def test_small_differences_of_predictions_survive_float16(tiny: Tiny) -> None:
    """Of many tokens, each has a small share of the mean."""
    skeleton, generator = open_skeleton(tiny("llama", torch.float16), CPU, "float16"), torch.Generator().manual_seed(0)
    wanted = torch.randn(64, 256, skeleton.width, generator=generator)
    given = wanted + 1e-2 * torch.randn(wanted.shape, generator=generator)
    slopes = []
    for part in (slice(0, 64), slice(0, 1)):
        with skeleton.head() as head:
            slopes.append(sweep.divergence(skeleton, head, given[part], wanted[part])[1][0])
    assert (64 * slopes[0] - slopes[1]).norm() < 0.01 * slopes[1].norm()


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sequences that refinement reads, in order."""
    found: list[int] = []
    real = ActivationStore._fetch

    def reading(self: ActivationStore, name: str, batch: slice) -> Tensor:
        found.extend(range(batch.start, batch.stop) if name == "source" else [])
        return real(self, name, batch)

    monkeypatch.setattr(ActivationStore, "_fetch", reading)
    return found


def test_a_step_takes_some_sequences_anew_each_time(read: list[int], tiny: Tiny, tmp_path: Path) -> None:
    skeleton, store, _ = streams(tiny("llama"), tmp_path, 24, "float32")

    def chosen(seed: int, batch: int, index: int = 1) -> list[list[int]]:
        read.clear()
        ((_, block),) = sweep.blocks(skeleton, [1])
        how = Refinement(3, seed=seed, batch=batch)
        refine(skeleton, block, index, store, "source", sweep.boundary("dense", 2), how)
        return [read[i : i + TRAIN_SEQUENCES] for i in range(0, len(read), TRAIN_SEQUENCES)]

    first = chosen(0, 3)
    assert len(first) == 3
    assert all(len(set(step)) == TRAIN_SEQUENCES for step in first)
    assert len({tuple(sorted(step)) for step in first}) == 3
    assert chosen(0, 5) == first
    assert chosen(1, 3) != first
    assert chosen(0, 3, index=2) != first


def test_every_pass_takes_every_sequence_once(read: list[int], tiny: Tiny, tmp_path: Path) -> None:
    skeleton, store, _ = streams(tiny("llama"), tmp_path, 6, "float32")
    ((_, block),) = sweep.blocks(skeleton, [1])
    how = Refinement(6, seed=0, batch=2, sequences=2)
    refine(skeleton, block, 1, store, "source", sweep.boundary("dense", 2), how)
    assert sorted(read[:6]) == sorted(read[6:]) == list(range(6))
    assert read[:6] != read[6:]


def test_a_cosine_rises_then_falls_to_zero() -> None:
    weight = nn.Parameter(torch.zeros(1))
    descent = Descent({"w": weight}, steps=20, rate=2.0, warmup=2, decay="cosine", place="here")
    rates = []
    for _ in range(20):
        weight.grad = torch.ones(1)
        before = weight.detach().clone()
        descent.step()
        rates.append(float((before - weight).detach()))  # Adam's step under a constant gradient is its rate
    assert rates == pytest.approx([0, 1, *(1 + math.cos(math.pi * n / 18) for n in range(18))], rel=1e-4, abs=1e-6)


def test_a_bfloat16_block_multiplies_in_bfloat16_and_steps_in_float32(tiny: Tiny, tmp_path: Path) -> None:
    skeleton, store, _ = streams(tiny("llama", torch.bfloat16), tmp_path, 6, "bfloat16")
    ((_, block),) = sweep.blocks(skeleton, [1])
    seen = []
    linear = block._layer.module("mlp.down_proj")
    hook = linear.register_forward_hook(lambda module, inputs, output: seen.append((module.weight.dtype, output.dtype)))
    refine(skeleton, block, 1, store, "source", sweep.boundary("dense", 2), Refinement(1, seed=0, batch=8))
    hook.remove()
    assert seen == [(torch.float32, torch.bfloat16)]


def block_error(config: Config, index: int, tokens: Tensor) -> float:
    """Mean squared difference between a block's outputs in the source and in the result."""
    outputs = []
    for model in (reference.load(config.model), streamprune.load(config.out, dtype=torch.float64)):
        block = model.get_submodule("model.layers")[index]
        hook = block.register_forward_hook(lambda m, a, y: outputs.append(y[0] if isinstance(y, tuple) else y))
        with torch.no_grad():
            model(tokens)
        hook.remove()
    return float((outputs[1] - outputs[0]).square().mean())


def test_a_refined_block_is_nearer_to_its_dense_output_and_nothing_else_changes(tiny: Tiny, configured: Make) -> None:
    path = tiny("llama-biased", torch.float64)
    plain, refined = (
        configured(path, out, recipe="default", dtype="float64", blocks=(1, 2), ratio=0.15, samples=8, refine=steps)
        for out, steps in (("plain", 0), ("refined", 120))
    )
    for config in (plain, refined):
        streamprune.prune(config)
    tokens = Job(plain, None).tokens
    reports = {
        site["site"]: site["refinement"]
        for site in json.loads((refined.out / "report.json").read_text())["sites"]
        if "refinement" in site
    }
    assert list(reports) == ["blocks.1.ffn"]
    first, last = reports["blocks.1.ffn"]
    before, after = block_error(plain, 1, tokens), block_error(refined, 1, tokens)
    # The means of twelve steps each: the first of them begin at what the unrefined block gives, in another order of samples.
    assert after < last < min(first, before)
    assert first == pytest.approx(before, rel=0.1)
    assert after < 0.9 * before
    one, other = Checkpoint(plain.out), Checkpoint(refined.out)
    changed = {name for name in one if not torch.equal(one.read(name), other.read(name))}
    inside = {name for name in one if name.startswith("model.layers.1.")}
    assert changed <= inside
    assert inside - changed <= {"model.layers.1.self_attn.k_proj.bias"}


def test_the_loss_is_the_whole_models_and_a_rate_of_zero_changes_nothing(
    tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny("llama", torch.float64)
    settings = {"recipe": "default", "dtype": "float64", "ratio": 0.3, "samples": 8, "blocks": (0, 2)}
    config = configured(path, refine=2, **settings)
    with monkeypatch.context() as patch:
        patch.setattr(run, "refinement_rate", lambda width: 0.0)
        patch.setattr(run, "REFINE_SEQUENCES", 8)
        streamprune.prune(config)
    tokens = Job(config, None).tokens
    sites = json.loads((config.out / "report.json").read_text())["sites"]
    for index in (0, 1):
        site = next(site for site in sites if site["site"] == f"blocks.{index}.ffn")
        assert site["refinement"] == pytest.approx([block_error(config, index, tokens)] * 2, rel=1e-8)
    streamprune.prune(configured(path, "plain", **settings))
    one, other = (
        {name: data for name, data in contents(configured(path, out).out).items() if "safetensors" in name}
        for out in ("out", "plain")
    )
    assert one == other


def test_a_later_block_reads_what_the_refined_one_gives(
    tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny("llama", torch.float64)
    config = configured(path, recipe="default", dtype="float64", samples=8, refine=2)

    def first_only(skeleton: Any, block: Any, index: int, *rest: Any) -> Any:
        *streams, how, ranks, counts = rest
        how = replace(how, rate=0.0 if index else 1e-2, sequences=8)
        return refine(skeleton, block, index, *streams, how, ranks, counts)

    monkeypatch.setattr(pruning_block, "refine", first_only)
    streamprune.prune(config)
    tokens = Job(config, None).tokens
    sites = {site["site"]: site for site in json.loads((config.out / "report.json").read_text())["sites"]}
    error = block_error(config, 1, tokens)
    assert sites["blocks.1.ffn"]["refinement"] == pytest.approx([error, error], rel=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["magnitude", "sobp"])
def test_every_recipe_can_be_refined(
    recipe: str, tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "REFINE_SEQUENCES", 12)  # all, so that steps compare
    path = tiny("gpt2", torch.bfloat16)
    config = configured(path, recipe=recipe, ratio=0.3, refine=20)
    streamprune.prune(config)
    report = json.loads((config.out / "report.json").read_text())
    falls = [site["refinement"] for site in report["sites"] if "refinement" in site]
    assert len(falls) == 3
    assert all(last < first for first, last in falls)
    out = Checkpoint(config.out)
    assert {out[name].dtype for name in out} == {torch.bfloat16}


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 8])
def test_killed_inside_a_block_the_bytes_are_the_same(
    step: int, tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny("opt-350m")
    whole, killed = (configured(path, out, recipe="default", refine=4, samples=9) for out in ("whole", "killed"))
    streamprune.prune(whole)
    real, count = torch.optim.Adam.step, 0

    def stepping(self: Any, *arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == step:
            raise Stop
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", stepping)
        with pytest.raises(Stop):
            streamprune.prune(killed)
    assert streamprune.prune(killed).resumed
    assert contents(killed.out) == contents(whole.out)


def test_a_loss_that_is_not_finite_is_an_error(tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "refinement_rate", lambda width: 1e30)
    config = configured(tiny("llama"), recipe="magnitude", refine=5)
    with pytest.raises(NumericalError, match=r"block 0: the refinement's loss is (nan|inf) at step 1"):
        streamprune.prune(config)
    assert not config.out.exists()
