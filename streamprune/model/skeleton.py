"""A model without its weights: transformers' own modules on the meta device, filled one part at a time.

Embeddings, positions and masks are computed by the model's own forward with the blocks taken out, so no masking or position
code is duplicated here.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, NumericalError
from ..maths.flops import counted
from ..maths.refit import accumulator, advice, all_finite
from ..maths.sums import SiteStatistics, Statistic
from ..system.machine import resolve_dtype
from . import upstream
from .architectures import SublayerEntry, is_stock
from .block import Arguments, Block, Layer, Routed, Sublayer, linear_shape, place
from .checkpoint import UNREAD, Checkpoint
from .config import read_configuration
from .modeling_streamprune import Experts, separate_experts
from .site import FREE, Layout, Site


class Skeleton:
    """The model of a checkpoint directory, dense or pruned.

    Args:
        checkpoint: holds the weights.
        device: device of the blocks.
        dtype: computing dtype of the blocks.
        layout: constrains the widths of the sites.
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
        check: bool = True,
    ) -> None:
        self.checkpoint, self.device, self.dtype, self.layout = checkpoint, device, dtype, layout
        self.copies_ahead = False
        """Whether to copy the next block's weights to the device while the current block runs; decided by `jobs.forecast.memory`."""
        self.architecture, self.config = read_configuration(checkpoint)
        self._arguments: OrderedDict[tuple[int, int, int, bool], list[Arguments]] = OrderedDict()
        with upstream.translated(f"{checkpoint.directory}/config.json", "build this model"):
            self._build(check)
            if check:
                # The blocks and their arguments depend on the config too: check that they work.
                self.all_sites()
                with counted(0):
                    self._try()

    def _build(self, check: bool) -> None:
        """Take the model apart on the meta device and compare it with the shards, before anything takes memory."""
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config, trust_remote_code=False).eval()
        self._base = model.get_submodule(self.architecture.base)
        blocks = model.get_submodule(self.architecture.blocks)
        assert isinstance(blocks, nn.ModuleList)
        self._templates: list[nn.Module] = list(blocks.children())
        self.entries = [self.architecture.sublayers(self.config, index) for index in range(len(self._templates))]
        """Sublayers of each block, from the table."""
        self._separate_experts()
        self._slots = [upstream.Recorder(template) for template in self._templates]
        model.set_submodule(self.architecture.blocks, nn.ModuleList(self._slots))
        self._embed = _present(model, self.architecture.embed)
        self._after = _present(model, (*self.architecture.final, self.architecture.head))
        if check:
            for name, what in self.layout_faults():
                raise CheckpointError(f"{self.checkpoint.directory}: tensor {name!r} {what}")
            for name in self.extra():
                raise CheckpointError(
                    f"{self.checkpoint.directory}: tensor {name!r} is not in the {self.architecture.model_type} model that the "
                    "config describes; transformers ignores it, but a result would lack it: remove it from the files"
                )
        for name in list(self._after)[:-1]:
            model.set_submodule(name, nn.Identity())
        numbers = sum(buffer.numel() for buffer in model.buffers() if buffer.is_meta)
        weights = sum(entry.numel for entry in self.checkpoint.values())
        if numbers > weights:
            raise CheckpointError(
                f"{self.checkpoint.directory}/config.json: tables of {numbers} numbers for a model of {weights} weights"
            )
        upstream.rebuild_buffers(model, self.config, self.device, self.dtype)
        # The rest of the model is its head, including any post-processing of logits.
        model.set_submodule(self.architecture.base, upstream.PassThrough())
        self._head = model

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
            if entry.experts is None:
                found.append((self._site(index, entry), entry))
                continue
            experts = layer.get_submodule(entry.experts)
            assert isinstance(experts, Experts)
            share = self.config.num_experts_per_tok / len(experts)
            for number in range(len(experts)):
                own = entry.expert(number)
                found.append((replace(self._site(index, own), expert=number, share=share), own))
        sites = tuple(site for site, _ in found)
        alike = self.layout.alike
        return [
            (replace(site, choices=self._stock_choices(sites, site)) if site.family in alike else site, entry)
            for site, entry in found
        ]

    def _site(self, index: int, entry: SublayerEntry) -> Site:
        layer = self._templates[index]
        outputs, columns = linear_shape(layer.get_submodule(entry.consumer))
        producers = [layer.get_submodule(producer.name) for producer in entry.producers]
        rows = [linear_shape(module)[0] for module in producers]
        heads, units = 0, columns
        if entry.kind == "attention":
            attention: Any = layer.get_submodule(entry.mixer[0])
            # Besides the queries, the producers output one key head and one value head per unit.
            head = attention.head_dim if hasattr(attention, "head_dim") else attention.head_size
            heads, units = columns // head, (sum(rows) - columns) // (2 * head)
        if units < 1 or any(width % units for width in (columns, *rows)):
            raise CheckpointError(
                f"{self.checkpoint.directory}: {entry.kind} widths {[columns, *rows]} of block {index} are not divisible into "
                f"{units} units"
            )
        produced = sum(p.numel() for module in producers for p in module.parameters())
        produced += sum(p.numel() for v in entry.vectors for p in layer.get_submodule(v.name).parameters())
        site = Site(
            block=index,
            kind=entry.kind,
            units=units,
            width=columns // units,
            outputs=outputs,
            unit_parameters=(outputs * columns + produced) // units,
            heads=heads,
            choices=(units,) if entry.fixed else None,
        )
        parts = [part for p, each in zip(entry.producers, rows, strict=True) for part in p.stretches(site, each)]
        inputs = linear_shape(producers[0])[1]
        return replace(site, linears=(*(part * inputs for part in parts), outputs * columns))

    @cached_property
    def families(self) -> dict[str, SublayerEntry]:
        """Sublayer entry of each family of sites, whose `widths` are the fields of the stock config."""
        return {entry.family: entry for entries in self.entries for entry in entries}

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
        return [name for _, e in self.places(index) for name in (*(p.name for p in e.producers), e.consumer)]

    def block(self, index: int) -> nn.Module:
        """Return a block on the meta device."""
        return self._templates[index]

    def module(self, index: int, name: str) -> nn.Module:
        """Return a module of a block, on the meta device."""
        return self._templates[index].get_submodule(name)

    def all_sites(self) -> list[Site]:
        return [site for index in range(len(self)) for site in self.sites(index)]

    def block_names(self, index: int) -> dict[str, str]:
        """Return a mapping from tensor names inside the block to names in the checkpoint."""
        prefix = f"{self.architecture.blocks}.{index}."
        return {name: self.stored_name(prefix + name) for name in self._templates[index].state_dict()}

    def stored_name(self, name: str) -> str:
        stored = name
        for ours, theirs in self.architecture.stored:
            stored = stored.replace(ours, theirs)
        return name if name in self.checkpoint or stored not in self.checkpoint else stored

    @cached_property
    def renamed(self) -> list[tuple[str, str]]:
        """Substrings of tensor names that differ in this checkpoint: (in the model, in the checkpoint)."""
        names = [*self.checkpoint]
        return [pair for pair in self.architecture.stored if any(pair[1] in f".{name}" for name in names)]

    def block_parameters(self, index: int | None = None) -> int:
        """Return the number of parameters of one block, or of all blocks if `index` is None."""
        layers = self._templates if index is None else [self._templates[index]]
        return sum(p.numel() for layer in layers for p in layer.parameters())

    def embed_names(self) -> list[str]:
        """Return the checkpoint's names of the tensors before the blocks."""
        return [name for *_, name in self._leaves(self._embed)]

    def head_names(self) -> list[str]:
        """Return the checkpoint's names of the tensors after the blocks; a tied head is not included."""
        names = [name for *_, name in self._leaves(self._after)]
        return [name for name in names if name != self._head_weight or not self.tied]

    def parameters(self) -> int:
        """Return the number of parameters of the model; a tied head counts once."""
        outside = {*self.embed_names(), *self.head_names()}
        return self.block_parameters() + sum(self.checkpoint[name].numel for name in outside)

    def forward_operations(self, sequences: int, length: int) -> int:
        """Return the floating-point operations of a forward pass over `sequences` of `length` tokens, in the convention of `maths.flops`.

        Two per weight and token of each linear, plus the two attention products over all pairs of tokens. The head runs on all
        tokens of a sequence except the last, which predicts nothing.
        """
        linears = sum(_matrix_elements(layer) for layer in self._templates)
        linears -= round(sum((1 - site.share) * sum(site.linears) for site in self.all_sites()))
        mixing = sum(4 * length * site.columns for site in self.all_sites() if site.kind == "attention")
        head = sum(_matrix_elements(module) for module in self._after.values())
        return sequences * (length * (2 * linears + mixing) + (length - 1) * 2 * head)

    def announce_block(self, index: int) -> None:
        """Ask the kernel to read ahead what `read_block` will read."""
        for full in self.block_names(index).values():
            self.checkpoint.announce(full)

    def read_block(self, index: int) -> dict[str, Tensor]:
        """Read the tensors of a block to host memory, in the stored dtype, by name inside the block."""
        return {name: self.checkpoint.read(full, self.device) for name, full in self.block_names(index).items()}

    def build_block(self, index: int, weights: dict[str, Tensor], there: Mapping[str, Tensor] | None = None) -> Block:
        """Build a block from the result of `read_block`; `there` has copies of weights that are already on the device, by name."""
        entries, places = self.entries[index], iter(self.places(index))
        layer = Layer(copy.deepcopy(self._templates[index]), weights, entries, self.device, self.dtype, there or {})
        sublayers = []
        for entry in entries:
            number = len(layer.experts) if entry.experts else 1
            sublayers.append(Sublayer(layer, entry, [next(places) for _ in range(number)]))
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
            attention = upstream.eager_attention(self._base.config) if maps else nullcontext()
            # Not counted, because results are cached and a repeat depends on earlier calls.
            with attention, counted(0), self._filled(self._embed, self._blank):
                self._embedded(torch.zeros((sequences, tokens), dtype=torch.int64, device=self.device), past)
            given = [slot.arguments.get("position_embeddings") or () for slot in self._slots]
            # Blocks of the same kind share their tables.
            if not all(all_finite(table) for table in {table for tables in given for table in tables}):
                raise NumericalError(
                    f"{self.checkpoint.directory}: the rotary embedding of positions {past} to {past + tokens - 1} holds "
                    f"NaN or Inf{advice(self.dtype)}"
                )
            self._arguments[key] = [slot.arguments for slot in self._slots]
            while len(self._arguments) > 4:
                self._arguments.popitem(last=False)
        return self._arguments[key]

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
            families = {name: e for name, e in self.families.items() if any(s.family == name for s in sites)}
            return is_stock(
                self.architecture.model_type, families, self.checkpoint.config, [site.keeping(units), *others]
            )

        if site.choices is not None:
            return site.choices
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
        if not getattr(self.config, "tie_word_embeddings", False):
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
        for template, entries, arguments in zip(self._templates, self.entries, self.arguments(1, 1), strict=True):
            dtype = next(template.parameters()).dtype
            given = {name: _moved(value, meta, dtype) for name, value in arguments.items()}
            # Routing depends on values, which meta tensors do not have.
            experts = {entry.experts: template.get_submodule(entry.experts) for entry in entries if entry.experts}
            try:
                for name in experts:
                    template.set_submodule(name, Routed())
                template(torch.empty((1, 1, self.width), device=meta, dtype=dtype), **given)
            finally:
                for name, module in experts.items():
                    template.set_submodule(name, module)
        dtype = next(self._after[self.architecture.head].parameters()).dtype
        self._logits(torch.empty((1, 1, self.width), device=meta, dtype=dtype))

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

    def _read(self, name: str) -> Tensor:
        if name == self._head_weight and self.tied:
            name = self._embedding_weight
        return self.checkpoint.read(name).to(self.device, self.dtype)

    def _blank(self, name: str) -> Tensor:
        """Return zeros of a tensor's shape, expanded from one element so that they take no memory."""
        return torch.zeros((), device=self.device, dtype=self.dtype).expand(self.checkpoint[name].shape)

    @contextmanager
    def _filled(self, modules: dict[str, nn.Module], source: Callable[[str], Tensor]) -> Iterator[None]:
        names = self._leaves(modules)
        before = [module.get_parameter(leaf).detach() for module, leaf, _ in names]
        try:
            for module, leaf, name in names:
                place(module, leaf, source(name))
            yield
        finally:
            for (module, leaf, _), tensor in zip(names, before, strict=True):
                place(module, leaf, tensor)

    def _separate_experts(self) -> None:
        """Replace fused experts by separate modules, after checking their number against the shards."""
        counted = 0
        for template, entries in zip(self._templates, self.entries, strict=True):
            for name in (entry.experts for entry in entries if entry.experts):
                experts: Any = template.get_submodule(name)
                held = len(experts) if isinstance(experts, Experts) else experts.down_proj.shape[0]
                counted += held
                if counted > len(self.checkpoint):
                    raise CheckpointError(
                        f"{self.checkpoint.directory}/config.json: {counted} experts or more; the shards hold "
                        f"{len(self.checkpoint)} tensors"
                    )
                chosen = self.config.num_experts_per_tok
                if not 1 <= chosen <= held:
                    raise CheckpointError(
                        f"{self.checkpoint.directory}/config.json: num_experts_per_tok is {chosen}; it must be 1 to {held}"
                    )
                if not isinstance(experts, Experts):
                    separate_experts(template, name)

    def _leaves(self, modules: dict[str, nn.Module]) -> list[tuple[nn.Module, str, str]]:
        """Return the tensors of modules: module, name inside it, and name in the checkpoint."""
        return [
            (module, leaf, self.stored_name(f"{path}.{leaf}"))
            for path, module in modules.items()
            for leaf in module.state_dict()
        ]

    def layout_faults(self) -> Iterator[tuple[str, str]]:
        """Yield tensors that are missing, or whose shape differs from the config: name, and what is wrong."""
        expected = self._expected()
        # `tied` compares a stored head with the embedding, so it needs both.
        if (self._head_weight not in self.checkpoint or self._embedding_weight in self.checkpoint) and self.tied:
            expected.pop(self._head_weight)
        for name, shape in expected.items():
            if name not in self.checkpoint:
                yield name, f"is missing; the {self.architecture.model_type} model that the config describes has it"
            elif self.checkpoint[name].shape != shape:
                yield name, f"has shape {list(self.checkpoint[name].shape)}; the config says {list(shape)}"

    def extra(self) -> list[str]:
        """Return tensors that the config's model does not have, except the unused buffers of old checkpoints."""
        expected = self._expected()
        return [name for name in self.checkpoint if name not in expected and not name.endswith(UNREAD)]

    def _expected(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all tensors that the config implies, by stored name; the head is always included."""
        expected: dict[str, tuple[int, ...]] = {}
        for index, layer in enumerate(self._templates):
            state = layer.state_dict()
            expected |= {full: tuple(state[name].shape) for name, full in self.block_names(index).items()}
        for modules in (self._embed, self._after):
            for module, leaf, name in self._leaves(modules):
                expected[name] = tuple(module.state_dict()[leaf].shape)
        return expected


def open_skeleton(model: Path, device: torch.device, dtype: str, *, layout: Layout = FREE) -> Skeleton:
    """Open the skeleton of a checkpoint directory. `dtype` is the name of the computing dtype, see `resolve_dtype`."""
    checkpoint = Checkpoint(model)
    return Skeleton(checkpoint, device=device, dtype=resolve_dtype(dtype, device, checkpoint.dtype), layout=layout)


def _present(model: nn.Module, paths: tuple[str, ...]) -> dict[str, nn.Module]:
    """Return the modules at `paths`, by path, except those that the config omits."""
    found = {}
    for path in paths:
        parent, _, leaf = path.rpartition(".")
        module = getattr(model.get_submodule(parent), leaf)
        if module is not None:
            found[path] = module
    return found


def _moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Move an argument of a block to a device, and floating-point tensors to a dtype; other values are unchanged."""
    if isinstance(value, tuple):
        return tuple(_moved(each, device, dtype) for each in value)
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else None)


def _matrix_elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.dim() == 2)
