"""GGUF files as models: blocks are dequantised to bfloat16 by the gguf package, a few rows at a time while they are read.

Config, tensor names and layouts are those of transformers' own GGUF loader. Config and tokenizer come from the file alone, even if
there are others beside it.
"""

from __future__ import annotations

import copy
import importlib.util
import mmap
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError, one_line
from ..system.directory import check_pointer
from .entries import ALL, ByRows, Span, Stored, TensorEntry, View
from .quantised import chunks

Array = np.ndarray[Any, Any]
Layout = Callable[[Array], Array]
"""Gives a tensor of the file the values and layout that it has in transformers."""
_EXPERTS = re.compile(r"(blk\.\d+\.ffn_(gate|up|down)_exps)\.weight")
_FACTORS = "rope_freqs.weight"
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What every llama 3 has besides its factor."""
_MORE = {
    "llama": {"attention.key_length": "head_dim"},
    "mistral": {"attention.key_length": "head_dim"},
    "qwen3": {"attention.key_length": "head_dim"},
    "qwen3_moe": {"expert_feed_forward_length": "moe_intermediate_size"},
    "qwen2_moe": {
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    },
    "gpt2": {"context_length": "n_positions", "feed_forward_length": "n_inner"},
    "gemma2": {name: name for name in ("attn_logit_softcapping", "final_logit_softcapping")},
}
"""Fields of a file that transformers' loader leaves at its defaults, by model type, with their names in the config."""
_GEMMA_27B = {"gemma2": 46, "gemma3_text": 62}
"""Numbers of blocks of the Gemma models whose attention is scaled by the width per head; others by the head's own width."""
_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Sizes of metadata values by the number of their type; 8 are strings, 9 arrays."""
_STRING, _ARRAY = 8, 9
_VALUES = (
    1 << 22
)  # most values of metadata, elements of arrays included; a vocabulary of 262,144 tokens with merges takes 1.4 million
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_PIECE = 1 << 20  # bytes that are checked for NaN and Inf at a time, at least one block


class Gguf(NamedTuple):
    """What a GGUF file says of its model."""

    config: dict[str, Any]  # fields of config.json
    header: bytes  # everything before the tensors
    stored: dict[str, Stored]  # by the file's names
    entries: dict[str, TensorEntry]  # by transformers' names


def read_gguf(path: Path) -> Gguf:
    """Read a GGUF file without its tensors. The last two results are kept as long as the files do not change.

    Raises:
        CheckpointError: the gguf package is missing, transformers does not support the architecture, a tensor has no place in the
            model or cannot be dequantised, or the file is damaged or one of several parts.
    """
    check_pointer(path)
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError(
            f"{path} is a GGUF file; reading it needs the gguf package: pip install 'streamprune[gguf]'"
        )
    stat = path.stat()
    found = _read(path, stat.st_size, stat.st_mtime_ns, stat.st_ino)
    return found._replace(config=copy.deepcopy(found.config), stored=dict(found.stored), entries=dict(found.entries))


@lru_cache(maxsize=2)
def _read(path: Path, *stamps: int) -> Gguf:
    import gguf

    from . import upstream

    check_metadata(path)
    with upstream.translated(path, "read this GGUF file"), upstream.parsed_once():
        reader = gguf.GGUFReader(path)
        fields = {
            name: field.contents()
            for name in reader.fields
            if not name.startswith("tokenizer.") and (field := reader.get_field(name)) is not None
        }
        if fields.get("split.count", 1) > 1:
            raise CheckpointError(
                f"{path} is one of {fields['split.count']} parts; join them with llama-gguf-split --merge"
            )
        stored = dict(_stored(path, reader.tensors))
        architecture = fields["general.architecture"]
        depth = fields.get(f"{architecture}.block_count", 0)
        blocks = {name.split(".")[1] for name in stored if name.startswith("blk.")}
        if depth > len(blocks):
            raise CheckpointError(f"{path}: it says {depth} blocks and holds {len(blocks)}")
        config, tokenizer = upstream.gguf_config(path)
        config |= {name: tokenizer.get(name) for name in _TOKENS} | {"dtype": "bfloat16"}
        for given, name in _MORE.get(config["model_type"], {}).items():
            if (value := fields.get(f"{architecture}.{given}")) is not None:
                config[name] = value
        if (largest := _GEMMA_27B.get(config["model_type"])) is not None:
            scale = config["hidden_size"] // config["num_attention_heads"] if depth == largest else config["head_dim"]
            config["query_pre_attn_scalar"] = scale
        scaling = _scaling(path, fields, config, stored)
        if scaling is not None:
            config["rope_scaling"] = scaling
        names, layout = upstream.gguf_names(architecture, config)
        entries = dict(_entries(path, stored, names, layout))
        header = bytes(reader.data[: reader.data_offset])
    return Gguf({name: value for name, value in config.items() if not name.startswith("_")}, header, stored, entries)


def check_metadata(path: Path) -> None:
    """Check the counts and lengths in a GGUF file's metadata: the gguf package believes them, and takes time and memory for them.

    Raises:
        CheckpointError: a string or an array ends beyond the file, arrays are nested, there are more than `_VALUES`, or the file is
            not of version 2 or 3 in little-endian order.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _walk(data)
    except (ValueError, struct.error) as error:
        raise CheckpointError(f"{path}: cannot read this GGUF file ({one_line(error)})") from error


