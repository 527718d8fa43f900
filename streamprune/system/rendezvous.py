"""Rendezvous of the ranks of one attempt, in a key-value store that earlier attempts have used.

`torchrun --max-restarts` gives every attempt the same store, which still holds the last attempt's entries. Connecting to a
stale address from it fails or hangs, so the ranks first agree on an unused prefix of the store:

1. Each rank publishes a random name.
2. Rank 0 publishes the list of the names it sees.
3. Each rank that finds its own name in the list confirms the list.
4. Once all ranks have confirmed a list, its digest identifies the attempt.

The name of a dead rank stays until the rank that replaces it publishes its own. A list that contains it is never confirmed by
all ranks.
"""

from __future__ import annotations

import hashlib
import time
from datetime import timedelta
from typing import Any
from uuid import uuid4

from ..errors import LostError

HERE, LISTED, CONFIRMED = "streamprune/here", "streamprune/listed", "streamprune/confirmed"
"""Keys of the store: the name of each rank, by number; the list of names; the ranks that confirmed a list, by its digest."""
LOOKING = 0.02
"""Seconds between two polls of the store."""


def unused(store: Any, rank: int, size: int, within: timedelta) -> Any:
    """Return a part of the store that belongs to this attempt alone, the same on all its ranks.

    Args:
        store: a torch.distributed.Store that all ranks can reach.
        within: time limit for the other ranks to join.

    Raises:
        LostError: they did not join in time.
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
    """Return the value of a key, or an empty string: `Store.get` would block until the key exists."""
    return store.get(key).decode() if store.check([key]) else ""
