"""Tuning: against plain in-memory training in float64, across kills, and with what a user may get wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner, Result
from conftest import STRUCTURES, contents, edit_tensors, make_tiny
from safetensors.torch import load_file
from stopping import Stop, stopping_after
from streamprune_cli import main
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import streamprune
from streamprune import TuneConfig
from streamprune.commands.tune import lora
from streamprune.errors import CheckpointError, ConfigError, NumericalError, ResourceError, ResumeError
from streamprune.jobs.names import job_folder
from streamprune.maths.descent import batch, epoch_batch, seeded
from streamprune.model.skeleton import open_skeleton
from streamprune.model.tokenizer import load_tokenizer
from streamprune.pruning.refine import Refinement
from streamprune.system import machine
from streamprune.system.progress import Silent
from streamprune.text import windows as calibration
from streamprune.text.windows import Windows

Tiny = Callable[..., Path]
Make = Callable[..., TuneConfig]
CPU = torch.device("cpu")
needs_peft = pytest.mark.skipif(not lora.installed(), reason="peft is not installed")


@pytest.fixture
def tuning(text: Path, tmp_path: Path) -> Make:
    """A small job's `TuneConfig`, with whatever is changed."""

    def make(model: Path, out: str = "out", **changes: Any) -> TuneConfig:
        fields: dict[str, Any] = {"text": text, "samples": 10, "seq_len": 16, "steps": 4, "rank": 2, "rate": 1e-2}
        return TuneConfig(model=model, out=tmp_path / out, **{**fields, **changes})

    return make


def perturbed(folder: Path, name: str, dtype: torch.dtype = torch.float32, by: float = 0.1, **changes: Any) -> Path:
    """The tiny model of that name with noise on the matrices of its blocks."""
    make_tiny(folder, name, dtype, **changes)
    generator = torch.Generator().manual_seed(3)

    def change(tensors: dict[str, Tensor]) -> None:
        for key, tensor in tensors.items():
            if tensor.dim() == 2 and (".layers." in key or ".h." in key):
                tensor += by * torch.randn(tensor.shape, generator=generator, dtype=dtype)

    edit_tensors(folder, change)
    return folder


@pytest.fixture
def student(tmp_path: Path) -> Path:
    """A perturbed llama, whose teacher is `tiny("llama")`."""
    return perturbed(tmp_path / "student", "llama")


def loaded(path: Path, dtype: torch.dtype = torch.float64) -> Any:
    model = streamprune.load(path, dtype=dtype).eval()
    model.requires_grad_(False)
    return model


def windows(config: TuneConfig) -> Tensor:
    tokens = calibration.tokenize(load_tokenizer(config.model), config.text, 40)
    return calibration.sample_windows(tokens, config.samples, config.seq_len or 0, config.seed, config.text).tokens


def linears(model: Any, index: int) -> dict[str, nn.Module]:
    """All linears of a block by their full names, producers before consumers as `architecture` lists them."""
    found = {
        "llama": "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj",
        "gpt2": "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj",
        "opt": "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj fc1 fc2",
    }
    kind = model.config.model_type.removeprefix("streamprune_")
    prefix = {"llama": "model.layers", "gpt2": "transformer.h", "opt": "model.decoder.layers"}[kind]
    return {f"{prefix}.{index}.{n}": model.get_submodule(f"{prefix}.{index}.{n}") for n in found[kind].split()}


