"""A few of the kills of `scripts/kills`: real processes, random instants, the same bytes, and nothing left behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from kills.campaign import Campaign, left_behind
from kills.life import Forked, Torchrun, send
from kills.scenario import SCENARIOS, Inputs

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux")]

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs.make(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def killed(inputs: Inputs, tmp_path: Path) -> Callable[..., None]:
    """Kill the jobs of a scenario so many times."""

    def kill(name: str, kills: int, number: signal.Signals = signal.SIGKILL) -> None:
        tally = Campaign(SCENARIOS[name], inputs, tmp_path, seed=1, number=number).kill(kills)
        assert (tally.faults, tally.left) == ([], [])
        assert tally.same == tally.jobs > 0
        assert tally.kills >= kills

    return kill


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_ended_at_random_instants_the_bytes_are_the_same(number: signal.Signals, killed: Callable[..., None]) -> None:
    killed("default", 2, number)


@pytest.mark.parametrize("name", ["uniform", "compare-cache", "restart", "restart-compare"])
def test_killed_at_random_instants_nothing_is_left_behind(name: str, killed: Callable[..., None]) -> None:
    killed(name, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["surgeon", "slimgpt", "lora", "distil"])
def test_other_recipes_and_commands(name: str, killed: Callable[..., None]) -> None:
    killed(name, 2)


@pytest.mark.slow
def test_of_two_processes_one_or_their_launcher_is_killed(killed: Callable[..., None]) -> None:
    killed("torchrun", 1)


@pytest.mark.slow
def test_two_processes_stop_when_their_launcher_is_gone(inputs: Inputs, tmp_path: Path) -> None:
    arguments = [*SCENARIOS["torchrun"].arguments(inputs), "--samples", "2000", "--quiet"]
    life = Torchrun(arguments, tmp_path)
    life.ready()
    send(life.targets()["launcher"], signal.SIGKILL)
    ended = life.wait()
    assert "streamprune: stopped on request; run the same command again to resume\n" in ended.err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_torchrun_goes_on_by_itself(inputs: Inputs, tmp_path: Path) -> None:
    life = Torchrun(SCENARIOS["torchrun"].arguments(inputs), tmp_path, "--max-restarts", "1")
    life.ready()
    send(life.targets()["rank 1"], signal.SIGKILL)
    ended = life.wait()
    assert ended.code == 0, ended.err
    assert left_behind(tmp_path, set()) == []


def test_a_life_begins_as_the_command_does(inputs: Inputs, tmp_path: Path) -> None:
    before = sorted(os.listdir())
    life = Forked(["plan", str(inputs.model), "--ratio", "2"], tmp_path)
    ended = life.wait()
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == "streamprune: ratio is 2; it must be in (0, 1)\n"
    assert sorted(os.listdir()) == before
