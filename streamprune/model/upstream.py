"""All uses of transformers interfaces that are private or change between releases.

Exceptions: `modeling_streamprune` is copied beside checkpoints and cannot import this package; it uses the public `CONFIG_MAPPING`
and `MODEL_FOR_CAUSAL_LM_MAPPING`, and `transformers.conversion_mapping` if tensor names in the checkpoint differ from the model's.
`maths.flops` refers by name to operators that transformers registers. `stream.generate` implements a cache's `update`.

tests/model/test_upstream.py tests each of these, and lists the versions they were observed with.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..errors import CheckpointError, StreamPruneError, one_line
from .entries import Computed, TensorEntry

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


class Returned:
    """What `Recorder` returns besides hidden states."""


class Recorder(nn.Module):
    """Takes the place of a block: records the arguments of the call and returns the hidden states unchanged."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["_block"] = block  # not a submodule
        self.names = list(inspect.signature(block.forward).parameters)[1:]
        self.outputs = 0
        """Number of values that a block returns; 0 if it returns hidden states alone, not in a tuple."""
        self.hidden: Tensor | None = None
        self.arguments: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)

    def forward(self, hidden_states: Tensor, *positional: Any, **arguments: Any) -> Any:
        self.hidden = hidden_states
        self.arguments = {**dict(zip(self.names, positional, strict=False)), **arguments}
        return (hidden_states, *[Returned()] * (self.outputs - 1)) if self.outputs else hidden_states


@dataclass
class _Output(BaseModelOutputWithPastAndCrossAttentions):  # type: ignore[misc]
    """Has every field that the head of any supported model reads: None if it is not set."""

    router_logits: None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return None


class PassThrough(nn.Module):
    """Takes the place of all modules before the head: returns ``inputs_embeds`` as the last hidden state."""

    def __init__(self, replaced: nn.Module) -> None:
        super().__init__()
        self.__dict__["_replaced"] = replaced  # not a submodule

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_replaced"], name)

    def forward(self, *positional: Any, inputs_embeds: Tensor, **arguments: Any) -> _Output:
        return _Output(last_hidden_state=inputs_embeds)


def attention(config: Any) -> str:
    """Return the attention implementation that a model with this config uses, such as ``"sdpa"``."""
    return str(config._attn_implementation)


@contextmanager
def eager_experts(block: nn.Module) -> Iterator[None]:
    """Make a block compute its experts one by one, in any dtype, while the context is open."""
    configs: list[Any] = [module.config for module in block.modules() if hasattr(module, "config")]
    usual = [getattr(config, "_experts_implementation", None) for config in configs]
    try:
        for config in configs:
            config._experts_implementation = "eager"
        yield
    finally:
        for config, before in zip(configs, usual, strict=True):
            config._experts_implementation = before


def plain_attention(block: nn.Module) -> None:
    """Have a copied block compute attention maps in full, with a config of its own."""
    for module in block.modules():
        if isinstance(config := getattr(module, "config", None), PreTrainedConfig):
            config._attn_implementation = "eager"


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


def build(model_class: Any, config: Any, dtype: torch.dtype, most: int) -> Any:
    """Build a model in evaluation mode with its parameters on the meta device, and its buffers on the CPU.

    Buffers that checkpoints do not store, such as rotary tables, are computed by the modules' constructors. Scales of embeddings
    have `dtype`, as after loading. Raises a CheckpointError if the buffers hold more than `most` numbers.
    """
    with torch.device("meta"):
        model = model_class._from_config(config, dtype=dtype).eval()
    numbers = sum(buffer.numel() for buffer in model.buffers())
    if numbers > max(most, 1 << 20):
        raise CheckpointError(f"config.json: tables of {numbers} numbers for a model of {most} weights")
    if numbers:
        with _parameters_on_meta(), _LargeOnMeta(), no_init_weights():
            real = model_class._from_config(config, dtype=dtype)
        for name, module in real.named_modules():
            model.get_submodule(name)._buffers.update(module._buffers)
        for name, buffer in model.named_buffers():
            if buffer.is_meta:
                raise CheckpointError(
                    f"config.json: {name} is a table of {buffer.numel()} numbers, which is not supported"
                )
    return model


class _LargeOnMeta(TorchFunctionMode):
    """Create large tensors, which are parameters, on the meta device at once: hosts refuse more memory than they have."""

    LARGEST = 1 << 26
    """Bytes of the largest tensor that may be a buffer: a boolean mask of 8192 × 8192."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn, torch.full):
            empty = func(*args, **{**kwargs, "device": "meta"})
            if empty.nbytes > self.LARGEST:
                return empty
        return func(*args, **kwargs)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Put every new parameter on the meta device."""
    usual = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        usual(self, name, param if param is None else nn.Parameter(param.to("meta"), requires_grad=param.requires_grad))

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = usual  # type: ignore[method-assign]


def blocks_of(model: Any, config: Any) -> str:
    """Return the path of the list of blocks: the largest list of the text model's decoder that has as many as the config says."""
    decoder = model.get_decoder()
    lists = {
        name: module
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == getattr(config, "num_hidden_layers", None)
    }
    if not lists:
        lists = {name: module for name, module in decoder.named_modules() if isinstance(module, nn.ModuleList)}
    if not lists:
        raise CheckpointError(f"{type(model).__name__} has no list of blocks, one per hidden layer")
    inside = max(lists, key=lambda name: sum(p.numel() for p in lists[name].parameters()))
    outer = next(name for name, module in model.named_modules() if module is decoder)
    return f"{outer}.{inside}".lstrip(".")


