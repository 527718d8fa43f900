"""Tokenize text and cut the tokens into windows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import CalibrationError, one_line
from ..model.names import COMPANIONS
from ..model.tokenizer import panics_as_errors
from ..system import files
from ..system.progress import Progress, Silent
from .documents import Conversation, Documents
from .source import Source, Spec, Text, source

DEFAULT_LENGTH = 2048
POOL = 1 << 22
"""Least number of characters of a source to draw windows from. A longer source is sampled down to about this size."""
POOL_PER_TOKEN = 16
"""Least number of characters to draw windows from, per token of all windows of the source."""
PIECE = 1 << 20
"""Characters tokenized at a time, to bound the memory that the tokenizer's own records take."""


def tokenize(tokenizer: Any, text: Spec, vocabulary: int) -> Tensor:
    """Tokenize a whole source in order, without adding special tokens: (tokens,) int64.

    Raises:
        CalibrationError: the text is unusable, or a token is outside the model's vocabulary.
    """
    given = source(text)
    documents = given.open()
    whole = "".join(text for _, text in _read(tokenizer, given, documents, range(len(documents))))
    if not whole.strip():
        raise CalibrationError(f"{given} is empty")
    return _encode(tokenizer, whole.removesuffix(documents.separator), vocabulary, given)


def sample(
    tokenizer: Any,
    text: Text,
    vocabulary: int,
    samples: int,
    length: int,
    seed: int,
    progress: Progress | None = None,
    *,
    bos: int | None = None,
) -> Tensor:
    """Draw windows at seeded random positions from every source, in proportion to its weight: (samples, length) int64.

    A source of up to `POOL` characters (more if many windows are needed) is read whole. From a longer source, random
    blocks are read until they hold that many characters.

    Args:
        progress: receives a message for each source with fewer tokens than its windows hold.
        bos: the token that every window begins with; see `sample_windows`.

    Raises:
        CalibrationError: a source is unusable or has too few tokens for one window.
        ConfigError: a source's weight is too small for a single window.
    """
    windows, own = [], length - (bos is not None)
    for number, (given, share) in enumerate(zip(text.sources, text.shares(samples), strict=True)):
        # Each source has another seed, so that two with the same content do not give the same windows.
        tokens = _pool(tokenizer, given, vocabulary, max(POOL, POOL_PER_TOKEN * share * own), seed + number)
        windows.append(sample_windows(tokens, share, length, seed + number, given, bos))
        if tokens.numel() < share * own:
            (progress or Silent()).say(
                f"{given} gives {tokens.numel():,} tokens, and {share:,} windows of {own:,} ask for "
                f"{share * own:,}: they overlap heavily; give more text, or lower samples or seq-len"
            )
    return torch.cat(windows)


def fingerprint(tokens: Tensor) -> str:
    """Identify windows (samples, length) int64 by the first 16 hex digits of the SHA-256 of their token ids."""
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16]


