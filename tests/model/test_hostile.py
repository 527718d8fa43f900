"""Files made to do harm, each refused by name, or read without harm: what fuzzing and thinking about it found."""

from __future__ import annotations

import ast
import gzip
import hashlib
import json
import os
import pickle
import shutil
import signal
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import contents
from safetensors.torch import save_file
from streamprune_cli import main

import streamprune
from streamprune import inspect, status
from streamprune.errors import CalibrationError, CheckpointError, ConfigError, NumericalError, ResumeError
from streamprune.jobs.journal import FORMAT
from streamprune.jobs.names import job_folder
from streamprune.model import hub, modeling_streamprune
from streamprune.model.checkpoint import Checkpoint
from streamprune.model.names import ADAPTER, CONFIG, INDEX
from streamprune.model.skeleton import open_skeleton
from streamprune.model.tokenizer import load_tokenizer
from streamprune.model.whole import load_whole
from streamprune.recipes.plan import Plan
from streamprune.system import files
from streamprune.system.strict_json import read_json
from streamprune.text import documents, windows
from streamprune.text.source import Source, Text

CPU = torch.device("cpu")
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """What hangs is ended, and fails."""

    def end(*_: Any) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def model(tmp_path: Path, tiny: Callable[..., Path]) -> Path:
    """A checkpoint of the test's own, to be broken."""
    return Path(shutil.copytree(tiny("llama"), tmp_path / "model"))


@pytest.fixture
def run(model: Path, text: Path, tmp_path: Path) -> Callable[..., Result]:
    def invoke(*more: str) -> Result:
        arguments = ["run", str(model), str(tmp_path / "out"), "--calibration", str(text), "--ratio", "0.3"]
        arguments += ["--samples", "4", "--seq-len", "24", "--round-to", "4", "--recipe", "wanda-sp"]
        return CliRunner().invoke(main, [*arguments, *more])

    return invoke


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def opened(model: Path) -> Any:
    return open_skeleton(model, CPU, "float32")


def shard(path: Path, header: Any, body: int = 64, length: int | None = None) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + bytes(body))


def peak(function: Callable[[], Any]) -> int:
    """Bytes of memory that a call took at the most, besides what was taken before."""
    high, state = Path("/proc/self/clear_refs"), Path("/proc/self/status")

    def taken() -> int:
        return next(int(line.split()[1]) << 10 for line in state.read_text().splitlines() if line.startswith("VmHWM"))

    high.write_text("5")
    before = taken()
    function()
    return taken() - before


# What a shard may claim.

