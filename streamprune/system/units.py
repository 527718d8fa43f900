"""Parse and format sizes, times, and names of devices and dtypes. Does not import torch."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..errors import ConfigError

DTYPES = ("auto", "float64", "float32", "bfloat16", "float16")
ACTIVATIONS = (*DTYPES, "float8")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {f"{prefix}{suffix}": 2 ** (10 * n) for n, prefix in enumerate("KMGT", start=1) for suffix in ("", "IB")}


def parse_bytes(text: str) -> int:
    """Parse a size in bytes: ``"24GiB"`` → 25769803776. Units may be decimal or binary.

    A number without a unit is in bytes and must be at least 1,000,000.

    Raises:
        ConfigError: not a size, not positive, 8 EiB or more, or below 1,000,000 without a unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise ConfigError(f"{text!r} is not a size; write it like 24GiB or 800MB")
    number = float(match[1])
    if not match[2] and 0 < number < 10**6:
        raise ConfigError(f"the size {text.strip()!r} has no unit and would be bytes; write it like {match[1]}GiB")
    if not 1 <= number * _UNITS[match[2].upper()] < 2**63:
        raise ConfigError(f"the size {text[:40]!r} must be positive and below 8 EiB")
    return int(number * _UNITS[match[2].upper()])


def format_bytes(size: float) -> str:
    """Format a size in bytes: 1536 → ``"1.5 KiB"``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def format_seconds(seconds: float) -> str:
    """Format a duration in seconds: 3725 → ``"1 h 02 min"``."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def format_passes(equivalents: float, kinds: Mapping[str, int]) -> str:
    """Format an amount of compute: ``"6.9 dense forward passes: 3.8 in sweeps, 1.1 in sums, 2.0 in solving"``.

    Args:
        equivalents: the total, in dense forward passes.
        kinds: floating-point operations by kind.
    """
    whole = max(1, sum(kinds.values()))
    parts = [f"{equivalents * count / whole:.1f} in {kind}" for kind, count in kinds.items() if count]
    return f"{equivalents:.1f} dense forward passes" + (f": {', '.join(parts)}" if parts else "")


def check_device(name: str) -> str:
    """Check the syntax of a device name and return it. `machine.resolve_device` checks that this machine has the device."""
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?", name) is None:
        raise ConfigError(f"device is {name!r}; it must be auto, cpu, cuda or cuda:N")
    return name


def check_dtype(name: str) -> str:
    """Check the name of a computing dtype and return it."""
    if name not in DTYPES:
        raise ConfigError(f"dtype is {name!r}; it must be one of {', '.join(DTYPES)}")
    return name
