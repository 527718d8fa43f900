"""Work that goes on in another thread, in order, a piece or two behind."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from ..occupancy import waiting

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
