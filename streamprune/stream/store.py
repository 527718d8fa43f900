"""Block inputs on disk: raw (samples, tokens, width), one file a stream and boundary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from .. import files
from ..errors import NumericalError, ResumeError
from ..host import tensor_bytes
from .prefetch import read_ahead

SUFFIX = ".activations"


class ActivationStore:
    """A folder of boundaries, all of one shape and dtype, read and written in micro-batches.

    Args:
        folder: made if it is not there.
        shape: (samples, tokens, width).
        dtype: as computed.
        device: where batches go when read.
        durable: fsync what is finished, for a journal that will speak of it.
    """

    def __init__(
        self, folder: Path, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, *, durable: bool
    ) -> None:
        self.folder, self.shape, self.dtype, self.device, self.durable = folder, shape, dtype, device, durable
        files.make_folder(folder)

    @property
    def row_bytes(self) -> int:
        """Bytes of one sample."""
        return self.shape[1] * self.shape[2] * self.dtype.itemsize

    def __contains__(self, name: str) -> bool:
        return self._path(name).exists()

    def batches(self, size: int) -> list[slice]:
        """The samples in micro-batches of `size`, the last one perhaps smaller."""
        return [slice(start, min(start + size, self.shape[0])) for start in range(0, self.shape[0], size)]

    def read(self, name: str, batch: slice) -> Tensor:
        """One micro-batch, on the device: (sequences, tokens, width)."""
        return self._fetch(name, batch).to(self.device, non_blocking=True)

    def each(self, size: int, *names: str) -> Iterator[tuple[slice, list[Tensor]]]:
        """All micro-batches of several boundaries side by side, the next one read while this one is used."""

        def load(batch: slice) -> list[Tensor]:
            return [self._fetch(name, batch) for name in names]

        def announce(batch: slice) -> None:
            for name in names:
                files.announce(
                    self._path(name), batch.start * self.row_bytes, (batch.stop - batch.start) * self.row_bytes
                )

        for batch, tensors in read_ahead(self.device, self.batches(size), announce, load):
            yield batch, [tensor.to(self.device, non_blocking=True) for tensor in tensors]

    @contextmanager
    def writing(self, name: str, place: str) -> Iterator[Callable[[Tensor], None]]:
        """Write a boundary batch after batch; it appears when all of it is there.

        Raises:
            NumericalError: a batch holds NaN or Inf; `place` says where it came from.
        """
        with files.replacing(self._path(name), durable=self.durable) as temporary, temporary.open("wb") as file:

            def write(batch: Tensor) -> None:
                # A sum shows NaN and Inf at a fifth of the cost; it may overflow by itself.
                if not bool(torch.isfinite(batch.sum())) and not bool(torch.isfinite(batch).all()):
                    raise NumericalError(f"{place} gives NaN or Inf")
                file.write(tensor_bytes(batch.detach().to("cpu", self.dtype)))

            yield write

    def link(self, source: str, target: str) -> None:
        """Give a boundary a second name."""
        files.link(self._path(source), self._path(target))

    def remove(self, name: str) -> None:
        """Remove a boundary that may be gone already."""
        files.remove(self._path(name))

    def keep_only(self, names: set[str]) -> None:
        """Remove every other boundary, and what a killed process left half-written."""
        for path in self.folder.iterdir():
            if path.name.endswith(files.TEMPORARY) or (path.suffix == SUFFIX and path.stem not in names):
                files.remove(path)

    def _path(self, name: str) -> Path:
        return self.folder / (name + SUFFIX)

    def _fetch(self, name: str, batch: slice) -> Tensor:
        length = (batch.stop - batch.start) * self.row_bytes
        buffer = torch.empty(length, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        try:
            done = files.read_into(self._path(name), batch.start * self.row_bytes, buffer.numpy().data)
        except FileNotFoundError:
            done = 0
        if done < length:
            raise ResumeError(f"{self._path(name)} is missing or cut short; start over with --restart")
        return buffer.view(self.dtype).view(batch.stop - batch.start, *self.shape[1:])
