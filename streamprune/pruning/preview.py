"""What each ratio would give, before anything is removed: sizes, speed and, from a kept survey, the predicted loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..errors import ConfigError
from ..jobs.config import Config
from ..system.progress import Progress
from . import archive
from .aim import aim_of, choose, plans, reached
from .curves import predicted_loss
from .request import Request

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)


@dataclass(frozen=True)
class Outcome:
    """A result at one ratio."""

    ratio: float
    """0 for the dense model."""
    parameters: int
    weights: Mapping[str, int | None]
    """Bytes of all tensors by format (see `model.formats`); None where the model cannot be stored so."""
    cache: int
    """Bytes of one sequence's cache."""
    speedup: float
    """How many times as fast as the dense model it decodes, by a measured table (see `pruning.speed`)."""
    loss: float | None
    """Predicted loss in nats per token, added to the dense model's; None without a kept survey that prices loss."""


@dataclass(frozen=True)
class Preview:
    """Outcomes at several ratios."""

    outcomes: tuple[Outcome, ...]
    """By ratio, ascending, from the dense model; ratios that the recipe cannot reach are left out."""
    chosen: float | None
    """The ratio that the job's aim would choose; None without one."""
    surveyed: bool
    """Whether widths are those of the job: from a kept survey, or of a recipe that takes none. Otherwise all sites lose the same share."""
    context: int
    """Tokens of the cache."""


def preview(config: Config, ratios: Sequence[float] = RATIOS, *, progress: Progress | None = None) -> Preview:
    """Work out what each ratio, and the config's own, would give. Reads no weights and writes nothing.

    With `Config.survey`, widths and predicted losses come from the survey that the folder holds.

    Raises:
        ConfigError: the settings keep all shapes, so that nothing becomes smaller.
    """
    request = Request(config, progress)
    if request.recipe.writes_zeros:
        raise ConfigError(f"recipe {request.recipe.name} keeps all shapes with these settings, whatever the ratio")
    survey = archive.SurveyFiles(request.config.survey, request.sites) if archive.find(request) else None  # type: ignore[arg-type]
    keeps, surveyed = _keeps(request, survey)
    aim = aim_of(request, survey)
    chosen = None if aim is None else choose(aim, keeps)["ratio"]
    wanted = {*(ratios if request.thins else ()), *(each for each in (request.ratio, chosen) if each is not None)}
    outcomes = [_outcome(request, 0.0, {site.name: site.units for site in request.sites}, survey)]
    for ratio in sorted(wanted):
        try:
            if request.thins:
                request.check_budget(ratio)
        except ConfigError:
            continue
        outcomes.append(_outcome(request, ratio, keeps(ratio), survey))
    return Preview(tuple(outcomes), chosen, surveyed, request.context)


def _keeps(request: Request, survey: Any) -> tuple[Callable[[float], dict[str, int]], bool]:
    """Return a function from a ratio to units by site name, and whether these are what the job would keep."""
    known = survey is not None or (request.recipe.statistics is None and request.shots == 1)
    if known:
        alike = "experts" in request.skeleton.layout.alike
        able = partial(reached, survey=survey or {}, alike=alike, whole=request.weighs_experts)
        return plans(request, request.sites, able, survey or {}), True
    whole = {site.name: site.units for site in request.sites}
    return lambda ratio: whole | request.evenly(ratio), False


def _outcome(request: Request, ratio: float, keeps: Mapping[str, int], survey: Any) -> Outcome:
    sizes = request.sizes
    gone = sum(site.removed(keeps[site.name]) for site in request.sites)
    sites = request.changeable(request.sites)
    return Outcome(
        ratio=ratio,
        parameters=request.skeleton.parameters() - gone,
        weights=sizes.in_formats(keeps),
        cache=sizes.cache(keeps, request.context),
        speedup=round(request.decoding.speed_up(keeps), 4),
        loss=None if survey is None else predicted_loss(request.recipe, sites, survey, keeps),
    )
