"""What a model weighs with other widths: its weights in each format, and the memory that a runtime needs beside them.

`plan`, `run --fit` and reports share this arithmetic. It reads shapes only, so it can weigh results before they exist.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from ..errors import ConfigError
from ..system.units import format_bytes
from . import fp8
from .block import is_linear, linear_shape
from .formats import FORMATS, Format, Model, Role, Weight, gguf_total
from .site import Site, routed
from .skeleton import Skeleton

CONTEXT = 8192
"""Tokens of the cache by default."""
CACHED = 2
"""Bytes of a number in the cache of keys and values: 16 bits, as runtimes keep it unless told otherwise."""
BATCH = 512
"""Tokens that a runtime computes at a time: llama.cpp's default."""
RUNTIME = 1 << 29
"""Bytes that a CUDA context and its libraries take."""

_CONSUMERS: Mapping[str, Role] = {"attention": "output", "ffn": "down"}


@dataclass(frozen=True)
class Size:
    """Bytes that a model needs on a card."""

    weights: int
    cache: int
    """Keys and values of one sequence, and states of linear attention."""
    workspace: int
    """Logits and activations of `BATCH` tokens, and `RUNTIME`."""

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.workspace

    def __str__(self) -> str:
        parts = f"{format_bytes(self.weights)} of weights, {format_bytes(self.cache)} of cache"
        return f"{format_bytes(self.total)} ({parts}, {format_bytes(self.workspace)} of workspace)"


@dataclass(frozen=True)
class _Part:
    """A tensor whose extent along `axis` goes with the units of a site; None: it stays as it is."""

    name: str
    weight: Weight
    site: Site | None = None
    axis: int = 0
    goes: Site | None = None
    """The site with whose last unit it goes; None: it stays."""
    experts: Sequence[Site] = ()
    """The routed experts for each of which it has an entry along `axis`; empty: for none."""

    def keeping(self, keeps: Mapping[str, int]) -> list[Weight]:
        """Return what is left of it: nothing if its sublayer is gone."""
        site = self.site
        if self.goes is not None and not keeps.get(self.goes.name, self.goes.units):
            return []
        shape = list(self.weight.shape)
        if site is not None:
            shape[self.axis] = shape[self.axis] // site.units * keeps.get(site.name, site.units)
        if self.experts:
            shape[self.axis] -= sum(not keeps.get(each.name, each.units) for each in self.experts)
        return [Weight(tuple(shape), self.weight.role, self.weight.block)]


