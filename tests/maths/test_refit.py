"""The shared solutions against plain loops, brute force and least squares, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from streamprune.errors import NumericalError
from streamprune.maths import refit as linalg
from streamprune.maths.refit import cholesky, compensation, fit, output_error, refit, unit_columns


def problem(n: int, d: int = 5, tokens: int = 200, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """W (d, n), correlated inputs X (tokens, n), mean Gram H (n, n)."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, n, generator=generator, dtype=torch.float64) @ mix
    w = torch.randn(d, n, generator=generator, dtype=torch.float64)
    return w, x, x.T @ x / tokens


def damp(h: Tensor, damping: float) -> Tensor:
    return h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)


def test_refit_equals_ridge_regression() -> None:
    w, x, h = problem(12)
    kept = torch.tensor([0, 2, 3, 7, 8, 11])
    fitted, used = refit(w, h, kept, 0.05, "here")
    # min ‖W_K' X_K − W X‖² + ridge·tokens·‖W_K' − W_K‖², as least squares on stacked rows.
    ridge = (0.05 * h.diagonal().mean() * len(x)).sqrt()
    rows = np.vstack([x[:, kept].numpy(), float(ridge) * np.eye(len(kept))])
    targets = np.vstack([(x @ w.T).numpy(), float(ridge) * w[:, kept].T.numpy()])
    expected = np.linalg.lstsq(rows, targets, rcond=None)[0].T
    assert used == 0.05
    np.testing.assert_allclose(fitted.numpy(), expected, rtol=1e-9, atol=1e-10)


def test_refit_is_the_papers_formula() -> None:
    w, _, h = problem(9)
    kept = torch.tensor([1, 2, 4, 5, 8])
    damped = damp(h, 0.01)
    expected = w @ damped[:, kept] @ torch.linalg.inv(damped[kept][:, kept])
    np.testing.assert_allclose(refit(w, h, kept, 0.01, "here")[0].numpy(), expected.numpy(), rtol=1e-9)


def test_compensation_equals_ridge_regression() -> None:
    w, x, _ = problem(10)
    x_hat = x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    tokens = len(x)
    h, c = x_hat.T @ x_hat / tokens, x.T @ x_hat / tokens
    factor = cholesky(h, 0.02, "here")[0]
    fitted = w + w @ compensation(h, c, factor)
    torch.testing.assert_close(fit(w, h, w @ c, factor), fitted)
    ridge = float((0.02 * h.diagonal().mean() * tokens).sqrt())
    # min ‖δW X̂ − W (X − X̂)‖² + ridge·tokens·‖δW‖²
    rows = np.vstack([x_hat.numpy(), ridge * np.eye(10)])
    targets = np.vstack([((x - x_hat) @ w.T).numpy(), np.zeros((10, len(w)))])
    expected = w.numpy() + np.linalg.lstsq(rows, targets, rcond=None)[0].T
    np.testing.assert_allclose(fitted.numpy(), expected, rtol=1e-9, atol=1e-10)
    # And it does what it is for.
    before = ((x_hat - x) @ w.T).square().sum()
    assert float((x_hat @ fitted.T - x @ w.T).square().sum()) < float(before)


@pytest.mark.parametrize("panel", [2, 3, 512])
def test_output_error_is_the_share_of_energy_lost(panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linalg, "PANEL", panel)
    w, x, h = problem(7)
    kept = torch.tensor([0, 1, 4, 6])
    fitted, _ = refit(w, h, kept, 0.01, "here")
    lost = (x[:, kept] @ fitted.T - x @ w.T).square().sum() / (x @ w.T).square().sum()
    assert output_error(w, h, fitted, kept) == pytest.approx(float(lost))


def test_output_error_of_many_rows_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(400, 40, generator=generator, dtype=torch.float64)
    # Rows of very different size: what matters may be one of them.
    w = torch.randn(1000, 40, generator=generator, dtype=torch.float64)
    w *= torch.linspace(-4, 4, 1000, dtype=torch.float64).exp()[:, None]
    h, kept = x.T @ x / 400, torch.arange(0, 40, 2)
    fitted, _ = refit(w, h, kept, 0.01, "here")
    estimated = output_error(w, h, fitted, kept)
    monkeypatch.setattr(linalg, "SKETCH", 1000)
    exact = output_error(w, h, fitted, kept)
    assert estimated != exact
    assert estimated == pytest.approx(exact, rel=0.1)


def test_all_dead_is_no_error() -> None:
    w, h = torch.ones(2, 4), torch.zeros(4, 4)
    assert torch.equal(refit(w, h, torch.tensor([2, 3]), 0.01, "here")[0], w[:, 2:])


def test_duplicate_columns_in_float32_raise_the_damping_and_say_so() -> None:
    x = torch.randn(50, 1).expand(50, 8).contiguous()
    h = x.T @ x / 50
    _, used = cholesky(h, 0.0, "here")
    assert used > 0
    _, used = cholesky(h, 0.01, "here")
    assert used == 0.01


def test_nan_is_an_error_that_names_the_place() -> None:
    h = torch.eye(3)
    h[1, 1] = torch.nan
    with pytest.raises(NumericalError, match=r"blocks\.3\.ffn.*NaN"):
        cholesky(h, 0.01, "blocks.3.ffn")


def test_unit_columns() -> None:
    assert unit_columns(torch.tensor([0, 2]), 3).tolist() == [0, 1, 2, 6, 7, 8]
