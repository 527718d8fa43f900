"""What the user asked for: frozen, validated, and explicit about what may change on resume."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from ..errors import ConfigError
from ..model.site import LAYOUTS
from ..system.units import ACTIVATIONS, check_device, check_dtype
from ..text.source import Source, Spec

RatioOf = Literal["blocks", "window", "model"]
RATIOS_OF: tuple[RatioOf, ...] = ("blocks", "window", "model")
DataFree = Literal["self", "random-tokens"]
DATA_FREE: tuple[DataFree, ...] = ("self", "random-tokens")
TuneMethod = Literal["auto", "lora", "distil"]
TUNE_METHODS: tuple[TuneMethod, ...] = ("auto", "lora", "distil")


def _fixed(**options: Any) -> Any:
    """A field that decides the bytes of the result: a job under way keeps it."""
    return field(metadata={"resume": "fixed"}, **options)


def _free(**options: Any) -> Any:
    """A field that a job under way may be resumed with another value of."""
    return field(metadata={"resume": "free"}, **options)


def _agreed(config: Any) -> dict[str, Any]:
    """The fields that a resumed job must agree with, JSON-ready."""
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.metadata["resume"] == "fixed"}
    return {
        name: list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value
        for name, value in values.items()
    }


def _make_paths(config: Any, *names: str) -> None:
    """Fields that may have been given as text."""
    for name in names:
        if isinstance(value := getattr(config, name), str):
            object.__setattr__(config, name, Path(value))


def _check_apart(out: Path, **others: Path | None) -> None:
    for name, path in others.items():
        if path is not None and out.resolve() == path.resolve():
            raise ConfigError(f"OUT is {out}, the {name} itself")


def _check_least(config: Any, *limits: tuple[str, int]) -> None:
    for name, least in limits:
        if getattr(config, name) < least:
            raise ConfigError(f"{name} is {getattr(config, name)}; it must be at least {least}")


def _check_common(config: Any) -> None:
    """What every job has."""
    _check_least(config, ("samples", 1), ("seed", 0))
    if config.seed >= 2**63:
        raise ConfigError(f"seed is {config.seed}; it must be below 2^63")
    if config.seq_len is not None and config.seq_len < 2:
        raise ConfigError(f"seq_len is {config.seq_len}; it must be at least 2")
    check_dtype(config.dtype)
    check_device(config.device)
    if config.activations not in ACTIVATIONS:
        raise ConfigError(f"activations is {config.activations!r}; it must be one of {', '.join(ACTIVATIONS)}")
    if config.memory_host is not None:
        _check_least(config, ("memory_host", 0))


@dataclass(frozen=True, kw_only=True)
class Config:
    """One pruning job.

    Raises:
        ConfigError: a value out of its range, quoting value and range.
    """

    model: Path = _free()
    """Directory of the source checkpoint, or its name on the hub; on resume its content is compared, not its path."""
    out: Path = _free()
    """Directory to create."""
    ratio: float | None = _fixed(default=None)
    """Share of the blocks' parameters to remove, in (0, 1); None when a plan file decides."""
    recipe: str = _fixed(default="default")
    settings: Mapping[str, str] = _fixed(default_factory=dict)
    """The recipe's own settings by name, as text."""
    calibration: Spec | Sequence[Spec] | None = _free(default=None)
    """Text, from one source or several (see `text.Source`); None takes the built-in sample. On resume its content is
    compared, not its path. ``"self"``: tokens that the model writes; ``"random-tokens"``: tokens drawn evenly from its vocabulary."""
    samples: int = _fixed(default=128)
    seq_len: int | None = _fixed(default=None)
    """Tokens a sample; None takes 2048, or the model's context if that is shorter."""
    seed: int = _fixed(default=0)
    layout: str = _fixed(default="free")
    """``"free"``, ``"uniform"`` or ``"decilm"``: see `layout`."""
    round_to: int = _fixed(default=8)
    """FFN widths that are changed become multiples of this."""
    blocks: tuple[int, int] | None = _fixed(default=None)
    """Prune only blocks ``start`` to ``stop - 1``; None prunes all."""
    ratio_of: RatioOf = _fixed(default="blocks")
    """What the ratio counts: all transformer blocks, those of `blocks`, or the model with embeddings and head."""
    refine: int = _fixed(default=0)
    """Steps of block refinement after each block was pruned; 0 for none."""
    dtype: str = _fixed(default="auto")
    """What blocks compute in; ``auto`` is the checkpoint's own on a GPU and float32 on the CPU."""
    activations: str = _fixed(default="auto")
    """What is stored of activations: see `machine.resolve_activations`."""
    cache: Path | None = _free(default=None)
    """Folder for activations; None keeps them beside OUT."""
    device: str = _free(default="auto")
    memory: int | None = _free(default=None)
    """Bytes the device may use; None takes what is free."""
    memory_host: int | None = _free(default=None)
    """Bytes of host memory that activations may be held in, besides `memory`; None holds none, since the kernel keeps
    what was written in memory that is free."""
    disk: int | None = _free(default=None)
    """Bytes of disk that activations may use; None takes what is free."""
    plan: Path | None = _free(default=None)
    """Plan file that replaces the recipe's allocation, in one shot; the journal keeps its digest."""
    surveys: Path | None = _free(default=None)
    """Folder in which jobs on one model and text leave their surveys for each other."""

    def __post_init__(self) -> None:
        _make_paths(self, "model", "out", "cache", "plan", "surveys")
        if not isinstance(self.calibration, (str, Path, Source)) and self.calibration is not None:
            for word in DATA_FREE:
                if word in self.calibration:
                    raise ConfigError(f"calibration {word!r} stands alone; it cannot be one of several sources")
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise ConfigError(f"ratio is {self.ratio:g}; it must be in (0, 1)")
        if self.ratio is None and self.plan is None:
            raise ConfigError("neither a ratio nor a plan file was given; one of them decides what goes")
        if self.blocks is not None and not 0 <= self.blocks[0] < self.blocks[1]:
            raise ConfigError(f"blocks is {self.blocks[0]}:{self.blocks[1]}; it must be A:B with 0 ≤ A < B")
        if self.ratio_of not in RATIOS_OF:
            raise ConfigError(f"ratio_of is {self.ratio_of!r}; it must be one of {', '.join(RATIOS_OF)}")
        _check_apart(self.out, model=self.model)
        _check_common(self)
        _check_least(self, ("round_to", 1), ("refine", 0))
        if self.layout not in LAYOUTS:
            raise ConfigError(f"layout is {self.layout!r}; it must be one of {', '.join(LAYOUTS)}")

    def fixed(self) -> dict[str, Any]:
        """The fields that a resumed job must agree with, JSON-ready."""
        return _agreed(self)


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """One tuning job.

    Raises:
        ConfigError: a value out of its range, quoting value and range.
    """

    model: Path = _free()
    """Directory of the checkpoint to tune, pruned or not, or its name on the hub; on resume its content is compared,
    not its path."""
    out: Path = _free()
    """Directory to create."""
    text: Spec | Sequence[Spec] = _free()
    """Text, from one source or several (see `text.Source`)."""
    teacher: Path | None = _free(default=None)
    """Directory, or name on the hub, of the dense model whose block outputs `distil` aims at."""
    method: TuneMethod = _free(default="auto")
    """``"lora"`` in memory and end to end, ``"distil"`` streamed and block by block; a job under way keeps the chosen one."""
    samples: int = _fixed(default=128)
    seq_len: int | None = _fixed(default=None)
    """Tokens a sample; None takes 2048, or the model's context if that is shorter."""
    seed: int = _fixed(default=0)
    rank: int = _fixed(default=8)
    """Of each linear's change, at the most."""
    steps: int = _fixed(default=200)
    """Of the whole model for `lora`, of each block for `distil`."""
    rate: float | None = _fixed(default=None)
    """Adam's, at the first step; it falls linearly to zero. None takes 1e-3 for `lora` and 3e-3 for `distil`."""
    dtype: str = _fixed(default="auto")
    """What blocks compute in; ``auto`` is the checkpoint's own on a GPU and float32 on the CPU."""
    activations: str = _fixed(default="auto")
    """What is stored of activations: see `machine.resolve_activations`."""
    cache: Path | None = _free(default=None)
    """Folder for activations; None keeps them beside OUT."""
    device: str = _free(default="auto")
    memory: int | None = _free(default=None)
    """Bytes the device may use; None takes what is free."""
    memory_host: int | None = _free(default=None)
    """Bytes of host memory that activations may be held in, besides `memory`; None holds none, since the kernel keeps
    what was written in memory that is free."""

    def __post_init__(self) -> None:
        _make_paths(self, "model", "out", "teacher", "cache")
        _check_apart(self.out, model=self.model, teacher=self.teacher)
        _check_common(self)
        _check_least(self, ("rank", 1), ("steps", 1))
        if self.rate is not None and not 0 < self.rate < float("inf"):
            raise ConfigError(f"rate is {self.rate:g}; it must be positive and finite")
        if self.method not in TUNE_METHODS:
            raise ConfigError(f"method is {self.method!r}; it must be one of {', '.join(TUNE_METHODS)}")

    def fixed(self) -> dict[str, Any]:
        """The fields that a resumed job must agree with, JSON-ready."""
        return _agreed(self)
