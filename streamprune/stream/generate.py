"""Generate calibration text with the model itself (Greedy Output Approximation, section 4.1).

Streamed batch decoding: each sweep over the blocks produces the next token of every sequence. Keys and values are on
disk between sweeps. Positions, masks and attention are those of transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import NumericalError
from ..maths.refit import advice, all_finite
from ..maths.sampling import sample
from ..model.skeleton import Skeleton
from ..model.upstream import cache_argument
from ..system import files
from ..system.host import host_buffer, tensor_bytes
from ..system.progress import Progress, rest
from . import sweep
from .store import temporary


@torch.no_grad()
def generate(
    skeleton: Skeleton,
    samples: int,
    length: int,
    seed: int,
    folder: Path,
    batch: int,
    progress: Progress,
    bos: int | None = None,
) -> Tensor:
    """Generate token ids (samples, length) int64: the first token is BOS or uniform, the others from the model's softmax.

    Args:
        length: tokens per sequence; at least 2 and at most the model's context.
        seed: seed of the single generator used for all draws.
        folder: holds keys and values; see `store.temporary`.
        batch: sequences per micro-batch of one block.
        bos: the token that every sequence begins with; None draws the first token uniformly from the vocabulary.

    Raises:
        NumericalError: a block or the head produces NaN or Inf.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.empty(samples, length, dtype=torch.int64)
    tokens[:, 0] = torch.randint(skeleton.vocabulary, (samples,), generator=generator) if bos is None else bos
    batches = [slice(start, min(start + batch, samples)) for start in range(0, samples, batch)]
    pasts = [(rows, KeysAndValues(folder, number)) for number, rows in enumerate(batches)]
    progress.phase("generate", length)
    progress.step("first tokens")
    with temporary(folder):
        for past in range(length - 1):
            with skeleton.embedding(past) as embedding:
                hidden = embedding(tokens[:, past : past + 1].to(skeleton.device))
            for index, block in sweep.blocks(skeleton, range(len(skeleton))):
                for rows, cache in pasts:
                    x = hidden[rows]
                    arguments = skeleton.arguments(x.shape[0], 1, past)[index]
                    hidden[rows] = block(x, {**arguments, cache_argument(type(skeleton.block(index)).forward): cache})
                del block
                if not all_finite(hidden):
                    raise NumericalError(f"block {index} gives NaN or Inf{advice(hidden.dtype)}")
            tokens[:, past + 1] = _next_tokens(skeleton, hidden[:, 0], generator)
            progress.step(f"token {past + 1}")
            rest(progress)
    return tokens


class KeysAndValues:
    """Keys and values of one micro-batch, appended to one file per block: the part of a cache that attention uses."""

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.number = folder, number

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *others: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Append one token (sequences, heads, 1, head_dim); return all tokens (sequences, heads, tokens, head_dim).

        Keys and values may differ in head_dim. Further arguments differ between releases of transformers and serve other kinds of
        cache.
        """
        token = torch.cat((key_states, value_states), dim=-1)[..., 0, :]
        path = self.folder / f"{layer_idx:04}-{self.number}"
        files.append(path, tensor_bytes(token.cpu()))
        buffer = host_buffer(path.stat().st_size, token.device)
        files.read_into(path, 0, buffer.numpy().data)
        tokens = buffer.to(token.device, non_blocking=True).view(token.dtype).view(-1, *token.shape)
        k, v = torch.split(tokens.permute(1, 2, 0, 3), [key_states.shape[-1], value_states.shape[-1]], dim=-1)
        return k, v


def _next_tokens(skeleton: Skeleton, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one token per sequence from the last block's output (samples, d): (samples,). Chunks bound the logits."""
    uniform = torch.rand(len(hidden), generator=generator, dtype=torch.float64)
    chunk = max(1, sweep.LOGIT_BYTES // (4 * skeleton.vocabulary))
    found = []
    with skeleton.head() as head:
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            found.append(sample(head(hidden[rows]).cpu(), uniform[rows]))
    return torch.cat(found)
