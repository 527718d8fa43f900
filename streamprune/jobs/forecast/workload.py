"""The facts that determine a job's resources: what it does, and the sizes of its model from the checkpoint's headers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from math import log, prod

import torch

from ...maths.sums import GRADIENTS, PANEL, Statistic, sample_size
from ...model.architectures import SublayerEntry
from ...model.block import has_grouped_products
from ...model.dry_run import Measured
from ...model.site import Site
from ...model.skeleton import Skeleton
from ...stream.encoding import token_bytes

TRAIN_SEQUENCES = 8
"""Sequences per step of tuning."""


def pinned_bytes(nbytes: int) -> int:
    """Return what torch allocates for `nbytes` bytes of pinned memory: the next power of two."""
    return 1 << (nbytes - 1).bit_length() if nbytes else 0


@dataclass(frozen=True)
class Workload:
    """What a job does, as far as its resources depend on it."""

    samples: int  # number of sequences
    length: int  # tokens per sequence
    text: bool  # whether the job runs text through the model at all
    activations: torch.dtype | None = None  # dtype in which activations are stored; None: as computed
    surveyed: int | None = None  # number of sequences that the survey reads; None for `samples`
    survey: frozenset[Statistic] = frozenset()  # statistics that the survey sums
    findings: int = 0  # elements of the sums' dtype stored on disk between survey and prune sweep
    gram: bool = False  # whether the prune sweep sums the Gram of each consumer's input
    compensates: bool = False  # whether producers are compensated, which sums the Grams of their inputs
    wants_inputs: bool = False  # whether the Gram of the producers' pruned inputs is summed in any case
    has_target: bool = False  # whether consumers are fitted to a target
    refines: int = 0  # steps of block refinement per block
    refine_sequences: int = TRAIN_SEQUENCES  # sequences per step of it
    refines_last: bool = True  # whether the last block is among those refined, which takes the head
    corrects: int = 0  # steps of training all blocks together at the end of a shot
    correction_rank: int | None = None  # None trains all weights
    correction_sequences: int = 0  # sequences per step of it
    correction_samples: int = 0  # sequences that it is drawn from
    corrected_shots: int = 0  # shots that end with it
    imitates: bool = False  # whether it follows the dense model's predictions, which takes a forward pass of that
    shots: int = 1
    rank: int | None = None  # rank of the updates that refinement trains; None trains whole weights
    prunes: bool = True  # False for evaluation and tuning
    scores: bool = False  # whether the head computes losses
    generates: bool = False  # whether the model generates its calibration tokens
    removes: float = 0.0  # share of the blocks' parameters removed in the end
    workspace: Callable[[Site], int] = lambda site: 0
    """Peak elements that solving a site holds besides its W and H."""
    digest_workspace: Callable[[Site], int] = lambda site: 0
    """Peak elements that computing a site's findings holds besides its W and statistics."""

    @property
    def gradients(self) -> bool:
        """Whether the survey includes a backward sweep."""
        return bool(self.survey & GRADIENTS)

    @property
    def dense_stream(self) -> bool:
        """Whether the prune sweep also advances the dense stream."""
        return self.compensates or self.has_target or self.refines > 0

    @property
    def streams(self) -> int:
        """Number of streams that the prune sweep moves."""
        return 1 + self.dense_stream


class Sublayer:
    """One sublayer: its entry and its sites, which are none, one, or the experts of a mixture.

    Attributes:
        measured: what its mixer does on one sequence, if its form is not known: it has no site, or a recurrent one.
    """

    def __init__(self, entry: SublayerEntry, sites: list[Site], measured: Measured | None) -> None:
        self.entry, self.sites, self.measured = entry, sites, measured
        self.widest = max(sites, key=lambda site: site.columns, default=None)
        self.parameters = sum(site.units * site.unit_parameters for site in sites)


