"""Values up to float16's end beside values of a thousandth: no sum overflows, and what is small is still there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from conftest import edit_tensors, make_tiny
from safetensors.torch import load_file
from torch import Tensor

import streamprune
from streamprune import Config
from streamprune.maths import kfac
from streamprune.maths.refit import output_error
from streamprune.maths.sums import Gram, MaskGradient
from streamprune.model.site import Site
from streamprune.model.skeleton import open_skeleton
from streamprune.pruning import block as pruning_block
from streamprune.pruning.job import Job
from streamprune.recipes.baselines import Magnitude, WandaSp
from streamprune.recipes.recipe import Problem
from streamprune.recipes.settings import MagnitudeSettings, NoSettings

Make = Callable[..., Config]
CPU = torch.device("cpu")
LARGE, SMALL = 6e4, 1e-3


def outliers(*shape: int, seed: int = 0) -> Tensor:
    """float16: the first of the last dimension large everywhere, the second now and then, all others small."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * SMALL
    x[..., 0] = LARGE * torch.sign(torch.randn(shape[:-1], generator=generator))
    x[..., 1] += LARGE * (torch.rand(shape[:-1], generator=generator) < 0.01)
    return x.half()


def test_a_gram_holds_the_small_beside_the_large() -> None:
    x, y = outliers(40, 500, 24), outliers(40, 500, 5, seed=1)
    sums = Gram(24, cross=5, device=CPU, dtype=torch.float32)
    for part, other in zip(x.split(2), y.split(2), strict=True):
        sums.add(part, other)
    h, c = sums.mean("here")
    flat, other = x.double().flatten(0, 1), y.double().flatten(0, 1)
    sizes, others = (each.square().mean(dim=0).sqrt() for each in (flat, other))
    # 1e-6 beside 3.6e9.
    assert float(sizes[2:].square().max()) < 1e-14 * float(sizes[0].square())
    assert c is not None
    assert float(((h.double() - flat.T @ flat / len(flat)) / torch.outer(sizes, sizes)).abs().max()) < 1e-5
    assert float(((c.double() - other.T @ flat / len(flat)) / torch.outer(others, sizes)).abs().max()) < 1e-5


def test_a_gram_of_nothing_but_large_values() -> None:
    sums = Gram(300, cross=2, device=CPU, dtype=torch.float32)
    x = torch.full((8, 2048, 300), LARGE, dtype=torch.float16)
    for _ in range(3):
        sums.add(x, x[..., :2])
    for mean in sums.mean("here"):
        assert mean is not None
        torch.testing.assert_close(mean, torch.full_like(mean, float(x[0, 0, 0]) ** 2), rtol=1e-3, atol=0)


