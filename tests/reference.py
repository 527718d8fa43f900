"""The recipes as METHODS.md writes them, on whole models in memory, in float64: inverses and least squares.

Nothing here streams, and nothing of `streamprune` but the knapsack is used. What is removed stays where it was, as zeros.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from streamprune.model.architectures import SublayerEntry
from streamprune.model.site import Site
from streamprune.recipes.allocation import Budget, allocate, even_densities

DAMPING = 0.01


# Whole models.


class AllTokens(torch.nn.Module):
    """Every expert works on all tokens, of which those that the router does not send it are zero before and after.

    llama4 calls experts with all tokens for each, times the router's weights.
    """

    def __init__(self, experts: Any) -> None:
        super().__init__()
        for number, expert in enumerate(experts):
            self.add_module(str(number), expert)

    def forward(self, x: Tensor, index: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        if index is None or weights is None:
            own: list[Any] = [*self.children()]
            return torch.cat([expert(part) for expert, part in zip(own, x.chunk(len(own)), strict=True)])
        total = torch.zeros_like(x)
        for number, expert in self.named_children():
            sent = index == int(number)
            reached = sent.any(dim=1, keepdim=True).to(x)
            weight = (weights * sent).sum(dim=1, keepdim=True).to(x)
            given: Any = expert
            output = given.down_proj(given.mix(x * reached) * weight)
            if given.down_proj.bias is not None:
                output = output + (weight - 1) * given.down_proj.bias
            total = total + output * reached
        return total


class Shared(torch.nn.Module):
    """A shared expert whose output the mixture multiplies by a gate: the consumer's input is multiplied here instead."""

    def __init__(self, ffn: Any, gate: torch.nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = ffn.gate_proj, ffn.up_proj, ffn.down_proj
        self.__dict__["gate"] = gate  # a module of the mixture
        self.activation = ffn.act_fn

    def forward(self, x: Tensor) -> Tensor:
        factor = self.gate(x).sigmoid()
        output: Tensor = self.down_proj(factor * self.activation(self.gate_proj(x)) * self.up_proj(x)) / factor
        return output


def load(path: Path, **options: Any) -> Any:
    """transformers' own model in float64, its weights fixed, experts apart."""
    from transformers import AutoModelForCausalLM

    from streamprune.model.modeling_streamprune import Experts, separate_experts

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, **options).eval().requires_grad_(False)
    for _, name, entry in entries(model):
        if entry.experts:
            block = model.get_submodule(name)
            if not isinstance(block.get_submodule(entry.experts), Experts):
                separate_experts(block, entry.experts)
            block.set_submodule(entry.experts, AllTokens(block.get_submodule(entry.experts)))
        if entry.shared and (gate := getattr(block.get_submodule(entry.mixer[0]), "shared_expert_gate", None)):
            (shared,) = entry.shared.mixer
            block.set_submodule(shared, Shared(block.get_submodule(shared), gate))
    return model


def parts(model: Any) -> tuple[str, list[tuple[SublayerEntry, ...]]]:
    """The path of a loaded model's blocks, and the sublayers of each."""
    from streamprune.model.skeleton import open_skeleton

    if not hasattr(model, "sublayers"):
        skeleton = open_skeleton(Path(model.name_or_path), torch.device("cpu"), "float64")
        model.sublayers = skeleton.architecture.blocks, skeleton.entries
    found: tuple[str, list[tuple[SublayerEntry, ...]]] = model.sublayers
    return found


def entries(model: Any) -> Iterator[tuple[int, str, SublayerEntry]]:
    """Every sublayer's block, that block's name, and its entry."""
    blocks, found = parts(model)
    for index, own in enumerate(found):
        for entry in own:
            yield index, f"{blocks}.{index}", entry


