"""Routed experts: where a block holds them, and their tensors in the checkpoint, fused or one by one."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from ..errors import CheckpointError
from . import modeling_streamprune as modeling
from .checkpoint import Checkpoint
from .entries import Computed


def experts_of(block: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a block that hold all routed experts in fused tensors, as transformers' mixtures do, by name."""
    return {name: module for name, module in block.named_modules() if _are_experts(module)}


def _are_experts(module: nn.Module) -> bool:
    down = module._parameters.get("down_proj")
    up = module._parameters.get("gate_up_proj", module._parameters.get("up_proj"))
    if down is None or up is None or getattr(module, "has_post_expert_norm", False):
        return False
    return down.dim() == up.dim() == 3 and len(inspect.signature(module.forward).parameters) in (1, 3)


def check_number(checkpoint: Checkpoint, blocks: str, templates: Sequence[nn.Module], where: str) -> None:
    """Check the number of experts against the shards, before anything loops over them."""
    counted = 0
    for index, template in enumerate(templates):
        for name, experts in experts_of(template).items():
            if f"{blocks}.{index}.{name}.down_proj" not in checkpoint:
                counted += len(experts.get_parameter("down_proj"))
            if counted > len(checkpoint):
                raise CheckpointError(f"{where}: {counted} experts or more; the shards hold {len(checkpoint)} tensors")


def unite(checkpoint: Checkpoint, path: str, experts: nn.Module) -> None:
    """Make the fused tensors of experts that stay as they are from separate ones in the checkpoint."""
    for leaf, parameter in experts.named_parameters():
        numbers = range(min(len(parameter), len(checkpoint)))
        parts = [name for name, *_ in modeling.expert_parts(leaf, experts)]
        names = [f"{path}.{number}.{name}" for number in numbers for name in parts]
        if f"{path}.{leaf}" not in checkpoint and all(name in checkpoint for name in names):
            bases = tuple(checkpoint[name] for name in names)
            whole = Computed(bases[0].dtype, tuple(parameter.shape), bases, partial(_fused, experts, path, leaf, names))
            checkpoint.unite(names, f"{path}.{leaf}", whole)


def _fused(experts: nn.Module, path: str, leaf: str, names: Sequence[str], tensors: Sequence[Tensor]) -> Tensor:
    whole: Tensor = modeling.fused(experts, path, leaf, dict(zip(names, tensors, strict=True)))
    return whole


def divide(checkpoint: Checkpoint, path: str, experts: nn.Module) -> None:
    """Replace the fused tensors of experts in the checkpoint by their parts."""
    for leaf, parameter in experts.named_parameters():
        if f"{path}.{leaf}" not in checkpoint:
            continue
        whole = checkpoint[f"{path}.{leaf}"]
        if whole.shape != tuple(parameter.shape):
            raise CheckpointError(
                f"{checkpoint.directory}: tensor {path}.{leaf} has shape {list(whole.shape)}; the config says "
                f"{list(parameter.shape)}"
            )
        parts = {}
        for name, step, first, transposed in modeling.expert_parts(leaf, experts):
            rows = parameter.shape[2 if transposed else 1]
            half = slice(first * rows // 2, (first + 1) * rows // 2)
            picked = half if step is None else slice(first, None, step or 1)
            for number in range(len(parameter)):
                parts[f"{path}.{number}.{name}"] = whole.part(number, picked, transposed=transposed)
        checkpoint.divide(f"{path}.{leaf}", parts)
