"""BOS before every window: what the tokenizer decides, what windows hold, and what commands and jobs do with it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from conftest import ALPHABET, add_bos, contents, make_tiny
from safetensors.torch import load_file
from stopping import interrupted
from streamprune_cli import main

import streamprune
from streamprune import Config, TuneConfig
from streamprune.commands.tune.run import Tuning
from streamprune.errors import CalibrationError, CheckpointError, ConfigError, ResumeError
from streamprune.model.tokenizer import BOS, Bos, bos_token, encode, find_bos, load_tokenizer
from streamprune.pruning.job import Job
from streamprune.text import windows
from streamprune.text.source import Text

Make = Callable[..., Config]
Tiny = Callable[..., Path]


@pytest.fixture(scope="module")
def adding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama with a tokenizer that begins every text with BOS, token 0."""
    return add_bos(make_tiny(tmp_path_factory.mktemp("adding"), "llama"))


def edited(folder: Path, name: str, **fields: Any) -> Path:
    """Change fields of a JSON file; None removes one."""
    path = folder / name
    merged = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({key: value for key, value in merged.items() if value is not None}))
    return folder


def whole(ids: torch.Tensor) -> windows.Tokens:
    """Tokens of one document, all of whose predictions count."""
    return windows.Tokens.join([(ids, ids)])


# Windows.


@pytest.mark.parametrize("tokens", [7, 8, 13, 14, 15])
def test_windows_are_bos_and_the_text_without_a_gap(tokens: int) -> None:
    text = torch.arange(2, 2 + tokens)
    found = windows.consecutive_windows(whole(text), 8, "text", 0).tokens
    assert found.shape == (tokens // 7, 8)  # no token of the text is lost to BOS, and only the remainder is dropped
    assert found[:, 0].tolist() == [0] * len(found)
    assert torch.equal(found[:, 1:].flatten(), text[: 7 * len(found)])
    drawn = windows.sample_windows(whole(text), 200, 8, 3, "text", 0).tokens
    assert drawn.shape == (200, 8)
    assert set(drawn[:, 0].tolist()) == {0}
    assert torch.equal(drawn[:, 2:], drawn[:, 1:-1] + 1)
    assert {*drawn[:, 1].tolist()} == {*range(2, 2 + tokens - 6)}  # as far as the last token


def test_too_short_a_text_is_refused_by_what_windows_hold_of_it() -> None:
    text = whole(torch.arange(2, 8))
    for cut in (
        lambda: windows.consecutive_windows(text, 8, "text", 0),
        lambda: windows.sample_windows(text, 1, 8, 0, "text", 0),
    ):
        with pytest.raises(CalibrationError, match="text has 6 tokens; one window needs 7"):
            cut()


def test_a_text_that_begins_with_bos_does_not_have_it_twice() -> None:
    text = torch.tensor([0, 5, 6, 7, 8, 0, 9])
    assert windows.consecutive_windows(whole(text), 4, "text", 0).tokens.tolist() == [[0, 5, 6, 7], [0, 8, 0, 9]]
    assert windows.sample_windows(whole(text[:4]), 1, 4, 0, "text", 0).tokens.tolist() == [[0, 5, 6, 7]]
    assert windows.consecutive_windows(whole(text), 3, "text").tokens.tolist() == [[0, 5, 6], [7, 8, 0]]


def test_windows_of_a_source_and_of_random_tokens(tiny: Tiny, text: Path) -> None:
    tokenizer = load_tokenizer(tiny("llama"))
    ids = windows.tokenize(tokenizer, text, 40)
    found = windows.sample(tokenizer, Text.of([text, text]), 40, 6, 12, 4, bos=1)
    expected = [windows.sample_windows(ids, 3, 12, seed, "text", 1).tokens for seed in (4, 5)]
    assert torch.equal(found.tokens, torch.cat(expected))
    drawn = windows.random_windows(40, 300, 12, 0, 1)
    assert drawn.shape == (300, 12)
    assert set(drawn[:, 0].tolist()) == {1}
    assert set(drawn[:, 1:].flatten().tolist()) == {*range(40)}


# The tokenizer.


def test_auto_does_as_the_tokenizer_does(tiny: Tiny, adding: Path) -> None:
    for path, expected in ((tiny("llama"), [None, 0, None]), (adding, [0, 0, None])):
        tokenizer = load_tokenizer(path)
        assert [bos_token(tokenizer, bos, path) for bos in BOS] == expected
        assert [find_bos(path, bos, 40) for bos in BOS] == expected
        plain = tokenizer("abc", add_special_tokens=False)["input_ids"]
        for bos, first in zip(BOS, expected, strict=True):
            assert encode(tokenizer, "abc", bos, path) == [*([] if first is None else [first]), *plain]
    with pytest.raises(ConfigError, match="bos is 'maybe'; it must be one of auto, on, off"):
        bos_token(tokenizer, "maybe", path)  # type: ignore[arg-type]


def test_a_text_of_unknown_tokens_is_no_bos(tmp_path: Path) -> None:
    """Some tokenizers use BOS for what they do not know, and some add a token behind a text only."""
    path = make_tiny(tmp_path / "model", "llama")
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    tokenizer["model"]["unk_token"] = "<s>"
    del tokenizer["model"]["vocab"]["a"]
    behind = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
    }
    for processor in (None, behind):
        edited(path, "tokenizer.json", **{**tokenizer, "post_processor": processor})
        loaded = load_tokenizer(path)
        assert loaded("a")["input_ids"][0] == 0
        assert bos_token(loaded, "auto", path) is None


