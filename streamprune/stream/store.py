"""Block inputs, on disk and, as far as they are allowed to, in host memory: one file a stream and boundary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import files
from ..errors import NumericalError, ResumeError
from ..host import host_buffer
from ..maths.linalg import advice
from ..occupancy import spent
from .background import Background
from .copies import Copies, Taken
from .encoding import Encoding
from .prefetch import read_ahead

SUFFIX = ".activations"
CPU = torch.device("cpu")


class ActivationStore:
    """A folder of boundaries, all of one shape and dtype, read and written in micro-batches.

    What is `durable` is always on the disk; host memory holds copies of it, of which the oldest go when others come. What
    nothing will be resumed from goes to the disk only where the memory has no room for it.

    Args:
        folder: made if it is not there.
        shape: (samples, tokens, width).
        dtype: as computed.
        device: where batches go when read.
        durable: fsync what is finished, for a journal that will speak of it.
        stored: dtype of what is kept; None keeps what was computed. See `Encoding`.
        memory: bytes of host memory that boundaries may be held in.
    """

    def __init__(
        self,
        folder: Path,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        *,
        durable: bool,
        stored: torch.dtype | None = None,
        memory: int = 0,
    ) -> None:
        self.folder, self.shape, self.dtype, self.device, self.durable = folder, shape, dtype, device, durable
        self.encoding = Encoding(shape[2], dtype, dtype if stored is None else stored)
        self.memory = memory
        self._held: dict[str, _Held] = {}
        """By name, the oldest first."""
        self._filling: list[_Held] = []
        self._copies = Copies.of(device)
        files.make_folder(folder)

    @property
    def row_bytes(self) -> int:
        """Bytes of one sample."""
        return self.shape[1] * self.encoding.token_bytes

    @property
    def held_bytes(self) -> int:
        """Host memory that boundaries take now."""
        return sum(
            len(held.raw) for held in {id(each): each for each in (*self._held.values(), *self._filling)}.values()
        )

    def __contains__(self, name: str) -> bool:
        return name in self._held or self._path(name).exists()

    def batches(self, size: int) -> list[slice]:
        """The samples in micro-batches of `size`, the last one perhaps smaller."""
        return [slice(start, min(start + size, self.shape[0])) for start in range(0, self.shape[0], size)]

    def read(self, name: str, batch: slice) -> Tensor:
        """One micro-batch, on the device: (sequences, tokens, width)."""
        (raw,) = self._copies.inward([self._fetch(name, batch)])()
        return self.encoding.decode(raw)

    def each(self, size: int, *names: str) -> Iterator[tuple[slice, list[Tensor]]]:
        """All micro-batches of several boundaries side by side, the next one read while this one is used."""

        def load(batch: slice) -> Taken:
            return self._copies.inward([self._fetch(name, batch) for name in names])

        def announce(batch: slice) -> None:
            for name in names:
                if name not in self._held:
                    length = (batch.stop - batch.start) * self.row_bytes
                    files.announce(self._path(name), batch.start * self.row_bytes, length)

        for batch, take in read_ahead(self.device, self.batches(size), announce, load):
            tensors = [[self.encoding.decode(raw) for raw in take()]]
            del take
            yield batch, tensors.pop()

    @contextmanager
    def writing(self, name: str, place: str, *, passing: bool = False) -> Iterator[Callable[[Tensor], None]]:
        """Write a boundary batch after batch, in the background; it appears when all of it is there.

        Batches must stay as they are once they are handed over.

        Args:
            place: where it comes from, for messages.
            passing: no journal line will speak of it.

        Raises:
            NumericalError: a batch holds NaN or Inf, or what the stored dtype cannot hold; here or at the next batch.
            OSError: it cannot be written; likewise.
        """
        durable = self.durable and not passing
        held = self._room(self.shape[0] * self.row_bytes)
        append = None
        with ExitStack() as stack:
            if held is not None:
                self._filling.append(held)
                stack.callback(self._filling.remove, held)
            if held is None or durable:
                temporary = stack.enter_context(files.replacing(self._path(name), durable=durable))
                append = stack.enter_context(files.appending(temporary, durable=durable))
            background = stack.enter_context(Background())

            def write(batch: Tensor) -> None:
                raw = self.encoding.encode(batch)
                # A sum shows NaN and Inf at a fifth of the cost; it may overflow by itself.
                take = self._copies.outward([raw, self.encoding.telling(raw).sum()])
                background.hand(lambda: keep(*take()))

            def keep(raw: Tensor, total: Tensor) -> None:
                if not bool(torch.isfinite(total)) and not bool(torch.isfinite(self.encoding.telling(raw)).all()):
                    raise NumericalError(f"{place} gives NaN or Inf{self._range}")
                data = raw.view(-1).numpy()
                if held is not None:
                    held.append(data)
                if append is not None:
                    append(data.data)

            yield write
        self._held.pop(name, None)
        if held is not None:
            held.on_disk = append is not None
            self._held[name] = held
        if append is None:
            files.remove(self._path(name))  # an older one

    def link(self, source: str, target: str) -> None:
        """Give a boundary a second name."""
        self._held.pop(target, None)
        if source in self._held:
            self._held[target] = self._held[source]
        if source not in self._held or self._held[source].on_disk:
            files.link(self._path(source), self._path(target))

    def remove(self, name: str) -> None:
        """Remove a boundary that may be gone already."""
        self._held.pop(name, None)
        files.remove(self._path(name))

    def keep_only(self, names: set[str]) -> None:
        """Remove every other boundary, and what a killed process left half-written."""
        self._held = {name: held for name, held in self._held.items() if name in names}
        for path in self.folder.iterdir():
            if path.name.endswith(files.TEMPORARY) or (path.suffix == SUFFIX and path.stem not in names):
                files.remove(path)

    def _path(self, name: str) -> Path:
        return self.folder / (name + SUFFIX)

    @property
    def _range(self) -> str:
        """What a message says of a dtype that ends early: as stored, or as computed."""
        largest = torch.finfo(self.encoding.stored).max
        if self.encoding.stored.itemsize > 1 and largest < torch.finfo(self.dtype).max:
            return f", or more than the {largest:g} that activations are stored up to"
        return advice(self.dtype)

    def _room(self, size: int) -> _Held | None:
        """Host memory for one boundary, for which the oldest that are on the disk as well make way; None where there is none."""
        staying = {id(held): len(held.raw) for held in self._held.values() if not held.on_disk}
        if sum(staying.values()) + sum(len(held.raw) for held in self._filling) + size > self.memory:
            return None
        for name in [name for name, held in self._held.items() if held.on_disk]:
            if self.held_bytes + size <= self.memory:
                break
            del self._held[name]
        return _Held(size)

    def _fetch(self, name: str, batch: slice) -> Tensor:
        """One micro-batch's bytes (sequences, tokens, token_bytes) on the host, pinned for a GPU."""
        begin, length = batch.start * self.row_bytes, (batch.stop - batch.start) * self.row_bytes
        buffer = torch.empty(length, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        try:
            if (held := self._held.get(name)) is not None:
                done = held.read_into(begin, buffer)
            else:
                done = files.read_into(self._path(name), begin, buffer.numpy().data)
        except FileNotFoundError:
            done = 0
        if done < length:
            raise ResumeError(f"{self._path(name)} is missing or cut short; start over with --restart")
        return buffer.view(batch.stop - batch.start, self.shape[1], self.encoding.token_bytes)


class _Held:
    """A boundary in host memory."""

    def __init__(self, size: int) -> None:
        self.raw = host_buffer(size, CPU)
        self.filled = 0
        self.on_disk = False
        """Whether it is there as well."""

    def append(self, data: np.ndarray) -> None:
        # numpy lets other threads go on meanwhile.
        np.copyto(self.raw.numpy()[self.filled : self.filled + len(data)], data)
        self.filled += len(data)

    def read_into(self, begin: int, buffer: Tensor) -> int:
        part = self.raw[begin : min(begin + len(buffer), self.filled)]
        with spent("read"):
            buffer[: len(part)] = part
        return len(part)
