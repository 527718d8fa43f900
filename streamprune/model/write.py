"""Complete a folder of shards to a checkpoint: index, config, tokenizer, model card, report, manifest."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import CheckpointError, DamageError, NumericalError
from ..system import files
from ..system.progress import Progress
from ..system.strict_json import write_json
from . import fp8, manifest
from . import modeling_streamprune as modeling
from .architectures import FAMILIES, SublayerEntry, family_of, is_stock, stock_config
from .block import rows_of
from .checkpoint import Shard, data_bytes, shard_name, write_index, write_shard
from .config import NO_OP, OURS
from .names import CARD, COMPANIONS, CONFIG, INDEX, REPORT, TOKENIZER_CONFIG, TOKENIZER_FILES, canonical
from .site import DECILM, FREE, Layout, Site, routed
from .skeleton import Skeleton
from .tokenizer import named_tokenizer, tokenizer_folder
from .verify import check

BLOCK_CONFIGS = "block_configs"  # the config field of DeciLM with per-block widths
OTHERS = 1 << 30
"""Bytes of a shard with tensors that take no part in computing text."""
AGAIN = "the disk, the memory or another program damaged it; run the same command again, and it will be made again"
"""Advice at the end of messages about damaged files."""


def block_shard(skeleton: Skeleton, index: int) -> str:
    """Return the file name of a block's shard. The first shard holds the embeddings, the last the final norm and head."""
    return shard_name(index + 2, _shards(skeleton))


def write_block(
    skeleton: Skeleton,
    index: int,
    weights: Mapping[str, Tensor],
    folder: Path,
    store: str = "auto",
    stock: bool = False,
) -> str:
    """Write a block's shard from its weights by name inside the block; return its digest.

    `store` is ``auto`` or ``fp8``; `stock` says that the result is a stock checkpoint, in which experts are fused if the source's are.
    """
    held = {name: full for name, full in skeleton.block_names(index).items() if name in weights}
    names = {name: skeleton.written_name(full, stock) for name, full in held.items()}
    if store == "fp8":
        weights = fp8.quantised(skeleton, index, weights)
        names |= {name: names[name.removesuffix(fp8.SCALE)] + fp8.SCALE for name in weights.keys() - names.keys()}
    tensors, whole = {names[name]: weights[name] for name in names}, stock and skeleton.written_type not in FAMILIES
    return write_shard(folder / block_shard(skeleton, index), _fused(skeleton, index, tensors) if whole else tensors)


