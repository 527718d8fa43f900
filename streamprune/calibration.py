"""Text to tokens to windows."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import CalibrationError, CheckpointError

DEFAULT_LENGTH = 2048


def builtin_text() -> Path:
    """A small English sample, for a first try; text of the user's own domain is better."""
    return Path(str(resources.files("streamprune") / "data" / "english.txt"))


def load_tokenizer(directory: Path) -> Any:
    """The model's own tokenizer.

    Raises:
        CheckpointError: there is none, or transformers cannot read it.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(f"{directory}: no tokenizer that transformers can read ({reason})") from error


def read_text(path: Path) -> str:
    """A whole UTF-8 file.

    Raises:
        CalibrationError: missing, not UTF-8, or empty.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CalibrationError(f"cannot read the text {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 text (byte {error.start})") from error
    if not text.strip():
        raise CalibrationError(f"{path} is empty")
    return text


def tokenize(tokenizer: Any, path: Path, vocabulary: int) -> Tensor:
    """The whole text as token ids, no special tokens added: (tokens,) int64.

    Raises:
        CalibrationError: the text is unusable, or a token lies outside the model's vocabulary.
    """
    ids = tokenizer(read_text(path), add_special_tokens=False, verbose=False)["input_ids"]
    tokens = torch.tensor(ids, dtype=torch.int64)
    if not tokens.numel():
        raise CalibrationError(f"the tokenizer makes no tokens of {path}; are the model's tokenizer files there?")
    if int(tokens.max()) >= vocabulary:
        raise CalibrationError(
            f"{path}: the tokenizer gives token {int(tokens.max())}, but the model has {vocabulary}; they do not belong together"
        )
    return tokens


def window_length(asked: int | None, context: int | None) -> int:
    """Tokens a window: what was asked, else 2048 or the model's context if that is shorter.

    Raises:
        CalibrationError: more than the context was asked for.
    """
    if asked is not None and context is not None and asked > context:
        raise CalibrationError(f"seq-len is {asked}; the model's context is {context}")
    return asked or min(DEFAULT_LENGTH, context or DEFAULT_LENGTH)


def sample_windows(tokens: Tensor, samples: int, length: int, seed: int, source: Path) -> Tensor:
    """`samples` windows at seeded random places: (samples, length) int64. They may overlap.

    Raises:
        CalibrationError: the text has fewer than `length` tokens.
    """
    if tokens.numel() < length:
        raise CalibrationError(f"{source} has {tokens.numel()} tokens; one window needs {length}")
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(tokens.numel() - length + 1, (samples,), generator=generator)
    return torch.stack([tokens[start : start + length] for start in starts.tolist()])


def random_windows(vocabulary: int, samples: int, length: int, seed: int) -> Tensor:
    """Token ids drawn evenly from the vocabulary: (samples, length) int64.

    Greedy Output Approximation, appendix: random input for covariances without data.
    """
    return torch.randint(vocabulary, (samples, length), generator=torch.Generator().manual_seed(seed))


def consecutive_windows(tokens: Tensor, length: int, source: Path) -> Tensor:
    """The text cut into windows in order, a remainder dropped: (windows, length) int64.

    Raises:
        CalibrationError: the text has fewer than `length` tokens.
    """
    windows = tokens.numel() // length
    if windows == 0:
        raise CalibrationError(f"{source} has {tokens.numel()} tokens; one window needs {length}")
    return tokens[: windows * length].view(windows, length)
