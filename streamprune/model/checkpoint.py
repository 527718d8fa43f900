"""Checkpoint directories of safetensors shards: read lazily by tensor name, written shard by shard.

Tensors are read by byte range into new memory, not memory-mapped. So resident memory is only what was requested, and the bytes
read can be counted. `safetensors` validates every header first.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence, Set
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
from ..system.host import checksum, tensor_bytes
from ..system.strict_json import parse, read_json, write_json
from .entries import CPU, DTYPES, Plain, Span, Stored, TensorEntry
from .hub import find_gguf
from .names import ADAPTER, CONFIG, INDEX, RUN_TIME, SINGLE
from .quantised import Quantisation, original, quantised_by, read_quantisation, without_quantisation

UNREAD = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")
"""Suffixes of the names of buffers that old checkpoints contain and current models do not read."""
MODELOPT = "hf_quant_config.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.safetensors")
"""A shard name that is neither a path nor a pattern, since it may be requested from the hub."""
_TABLES = ("I64", "BOOL")  # dtypes that never hold packed weights
NAMES = {**{dtype: name for name, dtype in DTYPES.items()}, torch.int64: "I64", torch.float8_e4m3fn: "F8_E4M3"}
"""Dtypes that `write_shard` supports: those of weights, int64 for counts, and float8."""


class Checkpoint(Mapping[str, TensorEntry]):
    """A checkpoint directory or GGUF file, as a mapping from tensor names to their locations. `read` loads a tensor.

    Raises:
        CheckpointError: not a checkpoint, or one that cannot be read safely and in full: only pickled weights, two sets of
            weights, a missing or corrupt shard, an index that names a file outside the directory, a link that leads out of it,
            a quantised or integer dtype, a Git LFS pointer, or an adapter that is not merged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        """The directory, or the path of a GGUF file."""
        self.config: dict[str, Any]
        """The config without run-time fields (see `RUN_TIME`), and without those of quantisation if tensors are dequantised."""
        self.bytes_read = 0
        self.headers: dict[str, str] = {}  # SHA-256 in hex of every shard's header, by file name
        self.stored: dict[str, Stored] = {}
        """The tensors of all shards as they are stored, by name, except integers."""
        self.names: dict[str, str] = {}
        """The names in the checkpoint, by the model's, of the tensors that `take` only renamed."""
        self._entries: dict[str, TensorEntry]
        self._quantisation: Quantisation | None = None
        if directory.is_dir():
            check_links(directory)
        if (gguf := find_gguf(directory)) is not None:
            self._read_gguf(gguf)
        elif directory.is_dir():
            self._read_shards()
        else:
            raise CheckpointError(f"{directory} is not a directory with a model in it")

    def _read_gguf(self, path: Path) -> None:
        from .gguf_source import read_gguf

        self.config, header, self.stored, self._entries = read_gguf(path)
        self._digest = _digest(self.config)
        self.headers[path.name] = hashlib.sha256(header).hexdigest()
        self._home = path.parent

    def _read_shards(self) -> None:
        directory = self._home = self.directory
        if (directory / ADAPTER).exists():
            raise CheckpointError(
                f"{directory} has an adapter ({ADAPTER}) beside its weights; merge it first, or remove the file"
            )
        config = read_json(directory / CONFIG)
        named = config.get("transformers_weights")
        if named is not None and named != (file := weight_file(directory)):
            raise CheckpointError(
                f"{directory / CONFIG}: transformers_weights has transformers read {str(named)[:80]!r} in place of {file}; "
                "delete the field, or that file"
            )
        self.config = {field: value for field, value in config.items() if field not in RUN_TIME}
        self._digest = _digest(self.config)
        self._quantisation = read_quantisation(self.config)
        for shard, wanted in self._shards().items():
            self._open(directory / shard, wanted)
        if self._quantisation is None:
            self._entries = {n: Plain(DTYPES[each.dtype], each.shape, each.span) for n, each in self.stored.items()}
        else:
            self._entries = self._quantisation.entries(self.stored)
        if self.dequantises:
            self.config = without_quantisation(self.config)

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
        """Names of all tensors that the checkpoint claims to hold."""
        return self._entries.keys()

    def read(self, name: str, device: torch.device = CPU) -> Tensor:
        """Read a tensor to new host memory, in its entry's dtype; pinned if `device` is a GPU."""
        entry = self[name]
        tensor = entry.read(device)
        self.bytes_read += entry.stored_bytes
        return tensor

    @property
    def dequantises(self) -> bool:
        """Whether tensors are read from a GGUF file or are quantised: other programs do not find in the files what `read` gives."""
        return any(type(each) is not Stored or each.dtype not in DTYPES for each in self.stored.values())

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the first non-empty tensor as `read` gives it: the stored one, or bfloat16 if it is dequantised."""
        return next((entry.dtype for entry in self.values() if entry.numel), torch.float32)

    def announce(self, name: str) -> None:
        """Ask the kernel to read a tensor ahead."""
        for span in self[name].spans:
            files.advise_read(span.file, span.begin, span.nbytes)

    def divide(self, name: str, parts: Mapping[str, TensorEntry]) -> None:
        """Replace a tensor by parts of it, by name: the experts of a fused tensor, see `TensorEntry.part`."""
        del self._entries[name]
        self._entries |= parts

    def unite(self, names: Sequence[str], name: str, whole: TensorEntry) -> None:
        """Replace tensors by one that is made of them."""
        for each in names:
            del self._entries[each]
        self._entries[name] = whole

    def take(self, entries: Mapping[str, TensorEntry]) -> None:
        """Replace the names of all tensors by those of the model."""
        names = {id(entry): name for name, entry in self._entries.items()}
        self.names = {name: names[id(entry)] for name, entry in entries.items() if id(entry) in names}
        self._entries = dict(entries)

    def identity(self) -> dict[str, Any]:
        """Return a fingerprint: the digest of the config and, per shard, size in bytes, digest of the header and digest of samples.

        Samples are up to 512 bytes from the middle of each tensor, so that two fine-tunes of one model differ.
        """
        samples = {name: hashlib.sha256() for name in self.headers}
        for span in (stored.span for stored in self.stored.values()):
            sample = bytearray(min(512, span.nbytes))
            files.read_into(span.file, span.begin + (span.nbytes - len(sample)) // 2, memoryview(sample))
            samples[span.file.name].update(sample)
        shards = {
            name: [(self._home / name).stat().st_size, header, samples[name].hexdigest()]
            for name, header in self.headers.items()
        }
        return {"config": self._digest, "shards": shards}

    def stamps(self) -> dict[str, list[int]]:
        """Return size in bytes, modification time in ns and inode of each shard: they change if the file is modified or replaced."""
        found = {name: (self._home / name).stat() for name in self.headers}
        return {name: [stat.st_size, stat.st_mtime_ns, stat.st_ino] for name, stat in found.items()}

    def changed(self, stamps: Mapping[str, list[int]], sums: Mapping[str, int]) -> str | None:
        """Return the name of a tensor that has changed; None if there is none.

        Args:
            stamps: earlier result of `stamps`. Only files whose stamps differ now are read.
            sums: earlier checksums of the tensors' bytes, by name.
        """
        now = self.stamps()
        suspects = {name for name in now if stamps.get(name) != now[name]}
        for name, check in sums.items():
            files_of = {span.file.name for span in self[name].spans}
            if files_of & suspects and checksum(tensor_bytes(self.read(name))) != check:
                return name
        return None

    def _shards(self) -> dict[str, set[str] | None]:
        """Return the shard file names, each with the tensors that the index places there; None if there is no index."""
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
        begin, raw = read_header(path)
        self.headers[path.name] = hashlib.sha256(raw).hexdigest()
        try:
            header = {name: value for name, value in parse(raw.decode("utf-8")).items() if name != "__metadata__"}
        except ValueError as error:
            raise CheckpointError(f"shard {path} is corrupt: {one_line(error)}") from error
        if missing := sorted((wanted or set()) - header.keys()):
            raise CheckpointError(f"shard {path} lacks {missing[0]!r}, which the index places there")
        self._check_dtypes(path, {name: entry["dtype"] for name, entry in header.items()})
        # Like transformers, read all tensors of a shard; the index only says which shards there are.
        for name, stored in _stored(path, begin, header):
            if (twin := self.stored.get(name)) is not None:
                raise CheckpointError(
                    f"shard {path} holds {name!r}, and so does {twin.span.file.name}; it must be in one"
                )
            if self._is_read(name, stored.dtype):
                self.stored[name] = stored

    def _is_read(self, name: str, dtype: str) -> bool:
        return dtype in DTYPES or (self._quantisation is not None and self._quantisation.reads(name, dtype))

    def _check_dtypes(self, path: Path, dtypes: Mapping[str, str]) -> None:
        """Raise a CheckpointError if a tensor of a shard, dtypes by name, has an unsupported dtype.

        The message names the quantisation method if the config declares one, and the original model. DeepSeek V4 has tables of
        integers.
        """
        # Pythia's attention masks are boolean.
        unread = {n: d for n, d in dtypes.items() if not self._is_read(n, d) and not n.endswith(UNREAD)}
        method = quantised_by(self.config) or ("modelopt" if (self.directory / MODELOPT).exists() else None)
        by = f" ({method})" if method else ""
        only = f"only {', '.join(DTYPES)}"
        for name, dtype in unread.items():
            named = "weight" in name.rpartition(".")[2]
            if dtype not in _TABLES and (named or method or dtype.startswith("F")):
                source = original(self.directory, self.config)
                raise CheckpointError(
                    f"{path}: tensor {name!r} has dtype {dtype}; quantised weights{by} cannot be pruned, {only}, or with "
                    "quant_method fp8 or mxfp4 in the config; take the 16-bit original"
                    + (f": {source}" if source else " that was quantised")
                )
        for name, dtype in unread.items():
            raise CheckpointError(f"{path}: tensor {name!r} has dtype {dtype}; tables of it cannot be read, {only}")


def _digest(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def weight_file(directory: Path) -> str:
    """Return the file from which transformers loads the weights of a directory: `SINGLE` if it exists, else `INDEX`.

    A left-over index beside `SINGLE`, whose shards are gone, is ignored, as in transformers. If its shards exist too, raise a
    CheckpointError: transformers would silently read `SINGLE`.
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
    """Return the offset of the tensors in a shard, in bytes, and its header's JSON, after `safetensors` has validated it.

    The validation checks the header's length against the file, that tensors follow each other without gaps or overlaps up
    to the end of the file, and that the size of each tensor matches its shape and dtype.

    Raises:
        CheckpointError: the shard is corrupt, truncated or a Git LFS pointer.
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
    files.read_into(path, 8, memoryview(raw))
    return 8 + len(raw), bytes(raw)


def _stored(path: Path, offset: int, header: Mapping[str, Any]) -> Iterator[tuple[str, Stored]]:
    """Yield the tensors of a shard; `offset` and `header` are those of `read_header`."""
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        yield name, Stored(entry["dtype"], tuple(entry["shape"]), Span(path, offset + begin, end - begin))


def read_index(path: Path) -> dict[str, set[str]]:
    """Return the shard file names of an index, each with the tensors that the index places there.

    A shard must be a safetensors file in the same directory; otherwise raise a CheckpointError.
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
    """Return the file name of a shard, such as `model-00003-of-00010.safetensors`; `number` starts at 1."""
    return f"model-{number:05}-of-{total:05}.safetensors"


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Durably write one shard; return the SHA-256 in hex of the bytes in memory. Equal tensors produce identical bytes.

    Does not use safetensors' own writer (0.8), which writes a randomly named file beside the target that only its owner can
    read and that a killed process leaves behind.
    """
    # Largest element size first, so that every tensor is aligned.
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
    """Read all tensors of a shard. Raises a DamageError if it is missing or its digest is not that of `write_shard`."""
    data = files.read_bytes(path) if path.is_file() else b""
    if hashlib.sha256(data).hexdigest() != digest:
        raise DamageError(f"{path} is missing or damaged; run the same command again: it will be made again")
    found: dict[str, Tensor] = load(data)
    return found


class Shard(Mapping[str, Tensor]):
    """A shard written by `write_shard`, as a mapping that reads each tensor on access.

    Args:
        prefix: leave out tensors whose names do not start with it, and remove it from the other names.
    """

    def __init__(self, path: Path, prefix: str = "") -> None:
        offset, raw = read_header(path)
        header = {name: entry for name, entry in json.loads(raw).items() if name != "__metadata__"}
        dtypes = {name: dtype for dtype, name in NAMES.items()}
        self._tensors = {
            name.removeprefix(prefix): Plain(dtypes[stored.dtype], stored.shape, stored.span)
            for name, stored in _stored(path, offset, header)
            if name.startswith(prefix)
        }

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def data_bytes(path: Path) -> int:
    """Return the size of the tensors in a shard, in bytes, without its header."""
    beginning = bytearray(8)
    files.read_into(path, 0, memoryview(beginning))
    return path.stat().st_size - len(beginning) - int.from_bytes(beginning, "little")


def write_index(directory: Path, placed: Mapping[str, str], parameters: int, size: int) -> str:
    """Durably write the index: `placed` maps tensor names to shard names, `size` is in bytes. Returns its SHA-256 in hex."""
    index = {
        "metadata": {"total_parameters": parameters, "total_size": size},
        "weight_map": dict(sorted(placed.items())),
    }
    return write_json(directory / INDEX, index)
