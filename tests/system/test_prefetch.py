"""Prefetching changes nothing but the time, and keeps nothing alive."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable

import pytest
import torch

from streamprune.system.threads import prefetch, read_ahead


class Thing:
    pass


def watched() -> tuple[list[weakref.ref[Thing]], Callable[[int], Thing]]:
    """A loader, and references to all that it has loaded."""
    living: list[weakref.ref[Thing]] = []

    def load(_: int) -> Thing:
        thing = Thing()
        living.append(weakref.ref(thing))
        return thing

    return living, load


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
    living, load = watched()
    for _, value in prefetch(range(6), load):
        del value
        gc.collect()
        # What was handed out is gone; only the one that is being loaded may live.
        assert sum(reference() is not None for reference in living[:-1]) == 0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_reading_ahead_announces_on_the_cpu_and_loads_for_a_gpu(count: int, device: str) -> None:
    told: list[tuple[str, int, bool]] = []

    def tell(what: str, i: int) -> int:
        told.append((what, i, threading.current_thread() is threading.main_thread()))
        return i * i

    def announce(i: int) -> None:
        tell("announce", i)

    loaded = read_ahead(torch.device(device), range(count), announce, lambda i: tell("load", i))
    assert list(loaded) == [(i, i * i) for i in range(count)]
    if device == "cuda":
        assert told == [("load", i, False) for i in range(count)]
        return
    for i in range(count):
        assert told.index(("announce", i, False)) < told.index(("load", i, True))


def test_reading_ahead_keeps_nothing_alive() -> None:
    living, load = watched()
    for _, value in read_ahead(torch.device("cpu"), range(4), lambda _: None, load):
        del value
        gc.collect()
        assert not any(reference() for reference in living)
