"""SoBP as METHODS.md writes it, on whole models in memory, in float64, with inverses instead of factors.

Nothing here streams, and nothing of `streamprune` but the knapsack is used.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from streamprune.methods.allocation import Budget, allocate
from streamprune.model.architecture import ARCHITECTURES
from streamprune.site import Site


def capture(model: Any, modules: list[str], tokens: Tensor) -> list[Tensor]:
    """Inputs of several linears, (all tokens, width) each."""
    seen: dict[str, Tensor] = {}
    hooks = []
    for name in modules:

        def hook(module: Any, inputs: Any, name: str = name) -> None:
            seen[name] = inputs[0].reshape(-1, inputs[0].shape[-1])

        hooks.append(model.get_submodule(name).register_forward_pre_hook(hook))
    with torch.no_grad():
        model(tokens)
    for handle in hooks:
        handle.remove()
    return [seen[name] for name in modules]


def weight_of(module: Any) -> Tensor:
    """The weight as (out, in), a view: GPT-2 holds it the other way round."""
    return module.weight.T if type(module).__name__ == "Conv1D" else module.weight


def ridge(h: Tensor, damping: float) -> Tensor:
    return h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)


def mask_gradients(model: Any, places: list[tuple[Site, str]], tokens: Tensor) -> dict[str, Tensor]:
    """Mean over sequences of the squared gradient of each unit's mask."""
    squares = {site.name: torch.zeros(site.units, dtype=torch.float64) for site, _ in places}
    for row in tokens:
        masks = {site.name: torch.ones(site.units, dtype=torch.float64, requires_grad=True) for site, _ in places}
        hooks = []
        for site, consumer in places:
            mask, width = masks[site.name], site.width
            hooks.append(
                model.get_submodule(consumer).register_forward_pre_hook(
                    lambda m, a, mask=mask, width=width: (a[0] * mask.repeat_interleave(width),)
                )
            )
        loss = F.cross_entropy(model(row[None]).logits[0, :-1], row[1:])
        for site, gradient in zip(masks, torch.autograd.grad(loss, list(masks.values())), strict=True):
            squares[site] += gradient.square() / len(tokens)
        for handle in hooks:
            handle.remove()
    return squares


def greedy(w: Tensor, h: Tensor, width: int, count: int) -> Tensor:
    """Units that stay after the plain loop."""
    w, p = w.clone(), torch.linalg.inv(ridge(h, 0.01))
    left = list(range(h.shape[0] // width))
    for _ in range(count):
        costs = []
        for u in left:
            c = slice(u * width, (u + 1) * width)
            costs.append(float(torch.trace(torch.linalg.inv(p[c, c]) @ w[:, c].T @ w[:, c])))
        u = left.pop(costs.index(min(costs)))
        c = slice(u * width, (u + 1) * width)
        inverse = torch.linalg.inv(p[c, c])
        w, p = w - w[:, c] @ inverse @ p[c], p - p[:, c] @ inverse @ p[c]
    return torch.tensor(left)


def sobp(
    path: Path, tokens: Tensor, sites: list[Site], *, ratio: float, round_to: int
) -> tuple[Any, dict[str, list[int]]]:
    """The pruned model, its removed columns zeroed instead of gone, and the units each site keeps."""
    from transformers import AutoModelForCausalLM

    dense = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    dense.requires_grad_(False)
    pruned = copy.deepcopy(dense)
    architecture = ARCHITECTURES[dense.config.model_type]
    places = []
    for site in sites:
        entry = next(entry for entry in architecture.sublayers if entry.kind == site.kind)
        places.append((site, f"{architecture.blocks}.{site.block}.{entry.consumer}"))

    squares = mask_gradients(dense, places, tokens)
    densities = {site.name: squares[site.name] / site.unit_parameters for site in sites}
    parameters = sum(p.numel() for block in dense.get_submodule(architecture.blocks) for p in block.parameters())
    budget = Budget(ratio, parameters, round_to, uniform=False)
    keep = allocate(sites, {name: d.sort().values for name, d in densities.items()}, budget)

    kept: dict[str, list[int]] = {}
    for site, consumer in places:
        entry = next(entry for entry in architecture.sublayers if entry.kind == site.kind)
        producers = [f"{architecture.blocks}.{site.block}.{p.name}" for p in entry.producers]
        (x,), (x_hat,) = capture(dense, producers[:1], tokens), capture(pruned, producers[:1], tokens)
        if not torch.equal(x, x_hat):
            h = x_hat.T @ x_hat / len(x)
            for name in producers:
                w = weight_of(pruned.get_submodule(name))
                change = w @ ((x - x_hat).T @ x_hat / len(x)) @ torch.linalg.inv(ridge(h, 0.01))
                w.add_(change)
        if keep[site.name] == site.units:
            kept[site.name] = list(range(site.units))
            continue
        (z,) = capture(pruned, [consumer], tokens)
        h = z.T @ z / len(z)
        w = weight_of(pruned.get_submodule(consumer))
        stays = greedy(w, h, site.width, site.units - keep[site.name])
        kept[site.name] = stays.tolist()
        columns = (stays[:, None] * site.width + torch.arange(site.width)).flatten()
        damped = ridge(h, 0.01)
        fitted = w @ damped[:, columns] @ torch.linalg.inv(damped[columns][:, columns])
        w.zero_()
        w[:, columns] = fitted
    return pruned, kept