F32 = {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]}
SHARDS: dict[str, tuple[Any, dict[str, int]]] = {
    "more bytes than it has": ({"a": {**F32, "shape": [2000], "data_offsets": [0, 8000]}}, {}),
    "overlapping": ({"a": F32, "b": {**F32, "data_offsets": [16, 48]}}, {"body": 48}),
    "a hole": ({"a": F32, "b": {**F32, "data_offsets": [40, 72]}}, {"body": 72}),
    "a shape of other bytes": ({"a": {**F32, "shape": [3, 4]}}, {"body": 32}),
    "a product beyond 64 bits": ({"a": {**F32, "shape": [2**33, 2**33]}}, {"body": 32}),
    "no places": ({"a": {"dtype": "F32", "shape": [2, 4]}}, {"body": 32}),
    "a name twice": (b'{"a": %s, "a": %s}' % ((json.dumps(F32).encode(),) * 2), {"body": 32}),
    "a header longer than the file": ({"a": F32}, {"body": 32, "length": 10**6}),
    "a header of 2^64": ({"a": F32}, {"body": 32, "length": 2**64 - 1}),
    "no header": (b"", {"body": 0}),
    "depth": (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", {}),
    "no UTF-8": (b'{"\xff": 1}', {}),
}


@pytest.mark.parametrize("case", SHARDS)
def test_shards(case: str, model: Path) -> None:
    header, more = SHARDS[case]
    edit(model / INDEX, weight_map={"a": "model.safetensors"})
    shard(model / "model.safetensors", header, **more)
    with pytest.raises(CheckpointError, match=r"shard .*model.safetensors is corrupt"):
        Checkpoint(model)


def put_alone(model: Path, tensors: dict[str, str]) -> None:
    """Make these tensors of 8 elements, dtypes by name, the only ones of the model."""
    sizes = {"I64": 64, "I32": 32, "U32": 32, "F32": 32}
    header, place = {}, 0
    for name, dtype in tensors.items():
        header[name] = {"dtype": dtype, "shape": [8], "data_offsets": [place, place := place + sizes.get(dtype, 8)]}
    shard(model / "model.safetensors", header, place)
    (model / INDEX).unlink()


NVFP4 = {"q.weight": "U8", "q.weight_scale": "F8_E4M3", "q.weight_scale_2": "F32", "q.input_scale": "F32"}


@pytest.mark.parametrize(
    ("tensors", "config", "beside", "method"),
    [
        (NVFP4, {}, None, ""),
        (NVFP4, {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}, None, "modelopt"),
        ({"q.weight": "F8_E4M3", "q.weight_scale": "F32"}, {}, "hf_quant_config.json", "modelopt"),
        ({"q.weight": "U32"}, {"quantization": {"bits": 4}}, None, "as quantization says"),
        (
            {"gate.tid2eid": "I64", "q.weight": "F8_E4M3"},
            {"quantization_config": {"quant_method": "fbgemm_fp8"}},
            None,
            "fbgemm_fp8",
        ),
        ({"q.weight_packed": "I32"}, {}, None, ""),
    ],
)
def test_quantised_weights(
    tensors: dict[str, str], config: dict[str, Any], beside: str | None, method: str, model: Path
) -> None:
    put_alone(model, tensors)
    edit(model / CONFIG, **config)
    if beside:
        (model / beside).write_text("{}")
    by = rf" \({method}\)" if method else ""
    with pytest.raises(
        CheckpointError, match=rf"tensor 'q\.weight.*; quantised weights{by} cannot be pruned, only F64"
    ):
        Checkpoint(model)


@pytest.mark.parametrize(("dtype", "config"), [("I64", {"quantization_config": {"quant_method": "fp8"}}), ("I32", {})])
def test_tables_of_integers_are_not_quantised_weights(dtype: str, config: dict[str, Any], model: Path) -> None:
    put_alone(model, {"model.layers.0.mlp.gate.tid2eid": dtype})
    edit(model / CONFIG, **config)
    with pytest.raises(
        CheckpointError, match=f"tid2eid' has dtype {dtype}; tables of it cannot be read, only F64, F32, F16"
    ):
        Checkpoint(model)


@pytest.mark.parametrize("field", ["quantization_config", "compression_config", "quantization"])
def test_what_is_left_over_of_quantised_weights(field: str, model: Path) -> None:
    for given, shown in (({"quant_method": "fp8"}, "fp8"), ({"bits": 4}, f"as {field} says")):
        edit(model / CONFIG, **{field: given})
        message = rf"it has a {field} \({shown}\), but no tensor is packed; .* delete {field} from the file"
        with pytest.raises(CheckpointError, match=message):
            opened(model)
        edit(model / CONFIG, **{field: None}, text_config={field: given})
        with pytest.raises(CheckpointError, match=message):
            opened(model)
        edit(model / CONFIG, text_config=None)
    opened(model)


# JSON with two meanings, or none.

TEXTS = {
    b'{"a": 1, "b": 2, "a": 3}': "the key 'a' occurs twice in one object",
    b'{"a": [{"b": 1, "b": 1}]}': "the key 'b' occurs twice",
    b'{"a": NaN}': "NaN is not valid JSON",
    b'{"a": -Infinity}': "-Infinity is not valid JSON",
    b'{"a": 1e999}': "the number 1e999 is too large",
    b'{"a": "\\ud800"}': "a string contains half a surrogate pair",
    b'{"\\uDFFF": 0}': "a string contains half a surrogate pair",
    b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}": "nesting is too deep",
    b'{"a": ' + b"9" * 5000 + b"}": "Exceeds the limit",
    b'\xef\xbb\xbf{"a": 1}': "Unexpected UTF-8 BOM",
    b'{"a": "\xff"}': "can't decode byte 0xff",
    b"": "Expecting value",
}


@pytest.mark.parametrize("data", TEXTS, ids=range(len(TEXTS)))
def test_json(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"cannot be read as JSON: .*{TEXTS[data]}"):
        read_json(path)
    with pytest.raises(ConfigError, match=TEXTS[data]):
        Plan.read(path)


