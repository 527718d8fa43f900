"""The importance of every linear's columns, llama.cpp's "imatrix": the mean square of each input over a text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ...model.block import Block
from ...model.skeleton import open_skeleton
from ...system import machine
from ...system.progress import Progress
from ...text.source import Spec, source
from ..evaluate import read_windows, through_blocks

LENGTH = 512
"""Tokens per window, as in llama.cpp's own program."""
ROWS = 256
"""Rows of an input that are squared at a time: squares are in float64, two to four times as large as the input."""


def importance(
    model: Path, text: Spec, *, device: str = "auto", memory: int | None = None, progress: Progress
) -> dict[str, Tensor]:
    """Return the mean of the squares of each input of every linear in the blocks, over all tokens that reach it.

    The whole text is cut into consecutive windows of `LENGTH` tokens, or the model's context. What an expert's consumer reads counts
    as the router weights it.

    Returns:
        (columns,) float32 on the CPU, by the name of the weight in the checkpoint. All ones for an expert that no token reaches.

    Raises:
        Those of `evaluate`.
    """
    skeleton = open_skeleton(model, machine.resolve_device(device), "auto")
    length = min(LENGTH, skeleton.context or LENGTH)
    windows, _ = read_windows(skeleton, source(text), length)
    found: dict[str, Tensor] = {}

    @contextmanager
    def sum_squares(index: int, block: Block) -> Iterator[None]:
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}

        def add(name: str, x: Tensor) -> None:
            for rows in torch.split(x.reshape(-1, x.shape[-1]), ROWS):
                sums[name] = rows.double().square().sum(0) + sums.get(name, 0.0)
                counts[name] = counts.get(name, 0) + len(rows)

        with block.reading(add):
            yield
        for name, stored in skeleton.block_names(index).items():
            linear = name.removesuffix(".weight")
            if linear in sums:
                mean = sums[linear] / counts[linear] if counts[linear] else torch.ones_like(sums[linear])
                found[stored] = mean.float().cpu()

    with through_blocks(skeleton, [windows.tokens], "measure importance", progress, memory=memory, watch=sum_squares):
        progress.step("sums")
    return found
