"""SlimGPT: layer-wise structured pruning (Ling et al., NeurIPS 2024).

*Incremental pruning ratio*: the share that a block loses grows with the logarithm of its depth.
*Batched greedy pruning*: remove heads by grouped Cholesky factorisation of the inverse Hessian's diagonal blocks, and
FFN channels in groups whose size falls from 1024 to 8.
*Reconstruction*: the OBS update, block by block on the pruned stream.
The paper's LoRA recovery is the command `tune`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ..maths.slimgpt import batched_group_removal, dynamic_group_removal
from ..maths.slimgpt import workspace as removal_workspace
from ..maths.triangular import inverse_work, product_work
from ..model.site import Site
from .allocation import Budget, allocate, even_densities
from .obs import greedy, greedy_workspace, obs, obs_work, obs_workspace, others
from .plan import Plan, SitePlan
from .recipe import Problem, Recipe, Survey
from .settings import SlimGptSettings


def incremental_ratios(blocks: int, r0: float) -> list[float]:
    """Return each block's share relative to the ratio: ``r_i = r_0 + (r_{L−1} − r_0)·log(i+1)/log(L)``.

    ``r_{L−1}`` is chosen so that the shares have mean 1.

    Args:
        blocks: L, the number of blocks.
        r0: relative share of the first block.
    """
    if blocks == 1:
        return [1.0]
    steps = [math.log(i + 1) / math.log(blocks) for i in range(blocks)]
    last = r0 + (1 - r0) * blocks / sum(steps)
    return [r0 + (last - r0) * step for step in steps]


def schedule(settings: SlimGptSettings, sites: Sequence[Site], survey: Survey, budget: Budget) -> Plan:
    """Allocate by the incremental pruning ratio. A uniform layout has one width, so it uses the mean over blocks."""
    blocks = sorted({site.block for site in sites})
    # `even_densities` divides by the shares, so they must be positive.
    shares = [max(share, 1e-6) for share in incremental_ratios(len(blocks), settings.r0)]
    keep = allocate(sites, even_densities(sites, dict(zip(blocks, shares, strict=True))), budget)
    return Plan({name: SitePlan(units) for name, units in keep.items()}, budget.ratio)


def batched(settings: SlimGptSettings, problem: Problem, keep: int) -> Tensor:
    """Select units by batched greedy pruning on the mean Gram H (n, n): (keep,) int64, ascending."""
    site, damping = problem.site, settings.damping
    if settings.exact:
        return greedy(problem, keep, damping)
    count = site.units - keep
    if site.kind == "attention":
        removed, _ = batched_group_removal(
            problem.w, problem.gram, width=site.width, count=count, damping=damping, place=site.name
        )
    else:
        removed, _ = dynamic_group_removal(
            problem.w,
            problem.gram,
            count=count,
            damping=damping,
            place=site.name,
            first=max(settings.first_group, settings.last_group),
            last=settings.last_group,
        )
    return others(site.units, removed)


def batched_work(site: Site, keep: float) -> float:
    """Count the FLOPs of `batched`: after each removed group, the remaining columns of P and W are updated."""
    count = (site.units - keep) * site.width
    left = site.columns - count / 2
    return inverse_work(site.columns) + product_work(left, count) + 2 * count * left * site.outputs


def workspace(settings: SlimGptSettings, site: Site, keep: int) -> int:
    """Count the elements held at the peak: P, W and the rows of the first removed group, or those of the refit."""
    n, d = site.columns, site.outputs
    group = site.width if site.kind == "attention" else min(max(settings.first_group, settings.last_group), n // 2)
    removal = greedy_workspace(site) if settings.exact else removal_workspace(n, d, group)
    return max(removal, obs_workspace(site, keep))


SLIMGPT = Recipe(
    name="slimgpt",
    summary="SlimGPT: ratio growing with the logarithm of depth, batched greedy pruning, OBS reconstruction",
    allocate=schedule,
    select=batched,
    reconstruct=lambda settings, problem, kept: obs(problem, kept, settings.damping),
    wants_gram=lambda settings: True,
    work=lambda settings, site, keep: batched_work(site, keep) + obs_work(site, keep),
    workspace=workspace,
)
