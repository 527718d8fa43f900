"""Batched greedy pruning against plain float64 loops, and against the exact greedy removal."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from streamprune.errors import NumericalError
from streamprune.maths.greedy import greedy_removal
from streamprune.maths.refit import cholesky_blocks, unit_columns
from streamprune.maths.slimgpt import batched_group_removal, dynamic_group_removal


def problem(n: int, d: int = 5, seed: int = 0, decay: float = 0.0) -> tuple[Tensor, Tensor]:
    """W (d, n) and a mean Gram H (n, n) of correlated inputs; the `decay` of its spectrum."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=generator, dtype=torch.float64)
    mix *= torch.arange(1, n + 1)[:, None] ** -decay
    x = torch.randn(10 * n, n, generator=generator, dtype=torch.float64) @ mix
    w = torch.randn(d, n, generator=generator, dtype=torch.float64)
    return w, x.T @ x / len(x)


def inverse(h: Tensor, damping: float) -> Tensor:
    return torch.linalg.inv(h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype))


def error(w: Tensor, h: Tensor, gone: Tensor, damping: float) -> float:
    """err(S) of METHODS: the output energy lost by the best re-fit."""
    p = inverse(h, damping)[gone][:, gone]
    return float(torch.trace(w[:, gone] @ torch.linalg.inv(p) @ w[:, gone].T))


def updated(w: Tensor, p: Tensor, gone: list[int]) -> tuple[Tensor, Tensor]:
    """The OBS block formula as written, full size."""
    middle = torch.linalg.inv(p[gone][:, gone])
    return w - w[:, gone] @ middle @ p[gone], p - p[:, gone] @ middle @ p[gone]


