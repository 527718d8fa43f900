"""Forecast the memory and disk of each step of a job.

Each figure sums the parts that the code holds at that step, in bytes. Activations are counted per token, from the
widths of the sublayer. `benchmarks/forecast.py` checks that forecasts are within 10 % of the measured peaks.

Scarce memory makes a job slower, but does not stop it. First, micro-batches shrink. Then, on a GPU, a site's Gram moves
to host memory while the site is solved. Finally, Grams are summed and sites are solved on the host, and the device only
runs the model (`GramPlace`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from ...maths.refit import SKETCH
from ...maths.triangular import PANEL, TILE, inverse_workspace
from ...model.block import linear_shape
from ...model.site import Site
from ...model.skeleton import Skeleton
from ...stream.store import file_bytes
from ...stream.sweep import LOGIT_BYTES
from .needs import REFINE_SEQUENCES, Needs
from .shapes import Shapes, Together

GRAMS_AT_ONCE = 1 << 31
"""Largest number of bytes of Grams of one block's experts summed in one pass, if more than one Gram."""
IDLE_SHARE = 16
"""Fragmentation: allocators and library buffers hold an extra 1/16 of the bytes of all tensors."""
SLACK = 1.02
"""Factor on the memory limit of a resumed job: processes differ slightly in what they hold before any work."""

GramPlace = Literal["device", "parked", "host"]
"""Where Grams are summed and sites solved. ``device``: both on the device. ``parked``: Grams move to the host while
their site is solved on the device. ``host``: both on the host. On a CPU, the device is the host."""
GRAM_PLACES: tuple[GramPlace, ...] = ("device", "parked", "host")
Sizes = tuple[int, int, GramPlace]
"""Sequences per micro-batch, forward and backward, and the place of Grams. They determine the order of summation."""


@dataclass(frozen=True)
class Demand:
    """Bytes that one step holds at the same time, by purpose."""

    weights: int = 0
    """Bytes of the block before and after pruning; on a CPU that computes in another dtype than is stored, in both."""
    sums: int = 0
    """Bytes of Grams and other running sums."""
    solving: int = 0
    """Bytes of what solves a site: weights in the sums' dtype, factors, inverses."""
    activations: int = 0
    """Bytes of one micro-batch's activations, and of the data that the next one needs."""
    slack: int = 0
    """Bytes lost to fragmentation."""
    host: int = 0
    """With a GPU, bytes in host memory: stored weights of this block and the next, and what moved from the device."""

    @property
    def device(self) -> int:
        """Bytes that the device holds in total."""
        return self.weights + self.sums + self.solving + self.activations + self.slack


def copies_ahead(skeleton: Skeleton, needs: Needs, sizes: Sizes, limit: int) -> bool:
    """Return whether a GPU has room for the next block's stored weights in addition to the peak.

    Args:
        limit: bytes that the device may use.
    """
    model = Memory(skeleton, needs)
    return skeleton.device.type == "cuda" and model.device_peak(*sizes) + model.stored_block <= limit


def device_peak(skeleton: Skeleton, needs: Needs, batch: int, backward_batch: int, grams: GramPlace = "device") -> int:
    """Return the peak bytes on the device.

    Args:
        batch, backward_batch: sequences per micro-batch, forward and backward.
    """
    return Memory(skeleton, needs).device_peak(batch, backward_batch, grams)


def in_memory_peak(skeleton: Skeleton, needs: Needs, batch: int) -> int:
    """Return the bytes on the device while low-rank updates are trained end to end, with the whole model in memory.

    Args:
        batch: sequences per training step.
    """
    return Memory(skeleton, needs).in_memory(batch)


