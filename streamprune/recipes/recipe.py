"""The base class of recipes: the statistics that a recipe needs, and its steps digest, allocate, select and reconstruct.

What a recipe needs decides what runs. If it needs gradients, the survey includes a backward sweep. If it needs
Grams, the pruned stream is computed. If it needs neither, no calibration text is read.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..maths.sums import SiteStatistics, Statistic
from ..model.site import Site
from .allocation import Budget, check_budget
from .plan import Plan, units_only
from .settings import SETTINGS

S = TypeVar("S")
WHOLE = "whole"
"""Key of an expert's cost in its findings, where the statistic ``removal`` is taken: with the experts of its block gone that cost less."""
OVERLAP = "overlap"
"""Key of a number beside it, one for all experts of a mixture: the loss, to second order, of what a token's experts add up to, by the
sum of the losses of what each adds. 1 if they have nothing to do with each other, their number if they are the same."""
LOSS = "loss per parameter"
"""The `Recipe.curve_label` of costs in nats per token, divided by the unit's parameters."""
Findings = Mapping[str, Tensor]
"""What a recipe's `digest` kept from the survey of one site."""
Survey = Mapping[str, Findings]
"""Findings by site name. Tensors are read from disk on access."""


@dataclass(frozen=True)
class SiteWeights:
    """One site and its weights."""

    site: Site
    w: Tensor
    """The consumer's weight (d_out, n), float32 or float64."""
    read_producers: Callable[[], tuple[Tensor, ...]]

    @property
    def producers(self) -> tuple[Tensor, ...]:
        """Weights of the producers, (rows, d) each, dtype of `w`; fused ones are split. Read again on every access."""
        return self.read_producers()


@dataclass(frozen=True)
class Surveyed(SiteWeights):
    """One site of the dense model after its survey."""

    statistics: SiteStatistics


@dataclass(frozen=True)
class Problem(SiteWeights):
    """One site of the partly pruned model; `w` is already fitted to the target if the recipe has one."""

    stored: torch.dtype
    """Dtype in which the weight will be stored."""
    zeros: tuple[int, ...] | None
    """Number of weights to zero in each producer and, last, in the consumer; None if whole units are removed."""
    h: Tensor | None
    """Mean Gram of the consumer's input (n, n), dtype of `w`, possibly in host memory; None unless `wants_gram`."""
    inputs: Tensor | None
    """Mean Gram of the producers' input (d, d), dtype of `w`; None unless `wants_inputs`."""
    tokens: int
    """Number of tokens that `h` is the mean of, over all ranks; 0 without `h`."""
    findings: Findings
    """What `digest` kept of the site; empty without a survey."""
    generator: torch.Generator
    """Random generator, seeded for this site."""
    factors: dict[float, Tensor] = field(default_factory=dict)
    """Cholesky factors of H_λ (n, n) already computed, by requested damping. `select` may pop and overwrite them."""

    @property
    def gram(self) -> Tensor:
        """`h` (n, n), which must not be None."""
        assert self.h is not None
        return self.h


@dataclass(frozen=True)
class Target:
    """Target that a consumer is fitted to before units are chosen: its output on the dense model."""

    damping: float
    """Ridge of the fit, relative to the Gram's mean diagonal; see `Recipe.ridge`."""
    residual: bool
    """Add the current error of the residual stream, dense minus pruned, to the target."""


@dataclass(frozen=True)
class Correction:
    """Training of all blocks together at the end of a shot."""

    steps: int
    rank: int | None
    """Rank of the updates, one per linear, which Adam trains; None trains all matrices by normalised gradients."""
    rate: float
    """The highest learning rate; without a rank, in the unit of `correct.step_size`."""
    sequences: int = 8
    """Windows per step."""
    imitates: bool = False
    """Whether the loss is the divergence from the dense model's predictions instead of that of the text's tokens."""


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


