"""Weights directories of safetensors shards: read lazily by tensor name, written shard by shard.

Reading goes by byte ranges into fresh tensors (no memory map), so that resident memory is what was
asked for and bytes can be counted. `safetensors` itself validates every header first.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from ..errors import CheckpointError, DamageError, one_line
from ..system import files
from ..system.directory import check_links, check_pointer
from ..system.host import host_buffer, tensor_bytes
from ..system.strict_json import parse, read_json, write_json
from .names import ADAPTER, CONFIG, INDEX, RUN_TIME, SINGLE

CPU = torch.device("cpu")
UNREAD = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")
"""Ends of names of buffers that old checkpoints carry and no model reads any more."""
MODELOPT = "hf_quant_config.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.safetensors")
"""A name that is no path, and no pattern either: the hub is asked for it."""
QUANTISED = ("quantization_config", "compression_config", "quantization")
"""Fields of a config that say how weights are packed."""
_PACKED = (
    (re.compile(r"\.(qweight|qzeros|g_idx)$"), "GPTQ or AWQ"),
    (re.compile(r"\.(absmax|quant_map|nested_absmax|nested_quant_map|SCB|quant_state\..*)$"), "bitsandbytes"),
    (re.compile(r"\.weight_scale_2$"), "ModelOpt"),
    (
        re.compile(r"\.(weight_packed|weight_shape|weight_zero_point|(weight|input)_global_scale)$"),
        "compressed-tensors",
    ),
    (re.compile(r"\.(weight_scale|input_scale)$"), "compressed-tensors or ModelOpt"),
    (re.compile(r"\.weight_scale_inv$|_proj_(blocks|scales)$"), "block-scaled float"),
)
"""Endings of the names of tensors that only packed weights have, and whose they are: the surest first."""

_TABLES = ("I64", "BOOL")
"""What no weights are packed in."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""What weights may be stored in."""
NAMES = {**{dtype: name for name, dtype in DTYPES.items()}, torch.int64: "I64"}
"""What `write_shard` writes: weights, and counts."""


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies."""

    shard: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    """Offset in the file."""
    nbytes: int

    @property
    def numel(self) -> int:
        """Elements."""
        return self.nbytes // self.dtype.itemsize


class Checkpoint(Mapping[str, TensorEntry]):
    """A checkpoint directory: tensor names to their places; `read` fetches one.

    Raises:
        CheckpointError: not a checkpoint, pickles only, two sets of weights, a shard that is missing, cut short or
            corrupt, an index that names a file outside the directory or a tensor its shard lacks, a tensor in two
            shards, a packed dtype or an integer one, a Git LFS pointer, a link that leads out of the directory, an
            adapter that is not merged.
    """

    def __init__(self, directory: Path) -> None:
        if not directory.is_dir():
            raise CheckpointError(f"{directory} is not a directory with a model in it")
        check_links(directory)
        if (directory / ADAPTER).exists():
            raise CheckpointError(
                f"{directory} has an adapter ({ADAPTER}) beside its weights; merge it first, or take the file away"
            )
        self.directory = directory
        config = read_json(directory / CONFIG)
        named = config.get("transformers_weights")
        if named is not None and named != (file := weight_file(directory)):
            raise CheckpointError(
                f"{directory / CONFIG}: transformers_weights has transformers read {str(named)[:80]!r} in place of {file}; "
                "delete the field, or that file"
            )
        self.config = {field: value for field, value in config.items() if field not in RUN_TIME}
        """Without how somebody once ran the model."""
        self.bytes_read = 0
        self.headers: dict[str, str] = {}
        """Digest of every shard's header, by file name."""
        self._entries: dict[str, TensorEntry] = {}
        for shard, wanted in self._shards().items():
            self._open(directory / shard, wanted)

    def __getitem__(self, name: str) -> TensorEntry:
        try:
            return self._entries[name]
        except KeyError:
            raise CheckpointError(f"{self.directory}: no tensor {name!r}") from None

    def __iter__(self) -> Any:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    @property
    def claimed(self) -> Set[str]:
        """Names of all tensors that there ought to be."""
        return self._entries.keys()

    def read(self, name: str, device: torch.device = CPU) -> Tensor:
        """One tensor on the host in its stored dtype, in memory of its own, ready to go to `device`."""
        entry = self[name]
        buffer = host_buffer(entry.nbytes, device)
        if files.read_into(entry.shard, entry.begin, buffer.numpy().data) < entry.nbytes:
            raise CheckpointError(f"{entry.shard}: ended inside tensor {name!r}")
        self.bytes_read += entry.nbytes
        return buffer.view(entry.dtype).view(entry.shape)

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are stored in, by the first of them."""
        return next((entry.dtype for entry in self.values() if entry.numel), torch.float32)

    def announce(self, name: str) -> None:
        """Have the kernel fetch a tensor that will be read soon."""
        entry = self[name]
        files.announce(entry.shard, entry.begin, entry.nbytes)

    def complete_names(self, prefix: str, head: str) -> None:
        """Put `prefix` before all names but the head's, if none has it: so checkpoints of bare base models read."""
        if not any(name.startswith(f"{prefix}.") for name in self._entries):
            full = {name if name.startswith(f"{head}.") else f"{prefix}.{name}": e for name, e in self._entries.items()}
            self._entries = full

    def identity(self) -> dict[str, Any]:
        """What tells this checkpoint from another: its config, every shard's size, and digests of headers and samples.

        A sample is up to 512 bytes in the middle of each tensor, so that two fine-tunes of one model differ.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()
        samples = {name: hashlib.sha256() for name in self.headers}
        for entry in self._entries.values():
            sample = bytearray(min(512, entry.nbytes))
            files.read_into(entry.shard, entry.begin + (entry.nbytes - len(sample)) // 2, memoryview(sample))
            samples[entry.shard.name].update(sample)
        shards = {
            name: [(self.directory / name).stat().st_size, header, samples[name].hexdigest()]
            for name, header in self.headers.items()
        }
        return {"config": digest, "shards": shards}

    def stamps(self) -> dict[str, list[int]]:
        """Of every shard's file what changes when it is written to or exchanged: size, time of the last write, inode."""
        found = {name: (self.directory / name).stat() for name in self.headers}
        return {name: [stat.st_size, stat.st_mtime_ns, stat.st_ino] for name, stat in found.items()}

    def changed(self, stamps: Mapping[str, list[int]], sums: Mapping[str, int]) -> str | None:
        """A tensor that is no longer what it was; None if there is none.

        Args:
            stamps: of then: only files that have others now are read.
            sums: CRC-32 of the tensors' bytes of then, by name.
        """
        now = self.stamps()
        suspects = {name for name in now if stamps.get(name) != now[name]}
        for name, check in sums.items():
            if self[name].shard.name in suspects and zlib.crc32(tensor_bytes(self.read(name))) != check:
                return name
        return None

    def _shards(self) -> dict[str, set[str] | None]:
        """Shard file names, each with the tensors that the index says it holds (None: whatever it holds)."""
        index = self.directory / INDEX
        if weight_file(self.directory) == SINGLE:
            return {SINGLE: None}
        if not index.exists():
            if any(next(self.directory.glob(pattern), None) for pattern in _PICKLES):
                raise CheckpointError(
                    f"{self.directory} has only pickled weights, which are never opened; convert them to safetensors first"
                )
            raise CheckpointError(f"{self.directory} has neither {SINGLE} nor {INDEX}")
        return {**read_index(index)}

    def _open(self, path: Path, wanted: set[str] | None) -> None:
        if not path.is_file():
            raise CheckpointError(f"shard {path} is {'not a regular file' if path.exists() else 'missing'}")
        length, raw = read_header(path)
        self.headers[path.name] = hashlib.sha256(raw).hexdigest()
        try:
            header = {name: value for name, value in parse(raw.decode("utf-8")).items() if name != "__metadata__"}
        except ValueError as error:
            raise CheckpointError(f"shard {path} is corrupt: {one_line(error)}") from error
        if missing := sorted((wanted or set()) - header.keys()):
            raise CheckpointError(f"shard {path} lacks {missing[0]!r}, which the index places there")
        self._check_dtypes(path, {name: entry["dtype"] for name, entry in header.items()})
        # As transformers, whatever a shard holds is read; the index only says which shards there are.
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                continue
            if (twin := self._entries.get(name)) is not None:
                raise CheckpointError(f"shard {path} holds {name!r}, and so does {twin.shard.name}; it must be in one")
            begin, end = entry["data_offsets"]
            self._entries[name] = TensorEntry(
                path, DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + begin, end - begin
            )

    def _check_dtypes(self, path: Path, dtypes: Mapping[str, str]) -> None:
        """See that a shard's tensors, dtypes by name, can be computed with.

        Raises:
            CheckpointError: packed weights, and by whom; or a table of integers, such as DeepSeek V4's of experts.
        """
        makers = {name: maker for ending, maker in reversed(_PACKED) for name in dtypes if ending.search(name)}
        # Pythia's masks are truth values.
        unread = {n: d for n, d in dtypes.items() if n in makers or (d not in DTYPES and not n.endswith(UNREAD))}
        declared = quantised_by(self.config) or ("modelopt" if (self.directory / MODELOPT).exists() else None)
        packed = [
            name
            for name, dtype in unread.items()
            if name in makers or dtype[0] == "F" or name.endswith(".weight") or (declared and dtype not in _TABLES)
        ]
        only = f"only {', '.join(DTYPES)}"
        if packed:
            surest = next((maker for _, maker in _PACKED if maker in makers.values()), None)
            by = f" ({declared or surest})" if declared or surest else ""
            raise CheckpointError(
                f"{path}: tensor {packed[0]!r} has dtype {unread[packed[0]]}; quantised or packed weights{by} cannot be "
                f"pruned, {only}"
            )
        if unread:
            name, dtype = next(iter(unread.items()))
            raise CheckpointError(f"{path}: tensor {name!r} has dtype {dtype}; tables of it cannot be read, {only}")


