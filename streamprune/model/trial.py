"""Run a mixer with random numbers in place of the outputs of its linears, to find which rows belong to a unit.

No weights of linears are needed, so a mixer of any size is tried in milliseconds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Conv1D

from ..maths.refit import unit_columns
from .architectures import Producer, SublayerEntry
from .block import StandIn, Zeros, fresh, is_linear, linear_shape, place, stand_in
from .modeling_streamprune import COUNTS_OF_EXPERTS, count, set_count
from .trace import is_norm
from .upstream import plain_attention

TOKENS = 5
"""Length of the sequence with which mixers are tried."""
_COUNTS = (
    *("num_heads", "num_attention_heads", "num_key_value_heads", "num_kv_heads", "n_heads", "n_head", "split_size"),
    *("num_k_heads", "num_v_heads", "key_dim", "value_dim", "n_groups", "intermediate_size", "conv_dim", "embed_dim"),
)
"""Names of attributes of a mixer, or fields of its config, that may count what is removed."""
_GROUPS = (("n_group", "num_group"), ("topk_group",))
"""Names of attributes, or fields, that count groups of experts, and those among which experts are chosen."""
_NEVER = -1000.0
"""What a router holds for an expert that no token may reach: its logit is then so low that its weight is zero."""


class Trial:
    """Runs a sublayer's mixer with random numbers in place of the outputs of its linears.

    Args:
        width: residual width, d.
        arguments: the block's arguments, see `infer`.
    """

    def __init__(self, block: nn.Module, entry: SublayerEntry, width: int, arguments: Mapping[str, Any]) -> None:
        self._block, self._entry, self._width, self._arguments = block, entry, width, arguments
        self._values: dict[str, Tensor] = {}
        self._hidden: dict[str, Tensor] = {}
        """Experts that no token may reach, by name of what has an entry per expert."""
        self._random = torch.Generator().manual_seed(0)

    def removed(self) -> SublayerEntry | None:
        """Return the entry, with the counts that its mixer needs, if the rows of a unit are as it says; None otherwise."""
        entry = self._entry
        columns = linear_shape(self._block.get_submodule(entry.consumer or ""))[1]
        units = columns // entry.width
        config = _Recorded.of(self._block, entry)
        full = self._run(lambda block: None, config)
        if full is None or full.shape[-1] != columns:
            return None
        if units == 1:
            return entry  # nothing can be removed, but the consumer can be refitted
        for counts in self._counts(units, config):

            def shrink(block: nn.Module, counts: tuple[str, ...] = counts) -> None:
                for name in counts:
                    set_count(block, name, count(block, name) // units * (units - 1))

            # Either end, since rows of the last unit alone may seem right if they are grouped in another way.
            if all(
                self._stays(shrink, full, units, kept) for kept in (torch.arange(1, units), torch.arange(units - 1))
            ):
                return replace(entry, counts=counts)
        return None

    def _stays(self, shrink: Callable[[nn.Module], None], full: Tensor, units: int, kept: Tensor) -> bool:
        """Return whether the units `kept` (k,) int64 of the consumer's input `full` are the same without the others."""
        wanted = full.view(*full.shape[:-1], units, self._entry.width)[..., kept, :].flatten(-2)
        found = self._run(shrink, None, units, kept)
        return found is not None and found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)

    def chosen(self) -> int | None:
        """Return the number of experts per token, if a mixture gives the sum of its parts' outputs, each with a factor per token."""
        parts, held = self._entry.parts, list[StandIn]()

        def change(value: float) -> Callable[[nn.Module], None]:
            def put(block: nn.Module) -> None:
                stand_in(block, parts)
                for name in parts:
                    module = block.get_submodule(name)
                    assert isinstance(module, StandIn)
                    module.value = value
                    held.append(module)

            return put

        once, twice = self._run(change(1.0), None), self._run(change(2.0), None)
        if once is None or twice is None or not torch.allclose(2 * once, twice):
            return None
        if bool(once[..., len(parts) :].any()) or not bool(once[..., : len(parts)].any()):
            return None
        hidden, *routing = held[0].given
        if routing:
            return routing[0].shape[-1]
        # Each expert in turn is given all tokens: zeros where they are not routed to it.
        return int(hidden.view(-1, TOKENS, self._width).any(-1).sum(0).max())

    def routing(self, number: int) -> SublayerEntry | None:
        """Return the entry of a mixture of `number` experts with what has one entry per expert; None if they cannot go as a whole.

        Without some experts, the mixture must compute what it computes if their logits are so low that no token reaches them.
        """
        entry, tensors = self._entry, list[Producer]()
        (mixer,) = entry.mixer
        for name, module in self._block.get_submodule(mixer).named_modules(prefix=mixer):
            if any(name == part or name.startswith(f"{part}.") for part in entry.parts):
                continue
            if is_linear(module):
                tensors += [Producer(name)] if linear_shape(module)[0] == number else []
                continue
            for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and tensor.is_floating_point() and number in tensor.shape[:1] + tensor.shape[-1:]:
                    tensors.append(Producer(f"{name}.{leaf}", axis=0 if tensor.shape[0] == number else -1))
        config = _Recorded.of(self._block, entry)
        self._route(config)
        own, read = {}, {}  # attributes of the router's modules, and fields that they read from the config
        for path, module in self._block.get_submodule(mixer).named_modules(prefix=mixer):
            for name in (*COUNTS_OF_EXPERTS, *_GROUPS[0], *_GROUPS[1]):
                own[f"{path}.{name}"] = getattr(module, name, None)
                if hasattr(module, "config") and name in config.read:
                    read[f"{path}.config.{name}"] = getattr(module.config, name, None)
        groups, among = (
            max((each for name, each in (own | read).items() if name.endswith(fields) and type(each) is int), default=1)
            for fields in _GROUPS
        )
        if number % groups:
            return None
        # Routers rank a group by its two best experts.
        least = entry.chosen if groups == 1 else groups * max(2, -(-entry.chosen // among))
        found = replace(entry, routing=tuple(tensors), groups=groups, least=least)
        if number <= least:
            return found  # none can go
        ends = torch.arange(number).view(found.groups, -1)
        for counts in ({}, own, own | read):
            equal = tuple(name for name, each in counts.items() if each == number and name.endswith(COUNTS_OF_EXPERTS))
            trials = (Trial(self._block, found, self._width, self._arguments) for _ in range(2))
            if all(trial._loses(ends[:, end], number, equal) for trial, end in zip(trials, (0, -1), strict=True)):
                return replace(found, routed=equal)
        return None

    def _route(self, config: Any, number: int = 1, kept: Tensor | None = None, counts: Sequence[str] = ()) -> Any:
        """Run the mixture with the experts `kept` (k,) int64 of `number`.

        Returns:
            Its output, and what the routed experts were given: states, the numbers of the chosen experts, and their weights.
        """
        held = list[StandIn]()

        def change(block: nn.Module) -> None:
            stand_in(block, self._entry.parts)
            experts = block.get_submodule(self._entry.parts[0])
            assert isinstance(experts, StandIn)
            held.append(experts)
            for name in counts:
                set_count(block, name, number if kept is None else len(kept))

        output = self._run(change, config, number, kept)
        return None if output is None else (output, *held[0].given)

    def _loses(self, gone: Tensor, number: int, counts: Sequence[str]) -> bool:
        """Return whether a mixture without the experts `gone` (k,) int64 computes what it does if no token can reach them."""
        stays = torch.ones(number, dtype=torch.bool).index_fill_(0, gone, False)
        for tensor in self._entry.routing:
            self._hidden[tensor.name] = gone
        full, less = self._route(None, number), self._route(None, number, stays.nonzero()[:, 0], counts)
        if full is None or less is None:
            return False
        if len(full) == 2:  # each expert in turn is given all tokens
            given = full[1].view(number, -1, full[1].shape[-1])
            left = given[stays].flatten(0, 1)
            # The output of the experts' stand-in counts as often as there are experts.
            same = ((left, less[1]), (full[0][..., 1:], less[0][..., 1:]))
            return not given[~stays].any() and all(
                one.shape == other.shape and torch.allclose(one, other, rtol=1e-4) for one, other in same
            )
        place_of = stays.cumsum(0) - 1
        chosen = full[2]
        return (
            bool(stays[chosen].all())
            and torch.equal(place_of[chosen], less[2])
            and all(torch.allclose(one, other, rtol=1e-4) for one, other in ((full[0], less[0]), (full[3], less[3])))
        )

    def _run(
        self,
        change: Callable[[nn.Module], None],
        config: Any,
        units: int = 1,
        kept: Tensor | None = None,
    ) -> Tensor | None:
        """Run a changed copy of the mixer, or of a block that calls the parts of its mixture itself, with the units `kept` (k,) int64.

        Returns the consumer's input (1, TOKENS, n), or the output if there is no consumer; None if it fails.
        """
        block, entry = copy.deepcopy(self._block), self._entry
        for module in block.modules():
            for leaf, buffer in module._buffers.items():
                module._buffers[leaf] = buffer if buffer is None or buffer.is_meta else buffer.cpu()
        # Widths that do not fit each other end the process in torch's own attention, but raise an error here.
        plain_attention(block)
        change(block)
        mixers = entry.mixer
        if entry.silent:  # the block itself calls the mixture's parts
            mixers = ("",)
            for part, outputs in entry.silent:
                block.set_submodule(part, Zeros(outputs))
        vectors = {each.name: each for each in (*entry.producers, *entry.vectors, *entry.routing)}
        consumer = None if entry.experts else entry.consumer
        for name in (consumer, entry.inner_norm):
            if name is not None:
                block.set_submodule(name, nn.Identity())

        def rows(name: str, total: int) -> Tensor:
            """The rows of a module or parameter that stay."""
            if kept is None or name not in vectors:
                return torch.arange(total)
            found, start = [], 0
            for size in vectors[name].stretches(units, total):
                found.append(unit_columns(kept, size // units) + start)
                start += size
            return torch.cat(found)

        for mixer in mixers:
            for path, module in [*block.get_submodule(mixer).named_modules(prefix=mixer)]:
                if config is not None and hasattr(module, "config"):
                    module.config = config
                if type(module).forward in (nn.Linear.forward, Conv1D.forward):
                    out, read = linear_shape(module)
                    given = self._value(path, (TOKENS, out), 1)[:, rows(path, out)]
                    block.set_submodule(path, _Given(given, read))
                elif path in vectors and is_norm(module) and entry.kind != "linear":
                    (size,) = next(module.parameters()).shape
                    block.set_submodule(path, _Scaled(self._value(path, (size,))[rows(path, size)]))
                else:
                    buffers = {leaf: each for leaf, each in module._buffers.items() if f"{path}.{leaf}" in vectors}
                    for leaf, parameter in (*module._parameters.items(), *buffers.items()):
                        if parameter is not None:
                            own = f"{path}.{leaf}"
                            named = path if path in vectors else own
                            axis = vectors[named].axis if named in vectors else 0
                            value = self._value(own, tuple(parameter.shape), axis, named)
                            if value.dim():
                                value = value.index_select(axis, rows(named, value.shape[axis]))
                            place(module, leaf, value)
        u = self._value("", (1, TOKENS, self._width))
        asked = {name: self._arguments[key] for name, key in entry.arguments if key in self._arguments}
        passed = fresh(self._arguments if entry.silent else asked)
        try:
            with torch.no_grad():
                for number, mixer in enumerate(mixers):
                    u = block.get_submodule(mixer)(u, **({} if number else passed))
                    u = u[0] if isinstance(u, tuple | list) else u
        except Exception:
            # A mixer may raise anything if its widths do not fit its code.
            return None
        return u

    def _value(self, name: str, shape: tuple[int, ...], axis: int = 0, owner: str = "") -> Tensor:
        """Return the random numbers that stand for a tensor; `owner` is what `_hidden` calls it, if not `name`."""
        if name not in self._values:
            value = self._values[name] = torch.rand(shape, generator=self._random) + 0.5
            if (hidden := self._hidden.get(owner or name)) is not None:
                value.index_fill_(axis, hidden, _NEVER)
        return self._values[name]

    def _counts(self, units: int, config: _Recorded) -> list[tuple[str, ...]]:
        """Return the sets of attributes to try that may count what is removed, smallest first."""
        found, last, fields, groups = list[str](), list[str](), list[str](), list[str]()
        for mixer in self._entry.mixer:
            for inner, module in self._block.get_submodule(mixer).named_modules(prefix=mixer):
                for name in _COUNTS:
                    value = getattr(module, name, None)
                    if type(value) is int and value % units == 0:
                        (found if "head" in name else last).append(f"{inner}.{name}")
                    if name in config.read and hasattr(module, "config"):
                        fields.append(f"{inner}.config.{name}")
                # Query heads that read a single key and value, of another block.
                if units > 1 and getattr(module, "num_key_value_groups", None) == units:
                    groups.append(f"{inner}.num_key_value_groups")
        sets = ((), tuple(found), (*found, *last), (*found, *fields), (*found, *last, *fields), tuple(groups))
        return list(dict.fromkeys(sets))


class _Given(nn.Module):
    """Takes the place of a linear: gives the same numbers (TOKENS, rows) whatever it reads."""

    def __init__(self, values: Tensor, columns: int) -> None:
        super().__init__()
        self.values, self.in_features, self.out_features = values, columns, values.shape[1]
        self.weight, self.bias = torch.empty(0), None

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        tokens = x.shape[:-1].numel()
        return self.values[torch.arange(tokens) % TOKENS].view(*x.shape[:-1], -1)


class _Scaled(nn.Module):
    """Takes the place of a norm over several units: only the factors, since removing units changes the norm."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class _Recorded:
    """A config that remembers which fields were read."""

    def __init__(self, config: Any) -> None:
        self.config, self.read = config, set[str]()

    @classmethod
    def of(cls, block: nn.Module, entry: SublayerEntry) -> _Recorded:
        """Return one for the config of a sublayer's mixer."""
        return cls(getattr(block.get_submodule(entry.mixer[0]), "config", None))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "_attn_implementation":
            return "eager"
        self.read.add(name)
        return getattr(self.config, name)
