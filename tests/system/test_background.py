"""Work in the background: in order, bounded, done at the end, and its errors are not lost."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from streamprune.system.threads import MAX_PENDING, Behind, background
from streamprune.system.timing import waited, waiting


def test_in_order_in_another_thread_and_done_at_the_end() -> None:
    done: list[tuple[int, bool]] = []
    with background() as submit:
        for i in range(9):
            submit(lambda i=i: done.append((i, threading.current_thread() is threading.main_thread())))
    assert done == [(i, False) for i in range(9)]


def test_no_more_than_a_piece_or_two_wait() -> None:
    gate, handed = threading.Event(), []

    def hand_in() -> None:
        with background() as submit:
            for i in range(5):
                submit(gate.wait)
                handed.append(i)

    thread = threading.Thread(target=hand_in)
    thread.start()
    deadline = time.monotonic() + 5
    while len(handed) < MAX_PENDING and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    assert handed == list(range(MAX_PENDING))
    gate.set()
    thread.join()
    assert len(handed) == 5


@pytest.mark.parametrize("later", [0, 3])
def test_an_error_is_raised_and_nothing_is_begun_after_it_was(later: int) -> None:
    done = []

    def fail() -> None:
        raise OSError(28, "No space left on device")

    def hand_in() -> None:
        with background() as submit:
            submit(fail)
            for i in range(later):
                submit(lambda i=i: done.append(i))

    with pytest.raises(OSError, match="No space"):
        hand_in()
    assert len(done) < MAX_PENDING


def test_whoever_leaves_by_an_error_waits_for_what_is_under_way_only() -> None:
    done, begun = [], threading.Event()

    def slow() -> None:
        begun.set()
        time.sleep(0.02)
        done.append("slow")

    class Stop(BaseException): ...

    def hand_in() -> None:
        with background() as submit:
            submit(slow)
            submit(lambda: done.append("next"))
            begun.wait()
            raise Stop

    with pytest.raises(Stop):
        hand_in()
    assert done == ["slow"]


def test_only_time_in_which_the_thread_itself_is_blocked_counts() -> None:
    before = waited()
    with background() as submit:
        submit(own_read)
        submit(lambda: None)
    after = waited()
    assert after["read"] == before["read"]
    assert 0.005 < after["write"] - before["write"] < 0.2
    own_read()
    assert waited()["read"] - before["read"] >= 0.01
    assert waited()["write"] == after["write"]


def own_read() -> None:
    with waiting("read"), waiting("write"):  # all of it is reading
        time.sleep(0.02)


def test_an_error_beside_a_task_waits_for_it_and_leaves_no_thread() -> None:
    done = threading.Event()

    def task() -> None:
        time.sleep(0.05)
        done.set()

    def fails() -> None:
        with Behind[None](torch.device("cuda")) as behind:
            behind.start(task)
            raise ValueError("beside it")

    with pytest.raises(ValueError, match="beside it"):
        fails()
    assert done.is_set()
    assert not [each for each in threading.enumerate() if each.name.startswith("behind")]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_for_a_gpu_a_task_runs_while_its_result_is_not_asked_for(kind: str) -> None:
    begun = threading.Event()

    def task() -> str:
        begun.set()
        return threading.current_thread().name

    def fails() -> str:
        raise OSError("no space")

    with Behind[str](torch.device(kind)) as behind:
        assert behind.result() is None
        behind.start(task)
        assert begun.wait(5 if kind == "cuda" else 0.05) == (kind == "cuda")
        assert str(behind.result()).startswith("behind") == (kind == "cuda")
    with Behind[str](torch.device(kind)) as behind:
        behind.start(fails)
        with pytest.raises(OSError, match="no space"):
            behind.result()
