"""Greedy Output Approximation (Li et al., CPAL 2025).

Every site loses the same share.
*Heads*: first those whose attention maps resemble another head's, by mean Jensen-Shannon divergence (eq. 1) below a
threshold τ (algorithm 2); then those of least second moment (sections 3.2.2 and 3.2.3).
*Channels*: those of least second moment (eq. 4).
*Recovery* (algorithms 1, 3, 4), module by module and before units are chosen: fit the producers to their dense outputs
on the pruned stream, then fit the consumer to its dense output. After units are chosen, the kept columns can be fitted
to the output of all of them (ours).

Key/value groups are removed whole. The divergence of two groups is the mean over their query heads (ours).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import ConfigError
from ..maths.divergence import between_units, redundant
from ..maths.refit import others
from ..model.site import Site
from .allocation import Budget, allocate, even_densities, steps
from .obs import ObsRecipe, best, kept_columns, obs_workspace
from .plan import Plan, SitePlan
from .recipe import Findings, Problem, Refit, Survey, Surveyed, Target
from .settings import GreedyOutputSettings


def candidates(d: Tensor, count: int) -> list[int]:
    """Return the first `count` units that become redundant as τ rises.

    If a step of τ makes more than `count` units redundant, return those most similar to a unit that stays.

    Args:
        d: (units, units) float, symmetric: divergence between units.
    """
    if not count:
        return []
    found = next(found for tau in _thresholds(d) if len(found := redundant(d, tau)) >= count)
    stays = others(torch.tensor(found), len(d))
    return sorted(found, key=lambda unit: float(d[unit, stays].min()))[:count]


def rising_thresholds(d: Tensor) -> Tensor:
    """Return the least τ at which each further unit becomes redundant.

    Args:
        d: (units, units) float, symmetric: divergence between units.

    Returns:
        (units,) float64, ascending. The last entry repeats the one before: one unit always stays.
    """
    taus: list[float] = []
    for tau in _thresholds(d):
        taus += [tau] * (len(redundant(d, tau)) - len(taus))
    return torch.tensor([*taus, taus[-1] if taus else 0.0], dtype=torch.float64)


def _thresholds(d: Tensor) -> list[float]:
    """Return every τ at which the redundant set can change, ascending: the next float above each divergence."""
    pairs = torch.tensor(sorted(set(d[~torch.eye(len(d), dtype=torch.bool)].tolist())), dtype=d.dtype)
    return torch.nextafter(pairs, torch.tensor(torch.inf, dtype=pairs.dtype)).tolist()


def _of_attention(sites: Sequence[Site], budget: Budget) -> Budget:
    """Return the budget of attention alone: the same share as of the whole model."""
    whole = sum(site.units * site.unit_parameters for site in sites)
    own = sum(site.units * site.unit_parameters for site in sites if site.kind == "attention")
    return replace(budget, ratio=budget.target / whole, parameters=own, gone=0)


def _as_many_as_can_go(site: Site, units: int, budget: Budget) -> int:
    return max(gone for gone in steps(site, budget) if gone <= units)


class GreedyOutput(ObsRecipe[GreedyOutputSettings]):
    name = "greedy-output"
    summary = "greedy output approximation: similar heads, then units of least second moment; two-step recovery"
    wants_inputs = True
    chooses_apart = False
    """Whether units are chosen by the survey's sums, on a text of its own."""

    def __init__(self, settings: GreedyOutputSettings) -> None:
        super().__init__(settings)
        self.only_similar = settings.heads == "similarity"
        self.recovers_after = settings.recover in ("after", "both")
        self.wants_gram = settings.recover != "off" or not self.only_similar
        if settings.heads != "second-moment":
            self.statistics, self.curve_label = frozenset({"divergence"}), "divergence from the most similar head"
            self.keeps_findings = not self.only_similar
        if settings.recover in ("before", "both"):
            self.compensation, self.target = settings.damping, Target(settings.damping, residual=False)

    def use_metric_text(self) -> None:
        """Choose units on the dense model and the survey's text. Only recovery reads the calibration text."""
        if self.settings.recover == "off":
            raise ConfigError(
                "metric-text is given, and with recover=off nothing reads calibration; give that text as calibration"
            )
        self.statistics = (self.statistics or frozenset()) | {"second-moment"}
        self.wants_inputs, self.keeps_findings, self.chooses_apart = False, True, True

    def digest(self, surveyed: Surveyed) -> dict[str, Tensor]:
        """Return what units are chosen by.

        Returns:
            ``divergence`` (units, units) between every two units of an attention site. With a text of its own, also
            ``energy`` (n,), the mean square of the consumer's input, for attention, and ``inputs`` (d, d), the mean Gram of the
            producers' input, for FFNs.
        """
        site, statistics, found = surveyed.site, surveyed.statistics, {}
        if statistics.divergence is not None:
            found["divergence"] = between_units(statistics.divergence.mean(), site.heads // site.units)
        if statistics.gram is not None:
            found["energy"] = statistics.gram.mean(site.name)[0].diagonal().clone()
        if statistics.inputs is not None:
            found["inputs"] = statistics.inputs.mean(f"{site.name}, inputs")[0]
        return found

    def allocate(self, sites: Sequence[Site], survey: Survey, budget: Budget) -> Plan:
        """Remove the same share at every site; by similarity alone, what τ says of heads and channels for the rest.

        Raises:
            ConfigError: `heads` is similarity, and τ removes more than the ratio, or different numbers of heads where
                the layout needs one number.
        """
        if self.only_similar:
            return self._allocate_by_similarity(sites, survey, budget)
        keep = allocate(sites, even_densities(sites), budget)
        return Plan({name: SitePlan(units) for name, units in keep.items()}, budget.ratio)

    def _allocate_by_similarity(self, sites: Sequence[Site], survey: Survey, budget: Budget) -> Plan:
        """Remove heads by similarity alone, then channels (the same share in every block) for the rest of the budget.

        Linear attention has no maps to compare and keeps all heads.
        """
        attention = [site for site in sites if site.kind == "attention"]
        ffn = [site for site in sites if site.kind == "ffn"]
        divergences = {site.name: survey[site.name]["divergence"] for site in attention}
        if self.settings.tau:
            gone = {
                site.name: _as_many_as_can_go(site, len(redundant(divergences[site.name], self.settings.tau)), budget)
                for site in attention
            }
            if "attention" in budget.alike and len(set(gone.values())) > 1:
                raise ConfigError(
                    f"tau is {self.settings.tau:g}; it removes {sorted(set(gone.values()))} heads per block, and the layout needs one number"
                )
        else:
            part = _of_attention(sites, budget)
            keep = allocate(attention, {name: rising_thresholds(d) for name, d in divergences.items()}, part)
            gone = {site.name: site.units - keep[site.name] for site in attention}
        removed = sum(gone[site.name] * site.unit_parameters for site in attention)
        if removed > budget.target:
            raise ConfigError(
                f"tau is {self.settings.tau:g}; the heads it removes are {removed / budget.parameters:.3f} of the parameters, "
                f"more than the ratio {budget.ratio:g}"
            )
        plan = {site.name: SitePlan(site.units) for site in sites if site.kind == "linear"}
        for site in attention:
            chosen = torch.tensor(candidates(divergences[site.name], gone[site.name]), dtype=torch.int64)
            units = others(chosen, site.units)
            plan[site.name] = SitePlan(len(units), tuple(units.tolist()))
        left = allocate(ffn, even_densities(ffn), replace(budget, gone=budget.gone + removed))
        return Plan({**plan, **{name: SitePlan(units) for name, units in left.items()}}, budget.ratio)

    def select(self, problem: Problem, keep: int) -> Tensor:
        """Return the units with the largest second moment, after similar heads: (keep,) int64, ascending.

        FFN (eq. 4): ``M_j = ½‖B_:j‖² (A_jᵀ Σ A_j)``; a gated FFN takes the product of the moments of (down, up) and
        (down, gate). `B` (d_out, n) is the consumer, `A_j` (d,) a producer's row, `Σ` (d, d) the mean Gram of its input.

        Attention: treat each head's value path as a linear module whose input is the attention-weighted hidden state.
        ``A_jᵀ Σ A_j`` is then the second moment of the consumer's input, the diagonal of H (n, n). A unit's moment is the
        sum over its columns.
        """
        problem.factors.clear()  # Free the Cholesky factor of the target's fit: it is as large as H.
        energy = problem.w.square().sum(dim=0)
        if problem.site.kind != "ffn":
            h = problem.findings["energy"] if self.chooses_apart else problem.gram.diagonal()
            moments = (energy * h.to(energy)).view(problem.site.units, -1).sum(dim=1) / 2
        else:
            inputs = problem.findings["inputs"] if self.chooses_apart else problem.inputs
            assert inputs is not None
            # Work in logarithms: a product of two moments can leave float32's range.
            inputs = inputs.to(energy)
            each = [energy * (a @ inputs).mul_(a).sum(dim=1) / 2 for a in problem.producers]
            moments = torch.stack(each).clamp_min(0).log().sum(dim=0)
        if "divergence" in problem.findings:
            d, gone = problem.findings["divergence"], problem.site.units - keep
            similar = candidates(d, min(gone, len(redundant(d, self.settings.tau))))
            moments[torch.tensor(similar, dtype=torch.int64, device=moments.device)] = -torch.inf
        return best(moments, keep, problem.site.name)

    def reconstruct(self, problem: Problem, kept: Tensor) -> Refit:
        """Restrict the consumer, already fitted on all columns, to the units `kept` (k,) int64.

        OBS-updates the kept columns if `recover` is after or both, otherwise copies them.
        """
        return super().reconstruct(problem, kept) if self.recovers_after else kept_columns(problem, kept)

    def plans_units(self, site: Site) -> bool:
        return self.only_similar and site.kind == "attention"

    def check(self, sites: Sequence[Site], budget: Budget) -> None:
        # By similarity, linear mixers keep all heads.
        super().check([site for site in sites if not (self.only_similar and site.kind == "linear")], budget)

    def foresee(self, sites: Sequence[Site], budget: Budget) -> dict[str, int]:
        """Bound the units that stay: the same share goes everywhere. By similarity alone, attention loses at most its
        own share if τ rises, which bounds the FFN channels; no bound if τ is set."""
        if not self.only_similar:
            return allocate(sites, even_densities(sites), budget)
        if self.settings.tau:
            return {}
        ffn = [site for site in sites if site.kind == "ffn"]
        gone = budget.gone + _of_attention(sites, budget).target
        kept = {site.name: site.units for site in sites if site.kind == "linear"}
        return kept | allocate(ffn, even_densities(ffn), replace(budget, gone=gone))

    def findings(self, site: Site) -> int:
        return site.outputs**2 if self.chooses_apart and site.kind == "ffn" else 0

    def workspace(self, site: Site, keep: int) -> int:
        # Selection needs the Gram of the producers' inputs, (d, d), which is held until then.
        selection = site.outputs**2 + sum(site.linears[:-1]) + max(site.linears[:-1], default=0)
        return max(selection, obs_workspace(site, keep) if self.recovers_after else 0)

    def curve(self, site: Site, findings: Findings) -> Tensor | None:
        """Return the rising thresholds of an attention site, (units,) float64 ascending; None for an FFN site."""
        return rising_thresholds(findings["divergence"]) if site.kind == "attention" else None
