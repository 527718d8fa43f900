"""Build transformers' config object from a config file that has been checked against the shards.

transformers' own loader trusts the file too much: it may name another file to read instead, Python code to run, an attention
kernel to download, or sizes that are looped over before any weight is read. So transformers never reads the file: its config
class receives the parsed fields, without those that select code or files.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import CheckpointError, one_line
from .architectures import ARCHITECTURES, Architecture, SublayerEntry, architecture_of
from .checkpoint import QUANTISED, Checkpoint, quantised_by
from .modeling_streamprune import PREFIX
from .names import CONFIG

OURS = "streamprune"
"""The config field with per-block widths."""
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
_ELSEWHERE = {
    "configuration_files": "another config to be read instead",
    "per_layer_config": "blocks of different configs, which the table of architectures does not know",
}
_PEFT = "PEFT wrote them: merge the adapter there (`merge_and_unload`), and save the merged model"
_PART = "they are part of a larger model: save its language model on its own"
_WRAPPERS = {
    "base_model": _PEFT,
    "base_layer": _PEFT,
    "lora_A": _PEFT,
    "lora_B": _PEFT,
    "module": "data parallel training wrote them: save the wrapped model, `model.module`",
    "_orig_mod": "`torch.compile` wrote them: save the model that was compiled, `model._orig_mod`",
    "_fsdp_wrapped_module": "FSDP wrote them: save its full state dict",
    "_checkpoint_wrapped_module": "activation checkpointing wrote them: save the model without its wrappers",
    "_forward_module": "Lightning wrote them: save the wrapped model, `model._forward_module`",
    "language_model": _PART,
    "text_model": _PART,
    "thinker": _PART,
}
"""Parts of tensor names that no supported model has, with the tool that adds them and how to remove them."""
_WIDEST = 1 << 31
"""Exclusive upper limit on any width."""
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
                f"{where}: it has a {name} ({quantised_by({name: fields[name]})}), but no tensor is packed: the field is left "
                f"over from before the weights were dequantised; delete {name} from the file"
            )
    for name, meaning in _ELSEWHERE.items():
        if fields.get(name) is not None:
            raise CheckpointError(f"{where}: {name} asks for {meaning}")
    architecture = _architecture(fields, str(checkpoint.directory))
    _check_names(checkpoint, architecture)
    checkpoint.complete_names(architecture.blocks.partition(".")[0], architecture.head)
    from transformers import CONFIG_MAPPING

    from .upstream import untested

    try:
        stock = CONFIG_MAPPING[fields["model_type"]]
        _check_depth(fields, stock, checkpoint, architecture, where)
        # A copy, since some config classes modify their arguments.
        config = stock.from_dict(copy.deepcopy({k: v for k, v in fields.items() if _is_setting(k)}))
        architecture_of(config.model_type.removeprefix(PREFIX), str(checkpoint.directory))
        entries = [architecture.sublayers(config, index) for index in range(config.num_hidden_layers)]
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{where}: transformers cannot build this model ({one_line(error, 400)}){untested()}"
        ) from error
    if fields["model_type"].startswith(PREFIX):
        _check_widths(fields.get(OURS), architecture, entries, len(checkpoint), where)
    _check_rotation(getattr(config, "rope_parameters", None), where)
    _check_numbers(fields, where)
    return architecture, config


def _architecture(fields: Mapping[str, Any], where: str) -> Architecture:
    """Return the table entry of the declared model_type.

    Raises:
        CheckpointError: not in the table, even if the model brings its own code.
    """
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
    """Check that tensors have the model's own names, with or without the base model's prefix, and no prefix of a wrapper.

    Raises:
        CheckpointError: names have another prefix; the message names it, and the tool that adds it if known.
    """
    *bases, blocks = map(re.escape, architecture.blocks.split("."))
    own = "".join(rf"(?:{base}\.)?" for base in bases)
    place = re.compile(rf"((?:[^.]+\.)*?){own}{blocks}\.\d+\.")
    around = {match[1]: name for name in checkpoint.claimed if (match := place.match(name))}
    if "" in around or not around:
        around = {piece: name for name in checkpoint.claimed for piece in name.split(".") if piece in _WRAPPERS}
    for what, name in around.items():
        advice = next(
            (_WRAPPERS[piece] for piece in what.split(".") if piece in _WRAPPERS), "save the model without it"
        )
        raise CheckpointError(
            f"{checkpoint.directory}: tensor names such as {name!r} have {what!r}, which no {architecture.model_type} "
            f"model has there; {advice}"
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
    """Check the number of blocks against the shards before anything loops over it.

    Raises:
        CheckpointError: the config has more blocks than the shards.
    """
    prefix = f"{architecture.blocks}."
    held = len({name[len(prefix) :].partition(".")[0] for name in checkpoint.claimed if name.startswith(prefix)})
    for name in ("num_hidden_layers", stock.attribute_map.get("num_hidden_layers", "num_hidden_layers")):
        claimed = fields.get(name)
        if isinstance(claimed, int | float) and claimed > held:
            raise CheckpointError(f"{where}: {name} is {claimed}; the shards hold {held} blocks")


def _check_rotation(settings: Any, where: str) -> None:
    """Check that the settings of rotary embeddings, common or per kind of block, give finite angles.

    Raises:
        CheckpointError: a setting is not a finite number above zero.
    """
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
    """Reject numbers outside the range of float32, which torch functions do not accept.

    Raises:
        CheckpointError: there is one, at any depth.
    """
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else ((name, each) for each in value):
            _check_numbers(each, where, key)
    elif isinstance(value, int | float) and not -_LARGEST <= value <= _LARGEST:
        raise CheckpointError(f"{where}: {name} is {str(value)[:40]}, which is beyond float32")


def _check_widths(
    widths: Any, architecture: Architecture, entries: Sequence[Sequence[SublayerEntry]], most: int, where: str
) -> None:
    """Check that per-block widths name only modules and attributes that the architecture can resize.

    Args:
        widths: the value of the config field `OURS`.
        entries: sublayers of each block.
        most: maximum number of experts.

    Raises:
        CheckpointError: an unknown part, module or attribute, a wrong number of blocks, or an invalid width.
    """
    known: dict[str, set[str]] = {"rows": set(), "columns": set(), "attributes": set(), "experts": set()}
    for entry in (entry for block in entries for entry in block):
        if entry.experts is not None:
            known["experts"].add(entry.experts)
            continue
        known["rows"] |= {producer.name for producer in (*entry.producers, *entry.vectors)}
        known["columns"].add(entry.consumer)
        known["attributes"] |= set(entry.counts)
    if not isinstance(widths, dict) or widths.get("blocks") != architecture.blocks:
        raise CheckpointError(f'{where}: "{OURS}" must say where the blocks are, "blocks": "{architecture.blocks}"')
    for part in widths.keys() - {"blocks", "renamed"}:
        if part not in known:
            raise CheckpointError(f'{where}: "{OURS}" has {part!r}; it has blocks, renamed, {", ".join(known)}')
    experts = 0
    for part in known:
        listed = widths.get(part, {} if part == "experts" else None)
        if not isinstance(listed, dict):
            raise CheckpointError(f'{where}: "{OURS}" has no "{part}"')
        for name, each in listed.items():
            if name not in known[part]:
                raise CheckpointError(f'{where}: "{part}" of "{OURS}" names {name!r}, which no block has')
            if not isinstance(each, list) or len(each) != len(entries):
                raise CheckpointError(
                    f'{where}: "{part}" of {name} must have one value for each of {len(entries)} blocks'
                )
            for value in each:
                own = value if part == "experts" and isinstance(value, list) else [value]
                if value is not None and not all(type(size) is int and 0 < size < _WIDEST for size in own):
                    raise CheckpointError(f'{where}: "{part}" of {name} has {str(value)[:40]}, which is no width')
                experts += len(own) if part == "experts" and value is not None else 0
    if experts > most:
        raise CheckpointError(f'{where}: "{OURS}" has {experts} experts; the shards hold {most} tensors')
    pairs = widths.get("renamed", [])
    if not isinstance(pairs, list) or any(pair not in [list(p) for p in architecture.stored] for pair in pairs):
        raise CheckpointError(f'{where}: "renamed" of "{OURS}" has what {architecture.model_type} does not rename')
