"""A method as data: which statistics it needs, and its digest, allocate, select and reconstruct functions.

Nothing else is configured: a recipe that wants a gradient gets a backward sweep, one that wants Grams
gets the pruned stream, one that wants neither needs no text at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ..maths.sums import SiteStatistics, Statistic
from ..model.site import Site
from .allocation import Budget, check_budget
from .plan import Plan, units_only
from .settings import SETTINGS

S = TypeVar("S")


Findings = Mapping[str, Tensor]
"""What a recipe kept of one site's survey."""
Survey = Mapping[str, Findings]
"""Findings by site name; tensors are read from the disk when they are asked for."""
Producers = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Surveyed:
    """One site of the dense model after its survey."""

    site: Site
    w: Tensor
    """The consumer's weight (d_out, n), float32 or float64."""
    read_producers: Producers
    statistics: SiteStatistics

    @property
    def producers(self) -> tuple[Tensor, ...]:
        """The producers' weights (rows, d), same dtype; a fused one in its parts. Read anew each time."""
        return self.read_producers()


@dataclass(frozen=True)
class Problem:
    """One site as a method sees it, on the model pruned so far."""

    site: Site
    w: Tensor
    """The consumer's weight (d_out, n), float32 or float64; fitted to the target already, where the recipe has one."""
    stored: torch.dtype
    """What it will be stored in."""
    read_producers: Producers
    zeros: tuple[int, ...] | None
    """Weights to make zero in each producer and, last, in the consumer; None where units go instead."""
    h: Tensor | None
    """Mean Gram of the consumer's input (n, n), same dtype, perhaps parked on the host; None unless the recipe wants it."""
    inputs: Tensor | None
    """Mean Gram of the producers' input (d, d), same dtype; None unless the recipe wants it."""
    findings: Findings
    """What `digest` kept of the site; empty without a survey."""
    generator: torch.Generator
    """Seeded for this site."""
    factors: dict[float, Tensor] = field(default_factory=dict)
    """Factors of H_λ that were made on the way here, by the damping asked for: to be popped and overwritten by `select`."""

    @property
    def producers(self) -> tuple[Tensor, ...]:
        """The producers' weights (rows, d), same dtype. Read anew each time: most methods need none of them."""
        return self.read_producers()

    @property
    def gram(self) -> Tensor:
        """`h`, which must be there."""
        assert self.h is not None
        return self.h


@dataclass(frozen=True)
class Target:
    """What a consumer is fitted to before units are chosen: its output on the dense model."""

    damping: float
    """Ridge of the fit, relative to the Gram's mean diagonal."""
    residual: bool
    """Add what the residual stream lacks by now, dense minus pruned."""


@dataclass(frozen=True)
class Correction:
    """Low-rank steps on the language modelling loss after each shot."""

    steps: int
    rank: int
    rate: float
    """Adam's, at the first step."""


@dataclass(frozen=True)
class Refit:
    """What stays of a site's weights."""

    w: Tensor
    """The consumer's, (d_out, k)."""
    damping: float | None = None
    """Relative damping that it took; None where nothing was solved, or no re-fit was better than none."""
    producers: tuple[Tensor, ...] | None = None
    """The producers', all rows, (rows, d) each; None leaves them as they are."""
    step: float = 1.0
    """The least part of a linear's update that was taken, where all of it would have done harm."""


@dataclass(frozen=True)
class Curve:
    """What decides how many units a site loses, for people to see."""

    label: str
    """What its numbers are."""
    values: Callable[[Site, Findings], Tensor | None]
    """What each further removed unit costs, (units,) ascending, as `allocate` weighs it; None or empty for a site without."""


@dataclass(frozen=True)
class Recipe(Generic[S]):
    """One method with settings of type `S`, a frozen dataclass."""

    name: str
    summary: str
    allocate: Callable[[S, Sequence[Site], Survey, Budget], Plan]
    select: Callable[[S, Problem, int], Tensor]
    """That many units to keep, (k,) ascending."""
    reconstruct: Callable[[S, Problem, Tensor], Refit]
    statistics: Callable[[S], frozenset[Statistic] | None] = lambda settings: None
    """What the survey sums on the dense model; the empty set for one of the weights alone, None for no survey."""
    draws_labels: Callable[[S], bool] = lambda settings: False
    """Whether gradients are those of predicting what the model itself draws, instead of the text."""
    digest: Callable[[S, Surveyed], dict[str, Tensor]] = lambda settings, surveyed: {}
    """What of them `allocate` and `reconstruct` will need."""
    wants_gram: Callable[[S], bool] = lambda settings: False
    wants_inputs: Callable[[S], bool] = lambda settings: False
    compensation: Callable[[S], float | None] = lambda settings: None
    """Relative damping of the producers' input compensation; None for none."""
    target: Callable[[S], Target | None] = lambda settings: None
    shots: Callable[[S, float], int] = lambda settings, ratio: 1
    """In how many shots that ratio is removed."""
    correction: Callable[[S], Correction | None] = lambda settings: None
    """What each shot ends with."""
    foresee: Callable[[S, Sequence[Site], Budget], Mapping[str, int]] = lambda settings, sites, budget: {}
    """Where there is a survey: how many units stay at most of those sites in whose number it has no say."""
    check: Callable[[S, Sequence[Site], Budget], None] = lambda settings, sites, budget: check_budget(sites, budget)
    """Refuses a budget that cannot be met, before any work."""
    check_plan: Callable[[S, Sequence[Site], Plan, str], None] = lambda settings, sites, plan, where: units_only(
        sites, plan, where
    )
    """Refuses a plan, which fits the model, that the recipe cannot follow; the text says where it stands."""
    plans_units: Callable[[S, Site], bool] = lambda settings, site: False
    """Whether the plan says which units of the site stay, not only how many."""
    keeps_findings: Callable[[S], bool] = lambda settings: False
    """Whether `reconstruct` needs the survey's findings: then a plan that is given does not spare the survey."""
    findings: Callable[[S, Site], int] = lambda settings, site: 0
    """How many numbers `digest` keeps of a site where they are too many to pass over: they wait on the disk."""
    work: Callable[[S, Site, float], float] = lambda settings, site, keep: 0.0
    """Operations of `select` and `reconstruct` where so many units stay, in leading terms."""
    digest_work: Callable[[S, Site], float] = lambda settings, site: 0.0
    """Operations of `digest`."""
    workspace: Callable[[S, Site, int], int] = lambda settings, site, keep: 0
    """How many numbers `select` and `reconstruct` hold at most beside the site's W and H where no more units stay than that."""
    digest_workspace: Callable[[S, Site], int] = lambda settings, site: 0
    """How many numbers `digest` holds at most beside the site's W and statistics."""
    curve: Callable[[S], Curve | None] = lambda settings: None
    """What the survey's findings say a unit costs; None for a recipe that does not ask."""
    seeded: bool = False
    """Whether `select` draws from the problem's generator."""
    writes_zeros: Callable[[S], bool] = lambda settings: False
    """Whether shapes stay and weights become zero: the plan then counts zeros, and no unit goes."""

    @property
    def settings(self) -> type[S]:
        """The dataclass of its settings; each field's metadata has its ``help``, ``choices`` and ``limits``."""
        return SETTINGS[self.name]
