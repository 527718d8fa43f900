"""llama.cpp's quantiser, called in the shared library of the xllamacpp wheel."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError
from ...model.formats import PLAIN, QUANTISED

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

DTYPES = (*PLAIN, *QUANTISED)


def check(dtype: str, imatrix: bool) -> None:
    """Check the format of a file, and whether its quantiser is installed. Does not import torch.

    Raises:
        ConfigError: the format is unknown, a package is missing, or there is a text for an imatrix (`imatrix`) that nothing would use.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    if imatrix and dtype not in QUANTISED:
        raise ConfigError(f"the imatrix text would not be used: dtype is {dtype}, not a quantised one such as q4_k_m")
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("export needs the gguf package: pip install 'streamprune[gguf]'")
    if dtype in QUANTISED and importlib.util.find_spec("xllamacpp") is None:
        raise ConfigError(f"dtype {dtype} needs llama.cpp's quantiser: pip install 'streamprune[llama]'")


@lru_cache(maxsize=1)
def quantise_rows() -> Callable[[Array, int, Array | None], Array]:
    """Return `quantise(rows, kind, importance)`, which is llama.cpp's `ggml_quantize_chunk`.

    Its arguments are rows (n, columns) float32, a number of `GGMLQuantizationType`, and the importance of each column, (columns,)
    float32 and not negative, or None. It returns (n, row_bytes) uint8. The types are those for which the rows are long enough.

    Raises:
        ConfigError: xllamacpp does not export the function.
    """
    import numpy as np
    import xllamacpp
    from gguf import GGMLQuantizationType, quant_shape_to_byte_shape

    library = xllamacpp.xllamacpp.__file__
    try:
        chunk = ctypes.CDLL(library).ggml_quantize_chunk
    except (AttributeError, OSError) as error:
        raise ConfigError(
            f"xllamacpp {xllamacpp.__version__} does not export llama.cpp's quantiser here ({error}); export with --dtype f16 and "
            "run llama-quantize"
        ) from error
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    chunk.restype, chunk.argtypes = (
        ctypes.c_size_t,
        [ctypes.c_int, pointer, pointer, integer, integer, integer, pointer],
    )

    def quantise(rows: Array, kind: int, importance: Array | None) -> Array:
        rows = np.ascontiguousarray(rows, np.float32)
        out = np.empty(quant_shape_to_byte_shape(rows.shape, GGMLQuantizationType(kind)), np.uint8)
        assert importance is None or (importance.dtype, importance.shape) == (np.float32, rows.shape[1:])
        given = None if importance is None else importance.ctypes.data
        written = chunk(kind, rows.ctypes.data, out.ctypes.data, 0, *rows.shape, given)
        assert written == out.nbytes, f"ggml_quantize_chunk wrote {written} bytes of {out.nbytes}"
        return out

    return quantise
