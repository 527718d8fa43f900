"""Factorisations in place: against LAPACK, with panels and tiles that do not divide the size."""

from __future__ import annotations

import pytest
import torch

from streamprune.maths import triangular


@pytest.fixture(autouse=True)
def small_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triangular, "PANEL", 7)
    monkeypatch.setattr(triangular, "TILE", 17)


def positive(n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, n + 3, generator=generator, dtype=torch.float64)
    return x @ x.T / n + 0.1 * torch.eye(n, dtype=torch.float64)


@pytest.mark.parametrize("n", [1, 7, 8, 51])
def test_factor_and_inverse_equal_lapack(n: int) -> None:
    h = positive(n)
    factor = h.clone()
    assert triangular.cholesky_(factor)
    torch.testing.assert_close(factor, torch.linalg.cholesky(h), rtol=1e-10, atol=1e-12)
    memory = factor.data_ptr()
    p = triangular.invert_(factor)
    assert p.data_ptr() == memory
    torch.testing.assert_close(p, torch.linalg.inv(h), rtol=1e-9, atol=1e-11)
    assert torch.equal(p, p.T)


def test_only_the_lower_triangle_is_read() -> None:
    h = positive(30)
    factor = h.tril() + torch.full_like(h, torch.nan).triu(1)
    assert triangular.cholesky_(factor)
    torch.testing.assert_close(factor, torch.linalg.cholesky(h))


@pytest.mark.parametrize("place", [0, 12, 29])
def test_what_is_not_positive_definite_is_told(place: int) -> None:
    h = positive(30)
    h[place, place] = -1.0
    assert not triangular.cholesky_(h)


def test_panels_cover_everything_once() -> None:
    assert [list(range(10))[each] for each in triangular.panels(10, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert triangular.panels(0, 4) == []


@pytest.mark.parametrize("columns", [1, 20])
def test_solving_in_place(columns: int) -> None:
    h, b = positive(30), torch.randn(30, columns, dtype=torch.float64)
    expected = torch.linalg.solve(h, b)
    solved = triangular.solve_(torch.linalg.cholesky(h), b)
    assert solved is b
    torch.testing.assert_close(b, expected)
