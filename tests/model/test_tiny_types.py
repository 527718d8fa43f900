"""The pure parts of scripts/architectures: tiny configs, what passes through, the page."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from conftest import ROOT


@pytest.fixture(autouse=True)
def harness(monkeypatch: pytest.MonkeyPatch) -> None:
    """`import architectures` is benchmarks/architectures."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("llama", None),
        ("qwen3_next", {"linear_attention", "full_attention"}),
        ("gemma4_text", {"sliding_attention", "full_attention"}),
        ("lfm2", {"conv", "full_attention"}),
        ("deepseek_v3", None),
        ("mistral3", None),
    ],
)
def test_a_tiny_model_has_blocks_of_every_kind_and_no_zeros(name: str, kinds: set[str] | None, tmp_path: Path) -> None:
    from architectures import scope, tiny
    from transformers import AutoConfig

    config = tiny.tiny_config(name)
    text = config.get_text_config()
    assert (text.hidden_size, text.num_attention_heads, text.vocab_size) == (64, 4, 320)
    assert kinds is None or set(text.layer_types) == kinds
    model = tiny.tiny_model(config, scope.auto_class(name))
    assert all((parameter != 0).all() for parameter in model.parameters())
    meant = config.to_dict()
    config.save_pretrained(tmp_path)
    assert "torch_dtype" in tiny.write_hub_config(tmp_path) or config.dtype is None
    read = AutoConfig.from_pretrained(tmp_path).to_dict()
    for field in ("rope_parameters", "layer_types", "text_config"):
        without = {"dtype", "transformers_version"}
        here, there = (json.loads(json.dumps(found.get(field))) for found in (meant, read))
        if isinstance(here, dict):
            here, there = ({k: v for k, v in found.items() if k not in without} for found in (here, there))
        assert here == there


def test_a_hub_config_has_the_fields_of_version_4(tmp_path: Path) -> None:
    from architectures import tiny

    tiny.tiny_config("llama").save_pretrained(tmp_path)
    assert {"rope_theta", "head_dim"} <= set(tiny.write_hub_config(tmp_path))
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["rope_theta"] == 10000.0
    assert fields["rope_scaling"] is None
    assert not {"rope_parameters", "head_dim"} & set(fields)


def test_lists_with_one_entry_per_block_keep_one_block_of_each_kind() -> None:
    from architectures import tiny

    kinds = ["a", "a", "b", "b", "a", "b"]
    sparse = [0, 1, 1, 1, 1, 1]
    found = tiny.reduced(
        {"num_hidden_layers": 6, "kinds": kinds, "sparse": sparse, "other": [1, 2], "hidden_size": 4096}
    )
    assert found == {
        "num_hidden_layers": 3,
        "kinds": ["a", "a", "b"],
        "sparse": [0, 1, 1],
        "other": [1, 2],
        "hidden_size": 64,
    }


def test_what_shrank_nowhere_in_a_block_passes_through() -> None:
    from architectures.trial import family, unchanged

    before = {
        ("layers.0", "self_attn"): 10,
        ("layers.0", "mlp"): 20,
        ("layers.1", "mamba"): 30,
        ("layers.1", "mlp"): 2,  # a router
        ("layers.1", "mlp.experts"): 40,
        ("layers.2", "mlp"): 2,
        ("layers.2", "mlp.experts"): 40,
        ("layers.2", "mlp.shared"): 5,
    }
    smaller = {("layers.0", "self_attn"): 9, ("layers.0", "mlp"): 19, ("layers.1", "mlp.experts"): 39}
    after = {**before, **smaller, ("layers.2", "mlp.experts"): 39}
    assert unchanged(before, after) == ["mamba", "mlp.shared"]
    assert [family(name) for name in ("blocks.0.attention", "blocks.10.ffn", "blocks.1.ffn.12")] == [
        "attention",
        "ffn",
        "experts",
    ]


def test_the_page_says_of_each_type_what_was_found() -> None:
    from architectures import page

    versions = {"transformers": "1.2"}
    rows: dict[str, dict[str, Any]] = {
        "b": {"status": "works", "sites": {"ffn": 2, "experts": 2}, "through": [], "step": "done", "fewer": "stock"},
        "a": {"status": "partly", "sites": {"ffn": 2}, "through": ["mamba"], "step": "done", "single": []},
        "c": {"status": "refused", "error": "it has | in it", "step": "open"},
        "d": {"status": "failed", "error": "no", "step": "prune", "sites": {"ffn": 1}},
    }
    rows = {name: {"type": name, "versions": versions, **row} for name, row in rows.items()}
    text = page.page(rows, {"a": "text", "b": "wrapper", "c": "text", "d": "text"}, "2026-01-02")
    assert "on 2026-01-02 with transformers 1.2" in text
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    assert lines[1:] == [
        "| `a` | text | partly | ffn |  | `mamba` |",
        "| `b` | wrapper | works | ffn, experts | stock |  |",
        "| `c` | text | refused |  |  | it has \\| in it |",
        "| `d` | text | failed |  |  | prune: no |",
    ]
    assert "| works | 0 | 1 | 1 |" in text
    assert "| all | 3 | 1 | 4 |" in text


