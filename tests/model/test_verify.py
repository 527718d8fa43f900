"""Results that can be trusted on the disk: what is damaged is found, and what was never written does not appear."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import contents, edit_tensors, make_tiny
from safetensors.torch import load_file, save_file
from stopping import Stop, stopping_after
from streamprune_cli import main

import streamprune
from streamprune import Config, TuneConfig, Verification
from streamprune.commands.tune import lora
from streamprune.errors import CheckpointError, DamageError, DiskError, NumericalError, Stopped
from streamprune.jobs.names import job_folder
from streamprune.model import verify
from streamprune.model.names import REPORT
from streamprune.model.verify import Fault
from streamprune.system import files
from streamprune.system.progress import Callback, Event

Make = Callable[..., Config]
Tiny = Callable[..., Path]
MANIFEST, INDEX = "SHA256SUMS", "model.safetensors.index.json"
UP = "model.layers.1.mlp.up_proj.weight"
KINDS = ("free", "uniform", "decilm", "tuned")


@pytest.fixture(scope="module")
def made(tiny: Tiny, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`made("free")`: a result of that kind, made once; not to be written to."""
    folder = tmp_path_factory.mktemp("made")
    shared: dict[str, Any] = {"calibration": text, "samples": 6, "seq_len": 24, "round_to": 4, "recipe": "sobp"}

    def make(kind: str) -> Path:
        out = folder / kind
        if out.exists():
            return out
        if kind == "tuned":
            how: dict[str, Any] = {"method": "distil", "teacher": tiny("llama"), "steps": 2}
            streamprune.tune(TuneConfig(model=make("free"), out=out, text=text, samples=6, seq_len=24, **how))
            return out
        wide = {"intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}
        model = tiny("llama", **wide) if kind == "decilm" else tiny("llama")
        streamprune.prune(Config(model=model, out=out, ratio=0.35, layout=kind, **shared))  # type: ignore[arg-type]
        return out

    return make


@pytest.fixture
def copied(made: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """`copied("free")`: a copy of the result, to be damaged."""

    def copy(kind: str = "free") -> Path:
        return Path(shutil.copytree(made(kind), tmp_path / "copy"))

    return copy


def flip(path: Path, place: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(bytes(data))


def sign_again(folder: Path) -> None:
    """A manifest of what is there, as somebody would make it by hand."""
    names = sorted(path.name for path in folder.iterdir() if path.name != MANIFEST)
    lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / MANIFEST).write_text("".join(lines))


def shard_of(folder: Path, tensor: str) -> Path:
    found: str = json.loads((folder / INDEX).read_text())["weight_map"][tensor]
    return folder / found


def change_tensor(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    path = shard_of(folder, name)
    tensors = load_file(path)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


def places(found: Verification) -> set[tuple[str, str, str | None]]:
    return {(fault.kind, fault.file, fault.tensor) for fault in found.faults}


# What is sound.


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_written_is_sound(kind: str, made: Callable[[str], Path]) -> None:
    out = made(kind)
    found = streamprune.verify(out)
    assert found.faults == found.unlisted == ()
    assert found.sound
    assert found.manifest
    listed = [line.partition("  ") for line in (out / MANIFEST).read_text().splitlines()]
    names = [name for _, _, name in listed]
    assert names == sorted(path.name for path in out.iterdir() if path.name != MANIFEST)
    assert {"log.txt", "report.json", "config.json", INDEX, "tokenizer.json"} < set(names)
    assert ("modeling_streamprune.py" in names) == (kind != "uniform")
    for digest, _, name in listed:
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
    assert found.files == len(names)
    assert found.bytes == sum((out / name).stat().st_size for name in names)
    assert found.tensors == len(json.loads((out / INDEX).read_text())["weight_map"])


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="the tool is not here")
def test_the_stock_tool_agrees(copied: Callable[..., Path]) -> None:
    out = copied()

    def check() -> subprocess.CompletedProcess[str]:
        return subprocess.run(["sha256sum", "-c", MANIFEST], cwd=out, capture_output=True, text=True, check=False)

    done = check()
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    flip(out / "report.json", 7)
    done = check()
    assert done.returncode == 1
    assert "report.json: FAILED" in done.stdout


def test_every_shots_result_has_a_manifest(tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(tiny("llama", num_hidden_layers=2), recipe="default", settings={"shots": "2"}, samples=3)
    kept = config.out.with_name("kept")
    real = files.remove_tree

    def keep(path: Path) -> None:
        if path.name == "shot-01" and path.is_dir():
            shutil.copytree(path, kept)
        real(path)

    monkeypatch.setattr(files, "remove_tree", keep)
    streamprune.prune(config)
    assert streamprune.verify(kept).sound
    assert streamprune.verify(kept).manifest
    assert streamprune.verify(config.out).sound


def test_a_model_without_a_manifest_is_held_against_its_config(tiny: Tiny, tmp_path: Path) -> None:
    found = streamprune.verify(tiny("llama"))
    assert found.sound
    assert not found.manifest
    assert found.unlisted == ()
    path = make_tiny(tmp_path / "model", "gpt2")
    assert streamprune.verify(path).sound
    edit_tensors(path, lambda tensors: [tensor.view(-1)[:1].fill_(float("inf")) for tensor in tensors.values()])
    found = streamprune.verify(path)
    assert len(found.faults) == found.tensors > 30
    assert {fault.kind for fault in found.faults} == {"values"}


def test_one_file_without_an_index(tmp_path: Path) -> None:
    path = make_tiny(tmp_path / "model", "llama")
    tensors: dict[str, torch.Tensor] = {}
    for shard in path.glob("*.safetensors"):
        tensors |= load_file(shard)
        shard.unlink()
    (path / INDEX).unlink()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    assert streamprune.verify(path).sound
    save_file({**tensors, "other": torch.ones(1)}, path / "model.safetensors", metadata={"format": "pt"})
    found = streamprune.verify(path)
    assert found.sound
    assert [(fault.kind, fault.file, fault.tensor) for fault in found.extra] == [
        ("extra", "model.safetensors", "other")
    ]
    (path / INDEX).write_text(json.dumps({"weight_map": {UP: "model-00001-of-00002.safetensors"}}))
    first, _ = streamprune.verify(path).extra
    assert str(first) == f"{INDEX} is not read: transformers takes model.safetensors, which lies beside it"
    (path / INDEX).unlink()
    files.truncate(path / "model.safetensors", 5000)
    (fault,) = streamprune.verify(path).faults
    assert str(fault).startswith("shard model.safetensors is corrupt or cut short: ")


def test_what_the_project_adds_later_is_no_fault(copied: Callable[..., Path]) -> None:
    out = copied()
    streamprune.report(out)
    (out / "notes").mkdir()
    found = streamprune.verify(out)
    assert found.sound
    assert found.unlisted == ("notes/", "report.html")


# What is not.


def test_any_flipped_bit_is_found(copied: Callable[..., Path]) -> None:
    out, generator = copied(), random.Random(0)
    for path in sorted(out.iterdir()):
        data = path.read_bytes()
        # The ends; of shards also the header's length, the header and the tensors behind it.
        header = int.from_bytes(data[:8], "little") if path.suffix == ".safetensors" else len(data) - 1
        spots = {0, len(data) - 1, generator.randrange(min(header, len(data))), generator.randrange(len(data))}
        for place in spots:
            flip(path, place, generator.randrange(8))
            found = streamprune.verify(out)
            assert not found.sound, f"{path.name} at {place}"
            if path.name != MANIFEST:
                assert ("file", path.name, None) in places(found), f"{path.name} at {place}"
            path.write_bytes(data)
    assert streamprune.verify(out).sound


@pytest.mark.parametrize(
    "name", ["config.json", "model-00003-of-00005.safetensors", INDEX, "tokenizer.json", "log.txt"]
)
def test_truncated_and_missing_files_are_found(name: str, copied: Callable[..., Path]) -> None:
    out = copied()
    data = (out / name).read_bytes()
    for length in (len(data) - 1, len(data) // 2, 0):
        (out / name).write_bytes(data[:length])
        assert ("file", name, None) in places(streamprune.verify(out))
    (out / name).unlink()
    found = streamprune.verify(out)
    (fault,) = (fault for fault in found.faults if fault.file == name)
    assert name in str(fault)
    (out / name).mkdir()
    assert {fault.file for fault in streamprune.verify(out).faults} == {name}


def test_swapped_files_are_found(copied: Callable[..., Path]) -> None:
    out = copied()
    names = ["model-00002-of-00005.safetensors", "model-00004-of-00005.safetensors"]
    one, other = (out / name for name in names)
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    found = places(streamprune.verify(out))
    assert {("file", name, None) for name in names} < found
    # The index as well knows that these are not the tensors it places there.
    assert {("layout", name, None) for name in names} <= found


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "line 16 of SHA256SUMS is not a checksum and a name"),
        (f"{'0' * 64}  ../escape", "names '../escape', which is not a file of this directory"),
        (f"{'0' * 64}  ..", "names '..', which is not a file of this directory"),
        (f"{'0' * 64}  config.json", "names 'config.json' again"),
        (f"{'0' * 64}  nothing.txt", "nothing.txt is missing"),
    ],
)
def test_lines_of_a_manifest_that_cannot_be(line: str, message: str, copied: Callable[..., Path]) -> None:
    out = copied()
    with (out / MANIFEST).open("a") as file:
        file.write(f"{line}\n")
    (fault,) = streamprune.verify(out).faults
    assert message in str(fault)


def test_a_manifest_without_the_files_that_matter_is_no_manifest(copied: Callable[..., Path]) -> None:
    out = copied()
    lines = (out / MANIFEST).read_text().splitlines(keepends=True)
    (out / MANIFEST).write_text("".join(line for line in lines if "model" not in line and "config.json" not in line))
    found = streamprune.verify(out)
    needed = {"config.json", INDEX, *(f"model-0000{number}-of-00005.safetensors" for number in range(1, 6))}
    assert {fault.file for fault in found.faults} == needed
    assert "SHA256SUMS does not name config.json, which the model needs" in map(str, found.faults)
    assert found.unlisted == ("generation_config.json", "modeling_streamprune.py", "tokenizer_config.json")
    (out / MANIFEST).write_bytes(b"")
    assert not streamprune.verify(out).sound
    (out / MANIFEST).unlink()
    (out / MANIFEST).mkdir()
    (fault,) = map(str, streamprune.verify(out).faults)
    assert fault.startswith("SHA256SUMS cannot be read: cannot read ")
    assert fault.endswith("SHA256SUMS: Is a directory")


def test_endless_files_are_not_read(copied: Callable[..., Path]) -> None:
    out = copied()
    (out / "log.txt").unlink()
    (out / "log.txt").symlink_to("/dev/zero")
    refused, unread = map(str, streamprune.verify(out).faults)
    assert "log.txt is a link to /dev/zero, out of the model directory" in refused
    assert unread == "log.txt is not a file"


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (float("nan"), torch.float32),
        (float("inf"), torch.bfloat16),
        (-float("inf"), torch.float16),
        (float("nan"), torch.float64),
    ],
)
def test_planted_values_are_found(
    value: float, dtype: torch.dtype, made: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(made("uniform"), tmp_path / "copy"))

    def cast(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            # Sums that overflow are no fault.
            tensors[name] = tensor.to(dtype).fill_(6e4 if dtype is torch.float16 else 1.0)

    edit_tensors(out, cast)
    sign_again(out)
    monkeypatch.setattr(verify, "PIECE", 64)
    assert streamprune.verify(out).sound

    def plant(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    change_tensor(out, UP, plant)
    sign_again(out)
    (fault,) = streamprune.verify(out).faults
    assert fault == Fault(
        "values", shard_of(out, UP).name, UP, f"{shard_of(out, UP).name}: tensor {UP!r} holds NaN or Inf"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_held_against_the_config(kind: str, copied: Callable[..., Path]) -> None:
    out = copied(kind)
    shape = list(load_file(shard_of(out, UP))[UP].shape)
    change_tensor(out, UP, lambda tensor: tensor[:-1])
    sign_again(out)
    (fault,) = streamprune.verify(out).faults
    name = shard_of(out, UP).name
    assert (fault.kind, fault.file, fault.tensor) == ("layout", name, UP)
    assert str(fault) == f"{name}: tensor {UP!r} has shape {[shape[0] - 1, shape[1]]}; the config says {shape}"


def test_tensors_too_many_and_too_few(copied: Callable[..., Path]) -> None:
    out = copied()
    path = shard_of(out, UP)
    original, index = path.read_bytes(), (out / INDEX).read_text()
    tensors = load_file(path)
    # In the shard only, in both, in the index only, in neither.
    save_file({**tensors, "other": torch.ones(2)}, path, metadata={"format": "pt"})
    placed = json.loads(index)
    placed["weight_map"]["other"] = path.name
    for text in (index, json.dumps(placed)):
        (out / INDEX).write_text(text)
        sign_again(out)
        found = streamprune.verify(out)
        assert found.sound
        (extra,) = map(str, found.extra)
        assert (
            extra == f"{path.name}: tensor 'other' is not in the llama model that the config describes, and is not read"
        )
    path.write_bytes(original)
    sign_again(out)
    (fault,) = streamprune.verify(out).faults
    assert str(fault) == f"shard {path.name} lacks 'other', which the index places there"
    del placed["weight_map"]["other"], placed["weight_map"][UP], tensors[UP]
    save_file(tensors, path, metadata={"format": "pt"})
    (out / INDEX).write_text(json.dumps(placed))
    sign_again(out)
    (fault,) = streamprune.verify(out).faults
    assert str(fault) == f"{INDEX}: tensor {UP!r} is missing; the llama model that the config describes has it"


EXTRA: dict[str, tuple[str, dict[str, torch.Tensor]]] = {
    "a head for several tokens": ("llama", {"model.mtp.layers.0.mlp.up_proj.weight": torch.ones(4, 4)}),
    "a mask": ("qwen2", {"model.layers.0.self_attn.mask": torch.full((4, 4), float("-inf"))}),
    "a bias": ("llama", {UP.replace("weight", "bias"): torch.ones(48)}),
}


@pytest.mark.parametrize(("name", "tensors"), EXTRA.values(), ids=EXTRA)
def test_what_transformers_passes_over_is_no_fault(
    name: str, tensors: dict[str, torch.Tensor], configured: Make, tmp_path: Path
) -> None:
    path = make_tiny(tmp_path / "model", name)
    whole = streamprune.load(path).state_dict()
    shard = shard_of(path, UP)
    save_file({**load_file(shard), **tensors}, shard, metadata={"format": "pt"})
    loaded = streamprune.load(path).state_dict()
    assert all(torch.equal(loaded[tensor], value) for tensor, value in whole.items())
    done = CliRunner().invoke(main, ["verify", str(path)])
    assert done.exit_code == 0
    (extra,) = tensors
    assert f"\nwarning: {shard.name}: tensor {extra!r} is not in the {name} model" in done.stdout
    # A result would lack it.
    message = f"tensor '{extra}' is not in the .* transformers ignores it, but a result would lack it"
    with pytest.raises(CheckpointError, match=message):
        streamprune.prune(configured(path))

    set_nan = {tensor: value * float("nan") if tensor == UP else value for tensor, value in load_file(shard).items()}
    save_file(set_nan, shard, metadata={"format": "pt"})
    done = CliRunner().invoke(main, ["verify", str(path), "--json"])
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert [(each["kind"], each["tensor"]) for each in found["faults"]] == [("values", UP)]
    assert [(each["kind"], each["tensor"]) for each in found["extra"]] == [("extra", extra)]


def test_what_old_checkpoints_carry_is_passed_over_silently(tiny: Tiny, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    shard = shard_of(path, UP)
    embedding = load_file(shard_of(path, "model.embed_tokens.weight"))["model.embed_tokens.weight"]
    carried = {
        "model.layers.1.self_attn.rotary_emb.inv_freq": torch.full((4,), float("inf")),
        "lm_head.weight": embedding.clone(),
    }
    save_file({**load_file(shard), **carried}, shard, metadata={"format": "pt"})
    found = streamprune.verify(path)
    assert found.faults == found.extra == ()


def test_a_result_with_something_extra_is_no_result(
    tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streamprune.model import write as model_write

    real = model_write.write_shard
    monkeypatch.setattr(
        model_write, "write_shard", lambda path, tensors: real(path, {**tensors, path.stem: torch.ones(1)})
    )
    with pytest.raises(CheckpointError, match="is not in the llama model that the config describes"):
        streamprune.prune(configured(tiny("llama"), recipe="magnitude"))


def test_all_faults_are_listed(copied: Callable[..., Path]) -> None:
    out = copied()
    (out / "model-00001-of-00005.safetensors").unlink()
    files.truncate(out / "model-00002-of-00005.safetensors", 900)
    change_tensor(out, UP, lambda tensor: tensor * float("nan"))
    change_tensor(out, UP.replace("1", "2"), lambda tensor: tensor[:-1])
    flip(out / "tokenizer.json", 40)
    (out / "README.md").unlink()
    one, two, three, four = (f"model-0000{number}-of-00005.safetensors" for number in range(1, 5))
    assert places(streamprune.verify(out)) == {
        ("file", one, None),
        ("file", two, None),
        ("layout", two, None),
        ("file", three, None),
        ("values", three, UP),
        ("file", four, None),
        ("layout", four, UP.replace("1", "2")),
        ("file", "tokenizer.json", None),
        ("file", "README.md", None),
    }


@pytest.mark.parametrize("name", ["config.json", INDEX])
@pytest.mark.parametrize("text", ["{", "{}"])
def test_a_model_whose_config_or_index_says_nothing(name: str, text: str, tmp_path: Path) -> None:
    path = make_tiny(tmp_path / "model", "llama")
    (path / name).write_text(text)
    (fault,) = streamprune.verify(path).faults
    assert (fault.kind, fault.file) == ("layout", name)
    assert name in str(fault)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("name", ["config.json", INDEX, "model.safetensors", "tokenizer.json", MANIFEST])
@pytest.mark.parametrize("finished", [True, False])
def test_pipes_are_not_waited_for(name: str, finished: bool, copied: Callable[..., Path], tmp_path: Path) -> None:
    if finished:
        folder = copied()
    else:
        folder = tmp_path / "bare"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    result = CliRunner().invoke(main, ["verify", str(folder)])
    if finished and name == "model.safetensors":  # the index places nothing in it
        assert result.exit_code == 0
        assert f"warning: SHA256SUMS does not name {name}" in result.stdout
    else:
        assert result.exit_code == 1, result.output
        assert "\nfault: " in result.stdout
    if name == "config.json":
        assert "fault: config.json is not a file\n" in result.stdout


def test_a_disk_that_cannot_be_read(made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    real, bad, path = files.read_into, "model-00003-of-00005.safetensors", made("free")

    def read(path: Path, offset: int, buffer: memoryview) -> int:
        if path.name == bad and offset > 8:  # its header opens
            raise DiskError("Input/output error")
        return real(path, offset, buffer)

    monkeypatch.setattr(files, "read_into", read)
    found = streamprune.verify(path)
    assert [str(fault) for fault in found.faults] == [f"{bad} cannot be read: Input/output error"]
    monkeypatch.setattr(files, "read_into", lambda path, offset, buffer: real(path, offset, buffer) // 2)
    assert len(streamprune.verify(path).faults) == found.files


def test_memory_is_a_few_pieces(made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    real = verify.host_buffer
    monkeypatch.setattr(verify, "PIECE", 512)
    monkeypatch.setattr(verify, "host_buffer", lambda size, device: (sizes.append(size), real(size, device))[1])
    found = streamprune.verify(made("free"))
    assert found.sound
    assert sum(sizes) == found.bytes
    assert max(sizes) == 512


# The command.


def test_the_command(copied: Callable[..., Path], tiny: Tiny) -> None:
    out = copied()

    def invoke(*arguments: str) -> Any:
        return CliRunner().invoke(main, ["verify", *arguments])

    done = invoke(str(out))
    assert done.exit_code == 0
    assert done.stdout.startswith(f"{out}: sound (15 files, 29 tensors, ")
    assert done.stdout.count("\n") == 1
    assert "verify: 15 of 15, model-00005-of-00005.safetensors" in done.stderr
    (out / "mine.txt").write_text("mine")
    (out / "README.md").unlink()
    flip(out / "log.txt", 0)
    done = invoke(str(out), "--quiet")
    assert done.exit_code == 1
    assert done.stderr == ""
    first, *lines = done.stdout.splitlines()
    assert first.startswith(f"{out}: damaged, 2 faults (")
    assert lines[0] == "fault: README.md is missing"
    assert lines[1].startswith("fault: log.txt has checksum ")
    assert lines[2:] == ["warning: SHA256SUMS does not name mine.txt"]
    done = invoke(str(out), "--json")
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert list(found) == ["path", "manifest", "files", "tensors", "bytes", "unlisted", "faults", "extra", "sound"]
    assert found["faults"][0] == {
        "kind": "file",
        "file": "README.md",
        "tensor": None,
        "message": "README.md is missing",
    }
    done = invoke(str(tiny("llama")))
    assert done.exit_code == 0
    assert "warning: there is no SHA256SUMS" in done.stdout
    assert invoke(str(out / "nothing")).exit_code == 1
    assert invoke().exit_code == 2


def test_names_out_of_files_command_no_terminal(copied: Callable[..., Path]) -> None:
    out = copied()
    name = "x\ncopy: sound\x1b[31mred"
    (out / name).touch()
    shown = CliRunner().invoke(main, ["verify", str(out)])
    assert shown.stdout.splitlines()[1:] == [r"warning: SHA256SUMS does not name x\ncopy: sound\x1b[31mred"]
    found = json.loads(CliRunner().invoke(main, ["verify", str(out), "--json"]).stdout)
    assert found["unlisted"] == [name]
    with (out / MANIFEST).open("a") as file:
        file.write(f"{'0' * 64}  \x1b[31mgone\n")
    shown = CliRunner().invoke(main, ["verify", str(out)])
    assert "\x1b" not in shown.output
    assert r"fault: \x1b[31mgone is missing" in shown.stdout
    assert shown.stderr.startswith(r"verify: 1 of 16, \x1b[31mgone")


def test_commands_need_no_manifest(copied: Callable[..., Path], text: Path) -> None:
    out = copied()
    (out / MANIFEST).unlink()
    assert streamprune.evaluate(out, text, seq_len=24).perplexity > 1
    assert streamprune.inspect(out)["job"]["state"] == "finished"
    assert streamprune.load(out).num_parameters() > 0


# What goes wrong while it is made.


@contextmanager
def torn(name: str, monkeypatch: pytest.MonkeyPatch, place: str = "") -> Iterator[None]:
    """The first file of that name, in a folder of that name, reaches the disk with a bit flipped."""
    real, left = files.sync, 1

    def sync(path: Path) -> None:
        nonlocal left
        if left and path.name == f"{name}.tmp" and place in str(path.parent):
            left = 0
            flip(path, path.stat().st_size - 2)
        real(path)

    with monkeypatch.context() as patch:
        patch.setattr(files, "sync", sync)
        yield
    assert not left, f"{name} was not written"


WRITTEN = (
    "model-00001-of-00004.safetensors",
    "model-00003-of-00004.safetensors",
    "model-00004-of-00004.safetensors",
    INDEX,
    "config.json",
    "tokenizer_config.json",
    "curves.json",
    "README.md",
    "report.json",
    MANIFEST,
    "log.txt",
)


@pytest.mark.slow
def test_a_write_that_goes_wrong_is_no_result_and_the_same_command_mends_it(
    tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny("llama-biased", num_hidden_layers=2)
    shared = {"recipe": "default", "samples": 3}
    whole = configured(path, "whole", **shared)
    streamprune.prune(whole)
    expected = contents(whole.out)
    assert set(WRITTEN) < {*expected, "log.txt"}
    for name in WRITTEN:
        config = configured(path, f"torn-{name}", **shared)
        with torn(name, monkeypatch), pytest.raises(DamageError, match=rf"{name} .*run the same command again"):
            streamprune.prune(config)
        assert not config.out.exists()
        result = streamprune.prune(config)
        assert result.resumed
        assert contents(config.out) == expected
        assert streamprune.verify(config.out).sound
        assert not job_folder(config.out).exists()


JOBS: dict[str, dict[str, Any]] = {
    "weights alone": {"recipe": "magnitude"},
    "shots": {"recipe": "default", "settings": {"shots": "2"}, "refine": 2},
    "corrections": {"recipe": "surgeon", "settings": {"shots": "2", "lora_steps": "2"}},
    "window": {"recipe": "sobp", "blocks": (1, 2)},
}


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_shards_that_an_earlier_process_wrote_are_held_too(
    job: str, tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, changes = tiny("llama", num_hidden_layers=2), JOBS[job]
    damages: list[Callable[[Path], object]] = [lambda path: flip(path, 300)]
    damages += [Path.unlink, lambda path: files.truncate(path, 4)] if job == "weights alone" else []
    whole = configured(path, "whole", samples=3, **changes)
    streamprune.prune(whole)
    expected = contents(whole.out)
    shard = "model-00002-of-00004.safetensors"
    for number, damage in enumerate(damages):
        config = configured(path, f"damaged{number}", samples=3, **changes)
        folder = job_folder(config.out)
        while not list(folder.rglob(shard)):
            with stopping_after(1, monkeypatch), pytest.raises(Stop):
                streamprune.prune(config)
        for written in folder.rglob(shard):
            damage(written)
        assert streamprune.prune(config).resumed
        assert contents(config.out) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model-00003-of-00005.safetensors", "config.json"])
@pytest.mark.parametrize("method", ["lora", "distil"])
def test_a_tuning_whose_write_goes_wrong(
    method: Any, name: str, tiny: Tiny, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if method == "lora":
        pytest.importorskip("peft")
    shared: dict[str, Any] = {"method": method, "text": text, "steps": 2, "samples": 3, "seq_len": 24, "rank": 2}
    if method == "distil":
        shared["teacher"] = tiny("llama")
    whole = TuneConfig(model=tiny("llama"), out=tmp_path / "whole", **shared)
    streamprune.tune(whole)
    config = replace(whole, out=tmp_path / "torn")
    with torn(name, monkeypatch), pytest.raises(DamageError, match=name):
        streamprune.tune(config)
    assert not config.out.exists()
    streamprune.tune(config)
    assert contents(config.out) == contents(whole.out)
    assert streamprune.verify(config.out).sound


def test_an_adapter_that_was_damaged_is_trained_again(
    tiny: Tiny, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    monkeypatch.setattr(lora, "SAVE_EVERY", 2)
    shared: dict[str, Any] = {"method": "lora", "text": text, "steps": 4, "samples": 3, "seq_len": 24, "rank": 2}
    whole = TuneConfig(model=tiny("llama"), out=tmp_path / "whole", **shared)
    streamprune.tune(whole)
    config = replace(whole, out=tmp_path / "damaged")
    with stopping_after(2, monkeypatch), pytest.raises(Stop):
        streamprune.tune(config)
    flip(job_folder(config.out) / "adapter-000002.safetensors", 2000)
    streamprune.tune(config)
    assert contents(config.out) == contents(whole.out)


def test_a_correction_that_was_damaged_is_made_again(
    tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny("llama", num_hidden_layers=2)
    shared = {"samples": 3, **JOBS["corrections"]}
    whole = configured(path, "whole", **shared)
    streamprune.prune(whole)
    config = configured(path, "damaged", **shared)
    with torn("block-0001.safetensors", monkeypatch, "corrections"), pytest.raises(DamageError, match="block-0001"):
        streamprune.prune(config)
    streamprune.prune(config)
    assert contents(config.out) == contents(whole.out)


def test_what_somebody_left_in_the_way_is_said(tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config, said = configured(tiny("llama"), recipe="magnitude"), list[str]()
    with stopping_after(4, monkeypatch), pytest.raises(Stop):
        streamprune.prune(config)
    (job_folder(config.out) / "out" / "mine.txt").write_text("mine")
    streamprune.prune(config, progress=Callback(lambda event: said.append(event.message)))
    assert any("also contains mine.txt, which is not part of the result" in message for message in said)
    assert streamprune.verify(config.out).unlisted == ("mine.txt",)


def test_reading_back_can_be_stopped_and_is_begun_again(tiny: Tiny, configured: Make) -> None:
    config, whole = (configured(tiny("llama"), out, recipe="magnitude") for out in ("stopped", "whole"))
    streamprune.prune(whole)
    seen: list[Event] = []

    def reading() -> bool:
        return bool(seen) and seen[-1].phase == "verify" and seen[-1].done == 3

    with pytest.raises(Stopped):
        streamprune.prune(config, progress=Callback(seen.append, stopping=reading))
    assert not config.out.exists()
    assert streamprune.prune(config).resumed
    assert contents(config.out) == contents(whole.out)


def test_a_result_that_holds_no_numbers_is_no_result(
    tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streamprune.model import write as model_write

    real = model_write.write_shard

    def write(path: Path, tensors: dict[str, torch.Tensor]) -> str:
        bad = {name: tensor * float("nan") if name == UP else tensor for name, tensor in tensors.items()}
        return real(path, bad)

    config = configured(tiny("llama"), recipe="magnitude")
    with monkeypatch.context() as patch:
        patch.setattr(model_write, "write_shard", write)
        with pytest.raises(NumericalError, match=rf"{UP}' holds NaN or Inf"):
            streamprune.prune(config)
    assert not config.out.exists()
    streamprune.prune(config, restart=True)

    def short(path: Path, tensors: dict[str, torch.Tensor]) -> str:
        return real(path, {name: tensor[1:] if name == UP else tensor for name, tensor in tensors.items()})

    monkeypatch.setattr(model_write, "write_shard", short)
    with pytest.raises(CheckpointError, match=rf"{UP}' has shape .*; the config says"):
        streamprune.prune(configured(tiny("llama"), "other", recipe="magnitude"))
    assert REPORT in os.listdir(job_folder(configured(tiny("llama"), "other").out) / "out")
