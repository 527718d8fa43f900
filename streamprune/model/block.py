"""One transformer block with real weights, cut into its sublayers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Conv1D

from ..errors import NumericalError
from ..maths.refit import accumulator, all_finite, unit_columns
from ..system.host import host_copy
from . import upstream
from .architectures import SublayerEntry
from .modeling_streamprune import Experts, count, set_count
from .site import Site

Arguments = Mapping[str, Any]
"""What the model's own forward passes to a block besides the hidden states."""


class Layer:
    """Modules on the device in the computing dtype, and masters on the host in the stored dtype.

    Args:
        modules: transformers' block on the meta device, with experts apart; taken over.
        weights: stored tensors by name inside the block.
        entries: what the block is made of.
        there: those of the weights that are on the device already.
    """

    def __init__(
        self,
        modules: nn.Module,
        weights: dict[str, Tensor],
        entries: Sequence[SublayerEntry],
        device: torch.device,
        dtype: torch.dtype,
        there: Mapping[str, Tensor],
    ) -> None:
        self.device, self.dtype = device, dtype
        self.weights = weights
        for name, tensor in weights.items():
            place(modules, name, there[name].to(dtype) if name in there else self._computing(tensor))
        # The mixers run with their consumer taken out, so that what they return is the consumer's input; experts
        # are run by themselves, on the tokens that the router sends them.
        apart: dict[str, nn.Module] = {}
        for entry in entries:
            name, stand_in = (entry.experts, Routed()) if entry.experts else (entry.consumer, nn.Identity())
            apart[name] = modules.get_submodule(name)
            modules.set_submodule(name, stand_in)
        self._modules = modules, apart

    @property
    def experts(self) -> Experts:
        """The block's experts, where it has some."""
        return next(module for module in self._modules[1].values() if isinstance(module, Experts))

    def twin(self) -> Layer:
        """A layer of its own that shares every tensor until one of the two replaces it."""
        other = copy.copy(self)
        modules, apart = self._modules
        tensors = [t for module in (modules, *apart.values()) for t in (*module.parameters(), *module.buffers())]
        other._modules = copy.deepcopy(self._modules, {id(tensor): tensor for tensor in tensors})
        other.weights = dict(self.weights)
        return other

    def module(self, name: str) -> nn.Module:
        """A module by its own name; what was taken out is found where it was."""
        modules, apart = self._modules
        for path, module in apart.items():
            if name == path or name.startswith(path + "."):
                return module.get_submodule(name[len(path) + 1 :])
        return modules.get_submodule(name)

    def count(self, name: str) -> int:
        """An attribute that counts heads."""
        value: int = count(self._modules[0], name)
        return value

    def set_count(self, name: str, value: int) -> None:
        """Set it, for this block alone."""
        set_count(self._modules[0], name, value)

    def set(self, name: str, tensor: Tensor) -> None:
        """Replace one tensor: the master is rounded to the stored dtype, the device gets what it holds."""
        master = self.weights[name] = host_copy(tensor, self.weights[name].dtype)
        self.put(name, self._computing(master))

    def put(self, name: str, tensor: Tensor) -> None:
        """Compute with `tensor` under that name; the master stays."""
        module, _, leaf = name.rpartition(".")
        place(self.module(module), leaf, tensor)

    def _computing(self, master: Tensor) -> Tensor:
        if self.device.type == "cpu" and master.dtype != self.dtype:
            return host_copy(master, self.dtype)
        return master.to(self.device, self.dtype, non_blocking=True)


@dataclass(frozen=True)
class Mixed:
    """The consumers' inputs of one sublayer."""

    z: tuple[Tensor, ...]
    """A site's each: (sequences, tokens, n); of experts (their tokens, n), times the router's weight."""
    rows: tuple[Tensor, ...] | None = None
    """Which tokens each expert got, of all sequences' one after the other; None where all sites get all."""
    shape: tuple[int, int] = (0, 0)
    """Sequences and tokens, with experts."""

    def of(self, number: int, x: Tensor) -> Tensor:
        """The rows of `x` (sequences, tokens, d) that a site gets; all of it where there is no router."""
        return x if self.rows is None else x.flatten(0, 1)[self.rows[number]]

    def sequences(self, number: int) -> Tensor | None:
        """Of each row of an expert's, the sequence that it is from."""
        return None if self.rows is None else self.rows[number] // self.shape[1]


