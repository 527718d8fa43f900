"""A model without its weights: transformers' own modules on the meta device, filled a part at a time.

What surrounds the blocks (embeddings, positions, masks) is computed by the model's own forward with the
blocks taken out of it, so no masking or position code is written again here.
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

from ..errors import CheckpointError, NumericalError, StreamPruneError, one_line
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
        checkpoint: where the weights are.
        device: where blocks go.
        dtype: what they compute in.
        layout: what the widths of its sites must stay like.
        check: whether to refuse what `layout_faults` and `extra` find. transformers passes over tensors that are extra, but
            what is written from this model would lack them.

    Raises:
        CheckpointError: what `read_configuration` refuses, a tensor that is missing, unexpected, or of another
            shape than the config says, and sizes that the shards do not hold.
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
        """Whether the next block's weights come to the device while this one's are used: see `memory.copies_ahead`."""
        self.architecture, self.config = read_configuration(checkpoint)
        self._arguments: OrderedDict[tuple[int, int, int, bool], list[Arguments]] = OrderedDict()
        try:
            self._build(check)
            if check:
                # What the blocks are made of and called with comes from the config too: see that it can be had.
                self.all_sites()
                with counted(0):
                    self._try()
        except StreamPruneError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"{checkpoint.directory}/config.json: transformers cannot build this model ({one_line(error, 400)})"
                f"{upstream.untested()}"
            ) from error

    def _build(self, check: bool) -> None:
        """Take the model apart, on the meta device, and hold it against the shards before anything takes memory."""
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config, trust_remote_code=False).eval()
        self._base = model.get_submodule(self.architecture.base)
        blocks = model.get_submodule(self.architecture.blocks)
        assert isinstance(blocks, nn.ModuleList)
        self._templates: list[nn.Module] = list(blocks.children())
        self.entries = [self.architecture.sublayers(self.config, index) for index in range(len(self._templates))]
        """Each block's sublayers, as the table has them."""
        self._separate_experts()
        self._slots = [upstream.Recorder(template) for template in self._templates]
        model.set_submodule(self.architecture.blocks, nn.ModuleList(self._slots))
        self._embed = _present(model, self.architecture.embed)
        self._after = _present(model, (*self.architecture.final, self.architecture.head))
        for name, what in self.layout_faults() if check else ():
            raise CheckpointError(f"{self.checkpoint.directory}: tensor {name!r} {what}")
        for name in self.extra() if check else ():
            raise CheckpointError(
                f"{self.checkpoint.directory}: tensor {name!r} has no place in the {self.architecture.model_type} model that "
                "the config says; transformers passes over it, but a result would lack it: take it out of the files"
            )
        for name in list(self._after)[:-1]:
            model.set_submodule(name, nn.Identity())
        numbers = sum(buffer.numel() for buffer in model.buffers() if buffer.is_meta)
        weights = sum(entry.numel for entry in self.checkpoint.values())
        if numbers > weights:
            raise CheckpointError(
                f"{self.checkpoint.directory}/config.json: it asks for tables of {numbers} numbers; the model has "
                f"{weights} weights"
            )
        upstream.rebuild_buffers(model, self.config, self.device, self.dtype)
        # What is left of the model is its head, with whatever it does to logits.
        model.set_submodule(self.architecture.base, upstream.PassThrough())
        self._head = model

    def __len__(self) -> int:
        """How many blocks there are."""
        return len(self._templates)

    @property
    def width(self) -> int:
        """Residual width, d."""
        return int(self.config.hidden_size)

    @property
    def vocabulary(self) -> int:
        """Tokens the model knows."""
        return int(self.config.vocab_size)

    @property
    def context(self) -> int | None:
        """Most tokens a window may have, where the config says."""
        value = getattr(self.config, "max_position_embeddings", None)
        return int(value) if value else None

    def sites(self, index: int) -> list[Site]:
        """The block's sites, in the order of its sublayers, and in a mixture of experts in theirs."""
        return [site for site, _ in self.places(index)]

    @property
    def writes_maps(self) -> bool:
        """Whether attention computes its maps in full, since the architecture knows no other way."""
        return upstream.attention(self._base.config) == "eager"

    def places(self, index: int) -> list[tuple[Site, SublayerEntry]]:
        """The block's sites with their names, an expert's in full."""
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
        return [
            (
                replace(site, choices=self._stock_choices(sites, site)) if site.family in self.layout.alike else site,
                entry,
            )
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
            # Beside the queries, producers give a key and a value of one head each unit.
            head = attention.head_dim if hasattr(attention, "head_dim") else attention.head_size
            heads, units = columns // head, (sum(rows) - columns) // (2 * head)
        if units < 1 or any(width % units for width in (columns, *rows)):
            raise CheckpointError(
                f"{self.checkpoint.directory}: {entry.kind} widths {[columns, *rows]} of block {index} do not fall into {units} units"
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
        """What a stock config says of each family of sites."""
        return {entry.family: entry for entries in self.entries for entry in entries}

    def statistics(
        self, index: int, wanted: frozenset[Statistic], device: torch.device | None = None
    ) -> list[SiteStatistics]:
        """Empty sums for a survey of the block, in the order of its sites, on the model's device or another."""
        found = []
        for site, entry in self.places(index):
            inputs = linear_shape(self.module(index, entry.producers[0].name))[1]
            found.append(
                SiteStatistics(
                    wanted,
                    units=site.units,
                    width=site.width,
                    heads=site.heads,
                    inputs=inputs,
                    outputs=site.outputs,
                    rows=[weights // inputs for weights in site.linears[:-1]],
                    device=device or self.device,
                    dtype=accumulator(self.dtype),
                )
            )
        return found

    def linears(self, index: int) -> list[str]:
        """All linears of a block's sites: the producers of each, then its consumer."""
        return [name for _, e in self.places(index) for name in (*(p.name for p in e.producers), e.consumer)]

    def block(self, index: int) -> nn.Module:
        """A block, on the meta device."""
        return self._templates[index]

    def module(self, index: int, name: str) -> nn.Module:
        """A module of a block, on the meta device."""
        return self._templates[index].get_submodule(name)

    def all_sites(self) -> list[Site]:
        """The sites of all blocks."""
        return [site for index in range(len(self)) for site in self.sites(index)]

    def block_names(self, index: int) -> dict[str, str]:
        """Tensor names inside the block → names in the checkpoint."""
        prefix = f"{self.architecture.blocks}.{index}."
        return {name: self.stored_name(prefix + name) for name in self._templates[index].state_dict()}

    def stored_name(self, name: str) -> str:
        """What the checkpoint calls a tensor of the model."""
        stored = name
        for ours, theirs in self.architecture.stored:
            stored = stored.replace(ours, theirs)
        return name if name in self.checkpoint or stored not in self.checkpoint else stored

    @cached_property
    def renamed(self) -> list[tuple[str, str]]:
        """Pieces of the model's names that the checkpoint has otherwise: (the model's, the checkpoint's)."""
        names = [*self.checkpoint]
        return [pair for pair in self.architecture.stored if any(pair[1] in f".{name}" for name in names)]

    def block_parameters(self, index: int | None = None) -> int:
        """Parameters of one block, or of all blocks together."""
        layers = self._templates if index is None else [self._templates[index]]
        return sum(p.numel() for layer in layers for p in layer.parameters())

    def embed_names(self) -> list[str]:
        """Tensors before the blocks, as the checkpoint names them."""
        return self._names(self._embed)

    def head_names(self) -> list[str]:
        """Tensors after the blocks, as the checkpoint names them; a tied head is among the embeddings."""
        return [name for name in self._names(self._after) if name != self._head_weight or not self.tied]

    def parameters(self) -> int:
        """Parameters of the whole model, a tied head counted once."""
        outside = {*self.embed_names(), *self.head_names()}
        return self.block_parameters() + sum(self.checkpoint[name].numel for name in outside)

    def forward_operations(self, sequences: int, length: int) -> int:
        """Floating-point operations of a forward pass through blocks and head, as `maths.operations` counts them.

        Two a weight of each linear and token, and attention's two products over all pairs of tokens; the head
        works on all tokens of a sequence but the last, from which nothing is predicted.
        """
        linears = sum(_matrix_elements(layer) for layer in self._templates)
        linears -= round(sum((1 - site.share) * sum(site.linears) for site in self.all_sites()))
        mixing = sum(4 * length * site.columns for site in self.all_sites() if site.kind == "attention")
        head = sum(_matrix_elements(module) for module in self._after.values())
        return sequences * (length * (2 * linears + mixing) + (length - 1) * 2 * head)

    def announce_block(self, index: int) -> None:
        """Have the kernel fetch what `read_block` will read."""
        for full in self.block_names(index).values():
            self.checkpoint.announce(full)

    def read_block(self, index: int) -> dict[str, Tensor]:
        """The block's stored tensors by their names inside it."""
        return {name: self.checkpoint.read(full, self.device) for name, full in self.block_names(index).items()}

    def build_block(self, index: int, weights: dict[str, Tensor], there: Mapping[str, Tensor] | None = None) -> Block:
        """A block with weights that `read_block` gave; `there` are those of them that have come to the device already."""
        entries, places = self.entries[index], iter(self.places(index))
        layer = Layer(copy.deepcopy(self._templates[index]), weights, entries, self.device, self.dtype, there or {})
        sublayers = []
        for entry in entries:
            number = len(layer.experts) if entry.experts else 1
            sublayers.append(Sublayer(layer, entry, [next(places) for _ in range(number)]))
        return Block(layer, sublayers)

    def arguments(self, sequences: int, tokens: int, past: int = 0, *, maps: bool = False) -> list[Arguments]:
        """What the model's own forward passes to each block for a batch of that size, `past` tokens having gone before.

        Args:
            maps: for `Sublayer.attend`, which needs every mask written out.

        Raises:
            NumericalError: rotary embeddings that hold NaN or Inf. Attention itself may give finite numbers from them.
        """
        key = sequences, tokens, past, maps
        if key not in self._arguments:
            attention = upstream.eager_attention(self._base.config) if maps else nullcontext()
            # Not counted, since whether it is done again depends on what was asked for before.
            with attention, counted(0), self._filled(self._embed, self._blank):
                self._embedded(torch.zeros((sequences, tokens), dtype=torch.int64, device=self.device), past)
            self._check_rotation(tokens, past)
            self._arguments[key] = [slot.arguments for slot in self._slots]
            while len(self._arguments) > 4:
                self._arguments.popitem(last=False)
        return self._arguments[key]

    def _check_rotation(self, tokens: int, past: int) -> None:
        """Hold what the slots were called with last to cosines and sines that are numbers."""
        given = [slot.arguments.get("position_embeddings") or () for slot in self._slots]
        # Blocks of one kind are given the same ones.
        for table in {id(table): table for tables in given for table in tables}.values():
            if not all_finite(table):
                raise NumericalError(
                    f"{self.checkpoint.directory}: the rotary embedding of positions {past} to {past + tokens - 1} holds "
                    f"NaN or Inf{advice(self.dtype)}"
                )

    @contextmanager
    def embedding(self, past: int = 0) -> Iterator[Callable[[Tensor], Tensor]]:
        """Token ids (sequences, tokens) after `past` others → the first block's input (sequences, tokens, d), while open."""
        with self._filled(self._embed, self._read):
            yield partial(self._embedded, past=past)

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """The last block's output (..., d) → logits (..., vocabulary), while open."""
        with self._filled(self._after, self._read):
            yield self._logits

    @cache  # noqa: B019 - a handful of entries, for as long as the skeleton lives
    def _stock_choices(self, sites: tuple[Site, ...], site: Site) -> tuple[int, ...]:
        """Unit counts of that site's family that a stock config can say, the other sites being as they are."""

        def sayable(units: int) -> bool:
            others = [other for other in sites if other.family != site.family]
            families = {name: e for name, e in self.families.items() if any(s.family == name for s in sites)}
            return is_stock(
                self.architecture.model_type, families, self.checkpoint.config, [site.keeping(units), *others]
            )

        if site.choices is not None:
            return site.choices
        # An FFN is as wide as it likes wherever its width can be said at all.
        if site.kind == "ffn":
            return tuple(range(1, site.units + 1)) if sayable(1) else (site.units,)
        return tuple(units for units in range(1, site.units + 1) if units == site.units or sayable(units))

    @property
    def _head_weight(self) -> str:
        return self.stored_name(f"{self.architecture.head}.weight")

    @cached_property
    def tied(self) -> bool:
        """Whether the head is the embedding. A head that is stored besides and differs is not, as in transformers."""
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
        """Run one token through every block and the head on the meta device, where nothing is computed, nor counted.

        What their modules cannot be called with, such as a factor that is no number, raises here whatever torch raises.
        """
        meta = torch.device("meta")
        for template, entries, arguments in zip(self._templates, self.entries, self.arguments(1, 1), strict=True):
            dtype = next(template.parameters()).dtype
            given = {name: _moved(value, meta, dtype) for name, value in arguments.items()}
            # How many tokens an expert gets is a matter of numbers.
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
        """Zeros of a tensor's shape that take no memory."""
        return torch.zeros((), device=self.device, dtype=self.dtype).expand(self.checkpoint[name].shape)

    @contextmanager
    def _filled(self, modules: dict[str, nn.Module], source: Callable[[str], Tensor]) -> Iterator[None]:
        names = [
            (module, leaf, self.stored_name(f"{path}.{leaf}"))
            for path, module in modules.items()
            for leaf in module.state_dict()
        ]
        before = [module.get_parameter(leaf).detach() for module, leaf, _ in names]
        try:
            for module, leaf, name in names:
                place(module, leaf, source(name))
            yield
        finally:
            for (module, leaf, _), tensor in zip(names, before, strict=True):
                place(module, leaf, tensor)

    def _separate_experts(self) -> None:
        """Give every expert modules of its own, unless they are more than the shards have tensors, or fewer than chosen."""
        counted = 0
        for template, entries in zip(self._templates, self.entries, strict=True):
            for name in (entry.experts for entry in entries if entry.experts):
                experts: Any = template.get_submodule(name)
                held = len(experts) if isinstance(experts, Experts) else experts.down_proj.shape[0]
                counted += held
                if counted > len(self.checkpoint):
                    raise CheckpointError(
                        f"{self.checkpoint.directory}/config.json: it says {counted} experts or more; the shards hold "
                        f"{len(self.checkpoint)} tensors"
                    )
                chosen = self.config.num_experts_per_tok
                if type(chosen) is not int or not 1 <= chosen <= held:
                    raise CheckpointError(
                        f"{self.checkpoint.directory}/config.json: num_experts_per_tok is {str(chosen)[:40]}; it must be "
                        f"1 to {held}, the number of experts"
                    )
                if not isinstance(experts, Experts):
                    separate_experts(template, name)

    def _names(self, modules: dict[str, nn.Module]) -> list[str]:
        return [self.stored_name(f"{path}.{leaf}") for path, module in modules.items() for leaf in module.state_dict()]

    def layout_faults(self) -> Iterator[tuple[str, str]]:
        """Tensors that are missing, or of another shape than the config says: name, and what is wrong with it."""
        expected = self._expected()
        # To tell a head that is stored from the embedding takes both.
        if (self._head_weight not in self.checkpoint or self._embedding_weight in self.checkpoint) and self.tied:
            expected.pop(self._head_weight)
        for name, shape in expected.items():
            if name not in self.checkpoint:
                yield name, f"is missing; the config says a {self.architecture.model_type} model that has it"
            elif self.checkpoint[name].shape != shape:
                yield name, f"has shape {list(self.checkpoint[name].shape)}; the config says {list(shape)}"

    def extra(self) -> list[str]:
        """Tensors that the model of the config has no place for, but for the buffers that old checkpoints carry."""
        expected = self._expected()
        return [name for name in self.checkpoint if name not in expected and not name.endswith(UNREAD)]

    def _expected(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors that the config says, by stored name, the head's among them whether tied or not."""
        expected: dict[str, tuple[int, ...]] = {}
        for index, layer in enumerate(self._templates):
            state = layer.state_dict()
            expected |= {full: tuple(state[name].shape) for name, full in self.block_names(index).items()}
        for path, module in {**self._embed, **self._after}.items():
            expected |= {
                self.stored_name(f"{path}.{leaf}"): tuple(tensor.shape) for leaf, tensor in module.state_dict().items()
            }
        return expected


def open_skeleton(model: Path, device: torch.device, dtype: str, *, layout: Layout = FREE) -> Skeleton:
    """The skeleton of a checkpoint directory, computing in `dtype` (``auto``: see `resolve_dtype`)."""
    checkpoint = Checkpoint(model)
    return Skeleton(checkpoint, device=device, dtype=resolve_dtype(dtype, device, checkpoint.dtype), layout=layout)


def _present(model: nn.Module, paths: tuple[str, ...]) -> dict[str, nn.Module]:
    """Those modules that the config did not leave out."""
    found = {}
    for path in paths:
        parent, _, leaf = path.rpartition(".")
        module = getattr(model.get_submodule(parent), leaf)
        if module is not None:
            found[path] = module
    return found


def _moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """An argument of a block, whatever it is; tensors, and tuples of them, elsewhere, floats in that dtype."""
    if isinstance(value, tuple):
        return tuple(_moved(each, device, dtype) for each in value)
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else None)


def _matrix_elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.dim() == 2)
