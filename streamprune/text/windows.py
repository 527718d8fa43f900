"""Tokenize text and cut the tokens into windows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import CalibrationError, ConfigError, one_line
from ..model.names import COMPANIONS
from ..model.tokenizer import IGNORED, panics_as_errors
from ..system import files
from ..system.progress import Progress, Silent
from . import conversations
from .conversations import ChatError
from .documents import Conversation, Document, Documents
from .source import Cut, LossOn, Source, Spec, Text, source

DEFAULT_LENGTH = 2048
POOL = 1 << 22
"""Least number of characters of a source to draw windows from. A longer source is sampled down to about this size."""
POOL_PER_TOKEN = 16
"""Least number of characters to draw windows from, per token of all windows of the source."""
PIECE = 1 << 20
"""Characters tokenized at a time, to bound the memory that the tokenizer's own records take."""


@dataclass(frozen=True)
class Tokens:
    """A text as tokens."""

    ids: Tensor
    """(n,) int64."""
    labels: Tensor
    """(n,) int64: the ids, and `IGNORED` for those whose prediction is not part of losses."""
    starts: Tensor
    """(documents,) int64: where documents begin, ascending. Those of a text that is tokenised as one count as one."""

    @classmethod
    def join(cls, parts: Sequence[tuple[Tensor, Tensor]]) -> Tokens:
        """Join documents, each with its ids and labels."""
        ids = torch.cat([ids for ids, _ in parts])
        labels = ids if all(own is each for own, each in parts) else torch.cat([each for _, each in parts])
        return cls(ids, labels, torch.tensor([0, *(len(each) for each, _ in parts[:-1])]).cumsum(0))

    def __len__(self) -> int:
        return self.ids.numel()


@dataclass(frozen=True)
class Windows:
    """Windows of a text."""

    tokens: Tensor
    """(samples, length) int64."""
    labels: Tensor
    """(samples, length) int64: the tokens, and `IGNORED` for those whose prediction is not part of losses."""

    @classmethod
    def of(cls, tokens: Tensor) -> Windows:
        """Windows (samples, length) int64 of which every prediction counts."""
        return cls(tokens, tokens)

    @property
    def fingerprint(self) -> str:
        """The first 16 hex digits of the SHA-256 of the token ids and, if not all count, of the labels."""
        digest = hashlib.sha256(self.tokens.numpy().tobytes())
        if not torch.equal(self.tokens, self.labels):
            digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()[:16]


def counted(labels: Tensor) -> int:
    """Return how many predictions count: of labels (samples, length), all but the first of each row and `IGNORED` ones."""
    return int((labels[:, 1:] != IGNORED).sum())


def tokenize(tokenizer: Any, text: Spec, vocabulary: int, *, loss_on: LossOn = "all", cut: Cut = "anywhere") -> Tokens:
    """Tokenize a whole source in order, without adding special tokens.

    Args:
        loss_on, cut: as in `sample`.

    Raises:
        CalibrationError: the text is unusable, or a token is outside the model's vocabulary.
        ConfigError: the source has no documents, and `cut` needs them.
    """
    given = source(text)
    documents = given.open()
    reader = _Reader(tokenizer, given, documents, vocabulary, loss_on, _checked(cut, given, documents), piece=None)
    return reader.tokens([part for _, parts in reader.read(range(len(documents))) for part in parts])


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
    loss_on: LossOn = "all",
    cut: Cut = "anywhere",
) -> Windows:
    """Draw windows from every source, in proportion to its weight.

    A source of up to `POOL` characters (more if many windows are needed) is read whole. From a longer source, random
    blocks are read until they hold that many characters.

    Args:
        progress: receives a message for each source with fewer tokens than its windows hold, and for windows without a
            prediction that counts.
        bos: the token that every window begins with; see `sample_windows`.
        loss_on: which tokens' predictions count: ``all``, or those that the ``assistant`` of a conversation says.
        cut: where windows begin: see `sample_windows` (``anywhere``) and `document_windows` (``documents``).

    Raises:
        CalibrationError: a source is unusable or has too few tokens for one window.
        ConfigError: a source's weight is too small for a single window, or see `tokenize`.
    """
    found, own, progress = [], length - (bos is not None), progress or Silent()
    for number, (given, share) in enumerate(zip(text.sources, text.shares(samples), strict=True)):
        # Each source has another seed, so that two with the same content do not give the same windows.
        size, own_seed = max(POOL, POOL_PER_TOKEN * share * own), seed + number
        tokens = _pool(tokenizer, given, vocabulary, size, own_seed, loss_on, cut)
        draw = document_windows if cut == "documents" else sample_windows
        windows = draw(tokens, share, length, own_seed, given, bos)
        found.append(windows)
        if len(tokens) < share * own:
            progress.say(
                f"{given} gives {len(tokens):,} tokens, and {share:,} windows of {own:,} ask for "
                f"{share * own:,}: they overlap heavily; give more text, or lower samples or seq-len"
            )
        if empty := sum(not counted(labels[None]) for labels in windows.labels):
            problem = f"{empty:,} of {share:,} windows of {length:,} tokens hold no token of the assistant"
            if empty == share:
                raise CalibrationError(f"{given}: {problem}; raise seq-len")
            progress.say(f"{given}: {problem} and have no loss")
    return _joined(found, loss_on)


