"""Job configurations: frozen and validated. Each field states whether it may change on resume."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from ..errors import ConfigError, check_choice, check_least
from ..model.formats import FORMATS, Format
from ..model.site import LAYOUTS
from ..model.tokenizer import BOS, Bos
from ..recipes.experts import THRESHOLD, Experts
from ..system.units import ACTIVATIONS, check_device, check_dtype
from ..text.source import CUTS, LOSSES_ON, Cut, LossOn, Source, Spec

AUTO: Literal["auto"] = "auto"
RatioOf = Literal["blocks", "window", "model"]
RATIOS_OF: tuple[RatioOf, ...] = ("blocks", "window", "model")
Store = Literal["auto", "fp8"]
STORES: tuple[Store, ...] = ("auto", "fp8")
AIMS = ("fit", "speedup", "perplexity_at_most")
"""Fields of `Config` that choose a ratio."""
DataFree = Literal["self", "random-tokens"]
DATA_FREE: tuple[DataFree, ...] = ("self", "random-tokens")
Effort = Literal["low", "normal", "high"]
EFFORTS: Mapping[Effort, float] = {"low": 0, "normal": 2, "high": 2}
"""Passes over the calibration windows in which block refinement trains each block."""
REFINE_SEQUENCES = 1
"""Windows of a step of block refinement."""
IMITATIONS: Mapping[Effort, int] = {"low": 0, "normal": 0, "high": 2}
"""Other windows per calibration window, on which all blocks are trained together in the end, towards the dense model's predictions."""
IMITATION_SEQUENCES = 4
"""Windows of a step of that, in large models: a step reads and writes all weights."""
IMITATION_SMALL = 1_000_000_000
"""Parameters of the source's blocks up to which a step takes one window."""
IMITATION_RATE = 0.075
"""Its highest learning rate, in the unit of `correct.step_size`."""
TuneMethod = Literal["auto", "lora", "distil"]
TUNE_METHODS: tuple[TuneMethod, ...] = ("auto", "lora", "distil")


def _fixed(**options: Any) -> Any:
    """Define a field that affects the bytes of the result, so it must not change on resume."""
    return field(metadata={"resume": "fixed"}, **options)


