"""Adam with a state that can be saved and restored."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import NumericalError
from .refit import all_finite

_BETAS = (0.9, 0.95)


class Descent:
    """Adam (Kingma & Ba 2015; equal to AdamW, since there is no weight decay) with a learning rate that falls linearly to zero.

    Args:
        weights: the trained parameters, by name.
        steps: number of steps after which the learning rate is zero.
        rate: learning rate of the first step.
        place: name of the trained part, for messages.
        state: result of `state`, to resume from there.
    """

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        *,
        steps: int,
        rate: float,
        place: str,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.weights, self.steps, self.rate, self.place, self.done = weights, steps, rate, place, 0
        self._adam = torch.optim.Adam(weights.values(), lr=rate, betas=_BETAS)
        if state is not None:
            self.done = int(state["step"])
            for name, weight in weights.items():
                first, second = (state[f"{name}.{moment}"].to(weight.device) for moment in ("first", "second"))
                step = torch.tensor(float(self.done))
                self._adam.state[weight] = {"step": step, "exp_avg": first, "exp_avg_sq": second}

    def step(self) -> None:
        """Take one step with the accumulated gradients, then clear them.

        Raises:
            NumericalError: a gradient holds NaN or Inf.
        """
        gathered = {name: weight.grad for name, weight in self.weights.items() if weight.grad is not None}
        sums = torch.stack(
            [gradient.sum() for gradient in gathered.values()]
        )  # a single device synchronisation for all gradients
        for (name, gradient), total in zip(gathered.items(), sums.tolist(), strict=True):
            if not math.isfinite(total) and not all_finite(gradient):
                raise NumericalError(f"{self.place}: the gradient of {name} holds NaN or Inf at step {self.done}")
        for group in self._adam.param_groups:
            group["lr"] = self.rate * (1 - self.done / self.steps)
        self._adam.step()
        self._adam.zero_grad()
        self.done += 1

    def state(self) -> dict[str, Tensor]:
        """Return the state on the host: ``step`` () int64, and both moments of each weight, ``name.first`` and ``name.second``."""
        found = {"step": torch.tensor(self.done)}
        for name, weight in self.weights.items():
            kept = self._adam.state[weight]
            found[f"{name}.first"], found[f"{name}.second"] = kept["exp_avg"].cpu(), kept["exp_avg_sq"].cpu()
        return found


def batch(samples: int, size: int, seed: int, step: int) -> Tensor:
    """Draw the sample indices of a step, (min(size, samples),) int64, without repetition; determined by `seed` and `step`."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    return torch.randperm(samples, generator=generator)[:size]
