"""What comes out: every way of loading gives the same logits, and it can be pruned and measured again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, contents, make_tiny
from safetensors.torch import load_file, save_file

import streamprune
from streamprune import Config
from streamprune.errors import ConfigError
from streamprune.model import checkpoint
from streamprune.model.architectures import FAMILIES
from streamprune.model.site import FREE, UNIFORM
from streamprune.model.skeleton import open_skeleton
from streamprune.system.host import tensor_bytes

Make = Callable[..., Config]
Tiny = Callable[..., Path]
IDS = torch.arange(40)[None, 2:20]

LOAD = """
import sys, warnings
import torch
from transformers import AutoModelForCausalLM
kind, path, save = sys.argv[1:]
if kind == "imported":
    import streamprune
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **({"trust_remote_code": True} if kind == "remote" else {}))
assert ("streamprune" in sys.modules) == (kind == "imported")
torch.save(model(torch.arange(40)[None, 2:20]).logits, save)
"""


FORKS = """
import json, os, sys, traceback
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
for line in sys.stdin:
    program, arguments, said = json.loads(line)
    child = os.fork()
    if not child:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for stream in (1, 2):
                os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
            sys.argv[1:] = arguments
            exec(program, {})
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
Elsewhere = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Elsewhere]:
    """`elsewhere(program, *arguments)`: run in a separate process, whose working directory is not the project, and without network.

    It has imported transformers, but not streamprune. Gives the exit code and what was printed.
    """
    home = tmp_path_factory.mktemp("home")
    environment = {"HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1", "PATH": "", "HOME": str(home)}
    environment["OMP_NUM_THREADS"] = "1"  # as here
    command, pipe = [sys.executable, "-c", FORKS], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=home, env=environment) as server:
        assert server.stdin is not None
        assert server.stdout is not None

        def run(program: str, *arguments: object) -> tuple[int, str]:
            said = home / "said"
            said.unlink(missing_ok=True)
            print(json.dumps([program, [*map(str, arguments)], str(said)]), file=server.stdin, flush=True)
            return int(server.stdout.readline()), said.read_text()

        yield run


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_three_ways_of_loading_agree(name: str, pruned: Tiny, elsewhere: Elsewhere, tmp_path: Path) -> None:
    out = pruned(name)
    assert json.loads((out / "config.json").read_text())["model_type"] == f"streamprune_{name}"
    with torch.no_grad():
        expected = streamprune.load(out, dtype=torch.float32)(IDS).logits
    for kind in ("remote", "imported"):
        code, said = elsewhere(LOAD, kind, out, tmp_path / f"{kind}.pt")
        assert code == 0, said
        assert torch.equal(torch.load(tmp_path / f"{kind}.pt"), expected)
    # Without any of the three: a message that says what to do, never random weights.
    code, said = elsewhere(LOAD, "plain", out, tmp_path / "plain.pt")
    assert code != 0
    assert "trust_remote_code=True" in said


def test_registration_imports_no_model(elsewhere: Elsewhere) -> None:
    """Otherwise a model could not be imported by its own module, which then would not be complete yet."""
    program = """
import sys
import streamprune
from transformers.models.llama.modeling_llama import LlamaForCausalLM
assert "streamprune.model.modeling_streamprune" in sys.modules
assert "transformers.models.mistral.modeling_mistral" not in sys.modules
"""
    code, said = elsewhere(program)
    assert code == 0, said


@pytest.mark.check("generate with a cache = forward")
@pytest.mark.parametrize("name", TINY)
def test_generation_with_a_cache_is_the_forward_pass(name: str, pruned: Tiny) -> None:
    model = streamprune.load(pruned(name), dtype=torch.float32)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(IDS, attention_mask=torch.ones_like(IDS), use_cache=True, **options)
    plain = model.generate(IDS, attention_mask=torch.ones_like(IDS), use_cache=False, **options)
    assert torch.equal(cached, plain)
    with torch.no_grad():
        assert torch.equal(model(cached[:, :-1]).logits[:, -1].argmax(-1), cached[:, -1])


