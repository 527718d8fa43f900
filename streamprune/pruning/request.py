"""What a job was asked to do, parsed and checked against the model: no files, no state."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

import torch

from ..errors import CheckpointError, ConfigError
from ..jobs.config import (
    AUTO,
    DATA_FREE,
    IMITATION_RATE,
    IMITATION_SEQUENCES,
    IMITATION_SMALL,
    IMITATIONS,
    REFINE_SEQUENCES,
    Config,
    DataFree,
    Effort,
)
from ..jobs.forecast.workload import Workload
from ..jobs.schedule import Phase
from ..maths.flops import kind
from ..maths.sums import Statistic
from ..model import fp8, hub, write
from ..model.architectures import kept_heads
from ..model.formats import GGUF_FORMATS, Format
from ..model.modeling_streamprune import stock_class
from ..model.site import DECILM, LAYOUTS, UNIFORM, Site
from ..model.sizes import CONTEXT, Sizes
from ..model.skeleton import Skeleton, open_skeleton
from ..model.tokenizer import end_tokens, find_bos, load_tokenizer
from ..recipes.allocation import COARSER, ROUND_TO, Budget, allocate, even_densities, largest_unit
from ..recipes.experts import Experts, check, leaving
from ..recipes.plan import Plan, SitePlan
from ..recipes.recipe import LOSS, Correction, Recipe, Survey
from ..recipes.registry import RECIPES
from ..recipes.settings import parse
from ..stream.generate import Writing
from ..system import machine
from ..system.progress import Progress
from ..system.ranks import ALONE, Ranks
from ..text import windows
from ..text.prompts import Prompts, prompts_identity
from ..text.source import Spec, Text, builtin_text, source
from ..text.windows import text_identity
from .block import site_generator
from .shortfall import Goal
from .speed import Decoding


class Request:
    """A config with the model, recipe and plan that it names. Raises all errors found before the job's folder is opened."""

    def __init__(self, config: Config, progress: Progress | None = None, ranks: Ranks = ALONE) -> None:
        self.recipe: Recipe[Any] = _recipe(config)
        self.ranks = ranks
        self.surveys = _surveys(config, self.recipe)
        """Whether the model is surveyed before anything is removed."""
        self.streams = _streams(config, self.recipe)
        """Whether the prune sweep needs activations."""
        fewest = config.samples if config.metric_text is None else config.metric_samples
        if fewest < ranks.size:
            raise ConfigError(f"samples is {fewest}; {ranks.size} processes need one each at least")
        self.device = machine.resolve_device(config.device, ranks)
        model = hub.resolve_model(config.model, progress)
        self.config = config = replace(config, model=model, out=config.out.absolute())
        self.skeleton: Skeleton = open_skeleton(
            config.model, self.device, config.dtype, layout=LAYOUTS[config.layout], text_only=config.text_only
        )
        stored = self.skeleton.checkpoint.dtype
        self.activations = machine.resolve_activations(config.activations, self.skeleton.dtype, stored)
        self.sites = self.skeleton.all_sites()
        self.skeleton.check_sites()
        if config.text_only and not self.skeleton.wrapped:
            raise ConfigError(f"text_only is on; {config.model} is a text model already")
        if self.skeleton.alone and stock_class(self.skeleton.written_type) is None:
            raise ConfigError(
                f"text_only is on; transformers has no text model of type {self.skeleton.written_type!r} on its own"
            )
        self._check_layout()
        self._check_devices({site.name: site.units for site in self.sites}, str(config.model))
        if config.store == "fp8":
            fp8.check_storable(self.skeleton)
        self.window = self._window()
        self.given_plan = self._given_plan()
        self.experts = self._experts()
        """Which experts go as a whole; None if none do, or if a plan decides."""
        self.ratio = self._agreed_ratio()
        """Share to remove; None until an aim has chosen it."""
        self._given_ratio = self.ratio
        self.shots = 1 if self.given_plan else self.recipe.shots(0.5 if self.ratio is None else self.ratio)
        if self.experts is not None and self.shots > 1:
            raise ConfigError(
                f"experts is {self.experts}; whole experts go in one shot, and recipe {self.recipe.name} takes {self.shots} here: "
                "--set shots=1"
            )
        self.length = windows.window_length(config.seq_len, self.skeleton.context) if self.needs_text else 0
        if self.writes_text and (module := self.skeleton.stateful):
            raise ConfigError(
                f"calibration is self; {module} may keep more than its own keys and values, with which text is generated: give "
                "calibration text"
            )
        if config.aim is not None:
            self._check_aim(config.aim)
        elif self.given_plan is None and self.thins:
            self.check_budget()

    def budget(self, part: float = 1.0, gone: int = 0, ratio: float | None = None) -> Budget:
        """How many parameters to remove.

        Args:
            part: share of the whole to have removed after a shot, in (0, 1].
            gone: parameters that earlier shots removed.
            ratio: another ratio than the job's.
        """
        ratio = self.ratio if ratio is None else ratio
        assert ratio is not None
        layout, wanted = self.skeleton.layout, self.config.round_to
        return Budget(
            ratio * part,
            self.counted_parameters,
            self._finest if wanted == AUTO else wanted,
            layout.alike,
            gone=gone,
            coarser=COARSER if wanted == AUTO else (),
            devices=self.config.tensor_parallel,
            # Formats of GGUF files cannot lack a sublayer.
            sublayers=self.recipe.sublayers and self.config.quant not in GGUF_FORMATS,
            experts=self.weighs_experts,
        )

    @property
    def _finest(self) -> int:
        """The least multiple of ``round_to="auto"``: `ROUND_TO`, or 8 if that would leave an FFN fewer than three smaller widths.

        On each of the devices of ``tensor_parallel``.
        """
        narrow = any(
            site.units < 4 * ROUND_TO * self.config.tensor_parallel for site in self.sites if site.kind == "ffn"
        )
        return 8 if narrow else ROUND_TO

    @property
    def weighs_experts(self) -> bool:
        """Whether whole experts and units are in one budget."""
        return self.experts is not None and not self.experts.counted

    @property
    def counted_parameters(self) -> int:
        """Number of parameters that the ratio is a share of."""
        if self.config.ratio_of == "model":
            return self.skeleton.parameters()
        blocks = self.window if self.config.ratio_of == "window" else range(len(self.skeleton))
        return sum(self.skeleton.block_parameters(index) for index in blocks)

    def changeable(self, sites: Sequence[Site]) -> list[Site]:
        """Return the sites inside the window."""
        return [site for site in sites if site.block in self.window]

    @kind("solving")
    def allocate(
        self, sites: Sequence[Site], reached: Callable[[Sequence[Site]], Sequence[Site]], survey: Survey, budget: Budget
    ) -> Plan:
        """Return a plan for the sites inside the window; all others keep everything.

        The experts that go by number go first. The recipe allocates what is left of the budget to what `reached` gives of the
        other sites.
        """
        costs = {}
        if self.experts is not None and self.experts.counted:
            for site in (site for site in self.changeable(sites) if site.expert is not None):
                generator = site_generator(self.config.seed, site, site.expert or 0)
                costs[site.name] = self.recipe.expert_cost(site, survey.get(site.name, {}), generator)
        left, gone = self._without(self.changeable(sites), costs)
        plan = {site.name: SitePlan(0) for site in gone}
        if self.thins:
            rest = replace(budget, gone=budget.gone + sum(site.removed(0) for site in gone))
            plan |= self.recipe.allocate(reached(left), survey, rest)
        whole = {site.name: plan.get(site.name, SitePlan(site.units)) for site in sites}
        return Plan(whole, budget.ratio)

    @property
    def thins(self) -> bool:
        """Whether units of sites that stay are removed, and not only whole experts."""
        return self.experts is None or not self.experts.counted or self.config.ratio is not None

    def check_budget(self, ratio: float | None = None) -> None:
        """Raise a ConfigError if the job's ratio, or another one, cannot be met."""
        left, gone = self._without(self.changeable(self.sites))
        self.recipe.check(left, self.budget(gone=sum(site.removed(0) for site in gone), ratio=ratio))

    def evenly(self, ratio: float) -> dict[str, int]:
        """Return the units that stay at each site inside the window if all sites that stay lose the same share."""
        left, gone = self._without(self.changeable(self.sites))
        budget = self.budget(gone=sum(site.removed(0) for site in gone), ratio=ratio)
        thinned = (
            allocate(left, even_densities(left), budget) if self.thins else {site.name: site.units for site in left}
        )
        return dict.fromkeys((site.name for site in gone), 0) | thinned

    def _without(
        self, sites: Sequence[Site], costs: Mapping[str, float] | None = None
    ) -> tuple[list[Site], list[Site]]:
        """Return the sites that stay and the experts that go as a whole, given what experts cost by site name.

        Without costs, as many go as with them.
        """
        costs = dict.fromkeys((site.name for site in sites), 0.0) if costs is None else costs
        if self.experts is None or not self.experts.counted:
            return [*sites], []
        gone = leaving(sites, costs, self.experts)
        names = {site.name for site in gone}
        return [site for site in sites if site.name not in names], gone

    @property
    def statistics(self) -> frozenset[Statistic]:
        """What a survey sums at each site; empty without a survey, or if it reads only weights."""
        found = (self.surveys and self.recipe.statistics) or frozenset()
        return found if self.experts is None or not found else found | self.recipe.expert_statistics

    @property
    def needs_text(self) -> bool:
        """Whether any text is read."""
        return bool(self.statistics) or self.streams or self.config.imitates

    def correction(self, shot: int) -> Correction | None:
        """Training of all blocks together at the end of a shot, numbered from 1: the recipe's own, or after the last one the effort's."""
        return self.recipe.correction or (self.imitation(self.config.chosen_effort) if shot == self.shots else None)

    def imitation(self, effort: Effort) -> Correction | None:
        """Training of all blocks together towards the dense model's predictions, at an effort."""
        small = self.skeleton.block_parameters() <= IMITATION_SMALL
        sequences = min(1 if small else IMITATION_SEQUENCES, self.config.samples)
        steps = math.ceil(IMITATIONS[effort] * self.config.samples / sequences)
        return Correction(steps, None, IMITATION_RATE, sequences, imitates=True) if steps else None

    def together(self, effort: Effort) -> int:
        """Return the windows that all blocks are trained on together, at most; what the model writes itself is used again."""
        return self.config.samples * (1 if self.writes_text else IMITATIONS[effort])

    @cached_property
    def text(self) -> Text | DataFree:
        """The calibration text, or the name of a substitute that needs none."""
        given = self.config.calibration
        return _text(builtin_text() if given is None else given)

    @cached_property
    def metric_text(self) -> Text | DataFree | None:
        """The text that units are chosen on; None for the calibration text."""
        given = self.config.metric_text
        return None if given is None else _text(given)

    @cached_property
    def bos(self) -> int | None:
        """The token that every window begins with, if any."""
        try:
            return find_bos(self.config.model, self.config.bos, self.skeleton.vocabulary)
        except CheckpointError as error:
            if isinstance(self.text, Text) or self.config.bos == "on":
                raise
            raise CheckpointError(f"{error}; with --bos off, {self.text} needs no tokenizer") from error

    @cached_property
    def writing(self) -> Writing:
        """What the model writes as calibration text."""
        config, vocabulary, samples, length = self.config, self.skeleton.vocabulary, self.config.samples, self.length
        how = Writing(samples, length, config.seed, self.bos, temperature=config.temperature)
        if config.prompts is None:
            return how
        tokenizer, prompts = load_tokenizer(config.model, vocabulary), source(config.prompts)
        asked = Prompts(tokenizer, prompts, vocabulary, config.seed, samples, length, self.bos)
        return replace(how, prompts=asked, ends=end_tokens(config.model, tokenizer))

    @property
    def writes_text(self) -> bool:
        """Whether the model writes its own calibration tokens."""
        return self.needs_text and self.text == "self"

    @cached_property
    def workload(self) -> Workload:
        corrections = [each for number in range(1, self.shots + 1) if (each := self.correction(number))]
        correction = corrections[0] if corrections else None
        imitates = correction is not None and correction.imitates
        # Only the first rank generates text and corrects.
        divided = not self.writes_text and self.recipe.correction is None
        return Workload(
            samples=self.ranks.max_samples(self.config.samples) if divided else self.config.samples,
            surveyed=self.config.metric_samples if self.metric_text else None,
            length=self.length,
            text=self.needs_text,
            survey=self.statistics,
            findings=sum(self.recipe.findings(site) for site in self.sites) if self.surveys else 0,
            gram=self.recipe.wants_gram or self.recipe.target is not None,
            compensates=self.recipe.compensation is not None,
            wants_inputs=self.recipe.wants_inputs,
            has_target=self.recipe.target is not None,
            refines=self.config.refinement_steps,
            refine_sequences=REFINE_SEQUENCES,
            refines_last=any(site.block == len(self.skeleton) - 1 for site in self.changeable(self.sites)),
            corrects=correction.steps if correction else 0,
            correction_rank=correction.rank if correction else None,
            correction_sequences=correction.sequences if correction else 0,
            correction_samples=self.together(self.config.chosen_effort) if imitates else self.config.samples,
            corrected_shots=len(corrections),
            imitates=imitates,
            shots=self.shots,
            generates=self.writes_text,
            removes=self._removes,
            workspace=lambda site: self.recipe.workspace(site, self.keeps.get(site.name, site.units)),
            digest_workspace=lambda site: self.recipe.digest_workspace(site),
            activations=self.activations,
        )

    @property
    def _removes(self) -> float:
        """Share of the blocks' parameters that goes; 0 until an aim has chosen it, which forecasts more than is needed."""
        if self.recipe.writes_zeros or self.ratio is None:
            return 0.0
        return self.budget().target / self.skeleton.block_parameters()

    @cached_property
    def keeps(self) -> Mapping[str, int]:
        """The most units that stay at each site for which that is known before the work starts."""
        if self.given_plan is not None:
            return {name: site.keep for name, site in self.given_plan.items()}
        if self.shots > 1 or self.experts is not None or self.config.aim is not None:
            return {}
        sites = self.changeable(self.sites)
        if self.recipe.statistics is None:
            plan = self.recipe.allocate(sites, {}, self.budget())
            return {name: site.keep for name, site in plan.items()}
        return self.recipe.foresee(sites, self.budget())

    @property
    def forward_operations(self) -> int:
        """Operations of one dense forward pass over the requested text, whether or not the recipe reads it."""
        most = self.skeleton.context or windows.DEFAULT_LENGTH
        length = self.length or min(self.config.seq_len or windows.DEFAULT_LENGTH, most)
        return self.skeleton.forward_operations(self.config.samples, length)

    @cached_property
    def header(self) -> dict[str, Any]:
        """What must be unchanged on resume: settings, inputs, and versions of libraries that change numbers."""
        import transformers

        inputs: dict[str, Any] = {"model": self.skeleton.checkpoint.identity()}
        # Also if a plan makes the survey unnecessary: a job that started without a plan may resume with one.
        reads_text = bool(self.recipe.statistics or self.streams or self.config.imitates)
        if reads_text:
            inputs |= self._text_identity(self.text)
        if self.metric_text is not None:
            inputs["metric"] = self._text_identity(self.metric_text)
        return {
            "settings": {
                **self.config.fixed(),
                "settings": asdict(self.recipe.settings),
                "bos": self.bos is not None if reads_text else None,
                "ratio": self._given_ratio,
                "dtype": machine.dtype_name(self.skeleton.dtype),
                "activations": machine.activations_name(self.activations, self.skeleton.dtype),
            },
            "inputs": inputs,
            "versions": {"torch": str(torch.__version__), "transformers": transformers.__version__},
        }

    def _text_identity(self, text: Text | DataFree) -> dict[str, Any]:
        if isinstance(text, Text):
            return text_identity(text, self.config.model)
        found = {"calibration": text, **({} if self.bos is None else {"bos": self.bos})}
        if text == "self" and self.config.prompts is not None:
            found |= prompts_identity(source(self.config.prompts), self.config.model)
        return found

    @property
    def goal(self) -> Goal:
        """What the result is compared with: the ratio or, if none was given, the plan."""
        budget, sites, plan = self.budget(), self.changeable(self.sites), self.given_plan
        target, slack = budget.target, largest_unit(sites, budget)
        if plan is not None and self.config.ratio is None:
            target = sum(site.removed(plan[site.name].keep) + sum(plan[site.name].zeros or ()) for site in sites)
        if self.experts is not None:  # whose sizes may differ
            sizes = [site.removed(0) for site in sites if site.expert is not None]
            slack += len(sizes) * (max(sizes) - min(sizes))
        zeros = self.recipe.writes_zeros
        if zeros:
            window = sum(self.skeleton.block_parameters(index) for index in self.window)
            slack = window - sum(sum(site.linears) for site in sites)
        what = {
            "blocks": "the blocks' parameters",
            "model": "the model's parameters",
            "window": f"the parameters of blocks {self.window.start}:{self.window.stop}",
        }[self.config.ratio_of]
        return Goal(sites, budget, target, slack, what, zeros, None if plan is None else str(self.config.plan))

    @property
    def planned(self) -> Mapping[str, int] | None:
        """Units that stay at each site, if they are known before the work starts."""
        chosen_before = self.experts is None and self.config.aim is None
        whole = self.given_plan is not None or (self.shots == 1 and self.recipe.statistics is None and chosen_before)
        return self.keeps if whole and not self.recipe.writes_zeros else None

    @property
    def counted_tokens(self) -> int | None:
        """Number of calibration tokens, if the tokens that reach each expert are counted."""
        counted = self.statistics or self.recipe.wants_gram
        samples = self.config.samples if self.metric_text is None else self.config.metric_samples
        return samples * self.length if counted else None

    @property
    def may_need_loader(self) -> bool:
        """Whether the result may not be a stock checkpoint, so that it must name its tokenizer's class."""
        if self.recipe.writes_zeros:
            return not write.fits_stock(self.skeleton, self.sites)
        return self.skeleton.layout is not UNIFORM

    @property
    def kept(self) -> str | None:
        """What the layout keeps whole, and why; None if any site may lose units."""
        return kept_heads(self.skeleton.written_type) if self.skeleton.layout is UNIFORM and self.thins else None

    def schedule(self) -> list[Phase]:
        depth = len(self.skeleton)
        found = [Phase("calibrate")] if self.writes_text else []
        for number in range(1, self.shots + 1):
            survey = {"forward": depth}
            if self.workload.gradients:
                survey |= {"head": 1, "backward": depth}
            shot, correction = f"shot-{number}", self.correction(number)
            steps = {
                "embed": int(self.needs_text),
                **(survey | {"surveyed": 1} if self.surveys else {}),
                "ratio": int(self.config.aim is not None),
                "allocate": 1,
                "prune": depth,
                "pruned": 1,
                "held-out": int(self.config.perplexity_at_most is not None),
                "correct": correction.steps if correction else 0,
                "finished": 1,
            }
            for step, count in steps.items():
                # A plan makes the rest of the survey unnecessary.
                skipped_after = f"{shot}/allocate" if step in survey or step == "surveyed" else None
                found += [Phase(f"{shot}/{step}", count, skipped_after)] if count else []
        return [*found, Phase("complete")]

    # Checks of what the user gives.

    def _check_layout(self) -> None:
        """Check that DeciLM's config can describe this model."""
        if self.skeleton.layout is DECILM and self.skeleton.architecture.model_type != "llama":
            raise ConfigError(
                f"layout is decilm; {self.config.model} is of model_type {self.skeleton.architecture.model_type}, and it must be llama"
            )

    def _check_devices(self, keeps: Mapping[str, int], where: str) -> None:
        """Check that the devices of ``tensor_parallel`` divide the units that stay at each site of what is named `where`.

        Servers copy the only key/value head of multi-query attention to all devices, and those that split a model run no block
        without attention. Where shapes stay, the result is split as the model is, and nothing depends on the option.
        """
        devices = self.config.tensor_parallel
        if devices == 1 or self.recipe.writes_zeros:
            return
        for index, entries in enumerate(self.skeleton.entries):
            if gone := next((entry.kind for entry in entries if entry.gone and entry.kind != "ffn"), None):
                raise ConfigError(
                    f"tensor_parallel is {devices}; block {index} of {self.config.model} has lost its {gone}, and servers that split "
                    "a model run no block without it"
                )
        for site in self.sites:
            units = site.heads if site.units == 1 and site.heads else keeps[site.name]
            if units % devices:
                grouped = site.kind == "attention" and site.heads > site.units > 1
                what = "channels" if site.kind == "ffn" else "key/value heads" if grouped else "heads"
                raise ConfigError(
                    f"tensor_parallel is {devices}; {site.name} of {where} has {units} {what}, which {devices} does not divide"
                )
            if not keeps[site.name] and site.kind != "ffn":
                raise ConfigError(
                    f"tensor_parallel is {devices}; {site.name} goes in {where}, and servers that split a model run no block without it"
                )

    def _window(self) -> range:
        """The blocks that may change."""
        depth = len(self.skeleton)
        start, stop = self.config.blocks or (0, depth)
        if stop > depth:
            raise ConfigError(
                f"blocks is {start}:{stop}; {self.config.model} has {depth} blocks, so it must end by {depth}"
            )
        if self.skeleton.layout.alike and (start, stop) != (0, depth):
            raise ConfigError(
                f"blocks is {start}:{stop}; the {self.config.layout} layout keeps blocks alike, so it needs all of them"
            )
        return range(start, stop)

    def _given_plan(self) -> Plan | None:
        path = self.config.plan
        if path is None:
            return None
        plan = Plan.read(path)
        plan.check(self.sites, str(path))
        for site in self.sites:
            entry, zeros = plan[site.name], sum(plan[site.name].zeros or ())
            if site.block not in self.window and (entry.keep < site.units or zeros):
                does = f"has {zeros} zeros" if zeros else f"keeps {entry.keep} of {site.units}"
                raise ConfigError(
                    f"{path}: {site.name} {does}; it lies outside blocks {self.window.start}:{self.window.stop}"
                )
        if not plan.is_alike([site for site in self.sites if site.family in self.skeleton.layout.alike]):
            raise ConfigError(
                f"{path}: blocks keep different widths, which the {self.config.layout} layout cannot hold"
            )
        for site in self.sites:
            kept = plan[site.name]
            if self.recipe.plans_units(site) and kept.units is None and kept.keep < site.units:
                raise ConfigError(f'{path}: with these settings {site.name} needs "units", not only how many to keep')
        self._check_devices({name: each.keep for name, each in plan.items()}, str(path))
        self.recipe.check_plan(self.sites, plan, str(path))
        return plan

    def _check_aim(self, aim: str) -> None:
        """Check that the recipe can choose the ratio itself."""
        name = self.recipe.name
        if self.recipe.writes_zeros:
            raise ConfigError(
                f"{aim} is given; recipe {name} keeps all shapes with these settings, so no ratio meets it"
            )
        if aim == "perplexity_at_most":
            if self.recipe.curve_label != LOSS:
                raise ConfigError(f"{aim} is given; recipe {name} does not price the loss with these settings")
            if self.recipe.correction is not None:
                raise ConfigError(
                    f"{aim} is given; recipe {name} corrects the result with these settings, which is not tried again"
                )
            if not isinstance(self.text, Text):
                raise ConfigError(
                    f"{aim} is given; it needs held-out windows of a text, and calibration is {self.text}"
                )
        if self.shots > 1:
            raise ConfigError(
                f"{aim} is given; recipe {name} takes several shots with these settings, and the ratio is chosen in one"
            )

    @cached_property
    def sizes(self) -> Sizes:
        return Sizes(self.skeleton)

    @cached_property
    def decoding(self) -> Decoding:
        return Decoding(self.skeleton)

    @property
    def format(self) -> Format:
        """Format of the weights of the aim `fit`."""
        return self.config.quant or "bf16"

    @property
    def context(self) -> int:
        """Tokens of the cache of the aim `fit`."""
        most = self.skeleton.context or CONTEXT
        if self.config.context is not None and self.config.context > most and self.skeleton.context:
            raise ConfigError(f"context is {self.config.context}; the context of {self.config.model} is {most}")
        return self.config.context or min(CONTEXT, most)

    def _experts(self) -> Experts | None:
        """Check that the experts can go as the config asks."""
        recipe = self.recipe
        if self.given_plan is not None:
            return None
        if self.config.experts is None:
            if not recipe.thins:
                raise ConfigError(f"recipe {recipe.name} removes whole experts only; give --experts")
            return None
        experts = Experts.parse(str(self.config.experts))
        able = "ranks_experts" if experts.counted else "prices_experts"
        if not getattr(recipe, able) or recipe.writes_zeros:
            names = ", ".join(name for name, each in RECIPES.items() if getattr(each, able))
            raise ConfigError(
                f"experts is {experts}; recipe {recipe.name} with these settings cannot decide on whole experts in this way; {names} can"
            )
        if recipe.correction is not None:
            raise ConfigError(
                f"experts is {experts}; recipe {recipe.name} corrects the result with these settings, which cannot be combined with whole experts"
            )
        if not recipe.thins and self.config.ratio is not None:
            raise ConfigError(
                f"ratio is {self.config.ratio:g}; recipe {recipe.name} removes whole experts only: drop --ratio"
            )
        if experts.threshold and "experts" in self.skeleton.layout.alike:
            raise ConfigError(
                f"experts is {experts}; the {self.config.layout} layout keeps the same number in all blocks: give a number or a share"
            )
        check(self.changeable(self.sites), experts, self.config.model)
        return experts

    def _agreed_ratio(self) -> float | None:
        if self.experts is not None and self.experts.counted:
            _, gone = self._without(self.changeable(self.sites))
            share = sum(site.removed(0) for site in gone) / self.counted_parameters
            if self.config.ratio is None:
                return share
            if share > self.config.ratio:
                raise ConfigError(
                    f"ratio is {self.config.ratio:g}; the experts that go are {share:.4f} of the parameters that it counts"
                )
        asked, planned = self.config.ratio, self.given_plan.ratio if self.given_plan else None
        if asked is not None and planned is not None and asked != planned:
            raise ConfigError(f"ratio is {asked:g}; the plan {self.config.plan} was made for {planned:g}")
        return asked if asked is not None else planned


