"""The table of supported architectures: module names, not classes.

A block is a sequence of sublayers. A sublayer reads the residual stream and adds to it::

    u = norm(x)                   input of the producers
    z = mixer(u)                  input of the consumer; the mixer contains the producers
    y = x + scale · branch_norm(consumer(z))

A norm of the sum may follow. With parallel residuals, all sublayers of a block read the block's input. Each sublayer is one
site; with a mixture of experts, each expert is one site. All attention and FFN modules of the table have this form once
their last linear, the consumer, is taken out. Adding an architecture of this form takes one entry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..errors import CheckpointError
from .site import Kind, Site

Part = Literal["rows", "columns", "heads"]
"""A range of a module's rows, grouped by unit: all rows, as many rows as the consumer has columns, or one head per unit."""


@dataclass(frozen=True)
class Producer:
    """A module whose output rows are removed with the units: a linear, or a norm over all heads."""

    name: str
    parts: tuple[Part, ...] = ("rows",)
    """Ranges of its rows, in order; several if projections are fused one after the other."""

    def stretches(self, site: Site, rows: int) -> list[int]:
        """Return the number of rows of each part; `rows` is the total of the module."""
        sizes = {"rows": rows, "columns": site.columns, "heads": site.units * site.head_width}
        return [sizes[part] for part in self.parts]


@dataclass(frozen=True)
class SublayerEntry:
    """One sublayer: names of modules and attributes, relative to the block."""

    kind: Kind
    mixer: tuple[str, ...]
    """Modules between the norm and the consumer, run in order. A consumer inside one of them is replaced by the identity."""
    producers: tuple[Producer, ...]
    consumer: str
    norm: str | None = None  # norm of the residual stream before the producers
    branch_norm: str | None = None  # norm of the consumer's output before it is added to the stream
    sum_norm: str | None = None  # norm of the sum
    scale: float = 1.0  # factor on the addition to the stream
    parallel: bool = False  # whether the sublayer reads the block's input instead of the previous sublayer's output
    vectors: tuple[Producer, ...] = ()  # norms whose weights are removed with the units
    counts: tuple[str, ...] = ()
    """Attributes that shrink with the units, such as head counts. ``config`` in a path is the block's own view of the config."""
    widths: tuple[tuple[str, str], ...] = ()
    """Fields of the stock config and the attribute of `Site` that each holds; empty if the stock config cannot express
    fewer units."""
    fixed: bool = False  # whether no unit can be removed, because code outside the block depends on their number
    repeats: bool = False  # whether the cache stores a key and a value per query head rather than per unit
    experts: str | None = None
    """The list of experts, each with `producers` and `consumer`; None if the sublayer is a single site."""
    router: str | None = None
    """The module that routes tokens to experts. It is never changed."""

    def expert(self, number: int) -> SublayerEntry:
        """Return the entry of one expert, with names relative to the block."""
        inside = f"{self.experts}.{number}."
        producers = tuple(replace(producer, name=inside + producer.name) for producer in self.producers)
        return replace(self, producers=producers, consumer=inside + self.consumer)

    @property
    def family(self) -> str:
        """The family of its sites. A stock config describes all sites of a family by the same fields."""
        return "experts" if self.experts else self.kind


Sublayers = Callable[[Any, int], tuple[SublayerEntry, ...]]
"""Maps a config and a block number to the block's sublayers, in execution order."""


@dataclass(frozen=True)
class Architecture:
    """One supported `model_type`: where its blocks, embeddings, norms and head are."""

    model_type: str
    sublayers: Sublayers
    blocks: str = "model.layers"
    embed: tuple[str, ...] = ("model.embed_tokens",)
    final: tuple[str, ...] = ("model.norm",)
    """Modules between the last block and the head, in order. Modules that a config omits are skipped."""
    head: str = "lm_head"
    stored: tuple[tuple[str, str], ...] = ()
    """Substrings of tensor names that may differ in a checkpoint: (in the model, in the checkpoint)."""

    @property
    def base(self) -> str:
        return self.blocks.rpartition(".")[0]


_QKV = (Producer("self_attn.q_proj"), Producer("self_attn.k_proj"), Producer("self_attn.v_proj"))
_HEADS = (("num_attention_heads", "heads"), ("num_key_value_heads", "units"), ("head_dim", "head_width"))
_WIDTH = (("intermediate_size", "columns"),)

_ATTENTION = SublayerEntry(
    kind="attention",
    norm="input_layernorm",
    mixer=("self_attn",),
    producers=_QKV,
    consumer="self_attn.o_proj",
    widths=_HEADS,
)
_GATED = SublayerEntry(
    kind="ffn",
    norm="post_attention_layernorm",
    mixer=("mlp",),
    producers=(Producer("mlp.gate_proj"), Producer("mlp.up_proj")),
    consumer="mlp.down_proj",
    widths=_WIDTH,
)
_EXPERTS = replace(
    _GATED,
    producers=(Producer("gate_proj"), Producer("up_proj")),
    consumer="down_proj",
    experts="mlp.experts",
    router="mlp.gate",
)
_HEAD_NORMS = (Producer("self_attn.q_norm", ("columns",)), Producer("self_attn.k_norm", ("heads",)))