class Routed(nn.Module):
    """Stands where experts stood: keeps what the router sends them."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        self.sent = [(hidden_states, top_k_index, top_k_weights)]
        return hidden_states


class Block:
    """One block with real weights. Nothing in it refers back to it, so it goes when the last user lets go.

    Args:
        layer: its modules and weights.
        sublayers: in the order in which they run.
    """

    def __init__(self, layer: Layer, sublayers: list[Sublayer]) -> None:
        self._layer, self.sublayers = layer, sublayers

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """Masters by their names inside the block."""
        return self._layer.weights

    def __call__(self, x: Tensor, arguments: Arguments) -> Tensor:
        """The block's output: (sequences, tokens, d) → same."""
        entered = x
        for sublayer in self.sublayers:
            x = sublayer(x, entered, arguments)
        return x

    @property
    def prunables(self) -> list[Prunable]:
        """The sites with their weights, in order."""
        return [prunable for sublayer in self.sublayers for prunable in sublayer.prunables]

    @contextmanager
    def training(self, dtype: torch.dtype) -> Iterator[dict[str, nn.Parameter]]:
        """The block's weights by name, routers' left out, as trainable parameters of `dtype`, while open; then they are its weights.

        Raises:
            NumericalError: what came out is not finite in the stored dtype.
        """
        layer = self._layer
        routers = tuple(f"{s.entry.router}." for s in self.sublayers if s.entry.router)
        weights = {name: nn.Parameter(master.to(layer.device, dtype)) for name, master in layer.weights.items()}
        for name, weight in weights.items():
            layer.put(name, weight)
        trained = {name: weight for name, weight in weights.items() if not name.startswith(routers)}
        for name in weights.keys() - trained.keys():
            weights[name].requires_grad_(False)
        yield trained
        for name, weight in weights.items():
            layer.set(name, weight.detach())
            if not all_finite(layer.weights[name]):
                raise NumericalError(f"{self.prunables[0].site.name}: {name} is not finite after training")

    def updates(self, rank: int, dtype: torch.dtype, generator: torch.Generator) -> dict[str, nn.Parameter]:
        """Low-rank updates of all linears, for training: ``W + U V``, `U` (out, r) zero and `V` (r, in) random.

        LoRA (Hu et al. 2021), section 4.1: U is their B, V their A; entries of V have variance 1/in, and there is no
        further factor.

        Args:
            rank: r, at the most: a smaller side of `W` takes its place.

        Returns:
            By ``name.u`` and ``name.v``, on the device.
        """
        found = {}
        for _, name in self._linears():
            rows, columns = linear_shape(self._layer.module(name))
            r = min(rank, rows, columns)
            v = torch.randn(r, columns, generator=generator, dtype=torch.float64) / columns**0.5
            found[f"{name}.u"] = nn.Parameter(torch.zeros(rows, r, device=self._layer.device, dtype=dtype))
            found[f"{name}.v"] = nn.Parameter(v.to(self._layer.device, dtype))
        return found

    @contextmanager
    def updated(self, updates: Mapping[str, nn.Parameter], *, keep_zeros: bool = False) -> Iterator[None]:
        """While open, the block computes with ``W + U V``, differentiably in `updates`; its weights stay.

        Args:
            keep_zeros: where W is zero, nothing is added.
        """

        def hook(u: Tensor, v: Tensor, mask: Tensor | None) -> Any:
            def add(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
                x = inputs[0].to(v.dtype)
                change = x @ v.T @ u.T if mask is None else x @ ((u @ v) * mask).T
                return output + change.to(output.dtype)

            return add

        hooks = []
        for prunable, name in self._linears():
            mask = prunable.weight(name) != 0 if keep_zeros else None
            change = hook(updates[f"{name}.u"], updates[f"{name}.v"], mask)
            hooks.append(self._layer.module(name).register_forward_hook(change))
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()

    @torch.no_grad()
    def absorb(self, updates: Mapping[str, Tensor], *, keep_zeros: bool = False) -> None:
        """Make ``W + U V`` the weights, as in `updated`; the masters are rounded to their stored dtype.

        Raises:
            NumericalError: what came out is not finite in the stored dtype.
        """
        for prunable, name in self._linears():
            change, weight = updates[f"{name}.u"] @ updates[f"{name}.v"], prunable.weight(name)
            prunable.set_weight(name, weight.to(change.dtype) + (change * (weight != 0) if keep_zeros else change))

    @contextmanager
    def frozen(self, dtype: torch.dtype) -> Iterator[None]:
        """While open, the block computes with its stored weights in `dtype`."""
        layer = self._layer
        for name, master in layer.weights.items():
            layer.put(name, master.to(layer.device, dtype))
        yield
        for name, master in layer.weights.items():
            layer.put(name, layer._computing(master))

    def _linears(self) -> Iterator[tuple[Prunable, str]]:
        for prunable in self.prunables:
            for name in (*prunable.producers, prunable.consumer):
                yield prunable, name

    def twin(self) -> Block:
        """A block of its own that shares every tensor until one of the two replaces it."""
        layer = self._layer.twin()
        return Block(
            layer, [Sublayer(layer, s.entry, [(p.site, p.entry) for p in s.prunables]) for s in self.sublayers]
        )


class Sublayer:
    """One or more sites with their norms and mixer (see `architectures`).

    Args:
        places: its sites, each with its names in full.
    """

    def __init__(self, layer: Layer, entry: SublayerEntry, places: Sequence[tuple[Site, SublayerEntry]]) -> None:
        self.layer, self.entry = layer, entry
        self.prunables = [Prunable(layer, own, site) for site, own in places]
        self._norm, self._branch_norm, self._sum_norm = (
            layer.module(name) if name else None for name in (entry.norm, entry.branch_norm, entry.sum_norm)
        )
        self._mixer = [layer.module(name) for name in entry.mixer]

    def __call__(self, x: Tensor, entered: Tensor, arguments: Arguments) -> Tensor:
        """The stream behind it, from the stream `x` before it and what entered the block."""
        return self.output(x, self.mix(self.normed(self.source(x, entered)), arguments))

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"blocks.{self.prunables[0].site.block}.{self.entry.kind}"

    def source(self, x: Tensor, entered: Tensor) -> Tensor:
        """Which of the two it reads: the stream before it, or what entered the block."""
        return entered if self.entry.parallel else x

    def normed(self, x: Tensor) -> Tensor:
        """What the producers read: (sequences, tokens, d) → same."""
        return x if self._norm is None else self._norm(x)

    def mix(self, u: Tensor, arguments: Arguments, chosen: Sequence[int] | None = None) -> Mixed:
        """The consumers' inputs: (sequences, tokens, d) → (sequences, tokens, n) each, or an expert's tokens.

        Args:
            chosen: experts to run; the others' places are empty.
        """
        if self.entry.kind == "attention":
            return Mixed((self._mixer[0](hidden_states=u, **arguments)[0],))
        shape = u.shape[0], u.shape[1]
        for module in self._mixer:
            u = module(u)
        if self.entry.experts is None:
            return Mixed((u,))
        routed = self._mixer[0].get_submodule(self.entry.experts.removeprefix(f"{self.entry.mixer[0]}."))
        assert isinstance(routed, Routed)
        ((hidden, index, weights),) = routed.sent
        routed.sent = []
        z, rows = [], []
        for number, expert in enumerate(self.layer.experts):
            tokens, rank = torch.where(index == number)
            if chosen is not None and number not in chosen:
                tokens, rank = tokens[:0], rank[:0]
            run: Any = expert
            z.append(run.mix(hidden[tokens]) * weights[tokens, rank, None].to(hidden.dtype))
            rows.append(tokens)
        return Mixed(tuple(z), tuple(rows), shape)

    def produce(self, u: Tensor, arguments: Arguments) -> tuple[Mixed, list[list[Tensor]]]:
        """`mix`, and what each site's producers gave on the way: (sequences, tokens, rows), or an expert's tokens, each."""
        given: dict[str, Tensor] = {}
        hooks = []
        names = [name for prunable in self.prunables for name in prunable.producers]
        for name in names:

            def keep(module: nn.Module, inputs: Any, output: Tensor, name: str = name) -> None:
                given[name] = output

            hooks.append(self.layer.module(name).register_forward_hook(keep))
        try:
            mixed = self.mix(u, arguments)
        finally:
            for hook in hooks:
                hook.remove()
        return mixed, [[given[name] for name in prunable.producers] for prunable in self.prunables]

    def attend(self, u: Tensor, arguments: Arguments) -> Tensor:
        """Attention maps: (sequences, tokens, d) → (sequences, heads, tokens, tokens), rows summing to 1.

        Args:
            arguments: as `Skeleton.arguments` gives them for ``maps=True``.
        """
        assert self.entry.kind == "attention"
        with upstream.eager_attention(self._mixer[0].config):
            maps: Tensor = self._mixer[0](hidden_states=u, **arguments)[1]
        return maps

    def consume(self, mixed: Mixed) -> Tensor:
        """The consumers' output: (sequences, tokens, d)."""
        if mixed.rows is None:
            o: Tensor = self.prunables[0].consume(mixed.z[0])
            return o
        given = [prunable.consume(z) for prunable, z in zip(self.prunables, mixed.z, strict=True)]
        total = given[0].new_zeros(mixed.shape[0] * mixed.shape[1], given[0].shape[1])
        for tokens, each in zip(mixed.rows, given, strict=True):
            total.index_add_(0, tokens, each)
        return total.view(*mixed.shape, -1)

    def join(self, x: Tensor, o: Tensor) -> Tensor:
        """The stream behind it, from the stream `x` before it and the consumers' output."""
        if self._branch_norm is not None:
            o = self._branch_norm(o)
        y = x + (o if self.entry.scale == 1.0 else o * self.entry.scale)
        return y if self._sum_norm is None else self._sum_norm(y)

    def lacking(self, missing: Tensor) -> Tensor | float:
        """What the consumers' output would have to gain for the stream to gain `missing`.

        Nothing where a norm stands between the two: no gain of its input is a given gain of its output.
        """
        return 0.0 if self._branch_norm is not None else missing / self.entry.scale

    def output(self, x: Tensor, mixed: Mixed) -> Tensor:
        """What the sublayer adds to the residual stream `x`, added."""
        return self.join(x, self.consume(mixed))

    def release(self) -> None:
        """Free the producers and the consumers, once nothing will run through them again."""
        for prunable in self.prunables:
            for name in (*prunable.producers, prunable.consumer):
                place(self.layer.module(name), "weight", torch.empty(0, device="meta"))
                self.layer.weights.pop(f"{name}.weight", None)  # a fused one is several sites'


class Prunable:
    """A site with the weights of its producers and its consumer.

    Args:
        entry: its names in full.
    """

    def __init__(self, layer: Layer, entry: SublayerEntry, site: Site) -> None:
        self.layer, self.entry, self.site = layer, entry, site
        self.producers = tuple(producer.name for producer in entry.producers)
        self.consumer = entry.consumer
        self._consumer = layer.module(entry.consumer)

    def consume(self, z: Tensor) -> Tensor:
        """The consumer's output: (..., n) → (..., d)."""
        o: Tensor = self._consumer(z)
        return o

    def weight(self, name: str) -> Tensor:
        """The stored weight of one linear, in float32 or better, on the device: (out, in)."""
        stored = self.layer.weights[f"{name}.weight"].to(self.layer.device)
        return self._turned(name, stored.to(accumulator(stored.dtype)))

    @property
    def stored(self) -> torch.dtype:
        """What the consumer's weight is stored in."""
        return self.layer.weights[f"{self.consumer}.weight"].dtype

    def split(self, producer: int, rows: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
        """What belongs to each part of a producer, where its rows lie along `dim`."""
        return torch.split(rows, self.entry.producers[producer].stretches(self.site, rows.shape[dim]), dim=dim)

    def producer_weights(self) -> tuple[Tensor, ...]:
        """The producers' stored weights (rows, d), in float32 or better, on the device; fused ones in their parts."""
        return tuple(part for i, name in enumerate(self.producers) for part in self.split(i, self.weight(name)))

    def set_producer_weights(self, weights: Sequence[Tensor]) -> None:
        """Replace what `producer_weights` gave."""
        parts = iter(weights)
        for producer in self.entry.producers:
            self.set_weight(producer.name, torch.cat([next(parts) for _ in producer.parts]))

    def bias(self, name: str) -> Tensor | None:
        """The bias that one linear computes with, where it has one."""
        return self.layer.module(name)._parameters.get("bias")

    def set_weight(self, name: str, weight: Tensor) -> None:
        """Replace the weight (out, in) of one linear.

        Raises:
            NumericalError: not finite, or no longer so in the stored dtype.
        """
        self.layer.set(f"{name}.weight", self._turned(name, weight).contiguous())
        if not all_finite(self.layer.weights[f"{name}.weight"]):
            raise NumericalError(f"{self.site.name}: the new weights of {name} are not finite in their stored dtype")

    def shrink(self, kept: Tensor, consumer_weight: Tensor) -> None:
        """Keep only the units `kept` (k,), ascending; the consumer gets `consumer_weight` (d_out, k·width)."""
        site = self.site
        for producer in (*self.entry.producers, *self.entry.vectors):
            for leaf in ("weight", "bias"):
                tensor = self.layer.weights.get(f"{producer.name}.{leaf}")
                if tensor is not None:
                    axis = tensor.dim() - 1 if isinstance(self.layer.module(producer.name), Conv1D) else 0
                    rows = self._rows(producer.stretches(site, tensor.shape[axis]), kept.cpu())
                    self.layer.set(f"{producer.name}.{leaf}", tensor.index_select(axis, rows))
        self.set_weight(self.consumer, consumer_weight)
        for name in self.entry.counts:
            self.layer.set_count(name, self.layer.count(name) // site.units * len(kept))
        self.site = site.keeping(len(kept))

    def _rows(self, stretches: Sequence[int], kept: Tensor) -> Tensor:
        """Which rows of a module stay, part after part."""
        found, start = [], 0
        for rows in stretches:
            found.append(unit_columns(kept, rows // self.site.units) + start)
            start += rows
        return torch.cat(found)

    def _turned(self, name: str, weight: Tensor) -> Tensor:
        """From how a module holds its weight to (out, in), or back."""
        return weight.T if isinstance(self.layer.module(name), Conv1D) else weight


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear, however it holds its weight."""
    rows, columns = module.get_parameter("weight").shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def module_rows(module: nn.Module) -> int:
    """Outputs of a linear, or entries of a norm."""
    weight = module.get_parameter("weight")
    return linear_shape(module)[0] if weight.dim() == 2 else len(weight)


def place(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor where a parameter or buffer of that name stands, without gradient; linears learn their widths."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._buffers:
        owner._buffers[leaf] = tensor
        return
    owner._parameters[leaf] = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
    if leaf == "weight" and tensor.dim() == 2:
        if isinstance(owner, nn.Linear):
            owner.out_features, owner.in_features = tensor.shape
        elif isinstance(owner, Conv1D):
            owner.nx, owner.nf = tensor.shape
