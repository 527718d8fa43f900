"""Model cards: describe how a result was made, from its report."""

from __future__ import annotations

from typing import Any

from ..model.names import REPORT
from ..model.write import Card
from .extents import experts_gone, extents


def pruning_card(report: dict[str, Any], source: str, depth: int) -> Card:
    """Write the model card of a pruned model, whose `source` had `depth` blocks."""
    blocks: dict[str, list[dict[str, Any]]] = {}
    for site in report["sites"]:
        blocks.setdefault(site["site"].split(".")[1], []).append(site)
    cells = {block: [f"{part:,} / {whole:,}" for part, whole in extents(each)] for block, each in blocks.items()}
    rows = "\n".join(f"| {block} | {' | '.join(each)} |" for block, each in cells.items())
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
    alone = sum(bool(site.get("left_alone")) for site in report["sites"])
    note = f" {alone} experts saw too few tokens and were left alone." if alone else ""
    whole = f" {gone}." if (gone := experts_gone(report["sites"])) else ""
    text = f"""{done}

{table}{whole}{note} Errors and settings are in `{REPORT}`.

| block | attention | FFN |
|---|---|---|
{rows}"""
    return Card(f"{source}, pruned by {report['ratio_blocks']:.1%}", "pruned", text)


def tuning_card(report: dict[str, Any], source: str) -> Card:
    """Write the model card of a tuned model; `source` is the model that was tuned."""
    tuning = report["tuning"]
    how = {
        "lora": "LoRA, end to end on the language modelling loss",
        "distil": "low-rank distillation, block by block, to the dense model's outputs",
    }[tuning["method"]]
    text = f"""Tuned with streamprune: {how}, rank {tuning["rank"]}, {tuning["steps"]} steps, absorbed into the weights.
Losses and settings are in `{REPORT}`, with the report of the model that was tuned under "source"."""
    return Card(f"{source}, tuned", "tuned", text)
