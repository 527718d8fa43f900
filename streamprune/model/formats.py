"""Formats of stored weights: the type that each tensor gets, and the bytes that it takes. Does not import torch.

`gguf_type` follows llama.cpp: its converter for 16-bit types and Q8_0, and `llama_tensor_get_type` of its `llama-quant.cpp` for
the others. Those named K_S, K_M and K_L are mixtures that give more bits to values, to down projections of some blocks, and to
the head.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

Format = Literal["bf16", "q8_0", "q4_k_m", "fp8"]
FORMATS: tuple[Format, ...] = ("bf16", "q8_0", "q4_k_m", "fp8")
"""bf16: a checkpoint in 16 bits. fp8: the same with linears as `model.fp8` writes them. The others are llama.cpp's."""
PLAIN = ("f32", "f16", "bf16", "q8_0")
"""GGUF formats in which all matrices have one type."""
QUANTISED = {
    "q2_k": "q2_k",
    "q3_k_s": "q3_k",
    "q3_k_m": "q3_k",
    "q3_k_l": "q3_k",
    "q4_0": "q4_0",
    "q4_1": "q4_1",
    "q4_k_s": "q4_k",
    "q4_k_m": "q4_k",
    "q5_0": "q5_0",
    "q5_1": "q5_1",
    "q5_k_s": "q5_k",
    "q5_k_m": "q5_k",
    "q6_k": "q6_k",
}
"""GGUF formats that llama.cpp's quantiser makes, with the type of most matrices."""
GGUF_FORMATS: tuple[Format, ...] = ("q8_0", "q4_k_m")
Role = Literal["embedding", "head", "kept", "key", "value", "output", "down", "linear"]
"""What llama.cpp distinguishes: `value` includes fused projections, `output` is attention's, `down` an FFN's or expert's consumer;
`kept` are routers and positions, which stay in float32."""

BLOCKS = {
    "f32": (1, 4),
    "f16": (1, 2),
    "bf16": (1, 2),
    "q8_0": (32, 34),
    "q4_0": (32, 18),
    "q4_1": (32, 20),
    "q5_0": (32, 22),
    "q5_1": (32, 24),
    "q2_k": (256, 84),
    "q3_k": (256, 110),
    "q4_k": (256, 144),
    "q5_k": (256, 176),
    "q6_k": (256, 210),
}
"""GGUF types: elements of a block, which divide a row, and its bytes."""
_FALLBACK = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
"""llama.cpp's types for rows that are no multiple of 256."""


@dataclass(frozen=True)
class Weight:
    """One tensor of a model."""

    shape: tuple[int, ...]
    """Matrices: (..., rows, columns), where the rows are multiplied with the input."""
    role: Role = "linear"
    block: int = 0
    """Number of the block; `gguf_total` counts otherwise where llama.cpp does."""


@dataclass(frozen=True)
class Model:
    """What llama.cpp's choice of a tensor's type depends on, besides the tensor."""

    depth: int  # number of blocks
    tied: bool  # whether the file has no head besides the embedding
    experts: int = 0  # routed experts of a block
    queries: int = 1  # query heads that share a key
    imatrix: bool = False  # whether the importance of columns is known
    values: int = 0  # number of blocks with attention; 0 for all


def gguf_type(format: str, weight: Weight, model: Model) -> str:
    """Return the GGUF type of a tensor, a key of `BLOCKS`; `format` is one of `PLAIN` or `QUANTISED`.

    Vectors, routers and positions stay f32. A row that no block of the type divides falls back, to f16 in the end.
    """
    if len(weight.shape) < 2 or weight.role == "kept":
        return "f32"
    kind, columns = format, weight.shape[-1]
    if format in QUANTISED:
        kind = _mixed(format, weight, model)
        if columns % BLOCKS[kind][0]:
            kind = _FALLBACK.get(kind, kind)
    return "f16" if columns % BLOCKS[kind][0] else kind


def gguf_bytes(format: str, weight: Weight, model: Model) -> int:
    """Return the bytes of a tensor in a GGUF file, without padding."""
    elements, size = BLOCKS[gguf_type(format, weight, model)]
    return prod(weight.shape) // elements * size


def gguf_total(format: str, weights: Sequence[Weight], model: Model) -> int:
    """Return the bytes of all tensors of a model, in the order of its blocks, in a GGUF file without padding.

    llama.cpp decides by how many values and, without experts, how many down projections came before a tensor.
    """
    found, before = 0, Counter[str]()
    model = replace(model, values=sum(each.role == "value" and len(each.shape) > 1 for each in weights))
    for each in weights:
        if len(each.shape) > 1 and (each.role == "value" or (each.role == "down" and not model.experts)):
            found += gguf_bytes(format, replace(each, block=before[each.role]), model)
            before[each.role] += 1
        else:
            found += gguf_bytes(format, each, model)
    return found


def _more_bits(block: int, depth: int) -> bool:
    """Whether llama.cpp's mixtures give more bits to a block: the first and the last eighth, and every third between."""
    return block < depth // 8 or block >= 7 * depth // 8 or (block - depth // 8) % 3 == 2


def _first(share: int) -> Callable[[int, int], bool]:
    return lambda block, depth: block < depth // share


def _all(block: int, depth: int) -> bool:
    return True


_MIXTURES: Mapping[str, Mapping[Role, Mapping[str, Callable[[int, int], bool]]]] = {
    "q2_k": {"value": {"q3_k": _all}, "down": {"q3_k": _all}, "output": {"q3_k": _all}},
    "q3_k_m": {
        "value": {"q5_k": lambda block, depth: block < 2, "q4_k": _all},
        "down": {"q5_k": _first(16), "q4_k": _all},
        "output": {"q4_k": _all},
    },
    "q3_k_l": {"value": {"q5_k": _all}, "down": {"q5_k": _all}, "output": {"q5_k": _all}},
    "q4_k_s": {"value": {"q5_k": lambda block, depth: block < 4}, "down": {"q5_k": _first(8)}},
    "q4_k_m": {"value": {"q6_k": _more_bits}, "down": {"q6_k": _more_bits}},
    "q5_k_m": {"value": {"q6_k": _more_bits}, "down": {"q6_k": _more_bits}},
}
"""Types besides that of most matrices, by format and role, and in which blocks: the first that applies counts."""


def _mixed(format: str, weight: Weight, model: Model) -> str:
    """Return the type of a matrix in one of llama.cpp's quantised formats before any fallback."""
    kind, role, block = QUANTISED[format], weight.role, weight.block
    if role == "head" or (model.tied and role == "embedding"):
        return "q8_0" if weight.shape[-1] % BLOCKS[kind][0] else "q6_k"
    if model.experts == 8 and role in ("key", "value"):
        return "q8_0"
    if model.experts == 8 and role == "output":
        return "q5_k" if format in ("q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m") else kind
    if format == "q2_k" and role == "value" and model.queries >= 4:
        return "q4_k"
    if format in ("q4_0", "q5_0") and role == "down" and model.imatrix and _first(8)(block, model.depth):
        return {"q4_0": "q4_1", "q5_0": "q5_1"}[format]
    rules, depth = _MIXTURES.get(format, {}).get(role, {}), model.depth
    depth = model.values or depth if role == "value" else depth
    kind = next((higher for higher, applies in rules.items() if applies(block, depth)), kind)
    if role == "value" and kind in ("q3_k", "q4_k") and model.depth == 80 and model.queries > 1:
        return "q5_k"  # Llama 2 70B and its like
    return kind
