"""Costs of experts: the second-order loss of the whole layer, whatever share of the tokens reaches the expert."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from streamprune.maths.sums import Origin, SiteStatistics
from streamprune.model.site import Site
from streamprune.recipes.default import Default
from streamprune.recipes.recipe import Surveyed
from streamprune.recipes.settings import DefaultSettings, SurgeonSettings
from streamprune.recipes.surgeon import Surgeon

F = torch.float64
D, N = 3, 4  # residual width; columns of the expert's consumer, in two units


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=F)


Z, X, G, P = normal(6, N), normal(6, D), normal(5, D), normal(5, N)
ROWS = len(Z) * len(G)
W, PRODUCER = normal(D, N), normal(N, D)


def pairs(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Every row of one with every row of the other: inputs and gradients are then independent, as K-FAC assumes."""
    return left.repeat_interleave(len(right), 0), right.repeat(len(left), 1)


def surveyed(recipe: Any, share: int) -> Surveyed:
    """An expert that one token in `share` reaches."""
    site = Site(block=0, kind="ffn", units=2, width=2, outputs=D, unit_parameters=1, linears=(N * D, N * D), expert=0)
    sums = SiteStatistics(
        recipe.statistics, units=2, width=2, heads=0, inputs=D, outputs=D, rows=[N], device=torch.device("cpu"), dtype=F
    )
    (z, g), (x, p) = pairs(Z, G), pairs(X, P)
    origin = Origin(torch.zeros(ROWS, dtype=torch.int64), 1, ROWS * share)
    sums.add(x, z, None, origin)
    sums.add_gradients(z, z, g, [p], 1.0, origin)
    return Surveyed(site=site, w=W, read_producers=lambda: (PRODUCER,), statistics=sums)


def least_loss(w: Tensor, removed: list[int], x: Tensor, g: Tensor, tokens: int) -> float:
    """``min ½ Σ_t (gᵀ δ x)² / tokens`` over all changes δ of `w` (rows, columns) that remove some columns, by least squares."""
    kept = [column for column in range(w.shape[1]) if column not in removed]
    x, g = pairs(x, g)
    terms = torch.einsum("tr,tc->trc", g, x)
    lost = (terms * w)[:, :, removed].sum((1, 2))
    design = terms[:, :, kept].flatten(1)
    change = torch.linalg.lstsq(design, lost[:, None], driver="gelsd").solution
    return float((design @ change - lost[:, None]).square().sum() / (2 * tokens))


@pytest.mark.parametrize("share", [1, 2, 4, 8, 16, 32, 64])
def test_the_cost_of_an_experts_unit_is_the_layers_second_order_loss(share: int) -> None:
    units, tokens = ([0, 1], [2, 3]), ROWS * share
    consumer = [least_loss(W, unit, Z, G, tokens) for unit in units]
    producer = [least_loss(PRODUCER.T, unit, P, X, tokens) for unit in units]
    default = Default(DefaultSettings(damping=0.0))
    found = default.digest(surveyed(default, share))["costs"]
    torch.testing.assert_close(float(found[0]), min(consumer), rtol=1e-5, atol=0)  # G has a ridge of 1e-6
    surgeon = Surgeon(SurgeonSettings(damping=0.0))
    costs = surgeon.digest(surveyed(surgeon, share))["costs"].tolist()
    assert costs == pytest.approx([c + p for c, p in zip(consumer, producer, strict=True)], rel=1e-9)


def test_an_expert_that_no_token_reaches_costs_nothing() -> None:
    recipe = Default(DefaultSettings())
    given = surveyed(recipe, 1)
    empty = SiteStatistics(
        recipe.statistics or frozenset(),
        units=2, width=2, heads=0, inputs=D, outputs=D, rows=[N], device=torch.device("cpu"), dtype=F,
    )  # fmt: skip
    nothing = Surveyed(site=given.site, w=W, read_producers=given.read_producers, statistics=empty)
    assert recipe.digest(nothing)["costs"].tolist() == [0.0, 0.0]
