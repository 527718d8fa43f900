"""Quantised tensors of safetensors shards, dequantised to bfloat16 a few rows at a time while they are read.

FP8 (float8_e4m3fn with a scale per block, row or tensor) and MXFP4 (packed pairs of 4-bit floats with a power of two per 32) give
the bits that transformers gives with ``dequantize=True``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .entries import DTYPES, ByRows, Plain, Span, Stored, TensorEntry, View, parts
from .names import CARD

QUANTISED = ("quantization_config", "compression_config", "quantization")
"""Config fields that describe quantisation."""
FP8 = "F8_E4M3"
_BLOCKS, _SCALES = "_blocks", "_scales"  # suffixes of the two tensors that store one in MXFP4
_SCALE_DTYPES = {**DTYPES, "F8_E8M0": torch.float8_e8m0fnu, "U8": torch.uint8}
_IGNORED = re.compile(r"(.*\.)?((\w+_proj_)?activation_scale|input_scale|output_scale|k_scale|v_scale)")
"""Names of scales of activations; fused experts have ``gate_up_proj_activation_scale``."""
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # and their negatives: sign, two bits of exponent, one of mantissa


@dataclass(frozen=True)
class Quantisation:
    """A method of quantisation that can be read."""

    method: str
    block: tuple[int, int] | None  # rows and columns per FP8 scale; None: given by the number of scales

    def reads(self, name: str, dtype: str) -> bool:
        """Return whether a tensor may have a dtype that is not one of `DTYPES`."""
        if self.method == "mxfp4":
            return dtype == "U8" and name.endswith((_BLOCKS, _SCALES))
        return dtype == FP8 or (dtype in _SCALE_DTYPES and "scale" in name.rpartition(".")[2])

    def entries(self, stored: Mapping[str, Stored]) -> dict[str, TensorEntry]:
        """Return the tensors of the model. Raises a CheckpointError if the stored ones do not fit together."""
        return dict(self._mxfp4(stored) if self.method == "mxfp4" else self._fp8(stored))

    def _fp8(self, stored: Mapping[str, Stored]) -> Iterator[tuple[str, TensorEntry]]:
        scales = {name: found for name, each in stored.items() if each.dtype == FP8 and (found := _scale(name, stored))}
        used = {*scales.values()}
        for name, each in stored.items():
            if each.dtype == FP8:
                if name not in scales:
                    raise CheckpointError(f"{each.span.file}: tensor {name!r} is FP8, but there is no scale for it")
                yield name, _fp8_entry(name, each, stored[scales[name]], self.block)
            elif name not in used and not _IGNORED.fullmatch(name):
                if each.dtype not in DTYPES:
                    raise CheckpointError(
                        f"{each.span.file}: tensor {name!r} is {each.dtype}, and no FP8 tensor's scale"
                    )
                yield name, Plain(DTYPES[each.dtype], each.shape, each.span)

    def _mxfp4(self, stored: Mapping[str, Stored]) -> Iterator[tuple[str, TensorEntry]]:
        for name, each in stored.items():
            if each.dtype != "U8":
                yield name, Plain(DTYPES[each.dtype], each.shape, each.span)
            elif name.endswith(_BLOCKS):
                base = name.removesuffix(_BLOCKS)
                if base in stored:
                    raise CheckpointError(
                        f"{each.span.file}: tensor {base!r} is stored in MXFP4 ({name}) and plainly too"
                    )
                scales = stored.get(base + _SCALES)
                if (
                    scales is None
                    or scales.dtype != "U8"
                    or scales.shape != each.shape[:-1]
                    or 0 in each.shape
                    or len(each.shape) < 3
                ):
                    raise CheckpointError(f"{each.span.file}: no MXFP4 scales that fit tensor {name!r}")
                # Stored as rows of outputs; gpt-oss has (experts, inputs, outputs).
                shape = (*each.shape[:-2], 2 * prod(each.shape[-2:]))
                yield (
                    base,
                    View.of(Mxfp4(torch.bfloat16, shape, each.span, scales.span, each.shape[-1]), transposed=True),
                )
            else:
                blocks = stored.get(name.removesuffix(_SCALES) + _BLOCKS)
                if blocks is None or blocks.dtype != "U8":
                    raise CheckpointError(f"{each.span.file}: no MXFP4 blocks for the scales {name!r}")


def read_quantisation(config: Mapping[str, Any]) -> Quantisation | None:
    """Return the quantisation that a config declares, if it is one that can be read."""
    declared = _declaring(config).get("quantization_config")
    if not isinstance(declared, dict):
        return None
    method = declared.get("quant_method")
    if method == "mxfp4":
        return Quantisation("mxfp4", None)
    block: Any = declared.get("weight_block_size")
    if method == "compressed-tensors" and declared.get("format") == "float-quantized":
        groups = declared.get("config_groups")
        weights = [each.get("weights") for each in groups.values()] if isinstance(groups, dict) else []
        block = next((each.get("block_structure") for each in weights if isinstance(each, dict)), None)
    elif method != "fp8":
        return None
    two = isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
    return Quantisation("fp8", (block[0], block[1]) if two else None)


def quantised_by(config: Mapping[str, Any]) -> str | None:
    """Return the quantisation method that a config declares, such as ``gptq``; None if it declares none."""
    for field in QUANTISED:
        given = _declaring(config).get(field)
        if given is not None:
            method = given.get("quant_method") if isinstance(given, dict) else None
            return str(method)[:40] if method else f"as {field} says"
    return None


def without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without the fields that describe quantisation, and its `text_config` without them."""
    kept = {field: value for field, value in config.items() if field not in QUANTISED}
    if isinstance(text := kept.get("text_config"), dict):
        kept["text_config"] = {field: value for field, value in text.items() if field not in QUANTISED}
    return kept


