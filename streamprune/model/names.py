"""Names of the files of a checkpoint, and of what a job makes beside OUT while it runs.

`status` reads these without loading torch; so nothing here imports it.
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
"""Fields of a config that say by which kernels somebody once ran the model."""
RUN_TIME = KERNELS | {"output_attentions", "_output_attentions", "transformers_weights"}
"""Fields that say how, or from which file, somebody once ran the model: no part of a checkpoint, and another machine may not
have what they ask for."""
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
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
    "NOTICE.txt",
    "USE_POLICY.md",
)
"""Files of a checkpoint that are copied unchanged."""
