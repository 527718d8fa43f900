"""A model whole in memory, as transformers has it: what few parts of this project want."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, one_line
from .checkpoint import Checkpoint
from .config import read_configuration


def load_whole(directory: Path, dtype: torch.dtype | None = None) -> Any:
    """transformers' model of a checkpoint directory, in memory, to be evaluated.

    Args:
        dtype: of the weights; None leaves what they are stored in.

    Raises:
        CheckpointError: `Checkpoint` or `read_configuration` refuses it, or transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    from .upstream import untested

    _, config = read_configuration(Checkpoint(directory))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=dtype or "auto",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        ).eval()
    except Exception as error:
        raise CheckpointError(
            f"{directory}: transformers cannot load this model ({one_line(error)}){untested()}"
        ) from error
    # How to generate is ours to say: what a checkpoint asks for may be sampling, or code to fetch.
    asked = model.generation_config
    tokens = {name: _tokens(getattr(asked, name, None)) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**tokens)
    return model


def _tokens(value: Any) -> int | list[int] | None:
    """A token's id, or several tokens'; None if it is neither."""
    several = value if isinstance(value, list) else [value]
    return value if all(type(each) is int for each in several) else None
