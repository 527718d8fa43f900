"""File names in a checkpoint directory, groups of config fields, and names of activation functions.

Must not import torch, because `status` uses these names without it.
"""

from __future__ import annotations

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
ADAPTER = "adapter_config.json"
REPORT, CARD, CURVES = "report.json", "README.md", "curves.json"
KERNELS = {
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "_attn_implementation_autoset",
    "experts_implementation",
    "_experts_implementation",
    "_experts_implementation_internal",
}
"""Config fields that record which kernels a model was last run with."""
RUN_TIME = KERNELS | {"output_attentions", "_output_attentions", "transformers_weights"}
"""Config fields that record how, or from which file, a model was last run. They are dropped: they are not part of the
checkpoint, and other machines may lack what they ask for."""
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
COMPANIONS = (
    "generation_config.json",
    *TOKENIZER_FILES,
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
    "NOTICE.txt",
    "USE_POLICY.md",
)
"""Files that are copied unchanged from the source to the result."""
SAME = (
    ("silu", "swish"),
    ("gelu", "gelu_python"),
    ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh"),
)
"""Groups of transformers' names for the same activation function, up to float32 rounding."""


def canonical(activation: str | None) -> str | None:
    """Return the first name of an activation function in its group: ``"swish"`` → ``"silu"``. Others are unchanged."""
    return next((names[0] for names in SAME if activation in names), activation)
