"""How fast a model decodes with other widths, by a measured table: the seconds of each kind of site at a few widths.

It stands for decoding one token of one sequence: the matrix products of the sites, one after the other, and of the head, on this
device in the computing dtype, with random weights that no cache holds. Attention over a long cache, norms and the runtime's own
overhead are left out, so a real speed-up is somewhat smaller.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate

import torch
import torch.nn.functional as F

from ..model.site import Site, routed
from ..model.skeleton import Skeleton

SHARES = (0.125, 0.25, 0.5, 0.75, 1.0)
"""Shares of a site's units at which it is timed; between them, seconds are interpolated."""
ROUNDS = 5
ROUND_SECONDS = 0.01
"""Least seconds per round of one width."""
COLD_BYTES = 1 << 26
"""Least bytes of one width's weights, in several copies if necessary: more than most CPU caches hold."""
MOST_COPIES = 1024
"""Most copies of one width's weights: of smaller ones, the calls take longer than the reading."""
MOST_BYTES = 1 << 28
"""Most bytes of one width's weights; of larger matrices, a part of the rows is timed."""
Shapes = Sequence[tuple[int, int]]
"""(rows, columns) of matrices that are multiplied with one vector each."""


class Decoding:
    """Seconds per token of a model, with any number of units at its sites. Sites of equal shapes are timed once."""

    def __init__(self, skeleton: Skeleton) -> None:
        self.skeleton = skeleton
        self.sites = skeleton.all_sites()

    @cached_property
    def _curves(self) -> dict[tuple[int, ...], list[tuple[int, float]]]:
        """For each kind of site, ascending units with their seconds, which never fall."""
        kinds, found = {self._kind(site): site for site in self.sites}, dict[tuple[int, ...], list[tuple[int, float]]]()
        for kind, site in kinds.items():
            units = sorted({max(1, round(share * site.units)) for share in SHARES})
            seconds = accumulate((self._time(self._shapes(site, count)) for count in units), max)
            found[kind] = list(zip(units, seconds, strict=True))
        return found

    @cached_property
    def _head(self) -> float:
        return self._time([(self.skeleton.vocabulary, self.skeleton.width)])

    def seconds(self, keeps: Mapping[str, int]) -> float:
        """Return the seconds per token; `keeps` gives units by site name, and other sites keep theirs."""
        sites = [(site, keeps.get(site.name, site.units)) for site in self.sites]
        before, left = routed(self.sites), routed([site for site, units in sites if units])
        found = self._head
        for site, units in sites:
            # The experts that stay get the tokens of those that are gone.
            more = len(before[site.block]) / len(left[site.block]) if site.expert is not None else 1
            found += site.share * more * _between(self._curves[self._kind(site)], units)
        return found

    def speed_up(self, keeps: Mapping[str, int]) -> float:
        """Return how many times as fast as with all units the model decodes."""
        return self.seconds({}) / self.seconds(keeps)

    def _kind(self, site: Site) -> tuple[int, ...]:
        return site.units, site.outputs, *site.linears

    def _shapes(self, site: Site, units: int) -> Shapes:
        """Return the matrices of a site with fewer units: producers, then the consumer."""
        *producers, consumer = (weights // site.units * units for weights in site.linears)
        d = self.skeleton.width
        return [*((weights // d, d) for weights in producers), (site.outputs, consumer // site.outputs)]

    @torch.no_grad()
    def _time(self, shapes: Shapes) -> float:
        """Return the seconds of the products of matrices with one vector each: the median over rounds."""
        device, dtype = self.skeleton.device, self.skeleton.dtype
        whole = sum(rows * columns for rows, columns in shapes)
        part = min(1.0, MOST_BYTES / (whole * dtype.itemsize))
        shapes = [(max(1, int(part * rows)), columns) for rows, columns in shapes]
        timed = sum(rows * columns for rows, columns in shapes)
        copies = min(-(-COLD_BYTES // (timed * dtype.itemsize)), MOST_COPIES)
        matrices = [[torch.ones(shape, device=device, dtype=dtype) for shape in shapes] for _ in range(copies)]
        vectors = [torch.ones(1, columns, device=device, dtype=dtype) for _, columns in shapes]

        def now() -> float:
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            return time.perf_counter()

        def run(count: int) -> float:
            start = now()
            for _ in range(count):
                for each in matrices:
                    for x, w in zip(vectors, each, strict=True):
                        F.linear(x, w)
            return (now() - start) / (count * copies)

        run(1)  # warm up
        count = 1 + int(ROUND_SECONDS / (copies * run(1)))
        return statistics.median(run(count) for _ in range(ROUNDS)) * whole / timed


def _between(points: Sequence[tuple[int, float]], units: int) -> float:
    """Interpolate between the two measured points around `units`; below the least, in proportion."""
    low, below = 0, 0.0
    for high, above in points:
        if units <= high:
            return below + (above - below) * (units - low) / (high - low)
        low, below = high, above
    return below
