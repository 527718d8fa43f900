"""The machine: devices, dtypes, free memory and memory peaks."""

from __future__ import annotations

import os
import resource
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, ResourceError
from .ranks import ALONE, Ranks
from .units import ACTIVATIONS, check_device, check_dtype, format_bytes

WORKSPACE, WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
"""What cuBLAS reads before its first product, and the values with which its sums have a fixed order when streams share a GPU."""
_WARM = 48 << 20
"""Bytes of library pages that this process has not touched yet but will."""


def resolve_device(name: str, ranks: Ranks = ALONE) -> torch.device:
    """Return the torch device for a ``--device`` name. ``auto`` is CUDA if available, else the CPU.

    With several ranks, each takes the GPU with its local number.

    Raises:
        ConfigError: not a device, or one that this machine or this torch does not have.
    """
    check_device(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if ranks.size > 1 and name.startswith("cuda"):
        if name != "cuda":
            raise ConfigError(f"device is {name!r}; with {ranks.size} processes it must be auto, cpu or cuda")
        name = f"cuda:{ranks.local_rank}"
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ConfigError(f"device is {name!r}; torch sees {count} CUDA devices")
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


@contextmanager
def deterministic(device: torch.device, strict: bool) -> Iterator[None]:
    """Have torch choose kernels of a GPU whose sums have a fixed order, so that a resumed job computes the same bytes.

    Args:
        strict: raise an error where there is no such kernel. Otherwise these operations run as usual, and so does the backward pass
            of fused attention, whose ordered kernels torch takes only if it may raise.

    Raises:
        ConfigError: the environment's ``CUBLAS_WORKSPACE_CONFIG`` leaves the order open.
    """
    if device.type != "cuda":
        yield
        return
    workspace = os.environ.get(WORKSPACE)
    if workspace not in (None, *WORKSPACES):
        raise ConfigError(
            f"{WORKSPACE} is {workspace!r}; a job on a GPU takes {' or '.join(WORKSPACES)}, or no setting"
        )
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", ".*not have a deterministic implementation|.*defaults to a non-deterministic", UserWarning
        )
        os.environ[WORKSPACE] = workspace or WORKSPACES[0]
        torch.use_deterministic_algorithms(True, warn_only=not strict)
        memory.fill_uninitialized_memory = False  # which would write every new tensor
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            memory.fill_uninitialized_memory = filled
            if workspace is None:
                del os.environ[WORKSPACE]


def resolve_dtype(name: str, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """Return the dtype that blocks compute in. ``auto`` is the stored dtype on a GPU and float32 on the CPU."""
    check_dtype(name)
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    return stored if device.type == "cuda" else torch.float32


def resolve_activations(name: str, computing: torch.dtype, stored: torch.dtype) -> torch.dtype:
    """Return the dtype that activations are stored in.

    ``auto`` is bfloat16 for weights `stored` in bfloat16, unless blocks compute in float64: such a model was never more
    precise, and this halves the disk traffic of a CPU, which computes in float32. For all other models ``auto`` is the
    `computing` dtype; float16 ends at 65504, which residual streams exceed.

    Raises:
        ConfigError: not one of `ACTIVATIONS`, or wider than the computing dtype.
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
    """Return how a job's settings name the dtype of stored activations: ``"as computed"`` if it is the computing dtype."""
    return "as computed" if stored == computing else dtype_name(stored)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype: ``torch.float32`` → ``"float32"``, ``torch.float8_e4m3fn`` → ``"float8"``."""
    return "float8" if dtype == torch.float8_e4m3fn else str(dtype).removeprefix("torch.")


def available_memory(device: torch.device) -> int:
    """Return the bytes available on the device now; on the CPU, 90 % of them, so that other processes keep the rest.

    On a GPU, memory that torch caches but no tensor holds counts as available, and torch's own limit (`limit_memory`) holds.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_allocated(device)
        cached = torch.cuda.memory_reserved(device) - held
        allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total) - held
        return max(0, min(free + cached, allowed))
    return int(_host_available() * 0.9)


def memory_limits(
    device: torch.device, asked: int | None, activations: int = 0, ranks: Ranks = ALONE
) -> dict[str, int]:
    """Return the memory limits of a job, in bytes, as keyword arguments for `forecast`.

    Args:
        asked: the limit on device memory in bytes; None for all that is free. On the CPU it covers the whole process.
        activations: bytes of host memory that may hold activations.
        ranks: the processes of the job; those on this machine share its free host memory equally.

    Returns:
        ``device_limit``: bytes of device memory; ``host_limit``: bytes of host memory for the whole process; ``base``: bytes
        of host memory that this process takes by itself; ``memory_host``: bytes of host memory for activations.

    Raises:
        ResourceError: less host memory is free than `activations`.
    """
    base, free = base_bytes(), available_memory(torch.device("cpu")) // ranks.local_size
    if activations > free:
        raise ResourceError(
            f"memory for activations is {format_bytes(activations)}; {format_bytes(free)} of host memory are free"
        )
    if device.type == "cpu":
        limit = asked or free + base
    else:
        limit = min(asked or available_memory(device), available_memory(device))
    return {"device_limit": limit, "host_limit": free + base, "base": base, "memory_host": activations}


