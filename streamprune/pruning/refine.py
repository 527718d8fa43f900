"""Train one block's weights, or low-rank updates of them, to map its pruned input to its dense output.

Only that block is in memory, and for the last one the final norm and the head. There are no labels and no end-to-end gradient: the loss
is the mean squared error, and for the last block the divergence of the predictions. Operations are reported apart from those of the
closed form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..errors import NumericalError
from ..jobs.forecast.workload import TRAIN_SEQUENCES
from ..maths.descent import Decay, Descent, epoch_batch, seeded
from ..maths.flops import kind
from ..maths.refit import accumulator
from ..model.block import Block
from ..model.skeleton import Skeleton
from ..stream import sweep
from ..stream.store import ActivationStore
from ..system.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Refinement:
    """Hyperparameters of training, of one block or of the whole model."""

    steps: int
    seed: int
    batch: int
    """Sequences per micro-batch; the gradients of a step's micro-batches add up."""
    keeps_zeros: bool = False
    """Whether zeros in the weights of linears stay zero."""
    rate: float = 3e-4
    """The highest learning rate: Adam's, or for all blocks together without a rank, in the unit of `correct.step_size`."""
    warmup: int = 0
    """Steps in which the rate rises."""
    decay: Decay = "linear"
    """How the rate falls to zero."""
    sequences: int = TRAIN_SEQUENCES
    """Sequences per step."""
    rank: int | None = None
    """Rank of the updates, one per linear; None trains all weights themselves."""


@kind("training")
def refine(
    skeleton: Skeleton,
    block: Block,
    index: int,
    store: ActivationStore,
    source: str,
    target: str,
    how: Refinement,
    ranks: Ranks = ALONE,
    counts: Tensor | None = None,
) -> dict[str, Any]:
    """Train a block in float32 or better, and store the result in its masters, in their stored dtype.

    The loss is the mean squared error per number of the output; of the last block, see `sweep.divergence`.

    Args:
        source, target: boundaries with the block's inputs and its target outputs, (samples, length, d) each.
        ranks: processes that train it together, each with its own samples in its store; gradients are summed every step.
        counts: which tokens' predictions count, (samples, length) bool, for the last block; None for all.

    Returns:
        For the report: the mean loss over the first tenth of the steps, and over the last tenth.

    Raises:
        NumericalError: the loss is not finite.
    """
    dtype = accumulator(skeleton.dtype)
    shares = ranks.gather(store.shape[0])
    samples, before = sum(shares), sum(shares[: ranks.rank])
    size = min(how.sequences, samples)
    generator, place = seeded(how.seed, index), how.seed * 1_000_003 + index
    losses: list[float] = []

    drawn = [epoch_batch(samples, size, place, step).tolist() for step in range(how.steps)]

    def micro_batches(step: int) -> list[list[int]]:
        """This rank's samples of a step."""
        chosen = [row - before for row in drawn[step] if 0 <= row - before < store.shape[0]]
        return [chosen[begin : begin + how.batch] for begin in range(0, len(chosen), how.batch)]

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    ahead = store.rows((rows for step in range(how.steps) for rows in micro_batches(step)), source, target)
    with (
        closing(ahead) as reading,
        _loss(skeleton, index) as loss,
        _trained(block, dtype, how.rank, generator) as weights,
        torch.enable_grad(),
    ):
        descent = Descent(
            weights,
            steps=how.steps,
            rate=how.rate,
            warmup=how.warmup,
            decay=how.decay,
            place=f"block {index}",
            keeps_zeros=how.keeps_zeros,
        )
        for step in range(how.steps):
            total = 0.0
            for rows in micro_batches(step):
                x, y = (each.to(dtype) for each in next(reading))
                arguments = tree_map(cast, dict(skeleton.arguments(x.shape[0], x.shape[1])[index]))
                with torch.autocast(x.device.type, torch.bfloat16, enabled=skeleton.dtype == torch.bfloat16):
                    output = block(x, arguments).to(dtype)
                share = len(rows) / len(drawn[step])
                error, gradient = loss(output.detach(), y, None if counts is None else counts[rows])
                output.backward(gradient * share)  # type: ignore[no-untyped-call]
                total += float(error) * share
            total = sum(ranks.gather(total))
            for weight in weights.values() if ranks.size > 1 else ():
                if weight.grad is None:
                    weight.grad = torch.zeros_like(weight)
                ranks.sum(weight.grad)
            if not math.isfinite(total):
                raise NumericalError(f"block {index}: the refinement's loss is {total} at step {step}")
            descent.step()
            losses.append(total)
        # Ranks on different machines may differ in the last digits.
        for weight in weights.values():
            weight.data = ranks.broadcast_tensors([weight.data], 0, weight.device)[0]
    return {"refinement": ends(losses)}


def refinement_rate(width: int) -> float:
    """Return the highest learning rate for a residual stream of `width`: as of Adam in general, falling as 1 / width.

    Measured at widths of 256 and 576 (docs/methods.md): 4e-3 spoils the model, and so does 1e-3 where steps are few.
    """
    return min(5e-4, 0.3 / width)


def ends(losses: Sequence[float]) -> list[float]:
    """Return the mean loss over the first tenth of the steps, and over the last tenth."""
    tenth = max(1, len(losses) // 10)
    return [sum(part) / tenth for part in (losses[:tenth], losses[-tenth:])]


@contextmanager
def _loss(skeleton: Skeleton, index: int) -> Iterator[Callable[..., tuple[Tensor, Tensor]]]:
    """Yield a function from a block's output and its target, (sequences, tokens, width) each, and which tokens' predictions count, to
    the loss, (), and its gradient with respect to the output, of the same shape."""
    if index == len(skeleton) - 1:
        with skeleton.head() as head:
            yield partial(sweep.divergence, skeleton, head)
        return
    hidden = skeleton.side_inputs[index].hidden

    def squared(output: Tensor, target: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        missed, gradient = hidden(output) - hidden(target), torch.zeros_like(output)
        hidden(gradient).copy_(missed).mul_(2 / missed.numel())
        return missed.square().mean(), gradient

    yield squared


@contextmanager
def _trained(
    block: Block, dtype: torch.dtype, rank: int | None, generator: torch.Generator
) -> Iterator[Mapping[str, nn.Parameter]]:
    """Yield the parameters to train; on exit they are absorbed into the block's weights."""
    if rank is None:
        with block.training(dtype) as weights:
            yield weights
        return
    updates = block.updates(rank, dtype, generator)
    with block.frozen(dtype), block.updated(updates):
        yield updates
    block.absorb(updates)
