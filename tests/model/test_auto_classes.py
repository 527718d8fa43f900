"""Other auto classes than the one that generates text, and the configs per block that vLLM reads."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPRESENTATIVE, STRUCTURES, TINY
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForSequenceClassification

import streamprune
from streamprune import Config
from streamprune.model import modeling_streamprune as modeling

Tiny = Callable[..., Path]
IDS = torch.arange(40)[None, 2:20]


@pytest.fixture
def registered(pruned: Tiny) -> Tiny:
    """`pruned`, once its model type is known."""

    def get(name: str) -> Path:
        streamprune.load(pruned(name))
        return pruned(name)

    return get


@pytest.mark.parametrize("name", TINY)
def test_auto_model_gives_the_hidden_states_of_the_model_that_generates(name: str, pruned: Tiny) -> None:
    out = pruned(name)
    whole = streamprune.load(out, dtype=torch.float32)
    bare, info = AutoModel.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert type(bare).__name__ == json.loads((out / "config.json").read_text())["auto_map"]["AutoModel"].split(".")[1]
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    head = whole.get_output_embeddings()
    read: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    with torch.no_grad():
        whole(IDS, use_cache=False)
        states = bare(IDS, use_cache=False).last_hidden_state
    hook.remove()
    torch.testing.assert_close(states, read[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_saved_without_its_head_it_loads_again(name: str, registered: Tiny, tmp_path: Path) -> None:
    bare = AutoModel.from_pretrained(registered(name), dtype=torch.float32)
    bare.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert (tmp_path / "modeling_streamprune.py").is_file()
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).last_hidden_state, bare(IDS).last_hidden_state)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_a_model_that_classifies_has_the_pruned_blocks(name: str, registered: Tiny) -> None:
    classifier = AutoModelForSequenceClassification.from_pretrained(registered(name), num_labels=3, dtype=torch.float32)
    bare = AutoModel.from_pretrained(registered(name), dtype=torch.float32)
    with torch.no_grad():
        states = bare(IDS).last_hidden_state
        torch.testing.assert_close(classifier(IDS).logits, classifier.score(states[:, -1]))


@pytest.mark.parametrize("name", [name for name in STRUCTURES if name != "gemma4"])
def test_every_block_has_a_stock_config_with_its_own_heads(name: str, registered: Tiny) -> None:
    out = registered(name)
    config = AutoConfig.from_pretrained(out)
    stock = CONFIG_MAPPING[config.model_type.removeprefix(modeling.PREFIX)]
    assert config.is_heterogeneous
    assert len(config.per_layer_config) == len(config.per_layer_config[:]) == config.num_hidden_layers
    model = streamprune.load(out, dtype=torch.float32)
    for block, own in zip(model.get_submodule(config.streamprune["blocks"]), config.per_layer_config, strict=True):
        assert isinstance(own, stock)
        assert own.model_type == stock.model_type
        assert not isinstance(own, type(config))
        assert not own.is_heterogeneous
        twin = copy.deepcopy(own)
        assert twin.to_dict() == own.to_dict()
        assert not twin.to_dict().keys() & {"streamprune", "auto_map", "per_layer_config"}
        outputs = [
            module
            for path, module in block.named_modules()
            if re.search(r"(self_attn|attn|attention|mixer)\.(o_proj|out_proj|dense|c_proj)$", path)
            and not hasattr(block.get_submodule(path.rpartition(".")[0]), "A_log")
        ]
        for module in outputs:
            columns = module.weight.shape[0 if type(module).__name__ == "Conv1D" else 1]
            width = getattr(own, "v_head_dim", None) or own.head_dim
            assert own.num_attention_heads * width == columns


def test_heads_channels_and_keys_of_blocks_that_differ(registered: Tiny) -> None:
    config = AutoConfig.from_pretrained(registered("llama"))
    model = streamprune.load(registered("llama"), dtype=torch.float32)
    found = [
        (own.num_attention_heads * own.head_dim, own.num_key_value_heads * own.head_dim, own.intermediate_size)
        for own in config.per_layer_config
    ]
    layers = model.model.layers
    assert found == [
        (b.self_attn.q_proj.out_features, b.self_attn.k_proj.out_features, b.mlp.up_proj.out_features) for b in layers
    ]
    assert len(set(found)) > 1


def test_experts_of_differing_widths_are_no_fused_experts(registered: Tiny) -> None:
    """vLLM would hold them in one tensor of one width, and compute with what it did not load."""
    for name, field in (("mixtral", "num_local_experts"), ("qwen2_moe", "num_experts")):
        config = AutoConfig.from_pretrained(registered(name))
        assert getattr(config, field) == 4
        assert {getattr(own, field) for own in config.per_layer_config} == {0}


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_what_is_read_per_block_is_written_nowhere(name: str, registered: Tiny, tmp_path: Path) -> None:
    out = registered(name)
    config = AutoConfig.from_pretrained(out)
    before = json.loads((out / "config.json").read_text())
    assert "per_layer_config" not in before
    assert list(config.per_layer_config)
    for fields in (config.to_dict(), config.to_diff_dict(), copy.deepcopy(config).to_dict()):
        assert fields["model_type"] == config.model_type
        assert fields["streamprune"] == before["streamprune"]
        assert not fields.keys() & {"per_layer_config", "is_heterogeneous", "_heterogeneity_spec"}
    assert "streamprune" in list(config)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["streamprune"] == before["streamprune"]
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(config)


def test_a_model_that_reads_fields_per_block_itself_is_built_from_them(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    """And then resized. vLLM cannot read other ones beside them, so it is stopped."""
    if not AutoConfig.from_pretrained(tiny("gemma4")).is_heterogeneous:
        pytest.skip("this transformers' gemma4 has no fields that differ by block")
    kept = {f"blocks.{b}.{k}": {"keep": 1 + (k == "ffn")} for b in range(3) for k in ("attention", "ffn")}
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"format": "streamprune-plan-1", "ratio": 0.3, "sites": kept}))
    out = tmp_path / "out"
    streamprune.prune(Config(model=tiny("gemma4"), out=out, recipe="magnitude", plan=plan, calibration=text))
    model = streamprune.load(out, dtype=torch.float32)
    with torch.no_grad():
        assert model(IDS).logits.isfinite().all()
    own = model.config.per_layer_config[1]
    assert own.head_dim == 12
    assert own.num_attention_heads == 4
    model.config._attn_implementation_internal = "vllm"
    with pytest.raises(ValueError, match="vLLM cannot be told the widths of the blocks of a gemma4_text model"):
        AutoModel.from_config(model.config)


def test_a_static_cache_has_the_heads_of_every_block(registered: Tiny) -> None:
    model = streamprune.load(registered("llama"), dtype=torch.float32)
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    dynamic = model.generate(IDS, **settings)
    assert torch.equal(model.generate(IDS, cache_implementation="static", **settings), dynamic)
