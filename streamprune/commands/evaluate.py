"""Measure perplexity, streamed block by block."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import ConfigError, check_choice, check_least
from ..jobs.forecast.resources import bucket_batch, forecast
from ..jobs.forecast.workload import Workload
from ..model import hub
from ..model.block import Block
from ..model.proof import prove
from ..model.skeleton import Skeleton, open_skeleton
from ..model.tokenizer import Bos, bos_token, load_tokenizer
from ..stream import sweep
from ..stream.store import ActivationStore
from ..system import files, machine
from ..system.progress import Progress, Silent, rest
from ..text.source import CUTS, LOSSES_ON, Cut, LossOn, Source, Spec, Text, source
from ..text.windows import Windows, whole, window_length

CONSECUTIVE: dict[Cut, str] = {
    "anywhere": "consecutive",
    "documents": "consecutive, each from the beginning of a document,",
}
COUNTED: dict[LossOn, str] = {"all": "all {} predicted tokens", "assistant": "the {} predicted tokens of the assistant"}


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate`."""

    perplexity: float
    tokens: int  # predicted tokens that count: of the windows, except the first of each
    seq_len: int  # tokens per window, BOS included
    bos: bool  # whether every window begins with BOS
    loss_on: LossOn  # whose tokens count
    windows: Cut  # where windows begin
    protocol: str  # how perplexity was measured