def changed(model: Any, updates: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Weights with ``U V`` added, as the modules hold them."""
    found = {}
    for name, (u, v) in updates.items():
        module = model.get_submodule(name)
        delta = u @ v
        found[f"{name}.weight"] = module.weight + (delta.T if type(module).__name__ == "Conv1D" else delta)
    return found


def block_output(model: Any, index: int, tokens: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """What a block of transformers' own model gives, with other weights put in."""
    seen: list[Tensor] = []
    block = model.get_submodule(next(iter(linears(model, index))).split(f".{index}.")[0])[index]
    handle = block.register_forward_hook(lambda m, i, o: seen.append(o[0] if isinstance(o, tuple) else o))
    torch.func.functional_call(model, dict(weights), (tokens,))
    handle.remove()
    return seen[0]


def fresh(model: Any, index: int, rank: int, generator: torch.Generator) -> dict[str, tuple[Tensor, Tensor]]:
    found = {}
    for name, module in linears(model, index).items():
        shape = module.weight.T.shape if type(module).__name__ == "Conv1D" else module.weight.shape
        r = min(rank, *shape)
        v = torch.randn(r, shape[1], generator=generator, dtype=torch.float64) / shape[1] ** 0.5
        found[name] = (torch.zeros(shape[0], r, dtype=torch.float64).requires_grad_(), v.requires_grad_())
    return found


def leaves(updates: Mapping[str, tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [tensor for pair in updates.values() for tensor in pair]


# The pieces.


@pytest.mark.parametrize("name", STRUCTURES)
def test_an_update_is_what_it_is_absorbed_as(name: str, tiny: Tiny) -> None:
    skeleton = open_skeleton(tiny(name, torch.float64), CPU, "float64")
    block = skeleton.build_block(1, skeleton.read_block(1))
    updates = block.updates(3, torch.float64, torch.Generator().manual_seed(0))
    assert {name.rpartition(".")[0] for name in updates} == set(skeleton.linears(1))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 9, skeleton.stream_width, dtype=torch.float64, generator=generator)
    arguments = skeleton.arguments(2, 9)[1]
    with torch.no_grad():
        plain = block(x, arguments)
        with block.updated(updates):
            torch.testing.assert_close(block(x, arguments), plain)  # U is zero
        for key, weight in updates.items():
            if key.endswith(".u"):
                weight += torch.randn(weight.shape, dtype=torch.float64) * 0.1
        with block.updated(updates):
            updated = block(x, arguments)
        torch.testing.assert_close(block(x, arguments), plain)
        block.absorb(updates)
        torch.testing.assert_close(block(x, arguments), updated)
    assert float((updated - plain).abs().max()) > 0.01


def test_a_rank_beyond_a_linears_sides_is_cut(tiny: Tiny) -> None:
    skeleton = open_skeleton(tiny("llama"), CPU, "float32")
    block = skeleton.build_block(0, skeleton.read_block(0))
    updates = block.updates(32, torch.float32, torch.Generator())
    assert updates["self_attn.k_proj.v"].shape == (16, 32)  # two key heads of eight
    assert updates["mlp.gate_proj.u"].shape == (48, 32)


def test_batches_follow_seed_and_step() -> None:
    assert torch.equal(batch(20, 8, 1, 2), batch(20, 8, 1, 2))
    assert not torch.equal(batch(20, 8, 1, 2), batch(20, 8, 1, 3))
    assert not torch.equal(batch(20, 8, 1, 2), batch(20, 8, 2, 2))
    assert sorted(batch(5, 8, 0, 0).tolist()) == list(range(5))


# Distillation.


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_distil_is_the_plain_implementation(name: str, tiny: Tiny, tuning: Make, tmp_path: Path) -> None:
    path, dense = perturbed(tmp_path / "student", name, torch.float64), tiny(name, torch.float64)
    config = tuning(path, method="distil", teacher=dense, dtype="float64", steps=3)
    streamprune.tune(config)
    model, teacher, tokens = loaded(path), loaded(dense), windows(config)
    weights: dict[str, Tensor] = {}
    for index in range(3):
        target = block_output(teacher, index, tokens, {})
        generator = torch.Generator().manual_seed(index)
        updates = fresh(model, index, 2, generator)
        adam = torch.optim.Adam(leaves(updates), lr=1e-2, betas=(0.9, 0.95))
        for step in range(3):
            adam.param_groups[0]["lr"] = 1e-2 * (1 - step / 3)
            chosen = epoch_batch(10, 8, index, step)
            tuned = {**weights, **changed(model, updates)}
            adam.zero_grad()
            if index < 2:
                F.mse_loss(block_output(model, index, tokens[chosen], tuned), target[chosen]).backward()
            else:  # of the last block, the divergence of the whole model's predictions
                logits = torch.func.functional_call(model, tuned, (tokens[chosen],)).logits.log_softmax(-1)
                wanted = teacher(tokens[chosen]).logits.log_softmax(-1).flatten(0, 1)
                F.kl_div(logits.flatten(0, 1), wanted, reduction="batchmean", log_target=True).backward()
            adam.step()
        with torch.no_grad():
            weights |= changed(model, updates)
    tuned = dict(loaded(config.out).named_parameters())
    assert len(weights) == 3 * len(linears(model, 0))
    for key, expected in weights.items():
        torch.testing.assert_close(tuned[key], expected, rtol=1e-6, atol=1e-8)
        assert float((expected - model.get_parameter(key)).abs().max()) > 1e-3


def test_a_perfect_student_stays(tiny: Tiny, tuning: Make) -> None:
    path = tiny("qwen3")
    config = tuning(path, method="distil", teacher=path)
    result = streamprune.tune(config)
    assert (result.loss_first, result.loss_last) == (0, 0)
    for (name, before), after in zip(loaded(path).named_parameters(), loaded(config.out).parameters(), strict=True):
        assert torch.equal(before, after), name


@pytest.mark.parametrize("method", ["distil", pytest.param("lora", marks=needs_peft)])
@pytest.mark.parametrize("name", ["llama-biased", "gpt2"])
def test_only_linears_change_and_by_no_more_than_the_rank(
    name: str, method: str, tiny: Tiny, tuning: Make, tmp_path: Path
) -> None:
    path = perturbed(tmp_path / "student", name, torch.float64)
    config = tuning(path, method=method, teacher=tiny(name, torch.float64), dtype="float64", rank=3)
    streamprune.tune(config)
    before, after = loaded(path), loaded(config.out)
    inside = {f"{place}.weight" for index in range(3) for place in linears(before, index)}
    for key, weight in before.named_parameters():
        change = after.get_parameter(key) - weight
        if key not in inside:
            assert not change.any(), key
            continue
        singular = torch.linalg.svdvals(change)
        assert float(singular[2]) > 1e-6
        assert float(singular[3]) < 1e-12


# LoRA in memory.


@needs_peft
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {}),
        ("gpt2", {}),
        ("llama", {"batch": 3, "warmup": 2}),
        ("llama", {"batch": 50, "epochs": 2, "warmup": 1}),
    ],
)
def test_lora_is_the_plain_implementation(name: str, changes: dict[str, Any], tiny: Tiny, tuning: Make) -> None:
    path = tiny(name, torch.float64)
    config = tuning(path, method="lora", dtype="float64", **({"steps": 200} if "epochs" in changes else {}) | changes)
    result = streamprune.tune(config)
    model, tokens = loaded(path), windows(config)
    size, steps, warmup = config.batch, config.steps, config.warmup
    if config.epochs:
        text = calibration.tokenize(load_tokenizer(path), config.text, 40).ids
        tokens = text[: len(text) // 16 * 16].view(-1, 16)
        per = math.ceil(len(tokens) / size)
        assert per == 4
        steps = result.steps
        assert steps == 2 * per
        orders = [torch.randperm(len(tokens), generator=seeded(0, epoch)).split(size) for epoch in range(2)]
        batches = [part for order in orders for part in order]
        assert len(batches[3]) < size
    else:
        batches = [batch(10, size, 0, step) for step in range(steps)]
    _, begun = lora._adapted(open_skeleton(path, CPU, "float64"), Refinement(4, 0, 8, rate=1e-2, rank=2))
    updates, place = {}, next(iter(linears(model, 0))).split(".0.")[0]
    for key in dict.fromkeys(key.rpartition(".")[0] for key in begun):
        u, v = (begun[f"{key}.{leaf}"].detach().clone() for leaf in "uv")
        assert not u.any()
        updates[f"{place}.{key}"] = (u.requires_grad_(), v.requires_grad_())
    assert set(updates) == {name for index in range(3) for name in linears(model, index)}
    adam = torch.optim.AdamW(leaves(updates), lr=1e-2, betas=(0.9, 0.95), weight_decay=0)
    losses = []
    for step in range(steps):
        share = step / warmup if step < warmup else (steps - step) / (steps - warmup)
        adam.param_groups[0]["lr"] = 1e-2 * share
        chosen = tokens[batches[step]]
        adam.zero_grad()
        loss = torch.func.functional_call(model, changed(model, updates), (chosen,), {"labels": chosen}).loss
        loss.backward()
        losses.append(float(loss.detach()))
        adam.step()
    assert result.loss_first == pytest.approx(losses[0])
    assert result.loss_last == pytest.approx(losses[-1])
    assert losses[-1] < losses[0]
    tuned = loaded(config.out)
    with torch.no_grad():
        for key, expected in changed(model, updates).items():
            torch.testing.assert_close(tuned.get_parameter(key), expected, rtol=1e-6, atol=1e-8)


@needs_peft
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe"])
def test_lora_of_stock_experts(name: str, tiny: Tiny, tuning: Make) -> None:
    """Every expert's linears and the attention's are trained; what is written computes what was trained."""
    path = tiny(name)
    skeleton = open_skeleton(path, CPU, "float32")
    assert "Experts" in type(loaded(path).get_submodule("model.layers.2.mlp.experts")).__name__
    names = {f"{index}.{linear}" for index in range(len(skeleton)) for linear in skeleton.linears(index)}
    assert "2.mlp.experts.3.down_proj" in names
    config = tuning(path, method="lora", steps=3)
    states: list[dict[str, Tensor]] = []
    how = Refinement(3, 0, 8, rate=1e-2, rank=2)
    list(lora.train(skeleton, Windows.of(windows(config)), how, None, lambda state, losses: states.append(state)))
    assert {key.removesuffix(".u") for key in states[-1] if key.endswith(".u") and key.count(".") > 2} >= names
    result = streamprune.tune(config)
    assert result.loss_last < result.loss_first
    before, after = open_skeleton(path, CPU, "float32"), open_skeleton(config.out, CPU, "float32")
    for index in range(len(skeleton)):
        old, new = (each.read_block(index) for each in (before, after))
        for linear in skeleton.linears(index):
            change = states[-1][f"{index}.{linear}.u"] @ states[-1][f"{index}.{linear}.v"]
            torch.testing.assert_close(new[f"{linear}.weight"], old[f"{linear}.weight"] + change)


@pytest.mark.parametrize("method", [pytest.param("lora", marks=needs_peft), "distil"])
def test_a_tuned_stock_checkpoint_is_one_with_the_same_names(method: str, tiny: Tiny, tuning: Make) -> None:
    """Also of a type whose files have other names than the model, and which has no uniform layout."""
    path = tiny("mixtral", model_type="minimax_m2", num_experts_per_tok=2)
    config = tuning(path, method=method, teacher=path if method == "distil" else None)
    streamprune.tune(config)
    before, after = (
        {name: each for file in folder.glob("*.safetensors") for name, each in load_file(file).items()}
        for folder in (path, config.out)
    )
    assert before.keys() == after.keys()
    assert any("block_sparse_moe.experts.3.w1" in name for name in after)
    stock = AutoModelForCausalLM.from_pretrained(config.out, dtype=torch.float32)
    assert stock.config.model_type == "minimax_m2"
    tokens = windows(config)
    with torch.no_grad():
        torch.testing.assert_close(stock(tokens).logits, loaded(config.out, torch.float32)(tokens).logits)


@needs_peft
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lora_trains_in_float32(dtype: torch.dtype, tiny: Tiny) -> None:
    skeleton = open_skeleton(tiny("llama", dtype), CPU, str(dtype).removeprefix("torch."))
    model, weights = lora._adapted(skeleton, Refinement(3, 0, 8, rate=1e-2, rank=2))
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {dtype}
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(weight) for weight in weights.values()}


