"""Invalid input gives one line, with the value and the limit, before any work; nothing is left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import transformers
from click.testing import CliRunner, Result
from conftest import UP, edit_tensors, make_tiny, set_tensor
from faulty import GROWING, FaultyDisk
from safetensors.torch import load_file, save_file
from streamprune_cli import main

import streamprune
from streamprune.errors import CheckpointError
from streamprune.model.checkpoint import Checkpoint
from streamprune.model.names import INDEX
from streamprune.model.tokenizer import load_tokenizer
from streamprune.system import disk, files, machine


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint that the test may break."""
    return make_tiny(tmp_path / "model", "llama")


@pytest.fixture
def run(model: Path, text: Path, tmp_path: Path) -> Callable[..., Result]:
    """`streamprune run` on the model with small settings and more options."""

    def invoke(*more: str, source: Path = model, ratio: str | None = "0.3", calibration: Path = text) -> Result:
        arguments = ["run", str(source), str(tmp_path / "out"), "--calibration", str(calibration)]
        arguments += ["--samples", "4", "--seq-len", "24", "--round-to", "4"]
        return CliRunner().invoke(main, [*arguments, *(["--ratio", ratio] if ratio else []), *more])

    return invoke


def refused(result: Result, message: str, code: int, folder: Path) -> None:
    """One line on stderr that has `message`; OUT and the job's folder are not there."""
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    lines = [line for line in result.stderr.splitlines() if line.startswith("streamprune: ")]
    assert len(lines) == 1, result.stderr
    assert message in lines[0], lines[0]
    assert "Traceback" not in result.output
    assert {p.name for p in folder.iterdir()} <= {"model", "text.txt", "plan.json"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ratio", "0"], "ratio is 0; it must be in (0, 1)"),
        (["--ratio", "1"], "ratio is 1; it must be in (0, 1)"),
        (["--ratio", "nan"], "ratio is nan"),
        (["--ratio", "0.97", "--recipe", "sobp"], "ratio is 0.97; this model can lose at most 0."),
        (["--ratio", "0.0001"], "ratio is 0.0001; the smallest step is"),
        (["--recipe", "magic"], "recipe is 'magic'; it must be one of default, sobp"),
        (["--samples", "0"], "samples is 0; it must be at least 1"),
        (["--seq-len", "1"], "seq_len is 1; it must be at least 2"),
        (["--round-to", "0"], "round_to is 0"),
        (["--round-to", "some"], "round_to is 'some'; it must be a whole number or auto"),
        (["--tensor-parallel", "0"], "tensor_parallel is 0"),
        (["--tensor-parallel", "3"], "tensor_parallel is 3; blocks.0.attention of"),
        (["--seed", "-1"], "seed is -1"),
        (["--device", "abacus"], "device is 'abacus'"),
        (["--device", "cuda:99"], "device is 'cuda:99'; torch sees"),
        (["--dtype", "int8"], "dtype is 'int8'; it must be one of"),
        (["--memory", "lots"], "--memory: 'lots' is not a size"),
        (["--disk", "0GB"], "--disk: the size '0GB' must be positive"),
        (["--set", "damping"], "--set 'damping': write it as name=value"),
        (
            ["--recipe", "sobp", "--set", "dampnig=1"],
            "recipe sobp has no setting 'dampnig'; it has gradient, head_weight",
        ),
        (["--set", "damping=low"], "setting damping = 'low': it must be a number"),
        (["--set", "damping=-1"], "setting damping = '-1': it must be from 0 to 1"),
        (["--set", "damping=nan"], "it must be from 0 to 1"),
        (["--recipe", "sobp", "--set", "head_weight=inf"], "it must be from 0 to 1e+09"),
        (["--seed", "9223372036854775808"], "it must be below 2^63"),
        (["--memory", "9" * 400], "must be positive and below 8 EiB"),
        (["--recipe", "sobp", "--set", "refine=perhaps"], "setting refine = 'perhaps': it must be on or off"),
        (["--recipe", "sobp", "--set", "gradient=third"], "setting gradient = 'third': it must be one of fisher, abs"),
        (["--set", "damping=1", "--set", "damping=2"], "--set damping is given twice: '1' and '2'"),
        (["--plan", "plan.json"], "cannot read the plan plan.json"),
    ],
)
def test_settings(arguments: list[str], message: str, run: Callable[..., Result], tmp_path: Path) -> None:
    refused(run(*arguments), message, 2, tmp_path)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def break_config(model: Path, **changes: Any) -> None:
    edit_json(model / "config.json", **changes)


