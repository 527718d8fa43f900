"""What long work tells the outside; the command line decides how to show it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives phases and steps; every method returns at once."""

    def phase(self, name: str, total: int, done: int = 0) -> None:
        """A phase of `total` steps begins, `done` of which an earlier process finished."""

    def step(self, note: str = "") -> None:
        """One step of the phase is finished."""

    def say(self, message: str) -> None:
        """Something a person should know, once."""


class Silent:
    """Progress that nobody watches."""

    def phase(self, name: str, total: int, done: int = 0) -> None:
        pass

    def step(self, note: str = "") -> None:
        pass

    def say(self, message: str) -> None:
        pass
