"""What this machine is and has: device, dtype, free memory, peaks."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, ResourceError
from .ranks import ALONE, Ranks
from .units import ACTIVATIONS, check_device, check_dtype, format_bytes

_WARM = 48 << 20


def resolve_device(name: str, ranks: Ranks = ALONE) -> torch.device:
    """``auto`` takes CUDA where there is one, else the CPU; of several ranks on a machine each has a GPU of its own.

    Raises:
        ConfigError: not a device, or one that this machine or this torch has not.
    """
    check_device(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if ranks.size > 1 and name.startswith("cuda"):
        if name != "cuda":
            raise ConfigError(f"device is {name!r}; with {ranks.size} processes it must be auto, cpu or cuda")
        name = f"cuda:{ranks.local}"
    device = torch.device(name)
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
    check_dtype(name)
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    return stored if device.type == "cuda" else torch.float32


def resolve_activations(name: str, computing: torch.dtype, stored: torch.dtype) -> torch.dtype:
    """What activations are stored in.

    ``auto`` is bfloat16 for a model that is itself stored in it, whether or not it is computed in: nothing in such a
    model was ever more precise, and it halves what a CPU, which computes in float32, writes and reads. Any other model
    keeps what is computed: float16 would hold no more than 65504, which residual streams exceed. So does float64.

    Args:
        computing: what blocks compute in.
        stored: what the model's weights are stored in.

    Raises:
        ConfigError: not one of `ACTIVATIONS`, or larger than what is computed.
    """
    if name not in ACTIVATIONS:
        raise ConfigError(f"activations is {name!r}; it must be one of {', '.join(ACTIVATIONS)}")
    if name == "float8":
        return torch.float8_e4m3fn
    if name == "auto":
        return torch.bfloat16 if stored == torch.bfloat16 and computing != torch.float64 else computing
    dtype: torch.dtype = getattr(torch, name)
    if dtype.itemsize > computing.itemsize:
        raise ConfigError(
            f"activations is {name!r}, which is more than the {dtype_name(computing)} they are computed in"
        )
    return dtype


def activations_name(stored: torch.dtype, computing: torch.dtype) -> str:
    """How a job's settings say what is stored: the same for all jobs that keep what they compute."""
    return "as computed" if stored == computing else dtype_name(stored)


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` → ``"float32"``, and one name for all that activations may be stored in."""
    return "float8" if dtype == torch.float8_e4m3fn else str(dtype).removeprefix("torch.")


def available_memory(device: torch.device) -> int:
    """Bytes that work on the device may use now; on the CPU a tenth is left to others."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(_host_available() * 0.9)


def room(device: torch.device, asked: int | None, activations: int = 0, ranks: Ranks = ALONE) -> dict[str, int]:
    """How much memory a job may take, as `forecast` wants to know it.

    Args:
        asked: bytes of the device that it shall stay within; None for what is free. On the CPU that is the whole process.
        activations: bytes of host memory that they may be held in.
        ranks: those that share a job; each of them on this machine has an equal part of what is free of the host's.

    Returns:
        ``device_limit``; ``base``, what of the host's this process takes for itself; ``memory_host``, what activations may.

    Raises:
        ResourceError: this machine has not so much for activations.
    """
    base, free = base_bytes(), available_memory(torch.device("cpu")) // ranks.here
    if activations > free:
        raise ResourceError(
            f"activations may be held in {format_bytes(activations)} of host memory; {format_bytes(free)} are free"
        )
    if device.type == "cpu":
        limit = asked or free + base
    else:
        there = available_memory(device)
        limit = min(asked or there, there)
    return {"device_limit": limit, "base": base, "memory_host": activations}


@contextmanager
def within(device: torch.device, limit: int | None) -> Iterator[None]:
    """A context in which torch takes no more than `limit` bytes of a GPU's memory, None for all there is.

    What torch keeps for itself counts; the driver's own few hundred megabytes a process do not.

    Raises:
        ResourceError: the work inside needed more than that, or than there was.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total) if limit else 1.0, device)
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ResourceError(
            f"{device} ran out of memory: {str(error).splitlines()[0] if str(error) else 'no more could be had'}"
        ) from error
    except RuntimeError as error:
        # How torch's allocator on the CPU says it.
        if not any(said in str(error) for said in ("not enough memory", "can't allocate memory")):
            raise
        raise ResourceError(f"{device} ran out of memory: {str(error).splitlines()[0]}") from error


def base_bytes() -> int:
    """Host memory that this process takes for itself: what it holds now, and libraries' pages that use will bring in."""
    return resident_bytes() + _WARM


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
    for group, limit, used in _control_groups():
        try:
            taken = int((group / used).read_text()) - _reclaimable(group)
            available = min(available, int((group / limit).read_text()) - taken)
        except (OSError, ValueError):  # no limit, or none of that kind
            continue
    return max(available, 1)


def _control_groups(
    proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> Iterator[tuple[Path, str, str]]:
    """Folders that limit this process's memory, its own and those above it, each with the names of its limit and its use."""
    try:
        lines = [line.split(":", 2) for line in proc.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in lines:
        if controllers in ("", "memory"):
            top = root / "memory" if controllers else root
            files = (
                ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
            )
            # In a container the path may be that of the machine outside, and the root its own.
            inside = top / path.lstrip("/")
            for group in dict.fromkeys((inside, *inside.parents, top)):
                if group == top or top in group.parents:
                    yield group, *files


def _reclaimable(group: Path) -> int:
    """Bytes of a control group that hold pieces of files, which the kernel drops when it needs room."""
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return sum(int(stat.get(f"total_{name}", stat.get(name, 0))) for name in ("inactive_file", "active_file"))
