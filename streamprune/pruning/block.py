"""One block, sublayer by sublayer: compensate → sum H → fit to target → select → refit → shrink → advance; then refine.

Two streams of activations run side by side (see `streams`). The steps for one site, from the fit to the refit, are in
`BlockPruner._solve`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import CalibrationError, NumericalError
from ..jobs.forecast.memory import GramPlace, in_turn
from ..maths.flops import kind
from ..maths.refit import accumulator, all_finite, cholesky, compensation, fit, output_error, unit_columns
from ..maths.sums import Gram
from ..model.block import Block, Prunable, Sublayer
from ..model.site import Site
from ..model.skeleton import Skeleton
from ..recipes.plan import Plan
from ..recipes.recipe import Problem, Recipe, Refit, Survey, Target
from ..stream.sweep import boundary
from ..system.host import return_freed_memory
from ..system.ranks import ALONE, Ranks
from .refine import Refinement, refine
from .streams import DENSE, PRUNED, Place, Streams

CPU = torch.device("cpu")
SEEN = "seen"
"""Key in an expert's findings: the number of tokens that reached it."""
Report = dict[str, Any]
"""What the journal and `report.json` say of one site."""
GONE: Report = {"kept": 0, "error": 1.0, "damping": None, "seconds": 0.0}
"""What the report says of a site whose sublayer, or expert, is gone as a whole."""


