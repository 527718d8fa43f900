"""Copies between host and device: whatever order a device takes its streams in, what arrives is right."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from streamprune.stream.copies import Copies

Piece = Callable[[], object]


class Event:
    def __init__(self, device: Simulated) -> None:
        self.device = device
        self.at: float | None = None

    def synchronize(self) -> None:
        while self.at is None:
            self.device.go_on()


class Stream:
    """What it was given and has not done yet: pieces of work, events to record, and events to wait for."""

    def __init__(self, device: Simulated) -> None:
        self.device = device
        self.given: list[Piece | Event | tuple[Event]] = []

    def record_event(self) -> Event:
        event = Event(self.device)
        self.given.append(event)
        return event

    def wait_event(self, event: Event) -> None:
        self.given.append((event,))


class Simulated:
    """A device whose streams go on in random order, as far as they need not wait for each other.

    Memory that nobody keeps is overwritten as soon as the tensor goes: here, when `let_go` says so.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.streams: list[Stream] = []
        self.computing = self.stream()
        self.kept: list[tuple[int, Stream]] = []
        self.clock = 0.0

    def stream(self) -> Stream:
        self.streams.append(Stream(self))
        return self.streams[-1]

    def current(self) -> Stream:
        return self.computing

    def copy(self, stream: Stream, source: Tensor, *, to_host: bool) -> Tensor:
        target = torch.full_like(source, float("nan"))
        stream.given.append(lambda: target.copy_(source))
        return target

    def keep(self, tensor: Tensor, stream: Stream) -> None:
        self.kept.append((id(tensor), stream))

    def let_go(self, tensor: Tensor, owner: Stream) -> None:
        """The tensor's memory goes to others, once its owner and all who keep it have done what they have to do."""
        for stream in {id(s): s for s in (owner, *(s for key, s in self.kept if key == id(tensor)))}.values():
            while stream.given:
                self.go_on()
        tensor.fill_(float("nan"))

    def able(self) -> list[Stream]:
        """The streams that can go on."""
        return [s for s in self.streams if s.given and not (isinstance(s.given[0], tuple) and s.given[0][0].at is None)]

    def go_on(self) -> None:
        """One piece of one stream that can."""
        piece = self.random.choice(self.able()).given.pop(0)
        self.clock += 1
        if isinstance(piece, Event):
            piece.at = self.clock
        elif not isinstance(piece, tuple):
            piece()


@pytest.mark.parametrize("seed", range(8))
def test_in_comes_before_computing_and_computing_before_out(seed: int) -> None:
    device = Simulated(seed)
    copies = Copies(device)
    given = [torch.full((3,), float(i)) for i in range(5)]
    out: list[Any] = []
    ahead = copies.inward([given[0]])
    for number in range(5):
        take, ahead = ahead, copies.inward([given[min(number + 1, 4)]])
        (x,) = take()
        y = torch.full((3,), float("nan"))
        device.computing.given.append(lambda x=x, y=y: y.copy_(2 * x + 1))
        out.append((copies.outward([y]), y))
        device.let_go(x, copies._inward)
        if number % 2:
            device.let_go(y, device.computing)
    for number, (take_out, _) in enumerate(out):
        (found,) = take_out()
        assert found.tolist() == [2.0 * number + 1] * 3


def test_on_the_host_nothing_is_copied() -> None:
    copies, x = Copies.of(torch.device("cpu")), torch.ones(2)
    assert copies.inward([x])()[0] is x
    assert copies.outward([x])()[0] is x


def test_what_comes_in_is_not_held_up_by_what_goes_out() -> None:
    """Which waits for the device to compute it."""
    device = Simulated(0)
    copies = Copies(device)
    device.computing.wait_event(Event(device))  # it is busy for as long as we look
    copies.outward([torch.zeros(3)])
    copies.inward([torch.ones(3)])
    while device.able():
        device.go_on()
    assert copies._outward.given
    assert not copies._inward.given