class Recipe(ABC, Generic[S]):
    """One pruning method with its `settings`: in an instance their values, in the class their dataclass."""

    name: ClassVar[str]
    summary: ClassVar[str]
    settings: S

    # What the recipe needs.

    statistics: frozenset[Statistic] | None = None
    """Statistics that the survey sums on the dense model. An empty set surveys weights only; None skips the survey."""
    draws_labels: bool = False
    """Whether the loss predicts tokens drawn from the model itself instead of those of the text."""
    keeps_findings: bool = False
    """Whether `reconstruct` needs the survey's findings. If so, the survey runs even when a plan is given."""
    wants_gram: bool = False
    """Whether `select` or `reconstruct` reads the Gram of the consumer's input."""
    wants_inputs: bool = False
    """Whether `select` reads the Gram of the producers' input."""
    compensation: float | None = None
    """Relative damping of the producers' input compensation (see `Recipe.ridge`); None for no compensation."""
    target: Target | None = None
    """Target that consumers are fitted to before units are chosen; None for no such fit."""
    correction: Correction | None = None
    """Low-rank training at the end of each shot, as the recipe is published; None for none."""
    sublayers: bool = False
    """Whether `allocate` may take the last unit of a site, so that its sublayer goes as a whole."""
    ranks_experts: bool = False
    """Whether `expert_cost` says what a whole expert costs."""
    expert_statistics: frozenset[Statistic] = frozenset()
    """Statistics that the survey takes besides, if whole experts are to be ranked."""
    prices_experts: bool = False
    """Whether `allocate` can weigh whole experts against units (see `Budget.experts`)."""
    thins: bool = True
    """Whether units of sites that stay can be removed; otherwise only whole experts go."""
    seeded: bool = False
    """Whether `select` draws from the problem's generator."""
    writes_zeros: bool = False
    """Whether pruning keeps shapes and zeroes weights. The plan then counts zeros, and no unit is removed."""
    after_survey: ClassVar[frozenset[str]] = frozenset()
    """Names of settings that neither `statistics` nor `digest` reads, so that one survey serves all their values."""
    curve_label: str | None = None
    """What the values of `curve` measure; None for a recipe without a cost curve."""

    def __init_subclass__(cls) -> None:
        if "name" in cls.__dict__:
            cls.settings = SETTINGS[cls.name]  # type: ignore[assignment]

    def __init__(self, settings: S) -> None:
        self.settings = settings

    def use_metric_text(self) -> None:
        """Choose units by sums over the survey's text, which is then another than the prune sweep's.

        Raises:
            ConfigError: the recipe has no such form.
        """
        raise ConfigError(f"metric-text is given; recipe {self.name} reads no other text than calibration")

    # Its steps.

    def digest(self, surveyed: Surveyed) -> dict[str, Tensor]:
        """Reduce the statistics of a site to what `allocate` and `reconstruct` need."""
        return {}

    @abstractmethod
    def allocate(self, sites: Sequence[Site], survey: Survey, budget: Budget) -> Plan:
        """Decide how many units, or zeros, each site loses."""

    @abstractmethod
    def select(self, problem: Problem, keep: int) -> Tensor:
        """Select `keep` units that stay: (keep,) int64, ascending."""

    @abstractmethod
    def reconstruct(self, problem: Problem, kept: Tensor) -> Refit:
        """Compute the new weights, given the kept units (k,) int64, ascending."""

    def ridge(self, damping: float, columns: int, tokens: int) -> float:
        """Return the relative damping of a fit of `columns` inputs to `tokens` tokens, for which the recipe states `damping`.

        Fits are the compensation, the fit to the target and the refit.
        """
        return damping

    def expert_cost(self, site: Site, findings: Findings, generator: torch.Generator) -> float:
        """Return what a routed expert costs if it goes as a whole, comparable with the others. Only if `ranks_experts`.

        Infinity for one that has to stay because the router needs it.

        Args:
            findings: what the survey keeps of it; empty without a survey.
            generator: seeded for this site.
        """
        return float(findings[WHOLE]) if WHOLE in findings else math.inf

    # What is known or checked before the work starts.

    def shots(self, ratio: float) -> int:
        """Return the number of shots in which to remove `ratio`."""
        return 1

    def foresee(self, sites: Sequence[Site], budget: Budget) -> Mapping[str, int]:
        """Return upper bounds on the units kept, known before the survey, at sites whose count the survey does not decide."""
        return {}

    def check(self, sites: Sequence[Site], budget: Budget) -> None:
        """Raise ConfigError for a budget that cannot be met."""
        check_budget(sites, budget)

    def check_plan(self, sites: Sequence[Site], plan: Plan, where: str) -> None:
        """Raise ConfigError for a plan that fits the model but not the recipe; `where` names the plan's source."""
        units_only(sites, plan, where)

    def plans_units(self, site: Site) -> bool:
        """Return whether the plan says which units of the site stay, not only how many."""
        return False

    def findings(self, site: Site) -> int:
        """Return the number of elements that `digest` stores on disk for a site; 0 if they are few enough to ignore."""
        return 0

    def workspace(self, site: Site, keep: int) -> int:
        """Return the peak elements that `select` and `reconstruct` hold besides the site's W and H, if at most `keep` units stay."""
        return 0

    def digest_workspace(self, site: Site) -> int:
        """Return the peak elements that `digest` holds besides the site's W and statistics."""
        return 0

    def curve(self, site: Site, findings: Findings) -> Tensor | None:
        """Return the cost of each further removed unit, (units,) ascending; None without a curve. `allocate` decides by it, unless whole
        experts can go as well."""
        return None
