"""Output for people and scripts: progress on stderr; the result, or one JSON object, on stdout."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

import click
from tqdm import tqdm

if TYPE_CHECKING:
    from streamprune import Progress


@contextmanager
def progress(quiet: bool) -> Iterator[Progress]:
    """Progress of a command, shown unless `quiet`; the first SIGTERM, SIGINT or SIGHUP asks the work to stop."""
    from streamprune.system.signals import asked_by_signals

    def tell() -> None:
        if not quiet:
            # Straight to the descriptor: a handler must not enter a stream that was being written to.
            os.write(2, b"\nstreamprune: stopping at the end of this step; a second signal stops at once\n")

    with asked_by_signals(tell) as stopping, watched(quiet, stopping) as shown:
        yield shown


@contextmanager
def watched(quiet: bool = False, stopping: Callable[[], bool] = lambda: False) -> Iterator[Progress]:
    """Progress of work that cannot be resumed: a signal ends it at once."""
    if quiet:
        from streamprune.system.progress import Callback

        yield Callback(lambda event: None, stopping=stopping)
    else:
        with closing(Shown(stopping)) as shown:
            yield shown


class Shown:
    """Progress: a bar where stderr is a terminal, plain lines otherwise."""

    def __init__(self, stopping: Callable[[], bool]) -> None:
        self.stopping = stopping
        self._bar: Any = None
        self._terminal = sys.stderr.isatty()
        self._name, self._total, self._done = "", 0, 0
        self._printed = 0.0

    def phase(self, name: str, total: int, done: int = 0) -> None:
        self.close()
        self._name, self._total, self._done = name, total, done
        if self._terminal:
            self._bar = tqdm(total=total, initial=done, desc=name, file=sys.stderr, leave=True, unit="step")
        elif done:
            click.echo(f"{name}: {done} of {total} done earlier", err=True)

    def step(self, note: str = "") -> None:
        self._done += 1
        if self._bar is not None:
            self._bar.set_postfix_str(printable(note), refresh=False)
            self._bar.update()
            if self._done == self._total:
                self.close()
        elif self._done == self._total or time.monotonic() - self._printed > 1:
            # At most one line per second.
            self._printed = time.monotonic()
            line = f"{self._name}: {self._done} of {self._total}" + (f", {note}" if note else "")
            click.echo(printable(line), err=True)

    def say(self, message: str) -> None:
        line = f"streamprune: {printable(message)}"
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            click.echo(line, err=True)

    def close(self) -> None:
        """End the bar, if there is one."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def result(value: dict[str, Any], as_json: bool, lines: list[str]) -> None:
    """The command's result: one JSON object, or lines for people."""
    if as_json:
        from streamprune.system.strict_json import finite

        click.echo(json.dumps(finite(value)))
    else:
        for line in lines:
            click.echo(printable(line))


def tell(message: str) -> None:
    """One line on stderr."""
    click.echo(f"streamprune: {printable(' '.join(message.split()))}", err=True)


def printable(line: str) -> str:
    """The line with control characters escaped, since it may quote names from untrusted files."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in line)


def bar(part: float, width: int = 16) -> str:
    """A number from 0 to 1 as a bar of `width` characters, in steps of an eighth."""
    eighths = round(min(1.0, max(0.0, part)) * 8 * width)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (" ▏▎▍▌▋▊▉"[rest] if rest else "")).ljust(width)


def steps(values: list[float], low: float, high: float) -> str:
    """Positive values as a line of block characters, on a logarithmic scale from `low` to `high`."""
    span = math.log(high / low) if high > low else 1.0
    places = [math.log(max(value, low) / low) / span for value in values]
    return "".join("▁▂▃▄▅▆▇█"[round(7 * min(1.0, place))] for place in places)


def table(rows: list[list[str]]) -> list[str]:
    """Rows as aligned columns, the first column left and the others right; the first row is the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
