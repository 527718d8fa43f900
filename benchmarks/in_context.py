"""Allocations taken where pruning has already happened, in memory, against the default's: each plan is pruned by the real job.

    python benchmarks/in_context.py MODEL --ratio 0.5 --calibration CALIBRATION --text TEXT --seq-len 256 \\
        gates gates:refit=1:loss=kl shots search

Every row is `streamprune run --plan FILE --effort low` of the recipe `default`; the first row is the default's plan, computed here, in
which no sublayer goes whole. A form is a name with settings after colons. Choices are made on the calibration text alone: other windows
of it, which may overlap those that are pruned by, give the held-out gap, in nats per token above the dense model. Seconds are those of
the plan; `gates` and `search` begin with the survey that the first row counts. Some 5 minutes a form on one core with 128 windows; `search`
prunes once per plan. Target: a gap that is smaller than the default's by more than seeds differ.

    gates   One gate per unit, trained from the dense model by projected straight-through: each step keeps the units of highest
            score at the budget, and Adam moves the scores by the gradient of the gates, per parameter. They begin as the ranks
            of the default's costs.
            steps=16 size=8   steps, and windows of each      rate=0.01     how far a step moves a rank in 0..1
            loss=ce           or kl, to the dense model       rise=0.5      share of the steps in which the ratio rises
            refit=0           1: the consumer is refitted to the units that stay, and gates are on what the others do not predict
            units=0           1: the gates choose the units too, not only their numbers
            price=1           Adam moves by the value less its mean near the threshold, the price of the budget; 0: by the value
            shared=0          1: a site's scores move together, by the mean over the units near the threshold
    shots   The default's costs, with both Grams taken in the pruned model, whose removed units may come back.
            rounds=1          surveys, each on the result of the plan before
            mix=1             weight of the new costs against the dense model's, in logarithms
            grams=both        or inputs or gradients: the Gram that is taken in the pruned model, the other in the dense one
    search  An evolution strategy: each generation is drawn around the best plan so far, by factors on the costs of each site,
            and the plan of least loss on held-out calibration windows stays. In a stream, a generation would be one sweep.
            generations=2 size=6    plans in each              spread=0.3    standard deviation of the factors' logarithms at first
            samples=64 held=64      windows to prune by, and held out
"""

from __future__ import annotations

import argparse
import copy
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import streamprune
from streamprune.maths.greedy import greedy_removal
from streamprune.maths.refit import cholesky
from streamprune.maths.sampling import sample as draw
from streamprune.model.site import Site
from streamprune.model.skeleton import open_skeleton
from streamprune.model.tokenizer import load_tokenizer
from streamprune.recipes.allocation import Budget, allocate
from streamprune.recipes.default import Default
from streamprune.recipes.plan import Plan, SitePlan
from streamprune.text.source import Text
from streamprune.text.windows import sample

BATCH, HELD = 8, 1_000_003
"""Windows of a micro-batch, and what is added to the seed to draw held-out windows."""
DAMPING, RIDGE = 0.01, 1e-6
"""Ridges of both Grams, as in the default's costs."""
NEAR = 0.05
"""How near to the threshold a unit's rank is to count as near it, as a standard deviation."""
Sums = dict[str, tuple[Tensor, Tensor]]


def modules(model: Any, site: Site) -> tuple[nn.Module, nn.Linear]:
    """Return a site's sublayer and its consumer."""
    layer = model.model.layers[site.block]
    return (layer.mlp, layer.mlp.down_proj) if site.kind == "ffn" else (layer.self_attn, layer.self_attn.o_proj)


def output(found: Any) -> Tensor:
    return found[0] if isinstance(found, tuple) else found


