"""What to remove and how to re-fit what stays; tensors only. A new recipe is one file and one line here."""

from __future__ import annotations

from typing import Any

from .baselines import MAGNITUDE, RANDOM, WANDA_SP
from .recipe import Recipe
from .sobp import SOBP

RECIPES: dict[str, Recipe[Any]] = {recipe.name: recipe for recipe in (SOBP, RANDOM, MAGNITUDE, WANDA_SP)}
