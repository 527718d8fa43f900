"""Unattended jobs: signals, status, log, --quiet, and the shell scripts in examples/."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from conftest import ROOT, contents
from kills.life import Ended, Forked
from streamprune_cli import main

import streamprune
from streamprune import Callback, Config, Event, Stopped, TuneConfig
from streamprune.commands.status import EXIT_CODES
from streamprune.errors import ConfigError, NumericalError, ResumeError
from streamprune.jobs.folder import JobFolder
from streamprune.jobs.journal import Journal
from streamprune.jobs.names import job_folder
from streamprune.jobs.schedule import Phase, Schedule
from streamprune.pruning.block import BlockPruner
from streamprune.system import files

pytestmark = pytest.mark.slow

Make = Callable[..., Config]
Tiny = Callable[..., Path]
SMALL = ["--samples", "6", "--seq-len", "24", "--round-to", "4"]


@pytest.fixture
def arguments(tiny: Tiny, text: Path, tmp_path: Path) -> list[str]:
    """`streamprune run` on a tiny model, as typed."""
    return ["run", str(tiny("llama")), str(tmp_path / "out"), "--ratio", "0.3", "--calibration", str(text), *SMALL]


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def lines(out: Path) -> list[str]:
    """Names of the finished steps."""
    return [entry["step"] for entry in Journal(job_folder(out) / "journal.jsonl", repair=False).steps()]


class Stopping:
    """For `Callback`: returns false so many times, then true."""

    def __init__(self, asks: int) -> None:
        self.left = asks

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


class Impatient(Callback):
    """Stops wherever a job can, except where a process that stops makes no progress."""

    def __init__(self) -> None:
        super().__init__(self._see, stopping=self._stops)
        self._event = Event("phase", "", 0, 0, "")

    def _see(self, event: Event) -> None:
        self._event = event

    def _stops(self) -> bool:
        event = self._event
        last = event.total > 0 and event.done == event.total
        return not last and event.phase not in ("check weights", "generate", "write", "verify")


# Signals.


def send_in_block_1(name: str, times: int) -> None:
    """Have the command get so many signals in the middle of block 1; with none, its parent gets one and passes it on."""
    real = BlockPruner.prune

    def prune(self: BlockPruner, block: Any, index: int, *given: Any) -> Any:
        if index == 1:
            for _ in range(times):
                os.kill(os.getpid(), getattr(signal, name))
            if not times:
                os.kill(os.getppid(), signal.SIGTERM)
                while signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
                    time.sleep(0.01)
        return real(self, block, index, *given)

    BlockPruner.prune = prune  # type: ignore[method-assign]


def drive(name: str, times: int, arguments: list[str], folder: Path) -> Ended:
    return Forked(arguments, folder, partial(send_in_block_1, name, times)).wait()


def test_a_signal_finishes_the_step_and_the_same_command_resumes(
    arguments: list[str], configured: Make, tiny: Tiny, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    stopped = drive("SIGTERM", 1, [*arguments, "--quiet"], tmp_path)
    message = "streamprune: stopped on request; run the same command again to resume\n"
    assert (stopped.code, stopped.out, stopped.err) == (75, "", message)
    assert not out.exists()
    assert lines(out)[-1] == "shot-1/prune/1"
    assert not list(job_folder(out).rglob("*.tmp"))
    assert invoke("status", str(out)).exit_code == 75
    done = invoke(*arguments, "--json", "--quiet")
    assert (done.exit_code, done.stderr) == (0, "")
    assert json.loads(done.stdout)["resumed"] is True
    streamprune.prune(configured(tiny("llama"), "whole", samples=6, recipe="default", effort=None))
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("name", "times", "code", "last"),
    [("SIGTERM", 2, -signal.SIGTERM, 0), ("SIGINT", 1, 75, 1), ("SIGINT", 2, 130, 0)],
)
def test_a_second_signal_stops_at_once(
    name: str, times: int, code: int, last: int, arguments: list[str], tmp_path: Path
) -> None:
    stopped = drive(name, times, arguments, tmp_path)
    assert stopped.code == code, stopped.err
    assert "stopping at the end of this step; a second signal stops at once" in stopped.err
    assert lines(tmp_path / "out")[-1] == f"shot-1/prune/{last}"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe": "default", "refine": 2},
        {"recipe": "surgeon", "settings": {"shots": "2", "lora_steps": "2"}, "samples": 3},
        {"recipe": "wanda-sp", "calibration": "self", "samples": 2, "seq_len": 6},
    ],
)
def test_stopped_wherever_it_can_the_bytes_are_the_same(changes: dict[str, Any], tiny: Tiny, configured: Make) -> None:
    path = tiny("llama", num_hidden_layers=2)
    whole, parts = (configured(path, out, **changes) for out in ("whole", "parts"))
    streamprune.prune(whole)
    lives = 0
    while not parts.out.exists():
        lives += 1
        try:
            streamprune.prune(parts, progress=Impatient())
        except Stopped:
            assert not parts.out.exists()
        assert lives < 60
    assert lives > 2
    assert contents(parts.out) == contents(whole.out)


@pytest.mark.parametrize("method", ["lora", "distil"])
def test_tuning_stops_and_resumes(
    method: Any, tiny: Tiny, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if method == "lora":
        pytest.importorskip("peft")
    monkeypatch.setattr("streamprune.commands.tune.lora.SAVE_EVERY", 2)
    path, changes = tiny("llama", num_hidden_layers=2), {"rate": 1e-3, "samples": 6, "seq_len": 24, "rank": 2}

    def config(out: str) -> TuneConfig:
        given: dict[str, Any] = {"model": path, "text": text, "steps": 5, "method": method, **changes}
        return TuneConfig(out=tmp_path / out, teacher=path if method == "distil" else None, **given)

    streamprune.tune(config("whole"))
    expected, seen = contents(tmp_path / "whole"), []
    while not (tmp_path / "parts").exists():
        try:
            streamprune.tune(config("parts"), progress=Impatient())
        except Stopped:
            found = streamprune.status(tmp_path / "parts")
            assert found.state == "interrupted"
            seen.append((found.done, found.phase))
        assert len(seen) < 30
    assert len(set(seen)) > 1
    assert seen == sorted(seen, key=lambda each: each[0] or 0)
    assert contents(tmp_path / "parts") == expected
    assert streamprune.status(tmp_path / "parts").state == "finished"


def test_an_evaluation_stops_and_leaves_nothing(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    progress = Callback(events.append, stopping=Stopping(1))
    with pytest.raises(Stopped):
        streamprune.evaluate(tiny("llama"), text, seq_len=24, cache=tmp_path / "cache", progress=progress)
    assert [event.message for event in events if event.kind == "step"] == ["embedding", "block 0", "block 1"]
    assert not list((tmp_path / "cache").iterdir())


def test_a_comparison_stops_within_a_row_and_resumes(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    def compare(out: str, progress: streamprune.Progress | None = None) -> dict[str, Any]:
        found = streamprune.compare(
            tiny("llama"),
            ratios=[0.2, 0.4],
            recipes=["sobp", "magnitude"],
            text=text,
            eval_seq_len=48,
            out=tmp_path / out,
            calibration=text,
            samples=6,
            seq_len=24,
            round_to=4,
            keep=True,
            progress=progress,
        ).as_dict()
        return {row["label"] + str(row["ratio"]): row["perplexity"] for row in found["rows"]}

    whole = compare("whole")
    rows = {row.name: contents(row) for row in (tmp_path / "whole" / "rows").iterdir()}
    out = tmp_path / "parts"
    assert streamprune.status(out).state == "not started"
    seen: list[streamprune.Status] = []
    running: list[streamprune.Status] = []

    def watch(event: Event) -> None:
        if event.kind == "step":
            running.append(streamprune.status(out))

    for asks in (14, 6, 9, 4):
        with pytest.raises(Stopped):
            compare("parts", Callback(watch, stopping=Stopping(asks)))
        seen.append(streamprune.status(out))
    assert {found.state for found in seen} == {"interrupted"}
    assert {found.state for found in running} == {"running"}
    within = [found for found in seen if found.row is not None and found.row.state == "interrupted"]
    assert within
    assert within[0].phase == "prune"
    assert within[0].row is not None
    assert within[0].row.out == "sobp-0.2"
    assert within[0].row.done
    assert within[0].seconds_left is not None
    assert invoke("status", str(out)).exit_code == 75
    assert compare("parts") == whole
    assert {row.name: contents(row) for row in (out / "rows").iterdir()} == rows
    found = streamprune.status(out)
    assert (found.state, found.done, found.total) == ("finished", 9, 9)
    assert (out / "log.txt").read_text().count("stopped on request") == 4


def test_a_comparison_is_finished_when_its_table_is(
    tiny: Tiny, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def compare(ratios: list[float], **changes: Any) -> None:
        given: dict[str, Any] = {"recipes": ["magnitude"], "text": text, "eval_seq_len": 48, "samples": 6}
        streamprune.compare(tiny("llama"), ratios=ratios, out=out, seq_len=24, round_to=4, **given, **changes)

    def write(self: streamprune.Comparison, folder: Path, *, plotted: bool = False) -> None:
        raise OSError("the disk is full")

    compare([0.2])
    assert streamprune.status(out).state == "finished"
    # With more rows, the comparison is unfinished, and the old table is not its result.
    with monkeypatch.context() as patch:
        patch.setattr(streamprune.Comparison, "write", write)
        with pytest.raises(OSError, match="full"):
            compare([0.2, 0.3])
    found = streamprune.status(out)
    assert (found.state, found.error, found.done, found.total) == ("failed", "OSError: the disk is full", 5, 5)
    compare([0.2, 0.3])
    assert streamprune.status(out).state == "finished"
    with pytest.raises(Stopped):
        compare([0.4], progress=Callback(lambda event: None, stopping=lambda: True))
    assert streamprune.status(out).state == "interrupted"


# Status and log.


def test_every_state_has_its_exit_code(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"

    def state() -> dict[str, Any]:
        shown = invoke("status", str(out), "--json")
        found: dict[str, Any] = json.loads(shown.stdout)
        assert shown.exit_code == EXIT_CODES[found["state"]]
        assert invoke("status", str(out)).stdout.startswith(f"{out}: {found['state']}")
        return found

    assert state()["state"] == "not started"
    assert invoke(*arguments, "--plan-only").exit_code == 0
    found = state()
    assert (found["state"], found["phase"], found["shot"]) == ("interrupted", "prune", 1)
    # embed, forward and backward, head, surveyed, allocate; prune, pruned, finished, complete.
    assert (found["done"], found["total"], found["share"]) == (10, 16, 0.625)
    seen = []
    real = BlockPruner.prune

    def prune(self: BlockPruner, block: Any, index: int, *given: Any) -> Any:
        if index < 2:
            seen.append(state())
            return real(self, block, index, *given)
        raise NumericalError("the numbers are wrong")

    with monkeypatch.context() as patch:
        patch.setattr(BlockPruner, "prune", prune)
        assert invoke(*arguments).exit_code == 1
    assert [(found["state"], found["done"], found["phase"]) for found in seen] == [
        ("running", 10, "prune"),
        ("running", 11, "prune"),
    ]
    assert seen[1]["seconds_left"] is not None
    found = state()
    assert (found["state"], found["error"], found["done"]) == ("failed", "the numbers are wrong", 12)
    # A refused command changes nothing of this; one that resumes does.
    log = (job_folder(out) / "log.txt").read_bytes()
    assert "contains a job with other settings" in invoke(*arguments, "--seed", "7").stderr
    assert (job_folder(out) / "log.txt").read_bytes() == log
    assert state()["state"] == "failed"
    assert invoke(*arguments).exit_code == 0
    found = state()
    assert (found["state"], found["error"], found["share"]) == ("finished", None, 1.0)
    assert found["seconds"] == json.loads((out / "report.json").read_text())["seconds"]


def test_status_changes_nothing(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    invoke(*arguments, "--plan-only")
    journal = job_folder(out) / "journal.jsonl"
    with journal.open("ab") as file:
        file.write(b"torn")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert invoke("status", str(out)).exit_code == 75
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    # A process that checks the lock does not keep a job from starting.
    import fcntl

    with (job_folder(out) / "lock").open() as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        monkeypatch.setattr(files.time, "sleep", lambda seconds: looking.close())
        assert invoke(*arguments).exit_code == 0


def test_a_result_that_was_renamed_but_not_cleared_is_finished(
    tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(tiny("llama"))
    with monkeypatch.context() as patch:
        patch.setattr(JobFolder, "clear", lambda self: None)
        streamprune.prune(config)
    assert job_folder(config.out).is_dir()
    assert streamprune.status(config.out).state == "finished"


def test_what_has_no_status(tiny: Tiny, text: Path, arguments: list[str], tmp_path: Path) -> None:
    for other in (tiny("llama"), text):
        assert invoke("status", str(other)).exit_code == 2
        with pytest.raises(ConfigError, match="not a job's result"):
            streamprune.status(other)
    invoke(*arguments, "--plan-only")
    journal = job_folder(tmp_path / "out") / "journal.jsonl"
    journal.write_bytes(b"x" + journal.read_bytes())
    with pytest.raises(ResumeError, match="damaged"):
        streamprune.status(tmp_path / "out")
    assert invoke("status", str(tmp_path / "out")).exit_code == 1


def test_the_log_has_every_line_with_its_time(
    tiny: Tiny, configured: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(tiny("llama"), calibration=None)
    events: list[Event] = []
    with pytest.raises(Stopped):
        streamprune.prune(config, progress=Callback(events.append, stopping=Stopping(9)))
    first = (job_folder(config.out) / "log.txt").read_text()
    assert first.endswith(" stopped on request; run the same command again to resume\n")
    streamprune.prune(config, progress=Callback(events.append))
    log = (config.out / "log.txt").read_text()
    assert log.startswith(first)
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ \S", line) for line in log.splitlines())
    told = [line.partition(" ")[2] for line in log.splitlines()]
    expected = [f"note: {event}" if event.kind == "note" else str(event) for event in events]
    own = [f"streamprune {streamprune.__version__} starts", f"streamprune {streamprune.__version__} resumes"]
    own += ["stopped on request; run the same command again to resume", "finished"]
    assert [line for line in told if line not in own] == expected
    assert [line for line in told if line in own] == [own[0], own[2], own[1], own[3]]
    assert (
        "note: no --calibration given: using the built-in English sample; text of your own domain does better" in told
    )
    assert "prune: 3 of 3, block 2: " in log


def test_a_bug_is_logged_with_its_kind(tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def prune(self: BlockPruner, block: Any, index: int, *given: Any) -> Any:
        raise KeyError("nothing\nat all")

    monkeypatch.setattr(BlockPruner, "prune", prune)
    config = configured(tiny("llama"))
    with pytest.raises(KeyError):
        streamprune.prune(config)
    found = streamprune.status(config.out)
    assert (found.state, found.error) == ("failed", "KeyError: 'nothing\\nat all'")


# The estimate.


def journal_of(tmp_path: Path, steps: dict[str, float]) -> Journal:
    tmp_path.mkdir(exist_ok=True)
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append("start")
    for step, seconds in steps.items():
        journal.append(step, seconds=seconds)
    return journal


PHASES = [
    {"name": "shot-1/forward", "steps": 2, "skipped_after": "shot-1/allocate"},
    {"name": "shot-1/allocate"},
    {"name": "shot-1/prune", "steps": 2},
    {"name": "shot-2/forward", "steps": 2, "skipped_after": "shot-2/allocate"},
    {"name": "shot-2/allocate"},
    {"name": "shot-2/prune", "steps": 2},
]


def test_the_estimate_by_hand(tmp_path: Path) -> None:
    assert Schedule(PHASES, journal_of(tmp_path, {})).seconds_left() is None
    journal = journal_of(tmp_path, {"shot-1/forward/0": 10.0, "shot-1/forward/1": 14.0})
    schedule = Schedule(PHASES, journal)
    assert (schedule.done, schedule.total) == (2, 10)
    assert schedule.current == Phase("shot-1/allocate")
    # Nothing else is measured yet: 8 steps of 12 s.
    assert schedule.seconds_left() == pytest.approx(8 * 12)
    journal.append("shot-1/allocate", seconds=5.0)
    journal.append("shot-1/prune/0", seconds=30.0)
    schedule = Schedule(PHASES, journal)
    assert schedule.seconds_left() == pytest.approx(30 + 2 * 12 + 5 + 2 * 30)
    assert schedule.seconds_left(since=10) == pytest.approx(20 + 2 * 12 + 5 + 2 * 30)
    assert schedule.seconds_left(since=1000) == pytest.approx(2 * 12 + 5 + 2 * 30)
    # A step known to take 40 s counts as measured.
    assert schedule.seconds_left(since=10, step=40.0) == pytest.approx(30 + 2 * 12 + 5 + 2 * 35)


def test_skipped_steps_and_names_that_begin_alike(tmp_path: Path) -> None:
    schedule = Schedule(PHASES, journal_of(tmp_path, {"shot-1/allocate": 2.0}))
    assert (schedule.done, schedule.total, schedule.current) == (3, 10, Phase("shot-1/prune", 2))
    journal = journal_of(tmp_path / "other", {"prune/a-0.25": 1.0})
    schedule = Schedule([{"name": "prune/a-0.2"}, {"name": "prune/a-0.25"}], journal)
    assert (schedule.done, schedule.current) == (1, Phase("prune/a-0.2"))


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe": "default", "settings": {"shots": "2"}},
        {"recipe": "sobp"},
        {"recipe": "magnitude"},
        {"recipe": "wanda-sp", "calibration": "self", "samples": 2, "seq_len": 6},
        {"recipe": "greedy-output"},
        {"recipe": "slimgpt"},
        {"recipe": "surgeon", "settings": {"shots": "2", "lora_steps": "2"}, "samples": 3},
    ],
    ids=lambda changes: changes["recipe"],
)
def test_the_schedule_is_what_the_job_does(
    changes: dict[str, Any], tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(tiny("llama", num_hidden_layers=2), **changes)
    monkeypatch.setattr(JobFolder, "clear", lambda self: None)
    streamprune.prune(config)
    journal = Journal(job_folder(config.out) / "journal.jsonl")
    assert journal.header is not None
    schedule = Schedule(journal.header["schedule"], journal)
    assert schedule.current is None
    assert schedule.seconds_left() == 0
    names = [entry["step"] for entry in journal.steps()]
    assert schedule.total == len(names)
    place = [
        next(i for i, p in enumerate(schedule.phases) if name == p.name or name.startswith(f"{p.name}/"))
        for name in names
    ]
    assert place == sorted(place)


# The scripts.

SHIM = f"""#!/bin/bash
# Stands for the installed command.
exec {sys.executable} -m streamprune_cli "$@"
"""


@pytest.fixture
def shell(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a script with `streamprune`, and whatever other programs are given by name and text, on its PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def run(*command: str, env: dict[str, str] | None = None, **programs: str) -> subprocess.CompletedProcess[str]:
        for name, program in {"streamprune": SHIM, **programs}.items():
            (folder / name).write_text(program)
            (folder / name).chmod(0o755)
        path = f"{folder}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, **(env or {}), "PATH": path, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)

    return run


@pytest.mark.parametrize("name", ["slurm.sh", "slurm-nodes.sh", "sweep.sh", "torchrun.sh"])
def test_the_scripts_are_shell(name: str) -> None:
    script = ROOT / "examples" / name
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)


FAKE_SBATCH = """#!/bin/bash
# Stands for Slurm: runs the script at once, and again for as long as it asks to be requeued.
while true; do
    rm -f requeued
    SLURM_JOB_ID=7 "$@"
    [ -f requeued ] || exit 0
