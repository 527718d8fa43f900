"""Write a GGUF file's metadata: widths, norms, rotary embedding, context."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...model.hub import title
from ...model.skeleton import Skeleton
from ...model.upstream import rotary_frequencies
from .runtime import Runtime, are_alike

_YARN = {
    "attention_factor": None,
    "mscale": None,
    "mscale_all_dim": None,
    "beta_fast": 32,
    "beta_slow": 1,
    "truncate": True,
}
"""YaRN settings that some of llama.cpp's programs assume, whatever the file says."""

_EPSILONS = ("layer_norm_epsilon", "norm_epsilon")


def context_of(skeleton: Skeleton, runtime: Runtime) -> tuple[int, int | None]:
    """Return the context in tokens and, if a sliding window reduces it below the config's context, that window.

    Most of llama.cpp's architectures have no sliding attention. Within one window it equals plain attention.
    """
    config = skeleton.config
    context = skeleton.context or 2048
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None) if kinds is None or "sliding_attention" in kinds else None
    return (window, window) if window and window < context and not runtime.slides else (context, None)


def add_metadata(writer: Any, skeleton: Skeleton, runtime: Runtime, context: int) -> None:
    """Add all metadata but the vocabulary and the rotary embedding to a `GGUFWriter`."""
    config, sites = skeleton.config, skeleton.all_sites()
    attention = [site for site in sites if site.kind == "attention"]
    widths = {
        "head_count": [site.heads for site in attention],
        "head_count_kv": [site.units for site in attention],
        "feed_forward_length": [site.columns for site in sites if site.kind == "ffn"],
    }
    writer.add_name(title(skeleton.checkpoint.directory))
    writer.add_block_count(len(skeleton))
    writer.add_context_length(context)
    writer.add_embedding_length(skeleton.width)
    writer.add_vocab_size(skeleton.vocabulary)
    for name, each in widths.items():
        getattr(writer, f"add_{name}")(each[0] if are_alike(sites) else each)
    writer.add_key_length(attention[0].head_width)
    writer.add_value_length(attention[0].head_width)
    if (epsilon := getattr(config, "rms_norm_eps", None)) is not None:
        writer.add_layer_norm_rms_eps(epsilon)
    else:
        writer.add_layer_norm_eps(next(e for name in _EPSILONS if (e := getattr(config, name, None)) is not None))
    for name, stored in runtime.scales.items():
        if (value := getattr(config, name)) is not None:
            getattr(writer, f"add_{stored}")(float(value))
    if runtime.slides:
        writer.add_sliding_window(config.sliding_window)
    if (used := getattr(config, "num_experts_per_tok", None)) is not None:
        writer.add_expert_count(getattr(config, "num_local_experts", None) or config.num_experts)
        writer.add_expert_used_count(used)
        writer.add_expert_feed_forward_length(widths["feed_forward_length"][0])


def add_rotary(writer: Any, skeleton: Skeleton, runtime: Runtime, head_width: int) -> Tensor | None:
    """Add the rotary embedding to a `GGUFWriter`.

    Returns:
        (head_width / 2,) float32: factors by which the frequencies are divided; None if the model has none.

    Raises:
        CheckpointError: llama.cpp does not support the embedding.
    """
    from gguf.constants import RopeScalingType

    rope: Mapping[str, Any] | None = getattr(skeleton.config, "rope_parameters", None)
    if rope is None:
        return None
    where = skeleton.checkpoint.directory
    if (sliding := rope.get("sliding_attention")) is not None:
        if sliding.get("rope_type", "default") != "default" or sliding["rope_theta"] != 10000.0:
            raise CheckpointError(
                f"{where}: sliding attention turns by {dict(sliding)}; llama.cpp takes a base of 10000"
            )
        rope = rope["full_attention"]
    kind = rope.get("rope_type", "default")
    share = rope.get("partial_rotary_factor", 1.0)
    if share != 1.0:
        raise CheckpointError(
            f"{where}: only {share:g} of each head is rotated, which llama.cpp's {runtime.name} cannot do"
        )
    writer.add_rope_dimension_count(head_width)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind == "yarn" and all(rope.get(name, usual) == usual for name, usual in _YARN.items()):
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        original = rope.get("original_max_position_embeddings") or skeleton.config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(int(original))
    elif kind == "llama3" and runtime.factors:
        return _factors(skeleton, rope, head_width)
    elif kind != "default":
        raise CheckpointError(
            f"{where}: llama.cpp's {runtime.name} has no rotary embedding of type {kind!r} with its settings"
        )
    return None


def _factors(skeleton: Skeleton, rope: Mapping[str, Any], head_width: int) -> Tensor:
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, head_width, 2, dtype=torch.float32) / head_width)
    factors: Tensor = plain / rotary_frequencies(skeleton.config, rope["rope_type"])
    return factors
