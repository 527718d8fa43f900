"""`SHA256SUMS`, the manifest of a directory: what every file of it was meant to hold, as ``sha256sum -c`` reads it.

Digests are of bytes in memory on their way to the disk, never of a file that was read back, so that a write which went
wrong does not match its own.
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
    """Write a line for every file, by name, and see that the disk has it.

    Raises:
        DamageError: it has something else.
    """
    path = folder / NAME
    digest = files.write_text(path, "".join(f"{digests[name]}  {name}\n" for name in sorted(digests)))
    hold(path, digest)


def read(folder: Path) -> tuple[dict[str, str], list[str]]:
    """Digests by file name, and what is wrong with lines that give none.

    A name with a folder in it is wrong: what lies elsewhere is no part of this directory.
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


def hold(path: Path, digest: str) -> None:
    """See that the disk has a file as it was written.

    Raises:
        DamageError: it has something else.
    """
    files.forget(path)
    if files.sha256(path) != digest:
        raise DamageError(
            f"{path} is not on the disk as it was written: something is wrong with the disk or the memory; "
            "run the same command again to go on"
        )
