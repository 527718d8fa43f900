"""Side inputs: what blocks read of the tokens, or of earlier blocks, besides hidden states.

The stream (sequences, tokens, width) that moves from block to block holds the hidden states in its first d columns and the side inputs
in those after them. So they are stored, resumed and differentiated like hidden states.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """One tensor in the stream."""

    start: int
    """Its first column."""
    shape: tuple[int, ...]
    """Its shape per token."""

    @property
    def columns(self) -> slice:
        return slice(self.start, self.start + prod(self.shape))

    def read(self, x: Tensor) -> Tensor:
        """Return the tensor (sequences, tokens, *shape) from a stream."""
        return x[..., self.columns].view(*x.shape[:-1], *self.shape)


@dataclass(frozen=True)
class Shared:
    """Tensors that a block puts into a mapping for later blocks, such as keys and values: (sequences, heads, tokens, head width) each."""

    argument: str
    """The blocks' argument that is the mapping."""
    key: Any
    parts: tuple[Part, ...]
    """In the stream, (sequences, tokens, heads, head width) each."""


@dataclass(frozen=True)
class SideInputs:
    """What one block finds in the stream besides hidden states, and what it puts there."""

    d: int
    """Residual width."""
    width: int
    """Columns of the stream."""
    given: tuple[tuple[str, Part], ...] = ()
    """Arguments of the block that depend on the tokens."""
    shared: tuple[Shared, ...] = ()
    """What earlier blocks have put into mappings."""
    written: tuple[Shared, ...] = ()
    """What this block puts there."""
    aside: Part | None = None
    """Where a sublayer keeps its output (d,) until the next one adds to it; see `SublayerEntry.aside`."""

    def hidden(self, x: Tensor) -> Tensor:
        """Return the hidden states (..., d) of a stream (..., width)."""
        return x if self.width == self.d else x[..., : self.d]

    def arguments(self, x: Tensor, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the block's arguments with the side inputs in the stream `x` (sequences, tokens, width)."""
        if self.width == self.d:
            return arguments
        found = {**arguments, **{name: part.read(x) for name, part in self.given}}
        for name in {each.argument for each in self.shared}:
            found[name] = copy.copy(found[name])
        for each in self.shared:
            found[each.argument][each.key] = tuple(part.read(x).transpose(1, 2) for part in each.parts)
        return found

    def taken(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[Part, Tensor]]:
        """Return what the block put into its arguments, from before and after: tensors (sequences, tokens, columns), with their places."""
        found = []
        for each in self.written:
            values = after.get(each.argument, {}).get(each.key)
            if values is not before.get(each.argument, {}).get(each.key):
                found += [(p, value.transpose(1, 2).flatten(2)) for p, value in zip(each.parts, values, strict=True)]
        return found

    def put(self, x: Tensor, hidden: Tensor, taken: Iterable[tuple[Part, Tensor]] = ()) -> Tensor:
        """Return the stream `x` (sequences, tokens, width) with other hidden states (sequences, tokens, d), and with what is `taken`."""
        if self.width == self.d:
            return hidden
        pieces, end = [hidden], self.d
        for part, tensor in sorted(taken, key=lambda pair: pair[0].start):
            pieces += [x[..., end : part.start], tensor]
            end = part.columns.stop
        return torch.cat((*pieces, x[..., end:]), dim=-1)


def with_aside(blocks: Sequence[SideInputs]) -> list[SideInputs]:
    """Return the side inputs of all blocks with room for what a sublayer puts aside."""
    d, width = blocks[0].d, blocks[0].width
    return [replace(each, width=width + d, aside=Part(width, (d,))) for each in blocks]


def first(hidden: Tensor, blocks: Sequence[SideInputs], arguments: Sequence[Mapping[str, Any]]) -> Tensor:
    """Return the stream before the first block, from hidden states (sequences, tokens, d) and the arguments of each block."""
    d, width = blocks[0].d, blocks[0].width
    if d == width:
        return hidden
    stream = hidden.new_zeros(*hidden.shape[:-1], width)
    stream[..., :d] = hidden
    for block, given in zip(blocks, arguments, strict=True):
        for name, part in block.given:
            stream[..., part.columns] = given[name].flatten(2)
    return stream
