"""Models whose blocks differ in width: transformers' own classes with some linears resized.

Every pruned checkpoint with the free layout contains a copy of this file. It imports only torch and transformers. The
checkpoint's config field "streamprune" holds lists with one value per block, null if a block has no such module:

    "blocks":     path of the blocks, such as "model.layers" (not a list)
    "rows":       output widths of linears and widths of norms, by name, such as {"mlp.up_proj": [688, 704, ...]}; of
                  parameters and buffers, the size of their first axis
    "columns":    input widths of linears, by name; of parameters and buffers, the size of their last axis
    "attributes": module attributes that count heads or experts, by name; after "config.", attributes of the block's own config view
    "experts":    width of each expert, by name of the list of experts
    "no_op":      arguments of `remove_sublayer`, by name of the module whose sublayer is gone
    "renamed":    pairs of substrings of tensor names: in the model, in the files (not per block)

The classes of each model_type, such as `PrunedLlamaConfig` and `PrunedLlamaForCausalLM`, are created on first use.
"""

import copy
import inspect
import re
import shutil
from functools import cache
from pathlib import Path

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Conv1D,
)

PREFIX = "streamprune_"
IMAGES = "AutoModelForImageTextToText"
ENDINGS = (
    "ForCausalLM",
    "ForConditionalGeneration",
)  # of class names: for text models, and for those that read images too


class Expert(nn.Module):
    """One FFN, gated or not; `fused` is transformers' module for all experts."""

    def __init__(self, width, hidden, fused):
        super().__init__()
        bias, gated = "down_proj_bias" in fused._parameters, "gate_up_proj" in fused._parameters
        if gated:
            self.gate_proj = nn.Linear(hidden, width, bias=bias)
        self.up_proj = nn.Linear(hidden, width, bias=bias)
        self.down_proj = nn.Linear(width, hidden, bias=bias)
        self.activation = getattr(fused, "act_fn", None)
        # Not a submodule: the fused module keeps its settings, but no tensors.
        self.__dict__["gate"] = fused._apply_gate if gated and own_gate(fused) else None
        self.concatenated = getattr(fused, "is_concatenated", True)

    def mix(self, x):
        """Return the input of `down_proj`."""
        up = self.up_proj(x)
        if not hasattr(self, "gate_proj"):
            return self.activation(up)
        gate = self.gate_proj(x)
        if self.gate is None:
            return self.activation(gate) * up
        return self.gate(torch.cat((gate, up), -1) if self.concatenated else torch.stack((gate, up), -1).flatten(-2))

    def forward(self, x):
        return self.down_proj(self.mix(x))


def transposed(fused):
    """Return whether experts hold their matrices as (in, out): llama4's, called with one argument, always do."""
    return getattr(fused, "is_transposed", len(inspect.signature(fused.forward).parameters) == 1)


def own_gate(fused):
    """Return whether a class of experts has a gate that is not simply ``act(gate) · up``."""
    return type(fused)._apply_gate.__name__ != "_default_apply_gate" if hasattr(fused, "_apply_gate") else False


class Experts(nn.ModuleList):
    """Experts of different widths. Replaces transformers' module, which holds all experts in one tensor."""

    def __init__(self, widths, hidden, fused):
        super().__init__(Expert(width, hidden, fused) for width in widths)

    def forward(self, hidden_states, top_k_index=None, top_k_weights=None):
        if top_k_index is None:  # all tokens times the router's weight, which may be zero, for each expert in turn
            parts = zip(self, hidden_states.chunk(len(self)), strict=True)
            return torch.cat([expert(part) for expert, part in parts])
        total = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            tokens, rank = torch.where(top_k_index == number)
            given = expert(hidden_states[tokens]) * top_k_weights[tokens, rank, None]
            total.index_add_(0, tokens, given.to(total.dtype))
        return total


