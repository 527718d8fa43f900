"""Formats of stored weights: the type that each tensor gets, and the bytes that it takes. Does not import torch.

`gguf_type` follows llama.cpp: its converter for 16-bit types and Q8_0, and `llama_tensor_get_type` of its `llama-quant.cpp` for
Q4_K_M, a mixture that gives more bits to values, to down projections of some blocks, and to the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

Format = Literal["bf16", "q8_0", "q4_k_m", "fp8"]
FORMATS: tuple[Format, ...] = ("bf16", "q8_0", "q4_k_m", "fp8")
"""bf16: a checkpoint in 16 bits. fp8: the same with linears as `model.fp8` writes them. The others are llama.cpp's."""
Role = Literal["embedding", "head", "kept", "key", "value", "output", "down", "linear"]
"""What llama.cpp distinguishes: `value` includes fused projections, `output` is attention's, `down` an FFN's or expert's consumer;
`kept` are routers and positions, which stay in float32."""

BLOCKS = {
    "f32": (1, 4),
    "f16": (1, 2),
    "bf16": (1, 2),
    "q8_0": (32, 34),
    "q5_0": (32, 22),
    "q5_1": (32, 24),
    "q4_k": (256, 144),
    "q5_k": (256, 176),
    "q6_k": (256, 210),
}
"""GGUF types: elements of a block, which divide a row, and its bytes."""
_FALLBACK = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
"""llama.cpp's types for rows that are no multiple of 256."""


@dataclass(frozen=True)
class Weight:
    """One tensor of a model."""

    shape: tuple[int, ...]
    """Matrices: (..., rows, columns), where the rows are multiplied with the input."""
    role: Role = "linear"
    block: int = 0


@dataclass(frozen=True)
class Model:
    """What llama.cpp's choice of a tensor's type depends on, besides the tensor."""

    depth: int  # number of blocks
    tied: bool  # whether the head is the embedding
    experts: int = 0  # routed experts of a block
    grouped: bool = False  # whether several query heads share a key


def gguf_type(format: str, weight: Weight, model: Model) -> str:
    """Return the GGUF type of a tensor, a key of `BLOCKS`; `format` is ``f32``, ``f16``, ``bf16``, ``q8_0`` or ``q4_k_m``.

    Vectors, routers and positions stay f32. A row that no block of the type divides falls back, to f16 in the end.
    """
    if len(weight.shape) < 2 or weight.role == "kept":
        return "f32"
    kind, columns = format, weight.shape[-1]
    if format == "q4_k_m":
        kind = _mixed(weight, model)
        if columns % BLOCKS[kind][0]:
            kind = _FALLBACK.get(kind, kind)
    return "f16" if columns % BLOCKS[kind][0] else kind


def gguf_bytes(format: str, weight: Weight, model: Model) -> int:
    """Return the bytes of a tensor in a GGUF file, without padding."""
    elements, size = BLOCKS[gguf_type(format, weight, model)]
    return prod(weight.shape) // elements * size


def _mixed(weight: Weight, model: Model) -> str:
    """Return the type of a matrix in llama.cpp's Q4_K_M before any fallback."""
    if weight.role == "head" or (model.tied and weight.role == "embedding"):
        return "q8_0" if weight.shape[-1] % BLOCKS["q4_k"][0] else "q6_k"
    eight = model.experts == 8
    match weight.role:
        case "value" if eight:
            return "q8_0"
        case "value" if _more_bits(weight.block, model.depth):
            return "q6_k"
        case "value" if model.depth == 80 and model.grouped:  # Llama 2 70B and its like
            return "q5_k"
        case "key" if eight:
            return "q8_0"
        case "output" if eight:
            return "q5_k"
        case "down" if _more_bits(weight.block, model.depth):
            return "q6_k"
    return "q4_k"


def _more_bits(block: int, depth: int) -> bool:
    """Whether llama.cpp's mixtures give more bits to a block: the first and the last eighth, and every third between."""
    return block < depth // 8 or block >= 7 * depth // 8 or (block - depth // 8) % 3 == 2
