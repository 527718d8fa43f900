"""Write a checkpoint directory as one GGUF file, one tensor at a time."""

from __future__ import annotations

import importlib.util
import math
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ...errors import ConfigError, ResourceError
from ...model.hub import resolve_model
from ...model.skeleton import open_skeleton
from ...system import files
from ...system.progress import Progress, Silent
from ...system.units import format_bytes
from .runtime import choose

DTYPES = ("f32", "f16", "bf16", "q8_0")


@dataclass(frozen=True)
class Exported:
    """Result of an export."""

    path: Path
    architecture: str
    """llama.cpp's name of the architecture."""
    dtype: str
    parameters: int
    size: int
    """Bytes of the file."""
    context: int
    """Largest number of tokens in the context."""
    notes: list[str]
    """Differences between the file and the checkpoint."""


def export_gguf(
    model: str | Path, out: str | Path, *, dtype: str = "f16", progress: Progress | None = None
) -> Exported:
    """Write a checkpoint directory, dense or pruned, as a GGUF file for llama.cpp, tokenizer included.

    Peak memory depends on the largest tensor. `out` appears, or is replaced, in one rename once it is complete.

    Args:
        out: path of the file; its name must end in ``.gguf`` and its folder must exist.
        dtype: type of the matrices: ``f32``, ``f16``, ``bf16`` or ``q8_0``. Norms and biases stay float32.

    Raises:
        ConfigError: `out` or `dtype` is unusable, or the `gguf` package is not installed.
        CheckpointError: the model is unusable, or llama.cpp does not support its architecture or tokenizer.
        ResourceError: there is too little disk space.
        ResumeError: another process is writing `out`.
        NumericalError: a weight is NaN, Inf or too large for f16.
    """
    out, progress = Path(out), progress or Silent()
    model = resolve_model(model, progress)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    if out.suffix != ".gguf" or out.is_dir() or not out.parent.is_dir():
        raise ConfigError(
            f"cannot write {str(out)!r}: OUT must be a file name ending in .gguf in an existing directory"
        )
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("export needs the gguf package: pip install 'streamprune[gguf]'")
    from gguf import GGML_QUANT_VERSION, GGUFWriter, LlamaFileType

    from .metadata import add_metadata, add_rotary, context_of
    from .tensors import pack, plan
    from .vocabulary import add_vocabulary

    skeleton = open_skeleton(model, torch.device("cpu"), "float32")
    runtime = choose(skeleton)
    context, window = context_of(skeleton, runtime)
    writer = GGUFWriter(None, runtime.name)
    add_metadata(writer, skeleton, runtime, context)
    factors = add_rotary(writer, skeleton, runtime)
    notes = add_vocabulary(writer, skeleton)
    writer.add_file_type(LlamaFileType[f"{'ALL' if dtype == 'f32' else 'MOSTLY'}_{dtype.upper()}"])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    tensors = list(plan(skeleton, runtime, dtype, factors))
    for each in tensors:
        writer.add_tensor_info(
            each.name, each.byte_shape, np.dtype(np.uint8), math.prod(each.byte_shape), raw_dtype=each.kind
        )
    if window is not None:
        notes.append(f"llama.cpp has no sliding attention for this model: the context is its window of {window} tokens")
    short = [each.name for each in tensors if len(each.byte_shape) > 1 and each.kind.name.lower() not in (dtype, "f32")]
    if short:
        notes.append(f"{len(short)} tensors, such as {short[0]}, are f16: their rows are no multiple of 32 long")

    with files.locked_for_writing(out), files.replacing_file(out) as temporary, closing(writer):
        size = sum(math.prod(each.byte_shape) for each in tensors)
        if size > (free := files.free_bytes(out.parent)):
            raise ResourceError(f"{out} needs {format_bytes(size)}; {format_bytes(free)} are free")
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        progress.phase("export", len(tensors))
        for each in tensors:
            # No reference here: the tensor is freed before the next one is read.
            writer.write_tensor_data(
                pack(each.convert(*map(skeleton.checkpoint.read, each.parts)), each.kind, each.name)
            )
            progress.step(each.name)
    for note in notes:
        progress.say(note)
    return Exported(out, runtime.name, dtype, skeleton.parameters(), out.stat().st_size, context, notes)
