"""Forecast the memory and disk of each step of a job.

Each figure sums the parts that the code holds at that step, in bytes. Activations are counted per token, from the
widths of the sublayer; those of mixers of unknown form are measured in a run on the meta device. `benchmarks/forecast.py`
checks that forecasts are within 10 % of the measured peaks for models of known form.

Scarce memory makes a job slower, but does not stop it. First, micro-batches shrink. Then, on a GPU, a site's Gram moves
to host memory while the site is solved. Finally, Grams are summed and sites are solved on the host, and the device only
runs the model (`GramPlace`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ...maths.refit import SKETCH
from ...maths.sums import TOGETHER
from ...maths.triangular import PANEL, TILE, inverse_workspace
from ...model.block import linear_shape
from ...model.site import Site
from ...stream.store import file_bytes
from ...stream.sweep import LOGIT_BYTES
from .workload import Shapes, Sublayer, pinned_bytes

GRAMS_AT_ONCE = 1 << 31
"""Largest number of bytes of Grams of one block's experts summed in one pass, if more than one Gram."""
IDLE_SHARE = 16
"""Fragmentation: allocators and library buffers hold an extra 1/16 of the bytes of all tensors."""
RESERVE_SHARE, RESERVE = 16, 128 << 20
"""Part of a GPU's limit that is not planned with: holes that no block fits into; workspaces of cuBLAS (2 × 32 MiB) and the
ends of three streams' segments (22 MiB each)."""
SLACK = 1.02
"""Factor on the memory limit of a resumed job: processes differ slightly in what they hold before any work."""

GramPlace = Literal["device", "parked", "host"]
"""Where Grams are summed and sites solved. ``device``: both on the device. ``parked``: Grams move to the host while
their site is solved on the device. ``host``: both on the host. On a CPU, the device is the host."""
GRAM_PLACES: tuple[GramPlace, ...] = ("device", "parked", "host")
Sizes = tuple[int, int, GramPlace]
"""Sequences per micro-batch, forward and backward, and the place of Grams. They determine the order of summation."""


def in_turn(columns: Sequence[int], item: int) -> Iterator[range]:
    """Yield a sublayer's sites in runs whose Grams are summed together: those of all experts may not fit the memory.

    Args:
        columns: n of each site, whose Gram is (n, n).
        item: bytes per element of a Gram.
    """
    start, held = 0, 0
    for number, n in enumerate(columns):
        if held and held + item * n**2 > GRAMS_AT_ONCE:
            yield range(start, number)
            start, held = number, 0
        held += item * n**2
    yield range(start, len(columns))


@dataclass(frozen=True)
class Demand:
    """Bytes that one step holds at the same time, by purpose."""

    weights: int = 0  # block before and after pruning; on a CPU, in the stored and the computing dtype if they differ
    sums: int = 0  # Grams and other running sums
    solving: int = 0  # what solves a site: weights in the sums' dtype, factors, inverses
    activations: int = 0  # activations of one micro-batch, and data that the next one needs
    slack: int = 0  # lost to fragmentation
    host: int = 0  # with a GPU, in host memory: stored weights of this block and the next, what is trained, what left the device

    @property
    def device(self) -> int:
        """Bytes that the device holds in total."""
        return self.weights + self.sums + self.solving + self.activations + self.slack


