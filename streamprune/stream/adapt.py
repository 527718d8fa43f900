"""Low-rank corrections end to end, streamed (LLM Surgeon, section 3.6: interleaved LoRA updates).

Every step is Adam's on the language modelling loss, by one forward and one backward sweep over the blocks. Updates and
their moments lie on the disk between sweeps, so no more than a block of anything is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .. import files
from ..errors import NumericalError
from ..maths.descent import Descent, batch
from ..maths.linalg import accumulator
from ..model.block import Block
from ..model.checkpoint import write_shard
from ..model.skeleton import Skeleton
from . import sweep
from .store import ActivationStore
from .sweep import boundary

STATE = "updates-"


@dataclass(frozen=True)
class Adaptation:
    """How a model is corrected."""

    rank: int
    steps: int
    rate: float
    seed: int
    size: int
    """Sequences a step."""
    batch: int
    """Sequences a micro-batch, forward."""
    backward_batch: int


def adapt(
    skeleton: Skeleton,
    tokens: Tensor,
    how: Adaptation,
    folder: Path,
    done: int,
    record: Callable[[int, float], object],
) -> None:
    """Train low-rank updates of all linears of all blocks; `absorbed` then has them in the weights.

    Args:
        tokens: windows (samples, length), int64; a step takes `how.size` of them.
        folder: for updates, moments and activations; made if it is not there.
        done: steps that were recorded before; a step cut off begins again and gives the same.
        record: called with the number of steps done and the step's loss, nats a token, once all of it is durable.

    Raises:
        NumericalError: NaN or Inf on the way.
    """
    size, (samples, length) = min(how.size, len(tokens)), tokens.shape
    store = ActivationStore(folder, (size, length, skeleton.width), skeleton.dtype, skeleton.device, durable=False)
    depth, scale = len(skeleton), size * (length - 1)
    for step in range(done, how.steps):
        store.keep_only(set())
        _keep_states(folder, step)
        chosen = tokens[batch(samples, size, how.seed, step)]
        sweep.embed(skeleton, chosen, store, boundary("dense", 0), how.batch)
        for index, block in sweep.blocks(skeleton, range(depth)):
            with block.updated(_updates(skeleton, block, index, how, folder, step)[0]):
                sweep.advance(skeleton, block, index, store, "dense", how.batch)
            del block
        loss = sweep.head_gradient(skeleton, store, chosen, how.batch) / scale
        for index, block in sweep.blocks(skeleton, range(depth - 1, -1, -1)):
            updates, state = _updates(skeleton, block, index, how, folder, step)
            descent = Descent(updates, steps=how.steps, rate=how.rate, state=state)
            with block.updated(updates):
                _backward(skeleton, block, index, store, updates, how.backward_batch)
            for weight in updates.values():
                assert weight.grad is not None
                weight.grad /= scale
            descent.step()
            _check_finite(updates, index)
            found = {name: weight.detach().cpu() for name, weight in updates.items()}
            write_shard(_state_path(folder, step + 1, index), found | descent.state())
            for stream in ("dense", "gradient"):
                store.remove(boundary(stream, index + 1))
            del block
        record(step + 1, loss)
    store.keep_only(set())
    _keep_states(folder, how.steps)


def absorbed(skeleton: Skeleton, how: Adaptation, folder: Path) -> Iterator[tuple[int, Block]]:
    """The blocks in order, with the updates that `adapt` left in `folder` in their weights."""
    for index, block in sweep.blocks(skeleton, range(len(skeleton))):
        block.absorb(_updates(skeleton, block, index, how, folder, how.steps)[0])
        # As in `sweep.blocks`: nothing here keeps alive what the caller lets go of.
        built = [block]
        del block
        yield index, built.pop()


def _backward(
    skeleton: Skeleton,
    block: Block,
    index: int,
    store: ActivationStore,
    updates: dict[str, nn.Parameter],
    size: int,
) -> None:
    """Hand the gradient from a block's output to its input, and leave the updates' own with them."""
    with store.writing(boundary("gradient", index), f"the gradient of block {index}") as write:
        for _, (x, dy) in store.each(size, boundary("dense", index), boundary("gradient", index + 1)):
            with torch.enable_grad():
                x.requires_grad_()
                y = block(x, skeleton.arguments(x.shape[0], x.shape[1])[index])
                torch.autograd.backward(y, dy, inputs=[x, *updates.values()])
            del y
            assert x.grad is not None
            write(x.grad)


def _updates(
    skeleton: Skeleton, block: Block, index: int, how: Adaptation, folder: Path, step: int
) -> tuple[dict[str, nn.Parameter], dict[str, Tensor] | None]:
    """A block's updates after so many steps, and the state that goes on from there."""
    if step == 0:
        generator = torch.Generator().manual_seed((how.seed * 1_000_003 + index) % 2**63)
        return block.updates(how.rank, accumulator(skeleton.dtype), generator), None
    state = load_file(_state_path(folder, step, index))
    names = [f"{name}.{leaf}" for name in skeleton.architecture.linears for leaf in "uv"]
    return {name: nn.Parameter(state[name].to(skeleton.device)) for name in names}, state


def _check_finite(updates: dict[str, nn.Parameter], index: int) -> None:
    for name, weight in updates.items():
        if not bool(torch.isfinite(weight).all()):
            raise NumericalError(f"block {index}: the update {name} is NaN or Inf")


def _state_path(folder: Path, step: int, index: int) -> Path:
    return folder / f"{STATE}{step:06}-{index:04}.safetensors"


def _keep_states(folder: Path, step: int) -> None:
    """Remove the states of other steps, and what a killed process left half-written."""
    for path in folder.glob(f"{STATE}*"):
        if not path.name.startswith(f"{STATE}{step:06}-") or path.name.endswith(files.TEMPORARY):
            files.remove(path)
