"""The errors a user can meet.

::

    StreamPruneError            exit 1
    ├── ConfigError             exit 2   a setting that cannot be: quotes the value and the limit
    ├── CheckpointError         exit 1   the model directory is not what it should be
    ├── CalibrationError        exit 1   the text is missing, unreadable or too short
    ├── ResourceError           exit 1   memory or disk is too small: says how much is needed
    ├── DiskError               exit 1   a file cannot be read or written: says which, and why
    ├── DamageError             exit 1   the disk does not hold what was written: made anew by the same command
    ├── ResumeError             exit 1   a job under way was started with other settings or inputs
    ├── NumericalError          exit 1   NaN, Inf or a matrix that no damping could factor
    │   └── SingularError       exit 1   the latter, which more damping may mend on the way
    ├── LostError               exit 1   of several processes at one job, another one is gone
    ├── ElsewhereError          its own  the same, and it has told why
    └── Stopped                 exit 75  nothing is wrong: somebody asked, and the same command goes on

Everything else that escapes is a bug.
"""

from __future__ import annotations


def one_line(error: BaseException, most: int = 200) -> str:
    """Another library's error as part of a message: its first `most` characters without line breaks, or its kind."""
    return " ".join(str(error).split())[:most] or type(error).__name__


class StreamPruneError(Exception):
    """Base of every error that is the user's to mend; the message is one line."""

    exit_code = 1
    told = False
    """Whether another process of the same job has told it already."""


class ConfigError(StreamPruneError):
    """A setting that cannot be."""

    exit_code = 2


class CheckpointError(StreamPruneError):
    """A model directory that cannot be read as a checkpoint."""


class CalibrationError(StreamPruneError):
    """Text that cannot be used."""


class ResourceError(StreamPruneError):
    """Too little memory or disk."""


class DiskError(StreamPruneError):
    """A file that cannot be read or written."""


class DamageError(StreamPruneError):
    """A file that is not on the disk as it was written."""


class ResumeError(StreamPruneError):
    """A job under way that does not fit what is asked now."""


class NumericalError(StreamPruneError):
    """Numbers that cannot be worked with."""


class SingularError(NumericalError):
    """A matrix that is not positive definite to its dtype, or no longer after what was taken from it."""


class LostError(StreamPruneError):
    """Another process of the same job is gone."""


class ElsewhereError(StreamPruneError):
    """Another process of the same job has failed.

    Args:
        message: what it said.
        exit_code: what it ends with.
    """

    told = True

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Stopped(StreamPruneError):
    """Work that ended early because it was asked to."""

    exit_code = 75
    """The C library's EX_TEMPFAIL: try again."""