@needs_peft
def test_micro_batches_add_up(tiny: Tiny, tuning: Make) -> None:
    path = tiny("llama", torch.float64)
    skeleton = open_skeleton(path, CPU, "float64")
    tokens = windows(tuning(path))
    found = []
    for micro in (8, 3):
        states: list[dict[str, Tensor]] = []
        how = Refinement(3, 0, micro, rate=1e-2, rank=2)
        list(lora.train(skeleton, Windows.of(tokens), how, None, lambda state, losses, to=states: to.append(state)))  # type: ignore[misc]
        found.append(states[-1])
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value)


@needs_peft
def test_dropout_is_of_the_updates_alone(tiny: Tiny, tuning: Make) -> None:
    path = tiny("gpt2", torch.float64)
    model, found = loaded(path), {}
    assert model.config.resid_pdrop > 0  # which stays off
    for dropout in (0.0, 0.5):
        config = tuning(path, f"{dropout}", method="lora", dtype="float64", dropout=dropout)
        found[dropout] = streamprune.tune(config)
        # While U is zero, what V sees does not matter.
        first = windows(config)[batch(10, 8, 0, 0)]
        assert found[dropout].loss_first == pytest.approx(float(model(first, labels=first).loss))
    assert found[0.0].loss_last != pytest.approx(found[0.5].loss_last, rel=1e-6)


