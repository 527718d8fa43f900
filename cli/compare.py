"""`streamprune compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from . import options, show


@click.command()
@click.argument("model", type=options.DIRECTORY)
@click.option(
    "--ratios", required=True, metavar="R,R,…", help="Shares of the blocks' parameters to remove, each in (0, 1)."
)
@click.option(
    "--recipes", required=True, metavar="NAME,…", help="Recipes; label=NAME to have one several times, with settings."
)
@click.option("--text", required=True, metavar=options.TEXT, help="Text to measure perplexity on, whole and in order.")
@click.option(
    "--eval-seq-len", type=int, help="Tokens a window of it.  [default: 2048, or the model's context if shorter]"
)
@click.option(
    "--out", type=options.DIRECTORY, help="Folder for the table and the work.  [default: MODEL-compare, beside MODEL]"
)
@click.option(
    "--set", "settings", multiple=True, metavar="LABEL.NAME=VALUE", help="A setting of one recipe; may be repeated."
)
@click.option(
    "--perplexity",
    "perplexities",
    type=float,
    multiple=True,
    metavar="P",
    help="Say at which ratio every recipe reaches this perplexity, log-perplexity interpolated; may be repeated.",
)
@options.calibration_options
@options.machine_options
@options.result_options
@click.option(
    "--keep", is_flag=True, help="Leave every pruned checkpoint in OUT/rows; else it goes once it is measured."
)
@click.option("--plot", is_flag=True, help="Draw compare.png too; needs the extra: pip install 'streamprune[plot]'.")
@click.option("--restart", is_flag=True, help="Throw away what an earlier comparison left in OUT.")
@options.output_options
def compare(
    model: Path,
    ratios: str,
    recipes: str,
    text: str,
    settings: tuple[str, ...],
    disk: str | None,
    as_json: bool,
    quiet: bool,
    **chosen: Any,
) -> None:
    """Prune MODEL by several recipes at several ratios, on the same text and budget, and measure each.

    The table is printed, and lies in OUT as compare.json, compare.csv and compare.md. Interrupted, the same command
    goes on where it stopped; with more ratios or recipes it measures what is missing.

    Examples:

      streamprune compare llama-2-7b --ratios 0.2,0.3,0.5 --recipes sobp,wanda-sp,magnitude --text wiki-test.txt

      streamprune compare llama-2-7b --ratios 0.3 --text wiki-test.txt --recipes sobp,plain=sobp --set plain.refine=off
    """
    import streamprune

    options.begin()

    variants = _variants(recipes, settings)
    with show.progress(quiet) as progress:
        found = streamprune.compare(
            model,
            ratios=_numbers(ratios),
            recipes=variants,
            text=text,
            disk=options.size(disk, "--disk"),
            progress=progress,
            **options.machine(**chosen),
        )
    common = {"model": model, "out": Path(found.out), "ratio": 0.5, "refine": chosen["refine"]}
    options.note_unread(
        quiet, *(streamprune.Config(recipe=each.recipe, settings=each.settings, **common) for each in variants)
    )
    lines = show.table(found.cells())
    if found.reached:
        lines += ["", *show.table(found.reached_cells())]
    lines += ["", f"perplexity: {found.protocol}", *found.notes, f"written to {found.out}"]
    show.result(found.as_dict(), as_json, lines)


def _numbers(text: str) -> list[float]:
    from streamprune.errors import ConfigError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--ratios {text!r}: write numbers with commas between, such as 0.2,0.3") from None


def _variants(recipes: str, settings: tuple[str, ...]) -> list[Any]:
    """The recipes asked for, each with its settings."""
    from streamprune import Variant
    from streamprune.errors import ConfigError

    variants = [Variant.parse(part.strip()) for part in recipes.split(",")]
    own: dict[str, dict[str, str]] = {variant.label: {} for variant in variants}
    for key, value in options.assignments(settings, form := "label.name=value").items():
        label, dot, name = key.partition(".")
        if not dot:
            raise ConfigError(f"--set {key!r}: write it as {form}")
        if label not in own:
            raise ConfigError(f"--set {key}: there is no {label!r} among the recipes; there are {', '.join(own)}")
        own[label][name] = value
    return [Variant(variant.label, variant.recipe, own[variant.label]) for variant in variants]
