"""A uniform result is a stock checkpoint of its source's architecture: the config field by field, and what loads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY
from transformers import AutoConfig, AutoModelForCausalLM

import streamprune
from streamprune.model.architecture import ARCHITECTURES, SublayerEntry
from streamprune.model.checkpoint import Checkpoint

pytestmark = pytest.mark.usefixtures("unsynced")

Make = Callable[..., Path]


def widths(entry: SublayerEntry) -> dict[str, str]:
    """The fields that a sublayer shrinks, by what they count."""
    return {attribute: field for field, attribute in entry.widths}


def consumer_columns(checkpoint: Checkpoint, model_type: str, entry: SublayerEntry, index: int) -> int:
    """Inputs of a sublayer's last linear, from the stored tensor."""
    shape = checkpoint[f"{ARCHITECTURES[model_type].blocks}.{index}.{entry.consumer}.weight"].shape
    # gpt2 stores its linears the other way round.
    return shape[0] if model_type == "gpt2" else shape[1]


@pytest.fixture(params=sorted(TINY))
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
    architecture = ARCHITECTURES[model_type]
    checkpoint = Checkpoint(out)

    assert after["model_type"] == model_type
    assert after["architectures"] == before["architectures"]
    assert "streamprune" not in after
    assert "auto_map" not in after
    assert not list(out.glob("*.py"))

    changed = {field for entry in architecture.sublayers for field, _ in entry.widths}
    assert {k: v for k, v in after.items() if k not in changed} == {k: v for k, v in before.items() if k not in changed}
    # It did shrink, and says so.
    assert any(after[field] != before.get(field) for field in changed)

    for entry in architecture.sublayers:
        found = {
            consumer_columns(checkpoint, model_type, entry, index)
            for index in range(len_of(checkpoint, architecture.blocks))
        }
        assert len(found) == 1, "blocks differ"
        if "heads" in widths(entry):
            heads, units, head = (after[widths(entry)[name]] for name in ("heads", "units", "head_width"))
            assert found == {heads * head}
            assert heads % units == 0
            assert head == (before.get("head_dim") or before["hidden_size"] // before["num_attention_heads"])
        elif widths(entry):
            assert found == {after[widths(entry)["columns"]]}


def len_of(checkpoint: Checkpoint, blocks: str) -> int:
    """How many blocks have tensors."""
    return len({name[len(blocks) + 1 :].partition(".")[0] for name in checkpoint if name.startswith(f"{blocks}.")})


def test_transformers_loads_it_without_our_code(uniform: tuple[dict[str, Any], Path]) -> None:
    before, out = uniform
    model, info = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=False, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert [type(model).__name__] == before["architectures"]
    assert type(model).__module__.startswith("transformers.models.")
    read = AutoConfig.from_pretrained(out, trust_remote_code=False)
    after = json.loads((out / "config.json").read_text())
    for entry in ARCHITECTURES[before["model_type"]].sublayers:
        for field, _ in entry.widths:
            assert getattr(read, field) == after[field]