def _walk(data: mmap.mmap) -> None:
    magic, version, tensors, count = struct.unpack_from("<4sIQQ", data)
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError("it is not one of version 2 or 3 in little-endian order")
    at, left = 24, _VALUES

    def number(form: str) -> int:
        nonlocal at
        (found,) = struct.unpack_from(form, data, at)
        at += struct.calcsize(form)
        return int(found)

    def skip(values: int, kind: int) -> None:
        nonlocal at, left
        left -= values
        if left < 0:
            raise ValueError(f"its metadata has more than {_VALUES} values")
        if kind == _STRING:
            for _ in range(values):
                skip_bytes(number("<Q"))
        elif kind in _BYTES:
            skip_bytes(values * _BYTES[kind])
        else:
            raise ValueError(f"there is a value of type {kind} at byte {at}")

    def skip_bytes(nbytes: int) -> None:
        nonlocal at
        if nbytes > len(data) - at:
            raise ValueError(f"the value at byte {at} ends beyond the file")
        at += nbytes

    for _ in range(count):
        skip(1, _STRING)
        kind, values = number("<I"), 1
        if kind == _ARRAY:
            kind, values = number("<I"), number("<Q")
        skip(values, kind)
    if tensors > left:
        raise ValueError(f"it claims {tensors} tensors")


def _stored(path: Path, tensors: Any) -> Iterator[tuple[str, Stored]]:
    from gguf.constants import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    for tensor in tensors:
        shape = tuple(map(int, reversed(tensor.shape.tolist())))
        kind, unit = tensor.tensor_type, GGML_QUANT_SIZES[tensor.tensor_type][1]
        if 0 in shape:
            raise CheckpointError(f"{path}: tensor {tensor.name!r} is empty")
        try:
            dequantize(np.zeros((1, unit), np.uint8), kind)
        except NotImplementedError:
            raise CheckpointError(
                f"{path}: tensor {tensor.name!r} is {kind.name}, which cannot be dequantised"
            ) from None
        yield (
            tensor.name,
            StoredBlocks(kind.name, shape, Span(path, int(tensor.data_offset), int(tensor.n_bytes)), kind, unit),
        )


def _scaling(
    path: Path, fields: Mapping[str, Any], config: Mapping[str, Any], stored: Mapping[str, Stored]
) -> dict[str, Any] | None:
    """Return the scaling of the rotary embedding, which transformers' loader leaves out for most architectures."""
    from . import upstream

    if _FACTORS in stored:
        factors = Blocks.of(stored[_FACTORS]).floats(0, 1)[0]
        found = {"rope_type": "llama3", "factor": round(float(factors.max()), 6), **_LLAMA3}
        expected = upstream.gguf_factors(config, found)
        if expected.shape != factors.shape or not torch.allclose(expected, factors, rtol=1e-4):
            raise CheckpointError(
                f"{path}: the factors of its rotary embedding ({_FACTORS}) are not those of a llama 3"
            )
        return found
    prefix = f"{fields['general.architecture']}.rope.scaling."
    kind = fields.get(f"{prefix}type", "none")
    if kind == "none" or "rope_scaling" in config:
        return None
    found = {"rope_type": kind, "factor": fields.get(f"{prefix}factor")}
    if kind == "yarn":
        found["original_max_position_embeddings"] = fields.get(f"{prefix}original_context_length")
    if kind not in ("linear", "yarn") or None in found.values():
        raise CheckpointError(f"{path}: its rotary embedding is scaled by {kind!r}, which cannot be read")
    return found


def _entries(
    path: Path, stored: Mapping[str, Stored], names: Mapping[str, str], layout: Callable[[str], Layout]
) -> Iterator[tuple[str, TensorEntry]]:
    for name, each in stored.items():
        blocks, experts = Blocks.of(each), _EXPERTS.fullmatch(name)
        if experts and experts[1] in names and len(each.shape) == 3:
            folder = names[experts[1]].rpartition(".")[0]
            for number in range(each.shape[0]):
                yield f"{folder}.{number}.{experts[2]}_proj.weight", blocks.part(number)
        elif name in names:
            yield names[name], laid_out(blocks, layout(name))
        elif name != _FACTORS:
            raise CheckpointError(
                f"{path}: tensor {name!r} has no place in the model that transformers makes of the file"
            )


