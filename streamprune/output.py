"""What makes a folder of shards a checkpoint: index, config, tokenizer, model card, report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import files
from .calibration import load_tokenizer
from .model import modeling_streamprune as modeling
from .model.architecture import is_stock, stock_config
from .model.block import linear_shape
from .model.checkpoint import (
    CONFIG,
    Checkpoint,
    data_bytes,
    read_json,
    shard_name,
    write_index,
    write_json,
    write_shard,
)
from .model.skeleton import Skeleton
from .site import Site

REPORT = "report.json"
CARD = "README.md"
FIGURES = (
    "recipe",
    "ratio_requested",
    "ratio_blocks",
    "ratio_model",
    "parameters_before",
    "parameters_after",
    "zeros",
    "operations",
    "forward_equivalents",
)
"""What a report says of the whole."""
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
    "NOTICE.txt",
    "USE_POLICY.md",
)
"""Files that are copied as they are."""


def is_report(report: Any) -> bool:
    """Whether a JSON value is a report of ours."""
    return isinstance(report, dict) and all(key in report for key in (*FIGURES, "job", "plan", "plan_given", "sites"))


def is_tuning(report: Any) -> bool:
    """Whether a JSON value is a report of a tuning."""
    return isinstance(report, dict) and all(key in report for key in ("tuning", "parameters_after", "job", "source"))


def block_shard(skeleton: Skeleton, index: int) -> str:
    """The shard that holds a block; the embeddings come before it, norm and head after all."""
    return shard_name(index + 2, _shards(skeleton))


def write_outside(skeleton: Skeleton, folder: Path) -> None:
    """Write the shards of what surrounds the blocks, unchanged."""
    checkpoint, total = skeleton.checkpoint, _shards(skeleton)
    for number, names in ((1, skeleton.embed_names()), (total, skeleton.head_names())):
        if names:
            write_shard(folder / shard_name(number, total), {name: checkpoint.read(name) for name in names})


@dataclass(frozen=True)
class Card:
    """What the model card says of how this model was made."""

    title: str
    tag: str
    text: str


def finish(skeleton: Skeleton, folder: Path, sites: Sequence[Site], report: dict[str, Any], card: Card) -> None:
    """Write everything but the shards, and hold the result against its own config.

    Args:
        sites: of the pruned model, in order.
        report: what `report.json` holds; "parameters_after" is in it.
    """
    placed = {name: shard_name(1, _shards(skeleton)) for name in skeleton.embed_names()}
    placed |= {name: shard_name(_shards(skeleton), _shards(skeleton)) for name in skeleton.head_names()}
    for index in range(len(skeleton)):
        placed |= {name: block_shard(skeleton, index) for name in skeleton.block_names(index).values()}
    source = skeleton.checkpoint
    size = sum(data_bytes(folder / shard) for shard in set(placed.values()))
    write_index(folder, placed, report["parameters_after"], size)
    stock = is_stock(skeleton.architecture, _plain_config(skeleton), sites)
    write_json(folder / CONFIG, uniform_config(skeleton, sites) if stock else free_config(skeleton, sites))
    if not stock:
        files.copy(Path(modeling.__file__), folder / Path(modeling.__file__).name)
    for name in COMPANIONS:
        if (source.directory / name).is_file():
            files.copy(source.directory / name, folder / name)
    if not stock:
        _name_tokenizer(source.directory, folder)
    files.write_text(folder / CARD, _card(card, stock))
    write_json(folder / REPORT, report)
    # Reading it back: every tensor present, shapes as the config says, in transformers' own model.
    Skeleton(Checkpoint(folder), device=torch.device("cpu"), dtype=torch.float32)


def uniform_config(skeleton: Skeleton, sites: Sequence[Site]) -> dict[str, Any]:
    """The source's config with the new widths, as the stock architecture reads it."""
    base = skeleton.architecture.model_type
    stock = modeling.stock_class(base)
    return {**stock_config(skeleton.architecture, _plain_config(skeleton), sites), "architectures": [stock.__name__]}