def test_json_that_is_well(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_bytes('{"a": "\\ud83d\\ude00 \\\\ud800", "b": [1e308, -0.0], "ü": {"a": {"a": 1}}}'.encode())
    assert read_json(path) == {"a": "😀 \\ud800", "b": [1e308, -0.0], "ü": {"a": {"a": 1}}}


# What the index may name.


@pytest.mark.parametrize("name", ["*", "pytorch_model.bin", "..", "a/b.safetensors", "", "a\0.safetensors"])
def test_an_index_names_no_pattern_and_no_pickle(name: str, model: Path) -> None:
    """A pattern would have the hub fetch whatever it matches."""
    edit(model / INDEX, weight_map={UP: name})
    for read in (Checkpoint, hub._missing):
        with pytest.raises(CheckpointError, match="which is not a file of this directory"):
            read(model)


# Links.


def test_links_of_the_hubs_cache(model: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--model" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(model.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert len(opened(snapshot)) == 3
    load_tokenizer(snapshot)
    # A cache of a stranger's making, whose blobs are somebody's home.
    blobs.rename(tmp_path / "home")
    blobs.symlink_to(tmp_path / "home")
    with pytest.raises(CheckpointError, match=r"is a link to .*home.*, out of the model directory"):
        opened(snapshot)


@pytest.mark.parametrize("name", ["tokenizer.json", "LICENSE", "config.json", "whatever"])
def test_a_link_out_of_the_model_directory(name: str, model: Path, run: Callable[..., Result], tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    shutil.copyfile(model / name if (model / name).exists() else model / CONFIG, secret)
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to("../secret")
    result = run()
    assert result.exit_code == 1
    assert f"{model / name} is a link to {secret}, out of the model directory" in result.stderr
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="out of the model directory"):
        load_tokenizer(model)


def test_links_that_stay_or_lead_nowhere(model: Path, tmp_path: Path) -> None:
    (model / CONFIG).rename(model / "settings")
    (model / CONFIG).symlink_to("settings")
    (model / "circle").symlink_to("circle")
    (tmp_path / "link").symlink_to(model)
    assert len(opened(tmp_path / "link")) == 3
    (model / "tokenizer.model").symlink_to(tmp_path / "not there")
    with pytest.raises(CheckpointError, match="out of the model directory"):
        opened(model)


@pytest.mark.parametrize(
    "place", ["out.streamprune", "out.streamprune/out", "out.streamprune/cache", "cache/job", "tmp"]
)
def test_no_job_writes_through_a_link(place: str, run: Callable[..., Result], tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    link = tmp_path / place
    if place == "cache/job":
        (tmp_path / "cache").mkdir()
        folder = job_folder(tmp_path / "out")
        link = tmp_path / "cache" / f"{folder.name}-{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}"
    elif place == "tmp":
        (tmp_path / "out.streamprune" / "out").mkdir(parents=True)
        link = tmp_path / "out.streamprune" / "out" / "model-00001-of-00005.safetensors.tmp"
        elsewhere = elsewhere / "file"
        elsewhere.write_text("mine")
    else:
        link.parent.mkdir(exist_ok=True)
    link.symlink_to(elsewhere)
    result = run(*(["--cache", str(tmp_path / "cache")] if place == "cache/job" else []))
    assert result.exit_code == 2
    assert f"{link} is a symbolic link" in result.stderr
    assert not elsewhere.is_dir() or not any(elsewhere.iterdir())
    assert not elsewhere.is_file() or elsewhere.read_text() == "mine"


def test_a_comparison_writes_through_no_link(model: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "table").mkdir()
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "table" / "journal.jsonl").symlink_to(tmp_path / "mine")
    given = ["compare", str(model), "--text", str(text), "--out", str(tmp_path / "table"), "--recipes", "magnitude"]
    small = ["--ratios", "0.3", "--samples", "4", "--seq-len", "24", "--eval-seq-len", "24", "--round-to", "4"]
    result = CliRunner().invoke(main, [*given, *small])
    assert result.exit_code == 2, result.output
    assert "journal.jsonl is a symbolic link" in result.stderr
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_link_in_the_place_of_a_temporary_file(tmp_path: Path) -> None:
    """A page is written into a directory that may be a stranger's."""
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "page.html.tmp").symlink_to(tmp_path / "mine")
    files.write_text(tmp_path / "page.html", "page")
    assert (tmp_path / "mine").read_text() == "mine"
    assert (tmp_path / "page.html").read_text() == "page"


# What is no file at all.

EXPECTED = [CONFIG, INDEX, "shard", "tokenizer.json", "tokenizer_config.json", "text", "plan"]


@pytest.mark.parametrize("kind", ["pipe", "folder"])
@pytest.mark.parametrize("name", EXPECTED)
def test_no_file_where_one_is_expected(
    name: str, kind: str, model: Path, run: Callable[..., Result], tmp_path: Path
) -> None:
    path = {"shard": next(model.glob("*.safetensors")), "text": tmp_path / "t.txt", "plan": tmp_path / "p.json"}.get(
        name, model / name
    )
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    result = run(*{"text": ("--calibration", str(path)), "plan": ("--plan", str(path))}.get(name, ()))
    if name == "tokenizer_config.json":
        assert result.exit_code == 0  # a tokenizer can do without
        return
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code != 0
    assert result.stderr.splitlines()[-1].startswith("streamprune: ")
    assert not (tmp_path / "out").exists()


def test_a_device_is_not_read(tmp_path: Path) -> None:
    (tmp_path / CONFIG).symlink_to("/dev/null")
    with pytest.raises(CheckpointError, match=r"cannot read .*: Not a regular file"):
        read_json(tmp_path / CONFIG)
    with pytest.raises(ConfigError, match="Not a regular file"):
        Plan.read(Path("/dev/null"))


# What a config may claim.

BOMBS: dict[str, dict[str, Any]] = {
    "blocks": {"num_hidden_layers": 10**6},
    "width": {"hidden_size": 10**12},
    "heads": {"num_attention_heads": 10**9, "num_key_value_heads": 10**9},
    "channels": {"intermediate_size": 10**15},
    "tokens": {"vocab_size": 2**62},
    "rotation": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 1e10}},
    "nothing": {"hidden_size": 0},
}


