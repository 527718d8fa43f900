"""A uniform result is a stock checkpoint of its source's architecture: the config field by field, and what loads it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import TINY
from streamprune_cli import main
from transformers import AutoConfig, AutoModelForCausalLM

import streamprune
from streamprune.model.architectures import DERIVED_HEADS, FAMILIES
from streamprune.model.checkpoint import Checkpoint

Make = Callable[..., Path]
HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim")
FFN = ("moe_intermediate_size", "intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")
# The last linear of a sublayer, as checkpoints name it.
ATTENTION_OUT = r"(self_attn\.(o|out)_proj|attn\.c_proj|attention\.dense)\.weight$"
FFN_OUT = r"(down_proj|fc2|mlp\.c_proj|dense_4h_to_h|\.w2)\.weight$"


def columns(out: Path, pattern: str, model_type: str) -> set[int]:
    """Inputs of all linears of that kind, from the stored tensors."""
    checkpoint = Checkpoint(out)
    # gpt2 stores its linears the other way round.
    side = 0 if model_type == "gpt2" else 1
    return {checkpoint[name].shape[side] for name in checkpoint if re.search(pattern, name)}


@pytest.fixture(params=sorted(name for name, fields in TINY.items() if fields["model_type"] in FAMILIES))
def uniform(
    request: pytest.FixtureRequest, tiny: Make, configured: Callable[..., streamprune.Config]
) -> tuple[dict[str, Any], Path]:
    """The source's config, and a uniform result."""
    source = tiny(request.param)
    result = streamprune.prune(configured(source, recipe="magnitude", ratio=0.2, layout="uniform"))
    return json.loads((source / "config.json").read_text()), Path(result.out)


def test_the_config_is_stock(uniform: tuple[dict[str, Any], Path]) -> None:
    before, out = uniform
    after = json.loads((out / "config.json").read_text())
    model_type = before["model_type"]
    assert after["model_type"] == model_type
    assert after["architectures"] == before["architectures"]
    assert "streamprune" not in after
    assert "auto_map" not in after
    assert not list(out.glob("*.py"))

    changed = {name for name in after.keys() | before.keys() if after.get(name) != before.get(name)}
    assert changed, "nothing shrank"
    assert changed <= {*HEADS, *FFN}

    wide = columns(out, FFN_OUT, model_type)
    assert wide == {after[name] for name in FFN if after.get(name) and (name in changed or after[name] in wide)}
    if "head_dim" in after:
        heads, units, head = (after[name] for name in HEADS)
        assert columns(out, ATTENTION_OUT, model_type) == {heads * head}
        assert heads % units == 0
        assert head == (before.get("head_dim") or before["hidden_size"] // before["num_attention_heads"])


def test_transformers_loads_it_without_our_code(uniform: tuple[dict[str, Any], Path]) -> None:
    before, out = uniform
    model, info = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=False, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert [type(model).__name__] == before["architectures"]
    assert type(model).__module__.startswith("transformers.models.")
    read = AutoConfig.from_pretrained(out, trust_remote_code=False)
    after = json.loads((out / "config.json").read_text())
    for name in (*HEADS, *FFN):
        assert getattr(read, name, None) == after.get(name) or name not in after


SOURCES = {
    "vLLM": ("vllm", "model_executor/models", {"phi3": "llama", "gemma3_text": "gemma3"}),
    "SGLang": ("sglang", "srt/models", {"mistral": "llama", "phi3": "llama", "gemma3_text": "gemma3_causal"}),
    "mlx-lm": ("mlx_lm", "models", {"mistral": "llama"}),
    "exllamav3": ("exllamav3", "architecture", {"gemma3_text": "gemma3"}),
}
"""By runtime: its package, where the classes of models are, and files with another name than the model type."""
READS_HEAD_DIM = re.compile(
    r'"head_dim"|\b(args|config)\.head_dim|import LlamaConfig|LlamaForCausalLM|import llama$', re.MULTILINE
)


@pytest.mark.parametrize("runtime", SOURCES)
def test_who_reads_head_dim(runtime: str) -> None:
    """Where the runtime is installed: its sources agree with the table."""
    package, folder, others = SOURCES[runtime]
    if (spec := find_spec(package)) is None:
        pytest.skip(f"{package} is not installed")
    found = {}
    for model_type, family in FAMILIES.items():
        path = Path(
            next(iter(spec.submodule_search_locations or ())), folder, f"{others.get(model_type, model_type)}.py"
        )
        if "attention" in family.widths and path.is_file():
            found[model_type] = bool(READS_HEAD_DIM.search(path.read_text()))
    assert len(found) > 8
    assert found == {model_type: runtime not in DERIVED_HEADS.get(model_type, ()) for model_type in found}


@pytest.mark.parametrize("model_type", DERIVED_HEADS)
def test_a_runtime_that_derives_head_dim_gets_it_right(model_type: str, tiny: Make, configured: Any) -> None:
    name = next(name for name, fields in TINY.items() if fields["model_type"] == model_type)
    config = configured(tiny(name), recipe="magnitude", ratio=0.2, layout="uniform")
    streamprune.prune(config)
    written = json.loads((config.out / "config.json").read_text())
    derived = written["hidden_size"] // written["num_attention_heads"] * written["num_attention_heads"]
    assert columns(config.out, ATTENTION_OUT, model_type) == {derived}
    runtimes = " and ".join(DERIVED_HEADS[model_type])
    said = f"loads it. All query heads are there, which {runtimes} need for {model_type}."
    assert said in (config.out / "README.md").read_text()


def test_plan_says_who_needs_all_heads(tiny: Make, text: Path) -> None:
    command = ["plan", "--ratio", "0.2", "--recipe", "magnitude", "--layout"]
    said = "uniform layout: all query heads stay, since vLLM and mlx-lm ignore head_dim of qwen2"
    for layout, model, expected in (("uniform", "qwen2", True), ("free", "qwen2", False), ("uniform", "llama", False)):
        done = CliRunner().invoke(main, [*command, layout, str(tiny(model))])
        assert done.exit_code == 0, done.output
        assert (said in done.stdout) == expected


def test_blocks_with_equally_few_heads_are_not_stock_where_head_dim_is_derived(
    tiny: Make, configured: Any, tmp_path: Path
) -> None:
    kept = {f"blocks.{b}.{kind}": {"keep": keep} for b in range(3) for kind, keep in (("attention", 1), ("ffn", 16))}
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"format": "streamprune-plan-1", "ratio": 0.3, "sites": kept}))
    for name, stock in (("qwen2", False), ("qwen3", True)):
        config = configured(tiny(name), name, recipe="magnitude", ratio=None, plan=plan)
        streamprune.prune(config)
        written = json.loads((config.out / "config.json").read_text())
        assert (written["model_type"] == name) == stock
