"""All errors that streamprune raises on purpose, and the exit code of each.

::

    StreamPruneError            exit 1   base class
    ├── ConfigError             exit 2   invalid setting; the message quotes the value and the limit
    ├── CheckpointError         exit 1   the model directory is not a valid, supported checkpoint
    ├── CalibrationError        exit 1   calibration or evaluation text is missing, unreadable or too short
    ├── ResourceError           exit 1   not enough memory or disk; the message says how much is needed
    ├── DiskError               exit 1   a file cannot be read or written; the message says which and why
    ├── DamageError             exit 1   a file differs from what was written; rerun the command to rebuild it
    ├── ResumeError             exit 1   the job is locked, or was started with other settings or inputs
    ├── NumericalError          exit 1   NaN, Inf, or a matrix that cannot be factored
    │   └── SingularError       exit 1   a matrix is not positive definite; callers may retry with more damping
    ├── LostError               exit 1   another process of a multi-process job is gone
    ├── ElsewhereError          varies   another process of the job failed and reported why; uses its exit code
    └── Stopped                 exit 75  the job stopped on request; rerun the command to resume

Any other exception that reaches the user is a bug.
"""

from __future__ import annotations

from collections.abc import Collection


def one_line(error: BaseException, most: int = 200) -> str:
    """Return another library's error on one line, cut to `most` characters; its class name if it has no text."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def check_least(least: int, **values: int | None) -> None:
    """Raise ConfigError if a value, by its setting's name, is below `least`; None is accepted."""
    for name, value in values.items():
        if value is not None and value < least:
            raise ConfigError(f"{name} is {value}; it must be at least {least}")


def check_choice(**choices: tuple[object, Collection[object]]) -> None:
    """Raise ConfigError if a value, by its setting's name, is not among those allowed: ``name=(value, allowed)``."""
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(map(str, allowed))}")


class StreamPruneError(Exception):
    """Base class for errors the user can fix. Messages are one line."""

    exit_code = 1
    reported = False
    """Whether another process of the same job has already reported this error."""


class ConfigError(StreamPruneError):
    """A setting is invalid."""

    exit_code = 2


class CheckpointError(StreamPruneError):
    """A model directory cannot be read as a checkpoint."""


class CalibrationError(StreamPruneError):
    """Calibration or evaluation text cannot be used."""


class ResourceError(StreamPruneError):
    """There is not enough memory or disk space."""


class DiskError(StreamPruneError):
    """A file cannot be read or written."""


class DamageError(StreamPruneError):
    """A file on disk differs from what was written."""


class ResumeError(StreamPruneError):
    """An existing job cannot be resumed: it is locked, or its settings or inputs differ."""


class NumericalError(StreamPruneError):
    """A computation met NaN, Inf or a matrix that it cannot factor."""


class SingularError(NumericalError):
    """A matrix is not positive definite in its dtype, either from the start or after updates."""


class LostError(StreamPruneError):
    """Another process of the same job exited or lost its connection."""


class ElsewhereError(StreamPruneError):
    """Another process of the same job failed and reported its error, with this message and exit code."""

    reported = True

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Stopped(StreamPruneError):
    """The work stopped early on request; nothing is wrong."""

    exit_code = 75
    """EX_TEMPFAIL from sysexits.h: try again later."""
