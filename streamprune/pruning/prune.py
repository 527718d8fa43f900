"""The prune sweep of a shot: block after block is pruned, its shard written, and its line journalled."""

from __future__ import annotations

from ..jobs.reports import extents
from ..model import write
from ..recipes.plan import Plan
from ..stream import sweep
from ..system import files
from .block import DENSE, PRUNED, BlockPruner
from .refine import Refinement
from .shot import Shot
from .solve import SiteSolver


def prune_blocks(shot: Shot, plan: Plan) -> dict[str, str]:
    """Prune the blocks that are not pruned yet; return the digests of all blocks' shards by name."""
    skeleton, depth, done = shot.skeleton, len(shot.skeleton), len(shot.steps("prune/"))
    pruner = _pruner(shot, plan)
    if shot.ranks.first:
        files.make_folder(shot.pruned)
    shot.progress.phase("prune", depth, done)
    if pruner.store is not None:
        _prepare_streams(shot, done)
    for index, block in sweep.blocks(skeleton, range(done, depth)):
        pruned, reports = pruner.prune(block, index)
        digest = write.write_block(skeleton, index, pruned.weights, shot.pruned) if shot.ranks.first else None
        shot.record(f"prune/{index}", sites=reports, sha256=digest)
        del block, pruned
        for stream in (DENSE, PRUNED) if pruner.store is not None else ():
            shot.job.store.remove(sweep.boundary(stream, index))
        for report in reports:
            if report.get("left_alone"):
                shot.progress.say(f"{report['site']} saw {report['tokens']} tokens and is left alone")
        shares = ", ".join(f"{part:,} of {whole:,}" for part, whole in extents(reports))
        shot.progress.step(f"block {index}: {shares}")
    lines = enumerate(shot.steps("prune/"))
    return {write.block_shard(skeleton, index): line["sha256"] for index, line in lines}


def _pruner(shot: Shot, plan: Plan) -> BlockPruner:
    """What prunes each block of the shot."""
    job, refinement = shot.job, None
    if shot.last and job.config.refine:
        zeros = job.recipe.writes_zeros
        refinement = Refinement(job.config.refine, job.config.seed, job.backward_batch, keeps_zeros=zeros)
    solver = SiteSolver(
        recipe=job.recipe,
        plan=plan,
        survey=shot.survey,
        seed=job.config.seed,
        experts_alike=shot.experts_alike,
        device=shot.skeleton.device,
        grams=job.grams,
    )
    return BlockPruner(
        skeleton=shot.skeleton,
        solver=solver,
        store=job.store if job.streams else None,
        batch=job.batch,
        streams=shot.streams,
        refinement=refinement,
        ranks=shot.ranks,
    )


def _prepare_streams(shot: Shot, done: int) -> None:
    """Keep only what the next block reads; before the first one, the pruned stream begins as the dense one."""
    store = shot.job.store
    first = {sweep.boundary(DENSE, 0)} if done == 0 else set()
    store.keep_only(first | {sweep.boundary(stream, done) for stream in shot.streams.into(done)})
    if done == 0:
        shot.ensure_embedded()
        store.link(sweep.boundary(DENSE, 0), sweep.boundary(PRUNED, 0))
