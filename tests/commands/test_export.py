"""GGUF against llama.cpp itself: logits, tokens, perplexity; and what it cannot say is refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import weakref
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import EXAMPLE, EXAMPLE_TEXT, TINY, edit_tensors, make_tiny, shared
from gguf_reference import TEXT, VOCABULARY, opened, runtime_logits, stock_logits, write_byte_tokenizer
from streamprune_cli import main

import streamprune
from streamprune.errors import CheckpointError, ConfigError, NumericalError, ResumeError
from streamprune.model.checkpoint import Checkpoint
from streamprune.model.names import canonical
from streamprune.system.progress import Callback, Event

pytest.importorskip("gguf", reason="the gguf package is not here")
Make = Callable[..., Path]
# transformers' qwen2 tokenizer adds a token of its own.
SIZES = {"vocab_size": VOCABULARY + 8, "hidden_size": 64}
WINDOW = random.Random(3).choices(range(VOCABULARY), k=48)
# Of the logits' standard deviation, at the worst logit; llama.cpp rounds activations as it does weights.
PRECISION = {"f32": 1e-4, "f16": 6e-3, "bf16": 3e-2, "q8_0": 1e-1}


@pytest.fixture(scope="module")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """`byte_model("llama")`: a tiny checkpoint with a byte-level tokenizer; not to be written to."""
    made: dict[str, Path] = {}

    def get(name: str, **changes: Any) -> Path:
        key = repr((name, changes))
        if key not in made:
            # llama.cpp reads more into some models' names.
            made[key] = make_tiny(tmp_path_factory.mktemp("model"), name, **{**SIZES, **changes})
            write_byte_tokenizer(made[key])
        return made[key]

    return get


@pytest.fixture
def pruned(configured: Callable[..., streamprune.Config]) -> Make:
    """`pruned(model, "free")`: 20 % shorter by magnitude; free leaves the first block as it is."""

    def make(model: Path, layout: str) -> Path:
        blocks = (1, 3) if layout == "free" else None
        config = configured(
            model, f"{layout}-{model.name}", recipe="magnitude", ratio=0.2, layout=layout, blocks=blocks
        )
        return Path(streamprune.prune(config).out)

    return make


def spread(exported: Path, folder: Path, context: int) -> float:
    """The worst difference of a logit between the two runtimes, over the logits' standard deviation."""
    expected = stock_logits(folder, WINDOW[:context])
    return float(np.abs(runtime_logits(exported, WINDOW[:context]) - expected).max() / expected.std())


CASES = [
    ("llama", {}, ("llama", "llama", "deci")),
    ("llama-biased", {}, ("llama", "llama", None)),
    ("llama-biased", {"attention_bias": False}, ("llama", "llama", "deci")),
    ("mistral", {}, ("llama", "llama", "deci")),
    ("qwen2", {}, ("qwen2", "qwen2", None)),
    ("qwen3", {}, ("qwen3", "qwen3", None)),
    ("qwen3", {"tie_word_embeddings": True}, ("qwen3", "qwen3", "openelm")),
    ("gpt2", {}, ("gpt2", "gpt2", None)),
    ("granite", {}, ("granite", "granite", None)),
    (
        "smollm3",
        {"no_rope_layer_interval": 4, "num_hidden_layers": 5, "use_sliding_window": False, "layer_types": None},
        ("smollm3", "smollm3", None),
    ),
    ("gemma2", {"query_pre_attn_scalar": 8}, ("gemma2", "gemma2", None)),
    (
        "gemma3",
        {
            "query_pre_attn_scalar": 8,
            "num_hidden_layers": 7,
            "final_logit_softcapping": None,
            "layer_types": [*["sliding_attention"] * 5, "full_attention", "sliding_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 50000.0, "factor": 2.0},
            },
        },
        ("gemma3", "gemma3", None),
    ),
    ("olmo2", {}, ("olmo2", "olmo2", None)),
    ("phi3", {}, ("phi3", "phi3", None)),
    ("starcoder2", {}, ("starcoder2", "starcoder2", None)),
    ("mixtral", {}, ("llama", "llama", None)),
    ("qwen3_moe", {"mlp_only_layers": []}, ("qwen3moe", "qwen3moe", None)),
    ("olmoe", {"num_key_value_heads": 4}, ("olmoe", "olmoe", None)),
]
# llama.cpp takes GELU from a table of 16-bit numbers.
TABLED = {"gpt2": 2e-3, "starcoder2": 5e-3, "gemma2": 2e-2, "gemma3": 2e-2}


