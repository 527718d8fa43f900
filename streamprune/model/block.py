"""One transformer block with its weights, split into sublayers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Conv1D

from ..errors import NumericalError
from ..maths.refit import accumulator, all_finite, unit_columns
from ..maths.sums import Origin
from ..system.host import host_buffer, host_copy
from . import upstream
from .architectures import SublayerEntry
from .modeling_streamprune import Experts, count, remove_sublayer, set_count
from .side_inputs import Part, SideInputs
from .site import Site

Arguments = Mapping[str, Any]  # arguments that the model's forward passes to a block besides the hidden states


class Layer:
    """The modules of a block on the device, in the computing dtype, and master weights on the host, in the stored dtype.

    Args:
        modules: transformers' block on the meta device, with separate experts. Ownership is transferred.
        weights: stored tensors by name inside the block.
        entries: the sublayers of the block.
        there: copies of weights that are already on the device.
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
        # Take the consumers out of the mixers, so that a mixer returns the consumer's input. Experts run separately, on the
        # tokens that the router sends to them.
        apart: dict[str, nn.Module] = {}
        for entry in entries:
            apart |= stand_in(modules, entry.parts)
            single = entry.shared if entry.experts else entry
            if single is not None and single.consumer is not None:
                path, _, leaf = single.consumer.rpartition(".")
                owner = self._find((modules, apart), path)
                apart[single.consumer] = getattr(owner, leaf)
                setattr(owner, leaf, nn.Identity())
            if entry.inner_norm is not None:
                apart[entry.inner_norm] = modules.get_submodule(entry.inner_norm)
                modules.set_submodule(entry.inner_norm, nn.Identity())
        self._modules = modules, apart
        self._stacks: dict[tuple[str, ...], tuple[Tensor, list[nn.Module]]] = {}
        for entry in entries:
            if entry.experts is not None:
                self._put_together(entry.experts)

    def experts(self, name: str) -> Experts:
        """Return the routed experts of a mixture."""
        found = self.module(name)
        assert isinstance(found, Experts)
        return found

    def twin(self) -> Layer:
        """Return a copy that shares all tensors until one of the two replaces them."""
        other = copy.copy(self)
        modules, apart = self._modules
        tensors = [t for module in (modules, *apart.values()) for t in (*module.parameters(), *module.buffers())]
        other._modules = copy.deepcopy(self._modules, {id(tensor): tensor for tensor in tensors})
        other.weights, other._stacks = dict(self.weights), dict(self._stacks)
        return other

    def module(self, name: str) -> nn.Module:
        """Return a module by its original name, including consumers and experts that were taken out."""
        return self._find(self._modules, name)

    @staticmethod
    def _find(held: tuple[nn.Module, Mapping[str, nn.Module]], name: str) -> nn.Module:
        modules, apart = held
        for path in sorted(apart, key=len, reverse=True):
            if name == path or name.startswith(path + "."):
                return apart[path].get_submodule(name[len(path) + 1 :])
        return modules.get_submodule(name)

    def rest(self, silent: Sequence[tuple[str, int]]) -> nn.Module:
        """Return the block with some modules that give zero (see `SublayerEntry.silent`); it shares all others."""
        block = self._modules[0]
        for name, outputs in silent:
            block = _replaced(block, name, Zeros(outputs))
        return block

    def given(self, name: str) -> tuple[Tensor, ...]:
        """Return what the module that stands in at a place was given, and forget it."""
        module = self._modules[0].get_submodule(name)
        assert isinstance(module, StandIn)
        given, module.given = module.given, ()
        return given

    def tensor(self, name: str) -> Tensor:
        """Return a parameter or buffer in the computing dtype."""
        path, _, leaf = name.rpartition(".")
        owner = self.module(path)
        found: Tensor = owner._buffers[leaf] if leaf in owner._buffers else owner._parameters[leaf]  # type: ignore[assignment]
        return found

    def is_buffer(self, name: str) -> bool:
        path, _, leaf = name.rpartition(".")
        return leaf in self.module(path)._buffers

    def scale_count(self, name: str, kept: int, units: int) -> None:
        """Scale an attribute that counts heads, for this block only, from `units` units to `kept`."""
        block = self._modules[0]
        set_count(block, name, count(block, name) // units * kept)

    def remove(self, entry: SublayerEntry) -> None:
        """Let a sublayer go as a whole, with the weights that only served it."""
        modules, apart = self._modules
        assert entry.consumer is not None
        assert entry.removal is not None
        for name in [name for name in apart if name == entry.consumer or entry.removal.takes(name)]:
            modules.set_submodule(name, apart.pop(name))
        self._stacks.clear()
        before = {*modules.state_dict()}
        remove_sublayer(modules, entry.removal.seat, **entry.removal.arguments(entry.kind))
        for name in before - {*modules.state_dict()}:
            del self.weights[name]

    def keep_experts(self, entry: SublayerEntry, kept: Sequence[int]) -> None:
        """Keep only the routed experts `kept`, ascending, of a mixture, and their part of the router. They are renumbered from 0."""
        assert entry.experts is not None
        experts = self.experts(entry.experts)
        for number in range(len(experts)):
            prefix = f"{entry.experts}.{number}."
            for name in [name for name in self.weights if name.startswith(prefix)]:
                tensor = self.weights.pop(name)
                if number in kept:
                    self.weights[f"{entry.experts}.{kept.index(number)}.{name.removeprefix(prefix)}"] = tensor
        self._stacks.clear()
        held = [experts[number] for number in kept]
        del experts[:]
        experts.extend(held)
        for name, axis in self._routing(entry):
            self.set(name, self.weights[name].index_select(axis, torch.tensor(kept)))
        self._count_experts(entry, len(kept))

    @contextmanager
    def routing_among(self, entry: SublayerEntry, kept: Sequence[int]) -> Iterator[None]:
        """Let the router of a mixture choose among the experts `kept`, ascending, and no others. It numbers them from 0."""
        assert entry.experts is not None
        before = [(name, axis, self.tensor(name)) for name, axis in self._routing(entry)]
        index = torch.tensor(kept, device=self.device)
        try:
            for name, axis, tensor in before:
                self.put(name, tensor.index_select(axis, index))
            self._count_experts(entry, len(kept))
            yield
        finally:
            for name, _, tensor in before:
                self.put(name, tensor)
            self._count_experts(entry, len(self.experts(entry.experts)))

    def _routing(self, entry: SublayerEntry) -> list[tuple[str, int]]:
        """Return the tensors with one entry per routed expert, each with the axis of that."""
        return [
            (name, part.axis)
            for part in entry.routing
            for name in (part.name, f"{part.name}.weight", f"{part.name}.bias")
            if name in self.weights
        ]

    def _count_experts(self, entry: SublayerEntry, number: int) -> None:
        for name in entry.routed:
            set_count(self._modules[0], name, number)

    def set(self, name: str, tensor: Tensor) -> None:
        """Replace one tensor. The master is rounded to the stored dtype; the device receives the rounded values."""
        master = self.weights[name] = host_copy(tensor, self.weights[name].dtype)
        self.put(name, self._computing(master))

    def put(self, name: str, tensor: Tensor) -> None:
        """Compute with `tensor` as the parameter `name`, without changing the master."""
        module, _, leaf = name.rpartition(".")
        place(self.module(module), leaf, tensor)
        self._stacks = {names: stack for names, stack in self._stacks.items() if module not in names}

    def linears(self, names: Sequence[str], x: Tensor, sizes: list[int]) -> Tensor:
        """Apply linears of one shape, each to its own rows of `x` (rows, in), `sizes` of them: (rows, out)."""
        stack = self._stacked(tuple(names)) if len(x) else None
        if stack is None:
            parts = zip(names, torch.split(x, sizes), strict=True)
            return torch.cat([self.module(name)(own) for name, own in parts])
        ends = host_buffer(4 * len(sizes), x.device).view(torch.int32).copy_(torch.tensor([*accumulate(sizes)]))
        return F.grouped_mm(x, stack.transpose(1, 2), offs=ends.to(x.device, non_blocking=True))

    def _stacked(self, names: tuple[str, ...]) -> Tensor | None:
        """Return the weights of linears in one tensor, of which theirs become parts; None if they are to run one by one."""
        if names not in self._stacks:
            modules = [self.module(name) for name in names]
            weights: list[Tensor] = [module.get_parameter("weight") for module in modules]
            biased = any(module._parameters.get("bias") is not None for module in modules)
            if biased or any(weight.requires_grad for weight in weights) or not multiplies_groups(weights):
                return None
            stack = torch.stack(weights)
            for name, part in zip(names, stack, strict=True):
                self.put(f"{name}.weight", part)
            self._stacks[names] = stack, modules
        stack, modules = self._stacks[names]
        # A hook expects its own linear to run.
        return None if any(module._forward_hooks or module._forward_pre_hooks for module in modules) else stack

    def _put_together(self, experts: str) -> None:
        """Put the weights of experts into one tensor for each linear, so that twins share them."""
        held = self.experts(experts)
        for name in [name for name, module in held[0].named_children() if is_linear(module)]:
            alike: dict[tuple[int, int], list[str]] = {}
            for number, expert in enumerate(held):
                alike.setdefault(linear_shape(expert.get_submodule(name)), []).append(f"{experts}.{number}.{name}")
            for names in alike.values():
                self._stacked(tuple(names))

    def _computing(self, master: Tensor) -> Tensor:
        if self.device.type == "cpu" and master.dtype != self.dtype:
            return host_copy(master, self.dtype)
        return master.to(self.device, self.dtype, non_blocking=True)


@dataclass(frozen=True)
class Mixed:
    """The inputs of all consumers of one sublayer."""

    z: tuple[Tensor, ...]
    """One per site: (sequences, tokens, n), or (tokens of the expert, n), multiplied by `factors`. Without a site, the output itself."""
    rows: tuple[Tensor, ...] = ()
    """Tokens routed to each expert, (rows,) int64 indices into all tokens of the sequences in order. Other sites see all tokens."""
    factors: tuple[Tensor, ...] = ()
    """In a mixture of experts, what the output of each site is multiplied by: (sequences, tokens, 1) or (rows, 1)."""
    shape: tuple[int, int] = (0, 0)  # (sequences, tokens); only set with experts
    taken: Sequence[tuple[Part, Tensor]] = ()
    """What the mixer put into its arguments for later blocks; see `SideInputs.taken`."""

    def split(self, x: Tensor) -> list[Tensor]:
        """Return the rows of `x` (sequences, tokens, d) that are routed to each site, (rows, d); all of `x` where there is no router."""
        routed = (
            torch.split(x.flatten(0, 1)[torch.cat(self.rows)], [len(rows) for rows in self.rows]) if self.rows else ()
        )
        return [*routed, *[x] * (len(self.z) - len(routed))]

    def origins(self) -> list[Origin | None]:
        """Return where each site's rows come from; None where there is no router."""
        routed = list[Origin | None]()
        if self.rows:
            sequences, tokens = self.shape
            numbers = torch.split(torch.cat(self.rows) // tokens, [len(rows) for rows in self.rows])
            routed = [Origin(each, sequences, sequences * tokens) for each in numbers]
        return [*routed, *[None] * (len(self.z) - len(routed))]


def fresh(arguments: Arguments) -> dict[str, Any]:
    """Return arguments with new mappings: what a block writes to one is for no other block."""
    return {name: copy.copy(value) if isinstance(value, MutableMapping) else value for name, value in arguments.items()}


class StandIn(nn.Module):
    """Takes the place of one part of a mixture: records what it is given, and gives `value` in one entry.

    The other entries of the mixture's output are those of other parts, so that its factor for each part can be read off.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.value, self.given = number, 1.0, tuple[Tensor, ...]()

    def forward(self, hidden_states: Tensor, index: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        self.given = tuple(each for each in (hidden_states, index, weights) if each is not None)
        vector = torch.zeros_like(hidden_states)
        vector[..., self.number] = self.value
        return vector


def stand_in(block: nn.Module, parts: Sequence[str]) -> dict[str, nn.Module]:
    """Replace the parts of a mixture, by name; return them."""
    found = {name: block.get_submodule(name) for name in parts}
    for number, name in enumerate(parts):
        block.set_submodule(name, StandIn(number))
    return found


class _Together(nn.Module):
    """Takes the place of a linear of one expert: that of several, each for its own rows."""

    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


class Zeros(nn.Module):
    """Takes the place of a module: gives zeros of its input's shape, as the first of `outputs` values, or alone if that is 0."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, *arguments: Any, **named: Any) -> Any:
        zeros = torch.zeros_like(next(each for each in (*arguments, *named.values()) if isinstance(each, Tensor)))
        return (zeros, *[None] * (self.outputs - 1)) if self.outputs else zeros


def _replaced(module: nn.Module, name: str, other: nn.Module) -> nn.Module:
    """Return a module that shares everything with another one except the module at a path."""
    found = copy.copy(module)
    leaf, _, path = name.partition(".")
    inner = _replaced(found.get_submodule(leaf), path, other) if path else other
    found._modules = {**module._modules, leaf: inner}
    return found


class Block:
    """One block with its weights, and its sublayers in execution order. It has no reference cycles, so its memory is freed with the
    last reference.
    """

    def __init__(self, layer: Layer, sublayers: list[Sublayer]) -> None:
        self._layer, self.sublayers = layer, sublayers

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """Master weights in the stored dtype, by name inside the block."""
        return self._layer.weights

    def release(self) -> Block:
        """Forget the weights in the stored dtype; return the block, which can then only be run."""
        self._layer.weights.clear()
        return self

    def __call__(self, x: Tensor, arguments: Arguments) -> Tensor:
        """Run the block on the stream: (sequences, tokens, width) → same shape."""
        entered = x
        for sublayer in self.sublayers:
            x = sublayer(x, entered, arguments)
        return x

    @property
    def prunables(self) -> list[Prunable]:
        """The sites with their weights, in execution order."""
        return [prunable for sublayer in self.sublayers for prunable in sublayer.prunables]

    @contextmanager
    def training(self, dtype: torch.dtype) -> Iterator[dict[str, nn.Parameter]]:
        """Yield the block's parameters, except routers, as trainable in `dtype`, by name. At the end they become its weights.

        Raises a NumericalError if a trained weight is not finite in the stored dtype.
        """
        layer, names = self._layer, self._trainable()
        weights = {
            name: nn.Parameter(master.to(layer.device, dtype), requires_grad=name in names)
            for name, master in layer.weights.items()
            if not layer.is_buffer(name)
        }
        for name, weight in weights.items():
            layer.put(name, weight)
        yield {name: weights[name] for name in names}
        self.assign(weights)

    def masters(self, dtype: torch.dtype) -> dict[str, nn.Parameter]:
        """Return copies of the block's matrices, except routers, in `dtype` on the device, by name."""
        weights, device = self.weights, self._layer.device
        matrices = (name for name in self._trainable() if weights[name].dim() == 2)
        return {name: nn.Parameter(weights[name].to(device, dtype, copy=True)) for name in matrices}

    def _trainable(self) -> list[str]:
        routers = tuple(f"{s.entry.router}." for s in self.sublayers if s.entry.router)
        return [name for name in self.weights if not self._layer.is_buffer(name) and not name.startswith(routers)]

    def assign(self, weights: Mapping[str, Tensor]) -> None:
        """Set weights, by name. Raises a NumericalError if one is not finite in its stored dtype."""
        for name, weight in weights.items():
            self._layer.set(name, weight.detach())
            if not all_finite(self.weights[name]):
                raise NumericalError(f"blocks.{self.sublayers[0].block}: {name} is not finite after training")

    def compute_with(self, weights: Mapping[str, Tensor]) -> list[nn.Parameter]:
        """Compute with other values of parameters from now on, given by name; the block's own weights do not change.

        Returns them in the computing dtype, in the same order; gradients flow to these.
        """
        layer = self._layer
        leaves = {name: nn.Parameter(layer._computing(weight.detach())) for name, weight in weights.items()}
        for name, leaf in leaves.items():
            layer.put(name, leaf)
        return [*leaves.values()]

    def updates(self, rank: int, dtype: torch.dtype, generator: torch.Generator) -> dict[str, nn.Parameter]:
        """Create trainable low-rank updates ``W + U V`` for all linears, by ``name.u`` and ``name.v``, on the device.

        LoRA (Hu et al. 2021), section 4.1: our `U` (out, r), zero, is their B; our `V` (r, in), random, is their A. Entries of V have
        variance 1/in, and there is no scaling factor. `rank` is r, capped at the smaller side of each `W`.
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
        """Compute with ``W + U V``, differentiable in `updates`, while the context is open. The weights do not change.

        `keep_zeros` leaves zero entries of W at zero.
        """

        def hook(u: Tensor, v: Tensor, mask: Tensor | None) -> Any:
            def add(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
                x = inputs[0].to(v.dtype)
                change = x @ v.T @ u.T if mask is None else x @ ((u @ v) * mask).T
                return output + change.to(output.dtype)

            return add

        with ExitStack() as hooks:
            for prunable, name in self._linears():
                mask = prunable.weight(name) != 0 if keep_zeros else None
                change = hook(updates[f"{name}.u"], updates[f"{name}.v"], mask)
                hooks.enter_context(self._layer.module(name).register_forward_hook(change))
            yield

    @torch.no_grad()
    def absorb(self, updates: Mapping[str, Tensor], *, keep_zeros: bool = False) -> None:
        """Set the weights to ``W + U V``, as in `updated`. Masters are rounded to their stored dtype, in which they must be finite."""
        for prunable, name in self._linears():
            change, weight = updates[f"{name}.u"] @ updates[f"{name}.v"], prunable.weight(name)
            prunable.set_weight(name, weight.to(change.dtype) + (change * (weight != 0) if keep_zeros else change))

    @contextmanager
    def frozen(self, dtype: torch.dtype) -> Iterator[None]:
        """Compute with the master weights, converted to `dtype`, while the context is open."""
        layer = self._layer
        for name, master in layer.weights.items():
            layer.put(name, master.to(layer.device, dtype))
        yield
        for name, master in layer.weights.items():
            layer.put(name, layer._computing(master))

    @contextmanager
    def reading(self, read: Callable[[str, Tensor], None]) -> Iterator[None]:
        """Call `read(name, x)` with what each linear reads, (..., columns), while the context is open."""

        def hook(name: str) -> Any:
            return lambda module, inputs: read(name, inputs[0])

        with ExitStack() as hooks:
            for name in [name.removesuffix(".weight") for name in self.weights if name.endswith(".weight")]:
                if is_linear(module := self._layer.module(name)):
                    hooks.enter_context(module.register_forward_pre_hook(hook(name)))
            yield

    def _linears(self) -> Iterator[tuple[Prunable, str]]:
        for prunable in self.prunables:
            for name in (*prunable.producers, prunable.consumer):
                yield prunable, name

    def twin(self) -> Block:
        """Return a copy that shares all tensors until one of the two replaces them."""
        layer = self._layer.twin()
        sublayers = [
            Sublayer(layer, s.entry, [(p.site, p.entry) for p in s.prunables], s.block, s.side) for s in self.sublayers
        ]
        return Block(layer, sublayers)


class Sublayer:
    """One or more sites with their norms and mixer (see `architectures`).

    Each of `places` is a site and an entry whose names are relative to the block.
    """

    def __init__(
        self,
        layer: Layer,
        entry: SublayerEntry,
        places: Sequence[tuple[Site, SublayerEntry]],
        block: int,
        side: SideInputs,
    ) -> None:
        self.layer, self.block, self.side = layer, block, side
        self.prunables = [Prunable(layer, own, site, number) for number, (site, own) in enumerate(places)]
        self._take(entry)

    def _take(self, entry: SublayerEntry) -> None:
        self.entry = entry
        self._norm, self._branch_norm, self._sum_norm = (
            self.layer.module(name) if name else None for name in (entry.norm, entry.branch_norm, entry.sum_norm)
        )
        by_block = entry.whole or entry.silent
        self._mixer = [self.layer.rest(entry.silent)] if by_block else [self.layer.module(name) for name in entry.mixer]
        self._joint_norm = self.layer.module(entry.joint_norm) if entry.joint_norm else None

    def __call__(self, x: Tensor, entered: Tensor, arguments: Arguments) -> Tensor:
        """Return the stream after this sublayer, given the stream before it and the block's input; all (sequences, tokens, width)."""
        source = self.source(x, entered)
        return self.output(x, self.mix(self.normed(source), self.given(source, arguments)))

    @property
    def name(self) -> str:
        return f"blocks.{self.block}.{self.entry.kind}"

    def given(self, x: Tensor, arguments: Arguments) -> Arguments:
        """Return the block's arguments for `mix`, with what the stream `x` (sequences, tokens, width) holds of them."""
        found = self.side.arguments(x, arguments)
        return {"hidden_states": self.side.hidden(x), **found} if self.entry.silent and not self.entry.whole else found

    def source(self, x: Tensor, entered: Tensor) -> Tensor:
        """Return what the sublayer reads: the stream before it or, if parallel, the block's input."""
        return entered if self.entry.parallel else x

    def normed(self, x: Tensor) -> Tensor:
        """Return the input of the producers from the stream: (sequences, tokens, width) → (sequences, tokens, d)."""
        x = self.side.hidden(x)
        u = x if self._norm is None else self._norm(x)
        return u if self.entry.factor == 1.0 else u * self.entry.factor

    def mix(
        self,
        u: Tensor,
        arguments: Arguments,
        chosen: Sequence[int] | None = None,
        among: Sequence[int] | None = None,
    ) -> Mixed:
        """Compute the inputs of the consumers from the input `u` (sequences, tokens, d) of the producers.

        Args:
            arguments: those that `given` returns.
            chosen: the experts to run; the inputs of the others are empty. Not together with `among`.
            among: the experts that the router may choose, ascending; None for all.
        """
        assert chosen is None or among is None
        given = fresh(arguments)
        if self.entry.whole:
            return Mixed((_first(self._mixer[0](u, **given)),), taken=self.side.taken(arguments, given))
        shape = u.shape[0], u.shape[1]
        with nullcontext() if among is None else self.layer.routing_among(self.entry, among):
            if self.entry.silent:
                self._mixer[0](given.pop("hidden_states"), **given)
                mixed = u.new_ones(*shape, 1)  # the block uses the experts' output as it is
            else:
                mixed = _first(self._mixer[0](u, **self._passed(given)))
        for module in self._mixer[1:]:
            mixed = module(mixed)
        if self.entry.experts is None:
            return Mixed((mixed.view(*shape, -1),), taken=self.side.taken(arguments, given))
        # See `StandIn`.
        routed, *shared = torch.split(mixed.flatten(0, -2)[:, : len(self.entry.parts)], 1, dim=1)
        called, number = self.layer.given(self.entry.experts), len(self.layer.experts(self.entry.experts))
        tokens, read, weights, sizes = _routed(called, number if among is None else len(among), chosen)
        if among is not None:
            found = dict(zip(among, sizes, strict=True))
            sizes = [found.get(each, 0) for each in range(number)]
        weights = weights * routed[tokens]
        rows, factors = torch.split(tokens, sizes), [*torch.split(weights, sizes)]
        z = self._run_experts(read, weights, sizes)
        if self.entry.shared is not None:
            name = self.entry.shared.mixer[0]
            (read,) = (u,) if self.entry.beside else self.layer.given(name)
            factors.append(u.new_ones(*shape, 1) if self.entry.beside else shared[0].view(*shape, 1))
            wanted = chosen is None or len(z) in chosen
            z.append(self.layer.module(name)(read).view(*shape, -1) * factors[-1] if wanted else u.new_empty(0))
        return Mixed(tuple(z), rows, tuple(factors), shape)

    def _passed(self, arguments: Arguments) -> dict[str, Any]:
        """Return the arguments of the first mixer besides its input."""
        return {name: arguments[given] for name, given in self.entry.arguments if given in arguments}

    def produce(self, u: Tensor, arguments: Arguments) -> tuple[Mixed, list[list[Tensor]]]:
        """Like `mix`, but also return the outputs of each site's producers: (sequences, tokens, rows), or (tokens of the expert, rows)."""
        given: dict[str, Tensor] = {}
        with ExitStack() as hooks:
            for name in (name for prunable in self.prunables for name in prunable.producers):

                def keep(module: nn.Module, inputs: Any, output: Tensor, name: str = name) -> None:
                    given[name] = output

                hooks.enter_context(self.layer.module(name).register_forward_hook(keep))
            mixed = self.mix(u, arguments)
        return mixed, [[given[name] for name in prunable.producers] for prunable in self.prunables]

    def attend(self, u: Tensor, arguments: Arguments) -> Tensor:
        """Compute attention maps: (sequences, tokens, d) → (sequences, heads, tokens, tokens), rows sum to 1.

        `u` is the input of the producers, `arguments` a result of `Skeleton.arguments` with ``maps=True``, with side inputs.
        """
        assert self.entry.kind == "attention"
        with upstream.eager_attention(self._mixer[0].config):
            maps: Tensor = self._mixer[0](u, **self._passed(fresh(arguments)))[1]
        return maps

    def consume(self, mixed: Mixed) -> Tensor:
        """Return the output of the consumers, summed over experts: (sequences, tokens, d)."""
        if not self.prunables:
            return mixed.z[0]
        if not mixed.rows:
            return self.prunables[0].consume(mixed.z[0])
        total: Tensor | None = None
        for numbers in self._alike():
            parts = [mixed.z[number] for number in numbers]
            names = [self.prunables[number].consumer for number in numbers]
            o = self.layer.linears(names, torch.cat(parts), [len(part) for part in parts])
            if self.prunables[numbers[0]].bias(names[0]) is not None:
                o = o + torch.cat([self.prunables[number].bias_lacking(mixed.factors[number]) for number in numbers])
            if total is None:
                total = o.new_zeros(mixed.shape[0] * mixed.shape[1], o.shape[1])
            total = total.index_add_(0, torch.cat([mixed.rows[number] for number in numbers]), o)
        assert total is not None
        if len(mixed.rows) < len(self.prunables):
            total = total + self.prunables[-1].consume(mixed.z[-1], mixed.factors[-1]).flatten(0, 1)
        return total.view(*mixed.shape, -1)

    def _alike(self) -> list[list[int]]:
        """Return the numbers of the routed experts in runs of one width, which run together: a GPU then starts few kernels."""
        found: dict[int, list[int]] = {}
        for number, prunable in enumerate(self.prunables):
            if prunable.site.expert is not None:
                found.setdefault(prunable.site.columns, []).append(number)
        return [*found.values()]

    def _run_experts(self, read: Tensor, weights: Tensor, sizes: list[int]) -> list[Tensor]:
        """Return the weighted inputs of the routed experts' consumers, (rows, n) each.

        Args:
            read: what they read (rows, d), the rows of the first expert first.
            weights: what multiplies each row (rows, 1).
            sizes: number of rows of each expert.
        """
        assert self.entry.experts is not None
        experts, found = self.layer.experts(self.entry.experts), dict[int, Tensor]()
        for numbers in self._alike():
            own, x, factor = [sizes[number] for number in numbers], read, weights
            if len(numbers) < len(sizes):
                parts = [torch.split(each, sizes) for each in (read, weights)]
                x, factor = (torch.cat([each[number] for number in numbers]) for each in parts)
            run: Any = copy.copy(experts[numbers[0]])
            run._modules = dict(run._modules)
            for name in (name for name, module in run.named_children() if is_linear(module)):
                paths = [f"{self.entry.experts}.{number}.{name}" for number in numbers]
                run._modules[name] = _Together(partial(self.layer.linears, paths, sizes=own))
            found |= zip(numbers, torch.split(run.mix(x) * factor, own), strict=True)
        return [found[number] for number in range(len(sizes))]

    def join(self, x: Tensor, o: Tensor, taken: Iterable[tuple[Part, Tensor]] = ()) -> Tensor:
        """Return the stream after this sublayer (sequences, tokens, width).

        Args:
            x: the stream before it (sequences, tokens, width).
            o: the consumers' output (sequences, tokens, d).
            taken: see `Mixed`.
        """
        if self._branch_norm is not None:
            o = self._branch_norm(o)
        aside = self.side.aside
        if self.entry.aside and aside is not None:
            return self.side.put(x, self.side.hidden(x), [(aside, o), *taken])
        if self._joint_norm is not None and aside is not None:
            o = self._joint_norm(aside.read(x) + o)
        return self.side.put(x, o if self.entry.whole else self._added(self.side.hidden(x), o), taken)

    def _added(self, x: Tensor, o: Tensor) -> Tensor:
        """Return the hidden states `x` (sequences, tokens, d) with what a sublayer gives, `o`, same shape, added."""
        y = x + (o if self.entry.scale == 1.0 else o * self.entry.scale)
        y = y if self._sum_norm is None else self._sum_norm(y)
        return y if self.entry.sum_scale is None else y * self.layer.tensor(self.entry.sum_scale)

    def lacking(self, missing: Tensor) -> Tensor | float:
        """Return the change of the consumers' output that changes the stream by `missing` (sequences, tokens, width).

        Zero if a norm follows the consumer: a change of the norm's output does not translate into a change of its input.
        """
        normed = self._branch_norm is not None or self.entry.aside
        return 0.0 if normed else self.side.hidden(missing) / self.entry.scale

    def output(self, x: Tensor, mixed: Mixed) -> Tensor:
        """Return the stream after this sublayer, given the stream `x` before it and the inputs of the consumers."""
        return self.join(x, self.consume(mixed), mixed.taken)

    def remove(self) -> None:
        """Let the sublayer go as a whole: it adds its consumer's bias to the stream, or nothing."""
        self.prunables = []
        self.layer.remove(self.entry)
        self._take(self.entry.remainder)

    def keep_experts(self, kept: Sequence[int]) -> None:
        """Keep only the routed experts `kept` of a mixture, by their places among `prunables`, ascending. Sites keep their names."""
        self.layer.keep_experts(self.entry, kept)
        shared = [prunable for prunable in self.prunables if prunable.site.expert is None]
        self.prunables = [
            Prunable(self.layer, self.entry.expert(new), self.prunables[old].site, self.prunables[old].number)
            for new, old in enumerate(kept)
        ] + shared

    def release(self) -> None:
        """Free the weights of the mixers, consumers and experts. The sublayer cannot run afterwards."""
        shared = self.entry.shared.mixer if self.entry.shared else ()
        parts = (*self.entry.mixer, *self.entry.parts, *shared, *(prunable.consumer for prunable in self.prunables))
        inside = tuple(f"{part}." if part else "" for part in parts)
        for name in [name for name in self.layer.weights if name.startswith(inside)]:
            self.layer.put(name, torch.empty(0, device="meta"))
            del self.layer.weights[name]


class Prunable:
    """A site with the weights of its producers and its consumer. Names in `entry` are relative to the block."""

    def __init__(self, layer: Layer, entry: SublayerEntry, site: Site, number: int) -> None:
        self.layer, self.entry, self.site = layer, entry, site
        self.number = number
        """Position among the sites of its dense sublayer: experts by number, then the shared experts."""
        self.producers = tuple(producer.name for producer in entry.producers)
        assert entry.consumer is not None
        self.consumer = entry.consumer
        self._consumer = layer.module(entry.consumer)

    def consume(self, z: Tensor, factor: Tensor | None = None) -> Tensor:
        """Return the consumer's output; `factor` is what its input was multiplied by, and its bias must be."""
        o: Tensor = self._consumer(z)
        return o if factor is None or self.bias(self.consumer) is None else o + self.bias_lacking(factor)

    def bias_lacking(self, factor: Tensor) -> Tensor:
        """Return what the consumer's output lacks of its bias (rows, d_out), if its input was multiplied by `factor` (rows, 1)."""
        bias = self.bias(self.consumer)
        assert bias is not None
        return (factor - 1) * bias

    def weight(self, name: str) -> Tensor:
        """Return the master weight of a linear (out, in), in float32 (float64 if stored so), on the device."""
        stored = self.layer.weights[f"{name}.weight"].to(self.layer.device)
        return self._turned(name, stored.to(accumulator(stored.dtype)))

    @property
    def stored(self) -> torch.dtype:
        """Stored dtype of the consumer's weight."""
        return self.layer.weights[f"{self.consumer}.weight"].dtype

    def split(self, producer: int, rows: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
        """Split a tensor along `dim`, which is indexed by the rows of a producer, into the producer's parts."""
        return torch.split(rows, self.entry.producers[producer].stretches(self.site.units, rows.shape[dim]), dim=dim)

    def producer_weights(self) -> tuple[Tensor, ...]:
        """Return the master weights of the producers (rows, d), fused ones in their parts; dtype and device as in `weight`."""
        return tuple(part for i, name in enumerate(self.producers) for part in self.split(i, self.weight(name)))

    def set_producer_weights(self, weights: Sequence[Tensor]) -> None:
        """Replace the weights of the producers; same order and shapes as `producer_weights`."""
        parts = iter(weights)
        for producer in self.entry.producers:
            self.set_weight(producer.name, torch.cat([next(parts) for _ in producer.parts or (0,)]))

    def bias(self, name: str) -> Tensor | None:
        """Return the bias of a linear (out,) in the computing dtype, or None."""
        return self.layer.module(name)._parameters.get("bias")

    def set_weight(self, name: str, weight: Tensor) -> None:
        """Replace the weight (out, in) of a linear. Raises a NumericalError if it is not finite in the stored dtype."""
        self.layer.set(f"{name}.weight", self._turned(name, weight).contiguous())
        if not all_finite(self.layer.weights[f"{name}.weight"]):
            raise NumericalError(f"{self.site.name}: the new weights of {name} are not finite in their stored dtype")

    def shrink(self, kept: Tensor, consumer_weight: Tensor) -> None:
        """Keep only the units `kept` (k,) int64, ascending, and set the consumer's weight to `consumer_weight` (d_out, k·width)."""
        site = self.site
        for producer in (*self.entry.producers, *self.entry.vectors):
            for name in (producer.name, f"{producer.name}.weight", f"{producer.name}.bias"):
                if (tensor := self.layer.weights.get(name)) is not None:
                    turned = name != producer.name and isinstance(self.layer.module(producer.name), Conv1D)
                    axis = tensor.dim() - 1 if turned else 0
                    rows = self._rows(producer.stretches(site.units, tensor.shape[axis]), kept.cpu())
                    self.layer.set(name, tensor.index_select(axis, rows))
        self.set_weight(self.consumer, consumer_weight)
        for name in self.entry.counts:
            self.layer.scale_count(name, len(kept), site.units)
        self.site = site.keeping(len(kept))

    def _rows(self, stretches: Sequence[int], kept: Tensor) -> Tensor:
        """Return the rows of a module that stay, part by part."""
        found, start = [], 0
        for rows in stretches:
            found.append(unit_columns(kept, rows // self.site.units) + start)
            start += rows
        return torch.cat(found)

    def _turned(self, name: str, weight: Tensor) -> Tensor:
        """Convert between the layout in which a module holds its weight and (out, in), in either direction."""
        return weight.T if isinstance(self.layer.module(name), Conv1D) else weight


def _routed(
    given: tuple[Tensor, ...], experts: int, chosen: Container[int] | None = None
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Return which tokens go to the experts (rows,) int64, what is read of each (rows, d), their factors (rows, 1), and the number
    of rows of each expert: those of the first come first.

    The tokens of all experts are found at once, so that the host does not wait for a GPU once per expert.

    Args:
        given: what the experts are called with: all tokens (tokens, d), and for each the chosen experts and their weights,
            (tokens, k) each; or all tokens for each expert in turn (experts · tokens, d), zero where they are not routed to it.
        chosen: the experts that are wanted; the others get no tokens. None for all.
    """
    hidden = given[0]
    if len(given) == 1:
        total = len(hidden) // experts
        (places,) = torch.where(hidden.any(-1))
        numbers, tokens = places // total, places % total
        # The mixture adds the outputs for all experts, so that of the stand-in counts several times.
        factors = hidden.new_full((len(tokens), 1), 1 / experts)
    else:
        index, weights = given[1:]
        numbers, order = index.flatten().sort(stable=True)
        places = tokens = order // index.shape[1]
        factors = weights.flatten()[order, None].to(hidden.dtype)
    edges = torch.searchsorted(numbers, torch.arange(experts + 1, dtype=numbers.dtype, device=numbers.device)).tolist()
    own = slice(edges[0], edges[-1])
    tokens, places, factors, sizes = tokens[own], places[own], factors[own], [b - a for a, b in pairwise(edges)]
    if chosen is not None:
        parts = [torch.split(each, sizes) for each in (tokens, places, factors)]
        sizes = [size if number in chosen else 0 for number, size in enumerate(sizes)]
        tokens, places, factors = (
            torch.cat([part[:size] for part, size in zip(each, sizes, strict=True)]) for each in parts
        )
    return tokens, hidden[places], factors, sizes


def has_grouped_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether torch has a kernel that takes many products at once, each with its own rows.

    Elsewhere, `grouped_mm` is a loop that waits for the device: on GPUs other than Hopper and Blackwell for data centres, and for
    dtypes other than bfloat16. Older versions of torch do not have it.
    """
    if (
        not hasattr(F, "grouped_mm")
        or device.type != "cuda"
        or torch.version.hip is not None
        or dtype != torch.bfloat16
    ):
        return False
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] in (9, 10)


def multiplies_groups(weights: Sequence[Tensor]) -> bool:
    """Return whether products with these weights, (out, in) each, are to be taken at once: as many as the kernel takes, and aligned."""
    aligned = all(size * weights[0].element_size() % 16 == 0 for size in weights[0].shape)
    return 1 < len(weights) < 1024 and aligned and has_grouped_products(weights[0].device, weights[0].dtype)


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """Return (out, in) of a linear, whichever way it holds its weight."""
    rows, columns = module.get_parameter("weight").shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def rows_of(block: nn.Module, name: str) -> int:
    """Return the number of outputs of a linear, of entries of a norm, or of rows of a parameter."""
    owner, _, leaf = name.rpartition(".")
    parameter = block.get_submodule(owner)._parameters.get(leaf)
    if parameter is not None:
        return len(parameter)
    module = block.get_submodule(name)
    return linear_shape(module)[0] if is_linear(module) else len(next(module.parameters()))


def _first(output: Any) -> Tensor:
    """Return the hidden states among what a module returns."""
    found: Tensor = output[0] if isinstance(output, tuple | list) else output
    return found


def place(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Set a parameter or buffer to `tensor`, without gradient unless it is a Parameter, and update the widths of a linear."""
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
    if leaf == "weight" and isinstance(owner, nn.Conv1d):  # of one channel each
        owner.in_channels = owner.out_channels = owner.groups = len(tensor)
