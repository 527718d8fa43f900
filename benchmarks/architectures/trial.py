"""One model type from a tiny checkpoint to a reloaded result: prune, evaluate, compare with transformers.

The row's ``status``:

works    every sublayer of every block is pruned, and everything agrees
partly   as above, but some modules with weights pass through unpruned (`through`)
refused  streamprune refuses the model before any work, with the reason (`error`)
failed   pruning ends in an error or disagrees with transformers: a fault of streamprune
unbuilt  transformers cannot build the tiny checkpoint here, for example because of a missing package
"""

from __future__ import annotations

import json
import os
import random
import re
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from . import scope, tiny
from .reload import Loader

WINDOWS, LENGTH = 8, 32
STREAMED = 3
"""Windows whose losses are compared one by one: each opens the model again."""
RATIO = 0.25
CLOSE = 1e-5
"""Largest relative difference of losses and logits, in float32."""

Row = dict[str, Any]


class Disagreement(Exception):
    """Two ways to compute the same thing differ."""


def trial(model_type: str, folder: Path, record: Callable[[Row], None]) -> None:
    """Try one model type. `record` gets the row at each step, so that the last one tells where a crash was.

    Call it in a process that has not imported streamprune.
    """
    loader = Loader()
    import streamprune

    # Waiting for the disk is half the time of a tiny job, and this is no test of crashes.
    os.fsync = lambda descriptor: None
    torch.set_num_threads(1)
    row: Row = {"type": model_type, "status": "unbuilt"}
    started, begun = time.monotonic(), set[str]()
    watch = streamprune.Callback(lambda event: begun.add(row["step"]) if event.kind != "note" else None)

    def at(step: str, status: str) -> None:
        row.update(step=step, status=status, seconds=round(time.monotonic() - started, 1))
        record(row)

    try:
        _try(model_type, folder, row, at, loader, watch)
    except streamprune.StreamPruneError as error:
        row["error"] = re.sub(rf"{re.escape(str(folder / 'model'))}\S*: ", "", _line(error))
        at(row["step"], "refused" if refuses(error, row["step"], folder / "model", begun) else "failed")
    except Exception as error:  # a type's own code may raise anything
        row["error"] = f"{type(error).__name__}: {_line(error)}"
        traceback.print_exc()
        at(row["step"], "unbuilt" if row["step"] == "build" else "failed")
    loader.close()


def refuses(error: Exception, step: str, source: Path, begun: Collection[str]) -> bool:
    """Return whether streamprune's error refuses the model: it names the checkpoint, and comes before any work.

    Args:
        begun: steps in which streamprune has reported progress, such as ``prune``.
    """
    from streamprune.errors import CheckpointError, ConfigError

    if step == "open":
        return True
    of_source = isinstance(error, (CheckpointError, ConfigError)) and str(source) in str(error)
    return of_source and step in ("evaluate", "prune") and step not in begun