@pytest.mark.check("uniform layout = stock checkpoint")
@pytest.mark.parametrize("name", [name for name, fields in TINY.items() if fields["model_type"] in FAMILIES])
def test_uniform_layout_is_a_stock_checkpoint(name: str, tiny: Tiny, configured: Make) -> None:
    from transformers import AutoModelForCausalLM

    path = tiny(name)
    config = configured(path, layout="uniform", ratio=0.3)
    streamprune.prune(config)
    written = json.loads((config.out / "config.json").read_text())
    before = json.loads((path / "config.json").read_text())
    assert written["model_type"] == before["model_type"]
    assert written["architectures"] == before["architectures"]
    assert "auto_map" not in written
    assert not list(config.out.glob("*.py"))
    stock = AutoModelForCausalLM.from_pretrained(config.out, dtype=torch.float32)
    assert not type(stock).__name__.startswith("Pruned")
    evaluation = streamprune.evaluate(config.out, config.calibration or Path(), seq_len=24)
    assert evaluation.perplexity > 1
    assert stock.num_parameters() < 0.95 * AutoModelForCausalLM.from_pretrained(path).num_parameters()


def test_uniform_layout_takes_heads_where_a_stock_config_can_say_so(tiny: Tiny, configured: Make) -> None:
    path = tiny("mistral", num_hidden_layers=2)
    config = configured(path, layout="uniform", ratio=0.5, settings={"head_weight": "0"})
    streamprune.prune(config)
    written = json.loads((config.out / "config.json").read_text())
    assert written["num_key_value_heads"] == 1
    assert written["num_attention_heads"] == 2
    assert written["head_dim"] == 8
    assert streamprune.load(config.out)(IDS).logits.isfinite().all()


def test_llamas_own_config_limits_its_uniform_heads(tiny: Tiny) -> None:
    # 32 is no multiple of 3 heads: transformers' LlamaConfig refuses that, whatever head_dim says.
    path = tiny("llama", num_attention_heads=4, num_key_value_heads=4)
    free, uniform = (open_skeleton(path, torch.device("cpu"), "float32", layout=u) for u in (FREE, UNIFORM))
    assert free.sites(0)[0].choices is None
    assert uniform.sites(0)[0].choices == (1, 2, 4)
    opt = open_skeleton(tiny("opt"), torch.device("cpu"), "float32", layout=UNIFORM)
    assert opt.sites(0)[0].choices == (4,)


def runtimes_width(ffn: Any, width: int) -> int:
    """How vLLM takes an FFN's width from DeciLM's config. The others know only the factor, which mlx-lm rounds."""
    if not hasattr(ffn, "ffn_mult"):
        return int(ffn.intermediate_size)
    columns = int(2 * round(ffn.ffn_mult, 4) * width / 3)
    return columns if columns % 256 == 0 else columns + 256 - columns % 256


