"""What is inferred of every kind's blocks, that wrong entries are noticed, and which blocks are refused."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STRUCTURES, TINY, make_tiny
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

from streamprune.errors import CheckpointError
from streamprune.model import proof
from streamprune.model import skeleton as skeletons
from streamprune.model.architectures import Producer, SublayerEntry
from streamprune.model.skeleton import Skeleton, open_skeleton
from streamprune.model.trial import TOKENS, Trial

Tiny = Callable[..., Path]
Change = Callable[[SublayerEntry], SublayerEntry]


def opened(path: Path) -> Skeleton:
    return open_skeleton(path, torch.device("cpu"), "float32")


# What is expected of the model types that were once written down by hand. All have 4 query heads of 8, in 2 groups.


def producers(*names: str) -> tuple[Producer, ...]:
    return tuple(Producer(name) for name in names)


QKV = producers("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ATTENTION = SublayerEntry(
    kind="attention",
    norm="input_layernorm",
    mixer=("self_attn",),
    producers=QKV,
    consumer="self_attn.o_proj",
    width=16,
    head=8,
)
FFN = SublayerEntry(
    kind="ffn",
    norm="post_attention_layernorm",
    mixer=("mlp",),
    producers=producers("mlp.gate_proj", "mlp.up_proj"),
    consumer="mlp.down_proj",
)
EXPERTS = replace(
    FFN,
    producers=producers("gate_proj", "up_proj"),
    consumer="down_proj",
    experts="mlp.experts",
    router="mlp.gate",
    chosen=2,
)
HEAD_NORMS = producers("self_attn.q_norm", "self_attn.k_norm")
WIDE = replace(ATTENTION, width=24, head=12)  # heads of 12
FALCON = replace(
    ATTENTION,
    mixer=("self_attention",),
    producers=producers("self_attention.query_key_value"),
    consumer="self_attention.dense",
    counts=("self_attention.num_heads", "self_attention.num_kv_heads"),
)
PYTHIA = replace(
    ATTENTION,
    mixer=("attention",),
    producers=producers("attention.query_key_value"),
    consumer="attention.dense",
    width=8,
)
UP_DOWN = replace(FFN, producers=producers("mlp.dense_h_to_4h"), consumer="mlp.dense_4h_to_h")
C_FC = replace(FFN, producers=producers("mlp.c_fc"), consumer="mlp.c_proj")
OPT = (
    replace(
        ATTENTION,
        consumer="self_attn.out_proj",
        norm="self_attn_layer_norm",
        counts=("self_attn.num_heads",),
        width=8,
    ),
    replace(FFN, norm="final_layer_norm", mixer=("fc1", "activation_fn"), producers=producers("fc1"), consumer="fc2"),
)
GEMMA = (
    replace(ATTENTION, branch_norm="post_attention_layernorm"),
    replace(FFN, norm="pre_feedforward_layernorm", branch_norm="post_feedforward_layernorm"),
)

ENTRIES: dict[str, tuple[SublayerEntry, ...]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "smollm3"), (ATTENTION, FFN)),
    "llama-biased": (replace(ATTENTION, width=6, head=6), FFN),
    "qwen3": (WIDE, FFN),
    "granite": (replace(ATTENTION, scale=0.5), replace(FFN, scale=0.5)),
    "gemma2": GEMMA,
    "gemma3": GEMMA,
    "olmo2": (
        replace(ATTENTION, norm=None, branch_norm="post_attention_layernorm", vectors=HEAD_NORMS),
        replace(FFN, norm=None, branch_norm="post_feedforward_layernorm"),
    ),
    "phi3": (
        replace(
            ATTENTION,
            producers=(Producer("self_attn.qkv_proj", (16, 8, 8)),),
            counts=("self_attn.num_key_value_heads", "self_attn.config.num_attention_heads"),
        ),
        replace(FFN, producers=(Producer("mlp.gate_up_proj", (1, 1)),)),
    ),
    "starcoder2": (ATTENTION, C_FC),
    "gpt_neox": (PYTHIA, replace(UP_DOWN, parallel=True)),
    "gpt_neox-serial": (PYTHIA, UP_DOWN),
    "falcon": (
        replace(FALCON, norm="ln_attn", repeats=True),
        replace(UP_DOWN, norm="ln_mlp", parallel=True),
    ),
    # A single group, of which nothing can be removed: its parts follow each other, and no counts change.
    "falcon-7b": (
        replace(
            FALCON,
            producers=(Producer("self_attention.query_key_value", (32, 8, 8)),),
            norm="input_layernorm",
            counts=(),
            width=32,
        ),
        replace(UP_DOWN, norm="input_layernorm", parallel=True),
    ),
    # With ALiBi, the model passes every block one slope per head: fewer heads do not run, so attention has no site.
    "falcon-rw": (SublayerEntry("attention", ("self_attention",), norm="input_layernorm"), UP_DOWN),
    "mixtral": (ATTENTION, EXPERTS),
    "qwen3_moe": (WIDE, EXPERTS),  # but for its second block
    "olmoe": (replace(ATTENTION, vectors=HEAD_NORMS), EXPERTS),
    "gpt2": (
        replace(
            ATTENTION,
            norm="ln_1",
            mixer=("attn",),
            producers=(Producer("attn.c_attn", (8, 8, 8)),),
            consumer="attn.c_proj",
            counts=("attn.num_heads", "attn.split_size", "attn.embed_dim"),  # the last one is read by no forward pass
            width=8,
        ),
        replace(C_FC, norm="ln_2"),
    ),
    "opt": OPT,
    "opt-350m": tuple(replace(entry, norm=None, sum_norm=entry.norm) for entry in OPT),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_entries_are_those_written_by_hand(name: str, tiny: Tiny) -> None:
    """The comments in `ENTRIES` say where inference finds something else than what was written down before."""
    for index, entries in enumerate(opened(tiny(name)).entries):
        dense = (name, index) == ("qwen3_moe", 1)
        expected = (WIDE, FFN) if dense else ENTRIES[name]
        assert tuple(sites_of(entry) for entry in entries) == expected


def sites_of(entry: SublayerEntry) -> SublayerEntry:
    """An entry without its arguments, and without how it, or its experts, go as a whole, which other tests cover."""
    return replace(entry, arguments=(), removal=None, routing=(), routed=(), groups=1, least=0)


def parts(entries: tuple[SublayerEntry, ...], number: int) -> dict[str, tuple[int, ...]]:
    return {each.name: each.parts for each in (*entries[number].producers, *entries[number].vectors)}


def test_entries_of_other_kinds(tiny: Tiny) -> None:
    """What each of the later kinds was added for."""
    mixture = opened(tiny("qwen2_moe")).entries[0][1]
    assert mixture.shared == replace(
        FFN,
        norm=None,
        mixer=("mlp.shared_expert",),
        producers=producers("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
        consumer="mlp.shared_expert.down_proj",
    )

    attention, mixture = opened(tiny("gpt_oss")).entries[0]
    assert attention.vectors == producers("self_attn.sinks")
    assert (mixture.router, mixture.chosen, mixture.shared) == ("mlp.router", 2, None)

    first, second, _ = opened(tiny("deepseek_v3")).entries
    assert sites_of(first[1]) == FFN
    assert (first[0].width, first[0].head, first[0].producers) == (6, 6, ())  # of the values
    assert first[0].vectors == producers("self_attn.q_b_proj", "self_attn.kv_b_proj")
    assert second[1].experts == "mlp.experts"
    assert second[1].shared is not None

    linear, gated, _ = opened(tiny("qwen3_5")).entries
    assert linear[0].kind == "linear"
    assert parts(linear, 0) == {
        "linear_attn.in_proj_qkv": (6, 6, 16),
        "linear_attn.conv1d": (6, 6, 16),
        **dict.fromkeys((f"linear_attn.{leaf}" for leaf in ("in_proj_z", "in_proj_b", "in_proj_a")), ()),
        **dict.fromkeys((f"linear_attn.{leaf}" for leaf in ("dt_bias", "A_log")), ()),
    }
    assert sites_of(gated[0]) == ATTENTION

    mamba, attention_only, ffn_only, _ = opened(tiny("nemotron_h")).entries
    assert [len(each) for each in (mamba, attention_only, ffn_only)] == [1, 1, 1]
    assert [each[0].kind for each in (mamba, attention_only, ffn_only)] == ["linear", "attention", "ffn"]
    assert parts(mamba, 0)["mixer.in_proj"] == (16, 16, 6, 6, 2)
    assert parts(mamba, 0)["mixer.conv1d"] == (16, 6, 6)
    assert ffn_only[0].producers == producers("mixer.up_proj")

    (convolution, ffn), _, _ = opened(tiny("lfm2")).entries
    assert (convolution.consumer, ffn.consumer) == (None, "feed_forward.w2")
    assert opened(tiny("lfm2")).unpruned == {"conv": [0, 2]}

    narrow, wide, _ = opened(tiny("gemma4")).entries
    assert (narrow[0].head, wide[0].head) == (8, 12)
    assert [entry.sum_scale for entry in narrow] == [None, "layer_scalar"]

    attention, ffn = opened(tiny("cohere")).entries[0]
    assert attention.norm == ffn.norm == "input_layernorm"
    assert (attention.parallel, ffn.parallel) == (False, True)


# Wrong entries.


def with_parts(name: str, *found: int) -> Change:
    """Rows of a producer or vector grouped in another way."""

    def change(entry: SublayerEntry) -> SublayerEntry:
        each = [
            [replace(one, parts=found) if one.name.endswith(name) else one for one in all_of]
            for all_of in (entry.producers, entry.vectors)
        ]
        return replace(entry, producers=tuple(each[0]), vectors=tuple(each[1]))

    return change


def without(name: str) -> Change:
    return lambda entry: replace(entry, vectors=tuple(one for one in entry.vectors if not one.name.endswith(name)))


@pytest.mark.parametrize(
    ("name", "block", "change"),
    [
        ("llama", 0, lambda entry: replace(entry, width=8)),  # heads instead of groups
        ("llama", 0, lambda entry: replace(entry, producers=entry.producers[:2])),
        ("phi3", 0, with_parts("qkv_proj")),
        ("phi3", 0, with_parts("qkv_proj", 8, 8, 16)),
        ("gpt_neox", 0, with_parts("query_key_value", 8, 8, 8)),
        ("gpt2", 0, with_parts("c_attn")),
        ("olmo2", 0, lambda entry: replace(entry, vectors=entry.vectors[:1])),
        ("gpt_oss", 0, without("sinks")),
        ("deepseek_v3", 0, without("kv_b_proj")),
        ("qwen3_5", 0, with_parts("conv1d")),
        ("qwen3_5", 0, with_parts("in_proj_qkv", 16, 6, 6)),
        ("qwen3_5", 1, with_parts("q_proj", 16, 16)),  # queries, then gates
        ("nemotron_h", 0, without("conv1d")),
        ("nemotron_h", 0, with_parts("in_proj", 6, 6, 16, 16, 2)),
    ],
)
def test_rows_grouped_wrongly_are_noticed(name: str, block: int, change: Change, tiny: Tiny) -> None:
    skeleton = opened(tiny(name))
    given = skeleton.block(block), skeleton.width, skeleton.arguments(1, TOKENS)[block]
    right = skeleton.entries[block][0]
    wrong = change(right)
    assert wrong != right
    assert Trial(given[0], right, *given[1:]).removed() == right
    assert Trial(given[0], wrong, *given[1:]).removed() is None


@pytest.mark.parametrize(
    ("name", "block", "number", "changes"),
    [
        ("llama", 0, 0, {"norm": None}),
        ("granite", 0, 1, {"scale": 1.0}),
        ("gemma4", 0, 0, {"branch_norm": None}),
        ("gemma4", 0, 1, {"sum_scale": None}),
        ("gemma4-e", 0, 2, {"silent": ()}),
        ("gemma4-moe", 0, 1, {"aside": False}),
        ("gemma4-moe", 0, 2, {"joint_norm": None}),
        ("opt-350m", 0, 1, {"sum_norm": None}),
        ("cohere", 0, 1, {"parallel": False}),
        ("deepseek_v3", 1, 1, {"shared": None}),
        ("qwen2_moe", 0, 1, {"shared": None}),
    ],
)
def test_a_block_that_is_taken_apart_wrongly_is_refused(
    name: str, block: int, number: int, changes: dict[str, Any], tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (proof, skeletons):
        monkeypatch.setattr(module, "FAMILIES", {})  # which need no proof
    skeleton = opened(tiny(name))
    proof.prove(skeleton)
    entries = list(skeleton.entries[block])
    assert all(getattr(entries[number], field) != value for field, value in changes.items())
    entries[number] = replace(entries[number], **changes)
    skeleton.entries[block], skeleton.proven = tuple(entries), False
    skeleton._places.clear()
    with pytest.raises(CheckpointError, match=rf"block {block}, rebuilt .* differs .* own by|cannot run block {block}"):
        proof.prove(skeleton)


# Blocks that are refused.


def test_a_block_that_reads_token_ids_is_refused(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def model(self: Any, input_ids: torch.Tensor, **others: Any) -> Any:
        x = self.embed_tokens(input_ids)
        for block in self.layers:
            x = block(x, ids=input_ids)
        return self.norm(x)

    monkeypatch.setattr(LlamaModel, "forward", model)
    monkeypatch.setattr(LlamaDecoderLayer, "forward", lambda self, hidden_states, ids=None: hidden_states)
    with pytest.raises(CheckpointError, match="read ids, which depends on the tokens: this is not supported"):
        opened(tiny("llama"))


def test_blocks_that_share_weights_are_refused(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = LlamaModel.__init__

    def build(self: Any, config: Any) -> None:
        usual(self, config)
        self.layers[2].mlp = self.layers[0].mlp

    path = tiny("llama")
    monkeypatch.setattr(LlamaModel, "__init__", build)
    with pytest.raises(CheckpointError, match="blocks of llama models share weights: this is not supported"):
        opened(path)


def test_a_block_that_reads_what_another_returns_is_refused(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny("llama")

    def model(self: Any, input_ids: torch.Tensor, **others: Any) -> Any:
        x, previous = self.embed_tokens(input_ids), None
        for block in self.layers:
            x, previous = block(x, previous=previous)
        return self.norm(x)

    def block(self: Any, hidden_states: torch.Tensor, previous: Any = None) -> Any:
        return hidden_states, hidden_states

    monkeypatch.setattr(LlamaModel, "forward", model)
    monkeypatch.setattr(LlamaDecoderLayer, "forward", block)
    with pytest.raises(CheckpointError, match="read previous, which earlier blocks return: this is not supported"):
        opened(path)


@pytest.mark.parametrize("name", STRUCTURES)
def test_blocks_of_a_pruned_model_are_those_of_the_dense_one(
    name: str, tiny: Tiny, pruned: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before they are resized: so what was inferred of one in this process is known of the other."""
    found = []
    for path in (tiny(name), pruned(name)):
        known = OrderedDict[Any, Any]()
        monkeypatch.setattr(skeletons, "_KNOWN", known)
        opened(path)
        found.append(known)
    assert found[0] == found[1]


