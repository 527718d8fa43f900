"""Text that the model writes itself, for calibration without data (Greedy Output Approximation, section 4.1).

Batched decoding, streamed: a sweep over the blocks gives every sequence its next token. Keys and values lie on disk
between sweeps; positions, masks and attention are transformers' own.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..errors import NumericalError
from ..maths.refit import advice
from ..maths.sampling import sample
from ..model.skeleton import Skeleton
from ..model.upstream import BlockCache, cache_argument
from ..system import files
from ..system.host import host_buffer, tensor_bytes
from ..system.progress import Progress, rest
from . import sweep


@torch.no_grad()
def generate(
    skeleton: Skeleton, samples: int, length: int, seed: int, folder: Path, batch: int, progress: Progress
) -> Tensor:
    """Token ids (samples, length) int64: the first of a sequence drawn evenly, the others from the model's own softmax.

    Args:
        length: at least 2, and no more than the model's context.
        seed: of the one generator that all draws come from.
        folder: for keys and values; what is there goes, before and after.
        batch: sequences whose keys and values one block works on at a time.

    Raises:
        NumericalError: a block or the head gives NaN or Inf.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.empty(samples, length, dtype=torch.int64)
    tokens[:, 0] = torch.randint(skeleton.vocabulary, (samples,), generator=generator)
    files.remove_tree(folder)
    files.make_folder(folder)
    batches = [slice(start, min(start + batch, samples)) for start in range(0, samples, batch)]
    pasts = [(rows, KeysAndValues(folder, number)) for number, rows in enumerate(batches)]
    progress.phase("generate", length)
    progress.step("first tokens")
    for past in range(length - 1):
        with skeleton.embedding(past) as embedding:
            hidden = embedding(tokens[:, past : past + 1].to(skeleton.device))
        for index, block in sweep.blocks(skeleton, range(len(skeleton))):
            for rows, cache in pasts:
                x = hidden[rows]
                arguments = skeleton.arguments(x.shape[0], 1, past)[index]
                hidden[rows] = block(x, {**arguments, cache_argument(type(skeleton.block(index)).forward): cache})
            del block
            _check_finite(hidden, f"block {index}")
        tokens[:, past + 1] = _next_tokens(skeleton, hidden[:, 0], generator)
        progress.step(f"token {past + 1}")
        rest(progress)
    files.remove_tree(folder)
    return tokens


class KeysAndValues(BlockCache):
    """Keys and values of one micro-batch, in a growing file per block."""

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.number = folder, number

    def extend(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Append one token's (sequences, heads, 1, head_dim); returns all tokens' (sequences, heads, tokens, head_dim)."""
        token = torch.stack((keys, values))[..., 0, :]
        path = self.folder / f"{layer:04}-{self.number}"
        files.append_bytes(path, tensor_bytes(token.cpu()))
        buffer = host_buffer(path.stat().st_size, token.device)
        files.read_into(path, 0, buffer.numpy().data)
        tokens = buffer.to(token.device, non_blocking=True).view(token.dtype).view(-1, *token.shape)
        k, v = tokens.permute(1, 2, 3, 0, 4)
        return k, v


def _next_tokens(skeleton: Skeleton, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """One token a sequence from the last block's output (samples, d), a few logits at a time."""
    uniform = torch.rand(len(hidden), generator=generator, dtype=torch.float64)
    chunk = max(1, sweep.LOGIT_BYTES // (4 * skeleton.vocabulary))
    found = []
    with skeleton.head() as head:
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits = head(hidden[rows]).cpu()
            _check_finite(logits, "the head")
            found.append(sample(logits, uniform[rows]))
    return torch.cat(found)


def _check_finite(tensor: Tensor, place: str) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise NumericalError(f"{place} gives NaN or Inf{advice(tensor.dtype)}")
