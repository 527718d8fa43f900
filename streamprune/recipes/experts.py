"""Which routed experts go as a whole: the same number in each block, or those below one threshold over all blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, NumericalError
from ..model.site import Site, routed

THRESHOLD = "threshold"


@dataclass(frozen=True)
class Experts:
    """Which routed experts go as a whole, as `--experts` says: by number, or in one budget with the units."""

    keep: int | None = None
    """How many stay in each block."""
    share: float | None = None
    """Share of the experts that goes, in (0, 1)."""
    threshold: bool = False
    """Whether one threshold decides over all blocks, instead of the same number in each."""

    @classmethod
    def parse(cls, text: str) -> Experts:
        """Parse ``96``, ``0.25``, ``0.25:threshold`` or ``threshold``. Raises a ConfigError for anything else."""
        number, _, rest = text.partition(":")
        if text == THRESHOLD:
            return cls(threshold=True)
        if number.isdecimal() and not rest and int(number):
            return cls(keep=int(number))
        try:
            share = float(number)
        except ValueError:
            share = 0.0
        if not 0 < share < 1 or rest not in ("", THRESHOLD):
            raise ConfigError(
                f"experts is {text!r}; it must be how many stay in each block, such as 96, the share that goes, such as 0.25 or "
                f"0.25:{THRESHOLD}, or {THRESHOLD}"
            )
        return cls(share=share, threshold=bool(rest))

    @property
    def counted(self) -> bool:
        """Whether the number of experts that go is given; otherwise it follows from the costs and the ratio."""
        return self.keep is not None or self.share is not None

    def __str__(self) -> str:
        number = self.keep if self.keep is not None else self.share
        return ":".join(str(each) for each in (number, THRESHOLD if self.threshold else None) if each is not None)


def leaving(sites: Sequence[Site], costs: Mapping[str, float], experts: Experts) -> list[Site]:
    """Return the experts that go: those of least cost or, by threshold, of least cost per parameter.

    Ties go to the earlier expert. As many stay in each block as its router needs (`Site.least`), the same number in each of the
    router's groups.

    Args:
        costs: cost of each expert, by site name.

    Raises:
        NumericalError: a cost is NaN.
    """
    blocks = routed(sites)
    for site in (site for own in blocks.values() for site in own):
        if costs[site.name] != costs[site.name]:
            raise NumericalError(f"{site.name}: the expert's cost is NaN")
    if experts.threshold:
        assert experts.share is not None
        spare = {block: len(own) - own[0].least for block, own in blocks.items()}
        wanted, found = round(experts.share * sum(map(len, blocks.values()))), list[Site]()
        for site in sorted(
            (site for own in blocks.values() for site in own), key=lambda site: costs[site.name] / site.removed(0)
        ):
            if len(found) < wanted and spare[site.block]:
                spare[site.block] -= 1
                found.append(site)
        return found
    found = []
    for own in blocks.values():
        size = len(own) // own[0].groups
        fewer = size - _stay(own, experts) // own[0].groups
        for start in range(0, len(own), size):
            group = sorted(own[start : start + size], key=lambda site: costs[site.name])
            found += group[:fewer]
    return found


def _stay(own: Sequence[Site], experts: Experts) -> int:
    """Return how many experts of a block stay, by number."""
    if experts.keep is not None:
        return experts.keep
    size, share = len(own) // own[0].groups, experts.share
    assert share is not None
    return own[0].groups * (size - round(share * size))


def check(sites: Sequence[Site], experts: Experts, model: Any) -> None:
    """Raise a ConfigError if the experts of these sites cannot go as asked; `model` is the name of the model."""
    blocks = routed(sites)
    if not blocks:
        raise ConfigError(f"experts is {experts}; {model} has no routed experts that can be pruned")
    gone = 0
    for block, own in blocks.items():
        where, least, groups = f"blocks.{block}", own[0].least, own[0].groups
        if own[0].rest is None:
            raise ConfigError(
                f"experts is {experts}; the router of {where} has an unknown form, so no expert of it can go as a whole"
            )
        if experts.threshold and groups > 1:
            raise ConfigError(
                f"experts is {experts}; the router of {where} chooses among {groups} groups of experts, which must stay equal: "
                f"give a number or a share without {THRESHOLD}"
            )
        if not experts.counted or experts.threshold:
            gone += 1
            continue
        stay = _stay(own, experts)
        if stay > len(own):
            raise ConfigError(f"experts is {experts}; {where} has {len(own)} experts")
        if stay % groups:
            raise ConfigError(
                f"experts is {experts}; the router of {where} chooses among {groups} groups of experts, so a multiple of "
                f"{groups} must stay"
            )
        if stay < least:
            raise ConfigError(
                f"experts is {experts}, so {stay} of {len(own)} would stay in {where}; its router needs {least} at least"
            )
        gone += len(own) - stay
    if experts.threshold and experts.share is not None:
        total, spare = (sum(len(own) - less * own[0].least for own in blocks.values()) for less in (0, 1))
        gone = round(experts.share * total)
        if gone > spare:
            raise ConfigError(f"experts is {experts}; at most {spare} of {total} can go, since routers need the others")
    if not gone:
        raise ConfigError(f"experts is {experts}; no expert would go")


def check_kept(sites: Sequence[Site], keeps: Mapping[str, int], where: str) -> None:
    """Raise a ConfigError if a plan, given as units that stay by site name, lets more experts go than a router allows."""
    for block, own in routed(sites).items():
        stay, groups = [site for site in own if keeps[site.name]], own[0].groups
        if len(stay) == len(own):
            continue
        if len(stay) < own[0].least:
            raise ConfigError(
                f"{where}: {len(stay)} of {len(own)} experts of blocks.{block} stay; its router needs {own[0].least} at least"
            )
        size = len(own) // groups
        if (
            len({sum(keeps[site.name] > 0 for site in own[start : start + size]) for start in range(0, len(own), size)})
            > 1
        ):
            raise ConfigError(
                f"{where}: the same number must stay in each of the {groups} groups of experts of blocks.{block}"
            )