@pytest.mark.parametrize(("name", "changes", "architectures"), CASES, ids=lambda value: str(value))
def test_logits_agree(
    name: str,
    changes: dict[str, Any],
    architectures: tuple[str | None, ...],
    byte_model: Make,
    pruned: Make,
    tmp_path: Path,
) -> None:
    if name not in TINY:
        pytest.skip(f"no {name} here")
    model, out = byte_model(name, **changes), tmp_path / "model.gguf"
    for layout, architecture in zip(("dense", "uniform", "free"), architectures, strict=True):
        folder = model if layout == "dense" else pruned(model, layout)
        if architecture is None:
            with pytest.raises(CheckpointError, match="--layout uniform"):
                streamprune.export_gguf(folder, out)
            continue
        done = streamprune.export_gguf(folder, out, dtype="f32")
        assert done.architecture == architecture
        assert spread(out, folder, done.context) < TABLED.get(name, PRECISION["f32"]), layout


@pytest.mark.parametrize(("name", "changes"), [("mixtral", {}), ("qwen3_moe", {"mlp_only_layers": []})])
def test_logits_of_fewer_experts_agree(
    name: str, changes: dict[str, Any], byte_model: Make, configured: Callable[..., streamprune.Config], tmp_path: Path
) -> None:
    config = configured(byte_model(name, **changes), recipe="reap", ratio=None, experts="3", layout="uniform")
    streamprune.prune(config)
    done = streamprune.export_gguf(config.out, tmp_path / "model.gguf", dtype="f32")
    assert spread(done.path, config.out, done.context) < PRECISION["f32"]


@pytest.mark.parametrize("layout", ["dense", "free"])
@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_logits_agree_within_the_dtype(layout: str, dtype: str, pruned: Make, tmp_path: Path) -> None:
    # Trained weights: random ones make attention so sharp that any rounding turns it.
    folder = EXAMPLE if layout == "dense" else pruned(EXAMPLE, layout)
    done = streamprune.export_gguf(folder, tmp_path / "model.gguf", dtype=dtype)
    assert done.architecture == ("llama" if layout == "dense" else "deci")
    # More than float32 would leave: it really was rounded.
    assert 1e-4 < spread(done.path, folder, done.context) < PRECISION[dtype]
    assert done.size == done.path.stat().st_size


ROPE = {"rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 256}
LLAMA3 = {**ROPE, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("name", "rope"),
    [
        ("llama", LLAMA3),
        ("llama", {**ROPE, "rope_type": "linear"}),
        ("llama", {**ROPE, "rope_type": "yarn"}),
        ("qwen3", {**ROPE, "rope_type": "yarn"}),
    ],
    ids=lambda value: value if isinstance(value, str) else value["rope_type"],
)
def test_rotary_embeddings_agree(name: str, rope: dict[str, Any], byte_model: Make, tmp_path: Path) -> None:
    folder = byte_model(name, rope_parameters=rope, max_position_embeddings=1024)
    done = streamprune.export_gguf(folder, tmp_path / "model.gguf", dtype="f32")
    assert spread(done.path, folder, done.context) < PRECISION["f32"]


def split_tokenizer(folder: Path, steps: tuple[str, ...], whole: bool) -> None:
    from tokenizers import Regex, pre_tokenizers

    from streamprune.commands.export.vocabulary import GPT2_SPLIT

    assert steps[-1] == "bytes"
    parts: list[Any] = [
        pre_tokenizers.Digits(individual_digits=True)
        if step == "digits"
        else pre_tokenizers.Split(Regex(step), "isolated", False)
        for step in steps[:-1]
        if step != GPT2_SPLIT
    ]
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=GPT2_SPLIT in steps))
    write_byte_tokenizer(folder, pre_tokenizers.Sequence(parts), ignore_merges=whole)


def test_text_is_cut_alike(tmp_path: Path) -> None:
    from streamprune.commands.export.vocabulary import SPLITS

    texts = [TEXT, "".join(random.Random(0).choices("aAbZé 123'stll\n\t.,!_()", k=2000))]
    folder = make_tiny(tmp_path / "model", "llama", **SIZES)
    for (steps, whole), name in SPLITS.items():
        split_tokenizer(folder, steps, whole)
        model = opened(streamprune.export_gguf(folder, tmp_path / f"{name}.gguf").path)
        assert model.metadata("tokenizer.ggml.pre") == name
        for text in texts:
            assert model.tokenize(text.encode(), add_bos=False, special=False) == tokens(folder, text), name
        model.close()


