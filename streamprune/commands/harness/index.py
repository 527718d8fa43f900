"""Find unknown task names quickly, without importing lm_eval or parsing its thousands of task files."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path

_NO_YAML = (".py", ".pyc", ".md", ".sh")


def missing(names: Sequence[str]) -> list[str]:
    """Return the names that no task file of lm_eval contains as a word. They cannot be tasks, groups or tags.

    A name that is not returned may still be none of these.
    """
    # YAML may escape non-ASCII characters, so such names are never reported.
    left = [name for name in names if name.isascii()]
    for path in _files():
        if not left:
            break
        data = path.read_bytes()
        left = [name for name in left if not _contains(data, name)]
    return left


def _contains(data: bytes, name: str) -> bool:
    word = name.encode()
    return (
        word in data and re.search(rb"(?<![^\s\"'\[{,])" + re.escape(word) + rb"(?![^\s\"'\]},:#])", data) is not None
    )


def _files() -> list[Path]:
    """Return the task files, and all files that they may include, which can have any suffix."""
    spec = importlib.util.find_spec("lm_eval")
    places = (spec and spec.submodule_search_locations) or []
    return [
        Path(folder, name)
        for place in places
        for folder, _, names in os.walk(Path(place, "tasks"))
        for name in names
        if not name.endswith(_NO_YAML)
    ]