@dataclass(frozen=True)
class BlockPruner:
    """Prune one block after another."""

    skeleton: Skeleton
    recipe: Recipe[Any]
    plan: Plan
    survey: Survey
    """Findings of the dense model; empty without a survey."""
    window: range
    """Blocks that may change."""
    streams: Streams | None
    """None for a recipe that measures nothing."""
    refinement: Refinement | None
    counts: Tensor | None
    """Which tokens' predictions refinement counts, (samples, length) bool; None for all."""
    seed: int
    experts_alike: bool
    """Whether all experts must end with the same width."""
    grams: GramPlace = "device"
    ranks: Ranks = ALONE
    """Processes that sum over their own samples, and share the sites to solve among themselves."""

    @torch.no_grad()
    def prune(
        self, block: Block, index: int, final: Callable[[Block], None] = lambda block: None
    ) -> tuple[Block, list[Report]]:
        """Return the pruned block and a report for each of its sites.

        Afterwards the store has the streams that the next block needs.

        Args:
            final: called with the pruned block once its weights are final, before the streams' last pass through it.
        """
        streams = self.streams
        if streams is not None and index in self.window:
            streams.part(index)
        if index not in self.window or not block.prunables:
            final(block)
            if streams is not None:
                streams.pass_by(block, index)
            return block, [self._counts(each.site) | untouched(each.site) for each in block.prunables]
        pruned, reports = block.twin(), list[Report]()
        gone = [self._keep_experts(sub) for sub in pruned.sublayers]
        inputs: Gram | None = None
        for position, (dense, sub) in enumerate(zip(block.sublayers, pruned.sublayers, strict=True)):
            started = time.perf_counter()
            here = Place(index, position, last=position == len(block.sublayers) - 1)
            if self._sums_inputs(sub, here):
                inputs = inputs or self._sum_inputs(dense, sub, here)
                inputs.across(self.ranks.sum)
            common = self._compensate(sub, inputs) if self._compensates(sub, here) else {}
            # Only what the recipe wants outlives the compensation.
            given = inputs.mean(f"{sub.name}, inputs")[0] if inputs is not None and self.recipe.wants_inputs else None
            inputs = None
            found = [self._remove(sub)] if self._goes(sub) else self._prune_sites(dense, sub, here, given, common)
            del given
            order = [each.site.name for each in dense.prunables]
            found = sorted([*found, *gone[position]], key=lambda report: order.index(report["site"]))
            if here.last and self.refinement is None:
                final(pruned)
            if self._continues(here):
                inputs = self._advance(block, pruned, here)
            dense.release()
            seconds = round((time.perf_counter() - started) / max(1, len(found)), 3)
            reports += [report | {"seconds": seconds} for report in found]
        if self.refinement is not None:
            reports[-1] |= self._refine(pruned, index, reports[-1]["seconds"], final)
        return pruned, reports

    def _keep_experts(self, sub: Sublayer) -> list[Report]:
        """Let the routed experts go that the plan does not keep; return their reports. Their tokens go to the others from now on."""
        prunables = sub.prunables if sub.entry.experts is not None else []
        kept = [
            n for n, each in enumerate(prunables) if each.site.expert is not None and self.plan[each.site.name].keep
        ]
        gone = [each.site for each in prunables if not self.plan[each.site.name].keep]
        if gone:
            sub.keep_experts(kept)
        seen = {site.name: tokens_seen(site, self.survey) for site in gone}
        tokens = {name: {} if number is None else {"tokens": number} for name, number in seen.items()}
        return [{**self._counts(site), **GONE, **tokens[site.name]} for site in gone]

    # Which steps the recipe asks for.

    def _compensates(self, sub: Sublayer, here: Place) -> bool:
        """Whether producers are fitted to their input, which must then differ from the dense one."""
        if self.streams is None or self.recipe.compensation is None or self._goes(sub):
            return False
        if not any(p.producers for p in sub.prunables):
            return False
        return here.block > self.window.start or (here.position > 0 and not sub.entry.parallel)

    def _sums_inputs(self, sub: Sublayer, here: Place) -> bool:
        wanted = self.recipe.wants_inputs and bool(sub.prunables) and not self._goes(sub)
        return self._compensates(sub, here) or wanted

    def _has_target(self, sub: Sublayer, here: Place) -> bool:
        """Whether consumers are fitted to a target.

        Which sublayers can be is `SublayerEntry.takes_target`. Before the streams part, the consumer's own output is the
        target.
        """
        wanted = self.streams is not None and self.recipe.target is not None and sub.entry.takes_target
        return wanted and not self._goes(sub) and (here.block > self.window.start or here.position > 0)

    def _continues(self, here: Place) -> bool:
        """Whether a later step reads the streams after this sublayer."""
        if self.streams is None:
            return False
        return not here.last or self.refinement is not None or bool(self.streams.into(here.block + 1))

    @property
    def _moving(self) -> Streams:
        assert self.streams is not None
        return self.streams

    @property
    def _where(self) -> torch.device:
        """Where Grams are summed and sites are solved."""
        return CPU if self.grams == "host" else self.skeleton.device

    def _goes(self, sub: Sublayer) -> bool:
        """Whether the plan lets a sublayer go as a whole."""
        return any(self.plan[each.site.name].keep == 0 for each in sub.prunables)

    def _changes(self, site: Site) -> bool:
        """Whether the plan removes units of a site or zeroes some of its weights."""
        entry = self.plan[site.name]
        return entry.keep < site.units or any(entry.zeros or ())

    # Compensate.

    def _sum_inputs(self, dense: Sublayer, sub: Sublayer, here: Place) -> Gram:
        """Sum the Gram of the producers' input: see `_inputs_gram`."""
        sums, streams = self._inputs_gram(sub, here)
        owners = {PRUNED: sub, DENSE: dense}
        for read in self._moving.read(dict.fromkeys(streams, here.entry), here, parallel=sub.entry.parallel):
            sums.add(*(_normed(owners[stream], *read[stream]) for stream in streams))
        return sums

    def _inputs_gram(self, sub: Sublayer, here: Place) -> tuple[Gram, tuple[str, ...]]:
        """An empty Gram of the producers' input, and the streams to feed it.

        H (d, d) is of the pruned stream; a compensation also needs C (d, d) = Σ (dense input) (pruned input)ᵀ.
        """
        width = self.skeleton.width
        if self._compensates(sub, here):
            return self._gram(width, cross=width), (PRUNED, DENSE)
        return self._gram(width, cross=0), (PRUNED,)

    @kind("solving")
    def _compensate(self, sub: Sublayer, inputs: Gram | None) -> Report:
        """Fit the producers (rows, d) to their pruned input, so that they give what they gave on the dense one.

        `inputs` are the sums over all ranks of H (d, d) and C (d, d). Returns the damping that it took, for the report.
        """
        assert inputs is not None
        assert self.recipe.compensation is not None
        damping = self.recipe.ridge(self.recipe.compensation, self.skeleton.width, inputs.rows)
        h, c = inputs.mean(f"{sub.name}, inputs")
        assert c is not None
        dtype = accumulator(sub.prunables[0].stored)
        h, c = h.to(dtype), c.to(dtype)
        solved = []
        if self.ranks.mine(0):
            factor, used = cholesky(h, damping, sub.name)
            solved = [(used, [compensation(h, c, factor)])]
            del factor
        ((_, damping, (m,)),) = self.ranks.exchange([sub.name], solved, self.skeleton.device)
        for prunable in sub.prunables:
            for name in prunable.producers:
                w = prunable.weight(name)
                prunable.set_weight(name, torch.addmm(w, w, m.to(w.device)))
        return {"compensation_damping": damping}

    def _remove(self, sub: Sublayer) -> Report:
        """Let a sublayer go as a whole; return the report of its site. What it added is lost, but for a bias."""
        (prunable,) = sub.prunables
        counts = self._counts(prunable.site)
        sub.remove()
        return {**counts, **GONE}

    # Sum H, solve, shrink.

    def _prune_sites(
        self, dense: Sublayer, sub: Sublayer, here: Place, inputs: Tensor | None, common: Report
    ) -> list[Report]:
        """Solve and shrink all sites of a sublayer; return their reports.

        Args:
            inputs: mean Gram of the producers' input (d, d); None unless the recipe wants it.
            common: what the reports of all these sites say.
        """
        has_target = self._has_target(sub, here)
        sums_h = has_target or (self.recipe.wants_gram and any(self._changes(each.site) for each in sub.prunables))
        reports = []
        item = accumulator(sub.layer.dtype).itemsize
        for numbers in in_turn([each.site.columns for each in sub.prunables], item):
            sums = self._sum_h(dense, sub, here, numbers, has_target) if sums_h else {}
            for place, number in enumerate(numbers if sums else ()):
                owner = self.ranks.owner(place)
                sums[number].across(partial(self.ranks.sum, owner=owner))
                if not self.ranks.mine(place):
                    del sums[number]  # each rank keeps those of the sites that it solves
            return_freed_memory()  # of the sweep: what solves needs more, in larger pieces
            for together, mine in self.ranks.rounds(numbers):
                # Popped, so that no sum outlives its site.
                solved = [self._solve(sub.prunables[n], sums.pop(n, None), inputs, has_target) for n in mine]
                for number, report, weights in self.ranks.exchange(together, solved, self.skeleton.device):
                    kept = report.pop("units_kept")
                    reports.append({**self._counts(sub.prunables[number].site), **common, **report})
                    _shrink(sub.prunables[number], kept, weights)
        return reports

    def _sum_h(
        self, dense: Sublayer, sub: Sublayer, here: Place, numbers: Sequence[int], has_target: bool
    ) -> dict[int, Gram]:
        """Sum H (n, n) of the consumer's input for each of the sites `numbers`, and C (d_out, n) if there is a target."""
        if has_target:
            return {0: self._sum_with_target(dense, sub, here)}
        sums = {number: self._gram(sub.prunables[number].site.columns, cross=0) for number in numbers}
        for read in self._moving.read({PRUNED: here.entry}, here, parallel=sub.entry.parallel):
            x, entered = read[PRUNED]
            mixed = sub.mix(_normed(sub, x, entered), self._moving.arguments(sub, x, here), chosen=numbers)
            for number, gram in sums.items():
                gram.add(mixed.z[number], tokens=x.shape[0] * x.shape[1])
        return sums

    def _sum_with_target(self, dense: Sublayer, sub: Sublayer, here: Place) -> Gram:
        """Sum H (n, n) and C = Σ target zᵀ (d_out, n) over both streams; the dense stream advances in passing.

        z (n,) is the consumer's input on the pruned stream, its target (d_out,) the consumer's dense output without bias,
        plus what the residual stream lacks if the recipe says so.
        """
        target, (prunable,), streams = self.recipe.target, sub.prunables, self._moving
        assert target is not None
        sums = self._gram(prunable.site.columns, cross=self.skeleton.width)
        with ExitStack() as stack:
            write = stack.enter_context(streams.writing(DENSE, sub, here)) if self._continues(here) else None
            places = {PRUNED: here.entry, DENSE: here.entry}
            for read in streams.read(places, here, parallel=sub.entry.parallel):
                (x_hat, entered_hat), (x, entered) = read[PRUNED], read[DENSE]
                z = sub.mix(_normed(sub, x_hat, entered_hat), streams.arguments(sub, x_hat, here)).z[0]
                mixed = dense.mix(_normed(dense, x, entered), streams.arguments(dense, x, here))
                o, taken = dense.consume(mixed), mixed.taken
                del mixed
                sums.add(z, _target_output(sub, target, o, x, x_hat))
                if write is not None:
                    write(dense.join(x, o, taken))
        return sums

    # One site: fit to target, select, refit.

    @kind("solving")
    def _solve(
        self, prunable: Prunable, sums: Gram | None, inputs: Tensor | None, has_target: bool
    ) -> tuple[Report, list[Tensor]]:
        """Fit to the target, select and refit, as far as the plan and the recipe ask for it.

        Args:
            sums: sums over tokens of the consumer's input, used up here: H (n, n) and, with a target, C (d_out, n).
            inputs: mean Gram of the producers' input (d, d); None unless the recipe wants it.

        Returns:
            The site's report, with the units that stay as ``units_kept`` (None if nothing is removed), and the new
            weights: none if nothing changes, else the consumer's (d_out, k), then the producers' (rows, d) if they change.

        Raises:
            NumericalError: sums or weights hold NaN or Inf.
            CalibrationError: too few tokens reached an expert that may not be left alone.
        """
        site, report = prunable.site, {"units_kept": None, **self._tokens(prunable.site, sums)}
        changes = self._changes(site)
        if report.get("left_alone") or not (changes or has_target):
            return {**untouched(site), **report}, []
        w, factors, (h, c) = prunable.weight(prunable.consumer).to(self._where), dict[float, Tensor](), (None, None)
        tokens = 0 if sums is None else sums.rows
        if sums is not None:
            if self.grams == "parked":
                sums.park()
            h, c = (None if each is None else each.to(w.dtype) for each in sums.mean(site.name))
        del sums
        if has_target:
            w, report["target_damping"] = self._fit_to_target(site, w, h, c, tokens, factors)
        del c
        if not changes:
            return {**untouched(site), **report}, [w]
        problem = Problem(
            site=site,
            w=w,
            stored=prunable.stored,
            read_producers=lambda: tuple(each.to(self._where) for each in prunable.producer_weights()),
            zeros=self.plan[site.name].zeros,
            h=h,
            inputs=inputs,
            tokens=tokens,
            findings=self.survey.get(site.name, {}),
            generator=site_generator(self.seed, site, prunable.number),
            factors=factors,
        )
        kept = self._select(problem)
        refit = self.recipe.reconstruct(problem, kept)
        report |= {"units_kept": kept.tolist(), **_outcome(problem, kept, refit)}
        return report, [refit.w, *(refit.producers or ())]

    def _counts(self, site: Site) -> Report:
        """The first entries of a site's report: its units, or the zeros among its weights."""
        counts: Report = {"site": site.name, "units": site.units}
        if self.recipe.writes_zeros:
            counts |= {"zeros": sum(self.plan[site.name].zeros or ()), "weights": sum(site.linears)}
        return counts

    def _tokens(self, site: Site, sums: Gram | None) -> Report:
        """The tokens that an expert saw, for its report; empty if the site has no router."""
        seen = tokens_seen(site, self.survey) if sums is None else sums.rows
        if site.expert is None or seen is None:
            return {}
        report: Report = {"tokens": seen}
        if left_alone(site, seen, alike=self.experts_alike and self._changes(site)):
            report |= {"left_alone": True, **({"zeros": 0} if self.plan[site.name].zeros is not None else {})}
        return report

    def _fit_to_target(
        self, site: Site, w: Tensor, h: Tensor | None, c: Tensor | None, tokens: int, factors: dict[float, Tensor]
    ) -> tuple[Tensor, float]:
        """Fit the consumer to its target: see `maths.refit.fit`.

        Args:
            w: (d_out, n), float32 or float64.
            h: (n, n), mean Gram of the consumer's input, same dtype.
            c: (d_out, n), mean of target times input, same dtype.
            tokens: number of tokens that both are means of.
            factors: receives the factor (n, n) of H_λ under the damping asked for, so that `select` may reuse it.

        Returns:
            The fitted weight (d_out, n), and the damping that it took.
        """
        target = self.recipe.target
        assert target is not None
        assert h is not None
        assert c is not None
        damping = self.recipe.ridge(target.damping, site.columns, tokens)
        factors[damping], used = cholesky(h, damping, site.name, device=self._where)
        w = fit(w, h, c, factors[damping])
        if not all_finite(w):
            raise NumericalError(f"{site.name}: the fit to the target is not finite")
        return w, used

    def _select(self, problem: Problem) -> Tensor:
        """The units that stay (k,) int64, ascending: all, those that the plan names, or the recipe's choice."""
        site, entry = problem.site, self.plan[problem.site.name]
        if entry.keep == site.units:
            kept = torch.arange(site.units)
        elif self.recipe.plans_units(site):
            assert entry.units is not None
            kept = torch.tensor(entry.units)
        else:
            kept = self.recipe.select(problem, entry.keep)
        problem.factors.clear()
        assert kept.numel() == entry.keep
        assert bool((kept.diff() > 0).all())
        return kept

    # Advance, refine.

    def _advance(self, block: Block, pruned: Block, here: Place) -> Gram | None:
        """Move the streams past a sublayer; return the Gram of the next one's inputs in this block, if it is needed."""
        owners = {PRUNED: pruned.sublayers, DENSE: block.sublayers}
        # A block to be refined moves the pruned stream after its refinement.
        waiting = [PRUNED] if here.last and self.refinement is not None else []
        sums, summed = None, tuple[str, ...]()
        if not here.last and self._sums_inputs(following := pruned.sublayers[here.position + 1], here.next):
            sums, summed = self._inputs_gram(following, here.next)
        with closing(self._moving.advance(owners, here, waiting, summed)) as advanced:
            for read in advanced:
                if sums is not None:
                    sums.add(*(_normed(owners[s][here.position + 1], *read[s]) for s in summed))
                del read  # before the next micro-batch is computed
        return sums

    def _refine(self, pruned: Block, index: int, seconds: float, final: Callable[[Block], None]) -> Report:
        """Refine a block, which is then `final`, and advance the pruned stream; return its figures, with the time it took added to
        `seconds`."""
        assert self.refinement is not None
        started = time.perf_counter()
        source, target = boundary(PRUNED, index), boundary(DENSE, index + 1)
        if not pruned.prunables:
            final(pruned)
            self._moving.pass_by(pruned, index)
            return {}
        store = self._moving.store
        report = refine(self.skeleton, pruned, index, store, source, target, self.refinement, self.ranks, self.counts)
        final(pruned)
        self._moving.pass_by(pruned, index)
        return report | {"seconds": round(seconds + time.perf_counter() - started, 3)}

    def _gram(self, columns: int, *, cross: int) -> Gram:
        """An empty Gram: H (columns, columns) and, unless `cross` is 0, C (cross, columns)."""
        return Gram(columns, cross=cross, device=self._where, dtype=accumulator(self.skeleton.dtype))


