"""Multi-process jobs: how samples and sites are divided among ranks, and the collectives between them.

Every rank runs the same program on its own samples and stores its own activations. Running sums are all-reduced, pruning
problems are distributed, and rank 0 writes the shared files. This uses torch.distributed as `torchrun` sets it up: Gloo for
host tensors, NCCL for GPU tensors. A single process is its own only rank and uses none of it.

A failing rank publishes its error in the group's key-value store before it exits. A rank that dies closes its connections,
and the next collective of the others fails. Ranks always synchronise on the host before a GPU collective, because Gloo
detects a lost rank at once.
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
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import ConfigError, ElsewhereError, LostError, StreamPruneError, one_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")
Info = TypeVar("Info")

JOINING = timedelta(minutes=10)
"""Time limit for all ranks to join."""
WAITING = timedelta(days=1)
"""Time limit of a host collective. Long, since another rank may be solving a large problem; a lost rank is noticed early."""
SENDING = timedelta(minutes=30)
"""Time limit of a GPU collective."""
FAILED, READ = "streamprune/failed", "streamprune/read"
"""Keys of the store: the error of the first rank that failed, as JSON, and how many other ranks have read it."""
READING = 5.0
"""Seconds that rank 0, which may host the store, waits for the others to read the error."""
WATCHING = 1.0
"""Seconds between two checks that the launcher is alive."""


@dataclass(eq=False)
class Ranks:
    """This process among the ranks of a job; the only one by default."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Number of this process on its machine, which is also the number of its GPU."""
    local_size: int = 1
    """Number of ranks on this machine."""
    store: Any = None
    """The group's key-value store."""
    gpus: Any = None
    """The process group for GPU tensors; None for the default group, which is for host tensors."""

    # Division of work.

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes shared files and reports to the user."""
        return self.rank == 0

    def samples(self, total: int) -> slice:
        """Return this rank's range of samples out of `total`. Ranges differ in length by at most one."""
        return slice(total * self.rank // self.size, total * (self.rank + 1) // self.size)

    def max_samples(self, total: int) -> int:
        """Return the largest number of samples that any rank has."""
        return -(-total // self.size)

    def owner(self, number: int) -> int:
        """Return the rank that works on item `number`, counted from 0."""
        return number % self.size

    def mine(self, number: int) -> bool:
        """Return whether this rank works on item `number`."""
        return self.owner(number) == self.rank

    def in_turn(self) -> Iterator[None]:
        """Iterate once, on one rank after the other, so that the loop bodies never overlap."""
        for rank in range(self.size):
            if rank == self.rank:
                yield
            self.barrier()

    # Collectives. All ranks must call these, in the same order.

    def barrier(self) -> None:
        if self.size > 1:
            import torch

            with self._collective() as distributed:
                distributed.all_reduce(torch.zeros(1))

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in rank order. For small, picklable values."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            with self._collective() as distributed:
                distributed.all_gather_object(values, value)
        return values

    def broadcast(self, make: Callable[[], T], source: int = 0) -> T:
        """Return, on all ranks, the value that `make` returns on rank `source`. For small, picklable values."""
        if self.size == 1:
            return make()
        values: list[Any] = [make() if self.rank == source else None]
        with self._collective() as distributed:
            distributed.broadcast_object_list(values, src=source)
        return values[0]  # type: ignore[no-any-return]

    def sum(self, tensor: Tensor, owner: int | None = None) -> None:
        """Sum a tensor over all ranks, in place, on the host or a GPU.

        Args:
            tensor: contiguous, with the same shape and dtype on all ranks.
            owner: the only rank that receives the sum, the tensors of the others being left undefined; None for all ranks.
        """
        if self.size == 1:
            return
        group = self._group_for(tensor)
        with self._collective() as distributed:
            if owner is None:
                distributed.all_reduce(tensor, group=group)
            else:
                distributed.reduce(tensor, dst=owner, group=group)

    def broadcast_tensors(self, tensors: Sequence[Tensor] | None, source: int, device: torch.device) -> list[Tensor]:
        """Broadcast the tensors of one rank to all ranks.

        Args:
            tensors: the tensors of rank `source`; ignored on other ranks.
            device: this rank's device, which receives the GPU tensors of `source`; host tensors stay on the host.
        """
        if self.size == 1:
            assert tensors is not None
            return list(tensors)
        import torch

        own = [tensor.contiguous() for tensor in tensors or ()] if self.rank == source else []
        kinds = self.broadcast(lambda: [(tuple(tensor.shape), tensor.dtype, tensor.is_cuda) for tensor in own], source)
        result = own or [
            torch.empty(shape, dtype=dtype, device=device if on_gpu else None) for shape, dtype, on_gpu in kinds
        ]
        for tensor in result:
            if tensor.numel():
                group = self._group_for(tensor)
                with self._collective() as distributed:
                    # As bytes, which every backend supports.
                    distributed.broadcast(tensor.view(-1).view(torch.uint8), src=source, group=group)
        return result

    def rounds(self, items: Sequence[T]) -> Iterator[tuple[Sequence[T], list[T]]]:
        """Split items into groups of `size`; yield each group, and those of its items that this rank owns: one or none."""
        for start in range(0, len(items), self.size):
            together = items[start : start + self.size]
            yield together, [item for place, item in enumerate(together) if self.mine(place)]

    def exchange(
        self, together: Sequence[T], own: list[tuple[Info, list[Tensor]]], device: torch.device
    ) -> Iterator[tuple[T, Info, list[Tensor]]]:
        """Yield the items of a group of `rounds` with their owners' results, in order on all ranks.

        `own` are the results for this rank's items, used up here: a small, picklable value and tensors each.
        """
        info: Any
        for place, item in enumerate(together):
            info, tensors = own.pop(0) if self.mine(place) else (None, None)
            given = self.broadcast(lambda: info, place)  # noqa: B023
            yield item, given, self.broadcast_tensors(tensors, place, device)

    def _group_for(self, tensor: Tensor) -> Any:
        """Return the process group for a tensor. For GPU tensors, first wait for all ranks on the host, to detect a lost rank."""
        if not tensor.is_cuda:
            return None
        self.barrier()
        return self.gpus

    # Errors.

    @contextmanager
    def _collective(self) -> Iterator[Any]:
        """Yield torch.distributed; turn its errors into ElsewhereError, if another rank published its error, or LostError."""
        import torch.distributed

        try:
            yield torch.distributed
        except RuntimeError as error:
            with suppress(RuntimeError):  # the store may be gone with the rank that hosted it
                if self.store.check([FAILED]):
                    failure = json.loads(self.store.get(FAILED))
                    raise ElsewhereError(failure["message"], failure["code"]) from None
            reason = re.sub(r"^\[\S*\] ", "", one_line(error))  # without the location in the backend's source
            message = f"another process of this job was lost ({reason}); run the same command again to resume"
            raise LostError(message) from None

    def publish_error(self, error: BaseException) -> None:
        """Publish the error that ends this rank. If another rank was first, mark `error` as already reported.

        If the store is gone, as after the launcher's death, wait instead: ranks that stop at the same point as this one may not
        have received its last message yet, and closing the connection would discard it.
        """
        code = getattr(error, "exit_code", 130 if isinstance(error, KeyboardInterrupt) else 1)
        message = one_line(error) if isinstance(error, ElsewhereError) else f"rank {self.rank}: {one_line(error)}"
        own = json.dumps({"rank": self.rank, "message": message, "code": code})
        try:
            first = self.store.compare_set(FAILED, "", own).decode()
            if first != own:
                self.store.add(READ, 1)
                if isinstance(error, StreamPruneError):
                    error.reported = True
        except RuntimeError:
            time.sleep(1)

    def wait_until_read(self) -> None:
        """On rank 0, which may host the store, wait until the other ranks have read the error."""
        until = time.monotonic() + READING
        with suppress(RuntimeError):
            while self.first and self.store.add(READ, 0) < self.size - 1 and time.monotonic() < until:
                time.sleep(0.02)


ALONE = Ranks()
"""The only rank."""


def expected() -> int:
    """Return the number of ranks in the environment that `torchrun` sets; 1 if it is not set."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the ranks that the environment describes, while the context is open; yields `ALONE` if it describes none.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, which `torchrun` sets.

    Raises:
        ConfigError: `torchrun --max-restarts` on several machines, whose processes count their restarts separately.
        LostError: the other ranks did not join in time.
    """
    if expected() == 1:
        yield ALONE
        return
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) and int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "torchrun --max-restarts restarts the processes of one machine only; without it, run the same command again "
            "on all machines to resume"
        )
    import torch
    import torch.distributed as distributed
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    gpus = None
    try:
        store, rank, size = next(rendezvous("env://", timeout=JOINING))
        # After a restart, torchrun's store still has the addresses of the processes that are gone.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = PrefixStore(f"streamprune/attempt-{attempt}", store)
        with _discarded_stdout():
            distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=WAITING)
        if torch.cuda.is_available() and distributed.is_nccl_available():
            gpus = distributed.new_group(backend="nccl", timeout=SENDING)
    except (RuntimeError, ValueError) as error:
        raise LostError(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} cannot connect to the others ({one_line(error)})"
        ) from None
    ranks = Ranks(rank, size, int(os.environ.get("LOCAL_RANK", "0")), store=store, gpus=gpus)
    try:
        ranks.local_size = ranks.gather(socket.gethostname()).count(socket.gethostname())
        with _stopping_with_launcher():
            yield ranks
        ranks.barrier()
    except BaseException as error:
        ranks.publish_error(error)
        if gpus is None:  # destroying an NCCL group waits for the other ranks; exiting does not
            distributed.destroy_process_group()
            ranks.wait_until_read()
        raise
    distributed.destroy_process_group()


@contextmanager
def _discarded_stdout() -> Iterator[None]:
    """Discard stdout while the context is open: older versions of Gloo (torch 2.8) print their connections there."""
    try:
        kept = os.dup(1)
    except OSError:  # stdout is closed
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
def _stopping_with_launcher() -> Iterator[None]:
    """Send this process SIGTERM if the `torchrun` that started it dies, while the context is open.

    Otherwise it would keep the job's lock while another launcher starts the same command again. Linux could send it
    (PR_SET_PDEATHSIG), but does so once for every thread of the launcher, and a second signal ends a job at once.
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