def _declaring(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a config that declares quantisation: `text_config` if the rest does not."""
    text = config.get("text_config")
    whole = any(config.get(field) is not None for field in QUANTISED)
    return text if isinstance(text, dict) and not whole else config


def original(directory: Path, config: Mapping[str, Any]) -> str | None:
    """Return the name of the model that was quantised, as the model card or the config gives it; None if neither does."""
    card = directory / CARD
    head = card.read_bytes()[: 1 << 16].decode(errors="replace") if card.is_file() else ""
    named = re.search(r"^base_model:\s*(?:-\s*)?([\w.-]+/[\w.-]+)\s*$", head, re.MULTILINE)
    given = config.get("_name_or_path")
    return named[1] if named else given[:200] if isinstance(given, str) and given else None


def _scale(name: str, stored: Mapping[str, Stored]) -> str | None:
    """Return the name of the scale of an FP8 tensor, as in FP8 checkpoints of transformers, compressed-tensors or DeepSeek V4."""
    base = name.removesuffix("weight")
    names = (f"{name}_scale_inv", f"{name}_scale", *((f"{base}scale", f"{base}qscale_weight") if base != name else ()))
    return next((each for each in names if each in stored), None)


def _fp8_entry(name: str, values: Stored, scales: Stored, block: tuple[int, int] | None) -> Fp8:
    """Return the entry of an FP8 tensor with one scale, or with scales per block of its last two dimensions or per row."""
    shape, given, dtype = values.shape, scales.shape, _SCALE_DTYPES[scales.dtype]
    if prod(given) == 1 and shape and 0 not in shape:
        rows = prod(shape[:-1])
        return Fp8(torch.bfloat16, shape, values.span, scales.span, dtype, (rows, 1, 1), (rows, shape[-1]), 0)
    if given == shape[:-1]:
        given = (*given, 1)
    if len(given) == len(shape) > 1 and given[:-2] == shape[:-2] and 0 not in (*shape, *given):
        (height, width), (lines, columns) = shape[-2:], given[-2:]
        # A last block may be narrower; blocks that the config does not give are equal, as in transformers.
        for size in (block, (height // lines, width // columns)):
            if size and 0 not in size and (lines, columns) == (ceil(height / size[0]), ceil(width / size[1])):
                return Fp8(torch.bfloat16, shape, values.span, scales.span, dtype, (height, lines, columns), size, 0)
    raise CheckpointError(
        f"{values.span.file}: tensor {name!r} has shape {list(shape)}, which its scales {list(scales.shape)} do not fit"
    )


@dataclass(frozen=True)
class Fp8(ByRows):
    """Values in float8_e4m3fn times a scale per block of a matrix; of a tensor (experts, rows, columns), per block and expert.

    Args:
        scale_dtype: uint8 holds exponents of 2 with bias 127.
        grid: rows of a matrix, and its scales per column and per row.
        block: rows and columns per scale.
        first: number of stored rows before the first of this part.
    """

    values: Span
    scales: Span
    scale_dtype: torch.dtype
    grid: tuple[int, int, int]
    block: tuple[int, int]
    first: int

    @property
    def spans(self) -> tuple[Span, ...]:
        return self.values, self._scales_of(0, self.numel // self.shape[-1])[0]

    def fill(self, out: Tensor) -> None:
        width = self.shape[-1]
        for begin, rows in chunks(out):
            count = len(rows)
            x = self.values.part(begin * width, count * width).read(torch.float8_e4m3fn).view(count, width).float()
            span, lines = self._scales_of(begin, begin + count)
            s = span.read(self.scale_dtype).view(-1, self.grid[2])
            s = ((s.float() - 127).exp2() if s.dtype == torch.uint8 else s.float())[lines]
            whole = width // self.block[1]
            x[:, : whole * self.block[1]].view(count, whole, self.block[1]).mul_(s[:, :whole, None])
            if whole < self.grid[2]:
                x[:, whole * self.block[1] :].mul_(s[:, whole:])
            rows.copy_(x)

    def rows(self, begin: int, end: int, shape: tuple[int, ...]) -> Fp8:
        values = self.values.part(begin * self.shape[-1], (end - begin) * self.shape[-1])
        return replace(self, shape=shape, values=values, first=self.first + begin)

    def _scales_of(self, begin: int, end: int) -> tuple[Span, Tensor]:
        """Return the bytes of the scales of rows, and for each row the index of its scales in them, int64."""
        height, per_column, per_row = self.grid
        rows = torch.arange(self.first + begin, self.first + end)
        lines = rows // height * per_column + rows % height // self.block[0]
        first, last = int(lines[0]), int(lines[-1])
        nbytes = per_row * self.scale_dtype.itemsize
        return self.scales.part(first * nbytes, (last + 1 - first) * nbytes), lines - first


@dataclass(frozen=True)
class Mxfp4(ByRows):
    """Pairs of 4-bit floats (sign, 2-bit exponent, 1-bit mantissa), the first in the low bits, times a power of two per block.

    `scales` has the exponents, with bias 127; `block` is the number of bytes per scale.
    """

    values: Span
    scales: Span
    block: int

    @property
    def spans(self) -> tuple[Span, ...]:
        return self.values, self.scales

    def fill(self, out: Tensor) -> None:
        width = self.shape[-1] // 2
        groups = width // self.block
        four = torch.tensor([*_FP4, *(-value for value in _FP4)], dtype=self.dtype)
        pairs = torch.stack([four.repeat(16), four.repeat_interleave(16)], dim=1)  # by byte
        for begin, rows in chunks(out):
            count = len(rows)
            packed = self.values.part(begin * width, count * width).read(torch.uint8)
            exponents = self.scales.part(begin * groups, count * groups).read(torch.uint8).view(count, groups, 1)
            values = pairs[packed.int()].view(count, groups, 2 * self.block)
            rows.view(values.shape).copy_(torch.ldexp(values, exponents.int() - 127))

    def rows(self, begin: int, end: int, shape: tuple[int, ...]) -> Mxfp4:
        width = self.shape[-1] // 2
        groups = width // self.block
        values = self.values.part(begin * width, (end - begin) * width)
        return replace(
            self, shape=shape, values=values, scales=self.scales.part(begin * groups, (end - begin) * groups)
        )


def chunks(out: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Iterate over the rows of a contiguous tensor along its last dimension, see `parts`: first row, and rows (n, columns)."""
    rows = out.view(-1, out.shape[-1])
    return ((begin, rows[begin:end]) for begin, end in parts(*rows.shape))
