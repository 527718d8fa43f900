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
    "fields":     fields of the stock config that a block's own config has, by name, such as {"num_attention_heads": [8, 6, ...]}
    "renamed":    pairs of substrings of tensor names: in the model, in the files (not per block)

The classes of each model_type, such as `PrunedLlamaConfig`, `PrunedLlamaForCausalLM` and `PrunedLlamaModel`, are created on
first use.
"""

import copy
import inspect
import re
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    Conv1D,
)

PREFIX = "streamprune_"
IMAGES = "AutoModelForImageTextToText"
TEXT, WRAPPER, BARE, CLASSIFIES = "ForCausalLM", "ForConditionalGeneration", "Model", "ForSequenceClassification"
AUTO = {
    WRAPPER: (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
    TEXT: (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
    BARE: (AutoModel, MODEL_MAPPING),
    CLASSIFIES: (AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
}
"""By ending of class names: the auto class, and where it has transformers' own classes."""
COUNTS_OF_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
"""Fields of configs, and attributes of routers, that may count routed experts."""


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
        # Stock classes may initialise the tensors that held all experts, as qwen3_omni_moe's does.
        self.gate_up_proj = self.down_proj = torch.empty(0)

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
        if isinstance(old, Conv1D):
            new = Conv1D(rows or old.nf, columns or old.nx)
        else:
            new = copy.copy(old)  # of any class: llama4's router is a linear that takes other arguments
            new._parameters = {
                name: p
                if p is None
                else nn.Parameter(p.new_empty(rows or len(p), *(columns or n for n in p.shape[1:])))
                for name, p in old._parameters.items()
            }
            if isinstance(old, nn.Linear):
                new.in_features, new.out_features = columns or old.in_features, rows or old.out_features
            if isinstance(old, nn.Conv1d):  # of one channel each
                new.in_channels = new.out_channels = new.groups = rows or old.groups
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


@cache
def paged_cache():
    """Return the class of continuous batching's cache, with as many key/value heads in each block as the block has.

    transformers makes room for the config's number in every block. A block with fewer heads writes and reads the first ones.
    """
    from transformers.generation.continuous_batching import PagedAttentionCache

    class PagedCache(PagedAttentionCache):
        def update(self, key_states, value_states, layer_idx, kwargs):
            own, room = key_states.shape[1], self.layer_to_allocator[layer_idx].num_key_value_heads
            padded = [nn.functional.pad(each, (0, 0, 0, 0, 0, room - own)) for each in (key_states, value_states)]
            found = super().update(*padded, layer_idx, kwargs=kwargs)
            # Flash attention reads and writes pages itself: (pages, tokens, heads, width).
            kwargs.update({name: kwargs[name][:, :, :own] for name in ("k_cache", "v_cache") if name in kwargs})
            return tuple(each[:, :own] for each in found)

    return PagedCache


def take_paged_cache(model, args, kwargs):
    """A forward pre-hook: make a cache of transformers' class one of `paged_cache`."""
    if type(kwargs.get("cache")) is paged_cache().__base__:
        kwargs["cache"].__class__ = paged_cache()


class Batches:
    """Continuous batching for blocks with different numbers of key/value heads; mixed into classes that generate text."""

    def init_continuous_batching(self, *args, **kwargs):
        if "kwargs" not in inspect.signature(paged_cache().__base__.update).parameters:
            raise NotImplementedError(
                "this transformers is too old for continuous batching of pruned models; 5.24 works"
            )
        if take_paged_cache not in self._forward_pre_hooks.values():
            self.register_forward_pre_hook(take_paged_cache, with_kwargs=True)
        return super().init_continuous_batching(*args, **kwargs)

    def generate_batch(self, inputs, *args, **kwargs):
        """Raise an error where transformers only logs it and returns nothing."""
        found = super().generate_batch(inputs, *args, **kwargs)
        errors = [each.error for each in found.values() if each.error is not None]
        if inputs and len(errors) == len(found):
            raise RuntimeError(f"continuous batching failed: {errors[0] if errors else 'see the log'}")
        return found


