"""What each step needs, and the micro-batch that fits.

The figures are sums of what the code holds at each step, part by part; activations are counted a token from the
widths of the sublayer at hand. `benchmarks/memory.py` holds them to within a tenth of what is measured.

Less memory than is comfortable costs speed, not the job: micro-batches get smaller first; then, where the device is a
GPU, a site's Gram waits on the host while it is solved; then Grams are summed and sites solved on the host, and the
device runs the model alone (`GramPlace`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any, Literal

import torch

from .config import format_bytes
from .errors import ResourceError
from .host import HEAP_KEPT
from .machine import dtype_name
from .maths.blocked import TILE
from .maths.linalg import output_error_work
from .maths.operations import KINDS, Kind
from .maths.stats import GRADIENTS, PANEL, Statistic
from .model.block import linear_shape
from .model.skeleton import Skeleton
from .site import Site
from .stream.encoding import token_bytes
from .stream.sweep import LOGIT_BYTES

BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}
"""More tokens a micro-batch than this make nothing faster."""

PHASES = ("calibrate", "forward", "head", "backward", "prune", "correct")
"""What operations are forecast for; refinement belongs to ``prune``, whichever job it is."""

GRAMS_AT_ONCE = 1 << 31
"""Bytes of Grams of one block's experts that are summed in one pass."""
REFINE_SEQUENCES = 8
"""A refinement step's batch."""

ALLOCATOR_SHARE = 20
"""One part in so many of what tensors take on a GPU lies idle between them, where its allocator can extend segments."""
SLACK = 1.02
"""Processes differ a little in what they hold before any work: a job that was started within a limit may go on within it."""

GramPlace = Literal["device", "parked", "host"]
"""Where Grams are: with their solving on the device; waiting on the host while they are solved on the device; or both on
the host. On a CPU the device is the host."""
GRAM_PLACES: tuple[GramPlace, ...] = ("device", "parked", "host")
Sizes = tuple[int, int, GramPlace]
"""Sequences a micro-batch, forward and backward, and where Grams are: what decides the order of sums."""


@dataclass(frozen=True)
class Demand:
    """Bytes that one step holds at once, by what they are."""

    weights: int = 0
    """The block as it is and as it becomes; where a CPU computes in another dtype than is stored, in both."""
    sums: int = 0
    """Grams and their kin."""
    solving: int = 0
    """What sites are solved with: weights in float32, factors, inverses."""
    activations: int = 0
    """Of one micro-batch, with what the next one needs."""
    slack: int = 0
    """What is held to no use: by a GPU's allocator between tensors, by the CPU's heap."""
    host: int = 0
    """Beside a GPU: stored weights, this block's and the next one's; what of the others is on the host."""

    @property
    def device(self) -> int:
        """All of it that the device holds."""
        return self.weights + self.sums + self.solving + self.activations + self.slack


