"""The tensors of a GGUF file: names, shapes, types (f32, f16, bf16, or q8_0: blocks of 32 8-bit numbers with a scale)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from gguf import (
    MODEL_ARCH,
    GGMLQuantizationType,
    get_tensor_name_map,
    quant_shape_to_byte_shape,
    quantize,
)
from torch import Tensor

from ...errors import NumericalError
from ...model.formats import PLAIN, Model, Role, Weight, gguf_type
from ...model.llama_cpp import QKV, Runtime
from ...model.site import routed
from ...model.skeleton import Skeleton
from .quantiser import quantise_rows

_EXPERT = re.compile(r"(.*\.experts)\.\d+\.(\w+\.weight)")
_CHUNK = 1 << 22
"""Elements converted at a time."""
_LARGEST = float(np.finfo(np.float16).max)
_ROLES: dict[str, Role] = {
    "token_embd": "embedding",
    "output": "head",
    "position_embd": "kept",
    "ffn_gate_inp": "kept",
    "attn_q": "linear",
    "attn_k": "key",
    "attn_v": "value",
    "attn_qkv": "value",
    "attn_output": "output",
    "ffn_down": "down",
    "ffn_down_exps": "down",
}
"""By the last part of a tensor's name, without ``.weight``; others are linears."""


@dataclass(frozen=True)
class Planned:
    """A tensor of the file."""

    name: str
    parts: list[str]
    """Names of the tensors in the checkpoint that it is made of."""
    convert: Callable[..., Tensor]
    """Function from the parts to the tensor (..., columns)."""
    kind: GGMLQuantizationType
    wanted: GGMLQuantizationType
    """What `kind` would be if the rows were a multiple of 256 long."""
    byte_shape: tuple[int, ...]
    """(..., bytes of a row)."""


def plan(
    skeleton: Skeleton, runtime: Runtime, dtype: str, factors: Tensor | None, imatrix: bool = False
) -> Iterator[Planned]:
    """Yield every tensor of the file, in order.

    Args:
        dtype: name of the file's format, see `model.formats`.
        factors: the rotary embedding's, see `add_rotary`.
        imatrix: whether the importance of columns is known, on which the choice of a type depends.
    """
    attention = next(site for site in skeleton.all_sites() if site.kind == "attention")
    model = Model(
        depth=len(skeleton),
        tied=skeleton.outside.tied and not runtime.stored_head,
        experts=max(map(len, routed(skeleton.all_sites()).values()), default=0),
        queries=attention.heads // attention.units,
        imatrix=imatrix,
    )
    mapping = get_tensor_name_map(MODEL_ARCH[runtime.name.upper()], len(skeleton))
    plain = partial(_plain, norm_shift=runtime.norm_shift)

    def named(name: str) -> str:
        stem, _, leaf = name.rpartition(".")
        return f"{mapping[stem]}.{leaf}"

    def planned(name: str, parts: list[str], convert: Callable[..., Tensor]) -> Planned:
        shapes = [skeleton.checkpoint[part].shape for part in parts]
        shape = tuple(convert(*(torch.empty(each, device="meta") for each in shapes)).shape)
        kind, wanted = (_stored_as(dtype, name, each, model) for each in (shape, (*shape[:-1], 256)))
        return Planned(name, parts, convert, kind, wanted, quant_shape_to_byte_shape(shape, kind))

    if factors is not None:
        yield planned("rope_freqs.weight", [], lambda: factors)
    for name in skeleton.outside.embed_names():
        yield planned(named(name), [name], plain)
    for index in range(len(skeleton)):
        names = skeleton.block_names(index)
        if runtime.fused:
            parts = [names.pop(f"{linear}.weight") for linear in QKV]
            yield planned(f"blk.{index}.attn_qkv.weight", parts, lambda *rows: torch.cat(rows))
        experts: dict[str, list[str]] = {}
        for inside in [inside for inside in names if _EXPERT.fullmatch(inside)]:
            experts.setdefault(_EXPERT.sub(r"\1.\2", inside), []).append(names.pop(inside))
        for stacked, parts in experts.items():
            yield planned(named(f"model.layers.{index}.{stacked}"), parts, lambda *each: torch.stack(each))
        pair = partial(_paired, head_width=skeleton.sites(index)[0].head_width)
        for inside, name in names.items():
            convert = pair if runtime.paired and inside.rpartition(".")[0] in QKV[:2] else plain
            yield planned(named(name), [name], torch.t if runtime.transposed else convert)
    for name in skeleton.outside.head_names():
        yield planned(named(name), [name], plain)
    if runtime.stored_head and skeleton.outside.tied:
        yield planned("output.weight", skeleton.outside.embed_names(), plain)


