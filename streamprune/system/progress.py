"""Progress reports and stop requests. The command line, or the caller's code, decides how to show them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from ..errors import Stopped

STOPPED = "stopped on request; run the same command again to resume"


class Progress(Protocol):
    """Receives phases and steps. Every method must return quickly.

    An exception from a method ends the work and propagates to the caller. A job can be resumed afterwards, as after a kill.
    """

    def phase(self, name: str, total: int, done: int = 0) -> None:
        """Start a phase of `total` steps, `done` of which earlier processes finished."""

    def step(self, note: str = "") -> None:
        """Finish one step of the phase."""

    def say(self, message: str) -> None:
        """Show the user a message, once."""

    def stopping(self) -> bool:
        """Return whether the work should stop with `Stopped`. Called at points where stopping loses little or no work."""


@dataclass(frozen=True)
class Event:
    """One progress event. Its `str` is a line for the user."""

    kind: Literal["phase", "step", "note"]
    phase: str
    """Name of the current phase; empty before the first."""
    done: int
    """Finished steps of the phase, including those of earlier processes."""
    total: int
    """All steps of the phase."""
    message: str
    """Description of the step, or the note; may be empty."""

    def __str__(self) -> str:
        if self.kind == "note":
            return self.message
        return f"{self.phase}: {self.done} of {self.total}" + (f", {self.message}" if self.message else "")


class Callback:
    """Progress that calls a function with each event.

    Args:
        call: receives every event; its return value is ignored.
        stopping: see `Progress.stopping`.
    """

    def __init__(self, call: Callable[[Event], object], *, stopping: Callable[[], bool] = lambda: False) -> None:
        self._call, self._stopping = call, stopping
        self._phase, self._done, self._total = "", 0, 0

    def phase(self, name: str, total: int, done: int = 0) -> None:
        self._phase, self._done, self._total = name, done, total
        self._tell("phase")

    def step(self, note: str = "") -> None:
        self._done += 1
        self._tell("step", note)

    def say(self, message: str) -> None:
        self._tell("note", message)

    def stopping(self) -> bool:
        return self._stopping()

    def _tell(self, kind: Literal["phase", "step", "note"], message: str = "") -> None:
        self._call(Event(kind, self._phase, self._done, self._total, message))


class Silent:
    """Progress that is discarded."""

    def phase(self, name: str, total: int, done: int = 0) -> None:
        pass

    def step(self, note: str = "") -> None:
        pass

    def say(self, message: str) -> None:
        pass

    def stopping(self) -> bool:
        return False


def rest(progress: Progress) -> None:
    """Raise Stopped if `progress` asks to stop; called where stopping loses little or no work."""
    if progress.stopping():
        raise Stopped(STOPPED)
