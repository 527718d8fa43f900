"""The sizes of a model under a job, from its headers alone: what memory and effort are forecast by."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import torch

from ...model.site import Site
from ...model.skeleton import Skeleton
from ...stream.encoding import token_bytes
from .needs import Needs


class Together:
    """The sites of one sublayer: one, or a mixture's experts."""

    def __init__(self, sites: list[Site]) -> None:
        self.sites = sites
        self.widest = max(sites, key=lambda site: site.columns)
        self.routed = self.widest.expert is not None
        self.reached = sum(site.share for site in sites)
        """Of the sites, how many a token reaches."""
        self.parameters = sum(site.units * site.unit_parameters for site in sites)


class Shapes:
    """Sizes of one model under one job, in bytes unless their names say otherwise."""

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
            [Together(list(each)) for _, each in groupby(sites, lambda site: site.family)] for sites in self.blocks
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

    def all_sublayers(self) -> Iterator[Together]:
        return (sublayer for sublayers in self.sublayers for sublayer in sublayers)

    def summed(self, site: Site) -> list[int]:
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

    def widest(self) -> int:
        return max(site.columns for sites in self.blocks for site in sites)
