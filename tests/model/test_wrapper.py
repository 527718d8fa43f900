"""Multimodal models: the text model is pruned in place, everything else is carried over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import contents, make_tiny, write_tokenizer
from safetensors.torch import load_file
from transformers import AutoModel

import streamprune
from streamprune.errors import ConfigError
from streamprune.model.hub import load

IMAGE = 35
"""Token that stands for a piece of an image."""
TEXT = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "sliding_window": 6,
}
TOWER = {
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "vision_use_head": False,
}


@pytest.fixture(scope="module")
def wrapper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Gemma 3 with a random vision tower: four tokens an image."""
    from transformers import AutoModelForImageTextToText, Gemma3Config

    folder = tmp_path_factory.mktemp("gemma3")
    torch.manual_seed(1)
    config = Gemma3Config(
        text_config=TEXT,
        vision_config=TOWER,
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=36,
        eoi_token_index=37,
    )
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.1))
            if "norm" in name and "vision" in name and name.endswith("weight"):
                parameter.add_(1.0)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "Gemma3ImageProcessor"}')
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog, and then some more. " * 40)
    return path


def pruned(wrapper: Path, out: Path, text: Path, **options: Any) -> Path:
    streamprune.prune(
        streamprune.Config(
            model=wrapper,
            out=out,
            ratio=0.3,
            recipe="sobp",
            samples=6,
            seq_len=24,
            calibration=text,
            round_to=4,
            **options,
        )
    )
    return out


def logits(model: Any) -> torch.Tensor:
    """Logits (1, tokens, vocabulary) of a prompt with an image in it."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.tensor([[3, 4, 36, *[IMAGE] * 4, 37, 9, 12, 6]])
    pixels = torch.randn(1, 3, 16, 16, generator=generator)
    with torch.no_grad():
        found: torch.Tensor = model(
            input_ids=ids, pixel_values=pixels, token_type_ids=(ids == IMAGE).long(), use_cache=False
        ).logits
    return found


def test_answers_on_an_image_are_those_of_a_wrapper_around_the_pruned_text_model(
    wrapper: Path, text: Path, tmp_path: Path
) -> None:
    """By hand: the dense wrapper, with the blocks of the text model that `--text-only` writes."""
    whole = load(pruned(wrapper, tmp_path / "whole", text), dtype=torch.float32).eval()
    alone = load(pruned(wrapper, tmp_path / "alone", text, text_only=True), dtype=torch.float32).eval()
    dense = load(wrapper, dtype=torch.float32).eval()
    before = logits(dense)
    dense.model.language_model.layers = alone.model.layers
    assert torch.equal(logits(whole), logits(dense))
    assert not torch.allclose(logits(whole), before)
    shapes = [block.mlp.down_proj.weight.shape for block in whole.model.language_model.layers]
    assert any(shape[1] < TEXT["intermediate_size"] for shape in shapes)  # type: ignore[operator]


def test_the_rest_is_carried_over(wrapper: Path, text: Path, tmp_path: Path) -> None:
    out = pruned(wrapper, tmp_path / "out", text)
    before = load_file(wrapper / "model.safetensors")
    after = {name: tensor for path in out.glob("*.safetensors") for name, tensor in load_file(path).items()}
    tower = [name for name in after if "language_model" not in name and name != "lm_head.weight"]
    stored = {name.replace("language_model.model.", "model.language_model."): tensor for name, tensor in before.items()}
    found = {name.removeprefix("model."): tensor for name, tensor in after.items()}
    for name in tower:
        own = name.removeprefix("model.")
        assert torch.equal(found[own], stored.get(own, stored.get(name)))  # type: ignore[arg-type]
    assert len(tower) > 20
    assert (out / "preprocessor_config.json").read_bytes() == (wrapper / "preprocessor_config.json").read_bytes()
    assert streamprune.verify(out).faults == ()
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["PrunedGemma3ForConditionalGeneration"]
    named = {"Model", "ModelForCausalLM", "ModelForImageTextToText", "ModelForSequenceClassification", "Config"}
    assert set(config["auto_map"]) == {f"Auto{name}" for name in named}


def test_vllm_refuses_a_wrapper(wrapper: Path, text: Path, tmp_path: Path) -> None:
    """It would take the text model's head counts for all blocks."""
    model = load(pruned(wrapper, tmp_path / "out", text), dtype=torch.float32)
    assert not model.config.is_heterogeneous
    model.config.get_text_config()._attn_implementation_internal = "vllm"
    with pytest.raises(ValueError, match=r"vLLM cannot be told .* prune its text model alone"):
        AutoModel.from_config(model.config)


def test_a_result_is_pruned_again(wrapper: Path, text: Path, tmp_path: Path) -> None:
    """A pruned wrapper is a source like any other."""
    first = pruned(wrapper, tmp_path / "first", text)
    second = pruned(first, tmp_path / "second", text)
    once, twice = (streamprune.inspect(path)["model"] for path in (first, second))
    assert twice["block_parameters"] < once["block_parameters"]
    assert twice["carried"] == once["carried"] > 0
    assert contents(second)


def test_text_only_needs_a_multimodal_model(wrapper: Path, text: Path, tmp_path: Path) -> None:
    alone = pruned(wrapper, tmp_path / "alone", text, text_only=True)
    assert json.loads((alone / "config.json").read_text())["model_type"] == "streamprune_gemma3_text"
    with pytest.raises(ConfigError, match=r"text_only is on; .* is a text model already"):
        pruned(alone, tmp_path / "again", text, text_only=True)


def test_loading_a_pruned_model_leaves_the_rules_of_its_source_alone(tmp_path: Path, text: Path) -> None:
    """Pruned mixtures register names of their own with transformers, under a model_type of their own."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    from streamprune.model.whole import load_whole

    before = repr(get_checkpoint_conversion_mapping("mixtral"))
    out = pruned(make_tiny(tmp_path / "mixtral", "mixtral"), tmp_path / "out", text)
    load_whole(out)
    assert repr(get_checkpoint_conversion_mapping("mixtral")) == before


def test_the_card_names_the_class_that_reads_images(wrapper: Path, text: Path, tmp_path: Path) -> None:
    """vLLM cannot run it in the free layout, and the text model alone has the usual class."""
    for alone, auto in ((False, "AutoModelForImageTextToText"), (True, "AutoModelForCausalLM")):
        out = pruned(wrapper, tmp_path / auto, text, text_only=alone)
        card = (out / "README.md").read_text()
        assert f'{auto}.from_pretrained("OUT", dtype="auto"' in card
        assert ("of the blocks of a gemma3 model; prune with --text-only" in card) == (not alone)