def test_rows_of_other_code_and_torn_lines_do_not_count(tmp_path: Path) -> None:
    from architectures.__main__ import read, versions

    assert set(versions()) == {"transformers", "torch", "code"}
    path = tmp_path / "rows.jsonl"
    assert read(path) == {}
    row = {"type": "a", "versions": versions()}
    other = {"type": "b", "versions": {**versions(), "code": "0"}}
    path.write_text(f"{json.dumps(row)}\n{json.dumps(other)}\n{json.dumps(row)[:-9]}")
    assert read(path) == {"a": row}


def test_a_type_that_takes_too_long_is_killed_and_keeps_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from architectures import __main__ as harness

    def trial(name: str, folder: Path, record: Callable[[dict[str, Any]], None]) -> None:
        record({"type": name, "step": "prune", "status": "works" if name == "a" else "failed"})
        os.write(1, b"heard\n")
        if name == "b":
            Event().wait()

    monkeypatch.setattr(harness, "trial", trial)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"type": "a", "ver')
    options = argparse.Namespace(work=tmp_path, jobs=2, limit=3, keep=False)
    rows = harness.run(["a", "b"], path, options)
    assert rows["a"]["status"] == "works"
    assert (rows["b"]["step"], rows["b"]["error"]) == ("prune", "took longer than 3 s")
    assert "b: failed (prune: took longer than 3 s)" in capsys.readouterr().out
    assert harness.read(path) == rows
    assert {each.name for each in tmp_path.iterdir()} == {"rows.jsonl", "b.log"}
    assert (tmp_path / "b.log").read_text() == "heard\n"


def test_an_interrupt_ends_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from architectures import __main__ as harness

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(harness, "trial", lambda *_: Event().wait())
    monkeypatch.setattr(harness.time, "sleep", interrupt)
    before = set(harness.FORK.active_children())
    with pytest.raises(KeyboardInterrupt):
        harness.run(["a"], tmp_path / "rows.jsonl", argparse.Namespace(work=tmp_path, jobs=1, limit=60, keep=False))
    assert set(harness.FORK.active_children()) <= before


def test_a_refusal_names_the_model_and_comes_before_work(tmp_path: Path) -> None:
    from architectures.trial import refuses

    from streamprune.errors import CheckpointError, NumericalError

    error = CheckpointError(f"{tmp_path}/config.json: no")
    assert refuses(error, "open", tmp_path, ())
    assert refuses(error, "prune", tmp_path, {"evaluate"})
    assert not refuses(error, "prune", tmp_path, {"evaluate", "prune"})
    assert not refuses(error, "reload", tmp_path, {"evaluate", "prune"})
    assert not refuses(CheckpointError("elsewhere"), "prune", tmp_path, ())
    assert not refuses(NumericalError(f"{tmp_path}: NaN"), "prune", tmp_path, ())


def test_every_type_of_transformers_is_listed_or_left_out_with_a_reason() -> None:
    from architectures import scope

    listed = scope.listed()
    assert {"llama", "qwen3_5", "gemma4", "mamba"} <= set(listed)
    assert listed["mistral3"] == "wrapper"
    reasons = {name: scope.left_out(name) for name in ("bert", "t5gemma2", "whisper", "blip")}
    assert reasons == {
        "bert": "encoder",
        "t5gemma2": "encoder–decoder",
        "whisper": "speech or sound",
        "blip": "needs an image",
    }


def test_groups_are_modules_that_hold_linears_without_routers() -> None:
    from architectures import scope, tiny
    from architectures.trial import groups

    model = tiny.tiny_model(tiny.tiny_config("qwen2_moe"), scope.auto_class("qwen2_moe"))
    found = groups(model, {name: parameter.numel() for name, parameter in model.named_parameters()})
    assert {group for _, group in found} == {"self_attn", "mlp.experts", "mlp.shared_expert", "mlp"}
    block = "model.layers.1"
    assert {at for at, _ in found} == {f"model.layers.{number}" for number in range(len(model.model.layers))}
    experts = model.get_submodule(f"{block}.mlp.experts")
    assert found[block, "mlp.experts"] == sum(parameter.numel() for parameter in experts.parameters())


def test_losses_are_those_of_cross_entropy() -> None:
    import torch
    from architectures.trial import Disagreement, compare, losses

    tokens = [[3, 1, 2], [0, 0, 3]]
    logits = torch.randn(2, 3, 4)
    meant = [
        torch.nn.functional.cross_entropy(row[:-1].double(), torch.tensor(ids[1:]))
        for row, ids in zip(logits, tokens, strict=True)
    ]
    found = losses(logits, tokens)
    compare("the loss", found, torch.stack(meant))
    with pytest.raises(Disagreement, match=r"the loss differs by .*e-02"):
        compare("the loss", found * 1.03, torch.stack(meant))