@needs_peft
def test_dropout_takes_inputs_with_its_probability(tiny: Tiny) -> None:
    skeleton = open_skeleton(tiny("llama"), CPU, "float32")
    model, _ = lora._adapted(skeleton, Refinement(3, 0, 8, rate=1e-2, rank=2), 0.25)
    linear = model.model.layers[0].mlp.up_proj
    seen = []
    linear.lora_A["default"].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    x = torch.ones(1000, 32)
    for step, part in ((0, 0), (0, 0), (0, 1), (1, 0)):
        with lora._dropping(0.25, 0, step, part):
            linear(x)
    assert float((seen[0] == 0).float().mean()) == pytest.approx(0.25, abs=0.02)
    assert seen[0].unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 0}, "batch is 0; it must be at least 1"),
        ({"dropout": 1.0}, r"dropout is 1; it must be in \[0, 1\)"),
        ({"warmup": 4}, "warmup is 4; the training has 4 steps"),
        ({"epochs": 1}, "steps is 4 and epochs is 1; give one of them"),
        (
            {"epochs": 1, "steps": 200, "seq_len": 16, "text": ["{text}", "{text}=2"]},
            "is read whole, without weights; leave them out",
        ),
        *(
            ({"method": "distil", **each}, "method distil has none")
            for each in ({"batch": 4}, {"warmup": 1}, {"dropout": 0.1})
        ),
        ({"method": "distil", "steps": 200, "epochs": 1}, "epochs is 1; method distil has none"),
    ],
)
def test_a_schedule_that_cannot_be(
    changes: dict[str, Any], message: str, tiny: Tiny, student: Path, tuning: Make, text: Path
) -> None:
    if "text" in changes:
        changes = {**changes, "text": [each.format(text=text) for each in changes["text"]]}
    with pytest.raises(ConfigError, match=message):
        streamprune.tune(tuning(student, **{"method": "lora", "teacher": tiny("llama"), **changes}))