def class_stem(base):
    """Return the class name of a model_type without its suffix: "qwen2" gives "PrunedQwen2"."""
    return "Pruned" + "".join(part.capitalize() for part in re.split("[^a-z0-9]", base))


def as_stock(config):
    """Return a shallow copy of a pruned model's config as one of transformers' own class."""
    view = copy.copy(config)
    view.__class__ = CONFIG_MAPPING[config.model_type.removeprefix(PREFIX)]
    vars(view).pop("model_type", None)
    return view


class BlockConfigs(Sequence):
    """A config of transformers' own class for each block, with the block's own widths. A name in `layer_types` gives the model's.

    vLLM reads head counts from them.
    """

    def __init__(self, config):
        self.stock, self.fields = as_stock(config), config.streamprune.get("fields", {})
        self.separate = bool(config.streamprune.get("experts"))
        for name in ("streamprune", "auto_map"):
            vars(self.stock).pop(name, None)

    def __len__(self):
        return self.stock.num_hidden_layers

    def __getitem__(self, key):
        if isinstance(key, slice):
            return [self[index] for index in range(*key.indices(len(self)))]
        blocks = self.stock.per_layer_config  # None in older versions, where all blocks are alike
        view = self.stock if blocks is None else blocks[key]
        if isinstance(key, str):
            return view
        view, own = copy.copy(view), {name: each[key] for name, each in self.fields.items() if each[key] is not None}
        # Some classes compute a field from others.
        fixed = {name: value for name, value in own.items() if isinstance(getattr(type(view), name, None), property)}
        view.__class__ = type(type(view).__name__, (type(view),), fixed) if fixed else type(view)
        for name in own.keys() - fixed.keys():
            setattr(view, name, own[name])
        for name in COUNTS_OF_EXPERTS:
            if self.separate and hasattr(view, name):
                # vLLM would hold all experts of a block in one tensor of one width, and leave the rest uninitialised.
                setattr(view, name, 0)
        return view


@cache
def config_class(base):
    """Return the config class for pruned models of model_type `base`."""
    stock = CONFIG_MAPPING[base]

    def __init__(self, *args, **kwargs):
        stock.__init__(self, *args, **kwargs)
        if blocks := getattr(self, "block_configs", None):
            # Runtimes with the DeciLM architecture read these as attributes.
            self.block_configs = [Fields({part: Fields(fields) for part, fields in block.items()}) for block in blocks]

    def written(name):
        return lambda self: {**getattr(as_stock(self), name)(), "model_type": self.model_type}

    members = {
        "__init__": __init__,
        "model_type": PREFIX + base,
        "__iter__": lambda self: iter(as_stock(self)),
        **{name: written(name) for name in ("to_dict", "to_diff_dict")},
        "__module__": __name__,
    }
    if stock_class(base, WRAPPER) is None:
        # Properties, and no part of any file: as fields, transformers takes them for its own and forbids reading the whole model's.
        # Models that have such fields of their own read them while they are built, before their blocks are resized.
        fields, own_fields = stock.per_layer_config, stock.is_heterogeneous.fget
        members["is_heterogeneous"] = property(lambda self: own_fields(self) or "streamprune" in vars(self))
        members["per_layer_config"] = property(
            lambda self: fields.fget(self) if own_fields(self) else BlockConfigs(self), fields.fset
        )
    if hasattr(stock, "logits_scaling"):
        members["logit_scale"] = property(lambda self: 1 / self.logits_scaling)  # vLLM's name and form
    return type(class_stem(base) + "Config", (stock,), members)


def stock_class(base, ending=None):
    """Return transformers' own class of model_type `base` with an ending of `AUTO`, None if there is none.

    Without an ending: the one that generates text, from images too if it can.
    """
    config = CONFIG_MAPPING[base]
    mappings = [AUTO[each][1] for each in ((WRAPPER, TEXT) if ending is None else (ending,))]
    return next((mapping[config] for mapping in mappings if config in mapping), None)