class Study:
    """A dense llama, its sites, calibration windows (samples, length) int64, and the default's costs in the dense model."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.dense = self.load(options.model)
        skeleton = open_skeleton(options.model, torch.device("cpu"), "float32")
        self.sites: list[Site] = skeleton.all_sites()
        self.budget = Budget(options.ratio, skeleton.block_parameters(), options.round_to)
        self.windows = self.drawn(options.samples, options.seed)
        self.folder, self.jobs = Path(options.folder), 0

    def load(self, path: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval().requires_grad_(False)

    def drawn(self, samples: int, seed: int) -> Tensor:
        text, o = Text.of(str(self.options.calibration)), self.options
        return sample(load_tokenizer(o.model), text, self.dense.config.vocab_size, samples, o.seq_len, seed).tokens

    # The real job.

    @contextmanager
    def pruned(self, plan: Plan, samples: int | None = None, units: bool = False) -> Iterator[Path]:
        """Prune by a plan, and yield the result's folder, which then goes. With `units`, the plan names them."""
        self.jobs += 1
        file, out, o = self.folder / f"{self.jobs}.json", self.folder / f"{self.jobs}", self.options
        file.write_text(plan.to_json())
        config = streamprune.Config(
            model=o.model,
            out=out,
            plan=file,
            effort="low",
            calibration=o.calibration,
            samples=samples or o.samples,
            seq_len=o.seq_len,
            seed=o.seed,
            round_to=o.round_to,
        )
        with ExitStack() as stack:
            if units:
                stack.enter_context(patch.object(Default, "plans_units", lambda self, site: True))
            streamprune.prune(config)
        yield out
        shutil.rmtree(out)

    def plan(self, densities: dict[str, Tensor]) -> Plan:
        """Return the default's plan for costs per parameter, by site name (units,) ascending."""
        keep = allocate(self.sites, densities, self.budget)
        return Plan({name: SitePlan(units) for name, units in keep.items()}, self.options.ratio)

    @torch.no_grad()
    def loss(self, model: Any, windows: Tensor) -> float:
        """Return the mean negative log-likelihood of the predicted tokens, in nats."""
        total = 0.0
        for rows in windows.split(BATCH):
            logits = model(rows, use_cache=False).logits[:, :-1].flatten(0, 1)
            total += float(F.cross_entropy(logits, rows[:, 1:].flatten(), reduction="sum"))
        return total / windows[:, 1:].numel()

    # Surveys.

    def survey(self, model: Any) -> Sums:
        """Return H (n, n) and G (d_out, d_out) of each site of the dense model, means per token.

        Inputs and gradients are those of `model`, which may be pruned: the dense sublayers run on what its sublayers read.
        """
        h = {s.name: torch.zeros(s.columns, s.columns) for s in self.sites}
        g = {s.name: torch.zeros(s.outputs, s.outputs) for s in self.sites}
        generator = torch.Generator().manual_seed(self.options.seed)
        seen = dict[str, Tensor]()

        def read(site: Site) -> Callable[..., None]:
            """A hook on the sublayer of `model`."""
            own, _ = modules(self.dense, site)

            def hook(module: nn.Module, given: Any, named: Any, found: Any) -> None:
                y = output(found)
                if model is not self.dense:
                    with torch.no_grad():
                        own(*given, **named)  # gives seen
                z = seen.pop(site.name).flatten(0, 1)
                h[site.name].addmm_(z.T, z)

                def back(dy: Tensor) -> None:
                    dy = dy.flatten(0, 1)
                    g[site.name].addmm_(dy.T, dy)

                y.register_hook(back)

            return hook

        def caught(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, given: Any) -> None:
                seen[name] = given[0].detach()

            return hook

        with ExitStack() as stack:
            for site in self.sites:
                stack.callback(modules(self.dense, site)[1].register_forward_pre_hook(caught(site.name)).remove)
                stack.callback(modules(model, site)[0].register_forward_hook(read(site), with_kwargs=True).remove)
            for rows in self.windows.split(BATCH):
                x = model.model.embed_tokens(rows).requires_grad_()
                logits = model(inputs_embeds=x, use_cache=False).logits[:, :-1].flatten(0, 1)
                with torch.no_grad():
                    dense = logits
                    if model is not self.dense:
                        dense = self.dense(rows, use_cache=False).logits[:, :-1].flatten(0, 1)
                    labels = draw(dense, torch.rand(len(logits), generator=generator, dtype=torch.float64))
                F.cross_entropy(logits, labels, reduction="sum").backward()
        tokens, predicted = self.windows.numel(), self.windows[:, 1:].numel()
        return {s.name: (h[s.name] / tokens, g[s.name] / predicted) for s in self.sites}

    def costs(self, sums: Sums) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return each site's costs per parameter as the default takes them, and its units in the order in which they go."""
        densities, order = {}, {}
        for site in self.sites:
            h, g = sums[site.name]
            w = cholesky(g, RIDGE, site.name)[0].T @ modules(self.dense, site)[1].weight
            order[site.name], found = greedy_removal(
                w, h, width=site.width, count=site.units, damping=DAMPING, place=site.name
            )
            sizes = torch.full((site.units,), float(site.unit_parameters), dtype=torch.float64)
            sizes[-1] += site.rest or 0
            densities[site.name] = torch.cummax(found.double() / (2 * sizes), 0).values
        return densities, order


