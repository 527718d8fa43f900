"""Load and check the model's tokenizer, without running code from the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import gettempdir
from typing import Any, Literal

from ..errors import CheckpointError, ConfigError, one_line
from ..system import files
from ..system.directory import check_links, check_pointer
from ..system.progress import Progress
from ..system.strict_json import read_json
from .hub import find_gguf
from .names import COMPANIONS, CONFIG, TOKENIZER_CONFIG, TOKENIZER_FILES

Bos = Literal["auto", "on", "off"]
BOS: tuple[Bos, ...] = ("auto", "on", "off")
"""Whether BOS, the beginning-of-sequence token, comes before every window; ``auto`` does as the tokenizer does."""
IGNORED = -100
"""Label of a token whose prediction is not part of losses, as in torch and transformers."""
SCRATCH = "streamprune-tokenizer-"  # start of the names of temporary folders for the tokenizers of GGUF files


def load_tokenizer(directory: Path, vocabulary: int | None = None) -> Any:
    """Load the model's tokenizer, and check it against the model's vocabulary size unless that is None.

    Raises:
        CheckpointError: there is no tokenizer, it needs its own code, a file is a Git LFS pointer, a library is missing,
            transformers cannot read it, or `check_vocabulary` rejects it.
    """
    from transformers import AutoTokenizer

    gguf = find_gguf(directory)
    if gguf is not None:
        from .gguf_source import check_metadata

        check_metadata(gguf)
    else:
        check_links(directory)
        for name in TOKENIZER_FILES:
            check_pointer(directory / name)
        _check_libraries(directory)
    try:
        with panics_as_errors(), _loadable(directory, gguf) as (folder, options):
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:
        settings = directory / TOKENIZER_CONFIG
        if settings.is_file() and read_json(settings).get("auto_map") is not None:
            raise CheckpointError(
                f"{directory}: the tokenizer needs its own code (auto_map), which is never run"
            ) from error
        raise CheckpointError(f"{directory}: no tokenizer that transformers can read ({one_line(error)})") from error
    if vocabulary is not None:
        check_vocabulary(tokenizer, vocabulary, directory)
    return tokenizer


def bos_token(tokenizer: Any, bos: Bos, directory: Path) -> int | None:
    """Return the id of the BOS token that every window begins with; None if windows have none.

    Args:
        bos: ``auto`` encodes a text with `add_special_tokens=True` and looks whether BOS comes first.
        directory: the tokenizer's, for the message.

    Raises:
        ConfigError: `bos` is ``on`` and the tokenizer has no BOS token, or `bos` is none of `BOS`.
    """
    if bos not in BOS:
        raise ConfigError(f"bos is {bos!r}; it must be one of {', '.join(BOS)}")
    first: int | None = tokenizer.bos_token_id
    if bos == "on" and first is None:
        raise ConfigError(f"bos is on; the tokenizer of {directory} ({type(tokenizer).__name__}) has no BOS token")
    if bos == "auto":
        plain, whole = (tokenizer("a", add_special_tokens=flag)["input_ids"] for flag in (False, True))
        # The text itself may begin with BOS: some tokenizers use it for what they do not know.
        added = whole[:1] == [first] and whole[1 : len(plain) + 1] == plain
        return first if added else None
    return first if bos == "on" else None


def find_bos(directory: Path, bos: Bos, vocabulary: int) -> int | None:
    """Return the `bos_token` of a model, whose tokenizer is loaded only if it decides.

    A directory without tokenizer files has no BOS with ``auto``.

    Raises:
        CheckpointError: see `load_tokenizer`.
        ConfigError: see `bos_token`.
    """
    there = find_gguf(directory) is not None or any((directory / name).is_file() for name in TOKENIZER_FILES)
    if bos == "off" or (bos == "auto" and not there):
        return None
    return bos_token(load_tokenizer(directory, vocabulary), bos, directory)


def end_tokens(directory: Path, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end a text or an answer: as for transformers' `generate`, else the tokenizer's; perhaps none."""
    for name in ("generation_config.json", CONFIG):
        path = directory / name
        found = read_json(path).get("eos_token_id") if path.is_file() else None
        if found is not None:
            return frozenset([found] if isinstance(found, int) else found)
    return frozenset() if tokenizer.eos_token_id is None else frozenset([tokenizer.eos_token_id])


def encode(tokenizer: Any, text: str, bos: Bos, directory: Path) -> list[int]:
    """Encode a text that a model continues or scores.

    ``auto`` adds the tokenizer's own special tokens, ``on`` only BOS, ``off`` none.

    Raises:
        ConfigError: see `bos_token`.
    """
    first = None if bos == "auto" else bos_token(tokenizer, bos, directory)
    ids: list[int] = tokenizer(text, add_special_tokens=bos == "auto")["input_ids"]
    return ids if first is None else [first, *ids]


