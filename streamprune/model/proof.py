"""Prove that blocks taken apart compute what transformers' own blocks compute, before any work rests on it."""

from __future__ import annotations

import copy

import torch
from torch import nn

from ..errors import CheckpointError
from ..maths.refit import accumulator
from ..system.host import return_freed_memory
from . import modeling_streamprune as modeling
from . import upstream
from .architectures import FAMILIES
from .block import fresh, place
from .config import OURS
from .dry_run import moved
from .skeleton import Skeleton
from .trial import TOKENS

CLOSE = 1e-4
"""Largest relative difference."""


@torch.no_grad()
def prove(skeleton: Skeleton) -> None:
    """Prove the sites of a model on its own weights and random inputs.

    Reads one block of each kind, and computes in float32 (float64 if the skeleton does) on the device. Nothing is read if tests
    prove this model_type, or if the model was pruned before.

    Raises:
        CheckpointError: nothing can be pruned, or the outputs of a block differ by more than `CLOSE`, relative to what the
            block adds to the stream.
    """
    skeleton.check_sites()
    if skeleton.proven:
        return
    model_type = skeleton.architecture.model_type
    if model_type in FAMILIES or OURS in skeleton.checkpoint.config:
        return
    for index, template in skeleton.stock_blocks.items():
        with upstream.translated(skeleton.where, f"run block {index}"):
            difference, added = _difference(skeleton, index, template)
        return_freed_memory()
        if not difference <= CLOSE * added:
            raise CheckpointError(
                f"{skeleton.where}: model_type {model_type!r} is not supported: block {index}, rebuilt from its parts, differs "
                f"from transformers' own by {difference:.1e}, where it adds {added:.1e}"
            )
    skeleton.proven = True


def _difference(skeleton: Skeleton, index: int, template: nn.Module) -> tuple[float, float]:
    """Return the norms of the difference between a rebuilt block's output and that of `template`, and of what it adds to the stream."""
    device, dtype = skeleton.device, accumulator(skeleton.dtype)
    side, shape = skeleton.side_inputs[index], (1, TOKENS, skeleton.stream_width)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype).to(device)
    weights = {name: tensor.to(dtype) for name, tensor in skeleton.read_block(index).items()}
    arguments = {name: moved(each, device, dtype) for name, each in skeleton.arguments(1, TOKENS)[index].items()}
    own = skeleton.build_block(index, weights, dtype=dtype)(x, arguments)
    stock = copy.deepcopy(template)
    for name in [name for name, _ in (*stock.named_parameters(), *stock.named_buffers())]:
        path, _, leaf = name.rpartition(".")
        if name in weights:
            place(stock, name, weights[name].to(device))
        elif path in (entry.experts for entry in skeleton.entries[index]):
            place(stock, name, modeling.fused(stock.get_submodule(path), path, leaf, weights).to(device))
    with upstream.eager_experts(stock):
        before = side.arguments(x, arguments)
        after = fresh(before)
        wanted = stock(side.hidden(x), **after)
    wanted = side.put(x, wanted[0] if isinstance(wanted, tuple | list) else wanted, side.taken(before, after))
    end = side.width if side.aside is None else side.aside.start
    return float((own - wanted)[..., :end].norm()), float((wanted - x)[..., :end].norm())
