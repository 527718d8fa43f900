"""Divergence of attention heads, against scipy and against the algorithm as printed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from streamprune.maths.divergence import between_units, redundant
from streamprune.maths.sums import HeadDivergence


def attention(sequences: int = 4, heads: int = 5, tokens: int = 7, seed: int = 0, sharp: float = 3.0) -> Tensor:
    """Causal attention maps (sequences, heads, tokens, tokens), float64."""
    generator = torch.Generator().manual_seed(seed)
    scores = sharp * torch.randn(sequences, heads, tokens, tokens, generator=generator, dtype=torch.float64)
    later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -torch.inf).softmax(dim=-1)


def measured(maps: Tensor) -> Tensor:
    divergence = HeadDivergence(maps.shape[1])
    divergence.add(maps)
    return divergence.mean()


def test_divergence_equals_scipys_jensen_shannon_distance_squared() -> None:
    distance = pytest.importorskip("scipy.spatial.distance")
    maps = attention()
    sequences, heads, tokens, _ = maps.shape
    expected = np.zeros((heads, heads))
    for i in range(heads):
        for j in range(heads):
            for s in range(sequences):
                for t in range(1, tokens):  # the first row is the same for all: one token
                    expected[i, j] += distance.jensenshannon(maps[s, i, t].numpy(), maps[s, j, t].numpy()) ** 2
    expected /= sequences * tokens
    d = measured(maps)
    assert d.dtype == torch.float64
    np.testing.assert_allclose(d.numpy(), expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(measured(maps.float()).numpy(), expected, atol=1e-6)


def test_equal_heads_have_none_and_disjoint_ones_log_2() -> None:
    maps = torch.zeros(1, 3, 4, 4, dtype=torch.float16)
    maps[:, :2, :, 0] = 1
    maps[:, 2, :, 1] = 1
    maps[:, 2, 3] = torch.tensor([1, 0, 0, 0])
    d = measured(maps)
    assert d[0, 1] == 0
    assert float(d[0, 2]) == pytest.approx(0.75 * math.log(2))
    assert torch.equal(d.diagonal(), torch.zeros(3, dtype=torch.float64))
    assert torch.equal(d, d.T)


def test_nearly_equal_heads_are_not_below_zero() -> None:
    maps = attention(heads=1, tokens=64, sharp=0.1).float().expand(-1, 2, -1, -1).clone()
    maps[:, 1] *= 1 + 1e-7 * torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    assert 0 <= float(measured(maps)[0, 1]) < 1e-6


def test_micro_batches_change_nothing() -> None:
    maps, divergence = attention(), HeadDivergence(5)
    for part in (maps[:1], maps[1:3], maps[3:]):
        divergence.add(part)
    torch.testing.assert_close(divergence.mean(), measured(maps))


def test_shorter_sequences_weigh_by_their_rows() -> None:
    divergence = HeadDivergence(5)
    long, short = attention(2, tokens=9), attention(3, tokens=4, seed=1)
    divergence.add(long)
    divergence.add(short)
    torch.testing.assert_close(divergence.mean(), (measured(long) * 18 + measured(short) * 12) / 30)


def as_printed(d: list[list[float]], tau: float) -> list[int]:
    c: list[int] = []
    for i in range(len(d)):
        for j in range(len(d)):
            if d[i][j] < tau and i != j and i not in c and j not in c:
                c.append(i)
    return c


def test_redundant_is_algorithm_2() -> None:
    for seed in range(20):
        d = measured(attention(heads=8, seed=seed))
        off_diagonal = d[d > 0]
        for tau in (0.0, float(off_diagonal.median()), float(off_diagonal.quantile(0.1)), 1.0):
            assert redundant(d, tau) == as_printed(d.tolist(), tau)


def test_one_head_always_stays_and_none_goes_without_a_near_one() -> None:
    d = measured(attention(heads=6))
    assert redundant(d, 1.0) == [0, 1, 2, 3, 4]
    assert redundant(d, 0.0) == []
    assert redundant(d, float(d[d > 0].min())) == []
    # 1 is near 0 and 2, which are not near each other: 0 goes for 1, then 1 for 2, and 2 stays.
    chain = torch.tensor([[0.0, 0.1, 0.5], [0.1, 0.0, 0.1], [0.5, 0.1, 0.0]])
    assert redundant(chain, 0.2) == [0, 1]


def test_groups_take_the_mean_over_their_pairs_of_heads() -> None:
    d = measured(attention(heads=6))
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for a in range(3):
        for b in range(3):
            if a != b:
                expected[a, b] = sum(d[i, j] for i in (2 * a, 2 * a + 1) for j in (2 * b, 2 * b + 1)) / 4
    torch.testing.assert_close(between_units(d, 2), expected)
    torch.testing.assert_close(between_units(d, 1), d)
    assert between_units(d, 6).tolist() == [[0]]
