"""Host memory: where tensors get theirs, and when it goes back."""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress
from functools import cache

import torch
from torch import Tensor

_OWN_PAGES = 1 << 20
"""Host buffers of this size get pages of their own."""
HEAP_KEPT = 256 << 20
"""Free memory at the end of malloc's heap that is kept for the next operation (see `settle_malloc`)."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def host_buffer(nbytes: int, device: torch.device) -> Tensor:
    """Bytes on the host to read into for a device; pinned for a GPU.

    Otherwise large ones are pages of their own, outside malloc: what is read in one thread and freed in another
    would leave holes in its heap.
    """
    if device.type == "cuda":
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    if nbytes < _OWN_PAGES:
        return torch.empty(nbytes, dtype=torch.uint8)
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


def host_copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy on the host, in a `host_buffer`: for what lives as long as a block."""
    copy = host_buffer(tensor.numel() * dtype.itemsize, torch.device("cpu")).view(dtype).view(tensor.shape)
    return copy.copy_(tensor)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU; no copy if it is contiguous."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data


def settle_malloc() -> None:
    """Have glibc's malloc hold as much memory after many blocks as after a few, at no cost in speed.

    One heap for all threads: with a heap a thread, as it is by default, a tensor read in one thread and freed in
    another leaves holes, and the process creeps up with the number of blocks. Tensors below 16 MB come from that
    heap, of whose free end 256 MB are kept: memory that is given back has to be faulted in again, page by page, at
    the next operation. Larger ones are mapped and go back at once.

    To be called before threads and tensors, in a process of our own, such as the command; other systems' malloc is
    left as it is.
    """
    libc = _glibc()
    if libc is not None:
        for parameter, value in ((_M_ARENA_MAX, 1), (_M_MMAP_THRESHOLD, 16 << 20), (_M_TRIM_THRESHOLD, HEAP_KEPT)):
            libc.mallopt(parameter, value)


def return_freed_memory() -> None:
    """Have glibc's malloc give every free page back, holes too: between blocks, where it costs next to nothing."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


@cache
def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
