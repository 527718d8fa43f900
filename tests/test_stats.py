"""Running sums: micro-batches, halves and files change nothing."""

from __future__ import annotations

import torch

from streamprune.maths.stats import Gram, MaskGradient

CPU = torch.device("cpu")


def test_gram_is_the_mean_outer_product_however_it_is_fed() -> None:
    generator = torch.Generator().manual_seed(0)
    x_hat, x = (torch.randn(6, 5, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    first, second = (Gram(4, cross=4, device=CPU, dtype=torch.float64) for _ in range(2))
    first.add(x_hat[:1], x[:1])
    first.add(x_hat[1:4], x[1:4])
    second.add(x_hat[4:], x[4:])
    first.merge(second)
    h, c = first.mean()
    assert c is not None
    flat_hat, flat = x_hat.reshape(30, 4), x.reshape(30, 4)
    torch.testing.assert_close(h, flat_hat.T @ flat_hat / 30)
    # C = X X̂ᵀ: rows belong to the dense stream.
    torch.testing.assert_close(c, flat.T @ flat_hat / 30)


def test_half_inputs_are_summed_in_float32() -> None:
    sums = Gram(1, device=CPU, dtype=torch.float32)
    for _ in range(40):
        sums.add(torch.full((1, 100, 1), 8.0, dtype=torch.float16))
    # 40 · 100 · 64 does not fit float16.
    assert float(sums.h) == 256000.0


def test_mask_gradients_are_squared_and_taken_absolute_per_sequence() -> None:
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]], [[1.0, 1.0, 1.0, 1.0]]])
    gradient = torch.tensor([[[1.0, 1.0, 1.0, -1.0]], [[-2.0, 0.0, 0.0, 2.0]]])
    stats = MaskGradient(units=2, width=2)
    stats.add(x, gradient, scale=2.0)
    # Sequence 1: g = (3, -1) / 2; sequence 2: (-2, 2) / 2.
    assert stats.squares.tolist() == [2.25 + 1, 0.25 + 1]
    assert stats.magnitudes.tolist() == [1.5 + 1, 0.5 + 1]
    other = MaskGradient(units=2, width=2)
    other.add(x, gradient, scale=2.0)
    other.merge(stats)
    assert other.sequences == 4
    assert other.squares.tolist() == [6.5, 2.5]