def test_a_tokenizer_without_bos(tmp_path: Path, text: Path, configured: Make) -> None:
    path = edited(make_tiny(tmp_path / "model", "llama"), "tokenizer_config.json", bos_token=None)
    calls: list[Callable[[], Any]] = [
        lambda: streamprune.prune(configured(path, bos="on")),
        lambda: streamprune.prune(configured(path, bos="on", calibration="random-tokens")),
        lambda: streamprune.evaluate(path, text, seq_len=24, bos="on"),
        lambda: streamprune.tune(
            TuneConfig(model=path, out=tmp_path / "out", text=text, bos="on", teacher=path, method="distil")
        ),
    ]
    for call in calls:
        with pytest.raises(ConfigError, match=r"bos is on; the tokenizer of .*/model \(\w+\) has no BOS token"):
            call()
    assert not (tmp_path / "out").exists()
    assert [name.name for name in tmp_path.iterdir()] == ["model"]
    assert streamprune.evaluate(path, text, seq_len=24).bos is False
    refused = CliRunner().invoke(main, ["eval", str(path), "--text", str(text), "--seq-len", "24", "--bos", "on"])
    assert refused.exit_code == 2
    assert refused.stderr.count("\n") == 1
    assert "has no BOS token" in refused.stderr


# Evaluation.


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mixtral"])
def test_perplexity_is_transformers_own(name: str, tiny: Tiny, text: Path) -> None:
    path = tiny(name)
    measured = streamprune.evaluate(path, text, seq_len=24, bos="on")
    ids = load_tokenizer(path)(text.read_text(), add_special_tokens=False)["input_ids"]
    rows = [[0, *ids[start : start + 23]] for start in range(0, len(ids) - 22, 23)]
    tokens = torch.tensor(rows)
    with torch.no_grad():
        logits = streamprune.load(path)(tokens).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert measured.perplexity == pytest.approx(math.exp(float(loss)), rel=1e-5)
    assert measured.tokens == len(rows) * 23  # each token of the windows' text once, BOS never
    assert (measured.seq_len, measured.bos) == (24, True)
    assert f"{len(rows)} consecutive windows of 24 that begin with BOS, remainder dropped" in measured.protocol


def test_nothing_else_moves(tiny: Tiny, adding: Path, text: Path, configured: Make) -> None:
    """The same weights with a tokenizer that adds BOS and one that does not."""
    plain, scores = tiny("llama"), {}
    for path in (plain, adding):
        for bos in BOS:
            scores[path, bos] = streamprune.evaluate(path, text, seq_len=24, bos=bos)
    for bos in ("on", "off"):
        assert scores[plain, bos] == scores[adding, bos]
    assert scores[plain, "auto"] == scores[plain, "off"]
    assert scores[adding, "auto"] == scores[adding, "on"]
    assert scores[plain, "on"].perplexity != scores[plain, "off"].perplexity
    weights = {}
    for path in (plain, adding):
        for bos in BOS:
            config = configured(path, f"{path.name}-{bos}", bos=bos)
            fingerprint = streamprune.prune(config).tokens
            weights[path, bos] = (
                fingerprint,
                [data for name, data in contents(config.out).items() if name.endswith("safetensors")],
            )
    for bos in ("on", "off"):
        assert weights[plain, bos] == weights[adding, bos]
    assert weights[plain, "auto"] == weights[plain, "off"]
    assert weights[adding, "auto"] == weights[adding, "on"]
    assert weights[plain, "on"][0] != weights[plain, "off"][0]
    assert weights[plain, "on"][1] != weights[plain, "off"][1]


# Jobs.