def _plain(tensor: Tensor, norm_shift: float) -> Tensor:
    return tensor.float() + norm_shift if norm_shift and tensor.dim() == 1 else tensor


def _paired(tensor: Tensor, head_width: int) -> Tensor:
    """Reorder the rows of (heads · head_width, ...) in each head as ``0, d/2, 1, d/2+1, ...``, d = head_width."""
    halves = tensor.reshape(-1, 2, head_width // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _stored_as(dtype: str, name: str, shape: tuple[int, ...], model: Model) -> GGMLQuantizationType:
    path = name.removesuffix(".weight").split(".")
    weight = Weight(shape, _ROLES.get(path[-1], "linear"), int(path[1]) if path[0] == "blk" else 0)
    return GGMLQuantizationType[gguf_type(dtype, weight, model).upper()]


def of_columns(planned: Planned, importance: Mapping[str, Tensor]) -> Tensor | None:
    """Return the importance of a tensor's columns: (experts, columns) for stacked experts, (1, columns) for others; None: unknown."""
    parts = [importance[part] for part in planned.parts if part in importance]
    if not parts:
        return None
    return torch.stack(parts if len(planned.byte_shape) > 2 else parts[:1])  # fused projections read the same


def pack(
    tensor: Tensor, kind: GGMLQuantizationType, name: str, importance: Tensor | None = None
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Convert a tensor (..., columns) to the bytes of type `kind`, a few rows at a time: (rows, row_bytes) uint8.

    Args:
        importance: see `of_columns`.

    Raises:
        NumericalError: the tensor contains NaN, Inf or, for f16, a number outside its range.
    """
    rows = tensor.reshape(-1, tensor.shape[-1])
    packed = np.empty(quant_shape_to_byte_shape(rows.shape, kind), np.uint8)
    plain = kind.name.lower() in PLAIN
    height = len(rows) if importance is None else len(rows) // len(importance)
    step = max(1, _CHUNK // rows.shape[1])

    def fill(begin: int, end: int) -> None:
        chunk = rows[begin:end].to(torch.float32).contiguous().numpy()
        largest = float(np.abs(chunk).max())
        if not np.isfinite(largest):
            raise NumericalError(f"tensor {name!r} holds NaN or Inf")
        if kind == GGMLQuantizationType.F16 and largest > _LARGEST:
            raise NumericalError(
                f"tensor {name!r} holds {largest:g}, but f16 ends at {_LARGEST:g}; export with --dtype bf16"
            )
        columns = None if importance is None else importance[begin // height].contiguous().numpy()
        packed[begin:end] = quantize(chunk, kind).view(np.uint8) if plain else quantise_rows()(chunk, kind, columns)

    pieces = [
        (begin, min(begin + step, first + height))
        for first in range(0, len(rows), height)
        for begin in range(first, first + height, step)
    ]
    # llama.cpp's quantiser searches for scales, without the interpreter's lock.
    with ThreadPoolExecutor(1 if plain else torch.get_num_threads()) as pool:
        for _ in pool.map(fill, *zip(*pieces, strict=True)):
            pass
    return packed