@pytest.mark.slow
@pytest.mark.parametrize("round_to", [256, 8])
def test_decilm_layout_says_what_its_runtimes_read(
    round_to: int, tiny: Tiny, configured: Make, elsewhere: Elsewhere, tmp_path: Path
) -> None:
    from transformers import AutoConfig

    wide = {"intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}
    path = tiny("llama", **wide, hidden_act="swish")
    config = configured(path, layout="decilm", ratio=0.4, recipe="default", samples=6, round_to=round_to)
    streamprune.prune(config)
    written = AutoConfig.from_pretrained(config.out)
    assert written.architectures == ["DeciLMForCausalLM"]
    skeleton = open_skeleton(config.out, torch.device("cpu"), "float32")
    widths = []
    for index, block in enumerate(written.block_configs):
        attention, ffn = skeleton.sites(index)
        assert not block.attention.no_op
        assert not block.ffn.no_op
        # One number of query heads, of which each block's groups are cut.
        assert written.num_attention_heads == attention.heads
        assert written.num_attention_heads // block.attention.n_heads_in_group == attention.units
        assert written.num_key_value_heads == attention.units
        assert runtimes_width(block.ffn, written.hidden_size) == ffn.columns
        # mlx-lm knows no field beside the factor.
        assert block.ffn.keys() - {"no_op", "replace_with_linear"} == {
            "intermediate_size" if ffn.columns % 256 else "ffn_mult"
        }
        widths.append(ffn.columns)
    assert any(width % 256 for width in widths) == (round_to == 8)
    assert written.head_dim == 4
    assert written.hidden_act == "silu"
    assert len(set(widths)) > 1
    with torch.no_grad():
        expected = streamprune.load(config.out, dtype=torch.float32)(IDS).logits
    code, said = elsewhere(LOAD, "remote", config.out, tmp_path / "remote.pt")
    assert code == 0, said
    assert torch.equal(torch.load(tmp_path / "remote.pt"), expected)
    streamprune.load(config.out).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["block_configs"] == json.loads((config.out / "config.json").read_text())["block_configs"]


def test_decilm_layout_refuses_what_it_cannot_say(tiny: Tiny, configured: Make) -> None:
    with pytest.raises(ConfigError, match=r"layout is decilm.*model_type qwen3"):
        streamprune.prune(configured(tiny("qwen3"), layout="decilm"))


def test_equal_widths_by_chance_are_written_as_stock(tiny: Tiny, configured: Make) -> None:
    path = tiny("qwen3")
    config = configured(path, recipe="magnitude", ratio=0.5, round_to=8)
    streamprune.prune(config)
    report = json.loads((config.out / "report.json").read_text())
    assert len({site["kept"] for site in report["sites"] if "ffn" in site["site"]}) == 1
    assert json.loads((config.out / "config.json").read_text())["model_type"] == "qwen3"


@pytest.mark.check("pruned again")
@pytest.mark.parametrize("name", TINY)
def test_a_pruned_checkpoint_can_be_pruned_and_measured_again(name: str, pruned: Tiny, configured: Make) -> None:
    twice = configured(pruned(name), "twice", recipe="default", ratio=0.1)
    result = streamprune.prune(twice)
    model = streamprune.load(twice.out, dtype=torch.float32)
    assert model.num_parameters() == result.parameters_after < result.parameters_before
    assert json.loads((twice.out / "config.json").read_text())["model_type"].count("streamprune_") == 1
    tokens = IDS.repeat(2, 1)
    with torch.no_grad():
        logits = model(tokens).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.isfinite()
    found = streamprune.inspect(twice.out)
    assert found["model"]["parameters"] == result.parameters_after
    assert found["job"]["state"] == "finished"


@pytest.mark.check("reload after save_pretrained")
@pytest.mark.parametrize("name", TINY)
def test_save_pretrained_keeps_it_loadable(name: str, pruned: Tiny, tmp_path: Path) -> None:
    model = streamprune.load(pruned(name), dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    again = streamprune.load(tmp_path / "saved", dtype=torch.float32)
    saved, before = again.state_dict(), model.state_dict()
    assert saved.keys() == before.keys()
    assert all(torch.equal(saved[name], before[name]) for name in before)
    with torch.no_grad():
        # Products may round differently where weights are aligned differently in memory.
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)


def test_save_pretrained_takes_the_modelling_file_along(pruned: Tiny, elsewhere: Elsewhere, tmp_path: Path) -> None:
    model = streamprune.load(pruned("llama"), dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    code, said = elsewhere(LOAD, "remote", tmp_path / "saved", tmp_path / "remote.pt")
    assert code == 0, said
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "remote.pt"), model(IDS).logits)