class Fields(dict):
    """A dict whose values are also attributes."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class BlockConfig:
    """A block's view of the model's config, in which some fields are overridden."""

    def __init__(self, config):
        vars(self).update(_config=config, _own={})

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        own = vars(self).get("_own", {})
        return own[name] if name in own else getattr(vars(self)["_config"], name)

    def __setattr__(self, name, value):
        setattr(self._config, name, value)

    def __deepcopy__(self, memo):
        twin = BlockConfig(self._config)
        vars(twin)["_own"] = dict(self._own)
        return twin

    def override(self, name, value):
        """Override a field for this block."""
        self._own[name] = value


class NoOp(nn.Module):
    """Takes the place of a sublayer that is gone: gives zeros, or the bias that its consumer adds to nothing.

    Args:
        old: the module in that place.
        kind: "attention", "linear" or "ffn".
        returns: number of values that it returns in a tuple; 0 if it returns a tensor alone.
        bias: name of the bias inside `old`; None without one.
    """

    def __init__(self, old, kind, returns, bias):
        super().__init__()
        # Models read settings of their blocks' modules, such as the layer's number.
        plain = {name: value for name, value in vars(old).items() if type(value) in (bool, int, float, str)}
        vars(self).update({name: value for name, value in plain.items() if name not in vars(self)})
        self.kind, self.returns, self.held = kind, returns, bias
        self.reads = next(iter(inspect.signature(old.forward).parameters))
        if bias is not None:
            owner, (*path, leaf) = self, bias.split(".")
            for part in path:
                owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_parameter(leaf, old.get_parameter(bias))

    def forward(self, *args, **kwargs):
        x = args[0] if args else kwargs[self.reads]
        cache = next((each for each in (*args, *kwargs.values()) if hasattr(each, "get_seq_length")), None)
        if cache is not None and hasattr(self, "layer_idx"):
            self.count_tokens(x, cache)
        output = torch.zeros_like(x) if self.held is None else self.get_parameter(self.held).to(x.dtype).expand(x.shape)
        return (output, *[None] * (self.returns - 1)) if self.returns else output

    def count_tokens(self, x, cache):
        """Put one number per token into the cache of this layer: models ask some layer how many tokens came before."""
        held = cache.layers[self.layer_idx : self.layer_idx + 1]
        if self.kind == "attention" and all(hasattr(layer, "get_seq_length") for layer in held):
            # Not where keys and values come from another block.
            passed = x.new_zeros(x.shape[0], 1, x.shape[1], 1)
            cache.update(passed, passed, self.layer_idx)
        elif self.kind == "linear":
            cache.update_conv_state(x.new_zeros(x.shape[0], 1, 1), self.layer_idx)


def remove_sublayer(block, name, kind, returns, bias, identities):
    """Replace the module that gives a sublayer's output by a `NoOp`, and modules that only served the sublayer by identities."""
    block.set_submodule(name, NoOp(block.get_submodule(name), kind, returns, bias))
    for each in identities:
        block.set_submodule(each, nn.Identity())


def separate_experts(block, name, widths=None):
    """Replace transformers' experts by `Experts` of these widths. If `widths` is None, keep the widths and weights."""
    fused = block.get_submodule(name)
    down, parts = fused.down_proj, {leaf: tensor.detach() for leaf, tensor in fused.named_parameters()}
    number, width, hidden = down.shape if transposed(fused) else (len(down), *reversed(down.shape[1:]))
    with torch.device(down.device):
        experts = Experts(widths or [width] * number, hidden, fused).to(down.dtype)
    block.set_submodule(name, experts)
    fused._parameters.clear()
    if widths is None:
        for leaf, tensor in parts.items():
            for number, expert in enumerate(experts):
                for path, index, rows, turned in expert_parts(leaf, fused):
                    part = tensor[number].T if turned else tensor[number]
                    part = part.chunk(2)[rows] if index is None else part[rows::index] if index else part
                    owner, _, what = path.rpartition(".")
                    expert.get_submodule(owner)._parameters[what] = nn.Parameter(part, requires_grad=down.requires_grad)


