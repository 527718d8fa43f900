"""Jobs of one scenario, each killed at random instants and started again until it is finished."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from streamprune.jobs.names import JOURNAL, job_folder
from streamprune.system.files import TEMPORARY

from .life import Ended, Life, Torchrun, processes_below, send
from .scenario import Inputs, Make, Scenario

OWN = {"streams"}
"""What the campaign itself keeps in a job's folder."""
MOST = 40
"""Lives after which a job is taken never to come to an end."""
ENDS = {signal.SIGKILL: {-9}, signal.SIGTERM: {75, -15}, signal.SIGINT: {75, 130, -2}, signal.SIGHUP: {75, -1}}
"""How a process may end that was sent a signal: asked to stop or, before its work began, at once."""


@dataclass
class Tally:
    """What became of a scenario's jobs."""

    scenario: str
    lives: int = 0
    kills: int = 0
    resumed: int = 0
    """Lives that found a journal of an earlier one."""
    jobs: int = 0
    same: int = 0
    """Jobs that came out as the one that nobody interrupted."""
    faults: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    """What was still there of a job that was finished."""

    @property
    def good(self) -> bool:
        """Whether all is as it should be."""
        return not self.faults and not self.left and self.same == self.jobs


class Campaign:
    """One scenario in a folder of its own.

    Args:
        number: the signal.
        tell: gets a line a job.
    """

    def __init__(
        self,
        scenario: Scenario,
        inputs: Inputs,
        folder: Path,
        *,
        seed: int,
        number: signal.Signals = signal.SIGKILL,
        tell: Callable[[str], object] = print,
    ) -> None:
        self.scenario, self.inputs, self.folder, self.number = scenario, inputs, folder, number
        self._tell = tell
        self._random = random.Random(f"{seed} {scenario.name} {number.name}")
        self.tally = Tally(scenario.name)
        self._whole = folder / "whole"
        self._seconds = self._undisturbed(scenario.arguments, self._whole)
        """That instants are drawn from; less once a life of no kills took less, on a machine that has other work too."""
        self._expected = scenario.result(self._whole / "out")
        self._seconds_before = 0.0
        if scenario.before is not None:
            self._seconds_before = self._undisturbed(scenario.before, folder / "before")

    def kill(self, kills: int) -> Tally:
        """Jobs, one after the other, until so many signals were sent."""
        while self.tally.kills < kills:
            self._job(self.folder / f"job-{self.tally.jobs}", kills)
        return self.tally

    def _undisturbed(self, make: Make, folder: Path) -> float:
        """Run the whole command; returns its seconds."""
        life = self._begin(make, folder)
        life.ready()
        begun = time.monotonic()
        ended = life.wait()
        assert ended.code == 0, ended.err
        assert not left_behind(folder, set()), left_behind(folder, set())
        return time.monotonic() - begun

    def _begin(self, make: Make, folder: Path, *more: str) -> Life:
        return self.scenario.life([*make(self.inputs), "--json", *more], folder)

    def _job(self, folder: Path, kills: int) -> None:
        tally, told = self.tally, []
        more: list[str] = []
        if self.scenario.before is not None:
            # Sometimes it comes to its end: then there is a result to replace.
            self._life(self._begin(self.scenario.before, folder), 1.2 * self._seconds_before)
            more = ["--restart"]
        for _ in range(MOST):
            tally.lives += 1
            tally.resumed += has_journal(folder) and not more
            life = self._begin(self.scenario.arguments, folder, *more)
            begun = time.monotonic()
            sent, ended = self._life(life, self._seconds if tally.kills < kills else None)
            seconds = time.monotonic() - begun
            tally.kills += sent is not None
            told.append(f"{sent or 'to the end'}: {ended.code}")
            if "Traceback" in ended.err and self.scenario.life is not Torchrun:
                tally.faults.append(f"{folder.name}: {ended.err}")
            if sent is None and ended.code == 0:
                if len(told) == 1 and not more:
                    self._seconds = min(self._seconds, seconds)
                break
            # Killed before it let go of the earlier job, it is that one's folder still.
            refused = sent is None and "--restart" in ended.err
            more = ["--restart"] if self.scenario.before is not None and refused and not more else []
            if sent is None and not more:
                tally.faults.append(f"{folder.name}: exit code {ended.code}: {ended.err}")
                break
            if sent is not None and not self._as_sent(ended):
                tally.faults.append(f"{folder.name}: {sent} gave exit code {ended.code}: {ended.err}")
        else:
            tally.faults.append(f"{folder.name}: not finished after {MOST} lives")
        tally.jobs += 1
        out = folder / "out"
        same = out.is_dir() and self.scenario.result(out) == self._expected
        tally.same += same
        left = left_behind(folder, paths(self._whole))
        tally.left += [f"{folder.name}: {each}" for each in left]
        self._tell(f"{self.scenario.name} {folder.name}: {', '.join(told)}" + ("" if same else "; OTHER BYTES"))
        if same and not left:
            shutil.rmtree(folder)

    def _life(self, life: Life, seconds: float | None) -> tuple[str | None, Ended]:
        """One life, with a signal within so many seconds if it lasts that long: what was sent, and its end."""
        sent = None
        if seconds is not None:
            life.ready()
            instant = self._random.uniform(0, seconds)
            if not life.ended_within(instant) and (targets := life.targets()):
                whom, pids = self._random.choice(sorted(targets.items()))
                send(pids, self.number)
                sent = f"{whom} at {instant:.3f} of {seconds:.3f} s"
        ended = life.wait()
        # It may have been at its end already.
        return (None if ended.code == 0 else sent), ended

    def _as_sent(self, ended: Ended) -> bool:
        """Whether it ended as the signal has it; torchrun knows 1 only, but where it was killed itself."""
        return ended.code in ENDS[self.number] | ({1} if self.scenario.life is Torchrun else set())


def has_journal(folder: Path) -> bool:
    """Whether a life left something to go on from."""
    out = folder / "out"
    return any(path.is_file() for path in (job_folder(out) / JOURNAL, out / JOURNAL))


def paths(folder: Path) -> set[str]:
    """All that a job's folder holds."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


GENERATED = "_remote_module_non_scriptable.py"


def left_behind(folder: Path, expected: set[str]) -> list[str]:
    """What a finished job has no more use for, or another one like it does not have, and processes that live on."""
    there = sorted(paths(folder))
    # torchrun's own, and what an older torch writes when it is imported.
    torch = ["temporary/torchelastic_", *(str(Path(name).parent) for name in there if name.endswith(GENERATED))]
    found = [
        name
        for name in there
        if not name.startswith(tuple(torch))
        if ".streamprune" in name
        or name.endswith((TEMPORARY, "/lock"))
        or (Path(name).parts[0] in ("cache", "other", "temporary") and len(Path(name).parts) > 1)
        or (expected and name not in expected and Path(name).parts[0] == "out")
    ]
    return found + [f"process {pid}" for pid in processes_below(folder)]
