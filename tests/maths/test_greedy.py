"""Exact greedy removal against the plain loop, brute force and closed forms, in float64."""

from __future__ import annotations

import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from streamprune.errors import NumericalError, SingularError
from streamprune.maths import greedy, slimgpt, triangular
from streamprune.maths.greedy import greedy_removal, removal, workspace
from streamprune.maths.refit import cholesky, refit, unit_columns
from streamprune.maths.slimgpt import batched_group_removal, dynamic_group_removal


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triangular, "PANEL", 13)
    monkeypatch.setattr(triangular, "TILE", 17)
    monkeypatch.setattr(triangular, "_PRODUCT_ROWS", 7)
    monkeypatch.setattr(triangular, "_COPY_ROWS", 5)


def problem(n: int, d: int = 5, tokens: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    """W (d, n) and the mean Gram H (n, n) of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, n, generator=generator, dtype=torch.float64) @ mix
    w = torch.randn(d, n, generator=generator, dtype=torch.float64)
    return w, x.T @ x / tokens


def inverse(h: Tensor, damping: float = 0.01) -> Tensor:
    return torch.linalg.inv(h + damping * (h.diagonal().mean() or 1.0) * torch.eye(len(h), dtype=h.dtype))


def plain(w: Tensor, h: Tensor, width: int, count: int) -> tuple[list[int], list[float]]:
    """The loop of METHODS.md as written: W and P themselves are updated, in full, at every step."""
    w, p = w * (h.diagonal() > 0), inverse(h)
    left, order, costs = list(range(h.shape[0] // width)), [], []
    for _ in range(count):
        best = None
        for u in left:
            c = slice(u * width, (u + 1) * width)
            cost = float(torch.trace(torch.linalg.inv(p[c, c]) @ w[:, c].T @ w[:, c]))
            if best is None or cost < best[1]:
                best = u, cost
        assert best is not None
        u, cost = best
        c = slice(u * width, (u + 1) * width)
        middle = torch.linalg.inv(p[c, c])
        w = w - w[:, c] @ middle @ p[c]
        p = p - p[:, c] @ middle @ p[c]
        left.remove(u)
        order.append(u)
        costs.append(cost)
    return order, costs


def error(w: Tensor, h: Tensor, gone: Tensor) -> float:
    """err(S) of METHODS: the output energy lost by the best re-fit."""
    return float(torch.trace(w[:, gone] @ torch.linalg.inv(inverse(h)[gone][:, gone]) @ w[:, gone].T))


@pytest.mark.parametrize(
    ("n", "d", "width", "count", "block"),
    [
        (40, 5, 1, 30, 7),
        (40, 60, 1, 39, 64),  # down to one unit, in one block of steps
        (150, 5, 1, 149, 8),  # and in many, with the matrices made smaller in between
        (6, 5, 1, 0, 4),
        (120, 5, 3, 39, 12),
        (96, 60, 4, 23, 4),  # an update a step
        (96, 5, 4, 10, 10),  # a block that units do not divide
        (32, 5, 8, 3, 5),  # and one smaller than a unit
    ],
)
def test_the_order_is_that_of_the_plain_loop(n: int, d: int, width: int, count: int, block: int) -> None:
    w, h = problem(n, d)
    before = w.clone(), h.clone()
    order, costs = greedy_removal(w, h, width=width, count=count, damping=0.01, place="here", block=block)
    expected, expected_costs = plain(w, h, width, count)
    assert order.tolist() == expected
    assert order.dtype == torch.int64
    assert costs.dtype == w.dtype
    np.testing.assert_allclose(costs.numpy(), expected_costs, rtol=1e-8)
    assert torch.equal(w, before[0])
    assert torch.equal(h, before[1])


@pytest.mark.parametrize(("width", "dead"), [(1, [3, 6, 41]), (4, [*range(8, 12), 17, *range(40, 44)])])
def test_dead_columns_cost_nothing_and_go_first(width: int, dead: list[int]) -> None:
    w, h = problem(60)
    h[dead], h[:, dead] = 0, 0
    w[:, dead] = torch.inf
    units = [u for u in range(60 // width) if set(range(u * width, (u + 1) * width)) <= set(dead)]
    count = 60 // width - 3
    order, costs = greedy_removal(w, h, width=width, count=count, damping=0.01, place="here", block=8)
    assert order[: len(units)].tolist() == units
    assert costs[: len(units)].tolist() == [0] * len(units)
    w[:, dead] = 0
    expected, expected_costs = plain(w, h, width, count)
    assert order.tolist() == expected
    np.testing.assert_allclose(costs.numpy(), expected_costs, rtol=1e-8)


@pytest.mark.parametrize("width", [1, 2])
def test_of_equal_costs_the_first_goes(width: int) -> None:
    # Powers of two, without coupling: no rounding, and every step has many ties.
    h = 4 * torch.eye(80, dtype=torch.float64)
    w = torch.ones(4, 80, dtype=torch.float64)
    w[:, 40:60] = 2
    order, costs = greedy_removal(w, h, width=width, count=80 // width - 1, damping=0.0, place="here", block=8)
    units = torch.arange(80).view(-1, width)[:, 0] // width
    cheap = (units * width < 40) | (units * width >= 60)
    assert order.tolist() == (units[cheap].tolist() + units[~cheap].tolist())[:-1]
    assert costs.tolist() == ([16.0 * width] * (60 // width) + [64.0 * width] * (20 // width))[:-1]


@pytest.mark.parametrize("width", [1, 2])
def test_the_first_unit_removed_is_the_best_of_all(width: int) -> None:
    w, h = problem(8)
    order, costs = greedy_removal(w, h, width=width, count=1, damping=0.01, place="here")
    damped = torch.linalg.inv(inverse(h))
    energy = []
    for u in range(8 // width):
        kept = torch.tensor([c for c in range(8) if c // width != u])
        fitted, _ = refit(w, h, kept, 0.01, "here")
        change = w.clone()
        change[:, kept] -= fitted
        energy.append(float((change @ damped * change).sum()))
    assert int(order[0]) == int(np.argmin(energy))
    # The cost is the damped output energy of the best re-fit.
    assert float(costs[0]) == pytest.approx(min(energy), rel=1e-9)


@pytest.mark.parametrize(("width", "count"), [(1, 50), (1, 89), (3, 20), (10, 8)])
def test_costs_add_up_to_the_joint_error(width: int, count: int) -> None:
    w, h = problem(90)
    order, costs = greedy_removal(w, h, width=width, count=count, damping=0.01, place="here", block=8)
    for k in (1, count // 2, count):
        joint = error(w, h, unit_columns(order[:k], width))
        assert float(costs[:k].sum()) == pytest.approx(joint, rel=1e-9)


def test_greedy_is_near_the_best_subset() -> None:
    w, h = problem(8, seed=3)
    every = sorted(error(w, h, torch.tensor(s)) for s in itertools.combinations(range(8), 3))
    order, costs = greedy_removal(w, h, width=1, count=3, damping=0.01, place="here")
    assert error(w, h, order) == pytest.approx(float(costs.sum()))
    assert float(costs.sum()) <= every[len(every) // 10]


@pytest.mark.parametrize("width", [1, 5])
def test_float32_loses_as_little(width: int) -> None:
    w, h = problem(100, d=40, tokens=1000)
    count = 60 // width
    order, costs = greedy_removal(w.float(), h.float(), width=width, count=count, damping=0.01, place="here")
    assert costs.dtype == torch.float32
    joint = error(w, h, unit_columns(order, width))
    assert float(costs.sum()) == pytest.approx(joint, rel=1e-3)
    _, best = greedy_removal(w, h, width=width, count=count, damping=0.01, place="here")
    assert joint == pytest.approx(float(best.sum()), rel=1e-3)


def test_all_dead_is_no_error() -> None:
    w, h = torch.ones(2, 4), torch.zeros(4, 4)
    for width, count in ((1, 2), (2, 1)):
        order, costs = greedy_removal(w, h, width=width, count=count, damping=0.01, place="here")
        assert order.tolist() == list(range(count))
        assert costs.tolist() == [0] * count


@pytest.mark.parametrize("width", [1, 2])
def test_numbers_that_are_none_are_an_error_that_names_the_place(width: int) -> None:
    w, h = problem(8)
    for bad in (torch.nan, torch.inf):
        w[1, 4] = bad
        with pytest.raises(NumericalError, match=r"blocks\.3\.ffn.*NaN or Inf"):
            greedy_removal(w, h, width=width, count=3, damping=0.01, place="blocks.3.ffn")


def peak(work: Callable[[], object]) -> int:
    """Bytes that `work` had allocated at most, above those before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    assert profiler.profiler is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return max(itertools.accumulate(e.nbytes() for e in events))


@pytest.mark.parametrize(("width", "count", "block"), [(1, 299, 16), (4, 70, 16), (75, 3, 16)])
def test_memory_stays_in_the_workspace(width: int, count: int, block: int) -> None:
    w, h = (x.float() for x in problem(300, tokens=400))
    options = {"width": width, "count": count, "block": block}
    held = peak(lambda: greedy_removal(w, h, damping=0.01, place="here", **options)) / 4
    assert 0.75 < held / workspace(300, width, block) < 1.0


@pytest.mark.parametrize("width", [1, 30])
def test_batched_removal_stays_in_the_workspace(width: int) -> None:
    w, h = (x.float() for x in problem(300, d=100, tokens=400))
    given = {"damping": 0.01, "place": "here"}
    if width == 1:
        held = peak(lambda: dynamic_group_removal(w, h, count=200, first=40, **given))
    else:
        held = peak(lambda: batched_group_removal(w, h, width=width, count=8, **given))
    assert 0.6 < held / 4 / slimgpt.workspace(300, 100, 40 if width == 1 else width) < 1.0


class Watch(TorchDispatchMode):
    """The ops that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.ran = Counter[str]()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # A view launches nothing.
        if not any(a.alias_info is not None and not a.alias_info.is_write for a in func._schema.arguments):
            self.ran[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_many_steps_take_few_launches() -> None:
    """At 70B a block takes 37,000 steps."""
    w, h = problem(80)
    p, v = inverse(h).contiguous(), w.T @ w
    with Watch() as watch:
        removal(p, v, width=1, count=64, block=64, place="here")
    assert watch.ran.total() < 64


def test_steps_end_where_a_unit_becomes_cheaper_that_was_no_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greedy, "_CANDIDATES", 1)
    w, h = problem(80, tokens=90)
    settled, real = list[int](), greedy._Columns.settle

    def settle(self: greedy._Columns, late: Tensor, steps: int) -> None:
        settled.append(steps)
        real(self, late, steps)

    monkeypatch.setattr(greedy._Columns, "settle", settle)
    order, _ = greedy_removal(w, h, width=1, count=60, damping=0.01, place="here", block=30)
    assert order.tolist() == plain(w, h, 1, 60)[0]
    assert min(settled) < 30


def test_a_cost_below_zero_is_no_cost() -> None:
    p, v = torch.eye(6, dtype=torch.float64), torch.eye(6, dtype=torch.float64)
    p[2, 2] = -1
    with pytest.raises(SingularError, match="here"):
        removal(p, v, width=1, count=3, block=64, place="here")


@pytest.mark.parametrize("width", [1, 4])
def test_a_factor_that_is_at_hand_changes_no_bit(width: int) -> None:
    w, h = problem(40)
    factor, _ = cholesky(h, 0.01, "here")
    alone, given = (
        greedy_removal(w, h, width=width, count=7, damping=0.01, place="here", factor=f) for f in (None, factor)
    )
    assert torch.equal(alone[0], given[0])
    assert torch.equal(alone[1], given[1])


@pytest.mark.parametrize(
    ("module", "step", "remove"),
    [
        (greedy, "removal", partial(greedy.greedy_removal, width=1, count=3)),
        (slimgpt, "_remove", partial(slimgpt.batched_group_removal, width=2, count=2)),
        (slimgpt, "_remove", partial(slimgpt.dynamic_group_removal, count=3)),
    ],
)
def test_a_failed_attempt_is_freed_before_the_next(
    module: Any, step: str, remove: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    inverse, real, made = module.inverse, getattr(module, step), list[weakref.ref[torch.Tensor]]()

    def inverted(*arguments: Any, **options: Any) -> Any:
        assert all(earlier() is None for earlier in made)
        found = inverse(*arguments, **options)
        made.append(weakref.ref(found[0]))
        return found

    def fails_once(*arguments: Any, **options: Any) -> Any:
        if len(made) == 1:
            raise SingularError("here")
        return real(*arguments, **options)

    monkeypatch.setattr(module, "inverse", inverted)
    monkeypatch.setattr(module, step, fails_once)
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    remove(torch.ones(4, 8, dtype=torch.float64), x.T @ x / 40, damping=0.01, place="here")
    assert len(made) == 2
