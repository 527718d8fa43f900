"""Host memory: how tensors allocate it, and when it returns to the system."""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress
from functools import cache
from typing import Any

import torch
import xxhash
from torch import Tensor

_OWN_PAGES = 1 << 20
"""Host buffers of at least this many bytes are mapped separately, outside malloc's heap."""
HEAP_KEPT = 256 << 20
"""Bytes of free memory at the end of malloc's heap that are kept for reuse (see `configure_malloc`)."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def host_buffer(nbytes: int, device: torch.device) -> Tensor:
    """Allocate a host buffer (nbytes,) uint8 to read data for `device` into; pinned if `device` is a GPU.

    For the CPU, large buffers are mapped outside malloc's heap: buffers that one thread allocates and another frees would
    fragment it.
    """
    if device.type == "cuda":
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    if nbytes < _OWN_PAGES:
        return torch.empty(nbytes, dtype=torch.uint8)
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # this kernel has no huge pages
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


def host_copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Copy a tensor to a `host_buffer`, in `dtype`, rounded before it leaves its device. For tensors that live as long as a block."""
    copy = host_buffer(tensor.numel() * dtype.itemsize, torch.device("cpu")).view(dtype).view(tensor.shape)
    return copy.copy_(tensor if tensor.device.type == "cpu" else tensor.to(dtype))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a CPU tensor, without a copy if it is contiguous."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data


def checksum(data: Any) -> int:
    """Return XXH3, 64 bits, of bytes in memory: detects accidental damage at the speed of memory, but no forgery."""
    found = xxhash.xxh3_64()
    found.update(data)  # without the GIL; `xxh3_64_intdigest` of older versions holds it
    return found.intdigest()


def configure_malloc() -> None:
    """Configure glibc's malloc, where it is in use, so that memory does not grow with the number of blocks.

    All threads share one heap: with one each, tensors that one thread allocates and another frees fragment the heaps, and the
    process grows with every block. Allocations below 16 MiB come from the heap, of which up to 256 MiB at the free end are kept,
    since returned pages must be faulted in again. Larger ones are mapped, and return to the system when freed.

    Call this before creating threads or tensors, and only in a process of our own, such as the command line.
    """
    libc = _glibc()
    if libc is not None:
        for parameter, value in ((_M_ARENA_MAX, 1), (_M_MMAP_THRESHOLD, 16 << 20), (_M_TRIM_THRESHOLD, HEAP_KEPT)):
            libc.mallopt(parameter, value)


def return_freed_memory() -> None:
    """Return all free pages of glibc's malloc to the system, holes included. Called between blocks, where it costs almost nothing."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


@cache
def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
