"""The survey of a shot: a forward sweep, a backward sweep if a statistic needs gradients, and a digest of each site's sums."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..errors import DamageError, NumericalError
from ..maths.flops import kind
from ..maths.refit import all_finite
from ..maths.sums import GRADIENTS, SiteStatistics
from ..model.block import Block
from ..model.checkpoint import write_shard
from ..recipes.recipe import Surveyed
from ..stream import sweep
from ..system.host import return_freed_memory
from ..text.windows import counted
from . import archive, experts
from .block import CPU, SEEN
from .shot import GRADIENT, Shot
from .streams import DENSE


def survey(shot: Shot) -> None:
    """Leave the recipe's findings at every site in the job's folder: one file per block, see `Shot.survey`.

    If the survey is kept in a folder (see `archive`), it comes from there, or goes there.
    """
    if shot.journalled("surveyed"):
        return
    kept = shot.ranks.broadcast(lambda: archive.find(shot.job.request)) if shot.number == 1 else None
    if kept is not None:
        if shot.ranks.first:
            archive.fetch(shot, kept)
        shot.record("surveyed", sha256=kept)
        return
    if shot.job.request.statistics & GRADIENTS:
        _store_inputs(shot)
        _sum_backward(shot)
    else:
        _sum_forward(shot)
    if shot.number == 1 and shot.ranks.first:
        archive.keep(shot)
    shot.record("surveyed")
    if shot.job.request.metric_text is not None:
        shot.job.survey_store.keep_only(set())


def _sum_forward(shot: Shot) -> None:
    """Sum and digest each block forwards. If the recipe needs no statistics, only weights are read."""
    job, skeleton, depth, done = shot.job, shot.skeleton, len(shot.skeleton), len(shot.steps("forward/"))
    shot.progress.phase("survey", depth, done)
    if job.request.statistics:
        store = job.survey_store
        store.keep_only({sweep.boundary(DENSE, 0), sweep.boundary(DENSE, done)})
        if not done:
            shot.ensure_survey_embedded()
    for index, block in sweep.blocks(skeleton, range(done, depth)):
        stats = _empty_statistics(shot, index)
        if job.request.statistics:
            sweep.survey_block(skeleton, block, index, store, stats, job.batch)
        digest = _save_findings(shot, index, block, stats)
        del block, stats
        shot.record(f"forward/{index}", sha256=digest)
        if job.request.statistics and index:
            store.remove(sweep.boundary(DENSE, index))
        shot.progress.step(f"block {index}")


def _store_inputs(shot: Shot) -> None:
    """Run the blocks and the loss; keep every `Job.boundary_every`-th block's input, and the gradient of the last output."""
    job, store, depth, every = shot.job, shot.job.store, len(shot.skeleton), shot.job.boundary_every
    done = len(shot.steps("forward/"))
    shot.progress.phase("survey", 2 * depth, done + len(shot.steps("backward/")))
    if shot.journalled("head"):
        return
    store.keep_only({sweep.boundary(DENSE, i) for i in {*range(0, done + 1, every), done}})
    if not done:
        shot.ensure_embedded()
    for index in sweep.forward(shot.skeleton, store, DENSE, done, depth, job.batch):
        shot.record(f"forward/{index}")
        if index % every:
            store.remove(sweep.boundary(DENSE, index))
        shot.progress.step(f"forward, block {index}")
    uniform = None
    if job.recipe.draws_labels:
        generator = torch.Generator().manual_seed(job.config.seed)
        uniform = torch.rand(job.tokens.shape, generator=generator, dtype=torch.float64)[job.part]
    sweep.head_gradient(shot.skeleton, store, job.windows.labels[job.part], job.batch, uniform=uniform)
    shot.record("head")


def _sum_backward(shot: Shot) -> None:
    """Sum and digest each block backwards; inputs that were not kept, or are damaged, are recomputed."""
    try:
        return _sum_down(shot)
    except DamageError as error:
        # Inputs that this process wrote were not read to check them before; now they are.
        shot.progress.say(
            f"{str(error).partition(';')[0]}; inputs are checked, and computed again where they are damaged"
        )
        shot.job.store.doubt()
    return _sum_down(shot)


