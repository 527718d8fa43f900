"""Our own recipe: whole greedy paths in units of loss, fits to the dense output, and a stream pulled back to its course.

*Survey*: at every site of the model `H` of the consumer's input and `G` of its output's gradient, for tokens that the model
itself draws. Curvature of the
loss in `W` is ``G ⊗ H``, so removing columns `S` and re-fitting the rest costs ``½ tr(W_Sᵀ G W_S ([H_λ⁻¹]_SS)⁻¹)``: one
greedy path a site, down to one unit, gives the marginal cost of every further unit, in the same unit everywhere.
*Allocation*: one threshold on marginal cost a parameter. *Target*: each consumer is fitted to its dense output plus what
the residual stream lacks by now. *Selection, reconstruction*: exact greedy removal and OBS on the pruned stream.
*Compensation*: of the producers. Where several shots are asked for, each begins with a survey of what the last one left.

docs/methods.md says what each part was measured to bring.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..maths.greedy import greedy_removal
from ..maths.refit import cholesky
from ..model.site import Site
from .allocation import Budget, allocate
from .obs import greedy, greedy_work, greedy_workspace, obs, obs_work, obs_workspace
from .plan import Plan, SitePlan
from .recipe import Curve, Recipe, Survey, Surveyed, Target
from .settings import DefaultSettings

_RIDGE = 1e-6
"""Of G, relative: it has fewer tokens than rows in small jobs."""


def path_costs(settings: DefaultSettings, surveyed: Surveyed) -> dict[str, Tensor]:
    """Cost a parameter of each further unit (units,), ascending, of which the last never goes."""
    site, statistics = surveyed.site, surveyed.statistics
    assert statistics.gram is not None
    h, w = statistics.gram.mean(site.name)[0].to(surveyed.w.dtype), surveyed.w
    if settings.weighted:
        assert statistics.gradient is not None
        place = f"{site.name}, output gradients"
        g = statistics.gradient.mean(place)[0].to(w.dtype)
        # G = L Lᵀ, and tr(Wᵀ G W) = tr((Lᵀ W)ᵀ (Lᵀ W)): the unweighted loop on Lᵀ W.
        w = cholesky(g, _RIDGE, place, device=w.device)[0].T @ w
    _, costs = greedy_removal(w, h, width=site.width, count=site.units - 1, damping=settings.damping, place=site.name)
    # A unit that is cheaper once others are gone goes with them.
    marginal = (
        torch.cummax(torch.cat([costs.double(), costs.double()[-1:]]), dim=0).values if len(costs) else costs.double()
    )
    return {"costs": marginal / (2 * site.unit_parameters)}


def threshold(settings: DefaultSettings, sites: Sequence[Site], survey: Survey, budget: Budget) -> Plan:
    """One threshold for all sites."""
    keep = allocate(sites, {site.name: survey[site.name]["costs"] for site in sites}, budget)
    return Plan({name: SitePlan(units) for name, units in keep.items()}, budget.ratio)


def target(settings: DefaultSettings) -> Target | None:
    """What consumers are fitted to."""
    return None if settings.target == "own" else Target(settings.damping, residual=settings.target == "residual")


def work(settings: DefaultSettings, site: Site, keep: float) -> float:
    """Operations of selection and reconstruction; the factor is the target's, where there is one."""
    shared = 0.0 if settings.target == "own" or site.expert is not None else site.columns**3 / 3
    return greedy_work(site, (site.units - keep) * site.width) + obs_work(site, keep) - shared


DEFAULT = Recipe(
    name="default",
    summary="greedy cost paths in units of loss, one threshold, fits to the dense output with residual correction",
    statistics=lambda settings: frozenset({"gram", "gradient-gram"} if settings.weighted else {"gram"}),
    draws_labels=lambda settings: settings.labels == "drawn",
    digest=path_costs,
    allocate=threshold,
    curve=lambda settings: Curve(
        "loss a parameter" if settings.weighted else "squared output error a parameter",
        lambda site, findings: findings["costs"],
    ),
    select=lambda settings, problem, keep: greedy(problem, keep, settings.damping),
    reconstruct=lambda settings, problem, kept: obs(problem, kept, settings.damping),
    wants_gram=lambda settings: True,
    compensation=lambda settings: settings.damping if settings.compensate else None,
    target=target,
    work=work,
    digest_work=lambda settings, site: (
        greedy_work(site, site.columns) + settings.weighted * (site.outputs**3 / 3 + 2 * site.outputs**2 * site.columns)
    ),
    workspace=lambda settings, site, keep: max(greedy_workspace(site), obs_workspace(site, keep)),
    digest_workspace=lambda settings, site: (
        greedy_workspace(site) + settings.weighted * site.outputs * (site.outputs + site.columns)
    ),
    shots=lambda settings, ratio: settings.shots,
)
