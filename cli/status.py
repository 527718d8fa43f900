"""`streamprune status`."""

from __future__ import annotations

from pathlib import Path

import click

import streamprune
from streamprune.system.units import format_seconds

from . import options, show


@click.command()
@click.argument("out", type=options.PATH)
@options.json_option
def status(out: Path, as_json: bool) -> None:
    """Show the progress of the job that writes OUT.

    The job is a `run`, `tune` or `compare`. Nothing is changed. Exit code 0: finished. 3: not started. 4: running. 75:
    interrupted; run the same command again to resume. 1: failed; the same command tries again.

    Example:

      streamprune status llama-2-5b --json
    """
    found = streamprune.status(out)
    show.result(found.as_dict(), as_json, _lines(found))
    click.get_current_context().exit(found.exit_code)


def _lines(found: streamprune.Status) -> list[str]:
    lines = [f"{found.out}: {found.state}"]
    if found.error is not None:
        lines.append(f"error: {found.error}")
    if found.state != "finished" and found.phase is not None:
        shot = f"shot {found.shot}, " if found.shot is not None else ""
        steps = f", {found.done} of {found.total} steps done" if found.total is not None else ""
        lines.append(f"{shot}{found.phase}{steps}")
    if found.seconds is not None:
        left = "" if found.seconds_left is None else f", about {format_seconds(found.seconds_left)} left"
        lines.append(f"{format_seconds(found.seconds)} {'in total' if found.state == 'finished' else f'so far{left}'}")
    if found.row is not None:
        lines += [f"  {line}" for line in _lines(found.row)]
    elif found.log is not None and found.state == "running":
        lines.append(f"log: {found.log}")
    return lines
