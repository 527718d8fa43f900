"""The ratio where an aim stands in its place: chosen after the survey, among thousandths, by the plans that the recipe makes.

The choice is journalled before the plan, so a resumed job does not choose again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..model.site import Site
from ..model.skeleton import Skeleton, open_skeleton
from ..recipes.recipe import Survey
from ..system.machine import dtype_name
from ..system.units import format_bytes
from .block import left_alone, tokens_seen
from .curves import predicted_loss
from .held_out import perplexity
from .request import Request

if TYPE_CHECKING:
    from .shot import Shot

TRIES = 6
"""Ratios that are pruned, at most, until held-out windows accept one."""
STEPS = 1000
"""Ratios are multiples of one over this."""
Keeps = Mapping[str, int]
"""Units by site name."""


class Fit:
    """The result fits a card of so many bytes."""

    def __init__(self, request: Request) -> None:
        assert request.config.fit is not None
        self.request, self.card = request, request.config.fit
        if not request.sizes.storable(request.format):
            raise ConfigError(
                f"quant is {request.format}; {request.config.model} cannot be stored in it (see --store fp8)"
            )

    def meets(self, keeps: Keeps) -> bool:
        return self.request.sizes.size(keeps, self.request.format, self.request.context).total <= self.card

    def figures(self, keeps: Keeps) -> dict[str, Any]:
        request = self.request
        size = request.sizes.size(keeps, request.format, request.context)
        return {"fit": self.card, "quant": request.format, "context": request.context, **asdict(size)}


class SpeedUp:
    """The result decodes so many times as fast as the dense model (see `speed`)."""

    def __init__(self, request: Request) -> None:
        assert request.config.speedup is not None
        self.request, self.wanted = request, request.config.speedup

    def meets(self, keeps: Keeps) -> bool:
        return self.request.decoding.speed_up(keeps) >= self.wanted

    def figures(self, keeps: Keeps) -> dict[str, Any]:
        request = self.request
        where = {"device": str(request.device), "dtype": dtype_name(request.skeleton.dtype)}
        return {"speedup": self.wanted, "reached": round(request.decoding.speed_up(keeps), 4), **where}


class PerplexityAtMost:
    """Perplexity rises by at most a share: as the recipe's costs predict, corrected by what held-out windows said of earlier tries."""

    def __init__(self, request: Request, survey: Survey, tried: Sequence[Mapping[str, Any]] = ()) -> None:
        assert request.config.perplexity_at_most is not None
        self.request, self.survey, self.most = request, survey, request.config.perplexity_at_most
        self.tried = [each["figures"] for each in tried]
        self.budget = math.log1p(self.most)
        """Predicted loss in nats per token that may be spent."""
        for each in self.tried:
            # The loss was more than predicted by this factor, at which a smaller ratio is predicted too.
            self.budget = min(self.budget, each["predicted"] * math.log1p(self.most) / rise(each))

    def meets(self, keeps: Keeps) -> bool:
        return self._predicted(keeps) <= self.budget

    def figures(self, keeps: Keeps) -> dict[str, Any]:
        tried = {"tried": self.tried} if self.tried else {}
        return {"perplexity_at_most": self.most, "predicted": self._predicted(keeps), **tried}

    def _predicted(self, keeps: Keeps) -> float:
        found = predicted_loss(self.request.recipe, self.request.changeable(self.request.sites), self.survey, keeps)
        assert found is not None
        return found


Aim = Fit | SpeedUp | PerplexityAtMost


def aim_of(request: Request, survey: Survey | None = None, tried: Sequence[Mapping[str, Any]] = ()) -> Aim | None:
    """Return the aim that decides the job's ratio; None if the ratio or a plan is given, or a survey is needed that is not there.

    Args:
        tried: journal lines of larger ratios that held-out windows have refused.
    """
    match request.config.aim:
        case "fit":
            return Fit(request)
        case "speedup":
            return SpeedUp(request)
        case "perplexity_at_most" if survey is not None:
            return PerplexityAtMost(request, survey, tried)
    return None