class Shapes:
    """Sizes of one model under one job.

    Attributes:
        item, sum_item: bytes per element of the computing dtype and of sums.
        weight_item: bytes per weight in memory; on a CPU that computes in another dtype than is stored, of both copies.
        d, stream: width of hidden states, and of the stream with side inputs, in elements.
        most_columns: most columns of any site's consumer.
        row_bytes, stored_row: bytes of one sequence's activations, as computed and as stored.
        block, stored_block: bytes of the largest block's weights in memory, and as they are read.
        pinned_block: bytes of host memory that they are read into for a GPU.
        experts, stack: bytes of the most experts of a block, and of one linear of all of them, if they are put together in one tensor
            each (see `Layer.linears`); otherwise 0.
        stored_all: bytes of all blocks' weights as stored.
        embed, head: bytes of the embeddings, and of embeddings and head, in memory.
        keys_and_values, widest_pair: bytes of one sequence's keys and values, of all blocks and of the largest block.
    """

    def __init__(self, skeleton: Skeleton, workload: Workload) -> None:
        self.skeleton, self.workload = skeleton, workload
        checkpoint = skeleton.checkpoint
        self.item = skeleton.dtype.itemsize
        self.sum_item = 8 if skeleton.dtype == torch.float64 else 4
        stored = next((entry.dtype for entry in checkpoint.values() if entry.numel), skeleton.dtype)
        self.on_cpu = skeleton.device.type == "cpu"
        # On a CPU, a block computes with its stored weights or, for another dtype, with a copy in addition to them.
        self.weight_item = self.item + (stored.itemsize if self.on_cpu and stored != skeleton.dtype else 0)
        self.d, self.stream = skeleton.width, skeleton.stream_width
        self.row_bytes = workload.length * self.stream * self.item
        self.stored_row = workload.length * token_bytes(self.stream, workload.activations or skeleton.dtype)
        self.blocks = [skeleton.sites(index) for index in range(len(skeleton))]
        self.most_columns = max(site.columns for sites in self.blocks for site in sites)
        self.sublayers = [list(self._sublayers(index)) for index in range(len(skeleton))]
        counts = [[checkpoint[n] for n in skeleton.block_names(i).values()] for i in range(len(skeleton))]
        self.stored_block = max(sum(entry.nbytes for entry in block) for block in counts)
        self.pinned_block = max(sum(pinned_bytes(entry.nbytes) for entry in block) for block in counts)
        self.block = max(sum(entry.numel for entry in block) for block in counts) * self.weight_item
        self.largest = max(entry.numel for block in counts for entry in block)
        routed = [[site for site in sites if site.expert is not None] for sites in self.blocks]
        grouped = self.weight_item * has_grouped_products(skeleton.device, skeleton.dtype)
        self.experts = grouped * max(sum(site.units * site.unit_parameters for site in sites) for sites in routed)
        self.stack = grouped * max(sum(site.outputs * site.columns for site in sites) for sites in routed)
        self.stored_all = sum(entry.stored_bytes for block in counts for entry in block)
        self.embed = sum(checkpoint[name].numel for name in skeleton.outside.embed_names()) * self.weight_item
        pairs = [
            sum(2 * (site.heads if entry.repeats else site.units) * site.head_width for site, entry in places)
            for places in map(skeleton.places, range(len(skeleton)))
        ]
        self.keys_and_values, self.widest_pair = (workload.length * self.item * n for n in (sum(pairs), max(pairs)))
        self.head = (
            self.embed + sum(checkpoint[name].numel for name in skeleton.outside.head_names()) * self.weight_item
        )

    def _sublayers(self, index: int) -> Iterator[Sublayer]:
        sites, length = iter(self.blocks[index]), max(self.workload.length, 1)
        for number, entry in enumerate(self.skeleton.entries[index]):
            count = self.skeleton.site_count(index, entry)
            known = count > 0 and entry.kind != "linear"
            yield Sublayer(entry, list(islice(sites, count)), None if known else self._measured(index, number, length))

    def _measured(self, index: int, number: int, length: int) -> Measured:
        """Return what a mixer does on one sequence or, if it does not run on the meta device, a generous bound.

        The bound is eight float32 numbers per input and per output of each of its linears, and two maps of attention.
        Of experts in a fused tensor, only those that a token reaches count, if the config says how many.
        """
        if (measured := self.skeleton.measured(index, length)) is not None:
            return measured[number]
        config = self.skeleton.block_config(index)
        numbers = weights = 0
        for module in self.skeleton.entries[index][number].mixer:
            for parameter in self.skeleton.module(index, module).parameters():
                if parameter.dim() < 2:
                    continue
                *several, rows, columns = parameter.shape
                times = min(prod(several), getattr(config, "num_experts_per_tok", None) or prod(several))
                numbers += times * (rows + columns)
                weights += times * rows * columns
        maps = 2 * 4 * (getattr(config, "num_attention_heads", None) or 1) * length**2
        held = 8 * 4 * length * numbers + maps
        return Measured(2 * length * weights, held, held)

    def all_sublayers(self) -> Iterator[Sublayer]:
        """Iterate over the sublayers of all blocks."""
        return (sublayer for sublayers in self.sublayers for sublayer in sublayers)

    def sampled_tokens(self, sublayer: Sublayer) -> int:
        """Return how many tokens of what a mixture reads the survey keeps, for what its experts cost as a whole."""
        work, entry = self.workload, sublayer.entry
        if "removal" not in work.survey or not entry.routing:
            return 0
        sequences = work.samples if work.surveyed is None else work.surveyed
        return min(sample_size(self._routed(sublayer), entry.chosen), sequences * work.length)

    def _routed(self, sublayer: Sublayer) -> int:
        return sum(site.expert is not None for site in sublayer.sites)

    def rerouted(self, sublayer: Sublayer) -> float:
        """Return how many tokens a mixture runs for what its experts cost as a whole.

        All of the sample twice; those of each expert once; and those of the two that look cheapest each time one has gone.
        Measured with random routers of 8 to 128 experts: 0.9 to 1.2 times as many. More where other tokens change too.
        """
        if not (tokens := self.sampled_tokens(sublayer)):
            return 0.0
        experts, least = self._routed(sublayer), max(sublayer.sites[0].least, 1)
        return tokens * (1 if experts <= least else 2 + sublayer.entry.chosen * (1 + 2 * log(experts / least)))

    def summed(self, site: Site) -> list[int]:
        """Return the numbers of rows of the (square) Grams that the survey sums at a site."""
        wanted, found = self.workload.survey, []
        if wanted & {"gram", "factors"}:
            found.append(site.columns)
        if wanted & {"gradient-gram", "factors"}:
            found.append(self.d)
        if "factors" in wanted:
            # The producers' input, and the output of each producer.
            found += [self.d, *(weights // self.d for weights in site.linears[:-1])]
        if "inputs" in wanted:
            found.append(self.d)
        if "second-moment" in wanted:
            found.append(site.columns if site.heads else self.d)
        return found

    def gram_products(self, n: int) -> float:
        """Return how many of the n² products per token are computed for a Gram of n rows."""
        return n * (n + min(n, PANEL.get(self.skeleton.device.type, PANEL["cuda"]))) / 2
