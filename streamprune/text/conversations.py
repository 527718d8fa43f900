"""Render conversations by the tokenizer's chat template, and find the tokens that the assistant says.

Templates with ``{% generation %}`` tags mark them. For others, a turn of the assistant is what it adds to the prompt that
asks for it, found by rendering the messages up to there. If these texts do not agree with the whole, it is refused.
"""

from __future__ import annotations

import re
from typing import Any

from ..errors import one_line

Messages = list[dict[str, Any]]
ASSISTANT = "assistant"
_TAGS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_END = {"role": "user", "content": ""}


class ChatError(Exception):
    """A conversation that cannot be used; the message says why."""


def render(tokenizer: Any, messages: Messages, *, prompt: bool = False) -> str:
    """Render messages as text. With `prompt`, it ends where the assistant's next turn begins.

    Raises:
        ChatError: the chat template refuses them.
    """
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except Exception as error:
        raise ChatError(f"the model's chat template refuses a conversation ({one_line(error)})") from error
    return text


def encode(tokenizer: Any, messages: Messages) -> tuple[list[int], list[bool]]:
    """Return the token ids of a conversation, and which of them the assistant says.

    Raises:
        ChatError: the template refuses the messages or rewrites earlier turns, or the assistant says nothing.
    """
    if not any(message["role"] == ASSISTANT for message in messages):
        raise ChatError("no turn of the assistant, whose tokens --loss-on assistant counts")
    if not tokenizer.is_fast:
        raise ChatError(f"--loss-on assistant needs a fast tokenizer, and the model has {type(tokenizer).__name__}")
    if _TAGS.search(tokenizer.get_chat_template()):
        try:
            found = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        except Exception as error:
            raise ChatError(f"the model's chat template refuses a conversation ({one_line(error)})") from error
        ids, said = found["input_ids"], [bool(each) for each in found["assistant_masks"]]
    else:
        text = render(tokenizer, messages)
        turns = _turns(tokenizer, messages, text)
        found = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
        ids = found["input_ids"]
        said = [any(a < end and start < b for start, end in turns) for a, b in found["offset_mapping"]]
    if not any(said):
        raise ChatError("the assistant says nothing, or the chat template leaves it out")
    return ids, said


def _turns(tokenizer: Any, messages: Messages, whole: str) -> list[tuple[int, int]]:
    """Return the first and last character (exclusive) of every turn of the assistant in `whole`."""
    found = []
    for number, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        before = render(tokenizer, messages[:number], prompt=True)
        if not whole.startswith(before):  # asks for thoughts, say, that the turn does not have
            turns = [[*messages[:number], {**message, "content": content}] for content in "xy"]
            before = _common(*(render(tokenizer, each) for each in turns))
        through = render(tokenizer, messages[: number + 1])
        if not whole.startswith(through):  # drops thoughts, say, once the user answers
            through = _answered(tokenizer, messages[: number + 1])
        if not (whole.startswith(through) and through.startswith(before)):
            raise ChatError(
                f"the model's chat template writes turn {number + 1} in another way once others follow, so that its tokens are "
                "unknown; give conversations that end with their only answer, or a template with {% generation %} tags"
            )
        found.append((len(before), len(through)))
    return found


def _common(one: str, other: str) -> str:
    """Return what two texts begin with."""
    return one[: next((place for place, pair in enumerate(zip(one, other, strict=False)) if len({*pair}) > 1), 0)]


def _answered(tokenizer: Any, messages: Messages) -> str:
    """Render messages, of which the last is the assistant's, as they are once the user has answered, without the answer."""
    asked = render(tokenizer, messages[:-1])
    answer = render(tokenizer, [*messages[:-1], _END]).removeprefix(asked)
    return render(tokenizer, [*messages, _END]).removesuffix(answer)
