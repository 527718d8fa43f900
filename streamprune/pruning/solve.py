"""One site, once its Gram is summed: fit the consumer to its target, select units, refit what stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CalibrationError, NumericalError
from ..jobs.forecast.memory import GramPlace
from ..maths.flops import kind
from ..maths.refit import all_finite, cholesky, fit, output_error, unit_columns
from ..maths.sums import Gram
from ..model.block import Prunable
from ..model.site import Site
from ..recipes.plan import Plan
from ..recipes.recipe import Problem, Recipe, Refit, Survey, Target

CPU = torch.device("cpu")
SEEN = "seen"
"""Key in an expert's findings: the number of tokens that reached it."""


@dataclass(frozen=True)
class Solved:
    """The result for one site, without its weights."""

    report: dict[str, Any]
    kept: list[int] | None = None
    """Units that stay, ascending; None if nothing is removed."""


@dataclass(frozen=True)
class SiteSolver:
    """Compute the new weights of any site of a model."""

    recipe: Recipe[Any]
    plan: Plan
    survey: Survey
    """Findings of the dense model; empty without a survey."""
    seed: int
    experts_alike: bool
    """Whether all experts must end with the same width."""
    device: torch.device
    """Where the model computes."""
    grams: GramPlace = "device"

    @property
    def place(self) -> torch.device:
        """Where the Gram is summed and the site is solved."""
        return CPU if self.grams == "host" else self.device

    @property
    def target(self) -> Target | None:
        """What consumers are fitted to; None if the recipe has no target."""
        return self.recipe.target

    def changes(self, site: Site) -> bool:
        """Whether the plan removes units of a site or zeroes some of its weights."""
        entry = self.plan[site.name]
        return entry.keep < site.units or any(entry.zeros or ())

    def counts(self, site: Site) -> dict[str, Any]:
        """The first entries of a site's report: its units, or the zeros among its weights."""
        counts: dict[str, Any] = {"site": site.name, "units": site.units}
        if self.recipe.writes_zeros:
            counts |= {"zeros": sum(self.plan[site.name].zeros or ()), "weights": sum(site.linears)}
        return counts

    @kind("solving")
    def solve(
        self, prunable: Prunable, sums: Gram | None, inputs: Tensor | None, aims: bool
    ) -> tuple[Solved, list[Tensor]]:
        """Fit to the target, select and refit, as far as the plan and the recipe ask for it.

        Args:
            sums: sums over tokens of the consumer's input, used up here: H (n, n) and, with `aims`, C (d_out, n).
            inputs: mean Gram of the producers' input (d, d); None unless the recipe wants it.
            aims: whether the consumer is fitted to its target first.

        Returns:
            The result, and the new weights: none if nothing changes, else the consumer's (d_out, k), then the
            producers' (rows, d) if they change.

        Raises:
            NumericalError: sums or weights hold NaN or Inf.
            CalibrationError: too few tokens reached an expert that may not be left alone.
        """
        site, report = prunable.site, self._tokens(prunable.site, sums)
        changes = self.changes(site)
        if report.get("left_alone") or not (changes or aims):
            return Solved({**untouched(site), **report}), []
        w, factors = prunable.weight(prunable.consumer).to(self.place), dict[float, Tensor]()
        h, c = (None, None) if sums is None else self._means(sums, site, w.dtype)
        del sums
        if aims:
            assert h is not None
            assert c is not None
            w, report["target_damping"] = self._fit_to_target(site, w, h, c, factors)
        del c
        if not changes:
            return Solved({**untouched(site), **report}), [w]
        problem = self._problem(prunable, w, h, inputs, factors)
        kept = self._select(problem)
        refit = self.recipe.reconstruct(problem, kept)
        report |= self._outcome(problem, kept, refit)
        return Solved(report, kept.tolist()), [refit.w, *(refit.producers or ())]

    def _tokens(self, site: Site, sums: Gram | None) -> dict[str, Any]:
        """The tokens that an expert saw, for its report; empty if the site has no router."""
        seen = tokens_seen(site, self.survey) if sums is None else sums.rows
        if site.expert is None or seen is None:
            return {}
        report: dict[str, Any] = {"tokens": seen}
        if left_alone(site, seen, alike=self.experts_alike and self.changes(site)):
            report |= {"left_alone": True, **({"zeros": 0} if self.plan[site.name].zeros is not None else {})}
        return report

    def _means(self, sums: Gram, site: Site, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """H (n, n) and C (d_out, n) per token, in `dtype`; H waits on the host if Grams are parked there."""
        if self.grams == "parked":
            sums.park()
        h, c = sums.mean(site.name)
        return h.to(dtype), None if c is None else c.to(dtype)

    def _fit_to_target(
        self, site: Site, w: Tensor, h: Tensor, c: Tensor, factors: dict[float, Tensor]
    ) -> tuple[Tensor, float]:
        """Fit the consumer to its target: see `maths.refit.fit`.

        Args:
            w: (d_out, n), float32 or float64.
            h: (n, n), mean Gram of the consumer's input, same dtype.
            c: (d_out, n), mean of target times input, same dtype.
            factors: receives the factor (n, n) of H_λ under the damping asked for, so that `select` may reuse it.

        Returns:
            The fitted weight (d_out, n), and the damping that it took.
        """
        assert self.target is not None
        damping = self.target.damping
        factors[damping], used = cholesky(h, damping, site.name, device=self.place)
        w = fit(w, h, c, factors[damping])
        if not all_finite(w):
            raise NumericalError(f"{site.name}: the fit to the target is not finite")
        return w, used

    def _problem(
        self, prunable: Prunable, w: Tensor, h: Tensor | None, inputs: Tensor | None, factors: dict[float, Tensor]
    ) -> Problem:
        """The site as its recipe sees it: w (d_out, n), h (n, n), inputs (d, d), and factors (n, n) by damping."""
        site = prunable.site
        return Problem(
            site=site,
            w=w,
            stored=prunable.stored,
            read_producers=lambda: tuple(each.to(self.place) for each in prunable.producer_weights()),
            zeros=self.plan[site.name].zeros,
            h=h,
            inputs=inputs,
            findings=self.survey.get(site.name, {}),
            generator=_generator(self.seed, site),
            factors=factors,
        )

    def _select(self, problem: Problem) -> Tensor:
        """The units that stay (k,) int64, ascending: all, those that the plan names, or the recipe's choice."""
        site, entry = problem.site, self.plan[problem.site.name]
        if entry.keep == site.units:
            kept = torch.arange(site.units)
        elif self.recipe.plans_units(site):
            assert entry.units is not None
            kept = torch.tensor(entry.units)
        else:
            kept = self.recipe.select(problem, entry.keep)
        problem.factors.clear()
        assert kept.numel() == entry.keep
        assert bool((kept.diff() > 0).all())
        return kept

    def _outcome(self, problem: Problem, kept: Tensor, refit: Refit) -> dict[str, Any]:
        """The figures of a refit for the report, its output error among them."""
        columns = unit_columns(kept, problem.site.width).to(problem.w.device)
        error = None if problem.h is None else output_error(problem.w, problem.h, refit.w, columns)
        report = {"kept": kept.numel(), "error": error, "damping": refit.damping}
        return report | ({"step": refit.step} if refit.step < 1 else {})


def tokens_seen(site: Site, survey: Survey) -> int | None:
    """How many tokens reached an expert in the survey; None if there was no survey, or it counted nothing."""
    if site.expert is None or not survey:
        return None
    findings = survey[site.name]
    return int(findings[SEEN]) if SEEN in findings else None


def left_alone(site: Site, tokens: int, *, alike: bool) -> bool:
    """Whether an expert keeps everything because fewer tokens reached it than it has channels.

    Raises:
        CalibrationError: it would be left alone, but the layout needs all experts alike.
    """
    if site.expert is None or tokens >= site.columns:
        return False
    if alike:
        raise CalibrationError(
            f"{site.name} saw {tokens} tokens, fewer than its {site.columns} channels, and the uniform layout cannot leave "
            "it alone; more --samples, or --layout free"
        )
    return True


def untouched(site: Site) -> dict[str, Any]:
    """The report of a site that keeps everything."""
    return {"kept": site.units, "error": 0.0, "damping": None, "seconds": 0.0}


def _generator(seed: int, site: Site) -> torch.Generator:
    """A generator for this site alone, so that the order of sites does not matter."""
    place = (seed * 1_000_003 + site.block) * 2 + (site.kind == "ffn")
    return torch.Generator().manual_seed((place + 7_919_000_029 * (site.expert or 0)) % 2**63)
