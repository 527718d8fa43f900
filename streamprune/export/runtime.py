"""Which of llama.cpp's architectures can say a checkpoint, and what it wants changed: a table.

llama.cpp builds most architectures from one number of heads and one FFN width; a few take a number a block.
What none of them can say is refused here, before anything is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from ..errors import CheckpointError
from ..model.skeleton import Skeleton
from ..site import Site


@dataclass(frozen=True)
class Runtime:
    """One of llama.cpp's architectures. Linears go by their names inside transformers' block."""

    name: str
    activation: str = "silu"
    """The FFN's, as transformers calls it: it is part of the architecture."""
    biases: frozenset[str] = frozenset()
    """Linears that may have a bias."""
    paired: frozenset[str] = frozenset()
    """Linears whose heads' rows it wants as ``0, d/2, 1, d/2+1, ...``, since it turns neighbours in its rotary embedding."""
    fused: Mapping[str, Sequence[str]] = field(default_factory=lambda: MappingProxyType({}))
    """Its own names of tensors that hold several linears, rows behind rows."""
    factors: bool = False
    """Whether it divides the rotary frequencies by a tensor of factors."""
    own_head: bool = True
    """Whether the head may differ from the embedding."""
    full_heads: bool = False
    """Whether all query heads together must be as wide as the residual stream."""


@dataclass(frozen=True)
class Entry:
    """How llama.cpp runs one `model_type`."""

    uniform: Runtime
    """For blocks that are alike."""
    free: Runtime | None = None
    """With a number a block; None where llama.cpp has nothing that fits."""
    obstacle: str = ""
    """Why not."""


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

RUNTIMES = {
    "llama": Entry(LLAMA, DECI),
    "mistral": Entry(LLAMA, DECI),
    "qwen2": Entry(
        QWEN2, obstacle="none of its architectures with a number a block takes the biases of qwen2's attention"
    ),
    "qwen3": Entry(QWEN3, OPENELM),
    "gpt2": Entry(GPT2, obstacle="none of its architectures with a number a block has gpt2's LayerNorms and positions"),
}


def choose(skeleton: Skeleton) -> Runtime:
    """The architecture that runs a checkpoint.

    Raises:
        CheckpointError: none can; says why and which option of `run` avoids it.
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
            f"{where}: the blocks differ in width, which llama.cpp cannot run for {model_type} ({entry.obstacle}); "
            "prune with --layout uniform"
        )
    else:
        runtime = entry.free
    _check(skeleton, runtime, sites)
    return runtime


def are_alike(sites: Sequence[Site]) -> bool:
    """Whether every block has the same heads and channels."""
    return len({(site.kind, site.heads, site.units, site.width) for site in sites}) == len(
        {site.kind for site in sites}
    )


def _check(skeleton: Skeleton, runtime: Runtime, sites: Sequence[Site]) -> None:
    where, config = skeleton.checkpoint.directory, skeleton.config
    hint = "" if are_alike(sites) else "; prune with --layout uniform"
    activation = getattr(config, "hidden_act", None) or getattr(config, "activation_function", None)
    if activation != runtime.activation:
        raise CheckpointError(
            f"{where}: the activation is {activation!r}; llama.cpp's {runtime.name} has {runtime.activation!r} only"
        )
    names = skeleton.block_names(0)
    for name in names:
        linear, _, leaf = name.rpartition(".")
        # A norm's weight has one dimension.
        has_bias = leaf == "bias" and len(skeleton.checkpoint[names[f"{linear}.weight"]].shape) > 1
        if has_bias and linear not in runtime.biases:
            raise CheckpointError(f"{where}: {linear} has a bias, which llama.cpp's {runtime.name} cannot take{hint}")
    if not runtime.own_head and not skeleton.tied:
        raise CheckpointError(
            f"{where}: the head is not the embedding; the one architecture of llama.cpp with a number a block that fits "
            f"{skeleton.architecture.model_type} ({runtime.name}) ties them{hint}"
        )
    for site in sites:
        if runtime.full_heads and site.heads and site.columns != skeleton.width:
            raise CheckpointError(
                f"{where}: {site.heads} query heads of {site.head_width} columns; llama.cpp's {runtime.name} wants "
                f"{skeleton.width} columns together, so only FFN channels can go: prune with --layout uniform"
            )
