"""Output for people and scripts: progress on stderr; the result, or one JSON object, on stdout."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import click
from tqdm import tqdm

import streamprune
from streamprune.system.progress import Event, Progress
from streamprune.system.strict_json import finite


@contextmanager
def progress(quiet: bool) -> Iterator[Progress]:
    """Progress of a command, shown unless `quiet`; the first SIGTERM, SIGINT or SIGHUP asks the work to stop."""

    def tell() -> None:
        if not quiet:
            # Straight to the descriptor: a handler must not enter a stream that was being written to.
            os.write(2, b"\nstreamprune: stopping at the end of this step; a second signal stops at once\n")

    with streamprune.asked_by_signals(tell) as stopping, watched(quiet, stopping) as shown:
        yield shown


@contextmanager
def watched(quiet: bool = False, stopping: Callable[[], bool] = lambda: False) -> Iterator[Progress]:
    """Progress of work that cannot be resumed: a signal ends it at once."""
    with closing(Display()) as display:
        yield streamprune.Callback((lambda event: None) if quiet else display.show, stopping=stopping)


class Display:
    """Shows progress: a bar where stderr is a terminal, plain lines otherwise."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._printed = 0.0

    def show(self, event: Event) -> None:
        if event.kind == "note":
            line = f"streamprune: {printable(event.message)}"
            if self._bar is not None:
                self._bar.write(line, file=sys.stderr)
            else:
                click.echo(line, err=True)
        elif event.kind == "phase":
            self.close()
            if sys.stderr.isatty():
                self._bar = tqdm(
                    total=event.total, initial=event.done, desc=event.phase, file=sys.stderr, leave=True, unit="step"
                )
            elif event.done:
                click.echo(f"{event} done earlier", err=True)
        elif self._bar is not None:
            self._bar.set_postfix_str(printable(event.message), refresh=False)
            self._bar.update()
            if event.done == event.total:
                self.close()
        elif event.done == event.total or time.monotonic() - self._printed > 1:
            # At most one line per second.
            self._printed = time.monotonic()
            click.echo(printable(str(event)), err=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def result(value: dict[str, Any], as_json: bool, lines: list[str]) -> None:
    """The command's result: one JSON object, or lines for people."""
    if as_json:
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
