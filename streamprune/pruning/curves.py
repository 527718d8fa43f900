"""The cost of each site's units by the recipe's measure: a few points per site, kept beside the report for plots."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..model.site import Site
from ..recipes.plan import Plan
from ..recipes.recipe import LOSS, WHOLE, Recipe, Survey
from ..system import files

FORMAT = "streamprune-curves-1"
POINTS = 64
"""The most points per site."""


def write_curves(
    path: Path, recipe: Recipe[Any], sites: Sequence[Site], survey: Survey, plan: Plan, dense: Mapping[str, int]
) -> str:
    """Write ``{"format", "label", "sites": {name: [[gone, cost], ...]}}``: with `gone` units removed, the next one costs `cost`.

    Args:
        sites: sites that the recipe weighed, with their units at the time of the survey.
        dense: units by site name in the dense model, before any shot.

    Returns:
        The file's digest.
    """
    lines = []
    for site in sites:
        costs = recipe.curve(site, survey[site.name])
        if costs is not None and len(costs):
            points = sample(costs.double().cpu(), site.units - plan[site.name].keep)
            gone = dense[site.name] - site.units
            lines.append(f"    {json.dumps(site.name)}: {json.dumps([[gone + k, cost] for k, cost in points])}")
    body = ",\n".join(lines)
    head = f'  "format": {json.dumps(FORMAT)},\n  "label": {json.dumps(recipe.curve_label)}'
    return files.write_text(path, f'{{\n{head},\n  "sites": {{\n{body}\n  }}\n}}\n')


def predicted_loss(
    recipe: Recipe[Any], sites: Sequence[Site], survey: Survey, keeps: Mapping[str, int]
) -> float | None:
    """Return the loss in nats per token that the recipe's costs predict if `keeps` units stay; None if it prices something else.

    Whole experts are priced as such where the survey did so, units by themselves on the dense model: what refitting and correction
    recover later is not in it, nor that errors of the experts of a token add up.
    """
    if recipe.curve_label != LOSS:
        return None
    found = 0.0
    for site in sites:
        findings = survey[site.name]
        costs = recipe.curve(site, findings)
        if not keeps[site.name] and WHOLE in findings:
            found += float(findings[WHOLE])
        elif costs is not None:
            gone = costs[: site.units - keeps[site.name]].double()
            found += float(gone.sum()) * site.unit_parameters
            if len(gone) == site.units:
                found += float(gone[-1]) * (site.rest or 0)
    return found


def sample(costs: Tensor, cut: int) -> list[tuple[int, float]]:
    """Return at most `POINTS` points of a curve, evenly spaced, with both ends and the cut.

    Args:
        costs: (units,) float64, not empty.
        cut: number of removed units; its point is the first unit that stays.
    """
    count = len(costs)
    places = torch.linspace(0, count - 1, min(count, POINTS - 1)).round().long().tolist()
    # Six digits: enough for a plot, and no more than a float32 holds.
    return [(k, float(f"{costs[k]:.6g}")) for k in sorted({*places, min(cut, count - 1)})]