def _floats(blocks: Array, kind: Any) -> Array:
    """Dequantise blocks (n, bytes) to float32, without NumPy's warnings about Inf and NaN, which are looked for elsewhere."""
    from gguf.quants import dequantize

    with np.errstate(all="ignore"):
        found: Array = dequantize(blocks, kind)
    return found


@dataclass(frozen=True)
class StoredBlocks(Stored):
    """A tensor of a GGUF file; `dtype` is the name of its type there."""

    kind: Any  # GGMLQuantizationType
    block: int  # bytes per block

    @property
    def unit(self) -> int:
        return self.block

    def finite(self, piece: Tensor) -> bool:
        step = max(1, _PIECE // self.unit)
        blocks = piece.view(-1, self.unit).numpy()
        parts = (blocks[begin : begin + step] for begin in range(0, len(blocks), step))
        return all(bool(np.isfinite(_floats(part, self.kind)).all()) for part in parts)


@dataclass(frozen=True, eq=False)
class Blocks(ByRows):
    """Rows of GGUF blocks. `order` (rows,) int64 has the stored row of each row; None: as stored."""

    span: Span
    kind: Any
    row_bytes: int
    order: Tensor | None

    @classmethod
    def of(cls, stored: Stored) -> Blocks:
        assert isinstance(stored, StoredBlocks)
        rows = int(np.prod(stored.shape[:-1]))
        return cls(torch.bfloat16, stored.shape, stored.span, stored.kind, stored.span.nbytes // rows, None)

    @property
    def spans(self) -> tuple[Span, ...]:
        return (self.span,) if self.order is None else (self._rows(self.order)[0],)

    def floats(self, begin: int, end: int) -> Tensor:
        """Return rows (end − begin, columns), dequantised to float32."""
        picked = torch.arange(begin, end) if self.order is None else self.order[begin:end]
        span, local = self._rows(picked)
        data = span.read(torch.uint8).view(-1, self.row_bytes)
        rows = torch.from_numpy(_floats(data.numpy(), self.kind))
        return rows if self.order is None else rows[local]

    def fill(self, out: Tensor) -> None:
        for begin, rows in chunks(out):
            rows.copy_(self.floats(begin, begin + len(rows)))

    def rows(self, begin: int, end: int, shape: tuple[int, ...]) -> Blocks:
        if self.order is not None:
            return replace(self, shape=shape, order=self.order[begin:end])
        return replace(self, shape=shape, span=self.span.part(begin * self.row_bytes, (end - begin) * self.row_bytes))

    def _rows(self, picked: Tensor) -> tuple[Span, Tensor]:
        """Return the bytes of stored rows, with those between them, and the index of each row in them."""
        first, last = int(picked.min()), int(picked.max())
        return self.span.part(first * self.row_bytes, (last + 1 - first) * self.row_bytes), picked - first


@dataclass(frozen=True, eq=False)
class Processed(TensorEntry):
    """A tensor whose values or layout transformers changes when it loads it. It is dequantised as a whole, in float32."""

    base: Blocks
    layout: Layout

    @property
    def spans(self) -> tuple[Span, ...]:
        return self.base.spans

    def fill(self, out: Tensor) -> None:
        rows = int(np.prod(self.base.shape[:-1]))
        values = self.layout(self.base.floats(0, rows).view(self.base.shape).numpy())
        out.copy_(torch.from_numpy(np.ascontiguousarray(values)))

    def part(self, index: int | None = None, rows: slice = ALL, *, transposed: bool = False) -> TensorEntry:
        assert index is None, "only experts are parts of tensors, and their layout is not changed"
        return View.of(self, rows, transposed=transposed)


def laid_out(blocks: Blocks, layout: Layout) -> TensorEntry:
    """Return a tensor as transformers lays it out. Where only the order of rows differs, it is still read by rows."""
    if len(blocks.shape) == 2:
        numbers = np.arange(blocks.shape[0], dtype=np.float64)[:, None]
        try:
            order = layout(numbers)
        except ValueError:  # a layout that needs the columns too
            order = np.zeros(0)
        if order is numbers:
            return blocks
        if order.shape == numbers.shape and np.array_equal(np.sort(order, axis=0), numbers):
            return replace(blocks, order=torch.from_numpy(order[:, 0].astype(np.int64)))
    blank = np.broadcast_to(np.float32(1), blocks.shape)
    after = layout(blank)
    return blocks if after is blank else Processed(blocks.dtype, after.shape, blocks, layout)
