"""Read documents from files and datasets, which are split into numbered blocks for random access.

Blocks are small, and their number grows with the source. Sampling a huge source therefore takes only the memory of the
sample. `windows` decides which blocks to read. All blocks in order are the whole text.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import io
import json
import os
import re
import sys
import zlib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from ..errors import CalibrationError, ConfigError, one_line
from ..system import files

BLOCK = 1 << 16
"""Bytes of a file per block."""
SEPARATOR = "\n\n"
"""Text between documents."""
ROWS = 32
"""Rows of a table per block."""
FIELDS = ("text", "messages", "conversations", "content")
"""Fields to look for a document in, in this order, if none is named."""
JSON_LINES = (".jsonl", ".ndjson", ".json")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
PARQUET = ".parquet"
PACKED_TEXT = ".gz"
"""Suffix of a gzipped text, JSON lines or delimited file, after its own suffix."""
DATASET = "hf:"
EXTRA = "pip install 'streamprune[datasets]'"

_DATASET = re.compile(r"(?P<name>[^#@]+)(#(?P<config>[^@]+))?(@(?P<split>.+))?")
_SPLIT = "train"
_SPEAKERS = {"human": "user", "gpt": "assistant"}
_HEAD = 512
_GZIP = b"\x1f\x8b"
_FOREIGN = {
    ".bz2": rb"BZh[1-9](1AY&SY|\x17rE8P\x90)",
    ".xz": rb"\xfd7zXZ\0",
    ".lzma": rb"\x5d\0\0",
    ".zst": rb"\x28\xb5\x2f\xfd",
    ".lz4": rb"\x04\x22\x4d\x18",
    ".zip": rb"PK(\x03\x04|\x05\x06)",
    ".7z": rb"7z\xbc\xaf\x27\x1c",
    ".tar": rb".{257}ustar",
}
"""Unsupported compressed formats: suffix and pattern of the first bytes."""
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
"""Byte-order marks of unsupported encodings. UTF-32-LE comes first because its mark begins with that of UTF-16-LE."""
_LOOK_AHEAD = 1 << 12
_PROBES = 256
LINE = 1 << 24
"""Largest row of a file, in bytes: four times what is read of a whole source by default."""
UNPACKED = 1 << 26
"""Uncompressed bytes that any compressed file may have, whatever its size."""
PACKED = 200
"""Largest compression ratio beyond `UNPACKED` bytes. Text compresses to a tenth, a zip bomb to a thousandth."""
CROWDED = 8
"""Largest number of rows per byte of a table's file."""

Conversation = list[dict[str, Any]]
Document = str | Conversation
"""A text, or the messages of a conversation, each with "role" and "content"."""
Block = tuple[int, list[Document]]


class Documents(Protocol):
    """A source's documents in blocks."""

    separator: str
    """Text between documents; empty if the documents are pieces of one text."""

    @property
    def field(self) -> str | None:
        """Name of the field with a row's document; None for a source without rows."""

    def __len__(self) -> int:
        """Return the number of blocks."""

    def read(self, numbers: Sequence[int]) -> Iterator[Block]:
        """Read the blocks with the given numbers, which must ascend; yield each number with its documents.

        Raises:
            CalibrationError: a row is unusable. The message gives its position.
        """

    def identity(self) -> dict[str, Any]:
        """Identify the content, JSON-ready."""