def plain_heads(w: Tensor, h: Tensor, width: int, count: int, damping: float) -> list[int]:
    """One column after another inside a head: its P is updated, its W is not."""
    p = inverse(h, damping)
    left, order = list(range(h.shape[0] // width)), []
    for _ in range(count):
        estimates = []
        for u in left:
            inner, estimate = p.clone(), 0.0
            for j in range(u * width, (u + 1) * width):
                estimate += float(w[:, j].square().sum() / inner[j, j])
                inner = inner - torch.outer(inner[:, j], inner[j]) / inner[j, j]
            estimates.append(estimate)
        u = left.pop(int(np.argmin(estimates)))
        order.append(u)
        w, p = updated(w, p, list(range(u * width, (u + 1) * width)))
    return order


def plain_columns(w: Tensor, h: Tensor, sizes: list[int], damping: float) -> list[int]:
    p = inverse(h, damping)
    left, order = list(range(h.shape[0])), []
    for size in sizes:
        estimates = {j: float(w[:, j].square().sum() / p[j, j]) for j in left}
        group = sorted(left, key=lambda j: estimates[j])[:size]
        order += group
        left = [j for j in left if j not in group]
        w, p = updated(w, p, group)
    return order


@pytest.mark.parametrize(("n", "d", "width", "count"), [(48, 5, 4, 9), (40, 60, 8, 4), (24, 5, 1, 20), (12, 3, 4, 0)])
def test_heads_equal_the_plain_loop(n: int, d: int, width: int, count: int) -> None:
    w, h = problem(n, d)
    before = w.clone(), h.clone()
    order, energies = batched_group_removal(w, h, width=width, count=count, damping=0.01, place="here")
    assert order.tolist() == plain_heads(w, h, width, count, 0.01)
    assert torch.equal(w, before[0])
    assert torch.equal(h, before[1])
    assert energies.shape == (count,)
    for k in range(1, count + 1):
        gone = unit_columns(order[:k], width)
        assert float(energies[:k].sum()) == pytest.approx(error(w, h, gone, 0.01), rel=1e-9)


@pytest.mark.parametrize(
    ("n", "d", "count", "first", "last", "sizes"),
    [
        # Half of what is to go, in multiples of `last`, from `first` down to `last`; then the rest.
        (60, 5, 50, 12, 4, [12, 12, 12, 4, 4, 4, 2]),
        (60, 70, 50, 1024, 8, [24, 8, 8, 8, 2]),
        (40, 5, 3, 1024, 8, [3]),
        (20, 5, 6, 1, 1, [1] * 6),
        (20, 5, 0, 1024, 8, []),
    ],
)
def test_columns_equal_the_plain_loop(n: int, d: int, count: int, first: int, last: int, sizes: list[int]) -> None:
    w, h = problem(n, d)
    order, energies = dynamic_group_removal(w, h, count=count, damping=0.01, place="here", first=first, last=last)
    assert sum(sizes) == count
    assert order.tolist() == plain_columns(w, h, sizes, 0.01)
    assert energies.shape == (count,)
    for k in np.cumsum(sizes):
        assert float(energies[:k].sum()) == pytest.approx(error(w, h, order[:k], 0.01), rel=1e-9)


def test_groups_of_one_are_the_exact_greedy_removal() -> None:
    w, h = problem(50)
    expected, costs = greedy_removal(w, h, width=1, count=30, damping=0.01, place="here")
    order, energies = dynamic_group_removal(w, h, count=30, damping=0.01, place="here", first=1, last=1)
    assert torch.equal(order, expected)
    torch.testing.assert_close(energies, costs)
    order, energies = batched_group_removal(w, h, width=1, count=30, damping=0.01, place="here")
    assert torch.equal(order, expected)
    torch.testing.assert_close(energies, costs)


def test_heads_come_close_to_the_exact_greedy_removal() -> None:
    shared, ratios, by_chance = [], [], []
    for seed in range(8):
        w, h = problem(16 * 8, d=64, seed=seed, decay=0.5)
        exact, _ = greedy_removal(w, h, width=8, count=6, damping=0.01, place="here")
        order, _ = batched_group_removal(w, h, width=8, count=6, damping=0.01, place="here")
        best, reached, first_six = (error(w, h, unit_columns(s, 8), 0.01) for s in (exact, order, torch.arange(6)))
        shared.append(len(set(order.tolist()) & set(exact.tolist())) / 6)
        ratios.append(reached / best)
        by_chance.append(first_six / best)
    # Seen: 0.60 shared (0.38 by chance), error 1.011 times the exact one's (1.13 by chance).
    assert np.mean(shared) > 0.5
    assert np.mean(ratios) < 1.02
    assert np.mean(by_chance) > 1.1


def test_columns_come_close_to_the_exact_greedy_removal() -> None:
    shared, ratios, at_once = [], [], []
    for seed in range(4):
        w, h = problem(240, d=64, seed=seed, decay=0.5)
        exact, _ = greedy_removal(w, h, width=1, count=120, damping=0.01, place="here")
        order, _ = dynamic_group_removal(w, h, count=120, damping=0.01, place="here")
        one_group, _ = dynamic_group_removal(w, h, count=120, damping=0.01, place="here", last=120)
        best, reached, single = (error(w, h, s, 0.01) for s in (exact, order, one_group))
        shared.append(len(set(order.tolist()) & set(exact.tolist())) / 120)
        ratios.append(reached / best)
        at_once.append(single / best)
    # Seen: 0.77 shared (0.5 by chance), error 1.02 times the exact one's; 1.13 with one group.
    assert np.mean(shared) > 0.7
    assert np.mean(ratios) < 1.03
    assert np.mean(at_once) > 1.1


def test_float32_goes_the_same_way() -> None:
    w, h = problem(128, d=40, decay=0.5)
    for width, count in ((1, 60), (16, 3)):
        if width == 1:
            order, energies = dynamic_group_removal(w.float(), h.float(), count=count, damping=0.01, place="here")
        else:
            order, energies = batched_group_removal(
                w.float(), h.float(), width=width, count=count, damping=0.01, place="here"
            )
        assert energies.dtype == torch.float32
        assert float(energies.sum()) == pytest.approx(error(w, h, unit_columns(order, width), 0.01), rel=1e-3)


def test_dead_columns_cost_nothing_and_go_first() -> None:
    w, h = problem(40)
    dead = [4, 5, 6, 7, 30]
    h[dead], h[:, dead] = 0, 0
    w[:, dead] *= 1000
    order, energies = dynamic_group_removal(w, h, count=16, damping=0.01, place="here", last=2)
    assert order[:5].tolist() == dead
    assert energies[:5].tolist() == [0] * 5
    order, energies = batched_group_removal(w, h, width=4, count=3, damping=0.01, place="here")
    assert int(order[0]) == 1
    assert float(energies[0]) == 0


def test_all_dead_is_no_error() -> None:
    w, h = torch.ones(2, 6), torch.zeros(6, 6)
    order, energies = dynamic_group_removal(w, h, count=4, damping=0.01, place="here", last=2)
    assert order.tolist() == [0, 1, 2, 3]
    assert energies.tolist() == [0] * 4
    assert batched_group_removal(w, h, width=2, count=2, damping=0.01, place="here")[0].tolist() == [0, 1]


def test_a_block_that_cannot_be_factored_takes_a_ridge_and_leaves_the_others_alone() -> None:
    good = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    singular = torch.tensor([[1.0, 1.0], [1.0, 1.0]]) - 1e-6 * torch.eye(2)
    factors, ridge = cholesky_blocks(torch.stack([good, singular, good]), "here")
    assert 0 < ridge < 1e-4
    assert torch.equal(factors[0], torch.linalg.cholesky(good))
    assert torch.equal(factors[2], factors[0])
    torch.testing.assert_close(factors[1] @ factors[1].T, singular, rtol=1e-4, atol=1e-4)


def test_nan_is_an_error_that_names_the_place() -> None:
    h = torch.eye(4)
    h[1, 1] = torch.nan
    with pytest.raises(NumericalError, match=r"blocks\.3\.ffn.*NaN"):
        dynamic_group_removal(torch.ones(2, 4), h, count=2, damping=0.01, place="blocks.3.ffn")
    with pytest.raises(NumericalError, match=r"blocks\.3\.attention.*NaN"):
        batched_group_removal(torch.ones(2, 4), h, width=2, count=1, damping=0.01, place="blocks.3.attention")
