"""Models whose blocks differ in width: transformers' own classes with some linears resized.

A copy of this file lies beside every pruned checkpoint of free layout. It imports torch and transformers
only. The checkpoint's config holds, under "streamprune", one number a block:

    "blocks":     where the blocks are, such as "model.layers"
    "rows":       output widths of linears by name, such as {"mlp.up_proj": [688, 704, ...]}
    "columns":    input widths of linears by name
    "attributes": module attributes that count heads, by name

`PrunedLlamaConfig`, `PrunedLlamaForCausalLM` and their like for every model_type are made on first use.
"""

import shutil
from functools import cache
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

PREFIX = "streamprune_"


def resized(old, rows, columns):
    """A linear like `old` with other numbers of outputs and inputs; None leaves a number as it is."""
    with torch.device(old.weight.device):
        if isinstance(old, Conv1D):
            new = Conv1D(rows or old.nf, columns or old.nx)
        else:
            new = nn.Linear(columns or old.in_features, rows or old.out_features, bias=old.bias is not None)
    return new.to(old.weight.dtype)


def resize(model, widths):
    """Replace the linears of `model` by ones of the widths that the config lists."""
    for index, block in enumerate(model.get_submodule(widths["blocks"])):
        rows = {name: each[index] for name, each in widths["rows"].items()}
        columns = {name: each[index] for name, each in widths["columns"].items()}
        for name in rows.keys() | columns.keys():
            block.set_submodule(name, resized(block.get_submodule(name), rows.get(name), columns.get(name)))
        for name, each in widths["attributes"].items():
            path, _, attribute = name.rpartition(".")
            setattr(block.get_submodule(path), attribute, each[index])


def class_stem(base):
    """The middle of the class names for a model_type: "qwen2" gives "PrunedQwen2"."""
    return "Pruned" + "".join(part.capitalize() for part in base.split("_"))


@cache
def config_class(base):
    """The config class for pruned models of model_type `base`."""
    members = {"model_type": PREFIX + base, "__module__": __name__}
    return type(class_stem(base) + "Config", (CONFIG_MAPPING[base],), members)


def stock_class(base):
    """transformers' own causal language model of model_type `base`."""
    return AutoModelForCausalLM._model_mapping[CONFIG_MAPPING[base]]


@cache
def model_class(base):
    """The causal language model for pruned models of model_type `base`."""
    stock = stock_class(base)

    def __init__(self, config, *args, **kwargs):
        stock.__init__(self, config, *args, **kwargs)
        resize(self, config.streamprune)

    def save_pretrained(self, save_directory, *args, **kwargs):
        stock.save_pretrained(self, save_directory, *args, **kwargs)
        # The config names this file: it goes along.
        shutil.copyfile(__file__, Path(save_directory) / Path(__file__).name)

    members = {
        "__init__": __init__,
        "save_pretrained": save_pretrained,
        "config_class": config_class(base),
        "__module__": __name__,
    }
    return type(class_stem(base) + "ForCausalLM", (stock,), members)


class PrunedForCausalLM:
    """Stands in for every `model_class` until one is wanted, so that registering imports no model."""

    @classmethod
    def from_pretrained(cls, *args, config, **kwargs):
        """As every model class has it."""
        return model_class(config.model_type.removeprefix(PREFIX)).from_pretrained(*args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config, **kwargs):
        return model_class(config.model_type.removeprefix(PREFIX))._from_config(config, **kwargs)


def register(base):
    """Make AutoConfig and AutoModelForCausalLM know pruned models of model_type `base`."""
    AutoConfig.register(PREFIX + base, config_class(base), exist_ok=True)
    AutoModelForCausalLM.register(config_class(base), PrunedForCausalLM, exist_ok=True)


def __getattr__(name):
    for ending, maker in (("Config", config_class), ("ForCausalLM", model_class)):
        for base in CONFIG_MAPPING_NAMES:
            if name == class_stem(base) + ending:
                return maker(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
