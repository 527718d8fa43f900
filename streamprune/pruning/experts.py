"""What routed experts cost as a whole, one after the other: the router's next choices then do their work.

Without the experts `S` the output of a mixture changes by ``Δ_S``, which costs ``½ mean (gᵀ Δ_S)²`` to second order, `g` the gradient
of the output. The mean is over a sample of the tokens that the survey reads. The experts go greedily: each time the one that seems to
add least to this. Its cost is what it adds, so that experts which stand in for each other do not all look cheap.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..maths.sums import TOGETHER, SiteStatistics, TokenSample, sample_size
from ..model.block import Sublayer
from ..model.skeleton import Skeleton
from ..recipes.recipe import OVERLAP, WHOLE

_SEED = 0x51
_MATTERS = 1e-3
"""Share of what an expert costs on average, from which on the loss of the tokens that do not reach it counts too."""

Run = Callable[[Tensor, Sequence[int] | None], tuple[Tensor, Tensor]]
"""From tokens, at most `TOGETHER` int64, and the experts that the router may choose, ascending (None for all), to the mixture's output
(tokens, d_out) and the experts that they are routed to (tokens, experts) bool."""


def add_samples(
    skeleton: Skeleton,
    index: int,
    stats: Sequence[SiteStatistics],
    shape: tuple[int, int],
    first: int,
    *,
    gradients: bool,
) -> None:
    """Give the first expert of each mixture whose experts can go as a whole an empty sample, in the statistics of a block's sites.

    Args:
        shape: sequences over all ranks, and tokens of each.
        first: number of this rank's first sequence.
        gradients: whether gradients are sampled too.
    """
    number = 0
    for entry in skeleton.entries[index]:
        count = skeleton.site_count(index, entry)
        if entry.routing:
            stats[number].sample = TokenSample(
                positions(shape, sample_size(count - (entry.shared is not None), entry.chosen)),
                first=first,
                width=skeleton.stream_width,
                outputs=skeleton.width * gradients,
                device=skeleton.device,
                dtype=skeleton.dtype,
            )
        number += count


def positions(shape: tuple[int, int], number: int) -> Tensor:
    """Return which tokens are sampled, (number, 2) int64: sequence, ascending, and token; all if there are no more than `number`.

    They are spread evenly over the sequences, and drawn inside each.
    """
    sequences, length = shape
    if number >= sequences * length:
        return torch.cartesian_prod(torch.arange(sequences), torch.arange(length))
    generator = torch.Generator().manual_seed(_SEED)
    drawn = torch.randint(length, (number,), generator=generator)
    return torch.stack([torch.arange(number) * sequences // number, drawn], dim=1)


def costs(skeleton: Skeleton, sublayer: Sublayer, sample: TokenSample) -> dict[str, Tensor]:
    """Return what experts of a mixture cost, and their overlap: () float64 on the host, by the site's place and the finding's key.

    An expert costs more than the one that goes before it, by a trace where it would cost no more. Those that have to stay
    because the router needs them have no cost.
    """
    sites = [each.site for each in sublayer.prunables if each.site.expert is not None]
    arguments = skeleton.arguments(1, 1)[sublayer.block]  # nothing in a mixture depends on positions
    jointly, apart = list[Tensor](), list[Tensor]()  # losses of what the experts of all tokens add, of some tokens each

    def run(rows: Tensor, among: Sequence[int] | None) -> tuple[Tensor, Tensor]:
        x = sample.x[rows, None]
        mixed = sublayer.mix(sublayer.normed(x), sublayer.given(x, arguments), among=among)
        sizes = torch.tensor([len(each) for each in mixed.rows])
        reached = torch.zeros(len(x), len(sites), dtype=torch.bool, device=x.device)
        reached[torch.cat(mixed.rows), torch.arange(len(sites)).repeat_interleave(sizes).to(x.device)] = True
        if among is None:
            total = x.new_zeros(len(x), sites[0].outputs)
            for prunable, own, z, factor in zip(sublayer.prunables, mixed.rows, mixed.z, mixed.factors, strict=False):
                o = prunable.consume(z, factor)
                apart.append(_squares(o, sample.g, rows[own]).sum())
                total = total.index_add(0, own, o)
            jointly.append(_squares(total, sample.g, rows).sum())
        return sublayer.consume(mixed)[:, 0], reached

    steps = removal_costs(run, len(sample.x), sample.g, groups=sites[0].groups, least=sites[0].least)
    alone = float(sum(apart))
    overlap = torch.tensor(float(sum(jointly)) / alone if alone else 1.0, dtype=torch.float64)
    found, last = {f"{site.place}.{OVERLAP}": overlap for site in sites}, 0.0
    for number, cost in steps:
        last = max(cost, last * (1 + 1e-9), 1e-30)
        found[f"{sites[number].place}.{WHOLE}"] = torch.tensor(last, dtype=torch.float64)
    return found


def _squares(change: Tensor, g: Tensor | None, rows: Tensor) -> Tensor:
    """Return ``(gᵀ Δ)²`` (tokens,) float64 of changes (tokens, d_out) at tokens `rows`, or ``‖Δ‖²`` without gradients."""
    return change.double().square().sum(1) if g is None else (change.double() * g[rows].double()).sum(1).square()


@dataclass(frozen=True)
class _Step:
    """What changes if some experts go next: for some tokens, `rows`, their losses and experts."""

    rows: Tensor
    losses: Tensor
    reached: Tensor


def removal_costs(run: Run, tokens: int, g: Tensor | None, *, groups: int = 1, least: int) -> list[tuple[int, float]]:
    """Return the experts that can go, in the order in which they go, with what each adds to the loss.

    In a router with groups one expert of each goes at a time, those that as few tokens reach, and they share their cost. What goes
    next is decided by the tokens that reach it, re-estimated only for what looked cheapest when fewer were gone. Routers may
    change the weights, or the experts, of other tokens too (a softmax over all experts without normalisation, groups that are
    ranked); where the first step shows that, all tokens run again after each.

    Args:
        tokens: number of tokens.
        g: gradients (tokens, d_out); None for ``½ mean ‖Δ_S‖²``.
        groups: groups of consecutive experts of the router.
        least: fewest experts that it needs.
    """
    everything = torch.arange(tokens, device=None if g is None else g.device)
    first = [run(rows, None) for rows in torch.split(everything, TOGETHER)]
    dense, reached = (torch.cat(each) for each in zip(*first, strict=True))
    everything = everything.to(dense.device)
    experts = reached.shape[1]
    losses = torch.zeros(tokens, dtype=torch.float64, device=dense.device)
    stay = set(range(experts))

    def rerun(rows: Tensor, among: Sequence[int]) -> _Step:
        if not len(rows):
            return _Step(rows, losses[rows], reached[rows])
        found = []
        for part in torch.split(rows, TOGETHER):
            o, then = run(part, among)
            found.append((_squares(o - dense[part], g, part) / (2 * tokens), then))
        own, then = (torch.cat(each) for each in zip(*found, strict=True))
        return _Step(rows, own, then)

    def after(leaving: Sequence[int]) -> _Step:
        return rerun(reached[:, list(leaving)].any(1).nonzero()[:, 0], sorted(stay.difference(leaving)))

    size, used = experts // groups, reached.sum(0).tolist()
    ordered = (sorted(range(start, start + size), key=used.__getitem__) for start in range(0, experts, size))
    waiting = [(0.0, -1, leaving) for leaving in zip(*ordered, strict=True)]  # cost, how many were gone then, experts
    found, gone, steps = list[tuple[int, float]](), 0, dict[tuple[int, ...], _Step]()
    others: bool | None = None  # whether other tokens change too
    while waiting and len(stay) - groups >= least:
        cost, known, leaving = heapq.heappop(waiting)
        if known < gone:
            steps[leaving] = step = after(leaving)
            heapq.heappush(waiting, (float(step.losses.sum() - losses[step.rows].sum()), gone, leaving))
            continue
        step = steps[leaving]
        stay.difference_update(leaving)
        if others is not False:
            every, before = rerun(everything, sorted(stay)), float(losses.sum())
            if others is None:
                typical = sum(float(each.losses.sum()) for each in steps.values()) / len(steps)
                others = float(every.losses.sum() - every.losses[step.rows].sum()) > _MATTERS * typical
            if others:
                step, cost = every, float(every.losses.sum()) - before
        steps.clear()
        losses[step.rows], reached[step.rows] = step.losses, step.reached
        gone += 1
        found += [(expert, cost / groups) for expert in leaving]
    return found
