"""Which names can be those of lm_eval's own tasks, without importing lm_eval or parsing its thousands of files."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path

_NO_YAML = (".py", ".pyc", ".md", ".sh")


def missing(names: Sequence[str]) -> list[str]:
    """Those of `names` that no task file of lm_eval contains as a word: none of them can be a task, a group or a tag.

    A name that is not missing may still be none of these.
    """
    # YAML may write other characters as escapes.
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
    """Task files and whatever they may include, which has any name."""
    spec = importlib.util.find_spec("lm_eval")
    places = (spec and spec.submodule_search_locations) or []
    return [
        Path(folder, name)
        for place in places
        for folder, _, names in os.walk(Path(place, "tasks"))
        for name in names
        if not name.endswith(_NO_YAML)
    ]
