"""Micro-batches after a GPU ran out of memory: the sizes in force, how often they are halved, and what is freed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from streamprune.jobs.folder import SMALLER, JobFolder
from streamprune.jobs.journal import Journal
from streamprune.system.progress import Silent
from streamprune.system.ranks import ALONE


@pytest.fixture
def folder(tmp_path: Path) -> JobFolder:
    """An opened job that has a journal and nothing else."""
    found: Any = JobFolder.__new__(JobFolder)
    found.ranks, found.progress, found.device = ALONE, Silent(), torch.device("cuda", 0)
    found.journal = Journal(tmp_path / "journal.jsonl")
    schedule = [{"name": "calibrate"}, {"name": "forward", "steps": 2}, {"name": "prune", "steps": 5}]
    found.journal.append("start", resources={"batch": 8, "backward_batch": 2, "grams": "host"}, schedule=schedule)
    return found  # type: ignore[no-any-return]


def fail(folder: JobFolder) -> None:
    with folder.smaller_batches():
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_all_lines_of_smaller_batches_count(folder: JobFolder) -> None:
    fail(folder)
    assert folder.resources == {"batch": 4, "backward_batch": 1, "grams": "host"}
    folder.journal.append("calibrate")
    # The line of the second time has no `backward_batch`, which is 1 already.
    fail(folder)
    assert [line["resources"] for line in folder.journal.steps(SMALLER)][1:] == [{"batch": 2}]
    assert folder.resources == {"batch": 2, "backward_batch": 1, "grams": "host"}


def test_once_per_phase_and_before_its_first_line(folder: JobFolder) -> None:
    journal = folder.journal

    def refused() -> bool:
        before = folder.resources
        try:
            fail(folder)
        except torch.OutOfMemoryError:
            assert folder.resources == before
            return True
        return False

    assert not refused()
    assert refused()
    journal.append("generated-000001")  # a line that is no step of the schedule
    assert refused()
    journal.append("calibrate")
    assert not refused()
    journal.append("forward/0")
    assert refused()
    journal.append("forward/1")
    for index in range(5):
        journal.append(f"prune/{index}")
        assert refused()


def test_processes_that_share_a_job_do_not_retry(folder: JobFolder) -> None:
    folder.ranks = SimpleNamespace(size=2)  # type: ignore[assignment]
    with pytest.raises(torch.OutOfMemoryError):
        fail(folder)


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Cycles stay."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("chained", ["alone", "cause", "context"])
def test_the_failed_frames_are_freed_before_the_retry(chained: str, folder: JobFolder) -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def allocate() -> None:
        tensor = torch.ones(3)
        held.append(weakref.ref(tensor))
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        except torch.OutOfMemoryError as error:
            kept = error  # a cycle: the error, its traceback, this frame
            raise kept from None

    def work() -> None:
        if chained == "alone":
            allocate()
        try:
            allocate()
        except torch.OutOfMemoryError as error:
            if chained == "cause":
                raise torch.OutOfMemoryError("CUDA out of memory again") from error
            raise torch.OutOfMemoryError("CUDA out of memory again")  # noqa: B904

    with folder.smaller_batches():
        work()
    assert [each() for each in held] == [None]