def _joined(windows: Sequence[Windows], loss_on: LossOn) -> Windows:
    tokens = torch.cat([each.tokens for each in windows])
    return Windows.of(tokens) if loss_on == "all" else Windows(tokens, torch.cat([each.labels for each in windows]))


def whole(
    tokenizer: Any,
    text: Text,
    vocabulary: int,
    length: int,
    *,
    bos: int | None = None,
    loss_on: LossOn = "all",
    cut: Cut = "anywhere",
) -> Windows:
    """Cut every source into windows, each once and in order; what does not fill a window is dropped.

    Args:
        bos, loss_on, cut: as in `sample`.

    Raises:
        CalibrationError: a source is unusable or has too few tokens for one window, or none of the assistant.
        ConfigError: sources have different weights, or see `tokenize`.
    """
    if len({given.weight for given in text.sources}) > 1:
        raise ConfigError(f"the text {text} is read whole, without weights; leave them out")
    found = []
    for given in text.sources:
        tokens = tokenize(tokenizer, given, vocabulary, loss_on=loss_on, cut=cut)
        if cut == "documents":
            windows = document_windows(tokens, None, length, 0, given, bos)
        else:
            windows = consecutive_windows(tokens, length, given, bos)
        if not counted(windows.labels):
            raise CalibrationError(
                f"{given}: no window of {length:,} tokens holds a token of the assistant; raise seq-len"
            )
        found.append(windows)
    return _joined(found, loss_on)


