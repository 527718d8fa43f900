"""Build transformers' config object from a config file that has been checked against the shards.

transformers' own loader trusts the file too much: it may name another file to read instead, Python code to run, an attention
kernel to download, or sizes that are looped over before any weight is read. So its config class receives the parsed fields,
without those that select code or files.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import CheckpointError
from .architectures import ARCHITECTURES, Architecture, SublayerEntry, architecture_of
from .checkpoint import Checkpoint
from .modeling_streamprune import PREFIX
from .names import CONFIG
from .quantised import QUANTISED, quantised_by

OURS = "streamprune"  # the config field with per-block widths
_CHOOSING = {
    "auto_map",
    "name_or_path",
    "num_labels",
    "id2label",
    "label2id",
    "problem_type",
    "is_encoder_decoder",
    "return_dict",
    "output_hidden_states",
    "output_router_logits",
    "tie_last_hidden_states",
}
"""Fields that select code, files or the outputs of a forward pass, and label fields, which language models do not
have."""
_UNSUPPORTED = ("configuration_files", "per_layer_config")
"""Fields that ask for another config, or for blocks of different configs."""
_WRAPPERS = {
    *("base_model", "base_layer", "lora_A", "lora_B"),  # PEFT
    *("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"),
    *("language_model", "text_model", "thinker"),
}
"""Parts of tensor names that adapters, training wrappers and larger models add, and that no supported model has."""

_LARGEST = 3.4028234663852886e38
"""Largest finite float32."""
_ROTATION = {
    "rope_theta",
    "factor",
    "attention_factor",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "short_factor",
    "long_factor",
    "original_max_position_embeddings",
}
"""Rotary embedding settings that must be positive numbers or lists of them: divisors, or arguments of a logarithm."""


def read_configuration(checkpoint: Checkpoint) -> tuple[Architecture, Any]:
    """Return the table entry and transformers' config of a checkpoint, and complete its tensor names (`complete_names`).

    Raises:
        CheckpointError: unsupported architecture, a quantisation field but no quantised weights, tensor names with the prefix
            of a wrapper, more blocks than the shards hold, a config that transformers rejects, numbers out of range, or
            invalid per-block widths.
    """
    fields, where = checkpoint.config, f"{checkpoint.directory}/{CONFIG}"
    for name in QUANTISED:
        if fields.get(name) is not None:
            raise CheckpointError(
                f"{where}: it has a {name} ({quantised_by({name: fields[name]})}), but no tensor is packed; if the weights "
                f"were dequantised, delete {name} from the file"
            )
    for name in _UNSUPPORTED:
        if fields.get(name) is not None:
            raise CheckpointError(f"{where}: {name} is not supported")
    architecture = _architecture(fields, str(checkpoint.directory))
    _check_names(checkpoint, architecture)
    checkpoint.complete_names(architecture.blocks.partition(".")[0], architecture.head)
    from transformers import CONFIG_MAPPING

    from .upstream import translated

    with translated(where, "build this model"):
        stock = CONFIG_MAPPING[fields["model_type"]]
        _check_depth(fields, stock, checkpoint, architecture, where)
        # A copy, since some config classes modify their arguments.
        config = stock.from_dict(copy.deepcopy({k: v for k, v in fields.items() if _is_setting(k)}))
        architecture_of(config.model_type.removeprefix(PREFIX), str(checkpoint.directory))
        entries = [architecture.sublayers(config, index) for index in range(config.num_hidden_layers)]
    if fields["model_type"].startswith(PREFIX):
        _check_widths(fields.get(OURS), architecture, entries, len(checkpoint), where)
    _check_rotation(getattr(config, "rope_parameters", None), where)
    _check_numbers(fields, where)
    return architecture, config


def _architecture(fields: Mapping[str, Any], where: str) -> Architecture:
    """Return the table entry of the declared model_type. Raises a CheckpointError for others, even those that bring their own code."""
    declared = fields.get("model_type")
    base = declared.removeprefix(PREFIX) if isinstance(declared, str) else None
    if base == "mistral" == declared and "layer_types" in fields:
        base = "ministral"  # as transformers does
    if base not in ARCHITECTURES and fields.get("auto_map") is not None:
        raise CheckpointError(
            f"{where}: model_type {declared!r} is not supported, and the code that the model brings along (auto_map) is "
            f"never run; supported are {', '.join(sorted(ARCHITECTURES))}"
        )
    return architecture_of(base, where)


def _check_names(checkpoint: Checkpoint, architecture: Architecture) -> None:
    """Raise a CheckpointError if tensor names have a prefix other than the base model's own, or parts that wrappers add."""
    *bases, blocks = map(re.escape, architecture.blocks.split("."))
    own = "".join(rf"(?:{base}\.)?" for base in bases)
    place = re.compile(rf"((?:[^.]+\.)*?){own}{blocks}\.\d+\.")
    around = {match[1]: name for name in checkpoint.claimed if (match := place.match(name))}
    if "" in around or not around:
        around = {piece: name for name in checkpoint.claimed for piece in name.split(".") if piece in _WRAPPERS}
    for what, name in around.items():
        raise CheckpointError(
            f"{checkpoint.directory}: tensor names such as {name!r} have {what!r}, which no {architecture.model_type} model "
            "has there; save the model itself: merge adapters (`merge_and_unload`), unwrap a compiled or distributed model, "
            "or take the language model out of a larger one"
        )


