"""The plan of resources: micro-batches that fit, where Grams are, and what the job takes with them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ...errors import ResourceError
from ...maths.flops import KINDS
from ...model.skeleton import Skeleton
from ...system.machine import dtype_name
from ...system.units import format_bytes
from .flops import Effort
from .memory import GRAM_PLACES, GramPlace, Memory, Sizes, copies_ahead
from .needs import Needs

BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}
"""More tokens a micro-batch than this make nothing faster."""

PHASES = ("calibrate", "forward", "head", "backward", "prune", "correct")
"""What operations are forecast for; refinement belongs to ``prune``, whichever job it is."""


@dataclass(frozen=True)
class Resources:
    """A job's forecast."""

    device: str
    batch: int
    """Sequences a micro-batch, forward."""
    backward_batch: int
    grams: GramPlace
    boundary_every: int
    """The survey keeps every k-th boundary and recomputes the others."""
    copies_ahead: bool
    """Whether the next block's weights come to the device while this one's are used."""
    device_bytes: int
    """Peak of weights, sums, solver workspace and activations; where the device is the CPU, of the whole process."""
    host_bytes: int
    """Peak of the process; where the device is the CPU, the device's share included."""
    demands: dict[str, dict[str, int]]
    """What each step holds, by its name: the parts of a `Demand`, and ``device_bytes`` and ``host_bytes`` in all."""
    held_bytes: int
    """Of the host's peak, activations that `memory_host` allows to be held."""
    disk_bytes: int
    """Activations."""
    activations: str
    """What they are stored in."""
    output_bytes: int
    """What lies beside OUT, at the most: the result, and until it is made an earlier shot's and what a survey found."""
    bytes_to_read: int
    operations: int
    """Floating-point operations."""
    phases: dict[str, int]
    """The same by phase, one entry for each of `PHASES`."""
    operations_by_kind: dict[str, int]
    """The same by what they are for, one entry for each of `maths.operations.KINDS`."""
    device_limit: int
    disk_limit: int
    problems: tuple[str, ...]
    """Why it does not fit, and what would; empty when it does."""
    steps: int = 0
    """Of a job: as many as `status` counts."""
    ratio_missed: str | None = None
    """Why a job cannot remove what was asked, where that is certain beforehand."""

    @property
    def sizes(self) -> Sizes:
        """Those that were chosen."""
        return self.batch, self.backward_batch, self.grams

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "problems": list(self.problems), "fits": not self.problems}

    def require(self) -> Resources:
        """Itself, if it fits.

        Raises:
            ResourceError: it does not.
        """
        if self.problems:
            raise ResourceError("; ".join(self.problems))
        return self


def forecast(
    skeleton: Skeleton, needs: Needs, *, device_limit: int, disk_limit: int, base: int = 0, memory_host: int = 0
) -> Resources:
    """What the job takes, with the largest micro-batches that fit the device's limit.

    Args:
        device_limit: bytes; where the device is the CPU, of the whole process.
        base: bytes of host memory that the process takes for itself.
        memory_host: bytes of host memory that activations may be held in.
    """
    model, effort = Memory(skeleton, needs), Effort(skeleton, needs)
    problems = []
    on_cpu = skeleton.device.type == "cpu"
    places = GRAM_PLACES[:1] if on_cpu else GRAM_PLACES
    room = device_limit - (base + memory_host if on_cpu else 0)
    grams = next((place for place in places if model.device_peak(1, 1, place) <= room), places[-1])
    least = model.device_peak(1, 1, grams)
    batch = backward_batch = 1
    if least > room:
        problems.append(
            f"the memory limit is {format_bytes(device_limit)}; {model.tightest(1, 1, grams)} needs "
            f"{format_bytes(least + device_limit - room)} even with one sequence of {needs.length} tokens at a time"
        )
    elif needs.text:
        most = max(1, min(needs.samples, BATCH_TOKENS[skeleton.device.type] // needs.length))
        batch = max(size for size in range(1, most + 1) if model.device_peak(size, 1, grams) <= room)
        backward_batch = max(size for size in range(1, most + 1) if model.device_peak(batch, size, grams) <= room)
    every, disk = model.boundaries(disk_limit, memory_host)
    held = min(memory_host, model.boundaries(disk_limit, 0)[1])
    disk = max(disk, needs.generates * needs.samples * model.keys_and_values)  # these go before boundaries come
    if disk > disk_limit:
        problems.append(
            f"activations need {format_bytes(disk)} of disk and {format_bytes(disk_limit)} are free; "
            f"fewer samples than {needs.samples}, windows shorter than {needs.length} or another --cache would do"
        )
    operations = effort.operations()
    demands = model.demands(batch, backward_batch, grams)
    ahead = copies_ahead(skeleton, needs, (batch, backward_batch, grams), device_limit)
    totals = {
        name: {
            "device_bytes": demand.device + (base + held if on_cpu else ahead * model.stored_block),
            "host_bytes": base + held + demand.host + (demand.device if on_cpu else 0),
        }
        for name, demand in demands.items()
    }
    return Resources(
        device=str(skeleton.device),
        batch=batch,
        backward_batch=backward_batch,
        grams=grams,
        boundary_every=every,
        copies_ahead=ahead,
        device_bytes=max(each["device_bytes"] for each in totals.values()),
        host_bytes=max(each["host_bytes"] for each in totals.values()),
        held_bytes=held,
        demands={name: {**asdict(demand), **totals[name]} for name, demand in demands.items()},
        disk_bytes=disk,
        activations=dtype_name(needs.activations or skeleton.dtype),
        output_bytes=model.beside_out() if needs.prunes or needs.refines else 0,
        bytes_to_read=effort.bytes_to_read(every),
        operations=sum(round(count) for count in operations.values()),
        phases={
            phase: sum(round(count) for (each, _), count in operations.items() if each == phase) for phase in PHASES
        },
        operations_by_kind={
            kind: sum(round(count) for (_, each), count in operations.items() if each == kind) for kind in KINDS
        },
        device_limit=device_limit,
        disk_limit=disk_limit,
        problems=tuple(problems),
    )