# The forms.


class Start:
    """What the forms begin with: the default's survey of the dense model, its costs and its plan."""

    def __init__(self, study: Study) -> None:
        self.sums = study.survey(study.dense)
        self.densities, self.order = study.costs(self.sums)
        self.plan = study.plan(self.densities)


def ranks(scores: Tensor, sizes: Tensor) -> Tensor:
    """Return for each unit the share of the parameters in units of lower score, in (0, 1)."""
    order = scores.argsort(stable=True)
    return torch.empty_like(scores).index_copy_(0, order, (sizes[order].cumsum(0) - sizes[order] / 2) / sizes.sum())


def project(scores: Tensor, sizes: Tensor, target: float) -> Tensor:
    """Return (units,) bool, those that stay: the units of lowest score go, as long as their parameters fit the target."""
    order = scores.argsort(stable=True)
    stays = torch.ones_like(scores, dtype=torch.bool)
    stays[order[sizes[order].cumsum(0) <= target]] = False
    return stays


def refitted(w: Tensor, h: Tensor, stays: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the consumer refitted to the units that stay, and for each unit what it adds that the others do not predict.

    Args:
        w: (d_out, n).
        h: (n, n), damped.
        stays: (units,) bool.

    Returns:
        W' (d_out, n), zero where units go; R (n, n) and D (d_out, n): with unit u's rows and columns, ``D_u (R z)_u`` is what the
        refitted output loses if u goes too, or gains if it stays after all.
    """
    n, units = len(h), len(stays)
    columns = stays.repeat_interleave(width)
    s, r = columns.nonzero()[:, 0], (~columns).nonzero()[:, 0]
    p = torch.linalg.inv(h[s][:, s]) if len(s) else h.new_zeros(0, 0)
    across = p @ h[s][:, r]  # (kept, gone): the gone are predicted as acrossᵀ z_S
    kept = torch.zeros_like(w)
    kept[:, s] = w[:, s] + w[:, r] @ across.T
    unpredicted = h[r][:, r] - h[r][:, s] @ across  # K
    rows, directions = torch.zeros(n, n), kept.clone()
    rows[s[:, None], s] = _per_unit(p, width) @ p if len(s) else p
    rows[r[:, None], r] = torch.eye(len(r))
    rows[r[:, None], s] = -across.T
    if len(r):
        directions[:, r] = w[:, r] @ unpredicted @ _per_unit(unpredicted, width)
    assert rows.shape == (units * width, n)
    return kept, rows, directions


def _per_unit(matrix: Tensor, width: int) -> Tensor:
    """Return the block-diagonal matrix of the inverses of each unit's block."""
    blocks = [matrix[i : i + width, i : i + width] for i in range(0, len(matrix), width)]
    if width == 1:
        return torch.diag(1 / matrix.diagonal())
    return torch.block_diag(*(torch.linalg.inv(block) for block in blocks))


def gates(study: Study, start: Start, settings: dict[str, Any]) -> tuple[Plan, bool]:
    sites, steps, size = study.sites, int(settings["steps"]), int(settings["size"])
    sizes = torch.cat([torch.full((s.units,), float(s.unit_parameters)) for s in sites])
    parts = [s.units for s in sites]
    each = [torch.empty(s.units).index_copy_(0, start.order[s.name], start.densities[s.name].float()) for s in sites]
    scores = ranks(torch.cat(each), sizes)
    leaf = nn.Parameter(scores)
    adam = torch.optim.Adam([leaf], lr=settings["rate"], betas=(0.9, 0.95))
    model, generator = copy.deepcopy(study.dense), torch.Generator().manual_seed(study.options.seed)
    damped = {}
    for site in sites:
        h = start.sums[site.name][0].clone()
        h.diagonal().add_(DAMPING * h.diagonal().mean())
        damped[site.name] = h
    order = torch.Tensor()
    masks = dict[str, Tensor]()
    fits = dict[str, tuple[Tensor, Tensor, Tensor]]()

    def masked(site: Site) -> Callable[..., Any]:
        def hook(module: nn.Module, given: Any) -> Any:
            return (given[0] * masks[site.name].repeat_interleave(site.width),)

        return hook

    def predicted(site: Site) -> Callable[..., Any]:
        def hook(module: nn.Module, given: Any, found: Tensor) -> Tensor:
            kept, rows, directions = fits[site.name]
            m = masks[site.name].repeat_interleave(site.width)
            free = (m - m.detach()) * F.linear(given[0].detach(), rows)
            return F.linear(given[0], kept) + F.linear(free, directions)

        return hook

    for site in sites:
        consumer = modules(model, site)[1]
        if settings["refit"]:
            consumer.register_forward_hook(predicted(site))
        else:
            consumer.register_forward_pre_hook(masked(site))
    total = study.budget.ratio * study.budget.parameters
    for step in range(steps):
        target = total * min(1.0, (step + 1) / max(1.0, settings["rise"] * steps))
        stays = project(leaf.detach(), sizes, target)
        through = stays.float() + leaf - leaf.detach()
        masks.update(zip((s.name for s in sites), through.split(parts), strict=True))
        if settings["refit"]:
            for site, own in zip(sites, stays.split(parts), strict=True):
                w = modules(model, site)[1].weight
                fits[site.name] = refitted(w, damped[site.name], own, site.width)
        if len(order) < size:
            order = torch.randperm(len(study.windows), generator=generator)
        rows, order = study.windows[order[:size]], order[size:]
        lost = 0.0
        for part in rows.split(BATCH):
            logits = model(part, use_cache=False).logits[:, :-1].flatten(0, 1)
            if settings["loss"] == "ce":
                loss = F.cross_entropy(logits, part[:, 1:].flatten(), reduction="sum")
            else:
                with torch.no_grad():
                    wanted = study.dense(part, use_cache=False).logits[:, :-1].flatten(0, 1).log_softmax(-1)
                loss = F.kl_div(logits.log_softmax(-1), wanted, reduction="sum", log_target=True)
            loss = loss / rows[:, 1:].numel()
            gradient = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
            leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
            lost += float(loss.detach())
        assert leaf.grad is not None
        leaf.grad = leaf.grad / sizes * sizes.min()
        edge = leaf.detach()[~stays].max() if not bool(stays.all()) else leaf.detach().min()
        near = torch.exp(-(((leaf.detach() - edge) / NEAR) ** 2) / 2) * sizes
        if settings["price"]:
            leaf.grad -= (leaf.grad * near).sum() / near.sum()
        if settings["shared"]:
            pairs = zip(leaf.grad.split(parts), near.split(parts), strict=True)
            leaf.grad = torch.cat([((g * n).sum() / n.sum().clamp_min(1e-9)).expand(len(g)) for g, n in pairs])
        adam.step()
        adam.zero_grad()
        if study.options.verbose:
            print(f"    step {step}: loss {lost:.4f}, {int(stays.sum())} units", flush=True)
    final = dict(zip((s.name for s in sites), leaf.detach().split(parts), strict=True))
    densities = {name: (own - leaf.detach().min()).sort().values.double() for name, own in final.items()}
    plan = study.plan(densities)
    if not settings["units"]:
        return plan, False
    named = {}
    for name, entry in plan.items():
        best = final[name].argsort(descending=True, stable=True)[: entry.keep].sort().values
        named[name] = SitePlan(entry.keep, tuple(best.tolist()))
    return Plan(named, plan.ratio), True


def shots(study: Study, start: Start, settings: dict[str, Any]) -> tuple[Plan, bool]:
    plan, mix = start.plan, settings["mix"]
    for _ in range(int(settings["rounds"])):
        with study.pruned(plan) as path:
            found = study.survey(study.load(path))
        if settings["grams"] != "both":
            keep = settings["grams"] == "inputs"
            found = {
                name: (h, start.sums[name][1]) if keep else (start.sums[name][0], g) for name, (h, g) in found.items()
            }
        densities, _ = study.costs(found)
        plan = study.plan({name: start.densities[name] ** (1 - mix) * new**mix for name, new in densities.items()})
        if study.options.verbose:
            print("   ", {name: entry.keep for name, entry in plan.items()}, flush=True)
    return plan, False


def search(study: Study, start: Start, settings: dict[str, Any]) -> tuple[Plan, bool]:
    held = study.drawn(int(settings["held"]), study.options.seed + HELD + 1)
    generator = torch.Generator().manual_seed(study.options.seed)

    def lost(plan: Plan) -> float:
        with study.pruned(plan, int(settings["samples"])) as path:
            return study.loss(study.load(path), held)

    centre = torch.zeros(len(study.sites))
    best, plan = lost(start.plan), start.plan
    if study.options.verbose:
        print(f"    default: {best:.4f}", flush=True)
    for generation in range(int(settings["generations"])):
        spread, around = settings["spread"] / (generation + 1), centre
        for _ in range(int(settings["size"])):
            moved = around + spread * torch.randn(len(study.sites), generator=generator)
            other = study.plan(
                {
                    s.name: start.densities[s.name] * math.exp(m)
                    for s, m in zip(study.sites, moved.tolist(), strict=True)
                }
            )
            loss = lost(other)
            if study.options.verbose:
                print(f"    {loss:.4f}", [entry.keep for entry in other.values()], flush=True)
            if loss < best:
                best, plan, centre = loss, other, moved
    return plan, False


FORMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gates": (
        gates,
        {
            "steps": 16,
            "size": 8,
            "rate": 0.01,
            "loss": "ce",
            "rise": 0.5,
            "refit": 0,
            "units": 0,
            "price": 1,
            "shared": 0,
        },
    ),
    "shots": (shots, {"rounds": 1, "mix": 1, "grams": "both"}),
    "search": (search, {"generations": 2, "size": 6, "spread": 0.3, "samples": 64, "held": 64}),
}
WORDS = {"loss": ("ce", "kl"), "grams": ("both", "inputs", "gradients")}


