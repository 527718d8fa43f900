"""The outcome of a job, as the Python interface returns it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..jobs.names import FIGURES
from .job import Job


@dataclass(frozen=True)
class Result:
    """The outcome of a job."""

    out: str
    recipe: str
    ratio_requested: float
    ratio_blocks: float
    """Share of the blocks' parameters that were removed or zeroed."""
    ratio_model: float
    """Share of the whole model's parameters that were removed or zeroed."""
    ratio_missed: str | None
    """Why the result misses the ratio by more than one unit: a sentence with both shares and a remedy; None if it does not."""
    aim: Mapping[str, Any] | None
    """What an aim has chosen: the ratio and the figures that decided. For `fit` bytes of ``weights``, ``cache``, ``workspace``."""
    parameters_before: int
    parameters_after: int
    """Parameters in the checkpoint, zeros included."""
    zeros: int
    """Weights zeroed if shapes stay; 0 if units were removed."""
    operations: int
    """Floating-point operations of the whole job, as `maths.flops` counts them."""
    forward_equivalents: float
    """The same, in dense forward passes over the calibration set."""
    operations_by_kind: Mapping[str, int]
    """The same by purpose, one entry for each of `maths.flops.KINDS`; empty for a result of an older version."""
    sweeps_per_shot: float | None
    """Cost of the sweeps of one shot, in dense forward passes; None for a result of an older version."""
    tokens: str | None
    """Fingerprint of the calibration windows; None if no text was read."""
    seconds: float
    """Wall-clock seconds of this process."""
    peak_device_bytes: int
    peak_host_bytes: int
    bytes_read: int
    """Bytes that this process read from the checkpoint."""
    waited: dict[str, float]
    """Seconds of the whole job spent waiting for disk, by kind: ``read`` and ``write``."""
    resumed: bool
    """Whether an earlier process did some of the work."""

    @classmethod
    def of(cls, job: Job, report: Mapping[str, Any]) -> Result:
        """Combine the report's figures with those of this process."""
        return cls(
            out=job.out_given,
            **{name: report[name] for name in FIGURES},
            operations_by_kind=report.get("operations_by_kind", {}),
            sweeps_per_shot=report.get("sweeps_per_shot"),
            ratio_missed=report.get("ratio_missed"),
            tokens=report.get("tokens"),
            aim=report.get("aim"),
            waited=report.get("waited", {}),
            **job.spent(),
        )
