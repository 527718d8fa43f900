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

from ..maths.refit import others
from ..maths.slimgpt import batched_group_removal, dynamic_group_removal
from ..maths.slimgpt import workspace as removal_workspace
from ..model.site import Site
from .allocation import Budget, allocate, even_densities
from .obs import ObsRecipe, obs_workspace
from .plan import Plan, SitePlan
from .recipe import Problem, Survey
from .settings import SlimGptSettings


def incremental_ratios(blocks: int, r0: float, r_last: float = 0.0) -> list[float]:
    """Return each block's share relative to the ratio: ``r_i = r_0 + (r_{L−1} − r_0)·log(i+1)/log(L)``.

    L is the number of blocks. The shares have mean 1: if `r_last` is 0, ``r_{L−1}`` is chosen for that; else all of
    them are scaled.
    """
    if blocks == 1:
        return [1.0]
    steps = [math.log(i + 1) / math.log(blocks) for i in range(blocks)]
    last = r_last or r0 + (1 - r0) * blocks / sum(steps)
    shares = [r0 + (last - r0) * step for step in steps]
    mean = sum(shares) / blocks if r_last else 1.0
    return [share / mean for share in shares]


class SlimGpt(ObsRecipe[SlimGptSettings]):
    name = "slimgpt"
    summary = "SlimGPT: ratio growing with the logarithm of depth, batched greedy pruning, OBS reconstruction"

    def allocate(self, sites: Sequence[Site], survey: Survey, budget: Budget) -> Plan:
        """Allocate by the incremental pruning ratio. A uniform layout has one width, so it uses the mean over blocks."""
        blocks = sorted({site.block for site in sites})
        # `even_densities` divides by the shares, so they must be positive.
        shares = [max(share, 1e-6) for share in incremental_ratios(len(blocks), self.settings.r0, self.settings.r_last)]
        keep = allocate(sites, even_densities(sites, dict(zip(blocks, shares, strict=True))), budget)
        return Plan({name: SitePlan(units) for name, units in keep.items()}, budget.ratio)

    def select(self, problem: Problem, keep: int) -> Tensor:
        """Select units by batched greedy pruning on the mean Gram H (n, n): (keep,) int64, ascending."""
        if self.settings.exact:
            return super().select(problem, keep)
        site, w, h, damping = problem.site, problem.w, problem.gram, self.settings.damping
        count = site.units - keep
        if site.kind != "ffn":
            removed, _ = batched_group_removal(w, h, width=site.width, count=count, damping=damping, place=site.name)
        else:
            first, last = self._groups
            removed, _ = dynamic_group_removal(
                w, h, count=count, damping=damping, place=site.name, first=first, last=last
            )
        return others(removed, site.units)

    @property
    def _groups(self) -> tuple[int, int]:
        """Sizes of the first and the last group of FFN channels removed together."""
        return max(self.settings.first_group, self.settings.last_group), self.settings.last_group

    def workspace(self, site: Site, keep: int) -> int:
        """Count the elements held at the peak: P, W and the rows of the first removed group, or those of the refit."""
        if self.settings.exact:
            return super().workspace(site, keep)
        group = site.width if site.kind != "ffn" else min(self._groups[0], site.columns // 2)
        return max(removal_workspace(site.columns, site.outputs, group), obs_workspace(site, keep))
