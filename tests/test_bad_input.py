"""Every mistake is one line, with the value and the limit, before any work; nothing is left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import edit_tensors, make_tiny
from faulty import GROWING, FaultyDisk
from streamprune_cli import main

import streamprune
from streamprune import disk, files, machine


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint of the test's own, to be broken."""
    return make_tiny(tmp_path / "model", "llama")


@pytest.fixture
def run(model: Path, text: Path, tmp_path: Path) -> Callable[..., Result]:
    """`streamprune run` on the model with small settings and whatever else is given."""

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
        (["--ratio", "-0.2"], "ratio is -0.2"),
        (["--ratio", "nan"], "ratio is nan"),
        (["--ratio", "0.97"], "ratio is 0.97; this model can lose at most 0."),
        (["--ratio", "0.0001"], "ratio is 0.0001; the smallest step is"),
        (["--recipe", "magic"], "recipe is 'magic'; it must be one of default, sobp"),
        (["--samples", "0"], "samples is 0; it must be at least 1"),
        (["--seq-len", "1"], "seq_len is 1; it must be at least 2"),
        (["--round-to", "0"], "round_to is 0"),
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
        (["--set", "damping=100"], "it must be from 0 to 1"),
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


def test_neither_ratio_nor_plan(run: Callable[..., Result], tmp_path: Path) -> None:
    refused(run(ratio=None), "neither a ratio nor a plan file was given", 2, tmp_path)


def edit_json(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text())
    data.update(changes)
    path.write_text(json.dumps(data))


def break_config(model: Path, **changes: Any) -> None:
    edit_json(model / "config.json", **changes)


def shard_of(model: Path, name: str) -> Path:
    index = json.loads((model / "model.safetensors.index.json").read_text())
    return model / index["weight_map"][name]


