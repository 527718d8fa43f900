"""What each recipe lets its user set: names, types, limits and defaults of `--set`.

In a module without torch, so that a mistake is told before torch is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import ConfigError

_SWITCH = {"on": True, "off": False, "true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}
UNITS, UNSTRUCTURED = "units", "unstructured"
STRUCTURES = (UNITS, UNSTRUCTURED, "2:4", "4:8")
"""What goes: units, single weights, or M of N neighbouring weights."""


def setting(default: Any, help: str, *, choices: tuple[str, ...] = (), limits: tuple[float, float] = (0.0, 1e9)) -> Any:
    """A field of a settings class; the default's type is the setting's."""
    return field(default=default, metadata={"help": help, "choices": choices, "limits": limits})


@dataclass(frozen=True)
class NoSettings:
    """For recipes with nothing to set."""


@dataclass(frozen=True)
class DefaultSettings:
    """What `--set` reaches."""

    shots: int = setting(1, "in how many equal parts the ratio is removed", limits=(1, 1000))
    labels: str = setting(
        "drawn",
        "whose prediction the gradients are of: tokens that the model draws (Fisher), or the text's (empirical Fisher)",
        choices=("drawn", "text"),
    )
    weighted: bool = setting(True, "weight costs by the gradients' G; off counts output energy alike everywhere")
    target: str = setting(
        "residual",
        "what consumers are fitted to: the dense output with what the stream lacks, without it, or their own output",
        choices=("residual", "dense", "own"),
    )
    compensate: bool = setting(True, "input compensation of q, k, v and gate, up")
    damping: float = setting(0.01, "ridge of every Gram, relative to its mean diagonal", limits=(0.0, 1.0))


@dataclass(frozen=True)
class SobpSettings:
    """What `--set` reaches."""

    gradient: str = setting(
        "fisher",
        "how mask gradients of sequences add up: squares (empirical Fisher, ours) or absolute values (as published)",
        choices=("fisher", "abs"),
    )
    head_weight: float = setting(1.0, "the paper's λ: factor on the importance of attention units")
    refine: bool = setting(True, "local greedy refinement; off keeps the units of the global selection")
    reconstruct: bool = setting(True, "module-wise reconstruction; off leaves the kept weights as they are")
    compensate: bool = setting(True, "input compensation of q, k, v and gate, up")
    damping: float = setting(0.01, "ridge of the site's Gram, relative to its mean diagonal", limits=(0.0, 1.0))
    compensation_damping: float = setting(
        0.01, "ridge of the compensation's Gram, relative likewise", limits=(0.0, 1.0)
    )


@dataclass(frozen=True)
class SlimGptSettings:
    """What `--set` reaches."""

    r0: float = setting(0.4, "the first block's share, as a part of the ratio; 1 is uniform", limits=(0.0, 1.0))
    exact: bool = setting(False, "remove one unit at a time by its exact cost instead of the batched form")
    first_group: int = setting(1024, "FFN channels removed at once at first", limits=(1, 1e6))
    last_group: int = setting(8, "FFN channels removed at once in the end", limits=(1, 1e6))
    damping: float = setting(0.01, "ridge of the site's Gram, relative to its mean diagonal", limits=(0.0, 1.0))


@dataclass(frozen=True)
class GreedyOutputSettings:
    """What `--set` reaches."""

    heads: str = setting(
        "similarity",
        "how heads are chosen: by likeness of their attention maps, or by the second moment of their value path",
        choices=("similarity", "second-moment"),
    )
    tau: float = setting(
        0.0, "divergence below which a head is redundant; 0 raises it until the ratio is met", limits=(0, 1)
    )
    recover: bool = setting(True, "two-step recovery; off leaves the kept weights as they are")
    damping: float = setting(0.01, "ridge of the recovery's Grams, relative to their mean diagonal", limits=(0.0, 1.0))


@dataclass(frozen=True)
class SurgeonSettings:
    """What `--set` reaches."""

    structure: str = setting("units", "what goes: units, single weights, or M of N neighbours", choices=STRUCTURES)
    shots: int = setting(
        0, "shots of the linear schedule; 0 is the paper's: 40 for half of all units, 5 for weights", limits=(0, 1000)
    )
    correlated: int = setting(256, "weights at most whose removal is compensated jointly (m)", limits=(1, 8192))
    joint: bool = setting(True, "a unit's columns cost what removing them together costs; off adds up single ones'")
    update_rows: bool = setting(
        False, "correlated updates of the producers too (eq. 12), where the consumer's have made good the same loss"
    )
    lora_steps: int = setting(
        0, "low-rank corrections: Adam steps on the text after each shot, absorbed", limits=(0, 1e6)
    )
    lora_rank: int = setting(8, "their rank", limits=(1, 4096))
    lora_rate: float = setting(1e-3, "their rate, falling to zero within a shot", limits=(0.0, 1.0))
    damping: float = setting(0.01, "ridge of every factor, relative to its mean diagonal", limits=(0.0, 1.0))


@dataclass(frozen=True)
class MagnitudeSettings:
    """What `--set` reaches."""

    structure: str = setting("units", "what goes: units, single weights, or M of N neighbours", choices=STRUCTURES)


SETTINGS: dict[str, type[Any]] = {
    "default": DefaultSettings,
    "sobp": SobpSettings,
    "slimgpt": SlimGptSettings,
    "greedy-output": GreedyOutputSettings,
    "surgeon": SurgeonSettings,
    "random": NoSettings,
    "magnitude": MagnitudeSettings,
    "wanda-sp": NoSettings,
}
"""The settings of each recipe, by its name."""


def parse(recipe: str, given: Mapping[str, str]) -> Any:
    """A recipe's settings from ``name=value`` texts.

    Raises:
        ConfigError: no such recipe, an unknown name, or a value of another type or beyond its limits, with what there is.
    """
    if recipe not in SETTINGS:
        raise ConfigError(f"recipe is {recipe!r}; it must be one of {', '.join(SETTINGS)}")
    known = {f.name: f for f in fields(SETTINGS[recipe])}
    values: dict[str, Any] = {}
    for name, text in given.items():
        if name not in known:
            raise ConfigError(
                f"recipe {recipe} has no setting {name!r}; it has {', '.join(known) if known else 'none'}"
            )
        values[name] = _parse(recipe, name, text, known[name].default, known[name].metadata)
    return SETTINGS[recipe](**values)


def _parse(recipe: str, name: str, text: str, default: Any, metadata: Mapping[str, Any]) -> Any:
    where = f"recipe {recipe}, setting {name} = {text!r}"
    if isinstance(default, bool):
        if text.lower() not in _SWITCH:
            raise ConfigError(f"{where}: it must be on or off")
        return _SWITCH[text.lower()]
    if isinstance(default, str):
        if text not in metadata["choices"]:
            raise ConfigError(f"{where}: it must be one of {', '.join(metadata['choices'])}")
        return text
    try:
        number = type(default)(text)
    except ValueError:
        raise ConfigError(f"{where}: it must be a number") from None
    least, most = metadata["limits"]
    if not least <= number <= most:
        raise ConfigError(f"{where}: it must be from {least:g} to {most:g}")
    return number
