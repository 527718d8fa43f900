"""Sizes against files that are really written, llama.cpp's published sizes, and transformers' own caches."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, make_tiny
from gguf_reference import write_byte_tokenizer

import streamprune
from streamprune.model.checkpoint import Shard, data_bytes
from streamprune.model.formats import BLOCKS, FORMATS, Model, Weight, gguf_bytes, gguf_total, gguf_type
from streamprune.model.fp8 import SCALE
from streamprune.model.sizes import RUNTIME, Sizes
from streamprune.model.skeleton import open_skeleton

Tiny = Callable[..., Path]
Make = Callable[..., streamprune.Config]
CPU = torch.device("cpu")
GGUF = ("llama", "gpt2", "gemma2", "phi3", "starcoder2", "mixtral", "olmoe")
OFTEN = ("llama", "gpt2", "phi3", "gpt_oss", "deepseek_v3", "qwen2_moe", "nemotron_h")


def sizes(model: Path) -> Sizes:
    return Sizes(open_skeleton(model, CPU, "auto"))


def weights_in(folder: Path) -> int:
    return sum(data_bytes(path) for path in folder.glob("*.safetensors"))


def kept(result: Path) -> dict[str, int]:
    """Units by site, of a pruned model."""
    return {site.name: site.units for site in open_skeleton(result, CPU, "auto").all_sites()}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {}) if name in OFTEN else pytest.param(name, {}, marks=pytest.mark.slow) for name in sorted(TINY)),
        ("llama", {"model_type": "apertus"}),  # parameters that are a single number
    ],
)
def test_bf16_is_what_a_result_weighs(name: str, changes: dict[str, str], tiny: Tiny, configured: Make) -> None:
    model = tiny(name, torch.bfloat16, **changes)
    result = Path(streamprune.prune(configured(model, recipe="magnitude")).out)
    assert kept(result) != kept(model)
    assert sizes(model).weights(kept(result), "bf16") == weights_in(result) == sizes(result).weights({}, "bf16")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gemma4-e", "deepseek_v3", "nemotron_h"])
def test_a_sublayer_that_is_gone_weighs_nothing(name: str, tiny: Tiny, configured: Make, tmp_path: Path) -> None:
    model = tiny(name, torch.bfloat16)
    sites = open_skeleton(model, CPU, "auto").all_sites()
    keeps = {site.name: 0 if site.block < 2 and site.goes and site.expert is None else site.units for site in sites}
    assert 0 in keeps.values()
    plan = tmp_path / "plan.json"
    entries = {name: {"keep": units} for name, units in keeps.items()}
    plan.write_text(json.dumps({"format": "streamprune-plan-1", "ratio": 0.3, "sites": entries}))
    result = Path(streamprune.prune(configured(model, recipe="magnitude", plan=plan, ratio=None)).out)
    before, after = sizes(model), sizes(result)
    assert before.weights(keeps, "bf16") == weights_in(result) == after.weights({}, "bf16")
    assert before.weights(keeps, "q8_0") == after.weights({}, "q8_0")
    assert before.cache(keeps, 20) == after.cache({}, 20) < before.cache({}, 20)


@pytest.mark.parametrize("ratio", [0.1, 0.4])
def test_fp8_is_what_store_fp8_writes(ratio: float, tiny: Tiny, configured: Make) -> None:
    wide = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_attention_heads": 4}
    model = tiny("llama", torch.bfloat16, **wide)
    config = configured(model, recipe="magnitude", ratio=ratio, store="fp8", round_to=128, blocks=(1, 3))
    result = Path(streamprune.prune(config).out)
    shards = [Shard(path) for path in result.glob("*.safetensors")]
    assert any(name.endswith(SCALE) for shard in shards for name in shard)
    assert sizes(model).weights(kept(result), "fp8") == weights_in(result)
    assert not sizes(tiny("mixtral")).storable("fp8")
    config = configured(model, "less", recipe="default", ratio=ratio + 0.4, effort="low", store="fp8", round_to=128)
    streamprune.prune(config)
    sites = json.loads((config.out / "report.json").read_text())["sites"]
    keeps = {site["site"]: site["kept"] for site in sites}
    assert 0 in keeps.values()
    assert sizes(model).weights(keeps, "fp8") == weights_in(config.out)


@pytest.mark.slow
@pytest.mark.parametrize("name", GGUF)
def test_gguf_is_what_export_writes(name: str, configured: Make, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    changes: dict[str, Any] = {"vocab_size": 328, "hidden_size": 64}
    changes |= {"query_pre_attn_scalar": 8} if name == "gemma2" else {}
    changes |= {"num_key_value_heads": 4} if name == "olmoe" else {}
    model = make_tiny(tmp_path, name, **changes)
    write_byte_tokenizer(model)
    config = configured(model, recipe="magnitude", ratio=0.2, layout="uniform", round_to=8)
    result = Path(streamprune.prune(config).out)
    found, keeps = sizes(model), kept(result)
    after = {each: None if each == "fp8" else sizes(result).weights({}, each) for each in FORMATS}
    for dtype in ("bf16", "q8_0", "q4_k_m"):
        if dtype == "q4_k_m" and importlib.util.find_spec("xllamacpp") is None:
            continue
        done = streamprune.export_gguf(result, tmp_path / f"{dtype}.gguf", dtype=dtype)
        tensors = gguf.GGUFReader(done.path).tensors
        assert done.weights == after
        parts = found._kept(keeps)
        assert sum(gguf_bytes(dtype, each, found.model(keeps)) for each in (*found._outside, *parts)) == sum(
            tensor.n_bytes for tensor in tensors
        )
        if dtype != "bf16":
            assert found.weights(keeps, dtype) == sum(tensor.n_bytes for tensor in tensors)
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("q4_k_m: the xllamacpp package is not here")


def test_blocks_are_ggufs() -> None:
    gguf = pytest.importorskip("gguf")
    for name, block in BLOCKS.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]] == block


@pytest.mark.parametrize(
    ("shape", "published"),
    [
        # d, FFN, blocks, heads, key/value heads, vocabulary; GiB as llama-bench prints them.
        ((4096, 11008, 32, 32, 32, 32000), {"q4_k_m": 3.80, "q8_0": 6.67}),  # Llama 2 7B
        ((4096, 14336, 32, 32, 8, 128256), {"q4_k_m": 4.58, "q8_0": 7.95}),  # Llama 3 8B
        ((8192, 28672, 80, 64, 8, 128256), {"q4_k_m": 39.59}),  # Llama 3 70B
        ((3584, 18944, 28, 28, 4, 152064), {"q4_k_m": 4.36}),  # Qwen2 7B
    ],
)
def test_published_sizes(shape: tuple[int, ...], published: dict[str, float]) -> None:
    d, ffn, depth, heads, groups, vocabulary = shape
    tensors = [Weight((vocabulary, d), "embedding"), Weight((vocabulary, d), "head")]
    for block in range(depth):
        tensors += [Weight((heads * 128, d)), Weight((groups * 128, d), "key", block)]
        tensors += [Weight((groups * 128, d), "value", block), Weight((d, heads * 128), "output", block)]
        tensors += [Weight((ffn, d)), Weight((ffn, d)), Weight((d, ffn), "down", block), Weight((d,)), Weight((d,))]
    model = Model(depth, tied=False, queries=heads // groups)
    for format, size in published.items():
        assert round(gguf_total(format, tensors, model) / 2**30, 2) == size


def llama_cpps_types(gone: set[int], depth: int, experts: int) -> list[str]:
    """The types of values and down projections in Q4_K_M, block by block, with counters as in llama.cpp's `llama-quant.cpp`."""
    found, i_attention, i_down, n_attention = [], 0, 0, depth - len(gone)

    def more(i: int, n: int) -> bool:
        return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2

    for block in range(depth):
        if block not in gone:
            found.append("q6_k" if more(i_attention, n_attention) else "q4_k")
            i_attention += 1
        if block not in gone or experts:
            for _ in range(max(1, experts)):
                found.append("q6_k" if more(block if experts else i_down, depth) else "q4_k")
                i_down += 1
    return found