def idle(config: Config) -> dict[str, str]:
    """Fields of a config that have no effect, each with the reason: text options if no text is read, and what a plan decides.

    Raises:
        ConfigError: unknown recipe, or a setting that it does not have.
    """
    recipe = _recipe(config)
    summed = _surveys(config, recipe) and recipe.statistics
    decided = {"round_to": "the plan decides the widths", "experts": "the plan decides which experts go"}
    found = {} if config.plan is None else decided
    if config.plan is None and config.ratio is None and config.experts is not None:
        found["round_to"] = "only whole experts go"
    if recipe.writes_zeros:
        found |= dict.fromkeys(("round_to", "tensor_parallel"), "shapes stay")
    if config.refine is not None and (not config.imitates or recipe.correction is not None):
        found["effort"] = "--refine gives the steps"
    if config.metric_text is None:
        found["metric_samples"] = "no --metric-text is given"
    if not _surveys(config, recipe):
        found["survey"] = "the plan decides the widths" if config.plan else f"{config.recipe} takes no survey"
    found |= {} if config.fit else dict.fromkeys(("quant", "context"), "there is no --fit")
    if not summed and not _streams(config, recipe) and not config.imitates:
        names = [
            "calibration",
            "prompts",
            "temperature",
            "samples",
            "seq_len",
            "bos",
            "windows",
            "loss_on",
            *([] if recipe.seeded else ["seed"]),
        ]
        found |= dict.fromkeys(names, f"{config.recipe} reads no text here")
    return found


def _recipe(config: Config) -> Recipe[Any]:
    """The recipe with its settings. Raises ConfigError: unknown, or it does not have such settings or such texts."""
    settings = parse(config.recipe, config.settings)  # which refuses unknown recipes
    recipe: Recipe[Any] = RECIPES[config.recipe](settings)
    if config.metric_text is not None:
        recipe.use_metric_text()
    return recipe


def _text(given: Spec | Sequence[Spec]) -> Text | DataFree:
    return next((word for word in DATA_FREE if given == word), None) or Text.of(given)


def _surveys(config: Config, recipe: Recipe[Any]) -> bool:
    spared = config.plan is not None and not recipe.keeps_findings
    return recipe.statistics is not None and not spared


def _streams(config: Config, recipe: Recipe[Any]) -> bool:
    wants = recipe.wants_gram or recipe.wants_inputs or recipe.target is not None
    return wants or recipe.compensation is not None or config.refinement_steps > 0