def _sum_down(shot: Shot) -> None:
    job, skeleton, store = shot.job, shot.skeleton, shot.job.store
    predictions = counted(job.windows.labels) / job.config.samples
    first = len(skeleton) - 1 - len(shot.steps("backward/"))
    inputs = {sweep.boundary(DENSE, index) for index in range(max(first, 0) + 1)}
    store.keep_only({sweep.boundary(GRADIENT, first + 1)} | inputs)
    while first >= 0:
        lowest = _recompute(shot, first)
        for index, block in sweep.blocks(skeleton, range(first, lowest - 1, -1)):
            stats = _empty_statistics(shot, index)
            sweep.backward_block(skeleton, block, index, store, stats, job.backward_batch, predictions)
            digest = _save_findings(shot, index, block, stats)
            del block, stats
            shot.record(f"backward/{index}", sha256=digest)
            store.remove(sweep.boundary(GRADIENT, index + 1))
            if index:
                store.remove(sweep.boundary(DENSE, index))
            shot.progress.step(f"backward, block {index}")
        first = lowest - 1


def _recompute(shot: Shot, index: int) -> int:
    """Ensure that the input of block `index` is stored; return the lowest block from which on all inputs up to it are."""
    store, lowest = shot.job.store, index
    while lowest and not store.usable(sweep.boundary(DENSE, lowest)):
        lowest -= 1
    if not lowest:
        shot.ensure_embedded()
    for _ in sweep.forward(shot.skeleton, store, DENSE, lowest, index, shot.job.batch):
        pass
    while lowest and store.usable(sweep.boundary(DENSE, lowest - 1)):
        lowest -= 1
    return lowest


def _empty_statistics(shot: Shot, index: int) -> list[SiteStatistics]:
    """Zero sums, one per site of a block."""
    job = shot.job
    stats = shot.skeleton.statistics(index, job.request.statistics, CPU if job.grams == "host" else None)
    if "removal" in job.request.statistics:
        shape = len(job.survey_tokens), job.survey_tokens.shape[1]
        gradients = bool(job.request.statistics & GRADIENTS)
        experts.add_samples(shot.skeleton, index, stats, shape, job.survey_part.start, gradients=gradients)
    return stats


@torch.no_grad()
@kind("solving")
def _save_findings(shot: Shot, index: int, block: Block, stats: list[SiteStatistics]) -> str | None:
    """Add up the ranks' sums, digest them and write the block's file; `stats` is emptied.

    Returns:
        The file's digest on the first rank, which writes it; else None.

    Raises:
        NumericalError: a finding holds NaN or Inf.
    """
    job, ranks = shot.job, shot.ranks
    for number in range(len(stats)):
        stats[number].across(partial(ranks.sum, owner=ranks.owner(number)))
    own = {number: stats[number] for number in range(len(stats)) if ranks.mine(number)}
    stats.clear()
    if job.grams == "parked":
        for number in own:
            own[number].park()
    return_freed_memory()  # of the sweep

    found: dict[str, Tensor] = {}
    for together, mine in ranks.rounds(range(len(block.prunables))):
        # Popped, so that no sum outlives its site.
        findings = [_digest(shot, block, number, own.pop(number)) for number in mine]
        named = [(list(each), list(each.values())) for each in findings]
        for _, names, tensors in ranks.exchange(together, named, CPU):
            if ranks.first:
                found.update(zip(names, tensors, strict=True))
    if not ranks.first:
        return None
    for name, tensor in found.items():
        if not all_finite(tensor):
            raise NumericalError(f"block {index}: the survey's {name} is NaN or Inf")
    return write_shard(shot.survey_path(index), found)


def _digest(shot: Shot, block: Block, number: int, statistics: SiteStatistics) -> dict[str, Tensor]:
    """What is kept of a site's sums, on the host, by its name in the file; at the first expert, also what all of them cost."""
    job, prunable = shot.job, block.prunables[number]
    site = prunable.site
    where = CPU if job.grams == "host" else job.request.device
    surveyed = Surveyed(
        site=site,
        w=prunable.weight(prunable.consumer).to(where),
        read_producers=lambda: tuple(w.to(where) for w in prunable.producer_weights()),
        statistics=statistics,
    )
    findings = job.recipe.digest(surveyed)
    if site.expert is not None and job.request.statistics:
        findings[SEEN] = torch.tensor(statistics.seen)
    found = {f"{site.place}.{name}": tensor.cpu() for name, tensor in findings.items()}
    if statistics.sample is not None:
        (sublayer,) = (each for each in block.sublayers if prunable in each.prunables)
        with kind("sweeps"):
            found |= experts.costs(shot.skeleton, sublayer, statistics.sample)
    return found
