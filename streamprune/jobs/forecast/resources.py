"""Plan a job's resources: choose micro-batch sizes that fit and the place of Grams, and forecast the totals.

All micro-batch sizes are chosen here: `forecast` for streamed jobs, `generation_batch`, `answering`, `training_batch`,
`bucket_batch`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from ...errors import ResourceError
from ...maths.flops import KINDS, Kind
from ...model.skeleton import Skeleton
from ...system.machine import dtype_name
from ...system.units import format_bytes
from .memory import GRAM_PLACES, IDLE_SHARE, GramPlace, Memory
from .workload import TRAIN_SEQUENCES, Shapes, Workload

BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}
"""Tokens per micro-batch beyond which nothing gets faster, by device type."""
Stage = Literal["survey", "prune", "refine"]
"""Stages of a job that compute. What is no job's stage (text that the model writes, an evaluation) counts as ``survey``."""
STAGES: tuple[Stage, ...] = get_args(Stage)
ANSWERS = 32
"""Largest number of sequences per micro-batch that generates answers; a micro-batch takes as long as its longest answer."""


@dataclass(frozen=True)
class Resources:
    """Forecast of a job's resources."""

    device: str
    batch: int  # sequences per micro-batch in forward passes
    backward_batch: int  # sequences per micro-batch in backward passes
    grams: GramPlace  # where Grams are kept and sites are solved
    boundary_every: int  # k: the survey keeps every k-th boundary and recomputes the others
    copies_ahead: bool  # whether a GPU receives the next block's weights while it computes the current block
    device_bytes: int
    """Peak bytes of weights, sums, solver workspace and activations; on a CPU, of the whole process."""
    host_bytes: int
    """Peak bytes of the process; on a CPU, including the device's share."""
    demands: dict[str, dict[str, int]]
    """Bytes that each step holds, by step name: the parts of a `Demand`, totals ``device_bytes``, ``host_bytes``."""
    held_bytes: int  # bytes of the host's peak that are activations held within `memory_host`
    disk_bytes: int  # peak bytes of activations on disk
    activations: str  # dtype in which activations are stored
    output_bytes: int
    """Peak bytes beside OUT: the result and, until it is complete, an earlier shot's and the survey's findings."""
    bytes_to_read: int  # bytes of weights read over the whole job
    operations: int  # FLOPs of the whole job without solving
    operations_by_kind: dict[str, int]
    """FLOPs by kind, one entry for each of `maths.flops.KINDS`; 0 for solving, which is not forecast."""
    device_limit: int  # bytes that the device may use; on a CPU, the whole process
    disk_limit: int  # bytes of disk that activations may use
    problems: tuple[str, ...]  # why the job does not fit, and what would; empty if it fits
    steps: int = 0  # number of steps of a job, as `status` counts them
    refinement_operations: Mapping[str, int] = field(default_factory=dict)
    """FLOPs of training in each effort of `jobs.config.EFFORTS`."""
    ratio_missed: str | None = None  # why a job cannot remove the ratio asked for, if that is certain beforehand
    kept: str | None = None  # what the layout keeps whole, and why

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "problems": list(self.problems), "fits": not self.problems}

    def holding(self, held: int) -> Resources:
        """Return the forecast for a GPU with `held` bytes of activations in host memory in addition, and the same sizes."""
        return replace(
            self,
            host_bytes=self.host_bytes + held,
            held_bytes=self.held_bytes + held,
            demands={name: {**each, "host_bytes": each["host_bytes"] + held} for name, each in self.demands.items()},
        )

    def require(self) -> Resources:
        """Return the forecast itself. Raises ResourceError if the job does not fit."""
        if self.problems:
            raise ResourceError("; ".join(self.problems))
        return self


