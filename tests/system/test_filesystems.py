"""What a job rests on is tried on its file systems before any work, refused by name, and leaves nothing behind."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from streamprune_cli import main

import streamprune
from streamprune.commands.compare import run as comparison
from streamprune.errors import ConfigError, DiskError
from streamprune.jobs.caches import Caches
from streamprune.jobs.names import job_folder
from streamprune.system import disk, files
from streamprune.system.disk import Disk

Tiny = Callable[..., Path]
Run = Callable[..., Result]


def entries(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture
def run(tiny: Tiny, text: Path) -> Run:
    """`streamprune run` on a tiny model, with a folder for OUT and whatever else is given."""

    def invoke(folder: Path, *more: str) -> Result:
        arguments = ["run", str(tiny("llama")), str(folder / "out"), "--ratio", "0.3", "--calibration", str(text)]
        return CliRunner().invoke(main, [*arguments, "--samples", "4", "--seq-len", "24", "--round-to", "4", *more])

    return invoke


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder in which nothing can be made, by this user."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    if os.geteuid():
        folder.chmod(0o500)
        yield folder
        folder.chmod(0o700)
        return
    mounting = ["mount", "-t", "tmpfs", "-o", "ro,size=64k", "tmpfs", str(folder)]
    if subprocess.run(mounting, capture_output=True, check=False).returncode:
        pytest.skip("root may not mount here, and permissions do not bind it")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def refused(result: Result, *parts: str) -> None:
    """Exit code 1 and one line on stderr with these parts."""
    assert result.exit_code == 1, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("streamprune: ")]
    assert len(lines) == 1, result.stderr
    assert all(part in lines[0] for part in parts), lines[0]


def test_a_good_folder_passes_and_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("kept")
    files.check_file_system(tmp_path, "probe", "go elsewhere")
    files.check_file_system(tmp_path / "not" / "yet" / "there", "probe", "go elsewhere")
    assert entries(tmp_path) == {"kept"}


FAILURES = [
    ("making a folder", "make_folder", 1, errno.EROFS),
    ("making a folder", "sync_folder", 1, errno.EIO),
    ("writing a file and syncing it", "write", 1, errno.ENOSPC),
    ("writing a file and syncing it", "sync", 1, errno.EIO),
    ("writing a file and syncing it", "rename", 1, errno.EPERM),
    ("replacing a file by a rename", "rename", 2, errno.EEXIST),
    ("renaming a folder to where an empty one is", "rename", 4, errno.ENOTEMPTY),
    ("removing a folder", "remove_folder", 2, errno.EBUSY),
]


class Failing(Disk):
    """Refuses one operation when it is asked for the n-th time."""

    def __init__(self, operation: str, number: int, code: int) -> None:
        self.calls = 0
        real = getattr(self, operation)

        def refuse(*arguments: Any) -> Any:
            self.calls += 1
            if self.calls == number:
                raise OSError(code, os.strerror(code))
            return real(*arguments)

        setattr(self, operation, refuse)


@pytest.mark.parametrize(("operation", "name", "number", "code"), FAILURES)
def test_each_operation_is_tried(operation: str, name: str, number: int, code: int, tmp_path: Path) -> None:
    with disk.using(Failing(name, number, code)), pytest.raises(DiskError) as caught:
        files.check_file_system(tmp_path, "probe", "go elsewhere")
    assert str(caught.value) == f"{tmp_path}: {operation} fails there ({os.strerror(code)}); go elsewhere"
    assert not entries(tmp_path)


def no_locks(descriptor: int, how: int) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def test_an_older_file_that_stays_is_noticed(tmp_path: Path) -> None:
    class Keeping(Disk):
        def rename(self, source: Path, target: Path) -> None:
            if target.exists():
                source.unlink()
            else:
                super().rename(source, target)

    with (
        disk.using(Keeping()),
        pytest.raises(DiskError, match=r"by a rename fails there \(the older one is still there"),
    ):
        files.check_file_system(tmp_path, "probe", "go elsewhere")
    assert not entries(tmp_path)


@pytest.mark.parametrize(
    ("flock", "reason"),
    [(no_locks, "No locks available"), (lambda descriptor, how: None, "another process would not see it")],
)
def test_a_file_system_without_locks_is_noticed(
    flock: Callable[[int, int], None], reason: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(DiskError, match=rf"locking a file fails there \({reason}\); go elsewhere"):
        files.check_file_system(tmp_path, "probe", "go elsewhere")
    refused(run(tmp_path), str(tmp_path), "locking a file", reason)
    assert not entries(tmp_path)


def test_a_read_only_folder_is_refused(run: Run, read_only: Path, tmp_path: Path) -> None:
    refused(run(read_only), str(read_only), "making a folder", "choose another OUT")
    cache = read_only / "not" / "there"
    refused(run(tmp_path, "--cache", str(cache)), f"{read_only}: making a folder", "choose another --cache")
    assert entries(tmp_path) == {"read-only"}


def test_the_probe_comes_before_any_work(
    tiny: Tiny, configured: Callable[..., streamprune.Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that goes on is refused as well, and is there afterwards as it was."""
    config = configured(tiny("llama"), cache=tmp_path / "cache")
    streamprune.plan_only(config)
    before = entries(tmp_path)
    asked: list[Path] = []

    def failing(folder: Path, name: str, remedy: str) -> None:
        asked.append(folder)
        if folder != job_folder(config.out):
            raise DiskError("no good")

    monkeypatch.setattr(files, "check_file_system", failing)
    with pytest.raises(DiskError, match="no good"):
        streamprune.prune(config)
    assert asked[0] == job_folder(config.out)
    assert asked[1].parent == tmp_path / "cache"
    assert entries(tmp_path) == before


