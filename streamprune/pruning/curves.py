"""What the units of each site cost, as the recipe weighed them: a few points a site, for people to see.

A survey's findings go with the job; these points stay, in a file of their own beside the report.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..model.site import Site
from ..recipes.plan import Plan
from ..recipes.recipe import Curve, Survey
from ..system import files

FORMAT = "streamprune-curves-1"
POINTS = 64
"""At most, of a site."""


def write_curves(
    path: Path, curve: Curve, sites: Sequence[Site], survey: Survey, plan: Plan, dense: Mapping[str, int]
) -> str:
    """Write ``{"format", "label", "sites": {name: [[gone, cost], ...]}}``: with `gone` units away, the next costs that.

    Args:
        sites: those that were weighed, as the survey found them.
        dense: units by site name before any went, in earlier shots too.

    Returns:
        The file's digest.
    """
    lines = []
    for site in sites:
        costs = curve.values(site, survey[site.name])
        if costs is not None and len(costs):
            points = sample(costs.double().cpu(), site.units - plan[site.name].keep)
            gone = dense[site.name] - site.units
            lines.append(f"    {json.dumps(site.name)}: {json.dumps([[gone + k, cost] for k, cost in points])}")
    body = ",\n".join(lines)
    head = f'  "format": {json.dumps(FORMAT)},\n  "label": {json.dumps(curve.label)}'
    return files.write_text(path, f'{{\n{head},\n  "sites": {{\n{body}\n  }}\n}}\n')


def sample(costs: Tensor, cut: int) -> list[tuple[int, float]]:
    """At most `POINTS` of a curve, evenly spaced, its ends among them and where it was cut.

    Args:
        costs: (units,), not empty.
        cut: units that went; the point is that of the first which stays.
    """
    count = len(costs)
    places = torch.linspace(0, count - 1, min(count, POINTS - 1)).round().long().tolist()
    # Six digits: as many as anyone sees, and no more than a float32 holds.
    return [(k, float(f"{costs[k]:.6g}")) for k in sorted({*places, min(cut, count - 1)})]
