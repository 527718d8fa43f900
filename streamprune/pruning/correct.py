"""Low-rank corrections between shots (LLM Surgeon, section 3.6): LoRA steps on the language modelling loss, streamed.

A step is one forward and one backward sweep over the blocks for a small batch. Linears compute with ``W + U V``; Adam
updates `U` and `V` by their gradients. Only one block is in memory. `U`, `V` and Adam's moments are on disk, one file per
block and step, until ``U V`` is absorbed into `W` after the last step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from ..jobs.forecast.needs import REFINE_SEQUENCES
from ..maths.adam import Descent, batch
from ..maths.refit import accumulator
from ..model import write
from ..model.block import Block
from ..model.checkpoint import load_shard, write_shard
from ..model.skeleton import Skeleton, open_skeleton
from ..recipes.recipe import Correction
from ..stream import sweep
from ..stream.store import ActivationStore
from ..system import files
from ..system.progress import rest
from .shot import Shot

STREAM, GRADIENT = "dense", "gradient"


def correct_blocks(shot: Shot, how: Correction) -> dict[str, str]:
    """Correct the pruned checkpoint of a shot; return the digests of the corrected blocks' shards by name.

    The first rank does it alone, since a step takes only a few samples; the others return nothing.
    """
    if not shot.ranks.first:
        for step in range(len(shot.steps("correct/")), how.steps):
            shot.record(f"correct/{step}")
        return {}
    job = shot.job
    files.make_folder(shot.folder)
    journalled = shot.steps("correct/")
    corrector = Corrector(
        open_skeleton(shot.pruned, job.device, job.dtype, layout=job.skeleton.layout),
        job.tokens,
        shot.corrections,
        how,
        journalled[-1]["sha256"] if journalled else {},
        window=job.window,
        seed=job.config.seed,
        micro=job.backward_batch,
        keep_zeros=job.recipe.writes_zeros,
    )
    shot.progress.phase("correct", how.steps, len(journalled))
    for step, digests in corrector.steps(len(journalled)):
        shot.record(f"correct/{step}", sha256=digests)
        shot.progress.step(f"step {step}")
    return _absorb(shot, corrector)


def _absorb(shot: Shot, corrector: Corrector) -> dict[str, str]:
    """Write all blocks with their updates absorbed; return their shards' digests by name."""
    skeleton, shards = corrector.skeleton, {}
    for index, block in sweep.blocks(skeleton, range(len(skeleton))):
        names = skeleton.block_names(index)
        corrector.absorb(block, index)
        shard = write.block_shard(skeleton, index)
        tensors = {full: block.weights[name] for name, full in names.items()}
        shards[shard] = write_shard(shot.folder / shard, tensors)
        del block, tensors
        rest(shot.progress)
    return shards