@dataclass(frozen=True)
class Place:
    """Where a site's modules are in a whole model."""

    site: Site
    entry: SublayerEntry
    sublayer: SublayerEntry
    block: str
    before: str
    """Reads the stream before the sublayer; the block's input where that is parallel."""
    reader: str
    """Reads what the producers do, of all tokens."""
    producers: tuple[str, ...]
    consumer: str

    def split(self, rows: Tensor, producer: int, dim: int = 0) -> tuple[Tensor, ...]:
        """The parts of a producer's rows."""
        return rows.split(self.entry.producers[producer].stretches(self.site.units, rows.shape[dim]), dim=dim)


def places(model: Any, sites: Iterable[Site]) -> list[Place]:
    """One a site."""
    found = []
    for site in sites:
        block, entry = next(
            (name, entry)
            for index, name, entry in entries(model)
            if (index, entry.kind) == (site.block, site.kind) and entry.consumer
            if site.expert is None or entry.experts
        )
        own = entry.expert(site.expert) if site.expert is not None else entry.shared or entry
        producers = tuple(f"{block}.{producer.name}" for producer in own.producers)
        router = entry.experts if entry.silent else entry.router  # beside an FFN, the router reads another norm
        reader = f"{block}.{router or [*(each.name for each in own.producers), *own.mixer][0]}"
        before = f"{block}.{entry.norm}" if entry.norm else reader
        found.append(Place(site, own, entry, block, before, reader, producers, f"{block}.{own.consumer}"))
    return found


class NormOfKept(torch.nn.Module):
    """A root-mean-square norm over those entries alone that are left."""

    def __init__(self, norm: Any, rows: Tensor) -> None:
        super().__init__()
        self.norm, self.rows = norm, rows

    def forward(self, x: Tensor) -> Tensor:
        kept = x[..., self.rows]
        scale = torch.rsqrt(kept.square().mean(-1, keepdim=True) + self.norm.variance_epsilon)
        normed: Tensor = self.norm.weight * x * scale
        return normed


def forget(model: Any, place: Place, kept: Sequence[int]) -> None:
    """Norms over all heads no longer see those that are gone, as zeros in the consumer's columns do not say."""
    for vector in place.entry.vectors:
        owner = dict(model.named_modules()).get(f"{place.block}.{vector.name}")
        norm = owner.norm if isinstance(owner, NormOfKept) else owner
        # Each head has its own entries of other parameters, and so of a norm with a gate.
        if "norm" in type(norm).__name__.lower() and place.site.kind == "attention":
            rows = columns_of(torch.tensor(kept), len(norm.weight) // place.site.units)
            model.set_submodule(f"{place.block}.{vector.name}", NormOfKept(norm, rows))


def block_parameters(model: Any) -> int:
    names = {name for _, name, _ in entries(model)}
    return sum(p.numel() for name in names for p in model.get_submodule(name).parameters())


def capture(model: Any, modules: Iterable[str], tokens: Tensor) -> list[Tensor]:
    """Inputs of several modules, (all tokens, width) each."""
    seen: dict[str, Tensor] = {}
    hooks = []
    for name in modules:

        def hook(module: Any, inputs: Any, named: Any, name: str = name) -> None:
            x = inputs[0] if inputs else named["hidden_states"]
            seen[name] = x.reshape(-1, x.shape[-1])

        hooks.append(model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True))
    with torch.no_grad():
        model(tokens)
    for handle in hooks:
        handle.remove()
    return [seen[name] for name in modules]


def draw(logits: Tensor) -> Tensor:
    """The tokens that follow each of (sequences, tokens, vocabulary) when the model draws them, seed 0."""
    uniform = torch.rand(logits.shape[:2], generator=torch.Generator().manual_seed(0), dtype=torch.float64)[:, 1:]
    above = logits[:, :-1].detach().softmax(-1).cumsum(-1) > uniform[..., None]
    return above.int().argmax(-1)