def _pool(tokenizer: Any, given: Source, vocabulary: int, size: int, seed: int) -> Tensor:
    """Tokenize a source, or random blocks of it that hold at least `size` characters: (tokens,) int64."""
    documents = given.open()
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    found: dict[int, str] = {}
    drawn = characters = 0
    while drawn < len(order) and characters < size:
        # Estimate from the blocks so far how many more are needed, but at most double their number: sizes vary widely.
        likely = -(-(size - characters) * drawn // max(characters, 1))
        numbers = sorted(order[drawn : drawn + max(1, min(drawn, likely))])
        for number, text in _read(tokenizer, given, documents, numbers):
            found[number] = text
            characters += len(text)
        drawn += len(numbers)
    if not any(text.strip() for text in found.values()):
        raise CalibrationError(f"{given} is empty")
    pieces = [""]
    for number in sorted(found):
        if len(pieces[-1]) >= PIECE and found[number]:
            pieces.append("")
        pieces[-1] += found.pop(number)
    pieces[-1] = pieces[-1].removesuffix(documents.separator)
    return torch.cat([_encode(tokenizer, piece, vocabulary, given) for piece in pieces])


def _read(tokenizer: Any, given: Source, documents: Documents, numbers: Sequence[int]) -> Iterator[tuple[int, str]]:
    """Read blocks as text: each document followed by the separator, conversations formatted by the chat template."""
    for number, block in documents.read(numbers):
        parts = [
            _conversation(tokenizer, document, given) if isinstance(document, list) else document + documents.separator
            for document in block
            if document
        ]
        yield number, "".join(parts)


def _conversation(tokenizer: Any, messages: Conversation, given: Source) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        raise CalibrationError(
            f"{given} has conversations, and the model's tokenizer has no chat template; choose a field of plain text"
        )
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:
        raise CalibrationError(
            f"{given}: the model's chat template refuses a conversation ({one_line(error)})"
        ) from error
    return text


def _encode(tokenizer: Any, text: str, vocabulary: int, given: Source) -> Tensor:
    try:
        with panics_as_errors():
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        tokens = torch.tensor(ids, dtype=torch.int64)
    except Exception as error:
        raise CalibrationError(f"{given}: the model's tokenizer cannot read it ({one_line(error)})") from error
    if not tokens.numel():
        raise CalibrationError(f"{given} has no tokens; check that the model's tokenizer files are complete")
    if int(tokens.max()) >= vocabulary:
        raise CalibrationError(
            f"{given}: the tokenizer gives token {int(tokens.max())}, but the model has {vocabulary}; they do not match"
        )
    return tokens


def window_length(asked: int | None, context: int | None) -> int:
    """Return the tokens per window: as asked, or by default 2048 or the model's context if that is shorter.

    Raises:
        CalibrationError: the length asked for exceeds the context.
    """
    if asked is not None and context is not None and asked > context:
        raise CalibrationError(f"seq-len is {asked}; the model's context is {context}")
    return asked or min(DEFAULT_LENGTH, context or DEFAULT_LENGTH)


def sample_windows(
    tokens: Tensor, samples: int, length: int, seed: int, source: object, bos: int | None = None
) -> Tensor:
    """Draw windows at seeded random positions in tokens (tokens,) int64: (samples, length) int64. They may overlap.

    Args:
        bos: the token that every window begins with, before `length` - 1 tokens of the text; None for `length` tokens.

    Raises:
        CalibrationError: there are too few tokens for one window. The message names the source.
    """
    tokens, length = _beside_bos(tokens, length, source, bos)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(tokens.numel() - length + 1, (samples,), generator=generator)
    return _begun(torch.stack([tokens[start : start + length] for start in starts.tolist()]), bos)


def random_windows(vocabulary: int, samples: int, length: int, seed: int, bos: int | None = None) -> Tensor:
    """Draw token ids uniformly from the vocabulary: (samples, length) int64.

    Greedy Output Approximation, appendix: random input for covariances without data.

    Args:
        bos: as in `sample_windows`.
    """
    own = length - (bos is not None)
    return _begun(torch.randint(vocabulary, (samples, own), generator=torch.Generator().manual_seed(seed)), bos)


def consecutive_windows(tokens: Tensor, length: int, source: object, bos: int | None = None) -> Tensor:
    """Cut tokens (tokens,) int64 into consecutive windows and drop the remainder: (windows, length) int64.

    Args:
        bos: as in `sample_windows`. Every token of the text is then predicted, the first of a window from BOS alone.

    Raises:
        CalibrationError: there are too few tokens for one window. The message names the source.
    """
    tokens, length = _beside_bos(tokens, length, source, bos)
    return _begun(tokens[: tokens.numel() // length * length].view(-1, length), bos)


def _beside_bos(tokens: Tensor, length: int, source: object, bos: int | None) -> tuple[Tensor, int]:
    """Return the tokens of the text without BOS at its beginning, and how many of them a window holds beside BOS."""
    if bos is not None:
        length -= 1
        if int(tokens[0]) == bos:  # chat templates begin their text with BOS
            tokens = tokens[1:]
    if tokens.numel() < length:
        raise CalibrationError(
            f"{source} has {tokens.numel()} tokens; one window needs {length}: give more text, or lower seq-len"
        )
    return tokens, length


def _begun(windows: Tensor, bos: int | None) -> Tensor:
    """Put BOS before each of the windows (windows, tokens) int64."""
    return windows if bos is None else F.pad(windows, (1, 0), value=bos)


def text_identity(text: Text, model: Path) -> dict[str, Any]:
    """Identify a text, and the tokenizer in the directory `model`, by digests, JSON-ready."""
    parts = ("token", "chat_template", "vocab.", "merges.")
    names = [name for name in COMPANIONS if any(part in name for part in parts) and (model / name).is_file()]
    return {
        "calibration": text.identity(),
        "tokenizer": {name: files.sha256(model / name) for name in names},
    }
