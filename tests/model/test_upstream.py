"""What `model.upstream` assumes of transformers, one test per assumption, each seen with transformers 5.14 to 5.24."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, TINY
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

import streamprune.model.upstream as upstream
from streamprune.errors import CheckpointError
from streamprune.model import modeling_streamprune
from streamprune.model.block import _routed
from streamprune.model.checkpoint import Checkpoint
from streamprune.model.config import read_configuration
from streamprune.model.skeleton import Skeleton, open_skeleton

CPU = torch.device("cpu")
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])


def opened(folder: Path) -> tuple[Skeleton, Any]:
    """A checkpoint as we take it apart, and as transformers loads it."""
    return open_skeleton(folder, CPU, "float32"), AutoModelForCausalLM.from_pretrained(folder).eval()


def recorded(model: Any, skeleton: Skeleton, ids: Tensor, **given: Any) -> list[dict[str, Any]]:
    """What transformers' own whole model calls each of its blocks with."""
    found: list[dict[str, Any]] = []
    hooks = []
    for block in model.get_submodule(skeleton.architecture.blocks):
        names = upstream.Recorder(block).names

        def keep(module: nn.Module, positional: Any, named: Any, names: list[str] = names) -> None:
            found.append({**dict(zip(names, positional[1:], strict=False)), **named})

        hooks.append(block.register_forward_pre_hook(keep, with_kwargs=True))
    with torch.no_grad():
        model(input_ids=ids, **given)
    for hook in hooks:
        hook.remove()
    return found


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, Tensor):
        return isinstance(ours, Tensor) and torch.equal(ours, theirs)
    if isinstance(theirs, tuple):
        return all(same(a, b) for a, b in zip(ours, theirs, strict=True))
    return bool(ours == theirs)


@pytest.mark.parametrize("past", [0, 3])
@pytest.mark.parametrize("name", sorted(TINY))
def test_blocks_are_called_as_the_whole_model_calls_them(tiny: Any, name: str, past: int) -> None:
    """Recorders in place of the blocks, and `Past` in place of a cache: the same positions, masks and rotary tables."""
    skeleton, model = opened(tiny(name))
    cache = DynamicCache(config=model.config)
    argument = upstream.cache_argument(type(model).forward)
    if past:
        with torch.no_grad():
            model(input_ids=IDS[:, :past], use_cache=True, **{argument: cache})
    theirs = recorded(model, skeleton, IDS[:, past:], use_cache=bool(past), **({argument: cache} if past else {}))
    ours = skeleton.arguments(2, IDS.shape[1] - past, past)
    assert len(ours) == len(theirs) == len(skeleton)
    for side, own, other in zip(skeleton.side_inputs, ours, theirs, strict=True):
        # A cache, whether one is written, and what is only for a training loss differ.
        left_out = {*upstream.CACHES, "use_cache", "hidden_states", "output_router_logits"}
        left_out |= {key for key, value in own.items() if value == {}}  # for what the blocks write
        left_out |= {name for name, _ in side.given}
        assert own.keys() - left_out == other.keys() - left_out
        for key in own.keys() - left_out:
            assert same(own[key], other[key]), key


@pytest.mark.parametrize("name", sorted(TINY))
def test_a_cache_goes_by_the_name_that_is_current(tiny: Any, name: str) -> None:
    """Neither the model nor a block is called with a deprecated argument, and the cache that a block is given is used."""
    asked: list[int] = []
    expected: list[int] = []

    class Cache:
        def update(
            self, key_states: Tensor, value_states: Tensor, layer_idx: int, *others: Any, **options: Any
        ) -> tuple[Tensor, Tensor]:
            asked.append(layer_idx)
            return key_states, value_states

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        skeleton = open_skeleton(tiny(name), CPU, "float32")
        for index in range(len(skeleton)):
            if all(entry.kind != "attention" for entry in skeleton.entries[index]):
                continue  # its cache is none of keys and values
            expected += [index] * (not skeleton.side_inputs[index].shared)  # others have keys and values of their own
            block = skeleton.build_block(index, skeleton.read_block(index))
            argument = upstream.cache_argument(type(skeleton.block(index)).forward)
            block(torch.randn(1, 1, skeleton.stream_width), {**skeleton.arguments(1, 1)[index], argument: Cache()})
        with skeleton.embedding() as embedding:
            embedding(IDS[:, :1], 2)
    assert asked == expected
    assert [str(each.message) for each in told if "deprecated" in str(each.message)] == []


def test_a_forward_without_a_cache_is_named() -> None:
    def forward(hidden_states: Tensor, mask: Tensor) -> None: ...

    with pytest.raises(TypeError, match="forward takes no cache: hidden_states, mask"):
        upstream.cache_argument(forward)


def test_eager_attention_ends_with_its_context(tiny: Any) -> None:
    config = read_configuration(Checkpoint(tiny("llama")))[1]
    usual = upstream.attention(AutoModelForCausalLM.from_config(config).config)
    assert usual == "sdpa"
    config._attn_implementation = usual
    with suppress(ZeroDivisionError), upstream.eager_attention(config):
        assert upstream.attention(config) == "eager"
        raise ZeroDivisionError
    assert upstream.attention(config) == usual


def test_a_config_that_forgets_its_kernels_builds_without_them() -> None:
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1, intermediate_size=8, vocab_size=9)
    config._attn_implementation = "flash_attention_2"
    upstream.forget_kernels(config)
    assert upstream.attention(AutoModelForCausalLM.from_config(config).config) == "sdpa"


