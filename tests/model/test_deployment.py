"""What the model card and the report say about a result: how to run it, what it weighs, what it was calibrated on."""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, TINY, make_tiny
from gguf_reference import VOCABULARY, write_byte_tokenizer

import streamprune
from streamprune.jobs.reports import describe
from streamprune.model.checkpoint import Checkpoint
from streamprune.model.deployment import REFUSED, SERVED, Way, ways, weights
from streamprune.model.site import Site
from streamprune.model.skeleton import Skeleton, open_skeleton

Make = Callable[..., Any]
DOCS = (ROOT / "docs" / "deploy.md").read_text()


def opened(path: Path) -> Skeleton:
    return open_skeleton(path, torch.device("cpu"), "float32")


def by_runtime(path: Path) -> dict[str, Way]:
    return {way.runtime: way for way in ways(opened(path))}


def plan(path: Path, sites: list[Site], keep: Callable[[Site], int]) -> Path:
    kept = {site.name: {"keep": keep(site)} for site in sites}
    path.write_text(json.dumps({"format": "streamprune-plan-1", "ratio": 0.3, "sites": kept}))
    return path


def uneven(site: Site) -> int:
    """Fewer units in the first block than in others."""
    return site.units if site.block else max(1, site.units // 2)


@pytest.fixture
def pruned(tiny: Make, configured: Make, tmp_path: Path) -> Callable[..., Path]:
    """A pruned model of that kind; its first block is narrower except in the uniform layout."""

    def get(name: str, layout: str = "free", keep: Callable[[Site], int] = uneven, **changes: Any) -> Path:
        model = tiny(name)
        if layout != "uniform":  # equal blocks are a stock llama; decilm's have equally many heads
            chosen = keep if layout == "free" else lambda site: site.units if site.kind == "attention" else keep(site)
            changes |= {"plan": plan(tmp_path / "plan.json", opened(model).all_sites(), chosen), "ratio": None}
        config = configured(model, f"{name}-{layout}", recipe="magnitude", layout=layout, **changes)
        streamprune.prune(config)
        return Path(config.out)

    return get


def commands(card: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)\n```$", card, re.DOTALL | re.MULTILINE)


# Commands.


@pytest.mark.parametrize(
    "layout", ["free", *(pytest.param(each, marks=pytest.mark.slow) for each in ("uniform", "decilm"))]
)
def test_the_commands_for_transformers_run(layout: str, pruned: Callable[..., Path]) -> None:
    """Copied from the card, in a process that knows nothing of streamprune; they print what the model writes."""
    out = pruned("llama", layout)
    (code,) = commands((out / "README.md").read_text(), "python")
    assert ("trust_remote_code=True" in code) == (layout != "uniform")
    assert ("no `trust_remote_code` is needed." in (out / "README.md").read_text()) == (layout != "uniform")
    away = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    guarded = f"import sys\nsys.modules['streamprune'] = None\n{code.replace('OUT', str(out))}"
    command = [sys.executable, "-c", guarded.replace("Once upon a time", "abc")]
    done = subprocess.run(command, capture_output=True, text=True, env=away, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    from streamprune.model.tokenizer import load_tokenizer

    tokenizer, model = load_tokenizer(out), streamprune.load(out)
    given = tokenizer("abc", return_tensors="pt")
    expected = tokenizer.decode(model.generate(**given, max_new_tokens=40)[0])
    assert done.stdout.strip() == expected.strip()


def test_vllm_and_llama_cpp_by_layout(pruned: Callable[..., Path]) -> None:
    expected = {
        "free": ("vllm serve OUT --trust-remote-code", "deci"),
        "uniform": ("vllm serve OUT", "llama"),
        "decilm": ("vllm serve OUT --trust-remote-code", "deci"),
    }
    for layout, (serve, architecture) in expected.items():
        out = pruned("llama", layout)
        found = by_runtime(out)
        assert found["vLLM"].commands == serve
        assert ("own DeciLM" in found["vLLM"].note) == (layout == "decilm")
        assert f"architecture {architecture}." in found["llama.cpp"].note
        assert "streamprune export OUT model.gguf" in found["llama.cpp"].commands
        card = (out / "README.md").read_text()
        assert commands(card, "sh") == [serve, found["llama.cpp"].commands]


@pytest.mark.slow
def test_what_each_runtime_cannot_do(pruned: Callable[..., Path], tiny: Make) -> None:
    for name, reason in (
        ("falcon", "does not call the attention interface; prune with --layout uniform."),
        ("gpt2", "leaves weights uninitialised; prune with --layout uniform."),
        ("gemma2", "does not serve it: the dense model gives NaN there too, on a CPU; not tried on a GPU."),
        ("gemma4", "cannot be told the widths of the blocks of a gemma4_text model"),
        ("qwen3_5", "do not dispatch through the attention interface"),
        ("deepseek_v3", "it takes 320, 512, 576"),
    ):
        found = by_runtime(pruned(name))
        assert not found["vLLM"].commands
        assert reason in found["vLLM"].note, name
        assert found["transformers"].commands
    without = by_runtime(pruned("llama", keep=lambda site: int(site.name != "blocks.1.attention") and site.units))
    assert "a block lacks its attention" in without["vLLM"].note
    assert "the attention of block 1 is gone as a whole" in without["llama.cpp"].note
    assert not without["llama.cpp"].commands
    mixture = by_runtime(pruned("mixtral"))
    assert mixture["vLLM"].commands == "vllm serve OUT --trust-remote-code --enforce-eager"
    assert "each on its own number of tokens, which CUDA graphs" in mixture["vLLM"].note
    assert mixture["llama.cpp"].note.startswith(
        "`streamprune export` writes no GGUF file of it: the blocks differ in width"
    )
    assert "OUT" not in mixture["llama.cpp"].note


def test_a_stock_type_that_was_not_tried_is_said_to_be_so(tiny: Make) -> None:
    for name, note in (
        ("llama", ""),
        ("qwen2_moe", ""),
        ("gpt2", "Not tried with model type gpt2."),
        ("gemma2", "With vLLM 0.32, the dense model gives NaN there too, on a CPU; not tried on a GPU."),
    ):
        found = by_runtime(tiny(name))["vLLM"]
        assert (found.commands, found.note) == ("vllm serve OUT", note)


@pytest.mark.parametrize(
    ("name", "keeps", "common"),
    [
        # 4 query heads and 2 key/value heads per block, 48 channels; all of what is not given stays.
        ("llama", {"blocks.0.ffn": 24}, 2),
        ("llama", {"blocks.0.attention": 1}, 2),
        ("llama", {"blocks.0.ffn": 23}, 1),
        ("qwen3", {"blocks.0.ffn": 24}, 2),
        ("gpt_neox", {"blocks.0.attention": 3}, 1),
        ("mixtral", {"blocks.0.ffn.1": 9}, 1),
        ("mixtral", {"blocks.0.ffn.1": 8}, 2),
    ],
)
def test_devices_for_tensor_parallelism(
    name: str, keeps: dict[str, int], common: int, pruned: Callable[..., Path]
) -> None:
    """The only key/value head is copied to all devices; other heads and all channels are split."""
    note = by_runtime(pruned(name, keep=lambda site: keeps.get(site.name, site.units)))["vLLM"].note
    if common > 1:
        assert f"Tensor parallelism: over N GPUs where N divides {common}." in note
    else:
        assert "Tensor parallelism over N GPUs needs a result of `run --tensor-parallel N`." in note


def test_heads_that_vllm_would_compute_itself(tmp_path: Path) -> None:
    """A uniform qwen2 with fewer heads, as an older version wrote it."""
    path = make_tiny(tmp_path / "model", "qwen2", num_attention_heads=2, num_key_value_heads=2, head_dim=8)
    fewer, usual = by_runtime(path), by_runtime(make_tiny(tmp_path / "usual", "qwen2"))
    assert fewer["vLLM"].commands == "vllm serve OUT --model-impl transformers"
    assert usual["vLLM"].commands == "vllm serve OUT"
    assert fewer["transformers"].note.endswith("loads the source architecture and reads head_dim loads it.")
    assert usual["transformers"].note.endswith(
        "loads it. All query heads are there, which vLLM and mlx-lm need for qwen2."
    )
    other = by_runtime(make_tiny(tmp_path / "other", "llama"))["transformers"].note
    assert other == "A stock checkpoint: everything that loads the source architecture loads it."


def test_facts_are_those_of_the_docs() -> None:
    """Model types and commands are in docs/deploy.md, where each is said to have been run or refused."""
    section = DOCS.partition("## vLLM")[2].partition("\n## ")[0]
    served, refused = section.split("Not served in the free layout:")
    rows = "\n".join(row for row in served.splitlines() if row.startswith("|") and "96 of 96" in row)
    for name in SERVED:
        assert re.search(rf"(?<![\w-]){name.removesuffix('_text')}(?![\w-])", rows), name
    for name, reason in REFUSED.items():
        row = re.search(rf"^\| {name.removesuffix('_text')} \|.*\|(.*)\|$", refused, re.MULTILINE)
        assert row, name
        assert row[1].strip().strip("`") == reason.partition("; prune with ")[2], name
    types = {fields["model_type"] for fields in TINY.values()}
    assert {*SERVED, *REFUSED} <= types
    for command in (
        "vllm serve OUT ",
        "vllm serve OUT --trust-remote-code",
        "--enforce-eager",
        "vllm serve OUT --model-impl transformers",
        "pip install 'streamprune[gguf]'",
        "streamprune export OUT model.gguf --dtype q8_0",
        'llama-cli -m model.gguf -p "Once upon a time"',
        '.from_pretrained("OUT")',
        '.from_pretrained("OUT", trust_remote_code=True)',
        '.from_pretrained("OUT", trust_remote_code=False)',
    ):
        assert command in DOCS, command


# Weights.


def test_what_it_weighs(pruned: Callable[..., Path], tmp_path: Path) -> None:
    out = pruned("llama")
    found = dict(weights(opened(out)))
    stored = sum(entry.nbytes for entry in Checkpoint(out).values())
    assert found["as written"] == stored == 2 * found["16 bits"]
    assert found["16 bits"] > found["GGUF, Q8_0"] > 0
    assert "GGUF, Q4_K_M" in found
    assert found["cache of 64 tokens, 16 bits"] == 2 * 2 * 64 * 8 * sum(
        site.units for site in opened(out).all_sites() if site.kind == "attention"
    )
    assert not any(name.startswith("GGUF") for name in dict(weights(opened(pruned("mixtral")))))


def test_q8_0_is_what_an_export_weighs(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is not here")
    out = make_tiny(tmp_path, "llama", vocab_size=VOCABULARY)
    write_byte_tokenizer(out)
    streamprune.export_gguf(out, tmp_path / "model.gguf", dtype="q8_0")
    size = sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors)
    assert dict(weights(opened(out)))["GGUF, Q8_0"] == size


# Calibration and measurements, in the card and on the page.


def test_card_and_page_say_the_same(tiny: Make, configured: Make, tmp_path: Path) -> None:
    config = configured(tiny("llama"), recipe="sobp", samples=5, seq_len=24)
    result = streamprune.prune(config)
    card = (config.out / "README.md").read_text()
    report = json.loads((config.out / "report.json").read_text())
    digest = report["job"]["inputs"]["calibration"]["1"]["sha256"]
    assert f"Calibrated on 5 windows of 24 tokens of text with SHA-256 {digest[:16]}." in card
    assert f"Fingerprint of the tokens: {result.tokens}." in card
    assert (
        "Not measured: tasks, and perplexity on other text. "
        "`streamprune eval OUT --text FILE --tasks gsm8k,ifeval` measures them."
    ) in card
    errors = [site["error"] for site in report["sites"] if site["error"]]
    assert f"{sum(errors) / len(errors):.2%} on average, at most {max(errors):.2%}" in card
    page = streamprune.report(config.out, html=tmp_path / "page.html").read_text()
    text = html.unescape(re.sub(r"</?code>", "`", page)).replace("``", "")
    for section in describe(report, config.out):
        assert f"## {section.title}\n" in card
        assert f"<h3>{section.title}</h3>" in page
        for sentence in (*section.sentences, *(way.note for way in section.ways)):
            assert sentence in card
            assert sentence in text
        for way in section.ways:
            assert way.commands in card
            assert html.escape(way.commands, quote=False).replace('"', "&#34;").replace("'", "&#39;") in page
        for name, value in section.rows:
            assert f"| {name} | {value} |" in card
            assert f'<th scope="row">{name}</th><td>{value}</td>' in page


def test_a_dataset_and_a_speed(tiny: Make, configured: Make) -> None:
    """The digest of a dataset is of a sample of its rows. A speed is that of the matrix products alone."""
    config = configured(tiny("llama"), recipe="sobp", samples=4, seq_len=12)
    streamprune.prune(config)
    report = json.loads((config.out / "report.json").read_text())
    sha256 = "0123456789abcdef" * 4
    report["job"]["inputs"]["calibration"] = {
        "1": {"dataset": "org/name#en@train", "rows": 12345, "sha256": sha256, "field": "body", "share": 0.5}
    }
    report["aim"] = {"reached": 1.5, "device": "cpu", "dtype": "float32"}
    said = " ".join(sentence for section in describe(report, config.out) for sentence in section.sentences)
    digest = (
        "dataset org/name#en@train, 12,345 rows, digest of a sample of them 0123456789abcdef (field body), share 50%."
    )
    assert f"Calibrated on 4 windows of 12 tokens of {digest}" in said
    assert "Decoding on cpu in float32: 1.50 times as fast, by the measured times of its matrix products." in said


def test_texts_of_all_kinds(tiny: Make, configured: Make, text: Path) -> None:
    def said(out: str, **changes: Any) -> str:
        config = configured(tiny("llama"), out, **{"recipe": "sobp", "samples": 4, "seq_len": 12, **changes})
        streamprune.prune(config)
        return (config.out / "README.md").read_text()

    assert "No text was read." in said("none", recipe="magnitude", calibration=None)
    assert "on 4 windows of 12 tokens, drawn uniformly from the vocabulary." in said("r", calibration="random-tokens")
    assert "on 4 windows of 12 tokens, which the source model wrote." in said("self", calibration="self")


def test_a_tuned_model_says_both(tiny: Make, configured: Make, text: Path, tmp_path: Path) -> None:
    config = configured(tiny("llama"), "pruned", recipe="sobp", samples=5, seq_len=24)
    streamprune.prune(config)
    out = tmp_path / "tuned"
    streamprune.tune(
        streamprune.TuneConfig(
            model=config.out, out=out, text=text, teacher=tiny("llama"), steps=2, samples=4, seq_len=16
        )
    )
    card = (out / "README.md").read_text()
    assert "Tuned on 4 windows of 16 tokens of text with SHA-256" in card
    assert "Calibrated on 5 windows of 24 tokens of text with SHA-256" in card
    assert re.search(
        r"Loss( of the last block)? in training: [\d.e+-]+ at first, [\d.e+-]+ at last, in nats per token\.", card
    )
    assert "Share of a site's output energy lost" in card
