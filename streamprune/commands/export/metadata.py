"""Write a GGUF file's metadata: widths, norms, rotary embedding, context."""

from __future__ import annotations

from typing import Any

import torch
from gguf import GGUFWriter, RopeScalingType
from torch import Tensor

from ...errors import CheckpointError
from ...model.hub import title
from ...model.llama_cpp import Runtime, are_alike
from ...model.site import routed
from ...model.skeleton import Skeleton
from ...model.upstream import rotary_frequencies

_SCALES = {
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention_scale",
    "logits_scaling": "logit_scale",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
"""Scales of Granite and Gemma 2: fields of the config, with their names in `GGUFWriter`."""

_YARN = {
    "attention_factor": None,
    "mscale": None,
    "mscale_all_dim": None,
    "beta_fast": 32,
    "beta_slow": 1,
    "truncate": True,
}
"""YaRN settings that some of llama.cpp's programs assume, whatever the file says."""


def context_of(skeleton: Skeleton, runtime: Runtime) -> tuple[int, int | None]:
    """Return the context in tokens and, if a sliding window reduces it below the config's context, that window.

    Most of llama.cpp's architectures have no sliding attention. Within one window it equals plain attention.
    """
    config = skeleton.config
    context = skeleton.context or 2048
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None) if kinds is None or "sliding_attention" in kinds else None
    return (window, window) if window and window < context and not runtime.slides else (context, None)


def add_metadata(writer: GGUFWriter, skeleton: Skeleton, runtime: Runtime, context: int) -> None:
    """Add all metadata but the vocabulary and the rotary embedding."""
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
        epsilon = getattr(config, "layer_norm_epsilon", None)  # GPT-2's; the other is StarCoder2's
        writer.add_layer_norm_eps(config.norm_epsilon if epsilon is None else epsilon)
    for name, stored in _SCALES.items():
        if (value := getattr(config, name, None)) is not None:
            getattr(writer, f"add_{stored}")(float(value))
    if runtime.slides:
        writer.add_sliding_window(config.sliding_window)
    if (used := getattr(config, "num_experts_per_tok", None)) is not None:
        writer.add_expert_count(len(next(iter(routed(skeleton.all_sites()).values()))))
        writer.add_expert_used_count(used)
        writer.add_expert_feed_forward_length(widths["feed_forward_length"][0])


def add_rotary(writer: GGUFWriter, skeleton: Skeleton, runtime: Runtime) -> Tensor | None:
    """Add the rotary embedding.

    Returns:
        (head_width / 2,) float32: factors by which the frequencies are divided, if the embedding has them.

    Raises:
        CheckpointError: llama.cpp does not support the embedding.
    """
    given: dict[str, Any] | None = getattr(skeleton.config, "rope_parameters", None)
    if given is None:
        return None
    rope = given.get("full_attention", given)
    head_width, kind, theta = skeleton.sites(0)[0].head_width, rope.get("rope_type", "default"), rope["rope_theta"]
    writer.add_rope_dimension_count(head_width)
    writer.add_rope_freq_base(float(theta))
    supported = rope.get("partial_rotary_factor", 1.0) == 1.0
    # Gemma 3's sliding layers, for which llama.cpp has no settings.
    sliding = given.get("sliding_attention") or {}
    supported &= sliding.get("rope_theta", 10000.0) == 10000.0 and sliding.get("rope_type", "default") == "default"
    factors: Tensor | None = None
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind == "yarn":
        supported &= all(rope.get(name, usual) == usual for name, usual in _YARN.items())
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        original = rope.get("original_max_position_embeddings") or skeleton.config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(int(original))
    elif kind == "llama3":
        supported &= runtime.factors
        plain = 1.0 / theta ** (torch.arange(0, head_width, 2, dtype=torch.float32) / head_width)
        factors = plain / rotary_frequencies(skeleton.config, kind)
    else:
        supported &= kind == "default"
    if not supported:
        raise CheckpointError(
            f"{skeleton.checkpoint.directory}: llama.cpp's {runtime.name} does not support the rotary embedding {given}"
        )
    return factors
