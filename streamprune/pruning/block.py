"""One block, sublayer by sublayer: compensate → sum H → fit to target → select → refit → shrink → advance; then refine.

Two streams of activations run side by side: the dense model's, and that of the model pruned so far. Each token passes each
sublayer once on the dense stream and twice on the pruned one: once to sum H, once to advance.

`solve` has the steps for one site, from the fit to the refit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..jobs.forecast.memory import GRAMS_AT_ONCE
from ..maths.flops import kind
from ..maths.refit import accumulator, cholesky, compensation
from ..maths.sums import Gram
from ..model.block import Arguments, Block, Prunable, Sublayer
from ..model.skeleton import Skeleton
from ..recipes.recipe import Target
from ..stream.store import ActivationStore
from ..stream.sweep import advance, boundary
from ..system.host import return_freed_memory
from ..system.ranks import ALONE, Ranks
from .refine import Refinement, refine
from .solve import SiteSolver, Solved, untouched

DENSE, PRUNED = "dense", "pruned"


@dataclass(frozen=True)
class Streams:
    """Which streams the prune sweep moves, and through which blocks."""

    moving: tuple[str, ...]
    window: range
    """Blocks that may change. Those before it only pass the stream on; those after it are not run."""

    def into(self, index: int) -> tuple[str, ...]:
        """Streams that block `index` needs in the store: one up to the window's first block, where they part."""
        if index >= self.window.stop:
            return ()
        return self.moving if index > self.window.start else self.moving[:1]


