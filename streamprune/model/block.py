"""One transformer block with real weights, cut into its sublayers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import NumericalError
from ..host import host_copy
from ..maths.linalg import accumulator, unit_columns
from ..site import Site
from .architecture import Architecture, SublayerEntry

Arguments = Mapping[str, Any]
"""What the model's own forward passes to a block besides the hidden states."""


class Layer:
    """Modules on the device in the computing dtype, and masters on the host in the stored dtype.

    Args:
        modules: transformers' block on the meta device; taken over.
        weights: stored tensors by name inside the block.
    """

    def __init__(
        self,
        modules: nn.Module,
        weights: dict[str, Tensor],
        architecture: Architecture,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.device, self.dtype = device, dtype
        self.weights = weights
        for name, tensor in weights.items():
            place(modules, name, self._computing(tensor))
        # The mixers run with their consumer taken out, so that what they return is the consumer's input.
        consumers: dict[str, nn.Module] = {}
        for entry in architecture.sublayers:
            consumers[entry.consumer] = modules.get_submodule(entry.consumer)
            modules.set_submodule(entry.consumer, nn.Identity())
        self._modules = modules, consumers

    def twin(self) -> Layer:
        """A layer of its own that shares every tensor until one of the two replaces it."""
        other = copy.copy(self)
        modules, consumers = self._modules
        tensors = [t for module in (modules, *consumers.values()) for t in (*module.parameters(), *module.buffers())]
        other._modules = copy.deepcopy(self._modules, {id(tensor): tensor for tensor in tensors})
        other.weights = dict(self.weights)
        return other

    def module(self, name: str) -> nn.Module:
        """A module by its own name; consumers are found where they were."""
        modules, consumers = self._modules
        return consumers[name] if name in consumers else modules.get_submodule(name)

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
        for sublayer in self.sublayers:
            x = sublayer(x, arguments)
        return x

    @contextmanager
    def training(self, dtype: torch.dtype) -> Iterator[dict[str, nn.Parameter]]:
        """The block's weights by name as trainable parameters of `dtype`, while open; then they are its weights.

        Raises:
            NumericalError: what came out is not finite in the stored dtype.
        """
        layer = self._layer
        weights = {name: nn.Parameter(master.to(layer.device, dtype)) for name, master in layer.weights.items()}
        for name, weight in weights.items():
            layer.put(name, weight)
        yield weights
        for name, weight in weights.items():
            layer.set(name, weight.detach())
            if not bool(torch.isfinite(layer.weights[name]).all()):
                raise NumericalError(f"{self.sublayers[0].site.name}: {name} is not finite after training")

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
        for sublayer, name in self._linears():
            mask = sublayer.weight(name) != 0 if keep_zeros else None
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
        for sublayer, name in self._linears():
            change, weight = updates[f"{name}.u"] @ updates[f"{name}.v"], sublayer.weight(name)
            sublayer.set_weight(name, weight.to(change.dtype) + (change * (weight != 0) if keep_zeros else change))

    @contextmanager
    def frozen(self, dtype: torch.dtype) -> Iterator[None]:
        """While open, the block computes with its stored weights in `dtype`."""
        layer = self._layer
        for name, master in layer.weights.items():
            layer.put(name, master.to(layer.device, dtype))
        yield
        for name, master in layer.weights.items():
            layer.put(name, layer._computing(master))

    def _linears(self) -> Iterator[tuple[Sublayer, str]]:
        for sublayer in self.sublayers:
            for name in (*(producer.name for producer in sublayer.entry.producers), sublayer.entry.consumer):
                yield sublayer, name

    def twin(self) -> Block:
        """A block of its own that shares every tensor until one of the two replaces it."""
        layer = self._layer.twin()
        return Block(layer, [Sublayer(layer, s.entry, s.site, norm_after=s.norm_after) for s in self.sublayers])


class Sublayer:
    """One site with its norm, mixer and consumer (see `architecture`)."""

    def __init__(self, layer: Layer, entry: SublayerEntry, site: Site, *, norm_after: bool) -> None:
        self.layer, self.entry, self.site, self.norm_after = layer, entry, site, norm_after
        self._norm = layer.module(entry.norm)
        self._consumer = layer.module(entry.consumer)
        self._mixer = [layer.module(name) for name in entry.mixer]

    def __call__(self, x: Tensor, arguments: Arguments) -> Tensor:
        return self.output(x, self.mix(self.normed(x), arguments))

    def normed(self, x: Tensor) -> Tensor:
        """What the producers read: (sequences, tokens, d) → same."""
        return x if self.norm_after else self._norm(x)

    def mix(self, u: Tensor, arguments: Arguments) -> Tensor:
        """The consumer's input: (sequences, tokens, d) → (sequences, tokens, n)."""
        if self.entry.kind == "attention":
            z: Tensor = self._mixer[0](hidden_states=u, **arguments)[0]
            return z
        for module in self._mixer:
            u = module(u)
        return u

    def produce(self, u: Tensor, arguments: Arguments) -> tuple[Tensor, list[Tensor]]:
        """`mix`, and what each producer module gave on the way: (sequences, tokens, rows) each."""
        given: dict[str, Tensor] = {}
        hooks = []
        for producer in self.entry.producers:

            def keep(module: nn.Module, inputs: Any, output: Tensor, name: str = producer.name) -> None:
                given[name] = output

            hooks.append(self.layer.module(producer.name).register_forward_hook(keep))
        try:
            z = self.mix(u, arguments)
        finally:
            for hook in hooks:
                hook.remove()
        return z, [given[producer.name] for producer in self.entry.producers]

    def attend(self, u: Tensor, arguments: Arguments) -> Tensor:
        """Attention maps: (sequences, tokens, d) → (sequences, heads, tokens, tokens), rows summing to 1.

        Args:
            arguments: as `Skeleton.arguments` gives them for ``maps=True``.
        """
        assert self.entry.kind == "attention"
        attention = self._mixer[0]
        config: Any = attention.config
        usual, config._attn_implementation = config._attn_implementation, "eager"
        try:
            maps: Tensor = attention(hidden_states=u, **arguments)[1]
        finally:
            config._attn_implementation = usual
        return maps

    def consume(self, z: Tensor) -> Tensor:
        """The consumer's output: (sequences, tokens, n) → (sequences, tokens, d)."""
        o: Tensor = self._consumer(z)
        return o

    def join(self, x: Tensor, o: Tensor) -> Tensor:
        """The sublayer's output from the residual stream `x` and the consumer's output."""
        y = x + o
        return self._norm(y) if self.norm_after else y

    def output(self, x: Tensor, z: Tensor) -> Tensor:
        """What the sublayer adds to the residual stream `x`, added."""
        return self.join(x, self.consume(z))

    def weight(self, name: str) -> Tensor:
        """The stored weight of one linear, in float32 or better, on the device: (out, in)."""
        stored = self.layer.weights[f"{name}.weight"].to(self.layer.device)
        return self._turned(name, stored.to(accumulator(stored.dtype)))

    def producer_weights(self) -> tuple[Tensor, ...]:
        """The producers' stored weights (rows, d), in float32 or better, on the device; fused ones in their parts."""
        return tuple(part for p in self.entry.producers for part in self.weight(p.name).chunk(p.parts))

    def set_producer_weights(self, weights: Sequence[Tensor]) -> None:
        """Replace what `producer_weights` gave."""
        parts = iter(weights)
        for producer in self.entry.producers:
            self.set_weight(producer.name, torch.cat([next(parts) for _ in range(producer.parts)]))

    def bias(self, name: str) -> Tensor | None:
        """The bias that one linear computes with, where it has one."""
        return self.layer.module(name)._parameters.get("bias")

    def set_weight(self, name: str, weight: Tensor) -> None:
        """Replace the weight (out, in) of one linear.

        Raises:
            NumericalError: not finite, or no longer so in the stored dtype.
        """
        self.layer.set(f"{name}.weight", self._turned(name, weight).contiguous())
        if not bool(torch.isfinite(self.layer.weights[f"{name}.weight"]).all()):
            raise NumericalError(f"{self.site.name}: the new weights of {name} are not finite in their stored dtype")

    def shrink(self, kept: Tensor, consumer_weight: Tensor) -> None:
        """Keep only the units `kept` (k,), ascending; the consumer gets `consumer_weight` (d_out, k·width)."""
        site = self.site
        for producer in self.entry.producers:
            outputs = linear_shape(self.layer.module(producer.name))[0]
            part = outputs // producer.parts
            inside = unit_columns(kept.cpu(), part // site.units)
            rows = torch.cat([inside + start for start in range(0, outputs, part)])
            for leaf in ("weight", "bias"):
                tensor = self.layer.weights.get(f"{producer.name}.{leaf}")
                if tensor is not None:
                    axis = tensor.dim() - 1 if isinstance(self.layer.module(producer.name), Conv1D) else 0
                    self.layer.set(f"{producer.name}.{leaf}", tensor.index_select(axis, rows))
        self.set_weight(self.entry.consumer, consumer_weight)
        for name in self.entry.counts:
            path, _, attribute = name.rpartition(".")
            module = self.layer.module(path)
            setattr(module, attribute, getattr(module, attribute) // site.units * len(kept))
        self.site = site.keeping(len(kept))

    def release(self) -> None:
        """Free the producers and the consumer, once nothing will run through them again."""
        for name in (*(producer.name for producer in self.entry.producers), self.entry.consumer):
            place(self.layer.module(name), "weight", torch.empty(0, device="meta"))

    def _turned(self, name: str, weight: Tensor) -> Tensor:
        """From how a module holds its weight to (out, in), or back."""
        return weight.T if isinstance(self.layer.module(name), Conv1D) else weight


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear, however it holds its weight."""
    rows, columns = module.get_parameter("weight").shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


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
