"""Table of llama.cpp's architectures: which one can represent a checkpoint, and what must be converted for it.

llama.cpp builds most architectures with one number of heads and one FFN width; a few take numbers per block.
Checkpoints that none of them can represent are rejected here, before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ...errors import CheckpointError
from ...model.names import canonical
from ...model.site import Site
from ...model.skeleton import Skeleton


@dataclass(frozen=True)
class Runtime:
    """One of llama.cpp's architectures. Linears have their names from transformers' block."""

    name: str
    activation: str = "silu"
    """Activation of the FFN, by transformers' name. It is fixed by the architecture."""
    biases: frozenset[str] = frozenset()
    """Linears that may have a bias."""
    paired: frozenset[str] = frozenset()
    """Linears whose rows per head must be reordered as ``0, d/2, 1, d/2+1, ...``: the rotary embedding rotates
    neighbouring pairs."""
    fused: Mapping[str, Sequence[str]] = field(default_factory=lambda: MappingProxyType({}))
    """Fused tensors, by llama.cpp's name: the linears whose rows they concatenate."""
    factors: bool = False
    """Whether it divides the rotary frequencies by a tensor of factors."""
    own_head: bool = True
    """Whether the head may differ from the embedding."""
    full_heads: bool = False
    """Whether all query heads together must be as wide as the residual stream."""
    stored_head: bool = False
    """Whether the head must be stored even if it is tied to the embedding."""
    slides: bool = False
    """Whether it supports the sliding windows of the model."""
    norm_shift: float = 0.0
    """Constant to add to the weights of norms."""
    scales: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Fields of the config to store in the file, with their names there."""
    assumes: Mapping[str, Callable[[Any], Any]] = field(default_factory=lambda: MappingProxyType({}))
    """Fields of the config that it assumes, with a function from the config to the assumed value."""


@dataclass(frozen=True)
class Entry:
    """How llama.cpp runs one `model_type`."""

    uniform: Runtime
    """Architecture for blocks of equal widths."""
    free: Runtime | None = None
    """Architecture with widths per block; None if llama.cpp has none that fits."""
    obstacle: str = ""
    """Why there is none, for messages."""


def _sliding(period: int) -> Callable[[Any], list[str]]:
    """Return the layer types of a model in which every `period`-th block has full attention."""
    kinds = ["sliding_attention"] * (period - 1) + ["full_attention"]
    return lambda config: [kinds[index % period] for index in range(config.num_hidden_layers)]


def _query_scale(largest: int) -> Callable[[Any], int]:
    """Return Gemma's query scale: the head width, except in the largest model, identified by its number of blocks."""
    return lambda c: c.hidden_size // c.num_attention_heads if c.num_hidden_layers == largest else c.head_dim


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_FFN = frozenset(("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"))
_PAIRED = frozenset(_QKV[:2])

