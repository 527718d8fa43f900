"""Explain why a job does not remove what it was asked to remove, to within one unit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..model.site import Site
from ..recipes.allocation import Budget, steps

REMEDY = "raise --samples or --seq-len"


@dataclass(frozen=True)
class Goal:
    """What a job has to remove."""

    sites: Sequence[Site]
    """Sites that may change."""
    budget: Budget
    target: int
    """Number of parameters to remove or to zero."""
    slack: int
    """Parameters by which a result may miss the target: those of one unit or, if shapes stay, those outside linears."""
    what: str
    """What the ratio counts, for messages."""
    zeros: bool
    """Whether shapes stay and weights become zero."""
    plan: str | None
    """The plan file that sets the target, if one was given."""

    def missed(self, gone: int, reports: Sequence[Mapping[str, Any]]) -> str | None:
        """Explain why `gone` parameters miss the target, given the sites' reports; None if they meet it."""
        if abs(self.target - gone) <= self.slack:
            return None
        experts = {site.name for site in self.sites if site.expert is not None}
        alone = [report for report in reports if report.get("left_alone") and report["site"] in experts]
        reason = self._steps()
        if alone:
            least = min(alone, key=lambda report: int(report["tokens"]))
            reason = (
                f"{len(alone)} of {len(experts)} experts keep all their channels, because fewer calibration tokens reached "
                f"them than they have channels ({least['site']}: {least['tokens']} tokens, {least['kept']} channels); {REMEDY}"
            )
        return self._explain("made zero" if self.zeros else "removed", gone, reason)

    def foreseen(self, keeps: Mapping[str, int] | None, tokens: int | None) -> str | None:
        """Explain why the target cannot be met, if that is certain before the work starts; else None.

        Args:
            keeps: units to keep by site name, if known.
            tokens: number of calibration tokens; None if the tokens that reach each expert are not counted.
        """
        most = sum(self._removable(site, keeps) for site in self.sites if site.expert is None)
        experts: dict[int, list[Site]] = {}
        for site in self.sites:
            if site.expert is not None:
                experts.setdefault(site.block, []).append(site)
        reason = self._steps()
        for each in experts.values():
            reached, columns = len(each), min(site.columns for site in each)
            if tokens is not None:
                visits = round(tokens * sum(site.share for site in each))
                reached = min(reached, visits // columns) if tokens >= columns else 0
            if reached < len(each):
                reason = (
                    f"of {tokens} calibration tokens at most {reached} of a block's {len(each)} experts can see as many as "
                    f"they have channels ({columns}), and the other experts keep all their channels; {REMEDY}"
                )
            most += sum(sorted((self._removable(site, keeps) for site in each), reverse=True)[:reached])
        if self.target - most <= self.slack:
            return None
        return self._explain(f"can {'make zero' if self.zeros else 'remove'} at most", most, reason)

    def _removable(self, site: Site, keeps: Mapping[str, int] | None) -> int:
        if self.zeros:
            return sum(site.linears)
        if keeps is not None:
            return site.removed(keeps[site.name])
        return site.removed(site.units - steps(site, self.budget)[-1])

    def _steps(self) -> str:
        if self.plan is not None:
            return f"the plan {self.plan} decides what stays"
        if self.budget.alike:
            return "the next step of this layout, the same in all blocks, would remove too much; --layout free has smaller steps"
        return "no further step fits; a smaller --round-to has smaller steps"

    def _explain(self, verb: str, gone: int, reason: str) -> str:
        whole = self.budget.parameters
        return f"{verb} {gone / whole:.2%} of {self.what} instead of {self.target / whole:.2%}: {reason}"
