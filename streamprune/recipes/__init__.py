"""Recipes: which units to remove and how to refit the remaining weights.

Recipes see tensors only: no files, no models. To add one, write one file here and add its settings to `settings`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .settings import SETTINGS

if TYPE_CHECKING:
    from .recipe import Recipe

_FILES = {"random": "baselines", "magnitude": "baselines", "wanda-sp": "baselines", "greedy-output": "greedy_output"}
"""Module of each recipe whose module is not named after it."""


class _Recipes(Mapping[str, "Recipe[Any]"]):
    """Recipes by name. The lookup imports the recipe's module, and torch with it, on first use."""

    def __getitem__(self, name: str) -> Recipe[Any]:
        if name not in self:
            raise KeyError(name)
        module = import_module(f".{_FILES.get(name, name)}", __name__)
        recipe: Recipe[Any] = getattr(module, name.upper().replace("-", "_"))
        return recipe

    def __contains__(self, name: object) -> bool:
        return name in SETTINGS

    def __iter__(self) -> Iterator[str]:
        return iter(SETTINGS)

    def __len__(self) -> int:
        return len(SETTINGS)


RECIPES: Mapping[str, Recipe[Any]] = _Recipes()