def _free(**options: Any) -> Any:
    return field(metadata={"resume": "free"}, **options)


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """The fields that all jobs have. Fields given as strings become paths."""

    model: Path = _free()
    """Directory of the source checkpoint, or its name on the hub. Resuming compares its content, not its path."""
    out: Path = _free()
    """Directory to create."""
    samples: int = _fixed(default=128)
    """Number of windows of text."""
    seq_len: int | None = _fixed(default=None)
    """Tokens per window, BOS included; None takes 2048, or the model's context if that is shorter."""
    bos: Bos = _fixed(default="auto")
    """Whether every window begins with BOS: ``on``, ``off``, or ``auto``, which does as the tokenizer does. Resuming
    compares what was resolved."""
    windows: Cut = _fixed(default="anywhere")
    """Where windows of text begin: ``anywhere``, or where ``documents`` begin."""
    loss_on: LossOn = _fixed(default="all")
    """Whose tokens have losses and gradients: ``all``, or those that the ``assistant`` of a conversation says."""
    seed: int = _fixed(default=0)
    dtype: str = _fixed(default="auto")
    """Dtype in which blocks compute; ``auto`` is the checkpoint's dtype on a GPU and float32 on the CPU."""
    activations: str = _fixed(default="auto")
    """Dtype in which activations are stored: see `system.machine.resolve_activations`."""
    cache: Path | None = _free(default=None)
    """Folder for activations; None keeps them beside OUT."""
    device: str = _free(default="auto")
    memory: int | None = _free(default=None)
    """Bytes that the device may use; None allows all free memory."""
    memory_host: int | None = _free(default=None)
    """Bytes of host memory for activations, in addition to `memory`. None reserves none on a CPU, where the kernel's page cache
    already keeps written files in free memory; pruning on a GPU takes up to half of what is free beside what the steps need."""

    def __post_init__(self) -> None:
        for name in ("model", "out", "cache", "plan", "survey", "teacher"):
            if isinstance(value := getattr(self, name, None), str):
                object.__setattr__(self, name, Path(value))
        for name in ("model", "teacher"):
            path = getattr(self, name, None)
            if path is not None and self.out.resolve() == path.resolve():
                raise ConfigError(f"OUT is {self.out}, the {name} itself")
        check_least(1, samples=self.samples)
        check_least(2, seq_len=self.seq_len)
        check_least(0, seed=self.seed, memory_host=self.memory_host)
        if self.seed >= 2**63:
            raise ConfigError(f"seed is {self.seed}; it must be below 2^63")
        check_dtype(self.dtype)
        check_device(self.device)
        self._check_choice(activations=ACTIVATIONS, bos=BOS, windows=CUTS, loss_on=LOSSES_ON)

    def _check_choice(self, **choices: Collection[str]) -> None:
        check_choice(**{name: (getattr(self, name), allowed) for name, allowed in choices.items()})

    def fixed(self) -> dict[str, Any]:
        """Return the fields that must not change on resume, JSON-ready."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.metadata["resume"] == "fixed"}
        return {
            name: list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value
            for name, value in values.items()
        }


@dataclass(frozen=True, kw_only=True)
class Config(JobConfig):
    """Configuration of one pruning job.

    Raises:
        ConfigError: a value is out of range. The message quotes the value and the range.
    """

    ratio: float | None = _fixed(default=None)
    """Share of the parameters to remove (see `ratio_of`), in (0, 1); None if a plan file or an aim decides."""
    fit: int | None = _fixed(default=None)
    """An aim instead of a ratio: remove the least at which the result fits a card of that many bytes (see `pruning.aim`)."""
    speedup: float | None = _fixed(default=None)
    """An aim: remove the least at which the result decodes that many times as fast, by a measured table (see `pruning.speed`)."""
    perplexity_at_most: float | None = _fixed(default=None)
    """An aim: remove the most at which perplexity on held-out windows rises by at most this share, such as 0.05."""
    quant: Format | None = _fixed(default=None)
    """Format of the weights on the card of `fit`; None is bf16."""
    context: int | None = _fixed(default=None)
    """Tokens of the cache on the card of `fit`; None takes 8192, or the model's context if that is shorter."""
    recipe: str = _fixed(default="default")
    settings: Mapping[str, str] = _fixed(default_factory=dict)
    """The recipe's settings by name, as strings."""
    calibration: Spec | Sequence[Spec] | None = _free(default=None)
    """Text from one source or several (see `text.source.Source`); None takes the built-in sample. Resuming compares its
    content, not its path. ``"self"``: text generated by the model. ``"random-tokens"``: tokens drawn uniformly from the
    vocabulary."""
    metric_text: Spec | Sequence[Spec] | None = _free(default=None)
    """Text that `greedy-output` chooses units on, given as `calibration` is, but not ``"self"``; None for `calibration`."""
    metric_samples: int = _fixed(default=16)
    """Number of windows of `metric_text`, at most `samples`."""
    prompts: Spec | None = _free(default=None)
    """Source of prompts that the model answers, with calibration ``"self"``. Resuming compares its content."""
    temperature: float = _fixed(default=1.0)
    """What the logits are divided by as the model writes text, with calibration ``"self"``; 0 takes the likeliest token."""
    layout: str = _fixed(default="free")
    """``"free"``, ``"uniform"`` or ``"decilm"``: see `model.site.LAYOUTS`."""
    store: Store = _fixed(default="auto")
    """How the linears of the result's blocks are stored: ``auto``, in the source's dtype (quantised sources: bfloat16), or
    ``fp8``, with a scale per 128 × 128 weights, where both widths are multiples of 128."""
    text_only: bool = _fixed(default=False)
    """Write the text model of a multimodal model alone."""
    round_to: int | Literal["auto"] = _fixed(default=AUTO)
    """Every FFN width that changes becomes a multiple of this; so does every width of attention whose heads allow it.
    ``"auto"`` takes 32, and 128 or 256 where that costs little: see `recipes.allocation`."""
    tensor_parallel: int = _fixed(default=1)
    """Devices over which a server splits each block: they divide the heads and FFN widths of all blocks."""
    experts: str | int | float | None = _fixed(default=None)
    """Routed experts that go as a whole: how many stay in each block (``"96"``), the share that goes (``"0.25"``), the same by
    one threshold over all blocks (``"0.25:threshold"``), or, with `ratio` or an aim, as many as one threshold over experts and units gives
    (``"threshold"``). With a number or share, units go only if `ratio` is given too."""
    blocks: tuple[int, int] | None = _fixed(default=None)
    """Prune only blocks ``start`` to ``stop - 1``; None prunes all."""
    ratio_of: RatioOf = _fixed(default="blocks")
    """What the ratio refers to: all transformer blocks, those of `blocks`, or the model with embeddings and head."""
    effort: Effort | None = _fixed(default=None)
    """How much training there is: see `EFFORTS` and `IMITATIONS`. None is ``normal`` for the recipe ``default`` and ``low`` for others."""
    refine: int | None = _fixed(default=None)
    """Steps of block refinement after each pruned block; None as `effort` says."""
    disk: int | None = _free(default=None)
    """Bytes of disk that activations may use; None allows all free space."""
    plan: Path | None = _free(default=None)
    """Plan file that replaces the recipe's allocation, in one shot. The journal stores its digest."""

    survey: Path | None = _free(default=None)
    """Folder that keeps the survey: it is taken and put there or, if it is there, used. See `pruning.archive`."""

    def __post_init__(self) -> None:
        for name, text in (("calibration", self.calibration), ("metric-text", self.metric_text)):
            several = () if text is None or isinstance(text, (str, Path, Source)) else text
            for word in DATA_FREE:
                if word in several:
                    raise ConfigError(f"{name} {word!r} cannot be combined with other sources")
        generates = isinstance(self.calibration, str) and self.calibration == "self"
        if not generates and self.prompts is not None:
            raise ConfigError(f"prompts is {self.prompts}; only calibration 'self' answers them")
        if not generates and self.temperature != 1:
            raise ConfigError(f"temperature is {self.temperature:g}; only calibration 'self' uses it")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature is {self.temperature:g}; it must be at least 0 and finite")
        for word in DATA_FREE if isinstance(self.calibration, str) else ():
            if self.calibration == word and self.windows != "anywhere":
                raise ConfigError(f"windows is {self.windows!r}; calibration {word!r} reads no documents")
            if self.calibration == word and self.loss_on != "all" and self.prompts is None:
                raise ConfigError(
                    f"loss_on is {self.loss_on!r}; calibration {word!r} has no turns of the assistant"
                    + (" without prompts" if generates else "")
                )
        if self.metric_text == "self":
            raise ConfigError(
                "metric-text is self; only calibration can be, which feeds the metric too unless it has its own"
            )
        if self.metric_text is not None and self.metric_samples > self.samples:
            raise ConfigError(f"metric-samples is {self.metric_samples}; it must be at most samples, {self.samples}")
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise ConfigError(f"ratio is {self.ratio:g}; it must be in (0, 1)")
        if self.experts is not None:
            object.__setattr__(self, "experts", str(Experts.parse(str(self.experts))))
        self._check_aim()
        if self.blocks is not None and not 0 <= self.blocks[0] < self.blocks[1]:
            raise ConfigError(f"blocks is {self.blocks[0]}:{self.blocks[1]}; it must be A:B with 0 ≤ A < B")
        super().__post_init__()
        if isinstance(self.round_to, str) and self.round_to != AUTO:
            raise ConfigError(f"round_to is {self.round_to!r}; it must be a whole number or {AUTO}")
        check_least(1, round_to=None if self.round_to == AUTO else self.round_to)
        check_least(1, metric_samples=self.metric_samples, tensor_parallel=self.tensor_parallel)
        if self.effort is not None:
            self._check_choice(effort=EFFORTS)
        if self.refine is not None:
            check_least(0, refine=self.refine)
        self._check_choice(ratio_of=RATIOS_OF, layout=LAYOUTS, store=STORES)
        if self.quant is not None:
            self._check_choice(quant=FORMATS)
        check_least(1, fit=self.fit, context=self.context)
        if self.speedup is not None and not 1 < self.speedup < float("inf"):
            raise ConfigError(f"speedup is {self.speedup:g}; it must be above 1 and finite")
        if self.perplexity_at_most is not None and not 0 < self.perplexity_at_most < float("inf"):
            raise ConfigError(f"perplexity_at_most is {self.perplexity_at_most:g}; it must be positive and finite")

    @property
    def aim(self) -> str | None:
        """The name of the aim that decides the ratio; None if the ratio or a plan is given."""
        return next((name for name in AIMS if getattr(self, name) is not None), None)

    def _check_aim(self) -> None:
        """Check that exactly one thing decides how much is removed; a plan may have the ratio that it was made for beside it."""
        given = [name for name in ("ratio", *AIMS, "plan") if getattr(self, name) is not None]
        counted = self.experts is not None and Experts.parse(str(self.experts)).counted
        if not given and not counted:
            raise ConfigError(
                f"give a ratio, experts by number or share, a plan file or one of {', '.join(AIMS)}: one of them decides how much "
                "is removed"
            )
        if self.aim is not None and counted:
            raise ConfigError(
                f"experts is {self.experts}; {self.aim} chooses how much goes: give experts {THRESHOLD}, or a ratio instead of {self.aim}"
            )
        if len(given) > 1 and given != ["ratio", "plan"]:
            raise ConfigError(f"{' and '.join(given)} are given; only one of them can decide how much is removed")

    @property
    def chosen_effort(self) -> Effort:
        """The effort, given or by the recipe."""
        return self.effort or ("normal" if self.recipe == "default" else "low")

    @property
    def refinement_steps(self) -> int:
        """Steps of block refinement after each pruned block; 0 for none."""
        return self.effort_steps(self.chosen_effort) if self.refine is None else self.refine

    @property
    def imitates(self) -> bool:
        """Whether all blocks are trained together in the end."""
        return IMITATIONS[self.chosen_effort] > 0

    def effort_steps(self, effort: Effort) -> int:
        """Steps of block refinement after each pruned block at an effort."""
        return math.ceil(EFFORTS[effort] * self.samples / REFINE_SEQUENCES)


