"""Reading ahead: the only threads of the project."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from types import TracebackType
from typing import TypeVar

import torch

from .timing import waiting

Key = TypeVar("Key")
Value = TypeVar("Value")


def prefetch(keys: Iterable[Key], load: Callable[[Key], Value]) -> Iterator[tuple[Key, Value]]:
    """Yield ``(key, load(key))`` in order, the next one loading in one worker thread meanwhile.

    At most two values live here: the one handed out and the one being loaded. An exception of `load` is
    raised when its turn comes; leaving the loop early waits for the load under way.
    """
    iterator = iter(keys)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as worker:
        ahead = [(key, worker.submit(load, key)) for key in islice(iterator, 1)]
        while ahead:
            key, future = ahead.pop()
            handed = [(key, future.result())]
            del future
            ahead = [(key, worker.submit(load, key)) for key in islice(iterator, 1)]
            # Popped, so that nothing here keeps alive what the caller lets go of.
            yield handed.pop()


def read_ahead(
    device: torch.device, keys: Iterable[Key], announce: Callable[[Key], None], load: Callable[[Key], Value]
) -> Iterator[tuple[Key, Value]]:
    """Yield ``(key, load(key))`` in order, what the next one needs coming from the disk meanwhile.

    For a GPU the worker thread loads it. Where the cores compute, copying would take one of them from the others,
    which wait for it: there the thread announces it to the kernel, and the load finds it in memory.
    """
    if device.type == "cpu":
        for key, _ in prefetch(keys, announce):
            yield key, load(key)
    else:
        yield from prefetch(keys, load)


PIECES = 2
"""One is worked on, and one waits."""


class Background:
    """A context with a thread of its own for writing, at most `PIECES` behind.

    An error of a piece is raised by the next `hand`, or at the end; then what waits is not begun. Whoever leaves the context
    without an error finds everything done.
    """

    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="background")
        self._under_way: deque[Future[None]] = deque()

    def hand(self, work: Callable[[], None]) -> None:
        """Have it done after all that was handed in before; waits while there is too much of it."""
        while len(self._under_way) >= PIECES:
            self._finish_one()
        self._under_way.append(self._worker.submit(work))

    def __enter__(self) -> Background:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            while kind is None and self._under_way:
                self._finish_one()
        finally:
            self._worker.shutdown(wait=True, cancel_futures=True)

    def _finish_one(self) -> None:
        with waiting("write"):
            self._under_way.popleft().result()