def expert_parts(leaf, fused):
    """Return the parts of one expert that a fused tensor of that name holds.

    Each is: its name in `Expert`; None if the first or second half of the rows belongs to it, the step between its rows if
    they alternate, or 0 for all rows; which half, or the first row; whether the fused tensor has it transposed.
    """
    what = "bias" if leaf.endswith("_bias") else "weight"
    turned = what == "weight" and transposed(fused)
    name = leaf.removesuffix("_bias")
    if name != "gate_up_proj":
        return [(f"{name}.{what}", 0, 0, turned)]
    step = None if getattr(fused, "is_concatenated", True) else 2
    return [(f"gate_proj.{what}", step, 0, turned), (f"up_proj.{what}", step, 1, turned)]


def fused(experts, path, leaf, weights):
    """Return a fused tensor of transformers' experts, the opposite of `expert_parts`.

    `weights` has the parts by name, such as "mlp.experts.3.up_proj.weight" for the path "mlp.experts".
    """
    found = []
    number = 0
    parts = expert_parts(leaf, experts)
    while f"{path}.{number}.{parts[0][0]}" in weights:
        tensors = [weights[f"{path}.{number}.{name}"] for name, *_ in parts]
        whole = torch.stack(tensors, 1).flatten(0, 1) if parts[0][1] == 2 else torch.cat(tensors)
        found.append(whole.T if parts[0][3] else whole)
        number += 1
    return torch.stack(found)


def resized(old, rows, columns):
    """Return a linear or norm like `old` with other numbers of outputs and inputs; None keeps a number."""
    with torch.device(old.weight.device):
        if not isinstance(old, (nn.Linear, Conv1D)):
            new = copy.copy(old)
            new._parameters = {
                name: p if p is None else nn.Parameter(p.new_empty(rows or len(p), *p.shape[1:]))
                for name, p in old._parameters.items()
            }
            if isinstance(old, nn.Conv1d):  # of one channel each
                new.in_channels = new.out_channels = new.groups = rows or old.groups
        elif isinstance(old, Conv1D):
            new = Conv1D(rows or old.nf, columns or old.nx)
        else:
            new = type(old)(columns or old.in_features, rows or old.out_features, bias=old.bias is not None)
    return new.to(old.weight.dtype)


def cut(tensor, first, last):
    """Return a tensor like another one with other sizes of its first and its last axis; None keeps a size."""
    tensor = tensor[: first or len(tensor)]
    return tensor[..., : last or tensor.shape[-1]].clone()


def count(block, name):
    """Return an attribute that counts heads."""
    path, _, attribute = name.rpartition(".")
    owner = block.get_submodule(path.removesuffix(".config"))
    return getattr(owner.config if path.endswith(".config") else owner, attribute)


def set_count(block, name, value):
    """Set an attribute that counts heads, for this block only."""
    path, _, attribute = name.rpartition(".")
    owner = block.get_submodule(path.removesuffix(".config"))
    if not path.endswith(".config"):
        setattr(owner, attribute, value)
        return
    if not isinstance(owner.config, BlockConfig):
        owner.config = BlockConfig(owner.config)
    owner.config.override(attribute, value)


def resize(model, widths):
    """Resize the modules of `model` to the widths in the config."""
    resize_blocks(model.get_submodule(widths["blocks"]), widths)


def resize_blocks(blocks, widths):
    """Resize the modules of each block."""
    for index, block in enumerate(blocks):
        for name, each in widths.get("experts", {}).items():
            if each[index] is not None:
                separate_experts(block, name, each[index])
        rows = {name: each[index] for name, each in widths["rows"].items()}
        columns = {name: each[index] for name, each in widths["columns"].items()}
        for name in rows.keys() | columns.keys():
            size = rows.get(name), columns.get(name)
            if size == (None, None):
                continue
            owner, _, leaf = name.rpartition(".")
            owner = block.get_submodule(owner)
            if leaf in owner._parameters:
                owner._parameters[leaf] = nn.Parameter(cut(owner._parameters[leaf], *size))
            elif leaf in owner._buffers:
                owner._buffers[leaf] = cut(owner._buffers[leaf], *size)
            else:
                block.set_submodule(name, resized(block.get_submodule(name), *size))
        for name, each in widths["attributes"].items():
            if each[index] is not None:
                set_count(block, name, each[index])
        for name, each in widths.get("no_op", {}).items():
            if each[index] is not None:
                remove_sublayer(block, name, **each[index])