class Sizes:
    """Sizes of a model, dense or pruned, with any number of units at its sites.

    In all methods, `keeps` gives units by site name; sites that it does not name keep theirs.
    """

    def __init__(self, skeleton: Skeleton) -> None:
        self.skeleton = skeleton
        self.sites = skeleton.all_sites()
        self._blocks = [list(_parts(skeleton, index)) for index in range(len(skeleton))]
        self._outside = list(_outside(skeleton))
        self._carried = [Weight(skeleton.checkpoint[name].shape) for name in skeleton.carried_names()]
        attention = [site for site in self.sites if site.kind == "attention"]
        self._model = Model(
            depth=len(skeleton),
            tied=skeleton.outside.tied,
            queries=attention[0].heads // attention[0].units if attention else 1,
        )

    def size(self, keeps: Mapping[str, int], format: Format, context: int) -> Size:
        """Return what the model needs with its weights in `format` and a cache of `context` tokens."""
        return Size(self.weights(keeps, format), self.cache(keeps, context), self.workspace(keeps))

    def storable(self, format: Format) -> bool:
        """Whether the model can be stored in `format`: FP8 is not for all."""
        try:
            fp8.check_storable(self.skeleton) if format == "fp8" else None
        except ConfigError:
            return False
        return True

    def weights(self, keeps: Mapping[str, int], format: Format) -> int:
        """Return the bytes of all tensors: blocks, embeddings, head and, except in GGUF files, other towers.

        Raises:
            ConfigError: the format is fp8, which cannot store the model.
        """
        if format in ("bf16", "fp8"):
            found = sum(2 * prod(each.shape) for each in (*self._outside, *self._carried))
            found += sum(2 * prod(each.shape) for each in self._kept(keeps))
            return found - (self._saved(keeps) if format == "fp8" else 0)
        return gguf_total(format, [*self._outside, *self._kept(keeps)], self.model(keeps))

    def in_formats(self, keeps: Mapping[str, int]) -> dict[str, int | None]:
        """Return the bytes of all tensors by format; None where the model cannot be stored so."""
        return {each: self.weights(keeps, each) if self.storable(each) else None for each in FORMATS}

    def model(self, keeps: Mapping[str, int]) -> Model:
        """Return what the types of GGUF tensors depend on."""
        left = routed([site for site in self.sites if keeps.get(site.name, site.units)])
        return replace(self._model, experts=max(map(len, left.values()), default=0))

    def _kept(self, keeps: Mapping[str, int]) -> list[Weight]:
        return [left for parts in self._blocks for part in parts for left in part.keeping(keeps)]

    def _saved(self, keeps: Mapping[str, int]) -> int:
        """Return the bytes by which FP8 values and their scales are smaller than 16 bits."""
        fp8.check_storable(self.skeleton)
        saved = 0
        for index, parts in enumerate(self._blocks):
            shapes = {part.name: left.shape for part in parts for left in part.keeping(keeps)}
            for name in fp8.stored(self.skeleton, index, shapes):
                saved += prod(shapes[name]) - 4 * prod(shapes[name]) // fp8.SIDE**2
        return saved

    def cache(self, keeps: Mapping[str, int], context: int) -> int:
        """Return the bytes of one sequence's cache of `context` tokens: keys and values, within its window if a block has one.

        Latent attention keeps its latents and rotary keys, as llama.cpp and vLLM do, whatever the number of heads. Linear
        attention and state space models keep one state per unit, in float32.
        """
        found = 0
        for index, entries in enumerate(self.skeleton.entries):
            config = self.skeleton.block_config(index)
            latent = getattr(config, "kv_lora_rank", None)
            states = ("linear_key_head_dim", "ssm_state_size", "mamba_d_state")
            state = next((size for name in states if (size := getattr(config, name, 0))), 0)
            window = sliding_window(self.skeleton, index)
            tokens = CACHED * min(context, window or context)
            if self.skeleton.side_inputs[index].shared:
                continue  # its keys and values are another block's
            for site, entry in self.skeleton.places(index):
                units = keeps.get(site.name, site.units)
                if site.kind == "linear":
                    found += 4 * units * site.width * state
                elif site.kind == "attention" and latent and units:
                    found += tokens * (latent + config.qk_rope_head_dim)
                elif site.kind == "attention":
                    heads = site.heads // site.units if entry.repeats else 1
                    found += tokens * 2 * units * heads * site.head_width
            unknown = {entry.kind for entry in entries if entry.consumer is None and not entry.gone}
            if "attention" in unknown or ("block" in unknown and all(entry.kind != "attention" for entry in entries)):
                found += tokens * 2 * _unknown_width(config)
        return found

    def workspace(self, keeps: Mapping[str, int]) -> int:
        """Return the bytes that computing `BATCH` tokens takes in float32, with fused attention, and `RUNTIME`.

        That is logits, or the producers' outputs of the widest sublayer, beside the residual stream.
        """
        widest = self.skeleton.vocabulary
        for site in self.sites:
            inside = sum(weights // site.units for weights in site.linears[:-1]) // self.skeleton.width
            widest = max(widest, inside * keeps.get(site.name, site.units))
        return 4 * BATCH * (widest + self.skeleton.width) + RUNTIME


def sliding_window(skeleton: Skeleton, index: int) -> int | None:
    """Return the number of tokens that a block's attention sees, if fewer than all."""
    config = skeleton.block_config(index)
    kinds = getattr(config, "layer_types", None)
    kind = kinds[index] if kinds else "sliding_attention"
    names = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
    return getattr(config, names.get(kind, ""), None)


def _unknown_width(config: Any) -> int:
    """Return the width of all keys of attention without a site, as configs usually name it."""
    heads = int(getattr(config, "num_attention_heads", 0))
    groups = getattr(config, "num_key_value_heads", None) or heads
    return int(groups * (getattr(config, "head_dim", None) or config.hidden_size // max(1, heads)))


def _outside(skeleton: Skeleton) -> Iterator[Weight]:
    """Yield the tensors before and after the blocks. Embeddings of positions are neither embeddings of tokens nor linears."""
    outside = skeleton.outside
    embed, head = outside.embed_names(), outside.head_names()
    linears = {outside.stored_name(f"{name}.weight") for name in outside.linears}
    roles: dict[str, Role] = {embed[0]: "embedding", **({} if outside.tied else {outside.head_weight: "head"})}
    for name in (*embed, *head):
        yield Weight(skeleton.checkpoint[name].shape, roles.get(name, "linear" if name in linears else "kept"))


def _parts(skeleton: Skeleton, index: int) -> Iterator[_Part]:
    """Yield the tensors of a block, by name inside it."""
    block = skeleton.block(index)
    units: dict[str, tuple[Site | None, int, Role]] = {}
    routing: dict[str, int] = {}
    for entry in skeleton.entries[index]:
        units |= {f"{entry.router}.weight": (None, 0, "kept")} if entry.router else {}
        for part in entry.routing:
            routing |= dict.fromkeys((part.name, f"{part.name}.weight", f"{part.name}.bias"), part.axis)
    places, experts = skeleton.places(index), dict[str, Site]()
    for site, entry in places:
        if site.expert is not None:
            experts[f"{entry.experts}.{site.expert}"] = site
        for producer in (*entry.producers, *entry.vectors):
            leaf = producer.name.rpartition(".")[2]
            role: Role = "linear"
            if site.kind == "attention" and producer in entry.producers:
                fused = len(entry.producers) == 1
                role = "value" if fused or leaf.startswith("v") else "key" if leaf.startswith("k") else "linear"
            names = (producer.name, f"{producer.name}.weight", f"{producer.name}.bias")
            units |= dict.fromkeys(names, (site, 0, role))
        assert entry.consumer is not None
        units[f"{entry.consumer}.weight"] = site, -1, _CONSUMERS.get(site.kind, "linear")
    for name, tensor in block.state_dict().items():
        owner, axis, role = units.get(name, (None, 0, "linear"))
        goes = next((site for site, entry in places if entry.removal and entry.removal.takes(name)), None)
        goes = goes or next((experts[path] for path in _above(name) if path in experts), None)
        shape, module = tuple(tensor.shape), block.get_submodule(name.rpartition(".")[0])
        if name.endswith(".weight") and is_linear(module):
            shape = linear_shape(module)
        if name in routing:
            yield _Part(name, Weight(shape, role, index), axis=routing[name], experts=[*experts.values()])
        else:
            yield _Part(name, Weight(shape, role, index), owner, axis, goes)


def _above(name: str) -> Iterator[str]:
    """Yield the paths of the modules that contain a tensor."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
