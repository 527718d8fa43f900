"""What is fuzzed: each target puts bytes where a file should be, and reads as the commands do."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import mutation
import torch
from conftest import make_tiny, write_tokenizer
from gguf_reference import VOCABULARY as VOCABULARY_OF_BYTES
from gguf_reference import write_byte_tokenizer
from mutation import Form
from safetensors.torch import load_file, save

from streamprune import evaluate, export_gguf, inspect, status
from streamprune.errors import CalibrationError
from streamprune.jobs.journal import FORMAT, Journal
from streamprune.model import hub
from streamprune.model.checkpoint import Checkpoint, write_index, write_shard
from streamprune.model.gguf_source import read_gguf
from streamprune.model.names import CONFIG, INDEX, SINGLE
from streamprune.model.skeleton import Skeleton, open_skeleton
from streamprune.model.tokenizer import load_tokenizer
from streamprune.model.write import free_config
from streamprune.recipes.plan import Plan
from streamprune.system import machine
from streamprune.text import documents, windows
from streamprune.text.source import Source, Text

CPU = torch.device("cpu")
VOCABULARY = 40
WORDS = "a text of words, and some more of them. " * 4
SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2, "head_dim": 4}


@dataclass(frozen=True)
class Target:
    """One kind of file.

    Args:
        seeds: valid files.
        form: how they are made invalid.
        read: what the commands do with such a file.
        examples: how many the test suite tries.
        inputs: how many `scripts/fuzz` tries.
    """

    seeds: tuple[bytes, ...]
    form: Form
    read: Callable[[bytes], Any]
    examples: int
    inputs: int


def make_model(folder: Path, name: str = "llama", **changes: Any) -> Path:
    """A model of a few hundred weights in two shards, with a tokenizer."""
    grown = make_tiny(folder.with_name(f"{folder.name}-grown"), name, torch.bfloat16, **SMALL, **changes)
    found = {key: tensor for path in grown.glob("*.safetensors") for key, tensor in load_file(path).items()}
    for path in grown.glob("*.safetensors*"):
        path.unlink()
    shutil.move(grown, folder)
    names = sorted(found)
    halves = {f"model-{n:05}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    for shard, part in halves.items():
        write_shard(folder / shard, {key: found[key] for key in part})
    placed = {key: shard for shard, part in halves.items() for key in part}
    write_index(folder, placed, sum(t.numel() for t in found.values()), sum(t.nbytes for t in found.values()))
    return folder


def skeleton_of(folder: Path) -> Skeleton:
    """The model as the commands open it."""
    return open_skeleton(folder, CPU, "float32")


def header(home: Path) -> Target:
    folder = make_model(home / "header")
    whole = {n: t for path in sorted(folder.glob("*.safetensors")) for n, t in load_file(path).items()}
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    few = {"a.weight": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c.attn.bias": torch.ones(1).bool()}

    def read(data: bytes) -> None:
        (folder / SINGLE).write_bytes(data)
        checkpoint = Checkpoint(folder)
        end = 0
        for name, stored in sorted(checkpoint.stored.items(), key=lambda item: item[1].span.begin):
            span, entry = stored.span, checkpoint[name]
            assert span.begin >= end, f"{name} begins inside another tensor"
            assert span.nbytes == entry.nbytes == torch.Size(entry.shape).numel() * entry.dtype.itemsize
            end = span.begin + span.nbytes
        assert end <= len(data)
        checkpoint.identity()
        for name in checkpoint:
            checkpoint.read(name)
        if len(checkpoint) == len(whole):
            skeleton_of(folder)

    seeds = (save(few), save(few, {"format": "pt"}), save(whole, {"format": "pt"}))
    return Target(seeds, mutation.as_safetensors, read, 300, 20_000)


def index(home: Path) -> Target:
    folder = make_model(home / "index")

    def read(data: bytes) -> None:
        (folder / INDEX).write_bytes(data)
        hub._missing(folder)
        checkpoint = Checkpoint(folder)
        for name in checkpoint:
            checkpoint.read(name)

    return Target(((folder / INDEX).read_bytes(),), mutation.as_json, read, 300, 15_000)


def config(home: Path) -> Target:
    folders = {
        "experts": make_model(home / "experts", "qwen3_moe", moe_intermediate_size=4, num_experts=2),
        "pruned": make_model(home / "pruned"),
        "plain": make_model(home / "config"),
    }
    few = home / "few.txt"
    few.write_text(WORDS[:9])
    skeleton = skeleton_of(folders["pruned"])
    pruned = json.dumps(free_config(skeleton, skeleton.all_sites())).encode()
    seeds = ((folders["plain"] / CONFIG).read_bytes(), (folders["experts"] / CONFIG).read_bytes(), pruned)

    def read(data: bytes) -> None:
        kind = "pruned" if b"streamprune_" in data else "experts" if b"moe" in data else "plain"
        (folders[kind] / CONFIG).write_bytes(data)
        assert inspect(folders[kind])["model"] is not None
        load_tokenizer(folders[kind])
        evaluate(folders[kind], str(few), seq_len=4, device="cpu", memory=machine.base_bytes() + (1 << 29), cache=home)

    return Target(seeds, mutation.as_json, read, 120, 12_000)


def _tokenized(folder: Path, text: Path) -> None:
    windows.tokenize(load_tokenizer(folder), text, VOCABULARY)


def _with_tokenizer(home: Path, name: str) -> tuple[Path, Path]:
    folder = make_model(home / name)
    (home / f"{name}.txt").write_text(WORDS)
    return folder, home / f"{name}.txt"


def tokenizer(home: Path) -> Target:
    folder, text = _with_tokenizer(home, "tokenizer")
    path = folder / "tokenizer.json"
    plain = path.read_bytes()
    pairs = json.loads(plain)
    pieces = pairs["model"]["vocab"]
    pairs["model"] = {"type": "BPE", "vocab": {**pieces, "th": 33}, "merges": [["t", "h"]], "byte_fallback": False}
    pairs["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    pairs["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Prepend", "prepend": "_"}]}
    scores = json.loads(plain)
    scores["model"] = {"type": "Unigram", "unk_id": 1, "vocab": [[piece, -1.0] for piece in pieces]}
    scores["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 2}
    scores["padding"] = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<s>",
    }

    def read(data: bytes) -> None:
        path.write_bytes(data)
        _tokenized(folder, text)

    seeds = (plain, json.dumps(pairs).encode(), json.dumps(scores).encode())
    return Target(seeds, mutation.as_json, read, 200, 6_000)


def settings(home: Path) -> Target:
    folder, text = _with_tokenizer(home, "settings")
    path = folder / "tokenizer_config.json"
    asked = {
        **json.loads(path.read_bytes()),
        "add_bos_token": True,
        "model_max_length": 64,
        "added_tokens_decoder": {"0": {"content": "<s>", "special": True}},
        "additional_special_tokens": ["<s>"],
        "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
        "clean_up_tokenization_spaces": False,
        "auto_map": {"AutoTokenizer": [None, "evil.Tokenizer"]},
    }

    def read(data: bytes) -> None:
        path.write_bytes(data)
        _tokenized(folder, text)

    return Target((path.read_bytes(), json.dumps(asked).encode()), mutation.as_json, read, 200, 5_000)


def vocabulary(home: Path) -> Target:
    folder, text = _with_tokenizer(home, "vocabulary")
    (folder / "tokenizer.json").unlink()
    settings = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "<s>", "unk_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    letters = {letter: number for number, letter in enumerate(["<s>", *"abcdefghijklmnopqrstuvwxyz.,Ġ", "th"])}

    def read(data: bytes) -> None:
        pieces, _, merges = data.partition(b"\0")
        (folder / "vocab.json").write_bytes(pieces)
        (folder / "merges.txt").write_bytes(merges)
        _tokenized(folder, text)

    seed = json.dumps(letters).encode() + b"\0#version: 0.2\nt h\n"
    return Target((seed,), mutation.as_pair, read, 100, 4_000)


def plan(home: Path) -> Target:
    sites = skeleton_of(make_model(home / "planned")).all_sites()
    path = home / "plan.json"
    kept = {site.name: {"keep": 1, "units": [0]} for site in sites}
    zeros = {site.name: {"keep": site.units, "zeros": [0] * len(site.linears)} for site in sites}
    seeds = tuple(
        json.dumps({"format": "streamprune-plan-1", "ratio": 0.5, "sites": s}).encode() for s in (kept, zeros)
    )

    def read(data: bytes) -> None:
        path.write_bytes(data)
        found = Plan.read(path)
        found.check(sites, str(path))
        found.is_alike(sites)
        assert Plan.parse(found.to_json(), "itself") == found

    return Target(seeds, mutation.as_json, read, 300, 15_000)


def journal(home: Path) -> Target:
    out = home / "out"
    path = home / "out.streamprune" / "journal.jsonl"
    path.parent.mkdir()
    schedule = [{"name": "shot-1/prune", "steps": 2, "skipped_after": None}, {"name": "complete"}]
    job = {"settings": {"ratio": 0.5, "recipe": "sobp"}, "inputs": {}, "versions": {}}
    site = {"site": "blocks.0.ffn", "kept": 4, "units": 8, "error": 0.5, "seconds": 0.1}
    entries = [
        {"step": "start", "format": FORMAT, "job": job, "cache": None, "schedule": schedule, "replaces": False},
        {"step": "shot-1/prune/0", "sites": [site], "seconds": 1.5, "operations": 5},
    ]

    def read(data: bytes) -> None:
        path.write_bytes(data)
        found = Journal(path, repair=False)
        list(found.steps("shot-1/"))
        status(out)
        inspect(out)

    texts = [json.dumps(entry).encode() for entry in entries]
    seed = b"".join(b"%08x %s\n" % (zlib.crc32(text), text) for text in texts)
    return Target((seed,), mutation.as_journal, read, 300, 10_000)


class _Read:
    """Reads texts with a tokenizer that was loaded once."""

    def __init__(self, home: Path) -> None:
        folder = home / "reader"
        folder.mkdir()
        write_tokenizer(folder)
        self.tokenizer = load_tokenizer(folder)
        self.tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}.{% endfor %}"

    def __call__(self, path: Path) -> None:
        given = Source(str(path))
        windows.tokenize(self.tokenizer, given, VOCABULARY)
        windows.sample(self.tokenizer, Text((given,)), VOCABULARY, 2, 8, 0)


def rows(home: Path) -> list[dict[str, Any]]:
    """Documents of every kind."""
    turns = [{"role": "user", "content": "some words"}, {"role": "assistant", "content": "more words"}]
    spoken = [{"from": "human", "value": "some words"}, {"from": "gpt", "value": "more words"}]
    return [{"text": WORDS, "other": 1}, {"text": turns}, {"text": spoken}, {"text": None}, {"text": WORDS}]


def text(home: Path) -> Target:
    read_text, path = _Read(home), home / "calibration.txt"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        read_text(path)

    return Target((WORDS.encode(), "größer, 文字\r\n".encode() * 9), mutation.binary, read, 200, 10_000)


def lines(home: Path) -> Target:
    read_text, path = _Read(home), home / "calibration.jsonl"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        read_text(path)

    seed = b"".join(json.dumps(row).encode() + b"\n" for row in rows(home))
    return Target((seed,), mutation.as_lines, read, 200, 10_000)


def delimited(home: Path) -> Target:
    read_text, path = _Read(home), home / "calibration.csv"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        read_text(path)

    seed = f'\ufeffnumber,text\r\n1,"{WORDS}, ""quoted"",\n{WORDS}"\r\n\r\n'.encode() + f'2,"{WORDS}"\n'.encode() * 3
    return Target((seed,), mutation.binary, read, 200, 10_000)


def packed(home: Path) -> Target:
    read_text, path = _Read(home), home / "calibration.jsonl.gz"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        read_text(path)

    seed = b"".join(json.dumps(row).encode() + b"\n" for row in rows(home))
    return Target((gzip.compress(seed, mtime=0),), mutation.as_gzip, read, 200, 8_000)


def table(home: Path) -> Target:
    import pyarrow
    from pyarrow import parquet

    read_text, path = _Read(home), home / "calibration.parquet"

    def written(column: list[Any], **options: Any) -> bytes:
        held = io.BytesIO()
        parquet.write_table(pyarrow.table({"text": column, "number": [*range(len(column))]}), held, **options)
        return held.getvalue()

    def read(data: bytes) -> None:
        path.write_bytes(data)
        read_text(path)

    turns = [[{"role": "user", "content": "some words, many words"}]] * 5
    seeds = (written([WORDS] * 5, row_group_size=2), written(turns), written([WORDS] * 40, compression="gzip"))
    return Target(seeds, mutation.as_table, read, 150, 8_000)


def source(home: Path) -> Target:
    """How sources are given: places, fields and weights."""
    import datasets  # noqa: F401 - a folder's first read imports it, and an input would be blamed for its memory

    folder = home / "sources"
    folder.mkdir()
    for name in ("t.txt", "t.jsonl", "t.jsonl=2", "a:b.txt"):
        (folder / name).write_text(json.dumps({"text": WORDS}))

    def refuse(place: str) -> Any:
        raise CalibrationError(f"{place}: the hub is no part of this")

    def read(data: bytes) -> None:
        fetched, documents._load = documents._load, refuse
        here = os.getcwd()
        try:
            os.chdir(folder)
            given = Text.of(data.decode("utf-8", "surrogateescape").split("\n"))
            given.shares(4)
            given.identity()
        finally:
            os.chdir(here)
            documents._load = fetched

    seeds = (b"t.txt", b"t.jsonl:text=0.5\nt.txt=2", b"a:b.txt=1e1\nt.jsonl=2=9", b"./t.jsonl:text=2")
    return Target(seeds, mutation.as_words, read, 300, 15_000)


def gguf(home: Path) -> Target:
    folder = make_tiny(
        home / "gguf-model",
        "llama",
        torch.bfloat16,
        **{**SMALL, "hidden_size": 64, "intermediate_size": 64},
        vocab_size=VOCABULARY_OF_BYTES,
    )
    write_byte_tokenizer(folder)
    path = export_gguf(folder, home / "model.gguf", dtype="q8_0").path
    whole = path.read_bytes()
    ends = len(read_gguf(path).header)

    def form(data: bytes, random: Random) -> bytes:
        at = random.randint(0, ends)  # the metadata, its parts alone
        return data[:at] + mutation.binary(data[at:ends], random) + data[ends:]

    def read(data: bytes) -> None:
        path.write_bytes(data)
        checkpoint = Checkpoint(path)
        checkpoint.identity()
        for name in checkpoint:
            checkpoint.read(name)

    return Target((whole,), form, read, 100, 2_000)


TARGETS: dict[str, Callable[[Path], Target]] = {
    make.__name__: make
    for make in (
        header,
        gguf,
        index,
        config,
        tokenizer,
        settings,
        vocabulary,
        plan,
        journal,
        text,
        lines,
        delimited,
        packed,
        table,
        source,
    )
}
"""By name; each is made in a home of its own."""
