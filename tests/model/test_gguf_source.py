"""GGUF files as sources: the bits that transformers and the gguf package give, and results that equal those of a 16-bit twin."""

from __future__ import annotations

import importlib.util
import json
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import contents, make_tiny
from gguf import GGMLQuantizationType as Kind
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize
from gguf_reference import VOCABULARY, write_byte_tokenizer
from safetensors.torch import save_file
from stopping import Stop, stopping_after
from transformers import AutoModelForCausalLM, AutoTokenizer

import streamprune
from streamprune import Config
from streamprune.errors import CheckpointError, ResumeError
from streamprune.model import entries
from streamprune.model.checkpoint import Checkpoint
from streamprune.model.config import read_configuration
from streamprune.model.entries import Span
from streamprune.model.gguf_source import Blocks, StoredBlocks, laid_out
from streamprune.model.tokenizer import load_tokenizer, tokenizer_folder
from streamprune.model.whole import load_whole

Exported = Callable[..., Path]
Make = Callable[..., Config]
KINDS = [
    "F32",
    "F16",
    "BF16",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ4_NL",
    "IQ4_XS",
]
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
    "gpt2": {"n_inner": 256, "max_position_embeddings": 1024},
    "gemma2": {"query_pre_attn_scalar": 8},
    "phi3": {"vocab_size": 32001},
    "starcoder2": {},
    "qwen3_moe": {"mlp_only_layers": [], "moe_intermediate_size": 768},
}
"""What both transformers' loader and the exporter support, in sizes that the former does not forget."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """`exported("llama", "q8_0")`: a tiny model in bfloat16, its GGUF file in a folder of its own; not to be written to."""
    made: dict[str, Path] = {}

    def get(name: str, dtype: str = "bf16", **changes: Any) -> Path:
        key = repr((name, dtype, changes))
        if key not in made:
            folder = tmp_path_factory.mktemp("model")
            sizes = {"vocab_size": VOCABULARY + 8, "hidden_size": 64, "intermediate_size": 96, **changes}
            model = make_tiny(folder / "model", name, torch.bfloat16, **sizes)
            write_byte_tokenizer(model)
            (folder / "gguf").mkdir()
            made[key] = streamprune.export_gguf(model, folder / "gguf" / "model.gguf", dtype=dtype).path
        return made[key]

    return get


def original(path: Path) -> Path:
    return path.parent.parent / "model"


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_dequantised_as_by_gguf(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(entries, "CHUNK", 1000)
    qtype, random = Kind[kind], np.random.default_rng(0)
    elements, unit = GGML_QUANT_SIZES[qtype]
    columns = 512
    data = random.integers(0, 256, (24, columns // elements * unit), dtype=np.uint8)
    if elements > 1:  # scales in float16 stay finite if no byte has the high bits of an exponent
        data &= 0b10111011
    else:
        data = random.standard_normal((24, columns), dtype=np.float32)
        data = gguf.quants.quantize(data, qtype).view(np.uint8)
    (tmp_path / "blocks").write_bytes(b"header" + data.tobytes())
    expected = torch.from_numpy(dequantize(data, qtype))
    assert expected.isfinite().all()
    stored = StoredBlocks(kind, (3, 8, columns), Span(tmp_path / "blocks", 6, data.nbytes), qtype, unit)
    entry = Blocks.of(stored)
    assert torch.equal(entry.read(), expected.bfloat16().view(3, 8, columns))
    assert torch.equal(entry.part(2, slice(1, 5)).read(), expected.bfloat16()[17:21])
    assert entry.part(2, slice(1, 5)).stored_bytes == 4 * data.shape[1]
    order = random.permutation(24)
    moved = laid_out(entry.rows(0, 24, (24, columns)), lambda weights: weights[order])  # type: ignore[arg-type]
    assert isinstance(moved, Blocks)
    assert torch.equal(moved.read(), expected[order].bfloat16())
    assert torch.equal(moved.part(rows=slice(7, 9)).read(), expected[order[7:9]].bfloat16())
    turned = laid_out(entry.rows(0, 24, (24, columns)), lambda weights: weights.T - 1)
    assert torch.equal(turned.read(), (expected.T - 1).bfloat16())
    assert stored.finite(torch.from_numpy(data).view(-1))
    data[-1] = 0xFF  # NaN as a float of any size, and as a block's scale
    assert not stored.finite(torch.from_numpy(data).view(-1))


@pytest.mark.parametrize("name", MODELS)
def test_tensors_are_those_of_the_model_and_of_transformers(name: str, exported: Exported) -> None:
    path = exported(name, **MODELS[name])
    checkpoint, source = Checkpoint(path), Checkpoint(original(path))
    read_configuration(checkpoint), read_configuration(source)
    left = set(source) - set(checkpoint)
    assert left <= {"lm_head.weight"}
    assert set(checkpoint) <= set(source)
    for tensor in checkpoint:
        assert torch.equal(checkpoint.read(tensor), source.read(tensor)), tensor
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16).state_dict()
    ours = load_whole(path).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_quantised_tensors_are_those_of_transformers(name: str, exported: Exported) -> None:
    path = exported(name, "q8_0", **MODELS[name])
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16).state_dict()
    ours = load_whole(path).state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert {"Q8_0", "F32"} <= {each.dtype for each in Checkpoint(path).stored.values()}


@pytest.mark.parametrize("layout", ["uniform", "free"])
def test_a_gguf_file_gives_the_bytes_of_its_16_bit_twin(
    layout: str, exported: Exported, configured: Make, text: Path, tmp_path: Path
) -> None:
    path, twin = exported("llama", "q8_0"), tmp_path / "model.gguf-twin"
    checkpoint = Checkpoint(path)
    with tokenizer_folder(path) as folder:
        shutil.copytree(folder, twin)
    save_file(
        {name: checkpoint.read(name) for name in checkpoint}, twin / "model.safetensors", metadata={"format": "pt"}
    )
    (twin / "config.json").write_text(json.dumps(checkpoint.config))
    results, forecasts = [], []
    for model in (path, twin):
        config = configured(model, f"out-{model.name}", recipe="default", layout=layout)
        forecasts.append(streamprune.forecast_job(config))
        streamprune.prune(config)
        assert streamprune.verify(config.out).sound
        files = contents(config.out)
        results.append({name: files[name] for name in files if name not in ("report.json", "README.md", "SHA256SUMS")})
    assert results[0].keys() == results[1].keys()
    assert results[0] == results[1]
    same = [(each.steps, each.operations_by_kind, each.output_bytes, each.disk_bytes) for each in forecasts]
    assert same[0] == same[1]
    assert forecasts[0].bytes_to_read < forecasts[1].bytes_to_read
    assert {"tokenizer.json", "tokenizer_config.json"} <= results[0].keys()
    assert json.loads(results[0]["config.json"])["dtype"] == "bfloat16"
    tokens = [AutoTokenizer.from_pretrained(each)("two words").input_ids for each in (original(path), config.out)]
    assert tokens[0] == tokens[1]
    measured = [streamprune.evaluate(model, text, seq_len=24).perplexity for model in (path, twin)]
    assert measured[0] == measured[1]


def test_a_folder_with_one_file(exported: Exported, tmp_path: Path) -> None:
    path = exported("llama")
    assert Checkpoint(path.parent).identity() == Checkpoint(path).identity()
    assert (
        streamprune.inspect(path)["model"]["dtypes"]
        == streamprune.inspect(path.parent)["model"]["dtypes"]
        == ["bfloat16"]
    )
    assert streamprune.verify(path).sound
    assert streamprune.verify(path.parent).sound
    assert load_tokenizer(path)("two words") == load_tokenizer(original(path))("two words")
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(path, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"has 2 GGUF files; give one of them, such as .*a\.gguf"):
        Checkpoint(tmp_path)


def test_a_job_notices_that_its_file_changed(
    exported: Exported, configured: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    shutil.copy(exported("llama", "q8_0"), path)
    config = configured(path, recipe="default", round_to=1)
    with stopping_after(3, monkeypatch), pytest.raises(Stop):
        streamprune.prune(config)
    data = bytearray(path.read_bytes())
    data[Checkpoint(path).stored["blk.1.ffn_up.weight"].span.begin + 2] ^= 1  # not among the samples of `identity`
    path.write_bytes(data)
    with pytest.raises(ResumeError, match="has changed since the job was started"):
        streamprune.prune(config)


@pytest.mark.parametrize("block", [b"\xff\x7f", b"\x00\x7c" + bytes(32)], ids=["NaN", "Inf times zero"])
def test_verify_finds_nan(block: bytes, exported: Exported, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    shutil.copy(exported("llama", "q8_0"), path)
    span = Checkpoint(path).stored["blk.1.ffn_up.weight"].span
    with path.open("r+b") as file:
        file.seek(span.begin + 34)
        file.write(block)  # the second one, which begins with its scale
    (fault,) = streamprune.verify(path).faults
    assert (fault.kind, fault.tensor) == ("values", "blk.1.ffn_up.weight")
    assert Checkpoint(path).read("model.layers.1.mlp.up_proj.weight").isnan().any()


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    "scaling",
    [
        LLAMA3,
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    ],
    ids=lambda scaling: str(scaling["rope_type"]),
)
def test_scaled_rotary_embeddings_are_kept(scaling: dict[str, Any], exported: Exported) -> None:
    path = exported("llama", rope_parameters={"rope_theta": 500000.0, **scaling})
    assert Checkpoint(path).config["rope_scaling"] == scaling
    found = [read_configuration(Checkpoint(model))[1].rope_parameters for model in (path, original(path))]
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "gpt2", "gemma2"])
def test_what_transformers_forgets_is_read(name: str, exported: Exported, text: Path) -> None:
    """Head widths, experts' widths, contexts and caps: `transformers` takes its defaults."""
    changes = {"qwen3_moe": {"mlp_only_layers": []}, "gemma2": {"query_pre_attn_scalar": 8}}
    path = exported(name, **changes.get(name, {}))
    measured = [streamprune.evaluate(model, text, seq_len=24).perplexity for model in (path, original(path))]
    assert measured[0] == pytest.approx(measured[1], rel=1e-5)