@pytest.mark.parametrize("case", BOMBS)
def test_sizes_that_the_shards_do_not_hold(case: str, model: Path) -> None:
    opened(model)  # what is imported for the first time is not counted
    edit(model / CONFIG, **BOMBS[case])

    def refuse() -> None:
        with pytest.raises(CheckpointError):
            opened(model)

    assert peak(refuse) < 64 << 20


def test_blocks_by_another_name(tiny: Callable[..., Path], tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny("gpt2"), tmp_path / "gpt2"))
    edit(model / CONFIG, n_layer=10**9)
    with pytest.raises(CheckpointError, match="n_layer is 1000000000; the shards hold 3 blocks"):
        opened(model)


def test_experts_that_the_shards_do_not_hold(tiny: Callable[..., Path], tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny("mixtral"), tmp_path / "mixtral"))
    opened(model)
    edit(model / CONFIG, num_local_experts=10**9)

    def refuse() -> None:
        with pytest.raises(CheckpointError, match=r"1000000000 experts or more; the shards hold \d+ tensors"):
            opened(model)

    assert peak(refuse) < 64 << 20


def test_experts_of_ours_that_the_shards_do_not_hold(tiny: Callable[..., Path], configured: Callable[..., Any]) -> None:
    config = configured(tiny("mixtral"), recipe="magnitude")
    streamprune.prune(config)
    asked = json.loads((config.out / CONFIG).read_text())
    (name,) = asked["streamprune"]["experts"]

    def refuse() -> None:
        with pytest.raises(CheckpointError, match="lists more experts than the shards hold tensors"):
            opened(config.out)

    for listed in ({name: [[1] * 20_000] * 3}, {name: None, "other": [[1] * 20_000]}):
        edit(config.out / CONFIG, streamprune={**asked["streamprune"], "experts": listed})
        assert peak(refuse) < 64 << 20


def test_labels_are_not_counted_up_to(model: Path) -> None:
    edit(model / CONFIG, num_labels=10**9)
    assert peak(lambda: opened(model)) < 64 << 20


def test_widths_of_ours_touch_nothing_else(
    tiny: Callable[..., Path], configured: Callable[..., Any], tmp_path: Path
) -> None:
    config = configured(tiny("llama-biased"), recipe="wanda-sp")
    streamprune.prune(config)
    asked = json.loads((config.out / CONFIG).read_text())
    assert asked["model_type"] == "streamprune_llama"
    widths = asked["streamprune"]
    wrong: list[Any] = [
        None,
        {**widths, "blocks": "model"},
        {**widths, "rows": None},
        {**widths, "rows": {"input_layernorm": [4, 4, 4]}},
        {**widths, "rows": {"mlp.up_proj": [4, 4]}},
        {**widths, "rows": {"mlp.up_proj": [4, 4, "4"]}},
        {**widths, "rows": {"mlp.up_proj": [4, 4, True]}},
        {**widths, "rows": {"mlp.up_proj": [4, 4, 2**40]}},
        {**widths, "attributes": {"forward": [1, 1, 1]}},
        {**widths, "attributes": {"mlp.config.vocab_size": [1, 1, 1]}},
        {**widths, "experts": {"mlp.experts": [[4], [4], [4]]}},
        {**widths, "renamed": [["model.", "evil."]]},
    ]
    for each in wrong:
        edit(config.out / CONFIG, streamprune=each)
        with pytest.raises(CheckpointError, match=r"config.json: |has shape"):
            opened(config.out)
    edit(config.out / CONFIG, streamprune=widths)
    opened(config.out)


