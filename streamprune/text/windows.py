"""Text to tokens to windows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
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
"""Characters of a source that windows are drawn from, at the least; a longer source is thinned to about so many."""
POOL_PER_TOKEN = 16
"""The same per token of all its windows."""
PIECE = 1 << 20
"""Characters that are tokenised at once, so that the tokenizer's own records of a long text do not pile up."""


def tokenize(tokenizer: Any, text: Spec, vocabulary: int) -> Tensor:
    """A source whole and in order as token ids, no special tokens added: (tokens,) int64.

    Raises:
        CalibrationError: the text is unusable, or a token lies outside the model's vocabulary.
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
) -> Tensor:
    """Windows at seeded random places of every source, as many as its weight asks for: (samples, length) int64.

    A source of up to `POOL` characters (more, where many windows are asked for) is read whole; of a longer one, blocks
    are drawn until they have so many.

    Args:
        progress: is told of each source with fewer tokens than its windows hold, which then overlap heavily.

    Raises:
        CalibrationError: a source is unusable or has fewer than `length` tokens.
        ConfigError: a source's weight is worth no window.
    """
    windows = []
    for number, (given, share) in enumerate(zip(text.sources, text.shares(samples), strict=True)):
        # Two sources with the same content shall not give the same windows.
        own = seed + number
        tokens = _pool(tokenizer, given, vocabulary, max(POOL, POOL_PER_TOKEN * share * length), own)
        windows.append(sample_windows(tokens, share, length, own, given))
        if tokens.numel() < share * length:
            (progress or Silent()).say(
                f"{given} gives {tokens.numel():,} tokens, and {share:,} windows of {length:,} ask for "
                f"{share * length:,}: they overlap heavily; give more text, or lower samples or seq-len"
            )
    return torch.cat(windows)


def fingerprint(tokens: Tensor) -> str:
    """What tells windows (samples, length) int64 from others: the start of their ids' SHA-256."""
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16]


def _pool(tokenizer: Any, given: Source, vocabulary: int, size: int, seed: int) -> Tensor:
    """Tokens of a source, or of blocks drawn from it until they have `size` characters: (tokens,) int64."""
    documents = given.open()
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    found: dict[int, str] = {}
    drawn = characters = 0
    while drawn < len(order) and characters < size:
        # As many more as those so far make likely, but at most twice as many in all: blocks may differ much.
        likely = -(-(size - characters) * drawn // max(characters, 1))
        numbers = sorted(order[drawn : drawn + max(1, min(drawn, likely))])
        for number, text in _read(tokenizer, given, documents, numbers):
            found[number] = text
            characters += len(text)
        drawn += len(numbers)
    if not any(text.strip() for text in found.values()):
        raise CalibrationError(f"{given} is empty")
    pieces = list(_pieces(text for _, text in sorted(found.items())))
    del found
    pieces[-1] = pieces[-1].removesuffix(documents.separator)
    return torch.cat([_encode(tokenizer, piece, vocabulary, given) for piece in pieces])


def _read(tokenizer: Any, given: Source, documents: Documents, numbers: Sequence[int]) -> Iterator[tuple[int, str]]:
    """Blocks as text: their documents, each with the separator behind it, and conversations as the model's template has them.

    Raises:
        CalibrationError: the text is unusable, or there is no template.
    """
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
            f"{given} has conversations, and the model's tokenizer no chat template to write them with; "
            "take a field of plain text"
        )
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:
        raise CalibrationError(
            f"{given}: the model's chat template refuses a conversation ({one_line(error)})"
        ) from error
    return text


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    """Texts put together until they have `PIECE` characters."""
    parts: list[str] = []
    for text in texts:
        parts.append(text)
        if sum(map(len, parts)) >= PIECE:
            yield "".join(parts)
            parts = []
    if rest := "".join(parts):
        yield rest


def _encode(tokenizer: Any, text: str, vocabulary: int, given: Source) -> Tensor:
    try:
        with panics_as_errors():
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        tokens = torch.tensor(ids, dtype=torch.int64)
    except Exception as error:
        raise CalibrationError(f"{given}: the model's tokenizer cannot read it ({one_line(error)})") from error
    if not tokens.numel():
        raise CalibrationError(f"the tokenizer makes no tokens of {given}; are the model's tokenizer files there?")
    if int(tokens.max()) >= vocabulary:
        raise CalibrationError(
            f"{given}: the tokenizer gives token {int(tokens.max())}, but the model has {vocabulary}; they do not belong together"
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


def sample_windows(tokens: Tensor, samples: int, length: int, seed: int, source: object) -> Tensor:
    """`samples` windows at seeded random places: (samples, length) int64. They may overlap.

    Raises:
        CalibrationError: the text has fewer than `length` tokens.
    """
    if tokens.numel() < length:
        raise CalibrationError(
            f"{source} has {tokens.numel()} tokens; one window needs {length}: give more text, or lower seq-len"
        )
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(tokens.numel() - length + 1, (samples,), generator=generator)
    return torch.stack([tokens[start : start + length] for start in starts.tolist()])


def random_windows(vocabulary: int, samples: int, length: int, seed: int) -> Tensor:
    """Token ids drawn evenly from the vocabulary: (samples, length) int64.

    Greedy Output Approximation, appendix: random input for covariances without data.
    """
    return torch.randint(vocabulary, (samples, length), generator=torch.Generator().manual_seed(seed))


def consecutive_windows(tokens: Tensor, length: int, source: object) -> Tensor:
    """The text cut into windows in order, a remainder dropped: (windows, length) int64.

    Raises:
        CalibrationError: the text has fewer than `length` tokens.
    """
    windows = tokens.numel() // length
    if windows == 0:
        raise CalibrationError(
            f"{source} has {tokens.numel()} tokens; one window needs {length}: give more text, or lower seq-len"
        )
    return tokens[: windows * length].view(windows, length)


def text_identity(text: Text, model: Path) -> dict[str, Any]:
    """What tells a text and its tokenizer from others: digests.

    Raises:
        CalibrationError: the text cannot be read.
    """
    parts = ("token", "chat_template", "vocab.", "merges.")
    found = {name: model / name for name in COMPANIONS if any(part in name for part in parts)}
    return {
        "calibration": text.identity(),
        "tokenizer": {name: files.sha256(path) for name, path in found.items() if path.is_file()},
    }