class Memory(Shapes):
    """Bytes that a job holds on the device, on the host and on disk.

    `batch` and `backward_batch` are sequences per micro-batch, forward and backward.
    """

    def device_peak(self, batch: int, backward_batch: int, grams: GramPlace = "device") -> int:
        """Return the peak bytes on the device over all steps."""
        return max(demand.device for demand in self.demands(batch, backward_batch, grams).values())

    def host_peak(self, batch: int, backward_batch: int, grams: GramPlace) -> int:
        """Return the peak bytes that a job on a GPU holds in host memory, without activations kept there."""
        return max(demand.host for demand in self.demands(batch, backward_batch, grams).values())

    def plannable(self, limit: int) -> int:
        """Return the bytes of the device's limit that a plan may fill: on a GPU, what `RESERVE` leaves."""
        return limit if self.on_cpu else max(0, limit - RESERVE) * (RESERVE_SHARE - 1) // RESERVE_SHARE

    def limit_for(self, peak: int) -> int:
        """Return the least limit of which `peak` bytes are `plannable`."""
        return peak if self.on_cpu else -(-peak * RESERVE_SHARE // (RESERVE_SHARE - 1)) + RESERVE

    def copies_ahead(self, sizes: Sizes, limit: int) -> bool:
        """Return whether a GPU that may use `limit` bytes has room for the next block's stored weights as well."""
        needed = self.device_peak(*sizes) + self.stored_block
        return self.skeleton.device.type == "cuda" and needed <= self.plannable(limit)

    def demands(self, batch: int, backward_batch: int, grams: GramPlace) -> dict[str, Demand]:
        """Return the largest demand of each step, by the step's name."""
        found: dict[str, Demand] = {}
        for name, demand in self._steps(batch, backward_batch):
            placed = self._placed(demand, grams, batch, backward_batch)
            if name not in found or found[name].device < placed.device:
                found[name] = placed
        return found

    def _placed(self, demand: Demand, grams: GramPlace, batch: int, backward_batch: int) -> Demand:
        """Assign the bytes of sums and solving to device or host; add buffers in transit and fragmentation."""
        # Ten stored micro-batches are in transit: two boundaries are read while the next micro-batch of both is
        # fetched, and two are written with two micro-batches queued for each.
        if self.on_cpu:
            in_transit = 10 * self.stored_row * batch
            placed = replace(demand, activations=demand.activations + (in_transit if demand.activations else 0))
        else:
            moved = demand.sums if grams == "host" or (grams == "parked" and demand.solving) else 0
            solved = demand.solving if grams == "host" else 0
            work = self.workload
            rows = max(batch, backward_batch) if work.gradients or work.refines or work.corrects else batch
            placed = replace(
                demand,
                sums=demand.sums - moved,
                solving=demand.solving - solved,
                activations=demand.activations + (self.sum_item * self.most_columns * TILE if moved else 0),
                host=demand.host + 2 * self.pinned_block + 10 * pinned_bytes(self.stored_row * rows) + moved + solved,
            )
        return replace(placed, slack=placed.device // IDLE_SHARE)

    def _steps(self, batch: int, backward_batch: int) -> Iterator[tuple[str, Demand]]:
        work, length, block = self.workload, self.workload.length, self.block
        yield "one block", Demand(weights=block + self.experts)
        if work.text:
            yield "the embedding", Demand(weights=self.embed, activations=3 * batch * self.row_bytes)
            yield "one block's forward pass", Demand(weights=block, activations=self.passing(batch))
        if work.gradients or work.scores:
            vocabulary = self.skeleton.vocabulary
            logits = min(LOGIT_BYTES, 4 * vocabulary * batch * length)
            yield (
                "the head",
                Demand(weights=self.head, activations=3 * batch * self.row_bytes + 4 * max(logits, 4 * vocabulary)),
            )
        if work.generates:
            logits = min(LOGIT_BYTES, 4 * self.skeleton.vocabulary * work.samples)
            # Logits in the computing dtype; probabilities and their cumulative sums in up to float64; softmax's copies.
            activations = work.samples * self.d * self.item + 8 * logits
            yield "the head's next tokens", Demand(weights=self.head, activations=activations)
            yield "one block's next tokens", Demand(weights=block, activations=self.decoding(1) - block)
        per_token = max(sum(map(self._backward_token, sublayers)) for sublayers in self.sublayers)
        backward = backward_batch * length * per_token
        sampled = max(sum(map(self._sample_bytes, sublayers)) for sublayers in self.sublayers)
        sums = max(map(self._survey_sums, self.blocks))
        if work.gradients:
            yield "one block's backward pass", Demand(block, sums, activations=backward + sampled)
        elif work.survey:
            yield "one block's survey", Demand(block, sums, activations=self.passing(batch) + sampled)
        if work.survey:
            yield from (("a site's findings", Demand(block, *digest)) for digest in self._digests())
        if sampled:
            # With the outputs of all tokens, as they are put together; changes and gradients of those that run, also in float64.
            tokens, widest = max(
                (self.sampled_tokens(each), self._forward_token(each)) for each in self.all_sublayers()
            )
            running = min(TOGETHER, tokens) * (widest + self.d * (3 * self.item + 3 * 8))
            outputs = 2 * tokens * self.d * self.item
            yield "what whole experts cost", Demand(block, sums, activations=sampled + outputs + running)
        if "divergence" in work.survey:
            heads = max(site.heads for sites in self.blocks for site in sites)
            # Scores, their softmax in float32 and a copy of it, and two maps with their mean and entropies.
            maps = batch * length**2 * ((2 * self.item + 4) * heads + 4 * 8)
            yield "one block's attention maps", Demand(block, activations=self.passing(batch) + maps)
        if work.refines:
            # All weights, and for the trained parameters also gradients and Adam's two moments: on the device, wherever Grams are.
            parameters = self.block // self.weight_item
            updates = max(self._update_parameters(index, work.rank or 0) for index in range(len(self.blocks)))
            trained = 4 * parameters if work.rank is None else parameters + 4 * updates
            rows = min(backward_batch, work.refine_sequences)
            activations = rows * length * per_token * self.sum_item // self.item
            yield "refining one block", Demand(block + self.sum_item * trained, activations=activations)
            if work.refines_last:
                # Before a step's only micro-batch goes backward, there are no gradients of weights.
                trained -= (parameters if work.rank is None else updates) * (work.refine_sequences <= rows)
                activations += self._divergence(rows)
                weights = block + self.head + self.sum_item * trained
                yield "refining the last block", Demand(weights, activations=activations)
        if work.corrects:
            # The weights as stored, the weights with their update, and the gradients. If all weights are trained: these and their
            # gradients, with a micro-batch's, and the copies of one as it is normalised.
            parameters, host = self.block // self.weight_item, 0
            solving = 3 * self.sum_item * parameters
            if work.correction_rank is None:
                solving = (2 * self.sum_item + self.item) * parameters + 3 * self.sum_item * self.largest
                host = 0 if self.on_cpu else 2 * self.sum_item * parameters  # as read from disk
            yield "correcting one block", Demand(block, solving=solving, activations=backward, host=host)
            if work.imitates:
                rows = min(backward_batch, work.correction_sequences)
                yield "the head's divergence", Demand(self.head, activations=self._divergence(rows))
        if work.prunes:
            for sublayer in self.all_sublayers():
                yield from self._prune_steps(sublayer, batch)

    def _divergence(self, rows: int) -> int:
        """Return the bytes of `sweep.divergence` for `rows` sequences."""
        length, vocabulary = self.workload.length, self.skeleton.vocabulary
        # Both models' logits and probabilities, and their copies in the computing dtype.
        logits = 5 * max(min(LOGIT_BYTES, 4 * vocabulary * rows * length), 4 * vocabulary)
        return (6 * rows * self.row_bytes // self.item + logits // 4) * self.sum_item

    def _digests(self) -> Iterator[tuple[int, int]]:
        """Yield bytes of sums and of solving for each site's findings. A site's sums are freed once it is digested."""
        for sites in self.blocks:
            left = self._survey_sums(sites)
            for site in sites:
                numbers = site.columns * site.outputs + self.workload.digest_workspace(site)
                yield left, self.sum_item * numbers
                left -= self._survey_sums([site])

    def _prune_steps(self, sublayer: Sublayer, batch: int) -> Iterator[tuple[str, Demand]]:
        """Yield the steps of the prune sweep at one sublayer, with the demand of each."""
        work, tokens, site = self.workload, batch * self.workload.length, sublayer.widest
        forward = tokens * self._forward_token(sublayer)
        if site is None:
            if work.gram or work.dense_stream:
                streams = forward + tokens * 4 * self.item * self.stream
                yield "two streams side by side", Demand(self.block, activations=streams)
            return
        # `weights` adds the compensated producers to the block. `after` adds the pruned sites to the block.
        producers = sum(sum(each.linears[:-1]) for each in sublayer.sites) if work.compensates else 0
        block = self.block + (self.stack if sublayer.entry.experts else 0)
        weights = block + producers * self.weight_item
        after = block + sublayer.parameters * self.weight_item
        n, d, item = site.columns, self.d, self.sum_item
        w, gram = item * n * d, item * n * n
        every = sum(item * each.columns**2 for each in sublayer.sites)
        grams = max(gram, min(GRAMS_AT_ONCE, every)) if work.gram else 0
        grams += item * d * d * work.wants_inputs
        converted = item if item != self.item else 0  # inputs of a sum, converted to its dtype
        error = item * n * (2 * min(d, SKETCH) + PANEL) if work.gram else 0
        solving = max(item * work.workspace(site), error)
        yield f"re-fitting one {site.kind} site", Demand(weights, grams, w + solving)
        yield f"shrinking one {site.kind} site", Demand(after, grams, 2 * w)
        if work.gram:
            sums, activations = grams, forward + tokens * converted * n
            if work.has_target and sublayer.entry.takes_target:
                sums += w
                # The pruned stream's input of the consumer is held while the dense stream's is computed.
                activations += tokens * (self._stream_token + self._inner_token(site) + (item + converted) * d)
                solving = 2 * w + item * (n * n + inverse_workspace(n))
                yield f"aiming one {site.kind} site", Demand(weights, grams, solving)
            yield f"the Gram of one {site.kind} site", Demand(weights, sums, activations=activations)
        if work.wants_inputs:
            stream = forward + tokens * (2 * self.item * self.stream + item * d)
            yield "the Gram of a sublayer's inputs", Demand(weights, item * d * d, activations=stream)
        if work.compensates:
            inputs = 2 * item * d * d
            streams = forward + tokens * (4 * self.item * self.stream + 2 * item * d)
            yield "two streams side by side", Demand(weights, inputs, activations=streams)
            rows = max(site.linears[:-1], default=0) // d
            solving = inputs + 3 * item * d * d + 2 * item * rows * d
            yield "input compensation", Demand(weights, solving=solving)

    def decoding(self, batch: int) -> int:
        """Return bytes while a block processes one token for `batch` sequences.

        Keys and values count three times: as read, copied for attention, and masked.
        """
        residual = 2 * self.workload.samples * self.d * self.item
        return self.block + residual + batch * (3 * self.widest_pair + self.passing(1) // self.workload.length)

    def in_memory(self, batch: int) -> int:
        """Return bytes on the device while low-rank updates are trained end to end, with the whole model in memory.

        They are all weights, the updates with gradients and Adam's moments, all activations, and logits with their
        gradient. `batch` is in sequences per training step.
        """
        weights = self.weight_item * self.skeleton.block_parameters() + self.head
        trained = 4 * self.sum_item * self._updates(self.workload.rank or 0)
        per_token = sum(map(self._backward_token, self.all_sublayers()))
        return weights + trained + batch * self.workload.length * (per_token + 4 * 4 * self.skeleton.vocabulary)

    def answering_in_memory(self, batch: int, passing: int) -> int:
        """Return bytes on the device while `batch` sequences are continued with the whole model in memory.

        They are all weights, a tied head twice, keys and values with copies of the largest block's, logits, and `passing`.
        """
        weights = self.item * self.skeleton.block_parameters() + (self.head + self.embed * self.skeleton.outside.tied)
        logits = 8 * min(LOGIT_BYTES, 4 * self.skeleton.vocabulary * batch)
        return weights + self.experts + batch * (self.keys_and_values + 3 * self.widest_pair) + logits + passing

    def passing(self, batch: int) -> int:
        """Return bytes of activations during the forward pass of the largest sublayer."""
        return batch * self.workload.length * max(map(self._forward_token, self.all_sublayers()))

    def _forward_token(self, sublayer: Sublayer) -> int:
        """Return bytes per token during a sublayer's forward pass: stream, norm in float32, and inner activations."""
        if sublayer.measured is not None:
            return self._stream_token + -(-sublayer.measured.peak // max(self.workload.length, 1))
        return self._stream_token + self._inner(sublayer)

    def _backward_token(self, sublayer: Sublayer) -> int:
        """Return bytes per token that one sublayer keeps for its backward pass, and of its gradients."""
        if (measured := sublayer.measured) is not None:
            # Gradients live as long as the results that they belong to.
            inner = -(-(measured.total + measured.peak) // max(self.workload.length, 1))
            return 2 * self._stream_token + inner
        return 2 * (self._stream_token + self._inner(sublayer))

    def _inner(self, sublayer: Sublayer) -> int:
        """Return bytes per token of the inner activations of all sites; experts of one width run together."""
        found = sum(site.share * self._inner_token(site) for site in sublayer.sites)
        experts = sublayer.entry.experts
        if experts is not None:
            routed = sum(site.share * site.columns for site in sublayer.sites if site.expert is not None)
            # The steps of a gate of their own, and what each expert's producers give before it is put together.
            own = self.skeleton.module(sublayer.sites[0].block, f"{experts}.0").gate is not None
            found += self.item * routed * (4 * own + 2 * ("factors" in self.workload.survey))
        return round(found)

    @property
    def _stream_token(self) -> int:
        """Bytes per token of the residual stream, its norm and stored micro-batches."""
        # The last term is two stored micro-batches: the next one, already read, and the previous one, being written.
        return self.item * 4 * self.stream + 8 * self.d + 2 * self.stored_row // max(self.workload.length, 1)

    def _inner_token(self, site: Site) -> int:
        if site.kind == "attention":
            # q, k, v, their rotated copies, k and v repeated for the query heads, the output.
            maps = (3 * self.item + 4) * site.heads * self.workload.length if self.skeleton.outside.writes_maps else 0
            return self.item * 8 * site.columns + maps
        if site.expert is None:
            return self.item * 4 * site.columns
        # Also the token itself (d), its weighted copy (n) and the output (d).
        return self.item * (5 * site.columns + 2 * self.d)

    def _update_parameters(self, index: int, rank: int) -> int:
        names = self.skeleton.linears(index)
        return rank * sum(sum(linear_shape(self.skeleton.module(index, name))) for name in names)

    def _updates(self, rank: int) -> int:
        return sum(self._update_parameters(index, rank) for index in range(len(self.blocks)))

    def _sample_bytes(self, sublayer: Sublayer) -> int:
        """Return bytes of the sampled tokens of a mixture, with their gradients."""
        return self.sampled_tokens(sublayer) * self.item * (self.stream + self.d * self.workload.gradients)

    def _survey_sums(self, sites: list[Site]) -> int:
        return self.sum_item * sum(n * n for site in sites for n in self.summed(site))

    # Disk.

    def boundaries(self, limit: int, memory_host: int) -> tuple[int, int]:
        """Return (k, bytes on disk): the survey keeps the boundary of every k-th block; k is the least that fits `limit`.

        Args:
            limit: bytes of disk that activations may use.
            memory_host: bytes of host memory that activations may be held in.
        """
        work, depth = self.workload, len(self.skeleton)
        if not work.text:
            return 1, 0
        one = file_bytes(work.samples, self.stored_row)
        streams = work.streams
        # Each stream stores a block's input and output until the journal records the block and, while pruning, the
        # boundary between its sublayers. No journal line refers to that boundary, or to any boundary of an evaluation.
        kept = (3 if work.prunes else 2) * streams
        passing = streams if work.prunes else kept * work.scores
        prune = (kept - min(passing, memory_host // (work.samples * self.stored_row))) * one
        if not work.gradients:
            return 1, prune
        # The kept boundaries, those recomputed between two of them, and the gradient before and after a block.
        disk = {k: max(prune, ((depth - 1) // k + 1 + k + 2) * one) for k in range(1, depth + 1)}
        every = next((k for k in disk if disk[k] <= limit), None) or min(disk, key=lambda k: (depth - 1) // k + k)
        return every, disk[every]

    def beside_out(self) -> int:
        """Return peak bytes on disk beside OUT: the result, and what the job keeps there until it is complete."""
        work, checkpoint = self.workload, self.skeleton.checkpoint
        result = sum(checkpoint[name].nbytes for name in checkpoint)
        found = result + self.sum_item * work.findings
        if work.shots > 1:
            found += result  # of the previous shot
        if work.corrects:
            streams = (
                (len(self.skeleton) + 3) * min(work.correction_sequences, work.correction_samples) * self.row_bytes
            )
            streams += 2 * work.imitates * work.correction_samples * self.row_bytes  # of the dense model's last pass
            # The result once more: the blocks without their correction.
            found += result + streams + self.states(work.correction_rank)
        return found

    def states(self, rank: int | None) -> int:
        """Return bytes of all low-rank updates with Adam's two moments, or of all weights that stay, before and after a step."""
        if rank is None:
            return math.ceil(2 * self.sum_item * (1 - self.workload.removes) * self.skeleton.block_parameters())
        return 2 * 3 * self.sum_item * self._updates(rank)