def evaluate(
    model: str | Path,
    text: Spec,
    *,
    seq_len: int | None = None,
    bos: Bos = "auto",
    windows: Cut = "anywhere",
    loss_on: LossOn = "all",
    device: str = "auto",
    dtype: str = "auto",
    memory: int | None = None,
    cache: Path | None = None,
    activations: str | None = None,
    memory_host: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure the perplexity of a checkpoint directory, dense or pruned, on a text.

    The text is one source (see `text.source.Source`). Its documents, if it has several, are joined by two newlines. The
    whole text is tokenized without special tokens and cut into consecutive windows of `seq_len` tokens (default: 2048,
    or the model's context if that is shorter); a remainder is dropped. With BOS, a window is BOS and `seq_len` - 1 tokens
    of text. Perplexity is the exponential of the mean negative log-likelihood over all predicted tokens: all tokens of a
    window but the first.

    Args:
        bos: whether every window begins with BOS; ``auto`` does as the tokenizer does.
        windows: ``documents`` begins every window where a document begins (see `text.windows.document_windows`) instead of
            where the last one ended.
        loss_on: ``assistant`` counts only the tokens that the assistant says in conversations.
        memory: bytes that the device may use; None allows all free memory.
        cache: folder for activations during the run; None takes the system's temporary folder.
        activations: dtype in which activations are stored, see `system.machine.resolve_activations`. None stores them
            as computed, because this is a measurement.
        memory_host: bytes of host memory that hold activations, in addition to `memory`, instead of the disk.

    Raises:
        CheckpointError, CalibrationError, ConfigError: the model, the text or the device is unusable.
        ResourceError: there is too little memory or disk.
        NumericalError: the computation produces NaN or Inf.
        Stopped: `progress` asked to stop. Nothing is kept of an unfinished evaluation.
    """
    progress, given = progress or Silent(), source(text)
    skeleton = open_skeleton(hub.resolve_model(model, progress), machine.resolve_device(device), dtype)
    cut, first = read_windows(skeleton, given, seq_len, bos, windows, loss_on)
    limits: dict[str, Any] = {"memory": memory, "cache": cache, "activations": activations, "memory_host": memory_host}
    with through_blocks(skeleton, [cut.tokens], "evaluate", progress, **limits) as (bucket,):
        last = sweep.boundary("dense", len(skeleton))
        loss, count = sweep.losses(skeleton, bucket.store, last, cut.labels, bucket.batch)
        progress.step("head")
    stored, (samples, length) = bucket.store.encoding.stored, cut.tokens.shape
    return Evaluation(
        perplexity=math.exp(loss / count) if loss / count < 700 else math.inf,
        tokens=count,
        seq_len=length,
        bos=first is not None,
        loss_on=loss_on,
        windows=windows,
        protocol=(
            f"{_whole(given)} tokenised without special tokens; {samples} {CONSECUTIVE[windows]} windows of {length} "
            f"{'without' if first is None else 'that begin with'} BOS, remainder dropped; mean over {COUNTED[loss_on].format(count)}; computed in {machine.dtype_name(skeleton.dtype)}"
            + ("" if stored == skeleton.dtype else f", activations stored in {machine.dtype_name(stored)}")
        ),
    )


@dataclass(frozen=True)
class Bucket:
    """Sequences of equal length on their way through the model."""

    tokens: Tensor  # (sequences, length) int64
    store: ActivationStore
    batch: int  # sequences per micro-batch


@contextmanager
def through_blocks(
    skeleton: Skeleton,
    groups: Sequence[Tensor],
    phase: str,
    progress: Progress,
    *,
    memory: int | None = None,
    cache: Path | None = None,
    activations: str | None = None,
    memory_host: int | None = None,
    watch: Callable[[int, Block], AbstractContextManager[None]] = lambda index, block: nullcontext(),
) -> Iterator[list[Bucket]]:
    """Run sequences through all blocks in one sweep; inside the context, the stores hold the last block's output.

    Args:
        groups: (sequences, length) int64 each, of different lengths.
        phase: reported to `progress`, with one step more than this function takes, for the head.
        memory, cache, activations, memory_host: as in `evaluate`, whose errors it raises.
        watch: returns a context that is open while a block runs.
    """
    dtypes = skeleton.dtype, skeleton.checkpoint.dtype
    skeleton.check_sites()
    stored = None if activations is None else machine.resolve_activations(activations, *dtypes)
    parent, held = cache or Path(tempfile.gettempdir()), memory_host or 0
    total, longest = sum(tokens.numel() for tokens in groups), max(tokens.shape[1] for tokens in groups)
    resources = forecast(
        skeleton,
        Workload(
            samples=-(-total // longest), length=longest, text=True, prunes=False, scores=True, activations=stored
        ),
        **machine.memory_limits(skeleton.device, memory, held),
        disk_limit=files.free_bytes(parent),
    ).require()
    skeleton.copies_ahead = resources.copies_ahead
    prove(skeleton)
    files.make_folder(parent)
    with machine.limit_memory(skeleton.device, memory), files.scratch(parent, "streamprune-eval-") as folder:
        buckets = []
        for tokens in groups:
            length, share = tokens.shape[1], held * tokens.numel() // total
            shape = (len(tokens), length, skeleton.stream_width)
            store = ActivationStore(
                folder / str(length), shape, skeleton.dtype, skeleton.device, durable=False, stored=stored, memory=share
            )
            buckets.append(Bucket(tokens, store, bucket_batch(resources, longest, length)))
        progress.phase(phase, len(skeleton) + 2)
        with skeleton.embedding() as embedding:
            for bucket in buckets:
                with bucket.store.writing(sweep.boundary("dense", 0), "the embedding") as write:
                    for batch in bucket.store.batches(bucket.batch):
                        write(embedding(bucket.tokens[batch].to(skeleton.device)))
        progress.step("embedding")
        for index, block in sweep.blocks(skeleton, range(len(skeleton))):
            with watch(index, block):
                for bucket in buckets:
                    sweep.advance(skeleton, block, index, bucket.store, "dense", bucket.batch)
                    bucket.store.remove(sweep.boundary("dense", index))
            del block
            progress.step(f"block {index}")
            rest(progress)
        yield buckets


def _whole(text: Source) -> str:
    """Describe, for the protocol, how a source becomes one text."""
    documents = text.open()
    if documents.field is None:
        return "whole text"
    first = next((each for _, block in documents.read(range(len(documents))) for each in block if each), "")
    joined = "by two newlines" if isinstance(first, str) else "as the chat template writes them"
    return f"whole text, documents of field {documents.field!r} joined {joined},"


def read_windows(
    skeleton: Skeleton,
    text: Source,
    seq_len: int | None,
    bos: Bos = "auto",
    cut: Cut = "anywhere",
    loss_on: LossOn = "all",
) -> tuple[Windows, int | None]:
    """Tokenize a text with the model's tokenizer and cut it into consecutive windows.

    Returns:
        The windows, and the BOS token that they begin with, or None.

    Raises:
        CheckpointError, CalibrationError, ConfigError: the tokenizer, the text, the length or `bos` is unusable.
    """
    check_least(2, seq_len=seq_len)
    if text.weight != 1:
        raise ConfigError(f"{text} has weight {text.weight:g}; a text to measure on is read whole, without weights")
    check_choice(windows=(cut, CUTS), loss_on=(loss_on, LOSSES_ON))
    length = window_length(seq_len, skeleton.context)
    tokenizer = load_tokenizer(skeleton.checkpoint.directory, skeleton.vocabulary)
    first = bos_token(tokenizer, bos, skeleton.checkpoint.directory)
    return whole(tokenizer, Text((text,)), skeleton.vocabulary, length, bos=first, loss_on=loss_on, cut=cut), first
