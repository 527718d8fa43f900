"""`streamprune run`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

import streamprune
from streamprune.errors import ConfigError
from streamprune.system.units import format_bytes, format_passes

from . import options, show


@click.command()
@click.argument("model", type=options.PATH)
@click.argument("out", type=options.PATH)
@options.job_options
@click.option("--plan-only", is_flag=True, help="Stop before pruning and print the path of the plan file.")
@click.option("--strict", is_flag=True, help="Exit with 1 if OUT misses its ratio by more than one unit.")
@options.restart_option
@options.output_options
def run(
    model: Path, out: Path, plan_only: bool, strict: bool, restart: bool, as_json: bool, quiet: bool, **chosen: Any
) -> None:
    """Prune MODEL into OUT.

    MODEL is a checkpoint directory, a GGUF file or a hub name. OUT appears complete or not at all. After an interruption, run the same
    command again to resume; until it finishes, its work is in OUT.streamprune.

    A result that misses its ratio by more than one unit is written all the same, with a note that says why. With --strict
    the exit code is then 1.

    Examples:

      streamprune run llama-2-7b llama-2-5b --ratio 0.3 --calibration wiki.txt

      streamprune run llama-2-7b stock --ratio 0.25 --layout uniform --memory 12GiB

      streamprune run llama-2-7b card --fit 8GiB --quant q8_0 --context 4096

      streamprune run llama-2-7b out --ratio 0.3 --recipe sobp --set head_weight=2

      streamprune run org/name@main out --ratio 0.3 --calibration code.jsonl:content=0.3 --calibration wiki.txt=0.7

      torchrun --nproc-per-node 4 -m streamprune_cli run llama-70b llama-49b --ratio 0.3 --calibration wiki.txt
    """
    if strict and plan_only:
        raise ConfigError("--strict judges a result, and --plan-only makes none; give one of them")
    with streamprune.joined() as ranks:
        config = options.config(model, out, **chosen)
        options.begin(model, texts=[config.calibration, config.metric_text, config.prompts], shared=True)
        with show.progress(quiet or not ranks.first) as progress:
            if plan_only:
                path = streamprune.plan_only(config, restart=restart, progress=progress, ranks=ranks)
            else:
                result = streamprune.prune(config, restart=restart, progress=progress, ranks=ranks)
    if not ranks.first:
        return
    from streamprune.pruning.aim import describe

    if plan_only:
        show.result({"plan": str(path)}, as_json, [f"plan: {path}"])
        options.note_idle(quiet, config)
        return
    shares = f"{result.ratio_blocks:.2%} of the blocks and {result.ratio_model:.2%} of the model"
    lines = [] if result.aim is None else [f"with ratio {result.ratio_requested:g} the result {describe(result.aim)}"]
    lines += [
        f"{result.out}: {result.zeros:,} of {result.parameters_after:,} parameters made zero, {shares}, by {result.recipe}"
        if result.zeros
        else f"{result.out}: {result.parameters_before:,} → {result.parameters_after:,} parameters, "
        f"{shares} removed by {result.recipe}",
        f"{result.seconds:.1f} s, {result.operations / 1e12:.3f} TFLOP ({format_passes(result.forward_equivalents, result.operations_by_kind)}), "
        f"peak {format_bytes(result.peak_host_bytes)} of host memory, "
        f"{format_bytes(result.bytes_read)} read" + (", resumed" if result.resumed else ""),
    ]
    if result.tokens is not None:
        lines.append(f"calibrated on tokens {result.tokens}")
    show.result(asdict(result), as_json, lines)
    options.note_idle(quiet, config)
    if result.ratio_missed is not None:
        if strict:
            show.tell(f"{result.out}: {result.ratio_missed}; the result is written, and --strict makes this a failure")
            click.get_current_context().exit(1)
        if not quiet:
            show.tell(f"{result.out}: {result.ratio_missed}")
