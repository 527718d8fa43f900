"""Options that several commands share, and the `Config` they make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

import streamprune
from streamprune.errors import ConfigError
from streamprune.system import units

from . import show

F = TypeVar("F", bound=Callable[..., Any])

PATH = click.Path(path_type=Path)
TEXT = "TEXT[:FIELD]"
SOURCE = f"{TEXT}[=WEIGHT]"


def bundle(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Combine several options into one decorator, in the given order."""

    def apply(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


class Size(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """``"24GiB"`` → 25769803776 bytes."""

    name = "size"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return units.parse_bytes(value)
        except ConfigError as error:
            raise ConfigError(f"{param.opts[0] if param else 'size'}: {error}") from None


SIZE = Size()


class Multiple(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """``"auto"`` or a whole number."""

    name = "auto|integer"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | int:
        # `Config` refuses everything else.
        return int(value) if str(value).removeprefix("-").isdecimal() else value


def window(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, int] | None:
    """``"4:30"`` → (4, 30)."""
    if text is None:
        return None
    start, colon, stop = text.partition(":")
    if not (colon and start.isdecimal() and stop.isdecimal()):
        raise click.BadParameter(f"{text!r}; write it as A:B, such as 4:30")
    return int(start), int(stop)


def percent(context: click.Context, parameter: click.Parameter, text: str | None) -> float | None:
    """``"5%"`` → 0.05."""
    if text is None:
        return None
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100
    except ValueError:
        pass
    raise ConfigError(f"{parameter.opts[0]} is {text!r}; write it with a percent sign, such as 5%")


def sources(context: click.Context, parameter: click.Parameter, given: tuple[str, ...]) -> str | tuple[str, ...] | None:
    """None for no source, the source itself for one, a tuple for several."""
    return given if len(given) > 1 else given[0] if given else None


def only_given(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
    """Pass the value to the command only if it is given, since the commands have different defaults."""
    if value is not None and parameter.name is not None:
        context.params[parameter.name] = value


def seq_len_option(name: str = "--seq-len", of: str = "") -> Callable[[F], F]:
    return click.option(
        name, type=int, help=f"Tokens per window{of}.  [default: 2048, or the model's context if shorter]"
    )


bos_option = click.option(
    "--bos",
    type=click.Choice(["auto", "on", "off"]),
    default="auto",
    help="Whether every text and window begins with the BOS token. auto: as the tokenizer does by itself.",
)


cut_options = bundle(
    click.option(
        "--windows",
        type=click.Choice(["anywhere", "documents"]),
        default="anywhere",
        help="Where windows begin. documents: where a row (document, conversation) begins, filled with the rows that follow.",
    ),
    click.option(
        "--loss-on",
        type=click.Choice(["all", "assistant"]),
        default="all",
        help="Whose tokens have losses and gradients. assistant: those that the assistant says in conversations.",
    ),
)


def windows_options(kind: str) -> Callable[[F], F]:
    return bundle(
        click.option("--samples", default=128, help=f"Number of {kind} windows."),
        seq_len_option(),
        bos_option,
        cut_options,
        click.option("--seed", default=0, help="Seed for all random choices."),
    )


text_option = click.option("--text", metavar=TEXT, help="Text to measure perplexity on, whole and in order.")
restart_option = click.option(
    "--restart", is_flag=True, help="Delete what an earlier job left in OUT, finished or not."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
output_options = bundle(
    json_option,
    click.option("--quiet", "-q", is_flag=True, help="Print no progress and no notes; only errors go to stderr."),
)

device_options = bundle(
    click.option(
        "--device",
        default="auto",
        callback=lambda context, parameter, name: units.check_device(name),
        help="Device: auto, cpu, cuda or cuda:N.",
    ),
    click.option(
        "--memory",
        type=SIZE,
        help="Limit on device memory (on a CPU: of the whole process), such as 24GiB.  [default: what is free]",
    ),
)

computing_options = bundle(
    device_options,
    click.option(
        "--dtype",
        default="auto",
        metavar="NAME",
        callback=lambda context, parameter, name: units.check_dtype(name),
        help="Dtype to compute in: auto, float32, bfloat16, float16 or float64. auto is the checkpoint's dtype on a GPU and "
        "float32 on the CPU.",
    ),
)

machine_options = bundle(
    computing_options,
    click.option(
        "--cache",
        type=PATH,
        help="Folder for activations; use a fast disk.  [default: beside OUT, or a temporary folder]",
    ),
    click.option(
        "--activations",
        metavar="NAME",
        callback=only_given,
        expose_value=False,
        help="Dtype to store activations in: float32, bfloat16, float16, float64, float8 (with one scale per token) or auto. "
        "auto is bfloat16 for models stored in it, and --dtype for others.  [default: auto; eval: --dtype]",
    ),
    click.option(
        "--memory-host",
        type=SIZE,
        help="Host memory for activations, in addition to --memory, such as 16GiB.  [default: none; pruning on a GPU: up to half of "
        "what is free]",
    ),
)

calibration_options = bundle(
    click.option(
        "--calibration",
        multiple=True,
        callback=sources,
        metavar=f"{SOURCE}|self|random-tokens",
        help="Text to calibrate on: a .txt, .jsonl, .csv or .parquet file, a folder or hf:DATASET; repeat for several sources. "
        "self: the model writes the text (slow). random-tokens: tokens drawn from the vocabulary.  [default: a built-in "
        "English sample]",
    ),
    click.option(
        "--prompts",
        metavar=TEXT,
        help="With --calibration self: prompts that the model answers, one per row or, in a text file, per line; rendered by "
        "the chat template if there is one.",
    ),
    click.option(
        "--temperature",
        default=1.0,
        help="With --calibration self: what logits are divided by before tokens are drawn; 0 takes the likeliest token.",
    ),
    windows_options("calibration"),
)

result_options = bundle(
    click.option("--disk", type=SIZE, help="Limit on disk space for activations.  [default: what is free]"),
    click.option(
        "--round-to",
        type=Multiple(),
        default="auto",
        help="Round widths that change to multiples of this: FFN channels, and heads × their width where heads allow it. auto: 32, "
        "which 4-bit and 8-bit formats need, and 128 or 256, which make smaller files, where that costs little.",
    ),
    click.option(
        "--tensor-parallel",
        type=int,
        default=1,
        metavar="N",
        help="Keep heads and FFN widths of all blocks divisible by N, so that a server can split them over N devices.",
    ),
    click.option(
        "--layout",
        type=click.Choice(["free", "uniform", "decilm"]),
        default="free",
        help="free: each block has its own widths. uniform: all blocks have the same widths, and the result is a stock "
        "checkpoint. decilm: the same attention in all blocks, for vLLM's DeciLM (llama only).",
    ),
    click.option("--text-only", is_flag=True, help="Of a multimodal model, write the text model alone."),
    click.option("--blocks", metavar="A:B", callback=window, help="Prune only blocks A to B - 1.  [default: all]"),
    click.option(
        "--ratio-of",
        type=click.Choice(["blocks", "window", "model"]),
        default="blocks",
        help="What --ratio is a share of: all blocks, the blocks of --blocks, or the whole model with embeddings and head.",
    ),
    click.option(
        "--effort",
        type=click.Choice(["low", "normal", "high"]),
        help="Training. low: none. normal: each pruned block towards its dense output, the last one towards the dense "
        "model's predictions, for two passes over the calibration windows. high: then also all blocks together, towards the "
        "same predictions, on twice as many other windows of the text.  [default: normal for the default recipe; low for "
        "others, which are then as published]",
    ),
    click.option(
        "--refine", type=int, metavar="STEPS", help="Training steps for each pruned block, instead of --effort's."
    ),
)

job_options = bundle(
    click.option("--ratio", type=float, help="Share of the parameters to remove, in (0, 1); see --ratio-of."),
    click.option(
        "--fit",
        type=SIZE,
        help="Instead of --ratio: remove the least at which weights, cache and workspace fit a card of this size, such as 24GiB.",
    ),
    click.option(
        "--speedup",
        type=float,
        help="Instead of --ratio: remove the least at which one sequence decodes so many times as fast, such as 1.5, by a table "
        "of matrix products measured on this device.",
    ),
    click.option(
        "--perplexity-at-most",
        callback=percent,
        metavar="X%",
        help="Instead of --ratio: remove the most at which perplexity rises by at most this, as the costs predict and held-out "
        "windows of the calibration text confirm; if they do not, a smaller ratio is pruned.",
    ),
    click.option(
        "--quant",
        type=click.Choice(["bf16", "q8_0", "q4_k_m", "fp8"]),
        help="Format of the weights on the card of --fit; q8_0 and q4_k_m are llama.cpp's.  [default: bf16]",
    ),
    click.option(
        "--context",
        type=int,
        help="Tokens of the cache on the card of --fit.  [default: 8192, or the model's context if shorter]",
    ),
    click.option(
        "--recipe",
        default="default",
        help="Pruning method: default; sobp, slimgpt, greedy-output or surgeon, from papers; reap, for "
        "experts; random, magnitude or wanda-sp, as baselines.",
    ),
    click.option(
        "--experts",
        metavar="N|SHARE|threshold",
        help="Let whole routed experts go. N: so many stay in each block. SHARE: this share goes from each block. "
        "SHARE:threshold: by one threshold over all blocks. threshold: one threshold over experts and units, to --ratio or an aim such as --fit.",
    ),
    calibration_options,
    machine_options,
    result_options,
    click.option(
        "--store",
        type=click.Choice(["auto", "fp8"]),
        default="auto",
        help="auto: the source's dtype. fp8: linears of the blocks in FP8, one scale per 128 × 128 weights, where both widths "
        "are multiples of 128 (see --round-to).",
    ),
    click.option(
        "--structure",
        type=click.Choice(["units", "unstructured", "2:4", "4:8", "rows-columns"]),
        help="What surgeon and magnitude remove: whole units, or weights that become zero (rows-columns: surgeon only). Same as "
        "--set structure=...",
    ),
    click.option(
        "--set", "settings", multiple=True, metavar="NAME=VALUE", help="Setting of the recipe; may be repeated."
    ),
    click.option(
        "--metric-text",
        multiple=True,
        callback=sources,
        metavar=f"{SOURCE}|random-tokens",
        help="Text that greedy-output chooses units on, on the dense model; --calibration is then for its recovery.  [default: "
        "--calibration]",
    ),
    click.option("--metric-samples", default=16, help="Number of windows of --metric-text, at most --samples."),
    click.option(
        "--survey",
        type=PATH,
        metavar="DIR",
        help="Folder that keeps the survey, so that other ratios of the same model and text cost the prune sweep only.",
    ),
    click.option(
        "--plan",
        type=PATH,
        metavar="FILE",
        help="Plan file that says what to keep, instead of letting the recipe decide.",
    ),
)


def check_alone() -> None:
    """Refuse to do the same work in each of several processes that torchrun started."""
    from streamprune.system.ranks import expected

    if expected() > 1:
        raise ConfigError(f"{expected()} processes were started together (WORLD_SIZE); only run shares its work")


def begin(*models: str | Path | None, texts: Sequence[Any] = (), shared: bool = False) -> None:
    """Check what needs no torch, then import it, so that invalid arguments are reported at once.

    Args:
        models: directories or names on the hub; None is ignored.
        texts: each one source, several, or a word of `DATA_FREE`; None is ignored.
        shared: whether processes that torchrun started together may share this work.
    """
    from streamprune.jobs.config import DATA_FREE
    from streamprune.model.hub import check_model
    from streamprune.text.source import Text

    if not shared:
        check_alone()
    for model in models:
        if model is not None:
            check_model(model)
    for text in texts:
        if text is not None and text not in DATA_FREE:
            Text.of(text)

    from transformers.utils.logging import disable_progress_bar

    from streamprune.system.host import configure_malloc

    configure_malloc()
    disable_progress_bar()  # `show` shows progress


def assignments(texts: tuple[str, ...], form: str) -> dict[str, str]:
    """Values of `--set` by name; `form` is how to write one."""
    chosen: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set {text!r}: write it as {form}")
        if name in chosen:
            raise ConfigError(f"--set {name} is given twice: {chosen[name]!r} and {value!r}")
        chosen[name] = value
    return chosen


def note_idle(quiet: bool, *configs: streamprune.Config, used: Sequence[str] = ()) -> None:
    """Say on stderr, unless `quiet`, which given options had no effect on any of the configs.

    Args:
        used: options that had an effect elsewhere.
    """
    from streamprune.pruning.request import idle

    if quiet:
        return
    context = click.get_current_context()
    reasons = [idle(config) for config in configs]
    unused: dict[str, list[str]] = {}
    for parameter in context.command.params:
        name = parameter.name or ""
        given = context.get_parameter_source(name) is not ParameterSource.DEFAULT
        if given and name not in used and all(name in each for each in reasons):
            reason = ", ".join(dict.fromkeys(each[name] for each in reasons))
            unused.setdefault(reason, []).append(parameter.opts[0])
    for reason, names in unused.items():
        show.tell(f"{reason}, so {', '.join(names)} changed nothing")


def config(
    model: Path, out: Path, *, settings: tuple[str, ...], structure: str | None, **others: Any
) -> streamprune.Config:
    from streamprune.recipes.settings import parse

    if structure is not None:
        settings = (*settings, f"structure={structure}")
    made = streamprune.Config(model=model, out=out, settings=assignments(settings, "name=value"), **others)
    parse(made.recipe, made.settings)
    return made
