"""Block inputs, on disk and, as far as they are allowed to, in host memory: one file a stream and boundary."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import DamageError, NumericalError
from ..maths.refit import advice
from ..system import files
from ..system.host import host_buffer
from ..system.threads import Background, read_ahead
from ..system.timing import spent
from .copies import Copies, Taken
from .encoding import Encoding

SUFFIX = ".activations"
SUM = np.dtype("<u4")
"""A CRC-32: of every sample, behind them all; and of these, at the very end of the file."""
CPU = torch.device("cpu")


def file_bytes(samples: int, row_bytes: int) -> int:
    """A boundary's, of so many samples of so many bytes."""
    return samples * row_bytes + (samples + 1) * SUM.itemsize


def _damaged(path: Path) -> DamageError:
    return DamageError(
        f"{path} is missing, or not what was written there; run the same command again: it is computed anew"
    )


class ActivationStore:
    """A folder of boundaries, all of one shape and dtype, read and written in micro-batches.

    Whatever is read from the disk is held against its checksum.

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
        self._sums: dict[str, np.ndarray] = {}
        """By name, of what is on the disk: every sample's checksum."""
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
        return name in self._held or self.path(name).exists()

    def intact(self, name: str) -> bool:
        """Whether a boundary is there and what was written, which is read for it."""
        if name in self._held:
            return True
        try:
            for batch in self.batches(1):
                self._read(name, batch)
        except DamageError:
            return False
        return True

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
                    files.announce(self.path(name), batch.start * self.row_bytes, length)

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
            DiskError: it cannot be written; likewise.
        """
        durable = self.durable and not passing
        held = self._room(self.shape[0] * self.row_bytes)
        append = None
        sums = np.zeros(self.shape[0] + 1, SUM)
        written = 0
        with ExitStack() as stack:
            if held is not None:
                self._filling.append(held)
                stack.callback(self._filling.remove, held)
            if held is None or durable:
                append = stack.enter_context(files.replacing(self.path(name), durable=durable))
            background = stack.enter_context(Background())

            def write(batch: Tensor) -> None:
                raw = self.encoding.encode(batch)
                # A sum shows NaN and Inf at a fifth of the cost; it may overflow by itself.
                take = self._copies.outward([raw, self.encoding.telling(raw).sum()])
                background.hand(lambda: keep(*take()))

            def keep(raw: Tensor, total: Tensor) -> None:
                nonlocal written
                if not bool(torch.isfinite(total)) and not bool(torch.isfinite(self.encoding.telling(raw)).all()):
                    raise NumericalError(f"{place} gives NaN or Inf{self._range}")
                data = raw.view(-1).numpy()
                if held is not None:
                    held.append(data)
                if append is not None:
                    append(data)
                    for row in data.reshape(-1, self.row_bytes):
                        sums[written] = zlib.crc32(row.data)
                        written += 1

            def close() -> None:
                if append is not None:
                    sums[-1] = zlib.crc32(sums[:-1].data)
                    append(sums)

            yield write
            background.hand(close)
        self._held.pop(name, None)
        if held is not None:
            held.on_disk = append is not None
            self._held[name] = held
        self._sums.pop(name, None)
        if append is None:
            files.remove(self.path(name))  # an older one
        else:
            self._sums[name] = sums[:-1]

    def link(self, source: str, target: str) -> None:
        """Give a boundary a second name."""
        self._forget(target)
        if source in self._sums:
            self._sums[target] = self._sums[source]
        if source in self._held:
            self._held[target] = self._held[source]
        if source not in self._held or self._held[source].on_disk:
            files.link(self.path(source), self.path(target))

    def remove(self, name: str) -> None:
        """Remove a boundary that may be gone already."""
        self._forget(name)
        files.remove(self.path(name))

    def keep_only(self, names: set[str]) -> None:
        """Remove every other boundary, and what a killed process left half-written."""
        for name in (self._held.keys() | self._sums.keys()) - names:
            self._forget(name)
        for path in self.folder.iterdir():
            if path.name.endswith(files.TEMPORARY) or (path.suffix == SUFFIX and path.stem not in names):
                files.remove(path)

    def _forget(self, name: str) -> None:
        self._held.pop(name, None)
        self._sums.pop(name, None)

    def path(self, name: str) -> Path:
        """Where a boundary lies, if it is on the disk."""
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
        if (held := self._held.get(name)) is None:
            buffer = self._read(name, batch)
        else:
            buffer = self._buffer(batch)
            held.read_into(batch.start * self.row_bytes, buffer)
        return buffer.view(batch.stop - batch.start, self.shape[1], self.encoding.token_bytes)

    def _buffer(self, batch: slice) -> Tensor:
        length = (batch.stop - batch.start) * self.row_bytes
        return torch.empty(length, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    def _read(self, name: str, batch: slice) -> Tensor:
        """One micro-batch's bytes from the disk.

        Raises:
            DamageError: they are not what was written.
        """
        if name not in self._sums:
            sums = np.zeros(self.shape[0] + 1, SUM)
            self._fill(name, self.shape[0] * self.row_bytes, sums)
            if zlib.crc32(sums[:-1].data) != sums[-1]:
                raise _damaged(self.path(name))
            self._sums[name] = sums[:-1]
        buffer = self._buffer(batch)
        rows = buffer.numpy().reshape(-1, self.row_bytes)
        self._fill(name, batch.start * self.row_bytes, rows)
        with spent("read"):
            if any(zlib.crc32(row.data) != check for row, check in zip(rows, self._sums[name][batch], strict=True)):
                raise _damaged(self.path(name))
        return buffer

    def _fill(self, name: str, begin: int, array: np.ndarray) -> None:
        path, view = self.path(name), array.data.cast("B")
        try:
            done = files.read_into(path, begin, view)
        except FileNotFoundError:
            done = 0
        if done < len(view):
            raise _damaged(path)


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

    def read_into(self, begin: int, buffer: Tensor) -> None:
        with spent("read"):
            buffer.copy_(self.raw[begin : begin + len(buffer)])
