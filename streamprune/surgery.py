"""One block: compensate → observe → aim → select → reconstruct → shrink → advance, sublayer by sublayer; then refine.

Two streams run side by side: what the dense model would have here, and what the model pruned so far has.
A token passes each sublayer once dense and twice pruned: once to measure, once to move on.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .maths.linalg import accumulator, fit, output_error, unit_columns
from .maths.stats import Gram
from .methods.plan import Plan
from .methods.recipe import Problem, Recipe, Survey, Target
from .model.block import Block, Sublayer
from .model.skeleton import Skeleton
from .refine import Refinement, refine
from .site import Site
from .stream.store import ActivationStore
from .stream.sweep import advance, boundary

DENSE, PRUNED = "dense", "pruned"


@dataclass(frozen=True)
class Surgeon:
    """What pruning a block takes, the same for all blocks."""

    skeleton: Skeleton
    recipe: Recipe[Any]
    settings: Any
    plan: Plan
    survey: Survey
    store: ActivationStore | None
    """The streams; None for a recipe that measures nothing."""
    batch: int
    seed: int
    window: range
    """The blocks that may change; those before only pass the stream on, those behind are not even run."""
    refinement: Refinement | None

    @property
    def streams(self) -> tuple[str, ...]:
        """The streams that move."""
        if self.store is None:
            return ()
        return (PRUNED, DENSE) if self._compensation is not None or self._target or self.refinement else (PRUNED,)

    def streams_into(self, index: int) -> tuple[str, ...]:
        """The streams that a block needs to have in store: they part at the window's first block."""
        if index >= self.window.stop:
            return ()
        return self.streams if index > self.window.start else self.streams[:1]

    @torch.no_grad()
    def operate(self, block: Block, index: int) -> tuple[Block, list[dict[str, Any]]]:
        """The pruned block, and what happened at each of its sites.

        The streams that the next block needs are in the store afterwards.
        """
        if index not in self.window:
            if self.streams_into(index + 1):
                assert self.store is not None
                advance(self.skeleton, block, index, self.store, PRUNED, self.batch)
            return block, [self._counts(sub.site) | _untouched(sub.site) for sub in block.sublayers]
        if index == self.window.start and DENSE in self.streams:
            assert self.store is not None
            self.store.link(boundary(PRUNED, index), boundary(DENSE, index))
        pruned = block.twin()
        reports = []
        inputs: Gram | None = None
        for position, (dense, sub) in enumerate(zip(block.sublayers, pruned.sublayers, strict=True)):
            started = time.perf_counter()
            here = _Place(index, position, last=position == len(block.sublayers) - 1)
            parted = index > self.window.start or position > 0
            report = self._counts(sub.site)
            if self._measures_inputs(parted):
                inputs = inputs or self._measure_inputs(
                    dense, sub, here, cross=parted and self._compensation is not None
                )
            if self._compensation is not None and parted:
                assert inputs is not None
                report["compensation_damping"] = self._compensate(sub, inputs)
            producers_input = (
                inputs.mean()[0] if inputs is not None and self.recipe.wants_inputs(self.settings) else None
            )
            inputs = None
            report |= self._shrink(dense, sub, here, parted, producers_input)
            del producers_input
            if self._goes_on(here):
                inputs = self._advance(block, pruned, here)
            dense.release()
            reports.append({**report, "seconds": round(time.perf_counter() - started, 3)})
        if self.refinement is not None:
            started = time.perf_counter()
            reports[-1] |= self._refine(pruned, index)
            reports[-1]["seconds"] = round(reports[-1]["seconds"] + time.perf_counter() - started, 3)
        return pruned, reports

    def _counts(self, site: Site) -> dict[str, Any]:
        """What the report says first of a site: its units, or the zeros among its weights."""
        counts: dict[str, Any] = {"site": site.name, "units": site.units}
        if self.recipe.writes_zeros(self.settings):
            counts |= {"zeros": sum(self.plan[site.name].zeros or ()), "weights": sum(site.linears)}
        return counts

    # What the recipe wants.

    @property
    def _compensation(self) -> float | None:
        return self.recipe.compensation(self.settings)

    @property
    def _target(self) -> Target | None:
        return self.recipe.target(self.settings)

    def _measures_inputs(self, parted: bool) -> bool:
        return (self._compensation is not None and parted) or self.recipe.wants_inputs(self.settings)

    def _goes_on(self, here: _Place) -> bool:
        """Whether anything will still be measured behind this sublayer."""
        if not self.streams:
            return False
        return not here.last or self.refinement is not None or bool(self.streams_into(here.block + 1))

    # The steps.

    def _measure_inputs(self, dense: Sublayer, sub: Sublayer, here: _Place, *, cross: bool) -> Gram:
        assert self.store is not None
        sums = self._gram(self.skeleton.width, cross=self.skeleton.width if cross else 0)
        streams = (PRUNED, DENSE) if cross else (PRUNED,)
        for _, inputs in self.store.each(self.batch, *(boundary(stream, *here.entry) for stream in streams)):
            sums.add(*(owner.normed(x) for owner, x in zip((sub, dense), inputs, strict=False)))
        return sums

    def _compensate(self, sub: Sublayer, inputs: Gram) -> float:
        h, c = inputs.mean()
        assert c is not None
        damping = self._compensation or 0.0
        for name in (producer.name for producer in sub.entry.producers):
            w = sub.weight(name)
            place = f"{sub.site.name}.{name}"
            fitted, used = fit(w, h.to(w.dtype), w @ c.to(w.dtype), self._compensation or 0.0, place)
            damping = max(damping, used)
            sub.set_weight(name, fitted)
        return damping

    def _shrink(
        self, dense: Sublayer, sub: Sublayer, here: _Place, parted: bool, inputs: Tensor | None
    ) -> dict[str, Any]:
        site, entry = sub.site, self.plan[sub.site.name]
        # Where the streams are still one, the target is what the consumer gives anyway.
        aims = self._target is not None and parted
        changes = entry.keep < site.units or any(entry.zeros or ())
        if not changes and not aims:
            return _untouched(site)
        w = sub.weight(sub.entry.consumer)
        h, report = None, {}
        if self.recipe.wants_gram(self.settings) or aims:
            sums = self._measure(dense, sub, here, aims)
            h, aim = (each if each is None else each.to(w.dtype) for each in sums.mean())
            del sums
            assert h is not None
            if aims and self._target is not None:
                assert aim is not None
                w, report["target_damping"] = fit(w, h, aim, self._target.damping, site.name)
            del aim
        if not changes:
            sub.set_weight(sub.entry.consumer, w)
            return {**_untouched(site), **report}
        problem = Problem(
            site=site,
            w=w,
            producers=sub.producer_weights(),
            zeros=entry.zeros,
            h=h,
            inputs=inputs,
            findings=self.survey.get(site.name, {}),
            generator=_generator(self.seed, site),
        )
        if entry.keep == site.units:
            kept = torch.arange(site.units)
        elif self.recipe.plans_units(self.settings, site):
            assert entry.units is not None
            kept = torch.tensor(entry.units)
        else:
            kept = self.recipe.select(self.settings, problem, entry.keep)
        assert kept.numel() == entry.keep
        assert bool((kept.diff() > 0).all())
        refit = self.recipe.reconstruct(self.settings, problem, kept)
        columns = unit_columns(kept, site.width).to(w.device)
        error = None if h is None else output_error(w, h, refit.w, columns)
        if refit.producers is not None:
            sub.set_producer_weights(refit.producers)
        sub.shrink(kept, refit.w)
        return {**report, "kept": entry.keep, "error": error, "damping": refit.damping}

    def _measure(self, dense: Sublayer, sub: Sublayer, here: _Place, aims: bool) -> Gram:
        """The Gram of the consumer's input; with a target, its cross sums as well, and the dense stream moves on."""
        assert self.store is not None
        sums = self._gram(sub.site.columns, cross=self.skeleton.width if aims else 0)
        streams = (PRUNED, DENSE) if aims else (PRUNED,)
        with ExitStack() as stack:
            write = None
            if aims and self._goes_on(here):
                place = f"{sub.site.name} ({DENSE})"
                write = stack.enter_context(self.store.writing(boundary(DENSE, *here.exit), place))
            for _, inputs in self.store.each(self.batch, *(boundary(stream, *here.entry) for stream in streams)):
                arguments = self.skeleton.arguments(inputs[0].shape[0], inputs[0].shape[1])[here.block]
                z = sub.mix(sub.normed(inputs[0]), arguments)
                if not aims:
                    sums.add(z)
                    continue
                x_hat, x = inputs
                o = dense.consume(dense.mix(dense.normed(x), arguments))
                assert self._target is not None
                lacking = x - x_hat if self._target.residual else 0.0
                bias = sub.bias(sub.entry.consumer)
                sums.add(z, o + lacking - (0.0 if bias is None else bias))
                if write is not None:
                    write(dense.join(x, o))
        return sums

    def _advance(self, block: Block, pruned: Block, here: _Place) -> Gram | None:
        """Move on the streams that have not; where another sublayer follows in this block, sum its inputs in passing."""
        assert self.store is not None
        owners = {PRUNED: pruned, DENSE: block}
        # A refined block moves its stream on when it is refined.
        waits = {PRUNED} if here.last and self.refinement is not None else set()
        moving = [s for s in self.streams if boundary(s, *here.exit) not in self.store and s not in waits]
        ready = [s for s in self.streams if s not in moving and s not in waits]
        cross = self._compensation is not None
        sums = None
        if not here.last and self._measures_inputs(parted=True):
            sums = self._gram(self.skeleton.width, cross=self.skeleton.width if cross else 0)
        following = here.position + 1
        with ExitStack() as stack:
            writers = {}
            for stream in moving:
                place = f"{pruned.sublayers[here.position].site.name} ({stream})"
                writers[stream] = stack.enter_context(self.store.writing(boundary(stream, *here.exit), place))
            sources = [boundary(s, *here.entry) for s in moving] + [boundary(s, *here.exit) for s in ready]
            for _, read in self.store.each(self.batch, *sources) if moving else ():
                arguments = self.skeleton.arguments(read[0].shape[0], read[0].shape[1])[here.block]
                outputs = dict(zip((*moving, *ready), read, strict=True))
                for stream in moving:
                    outputs[stream] = owners[stream].sublayers[here.position](outputs[stream], arguments)
                    writers[stream](outputs[stream])
                if sums is not None:
                    streams = (PRUNED, DENSE) if cross else (PRUNED,)
                    sums.add(*(owners[s].sublayers[following].normed(outputs[s]) for s in streams))
        if here.position:
            for stream in self.streams:
                self.store.remove(boundary(stream, *here.entry))
        return sums

    def _refine(self, pruned: Block, index: int) -> dict[str, Any]:
        assert self.store is not None
        assert self.refinement is not None
        source, target = boundary(PRUNED, index), boundary(DENSE, index + 1)
        report = refine(self.skeleton, pruned, index, self.store, source, target, self.refinement)
        if self.streams_into(index + 1):
            advance(self.skeleton, pruned, index, self.store, PRUNED, self.batch)
        return report

    def _gram(self, columns: int, *, cross: int) -> Gram:
        return Gram(columns, cross=cross, device=self.skeleton.device, dtype=accumulator(self.skeleton.dtype))


def extent(report: Mapping[str, Any]) -> str:
    """What the report says of a site, in a few words: the units it kept, or the zeros among its weights."""
    if "zeros" in report:
        return f"{report['zeros']:,} of {report['weights']:,}"
    return f"{report['kept']} of {report['units']}"


@dataclass(frozen=True)
class _Place:
    """A sublayer of the model."""

    block: int
    position: int
    last: bool
    """Whether it is the last of its block."""

    @property
    def entry(self) -> tuple[int, int]:
        """Block and sublayer whose input it reads."""
        return self.block, self.position

    @property
    def exit(self) -> tuple[int, int]:
        """Block and sublayer whose input it gives."""
        return (self.block + 1, 0) if self.last else (self.block, self.position + 1)


def _untouched(site: Site) -> dict[str, Any]:
    return {"kept": site.units, "error": 0.0, "damping": None, "seconds": 0.0}


def _generator(seed: int, site: Site) -> torch.Generator:
    """A generator of the site's own, so that the order in which sites come does not matter."""
    return torch.Generator().manual_seed(((seed * 1_000_003 + site.block) * 2 + (site.kind == "ffn")) % 2**63)
