"""How the ranks of one attempt at a job find each other in a store that earlier attempts have used.

`torchrun --max-restarts` hands every attempt the same store, with all that the last one left there; to connect to an
address out of it fails, or hangs. So ranks first agree on a part of the store that nobody has used: each shows a
random name; the first one lists the names that it sees; who finds its own in the list says so; and once all have, that
list is the attempt. A name that a dead rank left is shown until the living one writes its own, and a list with it in is
confirmed by nobody.
"""

from __future__ import annotations

import hashlib
import time
from datetime import timedelta
from typing import Any
from uuid import uuid4

from ..errors import LostError

HERE, LISTED, CONFIRMED = "streamprune/here", "streamprune/listed", "streamprune/confirmed"
"""Keys of the store: each rank's name, by its number; the list of them; and who found his own in a list, by its digest."""
LOOKING = 0.02
"""Seconds between two looks into the store."""


def unused(store: Any, rank: int, size: int, within: timedelta) -> Any:
    """The part of the store that all ranks of this attempt, and none of another one, are given.

    Args:
        store: a torch.distributed.Store that all ranks reach.
        within: how long to wait for the others.

    Raises:
        LostError: they did not appear.
    """
    from torch.distributed.distributed_c10d import PrefixStore

    own, until = uuid4().hex, time.monotonic() + within.total_seconds()
    store.set(f"{HERE}/{rank}", own)
    while time.monotonic() < until:
        if rank == 0:
            _list(store, size)
        names = _read(store, LISTED).split()
        if len(names) == size and names[rank] == own:
            attempt = hashlib.sha256(" ".join(names).encode()).hexdigest()
            store.set(f"{CONFIRMED}/{attempt}/{rank}", own)
            if store.check([f"{CONFIRMED}/{attempt}/{other}" for other in range(size)]):
                return PrefixStore(f"streamprune/attempt/{attempt}", store)
        time.sleep(LOOKING)
    raise LostError(f"rank {rank} of {size} finds no others: they did not appear within {within.total_seconds():g} s")


def _list(store: Any, size: int) -> None:
    names = " ".join(_read(store, f"{HERE}/{rank}") for rank in range(size))
    if names != _read(store, LISTED):
        store.set(LISTED, names)


def _read(store: Any, key: str) -> str:
    """A key's value; nothing where it has none, which to ask for would wait for it."""
    return store.get(key).decode() if store.check([key]) else ""
