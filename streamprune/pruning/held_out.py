"""Windows of the calibration text that share few passages with those that were calibrated on, and perplexity on them."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CalibrationError
from ..model.skeleton import Skeleton
from ..model.tokenizer import IGNORED
from ..stream import sweep
from ..stream.store import ActivationStore, temporary
from ..system.progress import Progress, rest
from ..text.windows import Windows
from .streams import DENSE

PASSAGE, SHARED = 16, 1 / 8
"""Tokens of a passage, and the largest share of a held-out window's passages that calibration windows may have, such as templates."""
DRAWN = 8
"""Windows drawn for each one that is wanted."""
_BASE, _MODULUS = 1_000_003, (1 << 31) - 1


def others(drawn: Windows, used: Windows, count: int) -> Windows:
    """Return the first `count` of the windows `drawn` that have a prediction that counts and share few passages with `used`, or all.

    First come those that share few passages with the ones before them, too: the windows drawn from a short text overlap.

    Args:
        drawn, used: windows of equal lengths.
    """
    length = min(PASSAGE, max(2, drawn.tokens.shape[1] // 2))
    passages = _passages(drawn.tokens, length)
    common = torch.isin(passages, _passages(used.tokens, length)).double().mean(dim=1) > SHARED
    empty = (drawn.labels[:, 1:] == IGNORED).all(dim=1)
    apart, overlapping, seen = list[int](), list[int](), set[int]()
    for row in (~(common | empty)).nonzero().flatten().tolist():
        own = passages[row].tolist()
        if sum(map(seen.__contains__, own)) > SHARED * len(own):
            overlapping.append(row)
            continue
        apart.append(row)
        seen.update(own)
        if len(apart) == count:
            break
    rows = [*apart, *overlapping][:count]
    return Windows(drawn.tokens[rows], drawn.labels[rows])


def disjoint(drawn: Windows, used: Windows, count: int, source: object) -> Windows:
    """Return `others`, of which there must be `count`.

    Args:
        source: the text, for the message.

    Raises:
        CalibrationError: there are fewer.
    """
    found = others(drawn, used, count)
    if len(found.tokens) < count:
        raise CalibrationError(
            f"{source} has too little text beside the calibration windows: {len(found.tokens)} of {count} held-out windows; give more "
            "text, or lower samples or seq-len"
        )
    return found


def _passages(windows: Tensor, length: int) -> Tensor:
    """Return a hash of every `length` consecutive tokens: (windows, passages) int64."""
    found = torch.zeros(len(windows), windows.shape[1] - length + 1, dtype=torch.int64)
    for start in range(length):
        found = (found * _BASE + windows[:, start : start + found.shape[1]] + 1) % _MODULUS
    return found


def perplexity(skeleton: Skeleton, windows: Windows, batch: int, folder: Path, progress: Progress) -> float:
    """Return the perplexity of the predictions that count, streamed; `folder` holds activations meanwhile."""
    depth = len(skeleton)
    progress.phase("held-out windows", depth + 1)
    with temporary(folder):
        store = ActivationStore(
            folder, (*windows.tokens.shape, skeleton.width), skeleton.dtype, skeleton.device, durable=False
        )
        sweep.embed(skeleton, windows.tokens, store, sweep.boundary(DENSE, 0), batch)
        for index in sweep.forward(skeleton, store, DENSE, 0, depth, batch):
            store.remove(sweep.boundary(DENSE, index))
            progress.step(f"block {index}")
            rest(progress)
        loss, count = sweep.losses(skeleton, store, sweep.boundary(DENSE, depth), windows.labels, batch)
    progress.step("head")
    return math.exp(min(loss / count, 700.0))