def test_a_config_leads_to_no_other_and_runs_no_kernel(model: Path) -> None:
    before = opened(model).config
    edit(
        model / CONFIG,
        attn_implementation="evil/attention",
        _attn_implementation="evil/attention",
        experts_implementation="evil/experts",
        to_dict="no method any more",
        attribute_map={"hidden_size": "hidden_size"},
        __class__="a class",
    )
    after = opened(model).config
    assert after._attn_implementation == before._attn_implementation == "sdpa"
    assert after.to_dict() == before.to_dict()
    # transformers would read the other file instead of the one that was checked.
    (model / "config.4.0.0.json").write_text((model / CONFIG).read_text())
    edit(model / CONFIG, configuration_files=["config.4.0.0.json"])
    with pytest.raises(CheckpointError, match="configuration_files is not supported"):
        opened(model)


def test_what_a_forward_returns_is_not_the_configs_to_say(model: Path, text: Path) -> None:
    expected = streamprune.evaluate(model, str(text), seq_len=24)
    config = opened(model).config.to_dict()
    edit(
        model / CONFIG,
        return_dict=False,
        output_attentions=True,
        output_hidden_states=True,
        tie_last_hidden_states=False,
        is_encoder_decoder=True,
        problem_type="single_label_classification",
    )
    assert opened(model).config.to_dict() == config
    assert streamprune.evaluate(model, str(text), seq_len=24).perplexity == expected.perplexity
    with torch.no_grad():
        given = load_whole(model)(input_ids=torch.zeros(1, 4, dtype=torch.int64))
    assert given.logits.shape == (1, 4, 40)
    assert given.hidden_states is None


@pytest.mark.parametrize("chosen", [0, 5, -1, 2**70])
def test_no_more_experts_are_chosen_than_there_are(chosen: int, tiny: Callable[..., Path], tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny("mixtral"), tmp_path / "mixtral"))
    edit(model / CONFIG, num_experts_per_tok=4)
    opened(model)
    edit(model / CONFIG, num_experts_per_tok=chosen)
    with pytest.raises(CheckpointError, match=f"num_experts_per_tok is {chosen}; it must be 1 to 4"):
        opened(model)


SETTINGS: list[tuple[str, dict[str, Any], str]] = [
    ("gemma3", {"query_pre_attn_scalar": -1}, "must be float, not complex"),
    ("falcon", {"layer_norm_epsilon": None}, "must be float, not NoneType"),
    ("granite", {"logits_scaling": 1e300}, "logits_scaling is 1e[+]300, which is beyond float32"),
    ("mixtral", {"more": [{"deep": [-(10**400)]}]}, "deep is -10000000.*, which is beyond float32"),
    (
        "phi3",
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 3.0}},
        r"[Tt]he size of tensor|broadcast",
    ),
]


@pytest.mark.parametrize(("name", "changes", "message"), SETTINGS, ids=range(len(SETTINGS)))
def test_settings_that_no_module_computes_with(
    name: str, changes: dict[str, Any], message: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny(name), tmp_path / name))
    edit(model / CONFIG, **changes)
    with pytest.raises(CheckpointError, match=message):
        opened(model)


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32}
LONG = {**YARN, "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0] * 4}
ROTATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "theta 0": ("rope_theta", {"rope_type": "default", "rope_theta": 0}),
    "theta -1": ("rope_theta", {"rope_type": "default", "rope_theta": -1.0}),
    "theta true": ("rope_theta", {"rope_type": "default", "rope_theta": True}),
    "theta beyond floats": ("rope_theta", {"rope_type": "default", "rope_theta": 10**400}),
    "factor 0": ("factor", {"rope_type": "linear", "rope_theta": 1e4, "factor": 0}),
    "factor -2": ("factor", {**YARN, "factor": -2.0}),
    "attention": ("attention_factor", {**YARN, "attention_factor": 0.0}),
    "beta": ("beta_fast", {**YARN, "beta_fast": -1}),
    "before": ("original_max_position_embeddings", {**YARN, "original_max_position_embeddings": -32}),
    "short": ("short_factor", {**LONG, "short_factor": [1.0, 1.0, 0.0, 1.0]}),
    "long": ("long_factor", {**LONG, "long_factor": [1.0, -1.0, 1.0, 1.0]}),
}