@pytest.fixture
def compare(tiny: Tiny, text: Path) -> Run:
    """`streamprune compare` on a tiny model, with a folder for OUT and whatever else is given."""

    def invoke(folder: Path, *more: str) -> Result:
        arguments = ["compare", str(tiny("llama")), "--out", str(folder / "out"), "--ratios", "0.3"]
        arguments += ["--recipes", "magnitude", "--text", str(text), "--eval-seq-len", "24", "--round-to", "4"]
        return CliRunner().invoke(main, [*arguments, *more])

    return invoke


@pytest.mark.parametrize("there", [False, True])
def test_a_comparisons_own_folders_are_tried_before_any_work(
    there: bool, compare: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "evaluate", lambda *given, **more: pytest.fail("work"))
    out, cache = tmp_path / "out", tmp_path / "cache"
    cache.mkdir()
    if there:
        (out / "rows").mkdir(parents=True)
    before = entries(tmp_path)
    # Of the probe of `out`, and then of that of the cache.
    for number, place, option in ((1, out, "OUT"), (4, cache, "--cache")):
        with disk.using(Failing("write", number, errno.EIO)):
            refused(
                compare(tmp_path, "--cache", str(cache)), f"{place}: writing a file and syncing it fails there", option
            )
        assert entries(tmp_path) == before
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", no_locks)
        refused(compare(tmp_path), "locking a file in it fails there (No locks available)", "OUT")
    assert entries(tmp_path) == before


def test_a_comparison_follows_no_link_in_the_cache_and_what_a_killed_probe_left_goes(
    compare: Run, tmp_path: Path
) -> None:
    cache, elsewhere = tmp_path / "cache", tmp_path / "elsewhere"
    own = Caches(tmp_path / "out", cache).own
    elsewhere.mkdir()
    cache.mkdir()
    own.symlink_to(elsewhere)
    result = compare(tmp_path, "--cache", str(cache))
    assert result.exit_code == ConfigError.exit_code
    assert f"{own} is a symbolic link" in result.stderr
    assert entries(tmp_path) == {"cache", f"cache/{own.name}", "elsewhere"}
    own.unlink()
    for place in (tmp_path / "out" / "probe", cache / f"{own.name}-probe"):
        place.mkdir(parents=True)
        (place / "file.tmp").write_text("half")
    assert compare(tmp_path, "--cache", str(cache)).exit_code == 0
    assert not entries(cache)
    assert not (tmp_path / "out" / "probe").exists()


def test_what_a_killed_probe_left_goes(run: Run, tmp_path: Path) -> None:
    cache = Caches(tmp_path / "out.streamprune", tmp_path / "cache").own
    for place in (tmp_path / "out.streamprune" / "probe", cache.with_name(f"{cache.name}-probe")):
        place.mkdir(parents=True)
        (place / "file.tmp").write_text("half")
    assert run(tmp_path, "--cache", str(tmp_path / "cache")).exit_code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"out", "cache"}
    assert not entries(tmp_path / "cache")


def test_out_on_a_mount_point_is_refused(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "out")
    result = run(tmp_path)
    assert result.exit_code == ConfigError.exit_code
    assert f"OUT is {tmp_path / 'out'}, a mount point" in result.stderr
    assert entries(tmp_path) == {"out"}


def test_a_job_folder_on_another_file_system_is_refused(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "same_file_system", lambda one, other: False)
    refused(run(tmp_path), f"{tmp_path / 'out.streamprune'} and {tmp_path} are on different file systems")
    assert not entries(tmp_path)


def test_a_removed_lock_that_keeps_a_name_while_it_is_open_is_no_obstacle(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS and FUSE, whose folders are not empty until such a file is closed."""
    lock, hidden = tmp_path / "out.streamprune" / "lock", tmp_path / "out.streamprune" / ".hidden"
    locked, seen = files.locked, False

    @contextmanager
    def letting_go(path: Path) -> Iterator[None]:
        with locked(path):
            yield
        if path == lock:
            hidden.unlink(missing_ok=True)

    class Hiding(Disk):
        def unlink(self, path: Path) -> None:
            nonlocal seen
            if path == lock:
                seen = True
                path.rename(hidden)
            else:
                super().unlink(path)

    monkeypatch.setattr(files, "locked", letting_go)
    with disk.using(Hiding()):
        result = run(tmp_path)
    assert result.exit_code == 0, result.output
    assert seen
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