@pytest.mark.parametrize(
    ("name", "declared"),
    [
        ("llama", None),
        ("qwen2", "PreTrainedTokenizerFast"),
        ("mistral", "LlamaTokenizerFast"),
        ("opt", "GPT2Tokenizer"),
    ],
)
def test_the_tokenizer_stays_what_it_is(name: str, declared: str | None, configured: Make, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = make_tiny(tmp_path / "model", name)
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": declared} if declared else {}))
    config = configured(path, ratio=0.3, recipe="magnitude", round_to=1)
    plan = tmp_path / "plan.json"
    kept = {f"blocks.{b}.{k}": {"keep": 1 + b if k == "ffn" else 2} for b in range(3) for k in ("attention", "ffn")}
    plan.write_text(json.dumps({"format": "streamprune-plan-1", "ratio": 0.3, "sites": kept}))
    streamprune.prune(replace(config, plan=plan))
    before, after = AutoTokenizer.from_pretrained(path), AutoTokenizer.from_pretrained(config.out)
    assert type(after) is type(before)
    words = "hello, world. a  b"
    assert after(words)["input_ids"] == before(words)["input_ids"]


TOKENIZE = """
import sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], **({} if sys.argv[2] == "bare" else {"trust_remote_code": False}))
assert "streamprune" not in sys.modules
assert not any("modeling_streamprune" in name for name in sys.modules)
print("ids", tokenizer("hello, world")["input_ids"])
"""
LONG = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
ROTATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("llama", {"rope_theta": 5e4}),
    "linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5e4}),
    "yarn": ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_theta": 5e4}),
    "llama3": (
        "llama",
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
            "rope_theta": 5e4,
        },
    ),
    "longrope": (
        "phi3",
        {"rope_scaling": {"type": "longrope", **LONG}, "rope_theta": 5e4, "original_max_position_embeddings": 32},
    ),
}


def uneven_plan(folder: Path) -> Path:
    """A plan whose blocks differ in width, whatever the model: of every FFN 1 to 3 channels, of attention one group."""
    kept = {f"blocks.{b}.{k}": {"keep": 1 + b if k == "ffn" else 1} for b in range(3) for k in ("attention", "ffn")}
    path = folder / "plan.json"
    path.write_text(json.dumps({"format": "streamprune-plan-1", "ratio": 0.3, "sites": kept}))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("name", "fields"), ROTATIONS.values(), ids=ROTATIONS)
def test_the_tokenizer_needs_no_code(
    name: str, fields: dict[str, Any], configured: Make, elsewhere: Elsewhere, tmp_path: Path
) -> None:
    """Whatever rotary embedding the config has, in the form that models are published with."""
    from transformers import AutoTokenizer

    path = make_tiny(tmp_path / "model", name)
    config = json.loads((path / "config.json").read_text())
    del config["rope_parameters"]
    (path / "config.json").write_text(json.dumps({**config, **fields}))
    job = replace(configured(path, recipe="magnitude"), plan=uneven_plan(tmp_path))
    streamprune.prune(job)
    written = json.loads((job.out / "config.json").read_text())
    assert written["model_type"] == f"streamprune_{name}"
    source, found = (open_skeleton(folder, torch.device("cpu"), "float32").config for folder in (path, job.out))
    assert found.rope_parameters == source.rope_parameters
    expected = AutoTokenizer.from_pretrained(path)("hello, world")["input_ids"]
    for kind in ("bare", "untrusted"):
        code, said = elsewhere(TOKENIZE, job.out, kind)
        assert code == 0, said
        assert f"ids {expected}\n" in said
        # On a terminal transformers asks about the config's class before it does without.
        assert kind == "bare" or "custom code" not in said


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["free", "uniform", "decilm"])
def test_the_tokenizer_of_a_layout_needs_no_code(
    layout: str, tiny: Tiny, configured: Make, elsewhere: Elsewhere
) -> None:
    from transformers import AutoTokenizer

    job = configured(tiny("llama"), layout=layout, recipe="sobp")
    streamprune.prune(job)
    expected = AutoTokenizer.from_pretrained(tiny("llama"))("hello, world")["input_ids"]
    for kind in ("bare", "untrusted"):
        code, said = elsewhere(TOKENIZE, job.out, kind)
        assert code == 0, said
        assert f"ids {expected}\n" in said
        # transformers reads the config before the tokenizer's, and a bare call asks about the config's class.
        assert ("custom code" in said) == (kind == "bare" and layout != "uniform")


