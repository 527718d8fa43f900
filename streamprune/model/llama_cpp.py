"""Table of llama.cpp's architectures: which one can represent a checkpoint, and what must be converted for it.

llama.cpp builds most architectures with one number of heads and one FFN width; a few take numbers per block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..errors import CheckpointError
from .names import canonical
from .site import Site, routed
from .skeleton import Skeleton


@dataclass(frozen=True)
class Runtime:
    """One of llama.cpp's architectures. Linears have their names from transformers' block."""

    name: str
    activation: str = "silu"
    """Activation of the FFN, by transformers' name. It is fixed by the architecture."""
    biases: tuple[str, ...] = ()
    """Prefixes of the linears that may have a bias."""
    paired: bool = False
    """Whether the rotary embedding rotates neighbouring pairs: each head's rows in the query and key projections must be
    reordered as ``0, d/2, 1, d/2+1, ...``."""
    fused: bool = False
    """Whether the rows of the query, key and value projections are concatenated in one tensor."""
    transposed: bool = False
    """Whether transformers stores the blocks' matrices transposed (its `Conv1D`)."""
    factors: bool = False
    """Whether it divides the rotary frequencies by a tensor of factors."""
    tied: bool = False
    """Whether the head must be the embedding."""
    stored_head: bool = False
    """Whether the head must be stored even if it is tied to the embedding."""
    full_heads: bool = False
    """Whether all query heads together must be as wide as the residual stream."""
    slides: bool = False
    """Whether it supports the sliding windows of the model."""
    norm_shift: float = 0.0
    """Constant to add to the weights of norms."""
    assumes: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    """Fields of the config that it assumes, with a function from the config to the assumed value."""


def _sliding(period: int) -> Callable[[Any], list[str]]:
    """Return the layer types of a model in which every `period`-th block has full attention."""
    kinds = ["sliding_attention"] * (period - 1) + ["full_attention"]
    return lambda config: [kinds[index % period] for index in range(config.num_hidden_layers)]


def _query_scale(largest: int) -> Callable[[Any], int]:
    """Return Gemma's query scale: the head width, except in the largest model, identified by its number of blocks."""
    return lambda c: c.hidden_size // c.num_attention_heads if c.num_hidden_layers == largest else c.head_dim


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

_gemma = partial(Runtime, activation="gelu_pytorch_tanh", slides=True, norm_shift=1.0, tied=True)
_llama = Runtime("llama", biases=("self_attn.", "mlp."), paired=True, factors=True)
_deci = Runtime("deci", biases=("mlp.",), paired=True, factors=True)

RUNTIMES = {
    "llama": _llama,
    "mistral": _llama,
    "mixtral": _llama,
    "qwen2": Runtime("qwen2", biases=QKV),
    "qwen3": Runtime("qwen3"),
    "gpt2": Runtime("gpt2", activation="gelu_new", biases=("attn.", "mlp."), transposed=True, full_heads=True),
    "granite": Runtime("granite", biases=_llama.biases, paired=True),
    "smollm3": Runtime(
        "smollm3",
        paired=True,
        assumes={"no_rope_layers": lambda c: [int((i + 1) % 4 != 0) for i in range(c.num_hidden_layers)]},
    ),
    "gemma2": _gemma("gemma2", assumes={"query_pre_attn_scalar": _query_scale(46), "layer_types": _sliding(2)}),
    "gemma3_text": _gemma(
        "gemma3",
        assumes={
            "query_pre_attn_scalar": _query_scale(62),
            "layer_types": _sliding(6),
            "final_logit_softcapping": lambda c: None,
            "attn_logit_softcapping": lambda c: None,
        },
    ),
    "olmo2": Runtime("olmo2", full_heads=True, stored_head=True),
    "phi3": Runtime("phi3", full_heads=True),
    "starcoder2": Runtime(
        "starcoder2",
        activation="gelu_pytorch_tanh",
        biases=_llama.biases,
        full_heads=True,
        assumes={"use_bias": lambda c: True},
    ),
    "qwen3_moe": Runtime(
        "qwen3moe",
        assumes={"norm_topk_prob": lambda c: True, "decoder_sparse_step": lambda c: 1, "mlp_only_layers": lambda c: []},
    ),
    "olmoe": Runtime("olmoe", full_heads=True, stored_head=True, assumes={"norm_topk_prob": lambda c: False}),
}
"""By `model_type`: the architecture for blocks of equal widths."""
PER_BLOCK = {"llama": _deci, "mistral": _deci, "qwen3": Runtime("openelm", fused=True, tied=True)}
"""By `model_type`: the architecture with widths per block, if there is one."""


