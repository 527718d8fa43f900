"""Text as it lies on the disk: files and datasets cut into numbered blocks, any of which can be read by itself.

A block is small, and a source has as many as its size asks for, so that a sample of a huge one costs a sample's memory.
Which blocks are read is `calibration`'s to say; all of them, in order, are the whole text.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from . import files
from .errors import CalibrationError, ConfigError, one_line

BLOCK = 1 << 16
"""Bytes of a file in one block."""
SEPARATOR = "\n\n"
"""Between documents."""
ROWS = 32
"""Rows of a table in one block."""
FIELDS = ("text", "messages", "conversations", "content")
"""Where a document is looked for when no field is named, in this order."""
JSON_LINES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz")
PARQUET = ".parquet"
DATASET = "hf:"
EXTRA = "pip install 'streamprune[datasets]'"

_DATASET = re.compile(r"(?P<name>[^#@]+)(#(?P<config>[^@]+))?(@(?P<split>.+))?")
_SPLIT = "train"
_SPEAKERS = {"human": "user", "gpt": "assistant"}
_LOOK_AHEAD = 1 << 12
_PROBES = 256
LINE = 1 << 24
"""Bytes that one row of a file may have: four times what is read of a whole source by default."""
UNPACKED = 1 << 26
"""Bytes that any packed file may unpack to,"""
PACKED = 200
"""and times its size that a larger one may; text packs to a tenth, a bomb to a thousandth."""
CROWDED = 8
"""Rows that a table may have for each byte of its file."""

Conversation = list[dict[str, Any]]
Document = str | Conversation
"""A text, or the messages of a conversation, each with its "role" and "content"."""
Block = tuple[int, list[Document]]


class Documents(Protocol):
    """A source's documents in blocks."""

    separator: str
    """What comes between documents of text; those that are pieces of one text have nothing between them."""

    @property
    def field(self) -> str | None:
        """Where a row has its document; None where there are no rows."""

    def __len__(self) -> int:
        """Blocks."""

    def read(self, numbers: Sequence[int]) -> Iterator[Block]:
        """The blocks of these numbers, which ascend, one at a time with their documents.

        Raises:
            CalibrationError: a row that cannot be used, by its place.
        """

    def identity(self) -> dict[str, Any]:
        """What tells the content from another."""


def open_documents(place: str, field: str | None) -> Documents:
    """The documents of a file, a folder or ``hf:NAME[#CONFIG][@SPLIT]``.

    Raises:
        CalibrationError: not there, not readable, or without the field.
        ConfigError: a field where there are none, or a library that is not installed.
    """
    if place.startswith(DATASET) and not os.path.exists(place):
        return Dataset(place, field)
    path = Path(place)
    if os.path.isdir(path):
        return Dataset(DATASET + place, field)
    if not os.path.isfile(path):
        reason = "not a file" if os.path.exists(path) else "No such file or directory"
        raise CalibrationError(f"cannot read the text {place}: {reason}")
    name = path.name.lower()
    if name.endswith(JSON_LINES):
        return JsonLines(path, field)
    if name.endswith(PARQUET):
        return Parquet(path, field)
    if field is not None:
        raise ConfigError(f"{place}:{field}: a field is of {', '.join(JSON_LINES[:3])} or {PARQUET} files and datasets")
    return PlainText(path)