def output_gradients(
    model: Any, modules: Iterable[str], tokens: Tensor, *, labels: Callable[[Tensor], Tensor] | None = None
) -> list[Tensor]:
    """∂loss/∂output of several linears, (all tokens, width) each; loss: the sum of negative log-likelihoods."""
    seen: dict[str, Tensor] = {}
    hooks = []
    for name in modules:

        def hook(module: Any, inputs: Any, output: Tensor, name: str = name) -> Tensor:
            seen[name] = output if output.requires_grad else output.detach().requires_grad_()
            return seen[name].clone()  # falcon adds to it in place

        hooks.append(model.get_submodule(name).register_forward_hook(hook))
    logits = model(tokens).logits
    targets = tokens[:, 1:] if labels is None else labels(logits)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="sum")
    gradients = torch.autograd.grad(loss, [seen[name] for name in modules])
    for handle in hooks:
        handle.remove()
    return [gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients]


def stream(model: Any, place: Place, tokens: Tensor) -> Tensor:
    """The residual stream to which a sublayer adds, (all tokens, d)."""
    (x,) = capture(model, [place.before], tokens)
    if place.sublayer.parallel:
        attention = next(entry for _, _, entry in entries(model) if entry.kind == "attention")
        consumer = f"{place.consumer.removesuffix(place.entry.consumer)}{attention.consumer}"
        (z,) = capture(model, [consumer], tokens)
        x = x + z @ weight_of(model.get_submodule(consumer)).T
        if (bias := model.get_submodule(consumer).bias) is not None:
            x = x + bias
    return x


def weight_of(module: Any) -> Tensor:
    """The weight as (out, in), a view: GPT-2 holds it the other way round."""
    return module.weight.T if type(module).__name__ == "Conv1D" else module.weight


def gram(x: Tensor) -> Tensor:
    """Mean over tokens of x xᵀ."""
    return x.T @ x / len(x)


def columns_of(units: Tensor, width: int) -> Tensor:
    return (units[:, None] * width + torch.arange(width)).flatten()


# The exact solutions.


def ridge(h: Tensor, damping: float = DAMPING) -> Tensor:
    return h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)


def fit_damping(x: Tensor) -> float:
    """The default's damping of a fit to inputs (tokens, n): by tokens per column; an expert's tokens are those that reach it."""
    tokens = int((x != 0).any(dim=1).sum())
    return max(DAMPING, min(0.5 * x.shape[1] / tokens, 0.1))


def least_squares(x: Tensor, y: Tensor, start: Tensor, strength: float) -> Tensor:
    """The W (rows, n) of least ``mean‖y − W x‖² + strength·‖W − start‖²``, by one stacked system.

    Args:
        x, y: (tokens, n) and (tokens, rows).
    """
    pull = (strength * len(x)) ** 0.5
    stacked = torch.cat([x, pull * torch.eye(x.shape[1], dtype=x.dtype)])
    return torch.linalg.lstsq(stacked, torch.cat([y, pull * start.T]), driver="gelsd").solution.T