def test_all_kinds_are_known() -> None:
    later = {"qwen2_moe", "gpt_oss", "deepseek_v3", "qwen3_5", "nemotron_h", "lfm2", "cohere"}
    later |= {"gemma4", "gemma4-e", "gemma4-moe", "llama4"}
    assert TINY.keys() == ENTRIES.keys() | later


def test_rotary_tables_with_a_factor_depend_on_no_token_in_any_dtype(tmp_path: Path) -> None:
    """YaRN's tables are multiplied by a factor and rounded to the computing dtype."""
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    path = make_tiny(tmp_path / "yarn", "llama", rope_parameters=yarn)
    for dtype in ("float32", "bfloat16"):
        assert open_skeleton(path, torch.device("cpu"), dtype).all_sites()


@pytest.mark.parametrize(
    "name", ["opt", "cohere", "falcon", "deepseek_v3", "qwen2_moe", "gpt_oss", "qwen3_5", "nemotron_h", "lfm2"]
)
def test_released_sublayers_keep_only_norms_and_factors(name: str, tiny: Tiny) -> None:
    skeleton = opened(tiny(name))
    x = torch.randn(2, 12, skeleton.width, generator=torch.Generator().manual_seed(0))
    for index in range(len(skeleton)):
        block, arguments = skeleton.build_block(index, skeleton.read_block(index)), skeleton.arguments(2, 12)[index]
        twin, wanted, stream = block.twin(), block(x, arguments), x
        for sublayer in block.sublayers:
            stream = sublayer(stream, x, arguments)
            sublayer.release()
        assert torch.equal(stream, wanted)
        assert torch.equal(twin(x, arguments), wanted)
        assert sum(weight.numel() for weight in block.weights.values()) <= 4 * skeleton.width
