"""Kronecker-factored costs and updates against the full matrix F = G ⊗ A, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from streamprune.errors import ConfigError, NumericalError
from streamprune.maths import kfac
from streamprune.maths.refit import inverse

R, C = 5, 8


def gram(n: int, generator: torch.Generator, samples: int = 40) -> Tensor:
    mix = torch.randn(n, n, generator=generator, dtype=torch.float64)
    x = torch.randn(samples, n, generator=generator, dtype=torch.float64) @ mix
    return x.T @ x / samples


def problem(seed: int = 0, rows: int = R, columns: int = C) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """W (R, C), damped G (R, R) and A (C, C), and their inverses."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    g = kfac.damped(gram(rows, generator), 0.01)
    a = kfac.damped(gram(columns, generator), 0.01)
    return w, g, a, torch.linalg.inv(g), torch.linalg.inv(a)


def random_mask(share: float, seed: int = 1, rows: int = R, columns: int = C) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < share


def selector(mask: Tensor) -> Tensor:
    """E_K (K, R·C)."""
    return torch.eye(mask.numel(), dtype=torch.float64)[mask.flatten()]


def cost(w: Tensor, g: Tensor, a: Tensor, mask: Tensor) -> float:
    """Eq. 7 as it stands."""
    e, f = selector(mask), torch.kron(g, a)
    theta = e @ w.flatten()
    return float(theta @ torch.linalg.inv(e @ torch.linalg.inv(f) @ e.T) @ theta / 2)


def optimum(w: Tensor, g: Tensor, a: Tensor, mask: Tensor) -> Tensor:
    """argmin ½ δᵀ F δ with (θ + δ)_K = 0, from its KKT system: no inverse in it."""
    e, f = selector(mask), torch.kron(g, a)
    zero = torch.zeros(len(e), len(e), dtype=torch.float64)
    kkt = torch.cat([torch.cat([f, e.T], dim=1), torch.cat([e, zero], dim=1)])
    right = torch.cat([torch.zeros(w.numel(), dtype=torch.float64), -e @ w.flatten()])
    change = torch.linalg.solve(kkt, right)[: w.numel()]
    return w + change.view_as(w)


def marked(rows: list[int], columns: list[int]) -> Tensor:
    mask = torch.zeros(R, C, dtype=torch.bool)
    mask[rows] = True
    mask[:, columns] = True
    return mask


def test_costs_are_those_of_the_full_curvature() -> None:
    w, g, a, g_inverse, a_inverse = problem()
    by_row = [cost(w, g, a, marked([r], [])) for r in range(R)]
    by_column = [cost(w, g, a, marked([], [c])) for c in range(C)]
    by_element = [[cost(w, g, a, marked([r], []) & marked([], [c])) for c in range(C)] for r in range(R)]
    np.testing.assert_allclose(kfac.row_costs(w, a, g_inverse).numpy(), by_row, rtol=1e-9)
    np.testing.assert_allclose(kfac.column_costs(w, g, a_inverse).numpy(), by_column, rtol=1e-9)
    np.testing.assert_allclose(kfac.element_costs(w, g_inverse, a_inverse).numpy(), by_element, rtol=1e-9)


def test_columns_of_a_group_cost_what_they_do_together() -> None:
    w, g, a, _, a_inverse = problem()
    w, a_inverse = w[:, :6], torch.linalg.inv(a[:6, :6])
    together = [cost(w, g, a[:6, :6], marked([], [c, c + 1])[:, :6]) for c in (0, 2, 4)]
    np.testing.assert_allclose(kfac.group_costs(w, g, a_inverse, 3).numpy(), together, rtol=1e-9)
    torch.testing.assert_close(kfac.group_costs(w, g, a_inverse, 6), kfac.column_costs(w, g, a_inverse))


@pytest.mark.parametrize("removed", [[3], [6, 0, 3], list(range(C)), []])
def test_columns_removed_jointly_are_the_constrained_optimum(removed: list[int]) -> None:
    w, g, a, _, a_inverse = problem()
    result, _ = kfac.remove_columns(w, a_inverse, torch.tensor(removed, dtype=torch.int64), "here")
    torch.testing.assert_close(result, optimum(w, g, a, marked([], removed)))
    assert torch.equal(result == 0, marked([], removed))