def tokens(folder: Path, text: str, **options: Any) -> list[int]:
    from streamprune.model.tokenizer import load_tokenizer

    ids: list[int] = load_tokenizer(folder)(text, verbose=False, add_special_tokens=False, **options)["input_ids"]
    return ids


@pytest.mark.parametrize(
    ("name", "text", "bos"),
    [
        ("docs-llama-7m", "docs-valid.txt", False),
        ("stories260K", "tinystories-valid.txt", True),
        ("babyllama-tok361-0.9M", "tinystories-valid.txt", True),
    ],
)
def test_trained_models_read_and_continue_text_alike(name: str, text: str, bos: bool, tmp_path: Path) -> None:
    folder = shared("models", name)
    sample = shared("text", text).read_text()[:50_000] + TEXT
    done = streamprune.export_gguf(folder, tmp_path / "model.gguf", dtype="f32")
    model = opened(done.path)
    ids = tokens(folder, sample)
    assert model.tokenize(sample.encode(), add_bos=False, special=False) == ids
    assert (model.tokenize(b"A", add_bos=True)[:1] == [model.bos]) == bos
    assert model.detokenize(ids[:500]).decode("utf-8", "ignore").strip()[:400] == sample.strip()[:400]
    model.close()
    # llama.cpp rounds probabilities in its softmax.
    expected = stock_logits(folder, ids[:48])
    assert np.abs(runtime_logits(done.path, ids[:48]) - expected).max() < 1e-3 * expected.std()