@contextmanager
def _loadable(directory: Path, gguf: Path | None) -> Iterator[tuple[Path, dict[str, str]]]:
    """Yield the folder from which transformers loads a tokenizer, with options. That of a GGUF file holds a link to it alone."""
    if gguf is None:
        yield directory, {}
        return
    from .upstream import parsed_once

    with files.scratch(Path(gettempdir()), SCRATCH) as folder, parsed_once():
        (folder / gguf.name).symlink_to(gguf.resolve())
        yield folder, {"gguf_file": gguf.name}


@contextmanager
def tokenizer_folder(source: Path) -> Iterator[Path]:
    """Yield the folder with the tokenizer files of a model: its directory, or a temporary one for a GGUF file.

    Raises:
        CheckpointError: the tokenizer of a GGUF file cannot be read.
    """
    if find_gguf(source) is None:
        yield source
        return
    tokenizer = load_tokenizer(source)
    with files.scratch(Path(gettempdir()), SCRATCH) as folder:
        tokenizer.save_pretrained(folder)
        yield folder


def check_vocabulary(tokenizer: Any, vocabulary: int, directory: Path) -> dict[str, int]:
    """Check that the model has an embedding for every token that ordinary text may contain.

    Added tokens, such as Gemma 3's image tokens in its text-only models, may have ids beyond the vocabulary: a tokenizer
    produces them only for text that contains their literal name, and such text is rejected when it is read.

    Returns:
        The ids of added tokens beyond the vocabulary, by name, in ascending order.

    Raises:
        CheckpointError: another token is beyond the vocabulary.
    """
    by_id = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    beyond = {token: id for token, id in by_id if id >= vocabulary}
    used = {getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk")}
    added = tokenizer.get_added_vocab() if beyond else {}
    for token, id in beyond.items():
        if token not in added or id in used:
            raise CheckpointError(
                f"{directory}: the tokenizer's {token!r} is token {id}, but the model has {vocabulary} (vocab_size); they do "
                "not match: put the model's own tokenizer files there"
            )
    return beyond


def _check_libraries(directory: Path) -> None:
    """Raise CheckpointError if a tokenizer without `tokenizer.json` needs a missing library; transformers names the wrong one."""
    from transformers import utils

    path = directory / "tokenizer.model"
    others = ("tokenizer.json", "vocab.json", "vocab.txt", "tekken.json")
    if not path.is_file() or any((directory / name).is_file() for name in others):
        return
    with path.open("rb") as file:
        # SentencePiece models start with the tag of their first protobuf field; tiktoken files are text.
        is_model = file.read(1) == b"\n"
    if is_model:
        kind = "a SentencePiece model"
        needed = {"sentencepiece": utils.is_sentencepiece_available(), "protobuf": utils.is_protobuf_available()}
    else:
        kind, needed = "a tiktoken file", {"tiktoken": utils.is_tiktoken_available()}
    if missing := [package for package, installed in needed.items() if not installed]:
        raise CheckpointError(
            f"{path} is {kind}, which transformers cannot read without {' and '.join(missing)}: "
            f"pip install {' '.join(missing)}"
        )


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Turn panics of the tokenizers library, which are not `Exception`s, into RuntimeErrors."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise RuntimeError(f"its tokenizer panics: {one_line(error)}") from error


def check_companions(source: Path, vocabulary: int, progress: Progress, *, required: bool) -> None:
    """Check the files that are copied from the source to the result, above all the tokenizer; warn through `progress`.

    Raises:
        CheckpointError: a file is a Git LFS pointer, `check_vocabulary` rejects the tokenizer, or it exists, is `required`
            and cannot be read.
    """
    for name in COMPANIONS:
        if source.is_dir():
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
        progress.say(f"the tokenizer's {token!r} is token {id}, but the model has {vocabulary}: no text may contain it")


def _has_tokenizer(source: Path) -> bool:
    if find_gguf(source) is not None:
        return True
    names = (TOKENIZER_CONFIG, "tokenizer.json", "tokenizer.model", "vocab.json")
    return any((source / name).is_file() for name in names)


def named_tokenizer(source: Path) -> dict[str, Any] | None:
    """Return the tokenizer's config with its class name added; None if it is there already, or there is no tokenizer.

    Without the name, transformers derives the class from the model_type, which it does not know for pruned models.

    Raises:
        CheckpointError: the tokenizer cannot be read.
    """
    if not _has_tokenizer(source):
        return None
    path, name = source / TOKENIZER_CONFIG, type(load_tokenizer(source)).__name__
    config = read_json(path) if path.is_file() else {}
    return None if config.get("tokenizer_class") == name else {**config, "tokenizer_class": name}
