"""Sublayers that go as a whole: what stays computes what the dense model does with the consumer's weights at zero."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, contents, make_tiny
from safetensors.torch import load_file
from stopping import Stop, stopping_after

import streamprune
from streamprune import Config
from streamprune.errors import CheckpointError, ConfigError
from streamprune.model.site import FREE, Site
from streamprune.model.skeleton import Skeleton, open_skeleton

Make = Callable[..., Config]
IDS = torch.arange(40)[None, 2:20]


def opened(path: Path) -> Skeleton:
    return open_skeleton(path, torch.device("cpu"), "float64", layout=FREE)


def write_plan(path: Path, sites: list[Site], gone: set[str]) -> Path:
    """A plan that keeps everything but some sites."""
    kept = {site.name: {"keep": 0 if site.name in gone else site.units} for site in sites}
    path.write_text(json.dumps({"format": "streamprune-plan-1", "ratio": 0.3, "sites": kept}))
    return path


def zeroed(path: Path, skeleton: Skeleton, gone: set[str]) -> Any:
    """The dense model in float64, with the weights of some sites' consumers at zero."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, experts_implementation="eager")
    for index in range(len(skeleton)):
        for site, entry in skeleton.places(index):
            if site.name in gone:
                name = f"{skeleton.architecture.blocks}.{index}.{entry.consumer}.weight"
                model.get_parameter(name).data.zero_()
    return model


def removable(skeleton: Skeleton) -> set[str]:
    """All of the first block, the FFN of the second, attention of the last."""
    last = len(skeleton) - 1
    places = {(0, "attention"), (0, "linear"), (0, "ffn"), (1, "ffn"), (last, "attention"), (last, "linear")}
    return {
        s.name for s in skeleton.all_sites() if s.rest is not None and s.expert is None and (s.block, s.kind) in places
    }


@pytest.mark.check("sublayers that go whole = zeroed")
@pytest.mark.parametrize("name", TINY)
def test_a_sublayer_that_goes_equals_zeroed_weights(name: str, configured: Make, tmp_path: Path) -> None:
    path = make_tiny(tmp_path / "model", name, torch.float64)
    skeleton = opened(path)
    gone = removable(skeleton)
    expected = {
        f"blocks.{index}.{entry.kind}"
        for index, entries in enumerate(skeleton.entries)
        for entry in entries
        if entry.consumer is not None and entry.experts is None
    }
    assert {s.name for s in skeleton.all_sites() if s.rest is not None and s.expert is None} == expected
    plan = write_plan(tmp_path / "plan.json", skeleton.all_sites(), gone)
    config = configured(path, recipe="magnitude", plan=plan, ratio=None)
    streamprune.prune(config)

    model, dense = streamprune.load(config.out, dtype=torch.float64), zeroed(path, skeleton, gone)
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, dense(IDS).logits, rtol=1e-10, atol=1e-12)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached, plain, wanted = (
        each.generate(IDS, attention_mask=torch.ones_like(IDS), use_cache=use, **options)
        for each, use in ((model, True), (model, False), (dense, True))
    )
    assert torch.equal(cached, plain)
    assert torch.equal(cached, wanted)

    report = json.loads((config.out / "report.json").read_text())
    before, after = (
        sum(each.numel() for shard in folder.glob("*.safetensors") for each in load_file(shard).values())
        for folder in (path, config.out)
    )
    assert report["parameters_before"] - report["parameters_after"] == before - after
    text = config.calibration or Path()
    assert streamprune.evaluate(config.out, text, seq_len=24, dtype="float64").perplexity == pytest.approx(
        perplexity(dense, config.out, text), rel=1e-5
    )


def perplexity(model: Any, tokenizer: Path, text: Path) -> float:
    from transformers import AutoTokenizer

    ids = torch.tensor(AutoTokenizer.from_pretrained(tokenizer)(text.read_text())["input_ids"])
    windows = ids[: len(ids) // 24 * 24].view(-1, 24)
    with torch.no_grad():
        logits = model(windows).logits[:, :-1].flatten(0, 1)
    return float(torch.nn.functional.cross_entropy(logits, windows[:, 1:].flatten()).exp())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda no_op: no_op["self_attn"][0].update(kind="ffn"), "does not fit self_attn of block 0"),
        (lambda no_op: no_op["self_attn"][0]["identities"].append("mlp.act_fn"), "does not fit self_attn of block 0"),
        (lambda no_op: no_op.update({"mlp.act_fn": no_op["self_attn"]}), "does not fit mlp.act_fn of block 0"),
        (lambda no_op: no_op["mlp"].pop(), "does not fit mlp of block 2"),
        (lambda no_op: no_op.update(mlp=3), "does not fit mlp of block 0"),
    ],
)
def test_what_is_gone_is_checked(change: Any, message: str, tiny: Any, configured: Make, tmp_path: Path) -> None:
    path = tiny("llama")
    sites = opened(path).all_sites()
    plan = write_plan(tmp_path / "plan.json", sites, {"blocks.0.attention", "blocks.1.ffn"})
    config = configured(path, recipe="magnitude", plan=plan, ratio=None)
    streamprune.prune(config)
    skeleton = opened(config.out)
    assert [[entry.gone for entry in block] for block in skeleton.entries] == [
        [True, False],
        [False, True],
        [False] * 2,
    ]
    fields = json.loads((config.out / "config.json").read_text())
    change(fields["streamprune"]["no_op"])
    (config.out / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=message):
        opened(config.out)