def shard_of(model: Path, name: str) -> Path:
    return model / str(json.loads((model / INDEX).read_text())["weight_map"][name])


def drop_from_index(model: Path, name: str) -> None:
    index = json.loads((model / INDEX).read_text())
    del index["weight_map"][name]
    (model / INDEX).write_text(json.dumps(index))


def drop_tensor(model: Path, name: str) -> None:
    edit_tensors(model, lambda tensors: tensors.pop(name, None))
    drop_from_index(model, name)


def poison(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[3] = value
        return tensor

    return change


def only_pickles(model: Path) -> None:
    for path in model.glob("*.safetensors*"):
        path.unlink()
    (model / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")


CASES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "not a checkpoint": (lambda m: [p.unlink() for p in m.iterdir()], "has no config.json"),
    "no weights": (lambda m: [p.unlink() for p in m.glob("*.safetensors*")], "has neither model.safetensors nor"),
    "only pickles": (only_pickles, "only pickled weights, which are never opened"),
    "missing shard": (lambda m: shard_of(m, UP).unlink(), "is missing"),
    "truncated shard": (lambda m: files.truncate(shard_of(m, UP), 600), "is corrupt or cut short"),
    "garbage shard": (lambda m: shard_of(m, UP).write_bytes(b"\xff" * 500), "is corrupt or cut short"),
    "empty shard": (lambda m: shard_of(m, UP).write_bytes(b""), "is corrupt or cut short"),
    "config is no JSON": (lambda m: (m / "config.json").write_text("{"), "config.json cannot be read as JSON"),
    "config is a list": (lambda m: (m / "config.json").write_text("[1]"), "config.json is not a JSON object"),
    "index is no JSON": (lambda m: (m / INDEX).write_text("oops"), "cannot be read as JSON"),
    "index is empty": (lambda m: (m / INDEX).write_text("{}"), "has no weight_map"),
    "index leads outside": (
        lambda m: edit_json(m / INDEX, weight_map={UP: "../../etc/passwd"}),
        "places 'model.layers.1.mlp.up_proj.weight' in '../../etc/passwd', which is not a file of this directory",
    ),
    "index names a number": (
        lambda m: edit_json(m / INDEX, weight_map={UP: 7}),
        "which is not a file of this directory",
    ),
    "index places a tensor wrongly": (
        lambda m: edit_tensors(m, lambda t: t.pop(UP, None)),
        f"lacks '{UP}', which the index places there",
    ),
    "tensor missing": (lambda m: drop_tensor(m, UP), f"tensor '{UP}' is missing"),
    "tensor of another shape": (
        lambda m: set_tensor(m, UP, lambda t: t[:40]),
        f"tensor '{UP}' has shape [40, 32]; the config says [48, 32]",
    ),
    "tensor too many": (lambda m: break_config(m, num_hidden_layers=2), "is not in the llama model"),
    "packed weights": (lambda m: set_tensor(m, UP, lambda t: t.to(torch.int8)), "has dtype I8; quantised weights"),
    "float8 weights": (lambda m: set_tensor(m, UP, lambda t: t.to(torch.float8_e4m3fn)), "has dtype F8_E4M3"),
    "NaN": (lambda m: set_tensor(m, UP, poison(float("nan"))), f"tensor '{UP}' holds NaN or Inf"),
    "Inf": (lambda m: set_tensor(m, "model.norm.weight", poison(float("inf"))), "'model.norm.weight' holds NaN or Inf"),
    "quantised config": (
        lambda m: break_config(m, quantization_config={"quant_method": "gptq"}),
        "config.json: it has a quantization_config (gptq), but no tensor is packed; if the weights were dequantised, ",
    ),
    "unknown architecture": (
        lambda m: break_config(m, model_type="llamb"),
        "model_type 'llamb' is not supported: transformers",
    ),
    "absurd config": (lambda m: break_config(m, num_attention_heads=0), "transformers cannot build this model"),
    "config of words": (lambda m: break_config(m, hidden_size="wide"), "transformers cannot build this model"),
    "no tokenizer": (lambda m: [p.unlink() for p in m.glob("tokenizer*")], "no tokenizer that transformers can read"),
    "broken tokenizer": (lambda m: (m / "tokenizer.json").write_text("{}"), "no tokenizer that transformers can read"),
}


@pytest.mark.parametrize("case", CASES)
def test_checkpoints(case: str, model: Path, run: Callable[..., Result], tmp_path: Path) -> None:
    break_it, message = CASES[case]
    break_it(model)
    refused(run(), message, 1, tmp_path)


def test_heads_that_do_not_divide(run: Callable[..., Result], tmp_path: Path) -> None:
    make_tiny(tmp_path / "text.txt", "llama", num_key_value_heads=3)
    refused(run(source=tmp_path / "text.txt"), "transformers cannot build this model (The size of tensor", 1, tmp_path)


def in_one_file(model: Path) -> dict[str, torch.Tensor]:
    """Put all tensors into model.safetensors; the index stays, and names shards that are gone."""
    tensors: dict[str, torch.Tensor] = {}
    for shard in model.glob("*.safetensors"):
        tensors |= load_file(shard)
        shard.unlink()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return tensors


def test_two_sets_of_weights(model: Path, run: Callable[..., Result], text: Path, tmp_path: Path) -> None:
    """transformers reads the single file, so that nothing else may be read."""
    name = "model.norm.weight"
    index = (model / INDEX).read_text()
    shard = shard_of(model, UP)
    data = shard.read_bytes()
    in_one_file(model)
    set_tensor(model, name, lambda tensor: tensor + 1)
    loaded = streamprune.load(model).state_dict()[name]
    assert torch.equal(Checkpoint(model).read(name), loaded)
    assert run("--recipe", "magnitude").exit_code == 0
    assert torch.equal(streamprune.load(tmp_path / "out").state_dict()[name], loaded)
    shutil.rmtree(tmp_path / "out")

    shard.write_bytes(data)
    message = f"has two sets of weights: model.safetensors, which transformers reads, and the shards of {INDEX} ({shard.name})"
    refused(run(), message, 1, tmp_path)
    for arguments in (["eval", "--text", str(text)], ["tune", str(tmp_path / "out"), "--text", str(text)], ["bench"]):
        refused(CliRunner().invoke(main, [arguments[0], str(model), *arguments[1:]]), message, 1, tmp_path)
    found = streamprune.verify(model)
    assert [fault.kind for fault in found.faults] == ["layout"]
    assert message in str(found.faults[0])

    # An index of the one file itself, as some models have.
    placed = dict.fromkeys(json.loads(index)["weight_map"], "model.safetensors")
    (model / INDEX).write_text(json.dumps({"weight_map": placed}))
    assert torch.equal(Checkpoint(model).read(name), loaded)


def test_tensors_missing_from_the_index_are_read(model: Path) -> None:
    """transformers takes from the index only which shards there are."""
    shard = shard_of(model, UP)
    drop_from_index(model, UP)
    assert torch.equal(Checkpoint(model).read(UP), streamprune.load(model).state_dict()[UP])
    other = next(path for path in model.glob("*.safetensors") if path != shard)
    save_file({**load_file(other), UP: torch.zeros(48, 32)}, other, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"shard .* holds '{UP}', and so does .*; it must be in one"):
        Checkpoint(model)


def test_a_config_that_names_other_weights(model: Path, run: Callable[..., Result], tmp_path: Path) -> None:
    break_config(model, transformers_weights="other.safetensors")
    message = f"transformers_weights has transformers read 'other.safetensors' in place of {INDEX}"
    refused(run(), message, 1, tmp_path)
    break_config(model, transformers_weights=INDEX)
    assert run("--recipe", "magnitude").exit_code == 0
    assert "transformers_weights" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize(
    ("rename", "found"),
    [
        (lambda name: f"base_model.model.{name}", "base_model.model."),
        (lambda name: name.replace("proj.weight", "proj.base_layer.weight"), "base_layer"),
        (lambda name: f"module.{name}", "module."),
        (lambda name: name.replace(".self_attn.", "._orig_mod.self_attn."), "_orig_mod"),
        (lambda name: name.replace("model.", "model.language_model."), "model.language_model."),
    ],
)
def test_names_around_the_models_own(
    rename: Callable[[str], str], found: str, model: Path, run: Callable[..., Result], tmp_path: Path
) -> None:
    tensors = {rename(name): tensor for name, tensor in in_one_file(model).items()}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    result = run()
    refused(result, f"have '{found}', which no llama model has there; save the model itself", 1, tmp_path)
    assert ".weight' have" in result.stderr


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{0:064}\nsize 123456789\n"


@pytest.mark.parametrize("name", ["shard", "config.json", INDEX, "tokenizer.json", "generation_config.json", "LICENSE"])
def test_pointers_of_git_lfs(name: str, model: Path, run: Callable[..., Result], tmp_path: Path) -> None:
    path = shard_of(model, UP) if name == "shard" else model / name
    path.write_text(POINTER)
    for more in ([], ["--recipe", "magnitude", "--layout", "uniform"]):
        message = f"{path} is a Git LFS pointer, not the file itself; fetch it with `git lfs pull` in {model}"
        refused(run(*more), message, 1, tmp_path)
    assert any(
        "Git LFS pointer" in str(fault) and path.name == fault.file for fault in streamprune.verify(model).faults
    )


@pytest.mark.parametrize(
    ("data", "lacking", "message"),
    [
        (
            b"\n\x0e\n\x05<unk>",
            {"sentencepiece"},
            "is a SentencePiece model, which .* without sentencepiece: pip install",
        ),
        (b"\n\x0e", {"protobuf"}, "is a SentencePiece model, .* without protobuf: pip install protobuf"),
        (b"IQ== 0\nIg== 1\n", {"tiktoken"}, "is a tiktoken file, .* without tiktoken: pip install tiktoken"),
    ],
)
def test_libraries_of_tokenizers(
    data: bytes, lacking: set[str], message: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("sentencepiece", "protobuf", "tiktoken"):
        monkeypatch.setattr(transformers.utils, f"is_{name}_available", lambda name=name: name not in lacking)
    (model / "tokenizer.model").write_bytes(data)
    load_tokenizer(model)  # by its tokenizer.json
    (model / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=rf"tokenizer\.model {message}"):
        load_tokenizer(model)


def test_model_is_no_directory(run: Callable[..., Result], tmp_path: Path, text: Path) -> None:
    refused(run(source=tmp_path / "nowhere"), "is not a directory with a model in it", 1, tmp_path)
    refused(run(source=text), "is not a directory with a model in it", 1, tmp_path)


def test_remote_code_is_not_run(model: Path, run: Callable[..., Result], tmp_path: Path) -> None:
    (model / "evil.py").write_text("raise SystemExit('it ran')")
    break_config(model, auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    result = run()
    assert "it ran" not in result.output
    assert result.exit_code == 0, result.output


def test_texts(run: Callable[..., Result], tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    refused(run(calibration=path), "cannot read the text", 1, tmp_path)
    path.write_text("abc")
    refused(run(calibration=path), "has 3 tokens; one window needs 24", 1, tmp_path)
    path.write_text(" \n")
    refused(run(calibration=path), "is empty", 1, tmp_path)
    path.write_bytes(b"abc\xff\xfe")
    refused(run(calibration=path), "is not UTF-8 text (byte 3)", 1, tmp_path)
    path.write_text("abc " * 100)
    refused(run("--seq-len", "65", calibration=path), "seq-len is 65; the model's context is 64", 1, tmp_path)


def test_tokenizer_of_another_model(model: Path, run: Callable[..., Result], tmp_path: Path) -> None:
    set_tensor(model, "model.embed_tokens.weight", lambda t: t[:20])
    break_config(model, vocab_size=20)
    refused(run(), "the tokenizer's 's' is token 20, but the model has 20 (vocab_size); they do not match", 1, tmp_path)
    # Recipes that read no text copy the tokenizer, too.
    for layout in ("free", "uniform"):
        refused(run("--recipe", "magnitude", "--layout", layout), "they do not match", 1, tmp_path)


def add_token(model: Path, token: str, id: int) -> None:
    """Add a special token of that id to the tokenizer; pieces fill the ids before it."""
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    pieces = tokenizer["model"]["vocab"]
    pieces |= {f"<{number}>": number for number in range(len(pieces), id)}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"].append({"id": id, "content": token, "special": True, **flags})
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))


def test_an_added_token_beyond_the_vocabulary(
    model: Path, run: Callable[..., Result], text: Path, tmp_path: Path
) -> None:
    """As Gemma 3 has one for images: texts must not contain it, and the tokenizer must not need it."""
    add_token(model, "<image>", 40)
    result = run("--recipe", "magnitude")
    assert result.exit_code == 0, result.output
    assert "the tokenizer's '<image>' is token 40, but the model has 40: no text may contain it" in result.stderr
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "text.txt").write_text(f"{text.read_text()}<image>")
    refused(run(calibration=tmp_path / "text.txt"), "the tokenizer gives token 40, but the model has 40", 1, tmp_path)
    edit_json(model / "tokenizer_config.json", eos_token="<image>")
    refused(run(), "the tokenizer's '<image>' is token 40, but the model has 40 (vocab_size)", 1, tmp_path)
    arguments = ["eval", str(model), "--text", str(text)]
    refused(CliRunner().invoke(main, arguments), "the tokenizer's '<image>' is token 40", 1, tmp_path)


def test_no_disk(run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(run("--disk", "10KB"), "activations need", 1, tmp_path)
    monkeypatch.setattr(files, "free_bytes", lambda folder: 100)
    refused(run(), "activations need", 1, tmp_path)
    refused(run("--recipe", "magnitude"), "the result may need", 1, tmp_path)


def test_no_memory(run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(run("--memory", "10KB"), "the memory limit is 9.8 KiB; ", 1, tmp_path)
    monkeypatch.setattr(machine, "available_memory", lambda device: 1000)
    monkeypatch.setattr(machine, "base_bytes", lambda: 0)
    refused(run(), "the memory limit is 1000 B; ", 1, tmp_path)


def test_disk_full_on_the_way(
    run: Callable[..., Result], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with disk.using(FaultyDisk(tmp_path, tmp_path_factory.mktemp("graves"), "full", 300)):
        result = run()
    assert result.exit_code == 1
    assert "No space left on device; run the same command again to resume" in result.stderr
    assert run("--json").exit_code == 0


@pytest.mark.parametrize("name", ["OUT", "cache"])
def test_a_name_that_is_not_utf8(name: str, run: Callable[..., Result], model: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "a\udcff")
    result = (
        run("--cache", path)
        if name == "cache"
        else CliRunner().invoke(main, ["run", str(model), path, "--ratio", "0.3", "--recipe", "magnitude"])
    )
    refused(result, "which is not UTF-8", 2, tmp_path)


def test_caches(run: Callable[..., Result], text: Path, tmp_path: Path) -> None:
    for place in ("out", "out/cache", "out.streamprune/out", "other/../out/x"):
        refused(run("--cache", str(tmp_path / place)), "; choose a folder outside", 2, tmp_path)
    refused(run("--cache", str(text / "cache")), "cache cannot be below", 2, tmp_path)


@pytest.mark.parametrize(
    ("name", "content"), [("tokenizer.json", "{}"), ("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": "a.B"}}')]
)
def test_a_tokenizer_that_the_result_has_to_name(
    name: str, content: str, model: Path, run: Callable[..., Result], tmp_path: Path
) -> None:
    """Also where no text is read; a stock result copies its tokenizer unchanged."""
    (model / "tokenizer.json").write_text("{}")
    (model / name).write_text(content)
    message = "the tokenizer needs its own code" if "auto_map" in content else "no tokenizer that transformers can read"
    refused(run("--recipe", "magnitude"), message, 1, tmp_path)
    assert run("--recipe", "magnitude", "--layout", "uniform").exit_code == 0
    assert (tmp_path / "out" / name).read_text() == content


@pytest.mark.parametrize("command", ["run", "eval"])
def test_only_what_resumes_is_told_to(
    command: str, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, *given = {
        "run": ("prune", str(tmp_path / "out"), "--ratio", "0.3"),
        "eval": ("evaluate", "--text", str(text)),
    }[command]
    advice = "; run the same command again to resume" if command == "run" else ""
    for error, message, code in (
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "\x1b[31m/tmp/x"),
            r"\x1b[31m/tmp/x: No space left on device",
            1,
        ),
        (KeyboardInterrupt(), "interrupted", 130),
    ):
        monkeypatch.setattr(streamprune, name, Mock(side_effect=error))
        result = CliRunner().invoke(main, [command, str(model), *given])
        assert result.exit_code == code
        assert result.stderr == f"streamprune: {message}{advice}\n"


def test_an_evaluation_on_a_full_disk(model: Path, text: Path, tmp_path: Path) -> None:
    cache, graves = tmp_path / "cache", tmp_path / "graves"
    cache.mkdir()
    graves.mkdir()
    arguments = ["eval", str(model), "--text", str(text), "--seq-len", "8", "--cache", str(cache), "--quiet"]
    with disk.using(whole := FaultyDisk(cache, graves)):
        assert CliRunner().invoke(main, arguments).exit_code == 0
    growing = [n for n, operation in enumerate(whole.operations, start=1) if operation.split()[0] in GROWING]
    assert whole.operations[growing[0] - 1] == "create lock"
    for at in growing[:4]:
        with disk.using(faulty := FaultyDisk(cache, graves, "full", at)):
            result = CliRunner().invoke(main, arguments)
        assert faulty.happened
        assert result.exit_code == 1, result.output
        assert result.stderr.startswith("streamprune: cannot ")
        assert result.stderr.endswith(": No space left on device\n")
        assert result.stderr.count("\n") == 1
        assert not list(cache.iterdir())


def test_out_is_taken(run: Callable[..., Result], model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("a file")
    result = run()
    assert result.exit_code == 2
    assert "which is not a directory" in result.stderr
    out.unlink()
    out.symlink_to(tmp_path / "elsewhere")
    assert "which is not a directory" in run().stderr
    out.unlink()
    shutil.copytree(model, out)
    assert "already exists and was not written by streamprune" in run().stderr
    assert "already exists and was not written by streamprune" in run("--restart").stderr
    result = CliRunner().invoke(main, ["run", str(model), str(model), "--ratio", "0.3", "--recipe", "magnitude"])
    assert result.exit_code == 2
    assert "the model itself" in result.stderr


def test_what_appears_in_out_meanwhile_is_left_alone(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from streamprune.model import write

    real = write.finish

    def finish(*arguments: Any) -> Any:
        digests = real(*arguments)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("all of it")
        return digests

    monkeypatch.setattr(write, "finish", finish)
    result = run()
    assert result.exit_code == 2
    assert "already exists and was not written by streamprune" in result.stderr
    assert (tmp_path / "out" / "thesis.txt").read_text() == "all of it"
    (tmp_path / "out" / "thesis.txt").unlink()
    monkeypatch.undo()
    assert run().exit_code == 0


def test_a_folder_of_the_users_in_the_jobs_place(run: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "out.streamprune").mkdir()
    (tmp_path / "out.streamprune" / "mine.txt").write_text("mine")
    result = run()
    assert result.exit_code == 2
    assert "contains mine.txt" in result.stderr
    assert (tmp_path / "out.streamprune" / "mine.txt").exists()


PLAN = {"format": "streamprune-plan-1", "ratio": 0.3}
SITES = {f"blocks.{b}.{k}": {"keep": 2 if k == "attention" else 20} for b in range(3) for k in ("attention", "ffn")}


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("{", "is not JSON"),
        ([], "is not a plan"),
        ({**PLAN, "format": "x", "sites": SITES}, "is not a plan"),
        ({"format": PLAN["format"], "sites": SITES}, "ratio is None"),
        ({**PLAN, "ratio": 2, "sites": SITES}, "ratio is 2; it must be in (0, 1)"),
        ({**PLAN, "sites": {}}, "blocks.0.attention is missing"),
        ({**PLAN, "sites": {**SITES, "blocks.9.ffn": {"keep": 1}}}, "the model has no site 'blocks.9.ffn'"),
        ({**PLAN, "sites": {**SITES, "blocks.1.ffn": {"keep": -1}}}, "blocks.1.ffn keeps -1; it must be 0 to 48"),
        ({**PLAN, "sites": {**SITES, "blocks.1.ffn": {"keep": 49}}}, "blocks.1.ffn keeps 49; it must be 0 to 48"),
        ({**PLAN, "sites": {**SITES, "blocks.1.ffn": {"keep": "many"}}}, 'blocks.1.ffn needs "keep", a whole number'),
        ({**PLAN, "sites": {**SITES, "blocks.1.ffn": 3}}, 'blocks.1.ffn needs "keep"'),
        ({**PLAN, "sites": {**SITES, "blocks.1.ffn": {"keep": 2, "units": [1]}}}, "must be 2 different numbers"),
        ({**PLAN, "sites": {**SITES, "blocks.1.ffn": {"keep": 2, "units": [1, 1]}}}, "must be 2 different numbers"),
        ({**PLAN, "sites": {**SITES, "blocks.1.ffn": {"keep": 2, "units": [1, 48]}}}, "must lie between 0 and 47"),
        ({**PLAN, "sites": {**SITES, "blocks.1.ffn": {"keep": 1, "units": "all"}}}, "must be a list of whole numbers"),
    ],
)
def test_plans(plan: Any, message: str, run: Callable[..., Result], tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(plan if isinstance(plan, str) else json.dumps(plan))
    refused(run("--plan", str(path), ratio=None), message, 2, tmp_path)


def test_plan_without_units_where_units_are_needed(run: Callable[..., Result], tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**PLAN, "sites": SITES}))
    given = ("--plan", str(path), "--recipe", "sobp", "--set", "refine=off")
    refused(run(*given, ratio=None), 'needs "units"', 2, tmp_path)


def test_evaluation(model: Path, text: Path, tmp_path: Path) -> None:
    def evaluate(*arguments: str) -> Result:
        return CliRunner().invoke(main, ["eval", str(model), "--text", str(text), *arguments])

    refused(evaluate("--seq-len", "100"), "seq-len is 100; the model's context is 64", 1, tmp_path)
    refused(evaluate("--seq-len", "1"), "seq_len is 1", 2, tmp_path)
    refused(evaluate("--dtype", "bf16"), "dtype is 'bf16'", 2, tmp_path)
    refused(evaluate("--memory", "3KB"), "the memory limit is 2.9 KiB", 1, tmp_path)
    short = tmp_path / "text.txt"
    short.write_text("abc")
    refused(evaluate("--text", str(short)), "has 3 tokens; one window needs 64", 1, tmp_path)
    set_tensor(model, UP, poison(float("nan")))
    refused(evaluate(), "block 1 gives NaN or Inf", 1, tmp_path)


def test_inspect_of_nothing(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["inspect", str(tmp_path / "nothing")])
    refused(result, "does not exist, and no job is writing it", 1, tmp_path)
