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
import tempfile
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain, groupby, islice
from pathlib import Path
from typing import Any, BinaryIO, cast

from ..errors import CalibrationError, ConfigError, StreamPruneError, one_line
from ..system import files

BLOCK = 1 << 16
"""Bytes of a file per block."""
ROWS = 32
"""Rows of a table per block."""
FIELDS = ("text", "messages", "conversations", "content", "instruction")
"""Fields to look for a document in, in this order, if none is named."""
INSTRUCTION = ("instruction", "input", "output")
"""Fields of a row that is a conversation of two turns: what the user says, more of it (optional), and the answer."""
JSON_LINES = (".jsonl", ".ndjson", ".json")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
PARQUET, ARROW, GZIPPED = ".parquet", ".arrow", ".gz"
DATASET = "hf:"
EXTRA = "pip install 'streamprune[datasets]'"

LINE = 1 << 24
"""Largest row of a text file, in bytes: four times what is read of a whole source by default."""
UNPACKED = 1 << 26
"""Uncompressed bytes that any compressed file may have, whatever its size."""
PACKED = 200
"""Largest compression ratio beyond `UNPACKED` bytes. Text compresses to a tenth, a zip bomb to a thousandth."""
CROWDED = 8
"""Largest number of rows per byte of a parquet file."""

_DATASET = re.compile(r"(?P<name>[^#@]+)(#(?P<config>[^@]+))?(@(?P<split>.+))?")
_SPEAKERS = {"human": "user", "gpt": "assistant"}
_GZIP = b"\x1f\x8b"
_UNSUPPORTED = (
    (".bz2", 4, b"1AY&SY"),
    (".xz", 0, b"\xfd7zXZ\0"),
    (".lzma", 0, b"\x5d\0\0"),
    (".zst", 0, b"\x28\xb5\x2f\xfd"),
    (".lz4", 0, b"\x04\x22\x4d\x18"),
    (".zip", 0, b"PK\x03\x04"),
    (".7z", 0, b"7z\xbc\xaf\x27\x1c"),
    (".tar", 257, b"ustar"),
    ("gzip within gzip", 0, _GZIP),
    ("UTF-32", 0, codecs.BOM_UTF32_LE),  # begins with the byte-order mark of UTF-16-LE, so it comes first
    ("UTF-32", 0, codecs.BOM_UTF32_BE),
    ("UTF-16", 0, codecs.BOM_UTF16_LE),
    ("UTF-16", 0, codecs.BOM_UTF16_BE),
)
"""Formats of unsupported files, each with the offset and bytes that identify it; also recognised by suffix."""
_LOOK_AHEAD = 1 << 12
_PROBES = 256


@dataclass(frozen=True)
class Conversation:
    """The messages of a row, each with "role" and "content"."""

    messages: list[dict[str, Any]]
    at: int
    """Position of the row, see `Documents.error`."""


Document = str | Conversation
Block = tuple[int, list[Document]]