def test_a_depth_without_weights_is_bounded(tiny: Any, configured: Make, tmp_path: Path) -> None:
    path = tiny("llama", tie_word_embeddings=False)
    sites = opened(path).all_sites()
    plan = write_plan(tmp_path / "plan.json", sites, {s.name for s in sites if s.block})
    config = configured(path, recipe="magnitude", plan=plan, ratio=None)
    streamprune.prune(config)
    assert [len(opened(config.out).block_names(index)) for index in range(3)] == [9, 0, 0]
    fields = json.loads((config.out / "config.json").read_text())
    for each in fields["streamprune"]["no_op"].values():
        each += each[-1:] * 100_000
    fields["num_hidden_layers"] += 100_000
    (config.out / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match="num_hidden_layers is 100003; the shards hold 13 blocks"):
        opened(config.out)


def test_decilm_says_which_sublayers_are_gone(tiny: Any, configured: Make, tmp_path: Path) -> None:
    path = tiny("llama", intermediate_size=512)
    sites = opened(path).all_sites()
    plan = write_plan(tmp_path / "plan.json", sites, {"blocks.1.ffn", "blocks.2.attention"})
    config = configured(path, recipe="magnitude", plan=plan, ratio=None, layout="decilm")
    streamprune.prune(config)
    fields = json.loads((config.out / "config.json").read_text())
    attention, ffn = ([block[kind] for block in fields["block_configs"]] for kind in ("attention", "ffn"))
    off = {"replace_with_linear": False}
    group = fields["num_attention_heads"] // fields["num_key_value_heads"]
    assert attention == [
        *[{"no_op": False, "n_heads_in_group": group, **off}] * 2,
        {"no_op": True, "n_heads_in_group": None, **off},
    ]
    assert [each["no_op"] for each in ffn] == [False, True, False]
    assert ffn[1]["ffn_mult"] is None
    # vLLM's DeciLM builds no norm for what is gone.
    block = load_file(config.out / "model-00004-of-00005.safetensors")
    assert not any("self_attn" in name or "input_layernorm" in name for name in block)


@pytest.mark.parametrize(
    ("layout", "changes", "gone"),
    [
        ("decilm", {"attention_bias": True}, "1.attention"),
        ("decilm", {"mlp_bias": True}, "1.ffn"),
        ("decilm", {}, "0.attention"),
        ("uniform", {}, "1.ffn"),
    ],
)
def test_a_layout_that_cannot_lack_a_sublayer(
    layout: str, changes: Any, gone: str, tiny: Any, configured: Make, tmp_path: Path
) -> None:
    """The biases of what is gone stay, which DeciLM's modules cannot hold; vLLM's begins with an attention."""
    path = tiny("llama", intermediate_size=512, **changes)
    plan = write_plan(tmp_path / "plan.json", opened(path).all_sites(), {f"blocks.{gone}"})
    with pytest.raises(ConfigError, match=rf"blocks\.{gone} keeps 0; it must be 1 to"):
        streamprune.prune(configured(path, recipe="magnitude", plan=plan, ratio=None, layout=layout))


def test_a_gguf_file_cannot_lack_a_sublayer(tiny: Any, configured: Make, tmp_path: Path) -> None:
    path = tiny("llama")
    plan = write_plan(tmp_path / "plan.json", opened(path).all_sites(), {"blocks.1.ffn"})
    config = configured(path, recipe="magnitude", plan=plan, ratio=None)
    streamprune.prune(config)
    with pytest.raises(CheckpointError, match="the ffn of block 1 is gone as a whole, which export does not support"):
        streamprune.export_gguf(config.out, tmp_path / "model.gguf")


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"shots": "2"}])
def test_a_job_whose_sublayers_go_resumes_with_the_same_bytes(
    settings: dict[str, str], tiny: Any, configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that lose a sublayer are refined, those of which nothing is left are not."""
    given = {"recipe": "default", "ratio": 0.85, "effort": "normal", "settings": settings}
    whole = configured(tiny("llama"), "whole", **given)
    streamprune.prune(whole)
    sites = json.loads((whole.out / "report.json").read_text())["sites"]
    assert sum(site["kept"] == 0 for site in sites) > 1
    assert any("refinement" in site for site in sites)
    for appends in (6, 11, 13):
        config = configured(tiny("llama"), f"stopped-{appends}", **given)
        with pytest.raises(Stop), stopping_after(appends, monkeypatch):
            streamprune.prune(config)
        assert streamprune.prune(config).resumed
        assert contents(config.out) == contents(whole.out)
