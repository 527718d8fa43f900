"""Prompts for a model to answer: read from a file or dataset, and rendered by the chat template where there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CalibrationError, ConfigError
from . import conversations
from .conversations import ASSISTANT, ChatError
from .documents import Conversation, Document
from .source import Source, Text
from .windows import encode, text_identity


class Prompts:
    """A source's prompts in a seeded random order.

    Each row is one: a text, or a conversation, whose last turns are dropped if they are the assistant's. In a text file,
    each line that is not blank is one. With a chat template, a text is what the user says, and the prompt ends where the
    assistant's turn begins.

    Args:
        bos: the token that every prompt begins with, also if the chat template does not write it; None for no more than
            that.
        length: tokens that a prompt must be shorter than, at least for the first `samples`.

    Raises:
        CalibrationError: the source is unusable, or a prompt has no tokens or too many.
        ConfigError: the source has a weight.
    """

    def __init__(
        self, tokenizer: Any, given: Source, vocabulary: int, seed: int, samples: int, length: int, bos: int | None
    ) -> None:
        if given.weight != 1:
            raise ConfigError(f"{given} has weight {given.weight:g}; prompts are read whole, without weights")
        self._tokenizer, self._given, self._vocabulary, self._bos = tokenizer, given, vocabulary, bos
        self._documents = given.open()
        self._chats = getattr(tokenizer, "chat_template", None) is not None
        blocks = self._documents.read(range(len(self._documents)))
        found: list[Document] = [document for _, block in blocks for document in block]
        if self._documents.field is None:
            found = [line for line in "".join(map(str, found)).splitlines() if line.strip()]
        self._found = [document for document in found if document]
        if not self._found:
            raise CalibrationError(f"{given} is empty")
        self._order = torch.randperm(len(self._found), generator=torch.Generator().manual_seed(seed)).tolist()
        for number in range(min(samples, len(self._found))):
            if (count := len(self(number))) >= length:
                raise CalibrationError(
                    f"{given}: a prompt has {count:,} tokens, and a window of {length:,} leaves no room for an answer; raise "
                    f"seq-len ({self._text(number)[:60]!r}…)"
                )

    def __call__(self, number: int) -> Tensor:
        """Return the token ids (n,) int64 of a prompt. After the last one comes the first again."""
        ids = encode(self._tokenizer, self._text(number), self._vocabulary, self._given)
        if self._bos is not None and not (len(ids) and int(ids[0]) == self._bos):
            ids = torch.cat([torch.tensor([self._bos]), ids])
        if not len(ids):
            raise CalibrationError(f"{self._given}: a prompt has no tokens ({self._text(number)[:60]!r})")
        return ids

    def _text(self, number: int) -> str:
        document = self._found[self._order[number % len(self._order)]]
        if isinstance(document, str) and not self._chats:
            return document
        if isinstance(document, str):
            document = Conversation([{"role": "user", "content": document}], -1)
        elif not self._chats:
            raise CalibrationError(
                f"{self._given} has conversations, and the model's tokenizer has no chat template; choose a field of plain text"
            )
        messages = list(document.messages)
        while messages and messages[-1]["role"] == ASSISTANT:
            messages.pop()
        try:
            if not messages:
                raise ChatError("no turn that the assistant answers")
            return conversations.render(self._tokenizer, messages, prompt=True)
        except ChatError as error:
            if document.at < 0:
                raise CalibrationError(f"{self._given}: {error}") from error
            raise self._documents.error(document.at, str(error)) from error


def prompts_identity(given: Source, model: Path) -> dict[str, Any]:
    """Identify prompts and the tokenizer in the directory `model`, JSON-ready."""
    found = text_identity(Text((given,)), model)
    return {"prompts": found["calibration"]["1"], "tokenizer": found["tokenizer"]}
