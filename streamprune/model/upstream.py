"""Every surface of transformers that is private or changes between releases, in one place.

Two things cannot live here. `modeling_streamprune` lies beside written checkpoints and imports nothing of ours; it uses the
public `CONFIG_MAPPING` and `MODEL_FOR_CAUSAL_LM_MAPPING`, and `transformers.conversion_mapping` where a checkpoint has other
names than its modules. `maths.operations` counts the operators that transformers registers, by their names.

tests/model/test_upstream.py has a test for each of these and names the versions that they were seen with.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

TESTED = {"transformers": (5, 24), "torch": (2, 14)}
"""The newest minor version of each library that the whole test suite passed with."""
CACHES = ("cache", "past_key_values", "layer_past")
"""What a forward may call its cache of keys and values: ``cache`` since transformers 5.24, ``past_key_values`` before, and
``layer_past`` in blocks of falcon and gpt_neox."""


def untested() -> str:
    """Advice for when a library failed: names those that are newer than what was tested; empty where there are none."""
    newer = [
        f"{name} {version(name)} is newer than {major}.{minor}, the newest version tested (pip install '{name}<={major}.{minor}.99')"
        for name, (major, minor) in TESTED.items()
        if _minor(version(name)) > (major, minor)
    ]
    return "".join(f"; {each}" for each in newer)


def _minor(text: str) -> tuple[int, int]:
    major, minor, *_ = text.split(".")
    return int(major), int(minor)


@cache
def cache_argument(forward: Callable[..., Any]) -> str:
    """The name of the argument through which `forward`, of a model or a block, takes its cache.

    Raises:
        TypeError: it takes none.
    """
    parameters = inspect.signature(forward).parameters
    for name in CACHES:
        if name in parameters:
            return name
    raise TypeError(f"{forward.__qualname__} takes no cache: {', '.join(parameters)}")


class Past:
    """What a model's forward asks of a cache outside its blocks: how many tokens precede these."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.tokens

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(number of keys, position of the first one)."""
        return self.tokens + query_length, 0


class BlockCache(ABC):
    """What the attention of a block asks of a cache."""

    @abstractmethod
    def extend(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Append (sequences, heads, new tokens, head_dim); returns those of all tokens so far."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *others: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """As attention calls it; what else it passes differs between releases and is for other kinds of cache."""
        return self.extend(key_states, value_states, layer_idx)


class Recorder(nn.Module):
    """Takes the place of a block: records what the model calls it with and returns the hidden states unchanged."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.names = list(inspect.signature(block.forward).parameters)[1:]
        self.hidden: Tensor | None = None
        self.arguments: dict[str, Any] = {}

    def forward(self, hidden_states: Tensor, *positional: Any, **arguments: Any) -> Tensor:
        self.hidden = hidden_states
        self.arguments = {**dict(zip(self.names, positional, strict=False)), **arguments}
        return hidden_states


@dataclass
class _Output(BaseModelOutputWithPastAndCrossAttentions):  # type: ignore[misc]
    """Has every field that some model's head reads."""

    router_logits: None = None


class PassThrough(nn.Module):
    """Takes the place of everything before the head: returns its ``inputs_embeds`` as the last hidden state."""

    def forward(self, *positional: Any, inputs_embeds: Tensor, **arguments: Any) -> _Output:
        return _Output(last_hidden_state=inputs_embeds)


def attention(config: Any) -> str:
    """The implementation of attention that a model of this config runs, such as ``"sdpa"``."""
    return str(config._attn_implementation)


@contextmanager
def eager_attention(config: Any) -> Iterator[None]:
    """A context in which models of this config compute attention maps and masks in full.

    `PreTrainedModel.set_attn_implementation` is public, but refuses falcon.
    """
    usual, config._attn_implementation = config._attn_implementation, "eager"
    try:
        yield
    finally:
        config._attn_implementation = usual


def rebuild_buffers(model: nn.Module, config: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Compute the buffers of a model on the meta device that no checkpoint stores, such as rotary tables, on `device`.

    A module with such buffers takes the config as its only argument, or is an embedding with a scale.
    """
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            with torch.device(device):
                if isinstance(module, nn.Embedding):
                    scaled: Any = module
                    scaled.embed_scale = torch.tensor(scaled.scalar_embed_scale, dtype=dtype)
                else:
                    model.set_submodule(name, type(module)(config=config))


def rotary_frequencies(config: Any, kind: str) -> Tensor:
    """Rotary frequencies of a scaled embedding (head_dim / 2,) float32, by the kind that ``rope_type`` names."""
    frequencies: Tensor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))[0]
    return frequencies
