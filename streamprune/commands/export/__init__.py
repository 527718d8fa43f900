"""Checkpoints in other runtimes' formats: GGUF, for llama.cpp and what is built on it."""

from .gguf import Exported, export_gguf

__all__ = ["Exported", "export_gguf"]
