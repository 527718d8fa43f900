"""What to remove and how to re-fit what stays; tensors only. A new recipe is one file and one line here."""

from __future__ import annotations

from typing import Any

from .baselines import MAGNITUDE, RANDOM, WANDA_SP
from .default import DEFAULT
from .greedy_output import GREEDY_OUTPUT
from .recipe import Recipe
from .slimgpt import SLIMGPT
from .sobp import SOBP
from .surgeon import SURGEON

RECIPES: dict[str, Recipe[Any]] = {
    recipe.name: recipe for recipe in (DEFAULT, SOBP, SLIMGPT, GREEDY_OUTPUT, SURGEON, RANDOM, MAGNITUDE, WANDA_SP)
}
