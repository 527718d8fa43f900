"""How alike a result's blocks are, as plain data: which families of sites have one width in all of them."""

from __future__ import annotations

from dataclasses import dataclass


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
