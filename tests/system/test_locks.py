"""Two jobs at once: on one OUT the second is refused while a process at the first lives, on two OUTs neither minds the other."""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import contents
from faulty import AT, Fault, FaultyDisk
from kills.campaign import left_behind, paths
from kills.life import Ended, Forked, Life, Torchrun, send
from kills.scenario import SCENARIOS, Inputs

import streamprune
from streamprune import Config
from streamprune.commands.status import read_journal
from streamprune.errors import DiskError, ResumeError
from streamprune.jobs.caches import Caches
from streamprune.jobs.folder import JobFolder
from streamprune.jobs.journal import Journal
from streamprune.jobs.names import JOURNAL, LOCK, job_folder
from streamprune.system import disk, files

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux")]

Make = Callable[..., Config]
Tiny = Callable[..., Path]


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs.make(tmp_path_factory.mktemp("inputs"))


@contextmanager
def halted(arguments: list[str], folder: Path, life: type[Life] = Forked) -> Iterator[Life]:
    """A context in which the command is stopped in the midst of its work; it is killed at the end."""
    journals = [job_folder(folder / "out") / JOURNAL, folder / "out" / JOURNAL]
    with ExitStack() as stack:
        running = life(arguments, folder)  # type: ignore[call-arg, arg-type]
        stack.callback(running.wait)
        stack.callback(lambda: [send(pids, signal.SIGKILL) for pids in running.targets().values()])
        while not any(path.is_file() and path.read_bytes().count(b"\n") > 2 for path in journals):
            assert not running.ended_within(0.002), running.wait().err
        for pids in running.targets().values():
            send(pids, signal.SIGSTOP)
        yield running


def refused(ended: Ended) -> bool:
    """Whether it was said, once, that another process is at work."""
    said = [line for line in ended.err.splitlines() if line.startswith("streamprune: ")]
    return (
        ended.code == 1
        and len(said) == 1
        and said[0].startswith("streamprune: another process is working on this job (")
        and said[0].endswith("lock is locked)")
    )


def files_below(folder: Path) -> dict[Path, bytes]:
    """Everything but what lives of the command write elsewhere."""
    parts = {"streams", "temporary"}
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and parts.isdisjoint(path.parts)}


def test_the_second_is_refused_and_a_dead_one_holds_nothing(inputs: Inputs, tmp_path: Path) -> None:
    def invoke(*arguments: str) -> Ended:
        return Forked(arguments, tmp_path).wait()

    run, tune = (SCENARIOS[name].arguments(inputs) for name in ("sobp", "distil"))
    with halted(run, tmp_path):
        before = files_below(tmp_path)
        for second in (run, tune, [*run, "--restart"], [*tune, "--restart"], [*run, "--plan-only"]):
            assert refused(invoke(*second)), second
        # Whoever only looks is answered, and nobody has changed anything.
        assert invoke("status", "out").code == 4
        assert invoke("plan", run[1], *run[3:], "--json").code == 0
        assert files_below(tmp_path) == before
    again = invoke(*run, "--json")
    assert json.loads(again.out)["resumed"] is True
    assert not job_folder(tmp_path / "out").exists()


def test_a_tuning_keeps_a_pruning_out(inputs: Inputs, tmp_path: Path) -> None:
    run, tune = (SCENARIOS[name].arguments(inputs) for name in ("sobp", "distil"))
    with halted(tune, tmp_path):
        for second in (run, [*run, "--restart"]):
            assert refused(Forked(second, tmp_path).wait())


def test_of_two_comparisons_the_second_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    compare = SCENARIOS["compare"].arguments(inputs)
    with halted(compare, tmp_path):
        for second in (compare, [*compare, "--restart"]):
            assert refused(Forked(second, tmp_path).wait())
        assert Forked(["status", "out"], tmp_path).wait().code == 4
        # A comparison's folder is no pruning's OUT.
        assert Forked(SCENARIOS["sobp"].arguments(inputs), tmp_path).wait().code == 2