done
"""
FAKE_SCONTROL = '#!/bin/bash\n[ "$1 $2" = "requeue 7" ] && touch requeued\n'
FAKE_SRUN = '#!/bin/bash\nexec "$@"\n'


def stopping_shim(times: int) -> str:
    """The command, which is asked to stop in its first life."""
    return f"""#!/bin/bash
if [ "$1" = run ] && [ ! -f stopped ]; then
    touch stopped
    export PYTHONPATH={ROOT}/tests:{ROOT}/tests/cli
    exec {sys.executable} -c 'import sys, test_batch as t; t.send_in_block_1("SIGTERM", {times}); t.main(sys.argv[1:])' "$@"
fi
exec {sys.executable} -m streamprune_cli "$@"
"""


@pytest.mark.slow
def test_a_sweep_through_the_queue_requeues_and_polls(
    shell: Callable[..., subprocess.CompletedProcess[str]],
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    programs = {"sbatch": FAKE_SBATCH, "srun": FAKE_SRUN, "scontrol": FAKE_SCONTROL, "streamprune": stopping_shim(1)}
    sweep = [str(ROOT / "examples" / "sweep.sh"), arguments[1], "small", "0.2", *arguments[5:]]
    submit = {"SUBMIT": f"sbatch {ROOT / 'examples' / 'slurm.sh'}", "POLL": "0.1"}
    done = shell(*sweep, env=submit, **programs)
    assert done.returncode == 0, done.stderr
    assert "stopped; requeueing job 7 to resume" in done.stdout
    assert done.stdout.endswith("small-0.2: queued\nsmall-0.2: finished\n")
    log = (tmp_path / "small-0.2" / "log.txt").read_text()
    assert log.count("stopped on request") == 1
    assert log.count("resumes") == 1


@pytest.mark.slow
def test_a_sweep_skips_stops_and_resumes(
    shell: Callable[..., subprocess.CompletedProcess[str]],
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    options = [*arguments[5:], "--quiet"]
    assert invoke("run", arguments[1], "small-0.2", "--ratio", "0.2", *options).exit_code == 0
    sweep = [str(ROOT / "examples" / "sweep.sh"), arguments[1], "small", "0.2 0.3", *options]
    stopped = shell(*sweep, streamprune=stopping_shim(0))
    assert stopped.returncode == 75, stopped.stderr
    assert stopped.stdout == "small-0.2: finished before\n"
    assert "small-0.3: stopped; run the same command again to resume" in stopped.stderr
    assert streamprune.status("small-0.3").state == "interrupted"
    done = shell(*sweep)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("small-0.2: finished before\nsmall-0.3: ")
    assert done.stdout.endswith("small-0.3: finished\n")
    assert streamprune.status("small-0.3").state == "finished"