@dataclass(frozen=True)
class Needs:
    """What a job will do, as far as resources go."""

    samples: int
    length: int
    text: bool
    """Activations move at all."""
    survey: frozenset[Statistic] = frozenset()
    shared: bool = False
    """Several recipes make something of the survey's sums."""
    findings: int = 0
    """Numbers that wait on the disk between survey and prune sweep."""
    gram: bool = False
    compensates: bool = False
    """Sums the producers' inputs."""
    aims: bool = False
    """Fits consumers to a target."""
    refines: int = 0
    """Steps of block refinement."""
    corrects: int = 0
    """Low-rank steps after each shot."""
    shots: int = 1
    rank: int | None = None
    """Of the updates that refinement trains; None for whole weights."""
    prunes: bool = True
    """False for evaluation and tuning."""
    scores: bool = False
    """The head gives losses."""
    generates: bool = False
    """The model writes its calibration tokens."""
    removes: float = 0.0
    """Share of the blocks' parameters that is gone in the end."""
    work: Callable[[Site, float], float] = lambda site, keep: 0.0
    """Operations of choosing what stays of a site and re-fitting it."""
    digest_work: Callable[[Site], float] = lambda site: 0.0
    """Operations of a site's findings."""
    workspace: Callable[[Site], int] = lambda site: 0
    """Numbers that solving a site takes beside its W and H."""
    digest_workspace: Callable[[Site], int] = lambda site: 0
    """Numbers that a site's findings take beside its W and statistics."""

    def surveying_with(self, other: Needs) -> Needs:
        """Those of a survey that serves another job as well."""
        return replace(
            self,
            survey=self.survey | other.survey,
            shared=True,
            digest_workspace=lambda site: max(self.digest_workspace(site), other.digest_workspace(site)),
        )

    activations: torch.dtype | None = None
    """What they are stored in; None for what is computed."""

    @property
    def gradients(self) -> bool:
        """Whether a backward sweep is made."""
        return bool(self.survey & GRADIENTS)

    @property
    def dense_stream(self) -> bool:
        """Whether the dense stream moves along in the prune sweep."""
        return self.compensates or self.aims or self.refines > 0


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
    """The result, at the most."""
    bytes_to_read: int
    operations: int
    """Floating-point operations."""
    phases: dict[str, int]
    """The same by phase, one entry for each of `PHASES`."""
    operations_by_kind: dict[str, int]
    """The same by what they are for, one entry for each of `maths.operations.KINDS`."""
    steps: int
    device_limit: int
    disk_limit: int
    problems: tuple[str, ...]
    """Why it does not fit, and what would; empty when it does."""

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
    model = _Shapes(skeleton, needs)
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
    operations = model.operations()
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
        output_bytes=sum(skeleton.checkpoint[name].nbytes for name in skeleton.checkpoint)
        if needs.prunes or needs.refines
        else 0,
        bytes_to_read=model.bytes_to_read(every),
        operations=sum(round(count) for count in operations.values()),
        phases={
            phase: sum(round(count) for (each, _), count in operations.items() if each == phase) for phase in PHASES
        },
        operations_by_kind={
            kind: sum(round(count) for (_, each), count in operations.items() if each == kind) for kind in KINDS
        },
        steps=model.steps(),
        device_limit=device_limit,
        disk_limit=disk_limit,
        problems=tuple(problems),
    )


def copies_ahead(skeleton: Skeleton, needs: Needs, sizes: Sizes, limit: int) -> bool:
    """Whether a GPU has room for the next block's stored weights besides what it holds at most."""
    model = _Shapes(skeleton, needs)
    return skeleton.device.type == "cuda" and model.device_peak(*sizes) + model.stored_block <= limit


def device_peak(skeleton: Skeleton, needs: Needs, batch: int, backward_batch: int, grams: GramPlace = "device") -> int:
    """Bytes that work on the device holds at most with micro-batches of these sizes."""
    return _Shapes(skeleton, needs).device_peak(batch, backward_batch, grams)


def in_memory_peak(skeleton: Skeleton, needs: Needs, batch: int) -> int:
    """Bytes that the device holds while updates of the whole model are trained end to end, nothing streamed."""
    return _Shapes(skeleton, needs).in_memory(batch)


