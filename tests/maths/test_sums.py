"""Running sums: micro-batches, halves and files change nothing."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from streamprune.maths import sums as stats
from streamprune.maths.flops import FlopCounter
from streamprune.maths.sums import PANEL, Gram, MaskGradient, TokenSample
from streamprune.pruning.experts import positions

CPU = torch.device("cpu")


def test_gram_is_the_mean_outer_product_however_it_is_fed() -> None:
    generator = torch.Generator().manual_seed(0)
    x_hat, x = (torch.randn(6, 5, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    sums = Gram(4, cross=4, device=CPU, dtype=torch.float64)
    sums.add(x_hat[:1], x[:1])
    sums.add(x_hat[1:4], x[1:4])
    sums.add(x_hat[4:], x[4:])
    h, c = sums.mean("here")
    assert c is not None
    flat_hat, flat = x_hat.reshape(30, 4), x.reshape(30, 4)
    torch.testing.assert_close(h, flat_hat.T @ flat_hat / 30)
    # C = X X̂ᵀ: rows belong to the dense stream.
    torch.testing.assert_close(c, flat.T @ flat_hat / 30)


def test_half_of_a_wide_gram_is_summed_and_all_of_it_is_there() -> None:
    n, generator = 2 * PANEL["cpu"] + 5, torch.Generator().manual_seed(0)
    x, y = (torch.randn(7, 9, size, generator=generator, dtype=torch.float64) for size in (n, 3))
    sums, single = Gram(n, cross=3, device=CPU, dtype=torch.float64), Gram(n, device=CPU, dtype=torch.float32)
    for rows in (slice(0, 4), slice(4, 7)):
        sums.add(x[rows], y[rows])
        single.add(x[rows])
    for h in (sums.mean("here")[0], single.mean("here")[0]):
        assert torch.equal(h, h.T)
        torch.testing.assert_close(h.double(), x.flatten(0, 1).T @ x.flatten(0, 1) / 63, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sums.h, x.flatten(0, 1).T @ x.flatten(0, 1) / 63)
    mean = single.h.clone()
    assert torch.equal(single.mean("here")[0], mean)  # a second call changes nothing


def test_sums_say_what_they_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    n, panel, rows = 2 * PANEL["cpu"] + 5, PANEL["cpu"], 20
    x, y = torch.ones(4, 5, n), torch.ones(4, 5, 3)

    def fed() -> dict[Any, int]:
        sums = Gram(n, cross=3, device=CPU, dtype=torch.float32)
        with FlopCounter() as counter:
            sums.add(x, y)
        return dict(counter.kinds)

    stated = fed()
    monkeypatch.setattr(stats, "counted", lambda operations: nullcontext())
    assert fed() == stated
    # Panels down to the diagonal, and the cross sum whole.
    assert stated["sums"] == sum(stated.values()) == 2 * rows * (panel * panel + panel * 2 * panel + 5 * n + 3 * n)


def test_where_the_device_can_halves_are_multiplied_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 50, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = torch.randn(1, 50, 4).bfloat16()
    real, seen = torch.mm, []

    def mm(left: Tensor, right: Tensor, *, out_dtype: torch.dtype) -> Tensor:
        """What CUDA does: exact products, sums in `out_dtype`."""
        seen.append((left.dtype, right.dtype))
        return real(left.to(out_dtype), right.to(out_dtype))

    def fed() -> tuple[Tensor, Tensor | None]:
        sums = Gram(300, cross=4, device=CPU, dtype=torch.float32)
        sums.add(x, y)
        sums.add(x, y)
        return sums.mean("here")

    converted = fed()
    assert not stats._multiplies_halves(CPU, torch.bfloat16)
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(stats, "_multiplies_halves", lambda device, dtype: True)
    for found, expected in zip(fed(), converted, strict=True):
        torch.testing.assert_close(found, expected)
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    assert len(seen) == 2 * (2 + 1)


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
    assert stats.signed.tolist() == [1.5 - 1, -0.5 + 1]
    stats.add(x, gradient, scale=2.0)
    assert stats.sequences == 4
    assert stats.squares.tolist() == [6.5, 2.5]


def test_a_sample_has_the_tokens_of_all_workers_in_order() -> None:
    x, g = (torch.randn(7, 5, width, generator=torch.Generator().manual_seed(width)) for width in (3, 2))
    positions = torch.tensor([(0, 4), (2, 0), (2, 3), (3, 1), (4, 2), (6, 0)])
    whole = torch.zeros(len(positions), 3)
    for first, last, size in ((0, 3, 2), (3, 7, 3)):
        own = TokenSample(positions, first=first, width=3, outputs=2, device=CPU, dtype=torch.bfloat16)
        for start in range(first, last, size):
            batch = slice(start, min(start + size, last))
            here = slice(batch.start - first, batch.stop - first)
            own.add(here, x[batch])
            own.add_gradients(here, g[batch])
        assert own.g is not None
        mine = (positions[:, 0] >= first) & (positions[:, 0] < last)
        expected = g[positions[:, 0], positions[:, 1]] * mine[:, None]
        torch.testing.assert_close(own.g, expected.to(torch.bfloat16))
        sums: list[Tensor] = []
        own.across(sums.append)
        assert [each.dtype for each in sums] == [torch.float32] * 2
        whole += sums[0]
    torch.testing.assert_close(whole, x[positions[:, 0], positions[:, 1]].to(torch.bfloat16).float())


def test_sampled_tokens_are_spread_over_the_sequences() -> None:
    few, some, every = (positions((6, 10), number) for number in (3, 40, 60))
    assert few[:, 0].tolist() == [0, 2, 4]
    assert torch.bincount(some[:, 0]).tolist() == [7, 7, 6, 7, 7, 6]
    assert some.max(0).values.tolist() == [5, 9]
    assert len({*map(tuple, every.tolist())}) == 60
