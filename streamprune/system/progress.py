"""What long work tells the outside, and asks it: the command line, or a caller's own code, decides how to show it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from ..errors import Stopped

STOPPED = "stopped as asked; run the same command again to go on"


class Progress(Protocol):
    """Receives phases and steps; every method returns at once.

    Whatever a method raises ends the work there and reaches the caller; a job goes on from it like from a kill.
    """

    def phase(self, name: str, total: int, done: int = 0) -> None:
        """A phase of `total` steps begins, `done` of which an earlier process finished."""

    def step(self, note: str = "") -> None:
        """One step of the phase is finished."""

    def say(self, message: str) -> None:
        """Something a person should know, once."""

    def stopping(self) -> bool:
        """Whether the work should end at its next resting place, with `Stopped`: asked where little or nothing is lost."""


class Silent:
    """Progress that nobody watches."""

    def phase(self, name: str, total: int, done: int = 0) -> None:
        pass

    def step(self, note: str = "") -> None:
        pass

    def say(self, message: str) -> None:
        pass

    def stopping(self) -> bool:
        return False


@dataclass(frozen=True)
class Event:
    """What happened; its `str` is a line for people."""

    kind: Literal["phase", "step", "note"]
    phase: str
    """The one under way; empty before the first."""
    done: int
    """Steps of it that are finished, by earlier processes too."""
    total: int
    message: str
    """What the step was, or what a person should know; may be empty."""

    def __str__(self) -> str:
        if self.kind == "note":
            return self.message
        return f"{self.phase}: {self.done} of {self.total}" + (f", {self.message}" if self.message else "")


class Callback:
    """Progress as calls of one function.

    Args:
        call: gets every event; what it returns is not looked at.
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


def rest(progress: Progress) -> None:
    """Mark a resting place.

    Raises:
        Stopped: whoever watches wants the work to end.
    """
    if progress.stopping():
        raise Stopped(STOPPED)
