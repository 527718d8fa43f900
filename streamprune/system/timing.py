"""Seconds that a thread is blocked by disk reads and writes, its own or those of a background thread.

Always on: the cost is two clock reads around each call, and each call moves megabytes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal


class _Clock(threading.local):
    def __init__(self) -> None:
        self.waited = {"read": 0.0, "write": 0.0}
        self.running = False


_clock = _Clock()


@contextmanager
def waiting(kind: Literal["read", "write"]) -> Iterator[None]:
    """Count the time in this context as waiting for disk. Nested contexts count once, as part of the outermost."""
    if _clock.running:
        yield
        return
    _clock.running, started = True, time.perf_counter()
    try:
        yield
    finally:
        _clock.running = False
        _clock.waited[kind] += time.perf_counter() - started


def waited() -> dict[str, float]:
    """Return the seconds that the calling thread has been blocked since it started, by kind."""
    return dict(_clock.waited)
