"""Verify checkpoint directories: files against checksums, tensors against the config, and values for NaN and Inf.

Every file is read once, from the disk, in pieces that are both hashed and checked. All faults are reported, not only the first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Set
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import CheckpointError, DiskError, one_line
from ..system import files
from ..system.directory import check_pointer
from ..system.host import host_buffer
from ..system.progress import Progress, Silent, rest
from ..system.threads import prefetch
from . import manifest
from .checkpoint import UNREAD, Checkpoint, weight_file
from .entries import CPU, Span, Stored
from .hub import find_gguf, resolve_model
from .names import COMPANIONS, CONFIG, INDEX, SINGLE
from .skeleton import Skeleton

PIECE = 8 << 20
"""Bytes per piece. Two pieces are in memory: one is checked while the next is read. A multiple of every element size."""
SHOWN = 12  # digits of a checksum shown in messages
Kind = Literal["file", "layout", "values", "extra"]
"""``file``: missing, unreadable, or different from the manifest. ``layout``: a tensor is missing or its shape differs from the
config, or the tensors of a file cannot be determined. ``values``: NaN or Inf. ``extra``: ignored by transformers."""


@dataclass(frozen=True)
class Fault:
    """One fault, or one extra item. `file` is a file name in the directory; `str` is a line for the user."""

    kind: Kind
    file: str
    tensor: str | None  # name of the tensor, if the fault concerns a single one
    message: str

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class Verification:
    """The result of verifying a checkpoint directory."""

    path: str
    manifest: bool
    """Whether there is a `SHA256SUMS`. Without it, file contents cannot be checked."""
    files: int  # number of files read: the shards and all other files in the manifest
    tensors: int  # number of tensors in the shards
    bytes: int  # size of the files read, in bytes
    unlisted: tuple[str, ...]  # other files in the directory: not in the manifest, and not needed by the model
    faults: tuple[Fault, ...]
    extra: tuple[Fault, ...]
    """Tensors that the config's model does not have, and an index that is not read. transformers ignores them, so they are not
    faults. Commands that prune, tune or measure reject such tensors, because a result would lack them."""

    @property
    def sound(self) -> bool:
        """Whether there are no faults. Extra tensors and files do not count."""
        return not self.faults

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "sound": self.sound}


def check(folder: Path, digests: Mapping[str, str] | None, progress: Progress) -> Verification:
    """Like `verify`, with the SHA-256 in hex of every file that belongs in `folder`, by name; None if unknown."""
    return _Reading(folder, digests, progress).done()


class _Reading:
    """The state of one verification."""

    def __init__(self, folder: Path, digests: Mapping[str, str] | None, progress: Progress) -> None:
        self.model, self.folder = folder, folder.parent if folder.is_file() else folder  # a GGUF file
        self.digests, self.progress = digests or {}, progress
        self.manifest = digests is not None
        self.faults: list[Fault] = []
        self.extra: dict[str, Fault] = {}
        self.bytes = 0

    def done(self) -> Verification:
        checkpoint = self._opened()
        stored = {} if checkpoint is None else checkpoint.stored
        shards = set() if checkpoint is None else checkpoint.shards
        small = sorted(self.digests.keys() - shards)
        self.progress.phase("verify", len(small) + len(shards))
        for name in small:
            self._read(name, {})
        if checkpoint is not None and not any(fault.file == CONFIG and fault.kind == "file" for fault in self.faults):
            self._compare_with_config(checkpoint)
        # Extra tensors are not used for computing, and masks may contain Inf.
        extra = set() if checkpoint is None else {span for name in self.extra for span in checkpoint.spans(name)}
        read = {name: each for name, each in stored.items() if each.span not in extra and not name.endswith(UNREAD)}
        for shard in sorted(shards):
            self._read(shard, {name: each for name, each in read.items() if each.span.file.name == shard})
        return Verification(
            path=str(self.model),
            manifest=self.manifest,
            files=len(small) + len(shards),
            tensors=len(stored),
            bytes=self.bytes,
            unlisted=self._unlisted(shards) if self.manifest else (),
            faults=tuple(self.faults),
            extra=tuple(self.extra.values()),
        )

    def _opened(self) -> _Opened | None:
        """Open the checkpoint, as far as its shards can be opened; None if the config or index is unusable."""
        for name in COMPANIONS:
            try:
                check_pointer(self.folder / name)
            except (CheckpointError, DiskError) as error:
                self._fault("file", name, None, self._within(error, name))
        for name in (CONFIG, INDEX, SINGLE):
            files.drop_cached(self.folder / name)
        try:
            checkpoint = _Opened(self.model)
        except (CheckpointError, DiskError) as error:
            gguf = find_gguf(self.model)
            if gguf is not None or (self.folder / CONFIG).is_file():
                name = gguf.name if gguf else CONFIG if CONFIG in str(error) else INDEX
                self._fault("layout", name, None, self._within(error, name))
            else:
                self._absent(CONFIG)
            return None
        if SINGLE in checkpoint.shards and (self.folder / INDEX).is_file():
            self._add_extra(INDEX, None, f"{INDEX} is not read: transformers takes {SINGLE}, which lies beside it")
        for shard, message in checkpoint.faults:
            kind: Kind = "layout" if (self.folder / shard).is_file() else "file"
            self._fault(kind, shard, None, self._within(message, shard))
        return checkpoint

    def _compare_with_config(self, checkpoint: _Opened) -> None:
        try:
            skeleton = Skeleton(checkpoint, device=CPU, dtype=torch.float32, check=False)
            found, extra = list(skeleton.layout_faults()), skeleton.extra()
        except (CheckpointError, DiskError) as error:
            if not checkpoint.faults:  # otherwise an unreadable shard may be the cause
                self._fault("layout", CONFIG, None, self._within(error, CONFIG))
            return
        for name in extra:
            shard, model = checkpoint[name].shard.name, skeleton.architecture.model_type
            message = f"{shard}: tensor {name!r} is not in the {model} model that the config describes, and is not read"
            self._add_extra(shard, name, message)
        for name, what in found:
            if name in checkpoint or not checkpoint.lost(name):
                file = checkpoint[name].shard.name if name in checkpoint else weight_file(self.folder)
                self._fault("layout", file, name, f"{file}: tensor {name!r} {what}")

    def _read(self, name: str, stored: Mapping[str, Stored]) -> None:
        path = self.folder / name
        if not path.is_file():
            if not any(fault.file == name for fault in self.faults):
                self._absent(name)
        else:
            try:
                self._read_pieces(path, stored)
            except (DiskError, FileNotFoundError) as error:
                self._fault("file", name, None, f"{name} cannot be read: {one_line(error)}")
        self.progress.step(name)
        rest(self.progress)

    def _read_pieces(self, path: Path, stored: Mapping[str, Stored]) -> None:
        digest, expected = hashlib.sha256(), self.digests.get(path.name)
        wrong: dict[str, None] = {}
        files.drop_cached(path)

        def load(piece: _Piece) -> Tensor:
            begin, length, _ = piece
            buffer = host_buffer(length, CPU)
            data = buffer.numpy().data
            if files.read_into(path, begin, data) < length:
                raise DiskError("it became shorter while it was read")
            if expected is not None:
                digest.update(data)
            return buffer

        for (_, length, tensor), buffer in prefetch(_pieces(path.stat().st_size, stored), load):
            self.bytes += length
            if tensor is not None and not stored[tensor].finite(buffer):
                wrong[tensor] = None
        if expected is not None and digest.hexdigest() != expected:
            message = f"{path.name} has checksum {digest.hexdigest()[:SHOWN]}…; it was written with {expected[:SHOWN]}…"
            self._fault("file", path.name, None, message)
        for tensor in wrong:
            self._fault("values", path.name, tensor, f"{path.name}: tensor {tensor!r} holds NaN or Inf")

    def _unlisted(self, shards: set[str]) -> tuple[str, ...]:
        """Return the files that the manifest does not name, and record a fault for each that the model needs."""
        there = {path.name + ("/" if path.is_dir() else "") for path in self.folder.iterdir()}
        others = there - self.digests.keys() - {manifest.NAME}
        needed = others & {CONFIG, INDEX, *shards}
        for name in sorted(needed):
            self._fault("file", name, None, f"{manifest.NAME} does not name {name}, which the model needs")
        return tuple(sorted(others - needed))

    def _within(self, error: object, name: str) -> str:
        """Return a message about a file, with paths in the directory shortened to file names."""
        message = str(error).removeprefix(f"{self.folder}: ").replace(f"{self.folder}/", "")
        return message if name in message else f"{name}: {message}"

    def _absent(self, name: str) -> None:
        self._fault("file", name, None, f"{name} is {'not a file' if (self.folder / name).exists() else 'missing'}")

    def _fault(self, kind: Kind, file: str, tensor: str | None, message: str) -> None:
        self.faults.append(Fault(kind, file, tensor, message))

    def _add_extra(self, file: str, tensor: str | None, message: str) -> None:
        self.extra[tensor or file] = Fault("extra", file, tensor, message)


class _Opened(Checkpoint):
    """A checkpoint that tolerates unreadable shards."""

    def __init__(self, directory: Path) -> None:
        self.faults: list[tuple[str, str]] = []  # unreadable shards, and the error of each
        self._lost: set[str] = set()
        self._all_lost = False
        super().__init__(directory)

    @property
    def shards(self) -> set[str]:
        """File names of all shards, readable or not."""
        return {*self.headers, *(shard for shard, _ in self.faults)}

    def spans(self, name: str) -> tuple[Span, ...]:
        """Return the bytes of a tensor; none for other names."""
        return self[name].spans if name in self else ()

    @property
    def claimed(self) -> Set[str]:
        return super().claimed | self._lost

    def lost(self, name: str) -> bool:
        """Return whether the tensor may be in an unreadable shard."""
        return self._all_lost or name.endswith(tuple(self._lost))  # names in base models lack the prefix

    def _open(self, path: Path, wanted: set[str] | None) -> None:
        try:
            super()._open(path, wanted)
        except (CheckpointError, DiskError) as error:
            self.faults.append((path.name, str(error)))
            self._lost |= wanted or set()
            self._all_lost |= wanted is None


_Piece = tuple[int, int, str | None]
"""A range of bytes of a file: begin, length, and the tensor that contains it all; None for data that is not checked."""


def _pieces(size: int, stored: Mapping[str, Stored]) -> Iterator[_Piece]:
    """Split a file of `size` bytes into pieces, in order. No piece crosses the boundary of a tensor."""
    place = 0
    for name, span in sorted(((name, each.span) for name, each in stored.items()), key=lambda item: item[1].begin):
        yield from _cut(place, span.begin, None)
        place = span.begin + span.nbytes
        yield from _cut(span.begin, place, name, stored[name].unit)
    yield from _cut(place, size, None)


def _cut(begin: int, end: int, tensor: str | None, unit: int = 1) -> Iterator[_Piece]:
    size = max(1, PIECE // unit) * unit
    return ((at, min(size, end - at), tensor) for at in range(begin, end, size))


def verify(path: str | Path, *, progress: Progress | None = None) -> Verification:
    """Verify a checkpoint directory: files against its `SHA256SUMS`, tensors against its config, values for NaN and Inf.

    Reads every file once, from the disk, and changes nothing. Works for any checkpoint, including source models and those written
    by other tools. Without a manifest, file contents are not checked.

    Args:
        path: a checkpoint directory, a GGUF file, or a name on the hub.
        progress: receives one step per file.

    Raises:
        CheckpointError: `path` is neither.
        Stopped: `progress` requested a stop.
    """
    progress = progress or Silent()
    folder = resolve_model(path, progress)
    digests, wrong = None, list[str]()
    if (folder / manifest.NAME).exists():
        try:
            digests, wrong = manifest.read(folder)
        except DiskError as error:
            wrong = [f"{manifest.NAME} cannot be read: {error}"]
    found = check(folder, digests, progress)
    own = tuple(Fault("file", manifest.NAME, None, message) for message in wrong)
    return replace(found, path=str(path), faults=(*own, *found.faults))