class Documents:
    """A source's documents in blocks."""

    separator = "\n\n"
    """Text between documents; empty if the documents are pieces of one text."""
    columns: tuple[str, ...] = ()
    """Fields that hold a row's document: one, or those of `INSTRUCTION` that exist; none for a source without rows."""
    _path: Path

    @property
    def field(self) -> str | None:
        """Name of the (first) field with a row's document; None for a source without rows."""
        return self.columns[0] if self.columns else None

    def __len__(self) -> int:
        """Return the number of blocks."""
        raise NotImplementedError

    def read(self, numbers: Sequence[int]) -> Iterator[Block]:
        """Read the blocks with the given numbers, which must ascend; yield each number with its documents.

        Raises:
            CalibrationError: a row is unusable. The message gives its position.
        """
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """Identify the content, JSON-ready: the digest of a file."""
        return {"sha256": files.sha256(self._path)}

    def error(self, at: int, problem: str) -> CalibrationError:
        """Return the error for the row at a position, which is an offset in a file or a row's index in a table."""
        raise NotImplementedError

    def _document(self, row: Mapping[str, Any], at: int) -> Document:
        """Check and convert the text or conversation of the row at a position; None and no messages become an empty text."""
        value, *more = (row.get(column) for column in self.columns)
        if isinstance(value, list):
            return Conversation([self._message(message, at) for message in value], at) if value else ""
        text = self._text(self.columns[0], value, at)
        if not more:
            return text
        parts = [text, *(self._text(column, value, at) for column, value in zip(self.columns[1:], more, strict=True))]
        if not parts[-1]:
            return ""
        asked = "\n\n".join(part for part in parts[:-1] if part)
        return Conversation([{"role": "user", "content": asked}, {"role": "assistant", "content": parts[-1]}], at)

    def _text(self, column: str, value: Any, at: int) -> str:
        text = "" if value is None else value
        if not isinstance(text, str):
            raise self.error(at, f"field {column!r} is neither text nor a list of messages")
        try:
            text.isascii() or text.encode()
        except UnicodeEncodeError as error:
            problem = f"field {column!r} has half a surrogate pair at character {error.start}, which is no text"
            raise self.error(at, problem) from None
        return text

    def _message(self, message: Any, at: int) -> dict[str, Any]:
        if isinstance(message, dict):
            if "role" in message and "content" in message:
                return message
            if "from" in message and "value" in message:
                speaker = message["from"]
                return {"role": _SPEAKERS.get(str(speaker), speaker), "content": message["value"]}
        raise self.error(at, f"field {self.field!r} has a message without role and content (or from and value)")


def open_documents(place: str, field: str | None) -> Documents:
    """Open the documents of a file, a folder or ``hf:NAME[#CONFIG][@SPLIT]``.

    Raises:
        CalibrationError: the source does not exist, cannot be read or lacks the field.
        ConfigError: a field is given for plain text, or a library is not installed.
    """
    path, name = Path(place), place.lower()
    if os.path.isdir(place) or (place.startswith(DATASET) and not os.path.exists(place)):
        return Table(place, field)
    if not os.path.isfile(place):
        reason = "not a file" if os.path.exists(place) else "No such file or directory"
        raise CalibrationError(f"cannot read the text {place}: {reason}")
    if name.endswith(PARQUET):
        return Parquet(path, field)
    if name.endswith(ARROW):
        return Table(place, field)
    suffix = Path(name.removesuffix(GZIPPED)).suffix
    if suffix in JSON_LINES:
        return JsonLines(path, field)
    if suffix in DELIMITERS:
        return Delimited(path, field, DELIMITERS[suffix])
    if field is not None:
        tables = ", ".join((*JSON_LINES, *DELIMITERS, PARQUET))
        raise ConfigError(f"{place}:{field}: only {tables} or {ARROW} files and datasets have fields")
    return PlainText(path)