def gemma_like(tokenizer: dict[str, Any]) -> None:
    tokenizer["normalizer"] = tokenizer["normalizer"]["normalizers"][1]
    tokenizer["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    }


def test_a_text_without_a_space_before_it(tmp_path: Path) -> None:
    folder = edited(shared("models", "stories260K"), tmp_path / "model", gemma_like)
    model = opened(streamprune.export_gguf(folder, tmp_path / "model.gguf").path)
    for text in ("Once upon a time", " two  spaces "):
        assert model.tokenize(text.encode(), add_bos=False, special=False) == tokens(folder, text)
    model.close()


def test_perplexity_agrees(tmp_path: Path) -> None:
    done = streamprune.export_gguf(EXAMPLE, tmp_path / "model.gguf")
    text = tmp_path / "text.txt"
    text.write_text((EXAMPLE_TEXT / "validation.txt").read_text()[:6000])
    expected = streamprune.evaluate(EXAMPLE, text, seq_len=128)
    ids = tokens(EXAMPLE, text.read_text())
    losses = []
    for begin in range(0, len(ids) // 128 * 128, 128):
        window = ids[begin : begin + 128]
        scores = torch.log_softmax(torch.from_numpy(runtime_logits(done.path, window)), -1)
        losses += [-scores[i, token].item() for i, token in enumerate(window[1:])]
    assert len(losses) == expected.tokens
    assert np.exp(np.mean(losses)) == pytest.approx(expected.perplexity, rel=1e-3)


def test_what_the_tokenizer_says_arrives(byte_model: Make, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(byte_model("llama"), folder)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(
        {**tokenizer["added_tokens"][0], "id": VOCABULARY, "content": "<x>", "special": False}
    )
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    model = opened(streamprune.export_gguf(folder, tmp_path / "model.gguf").path)
    assert model.metadata("tokenizer.chat_template") == template
    assert (model.bos, model.eos) == (0, 1)
    assert model.tokenize(b"a<x>b") == [0, *tokens(folder, "a<x>b")]
    assert VOCABULARY in tokens(folder, "a<x>b")
    model.close()


def test_holds_one_tensor_at_a_time(byte_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, alive = Checkpoint.read, []

    def watched(self: Checkpoint, name: str, *args: Any) -> torch.Tensor:
        assert not [each for each in alive if each() is not None], f"{name} is read while another tensor is held"
        tensor = read(self, name, *args)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(Checkpoint, "read", watched)
    done = streamprune.export_gguf(byte_model("llama"), tmp_path / "model.gguf", dtype="q8_0")
    assert len(alive) > 20
    assert done.notes == [
        "3 tensors, such as blk.0.ffn_down.weight, are f16 instead of q8_0: their rows are no multiple of 32 long"
    ]


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0"])
def test_rows_are_packed_in_pieces_as_at_once(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import quantize

    from streamprune.commands.export import tensors

    monkeypatch.setattr(tensors, "_CHUNK", 200)
    tensor, kind = torch.randn(17, 64), GGMLQuantizationType[dtype.upper()]
    assert tensors.pack(tensor, kind, "x").tobytes() == quantize(tensor.numpy(), kind).tobytes()


def _activated(values: torch.Tensor, name: str) -> torch.Tensor:
    from transformers.activations import ACT2FN

    with torch.no_grad():
        return ACT2FN[name](values)


def test_names_of_one_function_are_one_name() -> None:
    from transformers.activations import ACT2CLS

    values = torch.linspace(-12, 12, 4801)
    # xielu computes in bfloat16.
    outputs = {name: _activated(values, name) for name in ACT2CLS if name != "xielu"}
    for one, other in combinations(outputs, 2):
        alike = torch.allclose(outputs[one], outputs[other], rtol=1e-5, atol=1e-6)
        assert alike == (canonical(one) == canonical(other)), (one, other)


def test_an_activation_by_another_name_gives_the_same_file(byte_model: Make, tmp_path: Path) -> None:
    files = []
    for activation in ("silu", "swish"):
        model = tmp_path / activation / "model"
        shutil.copytree(byte_model("llama"), model)
        config = json.loads((model / "config.json").read_text())
        assert config["hidden_act"] == "silu"
        (model / "config.json").write_text(json.dumps({**config, "hidden_act": activation}))
        files.append(streamprune.export_gguf(model, tmp_path / f"{activation}.gguf").path.read_bytes())
    assert files[0] == files[1]


def test_refuses_what_llama_cpp_cannot_say(byte_model: Make, tiny: Make, tmp_path: Path) -> None:
    cases = [
        (tiny("opt"), "no GGUF architecture for model_type 'opt'"),
        (tiny("llama"), "WordLevel"),
        (byte_model("llama", hidden_act="gelu"), "activation is 'gelu'"),
        (byte_model("gpt2", activation_function="gelu"), "activation is 'gelu'; .* supports only 'gelu_new'"),
        (byte_model("qwen3", attention_bias=True), r"self_attn\.q_proj has a bias"),
        (byte_model("llama", rope_parameters={**ROPE, "rope_type": "dynamic"}), "rotary embedding .*'dynamic'"),
        (byte_model("qwen3", rope_parameters=LLAMA3), "rotary embedding .*'llama3'"),
        (
            byte_model("qwen3", rope_parameters={**ROPE, "rope_type": "yarn", "beta_fast": 4}),
            "rotary embedding .*'beta_fast': 4",
        ),
        (
            byte_model("llama", rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
            "'partial_rotary_factor': 0.5",
        ),
        (byte_model("llama", vocab_size=VOCABULARY - 1), "do not match"),
    ]
    for folder, message in cases:
        with pytest.raises(CheckpointError, match=message):
            streamprune.export_gguf(folder, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_added_tokens_beyond_the_vocabulary_are_left_out(byte_model: Make, tmp_path: Path) -> None:
    def add(tokenizer: dict[str, Any]) -> None:
        ids = [each["id"] for each in tokenizer["added_tokens"]] + list(tokenizer["model"]["vocab"].values())
        assert max(ids) == VOCABULARY - 1
        tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": VOCABULARY, "content": "<image>"})

    plain = byte_model("llama", vocab_size=VOCABULARY)
    exported = streamprune.export_gguf(edited(plain, tmp_path / "model", add), tmp_path / "image.gguf")
    assert f"token '<image>' ({VOCABULARY}) is left out: the model has {VOCABULARY} tokens" in exported.notes
    same = edited(plain, tmp_path / "plain" / "model", lambda tokenizer: None)
    assert exported.path.read_bytes() == streamprune.export_gguf(same, tmp_path / "plain.gguf").path.read_bytes()


def edited(source: Path, folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    shutil.copytree(source, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    change(tokenizer)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def unjoined(tokenizer: dict[str, Any]) -> None:
    tokenizer["model"]["merges"].pop()


def scattered(tokenizer: dict[str, Any]) -> None:
    merges = tokenizer["model"]["merges"]
    pieces = ["".join(pair) for pair in merges]
    merges.append(merges.pop(next(i for i, piece in enumerate(pieces) if piece in pieces[:i])))


def byteless(tokenizer: dict[str, Any]) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["?!"] = vocabulary.pop("<0xFF>")


@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        ("bytes", lambda t: t["pre_tokenizer"].update(add_prefix_space=True), "cannot split the text"),
        ("bytes", lambda t: t.update(normalizer={"type": "Lowercase"}), "cannot split the text"),
        ("bytes", lambda t: t["model"].update(ignore_merges=True), "cannot split the text"),
        ("bytes", lambda t: t["model"].update(byte_fallback=True), "cannot split the text"),
        ("bytes", lambda t: t["model"].update(merges=[]), "no merges"),
        ("bytes", lambda t: t["model"].update(end_of_word_suffix="</w>"), "dropout, prefixes or suffixes"),
        ("stories260K", unjoined, "no SentencePiece scores"),
        ("stories260K", scattered, "no SentencePiece scores"),
        ("stories260K", byteless, "lacks pieces for some bytes"),
    ],
)
def test_refuses_tokenizers_that_llama_cpp_would_read_differently(
    model: str, change: Callable[[dict[str, Any]], Any], message: str, byte_model: Make, tmp_path: Path
) -> None:
    folder = edited(byte_model("llama") if model == "bytes" else shared("models", model), tmp_path / "model", change)
    with pytest.raises(CheckpointError, match=message):
        streamprune.export_gguf(folder, tmp_path / "model.gguf")


def test_bad_files_and_dtypes(byte_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = byte_model("llama")
    (tmp_path / "folder.gguf").mkdir()
    for out, options, message in (
        (tmp_path / "model.bin", {}, "file name ending in .gguf"),
        (tmp_path / "folder.gguf", {}, "file name ending in .gguf"),
        (tmp_path / "none" / "model.gguf", {}, "in an existing directory"),
        (tmp_path / "model.gguf", {"dtype": "q4_k"}, "must be one of f32, f16, bf16, q8_0"),
    ):
        with pytest.raises(ConfigError, match=message):
            streamprune.export_gguf(model, out, **options)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'streamprune\[gguf\]'"):
        streamprune.export_gguf(model, tmp_path / "model.gguf")


def test_a_failure_leaves_the_older_file(byte_model: Make, tmp_path: Path) -> None:
    folder, out = tmp_path / "model", tmp_path / "model.gguf"
    shutil.copytree(byte_model("llama"), folder)
    out.write_bytes(b"older")
    edit_tensors(folder, lambda tensors: [t.view(-1)[:1].fill_(1e6) for n, t in tensors.items() if "2.mlp.up" in n])
    with pytest.raises(NumericalError, match="export with --dtype bf16"):
        streamprune.export_gguf(folder, out)
    assert out.read_bytes() == b"older"
    assert {path.name for path in tmp_path.iterdir()} == {"model", "model.gguf"}
    assert streamprune.export_gguf(folder, out, dtype="bf16").size == out.stat().st_size > 10_000


def test_of_two_to_one_file_the_second_is_refused(byte_model: Make, tmp_path: Path) -> None:
    model, out = byte_model("llama"), tmp_path / "model.gguf"
    refused: list[ResumeError] = []

    def second(event: Event) -> None:
        if event.kind == "phase":
            with pytest.raises(ResumeError, match=r"another process .*model\.gguf\.lock is locked") as caught:
                streamprune.export_gguf(model, out)
            refused.append(caught.value)

    streamprune.export_gguf(model, out, progress=Callback(second))
    assert len(refused) == 1
    alone = streamprune.export_gguf(model, tmp_path / "alone.gguf").path
    assert out.read_bytes() == alone.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"model.gguf", "alone.gguf"}


def test_what_a_killed_one_left_goes_with_the_next(byte_model: Make, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    process = os.fork()
    if not process:
        streamprune.export_gguf(byte_model("llama"), out, progress=Callback(lambda event: os._exit(0)))
    os.waitpid(process, 0)
    assert {path.name for path in tmp_path.iterdir()} == {"model.gguf.tmp", "model.gguf.lock"}
    streamprune.export_gguf(byte_model("llama"), out)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_command(byte_model: Make, tmp_path: Path) -> None:
    out = str(tmp_path / "model.gguf")
    result = CliRunner().invoke(main, ["export", str(byte_model("llama")), out, "--dtype", "q8_0", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["path"], found["architecture"], found["dtype"], found["context"]) == (out, "llama", "q8_0", 64)
    result = CliRunner().invoke(main, ["export", str(byte_model("llama")), out, "--dtype", "q4"])
    assert result.exit_code == 2
    assert "dtype is 'q4'" in result.output
