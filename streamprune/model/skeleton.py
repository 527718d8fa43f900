"""A model without its weights: transformers' own modules on the meta device, filled one part at a time."""

from __future__ import annotations

import copy
import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..maths.flops import counted
from ..maths.order import any_kernel
from ..maths.refit import accumulator
from ..maths.sums import SiteStatistics, Statistic
from ..system.machine import resolve_dtype
from . import dry_run, experts, side_inputs, upstream
from . import modeling_streamprune as modeling
from .architectures import FAMILIES, Removal, SublayerEntry, family_of, is_stock
from .block import Arguments, Block, Layer, Sublayer, linear_shape
from .checkpoint import UNREAD, Checkpoint
from .config import OURS, check_names, check_widths, read_configuration
from .dry_run import Measured, Ran, matrix_elements, moved
from .inference import infer
from .modeling_streamprune import Experts, separate_experts
from .names import CONFIG
from .outside import Outside
from .site import FREE, Layout, Site
from .trial import TOKENS

_KNOWN: OrderedDict[Any, tuple[SublayerEntry, ...]] = OrderedDict()
"""Sublayers that were inferred in this process, by config and modules."""
_RAN: OrderedDict[Any, None] = OrderedDict()
"""Blocks that ran on the meta device in this process, by a digest of config, dtype, number, sublayers and shapes."""