def tokens_seen(site: Site, survey: Survey) -> int | None:
    """How many tokens reached an expert in the survey; None if there was no survey, or it counted nothing."""
    if site.expert is None or not survey:
        return None
    findings = survey[site.name]
    return int(findings[SEEN]) if SEEN in findings else None


def left_alone(site: Site, tokens: int, *, alike: bool) -> bool:
    """Whether an expert keeps everything because fewer tokens reached it than it has channels.

    Raises:
        CalibrationError: it would be left alone, but the layout needs all experts alike.
    """
    if site.expert is None or tokens >= site.columns:
        return False
    if alike:
        raise CalibrationError(
            f"{site.name} saw {tokens} tokens, fewer than its {site.columns} channels, and the uniform layout cannot leave "
            "it alone; more --samples, or --layout free"
        )
    return True


def untouched(site: Site) -> Report:
    """The report of a site that keeps everything."""
    return {"kept": site.units, "error": 0.0, "damping": None, "seconds": 0.0}


def _outcome(problem: Problem, kept: Tensor, refit: Refit) -> Report:
    """The figures of a refit for the report, its output error among them."""
    columns = unit_columns(kept, problem.site.width).to(problem.w.device)
    error = None if problem.h is None else output_error(problem.w, problem.h, refit.w, columns)
    report = {"kept": kept.numel(), "error": error, "damping": refit.damping}
    return report | ({"step": refit.step} if refit.step < 1 else {})


