"""Text in every form: the same windows from each, shares by weight, samples of what does not fit, errors by their place."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import hashlib
import io
import json
import lzma
import random
import re
import shutil
import sys
import tarfile
import tempfile
import tracemalloc
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import ALPHABET
from streamprune_cli import main
from torch import Tensor

import streamprune
from streamprune import Config, Source, TuneConfig
from streamprune.errors import CalibrationError, ConfigError, ResumeError, StreamPruneError
from streamprune.model.tokenizer import load_tokenizer
from streamprune.text import documents
from streamprune.text import windows as calibration
from streamprune.text.source import Text

Tiny = Callable[..., Path]
TEMPLATE = "{% for m in messages %}{{ m.role }}. {{ m.content }},{% endfor %}"


@pytest.fixture(autouse=True)
def caches(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Reading local data leaves nothing in the caches of `datasets`, nor in the temporary folder."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("caches")
    for name in ("HF_DATASETS_CACHE", "HF_CACHE_HOME", "HF_MODULES_CACHE"):
        monkeypatch.setattr(datasets.config, name, folder / name)
    (folder / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "temporary"))
    yield
    assert [path.name for path in folder.iterdir()] == ["temporary"]
    assert not [*folder.glob("temporary/streamprune-*")]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    draw = random.Random(1)
    return ["".join(draw.choices(ALPHABET, k=draw.randint(1, 90))).strip() or "a" for _ in range(150)]


@pytest.fixture
def tokenizer(tiny: Tiny) -> Any:
    return load_tokenizer(tiny("llama"))


def stored(path: Path, data: bytes) -> Path:
    """Write a file, gzipped if its name says so."""
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def lines(path: Path, rows: list[Any]) -> Path:
    return stored(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def delimited(path: Path, rows: Iterable[Sequence[str]]) -> Path:
    held = io.StringIO(newline="")
    csv.writer(held, delimiter="\t" if ".tsv" in path.name else ",").writerows(rows)
    return stored(path, held.getvalue().encode())


def parquet(path: Path, columns: dict[str, Any]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pyarrow.table(columns), path, row_group_size=70)
    return path


def saved(path: Path, columns: dict[str, Any]) -> Path:
    import datasets

    datasets.Dataset.from_dict(columns).save_to_disk(path)
    return path


def written(path: Path, texts: list[str], field: str = "text", other: str = "id") -> Path:
    """Documents in the format that the name says, beside another field."""
    columns = {other: [("x\n", 'say ""', "")[number % 3] for number in range(len(texts))], field: texts}
    rows = [*zip(*columns.values(), strict=True)]
    kind = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    if kind in ("parquet", "dataset"):
        return {"parquet": parquet, "dataset": saved}[kind](path, columns)
    if kind in ("csv", "tsv"):
        return delimited(path, [[*columns], *rows])
    if kind == "txt":
        return stored(path, "\n\n".join(texts).encode())
    return lines(path, [dict(zip(columns, row, strict=True)) for row in rows])


def marked(path: Path) -> Path:
    """With UTF-8's byte-order mark in front."""
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    return path


def letters(tokens: Tensor) -> str:
    """Token ids of the tests' tokenizer as text; what it does not know is a newline here."""
    return "".join("\n" if token < 2 else ALPHABET[token - 2] for token in tokens.tolist())


def draw(tokenizer: Any, given: Any, samples: int = 20, length: int = 24, seed: int = 3) -> Tensor:
    return calibration.sample(tokenizer, Text.of(given), 40, samples, length, seed).tokens


# The same text in all forms.