RUN_TIME: dict[str, Any] = {
    "attn_implementation": "flash_attention_2",
    "_attn_implementation": "flash_attention_2",
    "_attn_implementation_internal": "flash_attention_2",
    "_attn_implementation_autoset": True,
    "experts_implementation": "grouped_mm_of_mine",
    "_experts_implementation": "grouped_mm_of_mine",
}


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "fields"), [("free", RUN_TIME), ("uniform", {"output_attentions": True})])
def test_how_somebody_ran_the_model_is_no_part_of_a_checkpoint(
    layout: Any, fields: dict[str, Any], tiny: Tiny, configured: Make, elsewhere: Elsewhere, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(tiny("qwen3_moe"), tmp_path / "model"))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **fields}))
    with torch.no_grad():
        assert torch.equal(streamprune.load(path)(IDS).logits, streamprune.load(tiny("qwen3_moe"))(IDS).logits)
    jobs = [configured(source, f"out{n}", layout=layout) for n, source in enumerate((path, tiny("qwen3_moe")))]
    for job in jobs:
        streamprune.prune(job)
    written, plain = (json.loads((job.out / "config.json").read_text()) for job in jobs)
    assert written == plain
    assert not written.keys() & fields.keys()
    code, said = elsewhere(LOAD, "remote", jobs[0].out, tmp_path / "remote.pt")
    assert code == 0, said


@pytest.mark.parametrize("name", ["llama", "falcon"])
def test_a_tied_head_that_is_stored_and_differs_is_not_tied(name: str, configured: Make, tmp_path: Path) -> None:
    path = make_tiny(tmp_path / "model", name, tie_word_embeddings=False)
    config = json.loads((path / "config.json").read_text())
    # Falcon's config class ties where the file says nothing.
    config.pop("tie_word_embeddings", None)
    said = {} if name == "falcon" else {"tie_word_embeddings": True}
    (path / "config.json").write_text(json.dumps({**config, **said}))
    job = configured(path)
    dense = streamprune.load(path, dtype=torch.float32)
    tokens = IDS
    with torch.no_grad():
        logits = dense(tokens).logits
    skeleton = open_skeleton(path, torch.device("cpu"), "float32")
    assert not skeleton.outside.tied
    with skeleton.embedding() as embedding, skeleton.head() as head, torch.no_grad():
        x = embedding(tokens)
        for index in range(len(skeleton)):
            block = skeleton.build_block(index, skeleton.read_block(index))
            x = block(x, skeleton.arguments(*tokens.shape)[index])
        torch.testing.assert_close(head(x), logits, rtol=1e-4, atol=1e-4)
    streamprune.prune(job)
    assert json.loads((job.out / "config.json").read_text())["tie_word_embeddings"] is False


def test_names_without_the_models_prefix(tiny: Tiny, configured: Make, tmp_path: Path) -> None:
    path = make_tiny(tmp_path / "model", "gpt2")
    tensors: dict[str, torch.Tensor] = {}
    for shard in path.glob("*.safetensors"):
        tensors |= load_file(shard)
        shard.unlink()
    (path / "model.safetensors.index.json").unlink(missing_ok=True)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(
        {**bare, "h.0.attn.bias": torch.ones(1, 1, 64, 64)}, path / "model.safetensors", metadata={"format": "pt"}
    )
    for source, out in ((tiny("gpt2"), "full"), (path, "bare")):
        streamprune.prune(configured(source, out))
    full, found = (contents(configured(path, out).out) for out in ("full", "bare"))
    for name in full:
        if name.endswith("safetensors"):
            assert full[name] == found[name]