def _fused(skeleton: Skeleton, index: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a block, by written name, with experts in fused tensors if they are so in the source."""
    found = dict(tensors)
    for entry in (entry for entry in skeleton.entries[index] if entry.experts):
        path = f"{skeleton.architecture.blocks}.{index}.{entry.experts}"
        if not _are_fused(skeleton, path):
            continue
        written = skeleton.written_name(path)
        held = next(block for block in skeleton.stock_blocks.values() if _has(block, entry.experts or ""))
        experts = held.get_submodule(entry.experts or "")
        whole = {leaf: modeling.fused(experts, written, leaf, tensors) for leaf, _ in experts.named_parameters()}
        found = {name: tensor for name, tensor in found.items() if not name.startswith(f"{written}.")}
        found |= {skeleton.written_name(f"{path}.{leaf}", True): each.contiguous() for leaf, each in whole.items()}
    return found


def _has(block: nn.Module, name: str) -> bool:
    return any(path == name for path, _ in block.named_modules())


def _are_fused(skeleton: Skeleton, path: str) -> bool:
    """Return whether the source's files hold the experts at `path` in fused tensors, plain or in MXFP4."""
    leaf = f"{path}.down_proj"
    named = skeleton.checkpoint.names.get(leaf, leaf)
    return any(f"{named}{end}" in skeleton.checkpoint.stored for end in ("", "_blocks"))


def write_outside(skeleton: Skeleton, folder: Path, stock: bool) -> dict[str, str]:
    """Write the shards outside the blocks (embeddings, final norm, head, other towers) unchanged. Returns their digests by file name.

    `stock` is that of `write_block`.
    """
    checkpoint, total = skeleton.checkpoint, _shards(skeleton)
    digests = {}
    for number, names in _outside(skeleton).items():
        shard = shard_name(number, total)
        tensors = {skeleton.written_name(name, stock): checkpoint.read(name) for name in names}
        digests[shard] = write_shard(folder / shard, tensors)
    return digests


def _outside(skeleton: Skeleton) -> dict[int, list[str]]:
    """Return the names of the tensors of each shard outside the blocks, by the shard's number.

    Tensors that take no part in computing text follow the head, in shards of at most 1 GiB unless one is larger.
    """
    depth, head = len(skeleton), skeleton.outside.head_names()
    found = {1: skeleton.outside.embed_names()} | ({depth + 2: head} if head else {})
    number, held = depth + 1 + bool(head), OTHERS
    for name in skeleton.carried_names():
        size = max(1, skeleton.checkpoint[name].nbytes)
        if held + size > OTHERS:
            number, held = number + 1, 0
        held += size
        found.setdefault(number, []).append(name)
    return found


def finish(
    skeleton: Skeleton,
    folder: Path,
    sites: Sequence[Site],
    report: dict[str, Any],
    card: Callable[[Path], str],
    layout: Layout,
    digests: Mapping[str, str],
    progress: Progress,
    stock: bool,
) -> dict[str, str]:
    """Write all files besides the shards, the manifest last; then read everything back and verify it.

    Args:
        skeleton: the source model.
        folder: holds the shards.
        sites: sites of the pruned model, in order.
        report: contents of `report.json`; must include "parameters_after".
        card: writes the model card, given the folder, in which only the card itself and the manifest are missing.
        layout: the requested layout. If the stock config can express the widths, it is used whatever the layout.
        digests: SHA-256 in hex of the files already written, including all shards, by name.
        stock: that of `write_block`.

    Returns:
        The digests of all files except the manifest.

    Raises:
        DamageError: a file on disk differs from what was written.
        NumericalError: a written tensor holds NaN or Inf.
        CheckpointError: the tensors do not match the config.
    """
    digests, total = dict(digests), _shards(skeleton)
    placed = {name: shard_name(number, total) for number, names in _outside(skeleton).items() for name in names}
    placed = {skeleton.written_name(name, stock): shard for name, shard in placed.items()}
    blocks = [shard_name(index + 2, total) for index in range(len(skeleton))]
    source = skeleton.checkpoint
    if lost := [shard for shard in sorted({*placed.values(), *blocks}) if not (folder / shard).is_file()]:
        raise DamageError(f"{folder}: {lost[0]} is missing; {AGAIN}")
    placed |= {name: shard for shard in blocks for name in Shard(folder / shard)}
    size = sum(data_bytes(folder / shard) for shard in set(placed.values()))
    scales = [name for name in placed if name.endswith(fp8.SCALE)]
    digests[INDEX] = write_index(folder, placed, report["parameters_after"], size)
    stock = stock and fits_stock(skeleton, sites)
    config = uniform_config if stock else decilm_config if layout is DECILM else free_config
    written = config(skeleton, sites)
    if scales:
        written["quantization_config"] = fp8.quantisation_config(skeleton, scales)
    digests[CONFIG] = write_json(folder / CONFIG, written)
    with tokenizer_folder(source.directory) as home:
        copies = {name: source.directory / name for name in COMPANIONS}
        copies |= {name: home / name for name in TOKENIZER_FILES}
        if not stock:
            path = Path(modeling.__file__)
            copies[path.name] = path
            if (named := named_tokenizer(home)) is not None:
                del copies[TOKENIZER_CONFIG]
                digests[TOKENIZER_CONFIG] = write_json(folder / TOKENIZER_CONFIG, named)
        for name, path in copies.items():
            if path.is_file():
                digests[name] = files.copy(path, folder / name)
    digests[REPORT] = write_json(folder / REPORT, report)
    try:
        described = card(folder)
    except CheckpointError:
        _check_written(folder, digests, progress)  # if the disk does not hold what was written, this says so
        raise
    digests[CARD] = files.write_text(folder / CARD, described)
    manifest.write(folder, digests)
    _check_written(folder, digests, progress)
    return digests


def fits_stock(skeleton: Skeleton, sites: Sequence[Site]) -> bool:
    """Return whether the stock architecture can load a checkpoint with these sites."""
    whole = not any(entry.gone for entries in skeleton.entries for entry in entries) and all(
        site.units for site in sites if site.expert is None
    )
    left = [site for site in sites if site.units]
    if not whole or len({len(own) for own in routed(left).values()}) > 1:
        return False
    if skeleton.written_type in FAMILIES:
        return is_stock(skeleton.written_type, {**_plain_config(skeleton), **_expert_fields(skeleton, left)}, left)
    # What fewer experts alone change is known of other types too.
    before = {site.name: site for site in skeleton.all_sites()}
    same = all(site.units == before[site.name].units for site in left)
    known = len(left) == len(before) or bool(_expert_fields(skeleton, left))
    return same and known and _as_stored(skeleton)


def _as_stored(skeleton: Skeleton) -> bool:
    """Return whether the source is a stock checkpoint whose files hold the tensors of blocks as the model has them, but for fused
    experts; its files may name them otherwise.
    """
    checkpoint = skeleton.checkpoint
    if OURS in checkpoint.config:
        return False
    for index, entries in enumerate(skeleton.entries):
        fused = [entry.experts for entry in entries if entry.experts]
        paths = (f"{skeleton.architecture.blocks}.{index}.{name}" for name in fused)
        apart = tuple(f"{path}." for path in paths if _are_fused(skeleton, path))
        names = skeleton.block_names(index).values()
        held = {name for name in names if checkpoint.names.get(name) in checkpoint.stored}
        if any(name not in held and not name.startswith(apart) for name in names):
            return False
        # As the text model alone, only what needs no conversion.
        if skeleton.alone and any(
            name != stored for name, stored in checkpoint.names.items() if name in held or name.startswith(apart)
        ):
            return False
    return True


def _known_experts(skeleton: Skeleton) -> dict[str, int]:
    """Return the fields of the source's config that count routed experts: no block has more of them."""
    fields, most = skeleton.config.to_dict(), max(map(len, routed(skeleton.all_sites()).values()), default=0)
    return {
        name: fields[name]
        for name in modeling.COUNTS_OF_EXPERTS
        if type(fields.get(name)) is int and fields[name] >= most > 0
    }


def _expert_fields(skeleton: Skeleton, sites: Sequence[Site]) -> dict[str, int]:
    """Return those fields with the number that stays in each block, if it has changed."""
    numbers = {len(own) for own in routed(sites).values()}
    return {name: n for name, known in _known_experts(skeleton).items() for n in numbers if n != known}


def _check_written(folder: Path, digests: Mapping[str, str], progress: Progress) -> None:
    """Verify that the disk holds what was written, and that it is a valid checkpoint. Raises the errors of `finish`."""
    found = check(folder, digests, progress)
    for name in found.unlisted:
        progress.say(f"{folder} also contains {name}, which is not part of the result and not in {manifest.NAME}")
    # A checkpoint that was just written must not contain anything extra.
    faults = (*found.faults, *found.extra)
    if not faults:
        return
    damaged = [fault for fault in faults if fault.kind == "file"]
    first = (damaged or faults)[0]
    message = f"{folder}: {first}" + (f" (and {len(faults) - 1} more)" if len(faults) > 1 else "")
    if damaged:
        raise DamageError(f"{message}; {AGAIN}")
    if first.kind == "values":
        raise NumericalError(f"{message}, already when computed; other settings may help, such as --dtype float32")
    raise CheckpointError(message)


def uniform_config(skeleton: Skeleton, sites: Sequence[Site]) -> dict[str, Any]:
    """Return the source's config with the new widths, for the stock architecture."""
    base = skeleton.written_type
    stock = modeling.stock_class(base)
    left = [site for site in sites if site.units]
    config, experts = stock_config(base, _plain_config(skeleton), left), _expert_fields(skeleton, left)
    if experts and "text_config" in config:
        config["text_config"] = {**config["text_config"], **experts}
    elif experts:
        config |= experts
    return {**config, "architectures": [stock.__name__]}


def free_config(skeleton: Skeleton, sites: Sequence[Site]) -> dict[str, Any]:
    """Return the source's config with per-block widths, for `modeling_streamprune`."""
    base = skeleton.written_type
    stem, module = modeling.class_stem(base), modeling.__name__.rpartition(".")[2]
    widths: dict[str, dict[str, list[Any]]] = {"rows": {}, "columns": {}, "attributes": {}, "experts": {}, "fields": {}}
    # Sublayers that the source lacks already.
    widths[NO_OP] = copy.deepcopy(skeleton.checkpoint.config.get(OURS, {}).get(NO_OP, {}))

    def put(what: str, name: str, block: int, value: Any) -> None:
        widths[what].setdefault(name, [None] * len(skeleton))[block] = value

    after = {site.name: site for site in sites}
    for index, entries in enumerate(skeleton.entries):
        for entry in entries:
            if entry.experts is not None:
                own = [after[site.name] for site, _ in skeleton.places(index) if site.expert is not None]
                own = [site for site in own if site.units]
                put("experts", entry.experts, index, [site.columns for site in own])
                if len(own) not in _known_experts(skeleton).values():
                    for part in entry.routing:
                        put("columns" if part.axis else "rows", part.name, index, len(own))
                    for name in entry.routed:
                        put("attributes", name, index, len(own))
        for before, entry in skeleton.places(index):
            site = after[before.name]
            if site.expert is not None:
                continue
            if not site.units:
                assert entry.removal is not None
                put(NO_OP, entry.removal.seat, index, entry.removal.arguments(entry.kind))
                continue
            for producer in (*entry.producers, *entry.vectors):
                parts = producer.stretches(before.units, rows_of(skeleton.block(index), producer.name))
                put("rows", producer.name, index, sum(part // before.units * site.units for part in parts))
            assert entry.consumer is not None
            put("columns", entry.consumer, index, site.columns)
            for name in entry.counts:
                count = modeling.count(skeleton.block(index), name)
                put("attributes", name, index, count // before.units * site.units)
            mixture = any(each.experts is not None for each in entries)
            for name, value in _own_fields(skeleton, entry, site, mixture).items():
                put("fields", name, index, value)
    name = modeling.class_name(base)
    return {
        **_current_rotation(skeleton, _plain_config(skeleton)),
        "model_type": modeling.PREFIX + base,
        "architectures": [name],
        "auto_map": {
            "AutoConfig": f"{module}.{stem}Config",
            **{auto: f"{module}.{kind}" for auto, kind in modeling.auto_classes(base).items()},
        },
        "streamprune": {
            "blocks": skeleton.written_name(skeleton.architecture.blocks),
            **{what: each for what, each in widths.items() if each or what != NO_OP},
            **({"renamed": skeleton.renamed} if skeleton.renamed else {}),
        },
    }


def _own_fields(skeleton: Skeleton, entry: SublayerEntry, site: Site, mixture: bool) -> dict[str, int]:
    """Return the fields of the stock config that hold the widths of a block's site, for runtimes that read one config per block."""
    config = skeleton.block_config(site.block)
    if site.kind == "attention":
        fields = {"num_attention_heads": site.heads}
        if getattr(config, "kv_lora_rank", None) is None:
            keys = next((name for name in ("num_kv_heads", "num_key_value_heads") if hasattr(config, name)), None)
            fields |= {"head_dim": site.head_width} | (
                {keys: site.heads if entry.repeats else site.units} if keys else {}
            )
        return fields
    # In a block with experts, these fields mean something else.
    plain = site.kind == "ffn" and not mixture
    names = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size") if plain else ()
    return {name: site.columns for name in names if hasattr(config, name)}


def decilm_config(skeleton: Skeleton, sites: Sequence[Site]) -> dict[str, Any]:
    """Return `free_config` with the fields that runtimes with their own DeciLM architecture (`nemotron_nas` in vLLM) read.

    Multiples of 256 are FFN widths that all of them read, from a factor: ``2/3 · ffn_mult · d``, rounded up to a multiple of 256. The
    factor here aims at half a multiple below the width, so that its rounding cannot change the result. Other widths are in
    ``intermediate_size``, which vLLM reads if there is no factor.
    """
    left = {(site.kind, site.block): site for site in sites if site.units}
    attention = next((site for site in left.values() if site.kind == "attention"), None)
    blocks: list[dict[str, Any]] = []
    for index in range(len(skeleton)):
        has_attention, ffn = ("attention", index) in left, left.get(("ffn", index))
        group = attention.heads // attention.units if attention and has_attention else None
        width = {"ffn_mult": None} if ffn is None else _decilm_width(ffn)
        blocks.append(
            {
                "attention": {"no_op": not has_attention, "replace_with_linear": False, "n_heads_in_group": group},
                "ffn": {"no_op": ffn is None, "replace_with_linear": False, **width},
            }
        )
    return {
        **free_config(skeleton, sites),
        # vLLM compares names, not functions.
        "hidden_act": canonical(skeleton.config.hidden_act),
        **{field: getattr(attention, name) for field, name in family_of("llama").widths["attention"] if attention},
        "architectures": ["DeciLMForCausalLM"],
        BLOCK_CONFIGS: blocks,
    }


def _decilm_width(ffn: Site) -> dict[str, float]:
    """Return the fields of DeciLM's config that hold an FFN's width."""
    step = 256
    if ffn.columns % step:
        return {"intermediate_size": ffn.columns}
    return {"ffn_mult": round(1.5 * (ffn.columns - step / 2) / ffn.outputs, 6)}


def layout_of(skeleton: Skeleton) -> Layout:
    """Return the layout that the config of a non-stock checkpoint implies."""
    return DECILM if BLOCK_CONFIGS in skeleton.checkpoint.config else FREE


def _current_rotation(skeleton: Skeleton, config: dict[str, Any]) -> dict[str, Any]:
    """Return a config with `rope_parameters`, transformers' current form, in place of `rope_scaling` and `rope_theta`.

    When transformers loads only the tokenizer, without our code, it reads the config without knowing the model class, and then it
    cannot convert the old fields.
    """
    if not config.get("rope_scaling"):
        return config
    kept = {name: value for name, value in config.items() if name not in ("rope_scaling", "rope_theta")}
    return {**kept, "rope_parameters": dict(skeleton.config.rope_parameters)}


def _plain_config(skeleton: Skeleton) -> dict[str, Any]:
    ours = ("streamprune", "auto_map", BLOCK_CONFIGS)
    fields = skeleton.checkpoint.config
    if skeleton.alone:
        # The text model's own fields, and those of the whole model that it shares.
        shared: dict[str, Any] = {key: fields[key] for key in ("dtype", "torch_dtype") if key in fields}
        fields = {**shared, **fields.get("text_config", {}), "tie_word_embeddings": skeleton.outside.tied}
    config = {key: value for key, value in fields.items() if key not in ours}
    # A head stored separately from the embedding, with other values, is not tied, whatever the config says.
    untied = getattr(skeleton.config, "tie_word_embeddings", False) and not skeleton.outside.tied
    return {**config, "tie_word_embeddings": False} if untied else config


def _shards(skeleton: Skeleton) -> int:
    return len(skeleton) + len(_outside(skeleton))
