"""Train LoRA end to end on the language modelling loss, with the whole model in memory (Hu et al. 2021; SlimGPT).

`peft` adapts transformers' own model. The trained updates are returned per block, so that the result is written by the
same code as every other result.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Conv1D

from ...errors import NumericalError
from ...jobs.forecast.workload import TRAIN_SEQUENCES
from ...maths.descent import Descent, batch, epoch_batch, seeded
from ...maths.refit import accumulator, advice, all_finite
from ...model.modeling_streamprune import Experts, separate_experts
from ...model.skeleton import Skeleton
from ...model.tokenizer import IGNORED
from ...model.whole import load_whole
from ...pruning.refine import Refinement
from ...text.windows import Windows, counted

SAVE_EVERY = 25
"""Number of steps between two saved states."""


@dataclass(frozen=True)
class Schedule:
    """Hyperparameters that only training in memory has."""

    batch: int = TRAIN_SEQUENCES
    """Windows per step."""
    warmup: int = 0
    """Steps in which the learning rate rises from zero."""
    dropout: float = 0.0
    """Probability with which an input of V is zero in training."""
    epochs: bool = False
    """Whether every epoch takes all windows once; otherwise each step draws its windows."""


def installed() -> bool:
    return importlib.util.find_spec("peft") is not None


def train(
    skeleton: Skeleton,
    windows: Windows,
    how: Refinement,
    state: Mapping[str, Tensor] | None,
    save: Callable[[dict[str, Tensor], list[float]], None],
    schedule: Schedule = Schedule(),
) -> Iterator[float]:
    """Train updates of all linears of all blocks; yield the loss of every step, in nats per token.

    Args:
        skeleton: the checkpoint, which is loaded as a whole and not modified.
        windows: text to train on.
        state: the state last passed to `save`, to resume from; None starts from the beginning.
        save: called every `SAVE_EVERY` steps and at the end. Receives `Descent.state`, which holds the updates by
            ``block.name.u`` and ``.v`` (see `Block.updates`), and the losses since the last call.

    Raises:
        NumericalError: the loss is NaN or Inf.
    """
    model, weights = _adapted(skeleton, how, schedule.dropout)
    descent = Descent(weights, steps=how.steps, rate=how.rate, warmup=schedule.warmup, place="lora", state=state)
    draw = epoch_batch if schedule.epochs else batch
    losses: list[float] = []
    while descent.done < how.steps:
        chosen = draw(len(windows.tokens), schedule.batch, how.seed, descent.done)
        predictions = max(1, counted(windows.labels[chosen]))
        summed = torch.zeros((), dtype=torch.float64, device=skeleton.device)
        for number, part in enumerate(torch.split(chosen, how.batch)):
            ids, labels = (each[part].to(skeleton.device) for each in (windows.tokens, windows.labels))
            with _dropping(schedule.dropout, how.seed, descent.done, number):
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
            # The first token of a window is not predicted.
            wide, targets = logits.to(accumulator(logits.dtype)), labels[:, 1:].flatten()
            loss = F.cross_entropy(wide, targets, reduction="sum", ignore_index=IGNORED) / predictions
            loss.backward()  # type: ignore[no-untyped-call]
            summed += loss.detach()
            del logits, wide, loss  # before the next forward pass
        total = float(summed)
        if not math.isfinite(total):
            place = _first_not_finite(model, skeleton, windows.tokens[chosen[: how.batch]])
            raise NumericalError(
                f"{place} gives NaN or Inf: the loss is {total} at step {descent.done}{advice(skeleton.dtype)}"
            )
        descent.step()
        losses.append(total)
        if descent.done % SAVE_EVERY == 0 or descent.done == how.steps:
            save(descent.state(), losses)
            losses = []
        yield total


@contextmanager
def _dropping(dropout: float, seed: int, step: int, part: int) -> Iterator[None]:
    """Seed what dropout draws by step and micro-batch, so that a resumed job drops the same."""
    if not dropout:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(2**62, (), generator=seeded(seed, step * 1009 + part))))
        yield


def _adapted(skeleton: Skeleton, how: Refinement, dropout: float = 0.0) -> tuple[Any, dict[str, nn.Parameter]]:
    """Load the model and add low-rank updates; return the model and the updates by name."""
    from peft import LoraConfig, inject_adapter_in_model

    model = load_whole(skeleton.checkpoint.directory, skeleton.dtype).requires_grad_(False)
    blocks = model.get_submodule(skeleton.architecture.blocks)
    for block, entries in zip(blocks, skeleton.entries, strict=True):
        for entry in entries:
            if entry.experts and not isinstance(block.get_submodule(entry.experts), Experts):
                separate_experts(block, entry.experts)
    names = [f"{index}.{name}" for index in range(len(skeleton)) for name in skeleton.linears(index)]
    turned = isinstance(blocks.get_submodule(names[0]), Conv1D)
    assert how.rank is not None
    # alpha = rank, so that U V has no scale factor.
    config = LoraConfig(
        r=how.rank,
        lora_alpha=how.rank,
        lora_dropout=dropout,
        target_modules=names,
        fan_in_fan_out=turned,
        bias="none",
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        # peft's own calls to transformers raise these warnings.
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(how.seed)
        # Pass only the blocks. Given the model_type of a whole mixture of experts, peft would look for the linears in
        # transformers' module of fused experts.
        inject_adapter_in_model(config, blocks)
    model.eval().to(skeleton.device)
    weights = {}
    for name in names:
        linear: Any = blocks.get_submodule(name)
        linear.lora_dropout.train()  # the model's own dropout stays off
        for leaf, module in (("u", linear.lora_B["default"]), ("v", linear.lora_A["default"])):
            weights[f"{name}.{leaf}"] = module.to(accumulator(skeleton.dtype)).weight
    return model, weights


@torch.no_grad()
def _first_not_finite(model: Any, skeleton: Skeleton, tokens: Tensor) -> str:
    """Name the first part of the model that produces NaN or Inf for `tokens` (sequences, length)."""
    finite: list[bool] = []

    def look(block: nn.Module, inputs: Any, output: Any) -> None:
        finite.append(all_finite(output[0] if isinstance(output, tuple) else output))

    for block in model.get_submodule(skeleton.architecture.blocks):
        block.register_forward_hook(look)
    model(input_ids=tokens.to(skeleton.device), use_cache=False)
    return f"block {finite.index(False)}" if False in finite else "the head"