# Both, as jobs.


METHODS = ["distil", pytest.param("lora", marks=needs_peft)]


@pytest.mark.parametrize("method", METHODS)
def test_a_pruned_model_of_free_layout_stays_one(
    method: str, tiny: Tiny, tuning: Make, text: Path, tmp_path: Path
) -> None:
    dense, pruned = tiny("llama"), tmp_path / "pruned"
    streamprune.prune(
        streamprune.Config(
            model=dense, out=pruned, ratio=0.3, recipe="sobp", calibration=text, samples=6, seq_len=24, round_to=4
        )
    )
    config = tuning(pruned, method=method, teacher=dense)
    result = streamprune.tune(config)
    before, after = (streamprune.inspect(path) for path in (pruned, config.out))
    for found in (before, after):
        found["model"].pop("path")
    assert after["model"] == before["model"]
    assert after["job"]["report"]["source"] == before["job"]["report"]
    assert after["job"]["report"]["tuning"]["method"] == method
    assert result.parameters == before["model"]["parameters"]
    assert streamprune.evaluate(config.out, text, seq_len=24).perplexity > 1
    ids = torch.arange(20)[None]
    assert not torch.equal(loaded(pruned)(ids).logits, loaded(config.out)(ids).logits)
    shown = CliRunner().invoke(main, ["inspect", str(config.out)])
    assert f"tuned by {method}, rank 2, 4 steps: loss" in shown.stdout
    assert "sobp: " in shown.stdout
    # And may be tuned, or pruned, once more.
    streamprune.tune(tuning(config.out, "again", method=method, teacher=dense))
    assert "tuned by" in CliRunner().invoke(main, ["inspect", str(tmp_path / "again")]).stdout


