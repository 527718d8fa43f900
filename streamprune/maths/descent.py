"""Steps of training with a state that can be saved and restored: Adam, or normalised gradients, which have no moments."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import NumericalError
from .refit import all_finite

Decay = Literal["linear", "cosine"]
_BETAS = (0.9, 0.95)
_MOMENTS = {"exp_avg": "first", "exp_avg_sq": "second"}


class Descent:
    """Adam (Kingma & Ba 2015) without weight decay. The learning rate rises linearly from zero, then falls to zero.

    If `normalised`, a step is the gradient with rows and columns of equal norm instead (SinkGD, Scetbon et al. 2025, arXiv 2502.06742;
    see `normalised`), whose entries have a root mean square of the learning rate. It has no moments.

    Args:
        weights: the trained parameters, by name.
        steps: number of steps after which the learning rate is zero.
        rate: the highest learning rate; that of the first step without warm-up.
        warmup: number of steps before the step with that rate.
        decay: how it falls then, linearly or as half a cosine.
        place: name of the trained part, for messages.
        normalised: whether steps are normalised gradients instead of Adam's; the parameters are then matrices.
        keeps_zeros: whether zero entries of matrices stay zero.
        state: result of `state`, to resume from there.
    """

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        *,
        steps: int,
        rate: float,
        place: str,
        warmup: int = 0,
        decay: Decay = "linear",
        normalised: bool = False,
        keeps_zeros: bool = False,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.weights, self.steps, self.rate, self.place = weights, steps, rate, place
        self.warmup, self.decay, self._keeps_zeros = warmup, decay, keeps_zeros
        self.done = 0
        self._adam = None if normalised else torch.optim.Adam(weights.values(), lr=rate, betas=_BETAS)
        if state is not None:
            self.done = int(state["step"])
            for name, weight in weights.items():
                weight.data.copy_(state[name])
                if self._adam is not None:
                    moments = {theirs: state[f"{name}.{ours}"].to(weight.device) for theirs, ours in _MOMENTS.items()}
                    self._adam.state[weight] = {"step": torch.tensor(float(self.done)), **moments}

    def step(self) -> None:
        """Take one step with the accumulated gradients, then clear them. Raises NumericalError if one holds NaN or Inf."""
        gathered = {name: weight.grad for name, weight in self.weights.items() if weight.grad is not None}
        # A single device synchronisation for all gradients.
        sums = torch.stack([gradient.sum() for gradient in gathered.values()]).tolist()
        for (name, gradient), total in zip(gathered.items(), sums, strict=True):
            if not math.isfinite(total) and not all_finite(gradient):
                raise NumericalError(f"{self.place}: the gradient of {name} holds NaN or Inf at step {self.done}")
        zeros = [(weight, weight == 0) for weight in self.weights.values() if self._keeps_zeros and weight.dim() == 2]
        rate = self.rate * self._share
        if self._adam is None:
            for name, gradient in gathered.items():
                self.weights[name].data.sub_(normalised(gradient), alpha=rate)
        else:
            self._adam.param_groups[0]["lr"] = rate
            self._adam.step()
        for weight, zero in zeros:
            weight.data.masked_fill_(zero, 0)
        for each in self.weights.values():
            each.grad = None
        self.done += 1

    @property
    def _share(self) -> float:
        """Share of the highest learning rate that the next step has."""
        if self.done < self.warmup:
            return self.done / self.warmup
        past = (self.done - self.warmup) / (self.steps - self.warmup)
        return 1 - past if self.decay == "linear" else (1 + math.cos(math.pi * past)) / 2

    def state(self) -> dict[str, Tensor]:
        """Return the state on the host: ``step`` () int64, all weights, and Adam's moments of each as ``name.first``, ``.second``."""
        found = {"step": torch.tensor(self.done)}
        for name, weight in self.weights.items():
            found[name] = weight.detach().cpu()
            if self._adam is not None:
                found |= {f"{name}.{ours}": self._adam.state[weight][theirs].cpu() for theirs, ours in _MOMENTS.items()}
        return found


def normalised(gradient: Tensor) -> Tensor:
    """Return a gradient (rows, columns) whose entries have a root mean square of 1, in all columns, and nearly in all rows.

    Rows are divided by theirs, then columns: one round of the paper's five, which does as well. Zeros stay zero.
    """
    gradient = gradient / gradient.abs().max().clamp(min=torch.finfo(gradient.dtype).tiny)  # squares must not vanish
    for axis in (1, 0):
        gradient = gradient / gradient.square().mean(axis, keepdim=True).sqrt().clamp(min=1e-12)
    return gradient


def seeded(seed: int, number: int) -> torch.Generator:
    """Return a generator that is determined by a job's seed and the number of a block or step."""
    return torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)


def batch(samples: int, size: int, seed: int, step: int) -> Tensor:
    """Draw the sample indices of a step, (min(size, samples),) int64, without repetition."""
    return torch.randperm(samples, generator=seeded(seed, step))[:size]


def epoch_batch(samples: int, size: int, seed: int, step: int) -> Tensor:
    """Return the sample indices of a step, (at most size,) int64: every epoch takes all samples once, in its own random order.

    The last step of an epoch takes what is left.
    """
    epoch, part = divmod(step, steps_per_epoch(samples, size))
    return torch.randperm(samples, generator=seeded(seed, epoch))[part * size : (part + 1) * size]


def next_batch(samples: int, size: int, seed: int, step: int) -> Tensor:
    """Return the sample indices of a step, (size,) int64: epochs follow each other without a gap, each of all samples in its own order."""
    first, skipped = divmod(step * size, samples)
    epochs = range(first, first + -(-(skipped + size) // samples))
    return torch.cat([torch.randperm(samples, generator=seeded(seed, epoch)) for epoch in epochs])[skipped:][:size]


def steps_per_epoch(samples: int, size: int) -> int:
    return -(-samples // size)
