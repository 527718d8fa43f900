"""What the reports of sites add up to. Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def extents(reports: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """Sum the site reports of a block: (units kept, units) or (zeros, weights), for attention and for FFN."""
    families: dict[str, list[Mapping[str, Any]]] = {}
    for report in reports:
        families.setdefault(report["site"].split(".")[2], []).append(report)
    found = []
    for each in families.values():
        part, whole = ("zeros", "weights") if "zeros" in each[0] else ("kept", "units")
        found.append((sum(r[part] for r in each), sum(r[whole] for r in each)))
    return found


def experts_gone(reports: Sequence[Mapping[str, Any]]) -> str | None:
    """Say how many routed experts went as a whole, given the reports of all sites; None if none did."""
    experts = [report for report in reports if report["site"].count(".") == 3]
    gone = sum(report["kept"] == 0 for report in experts)
    return f"{gone:,} of {len(experts):,} routed experts went as a whole" if gone else None