def drop_tensor(model: Path, name: str) -> None:
    edit_tensors(model, lambda tensors: tensors.pop(name, None))
    index = json.loads((model / "model.safetensors.index.json").read_text())
    del index["weight_map"][name]
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def set_tensor(model: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        if name in tensors:
            tensors[name] = change(tensors[name]).contiguous()

    edit_tensors(model, edit)


def poison(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[3] = value
        return tensor

    return change


UP = "model.layers.1.mlp.up_proj.weight"
CASES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "not a checkpoint": (lambda m: [p.unlink() for p in m.iterdir()], "has no config.json"),
    "no weights": (lambda m: [p.unlink() for p in m.glob("*.safetensors*")], "has neither model.safetensors nor"),
    "missing shard": (lambda m: shard_of(m, UP).unlink(), "is missing"),
    "truncated shard": (lambda m: files.truncate(shard_of(m, UP), 600), "is corrupt or cut short"),
    "garbage shard": (lambda m: shard_of(m, UP).write_bytes(b"\xff" * 500), "is corrupt or cut short"),
    "empty shard": (lambda m: shard_of(m, UP).write_bytes(b""), "is corrupt or cut short"),
    "config is no JSON": (lambda m: (m / "config.json").write_text("{"), "config.json cannot be read as JSON"),
    "config is a list": (lambda m: (m / "config.json").write_text("[1]"), "config.json is not a JSON object"),
    "index is no JSON": (lambda m: (m / "model.safetensors.index.json").write_text("oops"), "cannot be read as JSON"),
    "index is empty": (lambda m: (m / "model.safetensors.index.json").write_text("{}"), "has no weight_map"),
    "index leads outside": (
        lambda m: edit_json(m / "model.safetensors.index.json", weight_map={UP: "../../etc/passwd"}),
        "places 'model.layers.1.mlp.up_proj.weight' in '../../etc/passwd', which is not a file of this directory",
    ),
    "index is absolute": (
        lambda m: edit_json(m / "model.safetensors.index.json", weight_map={UP: "/etc/passwd"}),
        "'/etc/passwd', which is not a file of this directory",
    ),
    "index names a number": (
        lambda m: edit_json(m / "model.safetensors.index.json", weight_map={UP: 7}),
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
    "tensor too many": (lambda m: break_config(m, num_hidden_layers=2), "has no place in the llama model"),
    "packed weights": (lambda m: set_tensor(m, UP, lambda t: t.to(torch.int8)), "has dtype I8; quantised or packed"),
    "float8 weights": (lambda m: set_tensor(m, UP, lambda t: t.to(torch.float8_e4m3fn)), "has dtype F8_E4M3"),
    "NaN": (lambda m: set_tensor(m, UP, poison(float("nan"))), f"tensor '{UP}' holds NaN or Inf"),
    "Inf": (lambda m: set_tensor(m, "model.norm.weight", poison(float("inf"))), "'model.norm.weight' holds NaN or Inf"),
    "quantised config": (
        lambda m: break_config(m, quantization_config={"quant_method": "gptq"}),
        "the config has a quantization_config",
    ),
    "unknown architecture": (
        lambda m: break_config(m, model_type="mamba"),
        "model_type 'mamba' is not supported; supported are falcon, gemma2, gemma3_text, gpt2, gpt_neox, granite, llama",
    ),
    "no architecture": (lambda m: break_config(m, model_type=None), "model_type None is not supported"),
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
    refused(run(source=tmp_path / "text.txt"), "of block 0 do not fall into 3 units", 1, tmp_path)


def test_pickles_only(model: Path, run: Callable[..., Result], tmp_path: Path) -> None:
    for path in model.glob("*.safetensors*"):
        path.unlink()
    (model / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    refused(run(), "only pickled weights, which are never opened", 1, tmp_path)


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
    refused(run(), "but the model has 20; they do not belong together", 1, tmp_path)


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
    assert "No space left on device; run the same command again to go on" in result.stderr
    assert run("--json").exit_code == 0


@pytest.mark.parametrize("name", ["OUT", "cache"])
def test_a_name_that_is_not_utf8(name: str, run: Callable[..., Result], model: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "a\udcff")
    result = (
        run("--cache", path)
        if name == "cache"
        else CliRunner().invoke(main, ["run", str(model), path, "--ratio", "0.3", "--recipe", "magnitude"])
    )
    refused(result, "a name that is not UTF-8", 2, tmp_path)


@pytest.mark.parametrize("place", ["out", "out/cache", "out.streamprune/out", "other/../out/x"])
def test_a_cache_in_out(place: str, run: Callable[..., Result], tmp_path: Path) -> None:
    refused(run("--cache", str(tmp_path / place)), "where only the job itself writes", 2, tmp_path)


@pytest.mark.parametrize(
    ("name", "text"), [("tokenizer.json", "{}"), ("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": "a.B"}}')]
)
def test_a_tokenizer_that_the_result_has_to_name(
    name: str, text: str, model: Path, run: Callable[..., Result], tmp_path: Path
) -> None:
    """Also where no text is read; a stock result takes its tokenizer along as it is."""
    (model / "tokenizer.json").write_text("{}")
    (model / name).write_text(text)
    message = "its tokenizer wants code" if "auto_map" in text else "no tokenizer that transformers can read"
    refused(run("--recipe", "magnitude"), message, 1, tmp_path)
    assert run("--recipe", "magnitude", "--layout", "uniform").exit_code == 0
    assert (tmp_path / "out" / name).read_text() == text


@pytest.mark.parametrize("command", ["run", "eval"])
def test_only_what_goes_on_is_told_to_go_on(
    command: str, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "\x1b[31m/tmp/x")

    def interrupted(*given: object, **more: object) -> None:
        raise KeyboardInterrupt

    arguments = {
        "run": [str(model), str(tmp_path / "out"), "--ratio", "0.3"],
        "eval": [str(model), "--text", str(text)],
    }
    advice = "; run the same command again to go on" if command == "run" else ""
    for raised, message, code in (
        (full, r"\x1b[31m/tmp/x: No space left on device", 1),
        (interrupted, "interrupted", 130),
    ):
        monkeypatch.setattr(streamprune, {"run": "prune", "eval": "evaluate"}[command], raised)
        result = CliRunner().invoke(main, [command, *arguments[command]])
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
    assert whole.operations[growing[0] - 1].startswith("make_folder streamprune-eval-")
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
    assert "exists and holds something else" in run().stderr
    assert "exists and holds something else" in run("--restart").stderr


def test_what_appears_in_out_meanwhile_is_left_alone(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from streamprune import output

    real = output.finish

    def finish(*arguments: Any) -> Any:
        digests = real(*arguments)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("all of it")
        return digests

    monkeypatch.setattr(output, "finish", finish)
    result = run()
    assert result.exit_code == 2
    assert "exists and holds something else" in result.stderr
    assert (tmp_path / "out" / "thesis.txt").read_text() == "all of it"
    (tmp_path / "out" / "thesis.txt").unlink()
    monkeypatch.undo()
    assert run().exit_code == 0


def test_a_folder_of_the_users_in_the_jobs_place(run: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "out.streamprune").mkdir()
    (tmp_path / "out.streamprune" / "mine.txt").write_text("mine")
    result = run()
    assert result.exit_code == 2
    assert "holds something else: mine.txt" in result.stderr
    assert (tmp_path / "out.streamprune" / "mine.txt").exists()


def test_cache_below_a_file(run: Callable[..., Result], tmp_path: Path, text: Path) -> None:
    refused(run("--cache", str(text / "cache")), "cache cannot be below", 2, tmp_path)


def test_out_is_the_model(model: Path) -> None:
    result = CliRunner().invoke(main, ["run", str(model), str(model), "--ratio", "0.3", "--recipe", "magnitude"])
    assert result.exit_code == 2
    assert "the model itself" in result.stderr


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
        ({**PLAN, "sites": {**SITES, "blocks.1.ffn": {"keep": 0}}}, "blocks.1.ffn keeps 0; it must be 1 to 48"),
        ({**PLAN, "sites": {**SITES, "blocks.1.ffn": {"keep": 49}}}, "blocks.1.ffn keeps 49; it must be 1 to 48"),
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
    settings = ("--recipe", "sobp", "--set", "refine=off")
    refused(run("--plan", str(path), *settings, ratio=None), 'needs "units"', 2, tmp_path)


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
    refused(result, "does not exist, and no job is making it", 1, tmp_path)