@pytest.mark.parametrize("removed", [[3], [4, 0], list(range(R)), []])
def test_rows_removed_jointly_are_the_constrained_optimum(removed: list[int]) -> None:
    w, g, a, g_inverse, _ = problem()
    result, _ = kfac.remove_columns(w.T, g_inverse, torch.tensor(removed, dtype=torch.int64), "here")
    torch.testing.assert_close(result.T, optimum(w, g, a, marked(removed, [])))
    assert torch.equal(result.T == 0, marked(removed, []))


@pytest.mark.parametrize("at_most", [13, 10**9])
def test_elements_removed_jointly_are_the_constrained_optimum(at_most: int) -> None:
    w, g, a, g_inverse, a_inverse = problem()
    before = w.clone()
    mask = random_mask(0.4)
    assert int(mask.sum()) == 13
    result, _ = kfac.remove_elements(w, g_inverse, a_inverse, mask, at_most=at_most, place="here")
    torch.testing.assert_close(result, optimum(w, g, a, mask))
    assert torch.equal(result == 0, mask)
    assert not bool((result == w)[~mask].any())
    assert torch.equal(w, before)


@pytest.mark.parametrize("batch_bytes", [1, 3 * 5 * 5 * 8 * 2, 64 << 20])
@pytest.mark.parametrize("at_most", [1, 5, 6])
def test_subsets_are_solved_alone_and_added_up(at_most: int, batch_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kfac, "_BATCH_BYTES", batch_bytes)
    w, g, a, g_inverse, a_inverse = problem()
    mask = random_mask(0.4)
    expected = w.clone()
    for subset in mask.flatten().nonzero()[:, 0].split(at_most):
        alone = torch.zeros(R * C, dtype=torch.bool).index_fill_(0, subset, True).view(R, C)
        expected += optimum(w, g, a, alone) - w
    expected[mask] = 0
    result, _ = kfac.remove_elements(w, g_inverse, a_inverse, mask, at_most=at_most, place="here")
    torch.testing.assert_close(result, expected)
    assert torch.equal(result == 0, mask)


def test_more_correlation_costs_less() -> None:
    w, g, a, g_inverse, a_inverse = problem(rows=12, columns=16)
    mask = random_mask(0.5, rows=12, columns=16)
    losses = []
    for at_most in (1, 8, 32, 192):
        change = kfac.remove_elements(w, g_inverse, a_inverse, mask, at_most=at_most, place="here")[0] - w
        losses.append(float((g @ change @ a * change).sum()) / 2)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == pytest.approx(cost(w, g, a, mask))


def test_no_elements_and_all_elements() -> None:
    w, _, _, g_inverse, a_inverse = problem()
    nothing, everything = torch.zeros(R, C, dtype=torch.bool), torch.ones(R, C, dtype=torch.bool)
    torch.testing.assert_close(kfac.remove_elements(w, g_inverse, a_inverse, nothing, at_most=4, place="here")[0], w)
    assert not bool(kfac.remove_elements(w, g_inverse, a_inverse, everything, at_most=7, place="here")[0].any())