def greedy_path(w: Tensor, h: Tensor, width: int, count: int, g: Tensor | None = None) -> tuple[list[int], list[float]]:
    """The plain loop: units in the order in which they go, and ``tr((P_uu)⁻¹ W_uᵀ G W_u)`` of each when it goes.

    Columns that are always zero cost nothing.
    """
    g = torch.eye(len(w), dtype=w.dtype) if g is None else g
    w, p = w * (h.diagonal() > 0), torch.linalg.inv(ridge(h))
    left, order, paid = list(range(h.shape[0] // width)), [], []
    for _ in range(count):
        c = columns_of(torch.tensor(left), width).view(len(left), width)
        energies = (w.T @ g @ w)[c[:, :, None], c[:, None, :]]  # (left, width, width)
        costs = (torch.linalg.inv(p[c[:, :, None], c[:, None, :]]) @ energies).diagonal(dim1=1, dim2=2).sum(dim=1)
        best = int(costs.argmin())
        paid.append(float(costs[best]))
        order.append(left.pop(best))
        s = c[best]
        inverse = torch.linalg.inv(p[s][:, s])
        w, p = w - w[:, s] @ inverse @ p[s], p - p[:, s] @ inverse @ p[s]
    return order, paid


# The prune sweep.


@dataclass(frozen=True)
class Problem:
    """One site when its units are chosen."""

    place: Place
    w: Tensor
    z: Tensor
    inputs: Tensor
    producers: tuple[Tensor, ...]


Choose = Callable[[Problem, int], Tensor]
"""That many units to keep, ascending."""


def greedily(problem: Problem, keep: int) -> Tensor:
    width = problem.place.site.width
    units = problem.w.shape[1] // width
    gone, _ = greedy_path(problem.w, gram(problem.z), width, units - keep)
    return torch.tensor([u for u in range(units) if u not in gone])


class Twins:
    """A model twice, the dense one and the one that is pruned."""

    def __init__(self, path: Path, sites: list[Site]) -> None:
        self.dense = load(path)
        self.pruned = copy.deepcopy(self.dense)
        self.places = places(self.dense, sites)
        self.parameters = block_parameters(self.dense)
        self.kept = {site.name: torch.arange(site.units) for site in sites}
        """Units that are left, by their first numbers."""

    @property
    def sites(self) -> list[Site]:
        """The sites that are left, as they are by now."""
        left = [(place.site, len(self.kept[place.site.name])) for place in self.places]
        return [site.keeping(units) for site, units in left if units]

    @property
    def removed(self) -> int:
        """Parameters that are gone."""
        return sum(place.site.removed(len(self.kept[place.site.name])) for place in self.places)

    def columns(self, place: Place) -> Tensor:
        """The consumer's columns that are left."""
        return columns_of(self.kept[place.site.name], place.site.width)

    def settle(self) -> None:
        """The pruned model becomes the dense one of the next shot."""
        self.dense = copy.deepcopy(self.pruned)

    @torch.no_grad()
    def prune(
        self,
        keep: dict[str, int],
        tokens: Tensor,
        *,
        choose: Choose = greedily,
        compensate: bool = True,
        target: str = "own",
        reconstruct: bool = True,
        damping: Callable[[Tensor], float] = lambda x: DAMPING,
    ) -> None:
        """Site after site, each on the model as it is then. `damping` is that of a fit to inputs (tokens, n).

        Where the two models still agree, compensation and target change nothing of themselves.
        """
        for place in self.places:
            if place.site.name not in keep:
                continue
            if keep[place.site.name] == 0:  # the sublayer goes as a whole
                weight_of(self.pruned.get_submodule(place.consumer)).zero_()
                self.kept[place.site.name] = torch.arange(0)
                continue
            if compensate:
                self._compensate(place, tokens, damping)
            consumer = self.pruned.get_submodule(place.consumer)
            columns, w_all = self.columns(place), weight_of(consumer)
            w = w_all[:, columns]
            inputs, z = capture(self.pruned, [place.reader, place.consumer], tokens)
            z = z[:, columns]
            h = gram(z)
            strength = damping(z) * float(h.diagonal().mean())
            if target != "own" and place.sublayer.experts is None:
                # Dense output, less what the consumer adds by itself, more what the stream lacks.
                (dense_z,) = capture(self.dense, [place.consumer], tokens)
                aim = dense_z @ weight_of(self.dense.get_submodule(place.consumer)).T
                if target == "residual" and not place.sublayer.branch_norm:
                    lacking = stream(self.dense, place, tokens) - stream(self.pruned, place, tokens)
                    aim = aim + lacking / place.sublayer.scale
                w = least_squares(z, aim, w, strength)
            units = self.kept[place.site.name]
            if keep[place.site.name] < len(units):
                producers = tuple(
                    part
                    for i, name in enumerate(place.producers)
                    for part in place.split(weight_of(self.pruned.get_submodule(name)), i)
                )
                stays = choose(Problem(place, w, z, inputs, producers), keep[place.site.name])
                own = columns_of(stays, place.site.width)
                w = least_squares(z[:, own], z @ w.T, w[:, own], strength) if reconstruct else w[:, own]
                self.kept[place.site.name] = units[stays]
                forget(self.pruned, place, units[stays].tolist())
                columns = columns[own]
            w_all.zero_()
            w_all[:, columns] = w

    def _compensate(self, place: Place, tokens: Tensor, damping: Callable[[Tensor], float]) -> None:
        """Each producer is to give on its pruned input what it gives on the dense one."""
        if not place.producers:
            return
        (x,), (x_hat,) = (capture(model, [place.reader], tokens) for model in (self.dense, self.pruned))
        strength = damping(x_hat) * float(gram(x_hat).diagonal().mean())
        for name in place.producers:
            w = weight_of(self.pruned.get_submodule(name))
            w.copy_(least_squares(x_hat, x @ w.T, w, strength))


# The recipes.


def mask_gradients(model: Any, places: list[Place], tokens: Tensor) -> dict[str, Tensor]:
    """The gradient of each sequence's loss by each unit's mask: (sequences, units) of every site."""
    found: dict[str, list[Tensor]] = {p.site.name: [] for p in places}
    for row in tokens:
        masks = {p.site.name: torch.ones(p.site.units, dtype=torch.float64, requires_grad=True) for p in places}
        hooks = []
        for place in places:
            mask, width = masks[place.site.name], place.site.width
            hooks.append(
                model.get_submodule(place.consumer).register_forward_pre_hook(
                    lambda m, a, mask=mask, width=width: (a[0] * mask.repeat_interleave(width),)
                )
            )
        loss = F.cross_entropy(model(row[None]).logits[0, :-1], row[1:])
        for site, gradient in zip(masks, torch.autograd.grad(loss, list(masks.values())), strict=True):
            found[site].append(gradient)
        for handle in hooks:
            handle.remove()
    return {site: torch.stack(gradients) for site, gradients in found.items()}


def sobp(path: Path, tokens: Tensor, sites: list[Site], *, ratio: float, round_to: int) -> Twins:
    twins = Twins(path, sites)
    gradients = mask_gradients(twins.dense, twins.places, tokens)
    squares = {name: g.square().mean(dim=0) for name, g in gradients.items()}
    densities = {site.name: (squares[site.name] / site.unit_parameters).sort().values for site in sites}
    twins.prune(allocate(sites, densities, Budget(ratio, twins.parameters, round_to)), tokens)
    return twins


def path_costs(twins: Twins, tokens: Tensor, *, weighted: bool = True, drawn: bool = True) -> dict[str, Tensor]:
    """Of each further unit of each site, a parameter, in units of loss; a unit is no cheaper than one before it."""
    left = [place for place in twins.places if len(twins.kept[place.site.name])]
    consumers = [place.consumer for place in left]
    inputs = capture(twins.dense, consumers, tokens)
    gradients = output_gradients(twins.dense, consumers, tokens, labels=draw if drawn else None)
    costs = {}
    for place, site, z, dy in zip(left, twins.sites, inputs, gradients, strict=True):
        columns = twins.columns(place)
        w = weight_of(twins.dense.get_submodule(place.consumer))[:, columns]
        # The mean of dy dyᵀ over the tokens that reach an expert.
        g = ridge(gram(dy[(z != 0).any(dim=1)]), 1e-6) if weighted else None
        stays = site.rest is None
        _, paid = greedy_path(w, gram(z[:, columns]), site.width, site.units - stays, g)
        sizes = [site.unit_parameters] * (site.units - 1) + [site.unit_parameters + (site.rest or 0)]
        densities = [cost / 2 / size for cost, size in zip(paid, sizes, strict=False)]
        risen = [max(densities[: k + 1]) for k in range(len(densities))]
        costs[site.name] = torch.tensor([*risen, *(risen[-1:] if stays else [])], dtype=torch.float64)
    return costs


def default(
    path: Path,
    tokens: Tensor,
    sites: list[Site],
    *,
    ratio: float,
    round_to: int,
    shots: int = 1,
    target: str = "residual",
    weighted: bool = True,
    drawn: bool = True,
    window: range | None = None,
) -> tuple[Twins, list[dict[str, Tensor]]]:
    """The twins, and every shot's costs."""
    twins, found = Twins(path, sites), []
    for shot in range(1, shots + 1):
        costs = path_costs(twins, tokens, weighted=weighted, drawn=drawn)
        budget = Budget(ratio * shot / shots, twins.parameters, round_to, gone=twins.removed, sublayers=True)
        changeable = [site for site in twins.sites if window is None or site.block in window]
        twins.prune(allocate(changeable, costs, budget), tokens, target=target, damping=fit_damping)
        twins.settle()
        found.append(costs)
    return twins, found


def slimgpt(
    path: Path,
    tokens: Tensor,
    sites: list[Site],
    *,
    shares: list[float],
    ratio: float,
    round_to: int,
    choose: Choose = greedily,
) -> Twins:
    """Args:
    shares: of the ratio, by block.
    """
    twins = Twins(path, sites)
    budget = Budget(ratio, twins.parameters, round_to)
    keep = allocate(sites, even_densities(sites, dict(enumerate(shares))), budget)
    twins.prune(keep, tokens, compensate=False, choose=choose)
    return twins


def in_batches(problem: Problem, keep: int, *, first: int, last: int) -> Tensor:
    """SlimGPT's batched greedy pruning: heads by the Cholesky diagonals of their own blocks of P, channels in groups."""
    width, w, p = problem.place.site.width, problem.w, torch.linalg.inv(ridge(gram(problem.z)))
    left = list(range(w.shape[1] // width))
    while len(left) > keep:
        diagonal = torch.zeros(len(p), dtype=p.dtype)
        for u in left:
            c = slice(u * width, (u + 1) * width)
            diagonal[c] = torch.linalg.cholesky(p[c, c]).diagonal().square()
        estimates = {u: float((w.square().sum(dim=0) / diagonal)[u * width : (u + 1) * width].sum()) for u in left}
        to_go = len(left) - keep
        size = 1 if problem.place.site.kind == "attention" else max(last, min(first, to_go // 2 // last * last))
        gone = sorted(left, key=lambda u: estimates[u])[: min(size, to_go)]
        left = [u for u in left if u not in gone]
        c = columns_of(torch.tensor(gone), width)
        middle = torch.linalg.inv(p[c][:, c])
        w, p = w - w[:, c] @ middle @ p[c], p - p[:, c] @ middle @ p[c]
    return torch.tensor(left)


def by_second_moment(problem: Problem, keep: int, first: Sequence[int] = ()) -> Tensor:
    """Half the mean of each unit's squared linear outputs, (tokens, d_out) of them written out; gated, both products.

    The units `first` go before all others.
    """

    def moments(hidden: Tensor) -> Tensor:
        outputs = hidden[:, None, :] * problem.w[None]  # (tokens, d_out, n): what each channel alone gives
        return outputs.square().sum(dim=1).mean(dim=0) / 2

    site = problem.place.site
    if site.kind == "attention":
        scores = moments(problem.z).view(-1, site.width).sum(dim=1)
    else:
        scores = torch.stack([moments(problem.inputs @ a.T) for a in problem.producers]).prod(dim=0)
    scores[list(first)] = -1
    return scores.argsort(descending=True)[:keep].sort().values


def divergence(maps: Tensor) -> Tensor:
    """Mean Jensen-Shannon divergence (heads, heads) between the rows of (sequences, heads, tokens, tokens)."""

    def relative(p: Tensor, q: Tensor) -> Tensor:
        return torch.where(p > 0, p * (p / q).log(), 0.0).sum(dim=-1).mean()

    heads = maps.shape[1]
    d = torch.zeros(heads, heads, dtype=torch.float64)
    for i in range(heads):
        for j in range(heads):
            p, q = maps[:, i].double(), maps[:, j].double()
            d[i, j] = (relative(p, (p + q) / 2) + relative(q, (p + q) / 2)) / 2
    return d
