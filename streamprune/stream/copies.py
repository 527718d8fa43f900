"""Copy between host and device on separate CUDA streams, so that copies overlap with computation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

Taken = Callable[[], list[Tensor]]  # wait for a copy and return the copied tensors


class Cuda:
    """The streams of one GPU. They run concurrently, each in order."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def stream(self) -> Any:
        return torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def current(self) -> Any:
        return torch.cuda.current_stream(self._device)

    def copy(self, stream: Any, source: Tensor, *, to_host: bool) -> Tensor:
        """Queue a copy into new memory on the stream. Host memory, whether source or target, is pinned."""
        with torch.cuda.stream(stream):
            if not to_host:
                return source.to(self._device, non_blocking=True)
            target = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            return target.copy_(source, non_blocking=True)

    def keep(self, tensor: Tensor, stream: Any) -> None:
        """Do not reuse the tensor's memory, once freed, before the work now queued on the stream is done."""
        tensor.record_stream(stream)


class Copies:
    """Copy in both directions, one stream each. Outward copies wait for computation and would delay inward copies.

    Without an engine, the device is the host, and tensors are passed through without a copy.
    """

    def __init__(self, engine: Cuda | None) -> None:
        self._engine = engine
        if engine is not None:
            self._inward, self._outward = engine.stream(), engine.stream()

    @classmethod
    @cache
    def of(cls, device: torch.device) -> Copies:
        """The copies of a device, whose two streams serve everybody: torch caches memory for each stream apart."""
        return cls(Cuda(device) if device.type == "cuda" else None)

    def inward(self, tensors: Sequence[Tensor]) -> Taken:
        """Start copying pinned tensors to the device. Call from any thread; call the result on the computing thread."""
        engine = self._engine
        if engine is None:
            return lambda: list(tensors)
        there = [engine.copy(self._inward, tensor, to_host=False) for tensor in tensors]
        done = self._inward.record_event()

        def take() -> list[Tensor]:
            current = engine.current()
            current.wait_event(done)
            for tensor in there:
                engine.keep(tensor, current)
            return there

        return take

    def outward(self, tensors: Sequence[Tensor]) -> Taken:
        """Start copying the results of the calling thread's stream to pinned memory. Call the result on any thread."""
        engine = self._engine
        if engine is None:
            return lambda: list(tensors)
        stream = self._outward
        stream.wait_event(engine.current().record_event())
        here = [engine.copy(stream, tensor, to_host=True) for tensor in tensors]
        done = stream.record_event()
        for tensor in tensors:
            engine.keep(tensor, stream)

        def take() -> list[Tensor]:
            done.synchronize()
            return here

        return take