def test_float32_goes_the_same_way_with_entries_of_very_different_size() -> None:
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(24, 48, generator=generator, dtype=torch.float64)
    sizes = 10 ** torch.linspace(-2, 2, 48, dtype=torch.float64)
    # Fewer samples than columns: the damping alone makes it invertible.
    a = kfac.damped(gram(48, generator, samples=20) * sizes[:, None] * sizes, 0.01)
    g = kfac.damped(gram(24, generator, samples=10), 0.01)
    mask = random_mask(0.5, rows=24, columns=48)
    results = []
    for dtype in (torch.float64, torch.float32):
        g_inverse, a_inverse = (inverse(h.to(dtype), 0.0, "here")[0] for h in (g, a))
        results.append(kfac.remove_elements(w.to(dtype), g_inverse, a_inverse, mask, at_most=300, place="here")[0])
    losses = [float((g @ change @ a * change).sum()) / 2 for change in (result.double() - w for result in results)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_singular_blocks_take_a_ridge() -> None:
    w = torch.tensor([[1.0, 1.0, 1.0]])
    a_inverse = torch.tensor([[1.0, 1.0, 0.5], [1.0, 1.0, 0.5], [0.5, 0.5, 1.0]])
    mask = torch.tensor([[True, True, False]])
    result, ridge = kfac.remove_elements(w, torch.ones(1, 1), a_inverse, mask, at_most=2, place="here")
    assert 0 < ridge < 1e-4
    torch.testing.assert_close(result, torch.tensor([[0.0, 0.0, 0.5]]), rtol=1e-3, atol=1e-3)
    result, ridge = kfac.remove_columns(w, a_inverse, torch.tensor([0, 1]), "here")
    assert 0 < ridge < 1e-4
    torch.testing.assert_close(result, torch.tensor([[0.0, 0.0, 0.5]]), rtol=1e-3, atol=1e-3)


def test_the_ridge_is_relative_to_each_element() -> None:
    # Two equal columns, and two far smaller ones of which one stays.
    a_inverse = torch.tensor([[1e6, 1e6, 0, 0], [1e6, 1e6, 0, 0], [0, 0, 1e-3, 5e-4], [0, 0, 5e-4, 1e-3]])
    mask = torch.tensor([[True, True, True, False]])
    result, _ = kfac.remove_elements(torch.ones(1, 4), torch.ones(1, 1), a_inverse, mask, at_most=3, place="here")
    torch.testing.assert_close(result, torch.tensor([[0.0, 0.0, 0.0, 0.5]]), rtol=1e-3, atol=1e-3)


def test_inverse_is_that_of_the_damped_matrix_and_says_what_it_took() -> None:
    h = gram(6, torch.Generator().manual_seed(5))
    p, used = inverse(h, 0.05, "here")
    assert used == 0.05
    damped = h + 0.05 * h.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(kfac.damped(h, 0.05), damped)
    torch.testing.assert_close(p @ damped, torch.eye(6, dtype=torch.float64))
    nothing = torch.zeros(3, 3)
    torch.testing.assert_close(inverse(nothing, 0.1, "here")[0] @ kfac.damped(nothing, 0.1), torch.eye(3))
    p, used = inverse(torch.ones(4, 4), 0.0, "here")
    assert used > 0
    assert bool(torch.isfinite(p).all())


def test_nan_is_an_error_that_names_the_place() -> None:
    bad = torch.full((3, 3), torch.nan)
    with pytest.raises(NumericalError, match=r"blocks\.2\.ffn.*NaN"):
        inverse(bad, 0.01, "blocks.2.ffn")
    mask = torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(NumericalError, match=r"blocks\.2\.ffn.*NaN"):
        kfac.remove_elements(torch.ones(1, 3), torch.ones(1, 1), bad, mask, at_most=3, place="blocks.2.ffn")
    with pytest.raises(NumericalError, match=r"blocks\.2\.ffn.*NaN"):
        kfac.remove_columns(torch.ones(1, 3), bad, torch.tensor([1]), "blocks.2.ffn")


@pytest.mark.parametrize(("m", "n"), [(2, 4), (1, 4), (3, 8), (1, 2)])
def test_patterns_take_the_cheapest_of_every_group(m: int, n: int) -> None:
    costs = torch.rand(5, 16, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    mask = kfac.pattern_mask(costs, m, n)
    sums = kfac.pattern_costs(costs, m, n)
    assert mask.shape == (5, 16)
    assert sums.shape == (5, 16 // n)
    for r in range(5):
        for group in range(16 // n):
            columns = slice(group * n, (group + 1) * n)
            cheapest = sorted(costs[r, columns].tolist())[:m]
            assert sorted(costs[r, columns][mask[r, columns]].tolist()) == cheapest
            assert float(sums[r, group]) == pytest.approx(sum(cheapest))


def test_of_equal_costs_the_first_go() -> None:
    mask = kfac.pattern_mask(torch.zeros(2, 64), 16, 32)
    assert torch.equal(mask, (torch.arange(64) % 32 < 16).expand(2, 64))


def test_columns_that_a_pattern_does_not_divide_are_refused() -> None:
    for function in (kfac.pattern_mask, kfac.pattern_costs):
        with pytest.raises(ConfigError, match=r"pattern 2:4 needs a multiple of 4 columns; a weight has 10"):
            function(torch.zeros(3, 10), 2, 4)
