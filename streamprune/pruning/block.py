"""One block: compensate → observe → aim → select → reconstruct → shrink → advance, sublayer by sublayer; then refine.

Two streams run side by side: what the dense model would have here, and what the model pruned so far has.
A token passes each sublayer once dense and twice pruned: once to measure, once to move on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CalibrationError, NumericalError
from ..jobs.forecast.memory import GRAMS_AT_ONCE, GramPlace
from ..maths.flops import kind
from ..maths.refit import accumulator, all_finite, cholesky, compensation, fit, output_error, unit_columns
from ..maths.sums import Gram
from ..model.block import Block, Prunable, Sublayer
from ..model.site import Site
from ..model.skeleton import Skeleton
from ..recipes.plan import Plan
from ..recipes.recipe import Problem, Recipe, Survey, Target
from ..stream.store import ActivationStore
from ..stream.sweep import advance, boundary
from ..system.host import return_freed_memory
from ..system.ranks import ALONE, Ranks
from .refine import Refinement, refine

CPU = torch.device("cpu")
DENSE, PRUNED = "dense", "pruned"
SEEN = "seen"
"""Among an expert's findings: how many tokens reached it."""


@dataclass(frozen=True)
class Streams:
    """Which streams the prune sweep moves, and through which blocks."""

    moving: tuple[str, ...]
    window: range
    """The blocks that may change; those before only pass the stream on, those behind are not even run."""

    def into(self, index: int) -> tuple[str, ...]:
        """Those that a block needs to have in store: they part at the window's first block."""
        if index >= self.window.stop:
            return ()
        return self.moving if index > self.window.start else self.moving[:1]


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
    streams: Streams
    refinement: Refinement | None
    experts_alike: bool
    """Whether all experts must end with one width."""
    grams: GramPlace = "device"
    ranks: Ranks = ALONE
    """Those that measure, each on its own samples, and among which what is to be solved is dealt out."""

    @torch.no_grad()
    def operate(self, block: Block, index: int) -> tuple[Block, list[dict[str, Any]]]:
        """The pruned block, and what happened at each of its sites.

        The streams that the next block needs are in the store afterwards.
        """
        if index not in self.streams.window:
            if self.streams.into(index + 1):
                assert self.store is not None
                advance(self.skeleton, block, index, self.store, PRUNED, self.batch)
            return block, [self._counts(each.site) | _untouched(each.site) for each in block.prunables]
        if index == self.streams.window.start and DENSE in self.streams.moving:
            assert self.store is not None
            self.store.link(boundary(PRUNED, index), boundary(DENSE, index))
        pruned = block.twin()
        reports: list[dict[str, Any]] = []
        inputs: Gram | None = None
        for position, (dense, sub) in enumerate(zip(block.sublayers, pruned.sublayers, strict=True)):
            started = time.perf_counter()
            here = _Place(index, position, last=position == len(block.sublayers) - 1)
            common = {}
            if self._measures_inputs(sub, here):
                inputs = inputs or self._measure_inputs(dense, sub, here)
                inputs.across(self.ranks.add_up())
            if self._compensates(sub, here):
                assert inputs is not None
                common["compensation_damping"] = self._compensate(sub, inputs)
            producers_input = (
                inputs.mean(_inputs_of(sub))[0]
                if inputs is not None and self.recipe.wants_inputs(self.settings)
                else None
            )
            inputs = None
            counts = [self._counts(each.site) for each in sub.prunables]
            found = self._shrink(dense, sub, here, producers_input)
            del producers_input
            if self._goes_on(here):
                inputs = self._advance(block, pruned, here)
            dense.release()
            seconds = round((time.perf_counter() - started) / len(found), 3)
            reports += [{**a, **common, **b, "seconds": seconds} for a, b in zip(counts, found, strict=True)]
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

    def _parted(self, here: _Place) -> bool:
        """Whether the streams differ before a sublayer."""
        return here.block > self.streams.window.start or here.position > 0

    def _compensates(self, sub: Sublayer, here: _Place) -> bool:
        """Whether the producers are fitted to their input: it must differ from the dense one."""
        reads = here.block > self.streams.window.start or (here.position > 0 and not sub.entry.parallel)
        return self._compensation is not None and reads

    def _measures_inputs(self, sub: Sublayer, here: _Place) -> bool:
        return self._compensates(sub, here) or self.recipe.wants_inputs(self.settings)

    def _goes_on(self, here: _Place) -> bool:
        """Whether anything will still be measured behind this sublayer."""
        if not self.streams.moving:
            return False
        return not here.last or self.refinement is not None or bool(self.streams.into(here.block + 1))

    # The steps.

    def _read(self, here: _Place, streams: Sequence[str], *, parallel: bool) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Of each stream what is before a sublayer, and what entered the block if it is `parallel`, in micro-batches."""
        assert self.store is not None
        pairs = [
            (boundary(s, *here.entry), boundary(s, *((here.block, 0) if parallel else here.entry))) for s in streams
        ]
        names = list(dict.fromkeys(name for pair in pairs for name in pair))
        for _, read in self.store.each(self.batch, *names):
            found = dict(zip(names, read, strict=True))
            yield [(found[x], found[entered]) for x, entered in pairs]

    def _measure_inputs(self, dense: Sublayer, sub: Sublayer, here: _Place) -> Gram:
        cross = self._compensates(sub, here)
        sums = self._gram(self.skeleton.width, cross=self.skeleton.width if cross else 0)
        streams = (PRUNED, DENSE) if cross else (PRUNED,)
        for inputs in self._read(here, streams, parallel=sub.entry.parallel):
            sums.add(*(owner.normed(owner.source(*each)) for owner, each in zip((sub, dense), inputs, strict=False)))
        return sums

    @kind("solving")
    def _compensate(self, sub: Sublayer, inputs: Gram) -> float:
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
        return damping

    def _shrink(self, dense: Sublayer, sub: Sublayer, here: _Place, inputs: Tensor | None) -> list[dict[str, Any]]:
        """What became of each site of a sublayer."""
        # Where the streams are still one, the target is what the consumer gives anyway. An expert's own output has none:
        # the dense model sends it other tokens.
        aims = self._target is not None and self._parted(here) and sub.entry.experts is None
        changing = [self._changes(each.site) for each in sub.prunables]
        measured = aims or self.recipe.wants_gram(self.settings)
        reports = []
        for numbers in _in_turn(sub):
            sums = self._measure(dense, sub, here, numbers, aims) if measured and (aims or any(changing)) else {}
            for place, number in enumerate(numbers):
                if number in sums:
                    sums[number].across(self.ranks.add_up(self.ranks.owner(place)))
                    if not self.ranks.mine(place):
                        del sums[number]

            return_freed_memory()  # of the sweep: what solves needs more, in larger pieces

            def solved(number: int, sums: dict[int, Gram] = sums) -> tuple[Solved, list[Tensor]]:
                # Popped, so that no sum outlives its site.
                return self._solve_site(sub.prunables[number], sums.pop(number, None), inputs, aims)

            for number, found, weights in self.ranks.spread(numbers, solved, self.skeleton.device):
                self._replace(sub.prunables[number], found, weights)
                reports.append(found.report)
        return reports

    def _changes(self, site: Site) -> bool:
        entry = self.plan[site.name]
        return entry.keep < site.units or any(entry.zeros or ())

    @kind("solving")
    def _solve_site(
        self, prunable: Prunable, sums: Gram | None, inputs: Tensor | None, aims: bool
    ) -> tuple[Solved, list[Tensor]]:
        """What is to become of a site: with the weights of its consumer, where they change, and then of its producers."""
        site, entry = prunable.site, self.plan[prunable.site.name]
        report: dict[str, Any] = {}
        seen = tokens_seen(site, self.survey) if sums is None else sums.rows
        if site.expert is not None and seen is not None:
            report["tokens"] = seen
            if left_alone(site, seen, alike=self.experts_alike and self._changes(site)):
                report |= {"left_alone": True, **({"zeros": 0} if entry.zeros is not None else {})}
                return Solved({**_untouched(site), **report}), []
        if not self._changes(site) and not aims:
            return Solved({**_untouched(site), **report}), []
        where = CPU if self.grams == "host" else self.skeleton.device
        w = prunable.weight(prunable.consumer).to(where)
        h, factors = None, dict[float, Tensor]()
        if sums is not None:
            if self.grams == "parked":
                sums.park()
            h, aim = (each if each is None else each.to(w.dtype) for each in sums.mean(site.name))
            del sums
            assert h is not None
            if aims and self._target is not None:
                assert aim is not None
                damping = self._target.damping
                factors[damping], report["target_damping"] = cholesky(h, damping, site.name, device=where)
                w = fit(w, h, aim, factors[damping])
                if not all_finite(w):
                    raise NumericalError(f"{site.name}: the fit to the target is not finite")
            del aim
        if not self._changes(site):
            return Solved({**_untouched(site), **report}), [w]
        problem = Problem(
            site=site,
            w=w,
            stored=prunable.stored,
            read_producers=lambda: tuple(each.to(where) for each in prunable.producer_weights()),
            zeros=entry.zeros,
            h=h,
            inputs=inputs,
            findings=self.survey.get(site.name, {}),
            generator=_generator(self.seed, site),
            factors=factors,
        )
        if entry.keep == site.units:
            kept = torch.arange(site.units)
        elif self.recipe.plans_units(self.settings, site):
            assert entry.units is not None
            kept = torch.tensor(entry.units)
        else:
            kept = self.recipe.select(self.settings, problem, entry.keep)
        factors.clear()
        assert kept.numel() == entry.keep
        assert bool((kept.diff() > 0).all())
        refit = self.recipe.reconstruct(self.settings, problem, kept)
        columns = unit_columns(kept, site.width).to(w.device)
        error = None if h is None else output_error(w, h, refit.w, columns)
        report |= {"kept": entry.keep, "error": error, "damping": refit.damping}
        report |= {"step": refit.step} if refit.step < 1 else {}
        return Solved(report, kept.tolist()), [refit.w, *(refit.producers or ())]

    def _replace(self, prunable: Prunable, found: Solved, weights: Sequence[Tensor]) -> None:
        consumer, producers = weights[:1], weights[1:]
        if producers:
            prunable.set_producer_weights(producers)
        for w in consumer:
            if found.kept is None:
                prunable.set_weight(prunable.consumer, w)
            else:
                prunable.shrink(torch.tensor(found.kept), w)

    def _measure(
        self, dense: Sublayer, sub: Sublayer, here: _Place, numbers: Sequence[int], aims: bool
    ) -> dict[int, Gram]:
        """The Grams of consumers' inputs; with a target, their cross sums as well, and the dense stream moves on."""
        assert self.store is not None
        cross = self.skeleton.width if aims else 0
        sums = {number: self._gram(sub.prunables[number].site.columns, cross=cross) for number in numbers}
        streams = (PRUNED, DENSE) if aims else (PRUNED,)
        with ExitStack() as stack:
            write = None
            if aims and self._goes_on(here):
                place = f"{sub.name} ({DENSE})"
                write = stack.enter_context(self._writing(DENSE, here, place))
            for inputs in self._read(here, streams, parallel=sub.entry.parallel):
                x_hat, entered = inputs[0]
                arguments = self.skeleton.arguments(x_hat.shape[0], x_hat.shape[1])[here.block]
                mixed = sub.mix(sub.normed(sub.source(x_hat, entered)), arguments, chosen=numbers)
                if not aims:
                    for number, gram in sums.items():
                        gram.add(mixed.z[number], tokens=x_hat.shape[0] * x_hat.shape[1])
                    continue
                x, entered = inputs[1]
                o = dense.consume(dense.mix(dense.normed(dense.source(x, entered)), arguments))
                assert self._target is not None
                lacking = sub.lacking(x - x_hat) if self._target.residual else 0.0
                bias = sub.prunables[0].bias(sub.prunables[0].consumer)
                sums[0].add(mixed.z[0], o + lacking - (0.0 if bias is None else bias))
                if write is not None:
                    write(dense.join(x, o))
        return sums

    def _advance(self, block: Block, pruned: Block, here: _Place) -> Gram | None:
        """Move on the streams that have not; where another sublayer follows in this block, sum its inputs in passing."""
        assert self.store is not None
        owners = {PRUNED: pruned, DENSE: block}
        # A refined block moves its stream on when it is refined.
        waits = {PRUNED} if here.last and self.refinement is not None else set()
        moving = [s for s in self.streams.moving if boundary(s, *here.exit) not in self.store and s not in waits]
        sums, streams = None, tuple[str, ...]()
        if not here.last:
            next_place, following = here.next, pruned.sublayers[here.position + 1]
            if self._measures_inputs(following, next_place):
                cross = self._compensates(following, next_place)
                sums = self._gram(self.skeleton.width, cross=self.skeleton.width if cross else 0)
                streams = (PRUNED, DENSE) if cross else (PRUNED,)
        # What has moved already is read only for the sums.
        ready = [s for s in streams if s not in moving]
        parallel = any(sub.entry.parallel for sub in pruned.sublayers)
        places = {**dict.fromkeys(moving, here.entry), **dict.fromkeys(ready, here.exit)}
        names = {stream: boundary(stream, *place) for stream, place in places.items()}
        entries = {stream: boundary(stream, here.block) if parallel else name for stream, name in names.items()}
        wanted = list(dict.fromkeys((*names.values(), *entries.values())))
        with ExitStack() as stack:
            writers = {}
            for stream in moving:
                place = f"{pruned.sublayers[here.position].name} ({stream})"
                writers[stream] = stack.enter_context(self._writing(stream, here, place))
            for _, read in self.store.each(self.batch, *wanted) if moving else ():
                arguments = self.skeleton.arguments(read[0].shape[0], read[0].shape[1])[here.block]
                found = dict(zip(wanted, read, strict=True))
                outputs = {stream: found[name] for stream, name in names.items()}
                entered = {stream: found[name] for stream, name in entries.items()}
                for stream in moving:
                    sub = owners[stream].sublayers[here.position]
                    outputs[stream] = sub(outputs[stream], entered[stream], arguments)
                    writers[stream](outputs[stream])
                if sums is not None:
                    sums.add(
                        *(_read_by(owners[s].sublayers[here.position + 1], outputs[s], entered[s]) for s in streams)
                    )
        if here.position:
            for stream in self.streams.moving:
                self.store.remove(boundary(stream, *here.entry))
        return sums

    def _writing(self, stream: str, here: _Place, place: str) -> AbstractContextManager[Callable[[Tensor], None]]:
        """Write what a sublayer gives; inside a block no journal line speaks of it."""
        assert self.store is not None
        return self.store.writing(boundary(stream, *here.exit), place, passing=not here.last)

    def _refine(self, pruned: Block, index: int) -> dict[str, Any]:
        assert self.store is not None
        assert self.refinement is not None
        source, target = boundary(PRUNED, index), boundary(DENSE, index + 1)
        report = refine(self.skeleton, pruned, index, self.store, source, target, self.refinement, self.ranks)
        if self.streams.into(index + 1):
            advance(self.skeleton, pruned, index, self.store, PRUNED, self.batch)
        return report

    def _gram(self, columns: int, *, cross: int) -> Gram:
        device = CPU if self.grams == "host" else self.skeleton.device
        return Gram(columns, cross=cross, device=device, dtype=accumulator(self.skeleton.dtype))


