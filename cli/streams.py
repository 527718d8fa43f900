"""The standard streams as others leave them: closed from the start, or read by nobody any more."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from typing import Any


class Lasting(io.FileIO):
    """A descriptor for progress and notes: a line that cannot be written is lost, and the work continues."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def settle() -> None:
    """Open to the null device what is closed, since a file of ours would get its number and what libraries say; let stderr last.

    A stream that is not this process's own, such as a test's, stays as it is.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is sys.__stderr__:
        encoding = "utf-8" if sys.stderr is None else sys.stderr.encoding
        raw = io.BufferedWriter(Lasting(2, "w", closefd=False))
        sys.stderr = io.TextIOWrapper(raw, encoding, errors="backslashreplace", line_buffering=True)


def quieten() -> None:
    """Keep warnings of other libraries off stderr; STREAMPRUNE_WARNINGS=1 shows all of them, Python's -W those it names.

    What concerns the user's own input is an error or a note of streamprune's. In a process that is not the command's own,
    such as a test's, nothing changes.
    """
    if sys.stderr is not sys.__stderr__:
        return
    if os.environ.get("STREAMPRUNE_WARNINGS", "0") not in ("", "0"):
        warnings.simplefilter("default")
        return
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY", "DATASETS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # every survivor would print a stack for a lost rank
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    if logging.lastResort is not None:
        logging.lastResort.setLevel(logging.ERROR)
