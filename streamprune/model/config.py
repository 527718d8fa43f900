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
from importlib.metadata import version
from typing import Any

from ..errors import CheckpointError
from .architectures import Architecture, SublayerEntry
from .checkpoint import Checkpoint
from .modeling_streamprune import COUNTS_OF_EXPERTS, PREFIX
from .names import CONFIG
from .quantised import QUANTISED, quantised_by

OURS = "streamprune"  # the config field with per-block widths
NO_OP = "no_op"  # its part that describes sublayers which went as a whole
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
_UNSUPPORTED = ("configuration_files",)
"""Fields that ask for another config."""
_WRAPPERS = {
    *("base_model", "base_layer", "lora_A", "lora_B"),  # PEFT
    *("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"),
    *("language_model", "text_model", "thinker"),
}
"""Parts of tensor names that adapters, training wrappers and larger models add, and that no text model has."""

_NUMBER = re.compile(r"(?<=\.)(\d+)(?=\.)")
"""A number in a tensor name: that of a block or an expert."""
_DEPTHS = {"depth", "num_layers", "n_layers", "n_layer", "encoder_layers", "decoder_layers"}
"""Other fields with numbers of blocks, such as those of a vision tower."""
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


def read_configuration(checkpoint: Checkpoint) -> tuple[str, Any]:
    """Return the stock model_type and transformers' config of a checkpoint.

    Raises:
        CheckpointError: a model_type that transformers does not know, a quantisation field but no quantised weights, more
            blocks than the shards hold, a config that transformers rejects, or numbers out of range.
    """
    fields, where = checkpoint.config, f"{checkpoint.directory}/{CONFIG}"
    text = fields.get("text_config")
    for name in QUANTISED:
        for part in (fields, text if isinstance(text, dict) else {}):
            if part.get(name) is not None:
                raise CheckpointError(
                    f"{where}: it has a {name} ({quantised_by({name: part[name]})}), but no tensor is packed; if the weights "
                    f"were dequantised, delete {name} from the file"
                )
    for name in _UNSUPPORTED:
        if fields.get(name) is not None:
            raise CheckpointError(f"{where}: {name} is not supported")
    model_type = _model_type(fields, where)
    from transformers import CONFIG_MAPPING

    from .upstream import settings, translated

    with translated(where, "build this model"):
        stock = CONFIG_MAPPING[model_type]
        _check_depth(fields, stock, checkpoint, where)
        # A copy, since some config classes modify their arguments.
        own = copy.deepcopy({k: v for k, v in fields.items() if _is_setting(k)}) | {"model_type": model_type}
        config = stock.from_dict(settings(own))
        if config.model_type != model_type:
            raise CheckpointError(
                f"{where}: model_type {model_type!r} is read as {config.model_type!r}, which is not supported"
            )
        text = config.get_text_config()
        _check_rotation(getattr(text, "rope_parameters", None), where)
        _check_experts(text, where)
    _check_numbers(fields, where)
    return model_type, config


def _model_type(fields: Mapping[str, Any], where: str) -> str:
    """Return the stock model_type. Raises a CheckpointError if transformers has none, even if the model brings its own code."""
    from transformers import CONFIG_MAPPING

    from .modeling_streamprune import stock_class

    declared = fields.get("model_type")
    base = declared.removeprefix(PREFIX) if isinstance(declared, str) else ""
    if base == "mistral" == declared and "layer_types" in fields:
        base = "ministral"  # as transformers does
    if base in CONFIG_MAPPING and stock_class(base) is not None:
        return base
    code = "; the code that the model brings along (auto_map) is never run" if fields.get("auto_map") else ""
    raise CheckpointError(
        f"{where}: model_type {declared!r} is not supported: transformers {version('transformers')} has no such model that "
        f"generates text{code}"
    )


def check_names(checkpoint: Checkpoint, architecture: Architecture) -> None:
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


def _check_depth(fields: Mapping[str, Any], stock: Any, checkpoint: Checkpoint, where: str) -> None:
    """Check the number of blocks against the shards before anything loops over it."""
    numbers: dict[str, set[str]] = {}
    for name in checkpoint.claimed:
        for match in _NUMBER.finditer(name):
            numbers.setdefault(name[: match.start()], set()).add(match[1])
    held = max((len(each) for each in numbers.values()), default=0)
    # Blocks without attention and FFN hold nothing.
    removed = ours.get(NO_OP) if isinstance(ours := fields.get(OURS), dict) else None
    listed = [len(each) for each in removed.values() if isinstance(each, list)] if isinstance(removed, dict) else []
    held = max(held, min(max(listed, default=0), held + len(checkpoint)))
    own = {stock.attribute_map.get("num_hidden_layers", "num_hidden_layers"), "num_hidden_layers"}
    for part in (fields, *(value for value in fields.values() if isinstance(value, dict))):
        for name in own | _DEPTHS:
            claimed, most = part.get(name), held if name in own else len(checkpoint)
            if isinstance(claimed, int | float) and claimed > most:
                raise CheckpointError(f"{where}: {name} is {claimed}; the shards hold {most} blocks")
        for name in COUNTS_OF_EXPERTS:
            if isinstance(claimed := part.get(name), int | float) and claimed > len(checkpoint):
                raise CheckpointError(f"{where}: {claimed} experts or more; the shards hold {len(checkpoint)} tensors")


def _check_experts(config: Any, where: str) -> None:
    """Check the number of experts per token."""
    held = next(
        (getattr(config, name, None) for name in COUNTS_OF_EXPERTS if getattr(config, name, None) is not None), None
    )
    chosen = getattr(config, "num_experts_per_tok", None)
    if isinstance(held, int) and isinstance(chosen, int) and held > 1 and not 1 <= chosen <= held:
        raise CheckpointError(f"{where}: num_experts_per_tok is {chosen}; it must be 1 to {held}")


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


def check_widths(
    widths: Any, architecture: Architecture, entries: Sequence[Sequence[SublayerEntry]], most: int, where: str
) -> None:
    """Check the parts of the config field `OURS` that `modeling_streamprune` applies to whatever they name, and that it
    builds at most `most` experts. `entries` are those of the stock model's blocks.

    Other mistakes show when the model is built and compared with the shards.
    """
    counts = {name for block in entries for entry in block for name in (*entry.counts, *entry.routed)}
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
    removed = widths.get(NO_OP, {})
    for name, each in removed.items() if isinstance(removed, dict) else ((NO_OP, removed),):
        for index, own in enumerate(entries):
            found = each[index] if isinstance(each, list) and index < len(each) else ...
            possible = [e.removal.arguments(e.kind) for e in own if e.removal and e.removal.seat == name]
            if found is not None and found not in possible:
                raise CheckpointError(f'{where}: {NO_OP!r} of "{OURS}" does not fit {name} of block {index}')
    attributes, renamed = widths.get("attributes"), widths.get("renamed", [])
    if not isinstance(attributes, dict) or not attributes.keys() <= counts:
        raise CheckpointError(f'{where}: "attributes" of "{OURS}" may have {", ".join(sorted(counts)) or "none"}')
    if not isinstance(renamed, list) or not all(pair in map(list, architecture.family.stored) for pair in renamed):
        raise CheckpointError(f'{where}: "renamed" of "{OURS}" does not fit a {architecture.model_type} model')
