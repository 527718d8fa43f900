"""Tensors of a checkpoint as the model sees them, read from the bytes that store them.

`Plain` tensors are stored as they are. `View` is a part of a stored tensor, such as one expert of a fused tensor. `quantised` and
`gguf_source` have the kinds that are dequantised while they are read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..maths.refit import all_finite
from ..system import files
from ..system.host import host_buffer

CPU = torch.device("cpu")
ALL = slice(None)
CHUNK = 1 << 17
"""Elements that are dequantised or moved at a time."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Dtypes of weights that are not quantised, by safetensors' name."""
_PACKED = {"F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu}


@dataclass(frozen=True)
class Span:
    """Bytes of a file: `nbytes` from byte `begin`."""

    file: Path
    begin: int
    nbytes: int

    def part(self, begin: int, nbytes: int) -> Span:
        """Return `nbytes` of these bytes, from byte `begin` within them."""
        return Span(self.file, self.begin + begin, nbytes)

    def read_into(self, buffer: Tensor) -> None:
        """Read into a contiguous host tensor of `nbytes` bytes. Raises a CheckpointError if the file has become shorter."""
        data = buffer.view(-1).view(torch.uint8).numpy().data
        if files.read_into(self.file, self.begin, data) < self.nbytes:
            raise CheckpointError(f"{self.file} ends before byte {self.begin + self.nbytes}, inside a tensor")

    def read(self, dtype: torch.dtype) -> Tensor:
        """Return the bytes in new host memory, as elements (n,) of `dtype`."""
        buffer = host_buffer(self.nbytes, CPU).view(dtype)
        self.read_into(buffer)
        return buffer


@dataclass(frozen=True)
class Stored:
    """A tensor as a shard stores it."""

    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    span: Span

    @property
    def unit(self) -> int:
        """Bytes of an element, or of several: no piece for `finite` is cut inside them."""
        return 8

    def finite(self, piece: Tensor) -> bool:
        """Return whether a piece of the bytes, uint8 and of whole elements, holds neither NaN nor Inf. Integers never do."""
        if self.dtype in _PACKED:
            return all_finite(piece.view(_PACKED[self.dtype]).bfloat16())
        return self.dtype not in DTYPES or all_finite(piece.view(DTYPES[self.dtype]))


@dataclass(frozen=True)
class TensorEntry(ABC):
    """One tensor: its dtype and shape for the model, and where its bytes are."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    @abstractmethod
    def spans(self) -> tuple[Span, ...]:
        """The stored bytes that `read` reads."""

    @abstractmethod
    def fill(self, out: Tensor) -> None:
        """Read the tensor into `out`, a contiguous host tensor of its dtype and shape."""

    @abstractmethod
    def part(self, index: int | None = None, rows: slice = ALL, *, transposed: bool = False) -> TensorEntry:
        """Return a part of the tensor, such as the gate projection of one expert.

        As far as the part is contiguous, only its bytes are read.

        Args:
            index: position along the first dimension, such as the expert of a tensor (experts, rows, columns). None: the tensor
                itself is the matrix or vector.
            rows: rows of the result, or elements of a vector, after `transposed`; the step is at least 1.
            transposed: transpose the matrix: experts stored as (experts, inputs, outputs) give rows of outputs.
        """

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in memory, in bytes."""
        return self.numel * self.dtype.itemsize

    @property
    def stored_bytes(self) -> int:
        """Size of the bytes that `read` reads."""
        return sum(span.nbytes for span in self.spans)

    @property
    def shard(self) -> Path:
        """The file that holds the tensor; the first of them if there are several."""
        return self.spans[0].file

    def read(self, device: torch.device = CPU) -> Tensor:
        """Read the tensor to new host memory; pinned if `device` is a GPU."""
        out = host_buffer(self.nbytes, device).view(self.dtype).view(self.shape)
        self.fill(out)
        return out


def parts(count: int, width: int) -> Iterator[tuple[int, int]]:
    """Cut `count` rows of `width` elements into parts of about `CHUNK` elements, at least one row: begin and end of each."""
    step = max(1, CHUNK // width)
    return ((begin, min(begin + step, count)) for begin in range(0, count, step))


class ByRows(TensorEntry):
    """A tensor whose rows along the last dimension can be read one by one."""

    @abstractmethod
    def rows(self, begin: int, end: int, shape: tuple[int, ...]) -> ByRows:
        """Return rows `begin` to `end` of the tensor seen as a matrix with its last dimension as columns, in `shape`."""

    def part(self, index: int | None = None, rows: slice = ALL, *, transposed: bool = False) -> TensorEntry:
        height, width = prod(self.shape[1:-1]), self.shape[-1]
        whole = self if index is None else self.rows(index * height, (index + 1) * height, self.shape[1:])
        count = whole.shape[-1 if transposed else 0]
        begin, end, step = rows.indices(count)
        if transposed or len(whole.shape) == 1:
            everything = not transposed and (begin, end, step) == (0, count, 1)
            return whole if everything else View.of(whole, rows, transposed=transposed)
        near = whole.rows(begin, end, (end - begin, width))
        return near if step == 1 else View.of(near, slice(None, None, step))


@dataclass(frozen=True)
class Plain(ByRows):
    """A tensor whose bytes are stored as they are."""

    span: Span

    @property
    def spans(self) -> tuple[Span, ...]:
        return (self.span,)

    def fill(self, out: Tensor) -> None:
        self.span.read_into(out)

    def rows(self, begin: int, end: int, shape: tuple[int, ...]) -> Plain:
        row = self.shape[-1] * self.dtype.itemsize
        return replace(self, shape=shape, span=self.span.part(begin * row, (end - begin) * row))


@dataclass(frozen=True)
class View(TensorEntry):
    """Rows of another tensor, with its last two dimensions swapped first if `transposed`."""

    base: TensorEntry
    picked: slice
    transposed: bool

    @classmethod
    def of(cls, base: TensorEntry, picked: slice = ALL, *, transposed: bool = False) -> View:
        """Return a view of a tensor; `picked` selects along the first dimension of a matrix or vector."""
        shape = (*base.shape[:-2], base.shape[-1], base.shape[-2]) if transposed else base.shape
        return cls(base.dtype, (len(range(*picked.indices(shape[0]))), *shape[1:]), base, picked, transposed)

    @property
    def spans(self) -> tuple[Span, ...]:
        return self.base.spans

    def fill(self, out: Tensor) -> None:
        base = self.base
        if not isinstance(base, ByRows) or len(base.shape) != 2:
            whole = base.read()
            out.copy_((whole.mT if self.transposed else whole)[self.picked])
            return
        height, width = base.shape
        first, _, step = self.picked.indices(width if self.transposed else height)
        for begin, end in parts(height if self.transposed else len(out), width if self.transposed else step * width):
            if self.transposed:
                rows = base.rows(begin, end, (end - begin, width)).read()
                out[:, begin:end] = rows.T[self.picked]
            else:
                low, high = first + begin * step, first + (end - 1) * step + 1
                out[begin:end] = base.rows(low, high, (high - low, width)).read()[::step]

    def part(self, index: int | None = None, rows: slice = ALL, *, transposed: bool = False) -> TensorEntry:
        if self.picked == ALL:  # the base may read fewer bytes
            return self.base.part(index, rows, transposed=transposed != self.transposed)
        assert index is None, "only matrices and vectors are picked from"
        return View.of(self, rows, transposed=transposed)


@dataclass(frozen=True)
class Computed(TensorEntry):
    """A tensor that is computed from others, as transformers does while it loads: split, merged or interleaved."""

    bases: tuple[TensorEntry, ...]
    compute: Callable[[Sequence[Tensor]], Tensor]

    @property
    def spans(self) -> tuple[Span, ...]:
        return tuple(span for base in self.bases for span in base.spans)

    def fill(self, out: Tensor) -> None:
        out.copy_(self.compute([base.read() for base in self.bases]))

    def part(self, index: int | None = None, rows: slice = ALL, *, transposed: bool = False) -> TensorEntry:
        whole = (
            self
            if index is None
            else Computed(self.dtype, self.shape[1:], self.bases, lambda tensors: self.compute(tensors)[index])
        )
        return View.of(whole, rows, transposed=transposed)
