"""Recipes: which units to remove and how to refit the remaining weights.

Recipes see tensors only: no files, no models. To add one, write one file here, its settings in `settings`, and its class below.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .recipe import Recipe

_CLASSES = {
    "default": "default.Default",
    "sobp": "sobp.Sobp",
    "slimgpt": "slimgpt.SlimGpt",
    "greedy-output": "greedy_output.GreedyOutput",
    "surgeon": "surgeon.Surgeon",
    "random": "baselines.Random",
    "magnitude": "baselines.Magnitude",
    "wanda-sp": "baselines.WandaSp",
}


class _Recipes(Mapping[str, "type[Recipe[Any]]"]):
    """Classes of recipes by name. The lookup imports the recipe's module, and torch with it, on first use."""

    def __getitem__(self, name: str) -> type[Recipe[Any]]:
        module, _, cls = _CLASSES[name].partition(".")
        recipe: type[Recipe[Any]] = getattr(import_module(f".{module}", __name__), cls)
        return recipe

    def __contains__(self, name: object) -> bool:
        return name in _CLASSES

    def __iter__(self) -> Iterator[str]:
        return iter(_CLASSES)

    def __len__(self) -> int:
        return len(_CLASSES)


RECIPES: Mapping[str, type[Recipe[Any]]] = _Recipes()
