"""A model whole in memory, as transformers has it: what few parts of this project want."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, one_line


def load_whole(directory: Path, dtype: torch.dtype | None = None) -> Any:
    """transformers' model of a checkpoint directory, in memory, to be evaluated.

    Args:
        dtype: of the weights; None leaves what they are stored in.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype or "auto", local_files_only=True, trust_remote_code=False
        ).eval()
    except Exception as error:
        raise CheckpointError(f"{directory}: transformers cannot load this model ({one_line(error)})") from error