def test_zeros_that_pruning_wrote_are_not_filled(tiny: Tiny, tuning: Make, tmp_path: Path) -> None:
    dense, masked = tiny("llama"), tmp_path / "masked"
    settings = {"structure": "unstructured"}
    streamprune.prune(streamprune.Config(model=dense, out=masked, ratio=0.5, recipe="magnitude", settings=settings))
    with pytest.raises(
        ConfigError, match=r"has [0-9,]+ weights that pruning made zero; a low-rank change would fill them"
    ):
        streamprune.tune(tuning(masked, method="distil", teacher=dense))


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_keeps_its_dtype(method: str, tiny: Tiny, tuning: Make, tmp_path: Path) -> None:
    path = perturbed(tmp_path / "student", "llama", torch.bfloat16)
    config = tuning(path, method=method, teacher=tiny("llama"), dtype="bfloat16", steps=20, rank=8)
    result = streamprune.tune(config)
    assert result.loss_last < result.loss_first
    before, after = loaded(path, torch.bfloat16), loaded(config.out, torch.bfloat16)
    assert streamprune.inspect(config.out)["model"]["dtypes"] == ["bfloat16"]
    for index in range(3):
        for name in linears(before, index):
            old, new = (model.get_submodule(name).weight for model in (before, after))
            assert not torch.equal(old, new)
    assert torch.equal(before.model.embed_tokens.weight, after.model.embed_tokens.weight)


@pytest.mark.parametrize("method", METHODS)
def test_stopped_after_every_journal_line_the_bytes_are_the_same(
    method: str, tiny: Tiny, student: Path, tuning: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora, "SAVE_EVERY", 2)
    dropout = 0.1 if method == "lora" else 0.0
    whole = tuning(student, "whole", method=method, teacher=tiny("llama"), steps=5, dropout=dropout)
    assert not streamprune.tune(whole).resumed
    expected = contents(whole.out)
    config, lives = replace(whole, out=whole.out.with_name("stopped")), 0
    while not config.out.exists():
        lives += 1
        with stopping_after(2 if lives == 1 else 1, monkeypatch):
            try:
                assert streamprune.tune(config).resumed
            except Stop:
                continue
    assert lives > 3
    assert contents(config.out) == expected
    assert streamprune.tune(config).resumed
    assert not job_folder(config.out).exists()


