"""The table of architectures: names, not classes.

A block is a sequence of sublayers, and every sublayer is one site::

    z = mixer(norm(x))            the consumer's input; the mixer holds the producers
    y = x + consumer(z)

All of transformers' attention and FFN modules of the table fit once their last linear, the consumer, is
taken out of them. A new architecture of this shape is one entry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError
from ..site import Kind, Site


@dataclass(frozen=True)
class Producer:
    """A linear whose output rows go with the units."""

    name: str
    parts: int = 1
    """Equal stretches of its output, each of them grouped by units: 3 where q, k and v are fused."""


@dataclass(frozen=True)
class SublayerEntry:
    """Names inside a block."""

    kind: Kind
    norm: str
    mixer: tuple[str, ...]
    """Modules run in turn between the norm and the consumer; the consumer's place in them is bypassed."""
    producers: tuple[Producer, ...]
    consumer: str
    counts: tuple[str, ...] = ()
    """Module attributes that shrink with the units, such as a number of heads."""
    widths: tuple[tuple[str, str], ...] = ()
    """Fields of a stock config, each with the attribute of `Site` that it holds; empty where a stock config
    cannot say fewer units."""


@dataclass(frozen=True)
class Architecture:
    """One `model_type`."""

    model_type: str
    sublayers: tuple[SublayerEntry, ...]
    blocks: str = "model.layers"
    embed: tuple[str, ...] = ("model.embed_tokens",)
    final: tuple[str, ...] = ("model.norm",)
    """Modules between the last block and the head, in order; those a config leaves out are skipped."""
    head: str = "lm_head"
    norm_after: Callable[[Any], bool] = lambda config: False
    """Whether the norm follows the residual sum instead of opening the sublayer."""

    @property
    def linears(self) -> list[str]:
        """All linears of a block: the producers of every sublayer, then its consumer."""
        return [name for entry in self.sublayers for name in (*(p.name for p in entry.producers), entry.consumer)]

    @property
    def base(self) -> str:
        """The module that holds the blocks."""
        return self.blocks.rpartition(".")[0]


_ATTENTION = SublayerEntry(
    kind="attention",
    norm="input_layernorm",
    mixer=("self_attn",),
    producers=(Producer("self_attn.q_proj"), Producer("self_attn.k_proj"), Producer("self_attn.v_proj")),
    consumer="self_attn.o_proj",
    widths=(("num_attention_heads", "heads"), ("num_key_value_heads", "units"), ("head_dim", "head_width")),
)
_GATED = SublayerEntry(
    kind="ffn",
    norm="post_attention_layernorm",
    mixer=("mlp",),
    producers=(Producer("mlp.gate_proj"), Producer("mlp.up_proj")),
    consumer="mlp.down_proj",
    widths=(("intermediate_size", "columns"),),
)
_OPT_ATTENTION = SublayerEntry(
    kind="attention",
    norm="self_attn_layer_norm",
    mixer=("self_attn",),
    producers=(Producer("self_attn.q_proj"), Producer("self_attn.k_proj"), Producer("self_attn.v_proj")),
    consumer="self_attn.out_proj",
    counts=("self_attn.num_heads",),
)
_OPT_FFN = SublayerEntry(
    kind="ffn",
    norm="final_layer_norm",
    mixer=("fc1", "activation_fn"),
    producers=(Producer("fc1"),),
    consumer="fc2",
    widths=(("ffn_dim", "columns"),),
)
_GPT2_ATTENTION = SublayerEntry(
    kind="attention",
    norm="ln_1",
    mixer=("attn",),
    producers=(Producer("attn.c_attn", parts=3),),
    consumer="attn.c_proj",
    counts=("attn.num_heads", "attn.split_size"),
)
_GPT2_FFN = SublayerEntry(
    kind="ffn",
    norm="ln_2",
    mixer=("mlp",),
    producers=(Producer("mlp.c_fc"),),
    consumer="mlp.c_proj",
    widths=(("n_inner", "columns"),),
)

ARCHITECTURES = {
    entry.model_type: entry
    for entry in (
        Architecture("llama", (_ATTENTION, _GATED)),
        Architecture("mistral", (_ATTENTION, _GATED)),
        Architecture("qwen2", (_ATTENTION, _GATED)),
        Architecture("qwen3", (_ATTENTION, _GATED)),
        Architecture(
            "opt",
            (_OPT_ATTENTION, _OPT_FFN),
            blocks="model.decoder.layers",
            embed=("model.decoder.embed_tokens", "model.decoder.embed_positions", "model.decoder.project_in"),
            final=("model.decoder.final_layer_norm", "model.decoder.project_out"),
            norm_after=lambda config: not config.do_layer_norm_before,
        ),
        Architecture(
            "gpt2",
            (_GPT2_ATTENTION, _GPT2_FFN),
            blocks="transformer.h",
            embed=("transformer.wte", "transformer.wpe"),
            final=("transformer.ln_f",),
        ),
    )
}


def architecture_of(model_type: str | None, where: str) -> Architecture:
    """The table's entry.

    Raises:
        CheckpointError: not in the table.
    """
    entry = ARCHITECTURES.get(model_type or "")
    if entry is None:
        raise CheckpointError(
            f"{where}: model_type {model_type!r} is not supported; supported are {', '.join(sorted(ARCHITECTURES))}"
        )
    return entry


def stock_config(architecture: Architecture, config: Mapping[str, Any], sites: Sequence[Site]) -> dict[str, Any]:
    """`config` with the widths of `sites`, one of each kind, in the fields that the stock architecture reads."""
    fields = {"model_type": architecture.model_type}
    for entry in architecture.sublayers:
        site = next(site for site in sites if site.kind == entry.kind)
        fields |= {field: getattr(site, attribute) for field, attribute in entry.widths}
    return {**config, **fields}


def is_stock(architecture: Architecture, config: Mapping[str, Any], sites: Sequence[Site]) -> bool:
    """Whether the stock architecture can say these widths: alike in all blocks, and its config class takes them.

    transformers' `LlamaConfig`, for one, refuses a number of heads that does not divide the width, though
    head_dim is given apart.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for entry in architecture.sublayers:
        alike = [site for site in sites if site.kind == entry.kind]
        if len({(site.units, site.width) for site in alike}) > 1:
            return False
    fields = stock_config(architecture, config, sites)
    fields.pop("model_type")
    try:
        stock = CONFIG_MAPPING[architecture.model_type](**fields)
    except Exception:
        # What the class raises is its own affair (huggingface_hub's validation errors are no ValueErrors).
        return False
    heads = next((site.heads for site in sites if site.kind == "attention"), stock.num_attention_heads)
    return bool(stock.num_attention_heads == heads)