@pytest.mark.parametrize("name", sorted(TINY))
def test_buffers_of_a_model_without_weights_are_what_transformers_computes(tiny: Any, name: str) -> None:
    config = read_configuration(Checkpoint(tiny(name)))[1]
    whole = AutoModelForCausalLM.from_config(config)
    model = upstream.build(type(whole), config, torch.float32, 1 << 20)
    assert all(parameter.is_meta for parameter in model.parameters())
    expected = dict(whole.named_buffers())
    assert {n for n, _ in model.named_buffers()} == expected.keys()
    for buffer, tensor in model.named_buffers():
        assert torch.equal(tensor, expected[buffer]), buffer


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "linear", "factor": 2.0},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rotary_frequencies_are_those_of_the_model(rope: dict[str, Any]) -> None:
    parameters = {**rope, "rope_theta": 10000.0, "original_max_position_embeddings": 16}
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, rope_parameters=parameters)
    model: Any = AutoModelForCausalLM.from_config(config)
    assert torch.equal(upstream.rotary_frequencies(config, rope["rope_type"]), model.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("name", sorted(TINY))
def test_the_public_mapping_names_the_class_that_auto_model_builds(tiny: Any, name: str) -> None:
    config = read_configuration(Checkpoint(tiny(name)))[1]
    built = AutoModelForCausalLM.from_config(config)
    assert modeling_streamprune.stock_class(config.model_type) is type(built)


def test_names_of_a_checkpoint_are_registered_as_renamings() -> None:
    """tests/model/test_write.py loads such a result; here, that transformers still takes what the modelling file gives it."""
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
    from transformers.core_model_loading import WeightRenaming

    pairs = [WeightRenaming("a\\.b", "c.d")]
    register_checkpoint_conversion_mapping("streamprune_test", pairs, overwrite=True)
    found = get_checkpoint_conversion_mapping("streamprune_test")
    assert [(each.source_patterns, each.target_patterns) for each in found] == [(["a\\.b"], ["c.d"])]


def test_operators_that_are_counted_by_name_exist() -> None:
    import transformers.integrations.moe

    assert transformers.integrations.moe
    # Its backward is an op of its own in later releases than 5.14.
    assert torch.ops.transformers.grouped_mm_fallback


def test_a_library_newer_than_tested_is_named(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert upstream.untested() == "" or "newer" in upstream.untested()
    monkeypatch.setattr(upstream, "version", {"transformers": "6.1.0.dev0", "torch": "2.13.0+cpu"}.__getitem__)
    advice = (
        "transformers 6.1.0.dev0 is newer than 5.24, the newest version tested (pip install 'transformers<=5.24.99')"
    )
    assert upstream.untested() == f"; {advice}"

    def broken(*arguments: Any, **options: Any) -> Any:
        raise TypeError("forward() got an unexpected keyword argument 'cache'")

    monkeypatch.setattr(Skeleton, "_build", broken)
    with pytest.raises(CheckpointError) as error:
        open_skeleton(tiny("llama"), CPU, "float32")
    assert str(error.value).endswith(f"unexpected keyword argument 'cache'); {advice}")


def test_locked_versions_were_tested() -> None:
    for path in sorted((ROOT / "requirements").glob("*.txt")):
        for line in path.read_text().splitlines():
            name, _, pin = line.split(" ")[0].partition("==")
            if name in upstream.TESTED:
                assert tuple(map(int, pin.split(".")[:2])) <= upstream.TESTED[name], f"{path.name}: {line}"


def test_large_tables_are_on_the_meta_device_at_once() -> None:
    with upstream._LargeOnMeta():
        assert [torch.zeros((1 << 24) + n).is_meta for n in (0, 1)] == [False, True]
        assert not torch.zeros(1 << 26, dtype=torch.bool).is_meta


def by_expert(given: tuple[torch.Tensor, ...], chosen: Sequence[int] | None = None) -> list[tuple[torch.Tensor, ...]]:
    *found, sizes = _routed(given, 4, chosen)
    return list(zip(*(each.split(sizes) for each in found), strict=True))


def test_the_tokens_of_experts_are_those_that_are_routed_to_them() -> None:
    """In both forms in which transformers calls its experts; one gets none, and a number is no expert's."""
    hidden = torch.randn(6, 5)
    index = torch.tensor([[0, 3], [3, 1], [1, 0], [3, 0], [0, 1], [4, 3]])
    weights = torch.rand(6, 2)
    for number, (rows, read, factor) in enumerate(by_expert((hidden, index, weights))):
        tokens, rank = torch.where(index == number)
        assert torch.equal(rows, tokens)
        assert torch.equal(read, hidden[tokens])
        assert torch.equal(factor, weights[tokens, rank, None])
    each = torch.cat([hidden * (index == number).any(1, keepdim=True) for number in range(4)])
    for number, (rows, read, factor) in enumerate(by_expert((each,))):
        assert torch.equal(rows, torch.where((index == number).any(1))[0])
        assert torch.equal(read, hidden[rows])
        assert factor.eq(1 / 4).all()
    whole, parts = by_expert((hidden, index, weights)), by_expert((hidden, index, weights), chosen=[1, 3])
    assert [len(rows) for rows, _, _ in parts] == [0, 3, 0, 4]
    for number in (1, 3):
        assert all(map(torch.equal, parts[number], whole[number]))