def generation_batch(skeleton: Skeleton, needs: Needs, batch: int, backward_batch: int) -> int:
    """Return the sequences per micro-batch for generating calibration tokens, within the other steps' peak."""
    model = Memory(skeleton, needs)
    room = model.device_peak(batch, backward_batch, "device") - model.decoding(0)
    return max(1, min(needs.samples, room // (model.decoding(1) - model.decoding(0))))


class Memory(Shapes):
    """Bytes that a job holds on the device, on the host and on disk. Batch sizes are in sequences per micro-batch."""

    def _passed_rows(self, batch: int) -> int:
        """Return bytes of micro-batches in transit, as stored: ten of them.

        Two boundaries are read and the next micro-batch of both is being fetched; two are written with two
        micro-batches queued for each.
        """
        return 10 * self.stored_row * batch

    # Memory: the bytes held at the same time in each step, by the step's name.

    def device_peak(self, batch: int, backward_batch: int, grams: GramPlace) -> int:
        """Return the peak bytes on the device over all steps."""
        return max(demand.device for demand in self.demands(batch, backward_batch, grams).values())

    def tightest(self, batch: int, backward_batch: int, grams: GramPlace) -> str:
        """Return the name of the step with the device's peak."""
        steps = self.demands(batch, backward_batch, grams)
        return max(steps, key=lambda name: steps[name].device)

    def demands(self, batch: int, backward_batch: int, grams: GramPlace) -> dict[str, Demand]:
        """Return the largest demand of each step, by the step's name."""
        found: dict[str, Demand] = {}
        for name, demand in self._steps(batch, backward_batch):
            placed = self._placed(demand, grams, batch)
            if name not in found or found[name].device < placed.device:
                found[name] = placed
        return found

    def _placed(self, demand: Demand, grams: GramPlace, batch: int) -> Demand:
        """Assign the bytes of sums and solving to device or host; add buffers in transit and fragmentation."""
        if self.on_cpu:
            buffers = self._passed_rows(batch) if demand.activations else 0
            placed = replace(demand, activations=demand.activations + buffers)
            return replace(placed, slack=placed.device // IDLE_SHARE)
        moved = demand.sums if grams == "host" or (grams == "parked" and demand.solving) else 0
        solved = demand.solving if grams == "host" else 0
        tiles = self.sum_item * self.widest() * TILE if moved else 0
        passing = 2 * self.stored_block + self._passed_rows(batch)
        placed = replace(
            demand,
            sums=demand.sums - moved,
            solving=demand.solving - solved,
            activations=demand.activations + tiles,
            host=passing + moved + solved,
        )
        return replace(placed, slack=placed.device // IDLE_SHARE)

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
            # Logits in the computing dtype; probabilities and their cumulative sums in up to float64; softmax's copies.
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
            # Scores, their softmax in float32 and a copy of it, and two maps with their mean and entropies.
            maps = batch * length**2 * ((2 * self.item + 4) * heads + 4 * 8)
            yield "one block's attention maps", Demand(block, activations=self.passing(batch) + maps)
        if needs.refines:
            # All weights, and for the trained parameters also gradients and Adam's two moments.
            parameters = self.block // self.weight_item
            updates = max(self._update_parameters(index, needs.rank or 0) for index in range(len(self.blocks)))
            trained = 4 * parameters if needs.rank is None else parameters + 4 * updates
            activations = backward * self.sum_item // self.item
            yield "refining one block", Demand(block, solving=self.sum_item * trained, activations=activations)
        if needs.corrects:
            # The weights as stored, the weights with their update, and the gradients.
            solving = 3 * self.sum_item * (self.block // self.weight_item)
            yield "correcting one block", Demand(block, solving=solving, activations=backward)
        if needs.prunes:
            for sublayer in self.all_sublayers():
                yield from self._prune_steps(sublayer, batch)

    def _digests(self) -> Iterator[tuple[int, int]]:
        """Yield bytes of sums and of solving for each site's findings. A site's sums are freed once it is digested."""
        for sites in self.blocks:
            left = sum(self._site_sums(site) for site in sites)
            for site in sites:
                numbers = site.columns * site.outputs + self.needs.digest_workspace(site)
                yield left, self.sum_item * numbers
                left -= self._site_sums(site)

    def _prune_steps(self, sublayer: Together, batch: int) -> Iterator[tuple[str, Demand]]:
        """Yield the steps of the prune sweep at one sublayer, with the demand of each."""
        needs, tokens, site = self.needs, batch * self.needs.length, sublayer.widest
        # `weights` adds the compensated producers to the block. `after` adds the pruned sites to the block.
        producers = sum(sum(each.linears[:-1]) for each in sublayer.sites) if needs.compensates else 0
        weights = self.block + producers * self.weight_item
        after = self.block + sublayer.parameters * self.weight_item
        n, d, item = site.columns, self.d, self.sum_item
        w, grams = item * n * d, self._grams(sublayer) if needs.gram else 0
        forward = tokens * self._forward_token(sublayer)
        converted = item if item != self.item else 0  # inputs of a sum, converted to its dtype
        error = item * n * (2 * min(d, SKETCH) + PANEL) if needs.gram else 0
        solving = max(item * needs.workspace(site), error)
        yield f"re-fitting one {site.kind} site", Demand(weights, grams, w + solving)
        yield f"shrinking one {site.kind} site", Demand(after, grams, 2 * w)
        if needs.gram:
            sums, activations = grams, forward + tokens * converted * n
            if needs.aims and not sublayer.routed:
                sums += w
                activations += forward + tokens * (item + converted) * d
                solving = 2 * w + item * (n * n + inverse_workspace(n))
                yield f"aiming one {site.kind} site", Demand(weights, grams, solving)
            yield f"the Gram of one {site.kind} site", Demand(weights, sums, activations=activations)
        if needs.compensates:
            inputs = 2 * item * d * d
            streams = forward + tokens * (4 * self.item + 2 * item) * d
            yield "two streams side by side", Demand(weights, inputs, activations=streams)
            rows = max(site.linears[:-1], default=0) // d
            solving = inputs + 3 * item * d * d + 2 * item * rows * d
            yield "input compensation", Demand(weights, solving=solving)

    def _grams(self, sublayer: Together) -> int:
        """Return bytes of the Grams of a sublayer that are summed at the same time."""
        one = self.sum_item * sublayer.widest.columns**2
        return max(one, min(GRAMS_AT_ONCE, len(sublayer.sites) * one))

    def decoding(self, batch: int) -> int:
        """Return bytes while a block processes one token for `batch` sequences.

        Keys and values count three times: as read, copied for attention, and masked.
        """
        residual = 2 * self.needs.samples * self.d * self.item
        return self.block + residual + batch * (3 * self.widest_pair + self.passing(1) // self.needs.length)

    def in_memory(self, batch: int) -> int:
        """Return bytes of in-memory training.

        They are all weights, the trained updates with gradients and Adam's moments, all activations, and logits with
        their gradient.
        """
        weights = self.weight_item * self.skeleton.block_parameters() + self.head
        trained = 4 * self.sum_item * self._updates(self.needs.rank or 0)
        a_token = sum(self._backward_token(sublayer) for sublayer in self.all_sublayers())
        return weights + trained + batch * self.needs.length * (a_token + 4 * 4 * self.skeleton.vocabulary)

    def passing(self, batch: int) -> int:
        """Return bytes of activations during the forward pass of the largest sublayer."""
        return batch * self.needs.length * max(self._forward_token(sublayer) for sublayer in self.all_sublayers())

    def _forward_token(self, sublayer: Together) -> int:
        """Return bytes per token during a sublayer's forward pass: stream, norm in float32, and inner activations."""
        # The output of each expert is held until the last expert has run.
        given = self.item * (sublayer.widest.columns + self.d) if sublayer.routed else 0
        return self._stream_token + self._inner_token(sublayer.widest) + round(sublayer.reached * given)

    def _backward_token(self, sublayer: Together) -> int:
        """Return bytes per token that one sublayer keeps for its backward pass, and of its gradients."""
        return 2 * (self._stream_token + round(sublayer.reached * self._inner_token(sublayer.widest)))

    @property
    def _stream_token(self) -> int:
        """Bytes per token of the residual stream, its norm and stored micro-batches."""
        # The last term is two stored micro-batches: the next one, already read, and the previous one, being written.
        return self.item * 4 * self.d + 8 * self.d + 2 * self.stored_row // max(self.needs.length, 1)

    def _inner_token(self, site: Site) -> int:
        """Return bytes per token of the activations between the norm and the residual stream."""
        if site.kind == "attention":
            # q, k, v, their rotated copies, k and v repeated for the query heads, the output.
            maps = (3 * self.item + 4) * site.heads * self.needs.length if self.skeleton.writes_maps else 0
            return self.item * 8 * site.columns + maps
        if site.expert is None:
            return self.item * 4 * site.columns
        # Also the token itself (d), its weighted copy (n) and the output (d).
        return self.item * (5 * site.columns + 2 * self.d)

    def _backward_tokens(self) -> int:
        """Return bytes per token that a whole block keeps for its backward pass, and of its gradients."""
        return max(sum(self._backward_token(sublayer) for sublayer in sublayers) for sublayers in self.sublayers)

    def _update_parameters(self, index: int, rank: int) -> int:
        """Return the number of parameters of a block's low-rank updates."""
        names = self.skeleton.linears(index)
        return rank * sum(sum(linear_shape(self.skeleton.module(index, name))) for name in names)

    def _updates(self, rank: int) -> int:
        """Return the number of parameters of all blocks' low-rank updates."""
        return sum(self._update_parameters(index, rank) for index in range(len(self.blocks)))

    def _survey_sums(self) -> int:
        """Return bytes of the largest block's statistics."""
        return max(sum(self._site_sums(site) for site in sites) for sites in self.blocks)

    def _site_sums(self, site: Site) -> int:
        return self.sum_item * sum(n * n for n in self.summed(site))

    # Disk.

    def boundaries(self, limit: int, memory_host: int) -> tuple[int, int]:
        """Choose how many boundaries the survey keeps.

        Args:
            limit: bytes of disk that activations may use.
            memory_host: bytes of host memory that activations may be held in.

        Returns:
            (k, bytes on disk): the survey keeps the boundary of every k-th block; k is the least that fits `limit`.
        """
        needs, depth = self.needs, len(self.skeleton)
        if not needs.text:
            return 1, 0
        one = file_bytes(needs.samples, self.stored_row)
        streams = 2 if needs.dense_stream else 1
        # Each stream stores a block's input and output until the journal records the block and, while pruning, the
        # boundary between its sublayers. No journal line refers to that boundary, or to any boundary of an evaluation.
        kept = (3 if needs.prunes else 2) * streams
        passing = streams if needs.prunes else kept * needs.scores
        prune = (kept - min(passing, memory_host // (needs.samples * self.stored_row))) * one
        if not needs.gradients:
            return 1, prune
        every, disk = 1, 0
        for every in range(1, depth + 1):
            kept = (depth - 1) // every + 1
            disk = max(prune, (kept + (every if every > 1 else 1) + 2) * one)
            if disk <= limit:
                break
        else:
            every = min(range(1, depth + 1), key=lambda k: (depth - 1) // k + k)
            disk = max(prune, ((depth - 1) // every + 1 + every + 2) * one)
        return every, disk

    def beside_out(self) -> int:
        """Return peak bytes on disk beside OUT: the result, and what the job keeps there until it is complete."""
        needs, checkpoint = self.needs, self.skeleton.checkpoint
        result = sum(checkpoint[name].nbytes for name in checkpoint)
        found = result + self.sum_item * needs.findings
        if needs.shots > 1:
            found += result  # of the previous shot
        if needs.corrects:
            streams = (len(self.skeleton) + 3) * min(REFINE_SEQUENCES, needs.samples) * self.row_bytes
            # The result once more: the blocks without their correction.
            found += result + streams + self.states(needs.correction_rank)
        return found

    def states(self, rank: int) -> int:
        """Return bytes of all low-rank updates with Adam's two moments, before and after a step."""
        return 2 * 3 * self.sum_item * self._updates(rank)