def _try(
    model_type: str, folder: Path, row: Row, at: Callable[[str, str], None], loader: Loader, progress: Any
) -> None:
    import streamprune
    from streamprune.errors import ConfigError

    at("build", "unbuilt")
    auto = scope.auto_class(model_type)
    model = tiny.tiny_model(tiny.tiny_config(model_type), auto)
    row |= {"class": type(model).__name__, "auto": auto.__name__}
    source = folder / "model"
    row["hub_style"] = tiny.write_checkpoint(model, source)
    model, info = auto.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    if missing := [name for name, keys in info.items() if name.endswith("_keys") and keys]:
        raise Disagreement(f"transformers does not read its own checkpoint back: {missing}")
    calibration, text = folder / "calibration.txt", folder / "text.txt"
    letters = random.Random(0)
    for path, size in ((calibration, 4000), (text, WINDOWS * LENGTH)):
        path.write_bytes(bytes(letters.randrange(33, 127) for _ in range(size)))
    tokens = windows(source, text)
    dense = losses(logits(model, tokens), tokens)
    if not dense.isfinite().all():
        raise Disagreement("the losses of the tiny model are not finite")
    before = groups(model, {name: parameter.numel() for name, parameter in model.named_parameters()})
    if not before:
        raise Disagreement("no list of blocks was found, so that the modules that pass through are unknown")
    row["parameters"] = sum(parameter.numel() for parameter in model.parameters())

    at("open", "failed")
    described = streamprune.inspect(source)["model"]
    sites = [site for block in described["blocks"] for site in block["sites"]]
    row["sites"] = dict(Counter(family(site["site"]) for site in sites))

    at("evaluate", "failed")
    row["dense"] = compare("the streamed loss", streamed(source, text, progress), dense[:STREAMED])

    def reloaded(out: Path) -> tuple[dict[str, float], dict[str, int]]:
        """Return how a result differs streamed and loaded with streamprune from loaded without, and its sizes."""
        alone, sizes = loader.logits(out, tokens, auto.__name__)
        with_ours = logits(streamprune.load(out, dtype=torch.float32), tokens)
        differences = {
            "loss": compare("the streamed loss of the result", streamed(out, text), losses(alone, tokens)[:STREAMED]),
            "logits": compare("the result loaded with streamprune", with_ours, alone),
        }
        return differences, sizes

    at("prune", "failed")
    # Where most of a block passes through, its sites cannot lose as much.
    most = sum((site["units"] - 1) * site["unit_parameters"] for site in sites) / described["block_parameters"]
    ratio = row["ratio"] = min(RATIO, most / 2)
    job: Row = {"model": source, "calibration": calibration, "samples": WINDOWS, "seq_len": LENGTH, "dtype": "float32"}
    out = folder / "pruned"
    result = streamprune.prune(
        streamprune.Config(**job, out=out, ratio=ratio, recipe="sobp", round_to=4), progress=progress
    )
    row["removed"] = result.parameters_before - result.parameters_after
    if row["removed"] <= 0:
        raise Disagreement("no parameter was removed")
    at("reload", "failed")
    row["pruned"], _ = reloaded(out)

    # At these sizes the recipe may leave heads alone, so that a plan has every site shrink.
    at("prune every site", "failed")
    plan = folder / "plan.json"
    kept = {site["site"]: {"keep": max(1, site["units"] * 3 // 4)} for site in sites}
    plan.write_text(json.dumps({"format": "streamprune-plan-1", "ratio": RATIO, "sites": kept}))
    out = folder / "planned"
    streamprune.prune(streamprune.Config(**job, out=out, plan=plan, recipe="sobp", round_to=1))
    at("reload every site", "failed")
    row["planned"], sizes = reloaded(out)
    row["single"] = sorted({family(site["site"]) for site in sites if site["units"] == 1})
    row["through"] = unchanged(before, groups(model, sizes))

    mixtures = Counter(site["site"].split(".")[1] for site in sites if family(site["site"]) == "experts")
    if mixtures:
        at("drop an expert of each block", "failed")
        out, experts = folder / "fewer", max(mixtures.values()) - 1
        try:
            streamprune.prune(streamprune.Config(**job, out=out, experts=experts, recipe="reap"))
        except ConfigError as error:
            if "has an unknown form" not in str(error):
                raise
            row["fewer"] = "–"
        else:
            config = json.loads((out / "config.json").read_text())
            row["fewer"] = "free" if "streamprune" in config else "stock"
            at("reload with fewer experts", "failed")
            row["without"], _ = reloaded(out)
    at("done", "partly" if row["through"] else "works")


def windows(model: Path, text: Path) -> list[list[int]]:
    """Return token ids, (WINDOWS, LENGTH)."""
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(text.read_text()).ids
    return [ids[start : start + LENGTH] for start in range(0, len(ids), LENGTH)]


@torch.no_grad()
def logits(model: Any, tokens: list[list[int]]) -> torch.Tensor:
    """Return logits (WINDOWS, LENGTH, vocabulary) of a whole model in memory."""
    return model.eval()(input_ids=torch.tensor(tokens), use_cache=False).logits.float()


def losses(logits: torch.Tensor, tokens: list[list[int]]) -> torch.Tensor:
    """Return the mean negative log-likelihood of each window, (WINDOWS,) float64."""
    target = torch.tensor(tokens)[:, 1:, None]
    return -logits[:, :-1].double().log_softmax(-1).gather(2, target)[..., 0].mean(1)


def streamed(model: Path, text: Path, progress: Any = None) -> torch.Tensor:
    """Return what `streamprune.evaluate` finds for each of the first windows, (STREAMED,) float64 in nats."""
    import streamprune

    content, one, found = text.read_bytes(), text.with_name("window.txt"), []
    for start in range(0, STREAMED * LENGTH, LENGTH):
        one.write_bytes(content[start : start + LENGTH])
        found.append(streamprune.evaluate(model, one, seq_len=LENGTH, dtype="float32", progress=progress).perplexity)
    return torch.tensor(found, dtype=torch.float64).log()


def compare(what: str, found: torch.Tensor, meant: torch.Tensor) -> float:
    """Return the largest difference relative to the largest value. Raises a Disagreement if it is not `CLOSE`."""
    difference = float((found - meant).abs().max() / meant.abs().max())
    if not difference < CLOSE:
        raise Disagreement(f"{what} differs by {difference:.1e} relative to transformers")
    return difference


# What is pruned and what passes through.


def family(site: str) -> str:
    """Return the kind of a site by its name, such as ``blocks.3.ffn.12``, an expert."""
    kind, _, number = site.partition(".")[2].partition(".")[2].partition(".")
    return "experts" if kind == "ffn" and number.isdigit() else f"{kind} {number}".strip() if number else kind


def groups(model: Any, sizes: Mapping[str, int]) -> dict[tuple[str, str], int]:
    """Return the number of values in each group of linears of each block: by block and name of the group.

    A group is the module that holds a linear, such as ``self_attn`` or ``mlp.experts``; experts count together. Routers
    and modules without a matrix, such as norms, belong to no group.

    Args:
        sizes: the number of values of each parameter of `model`, or of a pruned copy of it.
    """
    in_block = re.compile(rf"({'|'.join(map(re.escape, _lists(model)))})\.(\d+)\.(.+)")
    with_matrix = {_key(in_block, name) for name, parameter in model.named_parameters() if parameter.dim() > 1}
    found: Counter[tuple[str, str] | None] = Counter()
    for name, size in sizes.items():
        found[_key(in_block, name)] += size
    return {key: found[key] for key in with_matrix if key}


def _key(in_block: re.Pattern[str], name: str) -> tuple[str, str] | None:
    """Return the block and the group of a parameter, or None if it has none."""
    match = in_block.match(name)
    group = _group(match[3]) if match else ""
    return (f"{match[1]}.{match[2]}", group) if match and group else None


def _group(name: str) -> str:
    """Return the module that holds the linear of a parameter, relative to the block, without the numbers of experts."""
    parts = name.split(".")[: -1 if name.endswith((".weight", ".bias")) else None]
    if {"router", "gate"} & set(parts):
        return ""
    return ".".join(part for part in parts[:-1] if not part.isdigit())


def _lists(model: Any) -> list[str]:
    """Return the names of the lists of text blocks: those as long as the config says, else any; the shallowest."""
    try:
        text = model.get_decoder()
    except (AttributeError, NotImplementedError):
        text = model.base_model
    base = next(name for name, module in model.named_modules() if module is text)
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = {name: len(module) for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)}
    inside = {name: length for name, length in lists.items() if name.startswith(f"{base}.".lstrip("."))} or lists
    found = [name for name, length in inside.items() if length == count] or list(inside)
    least = min((name.count(".") for name in found), default=0)
    return [name for name in found if name.count(".") == least]


def unchanged(before: Mapping[tuple[str, str], int], after: Mapping[tuple[str, str], int]) -> list[str]:
    """Return the groups that kept all their values in a block, though every site shrank.

    A group does not count if it is part of one that shrank in the same block, or holds one; nor if it is part of another
    that passes through.
    """
    shrunk = {key for key, size in before.items() if after.get(key, 0) < size}
    through = {
        group
        for block, group in set(before) - shrunk
        if not any(at == block and _related(group, other) for at, other in shrunk)
    }
    return sorted(group for group in through if not any(group.startswith(f"{other}.") for other in through))


def _related(group: str, other: str) -> bool:
    return group == other or f"{group}.".startswith(f"{other}.") or f"{other}.".startswith(f"{group}.")


def _line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return next(iter(str(error).strip().splitlines()), "")
