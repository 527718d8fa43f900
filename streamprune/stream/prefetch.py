"""Reading ahead: the only threads of the project."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import torch

Key = TypeVar("Key")
Value = TypeVar("Value")


def prefetch(keys: Iterable[Key], load: Callable[[Key], Value]) -> Iterator[tuple[Key, Value]]:
    """Yield ``(key, load(key))`` in order, the next one loading in one worker thread meanwhile.

    At most two values live here: the one handed out and the one being loaded. An exception of `load` is
    raised when its turn comes; leaving the loop early waits for the load under way.
    """
    iterator = iter(keys)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as worker:
        ahead = [(key, worker.submit(load, key)) for key in islice(iterator, 1)]
        while ahead:
            key, future = ahead.pop()
            handed = [(key, future.result())]
            del future
            ahead = [(key, worker.submit(load, key)) for key in islice(iterator, 1)]
            # Popped, so that nothing here keeps alive what the caller lets go of.
            yield handed.pop()


def read_ahead(
    device: torch.device, keys: Iterable[Key], announce: Callable[[Key], None], load: Callable[[Key], Value]
) -> Iterator[tuple[Key, Value]]:
    """Yield ``(key, load(key))`` in order, what the next one needs coming from the disk meanwhile.

    For a GPU the worker thread loads it. Where the cores compute, copying would take one of them from the others,
    which wait for it: there the thread announces it to the kernel, and the load finds it in memory.
    """
    if device.type == "cpu":
        for key, _ in prefetch(keys, announce):
            yield key, load(key)
    else:
        yield from prefetch(keys, load)
