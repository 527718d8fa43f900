"""`streamprune compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import streamprune
from streamprune.errors import ConfigError

from . import options, show


def numbers(context: click.Context, parameter: click.Parameter, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--ratios {text!r}: write numbers separated by commas, such as 0.2,0.3") from None


@click.command()
@click.argument("model", type=options.PATH)
@click.option(
    "--ratios",
    required=True,
    callback=numbers,
    metavar="R,R,…",
    help="Shares of the parameters to remove, each in (0, 1).",
)
@click.option(
    "--recipes",
    required=True,
    metavar="NAME,…",
    help="Recipes; label=NAME labels one that is used several times with different settings.",
)
@click.option("--text", required=True, metavar=options.TEXT, help="Text to measure perplexity on, whole and in order.")
@options.seq_len_option("--eval-seq-len", of=" of --text")
@click.option(
    "--out",
    type=options.PATH,
    help="Folder for the table and intermediate files.  [default: MODEL-compare in the current folder]",
)
@click.option(
    "--set", "settings", multiple=True, metavar="LABEL.NAME=VALUE", help="Setting of one recipe; may be repeated."
)
@click.option(
    "--perplexity",
    "perplexities",
    type=float,
    multiple=True,
    metavar="P",
    help="Print the ratio at which each recipe reaches this perplexity, interpolating log-perplexity; may be repeated.",
)
@options.calibration_options
@options.machine_options
@options.result_options
@click.option(
    "--keep", is_flag=True, help="Keep every pruned checkpoint in OUT/rows.  [default: delete each after measuring it]"
)
@click.option("--plot", is_flag=True, help="Also draw compare.png; needs the extra: pip install 'streamprune[plot]'.")
@click.option("--restart", is_flag=True, help="Delete an earlier comparison in OUT and start over.")
@options.output_options
def compare(
    model: Path, recipes: str, text: str, settings: tuple[str, ...], as_json: bool, quiet: bool, **chosen: Any
) -> None:
    """Prune with several recipes at several ratios and measure each.

    All use the same text and budget. The command prints a table and writes it to OUT as compare.json, compare.csv and
    compare.md. After an interruption, run the same command again to resume; with more ratios or recipes it adds only the
    missing rows.

    Examples:

      streamprune compare llama-2-7b --ratios 0.2,0.3,0.5 --recipes sobp,wanda-sp,magnitude --text wiki-test.txt

      streamprune compare llama-2-7b --ratios 0.3 --text wiki-test.txt --recipes sobp,plain=sobp --set plain.refine=off
    """
    variants = _variants(recipes, settings)
    options.begin(model, texts=[text, chosen["calibration"], chosen["prompts"]])
    with show.progress(quiet) as progress:
        found = streamprune.compare(model, recipes=variants, text=text, progress=progress, **chosen)
    given = {"model": model, "out": Path(found.out), "ratio": 0.5, "refine": chosen["refine"]}
    configs = [streamprune.Config(recipe=each.recipe, settings=each.settings, **given) for each in variants]
    options.note_idle(quiet, *configs, used=["bos"])  # by --text, too
    lines = show.table(found.cells())
    if found.reached:
        lines += ["", *show.table(found.reached_cells())]
    lines += ["", f"perplexity: {found.protocol}", *found.notes, f"written to {found.out}"]
    show.result(found.as_dict(), as_json, lines)


def _variants(recipes: str, settings: tuple[str, ...]) -> list[streamprune.Variant]:
    from streamprune.recipes.settings import parse

    variants = [streamprune.Variant.parse(part.strip()) for part in recipes.split(",")]
    own: dict[str, dict[str, str]] = {variant.label: {} for variant in variants}
    for key, value in options.assignments(settings, form := "label.name=value").items():
        label, dot, name = key.partition(".")
        if not dot:
            raise ConfigError(f"--set {key!r}: write it as {form}")
        if label not in own:
            raise ConfigError(f"--set {key}: there is no {label!r} among the recipes; there are {', '.join(own)}")
        own[label][name] = value
    for variant in variants:
        parse(variant.recipe, own[variant.label])
    return [streamprune.Variant(variant.label, variant.recipe, own[variant.label]) for variant in variants]