def test_what_a_stopped_life_left_goes(
    tiny: Tiny, student: Path, tuning: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tuning(student, method="distil", teacher=tiny("llama"))
    for appends, there in ((4, {1, 2}), (1, {2, 3})):  # block 1 is journalled, then block 2
        with stopping_after(appends, monkeypatch), pytest.raises(Stop):
            streamprune.tune(config)
        names = {path.name for path in (job_folder(config.out) / "cache").iterdir()}
        both = {f"{stream}-{index:04}-0.activations" for stream in ("student", "teacher") for index in there}
        assert names == both - {"student-0003-0.activations"}  # which nothing would read


def test_a_changed_setting_or_model_is_refused_with_both_values(
    tiny: Tiny, student: Path, tuning: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = tuning(student, method="distil", teacher=tiny("llama"))
    with stopping_after(3, monkeypatch), pytest.raises(Stop):
        streamprune.tune(config)
    assert streamprune.inspect(config.out)["job"]["finished"] == ["embed", "block/0"]
    other = tmp_path / "other.txt"
    other.write_text("abc " * 500)
    for change, message in (
        ({"rank": 3}, r"settings\.rank is 3 and was 2"),
        ({"steps": 9}, r"settings\.steps is 9 and was 4"),
        ({"rate": 0.5}, r"settings\.rate is 0\.5 and was 0\.01"),
        ({"seed": 4}, r"settings\.seed is 4 and was 0"),
        ({"bos": "on"}, r"settings\.bos is true and was false"),
        ({"text": other}, r"inputs\.calibration\.1\.sha256 is .* and was"),
        ({"teacher": student}, r"inputs\.teacher\.shards\..* is .* and was"),
        ({"model": tiny("llama")}, r"inputs\.model\.shards\..* is .* and was"),
        ({"cache": tmp_path / "c"}, r"cache is .*; this job was started with none"),
    ):
        with pytest.raises(ResumeError, match=message):
            streamprune.tune(replace(config, **change))
    with pytest.raises(ResourceError, match="this job was started with micro-batches that need"):
        streamprune.tune(replace(config, memory=1000))
    assert streamprune.tune(replace(config, method="auto")).resumed  # as it was begun
    with pytest.raises(ConfigError, match=r"a finished result of another job: settings\.rank is 3 and was 2"):
        streamprune.tune(replace(config, rank=3))
    streamprune.tune(replace(config, rank=3), restart=True)
    assert json.loads((config.out / "report.json").read_text())["tuning"]["rank"] == 3


def test_auto_takes_what_fits_and_says_so(
    tiny: Tiny, student: Path, tuning: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, said = tiny("llama"), list[str]()

    class Heard(Silent):
        def say(self, message: str) -> None:
            said.append(message)

    monkeypatch.setattr(lora, "installed", lambda: False)
    with pytest.raises(ConfigError, match=r"lora is not possible: peft is not installed.*distil needs.*--teacher DIR"):
        streamprune.tune(tuning(student))
    with pytest.raises(ConfigError, match=r"needs peft: pip install 'streamprune\[tune\]'"):
        streamprune.tune(tuning(student, method="lora"))
    assert streamprune.tune(tuning(student, "a", teacher=dense), progress=Heard()).method == "distil"
    assert said == ["method distil: peft is not installed (pip install 'streamprune[tune]')"]


@needs_peft
def test_auto_goes_by_memory(tiny: Tiny, student: Path, tuning: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    # Limits are those of the whole process.
    monkeypatch.setattr(machine, "base_bytes", lambda: 0)
    dense = tiny("llama")
    assert streamprune.tune(tuning(student, "a", teacher=dense)).method == "lora"
    needed = 400_000  # more than a block's training takes, less than the model's
    with pytest.raises(ConfigError, match=r"training the model in memory needs .* and the limit is 390\.6 KiB"):
        streamprune.tune(tuning(student, "b", memory=needed))
    assert streamprune.tune(tuning(student, "b", teacher=dense, memory=needed)).method == "distil"
    with pytest.raises(ResourceError, match="--method distil with --teacher needs only a block"):
        streamprune.tune(tuning(student, "c", method="lora", memory=needed))
    with pytest.raises(ResourceError, match=r"the memory limit is 9\.8 KiB"):
        streamprune.tune(tuning(student, "d", method="distil", teacher=dense, memory=10_000))


@pytest.fixture
def command(student: Path, text: Path, tmp_path: Path) -> Callable[..., Result]:
    def invoke(*more: str, source: Path = student, text: Path = text, out: Path = tmp_path / "out") -> Result:
        arguments = ["tune", str(source), str(out), "--text", str(text), "--seq-len", "16", "--samples", "4"]
        return CliRunner().invoke(main, [*arguments, "--steps", "2", *more])

    return invoke


def test_the_command(command: Callable[..., Result], tiny: Tiny, tmp_path: Path) -> None:
    options = ["--method", "distil", "--teacher", str(tiny("llama"))]
    done = command(*options, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["method"], found["rank"], found["resumed"]) == ("distil", 8, False)
    assert "distil: 3 of 3" in done.stderr
    again = command(*options)
    assert "tuned by distil, rank 8, loss" in again.stdout
    assert ", resumed" in again.stdout
    assert json.loads((tmp_path / "out" / "report.json").read_text())["tuning"]["rate"] == 3e-3


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--rank", "0"], 2, "rank is 0; it must be at least 1"),
        (["--rank", "33"], 2, "rank is 33; the model's width is 32"),
        (["--steps", "0"], 2, "steps is 0; it must be at least 1"),
        (["--rate", "0"], 2, "rate is 0; it must be positive and finite"),
        (["--seq-len", "1"], 2, "seq_len is 1; it must be at least 2"),
        (["--seq-len", "65"], 1, "seq-len is 65; the model's context is 64"),
        (["--teacher", "nowhere"], 1, "nowhere is not a directory with a model in it"),
        (["--text", "nowhere.txt"], 1, "cannot read the text nowhere.txt"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: list[str], code: int, message: str, command: Callable[..., Result], tiny: Tiny, tmp_path: Path
) -> None:
    refused(command("--method", "distil", "--teacher", str(tiny("llama")), *arguments), code, message, tmp_path)


def refused(result: Result, code: int, message: str, folder: Path) -> None:
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("streamprune: ")]
    assert len(lines) == 1, result.stderr
    assert message in lines[0]
    assert not (folder / "out").exists()
    assert not (folder / "out.streamprune").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 2}, "does not match"),
        ({"num_hidden_layers": 2}, "blocks 2, not 3"),
        ({"hidden_size": 40}, "width of the stream 40, not 32"),
        ({"vocab_size": 48}, "vocabulary 48, not 40"),
    ],
)
def test_a_teacher_of_another_family(
    changes: dict[str, int], message: str, command: Callable[..., Result], tiny: Tiny, tmp_path: Path
) -> None:
    refused(command("--method", "distil", "--teacher", str(tiny("llama", **changes))), 2, message, tmp_path)


