"""Reading ahead: the only threads of the project, and what the kernel does better without one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

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


def announced(
    keys: Iterable[Key], announce: Callable[[Key], None], load: Callable[[Key], Value]
) -> Iterator[tuple[Key, Value]]:
    """Yield ``(key, load(key))`` in order, with the next key announced before each load.

    For small reads on a machine whose cores compute: a thread that wakes for each takes a core from the others,
    which wait for it; the kernel, told what will be read, fetches it from the disk with none.
    """
    iterator = iter(keys)
    ahead = list(islice(iterator, 1))
    for key in ahead:
        announce(key)
    while ahead:
        key = ahead.pop()
        ahead = list(islice(iterator, 1))
        for following in ahead:
            announce(following)
        yield key, load(key)
