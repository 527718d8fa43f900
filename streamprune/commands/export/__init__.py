"""Export checkpoints to other runtimes' formats: GGUF, for llama.cpp and programs built on it."""

from .gguf import Exported, export_gguf

__all__ = ["Exported", "export_gguf"]