def rise(figures: Mapping[str, Any]) -> float:
    """Return the loss in nats per token that a result adds on held-out windows."""
    return math.log(figures["perplexity"]) - math.log(figures["dense_perplexity"])


def choose(aim: Aim, keeps: Callable[[float], Keeps]) -> dict[str, Any]:
    """Choose a ratio for an aim: the least that meets it or, for perplexity, the largest. `keeps` gives the units at a ratio.

    Raises:
        ConfigError: no ratio meets the aim.
    """
    if isinstance(aim, PerplexityAtMost):
        # The step below the least ratio that costs too much; and a smaller one than was tried.
        ratio = round(least(lambda ratio: not aim.meets(keeps(ratio))) - 1 / STEPS, 6)
        ratio = min([ratio, removable(aim.request), *(round(each["ratio"] - 1 / STEPS, 6) for each in aim.tried)])
        kept = keeps(max(ratio, 1e-9))
        if all(kept[site.name] == site.units for site in aim.request.sites):
            last = aim.tried[-1:]
            said = [f"; ratio {each['ratio']:g} {describe({'perplexity_at_most': aim.most, **each})}" for each in last]
            raise ConfigError(f"no ratio is predicted to raise perplexity by at most {aim.most:.2%}{''.join(said)}")
    else:
        ratio = least(lambda ratio: aim.meets(keeps(ratio)))
        if not aim.meets(keeps(ratio)):  # experts that saw too few tokens keep everything
            raise ConfigError(f"no ratio meets the aim: the smallest result {describe(aim.figures(keeps(ratio)))}")
    return {"ratio": ratio, "figures": aim.figures(keeps(ratio))}


def describe(figures: Mapping[str, Any]) -> str:
    """Describe the figures that decide on a ratio."""
    if "perplexity_at_most" in figures:
        most = f"at most {figures['perplexity_at_most']:.2%}"
        if "perplexity" not in figures:
            return f"is predicted to raise perplexity by {math.expm1(figures['predicted']):.2%} ({most})"
        return (
            f"raises perplexity on {figures['windows']} held-out windows from {figures['dense_perplexity']:.3f} to "
            f"{figures['perplexity']:.3f}, by {math.expm1(rise(figures)):.2%} ({most})"
        )
    if "speedup" in figures:
        return (
            f"decodes {figures['reached']:.2f} times as fast (asked for {figures['speedup']:g}), by the matrix products of one "
            f"token on {figures['device']} in {figures['dtype']}"
        )
    sizes = [f"{format_bytes(figures[name])} of {name}" for name in ("weights", "cache", "workspace")]
    return (
        f"takes {', '.join(sizes)} of {format_bytes(figures['fit'])}, with weights in {figures['quant']} and a context of "
        f"{figures['context']} tokens"
    )


def fewest(request: Request) -> dict[str, int]:
    """Return the fewest units that sites can keep, by name."""
    return request.evenly(1 - 1e-6)


def removable(request: Request) -> float:
    """Return the largest ratio that the sites can lose, in steps."""
    sites, keeps = request.changeable(request.sites), fewest(request)
    gone = sum(site.removed(keeps[site.name]) for site in sites)
    return gone * STEPS // request.budget(ratio=0.5).parameters / STEPS


def check(request: Request) -> None:
    """Check that the dense model does not meet the job's aim already, and that the smallest result does.

    Raises:
        ConfigError: either; the message has the figures.
    """
    aim = aim_of(request)
    if aim is None:
        return
    model, smallest = request.config.model, fewest(request)
    if aim.meets({}):
        raise ConfigError(f"nothing has to go: {model} as it is {describe(aim.figures({}))}")
    if not aim.meets(smallest):
        raise ConfigError(
            f"{model} with as little as can stay at every site {describe(aim.figures(smallest))}: the aim cannot be met"
        )


