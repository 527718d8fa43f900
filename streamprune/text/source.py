"""Sources of text: what a job reads, and the share of each source."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from ..errors import CalibrationError, ConfigError
from .documents import DATASET, Documents, open_documents

LossOn = Literal["all", "assistant"]
LOSSES_ON: tuple[LossOn, ...] = ("all", "assistant")
"""Whose tokens have a loss: all, or those that the assistant says in conversations."""
Cut = Literal["anywhere", "documents"]
CUTS: tuple[Cut, ...] = ("anywhere", "documents")
"""Where windows begin: at any token, or where documents begin."""

_WEIGHT = re.compile(r"(?P<place>.+)=(?P<weight>[^=:/]*)", re.DOTALL)
_FIELD = re.compile(r"(?P<place>.+):(?P<field>[^:/=\[\]]+)", re.DOTALL)
HEAVIEST = 1e12
"""Largest weight allowed, so that sums and products of weights stay finite."""


def builtin_text() -> Path:
    """Return the path of a small English sample for a first try. Text from the target domain works better."""
    return Path(str(resources.files("streamprune") / "data" / "english.txt"))


@dataclass(frozen=True)
class Source:
    """One source of text."""

    place: str
    """A file, a folder that the `datasets` library reads, or ``hf:NAME[#CONFIG][@SPLIT]``. Files are `.jsonl`, `.ndjson`,
    `.json`, `.csv`, `.tsv` (all also `.gz`), `.parquet` or `.arrow`; others are UTF-8 text, also gzipped."""
    field: str | None = None
    """Name of the field with a row's text or conversation; None takes the first of text, messages, conversations,
    content and instruction (with output) that exists."""
    weight: float = 1.0
    """Share of the windows, relative to the weights of the other sources: positive, at most `HEAVIEST`."""

    def __post_init__(self) -> None:
        if not 0 < self.weight <= HEAVIEST:
            raise ConfigError(f"{self.place}: the weight is {self.weight:g}; it must be positive, at most {HEAVIEST:g}")

    @classmethod
    def parse(cls, text: str) -> Source:
        """Parse ``"PLACE[:FIELD][=WEIGHT]"``. If several readings name an existing file, the longest wins.

        Raises:
            CalibrationError: the file does not exist.
            ConfigError: the weight is not a positive number.
        """
        if os.path.exists(text):
            return cls(text)
        place, weight = text, 1.0
        if match := _WEIGHT.fullmatch(text):
            place = match["place"]
            try:
                weight = float(match["weight"])
            except ValueError:
                raise ConfigError(f"{text!r}: the weight {match['weight']!r} is not a number") from None
        if os.path.exists(place):
            return cls(place, weight=weight)
        match = _FIELD.fullmatch(place)
        if match and (match["place"].startswith(DATASET) or os.path.exists(match["place"])):
            return cls(match["place"], match["field"], weight)
        if place.startswith(DATASET):
            return cls(place, weight=weight)
        raise CalibrationError(f"cannot read the text {text}: No such file or directory")

    def open(self) -> Documents:
        return open_documents(self.place, self.field)

    def __str__(self) -> str:
        return self.place + (f":{self.field}" if self.field else "")


Spec = str | Path | Source
"""A source as the caller gives it: a string to parse, a path to use as it is, or a `Source`."""


def source(given: Spec) -> Source:
    if isinstance(given, Source):
        return given
    return Source.parse(given) if isinstance(given, str) else Source(str(given))


@dataclass(frozen=True)
class Text:
    """One or several sources to draw windows from."""

    sources: tuple[Source, ...]

    @classmethod
    def of(cls, given: Spec | Sequence[Spec]) -> Text:
        """Create a text from one source or several; see `Source.parse`."""
        specs = [given] if isinstance(given, (str, Path, Source)) else list(given)
        if not specs:
            raise ConfigError("no text is given")
        return cls(tuple(source(spec) for spec in specs))

    def shares(self, samples: int) -> list[int]:
        """Distribute `samples` windows by weight; the largest remainders, then earlier sources, round up.

        Raises:
            ConfigError: a source would get no window.
        """
        exact = [samples * source.weight / self._whole for source in self.sources]
        shares = [math.floor(share) for share in exact]
        by_remainder = sorted(range(len(exact)), key=lambda index: (shares[index] - exact[index], index))
        for index in by_remainder[: samples - sum(shares)]:
            shares[index] += 1
        for source, share in zip(self.sources, shares, strict=True):
            if not share:
                raise ConfigError(
                    f"{source} with weight {source.weight:g} of {self._whole:g} gets none of {samples} samples; "
                    "take more samples, or leave it out"
                )
        return shares

    def identity(self) -> dict[str, Any]:
        """Identify the text, JSON-ready: content, field and share of the weights of each source, numbered from 1."""
        found = {}
        for number, source in enumerate(self.sources, start=1):
            documents, share = source.open(), round(source.weight / self._whole, 12)
            found[str(number)] = {**documents.identity(), "field": documents.field, "share": share}
        return found

    @property
    def _whole(self) -> float:
        return math.fsum(source.weight for source in self.sources)

    def __str__(self) -> str:
        weighted = len({source.weight for source in self.sources}) > 1
        return ", ".join(str(source) + (f"={source.weight:g}" if weighted else "") for source in self.sources)
