"""Load a whole model to memory with transformers. Only a few parts of the project need this."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from . import modeling_streamprune as modeling
from .checkpoint import Checkpoint
from .config import OURS
from .skeleton import Skeleton
from .upstream import translated


def load_whole(directory: Path, dtype: torch.dtype | None = None) -> Any:
    """Load a checkpoint directory as a transformers model in evaluation mode, on the CPU.

    `dtype` is that of the weights; None for the stored dtype. Quantised weights are dequantised. Raises a CheckpointError if the
    directory is rejected by `Checkpoint`, `Skeleton` or transformers.
    """
    from transformers import GenerationConfig

    skeleton = Skeleton(Checkpoint(directory), device=torch.device("cpu"), dtype=torch.float32)
    base, config, kind = skeleton.architecture.model_type, skeleton.whole_config, None
    if (widths := skeleton.checkpoint.config.get(OURS)) is not None:
        own = {"model_type": modeling.PREFIX + base, OURS: widths}
        config = modeling.config_class(base).from_dict({**config.to_dict(), **own})
        kind = modeling.model_class(base)
    kind = kind or modeling.stock_class(base)
    how = {"config": config, "dtype": dtype or "auto", "local_files_only": True, "use_safetensors": True}
    with translated(directory, "load this model"):
        if skeleton.checkpoint.dequantises:
            checkpoint = Checkpoint(directory)  # with its own names
            weights = {name: checkpoint.read(name) for name in checkpoint}
            model = kind.from_pretrained(
                None, **how | {"state_dict": weights, "dtype": dtype or checkpoint.dtype}
            ).eval()
        else:
            model = kind.from_pretrained(directory, **how).eval()
    # Ignore the checkpoint's generation settings, which may ask for sampling or remote code.
    asked = model.generation_config
    tokens = {name: _tokens(getattr(asked, name, None)) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**tokens)
    return model


def _tokens(value: Any) -> int | list[int] | None:
    """Return a token id or a list of them; None if `value` is neither."""
    several = value if isinstance(value, list) else [value]
    return value if all(type(each) is int for each in several) else None
