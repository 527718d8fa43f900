"""All uses of transformers interfaces that are private or change between releases.

Exceptions: `modeling_streamprune` is copied beside checkpoints and cannot import this package; it uses the public `CONFIG_MAPPING`
and `MODEL_FOR_CAUSAL_LM_MAPPING`, and `transformers.conversion_mapping` if tensor names in the checkpoint differ from the model's.
`maths.flops` refers by name to operators that transformers registers. `stream.generate` implements a cache's `update`.

tests/model/test_upstream.py tests each of these, and lists the versions they were observed with.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..errors import CheckpointError, StreamPruneError, one_line

TESTED = {"transformers": (5, 24), "torch": (2, 14)}
"""Newest minor version of each library with which the full test suite has passed."""
CACHES = ("cache", "past_key_values", "layer_past")
"""Names of a forward's argument for the key/value cache: ``cache`` since transformers 5.24, ``past_key_values`` before, and
``layer_past`` in blocks of falcon and gpt_neox."""


def untested() -> str:
    """Return a hint for messages that names libraries newer than the tested versions; empty if there are none."""
    return "".join(
        f"; {name} {version(name)} is newer than {major}.{minor}, the newest version tested "
        f"(pip install '{name}<={major}.{minor}.99')"
        for name, (major, minor) in TESTED.items()
        if tuple(map(int, version(name).split(".")[:2])) > (major, minor)
    )


@contextmanager
def translated(where: object, what: str) -> Iterator[None]:
    """Turn errors of transformers, of any type, into a CheckpointError: ``where: transformers cannot what``."""
    try:
        yield
    except StreamPruneError:
        raise
    except Exception as error:
        message = f"{where}: transformers cannot {what} ({one_line(error, 400)}){untested()}"
        raise CheckpointError(message) from error


@cache
def cache_argument(forward: Callable[..., Any]) -> str:
    """Return the name of the cache argument of `forward`, of a model or a block. Raises a TypeError if it has none."""
    parameters = inspect.signature(forward).parameters
    for name in CACHES:
        if name in parameters:
            return name
    raise TypeError(f"{forward.__qualname__} takes no cache: {', '.join(parameters)}")


class Past:
    """The part of a cache that a model's forward uses outside its blocks: the number of preceding tokens."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.tokens

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return (number of keys, position of the first key)."""
        return self.tokens + query_length, 0


class Recorder(nn.Module):
    """Takes the place of a block: records the arguments of the call and returns the hidden states unchanged."""

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
    """Has every field that the head of any supported model reads."""

    router_logits: None = None


class PassThrough(nn.Module):
    """Takes the place of all modules before the head: returns ``inputs_embeds`` as the last hidden state."""

    def forward(self, *positional: Any, inputs_embeds: Tensor, **arguments: Any) -> _Output:
        return _Output(last_hidden_state=inputs_embeds)


def attention(config: Any) -> str:
    """Return the attention implementation that a model with this config uses, such as ``"sdpa"``."""
    return str(config._attn_implementation)


@contextmanager
def eager_attention(config: Any) -> Iterator[None]:
    """Make models with this config compute attention maps and masks in full, while the context is open.

    The public `PreTrainedModel.set_attn_implementation` rejects falcon.
    """
    usual, config._attn_implementation = config._attn_implementation, "eager"
    try:
        yield
    finally:
        config._attn_implementation = usual


def forget_kernels(config: Any) -> None:
    """Make a config name no kernels, so that transformers chooses among those of this machine."""
    config._attn_implementation = config._experts_implementation = None


def rebuild_buffers(model: nn.Module, config: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Compute on `device` the buffers of a meta-device model that checkpoints do not store, such as rotary tables.

    Modules with such buffers take the config as their only argument, or are embeddings with a scale in `dtype`.
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
    """Return the inverse frequencies (head_dim / 2,) float32 of a scaled rotary embedding; `kind` is a ``rope_type``."""
    frequencies: Tensor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))[0]
    return frequencies


def gguf_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the config fields and the tokenizer's fields that transformers reads from a GGUF file."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    parsed = load_gguf_checkpoint(str(path), return_tensors=False)
    return dict(parsed["config"]), dict(parsed["tokenizer"])


def gguf_names(
    architecture: str, config: dict[str, Any]
) -> tuple[dict[str, str], Callable[[str], Callable[[Any], Any]]]:
    """Return how transformers loads the tensors of a GGUF file.

    Args:
        architecture: as the file gives it.
        config: see `gguf_config`.

    Returns:
        The names in transformers' model by those in the file, and a function from the latter to the function that gives a tensor,
        a NumPy array, its values and layout in the model. Experts are not laid out: gate and up projections are merged.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    fields = copy.deepcopy({name: value for name, value in config.items() if name != "model_type"})
    with torch.device("meta"):
        built = AutoConfig.for_model(config["model_type"], **fields)
        model = AutoModelForCausalLM.from_config(built, trust_remote_code=False)
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config)
    names = dict(get_gguf_hf_weights_map(model, processor))
    if architecture == "gpt2":
        names["output.weight"] = "lm_head.weight"  # which its processor stores itself

    def layout(name: str) -> Callable[[Any], Any]:
        if name == "output.weight":
            return lambda weights: weights
        return lambda weights: processor.process(weights=weights, name=name).weights

    return names, layout


def gguf_factors(config: Mapping[str, Any], scaling: dict[str, Any]) -> Tensor:
    """Return the factors (head_dim / 2,) float32 by which a scaled rotary embedding divides the frequencies."""
    from transformers import AutoConfig

    fields = {name: value for name, value in config.items() if name != "model_type"}
    plain, scaled = (
        AutoConfig.for_model(config["model_type"], **copy.deepcopy({**fields, **more}))
        for more in ({}, {"rope_scaling": scaling})
    )
    width = getattr(plain, "head_dim", None) or plain.hidden_size // plain.num_attention_heads
    usual: Tensor = 1.0 / plain.rope_parameters["rope_theta"] ** (
        torch.arange(0, width, 2, dtype=torch.float32) / width
    )
    return usual / rotary_frequencies(scaled, scaling["rope_type"])