class TextFile(Documents):
    """A UTF-8 file, gzipped or not, in blocks of `BLOCK` bytes."""

    def __init__(self, path: Path) -> None:
        self._path, self._size = path, _measure(path)

    def __len__(self) -> int:
        return max(1, -(-self._size // BLOCK))

    def error(self, at: int, problem: str) -> CalibrationError:
        lines = 1
        with _reading(self._path) as file:
            while at > 0 and (chunk := file.read(min(1 << 20, at))):
                lines, at = lines + chunk.count(b"\n"), at - len(chunk)
        return CalibrationError(f"{self._path}, line {lines}: {problem}")

    def _line(self, file: BinaryIO, at: int, read: int = 0) -> bytes:
        """Read the next line of a row that begins at `at`, after `read` bytes of it; empty at the end of the file."""
        line = file.readline(LINE - read + 1)
        if read + len(line) > LINE:
            raise self.error(at, f"longer than {LINE >> 20} MiB, which no document is")
        return line

    def _decoded(self, data: bytes, at: int) -> str:
        """Decode bytes from offset `at`. NUL is an error: it occurs in UTF-16 and binary files, but not in text."""
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CalibrationError(
                f"{self._path} is not UTF-8 text (byte {at + error.start}); convert it to UTF-8"
            ) from error
        if "\0" in text:
            raise CalibrationError(
                f"{self._path} is not UTF-8 text (byte {at + data.index(0)} is NUL, as in UTF-16); convert it to UTF-8"
            )
        return text


class PlainText(TextFile):
    """A file as one text. Blocks end at the end of a line unless lines are very long."""

    separator = ""

    def read(self, numbers: Sequence[int]) -> Iterator[Block]:
        with _reading(self._path) as file:
            # The bytes in memory and their offset. Read forwards only: in a gzipped file, seeking back starts over.
            data, at = b"", 0
            for number in numbers:
                if number * BLOCK != at:
                    data, at = b"", file.seek(number * BLOCK)
                data += file.read(BLOCK + _LOOK_AHEAD - len(data))
                start = _cut(data, 0) if number else _mark(data)
                text = self._decoded(data[start : _cut(data, BLOCK)], at + start)
                yield number, [text.replace("\r\n", "\n").replace("\r", "\n")]
                data, at = data[BLOCK:], at + BLOCK


class JsonLines(TextFile):
    """A file with one JSON object per line. A block holds the rows that begin in it."""

    def __init__(self, path: Path, field: str | None) -> None:
        super().__init__(path)
        with _reading(path) as file:
            first = next((row for _, row in self._rows(file, 0, self._size) if row), None)
        if first is None:
            raise CalibrationError(f"{path} is empty")
        self.columns = _columns(field, first, str(path))
        if len(self.columns) > 1:
            self.columns = INSTRUCTION  # later rows may have an input

    def read(self, numbers: Sequence[int]) -> Iterator[Block]:
        with _reading(self._path) as file:
            place = 0
            for number in numbers:
                begin, documents = number * BLOCK, []
                # Forwards only, as above: the last row of the previous block may end in this one.
                if place < begin:
                    place = file.seek(begin - 1)
                    place += len(self._line(file, place))
                for at, row in self._rows(file, place, begin + BLOCK):
                    for column in self.columns:
                        if column not in row and column != INSTRUCTION[1]:
                            raise self.error(at, f"no field {column!r}; {_listed(row)}")
                    documents.append(self._document(row, at))
                place = file.tell()
                yield number, documents

    def _rows(self, file: BinaryIO, place: int, stop: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the rows that begin in [`place`, `stop`), each with its offset. The file must be at `place`."""
        while place < stop and (line := self._line(file, place)):
            text = line[_mark(line) :]
            if text.strip():
                try:
                    row = json.loads(text.decode("utf-8"))
                except (ValueError, RecursionError) as error:
                    problem = f"not JSON ({error}); write one object per line, in UTF-8"
                    raise self.error(place, problem) from error
                if not isinstance(row, dict):
                    raise self.error(place, "not a JSON object; write one object per line")
                yield place, row
            place += len(line)


class Delimited(TextFile):
    """A column of a delimited file with a header row. A block holds the rows that begin in it.

    Quoting follows the `csv` module: cells that hold delimiters, quotes (doubled) or newlines are quoted. From the
    middle of a file one cannot tell whether a newline ends a row. Opening therefore reads the file once, row by
    row, and stores the offset of each block's first row: 8 bytes per 64 KiB.

    Rows with more or fewer cells than the header are errors; pandas, which `datasets` uses, would shift or drop cells.
    """

    def __init__(self, path: Path, field: str | None, delimiter: str) -> None:
        super().__init__(path)
        self._delimiter = delimiter
        self._edges = array("q")  # offset of each block's first row, then the end of the file
        with _reading(path) as file:
            rows = self._rows(file, 0, self._size)
            _, names = next(rows, (0, []))
            if not names:
                raise CalibrationError(f"{path} is empty")
            self.columns = _columns(field, names, str(path))
            for column in self.columns:
                if (count := names.count(column)) > 1:
                    raise CalibrationError(f"{path} has {count} columns {column!r}; rename all but one")
            self._names = names
            for place, cells in rows:
                if len(cells) != len(names):
                    problem = f"{len(cells)} cells, and the header has {len(names)}"
                    raise self.error(place, f"{problem}; quote cells that hold delimiters, quotes or newlines")
                if not self._edges or place // BLOCK > self._edges[-1] // BLOCK:
                    self._edges.append(place)
        self._edges.append(self._size)

    def __len__(self) -> int:
        return len(self._edges) - 1

    def read(self, numbers: Sequence[int]) -> Iterator[Block]:
        with _reading(self._path) as file:
            for number in numbers:
                start = file.seek(self._edges[number])
                rows = self._rows(file, start, self._edges[number + 1])
                yield number, [self._document(dict(zip(self._names, row, strict=True)), at) for at, row in rows]

    def _rows(self, file: BinaryIO, place: int, stop: int) -> Iterator[tuple[int, list[str]]]:
        """Yield the rows that begin in [`place`, `stop`), each with its offset. The file must be at `place`."""
        end = place

        def lines() -> Iterator[str]:
            nonlocal end
            while line := self._line(file, place, end - place):
                skipped = 0 if end else _mark(line)
                text = self._decoded(line[skipped:], end + skipped)
                end += len(line)
                yield text

        reader = csv.reader(lines(), delimiter=self._delimiter, strict=True)
        while place < stop:
            limit = csv.field_size_limit(LINE)
            try:
                cells = next(reader, None)
            except csv.Error as error:
                reason = str(error).partition(" - ")[0]
                raise self.error(place, f"not a row of cells ({reason}); check its quotes") from error
            finally:
                csv.field_size_limit(limit)  # that of the whole process
            if cells is None:
                return
            if cells:
                yield place, cells
            place = end


class Column(Documents):
    _place: str
    _reader: str
    """What reads it, for messages."""

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Turn any error of the library into a CalibrationError."""
        try:
            yield
        except StreamPruneError:
            raise
        except Exception as error:
            reason = one_line(error.__cause__ or error)
            raise CalibrationError(f"{self._place} cannot be read {self._reader}: {reason}") from error

    def error(self, at: int, problem: str) -> CalibrationError:
        return CalibrationError(f"{self._place}, row {at + 1}: {problem}")

    def _documents(self, rows: Iterable[Mapping[str, Any]], first: int) -> list[Document]:
        """Convert the rows from `first` on."""
        return [self._document(row, at) for at, row in enumerate(rows, start=first)]


class Parquet(Column):
    """A column of a parquet file. A block does not span two row groups.

    pyarrow reads a few rows at a time. `datasets` would first copy the column, row group by row group, to the disk.
    """

    _reader = "as parquet"

    def __init__(self, path: Path, field: str | None) -> None:
        self._place, self._path = str(path), path
        with self._opened() as file:
            self.columns = _columns(field, file.schema_arrow.names, str(path))
            groups = _row_groups(path, file.metadata)
        # Row group of each block, its first row in the group, and its first row in the file.
        self._blocks = [
            (group, first, end - count + first)
            for group, (count, end) in enumerate(zip(groups, accumulate(groups), strict=True))
            for first in range(0, count, ROWS)
        ]

    def __len__(self) -> int:
        return len(self._blocks)

    def read(self, numbers: Sequence[int]) -> Iterator[Block]:
        with self._opened() as file:
            for group, wanted in groupby(numbers, key=lambda number: self._blocks[number][0]):
                batches = file.iter_batches(ROWS, row_groups=[group], columns=[*self.columns], use_threads=False)
                values = chain.from_iterable(
                    zip(*(batch[name] for name in self.columns), strict=True) for batch in batches
                )
                position = 0
                for number in wanted:
                    _, first, row = self._blocks[number]
                    rows = islice(values, first - position, first - position + ROWS)
                    found = [
                        {name: value.as_py() for name, value in zip(self.columns, each, strict=True)} for each in rows
                    ]
                    position = first + len(found)
                    if not found:
                        raise CalibrationError(f"{self._path} has fewer rows than it says, in row group {group}")
                    yield number, self._documents(found, row)

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        try:
            import pyarrow.parquet
        except ImportError:
            raise ConfigError(f"{self._path} needs pyarrow: {EXTRA}") from None
        # Column chunks may be large, so read them through a small buffer.
        with self._refusing(), pyarrow.parquet.ParquetFile(self._path, buffer_size=1 << 20) as file:
            yield file


class Table(Column):
    """A column of an arrow file, of a folder or of a dataset on the hub, read by the `datasets` library."""

    _reader = "by the datasets library"

    def __init__(self, place: str, field: str | None) -> None:
        self._place, self._path = place, Path(place)
        with self._refusing():
            rows = _load(place)
        self.columns = _columns(field, rows.column_names, place)
        # As arrow, values are not decoded, for example from the path of an image.
        self._rows = rows.select_columns([*self.columns]).with_format("arrow")

    def __len__(self) -> int:
        return -(-len(self._rows) // ROWS)

    def read(self, numbers: Sequence[int]) -> Iterator[Block]:
        for number in numbers:
            first = number * ROWS
            with self._refusing():
                found = self._rows[first : first + ROWS].to_pylist()
            yield number, self._documents(found, first)

    def identity(self) -> dict[str, Any]:
        """Identify datasets other than files by the number of rows and a digest of evenly spaced rows."""
        if self._path.is_file():
            return super().identity()
        rows, digest = len(self._rows), hashlib.sha256()
        for probe in range(min(rows, _PROBES)):
            first = probe * rows // min(rows, _PROBES)
            with self._refusing():
                (row,) = self._rows[first : first + 1].to_pylist()
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        return {"dataset": self._place.removeprefix(DATASET), "rows": rows, "sha256": digest.hexdigest()}


def _row_groups(path: Path, metadata: Any) -> list[int]:
    """Return the rows of each row group from a parquet file's footer, after a check that the counts are plausible."""
    size = path.stat().st_size
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    rows = [group.num_rows for group in groups]
    if any(count < 0 for count in rows) or sum(rows) > CROWDED * size:
        raise CalibrationError(f"{path} says that it has {sum(rows)} rows in {size} bytes; it cannot")
    unpacked = sum(group.total_byte_size for group in groups)
    if unpacked > max(UNPACKED, PACKED * size):
        raise CalibrationError(f"{path} says that its {size} bytes unpack to {unpacked}; it is not text")
    return rows


def _load(place: str) -> Any:
    """Load an arrow file, or the requested split from a folder, the cache of `datasets` or the hub."""
    try:
        import datasets
    except ImportError:
        raise ConfigError(f"{place} needs datasets: {EXTRA}") from None
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    if os.path.isfile(place):
        return datasets.Dataset.from_file(place)
    if os.path.isdir(place):
        name, config, split = place, None, None
    elif match := _DATASET.fullmatch(place.removeprefix(DATASET)):
        name, config, split = match.group("name", "config", "split")
    else:
        raise ConfigError(f"{place!r}: write a dataset as hf:NAME, hf:NAME#CONFIG or hf:NAME@SPLIT")
    folder, wanted = Path(name), split or "train"
    if not folder.is_dir():
        return datasets.load_dataset(name, config, split=wanted)
    if not any((folder / saved).is_file() for saved in ("dataset_dict.json", "state.json")):
        found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        state = tuple((str(path), stat.st_size, stat.st_mtime_ns) for path in found for stat in [path.stat()])
        return _converted(str(folder.resolve()), config, wanted, state)
    found = datasets.load_from_disk(name)
    splits = found if isinstance(found, datasets.DatasetDict) else {}
    if split is None and not splits:
        return found
    if wanted not in splits:
        raise CalibrationError(f"{place} has no split {wanted!r}; it has {', '.join(splits) or 'none'}")
    return splits[wanted]


@lru_cache(maxsize=4)
def _converted(folder: str, config: str | None, split: str, state: tuple[tuple[str, int, int], ...]) -> Any:
    """Convert a folder of data files once per process; `state` (names, sizes and times) tells when it has changed."""
    import datasets

    # The library's copy can be removed as soon as it is mapped into memory.
    with files.scratch(Path(tempfile.gettempdir()), "streamprune-text-") as cache:
        # The full path cannot be mistaken for a name on the hub.
        return datasets.load_dataset(folder, config, split=split, cache_dir=str(cache))


def _columns(asked: str | None, names: Iterable[str], place: str) -> tuple[str, ...]:
    """Return the field asked for, or the first of `FIELDS`, if it exists; with it those that belong to an instruction."""
    names = list(names)
    if asked is not None and asked not in names:
        raise CalibrationError(f"{place} has no field {asked!r}; {_listed(names)}")
    answered = INSTRUCTION[-1] in names
    usual = FIELDS if answered else FIELDS[:-1]
    field = asked or next((each for each in usual if each in names), None)
    if field is None:
        raise CalibrationError(
            f"{place} has no field {', '.join(FIELDS[:-2])} or {FIELDS[-2]}, and no {INSTRUCTION[0]} with {INSTRUCTION[-1]}; "
            f"name one after a colon, {place}:FIELD; {_listed(names)}"
        )
    if field == INSTRUCTION[0] and answered:
        return tuple(column for column in INSTRUCTION if column in names or column != INSTRUCTION[1])
    return (field,)


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return f"it has {', '.join(names[:12]) or 'none'}" + (", …" if len(names) > 12 else "")


@contextmanager
def _reading(path: Path) -> Iterator[BinaryIO]:
    """Open a file, decompress it if its name or content says gzip, and turn errors into CalibrationError."""
    try:
        with path.open("rb") as raw:
            packed = path.name.lower().endswith(GZIPPED) or raw.read(len(_GZIP)) == _GZIP
            raw.seek(0)
            with gzip.GzipFile(fileobj=raw) if packed else nullcontext(raw) as file:
                yield cast(BinaryIO, file)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise CalibrationError(
            f"cannot read the text {path}: its gzip data is corrupt or truncated ({error}); download or compress it again"
        ) from error
    except OSError as error:
        raise CalibrationError(f"cannot read the text {path}: {error.strerror or error}") from error


def _measure(path: Path) -> int:
    """Return the uncompressed size of a text file in bytes. Reject unsupported formats and files that expand too much."""
    with _reading(path) as file:
        head = file.read(512)
        for form, offset, magic in _UNSUPPORTED:
            if path.name.lower().endswith(form) or head.startswith(magic, offset):
                raise CalibrationError(
                    f"{path} is {form}; convert it to UTF-8 text, plain or compressed with gzip once"
                )
        if isinstance(file, io.BufferedReader):
            return file.seek(0, os.SEEK_END)
        most, size = max(UNPACKED, PACKED * path.stat().st_size), len(head)
        while chunk := file.read(1 << 20):
            size += len(chunk)
            if size > most:
                raise CalibrationError(f"{path} unpacks to more than {PACKED} times its size; it is not text")
        return size


def _cut(data: bytes, edge: int) -> int:
    """Return the first offset from `edge` on where a line begins or, without a nearby newline, a character."""
    ahead = data[edge : edge + _LOOK_AHEAD]
    if (newline := ahead.find(b"\n")) >= 0:
        return edge + newline + 1
    return edge + next((place for place, byte in enumerate(ahead) if byte & 0xC0 != 0x80), 0)


def _mark(data: bytes) -> int:
    """Return the length in bytes of the UTF-8 byte-order mark at the start; 0 without one."""
    return len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