def test_masks_that_old_checkpoints_carry_are_not_read(configured: Make, tmp_path: Path) -> None:
    path = make_tiny(tmp_path / "model", "gpt_neox")
    plain = configured(path, "plain")
    streamprune.prune(plain)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    place = "gpt_neox.layers.0.attention."
    shard = path / index["weight_map"][f"{place}dense.weight"]
    # As Pythia's files have them.
    carried = {
        f"{place}bias": torch.ones(1, 1, 64, 64, dtype=torch.bool),
        f"{place}masked_bias": torch.tensor(-1e9),
        f"{place}rotary_emb.inv_freq": torch.ones(1),
    }
    save_file({**load_file(shard), **carried}, shard, metadata={"format": "pt"})
    index["weight_map"] |= dict.fromkeys(carried, shard.name)
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    old = configured(path, "old")
    streamprune.prune(old)
    for file in plain.out.glob("*.safetensors"):
        assert file.read_bytes() == (old.out / file.name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_dtype_is_kept(dtype: torch.dtype, tiny: Tiny, configured: Make) -> None:
    config = configured(tiny("llama", dtype))
    streamprune.prune(config)
    model = streamprune.load(config.out, dtype="auto")
    assert {p.dtype for p in model.parameters()} == {dtype}
    # Compensation and re-fitting were rounded once; what was measured is what was written.
    evaluation = streamprune.evaluate(config.out, config.calibration or Path(), seq_len=24)
    assert evaluation.perplexity > 1


def test_what_is_not_pruned_is_copied_bit_by_bit(tiny: Tiny, configured: Make) -> None:
    path = tiny("llama", torch.bfloat16)
    config = configured(path, recipe="magnitude", dtype="float16")
    streamprune.prune(config)
    dense, pruned = (
        streamprune.load(path, dtype="auto").state_dict(),
        streamprune.load(config.out, dtype="auto").state_dict(),
    )
    for name in dense:
        if "norm" in name or "embed" in name:
            assert torch.equal(dense[name], pruned[name])


def test_out_holds_what_a_checkpoint_needs(tiny: Tiny, configured: Make) -> None:
    config = configured(tiny("llama"), ratio=0.35)
    streamprune.prune(config)
    names = set(contents(config.out))
    assert {
        "README.md",
        "SHA256SUMS",
        "config.json",
        "generation_config.json",
        *(f"model-0000{number}-of-00005.safetensors" for number in range(1, 6)),
        "model.safetensors.index.json",
        "modeling_streamprune.py",
        "curves.json",
        "report.json",
        "tokenizer.json",
        "tokenizer_config.json",
    } == names
    index = json.loads((config.out / "model.safetensors.index.json").read_text())
    # One shard a block.
    for block in range(3):
        shards = {s for n, s in index["weight_map"].items() if n.startswith(f"model.layers.{block}.")}
        assert shards == {f"model-0000{block + 2}-of-00005.safetensors"}
    report = json.loads((config.out / "report.json").read_text())
    for site in report["sites"]:
        assert {"site", "units", "kept", "error", "damping", "seconds"} <= site.keys()
        assert 0 <= site["error"] < 1


def test_a_shard_is_written_under_one_other_name_and_readable_by_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill in the midst of it leaves nothing that the next attempt does not replace."""
    from safetensors.torch import load_file

    tensors = {
        "a": torch.arange(3, dtype=torch.bfloat16),
        "b": torch.randn(4, 5).T,
        "ünïcode": torch.randn(2, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5, dtype=torch.float16),
    }
    seen = set()

    def looked(tensor: torch.Tensor) -> memoryview:
        seen.update(path.name for path in tmp_path.iterdir())
        return tensor_bytes(tensor)

    monkeypatch.setattr(checkpoint, "tensor_bytes", looked)
    checkpoint.write_shard(tmp_path / "x.safetensors", tensors)
    assert seen == {"x.safetensors.tmp"}
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    (tmp_path / "ordinary").write_text("")
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@pytest.mark.slow
def test_uneven_pruned_model_cannot_be_made_uniform(tiny: Tiny, configured: Make) -> None:
    once = configured(tiny("llama"), "once", ratio=0.35)
    streamprune.prune(once)
    with pytest.raises(ConfigError, match="layout needs blocks of equal widths"):
        streamprune.prune(configured(once.out, "twice", layout="uniform"))