@pytest.mark.parametrize("case", ROTATIONS)
def test_settings_of_the_rotary_embedding(case: str, model: Path) -> None:
    name, asked = ROTATIONS[case]
    for well in (YARN, LONG):
        edit(model / CONFIG, rope_parameters=well)
        opened(model)
    edit(model / CONFIG, rope_parameters=asked)
    with pytest.raises(CheckpointError, match=rf"{name} of the rotary embedding is .*must be a finite number above 0"):
        opened(model)


def test_settings_of_the_rotary_embedding_by_kind_of_block(tiny: Callable[..., Path], tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny("gemma3"), tmp_path / "gemma3"))
    asked = json.loads((model / CONFIG).read_text())["rope_parameters"]
    edit(model / CONFIG, rope_parameters={**asked, "sliding_attention": {"rope_type": "default", "rope_theta": 0.0}})
    with pytest.raises(CheckpointError, match=r"rope_theta of the rotary embedding is 0\.0"):
        opened(model)


def test_a_rotary_embedding_that_is_no_number(model: Path) -> None:
    """Settings that are well one by one; and angles that only later positions take beyond the dtype."""
    edit(model / CONFIG, rope_parameters={"rope_type": "default", "rope_theta": 1e-300})
    with pytest.raises(NumericalError, match="the rotary embedding of positions 0 to 0 holds NaN or Inf"):
        opened(model)
    edit(model / CONFIG, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 1e-38})
    skeleton = opened(model)
    with pytest.raises(NumericalError, match="the rotary embedding of positions 0 to 23 holds NaN or Inf"):
        skeleton.arguments(1, 24)


def test_an_adapter_is_not_passed_over(model: Path) -> None:
    (model / ADAPTER).write_text(json.dumps({"base_model_name_or_path": "/elsewhere", "peft_type": "LORA"}))
    with pytest.raises(CheckpointError, match=r"has an adapter \(adapter_config.json\) beside its weights"):
        Checkpoint(model)


# Code and pickles.

EVIL = "open({mark!r}, 'w').close()\nclass C: ...\nclass M: ...\nclass T: ...\n"


@pytest.fixture
def evil(model: Path, tmp_path: Path) -> Path:
    """What the planted module makes when it is imported, from whichever of its names."""
    mark = tmp_path / "it ran"
    for name in ("evil", "modeling_streamprune", "tokenization", "__init__"):
        (model / f"{name}.py").write_text(EVIL.format(mark=str(mark)))
    maps = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", "evil.T"]}
    edit(model / CONFIG, auto_map=maps)
    edit(model / "tokenizer_config.json", auto_map=maps)
    return mark


def test_code_that_a_model_brings_is_not_run(
    evil: Path, model: Path, run: Callable[..., Result], text: Path, tmp_path: Path
) -> None:
    small = ["--text", str(text), "--seq-len", "24"]
    assert run().exit_code == 0
    for arguments in (
        ["eval", str(model), *small],
        ["inspect", str(model)],
        ["report", str(tmp_path / "out"), "--against", str(model), "--prompt", "abc", "--tokens", "2"],
    ):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
    assert streamprune.load(model) is not None
    assert not evil.exists()


def test_a_model_that_needs_its_own_code(evil: Path, model: Path) -> None:
    edit(model / CONFIG, model_type="evil")
    for read in (opened, load_whole, inspect):
        with pytest.raises(CheckpointError, match=r"the code that the model brings along \(auto_map\) is never run"):
            read(model)
    with pytest.raises(ValueError, match="custom code"):
        streamprune.load(model)
    assert not evil.exists()


def test_a_tokenizer_that_needs_its_own_code(evil: Path, model: Path) -> None:
    edit(model / "tokenizer_config.json", tokenizer_class="EvilTokenizer")
    (model / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"the tokenizer needs its own code \(auto_map\)"):
        load_tokenizer(model)
    assert not evil.exists()


class _Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return open, (str(self.mark), "w")


