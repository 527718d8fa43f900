"""The model's own tokenizer, read without running code of its."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, one_line
from ..system import files
from ..system.directory import check_links, check_pointer
from ..system.progress import Progress
from ..system.strict_json import read_json
from .names import COMPANIONS, TOKENIZER_CONFIG, TOKENIZER_FILES


def load_tokenizer(directory: Path, vocabulary: int | None = None) -> Any:
    """The model's own tokenizer.

    Args:
        vocabulary: tokens of the model; None leaves `check_vocabulary` to the caller.

    Raises:
        CheckpointError: there is none, it wants code of its own, it is a Git LFS pointer, a library is missing,
            transformers cannot read it, or what `check_vocabulary` refuses.
    """
    from transformers import AutoTokenizer

    check_links(directory)
    for name in TOKENIZER_FILES:
        check_pointer(directory / name)
    _check_libraries(directory)
    try:
        with panics_as_errors():
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        settings = directory / TOKENIZER_CONFIG
        if settings.is_file() and read_json(settings).get("auto_map") is not None:
            raise CheckpointError(
                f"{directory}: its tokenizer wants code that it brings along (auto_map), which is never run"
            ) from error
        raise CheckpointError(f"{directory}: no tokenizer that transformers can read ({one_line(error)})") from error
    if vocabulary is not None:
        check_vocabulary(tokenizer, vocabulary, directory)
    return tokenizer


def check_vocabulary(tokenizer: Any, vocabulary: int, directory: Path) -> dict[str, int]:
    """See that a model has an embedding for each token that ordinary text is made of.

    Tokens that were added to a tokenizer and stand for themselves, such as Gemma 3's of images in its text models, may lie
    beyond: only a text with their very name is cut into them, and such a text is refused when it is read.

    Args:
        vocabulary: tokens of the model.

    Returns:
        Ids by name of added tokens beyond the vocabulary.

    Raises:
        CheckpointError: any other token lies beyond.
    """
    beyond = {token: id for token, id in tokenizer.get_vocab().items() if id >= vocabulary}
    beyond = dict(sorted(beyond.items(), key=lambda item: item[1]))
    used = {getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk")}
    added = tokenizer.get_added_vocab() if beyond else {}
    for token, id in beyond.items():
        if token not in added or id in used:
            raise CheckpointError(
                f"{directory}: the tokenizer's {token!r} is token {id}, but the model has {vocabulary} (vocab_size); they do "
                "not belong together: put the model's own tokenizer files there"
            )
    return beyond


def _check_libraries(directory: Path) -> None:
    """See that what a tokenizer without a `tokenizer.json` is read with is installed; transformers asks for another one.

    Raises:
        CheckpointError: it is not.
    """
    path, beginning = directory / "tokenizer.model", bytearray(1)
    others = ("tokenizer.json", "vocab.json", "vocab.txt", "tekken.json")
    if not path.is_file() or any((directory / name).is_file() for name in others):
        return
    files.read_into(path, 0, memoryview(beginning))
    # The tag of a SentencePiece model's first field; tiktoken's files are text.
    kind, needed = (
        ("a SentencePiece model", {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"})
        if beginning == b"\n"
        else ("a tiktoken file", {"tiktoken": "tiktoken"})
    )
    if missing := [package for module, package in needed.items() if not _installed(module)]:
        raise CheckpointError(
            f"{path} is {kind}, which transformers cannot read without {' and '.join(missing)}: "
            f"pip install {' '.join(missing)}"
        )


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # nor the package that it would be in
        return False


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """A context in which a panic of the tokenizers library, which is no `Exception`, is a RuntimeError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise RuntimeError(f"its tokenizer panics: {one_line(error)}") from error


def check_companions(source: Path, vocabulary: int, progress: Progress, *, required: bool) -> None:
    """See that what a result takes along from its source is there, and belongs to the model.

    Args:
        vocabulary: tokens of the model.
        required: whether the tokenizer must be readable, too, if there is one.

    Raises:
        CheckpointError: a Git LFS pointer, what `check_vocabulary` refuses, or a tokenizer that is required and
            cannot be read.
    """
    for name in COMPANIONS:
        check_pointer(source / name)
    if not _has_tokenizer(source):
        return
    try:
        tokenizer = load_tokenizer(source)
    except CheckpointError as error:
        if required:
            raise
        progress.say(f"{error}; its files are copied unread")
        return
    for token, id in check_vocabulary(tokenizer, vocabulary, source).items():
        progress.say(f"the tokenizer's {token!r} is token {id}, but the model has {vocabulary}: no text may hold it")


def _has_tokenizer(source: Path) -> bool:
    names = (TOKENIZER_CONFIG, "tokenizer.json", "tokenizer.model", "vocab.json")
    return any((source / name).is_file() for name in names)


def named_tokenizer(source: Path) -> dict[str, Any] | None:
    """The tokenizer's config with its class, which transformers otherwise takes from a model_type it knows; None if it is there.

    Raises:
        CheckpointError: there is a tokenizer that cannot be read.
    """
    path = source / TOKENIZER_CONFIG
    if not _has_tokenizer(source):
        return None
    name = type(load_tokenizer(source)).__name__
    config = read_json(path) if path.is_file() else {}
    return None if config.get("tokenizer_class") == name else {**config, "tokenizer_class": name}