@pytest.mark.slow
def test_a_job_of_two_processes_and_one_by_itself(inputs: Inputs, tmp_path: Path) -> None:
    run = SCENARIOS["torchrun"].arguments(inputs)
    with halted([*run, "--samples", "500"], tmp_path, Torchrun):
        assert refused(Forked(run, tmp_path).wait())
    lock = job_folder(tmp_path / "out") / LOCK
    while files.is_locked(lock):  # the launcher may end before its processes do
        time.sleep(0.05)
    with files.locked(lock):
        assert refused(Torchrun(run, tmp_path).wait())


@pytest.mark.parametrize("spelled", ["./out", "out/", "below/../out", "link/out", "{}/out", "{}/link/out/"])
def test_however_out_is_spelled_it_is_one_job(spelled: str, inputs: Inputs, tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    run = [*SCENARIOS["sobp"].arguments(inputs), "--cache", str(tmp_path / "cache")]
    other = [*run[:2], spelled.format(tmp_path), *run[3:]]
    with halted(run, tmp_path):
        assert refused(Forked(other, tmp_path).wait())
    again = Forked([*other, "--json"], tmp_path).wait()
    assert again.code == 0, again.err
    assert json.loads(again.out)["resumed"] is True
    assert {path.name for path in tmp_path.iterdir()} == {"below", "cache", "link", "out", "streams", "temporary"}
    assert not list((tmp_path / "cache").iterdir())


def test_two_jobs_with_one_cache_at_once(inputs: Inputs, tmp_path: Path) -> None:
    run = [*SCENARIOS["default"].arguments(inputs), "--cache", str(tmp_path / "shared")]
    assert Forked(run, tmp_path / "alone").wait().code == 0
    lives = [Forked(run, tmp_path / name) for name in ("one", "other")]
    assert [life.wait().code for life in lives] == [0, 0]
    for life in lives:
        assert contents(life.folder / "out") == contents(tmp_path / "alone" / "out")
        assert left_behind(life.folder, paths(tmp_path / "alone")) == []
    assert not list((tmp_path / "shared").iterdir())


# Between two instants of one process.


def test_the_lock_is_the_last_to_go(tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(tiny("llama"))
    folder = job_folder(config.out)
    seen = []
    real = os.unlink

    def unlink(path: str | Path, **options: int) -> None:
        if config.out.exists():
            seen.append((os.path.basename(path), files.is_locked(folder / LOCK)))
        real(path, **options)

    monkeypatch.setattr(os, "unlink", unlink)
    streamprune.prune(config)
    names, held = zip(*seen, strict=True)
    assert names[-1] == LOCK
    assert JOURNAL in names[:-1]
    assert all(held)


def test_who_comes_in_behind_the_lock_keeps_the_folder(
    tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(tiny("llama"))
    folder = job_folder(config.out)
    real = files.remove

    def remove(path: Path) -> None:
        real(path)
        if path == folder / LOCK:
            path.write_text("another process's")

    monkeypatch.setattr(files, "remove", remove)
    streamprune.prune(config)
    assert [path.name for path in folder.iterdir()] == [LOCK]


def test_a_result_that_appears_before_the_lock_is_had_is_not_replaced(
    tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (configured(tiny("llama"), seed=seed, recipe="random") for seed in (1, 2))
    real = JobFolder.opened

    def opened(self: JobFolder, restart: bool) -> object:
        with monkeypatch.context() as patch:
            patch.setattr(JobFolder, "opened", real)
            streamprune.prune(first)
        return real(self, restart)

    with monkeypatch.context() as patch:
        patch.setattr(JobFolder, "opened", opened)
        with pytest.raises(ResumeError, match="another process has just finished this job: OUT is"):
            streamprune.prune(second)
    assert not job_folder(first.out).exists()
    assert streamprune.prune(first).resumed


def test_a_folder_that_is_gone_before_it_is_locked(tmp_path: Path) -> None:
    with (
        pytest.raises(ResumeError, match="another process has just finished this job"),
        files.locked(tmp_path / "gone" / LOCK),
    ):
        pass


def test_a_job_may_end_while_its_status_is_looked_at(
    tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(tiny("llama"))
    looks = []

    def read(out: Path) -> Journal | None:
        looks.append(out)
        if len(looks) == 1:
            streamprune.prune(config)
            raise FileNotFoundError(job_folder(out) / JOURNAL)
        return read_journal(out)

    monkeypatch.setattr(sys.modules[streamprune.status.__module__], "read_journal", read)
    assert streamprune.status(config.out).state == "finished"
    assert len(looks) == 2


def test_scratch_of_the_dead_goes_and_of_the_living_stays(tmp_path: Path) -> None:
    dead, unlocked, other = tmp_path / "work-dead", tmp_path / "work-unlocked", tmp_path / "other"
    for folder in (dead, unlocked, other):
        (folder / "below").mkdir(parents=True)
    (dead / LOCK).touch()
    (tmp_path / "work-link").symlink_to(other)
    (tmp_path / "work-file").touch()
    with files.scratch(tmp_path, "work-") as living:
        (living / "data").write_text("here")
        with files.scratch(tmp_path, "work-") as mine:
            names = {path.name for path in tmp_path.iterdir()}
        assert names == {living.name, mine.name, "other", "work-link", "work-file"}
        assert (living / "data").read_text() == "here"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["below", "other", "work-file", "work-link"]


def test_scratch_that_another_process_takes_for_the_dead_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, made = tempfile.mkdtemp, list[Path]()

    def mkdtemp(**options: Any) -> str:
        made.append(Path(real(**options)))
        if len(made) == 1:
            made[0].rmdir()
        return str(made[-1])

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    with files.scratch(tmp_path, "work-") as folder:
        assert folder == made[1]
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700  # for this user alone
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fault", ["full", "error"])
def test_wherever_the_disk_fails_scratch_says_so_and_goes(fault: Fault, tmp_path: Path) -> None:
    work, graves = tmp_path / "work", tmp_path / "graves"
    work.mkdir()
    graves.mkdir()
    with disk.using(whole := FaultyDisk(work, graves)), files.scratch(work, "work-"):
        begun = whole.count
    assert [operation.split()[0] for operation in whole.operations[:begun]] == ["create", "lock"]
    for at, operation in enumerate(whole.operations[:begun], start=1):
        faulty = FaultyDisk(work, graves, fault, at)
        if operation.split()[0] in AT[fault]:
            with (
                disk.using(faulty),
                pytest.raises(DiskError, match=r"cannot lock .*: (No space|Input/output)"),
                files.scratch(work, "work-"),
            ):
                pass
            assert faulty.happened
        assert not list(work.iterdir())


def test_a_scratch_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.tempfile, "mkdtemp", lambda **where: os.mkdir(tmp_path / "none" / "below"))
    with pytest.raises(DiskError, match=r"cannot make .*work-: No such file"), files.scratch(tmp_path, "work-"):
        pass


def test_a_scratch_folder_that_is_being_emptied_is_not_left_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, others = files._remove_all, []

    def remove(path: Path) -> None:
        if path.name == "mine" and not others:
            others.append(path)
            with files.scratch(tmp_path, "work-"):  # as another process would
                pass
            assert path.exists()
        real(path)

    monkeypatch.setattr(files, "_remove_all", remove)
    with files.scratch(tmp_path, "work-") as folder:
        (folder / "mine").touch()
    assert others
    assert not list(tmp_path.iterdir())


def test_a_lock_that_cannot_be_looked_at_is_no_lock_that_is_free(tmp_path: Path) -> None:
    (tmp_path / LOCK).touch()
    for at in (1, 2):
        with (
            disk.using(FaultyDisk(tmp_path, tmp_path, "error", at)),
            pytest.raises(DiskError, match=r"cannot read .*: Input/output error"),
        ):
            files.is_locked(tmp_path / LOCK)


@pytest.mark.usefixtures("impatient")
def test_a_lock_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / LOCK)
    assert not files.is_locked(tmp_path / LOCK)


def test_a_refused_job_leaves_no_folder(tiny: Tiny, configured: Make, tmp_path: Path) -> None:
    config = configured(tiny("llama"), cache=tmp_path / "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Caches, "record", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            streamprune.prune(config)
    assert not list(tmp_path.iterdir())
