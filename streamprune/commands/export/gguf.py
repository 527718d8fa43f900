"""Write a checkpoint directory as one GGUF file, one tensor at a time."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, ConfigError, ResourceError
from ...model.hub import resolve_model
from ...model.skeleton import Skeleton, open_skeleton
from ...system import files
from ...system.progress import Progress, Silent
from ...system.units import format_bytes
from .metadata import add_metadata, add_rotary, context_of
from .runtime import Runtime, choose
from .storage import DTYPES, pack, stored_as, stored_bytes
from .vocabulary import read_vocabulary

_EXPERT = re.compile(r"(.*\.experts)\.\d+\.(\w+\.weight)")


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
    notes: list[str] = field(default_factory=list)
    """Differences between the file and the checkpoint."""


@dataclass(frozen=True)
class _Planned:
    """A tensor of the file."""

    name: str
    shape: tuple[int, ...]
    """Shape in elements, in torch's order of dimensions."""
    kind: Any
    """The stored type, a `GGMLQuantizationType`."""
    read: Callable[[], Tensor]


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
    _check(out, dtype)
    from gguf import GGUFWriter
    from gguf.constants import GGML_QUANT_VERSION, LlamaFileType

    skeleton = open_skeleton(model, torch.device("cpu"), "float32")
    runtime = choose(skeleton)
    defaults = {name: getattr(skeleton.config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
    vocabulary = read_vocabulary(model, skeleton.vocabulary, {k: v for k, v in defaults.items() if v is not None})
    context, window = context_of(skeleton, runtime)

    with files.locked_for_writing(out), files.replacing_file(out) as temporary:
        writer = GGUFWriter(temporary, runtime.name)
        try:
            add_metadata(writer, skeleton, runtime, context)
            factors = add_rotary(writer, skeleton, runtime, skeleton.sites(0)[0].head_width)
            vocabulary.add_to(writer)
            prefix = "ALL" if dtype == "f32" else "MOSTLY"
            writer.add_file_type(LlamaFileType[f"{prefix}_{dtype.upper()}"])
            writer.add_quantization_version(GGML_QUANT_VERSION)
            planned = list(_plan(skeleton, runtime, dtype, factors))
            size = sum(stored_bytes(each.kind, each.shape) for each in planned)
            if size > (free := files.free_bytes(out.parent)):
                raise ResourceError(f"{out} takes {format_bytes(size)}; {format_bytes(free)} are free there")
            _write(writer, planned, progress)
        finally:
            writer.close()
    notes = list(vocabulary.notes)
    if window is not None:
        notes.append(
            f"attention slides over {window} tokens, which llama.cpp does not do here: its context is {window}"
        )
    short = [each.name for each in planned if len(each.shape) > 1 and each.kind.name.lower() not in (dtype, "f32")]
    if short:
        notes.append(f"{len(short)} tensors are f16, having rows that blocks of 32 do not divide ({short[0]}, for one)")
    for note in notes:
        progress.say(note)
    return Exported(
        path=out,
        architecture=runtime.name,
        dtype=dtype,
        parameters=skeleton.parameters(),
        size=out.stat().st_size,
        context=context,
        notes=notes,
    )


def _check(out: Path, dtype: str) -> None:
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    if out.suffix != ".gguf" or out.is_dir():
        raise ConfigError(f"the file to write is {str(out)!r}; its name must end in .gguf, and it must not be a folder")
    if not out.parent.is_dir():
        raise ConfigError(f"the file to write is {str(out)!r}; the folder {str(out.parent)!r} is not there")
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("export needs the gguf package: pip install 'streamprune[gguf]'")


def _write(writer: Any, planned: list[_Planned], progress: Progress) -> None:
    for each in planned:
        # The shape counts elements, whatever the stored type; raw_dtype gives that type.
        writer.add_tensor_info(
            each.name, each.shape, "float32", stored_bytes(each.kind, each.shape), raw_dtype=each.kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    progress.phase("export", len(planned))
    for each in planned:
        writer.write_tensor_data(pack(each.read(), each.kind, each.name))
        progress.step(each.name)


def _plan(skeleton: Skeleton, runtime: Runtime, dtype: str, factors: Tensor | None) -> Iterator[_Planned]:
    """Yield every tensor of the file, in order."""

    def planned(name: str, shape: tuple[int, ...], read: Callable[[], Tensor]) -> _Planned:
        return _Planned(name, shape, stored_as(dtype, name, shape), read)

    checkpoint, named = skeleton.checkpoint, _names(skeleton, runtime)
    if factors is not None:
        yield planned("rope_freqs.weight", tuple(factors.shape), lambda: factors)
    for name in skeleton.embed_names():
        yield planned(named(name), checkpoint[name].shape, partial(checkpoint.read, name))
    for index in range(len(skeleton)):
        full = skeleton.block_names(index)
        for fused, linears in runtime.fused.items():
            parts = [full.pop(f"{linear}.weight") for linear in linears]
            rows, columns = sum(checkpoint[part].shape[0] for part in parts), checkpoint[parts[0]].shape[1]
            yield planned(f"blk.{index}.{fused}.weight", (rows, columns), partial(_stacked, skeleton, parts))
        experts: dict[str, list[str]] = {}
        for inside in [inside for inside in full if _EXPERT.fullmatch(inside)]:
            experts.setdefault(_EXPERT.sub(r"\1.\2", inside), []).append(full.pop(inside))
        for stacked, parts in experts.items():
            shape = len(parts), *checkpoint[parts[0]].shape
            yield planned(
                named(f"model.layers.{index}.{stacked}"), shape, partial(_stacked, skeleton, parts, deep=True)
            )
        head_width = skeleton.sites(index)[0].head_width
        for inside, name in full.items():
            linear, _, leaf = inside.rpartition(".")
            shape = checkpoint[name].shape
            if leaf == "weight" and _is_transposed(skeleton, index, linear):
                yield planned(named(name), shape[::-1], partial(_transposed, skeleton, name))
            elif linear in runtime.paired:
                yield planned(named(name), shape, partial(_paired, skeleton, name, head_width))
            else:
                yield planned(named(name), shape, partial(_plain, skeleton, name, runtime.norm_shift))
    for name in skeleton.head_names():
        yield planned(named(name), checkpoint[name].shape, partial(_plain, skeleton, name, runtime.norm_shift))
    if runtime.stored_head and skeleton.tied:
        name = skeleton.embed_names()[0]
        yield planned("output.weight", checkpoint[name].shape, partial(checkpoint.read, name))


def _names(skeleton: Skeleton, runtime: Runtime) -> Callable[[str], str]:
    """Return a function that maps transformers' tensor names to llama.cpp's."""
    from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES
    from gguf.tensor_mapping import get_tensor_name_map

    arch = next(arch for arch in MODEL_ARCH if MODEL_ARCH_NAMES[arch] == runtime.name)
    mapping = get_tensor_name_map(arch, len(skeleton))

    def named(name: str) -> str:
        found: str | None = mapping.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise CheckpointError(
                f"{skeleton.checkpoint.directory}: llama.cpp's {runtime.name} has no tensor for {name!r}"
            )
        return found

    return named


def _is_transposed(skeleton: Skeleton, index: int, linear: str) -> bool:
    from transformers import Conv1D

    return isinstance(skeleton.module(index, linear), Conv1D)


def _plain(skeleton: Skeleton, name: str, norm_shift: float) -> Tensor:
    tensor = skeleton.checkpoint.read(name)
    return tensor.float() + norm_shift if norm_shift and tensor.dim() == 1 else tensor


def _stacked(skeleton: Skeleton, names: list[str], *, deep: bool = False) -> Tensor:
    """Read tensors (rows, columns) and concatenate their rows or, with `deep`, stack them in a new first dimension."""
    return (torch.stack if deep else torch.cat)([skeleton.checkpoint.read(name) for name in names])


def _transposed(skeleton: Skeleton, name: str) -> Tensor:
    return skeleton.checkpoint.read(name).t().contiguous()


def _paired(skeleton: Skeleton, name: str, head_width: int) -> Tensor:
    """Read (heads · head_width, ...) and reorder the rows of each head as ``0, d/2, 1, d/2+1, ...``, d = head_width."""
    tensor = skeleton.checkpoint.read(name)
    halves = tensor.reshape(-1, 2, head_width // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)
