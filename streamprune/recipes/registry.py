"""All recipes. To add one, write one file in this folder, its settings in `settings`, and name its class below."""

from __future__ import annotations

from typing import Any

from .baselines import Magnitude, Random, WandaSp
from .default import Default
from .greedy_output import GreedyOutput
from .reap import Reap
from .recipe import Recipe
from .slimgpt import SlimGpt
from .sobp import Sobp
from .surgeon import Surgeon

RECIPES: dict[str, type[Recipe[Any]]] = {
    recipe.name: recipe for recipe in (Default, Sobp, SlimGpt, GreedyOutput, Surgeon, Random, Magnitude, WandaSp, Reap)
}
"""Classes of recipes by name."""