def choose(skeleton: Skeleton) -> Runtime:
    """Return the architecture that can run a checkpoint.

    Raises:
        CheckpointError: none can. The message says why, and which option of `run` avoids it.
    """
    where, model_type = skeleton.checkpoint.directory, skeleton.architecture.model_type
    if model_type not in RUNTIMES:
        raise CheckpointError(
            f"{where}: export knows no GGUF architecture for model_type {model_type!r}; it knows {', '.join(sorted(RUNTIMES))}"
        )
    for index, entries in enumerate(skeleton.entries):
        for entry in entries:
            if entry.gone:
                raise CheckpointError(
                    f"{where}: the {entry.kind} of block {index} is gone as a whole, which export does not support; prune with "
                    "--layout uniform, or with --set sublayers=off"
                )
    alike = are_alike(skeleton.all_sites())
    pruned = skeleton.checkpoint.config["model_type"] != model_type
    hint = "; prune with --layout uniform" if pruned and not alike else ""
    uniform = RUNTIMES[model_type]
    runtime = uniform if alike else PER_BLOCK.get(model_type)
    if runtime is None:
        raise CheckpointError(
            f"{where}: the blocks differ in width, or in their number of experts, but llama.cpp's {uniform.name} builds all of them alike{hint}"
        )
    for obstacle in _obstacles(skeleton, runtime):
        raise CheckpointError(f"{where}: {obstacle}{hint}")
    return runtime


def are_alike(sites: Sequence[Site]) -> bool:
    """Return whether all blocks have the same numbers of heads, channels and routed experts."""
    widths = {(site.kind, site.heads, site.units, site.width) for site in sites}
    return len(widths) == len({site.kind for site in sites}) and len({*map(len, routed(sites).values())}) <= 1


def _obstacles(skeleton: Skeleton, runtime: Runtime) -> Iterator[str]:
    """Yield the reasons why an architecture cannot represent a checkpoint."""
    config = skeleton.config
    names = ("hidden_activation", "hidden_act", "activation_function")
    activation = next((found for name in names if (found := getattr(config, name, None))), None)
    if canonical(activation) != canonical(runtime.activation):
        yield f"the activation is {activation!r}; llama.cpp's {runtime.name} supports only {runtime.activation!r}"
    for name, expected in runtime.assumes.items():
        if (value := getattr(config, name, None)) != expected(config):
            yield f"{name} is {value}; llama.cpp's {runtime.name} assumes {expected(config)}"
    for linear in skeleton.linears(0):
        if f"{linear}.bias" in skeleton.block_names(0) and not linear.startswith(runtime.biases):
            yield f"{linear} has a bias, which llama.cpp's {runtime.name} does not support"
    if runtime.tied and not skeleton.outside.tied:
        yield f"the head is not tied to the embedding, as llama.cpp's {runtime.name} requires"
    for site in skeleton.all_sites():
        if runtime.full_heads and site.heads and site.columns != skeleton.width:
            yield (
                f"{site.heads} query heads of {site.head_width} columns; llama.cpp's {runtime.name} requires "
                f"{skeleton.width} columns together, so only FFN channels can be pruned: use --layout uniform"
            )
