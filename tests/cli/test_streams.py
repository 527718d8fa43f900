"""Jobs whose terminal is closed or whose output nobody reads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import contents
from kills.life import Forked
from kills.scenario import SCENARIOS, Inputs
from streamprune_cli.streams import BestEffort

from streamprune.system import signals

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux")


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs.make(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def expected(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The result of an undisturbed `run`."""
    folder = tmp_path_factory.mktemp("watched")
    ended = Forked(SCENARIOS["sobp"].arguments(inputs), folder).wait()
    assert ended.code == 0, ended.err
    return contents(folder / "out")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("redirected", "code"),
    [
        ("<&- >&- 2>&-", 0),
        ("2> >(head -n 1)", 0),
        # The result could not be printed; it is complete.
        ("> >(exec <&-)", 1),
        (">/dev/full", 1),
    ],
)
def test_the_job_continues_without_its_readers(
    redirected: str, code: int, inputs: Inputs, expected: dict[str, bytes], tmp_path: Path
) -> None:
    arguments = SCENARIOS["sobp"].arguments(inputs)
    script = f'"$@" {redirected}'
    ended = subprocess.run(
        ["bash", "-c", script, "bash", sys.executable, "-m", "streamprune_cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
    )
    assert "Exception ignored" not in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.returncode == code, ended.stderr
    assert contents(tmp_path / "out") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_write_errors_on_stderr_are_ignored() -> None:
    reading, writing = os.pipe()
    with BestEffort(writing, "w") as stream:
        assert stream.write(b"heard") == 5
        assert os.read(reading, 99) == b"heard"
        os.close(reading)
        assert stream.write(b"not heard") == 9


CLOSED = """
import os, sys
from streamprune_cli.streams import repair

repair()
print("to nobody", file=sys.stderr)
print("to nobody")
os.write(2, b"to nobody")
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
assert file > 2, file
assert [os.readlink(f"/proc/self/fd/{number}") for number in range(3)] == ["/dev/null"] * 3
"""


def test_no_file_gets_the_number_of_a_stream(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", '"$@" <&- >&- 2>&-', "bash", sys.executable, "-c", CLOSED, str(tmp_path / "file")], check=False
    )
    assert done.returncode == 0
    assert (tmp_path / "file").read_bytes() == b""


# Signals.

TERM, INT, HUP = signal.SIGTERM, signal.SIGINT, signal.SIGHUP


@pytest.mark.parametrize(
    ("sent", "ignored", "found"),
    [
        ((), [], (False, 0)),
        ((TERM,), [], (True, 1)),
        # A closed terminal asks however often it says so.
        ((HUP, HUP, HUP), [], (True, 1)),
        ((TERM, HUP), [], (True, 1)),
        # Behind it another signal ends at once.
        ((HUP, INT), [], KeyboardInterrupt),
        ((HUP, INT), [HUP, INT], (False, 0)),
    ],
)
def test_signals(
    sent: tuple[signal.Signals, ...], ignored: list[signal.Signals], found: tuple[bool, int] | type[KeyboardInterrupt]
) -> None:
    """Whether signals ask to stop, and how often that is told."""
    watched = (*signals.SIGNALS, signals.HANGUP)
    before = {number: signal.getsignal(number) for number in watched}
    # Whoever runs the tests may have them ignored.
    mine = {number: signal.SIG_IGN if number in ignored else signal.default_int_handler for number in watched}
    told: list[int] = []
    try:
        for number, handler in mine.items():
            signal.signal(number, handler)
        with signals.asked_by_signals(lambda: told.append(1)) as stop:
            for number in sent:
                os.kill(os.getpid(), number)
            assert (stop(), len(told)) == found
    except KeyboardInterrupt:
        assert found is KeyboardInterrupt
    finally:
        left = {number: signal.getsignal(number) for number in watched}
        for number, handler_before in before.items():
            signal.signal(number, handler_before)
    assert left == mine