def parsed(form: str) -> tuple[Any, dict[str, Any]]:
    """Return a form's function and settings. Raises ValueError for one that is not known."""
    name, *given = form.split(":")
    if name not in FORMS:
        raise ValueError(f"{form}: a form is one of {', '.join(FORMS)}, with settings as in --help")
    function, settings = FORMS[name][0], dict(FORMS[name][1])
    for each in given:
        key, _, value = each.partition("=")
        if key not in settings or (key in WORDS and value not in WORDS[key]):
            raise ValueError(f"{form}: {each} is no setting of {name}; see --help")
        settings[key] = value if key in WORDS else float(value)
    return function, settings


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="dense checkpoint of a llama")
    parser.add_argument("forms", nargs="*", help="see above")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument(
        "--text", type=Path, help="to measure perplexity on; without it, held-out calibration windows alone"
    )
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--round-to", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="print steps, plans and losses on the way")
    options = parser.parse_intermixed_args(given)
    try:
        forms = {form: parsed(form) for form in options.forms}
    except ValueError as problem:
        parser.error(str(problem))
    with tempfile.TemporaryDirectory(prefix="streamprune-benchmark-") as folder:
        options.folder = folder
        study = Study(options)
        held = study.drawn(options.samples, options.seed + HELD)

        def measured(path: Path) -> list[float]:
            """The loss on held-out calibration windows, and the logarithm of the perplexity on the text, if one is given."""
            found = [study.loss(study.load(path), held)]
            if options.text:
                found.append(math.log(streamprune.evaluate(path, options.text, seq_len=options.seq_len).perplexity))
            return found

        dense, begun = measured(options.model), time.perf_counter()
        start = Start(study)
        seconds = time.perf_counter() - begun
        print("| form | held-out gap | perplexity | gap | s to plan |\n|---|--:|--:|--:|--:|", flush=True)
        for name, (function, settings) in {"default": (None, {}), **forms}.items():
            plan, units = start.plan, False
            if function is not None:
                begun = time.perf_counter()
                plan, units = function(study, start, settings)
                seconds = time.perf_counter() - begun
            if options.verbose:
                print("   ", {name: entry.keep for name, entry in plan.items()}, flush=True)
            with study.pruned(plan, units=units) as path:
                (own, *test), (least, *best) = measured(path), dense
            on_text = f"{math.exp(test[0]):.2f} | {test[0] - best[0]:.4f}" if test else "|"
            print(f"| {name} | {own - least:.4f} | {on_text} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
