"""Signals that ask a process to end, turned into a flag; only a command installs this."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGBREAK") if hasattr(signal, name))
"""Those that ask, as far as this system has them."""
HANGUPS = tuple(getattr(signal, name) for name in ("SIGHUP",) if hasattr(signal, name))
"""That of a terminal that is closed, which comes from the kernel and from the shell: it asks, however often it comes."""


@contextmanager
def asked_by_signals(tell: Callable[[], object]) -> Iterator[Callable[[], bool]]:
    """A context in which the first of `SIGNALS` or `HANGUPS` only asks to stop; a second of `SIGNALS` does what it always did.

    Args:
        tell: called in the signal's handler, so it may do no more than write to a descriptor.

    Yields:
        For `Progress.stopping`: whether a signal has come.
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
        restore(before.keys() - set(HANGUPS))
        with suppress(OSError):
            tell()

    for number in SIGNALS + HANGUPS:
        # What a parent had ignored stays so: `nohup`, or a shell's background job.
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, ask)
    try:
        yield lambda: asked
    finally:
        restore(before)
