"""Copies between host and device on streams of their own, so that the device computes meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..system.timing import copied

Taken = Callable[[], list[Tensor]]
"""Waits for a copy, and gives what was copied."""


class Engine(Protocol):
    """What of CUDA is used. Streams run side by side, each in order; nothing here waits but `finish`."""

    def stream(self) -> Any:
        """A new stream."""

    def current(self) -> Any:
        """The calling thread's stream, on which it computes."""

    def record(self, stream: Any) -> Any:
        """An event: all that the stream was given so far."""

    def wait(self, stream: Any, event: Any) -> None:
        """What the stream is given from now on comes after the event."""

    def finish(self, event: Any) -> None:
        """Have the calling thread wait for the event."""

    def happened(self, event: Any) -> bool:
        """Whether it has."""

    def seconds(self, first: Any, second: Any) -> float:
        """Between two events that have happened."""

    def copy(self, stream: Any, source: Tensor, *, to_host: bool) -> Tensor:
        """Give the stream a copy into new memory, pinned on the host; the source must be pinned too, if it is there."""

    def keep(self, tensor: Tensor, stream: Any) -> None:
        """See that its memory, once let go of, is not given to others before the stream has done what it has to do by then."""


class Cuda:
    """`Engine` by torch.cuda."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def current(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)

    def record(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(stream)
        return event

    def wait(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        stream.wait_event(event)

    def finish(self, event: torch.cuda.Event) -> None:
        event.synchronize()

    def happened(self, event: torch.cuda.Event) -> bool:
        return bool(event.query())  # type: ignore[no-untyped-call]

    def seconds(self, first: torch.cuda.Event, second: torch.cuda.Event) -> float:
        return float(first.elapsed_time(second)) / 1000

    def copy(self, stream: torch.cuda.Stream, source: Tensor, *, to_host: bool) -> Tensor:
        with torch.cuda.stream(stream):
            if not to_host:
                return source.to(self._device, non_blocking=True)
            target = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            return target.copy_(source, non_blocking=True)

    def keep(self, tensor: Tensor, stream: torch.cuda.Stream) -> None:
        tensor.record_stream(stream)


class Copies:
    """Both ways, each on a stream of its own: what goes out waits for the device, and would hold up what comes in.

    Args:
        engine: None where the device is the host: then tensors are handed on as they are.
    """

    def __init__(self, engine: Engine | None) -> None:
        self._engine = engine
        if engine is not None:
            self._inward, self._outward = engine.stream(), engine.stream()
        self._timed: list[tuple[Any, Any]] = []

    @classmethod
    def of(cls, device: torch.device) -> Copies:
        """Those of a device."""
        return cls(Cuda(device) if device.type == "cuda" else None)

    def inward(self, tensors: Sequence[Tensor]) -> Taken:
        """Begin copying pinned tensors to the device, from any thread; to be taken by the one that computes."""
        engine = self._engine
        if engine is None:
            return lambda: list(tensors)
        stream = self._inward
        first = engine.record(stream)
        there = [engine.copy(stream, tensor, to_host=False) for tensor in tensors]
        done = engine.record(stream)
        self._timed.append((first, done))

        def take() -> list[Tensor]:
            current = engine.current()
            engine.wait(current, done)
            for tensor in there:
                engine.keep(tensor, current)
            self._count()
            return there

        return take

    def outward(self, tensors: Sequence[Tensor]) -> Taken:
        """Begin copying to pinned memory what the calling thread's stream computes; to be taken in any thread."""
        engine = self._engine
        if engine is None:
            return lambda: list(tensors)
        stream = self._outward
        engine.wait(stream, engine.record(engine.current()))
        first = engine.record(stream)
        here = [engine.copy(stream, tensor, to_host=True) for tensor in tensors]
        done = engine.record(stream)
        for tensor in tensors:
            engine.keep(tensor, stream)

        def take() -> list[Tensor]:
            engine.finish(done)
            copied(engine.seconds(first, done))
            return here

        return take

    def _count(self) -> None:
        """Count the inward copies that are over."""
        engine = self._engine
        assert engine is not None
        while self._timed and engine.happened(self._timed[0][1]):
            copied(engine.seconds(*self._timed.pop(0)))
