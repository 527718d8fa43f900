"""Strict JSON for untrusted files: rejects what two programs may read differently, or what cannot be written back.

Python's parser keeps the last of two equal keys, and accepts NaN, Infinity and lone surrogates, which UTF-8 cannot encode.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from ..errors import CheckpointError, DiskError, one_line
from . import files
from .directory import check_pointer

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_text(path: Path) -> str:
    """Read a regular file as UTF-8 text; see `files.read_bytes`."""
    return files.read_bytes(path).decode("utf-8")


def parse(text: str) -> Any:
    """Parse JSON text.

    Raises:
        ValueError: not JSON, a duplicate key in one object, NaN, Infinity, a number beyond float64, a lone surrogate, or
            nesting that is too deep.
    """
    try:
        value = json.loads(text, object_pairs_hook=_members, parse_constant=_constant, parse_float=_number)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nesting is too deep") from None
    except UnicodeEncodeError:
        raise ValueError("a string contains half a surrogate pair") from None
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        CheckpointError: the file is missing, unreadable, a Git LFS pointer, not an object, or rejected by `parse`.
    """
    try:
        value = parse(read_text(path))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}") from None
    except DiskError as error:
        raise CheckpointError(str(error)) from error
    except ValueError as error:
        check_pointer(path)
        raise CheckpointError(f"{path} cannot be read as JSON: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return value


def finite(value: Any) -> Any:
    """Return a JSON value with NaN and infinities replaced by None, at any depth."""
    if isinstance(value, Mapping):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Mapping[str, Any]) -> str:
    """Durably write an indented JSON file, through `finite` so that `read_json` accepts it. Returns its SHA-256 in hex."""
    return files.write_text(path, json.dumps(finite(value), indent=2, ensure_ascii=False) + "\n")


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        raise ValueError(f"the key {twice!r} occurs twice in one object")
    return found


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not valid JSON")


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value
