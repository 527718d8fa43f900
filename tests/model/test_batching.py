"""Continuous batching of transformers, whose paged cache has one number of key/value heads for all blocks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import streamprune
from streamprune.model import modeling_streamprune as modeling

pytest.importorskip("accelerate", reason="transformers' continuous batching needs accelerate")
Make = Callable[..., streamprune.Config]
PROMPTS = [[3, 5, 7, 9], [4, 4, 2, 8, 11, 6], [9] * 9]
GREEDY: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}


def uneven(name: str, tiny: Callable[..., Path], configured: Make, tmp_path: Path, **changes: Any) -> Any:
    """A pruned model whose blocks keep 4, 1 and 2 groups of key/value heads, and `changes`."""
    path = tiny(name, num_attention_heads=8, num_key_value_heads=4, head_dim=4)
    kept: dict[str, Any] = {f"blocks.{b}.attention": {"keep": (4, 1, 2)[b]} for b in range(3)}
    kept |= {f"blocks.{b}.ffn": {"keep": 8} for b in range(3)} | changes
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"format": "streamprune-plan-1", "ratio": 0.3, "sites": kept}))
    result = streamprune.prune(configured(path, recipe="magnitude", plan=plan, ratio=None))
    return streamprune.load(result.out, dtype=torch.float32)


def batched(model: Any) -> list[list[int]]:
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    pages = ContinuousBatchingConfig(num_blocks=16, page_size=16)
    options = {"generation_config": GenerationConfig(**GREEDY), "continuous_batching_config": pages, "warmup": False}
    return [each.generated_tokens for each in model.generate_batch(PROMPTS, **options).values()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [("llama", {}), ("llama", {"blocks.1.attention": {"keep": 0}}), ("gemma3", {})],
    ids=["heads differ", "a block without attention", "sliding windows"],
)
def test_it_writes_the_tokens_of_generate(
    name: str, changes: dict[str, Any], tiny: Any, configured: Make, tmp_path: Path
) -> None:
    model = uneven(name, tiny, configured, tmp_path, **changes)
    assert (
        len({block.self_attn.k_proj.out_features for block in model.model.layers if hasattr(block.self_attn, "k_proj")})
        > 1
    )
    expected = [model.generate(torch.tensor([each]), **GREEDY)[0, len(each) :].tolist() for each in PROMPTS]
    assert batched(model) == expected
    assert batched(model) == expected  # the hook is there once
    assert list(model._forward_pre_hooks.values()).count(modeling.take_paged_cache) == 1


def test_nothing_written_is_an_error(
    tiny: Any, configured: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers itself logs it and returns nothing."""
    model = uneven("llama", tiny, configured, tmp_path)
    monkeypatch.setattr(modeling, "take_paged_cache", lambda *_: None)
    with pytest.raises(RuntimeError, match="continuous batching failed: "):
        batched(model)


def test_flash_attention_gets_pages_with_the_heads_of_its_block() -> None:
    cache = object.__new__(modeling.paged_cache())
    pages = torch.randn(2, 5, 16, 4, 8)
    room = SimpleNamespace(num_key_value_heads=4, layer_type="full", index=0, get_cache_for_block_table=lambda _: pages)
    cache.layer_to_allocator = {0: room}
    given: dict[str, Any] = {"cu_seq_lens_k": {"full": torch.arange(3)}, "max_length_k": {"full": 2}}
    given["block_table"] = torch.zeros(1, 1, 3, dtype=torch.int32)
    states = torch.randn(2, 1, 3, 2, 8)
    assert all(torch.equal(a, b) for a, b in zip(cache.update(*states, 0, kwargs=given), states, strict=True))
    for name, whole in zip(("k_cache", "v_cache"), pages, strict=True):
        assert torch.equal(given[name], whole[:, :, :3])
        assert given[name].data_ptr() == whole.data_ptr()