def test_other_mistakes(command: Callable[..., Result], student: Path, tiny: Tiny, tmp_path: Path) -> None:
    distil = ["--method", "distil"]
    refused(command(*distil), 2, "method is 'distil', which needs the dense model: --teacher DIR", tmp_path)
    distil += ["--teacher", str(tiny("llama"))]
    refused(command(*distil, source=tmp_path / "no"), 1, "is not a directory with a model in it", tmp_path)
    assert "the model itself" in command(*distil, out=student).stderr
    short = tmp_path / "short.txt"
    short.write_text("too short")
    refused(command(*distil, text=short), 1, "has 9 tokens; one window needs 16", tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("")
    assert (
        "which already exists and was not written by streamprune"
        in command(*distil, "--restart", out=tmp_path / "taken").stderr
    )
    edit_tensors(student, lambda tensors: [t.fill_(float("nan")) for n, t in tensors.items() if "1.mlp.up_proj" in n])
    refused(command(*distil), 1, "'model.layers.1.mlp.up_proj.weight' holds NaN or Inf", tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_leaves_the_numbers(method: str, tiny: Tiny, student: Path, tuning: Make) -> None:
    config = tuning(student, method=method, teacher=tiny("llama"), rate=1e30, steps=6)
    with pytest.raises(NumericalError, match=r"the (refinement's )?loss is (nan|inf) at step|not finite"):
        streamprune.tune(config)
    assert not config.out.exists()


def test_a_model_that_transformers_cannot_load(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    import transformers

    def fail(*args: Any, **options: Any) -> None:
        raise OSError("no such luck")

    skeleton = open_skeleton(tiny("llama"), CPU, "float32")
    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", fail)
    tokens = Windows.of(torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(CheckpointError, match="transformers cannot load this model \\(no such luck\\)"):
        next(lora.train(skeleton, tokens, Refinement(1, 0, 1, rank=1), None, print))


def test_perplexity_falls_where_the_teacher_knows_the_text(tuning: Make, tmp_path: Path) -> None:
    """A teacher that learned to count letters, and a perturbed copy of it."""
    counting = tmp_path / "counting.txt"
    counting.write_text("abcdefghijklmnopqrstuvwxyz .," * 60)
    teacher = make_tiny(tmp_path / "teacher", "llama", tie_word_embeddings=False)
    model = streamprune.load(teacher, dtype=torch.float32)
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    tokens = windows(tuning(teacher, text=counting, samples=64))
    for step in range(40):
        part = tokens[8 * (step % 8) :][:8]
        adam.zero_grad()
        model(part, labels=part).loss.backward()
        adam.step()
    model.save_pretrained(teacher)
    for path in teacher.glob("model-*"):
        path.unlink()
    (teacher / "model.safetensors.index.json").unlink()
    other = tmp_path / "student"
    other.mkdir()
    for path in teacher.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    generator = torch.Generator().manual_seed(0)
    edit_tensors(
        other,
        lambda tensors: [
            t.add_(0.12 * torch.randn(t.shape, generator=generator)) for n, t in tensors.items() if "proj" in n
        ],
    )
    config = tuning(other, text=counting, teacher=teacher, method="distil", steps=30, rank=8, samples=32)
    streamprune.tune(config)
    dense, before, after = (
        streamprune.evaluate(path, counting, seq_len=16).perplexity for path in (teacher, other, config.out)
    )
    assert dense < before
    report = json.loads((config.out / "report.json").read_text())
    assert all(last < first for first, last in report["tuning"]["blocks"])
    assert after < dense + 0.5 * (before - dense)
