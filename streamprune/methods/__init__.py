"""What to remove and how to re-fit what stays; tensors only. A new recipe is one file and one line here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError

if TYPE_CHECKING:
    from .recipe import Recipe

_FILES = {
    "default": "default",
    "sobp": "sobp",
    "slimgpt": "slimgpt",
    "greedy-output": "greedy_output",
    "surgeon": "surgeon",
    "random": "baselines",
    "magnitude": "baselines",
    "wanda-sp": "baselines",
}


class _Recipes(Mapping[str, "Recipe[Any]"]):
    """Recipes by name; a recipe's file, and torch with it, is imported when it is asked for."""

    def __getitem__(self, name: str) -> Recipe[Any]:
        module = import_module(f".{_FILES[name]}", __name__)
        recipe: Recipe[Any] = getattr(module, name.upper().replace("-", "_"))
        return recipe

    def __contains__(self, name: object) -> bool:
        return name in _FILES

    def __iter__(self) -> Iterator[str]:
        return iter(_FILES)

    def __len__(self) -> int:
        return len(_FILES)


RECIPES: Mapping[str, Recipe[Any]] = _Recipes()


def check_recipe(name: str) -> None:
    """Refuse a name that is no recipe's.

    Raises:
        ConfigError: there is no such recipe.
    """
    if name not in RECIPES:
        raise ConfigError(f"recipe is {name!r}; it must be one of {', '.join(RECIPES)}")
