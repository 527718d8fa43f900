"""What to remove and how to re-fit what stays; tensors only. A new recipe is one file and its settings in `settings`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .settings import SETTINGS

if TYPE_CHECKING:
    from .recipe import Recipe

_FILES = {"random": "baselines", "magnitude": "baselines", "wanda-sp": "baselines", "greedy-output": "greedy_output"}
"""The file of a recipe, where it is not its name."""


class _Recipes(Mapping[str, "Recipe[Any]"]):
    """Recipes by name; a recipe's file, and torch with it, is imported when it is asked for."""

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
