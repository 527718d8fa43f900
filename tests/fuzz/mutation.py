"""Inputs that are nearly right: valid ones with a few things made wrong.

Whoever holds the dice draws: hypothesis in the test suite, the seed of a coverage-guided mutator in `scripts/fuzz`.
"""

from __future__ import annotations

import copy
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

Form = Callable[[bytes, Random], bytes]
"""Valid bytes of one kind of file, or nearly valid ones → others."""

NUMBERS = (0, -1, 1, 2, 7, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**12, 10**30, 10**400, -(2**63), 0.5, -0.0, 1e308)
NUMBERS += (float("nan"), float("inf"))
WORDS = (
    "",
    "x",
    "\ud800",
    "\0",
    "\x1b[31m",
    "é" * 50,
    "a" * 5000,
    "*",
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "/dev/zero",
)
WORDS += ("BOOL", "I8", "F8_E4M3", "BF16", "F64", "load", "__class__", "streamprune_llama", "sliding_attention")
NESTED: tuple[Any, ...] = ([], {}, [0], [-1], [2**62, 4], [True, 3], [[]], {"a": 1}, {"rope_type": "yarn"}, [None] * 40)
LENGTHS = (0, 1, 2, 7, 100_000_000, 100_000_001, 2**32, 2**63, 2**64 - 1)
DEPTHS = (50, 200, 1200, 50_000)


def any_value(random: Random) -> Any:
    """Something that hardly any field expects."""
    return copy.deepcopy(random.choice((None, True, False, *NUMBERS, *WORDS, *NESTED)))


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a JSON value with every key or number in it."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def change(value: Any, random: Random) -> Any:
    """A JSON value, which may be changed in place, with one thing made wrong."""
    found = list(places(value))
    if not found:
        return any_value(random)
    holder, key = random.choice(found)
    old = holder[key]
    drawn = random.randrange(8)
    if drawn == 0:
        del holder[key]
    elif drawn == 1 and isinstance(holder, dict):
        holder[random.choice((str(key) + "x", *(str(other) for _, other in found), *WORDS))] = holder.pop(key)
    elif drawn == 2:
        other, place = random.choice(found)
        # Through text, lest a value be put into itself.
        if place in other if isinstance(other, dict) else place < len(other):
            holder[key] = json.loads(json.dumps(other[place]))
    elif drawn == 3 and isinstance(holder, list):
        holder.insert(key, any_value(random))
    elif drawn < 6 and type(old) in (int, float) and abs(old) < 1e300:
        near = (old + 1, old - 1, -old, old * 2, old * 10**6, float(old), str(old), [old], bool(old))
        holder[key] = random.choice(near)
    else:
        holder[key] = any_value(random)
    return value


def as_text(value: Any, random: Random) -> str:
    """A value's JSON; now and then with a key twice, far too deep, or with a number far too long."""
    text = json.dumps(value, ensure_ascii=random.random() < 0.9, indent=random.choice((None, None, 1)))
    drawn = random.randrange(12)
    keys = list(re.finditer(r'"[^"\\]*": ', text))
    if drawn == 0 and keys:
        key = random.choice(keys)
        return f"{text[: key.start()]}{key[0]}{json.dumps(random.choice(WORDS[:3]))}, {text[key.start() :]}"
    if drawn == 1 and keys:
        depth, key = random.choice(DEPTHS), random.choice(keys)
        opening, closing = random.choice((("[", "]"), ('{"a": ', "}")))
        return f"{text[: key.end()]}{opening * depth}0{closing * depth}, {text[key.start() :]}"
    if drawn == 2 and keys:
        key = random.choice(keys)
        return (
            f"{text[: key.end()]}{random.choice(('9' * 5000, '1e999', '-1e-999', '0x10', '01'))}, {text[key.start() :]}"
        )
    return text


def binary(data: bytes, random: Random) -> bytes:
    """Bytes flipped, cut, repeated or put in."""
    found = bytearray(data)
    for _ in range(random.randint(1, 4)):
        drawn, at = random.randrange(6), random.randint(0, len(found))
        if drawn == 0:
            del found[at:]
        elif drawn == 1:
            del found[at : at + random.randint(1, 8)]
        elif drawn == 2:
            found[at:at] = random.choice((b"\xef\xbb\xbf", b"\xff", b"\0", b"\xed\xa0\x80", b"\n", b"]", b"{", b"\r"))
        elif drawn == 3:
            found[at:at] = found[at : at + random.randint(1, 64)]
        elif found:
            at = min(at, len(found) - 1)
            found[at] = random.choice((0, 1, 127, 128, 255, found[at] ^ 1 << random.randrange(8)))
    return bytes(found)


def maybe_binary(data: bytes, random: Random) -> bytes:
    """The same, one time in eight."""
    return binary(data, random) if random.randrange(8) == 0 else data


