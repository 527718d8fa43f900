"""Continue prompts greedily with several models, one model in memory at a time."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from ...errors import ConfigError, ResourceError, check_least
from ...model.checkpoint import Checkpoint
from ...model.config import read_configuration
from ...model.tokenizer import Bos, check_vocabulary, encode, load_tokenizer
from ...model.whole import load_whole
from ...system import machine
from ...system.host import return_freed_memory
from ...system.progress import Progress
from ...system.units import format_bytes

TOKENS = 48
"""Default number of tokens per sample."""
ROOM = 1.2
"""Memory that generation takes, as a multiple of the model's size."""


def check_samples(
    models: Mapping[str, Path], prompts: Sequence[str], tokens: int | None, device: torch.device, bos: Bos
) -> list[int]:
    """Check in advance that samples can be generated; return how many tokens may follow each prompt.

    Args:
        tokens: tokens per sample; None takes `TOKENS`, or what the prompt leaves of the models' contexts.
        bos: whether prompts begin with BOS; ``auto`` adds what the tokenizer adds.

    Raises:
        ConfigError: a prompt is empty, `tokens` is below 1, both together exceed a model's context, or a tokenizer lacks
            the BOS that is asked for.
        CheckpointError: a model is not a checkpoint, or its tokenizer cannot be read.
        ResourceError: a model does not fit into free memory.
    """
    check_least(1, tokens=tokens)
    for path in models.values():
        needed = int(ROOM * sum(entry.nbytes for entry in Checkpoint(path).values()))
        for place in {torch.device("cpu"), device}:
            free = machine.available_memory(place)
            if needed > free:
                raise ResourceError(
                    f"samples need all of {path} in memory, about {format_bytes(needed)}; {format_bytes(free)} are free "
                    f"on {place}; without --prompt the report needs no samples"
                )
    return [min(_room(path, prompt, tokens, bos) for path in models.values()) for prompt in prompts]


def _room(path: Path, prompt: str, tokens: int | None, bos: Bos) -> int:
    """Return how many tokens may follow a prompt."""
    length = len(encode(load_tokenizer(path), prompt, bos, path)) if prompt.strip() else 0
    if not length:
        raise ConfigError(f"prompt is {prompt!r}; it must have at least one token")
    _, config = read_configuration(Checkpoint(path))
    left = (getattr(config, "max_position_embeddings", None) or sys.maxsize) - length
    wanted = tokens or TOKENS
    if left < (tokens or 1):
        raise ConfigError(
            f"--tokens is {wanted} after a --prompt of length {length}; the context of {path} is {left + length} tokens "
            "and must hold both"
        )
    return min(wanted, left)


def write_samples(
    models: Mapping[str, Path],
    prompts: Sequence[str],
    limits: Sequence[int],
    device: torch.device,
    progress: Progress,
    bos: Bos,
) -> list[dict[str, Any]]:
    """Continue every prompt greedily with every model.

    Args:
        models: checkpoint directories by label.
        limits: largest number of tokens to generate after each prompt. A model may end its text earlier.
        bos: as in `check_samples`.

    Returns:
        Per prompt: the `prompt`, the continuations as `texts` by label, the numbers of leading characters (`alike`) and
        tokens (`same`) on which they agree, and the `tokens` of the longest.

    Raises:
        CheckpointError: transformers cannot load a model or its tokenizer.
    """
    progress.phase("samples", len(models) * len(prompts))
    found: list[tuple[dict[str, str], list[list[int]]]] = [({}, []) for _ in prompts]
    for label, path in models.items():
        model, tokenizer = load_whole(path).to(device), load_tokenizer(path)
        check_vocabulary(tokenizer, model.config.vocab_size, path)
        for prompt, limit, (texts, ids) in zip(prompts, limits, found, strict=True):
            ids.append(_continue(model, torch.tensor([encode(tokenizer, prompt, bos, path)], device=device), limit))
            texts[label] = tokenizer.decode(ids[-1], skip_special_tokens=True)
            progress.step(label)
        del model
        return_freed_memory()
    return [
        {
            "prompt": prompt,
            "texts": texts,
            "alike": _agreed([*texts.values()]),
            "same": _agreed(ids),
            "tokens": max(map(len, ids)),
        }
        for prompt, (texts, ids) in zip(prompts, found, strict=True)
    ]


@torch.no_grad()
def _continue(model: Any, prompt: torch.Tensor, tokens: int) -> list[int]:
    """Generate up to `tokens` ids greedily after `prompt` (1, length) int64; return them without the prompt."""
    # A checkpoint's generation config may ask for sampling or beams. A single sequence has no padding.
    greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None, "pad_token_id": 0}
    found = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, **greedy)
    written: list[int] = found[0, prompt.shape[1] :].tolist()
    return written


def _agreed(each: Sequence[Sequence[Any]]) -> int:
    """Return the number of leading items that all sequences have in common."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*each, strict=False)))