def class_stem(base):
    """Return the class name of a model_type without its suffix: "qwen2" gives "PrunedQwen2"."""
    return "Pruned" + "".join(part.capitalize() for part in re.split("[^a-z0-9]", base))


@cache
def config_class(base):
    """Return the config class for pruned models of model_type `base`."""
    stock = CONFIG_MAPPING[base]

    def __init__(self, *args, **kwargs):
        stock.__init__(self, *args, **kwargs)
        if blocks := getattr(self, "block_configs", None):
            # Runtimes with the DeciLM architecture read these as attributes.
            self.block_configs = [Fields({part: Fields(fields) for part, fields in block.items()}) for block in blocks]

    members = {"__init__": __init__, "model_type": PREFIX + base, "__module__": __name__}
    return type(class_stem(base) + "Config", (stock,), members)


def stock_class(base):
    """Return transformers' own class of model_type `base` that generates text, from images too if it can; None if there is none."""
    config = CONFIG_MAPPING[base]
    for mapping in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
        if config in mapping:
            return mapping[config]
    return None


def auto_classes(base):
    """Return the names of the auto classes that load models of model_type `base`."""
    config = CONFIG_MAPPING[base]
    named = {
        "AutoModelForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING,
        IMAGES: MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    }
    return [name for name, mapping in named.items() if config in mapping and mapping[config] is stock_class(base)]


def class_name(base):
    """Return the name of `model_class`: "PrunedQwen2ForCausalLM"."""
    return class_stem(base) + ENDINGS[IMAGES in auto_classes(base)]


@cache
def model_class(base):
    """Return the class for pruned models of model_type `base`, which generate text."""
    stock = stock_class(base)

    def __init__(self, config, *args, **kwargs):
        stock.__init__(self, config, *args, **kwargs)
        resize(self, config.streamprune)
        if renamed := config.streamprune.get("renamed"):
            # transformers does the same for the stock model_type.
            from transformers.conversion_mapping import register_checkpoint_conversion_mapping
            from transformers.core_model_loading import WeightRenaming

            pairs = [WeightRenaming(re.escape(stored), name) for name, stored in renamed]
            register_checkpoint_conversion_mapping(config.model_type, pairs, overwrite=True)

    def save_pretrained(self, save_directory, *args, **kwargs):
        stock.save_pretrained(self, save_directory, *args, **kwargs)
        # The config refers to this file.
        shutil.copyfile(__file__, Path(save_directory) / Path(__file__).name)

    members = {
        "__init__": __init__,
        "save_pretrained": save_pretrained,
        # Of custom code transformers expects no buffers that the model computes for its blocks, and leaves them empty.
        "is_custom_code": classmethod(lambda cls: False),
        "config_class": config_class(base),
        "__module__": __name__,
    }
    return type(class_name(base), (stock,), members)


class PrunedForCausalLM:
    """Placeholder for every `model_class`, so that registering does not import any model."""

    @classmethod
    def from_pretrained(cls, *args, config, **kwargs):
        """Load with the class of the config's model_type."""
        return model_class(config.model_type.removeprefix(PREFIX)).from_pretrained(*args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config, **kwargs):
        return model_class(config.model_type.removeprefix(PREFIX))._from_config(config, **kwargs)


def register(base):
    """Register pruned models of model_type `base` with AutoConfig and the auto classes of its kind, without importing a model."""
    AutoConfig.register(PREFIX + base, config_class(base), exist_ok=True)
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if CONFIG_MAPPING[base] in auto._model_mapping:
            auto.register(config_class(base), PrunedForCausalLM, exist_ok=True)


def __getattr__(name):
    for ending, maker in (("Config", config_class), *((ending, model_class) for ending in ENDINGS)):
        for base in CONFIG_MAPPING:
            if name == class_stem(base) + ending:
                return maker(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