def test_no_pickle_is_opened(
    model: Path, run: Callable[..., Result], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "it ran"
    bomb = pickle.dumps(_Bomb(mark))
    names = ("pytorch_model.bin", "consolidated.00.pth", "tokenizer.pkl", "vocab.pkl", "vocab.bin", "model.pt")
    for name in (*names, "adapter_model.bin", "training_args.bin", "optimizer.pt", "spiece.model"):
        (model / name).write_bytes(bomb)
    opened_pickles: list[Any] = []

    def refuse(*arguments: Any, **_: Any) -> Any:
        opened_pickles.append(arguments)
        raise AssertionError("a pickle was opened")

    for owner, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(owner, name, refuse)
    assert run("--recipe", "sobp").exit_code == 0
    assert CliRunner().invoke(main, ["eval", str(model), "--text", str(text), "--seq-len", "24"]).exit_code == 0
    load_whole(model)
    streamprune.load(tmp_path / "out")
    for path in model.glob("*.safetensors*"):
        path.unlink()
    for read in (Checkpoint, load_whole):
        with pytest.raises(CheckpointError, match="has only pickled weights, which are never opened"):
            read(model)
    with pytest.raises(OSError, match="safetensors"):
        streamprune.load(model)
    assert not opened_pickles
    assert not mark.exists()
    assert not set(names) & set(contents(tmp_path / "out"))


def test_how_to_generate_is_not_the_checkpoints_to_say(model: Path) -> None:
    """A generation config may ask for code of the hub's, as `penalty_alpha` does, or for a million sequences."""
    asked = {"penalty_alpha": 0.6, "top_k": 4, "eos_token_id": "one", "bos_token_id": 0}
    (model / "generation_config.json").write_text(json.dumps(asked))
    config = load_whole(model).generation_config
    assert (config.eos_token_id, config.bos_token_id) == (None, 0)
    assert getattr(config, "penalty_alpha", None) is None
    (model / "generation_config.json").write_text(json.dumps({"num_return_sequences": 10**6}))
    with pytest.raises(CheckpointError, match="num_return_sequences"):
        load_whole(model)


def test_what_travels_with_a_model_imports_little() -> None:
    found = set()
    for node in ast.walk(ast.parse(Path(modeling_streamprune.__file__).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found.add(str(node.module).partition(".")[0])
        assert not (isinstance(node, ast.Name) and node.id in ("eval", "exec", "compile", "__import__", "open"))
    assert found - set(sys.stdlib_module_names) == {"torch", "transformers"}
    assert found & set(sys.stdlib_module_names) == {
        "collections",
        "copy",
        "functools",
        "inspect",
        "pathlib",
        "re",
        "shutil",
    }


# Tokenizers.


def test_a_tokenizer_that_panics(model: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizers library's panics are no `Exception`."""
    panic = type("PanicException", (BaseException,), {})

    def fail(*_: Any, **__: Any) -> Any:
        raise panic("index out of bounds")

    tokenizer = load_tokenizer(model)
    monkeypatch.setattr(type(tokenizer), "__call__", fail)
    with pytest.raises(CalibrationError, match=r"cannot read it .its tokenizer panics: index out of bounds"):
        windows.tokenize(tokenizer, text, 40)
    monkeypatch.setattr(type(tokenizer), "from_pretrained", fail)
    with pytest.raises(CheckpointError, match="its tokenizer panics: index out of bounds"):
        load_tokenizer(model)


def test_a_tokenizer_that_pads_and_cuts(model: Path, text: Path) -> None:
    """Its own settings would pad each piece to any length."""
    before = windows.tokenize(load_tokenizer(model), text, 40)
    padding = {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    cut = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    edit(model / "tokenizer.json", padding={**padding, "pad_type_id": 0, "pad_token": "<s>"}, truncation=cut)
    assert torch.equal(windows.tokenize(load_tokenizer(model), text, 40).ids, before.ids)


# Texts.


def read_rows(path: Path) -> list[Any]:
    found = documents.open_documents(str(path), None)
    return [document for _, block in found.read(range(len(found))) for document in block]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a \ud83d"}, "field 'text' has half a surrogate pair at character 2"),
        ({"text": [{"from": ["human"], "value": "x"}]}, None),
        ({"text": 3}, "is neither text nor a list of messages"),
        ({"text": ["x"]}, "a message without role and content"),
    ],
)
def test_rows(row: Any, message: str | None, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "first"}) + "\n" + json.dumps(row) + "\n")
    if message is None:
        assert read_rows(path)[1].messages == [{"role": ["human"], "content": "x"}]
        return
    with pytest.raises(CalibrationError, match=rf"rows.jsonl, line 2: .*{message}"):
        read_rows(path)


def test_a_line_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "first"}\n{"text": "' + "a" * (documents.LINE + 100) + '"}\n')
    with pytest.raises(CalibrationError, match=r"rows.jsonl, line 2: longer than 16 MiB"):
        read_rows(path)
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(b" " * (3 * documents.LINE)))
    assert packed.stat().st_size < 100_000

    def refuse() -> None:
        with pytest.raises(CalibrationError, match=r"rows.jsonl.gz, line 1: longer than 16 MiB"):
            read_rows(packed)

    assert peak(refuse) < 64 << 20


