"""Activation functions by transformers' names, several of which are the same function."""

from __future__ import annotations

SAME = (
    ("silu", "swish"),
    ("gelu", "gelu_python"),
    ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh"),
)
"""Names of one function, up to rounding in float32."""
_CANONICAL = {name: names[0] for names in SAME for name in names}


def canonical(name: str | None) -> str | None:
    """One name for all names of a function: ``"swish"`` → ``"silu"``. A name without synonyms, or none, stays as it is."""
    return name if name is None else _CANONICAL.get(name, name)