@dataclass(frozen=True)
class BlockPruner:
    """Prune one block after another, reading and moving the streams in a store."""

    skeleton: Skeleton
    solver: SiteSolver
    store: ActivationStore | None
    """The streams; None for a recipe that measures nothing."""
    batch: int
    """Sequences per micro-batch."""
    streams: Streams
    refinement: Refinement | None
    ranks: Ranks = ALONE
    """Processes that sum over their own samples, and share the sites to solve among themselves."""

    @torch.no_grad()
    def prune(self, block: Block, index: int) -> tuple[Block, list[dict[str, Any]]]:
        """Return the pruned block and a report for each of its sites.

        Afterwards the store has the streams that the next block needs.
        """
        if index not in self.streams.window:
            return block, self._pass_by(block, index)
        if index == self.streams.window.start and DENSE in self.streams.moving:
            assert self.store is not None
            self.store.link(boundary(PRUNED, index), boundary(DENSE, index))
        pruned, reports = block.twin(), list[dict[str, Any]]()
        inputs: Gram | None = None
        for position, (dense, sub) in enumerate(zip(block.sublayers, pruned.sublayers, strict=True)):
            started = time.perf_counter()
            here = _Place(index, position, last=position == len(block.sublayers) - 1)
            if self._sums_inputs(sub, here):
                inputs = inputs or self._sum_inputs(dense, sub, here)
                inputs.across(self.ranks.add_up())
            common = self._compensate(sub, inputs) if self._compensates(sub, here) else {}
            # Only what the recipe wants outlives the compensation.
            producers_input, inputs = self._producers_input(sub, inputs), None
            found = self._prune_sites(dense, sub, here, producers_input, common)
            del producers_input
            if self._continues(here):
                inputs = self._advance(block, pruned, here)
            dense.release()
            seconds = round((time.perf_counter() - started) / len(found), 3)
            reports += [report | {"seconds": seconds} for report in found]
        if self.refinement is not None:
            reports[-1] |= self._refine(pruned, index, reports[-1]["seconds"])
        return pruned, reports

    def _pass_by(self, block: Block, index: int) -> list[dict[str, Any]]:
        """Leave a block outside the window as it is; advance the pruned stream if a later block needs it."""
        if self.streams.into(index + 1):
            assert self.store is not None
            advance(self.skeleton, block, index, self.store, PRUNED, self.batch)
        return [self.solver.counts(each.site) | untouched(each.site) for each in block.prunables]

    # Which steps the recipe asks for.

    @property
    def _compensation(self) -> float | None:
        """Relative damping of the compensation; None for a recipe without."""
        return self.solver.recipe.compensation

    @property
    def _wants_inputs(self) -> bool:
        """Whether the recipe reads the Gram of the producers' input."""
        return self.solver.recipe.wants_inputs

    def _compensates(self, sub: Sublayer, here: _Place) -> bool:
        """Whether producers are fitted to their input, which must then differ from the dense one."""
        differs = here.block > self.streams.window.start or (here.position > 0 and not sub.entry.parallel)
        return self._compensation is not None and differs

    def _sums_inputs(self, sub: Sublayer, here: _Place) -> bool:
        return self._compensates(sub, here) or self._wants_inputs

    def _aims(self, sub: Sublayer, here: _Place) -> bool:
        """Whether consumers are fitted to a target.

        Before the streams part, the consumer's own output is the target. An expert's output has none: the dense model
        sends the expert other tokens.
        """
        parted = here.block > self.streams.window.start or here.position > 0
        return self.solver.target is not None and parted and sub.entry.experts is None

    def _continues(self, here: _Place) -> bool:
        """Whether a later step reads the streams after this sublayer."""
        if not self.streams.moving:
            return False
        return not here.last or self.refinement is not None or bool(self.streams.into(here.block + 1))

    # Compensate.

    def _sum_inputs(self, dense: Sublayer, sub: Sublayer, here: _Place) -> Gram:
        """Sum the Gram of the producers' input: see `_inputs_gram`."""
        sums, streams = self._inputs_gram(sub, here)
        owners = {PRUNED: sub, DENSE: dense}
        for read in self._read(dict.fromkeys(streams, here.entry), here, parallel=sub.entry.parallel):
            sums.add(*(_normed(owners[stream], *read[stream]) for stream in streams))
        return sums

    def _inputs_gram(self, sub: Sublayer, here: _Place) -> tuple[Gram, tuple[str, ...]]:
        """An empty Gram of the producers' input, and the streams to feed it.

        H (d, d) is of the pruned stream; a compensation also needs C (d, d) = Σ (dense input) (pruned input)ᵀ.
        """
        width = self.skeleton.width
        if self._compensates(sub, here):
            return self._gram(width, cross=width), (PRUNED, DENSE)
        return self._gram(width, cross=0), (PRUNED,)

    @kind("solving")
    def _compensate(self, sub: Sublayer, inputs: Gram | None) -> dict[str, Any]:
        """Fit the producers (rows, d) to their pruned input, so that they give what they gave on the dense one.

        Args:
            inputs: sums over all ranks of H (d, d) and C (d, d), see `_inputs_gram`.

        Returns:
            For the report: the damping that it took.
        """
        assert inputs is not None
        h, c = inputs.mean(_inputs_of(sub))
        assert c is not None
        dtype = sub.prunables[0].weight(sub.prunables[0].producers[0]).dtype
        h, c = h.to(dtype), c.to(dtype)

        def solved(name: str) -> tuple[float, list[Tensor]]:
            factor, damping = cholesky(h, self._compensation or 0.0, name)
            return damping, [compensation(h, c, factor)]

        ((_, damping, (m,)),) = self.ranks.spread([sub.name], solved, self.skeleton.device)
        for prunable in sub.prunables:
            for name in prunable.producers:
                w = prunable.weight(name)
                prunable.set_weight(name, torch.addmm(w, w, m.to(w.device)))
        return {"compensation_damping": damping}

    def _producers_input(self, sub: Sublayer, inputs: Gram | None) -> Tensor | None:
        """Mean Gram of the producers' input (d, d), if the recipe wants it."""
        if inputs is None or not self._wants_inputs:
            return None
        return inputs.mean(_inputs_of(sub))[0]

    # Sum H, fit to target, select, refit, shrink.

    def _prune_sites(
        self, dense: Sublayer, sub: Sublayer, here: _Place, inputs: Tensor | None, common: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """Solve and shrink all sites of a sublayer; return their reports.

        Args:
            inputs: mean Gram of the producers' input (d, d); None unless the recipe wants it.
            common: what the reports of all these sites say.
        """
        aims = self._aims(sub, here)
        sums_h = aims or (
            self.solver.recipe.wants_gram and any(self.solver.changes(each.site) for each in sub.prunables)
        )
        reports = []
        for numbers in _in_turn(sub):
            sums = self._sum_h(dense, sub, here, numbers, aims) if sums_h else {}
            self._add_up(numbers, sums)
            return_freed_memory()  # of the sweep: what solves needs more, in larger pieces

            def solved(number: int, sums: dict[int, Gram] = sums) -> tuple[Solved, list[Tensor]]:
                # Popped, so that no sum outlives its site.
                return self.solver.solve(sub.prunables[number], sums.pop(number, None), inputs, aims)

            for number, found, weights in self.ranks.spread(numbers, solved, self.skeleton.device):
                prunable = sub.prunables[number]
                reports.append({**self.solver.counts(prunable.site), **common, **found.report})
                _shrink(prunable, found, weights)
        return reports

    def _sum_h(
        self, dense: Sublayer, sub: Sublayer, here: _Place, numbers: Sequence[int], aims: bool
    ) -> dict[int, Gram]:
        """Sum H (n, n) of the consumer's input for each of the sites `numbers`, and C (d_out, n) if there is a target."""
        if aims:
            return {0: self._sum_with_target(dense, sub, here)}
        sums = {number: self._gram(sub.prunables[number].site.columns, cross=0) for number in numbers}
        for read in self._read({PRUNED: here.entry}, here, parallel=sub.entry.parallel):
            x, entered = read[PRUNED]
            mixed = sub.mix(_normed(sub, x, entered), self._arguments(x, here), chosen=numbers)
            for number, gram in sums.items():
                gram.add(mixed.z[number], tokens=x.shape[0] * x.shape[1])
        return sums

    def _sum_with_target(self, dense: Sublayer, sub: Sublayer, here: _Place) -> Gram:
        """Sum H (n, n) and C = Σ target zᵀ (d_out, n) over both streams; the dense stream advances in passing.

        z (n,) is the consumer's input on the pruned stream, its target (d_out,) the consumer's dense output without bias,
        plus what the residual stream lacks if the recipe says so.
        """
        target = self.solver.target
        assert target is not None
        (prunable,) = sub.prunables
        sums = self._gram(prunable.site.columns, cross=self.skeleton.width)
        with ExitStack() as stack:
            write = stack.enter_context(self._writing(DENSE, sub, here)) if self._continues(here) else None
            places = {PRUNED: here.entry, DENSE: here.entry}
            for read in self._read(places, here, parallel=sub.entry.parallel):
                (x_hat, entered_hat), (x, entered) = read[PRUNED], read[DENSE]
                arguments = self._arguments(x_hat, here)
                z = sub.mix(_normed(sub, x_hat, entered_hat), arguments).z[0]
                o = dense.consume(dense.mix(_normed(dense, x, entered), arguments))
                sums.add(z, _aim(sub, target, o, x, x_hat))
                if write is not None:
                    write(dense.join(x, o))
        return sums

    def _add_up(self, numbers: Sequence[int], sums: dict[int, Gram]) -> None:
        """Add up the ranks' sums site by site; each rank keeps those of the sites that it solves."""
        for place, number in enumerate(numbers):
            if number in sums:
                sums[number].across(self.ranks.add_up(self.ranks.owner(place)))
                if not self.ranks.mine(place):
                    del sums[number]

    # Advance.

    def _advance(self, block: Block, pruned: Block, here: _Place) -> Gram | None:
        """Advance the streams past a sublayer; return the Gram of the next one's inputs in this block, if it is needed."""
        assert self.store is not None
        moving = self._still_to_move(here)
        sums, summed = None, tuple[str, ...]()
        if not here.last and self._sums_inputs(following := pruned.sublayers[here.position + 1], here.next):
            sums, summed = self._inputs_gram(following, here.next)
        # A stream that has moved already is read only for the sums.
        places = dict.fromkeys(moving, here.entry) | {s: here.exit for s in summed if s not in moving}
        parallel = any(sub.entry.parallel for sub in pruned.sublayers)
        owners = {PRUNED: pruned.sublayers, DENSE: block.sublayers}
        with ExitStack() as stack:
            sub = pruned.sublayers[here.position]
            writers = {s: stack.enter_context(self._writing(s, sub, here)) for s in moving}
            for read in self._read(places, here, parallel=parallel) if moving else ():
                arguments = self._arguments(next(iter(read.values()))[0], here)
                for s in moving:
                    x, entered = read[s]
                    read[s] = owners[s][here.position](x, entered, arguments), entered
                    writers[s](read[s][0])
                if sums is not None:
                    sums.add(*(_normed(owners[s][here.position + 1], *read[s]) for s in summed))
        if here.position:
            for stream in self.streams.moving:
                self.store.remove(boundary(stream, *here.entry))
        return sums

    def _still_to_move(self, here: _Place) -> list[str]:
        """Streams not yet past a sublayer. A block to be refined moves the pruned one after its refinement."""
        assert self.store is not None
        waits = {PRUNED} if here.last and self.refinement is not None else set()
        return [s for s in self.streams.moving if boundary(s, *here.exit) not in self.store and s not in waits]

    # Refine.

    def _refine(self, pruned: Block, index: int, seconds: float) -> dict[str, Any]:
        """Refine a block and advance the pruned stream; return its figures, and `seconds` with those that it took added."""
        assert self.store is not None
        assert self.refinement is not None
        started = time.perf_counter()
        source, target = boundary(PRUNED, index), boundary(DENSE, index + 1)
        report = refine(self.skeleton, pruned, index, self.store, source, target, self.refinement, self.ranks)
        if self.streams.into(index + 1):
            advance(self.skeleton, pruned, index, self.store, PRUNED, self.batch)
        return report | {"seconds": round(seconds + time.perf_counter() - started, 3)}

    # What the steps read, write and sum in.

    def _read(
        self, places: Mapping[str, tuple[int, int]], here: _Place, *, parallel: bool
    ) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        """Read streams in micro-batches.

        Args:
            places: for each stream, the block and sublayer whose input is read.
            parallel: whether what entered the block is read as well.

        Yields:
            For each stream x (sequences, tokens, d) and what entered the block (sequences, tokens, d): x itself unless
            `parallel`.
        """
        assert self.store is not None
        names = {
            stream: (boundary(stream, *place), boundary(stream, here.block) if parallel else boundary(stream, *place))
            for stream, place in places.items()
        }
        wanted = list(dict.fromkeys(name for pair in names.values() for name in pair))
        for _, read in self.store.each(self.batch, *wanted):
            found = dict(zip(wanted, read, strict=True))
            yield {stream: (found[x], found[entered]) for stream, (x, entered) in names.items()}

    def _writing(self, stream: str, sub: Sublayer, here: _Place) -> AbstractContextManager[Callable[[Tensor], None]]:
        """A context that writes a sublayer's output; the journal does not mention outputs inside a block."""
        assert self.store is not None
        return self.store.writing(boundary(stream, *here.exit), f"{sub.name} ({stream})", passing=not here.last)

    def _arguments(self, x: Tensor, here: _Place) -> Arguments:
        """What the block's modules take besides hidden states `x` (sequences, tokens, d)."""
        return self.skeleton.arguments(x.shape[0], x.shape[1])[here.block]

    def _gram(self, columns: int, *, cross: int) -> Gram:
        """An empty Gram: H (columns, columns) and, unless `cross` is 0, C (cross, columns)."""
        return Gram(columns, cross=cross, device=self.solver.place, dtype=accumulator(self.skeleton.dtype))


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
    def next(self) -> _Place:
        """The sublayer after it in the block."""
        return _Place(self.block, self.position + 1, last=False)

    @property
    def exit(self) -> tuple[int, int]:
        """Block and sublayer whose input it gives."""
        return (self.block + 1, 0) if self.last else (self.block, self.position + 1)


def _normed(sublayer: Sublayer, x: Tensor, entered: Tensor) -> Tensor:
    """What the producers read (sequences, tokens, d): see `Sublayer.source` and `Sublayer.normed`."""
    return sublayer.normed(sublayer.source(x, entered))


def _aim(sub: Sublayer, target: Target, o: Tensor, x: Tensor, x_hat: Tensor) -> Tensor:
    """The consumer's target without its bias (sequences, tokens, d).

    Args:
        o: the consumer's output on the dense stream (sequences, tokens, d).
        x, x_hat: the dense and the pruned stream before the sublayer (sequences, tokens, d).
    """
    bias = sub.prunables[0].bias(sub.prunables[0].consumer)
    lacking = sub.lacking(x - x_hat) if target.residual else 0.0
    return o + lacking - (0.0 if bias is None else bias)


def _shrink(prunable: Prunable, found: Solved, weights: Sequence[Tensor]) -> None:
    """Give a site its new weights, as `SiteSolver.solve` returns them, and only the units that stay."""
    consumer, producers = weights[:1], weights[1:]
    if producers:
        prunable.set_producer_weights(producers)
    for w in consumer:
        if found.kept is None:
            prunable.set_weight(prunable.consumer, w)
        else:
            prunable.shrink(torch.tensor(found.kept), w)


def _inputs_of(sub: Sublayer) -> str:
    """The name that messages give to what its producers read."""
    return f"{sub.name}, inputs"


def _in_turn(sub: Sublayer) -> Iterator[range]:
    """A sublayer's sites in runs whose Grams are summed together: those of all experts may not fit the memory."""
    start, held = 0, 0
    for number, prunable in enumerate(sub.prunables):
        size = accumulator(sub.layer.dtype).itemsize * prunable.site.columns**2
        if held and held + size > GRAMS_AT_ONCE:
            yield range(start, number)
            start, held = number, 0
        held += size
    yield range(start, len(sub.prunables))
