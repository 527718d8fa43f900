"""llama.cpp as a runtime: the C interface in the shared library of the xllamacpp wheel, on a CPU.

Used by benchmarks and tests; `streamprune export` itself needs no runtime.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int8, c_int32, c_ubyte, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

F32, F16 = 0, 1  # numbers of ggml_type
NO_FLASH = 0
# Fields of llama_context_params that are set, by their place among 4-byte numbers, with the defaults that they must have.
FIELDS = {"n_ctx": (0, 512), "n_batch": (1, 2048), "n_ubatch": (2, 512), "n_threads": (7, 4), "n_threads_batch": (8, 4)}
FIELDS |= {"flash_attn_type": (13, -1), "type_k": (26, F16), "type_v": (27, F16)}


class Params(ctypes.Structure):
    """Any struct of parameters: it is passed by value, and a longer one than the library reads is as good."""

    _fields_ = [("bytes", c_ubyte * 512)]


class Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


@lru_cache(maxsize=1)
def library() -> Any:
    """Return the library, silent."""
    import xllamacpp

    found = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    silent = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)(lambda level, text, data: None)
    found.llama_log_set(silent, None)
    found.silent = silent  # the library keeps no reference
    for name in ("llama_model_default_params", "llama_context_default_params"):
        getattr(found, name).restype = Params
    for name in ("llama_model_load_from_file", "llama_init_from_model", "llama_model_get_vocab", "llama_get_memory"):
        getattr(found, name).restype = c_void_p
    found.llama_model_load_from_file.argtypes = [c_char_p, Params]
    found.llama_init_from_model.argtypes = [c_void_p, Params]
    found.llama_batch_init.restype = Batch
    found.llama_batch_init.argtypes = [c_int32, c_int32, c_int32]
    found.llama_batch_free.argtypes = [Batch]
    found.llama_decode.argtypes = [c_void_p, Batch]
    found.llama_get_logits.restype = POINTER(c_float)
    for name in (
        "get_logits",
        "model_get_vocab",
        "get_memory",
        "free",
        "model_free",
        "vocab_bos",
        "vocab_eos",
        "vocab_n_tokens",
    ):
        getattr(found, f"llama_{name}").argtypes = [c_void_p]
    found.llama_memory_clear.argtypes = [c_void_p, c_bool]
    found.llama_tokenize.argtypes = [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]
    found.llama_detokenize.argtypes = [c_void_p, POINTER(c_int32), c_int32, c_char_p, c_int32, c_bool, c_bool]
    found.llama_model_meta_val_str.argtypes = [c_void_p, c_char_p, c_char_p, ctypes.c_size_t]
    found.llama_backend_init()
    return found


class Llama:
    """A GGUF file in llama.cpp, for one sequence of at most `length` tokens.

    With `exact`, keys and values are kept in float32 and attention is not fused.
    """

    def __init__(self, path: Path, length: int, *, threads: int = 1, exact: bool = False) -> None:
        self._library = library()
        self._model = self._library.llama_model_load_from_file(
            str(path).encode(), self._library.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        params = self._library.llama_context_default_params()
        numbers = (c_int32 * 128).from_buffer(params)
        wanted = {
            "n_ctx": length,
            "n_batch": length,
            "n_ubatch": length,
            "n_threads": threads,
            "n_threads_batch": threads,
        }
        wanted |= {"flash_attn_type": NO_FLASH, "type_k": F32, "type_v": F32} if exact else {}
        for name, value in wanted.items():
            place, default = FIELDS[name]
            assert numbers[place] == default, (
                f"this version of llama.cpp has {numbers[place]} where {name} was {default}"
            )
            numbers[place] = value
        self._context = self._library.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no context of {length} tokens for {path}")
        self._vocabulary = self._library.llama_model_get_vocab(self._model)
        self.vocabulary = self._library.llama_vocab_n_tokens(self._vocabulary)
        self._past = 0

    def reset(self) -> None:
        """Forget all tokens."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        self._past = 0

    def eval(self, tokens: Sequence[int]) -> np.ndarray[Any, Any]:
        """Read more tokens; return the logits after each, (tokens, vocabulary) float32."""
        batch = self._library.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place], batch.logits[place] = token, self._past + place, 1
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        failed = self._library.llama_decode(self._context, batch)
        self._library.llama_batch_free(batch)
        assert failed == 0, f"llama_decode returned {failed}"
        self._past += len(tokens)
        pointer = self._library.llama_get_logits(self._context)
        return np.ctypeslib.as_array(pointer, (len(tokens), self.vocabulary)).copy()

    def tokenize(self, text: bytes, *, add_bos: bool = True, special: bool = False) -> list[int]:
        most = len(text) + 8
        found = (c_int32 * most)()
        count = self._library.llama_tokenize(self._vocabulary, text, len(text), found, most, add_bos, special)
        assert count >= 0
        return list(found[:count])

    def detokenize(self, tokens: Sequence[int]) -> bytes:
        room = ctypes.create_string_buffer(64 * len(tokens) + 64)
        given = (c_int32 * len(tokens))(*tokens)
        count = self._library.llama_detokenize(self._vocabulary, given, len(tokens), room, len(room), False, False)
        assert count >= 0
        return room.raw[:count]

    def metadata(self, name: str) -> str:
        room = ctypes.create_string_buffer(1 << 16)
        count = self._library.llama_model_meta_val_str(self._model, name.encode(), room, len(room))
        assert count >= 0, f"there is no {name}"
        return room.value.decode()

    @property
    def bos(self) -> int:
        return int(self._library.llama_vocab_bos(self._vocabulary))

    @property
    def eos(self) -> int:
        return int(self._library.llama_vocab_eos(self._vocabulary))

    def close(self) -> None:
        self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)


def perplexity(path: Path, windows: torch.Tensor, threads: int = 1) -> float:
    """Return llama.cpp's perplexity over token ids (windows, length): all tokens of a window but the first count."""
    model = Llama(path, windows.shape[1], threads=threads)
    total = 0.0
    for window in windows:
        model.reset()
        logits = torch.from_numpy(model.eval(window.tolist())[:-1])
        total += float(torch.nn.functional.cross_entropy(logits.double(), window[1:], reduction="sum"))
    model.close()
    return math.exp(total / (windows.numel() - len(windows)))