def test_a_bomb_of_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress((json.dumps({"text": "a" * 1000}) + "\n").encode() * (documents.UNPACKED // 1000)))
    with pytest.raises(CalibrationError, match="unpacks to more than 200 times its size"):
        read_rows(path)


def _parquet(path: Path, **options: Any) -> Any:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": [f"document {n} " * 20 for n in range(200)]}), path, **options)
    return parquet


def test_a_table_broken_in_the_middle(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    _parquet(path, use_dictionary=False)
    assert len(read_rows(path)) == 200
    data = bytearray(path.read_bytes())
    data[200:600] = bytes(400)
    path.write_bytes(data)
    with pytest.raises(CalibrationError, match=r"table.parquet cannot be read as parquet"):
        read_rows(path)


def test_a_table_of_endless_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.parquet"
    _parquet(path)

    class Group:
        num_rows, total_byte_size = 10**12, 10

    class Metadata:
        num_row_groups = 1
        row_group = staticmethod(lambda number: Group)

    with pytest.raises(CalibrationError, match=r"says that it has 1000000000000 rows in \d+ bytes; it cannot"):
        documents._row_groups(path, Metadata)
    Group.num_rows, Group.total_byte_size = 10, 10**12
    with pytest.raises(CalibrationError, match=r"says that its \d+ bytes unpack to 1000000000000"):
        documents._row_groups(path, Metadata)
    Group.total_byte_size = 10
    assert documents._row_groups(path, Metadata) == [10]


@pytest.mark.parametrize("weight", ["1e308", "1e13", "inf", "-1", "1e999"])
def test_weights(weight: str, text: Path) -> None:
    with pytest.raises(ConfigError, match="it must be positive, at most 1e"):
        Text.of([f"{text}={weight}", f"{text}=1"]).shares(4)


def test_the_heaviest_weights(text: Path) -> None:
    heavy = Text.of([f"{text}=1e12", f"{text}=1e12"])
    assert heavy.shares(4) == [2, 2]


@pytest.mark.parametrize("place", ["a" * 5000, "a\0b", "a" * 5000 + "=2", "\ud800", "a" * 300 + ".jsonl:text"])
def test_names_that_no_file_has(place: str) -> None:
    with pytest.raises(CalibrationError, match="No such file or directory"):
        Source.parse(place)


# Journals.


def lines(*entries: Any) -> bytes:
    texts = [entry if isinstance(entry, bytes) else json.dumps(entry).encode() for entry in entries]
    return b"".join(b"%08x %s\n" % (zlib.crc32(text), text) for text in texts)


@pytest.mark.parametrize(
    "entries",
    [
        [[]],
        [{"step": 3}],
        [b"[" * 100_000],
        [b"\xff"],
        [{"step": "start", "format": FORMAT}],
        [{"step": "start", "format": FORMAT, "schedule": 5, "job": {}}],
        [{"step": "start", "format": FORMAT, "schedule": [{"name": "x", "steps": "y"}], "job": {"settings": {}}}],
        [{"step": "start", "format": FORMAT, "schedule": [], "job": {"settings": {}}}, {"step": "shot-1/prune/0"}],
    ],
    ids=range(8),
)
def test_journals_that_no_job_writes(entries: list[Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    job_folder(out).mkdir()
    (job_folder(out) / "journal.jsonl").write_bytes(lines(*entries, {"step": "more"}))
    for look in (status, inspect):
        with pytest.raises(ResumeError, match=r"is damaged|has unexpected content"):
            look(out)


# Messages.


def test_a_message_commands_no_terminal(model: Path) -> None:
    edit(model / CONFIG, model_type="\x1b]0;evil\x07\u202e")
    (model / "odd\x1b[31m.txt").symlink_to("/etc/passwd")
    result = CliRunner().invoke(main, ["inspect", str(model)])
    assert result.exit_code == 1
    assert "odd\\x1b[31m.txt is a link to /etc/passwd" in result.stderr
    assert all(letter.isprintable() or letter == "\n" for letter in result.stderr)


def test_an_index_beside_tensors_of_other_shards(model: Path) -> None:
    """A shard that the index does not name is not read."""
    save_file({"other": torch.zeros(2)}, model / "unnamed.safetensors")
    assert "other" not in Checkpoint(model)
