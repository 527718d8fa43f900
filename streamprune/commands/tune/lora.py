"""Train LoRA end to end on the language modelling loss, with the whole model in memory (Hu et al. 2021; SlimGPT).

`peft` adapts transformers' own model. The trained updates are returned per block, so that the result is written by the
same code as every other result.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Conv1D

from ...errors import NumericalError
from ...maths.adam import Descent, batch
from ...maths.refit import accumulator, advice, all_finite
from ...model.modeling_streamprune import Experts, separate_experts
from ...model.skeleton import Skeleton
from ...model.whole import load_whole

SAVE_EVERY = 25
"""Number of steps between two saved states."""


def installed() -> bool:
    """Return whether `peft` is installed."""
    return importlib.util.find_spec("peft") is not None


@dataclass(frozen=True)
class Lora:
    """Hyperparameters of LoRA training."""

    rank: int
    steps: int
    rate: float
    """Adam's learning rate at the first step."""
    seed: int
    size: int
    """Sequences per step."""
    micro: int
    """Sequences per micro-batch."""


def train(
    skeleton: Skeleton,
    tokens: Tensor,
    how: Lora,
    state: Mapping[str, Tensor] | None,
    save: Callable[[dict[str, Tensor], list[float]], None],
) -> Iterator[float]:
    """Train updates of all linears of all blocks; yield the loss of every step, in nats per token.

    Args:
        skeleton: the checkpoint, which is loaded as a whole and not modified.
        tokens: windows (samples, length) int64.
        state: the state last passed to `save`, to resume from; None starts from the beginning.
        save: called every `SAVE_EVERY` steps and at the end. Receives the state, which holds the updates by
            ``block.name.u`` and ``.v`` (see `Block.updates`) and `Descent.state`, and the losses since the last call.

    Raises:
        NumericalError: the loss is NaN or Inf.
    """
    model, weights = _adapted(skeleton, how)
    if state is not None:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(state[name])
    descent = Descent(weights, steps=how.steps, rate=how.rate, place="lora", state=state)
    losses: list[float] = []
    while descent.done < how.steps:
        chosen = tokens[batch(len(tokens), how.size, how.seed, descent.done)]
        total = 0.0
        for part in torch.split(chosen, how.micro):
            loss = _loss(model, part.to(skeleton.device)) * (len(part) / len(chosen))
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        if not math.isfinite(total):
            place = _first_not_finite(model, skeleton, chosen[: how.micro])
            raise NumericalError(
                f"{place} gives NaN or Inf: the loss is {total} at step {descent.done}{advice(skeleton.dtype)}"
            )
        descent.step()
        losses.append(total)
        if descent.done % SAVE_EVERY == 0 or descent.done == how.steps:
            save({name: weight.detach().cpu() for name, weight in weights.items()} | descent.state(), losses)
            losses = []
        yield total


def _adapted(skeleton: Skeleton, how: Lora) -> tuple[Any, dict[str, nn.Parameter]]:
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
    # alpha = rank, so that U V has no scale factor.
    config = LoraConfig(r=how.rank, lora_alpha=how.rank, target_modules=names, fan_in_fan_out=turned, bias="none")
    with torch.random.fork_rng(), warnings.catch_warnings():
        # peft's own calls to transformers raise these warnings.
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(how.seed)
        # Pass only the blocks. Given the model_type of a whole mixture of experts, peft would look for the linears in
        # transformers' module of fused experts.
        inject_adapter_in_model(config, blocks)
    # No dropout: it would require saving the state of a random generator as well.
    model.eval().to(skeleton.device)
    weights = {}
    for name in names:
        linear: Any = blocks.get_submodule(name)
        for leaf, module in (("u", linear.lora_B["default"]), ("v", linear.lora_A["default"])):
            weights[f"{name}.{leaf}"] = module.to(accumulator(skeleton.dtype)).weight
    return model, weights


def _first_not_finite(model: Any, skeleton: Skeleton, tokens: Tensor) -> str:
    """Name the first part of the model that produces NaN or Inf for `tokens` (sequences, length)."""
    found = []

    def watch(index: int) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if not all_finite(hidden):
                found.append(f"block {index}")

        return look

    blocks = model.get_submodule(skeleton.architecture.blocks)
    hooks = [block.register_forward_hook(watch(index)) for index, block in enumerate(blocks)]
    with torch.no_grad():
        model(input_ids=tokens.to(skeleton.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    return found[0] if found else "the head"


def _loss(model: Any, tokens: Tensor) -> Tensor:
    """Return the mean negative log-likelihood, in nats, of all tokens (sequences, length) except the first of each."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).to(accumulator(logits.dtype)), tokens[:, 1:].flatten())