def as_json(data: bytes, random: Random) -> bytes:
    """Of a JSON file."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return binary(data, random)
    for _ in range(random.randint(1, 3)):
        value = change(value, random)
    return maybe_binary(_encoded(as_text(value, random)), random)


def as_lines(data: bytes, random: Random) -> bytes:
    """Of one JSON value a line."""
    lines = data.splitlines() or [b""]
    at = random.randrange(len(lines))
    lines[at] = as_json(lines[at], random).replace(b"\n", b" ")
    if random.randrange(6) == 0:
        random.shuffle(lines)
    return b"\n".join(lines) + (b"\n" if random.randrange(4) else b"")


def as_journal(data: bytes, random: Random) -> bytes:
    """Of a journal, whose checksums are right more often than not."""
    texts = [line.partition(b" ")[2] for line in data.splitlines()]
    changed = as_lines(b"\n".join(texts), random).splitlines()
    lines = [b"%08x %s\n" % (zlib.crc32(text), text) for text in changed]
    return binary(b"".join(lines), random) if random.randrange(4) == 0 else b"".join(lines)


def as_gzip(data: bytes, random: Random) -> bytes:
    """Of packed lines."""
    try:
        inside = gzip.decompress(data)
    except (OSError, EOFError, zlib.error):
        return binary(data, random)
    return maybe_binary(gzip.compress(as_lines(inside, random), 1, mtime=0), random)


def rearranged(header: bytes, random: Random) -> bytes:
    """A shard's header that still reads like one: names, types, shapes and places changed for other sensible ones."""
    tensors = json.loads(header)
    names = [name for name in tensors if name != "__metadata__"]
    for _ in range(random.randint(1, 2)):
        one, other = (random.choice(names) for _ in range(2))
        drawn, place = random.randrange(7), tensors[one]["data_offsets"]
        if drawn == 0:
            tensors[one], tensors[other] = tensors[other], tensors[one]
        elif drawn == 1:
            tensors[one]["data_offsets"] = list(tensors[other]["data_offsets"])
        elif drawn == 2:
            tensors[one]["data_offsets"] = [
                place[0] + random.choice((-1, 0, 1, 8)),
                place[1] + random.choice((-1, 0, 1)),
            ]
        elif drawn == 3:
            tensors[one]["dtype"] = random.choice(("F16", "BF16", "F32", "I16", "U16", "F8_E5M2", "I64", "BOOL"))
        elif drawn == 4:
            tensors[one]["shape"] = random.choice(
                ([*tensors[one]["shape"], 1], [0], [], [2**32, 2**32], tensors[one]["shape"][::-1])
            )
        elif drawn == 5:
            tensors[one + random.choice((".qweight", ".absmax", ".attn.bias", "\x1b", "x"))] = tensors[one]
        else:
            tensors["__metadata__"] = random.choice(({}, {"format": "pt"}, {"a": "b" * 999}))
    return json.dumps(tensors).encode()


def as_safetensors(data: bytes, random: Random) -> bytes:
    """Of a shard: its header, the length of that, and the length of what follows."""
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    drawn = random.randrange(8)
    if drawn == 0:
        body = random.choice((body[:-1], body + b"\0", b"", body * 2))
    else:
        try:
            header = (rearranged if drawn > 4 else as_json)(header, random)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            header = binary(header, random)
        header += b" " * (-len(header) % 8) if random.randrange(4) else b""
    length = random.choice((*LENGTHS, len(header) + 1, len(header) - 1)) if drawn == 1 else len(header)
    return max(0, length).to_bytes(8, "little") + header + body


def as_table(data: bytes, random: Random) -> bytes:
    """Of a file whose end says where everything lies: more often than not nothing is moved."""
    if random.randrange(3) == 0 or not data:
        return binary(data, random)
    found = bytearray(data)
    for _ in range(random.randint(1, 4)):
        found[random.randrange(len(found))] = random.choice((0, 1, 2, 4, 127, 128, 255, random.randrange(256)))
    return bytes(found)


def as_pair(data: bytes, random: Random) -> bytes:
    """Of a JSON file and one of lines, with a zero byte between."""
    first, zero, second = data.partition(b"\0")
    if random.randrange(2):
        return as_json(first, random).replace(b"\0", b"") + zero + second
    return first + zero + binary(second, random)


def as_words(data: bytes, random: Random) -> bytes:
    """Of a line of text with signs in it that mean something."""
    text = data.decode("utf-8", "replace")
    at = random.randint(0, len(text))
    piece = random.choice((*WORDS, "=", ":", "/", "[1]", "=1e999", "=nan", "=-1", "=1e308", "\n", text))
    return _encoded(text[:at] + piece + text[random.randint(at, len(text)) :])


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
