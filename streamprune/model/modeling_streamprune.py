"""Models whose blocks differ in width: transformers' own classes with some linears resized.

Every pruned checkpoint with the free layout contains a copy of this file. It imports only torch and transformers. The
checkpoint's config field "streamprune" holds lists with one value per block, null if a block has no such module:

    "blocks":     path of the blocks, such as "model.layers" (not a list)
    "rows":       output widths of linears and widths of norms, by name, such as {"mlp.up_proj": [688, 704, ...]}
    "columns":    input widths of linears, by name
    "attributes": module attributes that count heads, by name; after "config.", attributes of the block's own config view
    "experts":    width of each expert, by name of the list of experts
    "renamed":    pairs of substrings of tensor names: in the model, in the files (not per block)

The classes of each model_type, such as `PrunedLlamaConfig` and `PrunedLlamaForCausalLM`, are created on first use.
"""

import copy
import re
import shutil
from functools import cache
from pathlib import Path

import torch
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, Conv1D

PREFIX = "streamprune_"


class Expert(nn.Module):
    """One gated FFN."""

    def __init__(self, width, hidden, activation):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)
        self.activation = activation

    def mix(self, x):
        """Return the input of `down_proj`."""
        return self.activation(self.gate_proj(x)) * self.up_proj(x)

    def forward(self, x):
        return self.down_proj(self.mix(x))


class Experts(nn.ModuleList):
    """Experts of different widths. Replaces transformers' module, which holds all experts in one tensor."""

    def __init__(self, widths, hidden, activation):
        super().__init__(Expert(width, hidden, activation) for width in widths)

    def forward(self, hidden_states, top_k_index, top_k_weights):
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


def separate_experts(block, name, widths=None):
    """Replace transformers' experts by `Experts` of these widths. If `widths` is None, keep the widths and weights."""
    fused = block.get_submodule(name)
    number, hidden, width = fused.down_proj.shape
    with torch.device(fused.down_proj.device):
        experts = Experts(widths or [width] * number, hidden, fused.act_fn).to(fused.down_proj.dtype)
    block.set_submodule(name, experts)
    if widths is None:
        for expert, gate_up, down in zip(experts, fused.gate_up_proj, fused.down_proj, strict=True):
            gate, up = gate_up.chunk(2)
            for linear, weight in ((expert.gate_proj, gate), (expert.up_proj, up), (expert.down_proj, down)):
                linear.weight = nn.Parameter(weight, requires_grad=fused.down_proj.requires_grad)


def resized(old, rows, columns):
    """Return a linear or norm like `old` with other numbers of outputs and inputs; None keeps a number."""
    with torch.device(old.weight.device):
        if old.weight.dim() == 1:
            new = copy.copy(old)
            new._parameters = {name: nn.Parameter(p.new_empty(rows or len(p))) for name, p in old._parameters.items()}
        elif isinstance(old, Conv1D):
            new = Conv1D(rows or old.nf, columns or old.nx)
        else:
            new = type(old)(columns or old.in_features, rows or old.out_features, bias=old.bias is not None)
    return new.to(old.weight.dtype)


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
    for index, block in enumerate(model.get_submodule(widths["blocks"])):
        for name, each in widths.get("experts", {}).items():
            if each[index] is not None:
                separate_experts(block, name, each[index])
        rows = {name: each[index] for name, each in widths["rows"].items()}
        columns = {name: each[index] for name, each in widths["columns"].items()}
        for name in rows.keys() | columns.keys():
            size = rows.get(name), columns.get(name)
            if size != (None, None):
                block.set_submodule(name, resized(block.get_submodule(name), *size))
        for name, each in widths["attributes"].items():
            if each[index] is not None:
                set_count(block, name, each[index])


def class_stem(base):
    """Return the class name of a model_type without its suffix: "qwen2" gives "PrunedQwen2"."""
    return "Pruned" + "".join(part.capitalize() for part in base.split("_"))


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
    """Return transformers' own causal language model class of model_type `base`."""
    return MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[base]]


@cache
def model_class(base):
    """Return the causal language model class for pruned models of model_type `base`."""
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
        "config_class": config_class(base),
        "__module__": __name__,
    }
    return type(class_stem(base) + "ForCausalLM", (stock,), members)


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
    """Register pruned models of model_type `base` with AutoConfig and AutoModelForCausalLM."""
    AutoConfig.register(PREFIX + base, config_class(base), exist_ok=True)
    AutoModelForCausalLM.register(config_class(base), PrunedForCausalLM, exist_ok=True)


def __getattr__(name):
    for ending, maker in (("Config", config_class), ("ForCausalLM", model_class)):
        for base in CONFIG_MAPPING:
            if name == class_stem(base) + ending:
                return maker(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
