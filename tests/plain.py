"""The recipes as one writes them for a llama that fits into memory: transformers' model, hooks, autograd, Cholesky.

The whole model, all activations that autograd keeps, both streams and every site's sums are in memory at once; nothing is
written before the end. Of `streamprune` there is the knapsack with its description of a site and, run as a program, the
calibration windows. Formulas are those of docs/methods.md, settings the defaults.

    python tests/plain.py MODEL OUT.safetensors --recipe default --ratio 0.3 --calibration FILE --samples 32 --seq-len 256

prints one JSON object: seconds from loading to saving, memory held before and the peak until then, and perplexity with
``--text``.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from streamprune.model.site import Site
from streamprune.recipes.allocation import Budget, allocate, even_densities

DAMPING = 0.01
RIDGE = 1e-6
"""Of the output gradients' Gram."""
RECIPES = ("default", "sobp", "slimgpt", "greedy-output", "surgeon", "wanda-sp", "magnitude", "random")
Linears = dict[str, tuple[Tensor, Tensor]]
"""By name, a linear's input (sequences, tokens, in) and the gradient of its output (sequences, tokens, out)."""


# The model.


def load(path: Path, dtype: torch.dtype) -> Any:
    """All of it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval().requires_grad_(False)


def sites_of(model: Any) -> list[Site]:
    """Attention and FFN of every block; a unit is a key/value head with its query heads, or a channel."""
    config, found = model.config, []
    for index, block in enumerate(model.model.layers):
        for kind, units in (("attention", config.num_key_value_heads), ("ffn", config.intermediate_size)):
            producers, consumer = linears(block, kind)
            own = sum(p.numel() for linear in producers for p in linear.parameters()) + consumer.weight.numel()
            outputs, columns = consumer.weight.shape
            site = Site(index, "ffn", units, columns // units, outputs, own // units)
            found.append(replace(site, kind="attention") if kind == "attention" else site)
    return found


def linears(block: Any, kind: str) -> tuple[list[Any], Any]:
    """Producers and consumer."""
    if kind == "ffn":
        return [block.mlp.gate_proj, block.mlp.up_proj], block.mlp.down_proj
    attention = block.self_attn
    return [attention.q_proj, attention.k_proj, attention.v_proj], attention.o_proj


def names_of(model: Any, site: Site) -> tuple[list[str], str]:
    """The same by their names in the model."""
    names = {module: name for name, module in model.named_modules()}
    producers, consumer = linears(model.model.layers[site.block], site.kind)
    return [names[linear] for linear in producers], names[consumer]


def columns_of(units: Tensor, width: int) -> Tensor:
    return (units[:, None] * width + torch.arange(width)).flatten()


def shrink(block: Any, site: Site, kept: Tensor, w: Tensor) -> None:
    """Cut a site down to its kept units; `w` becomes the consumer's weight."""
    producers, consumer = linears(block, site.kind)
    for linear in producers:
        rows = columns_of(kept, linear.out_features // site.units)
        linear.weight = torch.nn.Parameter(linear.weight[rows].clone(), requires_grad=False)
        if linear.bias is not None:
            linear.bias = torch.nn.Parameter(linear.bias[rows].clone(), requires_grad=False)
        linear.out_features = len(rows)
    consumer.weight = torch.nn.Parameter(w.clone(), requires_grad=False)
    consumer.in_features = w.shape[1]


# One site.


def ridge(h: Tensor, damping: float = DAMPING) -> Tensor:
    return h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)


def inverse(h: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(ridge(h)))


def fit(cross: Tensor, w: Tensor, h: Tensor, damping: float = DAMPING) -> Tensor:
    """The W' of least ``mean‖y − W' x‖² + λ‖W' − W‖²``: `cross` is the mean of y xᵀ, `h` that of x xᵀ."""
    strength = damping * h.diagonal().mean()
    return torch.cholesky_solve((cross + strength * w).T, torch.linalg.cholesky(ridge(h, damping))).T


