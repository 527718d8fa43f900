"""Store block inputs on disk and, within a limit, in host memory: one file per stream and boundary."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import DamageError, NumericalError
from ..maths.refit import advice
from ..system import files
from ..system.host import checksum, host_buffer
from ..system.threads import background, read_ahead
from ..system.timing import waiting
from .copies import Copies, Taken
from .encoding import Encoding

SUFFIX = ".activations"
SUM = np.dtype("<u8")
"""Dtype of a checksum. After the samples, a file holds one checksum per sample, then one checksum of these."""
CPU = torch.device("cpu")


def file_bytes(samples: int, row_bytes: int) -> int:
    """Return the size in bytes of a boundary's file with `samples` samples of `row_bytes` bytes."""
    return samples * row_bytes + (samples + 1) * SUM.itemsize


@contextmanager
def temporary(folder: Path) -> Iterator[None]:
    """Create an empty folder and remove it at the end. After an error it stays, and the next use empties it."""
    files.remove_tree(folder)
    files.make_folder(folder)
    yield
    files.remove_tree(folder)


def _damaged(path: Path) -> DamageError:
    return DamageError(f"{path} is missing or damaged; run the same command again: it will be computed again")


class ActivationStore:
    """A folder of boundaries of one shape and dtype, read and written in micro-batches.

    Everything read from disk is compared with its checksum. Durable boundaries are always on disk. Host memory caches them and
    evicts the oldest to make room. A boundary that no job resumes from is written to disk only if it does not fit into memory.

    Args:
        shape: (samples, tokens, width) of every boundary.
        dtype: dtype in which activations are computed.
        device: device to which batches are read.
        durable: fsync finished boundaries, because the journal will refer to them.
        stored: dtype in which activations are stored; None stores them as computed. See `Encoding`.
        memory: bytes of host memory that boundaries may occupy.
        spare: returns the bytes of host memory that are free now and that nothing else needs; a boundary that needs more goes to
            disk. None: `memory` is always available.
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
        spare: Callable[[], int] | None = None,
    ) -> None:
        self.folder, self.shape, self.dtype, self.device, self.durable = folder, shape, dtype, device, durable
        self.encoding = Encoding(shape[2], dtype, dtype if stored is None else stored)
        self.memory, self.spare = memory, spare
        self.row_bytes = shape[1] * self.encoding.token_bytes
        self._held: dict[str, _Held] = {}  # boundaries in host memory by name, oldest first
        self._filling: list[_Held] = []
        self._own: set[str] = set()  # boundaries that this process has written
        self._sums: dict[str, np.ndarray] = {}  # checksums (samples,) of the boundaries on disk, by name
        self._copies = Copies.of(device)
        files.make_folder(folder)

    @property
    def held_bytes(self) -> int:
        """Bytes of host memory that boundaries occupy now."""
        return sum(len(held.raw) for held in {*self._held.values(), *self._filling})

    def __contains__(self, name: str) -> bool:
        return name in self._held or self.path(name).exists()

    def usable(self, name: str) -> bool:
        """Return whether a boundary can be used: this process has written it, and will check it as it reads it, or it is `intact`."""
        return (name in self._own and name in self) or self.intact(name)

    def doubt(self) -> None:
        """From now on, read what this process has written to see whether it is `usable`."""
        self._own.clear()

    def intact(self, name: str) -> bool:
        """Read a boundary and return whether it exists and matches its checksums."""
        if name in self._held:
            return True
        try:
            for batch in self.batches(1):
                self._read(name, batch)
        except DamageError:
            return False
        return True

    def batches(self, size: int) -> list[slice]:
        """Split the samples into micro-batches of `size`; the last one may be smaller."""
        return [slice(start, min(start + size, self.shape[0])) for start in range(0, self.shape[0], size)]

    def read(self, name: str, batch: slice) -> Tensor:
        """Read one micro-batch to the device: (sequences, tokens, width) in the computing dtype."""
        (raw,) = self._copies.inward([self._fetch(name, batch)])()
        return self.encoding.decode(raw)

    def each(self, size: int, *names: str) -> Iterator[tuple[slice, list[Tensor]]]:
        """Iterate over the micro-batches of several boundaries in step, reading the next one while one is in use.

        Yields the samples of the micro-batch, and one tensor (sequences, tokens, width) per name, on the device.
        """
        for read in self._ahead(([batch] for batch in self.batches(size)), names):
            ready = [(read[0][0], read[1])]
            del read
            yield ready.pop()

    def rows(self, chosen: Iterable[Sequence[int]], *names: str) -> Generator[list[Tensor], None, None]:
        """Like `each`, for micro-batches of any samples, given by their numbers, in that order."""
        for read in self._ahead(([slice(row, row + 1) for row in rows] for rows in chosen), names):
            ready = [read[1]]
            del read
            yield ready.pop()

    def _ahead(
        self, batches: Iterable[list[slice]], names: Sequence[str]
    ) -> Iterator[tuple[list[slice], list[Tensor]]]:
        """Yield the parts of each micro-batch with one tensor per name. Nothing here keeps it alive after the caller drops it."""

        def load(parts: list[slice]) -> Taken:
            return self._copies.inward([self._fetch(name, part) for name in names for part in parts])

        def announce(parts: list[slice]) -> None:
            for name in names:
                for part in parts if name not in self._held else ():
                    length = (part.stop - part.start) * self.row_bytes
                    files.advise_read(self.path(name), part.start * self.row_bytes, length)

        for parts, take in read_ahead(self.device, batches, announce, load):
            raw = take()
            del take
            pieces = [raw[begin : begin + len(parts)] for begin in range(0, len(raw), len(parts))]
            del raw
            ready = [(parts, [self.encoding.decode(each[0] if len(each) == 1 else torch.cat(each)) for each in pieces])]
            del pieces
            yield ready.pop()

    @contextmanager
    def writing(self, name: str, place: str, *, passing: bool = False) -> Iterator[Callable[[Tensor], None]]:
        """Write a boundary batch by batch, in the background. It becomes visible once it is complete.

        Yields a function that takes the next batch (sequences, tokens, width). Do not modify a batch after handing
        it over.

        Args:
            place: origin of the values, for error messages.
            passing: no journal line will refer to this boundary, so it need not be durable.

        Raises:
            NumericalError: this or an earlier batch holds NaN, Inf or a value outside the stored dtype's range.
            DiskError: the boundary cannot be written; also raised with delay.
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
            submit = stack.enter_context(background())

            def write(batch: Tensor) -> None:
                raw = self.encoding.encode(batch)
                # A sum reveals NaN and Inf at a fifth of the cost. It can also overflow, so `keep` checks again.
                take = self._copies.outward([raw, self.encoding.telling(raw).sum()])
                submit(lambda: keep(*take()))

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
                        sums[written] = checksum(row.data)
                        written += 1

            def close() -> None:
                if append is not None:
                    sums[-1] = checksum(sums[:-1].data)
                    append(sums)

            yield write
            submit(close)
        self._forget(name)
        if held is not None:
            held.on_disk = append is not None
            self._held[name] = held
        if append is None:
            files.remove(self.path(name))  # a previous version
        else:
            self._sums[name] = sums[:-1]
        self._own.add(name)

    def link(self, source: str, target: str) -> None:
        """Make a boundary available under a second name, without a copy."""
        self._forget(target)
        if source in self._sums:
            self._sums[target] = self._sums[source]
        if source in self._held:
            self._held[target] = self._held[source]
        if source not in self._held or self._held[source].on_disk:
            files.link(self.path(source), self.path(target))

    def remove(self, name: str) -> None:
        self._forget(name)
        files.remove(self.path(name))

    def keep_only(self, names: set[str]) -> None:
        """Remove all other boundaries, and incomplete files from killed processes."""
        for name in (self._held.keys() | self._sums.keys() | self._own) - names:
            self._forget(name)
        for path in self.folder.iterdir():
            if path.name.endswith(files.TEMPORARY) or (path.suffix == SUFFIX and path.stem not in names):
                files.remove(path)

    def _forget(self, name: str) -> None:
        self._held.pop(name, None)
        self._sums.pop(name, None)
        self._own.discard(name)

    def path(self, name: str) -> Path:
        return self.folder / (name + SUFFIX)

    @property
    def _range(self) -> str:
        """The end of an error message that blames the range of the stored or the computing dtype."""
        largest = torch.finfo(self.encoding.stored).max
        if self.encoding.stored.itemsize > 1 and largest < torch.finfo(self.dtype).max:
            return f", or more than the {largest:g} that activations are stored up to"
        return advice(self.dtype)

    def _room(self, size: int) -> _Held | None:
        """Allocate `size` bytes for one boundary, evicting the oldest that are also on disk; None if they do not fit.

        Buffers take memory only as they are filled, so that those being filled do not count as taken in `spare`.
        """
        staying = {held for held in self._held.values() if not held.on_disk} | {*self._filling}
        if sum(len(held.raw) for held in staying) + size > self.memory:
            return None

        def fits() -> bool:
            unfilled = size + sum(len(held.raw) - held.filled for held in self._filling)
            return self.held_bytes + size <= self.memory and (self.spare is None or unfilled <= self.spare())

        for name in [name for name, held in self._held.items() if held.on_disk]:
            if fits():
                break
            del self._held[name]
        return _Held(size) if fits() else None

    def _fetch(self, name: str, batch: slice) -> Tensor:
        """Read one micro-batch to the host: (sequences, tokens, token_bytes) uint8, pinned if the device is a GPU."""
        if (held := self._held.get(name)) is None:
            buffer = self._read(name, batch)
        else:
            buffer = self._buffer(batch)
            with waiting("read"):
                buffer.copy_(held.raw[batch.start * self.row_bytes : batch.stop * self.row_bytes])
        return buffer.view(batch.stop - batch.start, self.shape[1], self.encoding.token_bytes)

    def _buffer(self, batch: slice) -> Tensor:
        length = (batch.stop - batch.start) * self.row_bytes
        return torch.empty(length, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    def _read(self, name: str, batch: slice) -> Tensor:
        """Read one micro-batch's bytes from disk: flat uint8. Raises a DamageError if they do not match their checksums."""
        if name not in self._sums:
            sums = np.zeros(self.shape[0] + 1, SUM)
            self._fill(name, self.shape[0] * self.row_bytes, sums)
            if checksum(sums[:-1].data) != sums[-1]:
                raise _damaged(self.path(name))
            self._sums[name] = sums[:-1]
        buffer = self._buffer(batch)
        rows = buffer.numpy().reshape(-1, self.row_bytes)
        self._fill(name, batch.start * self.row_bytes, rows)
        with waiting("read"):
            if any(checksum(row.data) != check for row, check in zip(rows, self._sums[name][batch], strict=True)):
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
        self.on_disk = False  # whether the boundary is also on disk

    def append(self, data: np.ndarray) -> None:
        # numpy releases the GIL during the copy.
        np.copyto(self.raw.numpy()[self.filled : self.filled + len(data)], data)
        self.filled += len(data)
