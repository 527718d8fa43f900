"""Sites: one consumer linear with its producers, as plain data.

Pruning heads and pruning channels are the same problem: which column groups of the consumer's `W` to drop. A *unit* is removed
as a whole: an FFN channel, or an attention key/value group with its query heads. Unit `u` owns the consumer's columns
``[u·width, (u+1)·width)`` and rows ``[u·r, (u+1)·r)`` of a producer with `r` rows per unit. Removing a unit does not change
the residual width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["attention", "linear", "ffn", "block"]
"""Attention, linear attention or a state space model, an FFN; a block as a whole has no site."""


@dataclass(frozen=True)
class Site:
    """One prunable site of one block."""

    block: int  # number of the block, from 0
    kind: Kind
    units: int  # number of units
    width: int  # columns of the consumer per unit
    outputs: int  # rows of the consumer, d_out: the residual width
    unit_parameters: int
    """Parameters removed with one unit: its rows of producers and norms, with biases, and its columns of the consumer."""
    heads: int = 0  # query heads; 0 for an FFN
    choices: tuple[int, ...] | None = None
    """Unit counts above 0 that the requested layout can express, ascending; None for all from 1 to `units`."""
    rest: int | None = None
    """Parameters that go with the last unit besides its own, such as norms, or an expert's part of the router; None if the model
    does not run without it."""
    stays: bool = False
    """Whether the last unit has to stay because the requested layout cannot express a model without it."""
    linears: tuple[int, ...] = ()
    """Number of weights of each linear: the producers in order, fused ones in their parts, then the consumer."""
    expert: int | None = None  # number of the expert in a mixture of experts, from 0; None otherwise
    share: float = 1.0  # expected fraction of tokens that reach the site; below 1 if a router selects them
    least: int = 0  # fewest routed experts that must stay in the block; 0 without a router
    groups: int = 1  # groups of routed experts in the block, which must stay equal in number

    @property
    def name(self) -> str:
        """Name in plans, reports and messages: `blocks.3.attention`, `blocks.3.ffn.5`."""
        return f"blocks.{self.block}.{self.place}"

    @property
    def place(self) -> str:
        """Name inside the block: `attention`, `ffn`, `ffn.5`."""
        return self.kind if self.expert is None else f"{self.kind}.{self.expert}"

    @property
    def family(self) -> str:
        """Family of the site. A stock config describes all sites of a family by the same fields."""
        return self.kind if self.expert is None else "experts"

    def keeping(self, units: int) -> Site:
        """Return the site with this number of units."""
        linears = tuple(weights // self.units * units for weights in self.linears)
        return replace(self, units=units, heads=self.heads // self.units * units, linears=linears)

    @property
    def goes(self) -> bool:
        """Whether the last unit can go, and its sublayer or expert with it."""
        return self.rest is not None and not self.stays

    def removed(self, keep: int) -> int:
        """Return the number of parameters that go if `keep` units stay."""
        return (self.units - keep) * self.unit_parameters + (0 if keep else self.rest or 0)

    @property
    def columns(self) -> int:
        """Columns of the consumer, n."""
        return self.units * self.width

    @property
    def head_width(self) -> int:
        """Columns of the consumer per query head; 0 for an FFN."""
        return self.columns // self.heads if self.heads else 0


def routed(sites: Sequence[Site]) -> dict[int, list[Site]]:
    """Return the routed experts of each block, in order, by the block's number."""
    found: dict[int, list[Site]] = {}
    for site in sites:
        if site.expert is not None:
            found.setdefault(site.block, []).append(site)
    return found


@dataclass(frozen=True)
class Layout:
    """One value of ``--layout``."""

    name: str
    alike: frozenset[str] = frozenset()
    """Families (see `Site.family`) that must have the same width in all blocks, one that the stock config class accepts."""
    sublayers: bool = True  # whether it can express blocks without attention, or without an FFN
    biases: bool = True  # whether such a block can keep the consumer's bias
    headless: bool = True  # whether the first block may lack its attention


FREE = Layout("free")
UNIFORM = Layout("uniform", frozenset({"attention", "ffn", "experts"}), sublayers=False)
DECILM = Layout("decilm", frozenset({"attention"}), biases=False, headless=False)
"""DeciLM configs (`nemotron_nas` in vLLM) have one number of query heads, and one FFN width per block. Blocks without attention or
FFN hold nothing of it. vLLM's first block starts the residual stream in its attention."""
LAYOUTS = {layout.name: layout for layout in (FREE, UNIFORM, DECILM)}
