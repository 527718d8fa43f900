"""Convert a tokenizer for llama.cpp: pieces, their types and scores or merges, and the name of the pre-tokenizer.

llama.cpp has two suitable tokenizers that cover all bytes. "gpt2" splits the text by a regular expression, one of
those it knows by name, and merges pairs by rank inside each part. "llama" joins any two neighbours that form a piece,
highest score first. All other tokenizers are rejected, and so are those whose tokens would differ.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from ...errors import CheckpointError
from ...model.skeleton import Skeleton
from ...model.tokenizer import check_vocabulary, load_tokenizer

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
    ((GPT2_SPLIT, "bytes"), False): "gpt-2",
    (("digits", GPT2_SPLIT, "bytes"), False): "smollm",
    ((TRIPLE_SPLIT, "bytes"), False): "dbrx",
    ((TRIPLE_SPLIT, "bytes"), True): "llama-bpe",
    ((SINGLE_SPLIT, "bytes"), False): "qwen2",
    ((TEKKEN_SPLIT, "bytes"), True): "tekken",
    ((GPT4O_SPLIT, "bytes"), False): "gpt-4o",
}
"""llama.cpp's names of pre-tokenizers, by steps and by whether a part that is a piece is taken whole. Steps are regular
expressions, ``"digits"`` (single digits) and ``"bytes"`` (bytes to characters)."""
APPROXIMATE = ("tekken", "gpt-4o")
"""Pre-tokenizers that split non-ASCII words of mixed case differently in llama.cpp."""


def add_vocabulary(writer: GGUFWriter, skeleton: Skeleton) -> list[str]:
    """Add the checkpoint's tokenizer. Ids of the model that the tokenizer does not use become unused pieces.

    Returns:
        Differences of llama.cpp's tokenization on some texts.

    Raises:
        CheckpointError: the tokenizer is missing, or llama.cpp would not produce the same tokens.
    """
    directory, size = skeleton.checkpoint.directory, skeleton.vocabulary
    tokenizer = load_tokenizer(directory)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    data: dict[str, Any] = {"model": {"type": type(tokenizer).__name__}}
    if backend is not None:
        data = json.loads(backend.to_str())
    model = data["model"]
    sentencepiece = model.get("byte_fallback", False)
    if model["type"] != "BPE" or not (sentencepiece or model["merges"]):
        raise CheckpointError(
            f"{directory}: the tokenizer is of type {model['type']} or has no merges; GGUF files can hold byte-level BPE "
            "and SentencePiece's BPE"
        )
    if any(model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")):
        raise CheckpointError(
            f"{directory}: the tokenizer's BPE has dropout, prefixes or suffixes, which llama.cpp lacks"
        )
    beyond = check_vocabulary(tokenizer, size, directory)
    notes = [f"token {token!r} ({id}) is left out: the model has {size} tokens" for token, id in beyond.items()]
    added = {each["id"]: each for each in data["added_tokens"] if each["id"] < size}
    pieces = {id: text for text, id in model["vocab"].items()} | {id: each["content"] for id, each in added.items()}
    kept = [pieces[id] for id in range(size) if id in pieces]
    if len({*kept}) < len(kept):
        twice = next(piece for piece in kept if kept.count(piece) > 1)
        raise CheckpointError(f"{directory}: the tokenizer has the piece {twice!r} twice, which llama.cpp refuses")
    types = [TokenType.NORMAL if id in pieces else TokenType.UNUSED for id in range(size)]
    for id, each in added.items():
        types[id] = TokenType.CONTROL if each["special"] else TokenType.USER_DEFINED
    split, prefix = ("default", _space_prefix(data)) if sentencepiece else (_split_name(data), False)
    if split is None or prefix is None:
        found = json.dumps({key: data[key] for key in ("normalizer", "pre_tokenizer")}, ensure_ascii=False)
        raise CheckpointError(f"{directory}: llama.cpp cannot split the text as the tokenizer does: {found[:400]}")
    if sentencepiece:
        unknown = model["vocab"].get(model.get("unk_token"))
        ids = [model["vocab"].get(f"<0x{byte:02X}>") for byte in range(256)]
        if None in ids:
            raise CheckpointError(f"{directory}: the tokenizer lacks pieces for some bytes, which llama.cpp needs")
        for id in ids:
            types[id] = TokenType.BYTE
        if unknown is not None:
            types[unknown] = TokenType.UNKNOWN
    elif data["normalizer"] is not None:
        notes.append("llama.cpp does not normalise Unicode (NFC) as the tokenizer does: give it normalised text")
    if split in APPROXIMATE:
        notes.append(f"llama.cpp's {split} splits non-ASCII words of mixed case a little differently")
    merges = [(left, right) for left, right in model["merges"]]
    writer.add_tokenizer_model("llama" if sentencepiece else "gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list([pieces.get(id, f"[PAD{id}]") for id in range(size)])
    writer.add_token_types(types)
    if sentencepiece:
        scores = _scores(model["vocab"], merges, {*added}, directory)
        writer.add_token_scores([scores.get(id, -1e6) for id in range(size)])
    else:
        writer.add_token_merges([" ".join(pair) for pair in merges])
    special = {}
    for name in ("bos", "eos", "unk", "pad"):
        ids = [getattr(each, f"{name}_token_id", None) for each in (tokenizer, skeleton.config)]
        # Configs may list several.
        id = next((each[0] if isinstance(each, list) else each for each in ids if each not in (None, [])), None)
        if id is not None and 0 <= id < size:
            special[name] = id
            getattr(writer, f"add_{name}_token_id")(id)
    if "eos" not in special:
        raise CheckpointError(
            f"{directory}: neither tokenizer nor config names an end-of-text token, and llama.cpp would assume one"
        )
    plain, whole = (tokenizer("a", add_special_tokens=flag)["input_ids"] for flag in (False, True))
    writer.add_add_bos_token(whole[: len(whole) - len(plain)][:1] == [special.get("bos")])
    writer.add_add_eos_token(whole[len(plain) :][-1:] == [special["eos"]])
    writer.add_add_space_prefix(prefix)
    template = getattr(tokenizer, "chat_template", None)
    if template := template.get("default") if isinstance(template, dict) else template:
        writer.add_chat_template(template)
    return notes


def _split_name(data: dict[str, Any]) -> str | None:
    """Return llama.cpp's name of a byte-level tokenizer's pre-tokenizer; None if it has none like it."""
    pre = data["pre_tokenizer"] or {"type": "none"}
    steps: list[str] = []
    for part in pre.get("pretokenizers", [pre]):
        match part:
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert} if (
                behavior,
                invert,
            ) in (("Isolated", False), ("Removed", True)):
                steps.append(pattern)
            case {"type": "Digits", "individual_digits": True}:
                steps.append("digits")
            case {"type": "ByteLevel", "add_prefix_space": False}:
                steps += [GPT2_SPLIT, "bytes"] if part.get("use_regex", True) else ["bytes"]
            case _:
                steps.append("unknown")
    composed = data["normalizer"] is None or data["normalizer"]["type"] == "NFC"
    return SPLITS.get((tuple(steps), bool(data["model"].get("ignore_merges")))) if composed else None


def _space_prefix(data: dict[str, Any]) -> bool | None:
    """Return whether the tokenizer prepends a space to the text, which llama.cpp can do; it replaces spaces by `SPACE`.

    None if the tokenizer prepares the text in any other way.
    """
    normalizer, pre = data["normalizer"] or {"normalizers": []}, data["pre_tokenizer"]
    parts = normalizer.get("normalizers", [normalizer])
    prepend = {"type": "Prepend", "prepend": SPACE}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    # A split at spaces does nothing once all spaces are replaced.
    if parts in ([prepend, replace], [replace]) and (pre is None or pre.get("pattern") == {"String": " "}):
        return prepend in parts
    if not parts and pre and pre["type"] == "Metaspace" and pre["replacement"] == SPACE and not pre.get("split", True):
        return bool(pre["prepend_scheme"] != "never")
    return None


def _scores(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], added: set[int], directory: Path
) -> dict[int, float]:
    """Return scores by token id that reproduce the merges in the same order: minus the rank of the merged piece.

    They are equivalent only if every pair that forms a piece is a merge and the merges of a piece are consecutive.
    """
    ranks: dict[str, int] = {}
    for left, right in merges:
        ranks.setdefault(left + right, len(ranks))
    order = [ranks[left + right] for left, right in merges]
    pairs = (
        (piece[:cut], piece[cut:])
        for piece, id in vocabulary.items()
        if id not in added
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    )
    if order != sorted(order) or not {*merges}.issuperset(pairs):
        raise CheckpointError(
            f"{directory}: no SentencePiece scores are equivalent to the tokenizer's merges: llama.cpp would merge other "
            "pairs, or in another order"
        )
    return {vocabulary[piece]: -float(rank) for piece, rank in ranks.items()}
