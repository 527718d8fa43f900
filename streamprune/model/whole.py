"""Load a whole model to memory with transformers. Only a few parts of the project need this."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .checkpoint import Checkpoint
from .config import read_configuration


def load_whole(directory: Path, dtype: torch.dtype | None = None) -> Any:
    """Load a checkpoint directory as a transformers model in evaluation mode, on the CPU.

    `dtype` is that of the weights; None for the stored dtype. Quantised weights are dequantised. Raises a CheckpointError if the
    directory is rejected by `Checkpoint`, `read_configuration` or transformers.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    from .upstream import translated

    checkpoint = Checkpoint(directory)
    _, config = read_configuration(checkpoint)
    how = {"config": config, "dtype": dtype or "auto", "local_files_only": True, "use_safetensors": True}
    with translated(directory, "load this model"):
        if checkpoint.dequantises:
            with torch.device("meta"):
                kind = type(AutoModelForCausalLM.from_config(config, trust_remote_code=False))
            how |= {
                "state_dict": {name: checkpoint.read(name) for name in checkpoint},
                "dtype": dtype or checkpoint.dtype,
            }
            model = kind.from_pretrained(None, **how).eval()
        else:
            model = AutoModelForCausalLM.from_pretrained(directory, **how, trust_remote_code=False).eval()
    # Ignore the checkpoint's generation settings, which may ask for sampling or remote code.
    asked = model.generation_config
    tokens = {name: _tokens(getattr(asked, name, None)) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**tokens)
    return model


def _tokens(value: Any) -> int | list[int] | None:
    """Return a token id or a list of them; None if `value` is neither."""
    several = value if isinstance(value, list) else [value]
    return value if all(type(each) is int for each in several) else None
