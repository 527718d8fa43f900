"""Names of activation functions in transformers, and which of them are synonyms."""

from __future__ import annotations

SAME = (
    ("silu", "swish"),
    ("gelu", "gelu_python"),
    ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh"),
)
"""Groups of names for the same function, up to float32 rounding."""
_CANONICAL = {name: names[0] for names in SAME for name in names}


def canonical(name: str | None) -> str | None:
    """Return the canonical name of an activation function: ``"swish"`` → ``"silu"``. Other names, and None, are returned unchanged."""
    return name if name is None else _CANONICAL.get(name, name)
