"""Run a block on the meta device, which computes nothing: to see that it works, and to measure what it costs."""

from __future__ import annotations

import copy
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..maths.flops import FlopCounter, counted
from ..maths.live import FusedAttention, LiveBytes
from .architectures import SublayerEntry
from .block import Arguments, fresh, stand_in
from .experts import experts_of


@dataclass(frozen=True)
class Measured:
    """What the mixer of one sublayer does on one sequence, besides routed experts."""

    operations: int  # floating-point operations
    peak: int  # most bytes of results alive at a time
    total: int  # bytes of all results: at least what a backward pass needs


@dataclass(frozen=True)
class Ran:
    """What a block does on one sequence."""

    products: int  # floating-point operations besides those of its linears
    sublayers: tuple[Measured, ...]


@torch.no_grad()
def run(block: nn.Module, entries: Sequence[SublayerEntry], tokens: int, width: int, arguments: Arguments) -> int:
    """Run a block on the meta device without its experts, on one sequence of `tokens` tokens of the residual `width`.

    Returns the weights of the linears that ran. Settings that the modules cannot run with, such as a factor that is not a number,
    raise torch's own errors.
    """
    meta = torch.device("meta")
    dtype = next((each.dtype for each in block.parameters()), torch.get_default_dtype())  # a block may be empty
    given = {name: moved(value, meta, dtype) for name, value in arguments.items()}
    if any(not buffer.is_meta for buffer in block.buffers()):
        block = copy.deepcopy(block).to(meta)
    # Routing depends on values, which meta tensors do not have. Other modules may read values too.
    apart = stand_in(block, [part for entry in entries for part in entry.parts])
    try:
        block(torch.empty((1, tokens, width), device=meta, dtype=dtype), **fresh(given))
        return matrix_elements(block)
    finally:
        for name, module in apart.items():
            block.set_submodule(name, module)


def measure(
    block: nn.Module, entries: Sequence[SublayerEntry], tokens: int, width: int, arguments: Arguments
) -> Ran | None:
    """Measure a block in such a run; None if it does not run on the meta device, because it reads values of tensors."""
    found = dict[int, Measured]()
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

            first, last = (block.get_submodule(entry.mixer[end]) for end in (0, -1))
            stack.callback(first.register_forward_pre_hook(enter, prepend=True).remove)
            stack.callback(last.register_forward_hook(leave).remove)
        try:
            weights = run(block, entries, tokens, width, arguments)
        except RuntimeError:  # NotImplementedError among them: it reads values of tensors
            return None
    if len(found) < len(entries):
        return None
    return Ran(counter.total - 2 * tokens * weights, tuple(found[number] for number in range(len(entries))))


@torch.no_grad()
def sharing(
    blocks: Sequence[nn.Module], arguments: Sequence[Arguments], tokens: int, width: int
) -> Iterator[tuple[dict[tuple[str, Any], Any], set[tuple[str, Any]]]]:
    """Run blocks one after the other, without their experts; yield what each puts into mappings among its arguments, and reads there.

    Args:
        arguments: of each block, for one sequence of `tokens` tokens. Mappings that several blocks receive are the same object.
        width: residual width, d.

    Yields:
        New values, tuples of tensors on the meta device, by argument and key; arguments and keys that were read.
    """
    meta, copies = torch.device("meta"), dict[int, _Watched]()
    for block, given in zip(blocks, arguments, strict=True):
        dtype, copied = next(block.parameters()).dtype, copy.deepcopy(block).to(meta)
        stand_in(copied, list(experts_of(copied)))
        mappings = {name: value for name, value in given.items() if isinstance(value, MutableMapping)}
        passed = {name: moved(value, meta, dtype) for name, value in given.items() if name not in mappings}
        watched = {name: copies.setdefault(id(value), _Watched(value)) for name, value in mappings.items()}
        before = {name: {**each} for name, each in watched.items()}
        for each in watched.values():
            each.read = set()
        copied(torch.empty((1, tokens, width), device=meta, dtype=dtype), **passed, **watched)
        yield (
            {(n, key): v for n, each in watched.items() for key, v in each.items() if before[n].get(key) is not v},
            {(name, key) for name, each in watched.items() for key in each.read},
        )


class _Watched(dict[Any, Any]):
    """A mapping that notes which keys are read."""

    read: set[Any]

    def __getitem__(self, key: Any) -> Any:
        self.read.add(key)
        return super().__getitem__(key)


def moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Move an argument of a block to a device, and floating-point tensors to a dtype; other values are unchanged."""
    if isinstance(value, tuple):
        return tuple(moved(each, device, dtype) for each in value)
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else None)


def matrix_elements(module: nn.Module) -> int:
    """Return the number of weights in the matrices of a module."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.dim() == 2)