def auto_classes(base):
    """Return the names of our classes of model_type `base`, by name of the auto class that loads them."""
    own, generates = [BARE, CLASSIFIES], stock_class(base)
    named = {ending: class_stem(base) + ending for ending in own if stock_class(base, ending) is not None}
    named |= {
        ending: class_name(base) for ending in (TEXT, WRAPPER) if stock_class(base, ending) is generates is not None
    }
    return {AUTO[ending][0].__name__: name for ending, name in named.items()}


def class_name(base):
    """Return the name of the `model_class` that generates text: "PrunedQwen2ForCausalLM"."""
    return class_stem(base) + (TEXT if stock_class(base, WRAPPER) is None else WRAPPER)


@cache
def model_class(base, ending=None):
    """Return the class for pruned models of model_type `base`, a subclass of `stock_class`."""
    if ending is None:
        return model_class(base, class_name(base).removeprefix(class_stem(base)))
    stock, generates = stock_class(base, ending), stock_class(base)

    def __init__(self, config, *args, **kwargs):
        wrapper = generates is stock_class(base, WRAPPER)
        taken = wrapper or CONFIG_MAPPING[base].is_heterogeneous.fget(config)
        if taken and config.get_text_config()._attn_implementation == "vllm":
            advice = ": prune its text model alone (--text-only)" if wrapper else ""
            raise ValueError(f"vLLM cannot be told the widths of the blocks of a {base} model{advice}")
        # Models that classify take the model without a head from AutoModel, with its blocks resized.
        AutoModel.register(config_class(base), PrunedModel, exist_ok=True)
        stock.__init__(self, config, *args, **kwargs)
        widths = dict(config.streamprune)
        while ending == BARE and not hasattr(self, widths["blocks"].split(".")[0]):
            widths["blocks"] = widths["blocks"].partition(".")[2]
        bare = stock_class(base, BARE) and model_class(base, BARE)
        if not any(type(module) is bare for module in self.children()):
            resize(self, widths)
        if renamed := widths.get("renamed"):
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
    bases = (Batches, stock) if hasattr(stock, "generate_batch") else (stock,)
    return type(class_stem(base) + ending, bases, members)


class PrunedForCausalLM:
    """Placeholder for every `model_class`, so that registering does not import any model."""

    ending = None

    @classmethod
    def from_pretrained(cls, *args, config, **kwargs):
        """Load with the class of the config's model_type."""
        return cls.named(config).from_pretrained(*args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config, **kwargs):
        return cls.named(config)._from_config(config, **kwargs)

    @classmethod
    def named(cls, config):
        """Return the `model_class` of the config's model_type."""
        return model_class(config.model_type.removeprefix(PREFIX), cls.ending)


class PrunedModel(PrunedForCausalLM):
    """Placeholder for models without a head."""

    ending = BARE


class PrunedForSequenceClassification(PrunedForCausalLM):
    """Placeholder for models that classify texts."""

    ending = CLASSIFIES


def register(base):
    """Register pruned models of model_type `base` with AutoConfig and the auto classes of its kind, without importing a model."""
    AutoConfig.register(PREFIX + base, config_class(base), exist_ok=True)
    placeholders = {BARE: PrunedModel, CLASSIFIES: PrunedForSequenceClassification}
    for ending, (auto, _) in AUTO.items():
        if CONFIG_MAPPING[base] in auto._model_mapping:
            auto.register(config_class(base), placeholders.get(ending, PrunedForCausalLM), exist_ok=True)


def __getattr__(name):
    for base in CONFIG_MAPPING:
        if name.startswith(stem := class_stem(base)):
            if name == stem + "Config":
                return config_class(base)
            if name.removeprefix(stem) in AUTO:
                return model_class(base, name.removeprefix(stem))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
