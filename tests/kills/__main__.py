"""`scripts/kills`."""

from __future__ import annotations

import signal
import tempfile
from pathlib import Path

import click

from .campaign import Campaign, Tally
from .scenario import SCENARIOS, Inputs

HEADING = ("scenario", "runs", "kills", "resumed", "jobs", "same bytes", "left behind")


@click.command()
@click.option("--kills", default=200, show_default=True, help="Signals to send, shared among the scenarios.")
@click.option("--scenario", "names", multiple=True, type=click.Choice(list(SCENARIOS)), help="[default: all]")
@click.option("--signal", "name", default="KILL", type=click.Choice(["KILL", "TERM", "INT", "HUP"]), show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of all instants.")
def main(kills: int, names: tuple[str, ...], name: str, seed: int) -> None:
    """Kill the command at random instants, start it again until it is finished, and compare bytes."""
    chosen = [SCENARIOS[each] for each in names or SCENARIOS]
    click.echo(f"SIG{name}, seed {seed}")
    tallies = []
    with tempfile.TemporaryDirectory(prefix="streamprune-kills-") as folder:
        inputs = Inputs.make(Path(folder) / "inputs")
        for number, scenario in enumerate(chosen):
            campaign = Campaign(
                scenario,
                inputs,
                Path(folder) / scenario.name,
                seed=seed,
                number=signal.Signals[f"SIG{name}"],
                tell=click.echo,
            )
            share = kills * (number + 1) // len(chosen) - kills * number // len(chosen)
            tallies.append(campaign.kill(share))
    click.echo("\n".join(report(tallies)))
    for tally in tallies:
        for fault in [*tally.faults, *tally.left]:
            click.echo(f"{tally.scenario}: {fault}", err=True)
    if not all(tally.good for tally in tallies):
        click.get_current_context().exit(1)


def report(tallies: list[Tally]) -> list[str]:
    """The table, its last row the sum."""
    rows = [(t.lives, t.kills, t.resumed, t.jobs, t.same, len(t.left)) for t in tallies]
    rows.append(tuple(map(sum, zip(*rows, strict=True))))
    names = [*(tally.scenario for tally in tallies), "all"]
    lines = [f"{HEADING[0]:16}" + "".join(f"{cell:>12}" for cell in HEADING[1:])]
    return lines + [f"{n:16}" + "".join(f"{c:>12}" for c in row) for n, row in zip(names, rows, strict=True)]


if __name__ == "__main__":
    main()