def test_a_job_keeps_what_was_resolved(adding: Path, configured: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(adding)
    tokens = Job(config, None).tokens
    assert set(tokens[:, 0].tolist()) == {0}
    interrupted(config, monkeypatch)
    with pytest.raises(ResumeError, match=r"settings\.bos is false and was true; --restart starts over"):
        streamprune.prune(configured(adding, bos="off"))
    assert streamprune.prune(configured(adding, bos="on")).resumed  # as auto decided
    report = json.loads((config.out / "report.json").read_text())
    assert report["job"]["settings"]["bos"] is True
    assert report["tokens"] == windows.Windows.of(tokens).fingerprint
    with pytest.raises(ConfigError, match=r"another job: settings\.bos is false and was true"):
        streamprune.prune(configured(adding, bos="off"))
    off = configured(adding, "off", bos="off", recipe="magnitude")
    streamprune.prune(off)
    assert json.loads((off.out / "report.json").read_text())["job"]["settings"]["bos"] is None  # it reads no text


@pytest.mark.parametrize("word", ["self", "random-tokens"])
def test_text_without_a_source_begins_with_bos(
    word: str, adding: Path, configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(adding, calibration=word, samples=4)
    job = Job(config, None)
    with job.opened(restart=False):
        from streamprune.pruning.run import Run

        Run(job).prepare()
        written = load_file(job.written_path)["tokens"] if word == "self" else job.tokens
    assert written[:, 0].tolist() == [0] * 4
    assert len({tuple(row) for row in written.tolist()}) == 4
    with pytest.raises(ResumeError, match=r"inputs\.bos is null and was 0"):
        streamprune.prune(configured(adding, calibration=word, samples=4, bos="off"))
    result = streamprune.prune(config)
    assert result.tokens == windows.Windows.of(written).fingerprint


def test_no_tokenizer_no_bos(tmp_path: Path, configured: Make) -> None:
    path = make_tiny(tmp_path / "model", "llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).unlink()
    job = Job(configured(path, calibration="random-tokens"), None)
    assert job.request.bos is None
    assert torch.equal(job.tokens, windows.random_windows(40, 12, 24, 0))
    (path / "tokenizer.json").write_text("{}")
    message = r"no tokenizer that transformers can read .*; with --bos off, random-tokens needs no tokenizer"
    with pytest.raises(CheckpointError, match=message):
        streamprune.prune(configured(path, calibration="random-tokens"))
    assert Job(configured(path, calibration="random-tokens", bos="off"), None).request.bos is None


def test_tuning_and_comparing(adding: Path, text: Path, tmp_path: Path) -> None:
    tuning = TuneConfig(
        model=adding, out=tmp_path / "tuned", text=text, method="distil", teacher=adding, seq_len=24, samples=4, steps=1
    )
    ids = windows.tokenize(load_tokenizer(adding), text, 40)
    assert torch.equal(
        Tuning(tuning, None, False).windows.tokens, windows.sample_windows(ids, 4, 24, 0, text, 0).tokens
    )
    streamprune.tune(tuning)
    assert json.loads((tuning.out / "report.json").read_text())["job"]["settings"]["bos"] is True
    given: dict[str, Any] = {"ratios": [0.3], "recipes": ["magnitude"], "text": text, "eval_seq_len": 24}
    for bos, begins in (("auto", True), ("off", False)):
        found = streamprune.compare(adding, out=tmp_path / bos, bos=bos, **given)
        expected = streamprune.evaluate(adding, text, seq_len=24, bos=bos)  # type: ignore[arg-type]
        assert found.rows[0].perplexity == expected.perplexity
        assert found.protocol == expected.protocol
        assert found.settings["bos"] == ("on" if begins else "off")


# The commands.


def test_a_report_measures_and_continues_with_bos(
    tiny: Tiny, text: Path, tmp_path: Path, configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streamprune.commands.report import samples

    config = configured(tiny("llama"), recipe="magnitude")
    streamprune.prune(config)
    prompts: list[list[int]] = []
    real = samples._continue
    monkeypatch.setattr(samples, "_continue", lambda m, p, n: prompts.append(p.tolist()[0]) or real(m, p, n))
    plain = [2 + ALPHABET.index(letter) for letter in "abc"]
    given: dict[str, Any] = {"prompts": ["abc"], "tokens": 3, "text": text, "seq_len": 24}
    pages = {}
    for bos in BOS:
        pages[bos] = streamprune.report(config.out, html=tmp_path / f"{bos}.html", bos=bos, **given).read_text()
    assert prompts == [plain, [0, *plain], plain]
    assert "windows of 24 that begin with BOS" in pages["on"]
    assert "windows of 24 without BOS" in pages["off"]


def test_the_option(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    path = str(tiny("llama"))

    def call(*words: object) -> Any:
        done = CliRunner().invoke(main, [str(word) for word in words])
        assert done.exit_code == 0, done.output
        return done

    measured = json.loads(call("eval", path, "--text", text, "--seq-len", 24, "--bos", "on", "--json").stdout)
    assert measured["bos"] is True
    run = ("run", path, tmp_path / "out", "--ratio", 0.3, "--recipe", "magnitude", "--round-to", 4)
    assert "magnitude reads no text here, so --bos changed nothing" in call(*run, "--bos", "on").stderr
    compared = call(
        *("compare", path, "--ratios", 0.3, "--recipes", "magnitude", "--text", text, "--eval-seq-len", 24),
        *("--out", tmp_path / "compared", "--bos", "on"),
    )
    assert "changed nothing" not in compared.stderr
    assert "that begin with BOS" in compared.stdout


def test_values_are_checked(configured: Make, tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match="bos is 'yes'; it must be one of auto, on, off"):
        configured(tiny("llama"), bos="yes")
    given: Bos = "auto"
    assert configured(tiny("llama")).bos == given
