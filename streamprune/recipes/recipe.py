"""A recipe as data: the statistics it needs, and its digest, allocate, select and reconstruct functions.

The needs of a recipe decide what runs. If it needs gradients, the survey includes a backward sweep. If it needs
Grams, the pruned stream is computed. If it needs neither, no calibration text is read.
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
"""What a recipe's `digest` kept from the survey of one site."""
Survey = Mapping[str, Findings]
"""Findings by site name. Tensors are read from disk on access."""
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
        """Weights of the producers, (rows, d) each, dtype of `w`; fused ones are split. Read again on every access."""
        return self.read_producers()


@dataclass(frozen=True)
class Problem:
    """One site of the partly pruned model, as a recipe sees it."""

    site: Site
    w: Tensor
    """The consumer's weight (d_out, n), float32 or float64; already fitted to the target if the recipe has one."""
    stored: torch.dtype
    """Dtype in which the weight will be stored."""
    read_producers: Producers
    zeros: tuple[int, ...] | None
    """Number of weights to zero in each producer and, last, in the consumer; None if whole units are removed."""
    h: Tensor | None
    """Mean Gram of the consumer's input (n, n), dtype of `w`, possibly in host memory; None unless `wants_gram`."""
    inputs: Tensor | None
    """Mean Gram of the producers' input (d, d), dtype of `w`; None unless `wants_inputs`."""
    findings: Findings
    """What `digest` kept of the site; empty without a survey."""
    generator: torch.Generator
    """Random generator, seeded for this site."""
    factors: dict[float, Tensor] = field(default_factory=dict)
    """Cholesky factors of H_λ (n, n) already computed, by requested damping. `select` may pop and overwrite them."""

    @property
    def producers(self) -> tuple[Tensor, ...]:
        """Weights of the producers, (rows, d) each, dtype of `w`. Read again on every access: few recipes need them."""
        return self.read_producers()

    @property
    def gram(self) -> Tensor:
        """`h` (n, n), which must not be None."""
        assert self.h is not None
        return self.h


@dataclass(frozen=True)
class Target:
    """Target that a consumer is fitted to before units are chosen: its output on the dense model."""

    damping: float
    """Ridge of the fit, relative to the Gram's mean diagonal."""
    residual: bool
    """Add the current error of the residual stream, dense minus pruned, to the target."""


@dataclass(frozen=True)
class Correction:
    """Low-rank training on the language modelling loss after each shot."""

    steps: int
    rank: int
    rate: float
    """Adam's learning rate at the first step."""


@dataclass(frozen=True)
class Refit:
    """The new weights of a site."""

    w: Tensor
    """Weight of the consumer, (d_out, k): k kept columns."""
    damping: float | None = None
    """Relative damping used; None if nothing was solved, or if no refit improved on the unchanged weights."""
    producers: tuple[Tensor, ...] | None = None
    """Weights of the producers with all their rows, (rows, d) each; None leaves them unchanged."""
    step: float = 1.0
    """Smallest fraction of a linear's update that was applied; below 1 where the full update would add loss."""


@dataclass(frozen=True)
class Curve:
    """The cost curve that decides how many units a site loses, for display."""

    label: str
    """What the values measure."""
    values: Callable[[Site, Findings], Tensor | None]
    """Cost of each further removed unit as `allocate` uses it, (units,) ascending; None or empty without a curve."""


@dataclass(frozen=True)
class Recipe(Generic[S]):
    """One pruning method, with settings of type `S`, a frozen dataclass."""

    name: str
    summary: str
    allocate: Callable[[S, Sequence[Site], Survey, Budget], Plan]
    select: Callable[[S, Problem, int], Tensor]
    """Select the given number of units to keep: (k,) int64, ascending."""
    reconstruct: Callable[[S, Problem, Tensor], Refit]
    """Compute the new weights, given the kept units (k,) int64, ascending."""
    statistics: Callable[[S], frozenset[Statistic] | None] = lambda settings: None
    """Statistics that the survey sums on the dense model. An empty set surveys weights only; None skips the survey."""
    draws_labels: Callable[[S], bool] = lambda settings: False
    """Whether the loss predicts tokens drawn from the model itself instead of those of the text."""
    digest: Callable[[S, Surveyed], dict[str, Tensor]] = lambda settings, surveyed: {}
    """Reduce the statistics to what `allocate` and `reconstruct` need."""
    wants_gram: Callable[[S], bool] = lambda settings: False
    wants_inputs: Callable[[S], bool] = lambda settings: False
    compensation: Callable[[S], float | None] = lambda settings: None
    """Relative damping of the producers' input compensation; None for no compensation."""
    target: Callable[[S], Target | None] = lambda settings: None
    shots: Callable[[S, float], int] = lambda settings, ratio: 1
    """Number of shots in which to remove the given ratio."""
    correction: Callable[[S], Correction | None] = lambda settings: None
    """Low-rank training at the end of each shot; None for none."""
    foresee: Callable[[S, Sequence[Site], Budget], Mapping[str, int]] = lambda settings, sites, budget: {}
    """Upper bounds on the units kept, known before the survey, at sites whose count the survey does not decide."""
    check: Callable[[S, Sequence[Site], Budget], None] = lambda settings, sites, budget: check_budget(sites, budget)
    """Raise ConfigError for a budget that cannot be met, before any work starts."""
    check_plan: Callable[[S, Sequence[Site], Plan, str], None] = lambda settings, sites, plan, where: units_only(
        sites, plan, where
    )
    """Raise ConfigError for a plan that fits the model but not the recipe; the string names the plan's source."""
    plans_units: Callable[[S, Site], bool] = lambda settings, site: False
    """Whether the plan says which units of the site stay, not only how many."""
    keeps_findings: Callable[[S], bool] = lambda settings: False
    """Whether `reconstruct` needs the survey's findings. If so, the survey runs even when a plan is given."""
    findings: Callable[[S, Site], int] = lambda settings, site: 0
    """Number of elements that `digest` stores on disk for a site; 0 if they are few enough to ignore."""
    work: Callable[[S, Site, float], float] = lambda settings, site, keep: 0.0
    """FLOPs of `select` and `reconstruct` for the given number of kept units, leading terms only."""
    digest_work: Callable[[S, Site], float] = lambda settings, site: 0.0
    """FLOPs of `digest`, leading terms only."""
    workspace: Callable[[S, Site, int], int] = lambda settings, site, keep: 0
    """Peak elements that `select` and `reconstruct` hold besides the site's W and H, given the most units kept."""
    digest_workspace: Callable[[S, Site], int] = lambda settings, site: 0
    """Peak elements that `digest` holds besides the site's W and statistics."""
    curve: Callable[[S], Curve | None] = lambda settings: None
    """Cost curve from the survey's findings; None for a recipe without one."""
    seeded: bool = False
    """Whether `select` draws from the problem's generator."""
    writes_zeros: Callable[[S], bool] = lambda settings: False
    """Whether pruning keeps shapes and zeroes weights. The plan then counts zeros, and no unit is removed."""

    @property
    def settings(self) -> type[S]:
        """The dataclass of the recipe's settings; each field's metadata holds ``help``, ``choices`` and ``limits``."""
        return SETTINGS[self.name]
