"""Conversations: ids and masks against transformers' own, windows of documents, losses of the assistant's tokens only."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from streamprune_cli import main
from transformers.utils import chat_template_utils

import streamprune
from streamprune import Config, TuneConfig
from streamprune.errors import CalibrationError, ConfigError, ResumeError
from streamprune.model.tokenizer import IGNORED, load_tokenizer
from streamprune.text import conversations, documents
from streamprune.text import windows as calibration
from streamprune.text.source import Text

Make = Callable[..., Config]
Tiny = Callable[..., Path]
PLAIN = "{% for m in messages %}{{ m.role + '. ' + m.content + ',' }}{% endfor %}{% if add_generation_prompt %}assistant. {% endif %}"
TAGGED = (
    "{% for m in messages %}{{ m.role + '. ' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content + ',' }}"
    "{% endgeneration %}{% else %}{{ m.content + ',' }}{% endif %}{% endfor %}"
)
THOUGHTS = (  # as Qwen3's: a turn has a thought until the user answers it
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}{{ m.role + '. ' }}{% if m.role == 'assistant' and loop.index0 > ns.last %}hm, {% endif %}"
    "{{ m.content + ',' }}{% endfor %}{% if add_generation_prompt %}assistant. {% endif %}"
)
ASKING = PLAIN.replace("assistant. {%", "assistant. hm, {%")  # as DeepSeek-R1's: the prompt begins a thought
NUMBERED = (
    "{% for m in messages %}{{ 'x' * (messages | length - loop.index) + m.role + '. ' + m.content + ',' }}{% endfor %}"
)
TURNS = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi there"},
    {"role": "user", "content": "what"},
    {"role": "assistant", "content": "this"},
]


@pytest.fixture
def tokenizer(tiny: Tiny) -> Any:
    return load_tokenizer(tiny("llama"))


@pytest.fixture
def chatting(tiny: Tiny, tmp_path: Path) -> Path:
    """A model whose tokenizer has a chat template."""
    import shutil

    path = Path(shutil.copytree(tiny("llama"), tmp_path / "chatting"))
    (path / "chat_template.jinja").write_text(PLAIN)
    return path


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    return lines(tmp_path / "chats.jsonl", [{"messages": TURNS[:2] if n % 2 else TURNS} for n in range(40)])


def said(tokenizer: Any, messages: list[dict[str, str]]) -> list[str]:
    """What the assistant says, as runs of text."""
    ids, mask = conversations.encode(tokenizer, messages)
    assert ids == tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    runs: list[list[int]] = []
    for number, (token, own) in enumerate(zip(ids, mask, strict=True)):
        if own and not (number and mask[number - 1]):
            runs.append([])
        if own:
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


def test_ids_and_masks_are_those_of_transformers(tokenizer: Any) -> None:
    tokenizer.chat_template = TAGGED
    expected = tokenizer.apply_chat_template(TURNS, return_dict=True, return_assistant_tokens_mask=True)
    assert 0 < sum(expected["assistant_masks"]) < len(expected["input_ids"])
    tagged = conversations.encode(tokenizer, TURNS)
    assert tagged == (expected["input_ids"], [bool(each) for each in expected["assistant_masks"]])
    tokenizer.chat_template = PLAIN
    assert conversations.encode(tokenizer, TURNS) == tagged


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (PLAIN, ["hi there,", "this,"]),
        (TAGGED, ["hi there,", "this,"]),
        (THOUGHTS, ["hi there,", "hm, this,"]),
        (ASKING, ["hi there,", "this,"]),
    ],
)
def test_what_the_assistant_says(template: str, expected: list[str], tokenizer: Any) -> None:
    tokenizer.chat_template = template
    assert said(tokenizer, TURNS) == expected
    assert said(tokenizer, [{"role": "system", "content": "be brief"}, *TURNS[:2]])[-1].endswith("hi there,")
    assert said(tokenizer, TURNS[:3]) == ["hi there,"]


def test_conversations_that_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    def refused(rows: list[Any], message: str, **how: Any) -> None:
        path = lines(tmp_path / "m.jsonl", rows)
        with pytest.raises(CalibrationError, match=message):
            calibration.tokenize(tokenizer, path, 40, **{"loss_on": "assistant", **how})

    good = {"messages": TURNS}
    refused([good], "m.jsonl has conversations, and the model's tokenizer has no chat template")
    tokenizer.chat_template = PLAIN
    refused([good, {"messages": TURNS[:1]}], r"m\.jsonl, line 2: no turn of the assistant")
    refused([{"text": "hello"}], r"m\.jsonl has plain text; loss_on is 'assistant', which needs conversations")
    tokenizer.chat_template = NUMBERED
    refused([good], r"m\.jsonl, line 1: the model's chat template writes turn 2 in another way once others follow")
    calibration.tokenize(tokenizer, tmp_path / "m.jsonl", 40)  # all tokens count
    tokenizer.chat_template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    refused([good], r"m\.jsonl, line 1: the assistant says nothing, or the chat template leaves it out")
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    refused([good], r"line 1: the model's chat template refuses a conversation .*no system role", loss_on="all")


def test_an_instruction_is_a_conversation(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = PLAIN
    rows = [{"instruction": "add", "output": "three"}, {"instruction": "add", "input": "one two", "output": "three"}]
    found = calibration.tokenize(tokenizer, lines(tmp_path / "a.jsonl", rows), 40, loss_on="assistant")
    text = "user. add,assistant. three,user. add\n\none two,assistant. three,"
    assert found.ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(found.labels[found.labels != IGNORED]) == "three,three,"
    (tmp_path / "a.csv").write_text("instruction,output,input\nadd,three,\nadd,three,one two\n")
    again = calibration.tokenize(tokenizer, tmp_path / "a.csv", 40, loss_on="assistant")
    assert torch.equal(again.ids, found.ids)
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    columns = {name: [row.get(name) for row in rows] for name in ("output", "input", "instruction")}
    pq.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    again = calibration.tokenize(tokenizer, tmp_path / "a.parquet", 40, loss_on="assistant")
    assert torch.equal(again.labels, found.labels)
    alone = lines(tmp_path / "b.jsonl", [{"instruction": "add", "answer": "three"}])
    with pytest.raises(CalibrationError, match=r"no field text, messages, .* and no instruction with output"):
        documents.open_documents(str(alone), None)
    assert documents.open_documents(str(alone), "instruction").columns == ("instruction",)
    with pytest.raises(CalibrationError, match=r"c\.jsonl, line 2: no field 'output'; it has instruction"):
        calibration.tokenize(tokenizer, lines(tmp_path / "c.jsonl", [rows[0], {"instruction": "add"}]), 40)


# Windows.


def letters(tokenizer: Any, tokens: torch.Tensor) -> str:
    """Tokens as text; what the tokenizer does not know is a newline."""
    return str(tokenizer.decode(tokens)).replace("</s>", "\n")


def test_windows_of_documents_begin_where_they_do_and_use_each_once(tokenizer: Any, tmp_path: Path) -> None:
    texts = [chr(ord("a") + number) * (number + 1) for number in range(20)]
    path = lines(tmp_path / "t.jsonl", [{"text": each} for each in texts])
    found = calibration.sample(tokenizer, Text.of(path), 40, 6, 12, 3, cut="documents")
    assert found.tokens is found.labels
    used: list[str] = []
    for window in found.tokens:
        begins = [run for run in letters(tokenizer, window).split("\n") if run]
        for number, run in enumerate(begins):
            whole = texts[ord(run[0]) - ord("a")]
            assert run == whole if number < len(begins) - 1 else whole.startswith(run)
        used += [run[0] for run in begins]
    assert len({*used}) == len(used)  # 6 windows of 12 need less than the 210 letters
    many = calibration.sample(tokenizer, Text.of(path), 40, 60, 12, 3, cut="documents")
    assert torch.equal(many.tokens[:6], found.tokens)
    tokens = calibration.tokenize(tokenizer, path, 40, cut="documents")
    assert len(tokens.starts) == 20
    inorder = calibration.document_windows(tokens, None, 12, 0, path).tokens
    assert inorder[0].tolist() == tokens.ids[:12].tolist()
    assert int(inorder[1][0]) in {int(tokens.ids[start]) for start in tokens.starts}
    (tmp_path / "t.txt").write_text("hello " * 50)
    message = r"t\.txt is one text; windows is 'documents', which needs a file or dataset with rows"
    with pytest.raises(ConfigError, match=message):
        calibration.tokenize(tokenizer, tmp_path / "t.txt", 40, cut="documents")


def test_windows_of_documents_have_bos_once() -> None:
    documents = [torch.tensor(each) for each in ([0, 5, 6], [7, 8], [0, 9, 10, 11])]
    tokens = calibration.Tokens.join([(each, each) for each in documents])
    found = calibration.document_windows(tokens, None, 4, 0, "text", 0)
    assert found.tokens.tolist() == [[0, 5, 6, 7], [0, 9, 10, 11]]
    found = calibration.document_windows(
        calibration.Tokens.join([(each, each) for each in documents[1:]]), None, 4, 0, "text", 0
    )
    assert found.tokens.tolist() == [[0, 7, 8, 0]]


def test_labels_follow_their_tokens(tokenizer: Any, chats: Path) -> None:
    tokenizer.chat_template = PLAIN
    for cut in ("anywhere", "documents"):
        for bos in (None, 0):
            given: dict[str, Any] = {"bos": bos, "cut": cut}
            every = calibration.sample(tokenizer, Text.of(chats), 40, 10, 40, 3, **given)
            found = calibration.sample(tokenizer, Text.of(chats), 40, 10, 40, 3, **given, loss_on="assistant")
            assert torch.equal(found.tokens, every.tokens)
            mask = found.labels != IGNORED
            assert torch.equal(found.labels[mask], found.tokens[mask])
            own = {*tokenizer.decode(found.tokens[mask]).split(",")}
            assert any("hi there" in each for each in own)
            assert not any("hello" in each or "what" in each for each in own)
            assert found.fingerprint != every.fingerprint
            assert calibration.counted(found.labels) == int(mask[:, 1:].sum())


def test_windows_without_the_assistant(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = PLAIN
    long = [{"role": "user", "content": "hello " * 20}, TURNS[1]]
    path = lines(tmp_path / "long.jsonl", [{"messages": long}] * 9)
    given: dict[str, Any] = {"cut": "documents", "loss_on": "assistant"}
    with pytest.raises(
        CalibrationError, match="4 of 4 windows of 20 tokens hold no token of the assistant; raise seq-len"
    ):
        calibration.sample(tokenizer, Text.of(path), 40, 4, 20, 3, **given)
    told: list[str] = []

    class Told:
        def say(self, text: str) -> None:
            told.append(text)

    lines(path, [{"messages": long}] * 5 + [{"messages": TURNS[:2]}] * 5)
    calibration.sample(tokenizer, Text.of(path), 40, 4, 40, 3, Told(), **given)  # type: ignore[arg-type]
    assert any("windows of 40 tokens hold no token of the assistant and have no loss" in each for each in told)


# Jobs.


def test_a_job_that_counts_the_assistants_tokens(chatting: Path, chats: Path, configured: Make) -> None:
    given: dict[str, Any] = {"calibration": chats, "recipe": "default", "windows": "documents"}
    results = {on: streamprune.prune(configured(chatting, on, loss_on=on, **given)) for on in ("all", "assistant")}
    assert results["all"].tokens != results["assistant"].tokens
    report = json.loads((configured(chatting, "assistant").out / "report.json").read_text())
    assert report["job"]["settings"]["loss_on"] == "assistant"
    assert report["job"]["settings"]["windows"] == "documents"
    costs = [json.loads((configured(chatting, on).out / "curves.json").read_text())["sites"] for on in results]
    assert costs[0] != costs[1]
    with pytest.raises(ConfigError, match=r"another job: settings\.loss_on is \"all\" and was \"assistant\""):
        streamprune.prune(configured(chatting, "assistant", loss_on="all", **given))


def test_a_job_under_way_keeps_its_windows(chatting: Path, chats: Path, configured: Make, monkeypatch: Any) -> None:
    from stopping import interrupted

    given: dict[str, Any] = {"calibration": chats, "recipe": "default"}
    interrupted(configured(chatting, loss_on="assistant", **given), monkeypatch)
    with pytest.raises(ResumeError, match=r"settings\.windows is \"documents\" and was \"anywhere\""):
        streamprune.prune(configured(chatting, loss_on="assistant", windows="documents", **given))
    whole = streamprune.prune(configured(chatting, "whole", loss_on="assistant", **given))
    resumed = streamprune.prune(configured(chatting, loss_on="assistant", **given))
    assert resumed.resumed
    from conftest import contents

    assert contents(Path(resumed.out)) == contents(Path(whole.out))


def test_a_template_that_writes_the_date(chatting: Path, chats: Path, configured: Make, monkeypatch: Any) -> None:
    from stopping import interrupted

    (chatting / "chat_template.jinja").write_text("{{ strftime_now('%B') | lower }}," + PLAIN)
    config = configured(chatting, calibration=chats)
    with monkeypatch.context() as patch:
        patch.setattr(chat_template_utils, "datetime", Clock("june"))
        interrupted(config, monkeypatch)
    monkeypatch.setattr(chat_template_utils, "datetime", Clock("july"))
    with pytest.raises(ResumeError, match=r"the text gives tokens \w+; this job was started with \w+ .*--restart"):
        streamprune.prune(config)


class Clock:
    """Stands for `datetime`, at a date that formats as `text`."""

    def __init__(self, text: str) -> None:
        self.text = text

    def now(self) -> Clock:
        return self

    def strftime(self, form: str) -> str:
        return self.text


def test_perplexity_of_what_the_assistant_says(chatting: Path, chats: Path) -> None:
    import torch.nn.functional as F

    tokenizer = load_tokenizer(chatting)
    model = streamprune.load(chatting, dtype=torch.float64)
    for cut in ("anywhere", "documents"):
        found = streamprune.evaluate(chatting, chats, seq_len=48, dtype="float64", loss_on="assistant", windows=cut)
        tokens = calibration.tokenize(tokenizer, chats, 40, loss_on="assistant", cut=cut)
        whole = (
            calibration.document_windows(tokens, None, 48, 0, chats)
            if cut == "documents"
            else calibration.consecutive_windows(tokens, 48, chats)
        )
        with torch.no_grad():
            logits = model(whole.tokens).logits[:, :-1].flatten(0, 1)
        labels = whole.labels[:, 1:].flatten()
        expected = F.cross_entropy(logits, labels, ignore_index=-100).exp()
        assert found.perplexity == pytest.approx(float(expected), rel=1e-9)
        assert found.tokens == int((labels != -100).sum())
        assert f"mean over the {found.tokens} predicted tokens of the assistant" in found.protocol
        assert ("each from the beginning of a document" in found.protocol) == (cut == "documents")


def test_tuning_on_what_the_assistant_says(chatting: Path, chats: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    given: dict[str, Any] = {"model": chatting, "text": chats, "samples": 8, "seq_len": 40, "loss_on": "assistant"}
    tuned = streamprune.tune(
        TuneConfig(out=tmp_path / "lora", method="lora", steps=1, rank=2, dtype="float64", **given)
    )
    windows = calibration.sample(load_tokenizer(chatting), Text.of(chats), 40, 8, 40, 0, loss_on="assistant")
    model = streamprune.load(chatting, dtype=torch.float64)
    with torch.no_grad():
        logits = model(windows.tokens).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, windows.labels[:, 1:].flatten(), ignore_index=-100)
    assert tuned.loss_first == pytest.approx(float(expected), rel=1e-9)  # the update is zero before the first step
    assert tuned.tokens == windows.fingerprint
    with pytest.raises(ConfigError, match="loss_on is 'assistant'; method distil fits the outputs of blocks"):
        streamprune.tune(TuneConfig(out=tmp_path / "distil", method="distil", teacher=chatting, **given))


def test_settings_that_need_conversations(tiny: Tiny, tmp_path: Path, text: Path) -> None:
    given: dict[str, Any] = {"model": tiny("llama"), "out": tmp_path / "out", "ratio": 0.3}
    with pytest.raises(ConfigError, match="loss_on is 'users'; it must be one of all, assistant"):
        Config(**given, loss_on="users")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="windows is 'rows'; it must be one of anywhere, documents"):
        Config(**given, windows="rows")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="windows is 'documents'; calibration 'random-tokens' reads no documents"):
        Config(**given, calibration="random-tokens", windows="documents")

    def called(*arguments: str) -> str:
        result = CliRunner().invoke(main, [*arguments, "--seq-len", "24"])
        assert result.exit_code
        return result.stderr

    run = [
        "run",
        str(given["model"]),
        str(given["out"]),
        "--ratio",
        "0.3",
        "--samples",
        "4",
        "--calibration",
        str(text),
    ]
    assert "has plain text; loss_on is 'assistant'" in called(*run, "--loss-on", "assistant")
    assert "is one text; windows is 'documents'" in called(*run, "--windows", "documents")
    assert not (tmp_path / "out").exists()
    evaluated = ["eval", str(given["model"]), "--text", str(text)]
    assert "has plain text; loss_on is 'assistant'" in called(*evaluated, "--loss-on", "assistant")