@dataclass(frozen=True, kw_only=True)
class TuneConfig(JobConfig):
    """Configuration of one tuning job.

    Raises:
        ConfigError: a value is out of range. The message quotes the value and the range.
    """

    text: Spec | Sequence[Spec] = _free()
    """Text from one source or several (see `text.source.Source`)."""
    teacher: Path | None = _free(default=None)
    """Directory, or name on the hub, of the dense model whose block outputs are the target of `distil`."""
    method: TuneMethod = _free(default="auto")
    """``"lora"``: in memory, end to end. ``"distil"``: streamed, block by block. A resumed job keeps its method."""
    rank: int = _fixed(default=8)
    """Largest rank of the update of a linear."""
    steps: int = _fixed(default=200)
    """Training steps: of the whole model for `lora`, of each block for `distil`."""
    rate: float | None = _fixed(default=None)
    """Adam's highest learning rate; it falls linearly to zero. None: 1e-3 for `lora`, 3e-3 for `distil`."""
    batch: int = _fixed(default=8)
    """Windows per step of `lora`."""
    warmup: int = _fixed(default=0)
    """Steps of `lora` in which the learning rate rises linearly from zero."""
    dropout: float = _fixed(default=0.0)
    """Dropout of the inputs of `lora`'s updates, in [0, 1)."""
    epochs: int | None = _fixed(default=None)
    """Times that `lora` takes the whole text, instead of `samples` and `steps`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(1, rank=self.rank, steps=self.steps, batch=self.batch, epochs=self.epochs)
        check_least(0, warmup=self.warmup)
        if self.epochs is not None and self.steps != TuneConfig.steps:
            raise ConfigError(f"steps is {self.steps} and epochs is {self.epochs}; give one of them")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is {self.dropout:g}; it must be in [0, 1)")
        if self.rate is not None and not 0 < self.rate < float("inf"):
            raise ConfigError(f"rate is {self.rate:g}; it must be positive and finite")
        self._check_choice(method=TUNE_METHODS)
