"""A prunable place: one consumer linear with its producers, as plain data.

Heads and channels are one problem: which column groups of the consumer's `W` to drop. A *unit* is what
goes as one: an FFN channel, or an attention key/value group with its query heads. Unit `u` owns the
consumer's columns ``[u·width, (u+1)·width)`` and, of a producer with `r` rows a unit, rows
``[u·r, (u+1)·r)``. Removing it from both sides leaves the residual width untouched.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["attention", "ffn"]


@dataclass(frozen=True)
class Site:
    """One prunable place of one block."""

    block: int
    kind: Kind
    units: int
    """How many units there are."""
    width: int
    """Consumer columns a unit."""
    outputs: int
    """Rows of the consumer: the residual width."""
    unit_parameters: int
    """Weights and biases that go with one unit, on both sides."""
    heads: int = 0
    """Query heads, for attention."""
    choices: tuple[int, ...] | None = None
    """Unit counts that the layout asked for can express, ascending; None for all from 1 to `units`."""
    linears: tuple[int, ...] = ()
    """Weights of each linear, the producers in order, a fused one in its parts, and the consumer last."""
    expert: int | None = None
    """Which of the block's experts it is, in a mixture of them."""
    share: float = 1.0
    """Of the tokens, how many reach it: fewer than all where a router sends them."""

    @property
    def name(self) -> str:
        """`blocks.3.attention`, `blocks.3.ffn.5`: how plans, reports and messages call it."""
        return f"blocks.{self.block}.{self.place}"

    @property
    def place(self) -> str:
        """`attention`, `ffn`, `ffn.5`: the name inside the block."""
        return self.kind if self.expert is None else f"{self.kind}.{self.expert}"

    @property
    def family(self) -> str:
        """Sites of one family are alike in what a stock config says of them."""
        return self.kind if self.expert is None else "experts"

    def keeping(self, units: int) -> Site:
        """The site with so many units."""
        linears = tuple(weights // self.units * units for weights in self.linears)
        return replace(self, units=units, heads=self.heads // self.units * units, linears=linears)

    @property
    def columns(self) -> int:
        """Consumer columns, n."""
        return self.units * self.width

    @property
    def head_width(self) -> int:
        """Columns of one query head."""
        return self.columns // self.heads if self.heads else 0


@dataclass(frozen=True)
class Layout:
    """One value of ``--layout``."""

    name: str
    alike: frozenset[str] = frozenset()
    """Families (see `Site.family`) of one width in all blocks, one that the stock config class takes."""
    multiple: int = 1
    """FFN widths are multiples of this."""


FREE = Layout("free")
UNIFORM = Layout("uniform", frozenset({"attention", "ffn", "experts"}))
DECILM = Layout("decilm", frozenset({"attention"}), multiple=256)
"""DeciLM's configs (`nemotron_nas` in vLLM) have one number of query heads, and FFN widths a block as a multiple of 256."""
LAYOUTS = {layout.name: layout for layout in (FREE, UNIFORM, DECILM)}
