"""What was done, on one page: a finished OUT read, drawn and written as HTML."""

from .report import report

__all__ = ["report"]
