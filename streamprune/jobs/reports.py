"""Describe a result: how it was made, how to run it, what it weighs, what it was calibrated on and what was measured.

The model card and the page of `streamprune report` show the same sections.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from ..model.checkpoint import Checkpoint
from ..model.deployment import Way, ways, weights
from ..model.names import REPORT
from ..model.skeleton import Skeleton
from ..system.units import format_bytes
from ..text.windows import window_length
from .extents import experts_gone, extents
from .names import is_report, is_tuning


@dataclass(frozen=True)
class Section:
    """A part of a result's description."""

    title: str
    sentences: tuple[str, ...] = ()
    rows: tuple[tuple[str, str], ...] = ()
    ways: tuple[Way, ...] = ()

    def markdown(self) -> str:
        parts = [f"## {self.title}", *self.sentences]
        if self.rows:
            parts.append("| | |\n|---|--:|\n" + "\n".join(f"| {name} | {value} |" for name, value in self.rows))
        for way in self.ways:
            parts.append(f"**{way.runtime}**" + (f": {way.note}" if way.note else ""))
            if way.commands:
                parts.append(f"```{way.language}\n{way.commands}\n```")
        return "\n\n".join(parts)


def describe(report: Mapping[str, Any], folder: Path) -> list[Section]:
    """Describe the complete checkpoint in `folder`, whose ``report.json`` has the content `report`."""
    skeleton = Skeleton(Checkpoint(folder), device=torch.device("cpu"), dtype=torch.float32)
    return [
        Section("How to run it", ("OUT is this folder.",), ways=tuple(ways(skeleton))),
        Section("What it weighs", rows=tuple((name, format_bytes(size)) for name, size in weights(skeleton))),
        Section("What it was calibrated on", tuple(_calibration(report, skeleton.context))),
        Section("What was measured", tuple(_measurements(report))),
    ]


def _calibration(report: Mapping[str, Any], context: int | None) -> list[str]:
    """Describe the texts of a job and, after tuning, of those before it. `context` is the model's, in tokens."""
    job, tuned = report["job"], is_tuning(report)
    settings, inputs = job["settings"], job["inputs"]
    use = "Tuned on" if tuned else "Calibrated on"
    given = inputs.get("calibration")
    if report.get("tokens") is None or given is None:
        return ["No text was read."]
    count = "all" if settings.get("epochs") else f"{settings['samples']:,}"
    windows = f"{count} windows of {window_length(settings['seq_len'], context):,} tokens"
    if given == "random-tokens":
        found = [f"{use} {windows}, drawn uniformly from the vocabulary."]
    elif given == "self":
        prompts = f", in answer to prompts ({_texts({'1': inputs['prompts']})})" if "prompts" in inputs else ""
        found = [f"{use} {windows}, which the source model wrote{prompts}."]
    else:
        found = [f"{use} {windows} of {_texts(given)}."]
    if isinstance(chosen := inputs.get("metric", {}).get("calibration"), dict):
        found.append(f"Units were chosen on {_texts(chosen)}.")
    found.append(f"Fingerprint of the tokens: {report['tokens']}.")
    return found + (_calibration(report["source"], context) if tuned and _is_ours(report["source"]) else [])


def _is_ours(report: Any) -> bool:
    return is_report(report) or is_tuning(report)


def _texts(given: Mapping[str, Any]) -> str:
    """Describe texts by what the report has of them: digests of their contents, and the names of datasets, not of files."""
    texts = [
        (
            f"dataset {each['dataset']}, {each['rows']:,} rows, digest of a sample of them {each['sha256'][:16]}"
            if "dataset" in each
            else f"text with SHA-256 {each['sha256'][:16]}"
        )
        + (f" (field {each['field']})" if each.get("field") else "")
        + (f", share {each['share']:.0%}" if each.get("share", 1) != 1 else "")
        for each in given.values()
    ]
    return "; ".join(texts)


def _measurements(report: Mapping[str, Any]) -> list[str]:
    """Describe what a job has measured of its result."""
    if is_tuning(report):
        tuning = report["tuning"]
        before = _measurements(report["source"]) if _is_ours(report["source"]) else []
        loss = "Loss of the last block" if tuning["method"] == "distil" else "Loss"
        return [
            f"{loss} in training: {tuning['loss_first']:.4g} at first, {tuning['loss_last']:.4g} at last, in nats per token.",
            *before,
        ]
    found, aim = [], report.get("aim") or {}
    if "perplexity" in aim:
        found.append(
            f"Perplexity on {aim['windows']:,} held-out windows: {aim['dense_perplexity']:.4g} before, {aim['perplexity']:.4g} after."
        )
    if "reached" in aim:
        found.append(
            f"Decoding on {aim['device']} in {aim['dtype']}: {aim['reached']:.2f} times as fast, by the measured times of its matrix products."
        )
    errors = [(site["error"], site["site"]) for site in report["sites"] if site.get("error")]
    if errors:
        found.append(
            f"Share of a site's output energy lost on the calibration text: {fmean(error for error, _ in errors):.2%} on average, "
            f"at most {max(errors)[0]:.2%} ({max(errors)[1]})."
        )
    found += [f"The ratio was missed: {report['ratio_missed']}"] if report.get("ratio_missed") else []
    found.append(
        "Not measured: tasks, and perplexity on other text. `streamprune eval OUT --text FILE --tasks gsm8k,ifeval` measures them."
    )
    return found


def write_card(report: Mapping[str, Any], title: str, tag: str, text: str, folder: Path) -> str:
    """Write the model card of the complete checkpoint in `folder`."""
    sections: Sequence[str] = [each.markdown() for each in describe(report, folder)]
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- streamprune
- {tag}
---

# {title}

{text}

{(chr(10) * 2).join(sections)}

The licence and limits of the source model hold for this one too.
"""


def pruning_card(report: dict[str, Any], source: str, depth: int, folder: Path) -> str:
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
    return write_card(report, f"{source}, pruned by {report['ratio_blocks']:.1%}", "pruned", text, folder)


def tuning_card(report: dict[str, Any], source: str, folder: Path) -> str:
    """Write the model card of a tuned model; `source` is the model that was tuned."""
    tuning = report["tuning"]
    how = {
        "lora": "LoRA, end to end on the language modelling loss",
        "distil": "low-rank distillation, block by block, to the dense model's outputs",
    }[tuning["method"]]
    text = f"""Tuned with streamprune: {how}, rank {tuning["rank"]}, {tuning["steps"]} steps, absorbed into the weights.
Losses and settings are in `{REPORT}`, with the report of the model that was tuned under "source"."""
    return write_card(report, f"{source}, tuned", "tuned", text, folder)
