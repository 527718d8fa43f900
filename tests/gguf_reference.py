"""What llama.cpp itself makes of an exported file, and byte-level tokenizers for tiny models."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT

VOCABULARY = 320
TEXT = """It's 12345 o'clock; WE'LL see 3.14159 things,  two spaces\tand tabs.\n\n\n  New lines \r\n too: naïve café, Ελλάδα 東京 🙂🙂
don't They'RE I'm x=y+1 /path/to/file.txt "quoted" (nested [brackets]) A1b2C3 HTTPServer camelCase ¼ ² Ⅷ   """


def write_byte_tokenizer(folder: Path, pre_tokenizer: Any = None, **model: Any) -> None:
    """A byte-level BPE of `VOCABULARY` pieces learnt from `TEXT`; ids 0 and 1 are the specials."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def runtime() -> Any:
    """benchmarks/runtime.py as a module."""
    pytest.importorskip("xllamacpp", reason="the xllamacpp package is not here")
    spec = importlib.util.spec_from_file_location("runtime", ROOT / "benchmarks" / "runtime.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules.setdefault("runtime", importlib.util.module_from_spec(spec))
    if not hasattr(module, "Llama"):
        spec.loader.exec_module(module)
    return module


def opened(path: Path, length: int = 64) -> Any:
    """The file in llama.cpp, its key/value cache in float32."""
    return runtime().Llama(path, length, exact=True)


def runtime_logits(path: Path, ids: Sequence[int]) -> np.ndarray[Any, Any]:
    """llama.cpp's logits for a window, (tokens, vocabulary) float32."""
    model = opened(path, len(ids))
    logits: np.ndarray[Any, Any] = model.eval(list(ids))
    model.close()
    return logits


def stock_logits(folder: Path, ids: Sequence[int]) -> np.ndarray[Any, Any]:
    """transformers' logits for a window in float32, (tokens, vocabulary)."""
    import streamprune

    model = streamprune.load(folder, dtype=torch.float32)
    with torch.no_grad():
        logits: np.ndarray[Any, Any] = model(torch.tensor([list(ids)])).logits[0].numpy()
    return logits