def quantised_by(config: Mapping[str, Any]) -> str | None:
    """What a config says that its weights are packed by, such as ``gptq``; None where it says nothing."""
    for field in QUANTISED:
        given = config.get(field)
        if given is not None:
            method = given.get("quant_method") if isinstance(given, dict) else None
            return str(method)[:40] if method else f"as {field} says"
    return None


def weight_file(directory: Path) -> str:
    """The file that transformers takes a directory's weights from: `SINGLE` where that is there, else `INDEX`.

    An index beside `SINGLE` may be left over, its shards gone: transformers does not read it, nor does anything here.

    Raises:
        CheckpointError: both are there, with shards; transformers would not tell.
    """
    index = directory / INDEX
    if not (directory / SINGLE).is_file():
        return INDEX
    for shard in sorted(read_index(index)) if index.exists() else ():
        if shard != SINGLE and (directory / shard).exists():
            raise CheckpointError(
                f"{directory} has two sets of weights: {SINGLE}, which transformers reads, and the shards of {INDEX} "
                f"({shard}); move the ones that are not meant elsewhere"
            )
    return SINGLE


def read_header(path: Path) -> tuple[int, bytes]:
    """A shard's header: its length and its JSON text, once `safetensors` has found all of it true.

    That checks the length against the file, that tensors follow each other without gaps or overlaps up to the end of
    the file, and that each has as many bytes as its shape and dtype say.

    Raises:
        CheckpointError: the shard is corrupt or cut short, or a Git LFS pointer.
    """
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        check_pointer(path)
        raise CheckpointError(f"shard {path} is corrupt or cut short: {one_line(error)}") from error
    beginning = bytearray(8)
    files.read_into(path, 0, memoryview(beginning))
    raw = bytearray(int.from_bytes(beginning, "little"))
    files.read_into(path, len(beginning), memoryview(raw))
    return len(raw), bytes(raw)