def settle(shot: Shot) -> None:
    """Set the job's ratio to the one that its aim has chosen; choose and journal it if that is still to be done."""
    request = shot.job.request
    aim = aim_of(request, shot.survey, shot.steps("tried/"))
    if aim is None:
        return
    line = shot.journalled("ratio")
    if line is None:
        able = partial(reached, survey=shot.survey, alike=shot.experts_alike, whole=request.weighs_experts)
        keeps = plans(request, shot.sites, able, shot.survey)
        line = shot.record("ratio", **shot.ranks.broadcast(lambda: choose(aim, keeps)))
        shot.progress.say(f"with ratio {line['ratio']:g} the result {describe(line['figures'])}")
    request.ratio = line["ratio"]
    request.check_budget()


def accepted(shot: Shot) -> bool:
    """Whether the pruned model meets its aim, where that is only known now: on held-out windows.

    If it does not, the journal is taken back to before the choice, which is then made again with what was found.

    Raises:
        ConfigError: so many ratios were refused that the predictions are of no use.
    """
    job, most = shot.job, shot.job.config.perplexity_at_most
    if most is None:
        return True
    line = shot.journalled("held-out")
    if line is None:
        figures = shot.ranks.broadcast(lambda: _measured(shot))
        line = shot.record("held-out", figures=figures)
    figures, chosen = line["figures"], shot.journalled("ratio")
    assert chosen is not None
    if rise(figures) <= math.log1p(most):
        return True
    said = describe({**chosen["figures"], **figures})
    number = len(shot.steps("tried/")) + 1
    if number == TRIES:
        raise ConfigError(f"{number} ratios were tried; with the last, {chosen['ratio']:g}, the result {said}")
    shot.progress.say(f"with ratio {chosen['ratio']:g} the result {said}: pruning less")
    job.journal.rewind(shot.named("ratio"))
    job.use(job.resources)  # micro-batches that were halved since are whole again
    tried = {"ratio": chosen["ratio"], "predicted": chosen["figures"]["predicted"], **figures}
    shot.record(f"tried/{number}", figures=tried)
    return False


def _measured(shot: Shot) -> dict[str, Any]:
    """Measure the dense and the pruned model on held-out windows."""
    job, tried = shot.job, shot.steps("tried/")
    where = job.cache / "held-out"

    def measure(skeleton: Skeleton) -> float:
        return perplexity(skeleton, job.held_out, job.batch, where, shot.progress)

    dense = tried[0]["figures"]["dense_perplexity"] if tried else measure(job.skeleton)
    pruned = open_skeleton(shot.pruned, job.request.device, dtype_name(job.skeleton.dtype))
    return {"dense_perplexity": dense, "perplexity": measure(pruned), "windows": len(job.held_out.tokens)}


def plans(
    request: Request, sites: Sequence[Site], able: Callable[[Sequence[Site]], Sequence[Site]], survey: Survey
) -> Callable[[float], dict[str, int]]:
    """Return a function from a ratio to the units that the recipe would keep, by site name; see `Request.allocate`."""

    def keeps(ratio: float) -> dict[str, int]:
        plan = request.allocate(sites, able, survey, request.budget(ratio=ratio))
        return {name: entry.keep for name, entry in plan.items()}

    return keeps


def least(meets: Callable[[float], bool]) -> float:
    """Return a ratio that meets the aim while the one a step below does not, by bisection.

    If larger ratios always meet what smaller ones do, it is the least of all. Sizes are an exception where a narrower matrix
    falls back to a larger type, as rows that are no multiple of 256 do in Q4_K_M.
    """
    low, high = 0, STEPS - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if meets(middle / STEPS) else (middle, high)
    return high / STEPS


def reached(sites: Sequence[Site], survey: Survey, *, alike: bool, whole: bool) -> list[Site]:
    """Return all sites except experts that saw fewer tokens than they have channels: those keep everything.

    Args:
        alike: whether all experts must end with the same width, which does not allow that (see `left_alone`).
        whole: whether such experts can go as a whole, which is the only step that they are returned with.
    """
    found = []
    for site in sites:
        seen = tokens_seen(site, survey)
        if seen is None or not left_alone(site, seen, alike=alike):
            found.append(site)
        elif whole and site.goes:
            found.append(replace(site, choices=()))
    return found