@pytest.mark.parametrize("width", [1, 4])
def test_mask_gradients_hold_the_small_beside_the_large(width: int) -> None:
    x, gradient = outliers(6, 400, 24), outliers(6, 400, 24, seed=1).flip(-1)
    x[..., 8:12], gradient[..., 8:12] = LARGE, LARGE
    sums = MaskGradient(24 // width, width)
    for rows in (slice(0, 4), slice(4, 6)):
        sums.add(x[rows], gradient[rows], scale=399.0)
    each = x.double() * gradient.double() / 399
    g, most = (y.sum(dim=1).view(6, -1, width).sum(dim=2) for y in (each, each.abs()))
    assert float((sums.magnitudes - g.abs().sum(dim=0)).abs().div(most.sum(dim=0)).max()) < 1e-5
    assert float((sums.squares - g.square().sum(dim=0)).abs().div(most.square().sum(dim=0)).max()) < 1e-5
    assert float(sums.magnitudes.max()) > 1e9 * float(sums.magnitudes.min()) > 0


def curvature(x: Tensor) -> Tensor:
    flat = x.flatten(0, 1).float()
    return flat.T @ flat / len(flat)


def test_costs_and_scores_are_those_of_float64() -> None:
    """K-FAC's costs, magnitude and Wanda, and the error of the report, of outlying weights on outlying inputs and gradients."""
    d, n = 10, 24
    w = outliers(d, n, seed=2).flip(-1).float()
    a, g = curvature(outliers(8, 300, n)), curvature(outliers(8, 300, d, seed=1))
    producers = (outliers(n, d, seed=3).float(), outliers(n, d, seed=4).float())

    def problem(dtype: torch.dtype) -> Problem:
        return Problem(
            site=Site(0, "ffn", n, 1, d, 3 * d),
            w=w.to(dtype),
            stored=torch.float16,
            read_producers=lambda: tuple(each.to(dtype) for each in producers),
            zeros=None,
            h=a.to(dtype),
            tokens=1 << 20,
            inputs=None,
            findings={},
            generator=torch.Generator(),
        )

    def figures(dtype: torch.dtype) -> list[Tensor]:
        w_, a_, g_ = (each.to(dtype) for each in (w, a, g))
        a_inverse, g_inverse = (torch.linalg.inv(kfac.damped(each, 0.01).double()).to(dtype) for each in (a_, g_))
        kept = torch.arange(0, n, 2)
        return [
            kfac.column_costs(w_, kfac.damped(g_, 0.01), a_inverse),
            kfac.group_costs(w_, kfac.damped(g_, 0.01), a_inverse, n // 4),
            kfac.row_costs(w_, kfac.damped(a_, 0.01), g_inverse),
            kfac.element_costs(w_, g_inverse, a_inverse),
            Magnitude(MagnitudeSettings()).score(problem(dtype)),
            WandaSp(NoSettings()).score(problem(dtype)),
            torch.tensor(output_error(w_, a_, w_[:, kept] * 0.5, kept)),
        ]

    for single, double in zip(figures(torch.float32), figures(torch.float64), strict=True):
        torch.testing.assert_close(single.double(), double.double(), rtol=1e-4, atol=0)


# Whole jobs.


def outlying(folder: Path, *, large: float) -> Path:
    """A float16 checkpoint of which some channels and heads are that large inside, and others a thousandth."""
    make_tiny(folder, "llama", torch.float16, num_key_value_heads=4)

    def change(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("up_proj.weight"):
                tensor[3] = (tensor[3].float() * large / 100).half()
                tensor[8:24] *= SMALL
            if name.endswith("down_proj.weight"):
                tensor[:, 3] *= 1e-4
                tensor[5, 7] = LARGE / 1e4
            if name.endswith("v_proj.weight"):
                tensor[:8] = (tensor[:8].float() * large / 100).half()
                tensor[8:16] *= SMALL
            if name.endswith("o_proj.weight"):
                tensor[:, :8] *= 1e-4

    edit_tensors(folder, change)
    return folder


JOBS = [
    ("default", {}),
    ("sobp", {}),
    ("slimgpt", {}),
    ("greedy-output", {}),
    ("greedy-output", {"heads": "second-moment"}),
    ("surgeon", {"shots": "2"}),
    ("surgeon", {"shots": "1", "structure": "2:4"}),
    ("wanda-sp", {}),
    ("magnitude", {}),
    ("magnitude", {"structure": "unstructured"}),
]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("recipe", "settings"), JOBS)
def test_jobs_on_outlying_models(
    recipe: str, settings: dict[str, str], dtype: str, configured: Make, tmp_path: Path
) -> None:
    # In float32 activations of 6e4 and more; in float16 what its forward can hold.
    path = outlying(tmp_path / "model", large=LARGE if dtype == "float32" else 4e3)
    config = configured(path, recipe=recipe, settings=settings, dtype=dtype, refine=2 if recipe == "sobp" else 0)
    streamprune.prune(config)
    for shard in config.out.glob("*.safetensors"):
        for name, tensor in load_file(shard).items():
            assert tensor.dtype == torch.float16
            assert bool(torch.isfinite(tensor).all()), name


def test_a_jobs_gram_is_that_of_float64(configured: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = outlying(tmp_path / "model", large=LARGE)
    config = configured(path, recipe="wanda-sp", dtype="float32")
    real, grams = pruning_block.output_error, list[Tensor]()

    def watched(w: Tensor, h: Tensor, *more: Any) -> float:
        grams.append(h.double())
        return real(w, h, *more)

    monkeypatch.setattr(pruning_block, "output_error", watched)
    streamprune.prune(config)
    sites = open_skeleton(path, CPU, "float64").all_sites()
    model = reference.load(path)
    names = {place.site.name: place.consumer for place in reference.places(model, sites)}
    (z,) = reference.capture(model, [names["blocks.0.attention"]], Job(config, None).tokens)
    sizes = z.square().mean(dim=0).sqrt()
    assert float(sizes.max()) > 1e5 * float(sizes.min()) > 0
    assert float(((grams[0] - z.T @ z / len(z)) / torch.outer(sizes, sizes)).abs().max()) < 1e-3