def _pool(tokenizer: Any, given: Source, vocabulary: int, size: int, seed: int, loss_on: LossOn, cut: Cut) -> Tokens:
    """Tokenize a source, or random blocks of it that hold at least `size` characters."""
    documents = given.open()
    reader = _Reader(tokenizer, given, documents, vocabulary, loss_on, _checked(cut, given, documents), piece=PIECE)
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    found: dict[int, list[_Part]] = {}
    drawn = characters = 0
    while drawn < len(order) and characters < size:
        # Estimate from the blocks so far how many more are needed, but at most double their number: sizes vary widely.
        likely = -(-(size - characters) * drawn // max(characters, 1))
        numbers = sorted(order[drawn : drawn + max(1, min(drawn, likely))])
        for number, parts in reader.read(numbers):
            found[number] = parts
            characters += sum(len(part.text) for part in parts)
        drawn += len(numbers)
    return reader.tokens([part for number in sorted(found) for part in found.pop(number)])


def _checked(cut: Cut, given: Source, documents: Documents) -> bool:
    """Return whether windows begin where documents do."""
    if cut == "documents" and documents.field is None:
        raise ConfigError(f"{given} is one text; windows is 'documents', which needs a file or dataset with rows")
    return cut == "documents"


@dataclass
class _Part:
    """A document as text, or several that are tokenised as one."""

    text: str
    conversation: Conversation | None = None


@dataclass
class _Reader:
    """Reads a source's documents and tokenises them."""

    tokenizer: Any
    given: Source
    documents: Documents
    vocabulary: int
    loss_on: LossOn
    apart: bool
    """Whether every document is tokenised alone; conversations always are."""
    piece: int | None
    """Characters of text that are tokenised at a time; None for all."""

    def read(self, numbers: Sequence[int]) -> Iterator[tuple[int, list[_Part]]]:
        """Read blocks: each document followed by the separator, conversations rendered by the chat template."""
        for number, block in self.documents.read(numbers):
            yield number, [self._part(document) for document in block if document]

    def _part(self, document: Document) -> _Part:
        if isinstance(document, Conversation):
            if getattr(self.tokenizer, "chat_template", None) is None:
                raise CalibrationError(
                    f"{self.given} has conversations, and the model's tokenizer has no chat template; choose a field of plain text"
                )
            try:
                return _Part(conversations.render(self.tokenizer, document.messages), document)
            except ChatError as error:
                raise self.documents.error(document.at, str(error)) from error
        if self.loss_on == "assistant":
            raise CalibrationError(
                f"{self.given} has plain text; loss_on is 'assistant', which needs conversations: name a field of messages, or "
                "instruction, after a colon"
            )
        return _Part(document + self.documents.separator)

    def tokens(self, parts: Iterable[_Part]) -> Tokens:
        """Tokenize documents in order."""
        pieces: list[_Part] = []
        for part in parts:
            alone = part.conversation or self.apart or not pieces or pieces[-1].conversation
            if alone or (self.piece is not None and len(pieces[-1].text) >= self.piece):
                pieces.append(part)
            else:
                pieces[-1].text += part.text
        if pieces and pieces[-1].conversation is None:
            pieces[-1].text = pieces[-1].text.removesuffix(self.documents.separator)
        if not any(piece.text.strip() for piece in pieces):
            raise CalibrationError(f"{self.given} is empty")
        found = [part for part in map(self._encoded, pieces) if len(part[0])]
        if not found:
            raise CalibrationError(f"{self.given} has no tokens; check that the model's tokenizer files are complete")
        return Tokens.join(found)

    def _encoded(self, piece: _Part) -> tuple[Tensor, Tensor]:
        if piece.conversation is None or self.loss_on == "all":
            ids = encode(self.tokenizer, piece.text, self.vocabulary, self.given)
            return ids, ids
        try:
            with panics_as_errors():
                found, said = conversations.encode(self.tokenizer, piece.conversation.messages)
        except ChatError as error:
            raise self.documents.error(piece.conversation.at, str(error)) from error
        ids = _in_vocabulary(torch.tensor(found, dtype=torch.int64), self.vocabulary, self.given)
        return ids, ids.where(torch.tensor(said), IGNORED)


def encode(tokenizer: Any, text: str, vocabulary: int, given: Source) -> Tensor:
    """Return the token ids (n,) int64 of a text, without special tokens.

    Raises:
        CalibrationError: the tokenizer cannot read it, or gives a token outside the vocabulary. The message names `given`.
    """
    try:
        with panics_as_errors():
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        tokens = torch.tensor(ids, dtype=torch.int64)
    except Exception as error:
        raise CalibrationError(f"{given}: the model's tokenizer cannot read it ({one_line(error)})") from error
    return _in_vocabulary(tokens, vocabulary, given)


def _in_vocabulary(tokens: Tensor, vocabulary: int, given: Source) -> Tensor:
    if len(tokens) and int(tokens.max()) >= vocabulary:
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
    tokens: Tokens, samples: int, length: int, seed: int, source: object, bos: int | None = None
) -> Windows:
    """Draw windows at seeded random positions. They may overlap.

    Args:
        bos: the token that every window begins with, before `length` - 1 tokens of the text; None for `length` tokens.

    Raises:
        CalibrationError: there are too few tokens for one window. The message names the source.
    """
    first, own = _beside_bos(tokens, length, source, bos)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(first, len(tokens) - own + 1, (samples,), generator=generator)
    return _windows(tokens, (torch.arange(start, start + own) for start in starts.tolist()), length, bos)


