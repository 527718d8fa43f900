"""Low-rank corrections between shots (LLM Surgeon, section 3.6): LoRA steps on the language modelling loss, streamed.

A step is one forward and one backward sweep over the blocks for a small batch: ``W + U V`` computes, the gradient reaches
`U` and `V`, Adam moves them. Only one block is in memory; its `U`, `V` and Adam's moments lie on the disk, one file a
block and step, until the last step absorbs ``U V`` into `W`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from . import files
from .errors import NumericalError
from .maths.linalg import accumulator
from .memory import REFINE_SEQUENCES
from .methods.recipe import Correction
from .model.block import Block
from .model.checkpoint import write_shard
from .model.skeleton import Skeleton
from .stream import sweep
from .stream.store import ActivationStore

STREAM, GRADIENT = "dense", "gradient"


class Corrector:
    """The steps of one shot's correction.

    Args:
        skeleton: the checkpoint to correct.
        tokens: calibration windows (samples, length).
        folder: for states and activations, a folder of its own.
        batch: sequences whose activations are held at once.
        keep_zeros: weights that are zero stay zero.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        tokens: Tensor,
        folder: Path,
        how: Correction,
        *,
        seed: int,
        batch: int,
        keep_zeros: bool,
    ) -> None:
        self.skeleton, self.tokens, self.folder, self.how = skeleton, tokens, folder, how
        self.seed, self.batch, self.keep_zeros = seed, batch, keep_zeros
        self.size = min(REFINE_SEQUENCES, len(tokens))
        shape = self.size, tokens.shape[1], skeleton.width
        self._store = ActivationStore(folder / "streams", shape, skeleton.dtype, skeleton.device, durable=False)

    def steps(self, done: int) -> Iterator[int]:
        """Steps from `done` on; yields each one's number once its state is durable."""
        for step in range(done, self.how.steps):
            files.remove_tree(self._state(step + 1))
            files.make_folder(self._state(step + 1))
            self._step(step)
            yield step
            files.remove_tree(self._state(step))

    def corrected(self, block: Block, index: int) -> dict[str, Tensor]:
        """The block's weights by name with what the last step left absorbed, in their stored dtypes."""
        weights = dict(block.weights)
        state = self._read(self.how.steps, index, block)
        for name in _linears(block):
            weights[name] = self._absorbed(block.weights[name], state, name).to(weights[name].dtype).cpu()
            if not bool(torch.isfinite(weights[name]).all()):
                raise NumericalError(f"block {index}: {name} is not finite after its correction")
        return weights

    def _step(self, step: int) -> None:
        skeleton, store, depth = self.skeleton, self._store, len(self.skeleton)
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) % 2**63)
        tokens = self.tokens[torch.randperm(len(self.tokens), generator=generator)[: self.size]]
        sweep.embed(skeleton, tokens, store, sweep.boundary(STREAM, 0), self.batch)
        for index, block in sweep.blocks(skeleton, range(depth)):
            self._put(block, self._read(step, index, block))
            sweep.advance(skeleton, block, index, store, STREAM, self.batch)
        sweep.head_gradient(skeleton, store, tokens, self.batch)
        for index, block in sweep.blocks(skeleton, range(depth - 1, -1, -1)):
            state = self._read(step, index, block)
            gradients = self._gradients(block, index, state)
            write_shard(self._file(step + 1, index), self._moved(state, gradients, step))
            store.remove(sweep.boundary(GRADIENT, index + 1))

    def _gradients(self, block: Block, index: int, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of the mean loss with respect to each linear's ``W + U V``; the stream's gradient moves on."""
        skeleton, store = self.skeleton, self._store
        weights = self._put(block, state)
        sums = {name: torch.zeros_like(weight, dtype=accumulator(weight.dtype)) for name, weight in weights.items()}
        with store.writing(sweep.boundary(GRADIENT, index), f"the correction's gradient of block {index}") as write:
            names = sweep.boundary(STREAM, index), sweep.boundary(GRADIENT, index + 1)
            for _, (x, dy) in store.each(self.batch, *names):
                arguments = skeleton.arguments(x.shape[0], x.shape[1])[index]
                with torch.enable_grad():
                    x.requires_grad_()
                    dx, *dw = torch.autograd.grad(block(x, arguments), (x, *weights.values()), dy)
                for name, gradient in zip(weights, dw, strict=True):
                    sums[name] += gradient
                write(dx)
        predictions = self.size * (self.tokens.shape[1] - 1)
        for name, total in sums.items():
            total /= predictions
            if self.keep_zeros:
                total *= block.weights[name].to(total.device) != 0
        return sums

    def _moved(self, state: dict[str, Tensor], gradients: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """The state after one step of Adam, the rate falling linearly to zero."""
        moved: dict[str, Tensor] = {}
        for name, gradient in gradients.items():
            u, v = (nn.Parameter(state[f"{part}.{name}"]) for part in "uv")
            u.grad, v.grad = gradient @ v.detach().T, u.detach().T @ gradient
            optimiser = torch.optim.Adam([u, v], lr=self.how.rate * (1 - step / self.how.steps))
            for part, parameter in (("u", u), ("v", v)):
                if step:
                    optimiser.state[parameter] = {
                        "step": torch.tensor(float(step)),
                        "exp_avg": state[f"{part}.first.{name}"],
                        "exp_avg_sq": state[f"{part}.second.{name}"],
                    }
            optimiser.step()
            for part, parameter in (("u", u), ("v", v)):
                moments = optimiser.state[parameter]
                moved[f"{part}.{name}"] = parameter.detach()
                moved[f"{part}.first.{name}"] = moments["exp_avg"]
                moved[f"{part}.second.{name}"] = moments["exp_avg_sq"]
        return {name: tensor.cpu() for name, tensor in moved.items()}

    def _put(self, block: Block, state: dict[str, Tensor]) -> dict[str, nn.Parameter]:
        """Let the block compute with ``W + U V``: the parameters that do, by name."""
        put = {}
        for name in _linears(block):
            weight = self._absorbed(block.weights[name], state, name).to(self.skeleton.dtype)
            put[name] = block.put(name, nn.Parameter(weight))
        return put

    def _absorbed(self, master: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
        w = master.to(self.skeleton.device)
        wide = w.to(accumulator(w.dtype))
        update = (state[f"u.{name}"] @ state[f"v.{name}"]).to(wide.dtype)
        return wide + (update * (w != 0) if self.keep_zeros else update)

    def _read(self, step: int, index: int, block: Block) -> dict[str, Tensor]:
        """`U` (rows, rank) and `V` (rank, columns) of every linear, and Adam's moments, before that step."""
        device = self.skeleton.device
        if step:
            return {name: tensor.to(device) for name, tensor in load_file(self._file(step, index)).items()}
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + index) % 2**63)
        state: dict[str, Tensor] = {}
        for name in _linears(block):
            rows, columns = block.weights[name].shape
            dtype = accumulator(self.skeleton.dtype)
            v = torch.randn(self.how.rank, columns, generator=generator, dtype=dtype) / columns**0.5
            state |= {f"u.{name}": torch.zeros(rows, self.how.rank, dtype=dtype), f"v.{name}": v}
        return {name: tensor.to(device) for name, tensor in state.items()}

    def _state(self, step: int) -> Path:
        return self.folder / f"step-{step:06}"

    def _file(self, step: int, index: int) -> Path:
        return self._state(step) / f"block-{index:04}.safetensors"


def _linears(block: Block) -> list[str]:
    """Names of the weights that are corrected: of every site's producers and consumer."""
    return [
        f"{name}.weight"
        for sub in block.sublayers
        for name in (*(producer.name for producer in sub.entry.producers), sub.entry.consumer)
    ]