def free_config(skeleton: Skeleton, sites: Sequence[Site]) -> dict[str, Any]:
    """The source's config with per-block widths, as `modeling_streamprune` reads it."""
    base = skeleton.architecture.model_type
    stem, module = modeling.class_stem(base), modeling.__name__.rpartition(".")[2]
    rows: dict[str, list[int]] = {}
    columns: dict[str, list[int]] = {}
    attributes: dict[str, list[int]] = {}
    for entry in skeleton.architecture.sublayers:
        for site in (site for site in sites if site.kind == entry.kind):
            before = next(old for old in skeleton.sites(site.block) if old.kind == site.kind)
            for name in (producer.name for producer in entry.producers):
                width = linear_shape(skeleton.module(site.block, name))[0]
                rows.setdefault(name, []).append(width // before.units * site.units)
            columns.setdefault(entry.consumer, []).append(site.columns)
            for name in entry.counts:
                path, _, attribute = name.rpartition(".")
                count: int = getattr(skeleton.module(site.block, path), attribute)
                attributes.setdefault(name, []).append(count // before.units * site.units)
    return {
        **_plain_config(skeleton),
        "model_type": modeling.PREFIX + base,
        "architectures": [f"{stem}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{module}.{stem}Config",
            "AutoModelForCausalLM": f"{module}.{stem}ForCausalLM",
        },
        "streamprune": {
            "blocks": skeleton.architecture.blocks,
            "rows": rows,
            "columns": columns,
            "attributes": attributes,
        },
    }


def _name_tokenizer(source: Path, folder: Path) -> None:
    """Write down the tokenizer's class, which transformers otherwise takes from a model_type it knows."""
    path = folder / "tokenizer_config.json"
    if not path.is_file() and not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
        return
    name = type(load_tokenizer(source)).__name__
    config = read_json(path) if path.is_file() else {}
    if config.get("tokenizer_class") != name:
        write_json(path, {**config, "tokenizer_class": name})


def _plain_config(skeleton: Skeleton) -> dict[str, Any]:
    ours = ("streamprune", "auto_map")
    config = {key: value for key, value in skeleton.checkpoint.config.items() if key not in ours}
    # A head that was stored apart from the embedding is not tied to it, whatever the config said.
    return (
        {**config, "tie_word_embeddings": False} if config.get("tie_word_embeddings") and not skeleton.tied else config
    )


def _shards(skeleton: Skeleton) -> int:
    return len(skeleton) + (2 if skeleton.head_names() else 1)


def pruning_card(report: dict[str, Any], source: str, depth: int) -> Card:
    """The card of a pruned model.

    Args:
        source: the name of the model that was pruned.
        depth: how many blocks it has.
    """
    extents: dict[str, list[str]] = {}
    for site in report["sites"]:
        _, block, _ = site["site"].split(".")
        pair = ("zeros", "weights") if "zeros" in site else ("kept", "units")
        extents.setdefault(block, []).append(" / ".join(f"{site[name]:,}" for name in pair))
    rows = "\n".join(f"| {block} | {' | '.join(each)} |" for block, each in extents.items())
    shares = (
        f"{report['ratio_blocks']:.2%} of the {depth} blocks' parameters, {report['ratio_model']:.2%} of the model's"
    )
    if report["zeros"]:
        done = (
            f"Pruned with streamprune, recipe `{report['recipe']}`: {report['zeros']:,} weights made zero\n"
            f"({shares}). No shape has changed: there are {report['parameters_after']:,}\n"
            "parameters as before, and the files are no smaller."
        )
        table = "Weights made zero, of each block's linears."
    else:
        done = (
            f"Structurally pruned with streamprune, recipe `{report['recipe']}`: {report['parameters_before']:,} parameters\n"
            f"before, {report['parameters_after']:,} after (removed: {shares})."
        )
        table = "Units kept (attention: key/value groups with their query heads; FFN: channels)."
    text = f"""{done}

{table} Errors and settings are in `{REPORT}`.

| block | attention | FFN |
|---|---|---|
{rows}"""
    return Card(f"{source}, pruned by {report['ratio_blocks']:.1%}", "pruned", text)


def tuning_card(report: dict[str, Any], source: str) -> Card:
    """The card of a tuned model; `source` is the name of the model that was tuned."""
    tuning = report["tuning"]
    how = {
        "lora": "LoRA, end to end on the language modelling loss",
        "distil": "low-rank distillation, block by block, to the dense model's outputs",
    }[tuning["method"]]
    text = f"""Tuned with streamprune: {how}, rank {tuning["rank"]}, {tuning["steps"]} steps, absorbed into the weights.
Losses and settings are in `{REPORT}`, with the report of the model that was tuned under "source"."""
    return Card(f"{source}, tuned", "tuned", text)


def _card(card: Card, stock: bool) -> str:
    load = (
        "It is a stock checkpoint: everything that loads the source architecture loads it."
        if stock
        else "Its blocks differ in width. `AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)` loads it, and so do\n"
        "`streamprune.load(path)` and, after `import streamprune`, plain `from_pretrained`."
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- streamprune
- {card.tag}
---

# {card.title}

{card.text}

{load} The licence and limits of the source model hold for this one too.
"""
