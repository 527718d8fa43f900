"""Tiny checkpoints of every architecture, made on the spot, and the shared trained models where they are."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from safetensors.torch import load_file, save_file

import streamprune

# Models this small run fastest on one thread.
torch.set_num_threads(1)

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
EXAMPLE = ROOT / "examples" / "docs-llama-7m"
EXAMPLE_TEXT = ROOT / "examples" / "text"
ALPHABET = "abcdefghijklmnopqrstuvwxyz .,"

# What each tiny model has of its own: grouped queries, explicit head_dim, biases, sliding windows, tied heads,
# norms after the residual sum, projected embeddings.
COMMON = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
GATED = {"intermediate_size": 48, "num_key_value_heads": 2}
TINY: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **GATED, "head_dim": 8, "tie_word_embeddings": True},
    "llama-biased": {
        "model_type": "llama",
        **GATED,
        "num_key_value_heads": 4,
        "head_dim": 6,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "mistral": {"model_type": "mistral", **GATED, "head_dim": 8, "sliding_window": 7},
    "qwen2": {
        "model_type": "qwen2",
        **GATED,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen3": {"model_type": "qwen3", **GATED, "head_dim": 12},
    "gpt2": {"model_type": "gpt2", "n_inner": 48},
    "opt": {"model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "opt-350m": {
        "model_type": "opt",
        "ffn_dim": 48,
        "word_embed_proj_dim": 16,
        "do_layer_norm_before": False,
        "dropout": 0.0,
    },
}


def shared(*parts: str) -> Path:
    """A path in the shared folder; skips the test where that is absent."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"../shared/{'/'.join(parts)} is not here")
    return path


def write_tokenizer(folder: Path) -> None:
    """A character tokenizer for `ALPHABET`; ids 0 and 1 are the specials."""
    vocabulary = {"<s>": 0, "</s>": 1, **{letter: index + 2 for index, letter in enumerate(ALPHABET)}}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": t,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for i, t in enumerate(["<s>", "</s>"])
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": ""}, "behavior": "Isolated", "invert": False},
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "</s>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def make_tiny(folder: Path, name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A random checkpoint of the named kind, with weights large enough to matter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {**COMMON, **TINY[name], **changes}
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            spread = 0.3 if parameter.dim() > 1 else 0.1
            noise = torch.randn_like(parameter) * spread
            parameter.copy_(noise + (1.0 if "norm" in parameter_name and parameter_name.endswith("weight") else 0.0))
    model.to(dtype).save_pretrained(folder, max_shard_size="20KB")
    write_tokenizer(folder)
    return folder


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Rewrite every shard after `change` had its tensors."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny("llama")`: a checkpoint directory, made once a session; not to be written to."""
    made: dict[Any, Path] = {}

    def get(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
        key = (name, dtype, *sorted(changes.items()))
        if key not in made:
            made[key] = make_tiny(tmp_path_factory.mktemp(name), name, dtype, **changes)
        return made[key]

    return get


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3000 random letters."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(random.Random(0).choices(ALPHABET, k=3000)))
    return path


@pytest.fixture
def configured(text: Path, tmp_path: Path) -> Callable[..., streamprune.Config]:
    """A small job's `Config`, with whatever is changed."""

    def make(model: Path, out: str = "out", **changes: Any) -> streamprune.Config:
        fields: dict[str, Any] = {
            "recipe": "sobp",
            "ratio": 0.3,
            "calibration": text,
            "samples": 12,
            "seq_len": 24,
            "round_to": 4,
        }
        return streamprune.Config(model=model, out=tmp_path / out, **{**fields, **changes})

    return make


@pytest.fixture
def float64_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' RMSNorms compute in float32 even in a float64 model: let them compute in float64."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.mistral.modeling_mistral import MistralRMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    def forward(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        epsilon = float(self.variance_epsilon)  # type: ignore[arg-type]
        return self.get_parameter("weight") * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)

    for norm in (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm):
        monkeypatch.setattr(norm, "forward", forward)


@pytest.fixture
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting for the disk: the bytes are the same, and half the time of a tiny job goes."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file's bytes by name but the log's; what a job spent, which an interruption may add to, is taken out of the report."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "log.txt":
            data = path.read_bytes()
            if path.name == "report.json":
                report = json.loads(data)
                for name in ("seconds", "operations", "forward_equivalents"):
                    report.pop(name, None)
                for site in report.get("sites", []):
                    site.pop("seconds")
                data = json.dumps(report).encode()
            found[str(path.relative_to(folder))] = data
    return found