def forecast(
    skeleton: Skeleton,
    workload: Workload,
    *,
    device_limit: int,
    disk_limit: int,
    base: int = 0,
    memory_host: int = 0,
    host_limit: int | None = None,
) -> Resources:
    """Forecast a job's resources, with the largest micro-batches that fit the device's limit.

    Args:
        device_limit: bytes that the device may use; on a CPU, the whole process.
        disk_limit: bytes of disk that activations may use.
        base: bytes of host memory that the process takes before any work.
        memory_host: bytes of host memory that activations may be held in.
        host_limit: with a GPU, bytes of host memory that the process may use; None for any number.
    """
    model, problems = Memory(skeleton, workload), []
    on_cpu = skeleton.device.type == "cpu"
    places = GRAM_PLACES[:1] if on_cpu else GRAM_PLACES
    room = model.plannable(device_limit) - (base + memory_host if on_cpu else 0)
    beside = base + (0 if on_cpu else min(memory_host, model.boundaries(disk_limit, 0)[1]))
    host_room = math.inf if on_cpu or host_limit is None else host_limit - beside
    grams = next((place for place in places if model.device_peak(1, 1, place) <= room), places[-1])
    batch = backward_batch = 1
    least = model.device_peak(1, 1, grams)
    if least > room:
        demands = model.demands(1, 1, grams)
        tightest = max(demands, key=lambda name: demands[name].device)
        problems.append(
            f"the memory limit is {format_bytes(device_limit)}; {tightest} needs "
            f"{format_bytes(model.limit_for(least) + (base + memory_host) * on_cpu)} even with one sequence of "
            f"{workload.length} tokens at a time"
        )
    elif not on_cpu and (needed := model.host_peak(1, 1, grams)) > host_room:
        problems.append(
            f"{format_bytes(int(host_room) + beside)} of host memory are free; the job needs {format_bytes(needed + beside)} of it "
            f"beside {skeleton.device}, even with one sequence of {workload.length} tokens at a time"
            + ("; a smaller --memory-host takes less" if beside > base else "")
        )
    elif workload.text:
        most = max(1, min(workload.samples, BATCH_TOKENS[skeleton.device.type] // workload.length))

        def fits(forward: int, backward: int) -> bool:
            beside_it = on_cpu or model.host_peak(forward, backward, grams) <= host_room
            return model.device_peak(forward, backward, grams) <= room and beside_it

        batch = max(size for size in range(1, most + 1) if fits(size, 1))
        backward_batch = max(size for size in range(1, most + 1) if fits(batch, size))
    every, disk = model.boundaries(disk_limit, memory_host)
    held = min(memory_host, model.boundaries(disk_limit, 0)[1])
    # Keys and values are removed before boundaries are written.
    disk = max(disk, workload.generates * workload.samples * model.keys_and_values)
    if disk > disk_limit:
        problems.append(
            f"activations need {format_bytes(disk)} of disk and {format_bytes(disk_limit)} are free; use fewer samples "
            f"than {workload.samples}, windows shorter than {workload.length} tokens or another --cache"
        )
    operations, ahead = _flops_by_kind(model), model.copies_ahead((batch, backward_batch, grams), device_limit)
    demands = model.demands(batch, backward_batch, grams)
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
        activations=dtype_name(workload.activations or skeleton.dtype),
        output_bytes=model.beside_out() if workload.prunes or workload.refines else 0,
        bytes_to_read=_bytes_to_read(model, every),
        operations=sum(operations.values()),
        operations_by_kind={str(kind): count for kind, count in operations.items()},
        device_limit=device_limit,
        disk_limit=disk_limit,
        problems=tuple(problems),
    )


def training_operations(skeleton: Skeleton, workload: Workload) -> int:
    """Return the forecast FLOPs of a job's training."""
    return _flops_by_kind(Shapes(skeleton, workload))["training"]


def generation_batch(memory: Memory, batch: int, backward_batch: int) -> int:
    """Return the sequences per micro-batch for generating calibration tokens, within the other steps' peak."""
    room = memory.device_peak(batch, backward_batch) - memory.decoding(0)
    return max(1, min(memory.workload.samples, room // (memory.decoding(1) - memory.decoding(0))))


@dataclass(frozen=True)
class Answering:
    """How answers to prompts are generated."""

    in_memory: bool  # whether all weights, keys and values stay on the device, instead of passing through it
    samples: int  # sequences whose keys and values are stored at a time
    batch: int  # sequences per micro-batch
    chunk: int  # most tokens of a sequence that pass the blocks together


def answering(
    skeleton: Skeleton,
    samples: int,
    length: int,
    *,
    device_limit: int,
    disk_limit: int,
    base: int = 0,
    memory_host: int = 0,
    host_limit: int | None = None,
) -> Answering:
    """Choose how `samples` sequences of up to `length` tokens, prompts with answers, are generated within the limits.

    In memory if weights, keys and values of a micro-batch fit on the device, otherwise streamed.

    Raises:
        ResourceError: not even one sequence fits.
    """
    model = Memory(skeleton, Workload(samples=samples, length=length, text=True, prunes=False, generates=True))
    room = model.plannable(device_limit) - (base + memory_host if model.on_cpu else 0)
    room = room * IDLE_SHARE // (IDLE_SHARE + 1)
    for batch in range(min(samples, ANSWERS), 0, -1):
        how = Answering(True, batch, batch, max(1, BATCH_TOKENS[skeleton.device.type] // batch))
        if _in_memory(model, how) <= room:
            return how
    one = Workload(samples=1, length=length, text=True, prunes=False, generates=True)
    resources = forecast(
        skeleton,
        one,
        device_limit=device_limit,
        disk_limit=disk_limit,
        base=base,
        memory_host=memory_host,
        host_limit=host_limit,
    ).require()
    samples = min(samples, disk_limit // max(1, model.keys_and_values))
    # Of what is left beside one sequence, hidden states of all sequences get half and the micro-batch the other half.
    left = max(0, room - Memory(skeleton, one).device_peak(1, 1)) // 2
    batch = max(1, min(samples, ANSWERS, left // (model.decoding(1) - model.decoding(0))))
    hidden = 2 * model.stream * model.item * samples
    return Answering(False, samples, batch, max(1, min(resources.batch * length // batch, left // hidden)))


def answering_bytes(skeleton: Skeleton, how: Answering, length: int) -> int:
    """Return the bytes on the device while sequences of up to `length` tokens are generated so: at most what `answering` allowed."""
    work = Workload(samples=how.samples, length=length, text=True, prunes=False, generates=True)
    model = Memory(skeleton, work)
    if how.in_memory:
        return _in_memory(model, how)
    one = Memory(skeleton, replace(work, samples=1)).device_peak(1, 1)
    hidden = 2 * model.stream * model.item * how.samples
    return one + (how.batch - 1) * (model.decoding(1) - model.decoding(0)) + (how.chunk - 1) * hidden


def _in_memory(model: Memory, how: Answering) -> int:
    length = model.workload.length
    return model.answering_in_memory(how.batch, how.batch * min(how.chunk, length) * (model.passing(1) // length))


def training_batch(memory: Memory, room: int) -> int | None:
    """Return the sequences per micro-batch for training the whole model within `room` bytes; None if none fits."""
    fitting = [size for size in range(1, TRAIN_SEQUENCES + 1) if memory.in_memory(size) <= room]
    return min(fitting[-1], memory.workload.samples) if fitting else None


def bucket_batch(resources: Resources, longest: int, length: int) -> int:
    """Return the sequences of `length` tokens that fill a micro-batch forecast for sequences of `longest` tokens."""
    return max(1, resources.batch * longest // length)


def _bytes_to_read(shapes: Shapes, every: int) -> int:
    """Return the bytes of stored weights read over the whole job, given boundaries at every `every`-th block."""
    skeleton, workload = shapes.skeleton, shapes.workload
    embed = sum(skeleton.checkpoint[name].stored_bytes for name in skeleton.outside.embed_names())
    head = sum(skeleton.checkpoint[name].stored_bytes for name in skeleton.outside.head_names())
    everything = shapes.stored_all + embed + head
    head += embed if skeleton.outside.tied else 0
    refined = bool(workload.refines) * workload.refines_last * head
    if not workload.prunes:
        return everything + refined
    # All weights are read to check and to prune. Gradients read them forward, backward and to recompute boundaries.
    survey = 2 + (every > 1) if workload.gradients else 1 if workload.survey else 0
    corrected = 2 * workload.corrects + 1 + workload.imitates if workload.corrects else 0
    shot = everything + survey * shapes.stored_all + workload.text * embed + workload.gradients * head
    writing = workload.generates * (workload.length - 1) * (shapes.stored_all + embed + head)
    stepwise = workload.corrects * (embed + head) + workload.imitates * embed
    correction = workload.corrected_shots * (corrected * shapes.stored_all + stepwise)
    return everything + workload.shots * shot + refined + correction + writing


def _flops_by_kind(shapes: Shapes) -> dict[Kind, int]:
    """Return the FLOPs of the whole job by kind; see `flops_by_stage`."""
    return {kind: round(sum(stage[kind] for stage in flops_by_stage(shapes).values())) for kind in KINDS}


def flops_by_stage(shapes: Shapes) -> dict[Stage, dict[Kind, float]]:
    """Return the FLOPs of the whole job by stage and kind: one forward pass times the passes of each sweep, and the sums.

    FLOPs of solving are not forecast: they depend on the recipe and are few if there is enough text. All sites are
    assumed to lose the same share of their units. Sums are counted at the sizes before the first shot.
    """
    skeleton, workload, d = shapes.skeleton, shapes.workload, shapes.d
    tokens = workload.samples * workload.length * workload.text
    head = 2 * d * skeleton.vocabulary * workload.samples * (workload.length - 1) * workload.text
    part = 1.0 if workload.surveyed is None else workload.surveyed / workload.samples  # of the text, in the survey
    forward = consumers = mixing = surveyed = sums = last = updates = rerouted = 0.0
    rank = workload.correction_rank
    for number, sublayer in enumerate(shapes.all_sublayers()):
        measured = sublayer.measured
        last = 0.0 if measured is None else float(measured.operations * workload.samples * workload.text)
        pruned_input = number > 0  # the input of the first sublayer is the same in both streams
        targeted = workload.has_target and pruned_input and sublayer.entry.takes_target
        for site in sublayer.sites:
            attention = site.kind == "attention"
            mixed = 4 * workload.length * site.columns * tokens * attention
            if measured is None:
                last += 2 * sum(site.linears) * site.share * tokens + mixed
            mixing += mixed
            consumers += 2 * site.linears[-1] * site.share * tokens
            sides = [weights // d for weights in site.linears]  # beside d
            if rank is None:
                updates += 2 * sum(site.linears) * site.share * tokens
            else:
                updates += 2 * site.share * tokens * sum(min(rank, d, side) * (d + side) for side in sides)
            surveyed += 2 * tokens * site.share * part * sum(map(shapes.gram_products, shapes.summed(site)))
            sums += 2 * tokens * site.share * shapes.gram_products(site.columns) * workload.gram
            sums += 2 * tokens * site.columns * d * targeted
            if "divergence" in workload.survey and attention:
                surveyed += part * (2 * sum(site.linears[:-1]) * tokens + mixed)
        mixture = sum(2 * sum(site.linears) * site.share for site in sublayer.sites)
        rerouted += shapes.rerouted(sublayer) * mixture
        compensated = workload.compensates and pruned_input and any(site.linears[:-1] for site in sublayer.sites)
        wanted = compensated or (workload.wants_inputs and bool(sublayer.sites))
        sums += 2 * tokens * (shapes.gram_products(d) * wanted + d * d * compensated)
        forward += last
    if tokens:
        # Linears that belong to no site, and products of other mixers than attention.
        forward = max(forward, skeleton.block_operations(workload.samples, workload.length))
    advanced = forward if workload.refines else forward - last  # no stream is needed after the last sublayer
    found: dict[Stage, dict[Kind, float]] = {stage: dict.fromkeys(KINDS, 0.0) for stage in STAGES}
    survey, prune = found["survey"], found["prune"]
    # Refinement: forward, gradients of inputs and of weights. Correction: forward twice, and gradients of inputs; of low-rank updates
    # these too and their own, or of all weights.
    step = 3 * min(workload.correction_sequences, workload.correction_samples) / max(workload.samples, 1)
    epoch = math.ceil(workload.samples / workload.refine_sequences)
    for shot in range(workload.shots):
        before, after = (1 - workload.removes * done / workload.shots for done in (shot, shot + 1))
        if workload.survey or not workload.prunes:
            survey["sweeps"] += part * before * forward
        if workload.gradients:
            # Forward again, then gradients of inputs. For attention, backward takes five products, forward two.
            survey["sweeps"] += before * (2 * forward + 1.5 * mixing)
        survey["sweeps"] += head * (2 if workload.gradients else workload.scores)
        if workload.gram:
            prune["sweeps"] += before * (forward - consumers)
        if workload.prunes and workload.dense_stream:
            prune["sweeps"] += before * (forward if workload.has_target else advanced)
        if workload.prunes and (workload.gram or workload.dense_stream):
            prune["sweeps"] += after * advanced
        if shot >= workload.shots - workload.corrected_shots:
            # For the other model's predictions, the head once more.
            passes = after * (forward + (1 if rank is None else 4) / 3 * updates) + (2 + workload.imitates) / 3 * head
            whole = workload.correction_samples / max(workload.samples, 1)
            found["refine"]["training"] += workload.corrects * step * passes + workload.imitates * whole * forward
    # Behind the last block the head computes both models' predictions, and gradients.
    predicted = head * workload.length / max(1, workload.length - 1) * workload.refines_last
    refined = 3 * ((1 - workload.removes) * forward + predicted)
    found["refine"]["training"] += workload.refines / max(epoch, 1) * refined
    survey["sweeps"] += rerouted  # whole experts go in one shot
    survey["sums"] = workload.shots * surveyed * workload.prunes
    prune["sums"] = workload.shots * sums * workload.prunes
    survey["writing"] = workload.generates * (forward + head)
    return found
