"""Lower halves against whole matrices, with tiles that do not divide the size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from streamprune.maths import triangular
from streamprune.maths.triangular import add_product, diagonal_blocks, shrink, shrink_rows, whole_rows


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triangular, "_PRODUCT_ROWS", 7)
    monkeypatch.setattr(triangular, "_COPY_ROWS", 5)


def matrices(n: int) -> tuple[Tensor, Tensor]:
    """A whole symmetric matrix, and one with nothing of use above the diagonal."""
    x = torch.randn(n, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    whole = x + x.T
    return whole, whole.tril() + torch.full_like(whole, torch.nan).triu(1)


@pytest.mark.parametrize("n", [1, 7, 30])
def test_a_product_is_added_below_the_diagonal(n: int) -> None:
    whole, half = matrices(n)
    a, b = matrices(n)[0][:3], torch.ones(3, n, dtype=torch.float64)
    left, right = torch.cat([a, b]), torch.cat([b, a])
    add_product(half, left, right, alpha=-2)
    torch.testing.assert_close(half.tril(), (whole - 2 * (left.T @ right)).tril())


def test_rows_come_whole() -> None:
    whole, half = matrices(24)
    index = torch.tensor([23, 0, 11])
    assert torch.equal(whole_rows(half, index), whole[index])


@pytest.mark.parametrize("width", [1, 4, 24])
def test_diagonal_blocks(width: int) -> None:
    whole, half = matrices(24)
    # Above the diagonal lies what was computed too, never NaN: it is finite where products are.
    blocks = diagonal_blocks(half.nan_to_num(1e9), width)
    expected = [whole[i : i + width, i : i + width] for i in range(0, 24, width)]
    assert torch.equal(blocks, torch.stack(expected))


@pytest.mark.parametrize("kept", [[29], [*range(1, 30)], [*range(0, 30, 2)], [*range(30)], []])
def test_shrinking_stays_in_place(kept: list[int]) -> None:
    whole, half = matrices(30)
    index = torch.tensor(kept, dtype=torch.int64)
    memory = half.data_ptr()
    small = shrink(half, index)
    assert small.shape == (len(kept), len(kept))
    assert not kept or small.data_ptr() == memory
    assert torch.equal(small.tril(), whole[index][:, index].tril())
    assert torch.equal(shrink_rows(whole.clone(), index), whole[index])
