"""Background threads for reading ahead and writing behind."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Generic, TypeVar

import torch

from .timing import waiting

Key = TypeVar("Key")
Value = TypeVar("Value")


def prefetch(keys: Iterable[Key], load: Callable[[Key], Value]) -> Iterator[tuple[Key, Value]]:
    """Yield ``(key, load(key))`` in order, while one worker thread loads the next value.

    At most two values are alive here: the one yielded and the one being loaded. An exception in `load` is raised when
    its key's turn comes. Leaving the loop early waits for the load in progress.
    """
    iterator = iter(keys)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as worker:
        ahead = [(key, worker.submit(load, key)) for key in islice(iterator, 1)]
        while ahead:
            key, future = ahead.pop()
            handed = [(key, future.result())]
            del future
            ahead = [(key, worker.submit(load, key)) for key in islice(iterator, 1)]
            # Popped, so that no reference here keeps the value alive after the caller drops it.
            yield handed.pop()


def read_ahead(
    device: torch.device, keys: Iterable[Key], announce: Callable[[Key], None], load: Callable[[Key], Value]
) -> Iterator[tuple[Key, Value]]:
    """Yield ``(key, load(key))`` in order, while the data of the next key is read from disk.

    For a GPU, the worker thread calls `load`. On the CPU, copying would take a core away from the computation, so the
    thread only calls `announce`: the kernel reads ahead, and `load` then hits the page cache.
    """
    if device.type == "cpu":
        for key, _ in prefetch(keys, announce):
            yield key, load(key)
    else:
        yield from prefetch(keys, load)


class Behind(Generic[Value]):
    """One task beside the computation, as a context, which ends when the task has.

    For a GPU, a thread works on it. On the CPU it would take a core away from the computation, so `result` does it.
    """

    def __init__(self, device: torch.device) -> None:
        on_cpu = device.type == "cpu"
        self._worker = None if on_cpu else ThreadPoolExecutor(max_workers=1, thread_name_prefix="behind")
        self._result: Callable[[], Value | None] = lambda: None

    def __enter__(self) -> Behind[Value]:
        return self

    def __exit__(self, *error: object) -> None:
        if self._worker is not None:
            self._worker.shutdown()

    def start(self, task: Callable[[], Value]) -> None:
        self._result = task if self._worker is None else self._worker.submit(task).result

    def result(self) -> Value | None:
        """Return the task's result or raise its error; None if no task was started."""
        with nullcontext() if self._worker is None else waiting("write"):
            return self._result()


MAX_PENDING = 2
"""Tasks of `background` that may be pending: one runs and one waits."""


@contextmanager
def background() -> Iterator[Callable[[Callable[[], None]], None]]:
    """Run tasks, such as writes, in one background thread, in order; yields the function that submits a task.

    It blocks while `MAX_PENDING` tasks are pending. An exception in a task is raised by a later submit, or when the context
    ends; waiting tasks are then cancelled. If the context ends without an exception, all tasks are done.
    """
    worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="background")
    pending: deque[Future[None]] = deque()

    def finish_one() -> None:
        with waiting("write"):
            pending.popleft().result()

    def submit(task: Callable[[], None]) -> None:
        while len(pending) >= MAX_PENDING:
            finish_one()
        pending.append(worker.submit(task))

    try:
        yield submit
        while pending:
            finish_one()
    finally:
        worker.shutdown(wait=True, cancel_futures=True)