def read_index(path: Path) -> dict[str, set[str]]:
    """Shard file names, each with the tensors that an index says it holds.

    Raises:
        CheckpointError: not an index, or a shard that is no safetensors file of the same directory.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map")
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            raise CheckpointError(
                f"{path} places {name!r} in {shard!r}, which is not a file of this directory (NAME.safetensors)"
            )
        shards.setdefault(shard, set()).add(name)
    return shards


def shard_name(number: int, total: int) -> str:
    """`model-00003-of-00010.safetensors`."""
    return f"model-{number:05}-of-{total:05}.safetensors"


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write one shard durably; equal tensors give equal bytes.

    By hand, since safetensors' own writer (0.8) goes by way of a randomly named file beside the target, which only its
    owner may read and which a killed process leaves behind.

    Returns:
        The SHA-256 in hex of what was to be written.

    Raises:
        DiskError: it could not be written, on a full disk for one.
    """
    # Widest elements first, so that every tensor is aligned.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return files.write(path, chain([len(raw).to_bytes(8, "little"), raw], (tensor_bytes(t) for _, t in ordered)))


def load_shard(path: Path, digest: str) -> dict[str, Tensor]:
    """All tensors of a shard whose digest `write_shard` gave.

    Raises:
        DamageError: it is no longer what was written.
    """
    data = files.read_bytes(path) if path.is_file() else b""
    if hashlib.sha256(data).hexdigest() != digest:
        raise DamageError(
            f"{path} is missing, or not what was written there; run the same command again: it is made anew"
        )
    found: dict[str, Tensor] = load(data)
    return found


class Shard(Mapping[str, Tensor]):
    """What `write_shard` wrote; a tensor is read when it is asked for.

    Raises:
        CheckpointError: the shard is corrupt or cut short.
    """

    def __init__(self, path: Path) -> None:
        length, raw = read_header(path)
        self._path, self._begin = path, 8 + length
        self._header = {name: entry for name, entry in json.loads(raw).items() if name != "__metadata__"}

    def __getitem__(self, name: str) -> Tensor:
        entry = self._header[name]
        begin, end = entry["data_offsets"]
        buffer = host_buffer(end - begin, CPU)
        files.read_into(self._path, self._begin + begin, buffer.numpy().data)
        dtype = next(dtype for dtype, code in NAMES.items() if code == entry["dtype"])
        return buffer.view(dtype).view(entry["shape"])

    def __iter__(self) -> Iterator[str]:
        return iter(self._header)

    def __len__(self) -> int:
        return len(self._header)


def data_bytes(path: Path) -> int:
    """Bytes of the tensors in a shard, its header left out."""
    beginning = bytearray(8)
    files.read_into(path, 0, memoryview(beginning))
    return path.stat().st_size - len(beginning) - int.from_bytes(beginning, "little")


def write_index(directory: Path, placed: Mapping[str, str], parameters: int, size: int) -> str:
    """Write the index: `placed` maps tensor names to shard names; `size` is in bytes. Returns its digest."""
    index = {
        "metadata": {"total_parameters": parameters, "total_size": size},
        "weight_map": dict(sorted(placed.items())),
    }
    return write_json(directory / INDEX, index)
