"""Settings of each recipe: names, types, limits and defaults for `--set`.

This module does not import torch, so that an invalid setting is reported before torch is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import ConfigError

_SWITCH = {"on": True, "off": False, "true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}
UNITS, UNSTRUCTURED, LINES = "units", "unstructured", "rows-columns"
STRUCTURES = (UNITS, UNSTRUCTURED, "2:4", "4:8")
"""What is removed: units, single weights, or M of N neighbouring weights."""


def setting(default: Any, help: str, *, choices: tuple[str, ...] = (), limits: tuple[float, float] = (0.0, 1e9)) -> Any:
    """Define a field of a settings class. The type of the default is the type of the setting."""
    return field(default=default, metadata={"help": help, "choices": choices, "limits": limits})


@dataclass(frozen=True)
class NoSettings:
    """Settings of a recipe that has none."""


@dataclass(frozen=True)
class DefaultSettings:
    shots: int = setting(1, "number of equal shots in which the ratio is removed", limits=(1, 1000))
    labels: str = setting(
        "drawn",
        "labels of the loss: tokens drawn from the model (Fisher), or those of the text (empirical Fisher)",
        choices=("drawn", "text"),
    )
    weighted: bool = setting(True, "weight costs by the gradient Gram G; off weights all outputs equally")
    target: str = setting(
        "residual",
        "what consumers are fitted to: dense output plus the residual stream's error, dense output, or their own output",
        choices=("residual", "dense", "own"),
    )
    compensate: bool = setting(True, "input compensation of q, k, v and gate, up")
    sublayers: bool = setting(True, "let a block's attention or FFN go as a whole; off keeps a unit of each")
    damping: float = setting(
        0.01, "ridge of the Grams by which units are chosen, relative to their mean diagonal", limits=(0.0, 1.0)
    )
    fit_damping: float = setting(
        0.0, "ridge of all fits, relative likewise; 0 chooses it by calibration tokens per column", limits=(0.0, 10.0)
    )


@dataclass(frozen=True)
class SobpSettings:
    gradient: str = setting(
        "fisher",
        "average the squares of the sequences' mask gradients (empirical Fisher, ours) or their absolute values, or take the "
        "absolute value of their average (the gradient of the whole text's loss)",
        choices=("fisher", "abs", "mean"),
    )
    head_weight: float = setting(1.0, "the paper's λ: factor on the importance of heads, also those of linear mixers")
    refine: bool = setting(True, "local greedy refinement; off keeps the units of the global selection")
    reconstruct: bool = setting(True, "module-wise reconstruction; off leaves the kept weights as they are")
    compensate: bool = setting(True, "input compensation of q, k, v and gate, up")
    damping: float = setting(0.01, "ridge of the site's Gram, relative to its mean diagonal", limits=(0.0, 1.0))
    compensation_damping: float = setting(
        0.01, "ridge of the compensation's Gram, relative to its mean diagonal", limits=(0.0, 1.0)
    )


@dataclass(frozen=True)
class SlimGptSettings:
    r0: float = setting(0.4, "the first block's share, as a fraction of the ratio; 1 is uniform", limits=(0.0, 1.0))
    r_last: float = setting(
        0.0, "the last block's share likewise; 0 is what makes the blocks' mean the ratio", limits=(0.0, 1000.0)
    )
    exact: bool = setting(False, "remove one unit at a time by its exact cost instead of in batches")
    first_group: int = setting(1024, "size of the first group of FFN channels removed together", limits=(1, 1e6))
    last_group: int = setting(8, "size of the last group of FFN channels removed together", limits=(1, 1e6))
    damping: float = setting(0.01, "ridge of the site's Gram, relative to its mean diagonal", limits=(0.0, 1.0))


@dataclass(frozen=True)
class GreedyOutputSettings:
    heads: str = setting(
        "similar-first",
        "how heads are chosen: those with similar attention maps, then those whose value path has the least second moment; "
        "by the second moment alone; or by similarity alone",
        choices=("similar-first", "second-moment", "similarity"),
    )
    tau: float = setting(
        0.16,
        "divergence below which heads are similar; with heads=similarity, 0 raises it until the ratio is met",
        limits=(0, 1),
    )
    recover: str = setting(
        "before",
        "recovery before units are chosen (the paper's: fits to dense outputs), after (the OBS update), both, or off",
        choices=("before", "after", "both", "off"),
    )
    damping: float = setting(0.01, "ridge of the recovery's Grams, relative to their mean diagonal", limits=(0.0, 1.0))


@dataclass(frozen=True)
class MagnitudeSettings:
    structure: str = setting(
        "units", "what is removed: units, single weights, or M of N neighbours", choices=STRUCTURES
    )
    norm: str = setting("l2", "sum the squares of a unit's weights, or their absolute values", choices=("l2", "l1"))


@dataclass(frozen=True)
class SurgeonSettings:
    structure: str = setting(
        "units",
        "what is removed: units, single weights, M of N neighbours, or rows and columns of every linear apart (zeros)",
        choices=(*STRUCTURES, LINES),
    )
    curvature: str = setting(
        "full",
        "curvature of the loss: G ⊗ A (full), its diagonal (k-obd) or that of I ⊗ A (l-obd); diagonals update no other weights",
        choices=("full", "k-obd", "l-obd"),
    )
    shots: int = setting(
        0,
        "shots of the linear schedule; 0 is the paper's: 40 to remove half of all units, rows and columns, 5 for weights",
        limits=(0, 1000),
    )
    correlated: int = setting(
        256, "maximum number of weights whose removal is compensated jointly (the paper's m)", limits=(1, 8192)
    )
    joint: bool = setting(
        True, "compute a unit's cost for removing its columns together; off sums the costs of single columns"
    )
    update_rows: bool = setting(
        False, "correlated updates of the producers too (eq. 12); the consumer's updates already recover the same loss"
    )
    lora_steps: int = setting(
        0, "Adam steps of low-rank training on the text after each shot, merged into the weights", limits=(0, 1e6)
    )
    lora_rank: int = setting(8, "rank of the low-rank training", limits=(1, 4096))
    lora_rate: float = setting(
        1e-3, "learning rate of the low-rank training, falling to zero within a shot", limits=(0.0, 1.0)
    )
    damping: float = setting(0.01, "ridge of every factor, relative to its mean diagonal", limits=(0.0, 1.0))


SETTINGS: dict[str, type[Any]] = {
    "default": DefaultSettings,
    "sobp": SobpSettings,
    "slimgpt": SlimGptSettings,
    "greedy-output": GreedyOutputSettings,
    "surgeon": SurgeonSettings,
    "random": NoSettings,
    "magnitude": MagnitudeSettings,
    "wanda-sp": NoSettings,
    "reap": NoSettings,
}
"""Settings class of each recipe, by recipe name."""


def parse(recipe: str, given: Mapping[str, str]) -> Any:
    """Parse a recipe's settings from the strings of ``name=value`` options.

    Raises:
        ConfigError: the recipe or a name is unknown, or a value has the wrong type or is outside its limits. The
            message lists what is allowed.
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