LLAMA = Runtime("llama", biases=frozenset((*_QKV, "self_attn.o_proj")) | _FFN, paired=_PAIRED, factors=True)
DECI = Runtime("deci", biases=_FFN, paired=_PAIRED, factors=True)
QWEN2 = Runtime("qwen2", biases=frozenset(_QKV))
QWEN3 = Runtime("qwen3")
OPENELM = Runtime("openelm", fused=MappingProxyType({"attn_qkv": _QKV}), own_head=False)
GPT2 = Runtime(
    "gpt2",
    activation="gelu_new",
    biases=frozenset(("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
    full_heads=True,
)

GRANITE = Runtime(
    "granite",
    biases=LLAMA.biases,
    paired=_PAIRED,
    scales=MappingProxyType(
        {
            "embedding_multiplier": "embedding_scale",
            "residual_multiplier": "residual_scale",
            "attention_multiplier": "attention_scale",
            "logits_scaling": "logit_scale",
        }
    ),
)
SMOLLM3 = Runtime(
    "smollm3",
    paired=_PAIRED,
    assumes=MappingProxyType({"no_rope_layers": lambda c: [int((i + 1) % 4 != 0) for i in range(c.num_hidden_layers)]}),
)
GEMMA2 = Runtime(
    "gemma2",
    activation="gelu_pytorch_tanh",
    slides=True,
    norm_shift=1.0,
    own_head=False,
    scales=MappingProxyType(
        {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}
    ),
    assumes=MappingProxyType({"query_pre_attn_scalar": _query_scale(46), "layer_types": _sliding(2)}),
)
GEMMA3 = Runtime(
    "gemma3",
    activation="gelu_pytorch_tanh",
    slides=True,
    norm_shift=1.0,
    own_head=False,
    assumes=MappingProxyType(
        {
            "query_pre_attn_scalar": _query_scale(62),
            "layer_types": _sliding(6),
            "final_logit_softcapping": lambda c: None,
            "attn_logit_softcapping": lambda c: None,
        }
    ),
)
OLMO2 = Runtime("olmo2", full_heads=True, stored_head=True)
PHI3 = Runtime("phi3", full_heads=True)
STARCODER2 = Runtime(
    "starcoder2",
    activation="gelu_pytorch_tanh",
    biases=frozenset((*_QKV, "self_attn.o_proj", "mlp.c_fc", "mlp.c_proj")),
    full_heads=True,
    assumes=MappingProxyType({"use_bias": lambda c: True}),
)
QWEN3_MOE = Runtime(
    "qwen3moe",
    assumes=MappingProxyType(
        {"norm_topk_prob": lambda c: True, "decoder_sparse_step": lambda c: 1, "mlp_only_layers": lambda c: []}
    ),
)
OLMOE = Runtime(
    "olmoe", full_heads=True, stored_head=True, assumes=MappingProxyType({"norm_topk_prob": lambda c: False})
)

_ALIKE = "it builds every block from the same numbers"
RUNTIMES = {
    "llama": Entry(LLAMA, DECI),
    "mistral": Entry(LLAMA, DECI),
    "qwen2": Entry(
        QWEN2, obstacle="none of its architectures with a number a block takes the biases of qwen2's attention"
    ),
    "qwen3": Entry(QWEN3, OPENELM),
    "gpt2": Entry(GPT2, obstacle=_ALIKE),
    "granite": Entry(GRANITE, obstacle=_ALIKE),
    "smollm3": Entry(SMOLLM3, obstacle=_ALIKE),
    "gemma2": Entry(GEMMA2, obstacle=_ALIKE),
    "gemma3_text": Entry(GEMMA3, obstacle=_ALIKE),
    "olmo2": Entry(OLMO2, obstacle=_ALIKE),
    "phi3": Entry(PHI3, obstacle=_ALIKE),
    "starcoder2": Entry(STARCODER2, obstacle=_ALIKE),
    "mixtral": Entry(LLAMA, obstacle=_ALIKE),
    "qwen3_moe": Entry(QWEN3_MOE, obstacle=_ALIKE),
    "olmoe": Entry(OLMOE, obstacle=_ALIKE),
}


def choose(skeleton: Skeleton) -> Runtime:
    """Return the architecture that can run a checkpoint.

    Raises:
        CheckpointError: none can. The message says why, and which option of `run` avoids it.
    """
    where, model_type = skeleton.checkpoint.directory, skeleton.architecture.model_type
    entry = RUNTIMES.get(model_type)
    if entry is None:
        raise CheckpointError(
            f"{where}: export knows no GGUF architecture for model_type {model_type!r}; it knows {', '.join(sorted(RUNTIMES))}"
        )
    sites = skeleton.all_sites()
    if are_alike(sites):
        runtime = entry.uniform
    elif entry.free is None:
        raise CheckpointError(
            f"{where}: the blocks differ in width, which llama.cpp cannot run for {model_type} ({entry.obstacle})"
            + ("; prune with --layout uniform" if skeleton.checkpoint.config["model_type"] != model_type else "")
        )
    else:
        runtime = entry.free
    _check(skeleton, runtime, sites)
    return runtime


def are_alike(sites: Sequence[Site]) -> bool:
    """Return whether all blocks have the same numbers of heads and channels."""
    return len({(site.kind, site.heads, site.units, site.width) for site in sites}) == len(
        {site.kind for site in sites}
    )


def _check(skeleton: Skeleton, runtime: Runtime, sites: Sequence[Site]) -> None:
    where, config = skeleton.checkpoint.directory, skeleton.config
    hint = "" if are_alike(sites) else "; prune with --layout uniform"
    names = ("hidden_activation", "hidden_act", "activation_function")
    activation = next((found for name in names if (found := getattr(config, name, None))), None)
    if canonical(activation) != canonical(runtime.activation):
        raise CheckpointError(
            f"{where}: the activation is {activation!r}; llama.cpp's {runtime.name} has {runtime.activation!r} only"
        )
    for name, expected in runtime.assumes.items():
        if (value := getattr(config, name, None)) != expected(config):
            raise CheckpointError(
                f"{where}: {name} is {value}; llama.cpp's {runtime.name} takes {expected(config)} for granted"
            )
    tensors = skeleton.block_names(0)
    for name in tensors:
        linear, _, leaf = name.rpartition(".")
        # A norm's weight has one dimension.
        has_bias = leaf == "bias" and len(skeleton.checkpoint[tensors[f"{linear}.weight"]].shape) > 1
        if has_bias and linear not in runtime.biases:
            raise CheckpointError(f"{where}: {linear} has a bias, which llama.cpp's {runtime.name} cannot take{hint}")
    if not runtime.own_head and not skeleton.tied:
        raise CheckpointError(
            f"{where}: the head is not the embedding; the architecture of llama.cpp that fits ({runtime.name}) ties them{hint}"
        )
    for site in sites:
        if runtime.full_heads and site.heads and site.columns != skeleton.width:
            raise CheckpointError(
                f"{where}: {site.heads} query heads of {site.head_width} columns; llama.cpp's {runtime.name} wants "
                f"{skeleton.width} columns together, so only FFN channels can go: prune with --layout uniform"
            )
