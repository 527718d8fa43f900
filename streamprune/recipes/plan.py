"""Plans: how many units each site keeps, as JSON that people can read and edit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DiskError, one_line
from ..model.site import Site, routed
from ..system import strict_json
from .experts import check_kept

FORMAT = "streamprune-plan-1"


@dataclass(frozen=True)
class SitePlan:
    """What one site keeps."""

    keep: int
    """Number of units to keep. With 0 its sublayer, or the routed expert, goes as a whole."""
    units: tuple[int, ...] | None = None
    """Indices of the units to keep, ascending; None lets the recipe select them."""
    zeros: tuple[int, ...] | None = None
    """For pruning that keeps shapes: number of weights to zero in each linear, producers in order, consumer last."""


class Plan(dict[str, SitePlan]):
    """What each site keeps, by site name. `ratio` is the share of parameters that the plan was made to remove, in (0, 1)."""

    def __init__(self, kept: Mapping[str, SitePlan], ratio: float) -> None:
        super().__init__(kept)
        self.ratio = ratio

    def to_json(self) -> str:
        """Return the text of the plan file, one line per site."""
        lines = []
        for name, entry in self.items():
            value: dict[str, Any] = {"keep": entry.keep}
            for field in ("units", "zeros"):
                if getattr(entry, field) is not None:
                    value[field] = list(getattr(entry, field))
            lines.append(f"    {json.dumps(name)}: {json.dumps(value)}")
        body = ",\n".join(lines)
        return f'{{\n  "format": "{FORMAT}",\n  "ratio": {json.dumps(self.ratio)},\n  "sites": {{\n{body}\n  }}\n}}\n'

    def digest(self) -> str:
        """Return a 16-character hash that identifies the plan."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Read a plan file, or raise ConfigError. Call `check` to compare it with the model before use."""
        try:
            text = strict_json.read_text(path)
        except (FileNotFoundError, DiskError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the plan {path}: {one_line(error)}") from error
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str, where: str) -> Plan:
        """Parse a plan from JSON text. Raises ConfigError if it is not a plan."""
        try:
            data = strict_json.parse(text)
        except ValueError as error:
            raise ConfigError(f"{where} is not JSON: {one_line(error)}") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("sites"), dict):
            raise ConfigError(f'{where} is not a plan: it needs "format": "{FORMAT}" and "sites"')
        ratio = data.get("ratio")
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio < 1:
            raise ConfigError(f"{where}: ratio is {ratio!r}; it must be in (0, 1)")
        kept = {}
        for name, value in data["sites"].items():
            value = value if isinstance(value, dict) else {}
            keep, units, zeros = value.get("keep"), value.get("units"), value.get("zeros")
            if isinstance(keep, bool) or not isinstance(keep, int):
                raise ConfigError(f'{where}: {name} needs "keep", a whole number')
            for field, listed in (("units", units), ("zeros", zeros)):
                if listed is None:
                    continue
                if not isinstance(listed, list) or any(isinstance(u, bool) or not isinstance(u, int) for u in listed):
                    raise ConfigError(f'{where}: "{field}" of {name} must be a list of whole numbers')
            if units is not None and (len(units) != keep or sorted(set(units)) != units):
                raise ConfigError(
                    f'{where}: {name} keeps {keep}, so "units" must be {keep} different numbers, ascending'
                )
            kept[name] = SitePlan(keep, *(None if listed is None else tuple(listed) for listed in (units, zeros)))
        return cls(kept, float(ratio))

    def check(self, sites: Sequence[Site], where: str) -> None:
        """Raise ConfigError if a site of the model is missing, or a site, count or unit of the plan does not exist there."""
        names = {site.name for site in sites}
        for name in self.keys() - names:
            raise ConfigError(f"{where}: the model has no site {name!r}")
        for site in sites:
            if site.name not in self:
                raise ConfigError(f"{where}: {site.name} is missing")
            entry = self[site.name]
            least = 0 if site.goes else 1
            if not least <= entry.keep <= site.units:
                raise ConfigError(f"{where}: {site.name} keeps {entry.keep}; it must be {least} to {site.units}")
            if entry.units and not (entry.units[0] >= 0 and entry.units[-1] < site.units):
                raise ConfigError(f'{where}: "units" of {site.name} must lie between 0 and {site.units - 1}')
            if entry.zeros is not None:
                _check_zeros(site, entry, where)
            if entry.keep and site.choices is not None and entry.keep not in site.choices:
                reason = "no unit of it can go" if site.choices == (site.units,) else "a stock config cannot say so"
                raise ConfigError(f"{where}: {site.name} keeps {entry.keep} of {site.units}; {reason}")

        check_kept(sites, {site.name: self[site.name].keep for site in sites}, where)

    def is_alike(self, sites: Sequence[Site]) -> bool:
        """Return whether all sites of each family that stay end with the same width, and all blocks with as many experts."""
        left = [(site, self[site.name].keep) for site in sites if self[site.name].keep]
        numbers = {len(own) for own in routed([site for site, _ in left]).values()}
        widths = {(site.family, keep * site.width) for site, keep in left}
        return len(widths) == len({site.family for site, _ in left}) and len(numbers) <= 1


def units_only(sites: Sequence[Site], plan: Plan, where: str) -> None:
    """Raise ConfigError if the plan writes zeros instead of removing whole units."""
    for site in sites:
        if plan[site.name].zeros is not None:
            raise ConfigError(f'{where}: {site.name} has "zeros"; with these settings whole units go')


def _check_zeros(site: Site, entry: SitePlan, where: str) -> None:
    zeros = entry.zeros or ()
    if len(zeros) != len(site.linears):
        raise ConfigError(
            f'{where}: "zeros" of {site.name} has {len(zeros)} numbers; the site has {len(site.linears)} linears'
        )
    for count, weights in zip(zeros, site.linears, strict=True):
        if not 0 <= count <= weights:
            raise ConfigError(f'{where}: "zeros" of {site.name} says {count}; that linear has {weights} weights')
