"""Results in other quantisers, as docs/deploy.md says: loaded, compared with the result in 16 bits, saved and loaded again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EXAMPLE
from torch import Tensor
from transformers import AutoModelForCausalLM

import streamprune

IDS = torch.arange(40, 104).view(2, 32)
# Of the logits' standard deviation, root mean square.
PRECISION = {
    "int8": 0.05,
    "nf4": 0.25,
    "torchao-int8": 0.05,
    "torchao-int4": 0.25,
    "W4A16": 0.25,
    "FP8_DYNAMIC": 0.15,
}


@pytest.fixture(scope="module", params=["free", "uniform"])
def result(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model, pruned by 20 %: in the free layout, two blocks alone."""
    blocks = (2, 4) if request.param == "free" else None
    config = streamprune.Config(
        model=EXAMPLE,
        out=tmp_path_factory.mktemp("result") / request.param,
        ratio=0.2,
        recipe="magnitude",
        layout=request.param,
        blocks=blocks,
        round_to=64,
    )
    return Path(streamprune.prune(config).out)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits.float()
    return found


def config_of(method: str) -> Any:
    import transformers

    if method in ("int8", "nf4"):
        pytest.importorskip("bitsandbytes", reason="the bitsandbytes package is not here")
        if method == "int8":
            return transformers.BitsAndBytesConfig(load_in_8bit=True)
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    torchao = pytest.importorskip("torchao.quantization", reason="the torchao package is not here")
    if method == "torchao-int8":
        return transformers.TorchAoConfig(torchao.Int8WeightOnlyConfig())
    groups = torchao.PerGroup(32)
    return transformers.TorchAoConfig(torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=groups))


def check(method: str, result: Path, found: Tensor, again: Callable[[], Any]) -> None:
    expected = logits(AutoModelForCausalLM.from_pretrained(result, trust_remote_code=True, dtype=torch.float32))
    error = float((found - expected).square().mean().sqrt() / expected.std())
    assert 1e-4 < error < PRECISION[method]
    torch.testing.assert_close(logits(again()), found, rtol=0.02, atol=0.02 * float(expected.std()))


@pytest.mark.filterwarnings("ignore:.*is deprecated")
@pytest.mark.parametrize("method", ["int8", "nf4", "torchao-int8", "torchao-int4"])
def test_transformers_quantises_while_it_loads(method: str, result: Path, tmp_path: Path) -> None:
    options = {"quantization_config": config_of(method), "trust_remote_code": True, "dtype": torch.bfloat16}
    quantised = AutoModelForCausalLM.from_pretrained(result, **options)
    quantised.save_pretrained(tmp_path)
    saved = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert saved < 0.7 * sum(path.stat().st_size for path in result.glob("*.safetensors"))
    check(
        method,
        result,
        logits(quantised),
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True),
    )


@pytest.mark.parametrize("method", ["FP8_DYNAMIC", "W4A16"])
def test_llm_compressor(method: str, result: Path, tmp_path: Path, matrix: Any) -> None:
    llmcompressor = pytest.importorskip("llmcompressor", reason="the llmcompressor package is not here")
    from llmcompressor.modifiers.quantization import QuantizationModifier

    model = AutoModelForCausalLM.from_pretrained(result, trust_remote_code=True, dtype=torch.bfloat16)
    options = {"config_groups": matrix.GROUPS} if method == "W4A16" else {"targets": "Linear", "scheme": method}
    recipe = QuantizationModifier(**options, ignore=["lm_head"])
    llmcompressor.oneshot(model=model, recipe=recipe, trust_remote_code_model=True)
    # Before it is saved, which replaces the weights.
    found = logits(model)
    model.save_pretrained(tmp_path, save_compressed=True)
    check(method, result, found, lambda: AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True))
