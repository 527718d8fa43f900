"""Write linears in block-scaled FP8: float8_e4m3fn with one float32 scale per 128 × 128 weights, as transformers and vLLM load it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .skeleton import Skeleton

SIDE = 128
SCALE = "_scale_inv"


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the FP8 values (m, n) and the scales (m / 128, n / 128) float32 of a weight (m, n), as transformers computes them.

    The largest weight of each block becomes float8's largest, 448. A block of zeros has scale 1, and so has one whose largest weight
    is below 1.4e-36, for which the factor is beyond float32: its weights become zeros.
    """
    high, wide = (size // SIDE for size in weight.shape)
    tiles = weight.float().view(high, SIDE, wide, SIDE)
    largest = tiles.abs().amax((1, 3))
    limit = torch.finfo(torch.float8_e4m3fn).max
    factors = limit / largest
    factors = torch.where(factors.isfinite(), factors, 1.0)
    values = (tiles * factors[:, None, :, None]).clamp_(-limit, limit).to(torch.float8_e4m3fn)
    return values.view(weight.shape), 1.0 / factors


def check_storable(skeleton: Skeleton) -> None:
    """Raise a ConfigError if a result of this model cannot hold FP8 weights."""
    where = skeleton.checkpoint.directory
    if any(entry.experts for entries in skeleton.entries for entry in entries):
        raise ConfigError(f"store is fp8; the model of {where} has experts, which are not written in FP8")
    if skeleton.width % SIDE:
        raise ConfigError(
            f"store is fp8; the width of {where} is {skeleton.width}, and FP8 needs blocks of {SIDE} × {SIDE} weights"
        )
    names = [(index, name) for index in range(len(skeleton)) for name in skeleton.linears(index)]
    if any(type(skeleton.module(index, name)) is not nn.Linear for index, name in names):
        raise ConfigError(f"store is fp8; the {skeleton.architecture.model_type} model of {where} has no linears")


def quantised(skeleton: Skeleton, index: int, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a block by name inside the block, with linears replaced by their FP8 values and scales.

    Linears whose widths are not multiples of 128 stay, and with one producer of a site all of them: vLLM fuses queries, keys and
    values, and gate and up projections.
    """
    found = dict(weights)
    for name in stored(skeleton, index, {name: tuple(weight.shape) for name, weight in weights.items()}):
        found[name], found[name + SCALE] = quantise(weights[name])
    return found


def stored(skeleton: Skeleton, index: int, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return the names inside a block of the weights that FP8 stores, given the shapes of its tensors."""
    found = []
    for _, entry in skeleton.places(index):
        for group in ([producer.name for producer in entry.producers], [entry.consumer]):
            names = [f"{name}.weight" for name in group]
            # A sublayer that went as a whole has none.
            if all(name in shapes and all(size % SIDE == 0 for size in shapes[name]) for name in names):
                found += names
    return found


def quantisation_config(skeleton: Skeleton, scales: Iterable[str]) -> dict[str, Any]:
    """Return the config's `quantization_config`, given the names of all stored scales."""
    kept = {name.removesuffix(f".weight{SCALE}") for name in scales}
    linears = [
        skeleton.written_name(skeleton.block_names(index)[f"{name}.weight"]).removesuffix(".weight")
        for index in range(len(skeleton))
        for name, module in skeleton.block(index).named_modules()
        if isinstance(module, nn.Linear)
    ]
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [SIDE, SIDE],
        "modules_to_not_convert": [name for name in (*linears, *skeleton.outside_linears()) if name not in kept],
    }
