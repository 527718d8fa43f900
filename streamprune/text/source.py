"""What a job reads: one or several sources of text, each with its share."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import CalibrationError, ConfigError
from .documents import DATASET, Documents, open_documents

_WEIGHT = re.compile(r"(?P<place>.+)=(?P<weight>[^=:/]*)", re.DOTALL)
_FIELD = re.compile(r"(?P<place>.+):(?P<field>[^:/=\[\]]+)", re.DOTALL)
HEAVIEST = 1e12
"""A weight, so that sums and products of weights stay numbers."""


def builtin_text() -> Path:
    """A small English sample, for a first try; text of the user's own domain is better."""
    return Path(str(resources.files("streamprune") / "data" / "english.txt"))


@dataclass(frozen=True)
class Source:
    """One source of text.

    Raises:
        ConfigError: the weight is not positive, or beyond `HEAVIEST`.
    """

    place: str
    """A file (`.jsonl`, `.ndjson`, `.json`, `.csv`, `.tsv`, `.parquet`, all else is UTF-8 text; all but `.parquet` also
    with `.gz`), a folder that the `datasets` library reads, or ``hf:NAME[#CONFIG][@SPLIT]``."""
    field: str | None = None
    """Where a row has its text or conversation; None takes text, messages, conversations or content, whichever comes first."""
    weight: float = 1.0
    """Its part of the windows, against the other sources' weights."""

    def __post_init__(self) -> None:
        if not 0 < self.weight <= HEAVIEST:
            raise ConfigError(f"{self.place}: the weight is {self.weight:g}; it must be positive, at most {HEAVIEST:g}")

    @classmethod
    def parse(cls, text: str) -> Source:
        """``"PLACE[:FIELD][=WEIGHT]"``; a file or folder of the longest name that is there wins.

        Raises:
            CalibrationError: there is no such file.
            ConfigError: the weight is not a positive number.
        """
        if os.path.exists(text):
            return cls(text)
        place, weight = text, 1.0
        if match := _WEIGHT.fullmatch(text):
            place, weight = match["place"], _number(match["weight"], text)
        if os.path.exists(place):
            return cls(place, weight=weight)
        match = _FIELD.fullmatch(place)
        if match and (match["place"].startswith(DATASET) or os.path.exists(match["place"])):
            return cls(match["place"], match["field"], weight)
        if place.startswith(DATASET):
            return cls(place, weight=weight)
        raise CalibrationError(f"cannot read the text {text}: No such file or directory")

    def open(self) -> Documents:
        """Its documents.

        Raises:
            CalibrationError, ConfigError: it cannot be read.
        """
        return open_documents(self.place, self.field)

    def __str__(self) -> str:
        return self.place + (f":{self.field}" if self.field else "")


Spec = str | Path | Source
"""How a source is given: as text to be parsed, as a path to be taken as it is, or as what both become."""


def source(given: Spec) -> Source:
    """The source that is meant."""
    if isinstance(given, Source):
        return given
    return Source.parse(given) if isinstance(given, str) else Source(str(given))


@dataclass(frozen=True)
class Text:
    """Sources to draw windows from."""

    sources: tuple[Source, ...]

    @classmethod
    def of(cls, given: Spec | Sequence[Spec]) -> Text:
        """One source or several.

        Raises:
            CalibrationError, ConfigError: what `Source.parse` raises, or none is given.
        """
        specs = [given] if isinstance(given, (str, Path, Source)) else list(given)
        if not specs:
            raise ConfigError("no text is given")
        return cls(tuple(source(spec) for spec in specs))

    def shares(self, samples: int) -> list[int]:
        """`samples` windows by weight, largest remainders first, then earlier sources.

        Raises:
            ConfigError: a source would get none.
        """
        whole = math.fsum(source.weight for source in self.sources)
        exact = [samples * source.weight / whole for source in self.sources]
        shares = [math.floor(share) for share in exact]
        by_remainder = sorted(range(len(exact)), key=lambda index: (shares[index] - exact[index], index))
        for index in by_remainder[: samples - sum(shares)]:
            shares[index] += 1
        for source, share in zip(self.sources, shares, strict=True):
            if not share:
                raise ConfigError(
                    f"{source} with weight {source.weight:g} of {whole:g} gets none of {samples} samples; "
                    "take more samples, or leave it out"
                )
        return shares

    def identity(self) -> dict[str, Any]:
        """What tells this text from another, by the sources' numbers: content, field, and share of the weights."""
        whole = math.fsum(source.weight for source in self.sources)
        found = {}
        for number, source in enumerate(self.sources, start=1):
            documents = source.open()
            found[str(number)] = {
                **documents.identity(),
                "field": documents.field,
                "share": round(source.weight / whole, 12),
            }
        return found

    def __str__(self) -> str:
        weighted = len({source.weight for source in self.sources}) > 1
        return ", ".join(str(source) + (f"={source.weight:g}" if weighted else "") for source in self.sources)


def _number(text: str, place: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{place!r}: the weight {text!r} is not a number") from None
