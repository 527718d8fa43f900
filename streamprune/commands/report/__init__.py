"""Write an HTML report of a finished OUT."""

from .report import report

__all__ = ["report"]