FORMS: dict[str, Callable[[Path, list[str]], Any]] = {
    **{
        name: lambda folder, texts, name=name: written(folder / name, texts)
        for name in (
            "t.jsonl",
            "T.JSON",
            "t.jsonl.gz",
            "t.txt.gz",
            "T.CSV",
            "t.csv.gz",
            "t.tsv",
            "t.parquet",
            "t.dataset",
        )
    },
    "content": lambda folder, texts: written(folder / "t.ndjson", texts, "content"),
    "field": lambda folder, texts: f"{written(folder / 't.jsonl', texts, 'body', 'text')}:body",
    "csv field": lambda folder, texts: f"{written(folder / 't.csv', texts, 'the body', 'text')}:the body",
    "parquet field": lambda folder, texts: f"{written(folder / 't.parquet', texts, 'body', 'text')}:body",
    "jsonl with a mark": lambda folder, texts: marked(written(folder / "t.jsonl", texts)),
    "csv with a mark": lambda folder, texts: marked(written(folder / "t.csv", texts)),
    "gz by content": lambda folder, texts: written(folder / "t.jsonl.gz", texts).rename(folder / "t.jsonl"),
    "csv gaps": lambda folder, texts: delimited(
        folder / "t.csv", [["text", "n"], *(row for text in texts for row in ([text, "x"], ["", "y"], []))]
    ),
    "gaps": lambda folder, texts: lines(
        folder / "t.jsonl", [row for text in texts for row in ({"text": text}, {"text": ""}, {"text": None})]
    ),
    "arrow": lambda folder, texts: next(written(folder / "t.dataset", texts).glob("*.arrow")),
    "dataset field": lambda folder, texts: f"hf:{written(folder / 't.dataset', texts, 'body', 'text')}:body",
    "folder": lambda folder, texts: written(folder / "train.jsonl", texts).parent,
    "folder's split": lambda folder, texts: f"hf:{written(folder / 'test.jsonl', texts).parent}@test",
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_windows_of_the_text(
    form: str, texts: list[str], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows").mkdir()
    given = FORMS[form](tmp_path / "rows", texts)
    plain = written(tmp_path / "t.txt", texts)
    ids = torch.tensor(tokenizer(plain.read_text(), add_special_tokens=False)["input_ids"])
    starts = torch.randint(len(ids) - 23, (20,), generator=torch.Generator().manual_seed(3)).tolist()
    expected = torch.stack([ids[start : start + 24] for start in starts])
    monkeypatch.setattr(documents, "BLOCK", 100)
    assert torch.equal(draw(tokenizer, plain), expected)
    assert torch.equal(draw(tokenizer, given), expected)
    assert torch.equal(calibration.tokenize(tokenizer, given, 40).ids, ids)


def test_pieces_of_a_long_text_lose_nothing(
    texts: list[str], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = written(tmp_path / "t.txt", texts)
    whole = draw(tokenizer, plain)
    monkeypatch.setattr(documents, "BLOCK", 64)
    monkeypatch.setattr(calibration, "PIECE", 200)
    assert torch.equal(draw(tokenizer, plain), whole)


@pytest.mark.parametrize(
    "text", ["a\r\nb\rc\n" * 40, "å∫𝄞" * 60, "long " * 3000 + "\n" + "x" * 9000, "one", "\ufeffé\n\nx"]
)
@pytest.mark.parametrize("block", [5, 64, 1000])
def test_blocks_of_a_text_make_the_whole(
    text: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(text.encode())
    monkeypatch.setattr(documents, "BLOCK", block)
    plain = documents.open_documents(str(path), None)
    found = [part for _, parts in plain.read(range(len(plain))) for part in parts]
    assert "".join(found) == path.read_text(encoding="utf-8-sig")
    for number in range(0, len(plain), 7):
        assert next(plain.read([number])) == (number, [found[number]])


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "csv", "csv.gz", "tsv", "parquet", "dataset"])
@pytest.mark.parametrize("block", [1, 33, 4000])
def test_blocks_hold_every_document_once(
    kind: str, block: int, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What has to be quoted in delimited files, in cells beside them too.
    quoted = str.maketrans({"a": '"', "b": "\n", "c": "\t", "d": "\r\n"})
    rows = [f"{number} {text}".translate(quoted) for number, text in enumerate(texts)]
    path = written(tmp_path / f"t.{kind}", rows, other="t\no")
    monkeypatch.setattr(documents, "BLOCK", block)
    monkeypatch.setattr(documents, "ROWS", block)
    found = documents.open_documents(str(path), None)
    blocks = dict(found.read(range(len(found))))
    assert [row for number in sorted(blocks) for row in blocks[number]] == rows
    if kind == "parquet" and block == 33:  # no block spans two row groups, of 70 rows
        assert [len(blocks[number]) for number in range(4)] == [33, 33, 4, 33]
    some = list(range(1, len(found), 3))
    assert dict(found.read(some)) == {number: blocks[number] for number in some}


@pytest.mark.parametrize("kind", ["txt.gz", "jsonl.gz", "csv.gz"])
@pytest.mark.parametrize("some", [slice(None), slice(1, None, 3)])
def test_a_packed_file_is_read_forwards_only(
    kind: str, some: slice, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Going back in one means unpacking it from its beginning, for every block."""

    class Forwards(gzip.GzipFile):
        def seek(self, offset: int, whence: int = 0) -> int:
            assert whence or offset >= self.tell()
            return super().seek(offset, whence)

    path = written(tmp_path / f"t.{kind}", texts)
    monkeypatch.setattr(documents, "BLOCK", 64)
    monkeypatch.setattr(documents, "_LOOK_AHEAD", 16)
    found = documents.open_documents(str(path), None)
    numbers = list(range(len(found)))[some]
    assert len(numbers) > 30
    whole = dict(found.read(range(len(found))))
    monkeypatch.setattr(gzip, "GzipFile", Forwards)
    assert dict(found.read(numbers)) == {number: whole[number] for number in numbers}


def test_members_of_a_packed_file_are_read_one_after_another(tmp_path: Path) -> None:
    path = tmp_path / "t.txt.gz"
    path.write_bytes(gzip.compress(b"one ") + gzip.compress(b"") + gzip.compress(b"two\n") + bytes(8))
    found = documents.open_documents(str(path), None)
    assert list(found.read([0])) == [(0, ["one two\n"])]


def test_long_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than the csv module's own limit."""
    csv.field_size_limit(1 << 17)
    path = delimited(tmp_path / "t.csv", [["text"], ["a" * (1 << 18)], ["b"]])
    found = documents.open_documents(str(path), None)
    assert [each for _, block in found.read(range(len(found))) for each in block] == ["a" * (1 << 18), "b"]
    monkeypatch.setattr(documents, "LINE", 1000)
    delimited(path, [["text"], ["x"], ["line\n" * 300]])
    with pytest.raises(CalibrationError, match=r"t\.csv, line 3: longer than"):
        documents.open_documents(str(path), None)


# Huge sources.


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["txt", "txt.gz", "jsonl", "csv", "parquet"])
def test_a_huge_source_is_sampled_within_bounds(kind: str, tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    size, pool = 20 << 20, 1 << 18
    document = "".join(random.Random(5).choices(ALPHABET.replace(",", ""), k=2000))
    path = written(tmp_path / f"t.{kind}", [f"{document},{number:,}," for number in range(size // 2000)])
    tokenised = []
    encode = calibration.encode
    monkeypatch.setattr(calibration, "POOL", pool)
    monkeypatch.setattr(
        calibration, "encode", lambda t, text, *more: tokenised.append(len(text)) or encode(t, text, *more)
    )
    tracemalloc.start()
    windows = draw(tokenizer, path, samples=8, length=30)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert pool <= sum(tokenised) <= 2 * pool
    # Ids as Python ints and as a tensor; a fraction of the 20 MiB.
    assert peak < 60 * pool < size
    assert windows.shape == (8, 30)
    for window in windows:
        # What the tokenizer does not know, digits and newlines, is left out.
        assert letters(window).replace("\n", "")[:5] in document + ",,," + document
    assert torch.equal(draw(tokenizer, path, samples=8, length=30), windows)
    assert not torch.equal(draw(tokenizer, path, samples=8, length=30, seed=4), windows)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv"])
def test_every_part_of_a_thinned_source_is_as_likely(
    kind: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 documents, each of one letter and of very different lengths: letters come as often as in the whole."""
    rows = [ALPHABET[number % 25] * (4 + 9 * (number % 7)) for number in range(40)]
    path = written(tmp_path / f"t.{kind}", rows)
    monkeypatch.setattr(documents, "BLOCK", 40)
    monkeypatch.setattr(documents, "ROWS", 1)
    monkeypatch.setattr(calibration, "POOL", 300)
    monkeypatch.setattr(calibration, "POOL_PER_TOKEN", 1)
    found: Counter[str] = Counter()
    for seed in range(600):
        found.update(letters(draw(tokenizer, path, samples=20, length=2, seed=seed).flatten()).replace("\n", ""))
    whole = Counter("".join(rows))
    for letter in whole:
        share = found[letter] / found.total()
        assert share == pytest.approx(whole[letter] / whole.total(), rel=0.35, abs=0.004), letter


# Several sources.


def test_shares_are_the_nearest_whole_numbers() -> None:
    draw = random.Random(2)
    for _ in range(50):
        weights = [draw.uniform(0.5, 3) for _ in range(3)]
        samples = draw.randint(9, 30)
        shares = Text(tuple(Source("x", weight=weight) for weight in weights)).shares(samples)
        exact = [samples * weight / sum(weights) for weight in weights]
        choices = [c for c in product(*(range(int(e), int(e) + 2) for e in exact)) if sum(c) == samples]
        best = min(sum(abs(a - b) for a, b in zip(choice, exact, strict=True)) for choice in choices)
        assert sum(abs(a - b) for a, b in zip(shares, exact, strict=True)) == pytest.approx(best)
    assert Text((Source("x"), Source("y"), Source("z"))).shares(8) == [3, 3, 2]
    with pytest.raises(ConfigError, match=r"y with weight 0\.01 of 1\.01 gets none of 12 samples"):
        Text((Source("x"), Source("y", weight=0.01))).shares(12)


def test_windows_come_from_each_source_by_its_weight(tokenizer: Any, tmp_path: Path) -> None:
    for letter in "abc":
        (tmp_path / letter).write_text(letter * 500)
    given = [f"{tmp_path}/a=0.5", f"{tmp_path}/b=1", Source(f"{tmp_path}/c", weight=2.5)]
    windows = draw(tokenizer, given, samples=16)
    assert Counter(letters(windows[:, 0])) == {"a": 2, "b": 4, "c": 10}
    twice = draw(tokenizer, [tmp_path / "a", tmp_path / "a"], samples=2)
    assert twice.shape == (2, 24)


def test_one_text_twice_does_not_give_the_same_windows_twice(tokenizer: Any, text: Path) -> None:
    first, second = draw(tokenizer, [text, text]).split(10)
    assert not torch.equal(first, second)


# How a source is written.


def test_what_is_there_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Source.parse(str(lines(Path("a.jsonl"), [{}]))) == Source("a.jsonl")
    assert Source.parse("a.jsonl=0.25") == Source("a.jsonl", weight=0.25)
    assert Source.parse("a.jsonl:body=2") == Source("a.jsonl", "body", 2)
    assert Source.parse("a.jsonl:the body") == Source("a.jsonl", "the body")
    for odd in ("a.jsonl:body", "a.jsonl=0.25", "a.jsonl:body=2", "hf:x"):
        Path(odd).write_text("x")
        assert Source.parse(odd) == Source(odd)
        assert Source.parse(f"{odd}=3") == Source(odd, weight=3)
    assert Source.parse("hf:org/name#en@train[:1%]:body=0.5") == Source("hf:org/name#en@train[:1%]", "body", 0.5)
    assert Source.parse("hf:org/name@train[1:20]") == Source("hf:org/name@train[1:20]")
    assert Source.parse("hf:name") == Source("hf:name")
    assert Source.parse("hf:name:body") == Source("hf:name", "body")
    assert Text.of(Path("a.jsonl")).sources == (Source("a.jsonl"),)
    assert str(Text.of(["a.jsonl:b=0.5", "a.jsonl"])) == "a.jsonl:b=0.5, a.jsonl=1"


ROW = '{"id": 1, "text": "some text"}'
GZIP = gzip.compress(b"some text", mtime=0)
CORRUPT = "its gzip data is corrupt or truncated"


@pytest.mark.parametrize(
    ("spec", "content", "message"),
    [
        ("t.jsonl=0", ROW, "t.jsonl: the weight is 0; it must be positive, at most 1e+12"),
        ("t.jsonl=nan", ROW, "the weight is nan"),
        ("t.jsonl=much", ROW, "'t.jsonl=much': the weight 'much' is not a number"),
        ("u.jsonl:text=0.5", None, "cannot read the text u.jsonl:text=0.5: No such file"),
        ("t.jsonl:body", ROW, "t.jsonl has no field 'body'; it has id, text"),
        (
            "t.txt:body",
            "some text",
            "t.txt:body: only .jsonl, .ndjson, .json, .csv, .tsv, .parquet or .arrow files and",
        ),
        ("t.csv:body", "id,text\n1,x", "t.csv has no field 'body'; it has id, text"),
        ("t.csv", "id,prose\n1,x", "name one after a colon, t.csv:FIELD; it has id, prose"),
        ("t.csv", "text,text\n1,x", "t.csv has 2 columns 'text'; rename all but one"),
        ("t.csv", 'id,text\n1,"a\nb"\n2,c,d', "t.csv, line 4: 3 cells, and the header has 2; quote cells that hold"),
        ("t.csv", "id,text\n1,a\n2\n", "t.csv, line 3: 1 cells, and the header has 2"),
        ("t.csv", 'text\nfine\n"a quote\nand no end', "t.csv, line 3: not a row of cells (unexpected end of data)"),
        (
            "t.csv",
            'text\n"odd" text\n',
            "t.csv, line 2: not a row of cells (',' expected after '\"'); check its quotes",
        ),
        ("t.csv", "text\na\rb\n", "t.csv, line 2: not a row of cells (new-line character seen in unquoted field)"),
        ("t.csv", b"\xef\xbb\xbftext\n\xe9\n", "t.csv is not UTF-8 text (byte 8); convert it to UTF-8"),
        ("t.csv", "text\na\0\n", "t.csv is not UTF-8 text (byte 6 is NUL, as in UTF-16); convert it to UTF-8"),
        ("t.csv", "\n", "t.csv is empty"),
        ("t.csv", "text\n", "t.csv is empty"),
        ("t.txt", codecs.BOM_UTF8 + b"\xe9x", "t.txt is not UTF-8 text (byte 3); convert it to UTF-8"),
        ("t.txt", b"\xef\xbb\xbf123456\na line.\na line.\n123456\xe9", "t.txt is not UTF-8 text (byte 32); convert"),
        ("t.txt", "a line.\na line.\na line.\n\0", "t.txt is not UTF-8 text (byte 24 is NUL, as in UTF-16)"),
        ("t.txt", codecs.BOM_UTF8, "t.txt is empty"),
        ("t.txt.gz", "", "t.txt.gz is empty"),
        ("t.txt.gz", "some text", f"cannot read the text t.txt.gz: {CORRUPT} (Not a gzipped file"),
        ("t.txt.gz", GZIP[:-9], f"cannot read the text t.txt.gz: {CORRUPT} (Compressed file ended"),
        ("t.txt.gz", GZIP[:-8] + bytes(8), f"cannot read the text t.txt.gz: {CORRUPT} (CRC check failed"),
        ("t.txt.gz", GZIP + b"on", f"cannot read the text t.txt.gz: {CORRUPT} (Not a gzipped file (b'on'))"),
        (
            "t.jsonl",
            '{"prose": 1}',
            "t.jsonl has no field text, messages, conversations or content, and no instruction with output; name one after a",
        ),
        ("t.jsonl", f'{ROW}\n{ROW}\n{ROW}\n{{"body": 1}}', "t.jsonl, line 4: no field 'text'; it has body"),
        ("t.jsonl", f"{ROW}\n\n{{\n", "t.jsonl, line 3: not JSON (Expecting"),
        ("t.jsonl", ROW.encode("utf-16-le"), "t.jsonl, line 1: not JSON (Expecting"),
        (
            "t.json",
            "[\n  {}\n]",
            "t.json, line 1: not JSON (Expecting value: line 2 column 1 (char 2)); write one object per",
        ),
        ("t.json", f"[{ROW}]", "t.json, line 1: not a JSON object; write one object per line"),
        ("t.jsonl", '{"text": 5}', "t.jsonl, line 1: field 'text' is neither text nor a list of messages"),
        ("t.jsonl", '{"messages": [{"by": 1}]}', "t.jsonl, line 1: field 'messages' has a message without role and"),
        ("t.jsonl", "", "t.jsonl is empty"),
        ("t.jsonl", '{"text": " "}\n{"text": null}', "t.jsonl is empty"),
        (
            "t.jsonl",
            '{"messages": [{"role": "user", "content": "x"}]}',
            "t.jsonl has conversations, and the model's tokenizer has no chat template",
        ),
        ("t.parquet:body", {"text": ["some text"]}, "t.parquet has no field 'body'; it has text"),
        ("t.parquet", {"text": [["x"]] * 3}, "t.parquet, row 1: field 'text' has a message without role and content"),
        ("t.parquet", {"text": []}, "t.parquet is empty"),
        ("t.parquet", "PAR0", "t.parquet cannot be read as parquet: Parquet"),
        ("t.arrow", "PAR0", "t.arrow cannot be read by the datasets library: "),
        ("hf:nowhere/nothing", None, "hf:nowhere/nothing cannot be read by the datasets library: "),
        ("hf:data@test[:5]:text", {"text": ["x"]}, "hf:data@test[:5] has no split 'test[:5]'; it has none"),
        ("hf:data:body", {"text": ["x"]}, "hf:data has no field 'body'; it has text"),
        ("hf:", None, "'hf:': write a dataset as hf:NAME"),
    ],
)
def test_errors_say_the_place(
    spec: str, content: Any, message: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("data" if spec.startswith("hf:") else spec.partition("=")[0].partition(":")[0])
    if isinstance(content, dict):
        parquet(path, content) if path.suffix else saved(path, content)
    elif content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    # Lines in far blocks are counted too.
    monkeypatch.setattr(documents, "BLOCK", 10)
    with pytest.raises(StreamPruneError, match=re.escape(message)):
        draw(tokenizer, spec, samples=1, length=2)


def _zipped(data: bytes) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr("t.txt", data)
    return held.getvalue()


def _archived(data: bytes) -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as archive:
        entry = tarfile.TarInfo("t.txt")
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))
    return held.getvalue()


UNSUPPORTED: dict[str, Callable[[bytes], bytes]] = {
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    ".zst": lambda data: b"\x28\xb5\x2f\xfd" + data,
    ".lz4": lambda data: b"\x04\x22\x4d\x18" + data,
    ".7z": lambda data: b"7z\xbc\xaf\x27\x1c" + data,
    ".zip": _zipped,
    ".tar": _archived,
    "gzip within gzip": lambda data: gzip.compress(gzip.compress(data)),
    "UTF-16": lambda data: data.decode().encode("utf-16"),
    "UTF-32": lambda data: codecs.BOM_UTF32_BE + data.decode().encode("utf-32-be"),
}


@pytest.mark.parametrize("form", UNSUPPORTED)
def test_unsupported_files_are_named(form: str, tmp_path: Path) -> None:
    """By content, also within gzip, or by suffix."""
    data = UNSUPPORTED[form](b"some text\n" * 50)
    found = {"t.txt": data, "t.jsonl": data, "t.csv": data, "t.tgz": gzip.compress(data)}
    if form.startswith("."):
        found[f"t.txt{form.upper()}"] = b"anything"
    for name, content in found.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(
            CalibrationError, match=rf"{re.escape(name)} is {re.escape(form)}; convert it to UTF-8 text"
        ):
            documents.open_documents(str(tmp_path / name), None)


def test_a_bomb_of_text(tmp_path: Path) -> None:
    path = stored(tmp_path / "t.txt.gz", b"a" * (documents.UNPACKED + 1))
    with pytest.raises(CalibrationError, match=r"t\.txt\.gz unpacks to more than 200 times its size; it is not text"):
        documents.open_documents(str(path), None)


def test_libraries_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = parquet(tmp_path / "t.parquet", {"text": ["x"]})
    for name in ("datasets", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None)
    for place, name in (("hf:x", "datasets"), (str(tmp_path), "datasets"), (str(path), "pyarrow")):
        with pytest.raises(ConfigError, match=rf"needs {name}: pip install 'streamprune\[datasets\]'"):
            documents.open_documents(place, None)


def test_data_free_calibration_stands_alone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'self' cannot be combined with other sources"):
        Config(model=tmp_path, out=tmp_path / "out", ratio=0.3, calibration=["self", "a.txt"])


# Conversations.


def test_conversations_as_the_template_writes_them(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = TEMPLATE
    turns = [["hello", "hi there"], ["what", "this"], ["more", "less"]] * 4
    expected = "".join(f"user. {ask},assistant. {answer}," for ask, answer in turns)
    roles = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in turns]
    speakers = [[{"from": "human", "value": a}, {"from": "gpt", "value": b}] for a, b in turns]
    for given in (
        lines(tmp_path / "m.jsonl", [{"messages": each} for each in roles]),
        lines(tmp_path / "c.jsonl", [{"conversations": each} for each in speakers]),
        f"{lines(tmp_path / 'x.jsonl', [{'chat': each} for each in roles])}:chat",
        parquet(tmp_path / "m.parquet", {"messages": roles}),
        saved(tmp_path / "data", {"messages": roles}),
    ):
        assert letters(calibration.tokenize(tokenizer, given, 40).ids) == expected
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(CalibrationError, match=r"chat template refuses a conversation .*roles must alternate"):
        calibration.tokenize(tokenizer, tmp_path / "m.jsonl", 40)


def test_a_chat_template_is_part_of_what_a_job_was_started_with(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny("llama"), tmp_path / "model")
    before = calibration.text_identity(Text.of(text), model)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    assert calibration.text_identity(Text.of(text), model) != before


# Through the commands.


def test_the_report_has_the_fingerprint(
    configured: Callable[..., Config], tiny: Tiny, texts: list[str], text: Path, tmp_path: Path
) -> None:
    path = tiny("llama")
    rows = lines(tmp_path / "rows.jsonl", [{"text": each} for each in texts])
    sources = [f"{rows}:text=0.25", f"{text}=0.75"]
    config = configured(path, recipe="wanda-sp", calibration=sources)
    result = streamprune.prune(config)
    windows = draw(load_tokenizer(path), sources, 12, 24, 0)
    expected = hashlib.sha256(windows.numpy().tobytes()).hexdigest()[:16]
    report = json.loads((config.out / "report.json").read_text())
    assert report["tokens"] == result.tokens == expected
    assert report["model"] == {"name": path.name, "commit": None}
    assert report["job"]["inputs"]["calibration"]["1"] == {
        "sha256": hashlib.sha256(rows.read_bytes()).hexdigest(),
        "field": "text",
        "share": 0.25,
    }
    arguments = ["run", str(path), str(tmp_path / "again"), "--recipe", "wanda-sp", "--ratio", "0.3", "--round-to", "4"]
    arguments += ["--samples", "12", "--seq-len", "24", "--calibration", sources[0], "--calibration", sources[1]]
    done = CliRunner().invoke(main, arguments)
    assert f"calibrated on tokens {expected}" in done.stdout
    # Content, field and share are compared; names are not.
    rows.rename(moved := tmp_path / "moved.jsonl")
    assert streamprune.prune(configured(path, recipe="wanda-sp", calibration=[f"{moved}=1", f"{text}=3"])).tokens
    with pytest.raises(ConfigError, match=r"inputs\.calibration\.1\.share is 0\.5 and was 0\.25"):
        streamprune.prune(configured(path, recipe="wanda-sp", calibration=[moved, text]))
    assert streamprune.prune(configured(path, "m", recipe="magnitude")).tokens is None


def test_tuning_reads_several_sources(tiny: Tiny, texts: list[str], text: Path, tmp_path: Path) -> None:
    path = tiny("llama")
    sources = [text, lines(tmp_path / "rows.jsonl", [{"text": each} for each in texts])]
    tuned = streamprune.tune(
        TuneConfig(
            model=path,
            out=tmp_path / "out",
            text=sources,
            teacher=path,
            method="distil",
            samples=4,
            seq_len=12,
            steps=2,
        )
    )
    windows = draw(load_tokenizer(path), sources, 4, 12, 0)
    assert tuned.tokens == calibration.Windows.of(windows).fingerprint
    assert json.loads((tmp_path / "out" / "report.json").read_text())["tokens"] == tuned.tokens


def test_perplexity_of_rows_is_that_of_their_text(tiny: Tiny, texts: list[str], tmp_path: Path) -> None:
    plain = written(tmp_path / "t.txt", texts)
    rows = written(tmp_path / "t.jsonl", texts, "body")
    one = streamprune.evaluate(tiny("llama"), plain, seq_len=24)
    other = streamprune.evaluate(tiny("llama"), f"{rows}:body", seq_len=24)
    assert one.perplexity == other.perplexity
    assert one.protocol.startswith("whole text tokenised without special tokens; ")
    assert other.protocol.startswith("whole text, documents of field 'body' joined by two newlines, tokenised without")
    with pytest.raises(ConfigError, match=r"has weight 0\.5; a text to measure on is read whole"):
        streamprune.evaluate(tiny("llama"), f"{rows}:body=0.5", seq_len=24)


def test_perplexity_of_conversations(tiny: Tiny, texts: list[str], tmp_path: Path) -> None:
    model = shutil.copytree(tiny("llama"), tmp_path / "model")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    rows = lines(tmp_path / "t.jsonl", [{"messages": [{"role": "user", "content": each}]} for each in texts])
    (tmp_path / "t.txt").write_text("".join(f"user. {each}," for each in texts))
    measured = streamprune.evaluate(model, rows, seq_len=24)
    assert measured.perplexity == streamprune.evaluate(model, tmp_path / "t.txt", seq_len=24).perplexity
    assert "documents of field 'messages' joined as the chat template writes them, tokenised" in measured.protocol


def test_a_packed_text_is_measured_whole(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    path = stored(tmp_path / "t.txt.gz", text.read_bytes())
    assert path.stat().st_size < text.stat().st_size / 1.5
    one, other = (streamprune.evaluate(tiny("llama"), each, seq_len=24) for each in (text, path))
    assert (one.perplexity, one.tokens, one.protocol) == (other.perplexity, other.tokens, other.protocol)
    assert one.tokens == len(text.read_text()) // 24 * 23
    path.write_bytes(path.read_bytes()[:-100])
    done = CliRunner().invoke(main, ["eval", str(tiny("llama")), "--text", str(path)])
    assert done.exit_code == 1
    assert f"cannot read the text {path}: its gzip data is corrupt or truncated" in done.stderr


def test_too_little_text_is_said_once_a_source(
    configured: Callable[..., Config], tiny: Tiny, text: Path, tmp_path: Path
) -> None:
    (tmp_path / "little.txt").write_text(text.read_text()[:200])
    little = Source(str(tmp_path / "little.txt"), weight=3)
    note = f"{little} gives 200 tokens, and 9 windows of 24 ask for 216: they overlap heavily; "
    note += "give more text, or lower samples or seq-len"
    said: list[str] = []
    progress = streamprune.Callback(lambda event: said.append(event.message))
    path = tiny("llama")
    streamprune.prune(configured(path, recipe="wanda-sp", calibration=[little, text]), progress=progress)
    assert [message for message in said if "overlap" in message] == [note]
    said.clear()
    # 8 windows of 24 tokens have 192.
    streamprune.prune(configured(path, "b", recipe="wanda-sp", calibration=little, samples=8), progress=progress)
    assert not [message for message in said if "overlap" in message]
    rows = {
        "ratios": [0.2, 0.3],
        "recipes": ["wanda-sp"],
        "samples": 9,
        "seq_len": 24,
        "eval_seq_len": 24,
        "round_to": 4,
    }
    streamprune.compare(path, text=text, calibration=little, out=tmp_path / "compared", progress=progress, **rows)
    assert [message for message in said if "overlap" in message] == [note]
    said.clear()
    tuning = TuneConfig(
        model=path, out=tmp_path / "t", text=little, teacher=path, method="distil", samples=9, seq_len=24, steps=1
    )
    streamprune.tune(tuning, progress=progress)
    assert [message for message in said if "overlap" in message] == [note]


def test_a_comparison_says_once_that_the_sample_is_built_in(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    said: list[str] = []
    progress = streamprune.Callback(lambda event: said.append(event.message))
    rows = {
        "ratios": [0.2, 0.3],
        "recipes": ["wanda-sp"],
        "samples": 4,
        "seq_len": 24,
        "eval_seq_len": 24,
        "round_to": 4,
    }
    found = streamprune.compare(tiny("llama"), text=text, out=tmp_path / "out", progress=progress, **rows)
    assert len([message for message in said if "built-in English sample" in message]) == 1
    assert found.settings["calibration"] == "built-in sample"


def test_a_job_goes_on_only_with_the_same_shares(
    configured: Callable[..., Config], tiny: Tiny, text: Path, tmp_path: Path
) -> None:
    (tmp_path / "other.txt").write_text(text.read_text()[::-1])
    both = [text, tmp_path / "other.txt"]
    config = configured(tiny("llama"), recipe="wanda-sp", calibration=both)
    streamprune.plan_only(config)
    with pytest.raises(ResumeError, match=r"inputs\.calibration\.1\.share is 0\.75 and was 0\.5"):
        streamprune.prune(configured(tiny("llama"), recipe="wanda-sp", calibration=[f"{text}=3", both[1]]))
    assert streamprune.prune(config).resumed