def open_documents(place: str, field: str | None) -> Documents:
    """Open the documents of a file, a folder or ``hf:NAME[#CONFIG][@SPLIT]``.

    Raises:
        CalibrationError: the source does not exist, cannot be read or lacks the field.
        ConfigError: a field is given for plain text, or a library is not installed.
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
    if name.endswith(PARQUET):
        return Parquet(path, field)
    suffix = Path(name.removesuffix(PACKED_TEXT)).suffix
    if suffix in JSON_LINES:
        return JsonLines(path, field)
    if suffix in DELIMITERS:
        return Delimited(path, field, DELIMITERS[suffix])
    if field is not None:
        tables = ", ".join((*JSON_LINES, *DELIMITERS))
        raise ConfigError(f"{place}:{field}: a field is of {tables} or {PARQUET} files and datasets")
    return PlainText(path)


class PlainText:
    """A UTF-8 file, gzipped or not, as one text. Blocks end at the end of a line unless lines are very long."""

    field = None
    separator = ""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._size = _measure(path)

    def __len__(self) -> int:
        return max(1, -(-self._size // BLOCK))

    def read(self, numbers: Sequence[int]) -> Iterator[Block]:
        with _reading(self._path) as file:
            # The bytes in memory and their offset. Read forwards only: in a gzipped file, seeking back starts over.
            data, at = b"", 0
            for number in numbers:
                if number * BLOCK != at:
                    data, at = b"", file.seek(number * BLOCK)
                data += file.read(BLOCK + _LOOK_AHEAD - len(data))
                start = _cut(data, 0) if number else _mark(data)
                text = _decoded(data[start : _cut(data, BLOCK)], self._path, at + start)
                yield number, [text.replace("\r\n", "\n").replace("\r", "\n")]
                data, at = data[BLOCK:], at + BLOCK

    def identity(self) -> dict[str, Any]:
        return {"sha256": files.sha256(self._path)}


class JsonLines:
    """A file with one JSON object per line, gzipped or not. A block holds the rows that begin in it."""

    separator = SEPARATOR

    def __init__(self, path: Path, field: str | None) -> None:
        self._path = path
        self._size = _measure(path)
        with _reading(path) as file:
            names: list[str] = []
            place = 0
            while (line := _line(file, path, place)) and not names:
                names = list(self._row(line, place) or ())
                place += len(line)
        if not names:
            raise CalibrationError(f"{path} is empty")
        self.field: str = _field(field, names, str(path))

    def __len__(self) -> int:
        return -(-self._size // BLOCK)

    def read(self, numbers: Sequence[int]) -> Iterator[Block]:
        with _reading(self._path) as file:
            place = 0
            for number in numbers:
                begin, stop = number * BLOCK, (number + 1) * BLOCK
                # Forwards only, as above: the last row of the previous block may end in this one.
                if place < begin:
                    file.seek(begin - 1)
                    place = begin - 1 + len(_line(file, self._path, begin - 1))
                found = []
                while place < stop and (line := _line(file, self._path, place)):
                    if (row := self._row(line, place)) is not None:
                        if self.field not in row:
                            raise CalibrationError(f"{self._where(place)}: no field {self.field!r}; {_listed(row)}")
                        found.append(_document(row[self.field], self.field, partial(self._where, place)))
                    place += len(line)
                yield number, found

    def _row(self, line: bytes, place: int) -> dict[str, Any] | None:
        """Parse the object of a line; None for a blank line."""
        line = line[_mark(line) :]
        if not line.strip():
            return None
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            hint = "; write one object a line, not one array" if line.lstrip().startswith(b"[") else ""
            if b"\0" in line:
                hint = "; it has NUL bytes, as UTF-16 has: convert it to UTF-8"
            raise CalibrationError(f"{self._where(place)}: not JSON ({error}){hint}") from error
        if not isinstance(row, dict):
            raise CalibrationError(f"{self._where(place)}: not a JSON object; write one object a line")
        return row

    def _where(self, place: int) -> str:
        return _place_of_line(self._path, place)

    def identity(self) -> dict[str, Any]:
        return {"sha256": files.sha256(self._path)}


class Delimited:
    """A column of a delimited file with a header row, gzipped or not. A block holds the rows that begin in it.

    Quoting follows the `csv` module: cells that hold delimiters, quotes (doubled) or newlines are quoted. From the
    middle of a file one cannot tell whether a newline ends a row. Opening therefore reads the file once, row by
    row, and stores the offset of each block's first row: 8 bytes per 64 KiB.

    Raises:
        CalibrationError: a row is malformed, or has more or fewer cells than the header.
    """

    separator = SEPARATOR

    def __init__(self, path: Path, field: str | None, delimiter: str) -> None:
        self._path, self._delimiter = path, delimiter
        self._size = _measure(path)
        self._starts = array("q")
        with _reading(path) as file, _long_cells():
            rows = self._rows(file, 0, self._size)
            _, names = next(rows, (0, []))
            if not names:
                raise CalibrationError(f"{path} is empty")
            self.field: str = _field(field, names, str(path))
            if (columns := names.count(self.field)) > 1:
                raise CalibrationError(f"{path} has {columns} columns {self.field!r}; rename all but one")
            self._column = names.index(self.field)
            for place, cells in rows:
                if len(cells) != len(names):
                    raise CalibrationError(
                        f"{_place_of_line(path, place)}: {len(cells)} cells, and the header has {len(names)}; "
                        "quote cells that hold delimiters, quotes or newlines"
                    )
                if not self._starts or place // BLOCK > self._starts[-1] // BLOCK:
                    self._starts.append(place)

    def __len__(self) -> int:
        return len(self._starts)

    def read(self, numbers: Sequence[int]) -> Iterator[Block]:
        with _reading(self._path) as file:
            for number in numbers:
                start, stop = [*self._starts[number : number + 2], self._size][:2]
                file.seek(start)
                with _long_cells():
                    found: list[Document] = [cells[self._column] for _, cells in self._rows(file, start, stop)]
                yield number, found

    def _rows(self, file: BinaryIO, place: int, stop: int) -> Iterator[tuple[int, list[str]]]:
        """Yield the rows that begin in [`place`, `stop`), each with its offset. The file must be at `place`."""
        end = place

        def lines() -> Iterator[str]:
            nonlocal end
            while line := _line(file, self._path, place, end - place):
                skipped = 0 if end else _mark(line)
                text = _decoded(line[skipped:], self._path, end + skipped)
                end += len(line)
                yield text

        reader = csv.reader(lines(), delimiter=self._delimiter, strict=True)
        while place < stop:
            try:
                cells = next(reader, None)
            except csv.Error as error:
                reason = str(error).partition(" - ")[0]
                raise CalibrationError(
                    f"{_place_of_line(self._path, place)}: no row of cells ({reason}); see to its quotes"
                ) from error
            if cells is None:
                return
            if cells:
                yield place, cells
            place = end

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
        # For each block: its row group, its first row in that group, and its first row in the file.
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
        """Return the rows of each row group from the file's footer, after a check that the counts are plausible."""
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
        """Yield a row group's column in slices of `ROWS`: (first row, values)."""
        slices = self._slices(file, group)
        while True:
            with self._refusing():
                found = next(slices, None)
                values = None if found is None else found[1].to_pylist()
            if found is None or values is None:
                return
            yield found[0], values

    def _slices(self, file: Any, group: int) -> Iterator[tuple[int, Any]]:
        """Yield a row group's column in slices of `ROWS`, whatever batches the library returns: (first row, values)."""
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
            # Column chunks may be large, so read them through a small buffer.
            return pyarrow.parquet.ParquetFile(self._path, buffer_size=1 << 20)

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Turn any error of the library about a broken file into a CalibrationError."""
        try:
            yield
        except CalibrationError:
            raise
        except Exception as error:
            raise CalibrationError(f"{self._path} cannot be read as parquet: {one_line(error)}") from error

    def identity(self) -> dict[str, Any]:
        return {"sha256": files.sha256(self._path)}


class Dataset:
    """A column of a dataset on the hub or in a folder, read by the `datasets` library."""

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
        """Return the number of rows and a digest of evenly spaced rows: a dataset has no single file to digest."""
        rows, digest = len(self._rows), hashlib.sha256()
        for probe in range(min(rows, _PROBES)):
            row = self._rows[probe * rows // min(rows, _PROBES)]
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        return {"dataset": self._place.removeprefix(DATASET), "rows": rows, "sha256": digest.hexdigest()}


def _load(place: str) -> Any:
    """Load the requested split from a folder, the cache of `datasets` or the hub."""
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
        # Use the folder's full path, so that it cannot be mistaken for a name on the hub.
        return datasets.load_dataset(str(folder.resolve()) if folder.is_dir() else name, config, split=split)
    except CalibrationError:
        raise
    except Exception as error:
        raise CalibrationError(
            f"{place} is no dataset that can be loaded, from a folder, the hub or its cache: {one_line(error)}"
        ) from error


def _field(asked: str | None, names: Sequence[str], place: str) -> str:
    """Return the field asked for, or the first of `FIELDS` that exists.

    Raises:
        CalibrationError: the field does not exist.
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
    """Check and convert a row's text or conversation; None becomes an empty text.

    Args:
        where: returns the row's position, for error messages.

    Raises:
        CalibrationError: the value is neither text nor a conversation, or is not valid Unicode.
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
    """Open a file, decompress it if its name or content says gzip, and turn errors into CalibrationError."""
    try:
        with path.open("rb") as raw:
            packed = path.name.lower().endswith(PACKED_TEXT) or raw.read(len(_GZIP)) == _GZIP
            raw.seek(0)
            with gzip.GzipFile(fileobj=raw) if packed else nullcontext(raw) as file:
                yield cast(BinaryIO, file)
    except EOFError as error:
        raise CalibrationError(
            f"cannot read the text {path}: it is truncated, its gzip data has no end; fetch or pack it again"
        ) from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise CalibrationError(
            f"cannot read the text {path}: it is corrupt, or not gzip ({error}); fetch or pack it again"
        ) from error
    except OSError as error:
        raise CalibrationError(f"cannot read the text {path}: {error.strerror or error}") from error


def _measure(path: Path) -> int:
    """Return the uncompressed size of a text file in bytes.

    Raises:
        CalibrationError: the compression or encoding is not supported, the gzip data is corrupt, or the file expands
            more than any text would.
    """
    with _reading(path) as file:
        head = file.read(_HEAD)
        _refuse_foreign(path, head)
        if isinstance(file, io.BufferedReader):
            return file.seek(0, 2)
        most, size = max(UNPACKED, PACKED * path.stat().st_size), len(head)
        while chunk := file.read(1 << 20):
            size += len(chunk)
            if size > most:
                raise CalibrationError(f"{path} unpacks to more than {PACKED} times its size; it is no text")
        return size


def _refuse_foreign(path: Path, head: bytes) -> None:
    """Raise CalibrationError if a file that begins with `head` has an unsupported compression or encoding."""
    if head.startswith(_GZIP):
        raise CalibrationError(f"{path} is gzipped twice; unpack it once")
    for suffix, magic in _FOREIGN.items():
        if path.name.lower().endswith(suffix) or re.match(magic, head, re.DOTALL):
            raise CalibrationError(f"{path} is packed as {suffix}, which is not read; unpack it, or pack it with gzip")
    for mark, encoding in _MARKS.items():
        if head.startswith(mark):
            raise CalibrationError(f"{path} is {encoding} text, by its byte-order mark; convert it to UTF-8")


def _cut(data: bytes, edge: int) -> int:
    """Return the first offset from `edge` on where a line begins or, without a nearby newline, a character."""
    ahead = data[edge : edge + _LOOK_AHEAD]
    if (newline := ahead.find(b"\n")) >= 0:
        return edge + newline + 1
    return edge + next((place for place, byte in enumerate(ahead) if byte & 0xC0 != 0x80), 0)


def _mark(data: bytes) -> int:
    """Return the length in bytes of the UTF-8 byte-order mark at the start; 0 without one."""
    return len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0


def _decoded(data: bytes, path: Path, place: int) -> str:
    """Decode bytes from offset `place` of a file.

    Raises:
        CalibrationError: they are not UTF-8, or hold NUL, which occurs in UTF-16 and binary files but not in text.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 text (byte {place + error.start}); convert it to UTF-8") from error
    if "\0" in text:
        raise CalibrationError(
            f"{path} is not UTF-8 text (byte {place + data.index(0)} is NUL, as in UTF-16); convert it to UTF-8"
        )
    return text


def _line(file: BinaryIO, path: Path, place: int, read: int = 0) -> bytes:
    """Read the next line of a row that begins at `place`, after `read` bytes of it; empty at the end of the file."""
    line = file.readline(LINE - read + 1)
    if read + len(line) > LINE:
        raise CalibrationError(f"{_place_of_line(path, place)}: longer than {LINE >> 20} MiB, which no document is")
    return line


def _place_of_line(path: Path, place: int) -> str:
    """Return the line number of an offset, for error messages. Counts lines on demand."""
    lines = 1
    with _reading(path) as file:
        while place > 0 and (chunk := file.read(min(1 << 20, place))):
            lines, place = lines + chunk.count(b"\n"), place - len(chunk)
    return f"{path}, line {lines}"


@contextmanager
def _long_cells() -> Iterator[None]:
    """Raise the `csv` module's cell limit to the longest row allowed. The limit is global to the process."""
    before = csv.field_size_limit(LINE)
    try:
        yield
    finally:
        csv.field_size_limit(before)
