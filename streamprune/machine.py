"""What this machine is and has: device, dtype, free memory, peaks."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from .config import DTYPES
from .errors import ConfigError
from .ranks import ALONE, Ranks


def resolve_device(name: str, ranks: Ranks = ALONE) -> torch.device:
    """``auto`` takes CUDA where there is one, else the CPU; of several ranks on a machine each has a GPU of its own.

    Raises:
        ConfigError: not a device, or one that this machine or this torch has not.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if ranks.size > 1 and name.startswith("cuda"):
        if name != "cuda":
            raise ConfigError(f"device is {name!r}; with {ranks.size} processes it must be auto, cpu or cuda")
        name = f"cuda:{ranks.local}"
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


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` → ``"float32"``."""
    return str(dtype).removeprefix("torch.")


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


def reset_peaks(device: torch.device) -> bool:
    """Have both peaks begin anew at what is held now; whether the kernel does so for the host's."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    # Some kernels take the request and do nothing.
    return peak_host_bytes() <= resident_bytes() * 1.02


def peak_device_bytes(device: torch.device) -> int:
    """The most device memory that tensors have held; on the CPU the device is the host."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else peak_host_bytes()


class Peaks:
    """The most memory that this process has held: lap by lap, and in all.

    The kernel knows one mark only, which every lap takes back.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._most_host = self._most_device = 0
        self._own = False

    def lap(self) -> dict[str, Any]:
        """End a lap and begin another: ``host_bytes`` and ``device_bytes`` (None on the CPU) held since the last one.

        ``own`` says whether the host's is of this lap alone, which takes a kernel that takes its mark back.
        """
        lap = {"host_bytes": peak_host_bytes(), "device_bytes": None, "own": self._own}
        if self._device.type == "cuda":
            lap["device_bytes"] = peak_device_bytes(self._device)
        self._most_host, self._most_device = self.most()
        self._own = reset_peaks(self._device)
        return lap

    def most(self) -> tuple[int, int]:
        """Host and device bytes, over all laps."""
        return max(self._most_host, peak_host_bytes()), max(self._most_device, peak_device_bytes(self._device))


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
