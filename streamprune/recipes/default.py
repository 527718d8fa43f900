"""The default recipe (ours): loss-based greedy cost paths, targets from the dense model, residual correction.

*Survey*: sum two Grams at every site of the dense model: `H` (n, n) of the consumer's input and `G` (d_out, d_out)
of the gradient of its output. By default the gradients are those of predicting tokens drawn from the model itself.
The curvature of the loss in `W` is about ``G ⊗ H``. Removing columns `S` and refitting the rest therefore costs
``½ tr(W_Sᵀ G W_S ([H_λ⁻¹]_SS)⁻¹)``. One greedy path per site, down to one unit, gives the marginal cost of every
further unit. These costs are comparable between sites, because all of them estimate the loss.

*Allocation*: one threshold on the marginal cost per parameter.
*Compensation*: refit the producers to read the pruned stream.
*Target*: fit each consumer to its dense output plus the current residual error (dense minus pruned stream).
*Selection and reconstruction*: exact greedy removal and the OBS update, on the pruned stream.

With several shots, each shot surveys the model that the previous shot produced.

docs/methods.md gives the measured effect of each part.
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
"""Ridge of G, relative to its mean diagonal: in small jobs G sums fewer tokens than it has rows."""


def path_costs(settings: DefaultSettings, surveyed: Surveyed) -> dict[str, Tensor]:
    """Estimate the cost per parameter of each further removed unit.

    Args:
        surveyed: its statistics hold the Gram H (n, n) and, if `weighted`, G (d_out, d_out); both are sums until
            `mean` normalises them per token.

    Returns:
        ``costs`` (units,) float64, ascending. The last entry repeats the one before: the last unit is never removed.
    """
    site, statistics = surveyed.site, surveyed.statistics
    assert statistics.gram is not None
    h, w = statistics.gram.mean(site.name)[0].to(surveyed.w.dtype), surveyed.w
    if settings.weighted:
        assert statistics.gradient is not None
        place = f"{site.name}, output gradients"
        g = statistics.gradient.mean(place)[0].to(w.dtype)
        # With G = L Lᵀ, tr(Wᵀ G W) = tr((Lᵀ W)ᵀ (Lᵀ W)): run the unweighted loop on Lᵀ W.
        w = cholesky(g, _RIDGE, place, device=w.device)[0].T @ w
    _, costs = greedy_removal(w, h, width=site.width, count=site.units - 1, damping=settings.damping, place=site.name)
    # A unit may become cheaper once others are removed. It then goes with them, so take the running maximum.
    marginal = (
        torch.cummax(torch.cat([costs.double(), costs.double()[-1:]]), dim=0).values if len(costs) else costs.double()
    )
    return {"costs": marginal / (2 * site.unit_parameters)}


def threshold(settings: DefaultSettings, sites: Sequence[Site], survey: Survey, budget: Budget) -> Plan:
    """Allocate by one threshold on marginal cost for all sites."""
    keep = allocate(sites, {site.name: survey[site.name]["costs"] for site in sites}, budget)
    return Plan({name: SitePlan(units) for name, units in keep.items()}, budget.ratio)


def target(settings: DefaultSettings) -> Target | None:
    """Return what consumers are fitted to before selection, or None for no such fit."""
    return None if settings.target == "own" else Target(settings.damping, residual=settings.target == "residual")


def work(settings: DefaultSettings, site: Site, keep: float) -> float:
    """Count the FLOPs of selection and reconstruction; a fit to a target already provides the Cholesky factor."""
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