def document_windows(
    tokens: Tokens, samples: int | None, length: int, seed: int, source: object, bos: int | None = None
) -> Windows:
    """Fill each window with whole documents, of which the last is cut off; the next window begins with the next document.

    So windows hold no padding, and begin where a document does. The documents are in a seeded random order, which is drawn
    again once all are used.

    Args:
        samples: number of windows; None takes the documents once, in their order, and drops what does not fill a window.
        bos: the token that every window begins with. Documents that begin with it, as chat templates may write them, do
            not have it twice there.

    Raises:
        CalibrationError: there are too few tokens for one window. The message names the source.
    """
    _beside_bos(tokens, length, source, bos)
    ends = [*tokens.starts[1:].tolist(), len(tokens)]
    places = [torch.arange(*place) for place in zip(tokens.starts.tolist(), ends, strict=True)]
    generator = torch.Generator().manual_seed(seed)

    def order() -> Iterator[int]:
        if samples is None:
            yield from range(len(places))
        while samples is not None:
            yield from torch.randperm(len(places), generator=generator).tolist()

    def packed() -> Iterator[Tensor]:
        held: list[Tensor] = []
        for number in order():
            held.append(places[number])
            own = length - (bos is not None and int(tokens.ids[held[0][0]]) != bos)
            if sum(map(len, held)) >= own:
                yield torch.cat(held)[:own]
                held = []

    return _windows(tokens, islice(packed(), samples), length, bos)


def random_windows(vocabulary: int, samples: int, length: int, seed: int, bos: int | None = None) -> Tensor:
    """Draw token ids uniformly from the vocabulary: (samples, length) int64.

    Greedy Output Approximation, appendix: random input for covariances without data.

    Args:
        bos: as in `sample_windows`.
    """
    own = length - (bos is not None)
    drawn = torch.randint(vocabulary, (samples, own), generator=torch.Generator().manual_seed(seed))
    return drawn if bos is None else F.pad(drawn, (1, 0), value=bos)


def consecutive_windows(tokens: Tokens, length: int, source: object, bos: int | None = None) -> Windows:
    """Cut tokens into consecutive windows and drop the remainder.

    Args:
        bos: as in `sample_windows`. Every token of the text is then predicted, the first of a window from BOS alone.

    Raises:
        CalibrationError: there are too few tokens for one window. The message names the source.
    """
    first, own = _beside_bos(tokens, length, source, bos)
    starts = range(first, len(tokens) - own + 1, own)
    return _windows(tokens, (torch.arange(start, start + own) for start in starts), length, bos)


def _beside_bos(tokens: Tokens, length: int, source: object, bos: int | None) -> tuple[int, int]:
    """Return the position of the first token after BOS, and how many tokens a window holds beside BOS."""
    # Chat templates begin their text with BOS.
    first = int(bos is not None and int(tokens.ids[0]) == bos)
    own = length - (bos is not None)
    if len(tokens) - first < own:
        raise CalibrationError(
            f"{source} has {len(tokens) - first} tokens; one window needs {own}: give more text, or lower seq-len"
        )
    return first, own


def _windows(tokens: Tokens, positions: Iterable[Tensor], length: int, bos: int | None) -> Windows:
    """Make windows of `length` tokens from their positions in the text, with BOS before those that lack one token."""
    ids, labels = [], []
    for each in positions:
        missing = (length - len(each), 0)
        ids.append(F.pad(tokens.ids[each], missing, value=0 if bos is None else bos))
        labels.append(F.pad(tokens.labels[each], missing, value=IGNORED))
    plain = tokens.labels is tokens.ids
    found = torch.stack(ids)
    return Windows.of(found) if plain else Windows(found, torch.stack(labels))


def text_identity(text: Text, model: Path) -> dict[str, Any]:
    """Identify a text, and the tokenizer in the directory `model`, by digests, JSON-ready."""
    parts = ("token", "chat_template", "vocab.", "merges.")
    names = [name for name in COMPANIONS if any(part in name for part in parts) and (model / name).is_file()]
    return {
        "calibration": text.identity(),
        "tokenizer": {name: files.sha256(model / name) for name in names},
    }