class Skeleton:
    """The model of a checkpoint directory, dense or pruned.

    Args:
        checkpoint: holds the weights.
        device: device of the blocks.
        dtype: computing dtype of the blocks.
        layout: constrains the widths of the sites.
        text_only: write the text model of a multimodal model alone.
        check: reject the faults that `layout_faults` and `extra` find. transformers ignores extra tensors, but a checkpoint
            written from this model would lack them.

    Raises:
        CheckpointError: `read_configuration` or transformers rejects the config, or it does not match the tensors.
        NumericalError: see `arguments`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: torch.device,
        dtype: torch.dtype,
        layout: Layout = FREE,
        text_only: bool = False,
        check: bool = True,
    ) -> None:
        self.checkpoint, self.device, self.dtype, self.layout = checkpoint, device, dtype, layout
        self.copies_ahead = False
        """Whether to copy the next block's weights to the device while the current block runs; decided by `jobs.forecast.memory`."""
        self.proven = False
        """Whether `proof.prove` has passed."""
        self._ran: dict[Any, Ran | None] = {}
        self._places: dict[int, list[tuple[Site, SublayerEntry]]] = {}
        model_type, self.whole_config = read_configuration(checkpoint)
        self.config = self.whole_config.get_text_config()
        """The config of the text model."""
        self.alone = text_only and self.wrapped
        """Whether the text model is written without the rest."""
        # Trials compute nothing that a result holds, also where a job opens another checkpoint.
        with upstream.translated(f"{checkpoint.directory}/{CONFIG}", "build this model"), any_kernel():
            self._build(model_type, check)

    def _build(self, model_type: str, check: bool) -> None:
        """Take the model apart on the meta device and compare it with the shards, before anything takes memory."""
        weights = sum(entry.numel for entry in self.checkpoint.values())
        model = upstream.build(modeling.stock_class(model_type), self.whole_config, self.dtype, weights)
        for module in model.modules():
            for buffer in (buffer for buffer in module._buffers.values() if buffer is not None and not buffer.is_meta):
                buffer.data = buffer.data.to(self.device)
        blocks = upstream.blocks_of(model, self.config)
        self._ignored = upstream.ignored(model)
        # Name the checkpoint's tensors as in the model, with separate experts. Those of a pruned model have the model's names.
        convert = not family_of(model_type).stored and OURS not in self.checkpoint.config
        self.checkpoint.take(upstream.model_tensors(model, self.checkpoint, convert=convert))
        self._templates: list[nn.Module] = list(model.get_submodule(blocks).children())
        self.outside = Outside(
            self.checkpoint,
            model,
            model_type=model_type,
            blocks=blocks,
            config=self.config,
            wrapped=self.wrapped,
            device=self.device,
            dtype=self.dtype,
        )
        self.architecture, self.side_inputs = self.outside.architecture, self.outside.side_inputs
        self.arguments, self.embedding, self.head = self.outside.arguments, self.outside.embedding, self.outside.head
        if check:
            self._raise_faults(self.outside.expected())
        self.entries = self._infer(weights)
        """Sublayers of each block."""
        if any(entry.aside for entries in self.entries for entry in entries):
            self.side_inputs = self.outside.side_inputs = side_inputs.with_aside(self.side_inputs)
        if (widths := self.checkpoint.config.get(OURS)) is not None:
            check_widths(widths, self.architecture, self.entries, len(self.checkpoint), self.where)
            modeling.resize_blocks(self._templates, widths)
            self._take_gone(widths)
        experts.check_number(self.checkpoint, self.architecture.blocks, self._templates, self.where)
        self._separate_experts()
        if check:
            self._raise_faults(self._expected())
            for name in self.extra():
                raise CheckpointError(
                    f"{self.checkpoint.directory}: tensor {name!r} is not in the {model_type} model that the config describes; "
                    "transformers ignores it, but a result would lack it: remove it from the files"
                )
        if check:
            # The blocks and their arguments depend on the config too: check that they work.
            self.all_sites()
            with counted(0):
                self._try()

    @property
    def wrapped(self) -> bool:
        """Whether the model is a text model inside a larger one, which reads images too."""
        return self.config is not self.whole_config

    @property
    def where(self) -> str:
        return f"{self.checkpoint.directory}/{CONFIG}"

    def _infer(self, weights: int) -> list[tuple[SublayerEntry, ...]]:
        """Infer the sublayers of each block; blocks of the same modules have the same."""
        meta, cpu = torch.device("meta"), torch.device("cpu")
        # What pruning adds to a config says nothing about blocks before they are resized.
        fields = {k: v for k, v in self.whole_config.to_dict().items() if k not in (OURS, "architectures")}
        config, kept = json.dumps(fields, sort_keys=True, default=str), self.architecture.model_type not in FAMILIES
        self.stock_blocks: dict[int, nn.Module] = {}
        """The first block of each kind as transformers builds it, on the meta device."""
        found, seen = list[tuple[SublayerEntry, ...]](), set[Any]()
        # With masks in full, so that they are seen wherever they go.
        for index, (template, one) in enumerate(
            zip(self._templates, self.outside.collect(1, 1, maps=True), strict=True)
        ):
            shapes = tuple((name, tuple(parameter.shape)) for name, parameter in template.named_parameters())
            if sum(shape[0] for _, shape in shapes if shape) > weights:
                raise CheckpointError(f"{self.where}: its blocks are larger than the shards")
            kinds = tuple((name, type(module)) for name, module in template.named_modules())
            settings = tuple(
                (name, field, value)
                for name, module in template.named_modules()
                for field, value in sorted(vars(module).items())
                if type(value) in (bool, int, float, str) and not field.endswith(("idx", "layer_id", "layer_number"))
            )
            shares = frozenset(each.argument for each in self.side_inputs[index].written)
            key = config, shapes, kinds, settings, tuple((name, value is None) for name, value in one.items()), shares
            if kept and key not in seen:
                self.stock_blocks[index] = copy.deepcopy(template)
            seen.add(key)
            if key not in _KNOWN:
                dtype, side = next(template.parameters()).dtype, self.side_inputs[index]
                stream = torch.empty((1, 1, side.width), device=meta, dtype=dtype)
                given = side.arguments(stream, {name: moved(value, meta, dtype) for name, value in one.items()})
                several = self.outside.collect(1, TOKENS)[index]
                stream = torch.rand((1, TOKENS, side.width), generator=torch.Generator().manual_seed(0))
                tried = side.arguments(
                    stream, {name: moved(value, cpu, torch.float32) for name, value in several.items()}
                )
                _KNOWN[key] = infer(template, given, self.width, tried, shares)
            found.append(_KNOWN[key])
        while len(_KNOWN) > 256:
            _KNOWN.popitem(last=False)
        return found

    def _take_gone(self, widths: Mapping[str, Any]) -> None:
        """Set the entries of sublayers that went as a whole."""
        for index, entries in enumerate(self.entries):
            gone = {name for name, each in widths.get("no_op", {}).items() if each[index] is not None}
            self.entries[index] = tuple(
                entry.remainder if entry.removal and entry.removal.seat in gone else entry for entry in entries
            )

    def check_sites(self) -> None:
        """Raise a CheckpointError if there is nothing to prune, or if two sites of a block would have the same name."""
        sites = self.all_sites()
        if len({site.name for site in sites}) < len(sites):
            raise CheckpointError(
                f"{self.where}: model_type {self.architecture.model_type!r} is not supported: a block has several sites of a kind"
            )
        if not sites:
            raise CheckpointError(
                f"{self.where}: model_type {self.architecture.model_type!r} is not supported: its attention and FFNs have an "
                "unknown form, so nothing can be pruned"
            )

    def _raise_faults(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        for name, what in self._faults(expected):
            if not self.wrapped:
                check_names(self.checkpoint, self.architecture)
            raise CheckpointError(f"{self.checkpoint.directory}: tensor {name!r} {what}")

    def __len__(self) -> int:
        return len(self._templates)

    @property
    def width(self) -> int:
        """Residual width, d."""
        return int(self.config.hidden_size)

    @property
    def stream_width(self) -> int:
        """Columns of the stream: `width`, and those of side inputs (see `side_inputs`)."""
        return self.side_inputs[0].width

    @property
    def vocabulary(self) -> int:
        return int(self.config.vocab_size)

    @property
    def context(self) -> int | None:
        """Maximum number of tokens per window, if the config has one."""
        value = getattr(self.config, "max_position_embeddings", None)
        return int(value) if value else None

    def sites(self, index: int) -> list[Site]:
        """Return the sites of a block, in the order of its sublayers and their experts."""
        return [site for site, _ in self.places(index)]

    def places(self, index: int) -> list[tuple[Site, SublayerEntry]]:
        """Return the sites of a block, each with an entry whose names are relative to the block."""
        if index not in self._places:
            self._places[index] = self._find_places(index)
        return [*self._places[index]]

    def _find_places(self, index: int) -> list[tuple[Site, SublayerEntry]]:
        layer = self._templates[index]
        found = []
        for entry in self.entries[index]:
            if entry.experts is not None:
                held = layer.get_submodule(entry.experts)
                assert isinstance(held, Experts)
                router = self._router_part(layer, entry) // len(held)
                for number, expert in enumerate(held):
                    own = entry.expert(number)
                    bias = getattr(expert, entry.consumer or "").bias
                    site = replace(
                        self._site(index, own),
                        rest=router + (0 if bias is None else bias.numel()) if entry.routing else None,
                        expert=number,
                        share=self._chosen[index] / len(held),
                        least=entry.least,
                        groups=entry.groups,
                    )
                    found.append((site, own))
            single = entry.shared if entry.experts else entry
            if single is not None and single.consumer is not None:
                found.append((self._site(index, single), single))
        for number, (site, entry) in enumerate(found):
            bias = entry.removal is not None and entry.removal.bias is not None
            first = index == 0 and site.kind == "attention" and not self.layout.headless
            if site.expert is None and (not self.layout.sublayers or (bias and not self.layout.biases) or first):
                found[number] = replace(site, stays=True), entry
        sites = tuple(site for site, _ in found)
        alike = self.layout.alike
        return [
            (replace(site, choices=self._stock_choices(sites, site)) if site.family in alike else site, entry)
            for site, entry in found
        ]

    @staticmethod
    def _router_part(layer: nn.Module, entry: SublayerEntry) -> int:
        """Return the number of parameters that a router has for all experts; buffers do not count."""
        owners = {each.name: layer.get_submodule(each.name.rpartition(".")[0]) for each in entry.routing}
        return sum(
            _numel(layer, name) for name, owner in owners.items() if name.rpartition(".")[2] not in owner._buffers
        )

    def site_count(self, index: int, entry: SublayerEntry) -> int:
        """Return the number of sites of one sublayer of a block."""
        if entry.experts is None:
            return int(entry.consumer is not None)
        held = self._templates[index].get_submodule(entry.experts)
        assert isinstance(held, Experts)
        return len(held) + (entry.shared is not None)

    def _site(self, index: int, entry: SublayerEntry) -> Site:
        layer = self._templates[index]
        assert entry.consumer is not None
        outputs, columns = linear_shape(layer.get_submodule(entry.consumer))
        producers = [layer.get_submodule(producer.name) for producer in entry.producers]
        rows = [linear_shape(module)[0] for module in producers]
        units = columns // entry.width
        if units < 1 or any(width % units for width in (columns, *rows)):
            raise CheckpointError(
                f"{self.checkpoint.directory}: {entry.kind} widths {[columns, *rows]} of block {index} are not divisible into "
                f"{units} units"
            )
        produced = sum(_numel(layer, producer.name) for producer in (*entry.producers, *entry.vectors))
        own = (outputs * columns + produced) // units
        site = Site(
            block=index,
            kind=entry.kind,
            units=units,
            width=entry.width,
            outputs=outputs,
            unit_parameters=own,
            heads=columns // entry.head if entry.head else 0,
            rest=None if entry.removal is None else self._served(index, entry.removal) - own * units,
        )
        parts = [part for p, each in zip(entry.producers, rows, strict=True) for part in p.stretches(units, each)]
        inputs = linear_shape(producers[0])[1] if producers else self.width
        return replace(site, linears=(*(part * inputs for part in parts), outputs * columns))

    def _served(self, index: int, removal: Removal) -> int:
        """Return the number of parameters that leave a block if a sublayer goes as a whole."""
        layer, bias = self._templates[index], removal.bias
        served = sum(_numel(layer, name) for name in {removal.seat, *removal.identities})
        return served - (_numel(layer, f"{removal.seat}.{bias}") if bias else 0)

    def statistics(
        self, index: int, wanted: frozenset[Statistic], device: torch.device | None = None
    ) -> list[SiteStatistics]:
        """Return empty sums for a survey of a block, one per site, on `device` or the model's own."""
        return [
            SiteStatistics(
                wanted,
                units=site.units,
                width=site.width,
                heads=site.heads,
                inputs=self.width,
                outputs=site.outputs,
                rows=[weights // self.width for weights in site.linears[:-1]],
                device=device or self.device,
                dtype=accumulator(self.dtype),
            )
            for site in self.sites(index)
        ]

    def linears(self, index: int) -> list[str]:
        """Return the names of all linears of a block's sites: the producers of each site, then its consumer."""
        return [name for _, e in self.places(index) for name in (*(p.name for p in e.producers), e.consumer or "")]

    def block(self, index: int) -> nn.Module:
        """Return a block on the meta device."""
        return self._templates[index]

    def module(self, index: int, name: str) -> nn.Module:
        """Return a module of a block, on the meta device."""
        return self._templates[index].get_submodule(name)

    @cached_property
    def stateful(self) -> str | None:
        """The first module that may keep something else than keys and values in a cache; None if there is none."""
        for index, entries in enumerate(self.entries):
            for entry in entries:
                given = {name for _, name in entry.arguments} & {*upstream.CACHES}
                whole = entry.whole and not entry.silent
                if whole or self.side_inputs[index].shared or (given and entry.kind != "attention"):
                    return f"{self.architecture.blocks}.{index}.{entry.mixer[0]}".rstrip(".")
        return None

    @cached_property
    def unpruned(self) -> dict[str, list[int]]:
        """What has no site and stays as it is: modules inside blocks, ``""`` for a whole block, each with the blocks' numbers."""
        found: dict[str, list[int]] = {}
        for index, entries in enumerate(self.entries):
            for entry in entries:
                if entry.consumer is None and not entry.gone:
                    found.setdefault(entry.mixer[0], []).append(index)
        return found

    def all_sites(self) -> list[Site]:
        return [site for index in range(len(self)) for site in self.sites(index)]

    def block_names(self, index: int) -> dict[str, str]:
        """Return a mapping from tensor names inside the block to names in the checkpoint."""
        prefix = f"{self.architecture.blocks}.{index}."
        return {name: self.outside.stored_name(prefix + name) for name in self._templates[index].state_dict()}

    @cached_property
    def renamed(self) -> list[tuple[str, str]]:
        """Substrings of tensor names that differ in this checkpoint: (in the model, in the checkpoint)."""
        names = [*self.checkpoint]
        return [pair for pair in self.architecture.family.stored if any(pair[1] in f".{name}" for name in names)]

    def block_parameters(self, index: int | None = None) -> int:
        """Return the number of parameters of one block, or of all blocks if `index` is None."""
        layers = self._templates if index is None else [self._templates[index]]
        return sum(p.numel() for layer in layers for p in layer.parameters())

    def carried_names(self) -> list[str]:
        """Return the checkpoint's names of the tensors that are written although they take no part in computing text."""
        return [] if self.alone else [self.outside.stored_name(name) for name in self.outside.carried]

    def outside_linears(self) -> list[str]:
        """Return the names of the linears outside the blocks, as written: the head, projections, those of other towers."""
        weights = [f"{name}.weight" for name in self.outside.linears]
        kept = [name for name in weights if not self.alone or name not in self.outside.carried]
        return [self.written_name(self.outside.stored_name(name)).removesuffix(".weight") for name in kept]

    @property
    def written_type(self) -> str:
        """The model_type of what is written, before pruning."""
        return str(self.config.model_type) if self.alone else self.architecture.model_type

    def block_config(self, index: int) -> Any:
        """Return the config of the text model as a block sees it: some fields differ by block."""
        different = getattr(self.config, "is_heterogeneous", False)
        return self.config.per_layer_config[index] if different else self.config

    def written_name(self, name: str, stock: bool = False) -> str:
        """Return the name that a tensor or module of the model has in what is written: as the model, or the text model alone, has it.

        A stock checkpoint of a type outside `FAMILIES` (`stock`) has the names of the source's files instead, where they are the
        same tensors: transformers converts them as it does the source's.
        """
        if not self.alone:
            return self.checkpoint.names.get(name, name) if stock and self.written_type not in FAMILIES else name
        base = f"{self.architecture.base}."
        if not name.startswith(base):
            return name
        return f"{modeling.stock_class(self.written_type).base_model_prefix}.{name.removeprefix(base)}"

    def parameters(self) -> int:
        """Return the number of parameters of the model; a tied head counts once."""
        outside = {*self.outside.embed_names(), *self.outside.head_names(), *self.carried_names()}
        return self.block_parameters() + sum(self.checkpoint[name].numel for name in outside)

    def forward_operations(self, sequences: int, length: int) -> int:
        """Return the floating-point operations of a forward pass over `sequences` of `length` tokens, in the convention of `maths.flops`.

        The head runs on all tokens of a sequence except the last, which predicts nothing.
        """
        head = sequences * (length - 1) * 2 * self.outside.head_elements()
        return self.block_operations(sequences, length) + head

    def block_operations(self, sequences: int, length: int) -> int:
        """Return the floating-point operations of all blocks in such a forward pass.

        Two per weight and token of each linear, plus the two attention products over all pairs of tokens. Products of other mixers
        are counted on the meta device.
        """
        linears = sum(matrix_elements(layer) for layer in self._templates)
        linears -= round(sum((1 - site.share) * sum(site.linears) for site in self.all_sites()))
        mixing = 0
        for index, entries in enumerate(self.entries):
            if all(entry.producers or entry.gone for entry in entries):
                mixing += sum(4 * length**2 * site.columns for site in self.sites(index) if site.kind == "attention")
            elif (ran := self._measured(index, length)) is not None:
                mixing += ran.products
        return sequences * (length * 2 * linears + mixing)

    def measured(self, index: int, length: int) -> tuple[Measured, ...] | None:
        """Return what each sublayer of a block does on one sequence of `length` tokens, from a run on the meta device.

        None if the block does not run there, because it reads values of tensors. Routed experts are left out.
        """
        ran = self._measured(index, length)
        return None if ran is None else ran.sublayers

    def _measured(self, index: int, length: int) -> Ran | None:
        """Run a block on the meta device; blocks of the same modules run once."""
        template, entries = self._templates[index], self.entries[index]
        shapes = tuple((name, tuple(p.shape)) for name, p in template.named_parameters())
        key = length, shapes, tuple(type(module) for module in template.modules()), entries
        if key not in self._ran:
            self._ran[key] = dry_run.measure(template, entries, length, self.width, self._dry(index, length))
        return self._ran[key]

    def _dry(self, index: int, tokens: int) -> Arguments:
        """The arguments of a block for `dry_run`, with empty side inputs."""
        stream = torch.empty((1, tokens, self.stream_width), device="meta")
        return self.side_inputs[index].arguments(stream, self.arguments(1, tokens)[index])

    def announce_block(self, index: int) -> None:
        """Ask the kernel to read ahead what `read_block` will read."""
        for full in self.block_names(index).values():
            self.checkpoint.announce(full)

    def read_block(self, index: int) -> dict[str, Tensor]:
        """Read the tensors of a block to host memory, in the stored dtype, by name inside the block."""
        return {name: self.checkpoint.read(full, self.device) for name, full in self.block_names(index).items()}

    def build_block(
        self,
        index: int,
        weights: dict[str, Tensor],
        there: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Block:
        """Build a block from the result of `read_block`.

        Args:
            there: copies of weights that are already on the device, by name.
            dtype: computing dtype; None for the skeleton's.
        """
        entries, places = self.entries[index], iter(self.places(index))
        layer = Layer(
            copy.deepcopy(self._templates[index]), weights, entries, self.device, dtype or self.dtype, there or {}
        )
        sublayers = []
        for entry in entries:
            number = self.site_count(index, entry)
            sublayers.append(
                Sublayer(layer, entry, [next(places) for _ in range(number)], index, self.side_inputs[index])
            )
        return Block(layer, sublayers)

    @cache  # noqa: B019 - a handful of entries, for the life of the skeleton
    def _stock_choices(self, sites: tuple[Site, ...], site: Site) -> tuple[int, ...]:
        """Return the unit counts for the site's family that the stock config can express, with other families unchanged."""

        def possible(units: int) -> bool:
            others = [other for other in sites if other.family != site.family]
            return is_stock(self.architecture.model_type, self.checkpoint.config, [site.keeping(units), *others])

        # If the stock config can express the FFN width at all, it can express any width.
        if site.kind == "ffn":
            return tuple(range(1, site.units + 1)) if possible(1) else (site.units,)
        return tuple(units for units in range(1, site.units + 1) if units == site.units or possible(units))

    def _try(self) -> None:
        """Run one token through every block and the head on the meta device; see `dry_run.run`."""
        config = self.whole_config.to_json_string(use_diff=False)
        for index, (template, entries) in enumerate(zip(self._templates, self.entries, strict=True)):
            unknown = experts.experts_of(template).keys() - {entry.experts for entry in entries}
            # Blocks of unknown form may read values, which the meta device does not have.
            shapes = tuple((name, tuple(parameter.shape)) for name, parameter in template.named_parameters())
            key = hashlib.sha256(repr((config, self.dtype, index, entries, shapes)).encode()).digest()
            meta = self.architecture.model_type in FAMILIES or not (unknown or any(entry.whole for entry in entries))
            if meta and key not in _RAN:
                dry_run.run(template, entries, 1, self.width, self._dry(index, 1))
                _RAN[key] = None
        while len(_RAN) > 1024:
            _RAN.popitem(last=False)
        self.outside.try_head(self.width)

    def _separate_experts(self) -> None:
        """Replace fused experts by separate modules."""
        self._chosen: list[int] = []
        """Experts per token of each block."""
        for index, (template, entries) in enumerate(zip(self._templates, self.entries, strict=True)):
            self._chosen.append(0)
            known = {entry.experts for entry in entries}
            for name, module in experts.experts_of(template).items():
                if name not in known:
                    experts.unite(self.checkpoint, f"{self.architecture.blocks}.{index}.{name}", module)
            for entry in (entry for entry in entries if entry.experts):
                assert entry.experts is not None
                held = template.get_submodule(entry.experts)
                self._chosen[-1] = entry.chosen
                if not isinstance(held, Experts):
                    experts.divide(self.checkpoint, f"{self.architecture.blocks}.{index}.{entry.experts}", held)
                    separate_experts(template, entry.experts)

    def layout_faults(self) -> Iterator[tuple[str, str]]:
        """Yield tensors that are missing, or whose shape differs from the config: name, and what is wrong."""
        return self._faults(self._expected())

    def _faults(self, expected: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, str]]:
        """Yield those of the expected tensors that are missing or have another shape: name, and what is wrong."""
        expected = dict(expected)
        head, embedding = self.outside.head_weight, self.outside.embedding_weight
        # `tied` compares a stored head with the embedding, so it needs both.
        if (head not in self.checkpoint or embedding in self.checkpoint) and self.outside.tied:
            expected.pop(head, None)
        for name, shape in expected.items():
            if name not in self.checkpoint:
                yield name, f"is missing; the {self.architecture.model_type} model that the config describes has it"
            elif self.checkpoint[name].shape != shape:
                yield name, f"has shape {list(self.checkpoint[name].shape)}; the config says {list(shape)}"

    def extra(self) -> list[str]:
        """Return tensors that the config's model does not have, except the unused buffers of old checkpoints."""
        expected = self._expected()
        return [
            name
            for name in self.checkpoint
            if name not in expected and not name.endswith(UNREAD) and not self._ignored(name)
        ]

    def _expected(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all tensors that the config implies, by stored name; the head is always included."""
        expected = self.outside.expected()
        for index, layer in enumerate(self._templates):
            state = layer.state_dict()
            expected |= {full: tuple(state[name].shape) for name, full in self.block_names(index).items()}
        return expected | {self.outside.stored_name(name): shape for name, shape in self.outside.carried.items()}


def open_skeleton(
    model: Path, device: torch.device, dtype: str, *, layout: Layout = FREE, text_only: bool = False
) -> Skeleton:
    """Open the skeleton of a checkpoint directory. `dtype` is the name of the computing dtype, see `resolve_dtype`."""
    checkpoint = Checkpoint(model)
    computing = resolve_dtype(dtype, device, checkpoint.dtype)
    return Skeleton(checkpoint, device=device, dtype=computing, layout=layout, text_only=text_only)


def _numel(block: nn.Module, name: str) -> int:
    """Return the number of parameters of a module, or of a parameter."""
    owner, _, leaf = name.rpartition(".")
    parameter = block.get_submodule(owner)._parameters.get(leaf)
    return (
        parameter.numel() if parameter is not None else sum(p.numel() for p in block.get_submodule(name).parameters())
    )
