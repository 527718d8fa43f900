"""One block: compensate → observe → select → reconstruct → shrink → advance, sublayer by sublayer.

Two streams run side by side: what the dense model would have here, and what the model pruned so far has.
A token passes each sublayer once dense and twice pruned: once to measure, once to move on.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from .maths.linalg import compensate, output_error, unit_columns
from .maths.stats import Gram, accumulator
from .methods.plan import Plan
from .methods.recipe import Problem, Recipe
from .model.block import Block, Sublayer
from .model.skeleton import Skeleton
from .site import Site
from .stream.store import ActivationStore
from .stream.sweep import boundary

DENSE, PRUNED = "dense", "pruned"


@dataclass(frozen=True)
class Surgeon:
    """What pruning a block takes, the same for all blocks."""

    skeleton: Skeleton
    recipe: Recipe[Any]
    settings: Any
    plan: Plan
    store: ActivationStore | None
    """The streams; None for a recipe that measures nothing."""
    batch: int
    seed: int

    @property
    def compensation(self) -> float | None:
        """Relative damping of the input compensation; None for none."""
        return self.recipe.compensation(self.settings)

    @property
    def streams(self) -> tuple[str, ...]:
        """The streams that move."""
        if self.store is None:
            return ()
        return (PRUNED,) if self.compensation is None else (PRUNED, DENSE)

    @torch.no_grad()
    def operate(self, block: Block, index: int) -> tuple[Block, list[dict[str, Any]]]:
        """The pruned block, and what happened at each of its sites.

        Both streams' next boundary is in the store afterwards, except behind the last block.
        """
        pruned = block.twin()
        reports = []
        inputs: Gram | None = None
        for position, (dense, sub) in enumerate(zip(block.sublayers, pruned.sublayers, strict=True)):
            started = time.perf_counter()
            report: dict[str, Any] = {"site": sub.site.name, "units": sub.site.units}
            if self.compensation is not None and (index or position):
                inputs = inputs or self._measure_inputs(dense, sub, index)
                report["compensation_damping"] = self._compensate(sub, inputs)
            inputs = None
            report |= self._shrink(sub, index, position)
            if self.streams and not (index == len(self.skeleton) - 1 and position == len(block.sublayers) - 1):
                inputs = self._advance(block, pruned, index, position)
            dense.release()
            reports.append({**report, "seconds": round(time.perf_counter() - started, 3)})
        return pruned, reports

    def _measure_inputs(self, dense: Sublayer, sub: Sublayer, index: int) -> Gram:
        assert self.store is not None
        sums = self._gram(self.skeleton.width, cross=True)
        names = boundary(PRUNED, index), boundary(DENSE, index)
        for _, (x_hat, x) in self.store.each(self.batch, *names):
            sums.add(sub.normed(x_hat), dense.normed(x))
        return sums

    def _compensate(self, sub: Sublayer, inputs: Gram) -> float:
        h, c = inputs.mean()
        assert c is not None
        damping = self.compensation or 0.0
        for name in (producer.name for producer in sub.entry.producers):
            w = sub.weight(name)
            fitted, used = compensate(
                w, h.to(w.dtype), c.to(w.dtype), self.compensation or 0.0, f"{sub.site.name}.{name}"
            )
            damping = max(damping, used)
            sub.set_weight(name, fitted)
        return damping

    def _shrink(self, sub: Sublayer, index: int, position: int) -> dict[str, Any]:
        site, entry = sub.site, self.plan[sub.site.name]
        if entry.keep == site.units:
            return {"kept": site.units, "error": 0.0, "damping": None}
        w = sub.weight(sub.entry.consumer)
        h = self._measure(sub, index, position).to(w.dtype) if self.recipe.wants_gram(self.settings) else None
        problem = Problem(
            site=site,
            w=w,
            producers=tuple(sub.weight(producer.name) for producer in sub.entry.producers),
            h=h,
            generator=_generator(self.seed, site),
        )
        if self.recipe.uses_plan_units(self.settings):
            assert entry.units is not None
            kept = torch.tensor(entry.units)
        else:
            kept = self.recipe.select(self.settings, problem, entry.keep)
        assert kept.numel() == entry.keep
        assert bool((kept.diff() > 0).all())
        refit = self.recipe.reconstruct(self.settings, problem, kept)
        columns = unit_columns(kept, site.width).to(w.device)
        error = None if h is None else output_error(w, h, refit.w, columns)
        sub.shrink(kept, refit.w)
        return {"kept": entry.keep, "error": error, "damping": refit.damping}

    def _measure(self, sub: Sublayer, index: int, position: int) -> torch.Tensor:
        assert self.store is not None
        sums = self._gram(sub.site.columns, cross=False)
        for _, (x_hat,) in self.store.each(self.batch, boundary(PRUNED, index, position)):
            arguments = self.skeleton.arguments(x_hat.shape[0], x_hat.shape[1])[index]
            sums.add(sub.mix(sub.normed(x_hat), arguments))
        return sums.mean()[0]

    def _advance(self, block: Block, pruned: Block, index: int, position: int) -> Gram | None:
        """Move the streams past a sublayer; where another follows in this block, sum its inputs in passing."""
        assert self.store is not None
        inside = position + 1 < len(block.sublayers)
        source, target = (index, position), (index, position + 1) if inside else (index + 1, 0)
        owners = {PRUNED: pruned, DENSE: block}
        sums = self._gram(self.skeleton.width, cross=True) if inside and DENSE in self.streams else None
        with ExitStack() as stack:
            writers = []
            for stream in self.streams:
                place = f"{pruned.sublayers[position].site.name} ({stream})"
                writers.append(stack.enter_context(self.store.writing(boundary(stream, *target), place)))
            for _, inputs in self.store.each(self.batch, *(boundary(stream, *source) for stream in self.streams)):
                arguments = self.skeleton.arguments(inputs[0].shape[0], inputs[0].shape[1])[index]
                following = []
                for stream, x, write in zip(self.streams, inputs, writers, strict=True):
                    y = owners[stream].sublayers[position](x, arguments)
                    write(y)
                    if sums is not None:
                        following.append(owners[stream].sublayers[position + 1].normed(y))
                if sums is not None:
                    sums.add(*following)
        if position:
            for stream in self.streams:
                self.store.remove(boundary(stream, index, position))
        return sums

    def _gram(self, columns: int, *, cross: bool) -> Gram:
        return Gram(columns, cross=cross, device=self.skeleton.device, dtype=accumulator(self.skeleton.dtype))


def _generator(seed: int, site: Site) -> torch.Generator:
    """A generator of the site's own, so that the order in which sites come does not matter."""
    return torch.Generator().manual_seed(((seed * 1_000_003 + site.block) * 2 + (site.kind == "ffn")) % 2**63)
