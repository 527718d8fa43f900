"""Convert a tokenizer for llama.cpp: pieces, their types and scores or merges, and the name of the pre-tokenizer.

llama.cpp has two suitable tokenizers that cover all bytes. "gpt2" splits the text by a regular expression, one of
those it knows by name, and merges pairs by rank inside each part. "llama" joins any two neighbours that form a piece,
highest score first. All other tokenizers are rejected, and so are those whose tokens would differ.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ...model.tokenizer import check_vocabulary, load_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of pieces, as GGUF numbers them."""
SPACE = "▁"

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_SLASHED = _REST.replace(r"[\r\n]*|", r"[\r\n/]*|", 1)
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TRIPLE_SPLIT = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
SINGLE_SPLIT = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"
TEKKEN_SPLIT = rf"{_CASED}|{_UPPER}|\p{{N}}|{_SLASHED}"
GPT4O_SPLIT = rf"{_CASED}{_CONTRACTIONS}?|{_UPPER}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_SLASHED}"

SPLITS: Mapping[tuple[tuple[str, ...], bool], str] = {
    ((GPT2_SPLIT,), False): "gpt-2",
    (("digits", GPT2_SPLIT), False): "smollm",
    ((TRIPLE_SPLIT,), False): "dbrx",
    ((TRIPLE_SPLIT,), True): "llama-bpe",
    ((SINGLE_SPLIT,), False): "qwen2",
    ((TEKKEN_SPLIT,), True): "tekken",
    ((GPT4O_SPLIT,), False): "gpt-4o",
}
"""llama.cpp's names of pre-tokenizers, by splitting steps and by whether a part that is a piece is taken whole."""
APPROXIMATE = ("tekken", "gpt-4o")
"""Pre-tokenizers that split non-ASCII words of mixed case differently in llama.cpp."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer's data in a GGUF file."""

    model: str
    """``"gpt2"`` or ``"llama"``."""
    pre: str
    """llama.cpp's name of the pre-tokenizer."""
    tokens: list[str]
    """Pieces, by token id."""
    types: list[int]
    """Types of the pieces, by token id."""
    merges: list[str]
    """Merges by rank; empty for ``"llama"``."""
    scores: list[float]
    """Scores by token id; empty for ``"gpt2"``."""
    special: dict[str, int]
    """Ids of those of ``bos``, ``eos``, ``unk`` and ``pad`` that exist."""
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_template: str | None
    notes: list[str]
    """Differences of llama.cpp's tokenization on some texts."""

    def add_to(self, writer: Any) -> None:
        """Add the vocabulary to a `GGUFWriter`."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        if self.scores:
            writer.add_token_scores(self.scores)
        for name, token in self.special.items():
            getattr(writer, f"add_{name}_token_id")(token)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        writer.add_add_space_prefix(self.add_space_prefix)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(directory: Path, size: int, defaults: Mapping[str, int]) -> Vocabulary:
    """Read the tokenizer of a checkpoint directory.

    Args:
        size: vocabulary size of the model. Ids that the tokenizer does not use become unused pieces.
        defaults: ids of special tokens from the model's config, for those that the tokenizer does not define.

    Raises:
        CheckpointError: the tokenizer is missing, or llama.cpp would not produce the same tokens.
    """
    tokenizer = load_tokenizer(directory)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise CheckpointError(
            f"{directory}: its tokenizer ({type(tokenizer).__name__}) is not one that can be exported"
        )
    data = json.loads(backend.to_str())
    model, added = data["model"], {each["id"]: each for each in data["added_tokens"]}
    if model["type"] != "BPE":
        raise CheckpointError(
            f"{directory}: the tokenizer is of type {model['type']}; GGUF can hold byte-level BPE and SentencePiece's BPE"
        )
    if model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise CheckpointError(
            f"{directory}: the tokenizer's BPE has dropout, prefixes or suffixes, which llama.cpp has not"
        )
    beyond = check_vocabulary(tokenizer, size, directory)
    added = {id: each for id, each in added.items() if id < size}
    pieces = {id: text for text, id in model["vocab"].items()} | {id: each["content"] for id, each in added.items()}
    tokens = [pieces.get(id, f"[PAD{id}]") for id in range(size)]
    if len(set(tokens)) < size:
        twice = next(text for text in tokens if tokens.count(text) > 1)
        raise CheckpointError(f"{directory}: the tokenizer has the piece {twice!r} twice, which llama.cpp refuses")
    types = [NORMAL if id in pieces else UNUSED for id in range(size)]
    for id, each in added.items():
        types[id] = CONTROL if each["special"] else USER_DEFINED
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    prefix, scores = False, []
    notes = [f"token {token!r} ({id}) is left out: the model has {size} tokens" for token, id in beyond.items()]
    if model.get("byte_fallback"):
        kind, pre = "llama", "default"
        prefix = _space_prefix(data, directory)
        _mark_bytes(model, types, directory)
        scores = _scores(model["vocab"], merges, added, size, directory)
        merges = []
    else:
        kind, pre = "gpt2", _split_name(data, directory)
        if data["normalizer"] is not None:
            notes.append("the tokenizer composes Unicode first (NFC) and llama.cpp does not: give it composed text")
        if pre in APPROXIMATE:
            notes.append(f"llama.cpp's {pre} cuts words of mixed case outside ASCII a little differently")
        if not merges:
            raise CheckpointError(f"{directory}: the tokenizer has no merges, without which llama.cpp reads no BPE")
    special = {
        name: id
        for name in ("bos", "eos", "unk", "pad")
        if (id := _first(getattr(tokenizer, f"{name}_token_id", None), defaults.get(name))) is not None and id < size
    }
    if "eos" not in special:
        raise CheckpointError(
            f"{directory}: neither tokenizer nor config names a token that ends a text; llama.cpp would take one of its own"
        )
    plain, whole = (tokenizer("a", add_special_tokens=flag)["input_ids"] for flag in (False, True))
    return Vocabulary(
        model=kind,
        pre=pre,
        tokens=tokens,
        types=types,
        merges=[" ".join(pair) for pair in merges],
        scores=scores,
        special=special,
        add_bos=whole[: len(whole) - len(plain)][:1] == [special.get("bos")],
        add_eos=whole[len(plain) :][-1:] == [special["eos"]] and whole[-1:] == [special["eos"]],
        add_space_prefix=prefix,
        chat_template=_template(tokenizer),
        notes=notes,
    )


def _split_name(data: Mapping[str, Any], directory: Path) -> str:
    """Return llama.cpp's name of a byte-level tokenizer's pre-tokenizer.

    Raises:
        CheckpointError: llama.cpp has no such pre-tokenizer.
    """
    steps = _steps(data["pre_tokenizer"])
    normalizer = (data["normalizer"] or {"type": "NFC"})["type"]
    name = SPLITS.get((steps, bool(data["model"].get("ignore_merges")))) if steps else None
    if name is None or normalizer != "NFC":
        found = json.dumps({key: data[key] for key in ("normalizer", "pre_tokenizer")}, ensure_ascii=False)
        raise CheckpointError(f"{directory}: llama.cpp has no name for how the tokenizer cuts the text: {found[:400]}")
    return name


def _steps(pre: Mapping[str, Any] | None) -> tuple[str, ...] | None:
    """Return the regular expressions in order, ``"digits"`` for splitting single digits; None if a step is neither."""
    steps: list[str] = []
    parts = [pre] if pre and pre["type"] != "Sequence" else (pre or {}).get("pretokenizers", [])
    for part in parts:
        kind, pattern = part["type"], part.get("pattern", {}).get("Regex")
        isolated = (part.get("behavior"), part.get("invert")) in (("Isolated", False), ("Removed", True))
        if kind == "Split" and pattern and isolated:
            steps.append(pattern)
        elif kind == "Digits" and part["individual_digits"]:
            steps.append("digits")
        elif kind == "ByteLevel" and not part["add_prefix_space"] and part is parts[-1]:
            steps += [GPT2_SPLIT] if part.get("use_regex", True) else []
            return tuple(steps)
        else:
            return None
    return None


def _space_prefix(data: Mapping[str, Any], directory: Path) -> bool:
    """Return whether the tokenizer prepends a space to the text; it replaces spaces by `SPACE` in either case.

    Raises:
        CheckpointError: llama.cpp cannot prepare the text in the same way.
    """
    normalizer, pre = data["normalizer"], data["pre_tokenizer"]
    parts = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    prepend, replace = (
        {"type": "Prepend", "prepend": SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    )
    # A split at spaces does nothing once all spaces are replaced.
    if parts in ([prepend, replace], [replace]) and (pre is None or pre.get("pattern") == {"String": " "}):
        return prepend in parts
    if not parts and pre and pre["type"] == "Metaspace" and pre["replacement"] == SPACE and not pre.get("split", True):
        return bool(pre["prepend_scheme"] != "never")
    found = json.dumps({"normalizer": normalizer, "pre_tokenizer": pre}, ensure_ascii=False)
    raise CheckpointError(f"{directory}: llama.cpp cannot prepare the text as the tokenizer does: {found[:400]}")


def _mark_bytes(model: Mapping[str, Any], types: list[int], directory: Path) -> None:
    vocabulary: Mapping[str, int] = model["vocab"]
    for byte in range(256):
        id = vocabulary.get(f"<0x{byte:02X}>")
        if id is None:
            raise CheckpointError(
                f"{directory}: the tokenizer has no piece for byte {byte}, without which llama.cpp stops"
            )
        types[id] = BYTE
    if model.get("unk_token") in vocabulary:
        types[vocabulary[model["unk_token"]]] = UNKNOWN


def _scores(
    vocabulary: Mapping[str, int],
    merges: Sequence[tuple[str, ...]],
    added: Mapping[int, Any],
    size: int,
    directory: Path,
) -> list[float]:
    """Return scores by token id that reproduce the merges in the same order: minus the rank of the merged piece.

    The scores are equivalent only if every pair that forms a piece is a merge and the merges of a piece are
    consecutive.

    Raises:
        CheckpointError: they are not equivalent.
    """
    ranks: dict[str, int] = {}
    last = ""
    for pair in merges:
        piece = "".join(pair)
        if piece != last and piece in ranks:
            raise CheckpointError(
                f"{directory}: the merges that make {piece!r} do not stand together; no scores say that"
            )
        last = piece
        ranks.setdefault(piece, len(ranks))
    known = set(merges)
    for piece, id in vocabulary.items():
        for cut in range(1, 0 if id in added else len(piece)):
            pair = piece[:cut], piece[cut:]
            if pair[0] in vocabulary and pair[1] in vocabulary and pair not in known:
                raise CheckpointError(
                    f"{directory}: the tokenizer has {piece!r} but does not join {pair[0]!r} and {pair[1]!r}; llama.cpp would"
                )
    scores = [-1e6] * size
    for piece, rank in ranks.items():
        scores[vocabulary[piece]] = -float(rank)
    return scores


def _first(*ids: Any) -> int | None:
    """Return the first id that is not None; of a list, take its first element."""
    for id in ids:
        value = id[0] if isinstance(id, list) and id else id
        if isinstance(value, int):
            return value
    return None


def _template(tokenizer: Any) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    return template.get("default") if isinstance(template, dict) else template
