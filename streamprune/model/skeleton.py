"""A model without its weights: transformers' own modules on the meta device, filled one part at a time.

Embeddings, positions and masks are computed by the model's own forward with the blocks taken out, so no masking or position
code is duplicated here.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import CheckpointError, NumericalError, one_line
from ..maths.flops import FlopCounter, counted
from ..maths.live import FusedAttention, LiveBytes
from ..maths.refit import accumulator, advice, all_finite
from ..maths.sums import SiteStatistics, Statistic
from ..system.machine import resolve_dtype
from . import experts, upstream
from . import modeling_streamprune as modeling
from .architectures import FAMILIES, Architecture, SublayerEntry, family_of, is_stock
from .block import Arguments, Block, Layer, Sublayer, fresh, linear_shape, place, stand_in
from .checkpoint import UNREAD, Checkpoint
from .config import OURS, check_names, check_widths, read_configuration
from .inference import infer
from .modeling_streamprune import Experts, separate_experts
from .names import CONFIG
from .site import FREE, Layout, Site
from .trial import TOKENS

_KNOWN: OrderedDict[Any, tuple[SublayerEntry, ...]] = OrderedDict()
"""Sublayers that were inferred in this process, by config and modules."""


@dataclass(frozen=True)
class Measured:
    """What the mixer of one sublayer does on one sequence, besides routed experts."""

    operations: int  # floating-point operations
    peak: int  # most bytes of results alive at a time
    total: int  # bytes of all results: at least what a backward pass needs


@dataclass(frozen=True)
class _Ran:
    """What a block does on one sequence."""

    products: int  # floating-point operations besides those of its linears
    sublayers: tuple[Measured, ...]


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
        self._arguments: OrderedDict[tuple[int, int, int, bool], list[Arguments]] = OrderedDict()
        self._ran: dict[Any, _Ran | None] = {}
        model_type, self.whole_config = read_configuration(checkpoint)
        self.config = self.whole_config.get_text_config()
        """The config of the text model."""
        self.alone = text_only and self.wrapped
        """Whether the text model is written without the rest."""
        with upstream.translated(f"{checkpoint.directory}/{CONFIG}", "build this model"):
            self._build(model_type, check)

    def _build(self, model_type: str, check: bool) -> None:
        """Take the model apart on the meta device and compare it with the shards, before anything takes memory."""
        weights = sum(entry.numel for entry in self.checkpoint.values())
        model = upstream.build(modeling.stock_class(model_type), self.whole_config, self.dtype, weights)
        for module in model.modules():
            for buffer in (buffer for buffer in module._buffers.values() if buffer is not None and not buffer.is_meta):
                buffer.data = buffer.data.to(self.device)
        blocks = upstream.blocks_of(model, self.config)
        self._family = family_of(model_type)
        self._rename(model, model_type)
        layers = model.get_submodule(blocks)
        self._templates: list[nn.Module] = list(layers.children())
        self._slots = [upstream.Recorder(template) for template in self._templates]
        self._base = model.get_submodule(blocks.rpartition(".")[0])
        model.set_submodule(blocks, nn.ModuleList(self._slots))
        self.architecture = self._outside(model, model_type, blocks)
        self._embed = _present(model, self.architecture.embed)
        self._after = _present(model, (*self.architecture.final, self.architecture.head))
        used = (*self.architecture.embed, *self.architecture.final, self.architecture.head)
        self._carried = {
            name: tuple(tensor.shape)
            for name, tensor in model.state_dict().items()
            if not name.startswith(tuple(f"{path}." for path in (*used, blocks)))
        }
        """Shapes of the tensors that take no part in computing text, such as those of a vision tower, by name."""
        self._linears = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and not name.startswith(f"{blocks}.")
        ]
        """Names of the linears outside the blocks."""
        for name in self._behind:
            model.set_submodule(name, nn.Identity())
        if check:
            self._raise_faults(self._expected_outside())
        self.entries = self._infer(weights)
        """Sublayers of each block."""
        if (widths := self.checkpoint.config.get(OURS)) is not None:
            check_widths(widths, self.architecture, self.entries, len(self.checkpoint), self.where)
            modeling.resize_blocks(self._templates, widths)
        self._separate_experts()
        if check:
            self._raise_faults(self._expected())
            for name in self.extra():
                raise CheckpointError(
                    f"{self.checkpoint.directory}: tensor {name!r} is not in the {model_type} model that the config describes; "
                    "transformers ignores it, but a result would lack it: remove it from the files"
                )
        # The rest of the model is its head, including any post-processing of logits.
        passed = blocks.partition(".")[0] if self.wrapped else self.architecture.base
        model.set_submodule(passed, upstream.PassThrough(model.get_submodule(passed)))
        self._head = model
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

    def _rename(self, model: nn.Module, model_type: str) -> None:
        """Name the checkpoint's tensors as in the model, with separate experts."""
        self._ignored, self._ties = upstream.ignored(model), upstream.ties_head(model)
        ours = OURS in self.checkpoint.config  # written with the model's names
        convert = not self._family.stored and not ours
        self.checkpoint.take(upstream.model_tensors(model, self.checkpoint, convert=convert))

    def _outside(self, model: Any, model_type: str, blocks: str) -> Architecture:
        """Find the modules with weights before and after the blocks, from the order in which the model calls them."""
        base, _, leaf = blocks.rpartition(".")
        own = {f"{base}.{name}": module for name, module in self._base.named_children() if name != leaf}
        if found := [name for name, _ in self._base.named_parameters(recurse=False)]:
            raise CheckpointError(
                f"{self.where}: {model_type} models have {found[0]} beside their blocks, which is not supported"
            )
        if getattr(self.config, "num_kv_shared_layers", 0):
            raise CheckpointError(
                f"{self.where}: num_kv_shared_layers is {self.config.num_kv_shared_layers}; blocks that use the keys and values of "
                "earlier blocks are not supported"
            )
        order: list[str] = []
        watched = {**own, "first": self._slots[0], "last": self._slots[-1]}
        hooks = [
            module.register_forward_pre_hook(lambda *_, name=name: order.append(name))
            for name, module in watched.items()
        ]
        self._embed = {name: module for name, module in own.items() if any(True for _ in module.parameters())}
        ids, failure = torch.zeros((1, 1), dtype=torch.int64, device=self.device), None
        try:
            for self._slots[0].outputs in (0, 1, 2, 3):
                order.clear()
                for slot in self._slots:
                    slot.outputs = self._slots[0].outputs
                try:
                    with torch.no_grad(), counted(0), self._filled(self._embed, self._blank):
                        self._base(input_ids=ids, use_cache=False)
                except Exception as error:
                    failure = failure or error  # the model takes what blocks return in another form
                    continue
                if all(slot.hidden is not None and slot.hidden.shape == (1, 1, self.width) for slot in self._slots):
                    break
            else:
                raise CheckpointError(
                    f"{self.where}: the blocks of {model_type} models do not pass on hidden states alone"
                    + (f" ({one_line(failure, 200)})" if failure else "")
                ) from failure
        finally:
            for hook in hooks:
                hook.remove()
        given = [dict(slot.arguments) for slot in self._slots]
        with torch.no_grad(), counted(0), self._filled(self._embed, self._varied):
            self._base(input_ids=ids + 1, use_cache=False)
        for slot, before in zip(self._slots, given, strict=True):
            for name, value in slot.arguments.items():
                what = f"the blocks of {model_type} models read {name}, which"
                if any(isinstance(each, upstream.Returned) for each in tree_leaves(value)):
                    raise CheckpointError(f"{self.where}: {what} earlier blocks return: this is not supported")
                for then, now in zip(tree_leaves(before.get(name)), tree_leaves(value), strict=False):
                    if isinstance(now, Tensor) and not (isinstance(then, Tensor) and _same(then, now)):
                        raise CheckpointError(f"{self.where}: {what} depends on the tokens: this is not supported")
        paths = {module: name for name, module in model.named_modules()}
        tokens, head = paths[model.get_input_embeddings()], paths[model.get_output_embeddings()]
        before = dict.fromkeys(name for name in order[: order.index("first")] if name in self._embed)
        last = len(order) - 1 - order[::-1].index("last")
        self._behind = set(order[last + 1 :]) - set(order[: order.index("first")])
        """Modules that only follow the blocks."""
        return Architecture(
            model_type,
            blocks,
            embed=(tokens, *(name for name in before if name != tokens)),
            final=tuple(dict.fromkeys(order[last + 1 :])),
            head=head,
            family=self._family,
        )

    def _infer(self, weights: int) -> list[tuple[SublayerEntry, ...]]:
        """Infer the sublayers of each block; blocks of the same modules have the same."""
        meta, cpu = torch.device("meta"), torch.device("cpu")
        experts.check_number(self.checkpoint, self.architecture.blocks, self._templates, self.where)
        config, kept = self.whole_config.to_json_string(use_diff=False), self.architecture.model_type not in FAMILIES
        self.stock_blocks: dict[int, nn.Module] = {}
        """The first block of each kind as transformers builds it, on the meta device."""
        found, seen = list[tuple[SublayerEntry, ...]](), set[Any]()
        # With masks in full, so that they are seen wherever they go.
        for index, (template, one) in enumerate(zip(self._templates, self._collect(1, 1, maps=True), strict=True)):
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
            key = config, shapes, kinds, settings, tuple((name, value is None) for name, value in one.items())
            if kept and key not in seen:
                self.stock_blocks[index] = copy.deepcopy(template)
            seen.add(key)
            if key not in _KNOWN:
                dtype = next(template.parameters()).dtype
                given = {name: moved(value, meta, dtype) for name, value in one.items()}
                several = self._collect(1, TOKENS)[index]
                tried = {name: moved(value, cpu, torch.float32) for name, value in several.items()}
                _KNOWN[key] = infer(template, given, self.width, tried)
            found.append(_KNOWN[key])
        while len(_KNOWN) > 256:
            _KNOWN.popitem(last=False)
        return found

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

    @property
    def writes_maps(self) -> bool:
        """Whether attention computes its maps in full, because the architecture only has eager attention."""
        return upstream.attention(self._base.config) == "eager"

    def places(self, index: int) -> list[tuple[Site, SublayerEntry]]:
        """Return the sites of a block, each with an entry whose names are relative to the block."""
        layer = self._templates[index]
        found = []
        for entry in self.entries[index]:
            if entry.experts is not None:
                held = layer.get_submodule(entry.experts)
                assert isinstance(held, Experts)
                for number in range(len(held)):
                    own = entry.expert(number)
                    site = self._site(index, own)
                    found.append((replace(site, expert=number, share=self._chosen[index] / len(held)), own))
            single = entry.shared if entry.experts else entry
            if single is not None and single.consumer is not None:
                found.append((self._site(index, single), single))
        sites = tuple(site for site, _ in found)
        alike = self.layout.alike
        return [
            (replace(site, choices=self._stock_choices(sites, site)) if site.family in alike else site, entry)
            for site, entry in found
        ]

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
        site = Site(
            block=index,
            kind=entry.kind,
            units=units,
            width=entry.width,
            outputs=outputs,
            unit_parameters=(outputs * columns + produced) // units,
            heads=columns // entry.head if entry.head else 0,
        )
        parts = [part for p, each in zip(entry.producers, rows, strict=True) for part in p.stretches(units, each)]
        inputs = linear_shape(producers[0])[1] if producers else self.width
        return replace(site, linears=(*(part * inputs for part in parts), outputs * columns))

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
                if entry.whole or (given and entry.kind != "attention"):
                    return f"{self.architecture.blocks}.{index}.{entry.mixer[0]}".rstrip(".")
        return None

    @cached_property
    def unpruned(self) -> dict[str, list[int]]:
        """What has no site and stays as it is: modules inside blocks, ``""`` for a whole block, each with the blocks' numbers."""
        found: dict[str, list[int]] = {}
        for index, entries in enumerate(self.entries):
            for entry in entries:
                if entry.consumer is None:
                    found.setdefault(entry.mixer[0], []).append(index)
        return found

    def all_sites(self) -> list[Site]:
        return [site for index in range(len(self)) for site in self.sites(index)]

    def block_names(self, index: int) -> dict[str, str]:
        """Return a mapping from tensor names inside the block to names in the checkpoint."""
        prefix = f"{self.architecture.blocks}.{index}."
        return {name: self.stored_name(prefix + name) for name in self._templates[index].state_dict()}

    def stored_name(self, name: str) -> str:
        stored = name
        for ours, theirs in self._family.stored:
            stored = stored.replace(ours, theirs)
        return name if name in self.checkpoint or stored not in self.checkpoint else stored

    @cached_property
    def renamed(self) -> list[tuple[str, str]]:
        """Substrings of tensor names that differ in this checkpoint: (in the model, in the checkpoint)."""
        names = [*self.checkpoint]
        return [pair for pair in self._family.stored if any(pair[1] in f".{name}" for name in names)]

    def block_parameters(self, index: int | None = None) -> int:
        """Return the number of parameters of one block, or of all blocks if `index` is None."""
        layers = self._templates if index is None else [self._templates[index]]
        return sum(p.numel() for layer in layers for p in layer.parameters())

    def embed_names(self) -> list[str]:
        """Return the checkpoint's names of the tensors before the blocks."""
        return [name for *_, name in self._leaves(self._embed)]

    def carried_names(self) -> list[str]:
        """Return the checkpoint's names of the tensors that are written although they take no part in computing text."""
        return [] if self.alone else [self.stored_name(name) for name in self._carried]

    def outside_linears(self) -> list[str]:
        """Return the names of the linears outside the blocks, as written: the head, projections, those of other towers."""
        weights = [f"{name}.weight" for name in self._linears]
        kept = [name for name in weights if not self.alone or name not in self._carried]
        return [self.written_name(self.stored_name(name)).removesuffix(".weight") for name in kept]

    @property
    def written_type(self) -> str:
        """The model_type of what is written, before pruning."""
        return str(self.config.model_type) if self.alone else self.architecture.model_type

    def written_name(self, name: str) -> str:
        """Return the name that a tensor or module of the model has in what is written."""
        base = f"{self.architecture.base}."
        if not self.alone or not name.startswith(base):
            return name
        return f"{modeling.stock_class(self.written_type).base_model_prefix}.{name.removeprefix(base)}"

    def head_names(self) -> list[str]:
        """Return the checkpoint's names of the tensors after the blocks; a tied head is not included."""
        names = [name for *_, name in self._leaves(self._after)]
        return [name for name in names if name != self._head_weight or not self.tied]

    def parameters(self) -> int:
        """Return the number of parameters of the model; a tied head counts once."""
        outside = {*self.embed_names(), *self.head_names(), *self.carried_names()}
        return self.block_parameters() + sum(self.checkpoint[name].numel for name in outside)

    def forward_operations(self, sequences: int, length: int) -> int:
        """Return the floating-point operations of a forward pass over `sequences` of `length` tokens, in the convention of `maths.flops`.

        The head runs on all tokens of a sequence except the last, which predicts nothing.
        """
        head = sum(_matrix_elements(module) for module in self._after.values())
        return self.block_operations(sequences, length) + sequences * (length - 1) * 2 * head

    def block_operations(self, sequences: int, length: int) -> int:
        """Return the floating-point operations of all blocks in such a forward pass.

        Two per weight and token of each linear, plus the two attention products over all pairs of tokens. Products of other mixers
        are counted on the meta device.
        """
        linears = sum(_matrix_elements(layer) for layer in self._templates)
        linears -= round(sum((1 - site.share) * sum(site.linears) for site in self.all_sites()))
        mixing = 0
        for index, entries in enumerate(self.entries):
            if all(entry.producers for entry in entries):
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

    def _measured(self, index: int, length: int) -> _Ran | None:
        """Run a block on the meta device; blocks of the same modules run once."""
        template, entries = self._templates[index], self.entries[index]
        shapes = tuple((name, tuple(p.shape)) for name, p in template.named_parameters())
        key = length, shapes, tuple(type(module) for module in template.modules()), entries
        if key not in self._ran:
            self._ran[key] = self._measure(index, length)
        return self._ran[key]

    def _measure(self, index: int, length: int) -> _Ran | None:
        template, entries, found = self._templates[index], self.entries[index], dict[int, Measured]()
        self.arguments(1, length)  # computed and cached before anything is counted
        with ExitStack() as stack:
            stack.enter_context(counted(0))
            stack.enter_context(FusedAttention())
            counter, live = stack.enter_context(FlopCounter()), stack.enter_context(LiveBytes())
            for number, entry in enumerate(entries):
                # Closures, which a copy of the block keeps.
                before = {"operations": 0, "now": 0, "total": 0}

                def enter(*_: Any, before: dict[str, int] = before) -> None:
                    before |= {"operations": counter.total, "now": live.now, "total": live.total}
                    live.peak = live.now

                def leave(*_: Any, number: int = number, before: dict[str, int] = before) -> None:
                    found[number] = Measured(
                        counter.total - before["operations"], live.peak - before["now"], live.total - before["total"]
                    )

                first, last = (template.get_submodule(entry.mixer[end]) for end in (0, -1))
                stack.callback(first.register_forward_pre_hook(enter, prepend=True).remove)
                stack.callback(last.register_forward_hook(leave).remove)
            try:
                ran = self._run_on_meta(index, length, opaque=True)
            except RuntimeError:  # NotImplementedError among them: it reads values of tensors
                return None
        if ran is None or len(found) < len(entries):
            return None
        products = counter.total - 2 * length * ran
        return _Ran(products, tuple(found[number] for number in range(len(entries))))

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
            sublayers.append(Sublayer(layer, entry, [next(places) for _ in range(number)], index))
        return Block(layer, sublayers)

    def arguments(self, sequences: int, tokens: int, past: int = 0, *, maps: bool = False) -> list[Arguments]:
        """Return the arguments that the model's forward passes to each block for a batch (sequences, tokens).

        Args:
            past: number of preceding tokens in the cache.
            maps: for `Sublayer.attend`, which needs all masks in full.

        Raises:
            NumericalError: the rotary embeddings hold NaN or Inf. Attention might still return finite numbers.
        """
        key = sequences, tokens, past, maps
        if key not in self._arguments:
            found = self._collect(*key)
            # Blocks of the same kind share their tables.
            given = [tree_leaves(arguments.get("position_embeddings")) for arguments in found]
            tables = {table for each in given for table in each if isinstance(table, Tensor)}
            if not all(all_finite(torch.view_as_real(t) if t.is_complex() else t) for t in tables):
                raise NumericalError(
                    f"{self.checkpoint.directory}: the rotary embedding of positions {past} to {past + tokens - 1} holds "
                    f"NaN or Inf{advice(self.dtype)}"
                )
            self._arguments[key] = found
            while len(self._arguments) > 4:
                self._arguments.popitem(last=False)
        return self._arguments[key]

    def _collect(self, sequences: int, tokens: int, past: int = 0, maps: bool = False) -> list[Arguments]:
        """Run the model without its blocks, and return the arguments that each of them receives."""
        attention = upstream.eager_attention(self._base.config) if maps else nullcontext()
        # Not counted, because results are cached and a repeat depends on earlier calls.
        with attention, counted(0), self._filled(self._embed, self._blank):
            self._embedded(torch.zeros((sequences, tokens), dtype=torch.int64, device=self.device), past)
        return [slot.arguments for slot in self._slots]

    @contextmanager
    def embedding(self, past: int = 0) -> Iterator[Callable[[Tensor], Tensor]]:
        """Yield a function from token ids (sequences, tokens) int64 to the first block's input (sequences, tokens, d)."""
        with self._filled(self._embed, self._read):
            yield partial(self._embedded, past=past)

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Yield a function from the last block's output (..., d) to logits (..., vocabulary)."""
        with self._filled(self._after, self._read):
            yield self._logits

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

    @property
    def _head_weight(self) -> str:
        return self.stored_name(f"{self.architecture.head}.weight")

    @cached_property
    def tied(self) -> bool:
        """Whether the head shares the embedding's weight. As in transformers, a stored head that differs is not tied."""
        if not self._ties:
            return False
        if self._head_weight not in self.checkpoint:
            return True
        head, embedding = self.checkpoint[self._head_weight], self.checkpoint[self._embedding_weight]
        return head.shape == embedding.shape and torch.equal(
            self.checkpoint.read(self._head_weight), self.checkpoint.read(self._embedding_weight)
        )

    @property
    def _embedding_weight(self) -> str:
        return f"{self.architecture.embed[0]}.weight"

    @torch.no_grad()
    def _try(self) -> None:
        """Run one token through every block and the head on the meta device, without computing or counting anything.

        Settings that the modules cannot run with, such as a factor that is not a number, raise torch's own errors here.
        """
        meta = torch.device("meta")
        for index in range(len(self)):
            self._run_on_meta(index, 1)
        dtype = next(self._after[self.architecture.head].parameters()).dtype
        self._logits(torch.empty((1, 1, self.width), device=meta, dtype=dtype))

    @torch.no_grad()
    def _run_on_meta(self, index: int, tokens: int, *, opaque: bool = False) -> int | None:
        """Run a block without its experts on one sequence; return the weights of the linears that ran.

        None if its parts are unknown and may not run on the meta device, unless `opaque` asks to try.
        """
        template, entries, meta = self._templates[index], self.entries[index], torch.device("meta")
        known = {entry.experts for entry in entries}
        unknown = any(entry.whole for entry in entries) or experts.experts_of(template).keys() - known
        if unknown and not opaque and self.architecture.model_type not in FAMILIES:
            return None
        dtype = next(template.parameters()).dtype
        given = {name: moved(value, meta, dtype) for name, value in self.arguments(1, tokens)[index].items()}
        if any(not buffer.is_meta for buffer in template.buffers()):
            template = copy.deepcopy(template).to(meta)
        # Routing depends on values, which meta tensors do not have. Other modules may read values too.
        apart = stand_in(template, [part for entry in entries for part in entry.parts])
        try:
            template(torch.empty((1, tokens, self.width), device=meta, dtype=dtype), **fresh(given))
            return _matrix_elements(template)
        finally:
            for name, module in apart.items():
                template.set_submodule(name, module)

    def _logits(self, hidden: Tensor) -> Tensor:
        *final, _ = self._after.values()
        for module in final:
            hidden = module(hidden)
        found: Tensor = self._head(inputs_embeds=hidden.reshape(1, -1, hidden.shape[-1]), use_cache=False).logits
        return found.view(*hidden.shape[:-1], -1)

    def _embedded(self, ids: Tensor, past: int = 0) -> Tensor:
        cache = {upstream.cache_argument(type(self._base).forward): upstream.Past(past)} if past else {}
        with torch.no_grad():
            self._base(input_ids=ids, use_cache=False, **cache)
        hidden = self._slots[0].hidden
        for slot in self._slots:
            slot.hidden = None
        assert hidden is not None
        return hidden

    def _varied(self, name: str, like: Tensor) -> Tensor:
        """Return a tensor of the shape of another, each row of which has the same numbers, different from other rows."""
        if like.dim() < 2:
            return torch.ones(like.shape, device=self.device, dtype=self.dtype)
        rows = torch.arange(len(like), device=self.device).to(self.dtype)
        return rows.view(-1, *[1] * (like.dim() - 1)).expand(like.shape)

    def _read(self, name: str, like: Tensor) -> Tensor:
        if name == self._head_weight and self.tied:
            name = self._embedding_weight
        return self.checkpoint.read(name).to(self.device, self.dtype)

    def _blank(self, name: str, like: Tensor) -> Tensor:
        """Return zeros of a tensor's shape, expanded from one element so that they take no memory."""
        return torch.zeros((), device=self.device, dtype=self.dtype).expand(like.shape)

    @contextmanager
    def _filled(self, modules: dict[str, nn.Module], source: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
        leaves = self._leaves(modules)
        try:
            for module, leaf, tensor, name in leaves:
                place(module, leaf, source(name, tensor))
            yield
        finally:
            for module, leaf, tensor, _ in leaves:
                place(module, leaf, tensor)

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

    def _leaves(self, modules: dict[str, nn.Module]) -> list[tuple[nn.Module, str, Tensor, str]]:
        """Return the tensors of modules: module, name inside it, the tensor, and its name in the checkpoint."""
        return [
            (module, leaf, tensor, self.stored_name(f"{path}.{leaf}"))
            for path, module in modules.items()
            for leaf, tensor in module.state_dict().items()
        ]

    def layout_faults(self) -> Iterator[tuple[str, str]]:
        """Yield tensors that are missing, or whose shape differs from the config: name, and what is wrong."""
        return self._faults(self._expected())

    def _faults(self, expected: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, str]]:
        """Yield those of the expected tensors that are missing or have another shape: name, and what is wrong."""
        expected = dict(expected)
        # `tied` compares a stored head with the embedding, so it needs both.
        if (self._head_weight not in self.checkpoint or self._embedding_weight in self.checkpoint) and self.tied:
            expected.pop(self._head_weight, None)
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
        expected = self._expected_outside()
        for index, layer in enumerate(self._templates):
            state = layer.state_dict()
            expected |= {full: tuple(state[name].shape) for name, full in self.block_names(index).items()}
        return expected | {self.stored_name(name): shape for name, shape in self._carried.items()}

    def _expected_outside(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors before and after the blocks, by stored name."""
        leaves = [*self._leaves(self._embed), *self._leaves(self._after)]
        return {name: tuple(tensor.shape) for _, _, tensor, name in leaves}


def open_skeleton(
    model: Path, device: torch.device, dtype: str, *, layout: Layout = FREE, text_only: bool = False
) -> Skeleton:
    """Open the skeleton of a checkpoint directory. `dtype` is the name of the computing dtype, see `resolve_dtype`."""
    checkpoint = Checkpoint(model)
    computing = resolve_dtype(dtype, device, checkpoint.dtype)
    return Skeleton(checkpoint, device=device, dtype=computing, layout=layout, text_only=text_only)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())


def _present(model: nn.Module, paths: tuple[str, ...]) -> dict[str, nn.Module]:
    """Return the modules at `paths`, by path, except those that the config omits."""
    found = {}
    for path in paths:
        parent, _, leaf = path.rpartition(".")
        module = getattr(model.get_submodule(parent), leaf)
        if module is not None:
            found[path] = module
    return found


def moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Move an argument of a block to a device, and floating-point tensors to a dtype; other values are unchanged."""
    if isinstance(value, tuple):
        return tuple(moved(each, device, dtype) for each in value)
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else None)


def _numel(block: nn.Module, name: str) -> int:
    """Return the number of parameters of a module, or of a parameter."""
    owner, _, leaf = name.rpartition(".")
    parameter = block.get_submodule(owner)._parameters.get(leaf)
    return (
        parameter.numel() if parameter is not None else sum(p.numel() for p in block.get_submodule(name).parameters())
    )


def _matrix_elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.dim() == 2)