def settings(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a config with infinities, which JSON cannot express, as transformers reads them."""
    decode = getattr(PreTrainedConfig, "_decode_special_floats", None)
    found: dict[str, Any] = decode(fields) if decode else fields
    return found


def ties_head(model: Any) -> bool:
    """Return whether the config lets the head share the weight of the embedding."""
    heads = {id(model.get_output_embeddings().weight)}
    named = {name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in heads}
    return bool(named & set(model.all_tied_weights_keys)) or id(model.get_input_embeddings().weight) in heads


def ignored(model: Any) -> Callable[[str], bool]:
    """Return whether transformers expects a tensor of that name in checkpoints, but does not load it."""
    patterns = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    return lambda name: any(pattern.search(name) for pattern in patterns)


def model_tensors(model: Any, stored: Mapping[str, TensorEntry], *, convert: bool) -> dict[str, TensorEntry]:
    """Return the tensors of a checkpoint by the model's names, with separate experts, as transformers would load them.

    Args:
        model: on the meta device.
        convert: apply transformers' own rules for models of this kind; otherwise only complete the prefix.

    Names of the parts of fused experts are those of `modeling_streamprune.Expert`: ``experts.3.gate_proj.weight``. Tensors that
    the model does not have keep their names.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model) if convert else []
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    state, found = model.state_dict(), dict[str, TensorEntry]()
    computed: dict[tuple[str, str], dict[str, list[TensorEntry]]] = {}
    for name in sorted(stored, key=_natural):
        key, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        rule = by_pattern.get(pattern)
        steps = [type(step).__name__ for step in rule.operations] if rule else []
        if rule is not None and steps[0] == "MergeModulelist" and steps[1:] in ([], ["Concatenate"]):
            number = re.findall(r"\.(\d+)\.", name)[-1]
            path, _, leaf = key.rpartition(".")
            leaves = {"gate_up_proj": ("gate_proj", "up_proj")}.get(leaf.removesuffix("_bias"), (leaf,))
            what = "bias" if leaf.endswith("_bias") else "weight"
            found[f"{path}.{number}.{leaves[rule.source_patterns.index(pattern)]}.{what}"] = stored[name]
        elif rule is not None:
            computed.setdefault((key, rule.source_patterns[0]), {}).setdefault(pattern, []).append(stored[name])
        else:
            found[key if key in state else name] = stored[name]
    for (key, first), given in computed.items():
        found |= _computed(key, by_pattern[first], given, model.config, state)
    return found


def _natural(name: str) -> list[Any]:
    """A key that sorts numbers in names by value."""
    return [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", name)]


def _computed(
    key: str, rule: Any, given: Mapping[str, Sequence[TensorEntry]], config: Any, state: Mapping[str, Tensor]
) -> dict[str, TensorEntry]:
    """Return the tensors that one of transformers' rules makes from stored ones, by name. `given` has these by pattern."""
    bases = tuple(entry for entries in given.values() for entry in entries)

    def convert(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        left = iter(tensors)
        held: Any = {pattern: [next(left) for _ in entries] for pattern, entries in given.items()}
        for step in rule.operations:
            held = step.convert(
                held,
                source_patterns=rule.source_patterns,
                target_patterns=rule.target_patterns,
                full_layer_name=key,
                model=_Shapes(config, state),
                config=config,
                missing_keys=None,
            )
        before, _, after = next((key.partition(name) for name in held if name in key), ("", "", ""))
        return {before + name + after: value[0] if isinstance(value, list) else value for name, value in held.items()}

    meta = convert([torch.empty(entry.shape, dtype=entry.dtype, device="meta") for entry in bases])
    return {
        name: Computed(bases[0].dtype, tuple(tensor.shape), bases, lambda tensors, name=name: convert(tensors)[name])  # type: ignore[misc]
        for name, tensor in meta.items()
    }


class _Shapes:
    """The part of a model that transformers' rules use."""

    def __init__(self, config: Any, state: Mapping[str, Tensor]) -> None:
        self.config, self._state = config, state

    def get_parameter(self, name: str) -> Tensor:
        return self._state[name]


def rotary_frequencies(config: Any, kind: str) -> Tensor:
    """Return the inverse frequencies (head_dim / 2,) float32 of a scaled rotary embedding; `kind` is a ``rope_type``."""
    frequencies: Tensor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))[0]
    return frequencies


@contextmanager
def parsed_once() -> Iterator[None]:
    """Parse the metadata of each GGUF file once while the context is open: the gguf package takes a minute for a large vocabulary,
    and transformers asks it again for each of config, tokenizer and weights.

    Does nothing without the gguf package, which transformers reports.
    """
    try:
        import gguf
    except ImportError:
        yield
        return
    usual = gguf.GGUFReader
    read = cache(usual)
    gguf.GGUFReader = lambda path: read(str(path))  # type: ignore[misc,assignment]
    try:
        yield
    finally:
        gguf.GGUFReader = usual  # type: ignore[misc]


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