def _is_setting(name: str) -> bool:
    """Return whether a field is a model setting: it selects no code and overrides no internals of transformers' config class."""
    from transformers import PreTrainedConfig

    own = inspect.getattr_static(PreTrainedConfig, name, None)
    plain = own is None or isinstance(own, bool | int | float | str)
    settable = isinstance(own, property) and own.fset is not None
    return name not in _CHOOSING and not name.startswith("_") and (plain or settable)


def _check_depth(
    fields: Mapping[str, Any], stock: Any, checkpoint: Checkpoint, architecture: Architecture, where: str
) -> None:
    """Check the number of blocks against the shards before anything loops over it."""
    prefix = f"{architecture.blocks}."
    held = len({name[len(prefix) :].partition(".")[0] for name in checkpoint.claimed if name.startswith(prefix)})
    for name in ("num_hidden_layers", stock.attribute_map.get("num_hidden_layers", "num_hidden_layers")):
        claimed = fields.get(name)
        if isinstance(claimed, int | float) and claimed > held:
            raise CheckpointError(f"{where}: {name} is {claimed}; the shards hold {held} blocks")


def _check_rotation(settings: Any, where: str) -> None:
    """Check that settings of rotary embeddings, common or per kind of block, are positive numbers that give finite angles."""
    for name, value in settings.items() if isinstance(settings, dict) else ():
        if isinstance(value, dict):
            _check_rotation(value, where)
        elif name in _ROTATION and value is not None:
            for each in value if isinstance(value, list) else [value]:
                if type(each) not in (int, float) or not 0 < each <= _LARGEST:
                    raise CheckpointError(
                        f"{where}: {name} of the rotary embedding is {str(each)[:40]}; it must be a finite number above 0"
                    )


def _check_numbers(value: Any, where: str, name: str = "the config") -> None:
    """Reject numbers outside the range of float32, at any depth: torch functions do not accept them."""
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else ((name, each) for each in value):
            _check_numbers(each, where, key)
    elif isinstance(value, int | float) and not -_LARGEST <= value <= _LARGEST:
        raise CheckpointError(f"{where}: {name} is {str(value)[:40]}, which is beyond float32")


def _check_widths(
    widths: Any, architecture: Architecture, entries: Sequence[Sequence[SublayerEntry]], most: int, where: str
) -> None:
    """Check the parts of the config field `OURS` that `modeling_streamprune` applies to whatever they name, and that it
    builds at most `most` experts.

    Other mistakes show when the model is built and compared with the shards.
    """
    counts = {name for block in entries for entry in block for name in entry.counts}
    if not isinstance(widths, dict) or widths.get("blocks") != architecture.blocks:
        raise CheckpointError(f'{where}: "{OURS}" must have "blocks": "{architecture.blocks}"')
    listed = widths.get("experts", {})
    held = (
        [own for blocks in listed.values() if isinstance(blocks, list) for own in blocks]
        if isinstance(listed, dict)
        else None
    )
    if held is None or sum(len(own) for own in held if isinstance(own, list)) > most:
        raise CheckpointError(
            f'{where}: "experts" of "{OURS}" lists more experts than the shards hold tensors ({most})'
        )
    attributes, renamed = widths.get("attributes"), widths.get("renamed", [])
    if not isinstance(attributes, dict) or not attributes.keys() <= counts:
        raise CheckpointError(f'{where}: "attributes" of "{OURS}" may have {", ".join(sorted(counts)) or "none"}')
    if not isinstance(renamed, list) or not all(pair in map(list, architecture.stored) for pair in renamed):
        raise CheckpointError(f'{where}: "renamed" of "{OURS}" does not fit a {architecture.model_type} model')
