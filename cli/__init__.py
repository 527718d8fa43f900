"""The `streamprune` command: thin over the library; errors become messages here, once."""

from .main import main

__all__ = ["main"]
