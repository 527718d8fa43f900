"""What this machine is and has: device, dtype, free memory, peaks."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .config import DTYPES
from .errors import ConfigError

_OWN_PAGES = 1 << 20
"""Host buffers of this size get pages of their own."""
HEAP_KEPT = 256 << 20
"""Free memory at the end of malloc's heap that is kept for the next operation (see `settle_malloc`)."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def resolve_device(name: str) -> torch.device:
    """``auto`` takes CUDA where there is one, else the CPU.

    Raises:
        ConfigError: not a device, or one that this machine or this torch has not.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device is {name!r}; it must be auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device is {name!r}; only cpu and cuda are supported")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ConfigError(f"device is {name!r}; torch sees {count} CUDA devices")
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


def resolve_dtype(name: str, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """What blocks compute in: ``auto`` is the stored dtype on a GPU and float32 on the CPU.

    Raises:
        ConfigError: not one of `DTYPES`.
    """
    if name not in DTYPES:
        raise ConfigError(f"dtype is {name!r}; it must be one of {', '.join(DTYPES)}")
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    return stored if device.type == "cuda" else torch.float32


def available_memory(device: torch.device) -> int:
    """Bytes that work on the device may use now; on the CPU a tenth is left to others."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(_host_available() * 0.9)


def resident_bytes() -> int:
    """Host memory that this process holds now."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_host_bytes()


def peak_host_bytes() -> int:
    """The most host memory that this process has held."""
    # Not getrusage first: Linux counts there what the parent held before it became this process.
    try:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_bytes(device: torch.device) -> int:
    """The most device memory that tensors have held; on the CPU the device is the host."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else peak_host_bytes()


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


def _host_available() -> int:
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            available = min(available, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):
            continue
    return max(available, 1)