def refit(w: Tensor, h: Tensor, columns: Tensor, damping: float = DAMPING) -> Tensor:
    """OBS: what the kept columns become."""
    strength = damping * h.diagonal().mean()
    damped = h[columns][:, columns] + strength * torch.eye(len(columns), dtype=h.dtype)
    right = w @ h[:, columns] + strength * w[:, columns]
    return torch.cholesky_solve(right.T, torch.linalg.cholesky(damped)).T


def blocks_of(m: Tensor, width: int) -> Tensor:
    """The diagonal blocks (units, width, width)."""
    units = torch.arange(len(m) // width)
    return m.view(len(units), width, len(units), width)[units, :, units]


def removal_costs(energies: Tensor, p: Tensor, width: int) -> Tensor:
    """``tr((P_uu)⁻¹ E_uu)`` of each unit."""
    if width == 1:
        return energies.diagonal() / p.diagonal()
    return torch.linalg.solve(blocks_of(p, width), blocks_of(energies, width)).diagonal(dim1=1, dim2=2).sum(dim=1)


def greedy(w: Tensor, h: Tensor, width: int, count: int) -> tuple[list[int], list[float]]:
    """Units in the order in which they go, one at a time with the OBS update, and what each one costs."""
    w, p = w * (h.diagonal() > 0), inverse(h)
    gone: list[int] = []
    costs: list[float] = []
    alive = torch.ones(len(p) // width, dtype=torch.bool)
    for _ in range(count):
        if width == 1:
            estimates = torch.where(alive, w.square().sum(dim=0) / p.diagonal(), torch.inf)
        else:
            left = alive.nonzero()[:, 0]
            c = columns_of(left, width)
            each = w[:, c].view(len(w), len(left), width).transpose(0, 1)
            estimates = torch.full((len(alive),), torch.inf, dtype=w.dtype)
            inside = torch.linalg.solve(blocks_of(p[c][:, c], width), each.mT @ each)
            estimates[left] = inside.diagonal(dim1=1, dim2=2).sum(dim=1)
        unit = int(estimates.argmin())
        gone.append(unit)
        costs.append(float(estimates[unit]))
        alive[unit] = False
        s = slice(unit * width, (unit + 1) * width)
        rows = torch.linalg.solve(p[s, s], p[s])
        w.addmm_(w[:, s].clone(), rows, alpha=-1)
        p.addmm_(p[:, s].clone(), rows, alpha=-1)
    return gone, costs


def others(units: int, gone: Sequence[int]) -> Tensor:
    return torch.tensor(sorted(set(range(units)) - set(gone)))


def in_batches(w: Tensor, h: Tensor, site: Site, keep: int) -> Tensor:
    """SlimGPT's batched greedy pruning, groups from 1024 to 8."""
    w, p = w * (h.diagonal() > 0), inverse(h)
    left = torch.arange(site.units)
    while len(left) > keep:
        to_go = len(left) - keep
        if site.kind == "attention":
            diagonal, size = torch.linalg.cholesky(blocks_of(p, site.width)).diagonal(dim1=1, dim2=2).square(), 1
        else:
            diagonal, size = p.diagonal()[:, None], max(8, min(1024, to_go // 2 // 8 * 8))
        estimates = (w.square().sum(dim=0).view(-1, site.width) / diagonal).sum(dim=1)
        cheapest = estimates.argsort(stable=True)[: min(size, to_go)]
        stays = others(len(left), cheapest.tolist())
        s, k = columns_of(cheapest, site.width), columns_of(stays, site.width)
        rows = torch.linalg.solve(p[s][:, s], p[s][:, k])
        w, p, left = w[:, k] - w[:, s] @ rows, p[k][:, k] - p[k][:, s] @ rows, left[stays]
    return left


# The whole model's statistics, by autograd.


def gradients(model: Any, names: Sequence[str], tokens: Tensor, size: int, *, drawn: bool = False) -> Iterator[Linears]:
    """Micro-batch by micro-batch, what the linears of those names see; loss: the sum of negative log-likelihoods.

    Args:
        drawn: of predicting the tokens that the model itself draws, seed 0, instead of the text's.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = []
    for name in names:

        def keep(module: Any, inputs: Any, output: Tensor, name: str = name) -> None:
            seen[name] = inputs[0].detach(), output

        hooks.append(model.get_submodule(name).register_forward_hook(keep))
    uniform = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for batch, numbers in zip(tokens.split(size), uniform.split(size), strict=True):
        embedded = model.model.embed_tokens(batch).requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits[:, :-1]
        labels = batch[:, 1:]
        if drawn:
            above = logits.detach().softmax(-1).cumsum(-1, dtype=torch.float64) > numbers[:, 1:, None]
            labels = above.int().argmax(-1)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        found = torch.autograd.grad(loss, [output for _, output in seen.values()])
        yield {name: (x, dy) for (name, (x, _)), dy in zip(seen.items(), found, strict=True)}
        seen.clear()
    for handle in hooks:
        handle.remove()


def grams(model: Any, names: Sequence[str], tokens: Tensor, size: int, drawn: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean Grams over all tokens of each linear's input and of its output's gradient."""
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    for batch in gradients(model, names, tokens, size, drawn=drawn):
        for name, pair in batch.items():
            a, g = (t.flatten(0, 1).T @ t.flatten(0, 1) / tokens.numel() for t in pair)
            if name in sums:
                a, g = sums[name][0].add_(a), sums[name][1].add_(g)
            sums[name] = a, g
    return sums


def mask_importance(model: Any, sites: Sequence[Site], tokens: Tensor, size: int) -> dict[str, Tensor]:
    """SoBP: mean over sequences of each unit's squared mask gradient, the loss a sequence's mean."""
    consumers = {names_of(model, site)[1]: site for site in sites}
    squares = {site.name: torch.zeros(site.units, dtype=torch.float64) for site in sites}
    for batch in gradients(model, list(consumers), tokens, size):
        for name, (z, dy) in batch.items():
            site = consumers[name]
            by_column = (z * (dy @ model.get_submodule(name).weight)).sum(dim=1) / (tokens.shape[1] - 1)
            by_unit = by_column.view(len(z), site.units, -1).sum(dim=2)
            squares[site.name] += by_unit.double().square().sum(dim=0) / len(tokens)
    return squares


def path_costs(model: Any, sites: Sequence[Site], tokens: Tensor, size: int) -> dict[str, Tensor]:
    """Default: cost a parameter of each further unit along the greedy path, in units of loss."""
    consumers = {site.name: names_of(model, site)[1] for site in sites}
    sums = grams(model, list(consumers.values()), tokens, size, drawn=True)
    costs = {}
    for site in sites:
        h, g = sums[consumers[site.name]]
        w = torch.linalg.cholesky(ridge(g, RIDGE)).T @ model.get_submodule(consumers[site.name]).weight
        _, paid = greedy(w, h, site.width, site.units - 1)
        path = torch.tensor(paid, dtype=torch.float64).cummax(dim=0).values
        costs[site.name] = torch.cat([path, path[-1:]]) / (2 * site.unit_parameters)
    return costs


@torch.no_grad()
def divergences(path: Path, dtype: torch.dtype, sites: Sequence[Site], tokens: Tensor, size: int) -> dict[str, Tensor]:
    """Greedy output approximation: mean Jensen-Shannon divergence between units' attention maps, (units, units)."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()
    attention = [site for site in sites if site.kind == "attention"]
    heads = model.config.num_attention_heads
    sums = {site.name: torch.zeros(heads, heads, dtype=torch.float64) for site in attention}
    for batch in tokens.split(size):
        maps = model(batch, output_attentions=True, use_cache=False).attentions
        for site in attention:
            p = maps[site.block]
            own = torch.special.entr(p).sum(dim=(0, 2, 3), dtype=torch.float64)
            for i in range(heads):
                both = (p[:, i : i + 1] + p) / 2
                mixed = torch.special.entr(both).sum(dim=(0, 2, 3), dtype=torch.float64)
                sums[site.name][i] += (mixed - (own[i] + own) / 2) / tokens.numel()
    rep = heads // model.config.num_key_value_heads
    return {n: d.view(heads // rep, rep, -1, rep).mean(dim=(1, 3)).fill_diagonal_(0) for n, d in sums.items()}


# The prune sweep.

Choose = Callable[[Site, Tensor, Tensor, Tensor, Sequence[Tensor], int], Tensor]
"""(site, consumer's W, its input's Gram, the producers' input's Gram, producers' W, how many) → units to keep, ascending."""


class Sublayer:
    """Norm, mixer and consumer of one site, run on a batch of the stream."""

    def __init__(self, model: Any, block: Any, kind: str) -> None:
        self.model, self.block, self.kind = model, block, kind
        self.producers, self.consumer = linears(block, kind)

    def read(self, h: Tensor) -> Tensor:
        """What the producers read."""
        norm = self.block.input_layernorm if self.kind == "attention" else self.block.post_attention_layernorm
        read: Tensor = norm(h)
        return read

    def run(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """The consumer's input, and what is added to the stream."""
        seen: list[Tensor] = []
        handle = self.consumer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        if self.kind == "ffn":
            y = self.block.mlp(self.read(h))
        else:
            positions = torch.arange(h.shape[1])[None]
            rotary = self.model.model.rotary_emb(h, positions)
            y, _ = self.block.self_attn(self.read(h), position_embeddings=rotary, attention_mask=None)
        handle.remove()
        return seen[0], y


@torch.no_grad()
def sweep(
    model: Any,
    sites: Sequence[Site],
    keep: Mapping[str, int],
    tokens: Tensor,
    size: int,
    choose: Choose,
    *,
    compensate: bool = False,
    target: str = "own",
    reconstruct: bool = True,
) -> None:
    """Site after site on the model as it is then; both streams move along in memory.

    With the residual as target, the default's, fits are damped by tokens per column.
    """

    def damping(h: Tensor) -> float:
        return max(DAMPING, min(0.5 * len(h) / tokens.numel(), 0.1)) if target == "residual" else DAMPING

    pruned = [model.model.embed_tokens(batch) for batch in tokens.split(size)]
    dense, parted = list(pruned), False
    original = None
    for site in sites:
        block = model.model.layers[site.block]
        if site.kind == "attention":
            original = copy.deepcopy(block)
        here, there = Sublayer(model, block, site.kind), Sublayer(model, original, site.kind)
        inputs = mean_product((here.read(h), here.read(h)) for h in pruned) if compensate else torch.empty(0)
        if compensate and parted:
            cross = mean_product((there.read(x), here.read(h)) for x, h in zip(dense, pruned, strict=True))
            for linear in here.producers:
                linear.weight.copy_(fit(linear.weight @ cross, linear.weight, inputs, damping(inputs)))
        both = compensate or target != "own"
        z = [here.run(h)[0] for h in pruned]
        given = [there.run(x)[1] for x in dense] if both else []
        h, w = mean_product((each, each) for each in z), here.consumer.weight.clone()
        if target != "own":
            bias = 0.0 if here.consumer.bias is None else here.consumer.bias
            aims = [
                y - bias + ((x - p) if target == "residual" else 0)
                for y, x, p in zip(given, dense, pruned, strict=True)
            ]
            w = fit(mean_product(zip(aims, z, strict=True)), w, h, damping(h))
        kept = torch.arange(site.units)
        if keep[site.name] < site.units:
            kept = choose(site, w, h, inputs, [linear.weight for linear in here.producers], keep[site.name])
            columns = columns_of(kept, site.width)
            w = refit(w, h, columns, damping(h)) if reconstruct else w[:, columns]
        shrink(block, site, kept, w)
        parted = parted or target != "own" or len(kept) < site.units
        pruned = [h + here.run(h)[1] for h in pruned]
        if both:
            dense = [x + y for x, y in zip(dense, given, strict=True)]


def mean_product(pairs: Any) -> Tensor:
    """Mean over all tokens of y xᵀ, of pairs (y, x)."""
    total, count = torch.zeros(()), 0
    for y, x in pairs:
        total = total.to(x.dtype) + y.flatten(0, 1).T @ x.flatten(0, 1)
        count += x.shape[0] * x.shape[1]
    return total / count


def greedily(site: Site, w: Tensor, h: Tensor, inputs: Tensor, producers: Sequence[Tensor], keep: int) -> Tensor:
    return others(site.units, greedy(w, h, site.width, site.units - keep)[0])


def best(scores: Tensor, keep: int) -> Tensor:
    return scores.argsort(descending=True, stable=True)[:keep].sort().values


def by_unit(columns: Tensor, site: Site) -> Tensor:
    return columns.view(site.units, -1).sum(dim=1)


def second_moment(
    site: Site, w: Tensor, h: Tensor, inputs: Tensor, producers: Sequence[Tensor], keep: int, *, first: Sequence[int]
) -> Tensor:
    energy = w.square().sum(dim=0) / 2
    if site.kind == "attention":
        scores = by_unit(energy * h.diagonal(), site)
    else:
        logs = [(energy * ((a @ inputs) * a).sum(dim=1)).log() for a in producers]  # products leave float32's range
        scores = torch.stack(logs).sum(dim=0)
    scores[list(first)] = -torch.inf
    return best(scores, keep)


# The recipes.


def prune(
    path: Path, recipe: str, tokens: Tensor, *, ratio: float, round_to: int, size: int, dtype: torch.dtype
) -> Any:
    """The pruned model: its linears are smaller, its config still says what they were."""
    model = load(path, dtype)
    sites = sites_of(model)
    parameters = sum(p.numel() for block in model.model.layers for p in block.parameters())
    budget = Budget(ratio, parameters, round_to)
    if recipe == "default":
        keep = allocate(sites, path_costs(model, sites, tokens, size), budget)
        sweep(model, sites, keep, tokens, size, greedily, compensate=True, target="residual")
    elif recipe == "sobp":
        importance = mask_importance(model, sites, tokens, size)
        keep = allocate(sites, {s.name: (importance[s.name] / s.unit_parameters).sort().values for s in sites}, budget)
        sweep(model, sites, keep, tokens, size, greedily, compensate=True)
    elif recipe == "slimgpt":
        keep = allocate(
            sites, even_densities(sites, dict(enumerate(depth_shares(len(model.model.layers), 0.4)))), budget
        )
        sweep(model, sites, keep, tokens, size, lambda site, w, h, inputs, producers, k: in_batches(w, h, site, k))
    elif recipe == "greedy-output":
        keep, d = allocate(sites, even_densities(sites), budget), divergences(path, dtype, sites, tokens, size)

        def choose(site: Site, *arguments: Any) -> Tensor:
            first: list[int] = []
            if site.kind == "attention":  # a head is similar if some later one is nearer than τ
                nearest = torch.stack([row[i + 1 :].min() for i, row in enumerate(d[site.name][:-1])])
                first = [u for u in nearest.argsort(stable=True).tolist() if nearest[u] < 0.16]
            return second_moment(site, *arguments, first=first[: site.units - keep[site.name]])

        sweep(model, sites, keep, tokens, size, choose, compensate=True, target="dense", reconstruct=False)
    elif recipe == "surgeon":
        surgeon(model, sites, tokens, budget, size)
    elif recipe == "wanda-sp":

        def wanda(site: Site, w: Tensor, h: Tensor, inputs: Tensor, producers: Sequence[Tensor], k: int) -> Tensor:
            return best(by_unit(w.abs().sum(dim=0) * h.diagonal().sqrt(), site), k)

        keep = allocate(sites, even_densities(sites), budget)
        sweep(model, sites, keep, tokens, size, wanda, reconstruct=False)
    else:
        keep = allocate(sites, even_densities(sites), budget)
        for site in sites:
            producers, consumer = linears(model.model.layers[site.block], site.kind)
            scores = by_unit(consumer.weight.square().sum(dim=0), site)
            scores = scores + sum(by_unit(linear.weight.square().sum(dim=1), site) for linear in producers)
            kept = best(torch.rand(site.units) if recipe == "random" else scores, keep[site.name])
            shrink(model.model.layers[site.block], site, kept, consumer.weight[:, columns_of(kept, site.width)])
    return model


def depth_shares(blocks: int, first: float) -> list[float]:
    """SlimGPT's incremental pruning ratio, of mean 1."""
    logs = [math.log(i + 1) / math.log(blocks) if blocks > 1 else 0.0 for i in range(blocks)]
    rise = (1 - first) * blocks / sum(logs) if blocks > 1 else 0.0
    return [first + rise * log for log in logs] if blocks > 1 else [1.0]


def surgeon(model: Any, sites: Sequence[Site], tokens: Tensor, budget: Budget, size: int) -> None:
    """LLM Surgeon, units, one shot: joint costs of all linears, the consumers' correlated updates."""
    places = {site.name: names_of(model, site) for site in sites}
    factors = grams(
        model, [n for all_of in places.values() for n in (*all_of[0], all_of[1])], tokens, size, drawn=False
    )
    costs, inverses = {}, {}
    for site in sites:
        producers, consumer = places[site.name]
        a, g = factors[consumer]
        w, inverses[site.name] = model.get_submodule(consumer).weight, inverse(a)
        cost = removal_costs(w.T @ ridge(g) @ w, inverses[site.name], site.width)
        for name in producers:
            a, g = factors[name]
            w = model.get_submodule(name).weight
            cost = cost + removal_costs(w @ ridge(a) @ w.T, inverse(g), len(w) // site.units)
        costs[site.name] = cost / 2
    keep = allocate(sites, {s.name: costs[s.name].sort().values / s.unit_parameters for s in sites}, budget)
    for site in sites:
        kept = best(costs[site.name], keep[site.name])
        k, s = (columns_of(u, site.width) for u in (kept, others(site.units, kept.tolist()).long()))
        w, p = model.get_submodule(places[site.name][1]).weight, inverses[site.name]
        updated = w[:, k] - w[:, s] @ torch.linalg.solve(p[s][:, s], p[s][:, k])
        shrink(model.model.layers[site.block], site, kept, updated)


@torch.no_grad()
def perplexity(model: Any, windows: Tensor, size: int) -> float:
    """exp of the mean negative log-likelihood over all predicted tokens."""
    total = 0.0
    for batch in windows.split(size):
        logits = model(batch, use_cache=False).logits[:, :-1]
        total += float(F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="sum").double())
    return math.exp(total / (windows.numel() - len(windows)))


def main() -> None:
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401 - before memory and time are taken

    from streamprune import Config
    from streamprune.commands.evaluate import read_windows
    from streamprune.pruning.job import Job
    from streamprune.system.machine import peak_host_bytes
    from streamprune.text.source import source

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path, help="file of the pruned weights, in the checkpoint's dtype")
    parser.add_argument("--recipe", choices=RECIPES, required=True)
    parser.add_argument("--ratio", type=float, required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, required=True)
    parser.add_argument("--size", type=int, default=4, help="sequences per micro-batch; default: %(default)s")
    parser.add_argument("--text", help="to measure perplexity on, afterwards")
    o = parser.parse_args()
    job = Job(
        Config(
            model=o.model,
            out=o.out.with_suffix(""),
            ratio=o.ratio,
            recipe="wanda-sp",  # any that reads text
            calibration=o.calibration,
            samples=o.samples,
            seq_len=o.seq_len,
            device="cpu",
        ),
        None,
    )
    tokens, base = job.tokens, peak_host_bytes()
    started = time.monotonic()
    model = prune(o.model, o.recipe, tokens, ratio=o.ratio, round_to=8, size=o.size, dtype=torch.float32)
    stored = job.skeleton.checkpoint[next(iter(job.skeleton.checkpoint))].dtype
    weights = {name: weight.to(stored) for name, weight in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    save_file(weights, o.out)
    found: dict[str, Any] = {
        "seconds": time.monotonic() - started,
        "base_bytes": base,
        "peak_host_bytes": peak_host_bytes(),
    }
    if o.text is not None:
        model.load_state_dict({name: weight.float() for name, weight in weights.items()}, strict=False)
        found["perplexity"] = perplexity(model, read_windows(job.skeleton, source(o.text), o.seq_len)[0].tokens, o.size)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
