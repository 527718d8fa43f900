"""The survey of a shot: a forward sweep and, for gradients, a backward sweep, and what is kept of their sums at each site."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from ..errors import NumericalError
from ..jobs.journal import Entry
from ..jobs.meter import OWN
from ..maths.flops import counting, kind
from ..maths.refit import all_finite
from ..maths.sums import GRADIENTS, SiteStatistics
from ..model.block import Block, Prunable
from ..model.checkpoint import write_shard
from ..recipes.recipe import Surveyed
from ..stream import sweep
from ..system.host import return_freed_memory
from .block import DENSE
from .job import Job
from .sharing import Part, Sharing
from .shot import GRADIENT, Shot
from .solve import CPU, SEEN


class Surveyor:
    """Survey the model of a shot.

    Args:
        sharing: the other jobs that the sweep serves.
    """

    def __init__(self, shot: Shot, sharing: Sharing) -> None:
        self.shot, self.sharing = shot, sharing
        self.job, self.skeleton, self.ranks, self.progress = shot.job, shot.skeleton, shot.ranks, shot.progress

    def survey(self) -> None:
        """Leave the recipe's findings at every site in the job's folder: one file per block, see `Shot.survey`."""
        self.sharing.take()
        if self.shot.journalled("surveyed"):
            return
        self.sharing.make_folders()
        if self.job.statistics & GRADIENTS:
            self._sweep_both_ways()
        elif self.job.statistics:
            self._sweep_forward()
        else:
            self._look_at_weights()
        self.shot.record("surveyed")
        self.sharing.share()

    # The sweeps.

    def _look_at_weights(self) -> None:
        """Keep findings of the weights alone: no text is read."""
        done, depth = len(self.shot.steps("forward/")), len(self.skeleton)
        self.progress.phase("survey", depth, done)
        for index, block in sweep.blocks(self.skeleton, range(done, depth)):
            parts = self._save_findings(index, block, self._empty_statistics(index))
            del block
            self.shot.record(f"forward/{index}", **parts)
            self.progress.step(f"block {index}")

    def _sweep_forward(self) -> None:
        """Sum forwards, where no statistic needs a gradient."""
        skeleton, store, depth = self.skeleton, self.job.store, len(self.skeleton)
        done = len(self.shot.steps("forward/"))
        self.progress.phase("survey", depth, done)
        store.keep_only({sweep.boundary(DENSE, 0), sweep.boundary(DENSE, done)})
        if not done:
            self.shot.ensure_embedded()
        for index, block in sweep.blocks(skeleton, range(done, depth)):
            stats = self._empty_statistics(index)
            sweep.survey_block(skeleton, block, index, store, stats, self.job.batch)
            parts = self._save_findings(index, block, stats)
            del block, stats
            self.shot.record(f"forward/{index}", **parts)
            if index:
                store.remove(sweep.boundary(DENSE, index))
            self.progress.step(f"block {index}")

    def _sweep_both_ways(self) -> None:
        """Store blocks' inputs forwards, then sum backwards, where a statistic needs gradients."""
        forward, backward = len(self.shot.steps("forward/")), len(self.shot.steps("backward/"))
        depth = len(self.skeleton)
        self.progress.phase("survey", 2 * depth, forward + backward)
        if not self.shot.journalled("head"):
            self._store_inputs(forward)
            tokens = self.job.tokens[self.job.part]
            sweep.head_gradient(self.skeleton, self.job.store, tokens, self.job.batch, uniform=self._uniform())
            self.shot.record("head")
        self._sum_backward(depth - 1 - backward)

    def _store_inputs(self, done: int) -> None:
        """Run blocks from `done` on, and keep every `Job.boundary_every`-th block's input and the last block's output."""
        store, every = self.job.store, self.job.boundary_every
        kept = {i for i in range(done + 1) if i % every == 0 or i == done}
        store.keep_only({sweep.boundary(DENSE, i) for i in kept})
        if not done:
            self.shot.ensure_embedded()
        for index in sweep.forward(self.skeleton, store, DENSE, done, len(self.skeleton), self.job.batch):
            self.shot.record(f"forward/{index}")
            if index % every:
                store.remove(sweep.boundary(DENSE, index))
            self.progress.step(f"forward, block {index}")

    def _sum_backward(self, first: int) -> None:
        """Sum backwards from block `first` to block 0; inputs that were not kept are recomputed."""
        skeleton, store = self.skeleton, self.job.store
        inputs = {sweep.boundary(DENSE, index) for index in range(max(first, 0) + 1)}
        store.keep_only({sweep.boundary(GRADIENT, first + 1)} | inputs)
        while first >= 0:
            lowest = self._recompute(first)
            for index, block in sweep.blocks(skeleton, range(first, lowest - 1, -1)):
                stats = self._empty_statistics(index)
                sweep.backward_block(skeleton, block, index, store, stats, self.job.backward_batch)
                parts = self._save_findings(index, block, stats)
                del block, stats
                self.shot.record(f"backward/{index}", **parts)
                store.remove(sweep.boundary(GRADIENT, index + 1))
                if index:
                    store.remove(sweep.boundary(DENSE, index))
                self.progress.step(f"backward, block {index}")
            first = lowest - 1

    def _uniform(self) -> Tensor | None:
        """Uniform numbers (samples, length) float64 that the model's own labels are drawn with, if the recipe wants them."""
        if not self.job.recipe.draws_labels:
            return None
        generator = torch.Generator().manual_seed(self.job.config.seed)
        return torch.rand(self.job.tokens.shape, generator=generator, dtype=torch.float64)[self.job.part]

    def _recompute(self, index: int) -> int:
        """Ensure that the input of block `index` is stored; return the lowest block from which on all inputs up to it are."""
        skeleton, store = self.skeleton, self.job.store
        lowest = index
        while lowest and not store.intact(sweep.boundary(DENSE, lowest)):
            lowest -= 1
        if not lowest:
            self.shot.ensure_embedded()
        for _ in sweep.forward(skeleton, store, DENSE, lowest, index, self.job.batch):
            pass
        while lowest and store.intact(sweep.boundary(DENSE, lowest - 1)):
            lowest -= 1
        return lowest

    # What is kept of a block.

    def _empty_statistics(self, index: int) -> list[SiteStatistics]:
        """Sums to be fed, one per site of a block."""
        device = CPU if self.job.grams == "host" else None
        return self.skeleton.statistics(index, self.sharing.statistics, device)

    @torch.no_grad()
    @kind("solving")
    def _save_findings(self, index: int, block: Block, stats: list[SiteStatistics]) -> Entry:
        """Write what is kept of a block's sums, for this job and for those that ask; `stats` is used up.

        Returns:
            For the journal: the digest of this job's file, and each job's part of the step if there are several.
        """
        own = self._add_up(stats)
        return_freed_memory()  # of the sweep
        parts = self.sharing.parts(index)

        def digest(number: int) -> tuple[list[tuple[str, str]], list[Tensor]]:
            statistics = own.pop(number)  # so that no sum outlives its site
            found: dict[tuple[str, str], Tensor] = {}
            for name, part in parts.items():
                digested = self._digest_for(part, block.prunables[number], statistics)
                found |= {(name, place): tensor for place, tensor in digested.items()}
            return list(found), list(found.values())

        for _, names, found in self.ranks.spread(range(len(block.prunables)), digest, CPU):
            for (name, place), tensor in zip(names, found, strict=True):
                if self.ranks.first:
                    parts[name].tensors[place] = tensor
        written = parts.items() if self.ranks.first else ()
        digests = {name: _write(index, part) for name, part in written}
        if not self.sharing.asking:
            return {"sha256": digests.get(OWN)}
        return {
            "parts": {name: part.as_entry(digests[name]) for name, part in parts.items()},
            "sha256": digests[OWN],
        }

    def _add_up(self, stats: list[SiteStatistics]) -> dict[int, SiteStatistics]:
        """Add up the ranks' sums; return those of the sites that this rank digests, by their number. `stats` is emptied."""
        for number, statistics in enumerate(stats):
            statistics.across(self.ranks.add_up(self.ranks.owner(number)))
        own = {number: statistics for number, statistics in enumerate(stats) if self.ranks.mine(number)}
        stats.clear()
        if self.job.grams == "parked":
            for statistics in own.values():
                statistics.park()
        return own

    def _digest_for(self, part: Part, prunable: Prunable, statistics: SiteStatistics) -> dict[str, Tensor]:
        """`_digest` for one job, with its operations and seconds counted."""
        started = time.monotonic()
        part.operations["sums"] += statistics.operations(part.job.statistics)
        with counting() as counter:
            own = statistics.part(part.job.statistics) if self.sharing.asking else statistics
            digested = self._digest(part.job, prunable, own)
        part.operations["solving"] += counter.total
        part.seconds += time.monotonic() - started
        return digested

    def _digest(self, job: Job, prunable: Prunable, statistics: SiteStatistics) -> dict[str, Tensor]:
        """What a job's recipe keeps of a site's sums, on the host, by its name in the file."""
        site = prunable.site
        where = CPU if self.job.grams == "host" else self.job.device
        surveyed = Surveyed(
            site=site,
            w=prunable.weight(prunable.consumer).to(where),
            read_producers=lambda: tuple(w.to(where) for w in prunable.producer_weights()),
            statistics=statistics,
        )
        findings = job.recipe.digest(surveyed)
        if site.expert is not None and job.statistics:
            findings[SEEN] = torch.tensor(statistics.seen)
        return {f"{site.place}.{name}": tensor.cpu() for name, tensor in findings.items()}


def _write(index: int, part: Part) -> str:
    """Write one job's findings of a block; return the file's digest.

    Raises:
        NumericalError: a finding holds NaN or Inf.
    """
    for place, tensor in part.tensors.items():
        if not all_finite(tensor):
            raise NumericalError(f"block {index}: the survey's {place} is NaN or Inf")
    return write_shard(part.path, part.tensors)
