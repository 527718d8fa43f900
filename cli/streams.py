"""Standard streams that are closed from the start, or whose reader is gone; warnings of other libraries."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from typing import Any


class BestEffort(io.FileIO):
    """Ignores write errors, so that work continues when nobody can read its progress."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def repair() -> None:
    """Open closed standard streams on the null device, and ignore write errors on stderr.

    Otherwise a file that is opened later would get the number of a standard stream, and receive what libraries print.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is sys.__stderr__:
        encoding = "utf-8" if sys.stderr is None else sys.stderr.encoding
        raw = io.BufferedWriter(BestEffort(2, "w", closefd=False))
        sys.stderr = io.TextIOWrapper(raw, encoding, errors="backslashreplace", line_buffering=True)


def give_up_stdout() -> None:
    """Drop what stdout cannot take, so that Python does not try again when it exits, and end with a code of its own."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def hide_warnings() -> None:
    """Hide warnings of other libraries. STREAMPRUNE_WARNINGS=1 shows all of them, Python's -W those it names."""
    if sys.stderr is not sys.__stderr__:
        return  # within another process, such as a test's
    if os.environ.get("STREAMPRUNE_WARNINGS", "0") not in ("", "0"):
        warnings.simplefilter("default")
        return
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY", "DATASETS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else every rank prints a stack when one is lost
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    if logging.lastResort is not None:
        logging.lastResort.setLevel(logging.ERROR)
