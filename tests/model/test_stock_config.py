"""A uniform result is a stock checkpoint of its source's architecture: the config field by field, and what loads it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY
from transformers import AutoConfig, AutoModelForCausalLM

import streamprune
from streamprune.model.architectures import FAMILIES
from streamprune.model.checkpoint import Checkpoint

Make = Callable[..., Path]
HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim")
FFN = ("moe_intermediate_size", "intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")
# The last linear of a sublayer, as checkpoints name it.
ATTENTION_OUT = r"(self_attn\.(o|out)_proj|attn\.c_proj|attention\.dense)\.weight$"
FFN_OUT = r"(down_proj|fc2|mlp\.c_proj|dense_4h_to_h|\.w2)\.weight$"


def columns(out: Path, pattern: str, model_type: str) -> set[int]:
    """Inputs of all linears of that kind, from the stored tensors."""
    checkpoint = Checkpoint(out)
    # gpt2 stores its linears the other way round.
    side = 0 if model_type == "gpt2" else 1
    return {checkpoint[name].shape[side] for name in checkpoint if re.search(pattern, name)}


@pytest.fixture(params=sorted(name for name, fields in TINY.items() if fields["model_type"] in FAMILIES))
def uniform(
    request: pytest.FixtureRequest, tiny: Make, configured: Callable[..., streamprune.Config]
) -> tuple[dict[str, Any], Path]:
    """The source's config, and a uniform result."""
    source = tiny(request.param)
    result = streamprune.prune(configured(source, recipe="magnitude", ratio=0.2, layout="uniform"))
    return json.loads((source / "config.json").read_text()), Path(result.out)


def test_the_config_is_stock(uniform: tuple[dict[str, Any], Path]) -> None:
    before, out = uniform
    after = json.loads((out / "config.json").read_text())
    model_type = before["model_type"]
    assert after["model_type"] == model_type
    assert after["architectures"] == before["architectures"]
    assert "streamprune" not in after
    assert "auto_map" not in after
    assert not list(out.glob("*.py"))

    changed = {name for name in after.keys() | before.keys() if after.get(name) != before.get(name)}
    assert changed, "nothing shrank"
    assert changed <= {*HEADS, *FFN}

    wide = columns(out, FFN_OUT, model_type)
    assert wide == {after[name] for name in FFN if after.get(name) and (name in changed or after[name] in wide)}
    if "head_dim" in after:
        heads, units, head = (after[name] for name in HEADS)
        assert columns(out, ATTENTION_OUT, model_type) == {heads * head}
        assert heads % units == 0
        assert head == (before.get("head_dim") or before["hidden_size"] // before["num_attention_heads"])


def test_transformers_loads_it_without_our_code(uniform: tuple[dict[str, Any], Path]) -> None:
    before, out = uniform
    model, info = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=False, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert [type(model).__name__] == before["architectures"]
    assert type(model).__module__.startswith("transformers.models.")
    read = AutoConfig.from_pretrained(out, trust_remote_code=False)
    after = json.loads((out / "config.json").read_text())
    for name in (*HEADS, *FFN):
        assert getattr(read, name, None) == after.get(name) or name not in after