def _alike(*entries: SublayerEntry) -> Sublayers:
    """Use the same sublayers in every block."""
    return lambda config, block: entries


def _granite(config: Any, block: int) -> tuple[SublayerEntry, ...]:
    """A factor on the addition of each sublayer."""
    scale = float(config.residual_multiplier)
    return replace(_ATTENTION, scale=scale), replace(_GATED, scale=scale)


def _opt(config: Any, block: int) -> tuple[SublayerEntry, ...]:
    """The norm comes before the sublayer or, in OPT-350m, after the sum."""
    attention = SublayerEntry(
        kind="attention",
        mixer=("self_attn",),
        producers=_QKV,
        consumer="self_attn.out_proj",
        counts=("self_attn.num_heads",),
    )
    ffn = SublayerEntry(
        kind="ffn",
        mixer=("fc1", "activation_fn"),
        producers=(Producer("fc1"),),
        consumer="fc2",
        widths=(("ffn_dim", "columns"),),
    )
    norms = "self_attn_layer_norm", "final_layer_norm"
    if config.do_layer_norm_before:
        return replace(attention, norm=norms[0]), replace(ffn, norm=norms[1])
    return replace(attention, sum_norm=norms[0]), replace(ffn, sum_norm=norms[1])


def _gpt_neox(config: Any, block: int) -> tuple[SublayerEntry, ...]:
    """The fused projection is grouped by head: q, k and v of one head are adjacent."""
    attention = SublayerEntry(
        kind="attention",
        norm="input_layernorm",
        mixer=("attention",),
        producers=(Producer("attention.query_key_value"),),
        consumer="attention.dense",
    )
    ffn = SublayerEntry(
        kind="ffn",
        norm="post_attention_layernorm",
        mixer=("mlp",),
        producers=(Producer("mlp.dense_h_to_4h"),),
        consumer="mlp.dense_4h_to_h",
        parallel=bool(config.use_parallel_residual),
        widths=_WIDTH,
    )
    return attention, ffn


def _falcon(config: Any, block: int) -> tuple[SublayerEntry, ...]:
    """The fused projection is grouped by key/value group. Sublayers are parallel with one norm or two, or sequential."""
    parallel = bool(config.parallel_attn or config.new_decoder_architecture)
    norms = "input_layernorm", "input_layernorm" if parallel else "post_attention_layernorm"
    # If the config leaves the number open, the model class sets it to two.
    if config.new_decoder_architecture and config.num_ln_in_parallel_attn in (None, 2):
        norms = "ln_attn", "ln_mlp"
    attention = SublayerEntry(
        kind="attention",
        norm=norms[0],
        mixer=("self_attention",),
        producers=(Producer("self_attention.query_key_value"),),
        consumer="self_attention.dense",
        counts=("self_attention.num_heads", "self_attention.num_kv_heads"),
        repeats=bool(config.new_decoder_architecture),
        fixed=bool(config.alibi),  # the model passes every block one slope per head
    )
    ffn = SublayerEntry(
        kind="ffn",
        norm=norms[1],
        mixer=("mlp",),
        producers=(Producer("mlp.dense_h_to_4h"),),
        consumer="mlp.dense_4h_to_h",
        parallel=parallel,
        widths=(("ffn_hidden_size", "columns"),),
    )
    return attention, ffn


def _qwen3_moe(config: Any, block: int) -> tuple[SublayerEntry, ...]:
    """Some blocks may have a plain FFN instead of experts."""
    sparse = config.num_experts > 0 and (block + 1) % config.decoder_sparse_step == 0
    if sparse and block not in (config.mlp_only_layers or ()):
        return _ATTENTION, replace(_EXPERTS, widths=(("moe_intermediate_size", "columns"),))
    return _ATTENTION, _GATED