def test_rotary_embeddings_that_cannot_be_read(exported: Exported) -> None:
    path = exported("llama", rope_parameters={"rope_theta": 500000.0, **LLAMA3, "low_freq_factor": 2.0})
    with pytest.raises(CheckpointError, match="are not those of a llama 3"):
        Checkpoint(path)


def write(path: Path, architecture: str = "llama", *, blocks: int = 1, extra: dict[str, Any] | None = None) -> Path:
    """A GGUF file of a llama of one block, width 32, from GGUFWriter alone."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(blocks)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([chr(97 + number) for number in range(16)])
    writer.add_token_merges(["a b"])
    random = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (16, 32), "output_norm": (32,)}
    shapes |= {f"blk.0.{name}": (32,) for name in ("attn_norm", "ffn_norm")}
    shapes |= {f"blk.0.attn_{name}": (rows, 32) for name, rows in (("q", 32), ("k", 16), ("v", 16), ("output", 32))}
    shapes |= {"blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64)}
    for name, shape in shapes.items():
        values = random.standard_normal(shape, dtype=np.float32)
        kind = Kind.Q4_1 if len(shape) == 2 else Kind.F32
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    for name, value in (extra or {}).items():
        if isinstance(value, np.ndarray):
            writer.add_tensor(name, value)
        else:
            writer.add_uint32(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_file_of_ggufs_own_writer(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.bfloat16).state_dict()
    ours = load_whole(path).state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "tensor without a place": (
        {"extra": {"blk.0.odd.weight": np.ones(32, np.float32)}},
        "'blk.0.odd.weight' has no place",
    ),
    "integers": ({"extra": {"blk.0.odd.weight": np.ones(32, np.int32)}}, "is I32, which cannot be dequantised"),
    "too many blocks": ({"blocks": 9}, "it says 9 blocks and holds 1"),
    "one of several parts": (
        {"extra": {"split.count": 3}},
        "is one of 3 parts; join them with llama-gguf-split --merge",
    ),
    "unknown architecture": ({"architecture": "plamo"}, "GGUF model with architecture plamo is not supported"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_cannot_be_read(case: str, tmp_path: Path) -> None:
    how, message = REFUSED[case]
    path = write(tmp_path / "model.gguf", **how)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(path)
    (fault,) = streamprune.verify(path).faults
    assert (fault.kind, fault.file) == ("layout", "model.gguf")


def test_damaged_files(exported: Exported, tmp_path: Path) -> None:
    whole, path = exported("llama").read_bytes(), tmp_path / "model.gguf"
    for damaged in (
        b"",
        whole[:100],
        whole[: len(whole) // 2],
        b"GGML" + whole[4:],
        whole[:8] + b"\xff" * 8 + whole[16:],
    ):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="cannot read this GGUF file"):
            Checkpoint(path)


def value(kind: int, data: bytes) -> bytes:
    """A GGUF file without tensors and with one value of metadata."""
    return struct.pack("<4sIQQQ1sI", b"GGUF", 3, 0, 1, 1, b"a", kind) + data


HOSTILE = {
    "long array": (value(9, struct.pack("<IQ", 4, 1 << 40)), "more than 4194304 values"),
    "array beyond the file": (value(9, struct.pack("<IQQ", 4, 1 << 20, 0)), "ends beyond the file"),
    "long string": (value(8, struct.pack("<Q", 1 << 62)), "ends beyond the file"),
    "array of strings": (value(9, struct.pack("<IQQ", 8, 2, 1 << 40)), "ends beyond the file"),
    "array of arrays": (value(9, struct.pack("<IQIQ", 9, 1, 9, 1)), "value of type 9"),
    "type": (value(77, b"\0" * 8), "value of type 77"),
    "tensors": (struct.pack("<4sIQQ", b"GGUF", 3, 1 << 40, 0), "claims 1099511627776 tensors"),
    "big-endian": (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "little-endian"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_metadata_is_checked_before_it_is_parsed(case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data, message = HOSTILE[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    monkeypatch.setattr(gguf.GGUFReader, "__init__", lambda *_: pytest.fail("parsed"))
    for read in (Checkpoint, load_tokenizer, streamprune.load):
        with pytest.raises(CheckpointError, match=f"cannot read this GGUF file .*{message}"):
            read(path)


def test_metadata_is_parsed_once(exported: Exported, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "copy.gguf"
    shutil.copy(exported("llama"), path)
    usual, parsed = gguf.GGUFReader.__init__, list[str]()
    monkeypatch.setattr(gguf.GGUFReader, "__init__", lambda self, path: parsed.append(path) or usual(self, path))
    for read in (Checkpoint, load_tokenizer, streamprune.load):
        parsed.clear()
        read(path)
        assert len(parsed) == 1


def test_folders_of_killed_processes_are_removed(
    exported: Exported, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left = tmp_path / "streamprune-tokenizer-left"
    left.mkdir()
    (left / "tokenizer.json").write_text("{}")
    with tokenizer_folder(exported("llama")) as folder:
        assert [*tmp_path.iterdir()] == [folder]
        assert (folder / "tokenizer.json").is_file()
    assert [*tmp_path.iterdir()] == []


def test_without_the_gguf_package(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"reading it needs the gguf package: pip install 'streamprune\[gguf\]'"):
        Checkpoint(exported("llama"))