class Corrector:
    """Run the steps of one shot's correction.

    Args:
        skeleton: the checkpoint to correct.
        tokens: calibration windows (samples, length).
        folder: folder for states and activations, used by nothing else.
        digests: digests of the files that the last step wrote, by name.
        window: the blocks that may change.
        micro: sequences per micro-batch.
        keep_zeros: whether weights that are zero stay zero.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        tokens: Tensor,
        folder: Path,
        how: Correction,
        digests: Mapping[str, str],
        *,
        window: range,
        seed: int,
        micro: int,
        keep_zeros: bool,
    ) -> None:
        self.skeleton, self.tokens, self.folder, self.how = skeleton, tokens, folder, how
        self._digests = digests
        self.window, self.seed, self.micro, self.keep_zeros = window, seed, micro, keep_zeros
        self.size = min(REFINE_SEQUENCES, len(tokens))
        shape = self.size, tokens.shape[1], skeleton.width
        self._store = ActivationStore(folder / "streams", shape, skeleton.dtype, skeleton.device, durable=False)

    def steps(self, done: int) -> Iterator[tuple[int, Mapping[str, str]]]:
        """Run the steps from `done` on; yield each one's number and the digests of its files by name, once its state is durable.

        Raises:
            DamageError: a state on disk was altered.
        """
        for step in range(done, self.how.steps):
            files.remove_tree(state(self.folder, step + 1))
            files.make_folder(state(self.folder, step + 1))
            self._digests = self._step(step)
            yield step, self._digests
            files.remove_tree(state(self.folder, step))

    def absorb(self, block: Block, index: int) -> None:
        """Add the updates of the last step to the block's weights."""
        if index in self.window:
            block.absorb(self._read(self.how.steps, index, block)[0], keep_zeros=self.keep_zeros)

    def _step(self, step: int) -> dict[str, str]:
        skeleton, store, depth = self.skeleton, self._store, len(self.skeleton)
        tokens = self.tokens[batch(len(self.tokens), self.size, self.seed, step)]
        sweep.embed(skeleton, tokens, store, sweep.boundary(STREAM, 0), self.micro)
        for index, block in sweep.blocks(skeleton, range(depth)):
            with self._updated(block, index, self._read(step, index, block)[0]):
                sweep.advance(skeleton, block, index, store, STREAM, self.micro)
            del block
        sweep.head_gradient(skeleton, store, tokens, self.micro)
        digests = {}
        # Below the window no gradient is needed.
        for index, block in sweep.blocks(skeleton, range(depth - 1, self.window.start - 1, -1)):
            updates, state = self._read(step, index, block)
            self._gather(block, index, updates)
            del block
            if updates:
                place = f"the correction of block {index}"
                descent = Descent(updates, steps=self.how.steps, rate=self.how.rate, place=place, state=state)
                descent.step()
                moved = {name: update.detach().cpu() for name, update in updates.items()}
                path = self._file(step + 1, index)
                digests[path.name] = write_shard(path, {**moved, **descent.state()})
            store.remove(sweep.boundary(GRADIENT, index + 1))
        return digests

    def _updated(self, block: Block, index: int, updates: Mapping[str, nn.Parameter]) -> AbstractContextManager[None]:
        return block.updated(updates, keep_zeros=self.keep_zeros) if index in self.window else nullcontext()

    def _gather(self, block: Block, index: int, updates: Mapping[str, nn.Parameter]) -> None:
        """Set the gradients of the mean loss with respect to the updates, and write the gradient of the block's input."""
        skeleton, store = self.skeleton, self._store
        names = sweep.boundary(STREAM, index), sweep.boundary(GRADIENT, index + 1)
        predictions = self.size * (self.tokens.shape[1] - 1)
        place = f"the correction's gradient of block {index}"
        with (
            self._updated(block, index, updates),
            store.writing(sweep.boundary(GRADIENT, index), place) as write,
        ):
            for _, (x, dy) in store.each(self.micro, *names):
                arguments = skeleton.arguments(x.shape[0], x.shape[1])[index]
                with torch.enable_grad():
                    x.requires_grad_()
                    dx, *gradients = torch.autograd.grad(block(x, arguments), (x, *updates.values()), dy)
                for update, gradient in zip(updates.values(), gradients, strict=True):
                    part = gradient / predictions
                    update.grad = part if update.grad is None else update.grad + part
                write(dx)

    def _read(self, step: int, index: int, block: Block) -> tuple[dict[str, nn.Parameter], dict[str, Tensor] | None]:
        """Each linear's update before that step, and Adam's state for it; nothing outside the window."""
        if index not in self.window:
            return {}, None
        dtype = accumulator(self.skeleton.dtype)
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + index) % 2**63)
        updates = block.updates(self.how.rank, dtype, generator)
        if not step:
            return updates, None
        path = self._file(step, index)
        state = load_shard(path, self._digests[path.name])
        return {name: nn.Parameter(state.pop(name).to(self.skeleton.device)) for name in updates}, state

    def _file(self, step: int, index: int) -> Path:
        return state(self.folder, step) / f"block-{index:04}.safetensors"


def state(folder: Path, step: int) -> Path:
    """Folder of the state after `step` steps."""
    return folder / f"step-{step:06}"