@pytest.mark.parametrize("experts", [0, 4])
def test_bits_go_by_what_came_before(experts: int) -> None:
    depth, gone = 24, {0, 1, 5, 11, 12}
    weights = []
    for block in range(depth):
        attention = [Weight((8, 256), "value", block), Weight((8,), "value", block), Weight((8, 256), "linear", block)]
        weights += [] if block in gone else attention
        weights += [] if block in gone and not experts else [Weight((8, 256), "down", block)] * max(1, experts)
    types = llama_cpps_types(gone, depth, experts)
    linears = 8 * (144 + 4) * (depth - len(gone))
    expected = linears + sum(8 * {"q6_k": 210, "q4_k": 144}[kind] for kind in types)
    assert gguf_total("q4_k_m", weights, Model(depth, tied=False, experts=experts)) == expected
    # By the numbers of the blocks alone it would be another size.
    assert sum(gguf_bytes("q4_k_m", each, Model(depth, tied=False, experts=experts)) for each in weights) != expected


@pytest.mark.parametrize(
    ("columns", "role", "kind"),
    [
        (512, "linear", "q4_k"),
        (160, "linear", "q5_0"),
        (512, "down", "q6_k"),
        (160, "down", "q8_0"),
        (72, "down", "f16"),
        (72, "linear", "f16"),
        (512, "head", "q6_k"),
        (160, "head", "q8_0"),
        (512, "kept", "f32"),
    ],
)
def test_rows_that_blocks_do_not_divide_fall_back(columns: int, role: Any, kind: str) -> None:
    assert gguf_type("q4_k_m", Weight((64, columns), role, block=0), Model(8, tied=False)) == kind