class PlainText:
    """A UTF-8 file as one text; its blocks end with a line where lines are not very long."""

    field = None
    separator = ""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._size = path.stat().st_size

    def __len__(self) -> int:
        return max(1, -(-self._size // BLOCK))

    def read(self, numbers: Sequence[int]) -> Iterator[Block]:
        with _reading(self._path) as file:
            for number in numbers:
                start, stop = (self._cut(file, edge * BLOCK) for edge in (number, number + 1))
                file.seek(start)
                try:
                    text = file.read(stop - start).decode("utf-8")
                except UnicodeDecodeError as error:
                    raise CalibrationError(f"{self._path} is not UTF-8 text (byte {start + error.start})") from error
                yield number, [text.replace("\r\n", "\n").replace("\r", "\n")]

    def _cut(self, file: BinaryIO, edge: int) -> int:
        """The first place from `edge` on where a line begins or, if there is none for long, a character."""
        if not 0 < edge < self._size:
            return min(edge, self._size)
        file.seek(edge)
        ahead = file.read(_LOOK_AHEAD)
        if (newline := ahead.find(b"\n")) >= 0:
            return edge + newline + 1
        return edge + next((place for place, byte in enumerate(ahead) if byte & 0xC0 != 0x80), 0)

    def identity(self) -> dict[str, Any]:
        return {"sha256": files.sha256(self._path)}


class JsonLines:
    """A file of one JSON object a line, gzipped or not; a block has the rows that begin in it."""

    separator = SEPARATOR

    def __init__(self, path: Path, field: str | None) -> None:
        self._path = path
        with _reading(self._path) as file:
            self._size = _unpacked(file, path)
            names: list[str] = []
            place = 0
            while (line := self._line(file, place)) and not names:
                names = list(self._row(line, place) or ())
                place += len(line)
        if not names:
            raise CalibrationError(f"{path} is empty")
        self.field: str = _field(field, names, str(path))

    def __len__(self) -> int:
        return -(-self._size // BLOCK)

    def read(self, numbers: Sequence[int]) -> Iterator[Block]:
        with _reading(self._path) as file:
            for number in numbers:
                place, stop = number * BLOCK, (number + 1) * BLOCK
                if place:
                    file.seek(place - 1)
                    place += len(self._line(file, place - 1)) - 1
                else:
                    file.seek(0)
                found = []
                while place < stop and (line := self._line(file, place)):
                    if (row := self._row(line, place)) is not None:
                        if self.field not in row:
                            raise CalibrationError(f"{self._where(place)}: no field {self.field!r}; {_listed(row)}")
                        found.append(_document(row[self.field], self.field, partial(self._where, place)))
                    place += len(line)
                yield number, found

    def _line(self, file: BinaryIO, place: int) -> bytes:
        """The line that the file, which stands at `place`, has next; empty at its end."""
        line = file.readline(LINE + 1)
        if len(line) > LINE:
            raise CalibrationError(f"{self._where(place)}: longer than {LINE >> 20} MiB, which no document is")
        return line

    def _row(self, line: bytes, place: int) -> dict[str, Any] | None:
        """A line's object; None for a blank line."""
        if not line.strip():
            return None
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            array = "; write one object a line, not one array" if line.lstrip().startswith(b"[") else ""
            raise CalibrationError(f"{self._where(place)}: not JSON ({error}){array}") from error
        if not isinstance(row, dict):
            raise CalibrationError(f"{self._where(place)}: not a JSON object; write one object a line")
        return row

    def _where(self, place: int) -> str:
        """The line that begins at a byte, for people; lines are counted only now."""
        lines = 1
        with _reading(self._path) as file:
            while place > 0 and (chunk := file.read(min(1 << 20, place))):
                lines, place = lines + chunk.count(b"\n"), place - len(chunk)
        return f"{self._path}, line {lines}"

    def identity(self) -> dict[str, Any]:
        return {"sha256": files.sha256(self._path)}


class Parquet:
    """A column of a parquet file; a block never spans two row groups."""

    separator = SEPARATOR

    def __init__(self, path: Path, field: str | None) -> None:
        self._path = path
        with self._opened() as file, self._refusing():
            self.field: str = _field(field, file.schema_arrow.names, str(path))
            groups = self._groups(file.metadata)
        # Per block: its row group, its first row in that, and its first row in the file.
        self._blocks: list[tuple[int, int, int]] = []
        before = 0
        for group, rows in enumerate(groups):
            self._blocks += [(group, first, before + first) for first in range(0, rows, ROWS)]
            before += rows

    def __len__(self) -> int:
        return len(self._blocks)

    def read(self, numbers: Sequence[int]) -> Iterator[Block]:
        groups: dict[int, dict[int, int]] = {}
        for number in numbers:
            group, first, _ = self._blocks[number]
            groups.setdefault(group, {})[first] = number
        with self._opened() as file:
            for group, wanted in groups.items():
                for first, values in self._rows(file, group):
                    if first in wanted:
                        number = wanted.pop(first)
                        begin = self._blocks[number][2] + 1
                        yield number, [self._document(value, begin + offset) for offset, value in enumerate(values)]
                    if not wanted:
                        break
                if wanted:
                    raise CalibrationError(f"{self._path} has fewer rows than it says, in row group {group}")

    def _groups(self, metadata: Any) -> list[int]:
        """Rows of each row group, as the file has them at its end, and as they may be."""
        size = self._path.stat().st_size
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        rows = [group.num_rows for group in groups]
        if any(count < 0 for count in rows) or sum(rows) > CROWDED * size:
            raise CalibrationError(f"{self._path} says that it has {sum(rows)} rows in {size} bytes; it cannot")
        unpacked = sum(group.total_byte_size for group in groups)
        if unpacked > max(UNPACKED, PACKED * size):
            raise CalibrationError(f"{self._path} says that its {size} bytes unpack to {unpacked}; it is no text")
        return rows

    def _rows(self, file: Any, group: int) -> Iterator[tuple[int, list[Any]]]:
        """A row group's column in slices of `ROWS`: (first row, values)."""
        slices = self._slices(file, group)
        while True:
            with self._refusing():
                found = next(slices, None)
                values = None if found is None else found[1].to_pylist()
            if found is None or values is None:
                return
            yield found[0], values

    def _slices(self, file: Any, group: int) -> Iterator[tuple[int, Any]]:
        """A row group's column in slices of `ROWS`, however the library cuts it: (first row, values)."""
        import pyarrow

        pending, first = [], 0
        for batch in file.iter_batches(ROWS, row_groups=[group], columns=[self.field], use_threads=False):
            pending.append(batch.column(0))
            column = pyarrow.chunked_array(pending)
            while len(column) >= ROWS:
                yield first, column[:ROWS]
                column, first = column[ROWS:], first + ROWS
            pending = column.chunks
        if sum(map(len, pending)):
            yield first, pyarrow.chunked_array(pending)

    def _document(self, value: Any, row: int) -> Document:
        return _document(value, self.field, lambda: f"{self._path}, row {row}")

    def _opened(self) -> Any:
        try:
            import pyarrow.parquet
        except ImportError:
            raise ConfigError(f"{self._path} needs pyarrow: {EXTRA}") from None
        with self._refusing():
            # Column chunks, which may be large, are read through a small buffer.
            return pyarrow.parquet.ParquetFile(self._path, buffer_size=1 << 20)

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """A context in which whatever the library says of a broken file is ours."""
        try:
            yield
        except CalibrationError:
            raise
        except Exception as error:
            raise CalibrationError(f"{self._path} cannot be read as parquet: {one_line(error)}") from error

    def identity(self) -> dict[str, Any]:
        return {"sha256": files.sha256(self._path)}


class Dataset:
    """A column of a dataset of the hub, or of a folder, as the `datasets` library has it."""

    separator = SEPARATOR

    def __init__(self, place: str, field: str | None) -> None:
        self._place = place
        self._rows = _load(place)
        self.field: str = _field(field, self._rows.column_names, place)
        self._rows = self._rows.select_columns([self.field])

    def __len__(self) -> int:
        return -(-len(self._rows) // ROWS)

    def read(self, numbers: Sequence[int]) -> Iterator[Block]:
        for number in numbers:
            first = number * ROWS
            try:
                values = self._rows[first : first + ROWS][self.field]
            except Exception as error:
                raise CalibrationError(f"{self._place} cannot be read: {one_line(error)}") from error
            yield number, [self._document(value, first + offset + 1) for offset, value in enumerate(values)]

    def _document(self, value: Any, row: int) -> Document:
        return _document(value, self.field, lambda: f"{self._place}, row {row}")

    def identity(self) -> dict[str, Any]:
        """Rows, and a digest of some of them, evenly spread: a dataset has no one file to digest."""
        rows, digest = len(self._rows), hashlib.sha256()
        for probe in range(min(rows, _PROBES)):
            row = self._rows[probe * rows // min(rows, _PROBES)]
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        return {"dataset": self._place.removeprefix(DATASET), "rows": rows, "sha256": digest.hexdigest()}


def _load(place: str) -> Any:
    """The split that is meant, as `datasets` has it in its cache or fetches it."""
    try:
        import datasets
    except ImportError:
        raise ConfigError(f"{place} needs datasets: {EXTRA}") from None
    match = _DATASET.fullmatch(place.removeprefix(DATASET))
    if match is None:
        raise ConfigError(f"{place!r}: write a dataset as hf:NAME, hf:NAME#CONFIG or hf:NAME@SPLIT")
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    name, config, split = match["name"], match["config"], match["split"] or _SPLIT
    folder = Path(name)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            found = datasets.load_from_disk(name)
            splits = list(found) if isinstance(found, datasets.DatasetDict) else []
            if match["split"] is None and not splits:
                return found
            if split not in splits:
                raise CalibrationError(f"{place} has no split {split!r}; it has {', '.join(splits) or 'none'}")
            return found[split]
        # The folder's whole path, so that it cannot be taken for a name on the hub.
        return datasets.load_dataset(str(folder.resolve()) if folder.is_dir() else name, config, split=split)
    except CalibrationError:
        raise
    except Exception as error:
        raise CalibrationError(
            f"{place} is no dataset that can be loaded, from a folder, the hub or its cache: {one_line(error)}"
        ) from error


def _field(asked: str | None, names: Sequence[str], place: str) -> str:
    """The field asked for, or the first of the usual ones.

    Raises:
        CalibrationError: it is not there.
    """
    if asked is not None and asked not in names:
        raise CalibrationError(f"{place} has no field {asked!r}; {_listed(names)}")
    field = asked or next((usual for usual in FIELDS if usual in names), None)
    if field is None:
        raise CalibrationError(
            f"{place} has no field {', '.join(FIELDS[:-1])} or {FIELDS[-1]}; name one after a colon, "
            f"{place}:FIELD; {_listed(names)}"
        )
    return field


def _listed(names: Sequence[str] | Mapping[str, Any]) -> str:
    shown = list(names)[:12]
    return f"it has {', '.join(shown) or 'none'}" + (", …" if len(names) > len(shown) else "")


def _document(value: Any, field: str, where: Callable[[], str]) -> Document:
    """A row's text or conversation; nothing is an empty text.

    Args:
        where: says the row's place, if it must be said.

    Raises:
        CalibrationError: it is neither, or no Unicode.
    """
    if value is None or isinstance(value, str):
        return _whole_text(value or "", field, where)
    if isinstance(value, list):
        return [_message(message, field, where) for message in value]
    raise CalibrationError(f"{where()}: field {field!r} is neither text nor a list of messages")


def _whole_text(text: str, field: str, where: Callable[[], str]) -> str:
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        raise CalibrationError(
            f"{where()}: field {field!r} has half a surrogate pair at character {error.start}, which is no text"
        ) from None
    return text


def _message(message: Any, field: str, where: Callable[[], str]) -> dict[str, Any]:
    if isinstance(message, dict):
        if "role" in message and "content" in message:
            return message
        if "from" in message and "value" in message:
            speaker = message["from"]
            return {"role": _SPEAKERS.get(str(speaker), speaker), "content": message["value"]}
    raise CalibrationError(f"{where()}: field {field!r} has a message without role and content (or from and value)")


@contextmanager
def _reading(path: Path) -> Iterator[BinaryIO]:
    """An open file, unpacked if it is gzipped, whose errors are the project's own."""
    try:
        with gzip.open(path) if _is_packed(path) else path.open("rb") as file:
            yield cast(BinaryIO, file)
    except (OSError, EOFError, zlib.error) as error:
        raise CalibrationError(f"cannot read the text {path}: {getattr(error, 'strerror', None) or error}") from error


def _is_packed(path: Path) -> bool:
    return path.name.lower().endswith(".gz")


def _unpacked(file: BinaryIO, path: Path) -> int:
    """Bytes of a file that stands at its beginning, unpacked; it stands there again.

    Raises:
        CalibrationError: a small file unpacks to more than any text would.
    """
    if not _is_packed(path):
        size = file.seek(0, 2)
        file.seek(0)
        return size
    most, size = max(UNPACKED, PACKED * path.stat().st_size), 0
    while chunk := file.read(1 << 20):
        size += len(chunk)
        if size > most:
            raise CalibrationError(f"{path} unpacks to more than {PACKED} times its size; it is no text")
    file.seek(0)
    return size