def generation_batch(skeleton: Skeleton, needs: Needs, batch: int, backward_batch: int) -> int:
    """Sequences a micro-batch while calibration tokens are written: as many as other steps leave room for."""
    model = _Shapes(skeleton, needs)
    room = model.device_peak(batch, backward_batch, "device") - model.decoding(0)
    return max(1, min(needs.samples, room // (model.decoding(1) - model.decoding(0))))


Work = defaultdict[tuple[str, Kind], float]
"""Operations by phase and kind."""


@dataclass(frozen=True)
class _Passes:
    """Operations of a forward pass through one site."""

    producers: float
    mixing: float
    """Attention's two products."""
    consumer: float

    @property
    def whole(self) -> float:
        return self.producers + self.mixing + self.consumer


class _Together:
    """The sites of one sublayer: one, or a mixture's experts."""

    def __init__(self, sites: list[Site]) -> None:
        self.sites = sites
        self.widest = max(sites, key=lambda site: site.columns)
        self.routed = self.widest.expert is not None
        self.reached = sum(site.share for site in sites)
        """Of the sites, how many a token reaches."""
        self.parameters = sum(site.units * site.unit_parameters for site in sites)


def _left(site: Site, left: float) -> Site:
    return site.keeping(max(1, round(left * site.units)))


class _Shapes:
    """Bytes and operations of one model under one job."""

    def __init__(self, skeleton: Skeleton, needs: Needs) -> None:
        self.skeleton, self.needs = skeleton, needs
        checkpoint = skeleton.checkpoint
        self.item = skeleton.dtype.itemsize
        self.sum_item = 8 if skeleton.dtype == torch.float64 else 4
        stored = next((entry.dtype for entry in checkpoint.values() if entry.numel), skeleton.dtype)
        self.on_cpu = skeleton.device.type == "cpu"
        # On a CPU a block computes with its stored weights, or with a copy beside them.
        self.weight_item = self.item + (stored.itemsize if self.on_cpu and stored != skeleton.dtype else 0)
        self.d = skeleton.width
        self.row_bytes = needs.length * self.d * self.item
        self.stored_row = needs.length * token_bytes(self.d, needs.activations or skeleton.dtype)
        self.blocks = [skeleton.sites(index) for index in range(len(skeleton))]
        self.sublayers = [
            [_Together(list(each)) for _, each in groupby(sites, lambda site: site.family)] for sites in self.blocks
        ]
        counts = [[checkpoint[n] for n in skeleton.block_names(i).values()] for i in range(len(skeleton))]
        self.stored_block = max(sum(entry.nbytes for entry in block) for block in counts)
        self.block = max(sum(entry.numel for entry in block) for block in counts) * self.weight_item
        self.stored_all = sum(entry.nbytes for block in counts for entry in block)
        self.embed = sum(checkpoint[name].numel for name in skeleton.embed_names()) * self.weight_item
        pairs = [
            sum(2 * (site.heads if entry.repeats else site.units) * site.head_width for site, entry in places)
            for places in map(skeleton.places, range(len(skeleton)))
        ]
        self.keys_and_values, self.widest_pair = (needs.length * self.item * n for n in (sum(pairs), max(pairs)))
        self.head = self.embed + sum(checkpoint[name].numel for name in skeleton.head_names()) * self.weight_item

    def _passed_rows(self, batch: int) -> int:
        """Stored micro-batches: two boundaries read and the next two coming, and two written with two waiting for each."""
        return 10 * self.stored_row * batch

    # Memory: what is held at once in each step, by the step's name.

    def device_peak(self, batch: int, backward_batch: int, grams: GramPlace) -> int:
        return max(demand.device for demand in self.demands(batch, backward_batch, grams).values())

    def tightest(self, batch: int, backward_batch: int, grams: GramPlace) -> str:
        steps = self.demands(batch, backward_batch, grams)
        return max(steps, key=lambda name: steps[name].device)

    def demands(self, batch: int, backward_batch: int, grams: GramPlace) -> dict[str, Demand]:
        found: dict[str, Demand] = {}
        for name, demand in self._steps(batch, backward_batch):
            placed = self._placed(demand, grams, batch)
            if name not in found or found[name].device < placed.device:
                found[name] = placed
        return found

    def _placed(self, demand: Demand, grams: GramPlace, batch: int) -> Demand:
        """Where the planner has put sums and solving, and what passes through the host."""
        if self.on_cpu:
            # What passed through the heap in a forward pass stays with it while the solver works.
            kept = min(HEAP_KEPT, self.passing(batch)) if self.needs.text else 0
            buffers = self._passed_rows(batch) if demand.activations else 0
            slack = max(0, kept - demand.activations)
            return replace(demand, activations=demand.activations + buffers, slack=slack)
        moved = demand.sums if grams == "host" or (grams == "parked" and demand.solving) else 0
        solved = demand.solving if grams == "host" else 0
        tiles = self.sum_item * self._widest() * TILE if moved else 0
        passing = 2 * self.stored_block + self._passed_rows(batch)
        placed = replace(
            demand,
            sums=demand.sums - moved,
            solving=demand.solving - solved,
            activations=demand.activations + tiles,
            host=passing + moved + solved,
        )
        return replace(placed, slack=placed.device // ALLOCATOR_SHARE)

    def _steps(self, batch: int, backward_batch: int) -> Iterator[tuple[str, Demand]]:
        needs, length, block = self.needs, self.needs.length, self.block
        yield "one block", Demand(weights=block)
        if needs.text:
            yield "the embedding", Demand(weights=self.embed, activations=3 * batch * self.row_bytes)
            yield "one block's forward pass", Demand(weights=block, activations=self.passing(batch))
        if needs.gradients or needs.scores:
            vocabulary = self.skeleton.vocabulary
            logits = min(LOGIT_BYTES, 4 * vocabulary * batch * length)
            yield (
                "the head",
                Demand(weights=self.head, activations=3 * batch * self.row_bytes + 4 * max(logits, 4 * vocabulary)),
            )
        if needs.generates:
            logits = min(LOGIT_BYTES, 4 * self.skeleton.vocabulary * needs.samples)
            # In the computing dtype, as probabilities and their sums in up to float64, with what softmax makes of them.
            activations = needs.samples * self.d * self.item + 8 * logits
            yield "the head's next tokens", Demand(weights=self.head, activations=activations)
            yield "one block's next tokens", Demand(weights=block, activations=self.decoding(1) - block)
        backward = backward_batch * length * self._backward_tokens()
        if needs.gradients:
            yield "one block's backward pass", Demand(block, self._survey_sums(), activations=backward)
        elif needs.survey:
            yield "one block's survey", Demand(block, self._survey_sums(), activations=self.passing(batch))
        if needs.survey:
            yield from (("a site's findings", Demand(block, *digest)) for digest in self._digests())
        if "divergence" in needs.survey:
            heads = max(site.heads for sites in self.blocks for site in sites)
            # Scores, their softmax in float32 and its copy, and two maps with their mean and entropies.
            maps = batch * length**2 * ((2 * self.item + 4) * heads + 4 * 8)
            yield "one block's attention maps", Demand(block, activations=self.passing(batch) + maps)
        if needs.refines:
            # Weights; gradients and Adam's two moments of what is trained.
            parameters = self.block // self.weight_item
            updates = max(self._update_parameters(index) for index in range(len(self.blocks)))
            trained = 4 * parameters if needs.rank is None else parameters + 4 * updates
            activations = backward * self.sum_item // self.item
            yield "refining one block", Demand(block, solving=self.sum_item * trained, activations=activations)
        if needs.corrects:
            # The weights twice, as stored and as corrected, and their gradients.
            solving = 3 * self.sum_item * (self.block // self.weight_item)
            yield "correcting one block", Demand(block, solving=solving, activations=backward)
        if needs.prunes:
            for sublayer in self._all_sublayers():
                yield from self._prune_steps(sublayer, batch)

    def _digests(self) -> Iterator[tuple[int, int]]:
        """Sums and solving of each site's findings: what is summed at a site goes once its findings are made."""
        for sites in self.blocks:
            left = sum(self._site_sums(site) for site in sites)
            for site in sites:
                numbers = site.columns * site.outputs + self.needs.digest_workspace(site)
                # What a digest may use up is a copy, where others are to come.
                copied = self._site_sums(site) if self.needs.shared else 0
                yield left, copied + self.sum_item * numbers
                left -= self._site_sums(site)

    def _all_sublayers(self) -> Iterator[_Together]:
        return (sublayer for sublayers in self.sublayers for sublayer in sublayers)

    def _prune_steps(self, sublayer: _Together, batch: int) -> Iterator[tuple[str, Demand]]:
        needs, tokens, site = self.needs, batch * self.needs.length, sublayer.widest
        # Compensated producers are there beside what they were; then what the sites become, beside what they are.
        producers = sum(sum(each.linears[:-1]) for each in sublayer.sites) if needs.compensates else 0
        weights = self.block + producers * self.weight_item
        after = self.block + sublayer.parameters * self.weight_item
        n, d, item = site.columns, self.d, self.sum_item
        w, grams = item * n * d, self._grams(sublayer) if needs.gram else 0
        forward = tokens * self._forward_token(sublayer)
        converted = item if item != self.item else 0  # inputs of a sum, in its dtype
        solving = max(item * needs.workspace(site), w + item * n * TILE if needs.gram else 0)
        yield f"re-fitting one {site.kind} site", Demand(weights, grams, w + solving)
        yield f"shrinking one {site.kind} site", Demand(after, grams, 2 * w)
        if needs.gram:
            sums, activations = grams, forward + tokens * converted * n
            if needs.aims and not sublayer.routed:
                sums += w
                activations += forward + tokens * (item + converted) * d
                solving = 2 * w + item * n * n + min(w, item * TILE * n)
                yield f"aiming one {site.kind} site", Demand(weights, grams, solving)
            yield f"the Gram of one {site.kind} site", Demand(weights, sums, activations=activations)
        if needs.compensates:
            inputs = 2 * item * d * d
            streams = forward + tokens * (4 * self.item + 2 * item) * d
            yield "two streams side by side", Demand(weights, inputs, activations=streams)
            rows = max(site.linears[:-1], default=0) // d
            solving = inputs + 3 * item * d * d + 2 * item * rows * d
            yield "input compensation", Demand(weights, solving=solving)

    def _grams(self, sublayer: _Together) -> int:
        """Bytes of the Grams that are summed at once."""
        one = self.sum_item * sublayer.widest.columns**2
        return max(one, min(GRAMS_AT_ONCE, len(sublayer.sites) * one))

    def decoding(self, batch: int) -> int:
        """Bytes while a block gives so many sequences a token: keys and values read, copied for attention, and masked."""
        residual = 2 * self.needs.samples * self.d * self.item
        return self.block + residual + batch * (3 * self.widest_pair + self.passing(1) // self.needs.length)

    def in_memory(self, batch: int) -> int:
        """All weights, what is trained with its gradients and moments, all activations, and logits with their gradient."""
        weights = self.weight_item * self.skeleton.block_parameters() + self.head
        trained = 4 * self.sum_item * sum(self._update_parameters(index) for index in range(len(self.blocks)))
        a_token = sum(self._backward_token(sublayer) for sublayer in self._all_sublayers())
        return weights + trained + batch * self.needs.length * (a_token + 4 * 4 * self.skeleton.vocabulary)

    def passing(self, batch: int) -> int:
        """Bytes of activations while one sublayer runs forward."""
        return batch * self.needs.length * max(self._forward_token(sublayer) for sublayer in self._all_sublayers())

    def _forward_token(self, sublayer: _Together) -> int:
        """Bytes a token while one sublayer runs forward: stream, norm in float32, and what is inside."""
        # What an expert gives is held until the last one has run.
        given = self.item * (sublayer.widest.columns + self.d) if sublayer.routed else 0
        return self._stream_token + self._inner_token(sublayer.widest) + round(sublayer.reached * given)

    def _backward_token(self, sublayer: _Together) -> int:
        """Bytes a token that one sublayer keeps for its backward pass, and its gradients."""
        return 2 * (self._stream_token + round(sublayer.reached * self._inner_token(sublayer.widest)))

    @property
    def _stream_token(self) -> int:
        # With two micro-batches as they are stored: the next one that was read, and the last one that is being written.
        return self.item * 4 * self.d + 8 * self.d + 2 * self.stored_row // max(self.needs.length, 1)

    def _inner_token(self, site: Site) -> int:
        """Bytes a token between the norm and the stream."""
        if site.kind == "attention":
            # q, k, v, their rotated copies, k and v repeated for the query heads, the output
            maps = (3 * self.item + 4) * site.heads * self.needs.length if self.skeleton.writes_maps else 0
            return self.item * 8 * site.columns + maps
        if site.expert is None:
            return self.item * 4 * site.columns
        # With the token itself, its weighted copy and what comes out.
        return self.item * (5 * site.columns + 2 * self.d)

    def _backward_tokens(self) -> int:
        """Bytes a token that a whole block keeps for its backward pass, and its gradients."""
        return max(sum(self._backward_token(sublayer) for sublayer in sublayers) for sublayers in self.sublayers)

    def _update_parameters(self, index: int) -> int:
        """Of a block's low-rank updates."""
        names = self.skeleton.linears(index)
        return (self.needs.rank or 0) * sum(sum(linear_shape(self.skeleton.module(index, name))) for name in names)

    def _survey_sums(self) -> int:
        """Bytes of one block's statistics."""
        return max(sum(self._site_sums(site) for site in sites) for sites in self.blocks)

    def _site_sums(self, site: Site) -> int:
        return self.sum_item * sum(n * n for n in self._summed(site))

    def _summed(self, site: Site) -> list[int]:
        """Sizes of the Grams that the survey sums at a site."""
        wanted, found = self.needs.survey, []
        if wanted & {"gram", "factors"}:
            found.append(site.columns)
        if wanted & {"gradient-gram", "factors"}:
            found.append(self.d)
        if "factors" in wanted:
            # The producers' input, and what each of them gives.
            found += [self.d, *(weights // self.d for weights in site.linears[:-1])]
        return found

    def _widest(self) -> int:
        return max(site.columns for sites in self.blocks for site in sites)

    # Disk, reading, operations.

    def boundaries(self, limit: int, memory_host: int) -> tuple[int, int]:
        """(k, bytes on the disk): boundaries of the survey kept at every k-th block, k the least that fits."""
        needs, depth = self.needs, len(self.skeleton)
        if not needs.text:
            return 1, 0
        one = needs.samples * self.stored_row
        streams = 2 if needs.dense_stream else 1
        # A stream has a block's input and its output until the journal has it and, while pruning, what is between its
        # sublayers; of that no journal line speaks, and none of an evaluation's.
        kept = (3 if needs.prunes else 2) * streams
        passing = streams if needs.prunes else kept * needs.scores
        prune = (kept - min(passing, memory_host // one)) * one
        findings = self.sum_item * needs.findings
        prune += findings
        if needs.corrects:
            prune += (depth + 3) * min(REFINE_SEQUENCES, needs.samples) * self.row_bytes
        if not needs.gradients:
            return 1, prune
        every, disk = 1, 0
        for every in range(1, depth + 1):
            kept = (depth - 1) // every + 1
            disk = max(prune, (kept + (every if every > 1 else 1) + 2) * one + findings)
            if disk <= limit:
                break
        else:
            every = min(range(1, depth + 1), key=lambda k: (depth - 1) // k + k)
            disk = max(prune, ((depth - 1) // every + 1 + every + 2) * one + findings)
        return every, disk

    def bytes_to_read(self, every: int) -> int:
        checkpoint, needs = self.skeleton.checkpoint, self.needs
        outside = sum(checkpoint[name].nbytes for name in {*self.skeleton.embed_names(), *self.skeleton.head_names()})
        if not needs.prunes:
            return self.stored_all + outside
        embed = sum(checkpoint[name].nbytes for name in self.skeleton.embed_names())
        head = sum(checkpoint[name].nbytes for name in self.skeleton.head_names()) + (
            embed if self.skeleton.tied else 0
        )
        # All of it to check and to prune; with gradients forward and backward too, and to recompute boundaries.
        survey = 2 + (every > 1) if needs.gradients else 1 if needs.survey else 0
        survey += 2 * needs.corrects + bool(needs.corrects)
        shot = (1 + survey) * self.stored_all + outside + needs.text * embed + needs.gradients * head
        writing = needs.generates * (needs.length - 1) * (self.stored_all + embed + head)
        return self.stored_all + outside + needs.shots * shot + writing

    def operations(self) -> Work:
        """By phase and kind, over all shots; attention counts in full and a router not at all."""
        needs = self.needs
        total: Work = defaultdict(float)
        fraction = min(REFINE_SEQUENCES, needs.samples) / max(needs.samples, 1)
        head = 2 * self.d * self.skeleton.vocabulary * needs.samples * (needs.length - 1) * needs.text
        for shot in range(1, needs.shots + 1):
            before, after = (1 - needs.removes * done / needs.shots for done in (shot - 1, shot))
            shapes: Counter[tuple[Site, bool, bool, bool]] = Counter()
            for index, sublayers in enumerate(self.sublayers):
                for position, sublayer in enumerate(sublayers):
                    last = index == len(self.sublayers) - 1 and position == len(sublayers) - 1
                    parted = index > 0 or position > 0
                    for number, site in enumerate(sublayer.sites):
                        plain = replace(site, block=0, expert=None if site.expert is None else 0)
                        shapes[plain, parted, number == 0, not last or needs.refines > 0] += 1
            for (site, parted, leads, goes_on), count in shapes.items():
                work = self._survey_work(site, before)
                if needs.prunes:
                    work |= self._prune_work(site, before, after, parted, leads, goes_on)
                # Forward, and gradients of inputs and of weights; or forward twice and gradients of inputs.
                a_step = 3 * fraction * self._passes(site, after).whole
                work["prune", "training"] += needs.refines * (shot == needs.shots) * a_step
                work["correct", "training"] += needs.corrects * a_step
                for place, operations in work.items():
                    total[place] += count * operations
            total["head", "sweeps"] += head * (2 if needs.gradients else int(needs.scores))
            total["correct", "training"] += 2 * fraction * needs.corrects * head
        passes = sum(self._passes(site, 1.0).whole for sites in self.blocks for site in sites)
        total["calibrate", "writing"] = needs.generates * (passes + head)
        return total

    def _passes(self, site: Site, left: float) -> _Passes:
        """A forward pass of all tokens through what is left of a site."""
        tokens = left * self.needs.samples * self.needs.length * self.needs.text
        linears = [2 * weights * site.share * tokens for weights in site.linears]
        mixing = 4 * self.needs.length * site.columns * tokens if site.kind == "attention" else 0
        return _Passes(sum(linears[:-1]), mixing, linears[-1])

    def _survey_work(self, site: Site, left: float) -> Work:
        """What the survey takes at what is left of a site."""
        needs, passes = self.needs, self._passes(site, left)
        found: Work = defaultdict(float)
        survey = "backward" if needs.gradients else "forward"
        if needs.survey or not needs.prunes:
            found["forward", "sweeps"] += passes.whole
        if needs.gradients:
            # Forward again, then gradients of inputs, not of weights; attention's takes five products to forward's two.
            found["backward", "sweeps"] += 2 * passes.whole + 1.5 * passes.mixing
        if needs.prunes:
            kept, tokens = _left(site, left), needs.samples * needs.length
            found[survey, "sums"] += 2 * tokens * site.share * sum(self._half(n) for n in self._summed(kept))
            if "divergence" in needs.survey and site.kind == "attention":
                found[survey, "sums"] += passes.producers + passes.mixing
            found[survey, "solving"] += needs.digest_work(kept)
        return found

    def _prune_work(self, site: Site, before: float, after: float, parted: bool, leads: bool, goes_on: bool) -> Work:
        """What the prune sweep takes at a site.

        Args:
            before, after: what is left of it.
            parted: whether the streams differ before it.
            leads: whether it is the first of its sublayer.
            goes_on: whether anything is measured behind it.
        """
        needs, passes, d = self.needs, self._passes(site, before), self.d
        n, tokens, kept = before * site.columns, needs.samples * needs.length, _left(site, before)
        aims = needs.aims and parted and site.expert is None
        sweeps, sums, solving = 0.0, 0.0, needs.work(kept, kept.units * after / before)
        if needs.gram:
            sweeps += passes.producers + passes.mixing
            sums += 2 * tokens * site.share * self._half(n)
            solving += output_error_work(d, n, after * site.columns)
        if needs.dense_stream and (goes_on or aims):
            sweeps += passes.whole
        if goes_on and (needs.gram or needs.dense_stream):
            # With refinement a block moves on as a whole, once it is refined.
            sweeps += self._passes(site, after).whole
        if aims:
            sums += 2 * tokens * n * d
            solving += n**3 / 3 + 4 * d * n**2
        if needs.compensates and parted:
            if leads:
                sums += 2 * tokens * (self._half(d) + d * d)
                solving += d**3 * (1 / 3 + 2)
            solving += 2 * d * before * sum(site.linears[:-1])
        return defaultdict(float, {("prune", "sweeps"): sweeps, ("prune", "sums"): sums, ("prune", "solving"): solving})

    def _half(self, n: float) -> float:
        """Of n² products, those that `Gram` computes."""
        return n * (n + min(n, PANEL.get(self.skeleton.device.type, PANEL["cuda"]))) / 2

    def steps(self) -> int:
        depth = len(self.skeleton)
        survey = 2 * depth + 1 if self.needs.gradients else depth if self.needs.survey else 0
        return self.needs.shots * (depth + survey + 3) + 1 + self.needs.generates * self.needs.length
