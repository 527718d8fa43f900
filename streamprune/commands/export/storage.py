"""Convert tensors to GGUF's storage types: f32, f16, bf16, or q8_0 (8-bit numbers in blocks of 32 with a scale)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import NumericalError

DTYPES = ("f32", "f16", "bf16", "q8_0")
_CHUNK = 1 << 22
"""Elements converted at a time."""
_LARGEST = float(np.finfo(np.float16).max)


def stored_as(dtype: str, name: str, shape: tuple[int, ...]) -> Any:
    """Return the `GGMLQuantizationType` of a tensor.

    Norms, biases and positions stay f32. A tensor whose row length is no multiple of the type's block becomes f16.
    """
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    wanted = GGMLQuantizationType[dtype.upper()]
    if len(shape) < 2 or name == "position_embd.weight":
        return GGMLQuantizationType.F32
    block, _ = GGML_QUANT_SIZES[wanted]
    return GGMLQuantizationType.F16 if shape[-1] % block else wanted


def stored_bytes(kind: Any, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor stored as `kind`."""
    from gguf.constants import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // block * size


def pack(tensor: Tensor, kind: Any, name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Convert a tensor (..., columns) to the bytes of type `kind`, a few rows at a time: (rows, row_bytes) uint8.

    Raises:
        NumericalError: the tensor contains NaN, Inf or, for f16, a number outside its range.
    """
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import quantize

    rows = tensor.reshape(-1, tensor.shape[-1])
    row_bytes = stored_bytes(kind, (rows.shape[1],))
    packed = np.empty((rows.shape[0], row_bytes), np.uint8)
    step = max(1, _CHUNK // rows.shape[1])
    for begin in range(0, rows.shape[0], step):
        chunk = np.ascontiguousarray(rows[begin : begin + step].to(torch.float32).numpy())
        largest = float(np.abs(chunk).max())
        if not np.isfinite(largest):
            raise NumericalError(f"tensor {name!r} holds NaN or Inf")
        if kind == GGMLQuantizationType.F16 and largest > _LARGEST:
            raise NumericalError(
                f"tensor {name!r} holds {largest:g}, beyond {_LARGEST:g}, the most of f16; take --dtype bf16"
            )
        packed[begin : begin + step] = quantize(chunk, kind).view(np.uint8).reshape(len(chunk), row_bytes)
    return packed
