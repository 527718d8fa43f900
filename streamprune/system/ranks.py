"""Several processes at one job: who has which samples and sites, and what they send each other.

Every rank runs the same program on its own samples and keeps its own activations; sums are added up, problems are dealt
out, and what is for all to read is written by the first. Underneath is torch.distributed, as `torchrun` sets it up: Gloo
for what lies on the host, NCCL for what lies on a GPU. A process by itself is the only rank, and nothing of this happens.

A rank that fails tells the others before it goes, by the group's key-value store; one that is lost closes its
connections, on which the others' next meeting fails. GPUs meet only after their processes have met on the host, where
a loss is noticed at once.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import ElsewhereError, LostError, StreamPruneError, one_line
from .rendezvous import unused

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")
Info = TypeVar("Info")

JOINING = timedelta(minutes=10)
"""What all ranks may take to appear."""
WAITING = timedelta(days=1)
"""What one rank may wait for another, which may be solving a large problem; a loss is noticed long before."""
SENDING = timedelta(minutes=30)
"""What GPUs may take to send each other a tensor."""
FAILED, HEARD = "streamprune/failed", "streamprune/heard"
"""Keys of the store: JSON, what the rank that failed first has to say; and how many others know."""
HEARING = 5.0
"""Seconds that the first rank, which may be the one that keeps the store, gives the others to look."""
WATCHING = 1.0
"""Seconds between two looks at whether the launcher is there."""


class Ranks:
    """This process among those that share a job; alone by default.

    Args:
        rank: from 0.
        size: how many there are.
        local: its number among those on its machine, and so of its GPU.
        here: how many of them are on its machine.
        store: the group's key-value store.
        gpus: the group that GPUs send in; None for the default one, which is the hosts'.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, local: int = 0, here: int = 1, store: Any = None, gpus: Any = None
    ) -> None:
        self.rank, self.size, self.local, self.here = rank, size, local, here
        self._store, self._gpus = store, gpus

    # Who has what.

    @property
    def first(self) -> bool:
        """Whether this rank writes what is for all to read, and speaks to people."""
        return self.rank == 0

    def samples(self, total: int) -> slice:
        """This rank's own of so many samples: a run of them, as long as the others' to within one."""
        return slice(total * self.rank // self.size, total * (self.rank + 1) // self.size)

    def most(self, total: int) -> int:
        """The most samples that a rank has."""
        return -(-total // self.size)

    def owner(self, number: int) -> int:
        """The rank that works on the item of that number, from 0."""
        return number % self.size

    def mine(self, number: int) -> bool:
        """Whether that is this one."""
        return self.owner(number) == self.rank

    def in_turn(self) -> Iterator[None]:
        """A loop whose body each rank runs once, one after the other."""
        for rank in range(self.size):
            if rank == self.rank:
                yield
            self.barrier()

    # What they send each other. All ranks call these, in the same order.

    def barrier(self) -> None:
        """Wait until all are here."""
        if self.size > 1:
            import torch

            with self._meeting() as distributed:
                distributed.all_reduce(torch.zeros(1))

    def gather(self, value: T) -> list[T]:
        """Every rank's small value, in order."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            with self._meeting() as distributed:
                distributed.all_gather_object(values, value)
        return values

    def told(self, make: Callable[[], T], source: int = 0) -> T:
        """A small value that one rank makes, on all."""
        if self.size == 1:
            return make()
        values = [make() if self.rank == source else None]
        with self._meeting() as distributed:
            distributed.broadcast_object_list(values, src=source)
        value: Any = values[0]
        found: T = value
        return found

    def add_up(self, owner: int | None = None) -> Callable[[Tensor], None]:
        """A function that makes a tensor the sum over all ranks, in place: see `sum`."""
        return partial(self.sum, owner=owner)

    def sum(self, tensor: Tensor, owner: int | None = None) -> None:
        """Make a tensor the sum over all ranks, in place, on the host or a GPU.

        Args:
            tensor: contiguous, of the same shape and dtype everywhere.
            owner: the one rank that gets the sum, the others' tensors being spent; None for all of them.
        """
        if self.size == 1:
            return
        group = self._assemble(tensor)
        with self._meeting() as distributed:
            if owner is None:
                distributed.all_reduce(tensor, group=group)
            else:
                distributed.reduce(tensor, dst=owner, group=group)

    def share(self, tensors: Sequence[Tensor] | None, source: int, device: torch.device) -> list[Tensor]:
        """One rank's tensors, on all.

        Args:
            tensors: those of `source`; what other ranks pass is not looked at.
            device: this rank's, for its copies of what lies on a GPU; what lies on the host comes to lie there.
        """
        if self.size == 1:
            assert tensors is not None
            return list(tensors)
        import torch

        own = [tensor.contiguous() for tensor in tensors or ()] if self.rank == source else []
        kinds = self.told(lambda: [(tuple(tensor.shape), tensor.dtype, tensor.is_cuda) for tensor in own], source)
        found = own or [
            torch.empty(shape, dtype=dtype, device=device if on_gpu else None) for shape, dtype, on_gpu in kinds
        ]
        for tensor in found:
            if tensor.numel():
                group = self._assemble(tensor)
                with self._meeting() as distributed:
                    # As bytes, which every backend sends.
                    distributed.broadcast(tensor.view(-1).view(torch.uint8), src=source, group=group)
        return found

    def spread(
        self,
        items: Sequence[T],
        work: Callable[[T], tuple[Info, Sequence[Tensor]]],
        device: torch.device,
    ) -> Iterator[tuple[T, Info, list[Tensor]]]:
        """Every item in order with what `work` made of it, which its owner alone does: `size` items at a time.

        Args:
            items: dealt out by their place among them, see `owner`.
            work: a small value and tensors.
            device: see `share`.
        """
        for start in range(0, len(items), self.size):
            together = items[start : start + self.size]
            own = [work(item) for place, item in enumerate(together) if self.mine(place)]
            for place, item in enumerate(together):
                info, tensors = own.pop() if self.mine(place) else (None, None)
                yield item, self.told(partial(_given, info), place), self.share(tensors, place, device)

    def _assemble(self, tensor: Tensor) -> Any:
        """The group to send it in; before GPUs meet, a rank waits for the others on the host, where it notices a loss."""
        if not tensor.is_cuda:
            return None
        self.barrier()
        return self._gpus

    # Ends.

    @contextmanager
    def _meeting(self) -> Iterator[Any]:
        """torch.distributed, its failure told apart.

        Raises:
            ElsewhereError: another rank failed and has said so.
            LostError: another rank is gone.
        """
        import torch.distributed

        try:
            yield torch.distributed
        except RuntimeError as error:
            raise self._loss(error) from None

    def _loss(self, error: RuntimeError) -> StreamPruneError:
        with suppress(RuntimeError):  # the store may be gone with the rank that kept it
            if self._store.check([FAILED]):
                told = json.loads(self._store.get(FAILED))
                return ElsewhereError(told["message"], told["code"])
        reason = re.sub(r"^\[\S*\] ", "", one_line(error))  # without the place in the backend's source
        return LostError(f"another process of this job was lost ({reason}); run the same command again to go on")

    def announce(self, error: BaseException) -> None:
        """Tell the others why this rank ends; an error that another one has told before is marked so."""
        code = getattr(error, "exit_code", 130 if isinstance(error, KeyboardInterrupt) else 1)
        message = one_line(error) if isinstance(error, ElsewhereError) else f"rank {self.rank}: {one_line(error)}"
        own = json.dumps({"rank": self.rank, "message": message, "code": code})
        with suppress(RuntimeError):
            told = self._store.compare_set(FAILED, "", own).decode()
            if told != own:
                self._store.add(HEARD, 1)
                if isinstance(error, StreamPruneError):
                    error.told = True

    def linger(self) -> None:
        """Keep the store until the others have looked into it, if it is this process that keeps it."""
        until = time.monotonic() + HEARING
        with suppress(RuntimeError):
            while self.first and self._store.add(HEARD, 0) < self.size - 1 and time.monotonic() < until:
                time.sleep(0.02)


def _given(value: Any) -> Any:
    return value


ALONE = Ranks()
"""The only rank."""


def expected() -> int:
    """How many ranks the environment speaks of, as `torchrun` leaves it; 1 where it speaks of none."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


@contextmanager
def joined() -> Iterator[Ranks]:
    """A context in which this process is one of those that the environment speaks of; `ALONE` where it speaks of none.

    It goes by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, which `torchrun` sets.

    Raises:
        LostError: the others do not appear.
    """
    if expected() == 1:
        yield ALONE
        return
    import torch
    import torch.distributed as distributed
    from torch.distributed.rendezvous import rendezvous

    gpus = None
    try:
        store, rank, size = next(rendezvous("env://", timeout=JOINING))
        store = unused(store, rank, size, JOINING)
        with _nothing_on_stdout():
            distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=WAITING)
        if torch.cuda.is_available() and distributed.is_nccl_available():
            gpus = distributed.new_group(backend="nccl", timeout=SENDING)
    except (RuntimeError, ValueError) as error:
        raise LostError(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} finds no others ({one_line(error)})"
        ) from None
    ranks = Ranks(rank, size, int(os.environ.get("LOCAL_RANK", "0")), store=store, gpus=gpus)
    try:
        ranks.here = ranks.gather(socket.gethostname()).count(socket.gethostname())
        with _launched():
            yield ranks
        ranks.barrier()
    except BaseException as error:
        ranks.announce(error)
        if gpus is None:  # NCCL would wait for the others; the end of the process does not
            distributed.destroy_process_group()
            ranks.linger()
        raise
    distributed.destroy_process_group()


@contextmanager
def _nothing_on_stdout() -> Iterator[None]:
    """A context in which this process writes nothing to stdout, where an older Gloo (torch 2.8's) tells of its connections."""
    try:
        kept = os.dup(1)
    except OSError:  # it is closed
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


@contextmanager
def _launched() -> Iterator[None]:
    """A context in which this process is asked to stop, by SIGTERM, once the `torchrun` that started it is gone.

    Nobody else would: it would go on and keep the job locked, while another launcher starts the same command again.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    launcher, over = os.getppid(), threading.Event()

    def watch() -> None:
        while not over.wait(WATCHING):
            if os.getppid() != launcher:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    watching = threading.Thread(target=watch, name="launcher", daemon=True)
    watching.start()
    try:
        yield
    finally:
        over.set()
        watching.join()