@dataclass(frozen=True)
class Solved:
    """What is to become of a site, but for its weights."""

    report: dict[str, Any]
    kept: list[int] | None = None
    """The units that stay, ascending; None where nothing goes."""


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
        """The sublayer behind it in the block."""
        return _Place(self.block, self.position + 1, last=False)

    @property
    def exit(self) -> tuple[int, int]:
        """Block and sublayer whose input it gives."""
        return (self.block + 1, 0) if self.last else (self.block, self.position + 1)


def _read_by(sublayer: Sublayer, x: Tensor, entered: Tensor) -> Tensor:
    return sublayer.normed(sublayer.source(x, entered))


def _inputs_of(sub: Sublayer) -> str:
    """How messages call what its producers read."""
    return f"{sub.name}, inputs"


def _in_turn(sub: Sublayer) -> Iterator[range]:
    """A sublayer's sites in runs whose Grams are summed at once; those of experts may be too many for the memory."""
    start, held = 0, 0
    for number, prunable in enumerate(sub.prunables):
        size = accumulator(sub.layer.dtype).itemsize * prunable.site.columns**2
        if held and held + size > GRAMS_AT_ONCE:
            yield range(start, number)
            start, held = number, 0
        held += size
    yield range(start, len(sub.prunables))


def tokens_seen(site: Site, survey: Survey) -> int | None:
    """How many tokens reached an expert in the survey; None where there was none, or it counted nothing."""
    if site.expert is None or not survey:
        return None
    findings = survey[site.name]
    return int(findings[SEEN]) if SEEN in findings else None


def left_alone(site: Site, tokens: int, *, alike: bool) -> bool:
    """Whether a site keeps everything because fewer tokens reached it than it has channels, as may happen to an expert.

    Raises:
        CalibrationError: it does, and the layout has all experts alike.
    """
    if site.expert is None or tokens >= site.columns:
        return False
    if alike:
        raise CalibrationError(
            f"{site.name} saw {tokens} tokens, fewer than its {site.columns} channels, and the uniform layout cannot leave "
            "it alone; more --samples, or --layout free"
        )
    return True


def _untouched(site: Site) -> dict[str, Any]:
    return {"kept": site.units, "error": 0.0, "damping": None, "seconds": 0.0}


def _generator(seed: int, site: Site) -> torch.Generator:
    """A generator of the site's own, so that the order in which sites come does not matter."""
    place = (seed * 1_000_003 + site.block) * 2 + (site.kind == "ffn")
    return torch.Generator().manual_seed((place + 7_919_000_029 * (site.expert or 0)) % 2**63)