@contextmanager
def limit_memory(device: torch.device, limit: int | None) -> Iterator[None]:
    """Limit torch to `limit` bytes of a GPU's memory while the context is open; None for no limit but an existing one.

    Memory that torch caches counts. The few hundred MB per process that the driver takes do not. At the end, the previous
    limit holds again, and torch's cache is returned to the GPU.

    Raises:
        ResourceError: the work ran out of memory on the GPU or the host.
    """
    on_gpu, before = device.type == "cuda", 1.0
    if on_gpu:
        before = torch.cuda.get_per_process_memory_fraction(device)
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(before, limit / total if limit else 1.0), device)
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # torch's CPU allocator raises a plain RuntimeError.
        told = any(text in str(error) for text in ("not enough memory", "can't allocate memory"))
        if not told and not isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            raise
        reason = str(error).partition("\n")[0] or "an allocation failed"
        raise ResourceError(f"{device} ran out of memory: {reason}") from error
    finally:
        if on_gpu:
            torch.cuda.set_per_process_memory_fraction(before, device)
            torch.cuda.empty_cache()


def base_bytes() -> int:
    """Return the host memory that this process takes by itself, in bytes: held now, plus library pages still to be loaded."""
    return resident_bytes() + _WARM


def resident_bytes() -> int:
    """Return the bytes of host memory that this process holds now."""
    return _proc_bytes("self/status", "VmRSS") or peak_host_bytes()


def peak_host_bytes() -> int:
    """Return the peak host memory of this process in bytes."""
    # Not getrusage first: on Linux it includes what the process held before exec.
    if peak := _proc_bytes("self/status", "VmHWM"):
        return peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _proc_bytes(path: str, field: str) -> int | None:
    """Return a field of a file below /proc in bytes; None without it."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc", path).read_text().splitlines())
        return int(fields[field].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def reset_peaks(device: torch.device) -> bool:
    """Reset both peaks to what is held now. Returns whether the kernel did so for the host peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    # Some kernels ignore the request.
    return peak_host_bytes() <= resident_bytes() * 1.02


class Peaks:
    """Memory peaks of this process, per lap and overall. The kernel keeps only one peak, which each lap resets."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._most_host = self._most_device = 0
        self._own = False

    def lap(self) -> dict[str, Any]:
        """End a lap and start the next. Returns its peaks in bytes: ``host_bytes`` and ``device_bytes`` (None on the CPU).

        ``own`` is whether the host peak belongs to this lap alone, which needs a kernel that can reset the peak.
        """
        host, device = self._current()
        lap = {"host_bytes": host, "device_bytes": device, "own": self._own}
        self._most_host, self._most_device = self.most()
        self._own = reset_peaks(self._device)
        return lap

    def most(self) -> tuple[int, int]:
        """Return the host and device peaks over all laps, in bytes; on the CPU both are the host's."""
        host, device = self._current()
        return max(self._most_host, host), max(self._most_device, host if device is None else device)

    def _current(self) -> tuple[int, int | None]:
        on_gpu = self._device.type == "cuda"
        return peak_host_bytes(), int(torch.cuda.max_memory_allocated(self._device)) if on_gpu else None


def _host_available() -> int:
    available = _proc_bytes("meminfo", "MemAvailable") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for group, limit, used in _control_groups():
        try:
            taken = int((group / used).read_text()) - _reclaimable(group)
            available = min(available, int((group / limit).read_text()) - taken)
        except (OSError, ValueError):  # no limit, or no such file
            continue
    return max(available, 1)


def _control_groups(
    proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> Iterator[tuple[Path, str, str]]:
    """Yield the memory control groups of this process, innermost first: folder, and the names of its limit and usage files."""
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
            # In a container, the path may be the host's while the root is the container's.
            inside = top / path.lstrip("/")
            for group in dict.fromkeys((inside, *inside.parents, top)):
                if group == top or top in group.parents:
                    yield group, *files


def _reclaimable(group: Path) -> int:
    """Return the bytes of page cache charged to a control group, which the kernel drops under pressure."""
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return sum(int(stat.get(f"total_{name}", stat.get(name, 0))) for name in ("inactive_file", "active_file"))
