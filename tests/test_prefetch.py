"""Prefetching changes nothing but the time, and keeps nothing alive."""

from __future__ import annotations

import gc
import weakref

import pytest

from streamprune.stream.prefetch import announced, prefetch


class Thing:
    pass


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_order_and_values(count: int) -> None:
    assert list(prefetch(range(count), lambda i: i * i)) == [(i, i * i) for i in range(count)]


def test_an_error_comes_in_its_turn() -> None:
    def load(i: int) -> int:
        if i == 2:
            raise ValueError("two")
        return i

    loaded = prefetch(range(4), load)
    assert [next(loaded), next(loaded)] == [(0, 0), (1, 1)]
    with pytest.raises(ValueError, match="two"):
        next(loaded)


def test_at_most_two_values_live() -> None:
    living: list[weakref.ref[Thing]] = []

    def load(_: int) -> Thing:
        thing = Thing()
        living.append(weakref.ref(thing))
        return thing

    for _, value in prefetch(range(6), load):
        del value
        gc.collect()
        # What was handed out is gone; only the one that is being loaded may live.
        assert sum(reference() is not None for reference in living[:-1]) == 0


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_the_next_is_announced_before_each_load(count: int) -> None:
    told: list[tuple[str, int]] = []

    def load(i: int) -> int:
        told.append(("load", i))
        return i * i

    assert list(announced(range(count), lambda i: told.append(("announce", i)), load)) == [
        (i, i * i) for i in range(count)
    ]
    for i in range(count):
        assert told.index(("announce", i)) < told.index(("load", i))
        if i + 1 < count:
            assert told.index(("announce", i + 1)) < told.index(("load", i))
