"""Run a mixer with random numbers in place of the outputs of its linears, to find which rows belong to a unit.

No weights of linears are needed, so a mixer of any size is tried in milliseconds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Conv1D

from ..maths.refit import unit_columns
from .architectures import SublayerEntry
from .block import StandIn, fresh, linear_shape, place, stand_in
from .modeling_streamprune import count, set_count
from .trace import is_norm
from .upstream import plain_attention

TOKENS = 5
"""Length of the sequence with which mixers are tried."""
_COUNTS = (
    *("num_heads", "num_attention_heads", "num_key_value_heads", "num_kv_heads", "n_heads", "n_head", "split_size"),
    *("num_k_heads", "num_v_heads", "key_dim", "value_dim", "n_groups", "intermediate_size", "conv_dim", "embed_dim"),
)
"""Names of attributes of a mixer, or fields of its config, that may count what is removed."""


class Trial:
    """Runs a sublayer's mixer with random numbers in place of the outputs of its linears.

    Args:
        width: residual width, d.
        arguments: the block's arguments, see `infer`.
    """

    def __init__(self, block: nn.Module, entry: SublayerEntry, width: int, arguments: Mapping[str, Any]) -> None:
        self._block, self._entry, self._width, self._arguments = block, entry, width, arguments
        self._values: dict[str, Tensor] = {}
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

    def _run(
        self,
        change: Callable[[nn.Module], None],
        config: Any,
        units: int = 1,
        kept: Tensor | None = None,
    ) -> Tensor | None:
        """Run a changed copy of the mixer, with the units `kept` (k,) int64; None if it fails.

        Returns the consumer's input (1, TOKENS, n), or the mixer's output if there is no consumer.
        """
        block, entry = copy.deepcopy(self._block), self._entry
        for module in block.modules():
            for leaf, buffer in module._buffers.items():
                module._buffers[leaf] = buffer if buffer is None or buffer.is_meta else buffer.cpu()
        # Widths that do not fit each other end the process in torch's own attention, but raise an error here.
        plain_attention(block)
        change(block)
        vectors = {producer.name: producer for producer in (*entry.producers, *entry.vectors)}
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

        for mixer in entry.mixer:
            for name, module in [*block.get_submodule(mixer).named_modules()]:
                path = f"{mixer}.{name}".rstrip(".")
                if config is not None and hasattr(module, "config"):
                    module.config = config
                if type(module).forward in (nn.Linear.forward, Conv1D.forward):
                    out, read = linear_shape(module)
                    given = self._value(path, (TOKENS, out))[:, rows(path, out)]
                    block.set_submodule(path, _Given(given, read))
                elif path in vectors and is_norm(module) and entry.kind != "linear":
                    (size,) = next(module.parameters()).shape
                    block.set_submodule(path, _Scaled(self._value(path, (size,))[rows(path, size)]))
                else:
                    for leaf, parameter in module._parameters.items():
                        if parameter is not None:
                            own = f"{path}.{leaf}"
                            value = self._value(own, tuple(parameter.shape))
                            named = path if path in vectors else own
                            place(module, leaf, value[rows(named, len(value))] if value.dim() else value)
        u = self._value("", (1, TOKENS, self._width))
        passed = fresh({name: self._arguments[key] for name, key in entry.arguments if key in self._arguments})
        try:
            with torch.no_grad():
                for number, mixer in enumerate(entry.mixer):
                    u = block.get_submodule(mixer)(u, **({} if number else passed))
                    u = u[0] if isinstance(u, tuple | list) else u
        except Exception:
            # A mixer may raise anything if its widths do not fit its code.
            return None
        return u

    def _value(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in self._values:
            self._values[name] = torch.rand(shape, generator=self._random) + 0.5
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
