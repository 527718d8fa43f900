"""Options that several commands share, and the `Config` they make."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from . import show

F = TypeVar("F", bound=Callable[..., Any])

DIRECTORY = click.Path(path_type=Path, file_okay=True)
FILE = click.Path(path_type=Path)
TEXT = "TEXT[:FIELD]"
SOURCE = f"{TEXT}[=WEIGHT]"


def bundle(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator, in the order given."""

    def apply(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


def window(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, int] | None:
    """``"4:30"`` → (4, 30)."""
    if text is None:
        return None
    start, colon, stop = text.partition(":")
    if not (colon and start.isdecimal() and stop.isdecimal()):
        raise click.BadParameter(f"{text!r}; write it as A:B, such as 4:30", context, parameter)
    return int(start), int(stop)


def sources(context: click.Context, parameter: click.Parameter, given: tuple[str, ...]) -> str | tuple[str, ...] | None:
    """None for no source, one by itself, or several."""
    return given if len(given) > 1 else given[0] if given else None


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
output_options = bundle(
    json_option,
    click.option("--quiet", "-q", is_flag=True, help="No progress and no notes: only errors go to stderr."),
)

device_options = bundle(
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
    click.option(
        "--memory", metavar="SIZE", help="Device memory to stay within, such as 24GiB.  [default: what is free]"
    ),
)

computing_options = bundle(
    device_options,
    click.option(
        "--dtype",
        default="auto",
        show_default=True,
        metavar="NAME",
        help="Computing dtype: auto (the checkpoint's own on a GPU, float32 on the CPU), float32, bfloat16, float16, float64.",
    ),
)

machine_options = bundle(
    computing_options,
    click.option("--cache", type=DIRECTORY, help="Folder for activations, on a fast disk."),
    click.option(
        "--activations",
        metavar="NAME",
        help="What is stored of activations: float32, bfloat16, float16, float64, float8 (a scale a token), or auto: bfloat16 "
        "for models stored in it, else what is computed.  [default: auto; eval: what is computed]",
    ),
    click.option(
        "--memory-host",
        metavar="SIZE",
        help="Host memory to hold activations in, besides --memory, such as 16GiB.  [default: none]",
    ),
)

calibration_options = bundle(
    click.option(
        "--calibration",
        multiple=True,
        callback=sources,
        metavar=f"{SOURCE}|self|random-tokens",
        help="Text to calibrate on: .txt, .jsonl, .parquet or hf:DATASET; repeat it for several sources. self: tokens that "
        "the model writes, slow; random-tokens: any of its vocabulary.  [default: a built-in English sample]",
    ),
    click.option("--samples", default=128, show_default=True, help="Calibration windows."),
    click.option("--seq-len", type=int, help="Tokens a window.  [default: 2048, or the model's context if shorter]"),
    click.option("--seed", default=0, show_default=True, help="Seed of everything that is drawn."),
)

result_options = bundle(
    click.option("--disk", metavar="SIZE", help="Disk that activations may take.  [default: what is free]"),
    click.option("--round-to", default=8, show_default=True, help="Make changed FFN widths multiples of this."),
    click.option(
        "--layout",
        type=click.Choice(["free", "uniform", "decilm"]),
        default="free",
        show_default=True,
        help="uniform: all blocks alike, so that the result is a stock checkpoint; decilm: attention alike, FFN widths "
        "multiples of 256, as vLLM's DeciLM reads them (llama only).",
    ),
    click.option("--blocks", metavar="A:B", callback=window, help="Prune only blocks A to B - 1.  [default: all]"),
    click.option(
        "--ratio-of",
        type=click.Choice(["blocks", "window", "model"]),
        default="blocks",
        show_default=True,
        help="What the ratio counts: all blocks, those of --blocks, or the model with embeddings and head.",
    ),
    click.option(
        "--refine",
        default=0,
        show_default=True,
        metavar="STEPS",
        help="Train each block for so many steps after it was pruned, from its pruned input to its dense output.",
    ),
)

job_options = bundle(
    click.option("--ratio", type=float, help="Share of the blocks' parameters to remove, in (0, 1)."),
    click.option(
        "--recipe",
        default="default",
        show_default=True,
        help="Method: default, the papers' sobp, slimgpt, greedy-output, surgeon, or the baselines random, magnitude, wanda-sp.",
    ),
    calibration_options,
    machine_options,
    result_options,
    click.option(
        "--structure",
        type=click.Choice(["units", "unstructured", "2:4", "4:8"]),
        help="What goes, for recipes that know more than units: surgeon and magnitude. Same as --set structure=...",
    ),
    click.option(
        "--set", "settings", multiple=True, metavar="NAME=VALUE", help="A setting of the recipe; may be repeated."
    ),
    click.option(
        "--plan", "plan_file", type=FILE, metavar="FILE", help="Keep what this plan file says instead of allocating."
    ),
)


def begin(*, shared: bool = False) -> None:
    """What every command does first that works with weights; of processes started together, only some share one."""
    from transformers.utils.logging import disable_progress_bar

    from streamprune.errors import ConfigError
    from streamprune.host import settle_malloc
    from streamprune.ranks import expected

    if not shared and expected() > 1:
        raise ConfigError(f"{expected()} processes were started together (WORLD_SIZE); only run shares its work")
    settle_malloc()
    # Before anything asks for a GPU: blocks of growing and shrinking sizes leave holes otherwise.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    disable_progress_bar()  # progress is shown by `show` alone


def size(text: str | None, option: str) -> int | None:
    """Bytes, or None."""
    from streamprune.config import parse_bytes
    from streamprune.errors import ConfigError

    try:
        return None if text is None else parse_bytes(text)
    except ConfigError as error:
        raise ConfigError(f"{option}: {error}") from None


def machine(*, memory: str | None, memory_host: str | None, activations: str | None, **others: Any) -> dict[str, Any]:
    """Options as settings: sizes in bytes, and what was not given left out where a setting has a default of its own."""
    given = {} if activations is None else {"activations": activations}
    sizes = {"memory": size(memory, "--memory"), "memory_host": size(memory_host, "--memory-host")}
    return {**others, **sizes, **given}


def assignments(texts: tuple[str, ...], form: str) -> dict[str, str]:
    """What `--set` was given, by name; `form` is how it should be written."""
    from streamprune.errors import ConfigError

    chosen: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set {text!r}: write it as {form}")
        if name in chosen:
            raise ConfigError(f"--set {name} is given twice: {chosen[name]!r} and {value!r}")
        chosen[name] = value
    return chosen


def note_unread(quiet: bool, *configs: Any) -> None:
    """Say on stderr which options about text were given although no recipe reads any."""
    from streamprune.job import unread

    context = click.get_current_context()
    given = {
        parameter.name: parameter.opts[0]
        for parameter in context.command.params
        if parameter.name and context.get_parameter_source(parameter.name) is not ParameterSource.DEFAULT
    }
    idle = [option for name, option in given.items() if all(name in unread(config) for config in configs)]
    if idle and not quiet:
        recipes = ", ".join(dict.fromkeys(config.recipe for config in configs))
        does = "reads no text" if len(configs) == 1 else "read no text"
        show.tell(f"{recipes} {does} here, so {', '.join(idle)} changed nothing")


def config(
    model: Path,
    out: Path,
    *,
    settings: tuple[str, ...],
    disk: str | None,
    plan_file: Path | None,
    structure: str | None,
    **others: Any,
) -> Any:
    """The `Config` that the options ask for."""
    from streamprune import Config

    if structure is not None:
        settings = (*settings, f"structure={structure}")
    return Config(
        model=model,
        out=out,
        settings=assignments(settings, "name=value"),
        disk=size(disk, "--disk"),
        plan=plan_file,
        **machine(**others),
    )
