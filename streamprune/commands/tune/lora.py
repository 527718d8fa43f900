"""LoRA end to end on the language modelling loss, with the whole model in memory (Hu et al. 2021; SlimGPT's last step).

`peft` adapts transformers' own model; what it trained is handed out as low-rank updates by block, so that the result is
written by the same hand as every other.
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
"""Steps after which the state is put away."""


def installed() -> bool:
    """Whether `peft` is there."""
    return importlib.util.find_spec("peft") is not None


@dataclass(frozen=True)
class Lora:
    """How a model is tuned."""

    rank: int
    steps: int
    rate: float
    seed: int
    size: int
    """Sequences a step."""
    micro: int
    """Sequences whose activations are held at once."""


def train(
    skeleton: Skeleton,
    tokens: Tensor,
    how: Lora,
    state: Mapping[str, Tensor] | None,
    save: Callable[[dict[str, Tensor], list[float]], None],
) -> Iterator[float]:
    """Train updates of all linears of all blocks; yields every step's loss, nats a token.

    Args:
        skeleton: of the checkpoint, whose model is loaded for this; nothing of it changes.
        tokens: windows (samples, length), int64.
        state: what `save` was given last, to go on from there.
        save: called every `SAVE_EVERY` steps and at the end with updates by ``block.name.u`` and ``.v`` (see
            `Block.updates`), what `Descent.state` gives, and the losses since the last call.

    Raises:
        NumericalError: the loss is no longer finite.
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
    """The model with updates, and these by name."""
    from peft import LoraConfig, inject_adapter_in_model

    model = load_whole(skeleton.checkpoint.directory, skeleton.dtype).requires_grad_(False)
    blocks = model.get_submodule(skeleton.architecture.blocks)
    for block, entries in zip(blocks, skeleton.entries, strict=True):
        for entry in entries:
            if entry.experts and not isinstance(block.get_submodule(entry.experts), Experts):
                separate_experts(block, entry.experts)
    names = [f"{index}.{name}" for index in range(len(skeleton)) for name in skeleton.linears(index)]
    turned = isinstance(blocks.get_submodule(names[0]), Conv1D)
    # alpha = rank: no factor before U V.
    config = LoraConfig(r=how.rank, lora_alpha=how.rank, target_modules=names, fan_in_fan_out=turned, bias="none")
    with torch.random.fork_rng(), warnings.catch_warnings():
        # How peft calls transformers is not ours to mend.
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(how.seed)
        # The blocks alone: by the model_type of a whole mixture of experts, peft looks for linears in transformers' own
        # module of fused experts.
        inject_adapter_in_model(config, blocks)
    # Without dropout, which would want a generator's state put away as well.
    model.eval().to(skeleton.device)
    weights = {}
    for name in names:
        linear: Any = blocks.get_submodule(name)
        for leaf, module in (("u", linear.lora_B["default"]), ("v", linear.lora_A["default"])):
            weights[f"{name}.{leaf}"] = module.to(accumulator(skeleton.dtype)).weight
    return model, weights


def _first_not_finite(model: Any, skeleton: Skeleton, tokens: Tensor) -> str:
    """Which part of the model gives NaN or Inf first."""
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
    """Mean negative log-likelihood of all tokens of the windows but their first."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).to(accumulator(logits.dtype)), tokens[:, 1:].flatten())
