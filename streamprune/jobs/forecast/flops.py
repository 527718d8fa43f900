"""Forecast the FLOPs of a job and the bytes it reads."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, replace

from ...maths.flops import Kind
from ...maths.refit import output_error_work
from ...maths.sums import PANEL
from ...model.site import Site
from .needs import REFINE_SEQUENCES
from .shapes import Shapes

Work = defaultdict[tuple[str, Kind], float]
"""FLOPs by phase and kind."""


@dataclass(frozen=True)
class _Passes:
    """FLOPs of a forward pass of all tokens through one site."""

    producers: float
    """FLOPs of the producers."""
    mixing: float
    """FLOPs of the two matrix products of attention; 0 for an FFN."""
    consumer: float
    """FLOPs of the consumer."""

    @property
    def whole(self) -> float:
        return self.producers + self.mixing + self.consumer


def _left(site: Site, left: float) -> Site:
    return site.keeping(max(1, round(left * site.units)))


class Effort(Shapes):
    """FLOPs of one job, and bytes of weights that it reads."""

    def bytes_to_read(self, every: int) -> int:
        """Return the bytes of stored weights read over the whole job, given boundaries at every `every`-th block."""
        checkpoint, needs = self.skeleton.checkpoint, self.needs
        outside = sum(checkpoint[name].nbytes for name in {*self.skeleton.embed_names(), *self.skeleton.head_names()})
        if not needs.prunes:
            return self.stored_all + outside
        embed = sum(checkpoint[name].nbytes for name in self.skeleton.embed_names())
        head = sum(checkpoint[name].nbytes for name in self.skeleton.head_names()) + (
            embed if self.skeleton.tied else 0
        )
        # All weights are read to check and to prune. Gradients read them forward, backward and to recompute boundaries.
        survey = 2 + (every > 1) if needs.gradients else 1 if needs.survey else 0
        survey += 2 * needs.corrects + bool(needs.corrects)
        shot = (1 + survey) * self.stored_all + outside + needs.text * embed + needs.gradients * head
        writing = needs.generates * (needs.length - 1) * (self.stored_all + embed + head)
        return self.stored_all + outside + needs.shots * shot + writing

    def operations(self) -> Work:
        """Return FLOPs by phase and kind, over all shots. Causal masks save nothing; routers are not counted."""
        needs = self.needs
        total: Work = defaultdict(float)
        fraction = min(REFINE_SEQUENCES, needs.samples) / max(needs.samples, 1)
        head = 2 * self.d * self.skeleton.vocabulary * needs.samples * (needs.length - 1) * needs.text
        for shot in range(1, needs.shots + 1):
            before, after = (1 - needs.removes * done / needs.shots for done in (shot - 1, shot))
            shapes: Counter[tuple[Site, bool, bool, bool]] = Counter()
            for index, sublayers in enumerate(self.sublayers):
                for position, sublayer in enumerate(sublayers):
                    last = index == len(self.sublayers) - 1 and position == len(sublayers) - 1
                    parted = index > 0 or position > 0
                    for number, site in enumerate(sublayer.sites):
                        plain = replace(site, block=0, expert=None if site.expert is None else 0)
                        shapes[plain, parted, number == 0, not last or needs.refines > 0] += 1
            for (site, parted, leads, goes_on), count in shapes.items():
                work = self._survey_work(site, before)
                if needs.prunes:
                    work |= self._prune_work(site, before, after, parted, leads, goes_on)
                # Forward, input gradients and weight gradients; or forward twice and input gradients.
                a_step = 3 * fraction * self._passes(site, after).whole
                work["prune", "training"] += needs.refines * (shot == needs.shots) * a_step
                work["correct", "training"] += needs.corrects * a_step
                for place, operations in work.items():
                    total[place] += count * operations
            total["head", "sweeps"] += head * (2 if needs.gradients else int(needs.scores))
            total["correct", "training"] += 2 * fraction * needs.corrects * head
        passes = sum(self._passes(site, 1.0).whole for sites in self.blocks for site in sites)
        total["calibrate", "writing"] = needs.generates * (passes + head)
        return total

    def _passes(self, site: Site, left: float) -> _Passes:
        """Return FLOPs of a forward pass of all tokens through a site, of which a share `left` of the units remains."""
        tokens = left * self.needs.samples * self.needs.length * self.needs.text
        linears = [2 * weights * site.share * tokens for weights in site.linears]
        mixing = 4 * self.needs.length * site.columns * tokens if site.kind == "attention" else 0
        return _Passes(sum(linears[:-1]), mixing, linears[-1])

    def _survey_work(self, site: Site, left: float) -> Work:
        """Return FLOPs of the survey at a site, of which a share `left` of the units remains."""
        needs, passes = self.needs, self._passes(site, left)
        found: Work = defaultdict(float)
        survey = "backward" if needs.gradients else "forward"
        if needs.survey or not needs.prunes:
            found["forward", "sweeps"] += passes.whole
        if needs.gradients:
            # Forward again, then gradients of inputs, not of weights. For attention, backward takes five products,
            # forward two.
            found["backward", "sweeps"] += 2 * passes.whole + 1.5 * passes.mixing
        if needs.prunes:
            kept, tokens = _left(site, left), needs.samples * needs.length
            found[survey, "sums"] += 2 * tokens * site.share * sum(self._half(n) for n in self.summed(kept))
            if "divergence" in needs.survey and site.kind == "attention":
                found[survey, "sums"] += passes.producers + passes.mixing
            found[survey, "solving"] += needs.digest_work(kept)
        return found

    def _prune_work(self, site: Site, before: float, after: float, parted: bool, leads: bool, goes_on: bool) -> Work:
        """Return FLOPs of the prune sweep at a site.

        Args:
            before, after: share of the units left before and after this shot.
            parted: whether the dense and pruned streams differ at the site's input.
            leads: whether the site is the first of its sublayer.
            goes_on: whether the streams are needed after this site.
        """
        needs, passes, d = self.needs, self._passes(site, before), self.d
        n, tokens, kept = before * site.columns, needs.samples * needs.length, _left(site, before)
        aims = needs.aims and parted and site.expert is None
        sweeps, sums, solving = 0.0, 0.0, needs.work(kept, kept.units * after / before)
        if needs.gram:
            sweeps += passes.producers + passes.mixing
            sums += 2 * tokens * site.share * self._half(n)
            solving += output_error_work(d, n, after * site.columns)
        if needs.dense_stream and (goes_on or aims):
            sweeps += passes.whole
        if goes_on and (needs.gram or needs.dense_stream):
            # With refinement, the streams advance by a whole block once it is refined.
            sweeps += self._passes(site, after).whole
        if aims:
            sums += 2 * tokens * n * d
            solving += n**3 / 3 + 4 * d * n**2
        if needs.compensates and parted:
            if leads:
                sums += 2 * tokens * (self._half(d) + d * d)
                solving += d**3 * (1 / 3 + 2)
            solving += 2 * d * before * sum(site.linears[:-1])
        return defaultdict(float, {("prune", "sweeps"): sweeps, ("prune", "sums"): sums, ("prune", "solving"): solving})

    def _half(self, n: float) -> float:
        """Return how many of the n² products per token `Gram` computes."""
        return n * (n + min(n, PANEL.get(self.skeleton.device.type, PANEL["cuda"]))) / 2