def site_generator(seed: int, site: Site, number: int) -> torch.Generator:
    """A generator for this site alone, so that the order of sites does not matter; `number` is that of `Prunable`."""
    kinds = {"attention": 0, "ffn": 1, "linear": 1 << 40}
    place = (seed * 1_000_003 + site.block) * 2 + kinds[site.kind]
    return torch.Generator().manual_seed((place + 7_919_000_029 * number) % 2**63)


def _normed(sublayer: Sublayer, x: Tensor, entered: Tensor) -> Tensor:
    """What the producers read (sequences, tokens, d): see `Sublayer.source` and `Sublayer.normed`."""
    return sublayer.normed(sublayer.source(x, entered))


def _target_output(sub: Sublayer, target: Target, o: Tensor, x: Tensor, x_hat: Tensor) -> Tensor:
    """The consumer's target without its bias (sequences, tokens, d).

    Args:
        o: the consumer's output on the dense stream (sequences, tokens, d).
        x, x_hat: the dense and the pruned stream before the sublayer (sequences, tokens, width).
    """
    bias = sub.prunables[0].bias(sub.prunables[0].consumer)
    lacking = sub.lacking(x - x_hat) if target.residual else 0.0
    return o + lacking - (0.0 if bias is None else bias)


def _shrink(prunable: Prunable, kept: list[int] | None, weights: Sequence[Tensor]) -> None:
    """Give a site its new weights, as `BlockPruner._solve` returns them, and only the units that stay."""
    consumer, producers = weights[:1], weights[1:]
    if producers:
        prunable.set_producer_weights(producers)
    for w in consumer:
        if kept is None:
            prunable.set_weight(prunable.consumer, w)
        else:
            prunable.shrink(torch.tensor(kept), w)