_GEMMA = _alike(
    replace(_ATTENTION, branch_norm="post_attention_layernorm"),
    replace(_GATED, norm="pre_feedforward_layernorm", branch_norm="post_feedforward_layernorm"),
)
_OLMO2 = _alike(
    replace(_ATTENTION, norm=None, branch_norm="post_attention_layernorm", vectors=_HEAD_NORMS),
    replace(_GATED, norm=None, branch_norm="post_feedforward_layernorm"),
)
_PHI3 = _alike(
    replace(
        _ATTENTION,
        producers=(Producer("self_attn.qkv_proj", ("columns", "heads", "heads")),),
        counts=("self_attn.num_key_value_heads", "self_attn.config.num_attention_heads"),
    ),
    replace(_GATED, producers=(Producer("mlp.gate_up_proj", ("columns", "columns")),)),
)
_STARCODER2 = _alike(
    _ATTENTION,
    replace(_GATED, producers=(Producer("mlp.c_fc"),), consumer="mlp.c_proj"),
)
_GPT2 = _alike(
    SublayerEntry(
        kind="attention",
        norm="ln_1",
        mixer=("attn",),
        producers=(Producer("attn.c_attn", ("columns", "heads", "heads")),),
        consumer="attn.c_proj",
        counts=("attn.num_heads", "attn.split_size"),
    ),
    SublayerEntry(
        kind="ffn",
        norm="ln_2",
        mixer=("mlp",),
        producers=(Producer("mlp.c_fc"),),
        consumer="mlp.c_proj",
        widths=(("n_inner", "columns"),),
    ),
)

ARCHITECTURES = {
    entry.model_type: entry
    for entry in (
        *(
            Architecture(model_type, _alike(_ATTENTION, _GATED))
            for model_type in ("llama", "mistral", "qwen2", "qwen3", "smollm3")
        ),
        Architecture("granite", _granite),
        Architecture("gemma2", _GEMMA),
        Architecture("gemma3_text", _GEMMA),
        Architecture("olmo2", _OLMO2),
        Architecture("phi3", _PHI3),
        Architecture("starcoder2", _STARCODER2),
        Architecture(
            "opt",
            _opt,
            blocks="model.decoder.layers",
            embed=("model.decoder.embed_tokens", "model.decoder.embed_positions", "model.decoder.project_in"),
            final=("model.decoder.final_layer_norm", "model.decoder.project_out"),
        ),
        Architecture(
            "gpt2",
            _GPT2,
            blocks="transformer.h",
            embed=("transformer.wte", "transformer.wpe"),
            final=("transformer.ln_f",),
        ),
        Architecture(
            "gpt_neox",
            _gpt_neox,
            blocks="gpt_neox.layers",
            embed=("gpt_neox.embed_in",),
            final=("gpt_neox.final_layer_norm",),
            stored=(("lm_head.", "embed_out."),),
        ),
        Architecture(
            "falcon",
            _falcon,
            blocks="transformer.h",
            embed=("transformer.word_embeddings",),
            final=("transformer.ln_f",),
        ),
        Architecture(
            "mixtral",
            _alike(_ATTENTION, replace(_EXPERTS, widths=_WIDTH)),
            stored=(
                (".mlp.", ".block_sparse_moe."),
                (".gate_proj.", ".w1."),
                (".down_proj.", ".w2."),
                (".up_proj.", ".w3."),
            ),
        ),
        Architecture("qwen3_moe", _qwen3_moe),
        Architecture(
            "olmoe",
            _alike(
                # The class ties the widths of the head norms to the residual width.
                replace(_ATTENTION, vectors=_HEAD_NORMS, widths=()),
                replace(_EXPERTS, widths=_WIDTH),
            ),
        ),
    )
}


def architecture_of(model_type: str | None, where: str) -> Architecture:
    """Return the table entry of a model_type. Raises a CheckpointError if there is none; `where` is the model directory."""
    entry = ARCHITECTURES.get(model_type or "")
    if entry is None:
        raise CheckpointError(
            f"{where}: model_type {model_type!r} is not supported; supported are {', '.join(sorted(ARCHITECTURES))}"
        )
    return entry


def stock_config(
    model_type: str, entries: Mapping[str, SublayerEntry], config: Mapping[str, Any], sites: Sequence[Site]
) -> dict[str, Any]:
    """Return `config` with the widths of `sites` in the fields that the stock architecture reads.

    The widths of each family, by name with its sublayer entry, are those of its first site.
    """
    fields = {"model_type": model_type}
    for family, entry in entries.items():
        site = next(site for site in sites if site.family == family)
        fields |= {field: getattr(site, attribute) for field, attribute in entry.widths}
    return {**config, **fields}


def is_stock(
    model_type: str, entries: Mapping[str, SublayerEntry], config: Mapping[str, Any], sites: Sequence[Site]
) -> bool:
    """Return whether the stock architecture can express these widths: equal in all blocks, and accepted by its config class.

    For example, transformers' `LlamaConfig` rejects a number of heads that does not divide the residual width, even if
    head_dim is set.
    """
    from transformers import CONFIG_MAPPING

    for family in entries:
        if len({(site.units, site.width) for site in sites if site.family == family}) > 1:
            return False
    fields = stock_config(model_type, entries, config, sites)
    fields.pop("model_type")
    try:
        stock = CONFIG_MAPPING[model_type](**fields)
    except Exception:
        # Config classes raise errors of any type (huggingface_hub's validation errors are not ValueErrors).
        return False
    heads = next((site.heads for site in sites if site.kind == "attention"), stock.num_attention_heads)
    return bool(stock.num_attention_heads == heads)
