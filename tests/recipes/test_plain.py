"""Every recipe against the plain implementation that benchmarks/recipes.py takes time and memory of, on llamas in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import plain
import pytest
import torch

import streamprune
from streamprune import Config
from streamprune.model.skeleton import open_skeleton
from streamprune.pruning.job import Job
from streamprune.recipes.registry import RECIPES

pytestmark = pytest.mark.usefixtures("float64_norms")
Make = Callable[..., Config]
Tiny = Callable[..., Path]


def test_every_recipe_has_its_plain_implementation() -> None:
    assert set(plain.RECIPES) == {name for name, recipe in RECIPES.items() if recipe.thins}


@pytest.mark.parametrize("name", ["llama", "llama-biased"])
def test_sites_are_the_engines(name: str, tiny: Tiny) -> None:
    path = tiny(name, torch.float64)
    theirs = open_skeleton(path, torch.device("cpu"), "float64").all_sites()
    ours = plain.sites_of(plain.load(path, torch.float64))
    fields = ("name", "units", "width", "outputs", "unit_parameters")
    assert [[getattr(site, f) for f in fields] for site in ours] == [
        [getattr(site, f) for f in fields] for site in theirs
    ]


@pytest.mark.parametrize(
    ("recipe", "name"),
    [*((recipe, "llama") for recipe in plain.RECIPES), ("default", "llama-biased"), ("sobp", "llama-biased")],
)
def test_the_engine_gives_what_the_plain_implementation_does(
    recipe: str, name: str, tiny: Tiny, configured: Make
) -> None:
    # More blocks and channels than usual, so that shares and groups differ.
    path = tiny(name, torch.float64, num_hidden_layers=4, intermediate_size=72)
    settings = {"surgeon": {"shots": "1"}, "default": {"sublayers": "off"}}.get(recipe, {})
    config = configured(path, recipe=recipe, dtype="float64", ratio=0.35, settings=settings)
    job = Job(config, None)
    tokens = job.tokens if job.request.needs_text else torch.arange(24).view(2, 12)
    model = plain.prune(path, recipe, tokens, ratio=0.35, round_to=4, size=5, dtype=torch.float64)
    result = streamprune.prune(config)

    assert result.parameters_after == sum(p.numel() for p in model.parameters())
    pruned = streamprune.load(config.out, dtype=torch.float64)
    sizes = {n: p.shape for n, p in model.named_parameters()}
    assert {n: p.shape for n, p in pruned.named_parameters()} == sizes
    if recipe != "random":
        with torch.no_grad():
            torch.testing.assert_close(model(tokens).logits, pruned(tokens).logits, rtol=1e-6, atol=1e-8)
