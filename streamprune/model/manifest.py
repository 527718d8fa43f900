"""`SHA256SUMS`, the manifest of a directory: the intended SHA-256 of every file, in the format of ``sha256sum -c``.

Digests are computed from the bytes in memory before they are written, never from a file read back, so that a faulty write does
not match its digest.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from ..errors import DamageError
from ..system import files

NAME = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def write(folder: Path, digests: Mapping[str, str]) -> None:
    """Durably write the manifest of `digests`, SHA-256 in hex by file name, and `check` it."""
    path = folder / NAME
    digest = files.write_text(path, "".join(f"{digests[name]}  {name}\n" for name in sorted(digests)))
    check(path, digest)


def read(folder: Path) -> tuple[dict[str, str], list[str]]:
    """Return the digests by file name, and messages about invalid lines.

    A name with a folder in it is invalid: files elsewhere are not part of this directory.
    """
    digests: dict[str, str] = {}
    wrong = []
    lines = files.read_bytes(folder / NAME).decode(errors="replace").removesuffix("\n").split("\n")
    for number, line in enumerate(lines, start=1):
        match = _LINE.fullmatch(line)
        if match is None:
            wrong.append(f"line {number} of {NAME} is not a checksum and a name")
        elif match[2] in (".", "..") or os.path.basename(match[2]) != match[2]:
            wrong.append(f"line {number} of {NAME} names {match[2]!r}, which is not a file of this directory")
        elif match[2] in digests:
            wrong.append(f"line {number} of {NAME} names {match[2]!r} again")
        else:
            digests[match[2]] = match[1]
    return digests, wrong


def check(path: Path, digest: str) -> None:
    """Raise DamageError unless a file on disk, read past the page cache where possible, has this SHA-256 (hex)."""
    files.drop_cached(path)
    if files.sha256(path) != digest:
        raise DamageError(
            f"{path} on disk differs from what was written: the disk or the memory may be faulty; "
            "run the same command again to resume"
        )
