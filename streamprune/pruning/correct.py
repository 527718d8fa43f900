"""Corrections of all blocks together, streamed: of low rank on the language modelling loss (LLM Surgeon, section 3.6), or ours, of all
matrices towards the dense model's predictions.

A step is one forward and one backward sweep over the blocks for a small batch. Only one block is in memory. What is trained is on disk
with any moments, one file per block and step, until the blocks take it after the last step. At low rank, linears compute with
``W + U V``, and Adam updates `U` and `V`; otherwise steps are normalised gradients. What the dense model's last block
gives is computed before the first step, and again by a job that resumes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ..errors import NumericalError
from ..maths.descent import Descent, batch, next_batch, seeded
from ..maths.refit import accumulator
from ..model import write
from ..model.block import Block
from ..model.checkpoint import load_shard, write_shard
from ..model.skeleton import Skeleton, open_skeleton
from ..recipes.recipe import Correction
from ..stream import sweep
from ..stream.store import ActivationStore
from ..system import files
from ..system.progress import Progress, Silent, rest
from ..text.windows import Windows, counted
from .refine import Refinement
from .shot import Shot

STREAM, GRADIENT = "dense", "gradient"


def correct_blocks(shot: Shot, how: Correction, stock: bool) -> dict[str, str]:
    """Correct the pruned checkpoint of a shot; return the digests of the corrected blocks' shards by name.

    `stock` is that of `write.write_block`.

    The first rank does it alone, since a step takes only a few samples; the others return nothing.
    """
    job, finished = shot.job, shot.steps("correct/")
    if not shot.ranks.first:
        for step in range(len(finished), how.steps):
            shot.record(f"correct/{step}")
        return {}
    files.make_folder(shot.folder)
    corrector = Corrector(
        open_skeleton(shot.pruned, job.request.device, job.config.dtype, layout=job.skeleton.layout),
        job.other_windows if how.imitates else job.windows,
        shot.corrections,
        Refinement(
            how.steps,
            job.config.seed,
            job.backward_batch,
            keeps_zeros=job.recipe.writes_zeros,
            rate=how.rate,
            sequences=how.sequences,
            rank=how.rank,
        ),
        job.request.window,
        finished[-1]["sha256"] if finished else {},
        job.skeleton if how.imitates else None,
        shot.progress,
    )
    for step, digests, loss in corrector.steps(len(finished)):
        shot.record(f"correct/{step}", sha256=digests, loss=loss)
        shot.progress.step(f"step {step}" if loss is None else f"step {step}: {loss:.4f} nats from the dense model")
    return write_blocks(corrector.skeleton, shot.folder, corrector.absorb, shot.progress, shot.store, stock)


def write_blocks(
    skeleton: Skeleton,
    folder: Path,
    absorb: Callable[[Block, int], None],
    progress: Progress,
    store: str = "auto",
    stock: bool = False,
) -> dict[str, str]:
    """Write all blocks after `absorb` has added the trained updates; return their shards' digests by name.

    `store` and `stock` are those of `write.write_block`.
    """
    shards = {}
    progress.phase("write", len(skeleton))
    for index, block in sweep.blocks(skeleton, range(len(skeleton))):
        absorb(block, index)
        shards[write.block_shard(skeleton, index)] = write.write_block(
            skeleton, index, block.weights, folder, store, stock
        )
        del block
        progress.step(f"block {index}")
        rest(progress)
    return shards


class Corrector:
    """Run the steps of one shot's correction.

    Args:
        skeleton: the checkpoint to correct.
        windows: calibration windows.
        folder: folder for states and activations, used by nothing else.
        window: the blocks that may change.
        digests: digests of the files that the last step wrote, by name.
        dense: the model whose predictions are wanted; None for the windows' labels.
        progress: told of the passes.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        windows: Windows,
        folder: Path,
        how: Refinement,
        window: range,
        digests: Mapping[str, str],
        dense: Skeleton | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.skeleton, self.windows, self.folder, self.how = skeleton, windows, folder, how
        self.window, self._digests, self._dense = window, digests, dense
        self._progress = progress or Silent()
        self._size = min(how.sequences, len(windows.tokens))
        self._store = self._open_store("streams", self._size)

    def _open_store(self, name: str, samples: int) -> ActivationStore:
        shape = samples, self.windows.tokens.shape[1], self.skeleton.stream_width
        return ActivationStore(self.folder / name, shape, self.skeleton.dtype, self.skeleton.device, durable=False)

    def steps(self, done: int) -> Iterator[tuple[int, Mapping[str, str], float | None]]:
        """Run the steps from `done` on; yield each one's number and the digests of its files, once its state is durable; and its divergence
        from the dense model, in nats per token, if there is one.

        Raises:
            DamageError: a state on disk was altered.
        """
        self._store.keep_only(set())
        wanted = self._outputs(self._dense) if self._dense is not None and done < self.how.steps else None
        self._progress.phase("correct", self.how.steps, done)
        for step in range(done, self.how.steps):
            files.remove_tree(state(self.folder, step + 1))
            files.make_folder(state(self.folder, step + 1))
            self._digests, loss = self._step(step, wanted)
            yield step, self._digests, loss
            files.remove_tree(state(self.folder, step))

    def _outputs(self, dense: Skeleton) -> ActivationStore:
        """Run a model on all windows; return a store that has the output of its last block."""
        store = self._open_store("wanted", len(self.windows.tokens))
        store.keep_only(set())
        self._progress.phase("predictions of the dense model", len(dense))
        sweep.embed(dense, self.windows.tokens, store, sweep.boundary(STREAM, 0), self.how.batch)
        for index in sweep.forward(dense, store, STREAM, 0, len(dense), self.how.batch):
            store.remove(sweep.boundary(STREAM, index))
            self._progress.step(f"block {index}")
            rest(self._progress)
        return store

    def absorb(self, block: Block, index: int) -> None:
        """Give the block what was trained."""
        if (descent := self.descent(self.how.steps, index, block)) is None:
            return
        if self.how.rank is None:
            block.assign(descent.weights)
        else:
            block.absorb(descent.weights, keep_zeros=self.how.keeps_zeros)

    def descent(self, step: int, index: int, block: Block) -> Descent | None:
        """Return what is trained of a block before a step; None outside the window and without sites."""
        if index not in self.window or not block.prunables:
            return None
        how, path, dtype = self.how, self._file(step, index), accumulator(self.skeleton.dtype)
        if how.rank is None:
            weights = block.masters(dtype)
            unit = step_size(weights.values(), self.skeleton.width)
        else:
            weights, unit = block.updates(how.rank, dtype, seeded(how.seed, index)), 1.0
        return Descent(
            weights,
            steps=how.steps,
            rate=how.rate * unit,
            place=f"the correction of block {index}",
            normalised=how.rank is None,
            keeps_zeros=how.rank is None and how.keeps_zeros,
            state=load_shard(path, self._digests[path.name]) if step else None,
        )

    def _step(self, step: int, wanted: ActivationStore | None) -> tuple[dict[str, str], float | None]:
        skeleton, store, depth, how = self.skeleton, self._store, len(self.skeleton), self.how
        draw = batch if wanted is None else next_batch
        chosen = draw(len(self.windows.tokens), self._size, how.seed, step)
        labels = self.windows.labels[chosen]
        sweep.embed(skeleton, self.windows.tokens[chosen], store, sweep.boundary(STREAM, 0), how.batch)
        for index, block in sweep.blocks(skeleton, range(depth)):
            with self._updated(block, self.descent(step, index, block)):
                sweep.advance(skeleton, block, index, store, STREAM, how.batch)
            del block
        loss, predictions = None, max(1, counted(labels))
        if wanted is None:
            sweep.head_gradient(skeleton, store, labels, how.batch)
        else:
            parts = (part.tolist() for part in torch.split(chosen, how.batch))
            with closing(wanted.rows(parts, sweep.boundary(STREAM, depth))) as reading:
                counts = sweep.predicting(labels)
                loss = sweep.imitation_gradient(skeleton, store, (aim for (aim,) in reading), how.batch, counts)
            predictions = max(1, int(counts.sum()))
            if not math.isfinite(loss):
                raise NumericalError(f"the correction's divergence from the dense model is {loss} at step {step}")
        digests = {}
        # Below the window no gradient is needed.
        for index, block in sweep.blocks(skeleton, range(depth - 1, self.window.start - 1, -1)):
            descent = self.descent(step, index, block)
            self._backward(block, index, descent, predictions)
            del block
            if descent is not None:
                descent.step()
                path = self._file(step + 1, index)
                digests[path.name] = write_shard(path, descent.state())
            store.remove(sweep.boundary(GRADIENT, index + 1))
        store.remove(sweep.boundary(GRADIENT, self.window.start))
        return digests, loss

    @contextmanager
    def _updated(self, block: Block, descent: Descent | None) -> Iterator[Sequence[Tensor]]:
        """Compute with what is trained while the context is open; yield the tensors to take gradients of, in the order of the weights."""
        if descent is None:
            yield []
        elif self.how.rank is None:
            yield block.compute_with(descent.weights)  # no block is used again
        else:
            with block.updated(descent.weights, keep_zeros=self.how.keeps_zeros):
                yield [*descent.weights.values()]

    def _backward(self, block: Block, index: int, descent: Descent | None, predictions: int) -> None:
        """Set the gradients of the loss per prediction with respect to what is trained, and write the gradient of the input."""
        skeleton, store = self.skeleton, self._store
        trained = [] if descent is None else [*descent.weights.values()]
        target, place = sweep.boundary(GRADIENT, index), f"the correction's gradient of block {index}"
        names = sweep.boundary(STREAM, index), sweep.boundary(GRADIENT, index + 1)
        with self._updated(block, descent) as leaves, store.writing(target, place) as write:
            for _, (x, dy) in store.each(self.how.batch, *names):
                arguments = skeleton.arguments(x.shape[0], x.shape[1])[index]
                with torch.enable_grad():
                    x.requires_grad_()
                    # An expert may be without tokens.
                    dx, *gradients = torch.autograd.grad(block(x, arguments), (x, *leaves), dy, materialize_grads=True)
                for weight, gradient in zip(trained, gradients, strict=True):
                    part = gradient.to(weight.dtype) / predictions
                    weight.grad = part if weight.grad is None else weight.grad + part
                write(dx)

    def _file(self, step: int, index: int) -> Path:
        return state(self.folder, step) / f"block-{index:04}.safetensors"


def step_size(matrices: Collection[Tensor], width: int) -> float:
    """Return the root mean square of all entries of a block's matrices, divided by the square root of the residual stream's `width`.

    For inputs of width d with a root mean square of 1, random weights with a root mean square of `s` give outputs of `s √d`. A step
    of rank 1 with entries of `u` changes these by up to `u d` (Yang et al. 2023, arXiv 2310.17813). So in this unit, a learning rate
    is about the share of the output that a step can change, whatever the width and the scale of the weights.
    """
    norms = torch.stack([torch.linalg.vector_norm(each.detach()) for each in matrices])
    return float(torch.linalg.vector_norm(norms)) / math.sqrt(sum(each.numel() for each in matrices) * width)


def state(folder: Path, step: int) -> Path:
    """Folder of the state after `step` steps."""
    return folder / f"step-{step:06}"