SAME = sorted(TINY.keys() - {"deepseek_v3", "qwen3_5", "nemotron_h", "lfm2"})  # these cache latents or states


@pytest.mark.parametrize("name", SAME)
def test_cache_is_transformers_own(name: str, tiny: Tiny) -> None:
    folder, context = tiny(name), 20
    model = streamprune.load(folder, dtype=torch.bfloat16)
    cache = model(torch.ones(1, context, dtype=torch.int64), use_cache=True).past_key_values
    found = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.keys is not None)
    # A sliding layer of transformers leaves out the token that the next step adds.
    short = sum(
        2 * 2 * k.keys.shape[1] * k.keys.shape[-1]
        for k in cache.layers
        if k.keys is not None and 0 < k.keys.shape[-2] < context
    )
    assert sizes(folder).cache({}, context) == found + short


def test_latents_are_cached_whatever_the_heads(tiny: Tiny) -> None:
    found = sizes(tiny("deepseek_v3"))
    few = {site.name: 1 for site in found.sites if site.kind == "attention"}
    assert found.cache({}, 10) == found.cache(few, 10) == 3 * 10 * 2 * (10 + 4)


def test_units_weigh_where_they_are(tiny: Tiny) -> None:
    found = sizes(tiny("gemma3"))
    first, second = (f"blocks.{index}.attention" for index in (0, 1))
    assert found.cache({}, 20) - found.cache({first: 1}, 20) == 2 * 2 * 6 * 8  # within its window
    assert found.cache({}, 20) - found.cache({second: 1}, 20) == 2 * 2 * 20 * 8
    assert found.workspace({}) == RUNTIME + 4 * 512 * (96 + 32)  # gate and up, wider than the vocabulary
    assert found.workspace({f"blocks.{index}.ffn": 8 for index in range(3)}) == RUNTIME + 4 * 512 * (64 + 32)
