"""Write a checkpoint directory as one GGUF file, one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...errors import ConfigError, ResourceError
from ...model.formats import BLOCKS, GGUF_FORMATS, QUANTISED
from ...model.hub import resolve_model
from ...model.llama_cpp import choose
from ...model.sizes import Sizes
from ...model.skeleton import open_skeleton
from ...system import files
from ...system.progress import Progress, Silent
from ...system.units import format_bytes
from ...text.source import Spec
from . import quantiser

if TYPE_CHECKING:
    from .tensors import Planned


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
    weights: Mapping[str, int | None]
    """Bytes of all tensors in other formats (see `model.formats`); None where the model cannot be stored so."""
    notes: list[str]
    """Differences between the file and the checkpoint."""


def _fallen_back(tensors: Sequence[Planned]) -> Iterator[str]:
    """Yield a note for each type that some tensors have in place of another."""
    groups: dict[tuple[str, str], list[str]] = {}
    for each in tensors:
        if each.kind != each.wanted:
            groups.setdefault((each.kind.name.lower(), each.wanted.name.lower()), []).append(each.name)
    for (kind, wanted), names in groups.items():
        rows = 32 if kind == "f16" else BLOCKS[wanted][0]
        yield (
            f"{len(names)} tensors, such as {names[0]}, are {kind} instead of {wanted}: their rows are no multiple of {rows} long"
        )


def export_gguf(
    model: str | Path,
    out: str | Path,
    *,
    dtype: str = "f16",
    imatrix_text: Spec | None = None,
    device: str = "auto",
    memory: int | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Write a checkpoint directory, dense or pruned, as a GGUF file for llama.cpp, tokenizer included.

    Peak memory depends on the largest tensor. `out` appears, or is replaced, in one rename once it is complete.

    Args:
        out: path of the file; its name must end in ``.gguf`` and its folder must exist.
        dtype: one of `quantiser.DTYPES`: the type of the matrices, or one of llama.cpp's mixtures such as ``q4_k_m``. Norms and biases stay
            float32. All but ``f32``, ``f16``, ``bf16`` and ``q8_0`` are made by llama.cpp's own quantiser, with its choice of a type
            for each tensor.
        imatrix_text: with these, a text (see `text.source.Source`) over which the importance of every input of a linear is measured,
            block by block. The quantiser weights errors with it.
        device, memory: as in `evaluate`, for measuring the importance.

    Raises:
        ConfigError: `out`, `dtype` or the text is unusable, or the `gguf` or `xllamacpp` package is not installed.
        CalibrationError: the text is unusable.
        CheckpointError: the model is unusable, or llama.cpp does not support its architecture or tokenizer.
        ResourceError: there is too little disk space.
        ResumeError: another process is writing `out`.
        NumericalError: a weight is NaN, Inf or too large for f16.
    """
    out, progress = Path(out), progress or Silent()
    model = resolve_model(model, progress)
    quantiser.check(dtype, imatrix_text is not None)
    if out.suffix != ".gguf" or out.is_dir() or not out.parent.is_dir():
        raise ConfigError(
            f"cannot write {str(out)!r}: OUT must be a file name ending in .gguf in an existing directory"
        )
    if dtype in QUANTISED:
        quantiser.quantise_rows()
    from gguf import GGML_QUANT_VERSION, GGUFWriter, LlamaFileType

    from .importance import importance
    from .metadata import add_metadata, add_rotary, context_of
    from .tensors import of_columns, pack, plan
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
    tensors = list(plan(skeleton, runtime, dtype, factors, imatrix_text is not None))
    for each in tensors:
        writer.add_tensor_info(
            each.name, each.byte_shape, np.dtype(np.uint8), math.prod(each.byte_shape), raw_dtype=each.kind
        )
    if window is not None:
        notes.append(f"llama.cpp has no sliding attention for this model: the context is its window of {window} tokens")
    notes += _fallen_back(tensors)

    with files.locked_for_writing(out), files.replacing_file(out) as temporary, closing(writer):
        size = sum(math.prod(each.byte_shape) for each in tensors)
        if size > (free := files.free_bytes(out.parent)):
            raise ResourceError(f"{out} needs {format_bytes(size)}; {format_bytes(free)} are free")
        known = {}
        if imatrix_text is not None:
            known = importance(model, imatrix_text, device=device, memory=memory, progress=progress)
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        progress.phase("export", len(tensors))
        for each in tensors:
            # No reference here: the tensor is freed before the next one is read.
            columns = of_columns(each, known)
            writer.write_tensor_data(
                pack(each.convert(*map(skeleton.checkpoint.read, each.parts)), each.kind, each.name, columns)
            )
            progress.step(each.name)
    for note in notes:
        progress.say(note)
    weights = Sizes(skeleton).in_formats({})
    for format in GGUF_FORMATS:
        weights[format] = sum(math.prod(each.byte_shape) for each in plan(skeleton, runtime, format, factors))
    return Exported(out, runtime.name, dtype, skeleton.parameters(), out.stat().st_size, context, weights, notes)
