"""Turn termination signals into a stop request. Only the command line installs these handlers."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""Signals of which the first requests a stop and the second acts as before."""
HANGUP = signal.SIGHUP
"""Sent when a terminal closes, by both the kernel and the shell. Requests a stop, however often it arrives."""


@contextmanager
def asked_by_signals(tell: Callable[[], object]) -> Iterator[Callable[[], bool]]:
    """Let signals request a stop while the context is open.

    Args:
        tell: called in the signal handler, so it must do no more than write to a file descriptor.

    Yields:
        A function that returns whether a signal has arrived, for `Progress.stopping`.
    """
    asked = False
    before: dict[int, Any] = {}

    def restore(numbers: Iterable[int]) -> None:
        for number in numbers:
            signal.signal(number, before[number])

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            return
        asked = True
        restore(before.keys() - {HANGUP})
        with suppress(OSError):
            tell()

    for number in (*SIGNALS, HANGUP):
        # Signals that the parent ignores stay ignored (`nohup`, background jobs of a shell).
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, ask)
    try:
        yield lambda: asked
    finally:
        restore(before)
