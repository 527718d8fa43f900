"""Results in FP8: transformers' own arithmetic, and models that transformers and streamprune read alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import contents, make_tiny, write_tokenizer
from stopping import Stop, stopping_after
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    FineGrainedFP8Config,
    Gemma3Config,
)
from transformers.integrations.finegrained_fp8 import FP8Linear, Fp8Quantize
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

import streamprune
from streamprune import Config
from streamprune.errors import ConfigError
from streamprune.model import fp8
from streamprune.model.checkpoint import Checkpoint
from streamprune.model.whole import load_whole

Make = Callable[..., Config]
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "num_hidden_layers": 3,
}
HOW: dict[str, Any] = {"recipe": "magnitude", "round_to": 128, "ratio": 0.3, "store": "fp8"}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("wide"), "llama", torch.bfloat16, **SIZES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_quantised_as_by_transformers(dtype: torch.dtype) -> None:
    weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[:128, :128] = 0
    quantiser: Any = SimpleNamespace(
        quantization_config=SimpleNamespace(weight_block_size=[128, 128], scale_fmt="float")
    )
    expected = Fp8Quantize(quantiser)._quantize_one("a.weight", weight)
    values, scales = fp8.quantise(weight)
    assert torch.equal(values.view(torch.uint8), expected["a.weight"].view(torch.uint8))
    assert torch.equal(scales, expected["a.weight_scale_inv"])


def test_blocks_whose_factor_overflows_become_zeros() -> None:
    weight = torch.zeros(128, 384)
    weight[0, 0], weight[0, 128], weight[0, 256] = 1e-36, 1e-38, 1e-35
    values, scales = fp8.quantise(weight)
    assert scales[0, :2].tolist() == [1.0, 1.0]
    assert values.float().nonzero().tolist() == [[0, 256]]
    assert torch.equal(values[0, 256].float() * scales[0, 2], weight[0, 256])


@pytest.mark.parametrize("layout", ["free", "uniform"])
def test_transformers_loads_what_streamprune_reads(layout: str, wide: Path, configured: Make, text: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers loads FP8 models with accelerate")
    out = Path(streamprune.prune(configured(wide, layout=layout, **HOW)).out)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    stored = Checkpoint(out).stored
    names = [name.removesuffix(".weight") for name, each in stored.items() if each.dtype == "F8_E4M3"]
    assert any(".mlp.down_proj" in name for name in names)
    assert all(size % 128 == 0 for name in names for size in stored[f"{name}.weight"].shape)
    linears = {n.removesuffix(".weight") for n in stored if n.endswith("proj.weight")}
    assert set(config["modules_to_not_convert"]) == {*(linears - set(names)), "lm_head"}
    # Queries, keys and values are fused by vLLM, and so are gate and up projections.
    for block in range(3):
        for group in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"):
            assert len({f"model.layers.{block}.{name}" in names for name in group}) == 1
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.bfloat16)
    theirs, ours = model.state_dict(), load_whole(out).state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert streamprune.verify(out).sound
    assert streamprune.inspect(out)["model"]["dtypes"] == ["bfloat16"]
    again = configured(out, "again", recipe="magnitude", ratio=0.2)
    streamprune.prune(again)
    assert "quantization_config" not in json.loads((again.out / "config.json").read_text())


def make_wrapper(folder: Path) -> Path:
    """A Gemma 3 with a vision tower, both of width 128."""
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Gemma3Config(
        text_config={
            **sizes,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "vocab_size": 40,
            "max_position_embeddings": 64,
        },
        vision_config={**sizes, "image_size": 16, "patch_size": 4, "vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=35,
        boi_token_index=36,
        eoi_token_index=37,
    )
    AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.mark.parametrize("kind", ["opt", "wrapper", "text model"])
def test_transformers_replaces_exactly_the_linears_in_fp8(kind: str, configured: Make, tmp_path: Path) -> None:
    """Linears outside the blocks, such as projections of embeddings and vision towers, are not replaced."""
    if kind == "opt":
        sizes = {"hidden_size": 128, "ffn_dim": 384, "num_attention_heads": 4, "word_embed_proj_dim": 64}
        model = make_tiny(tmp_path / "opt", "opt", torch.bfloat16, **sizes)
    else:
        model = make_wrapper(tmp_path / "gemma3")
    out = Path(streamprune.prune(configured(model, **HOW, text_only=kind == "text model")).out)
    config = AutoConfig.from_pretrained(out, trust_remote_code=True)
    auto = AutoModelForImageTextToText if kind == "wrapper" else AutoModelForCausalLM
    with torch.device("meta"):
        built = auto.from_config(config, trust_remote_code=True)
    given = FineGrainedFP8Config.from_dict(config.quantization_config)
    FineGrainedFP8HfQuantizer(given)._process_model_before_weight_loading(built)
    replaced = {f"{name}.weight" for name, module in built.named_modules() if isinstance(module, FP8Linear)}
    assert replaced == {name for name, each in Checkpoint(out).stored.items() if each.dtype == "F8_E4M3"} != set()


def test_only_rounding_differs(wide: Path, configured: Make) -> None:
    whole = Path(streamprune.prune(configured(wide, "whole", **{**HOW, "store": "auto"})).out)
    small = Path(streamprune.prune(configured(wide, "small", **HOW)).out)
    before, after = Checkpoint(whole), Checkpoint(small)
    assert set(before) == set(after)
    assert any(each.dtype == "F8_E4M3" for each in after.stored.values())
    for name in before:
        old, new = before.read(name).float(), after.read(name).float()
        if f"{name}_scale_inv" in after.stored:
            assert 0 < (old - new).norm() / old.norm() < 0.04
        else:
            assert torch.equal(old, new)


@pytest.mark.parametrize("recipe", ["magnitude", "surgeon"])
def test_an_interrupted_job_gives_the_same_bytes(
    recipe: str, wide: Path, configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"settings": {"shots": "2"}} if recipe == "surgeon" else {}
    config = configured(wide, "stopped", **{**HOW, **settings, "recipe": recipe})
    with stopping_after(6, monkeypatch), pytest.raises(Stop):
        streamprune.prune(config)
    streamprune.prune(config)
    through = configured(wide, "through", **{**HOW, **settings, "recipe": recipe})
    streamprune.prune(through)
    files = [
        {n: d for n, d in contents(c.out).items() if n.endswith((".safetensors", "config.json"))}
        for c in (config, through)
    ]
    assert files[0] == files[1]
    assert any(each.dtype == "F8_E4M3" for each in Checkpoint(through.out).stored.values())


def test_models_that_cannot_be_stored_in_fp8(configured: Make, tmp_path: Path) -> None:
    for name, sizes, message in (
        ("llama", {}, "the width of .* is 32, and FP8 needs blocks of 128 × 128 weights"),
        ("mixtral", {"hidden_size": 128}, "has experts, which are not written in FP8"),
        ("gpt2", {"hidden_size": 128}, "has no linears"),
    ):
        model = make_tiny(tmp_path / name, name, **sizes)
        with pytest.raises(ConfigError, match=message):
            streamprune.prune(configured(model, **HOW))
