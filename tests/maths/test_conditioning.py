"""Ill-conditioned Grams: finite weights, no worse than plain removal of the same units, and the damping that was used.

*Tolerance.* A re-fit minimises the error on a Gram that was summed in float32, and its weights are rounded to what they are stored
in. The first moves an energy by some n·2⁻²⁴ of itself, 3e-6 here; rounding the kept weights adds (2⁻²⁴)² of the whole output's energy,
4e-15. So an error may be above that of plain removal by 1e-4 of it and 1e-12 of the whole, and no more.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import edit_tensors, make_tiny
from safetensors.torch import load_file
from torch import Tensor

import streamprune
from streamprune import Config
from streamprune.maths import kfac
from streamprune.maths import refit as linalg
from streamprune.maths.greedy import greedy_removal
from streamprune.maths.refit import cholesky, compensation, fit, inverse, refit_as_stored
from streamprune.maths.slimgpt import batched_group_removal, dynamic_group_removal
from streamprune.model.site import Site
from streamprune.pruning import block
from streamprune.recipes import masks, obs, surgeon
from streamprune.recipes.recipe import Problem
from streamprune.recipes.registry import RECIPES
from streamprune.recipes.settings import parse

Make = Callable[..., Config]
N, D, TOKENS = 48, 20, 400


def few_tokens(x: Tensor) -> Tensor:
    return x[: N // 3]


def one_token(x: Tensor) -> Tensor:
    return x[:1]


def dead(x: Tensor) -> Tensor:
    x[:, ::3] = 0
    return x


def all_dead(x: Tensor) -> Tensor:
    return x * 0


def nearly_duplicated(x: Tensor) -> Tensor:
    x[:, 1::2] = x[:, ::2] + 1e-5 * x[:, 1::2]
    return x


def two_large_alike(x: Tensor) -> Tensor:
    x[:, 5] *= 1e6
    x[:, 6] += x[:, 5]
    return x


def half_small(x: Tensor) -> Tensor:
    x[:, : N // 2] *= 1e-6
    return x


def all_sizes(x: Tensor) -> Tensor:
    return x * 10 ** torch.linspace(-6, 6, N, dtype=x.dtype)


def large_constants_beside_small(x: Tensor) -> Tensor:
    x *= 1e-3
    x[:, 7:11] = 1e3
    return x


def far_from_zero(x: Tensor) -> Tensor:
    return x + 1e3


def all_at_once(x: Tensor) -> Tensor:
    x = x[: N // 2]
    x[:, 5] *= 1e6
    x[:, 6] = x[:, 5]
    x[:, 7:10] = 0
    x[:, 10:14] = 3.0
    x[:, 14] *= 1e-6
    return x


CASES = [
    few_tokens,
    one_token,
    dead,
    all_dead,
    nearly_duplicated,
    two_large_alike,
    half_small,
    all_sizes,
    large_constants_beside_small,
    far_from_zero,
    all_at_once,
]
case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
DAMPINGS = (0.01, 1e-4, 0.0)
METHODS = ("default", "sobp", "slimgpt", "greedy-output", "surgeon")


def inputs(case: Callable[[Tensor], Tensor], seed: int) -> tuple[torch.Generator, Tensor]:
    """Correlated inputs (tokens, N) in float64, spoilt."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(N, N, generator=generator, dtype=torch.float64) / N**0.5
    return generator, case(torch.randn(TOKENS, N, generator=generator, dtype=torch.float64) @ mix)


def gram(x: Tensor) -> Tensor:
    """Their mean Gram as a sweep sums it, in float32, micro-batch by micro-batch."""
    h = torch.zeros(x.shape[1], x.shape[1])
    for part in x.float().split(16):
        h.addmm_(part.T, part)
    return h / len(x)


def energy(change: Tensor, x: Tensor) -> float:
    """Mean squared output of a change of the weights, in float64."""
    return float((x @ change.double().T).square().sum()) / len(x)


def no_worse(w: Tensor, x: Tensor, fitted: Tensor, kept: Tensor, stored: torch.dtype) -> None:
    """Brute force in float64: the re-fitted columns against those of `w` as they were, both as they are stored."""
    assert bool(torch.isfinite(fitted.to(stored)).all())
    after, plain = w.double(), w.double()
    after[:, kept] -= fitted.to(stored).double()
    plain[:, kept] -= w[:, kept].to(stored).double()
    assert energy(after, x) <= energy(plain, x) * (1 + 1e-4) + 1e-12 * energy(w, x)


def removals(h: Tensor, units: int, width: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Units to keep, ascending: half of them at random, all but those of least energy, all but those of most."""
    by_energy = h.diagonal().view(units, width).sum(dim=1).argsort()
    yield torch.randperm(units, generator=generator)[: units // 2].sort().values
    yield by_energy[3:].sort().values
    yield by_energy[:-3].sort().values


def problem(width: int, w: Tensor, h: Tensor, stored: torch.dtype, generator: torch.Generator) -> Problem:
    kind, units = ("ffn" if width == 1 else "attention"), N // width
    site = Site(0, kind, units, width, D, 3 * D * width, heads=units, linears=(N * D,) * 3)  # type: ignore[arg-type]
    producers = tuple(torch.randn(N, D, generator=generator) for _ in range(2))
    return Problem(
        site=site,
        w=w,
        stored=stored,
        read_producers=lambda: producers,
        zeros=None,
        h=h,
        tokens=1 << 20,
        inputs=torch.eye(D),
        findings={"a.consumer": h, "g.0": gram(producers[0].T), "g.1": gram(producers[1].T)},
        generator=generator,
    )


@case
@pytest.mark.parametrize(
    ("recipe", "stored"), [*((name, torch.bfloat16) for name in METHODS), ("default", torch.float32)]
)
def test_refits_are_no_worse_than_none(recipe: str, stored: torch.dtype, case: Callable[[Tensor], Tensor]) -> None:
    generator, x = inputs(case, 0)
    h, w = gram(x), torch.randn(D, N, generator=generator).to(stored).float()
    for damping, width in product(DAMPINGS, (1, 6)):
        method = RECIPES[recipe](parse(recipe, {"damping": str(damping)}))
        given = problem(width, w, h, stored, generator)
        chosen = list(removals(h, N // width, width, generator))
        if recipe != "surgeon":  # it selects from whole surveys
            chosen.append(method.select(given, N // width // 2))
        for kept in chosen:
            refit = method.reconstruct(given, kept)
            assert refit.damping is None or refit.damping >= damping
            no_worse(w, x, refit.w, linalg.unit_columns(kept, width), stored)


@case
def test_fits_are_no_worse_than_none(case: Callable[[Tensor], Tensor]) -> None:
    """To a target and to other inputs; and what stays of the fitted weights, against what stays of those before."""
    stored = torch.bfloat16
    generator, x = inputs(case, 0)
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64) * x.std(dim=0, correction=0)
    before = x * (1 + 0.05 * torch.randn(N, generator=generator, dtype=torch.float64)) + 0.05 * noise
    w = torch.randn(D, N, generator=generator).to(stored).float()
    h, c = gram(x), (before.float().T @ x.float()) / len(x)
    target = before @ w.double().T

    def missed(fitted: Tensor) -> float:
        return float((target - x @ fitted.to(stored).double().T).square().sum()) / len(x)

    limit = missed(w) * (1 + 1e-4) + 1e-12 * energy(w, x)
    for damping in DAMPINGS:
        factor, used = cholesky(h, damping, "here")
        assert used >= damping
        assert missed(w + w @ compensation(h, c, factor)) <= limit
        fitted = fit(w, h, w @ c, factor)
        assert missed(fitted) <= limit
        for kept in removals(h, N, 1, generator):
            plain, both = torch.zeros_like(w), torch.zeros_like(w)
            plain[:, kept] = w[:, kept]
            both[:, kept] = refit_as_stored(fitted, h, kept, damping, stored, "here")[0]
            assert missed(both) <= missed(plain) * (1 + 1e-4) + 1e-12 * energy(w, x)


@case
def test_units_are_chosen_by_numbers(case: Callable[[Tensor], Tensor]) -> None:
    generator, x = inputs(case, 0)
    h, w = gram(x), torch.randn(D, N, generator=generator)
    for damping in DAMPINGS:
        given: dict[str, Any] = {"damping": damping, "place": "here"}
        found = [
            greedy_removal(w, h, width=1, count=N - 1, **given),
            greedy_removal(w, h, width=6, count=N // 6 - 1, **given),
            dynamic_group_removal(w, h, count=N - 1, first=16, last=2, **given),
            batched_group_removal(w, h, width=6, count=N // 6 - 1, **given),
        ]
        for order, costs in found:
            assert len(set(order.tolist())) == len(order)
            assert bool((costs >= 0).all() & torch.isfinite(costs).all())


def test_pairs_that_rounding_cannot_tell_apart_take_more_damping() -> None:
    n, generator = 128, torch.Generator().manual_seed(0)
    mix = torch.randn(n, n, generator=generator, dtype=torch.float64) / n**0.5
    x = torch.randn(8 * n, n, generator=generator, dtype=torch.float64) @ mix
    x[:, 1::2] = x[:, ::2]
    h, w = gram(x), torch.randn(24, n, generator=generator)
    order, costs = greedy_removal(w, h, width=1, count=n - 1, damping=1e-6, place="here")
    assert len(set(order.tolist())) == n - 1
    assert bool((costs >= 0).all() & torch.isfinite(costs).all())
    # One of each pair costs next to nothing.
    assert float(costs[: n // 2].max()) < 1e-2 * float(costs[n // 2 :].median())


@case
def test_zeros_cost_no_more_loss_than_without_an_update(case: Callable[[Tensor], Tensor]) -> None:
    generator, x = inputs(case, 0)
    h, w = gram(x), torch.randn(D, N, generator=generator)
    gradients = torch.randn(D // 2, D, generator=generator, dtype=torch.float64)
    g = gram(gradients)

    def loss(change: Tensor) -> float:
        return float((gradients @ change.double() @ x.T).square().sum()) / len(x) / len(gradients)

    shapes = (("unstructured", 8), ("unstructured", 256), ("2:4", 64))
    for damping, (structure, at_most) in product(DAMPINGS, shapes):
        g_inverse, a_inverse = (inverse(each, damping, "here")[0] for each in (g, h))
        mask = masks.mask(kfac.element_costs(w, g_inverse, a_inverse), w.numel() // 2, structure, "here")
        updated, _ = kfac.remove_elements(w, g_inverse, a_inverse, mask, at_most=at_most, place="here")
        updated, step = kfac.best_step(w, updated, mask, g, h)
        assert 0 <= step <= 1
        assert bool(torch.isfinite(updated).all())
        assert not bool(updated[mask].any())
        assert loss(updated - w) <= loss(w * mask) * (1 + 1e-4) + 1e-12 * loss(w)


def test_many_rows_are_told_from_a_few_sums_of_them() -> None:
    generator, x = inputs(half_small, 1)
    h, w = gram(x), torch.randn(300, N, generator=generator).bfloat16().float()
    _, kept, _ = removals(h, N, 1, generator)
    for damping in (0.01, 0.0):
        fitted, used = refit_as_stored(w, h, kept, damping, torch.bfloat16, "here")
        no_worse(w, x, fitted, kept, torch.bfloat16)
        assert used is not None
        assert used > 0 if damping == 0 else used == damping


def test_where_no_re_fit_is_any_better_the_weights_stay_and_no_damping_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = linalg.refit
    monkeypatch.setattr(linalg, "refit", lambda w, *more: (real(w, *more)[0] * -3, real(w, *more)[1]))
    generator, x = inputs(few_tokens, 0)
    w, kept = torch.randn(D, N, generator=generator), torch.arange(0, N, 2)
    fitted, used = refit_as_stored(w, gram(x), kept, 0.01, torch.float32, "here")
    assert used is None
    assert torch.equal(fitted, w[:, kept])


# Whole jobs.


def spoilt(folder: Path, dtype: torch.dtype) -> Path:
    """A model with dead, duplicated, very large and very small channels and heads."""
    make_tiny(folder, "llama", dtype, num_key_value_heads=4)

    def change(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith(("up_proj.weight", "gate_proj.weight")):
                tensor[20:24] = tensor[24:28]
            if name.endswith("up_proj.weight"):
                tensor[:8] = 0
                tensor[9] *= 1e6
                tensor[10:16] *= 1e-6
            if name.endswith("down_proj.weight"):
                tensor[:, 9] *= 1e-6
            if name.endswith("v_proj.weight"):
                tensor[:8] = 0
                tensor[8:16] = tensor[16:24]
                tensor[24:26] *= 1e4
            if name.endswith("o_proj.weight"):
                tensor[:, 24:26] *= 1e-4

    edit_tensors(folder, change)
    return folder


JOBS: list[tuple[str, dict[str, str]]] = [
    ("default", {}),
    ("sobp", {}),
    ("slimgpt", {}),
    ("greedy-output", {}),
    ("surgeon", {"shots": "1", "update_rows": "on"}),
    ("surgeon", {"shots": "1", "structure": "unstructured"}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("stored", "undamped"), [(torch.bfloat16, False), (torch.float32, True)])
@pytest.mark.parametrize(("recipe", "settings"), JOBS)
def test_jobs_on_spoilt_models(
    recipe: str,
    settings: dict[str, str],
    undamped: bool,
    stored: torch.dtype,
    configured: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if undamped:
        settings = settings | {"damping": "0"} | ({"compensation_damping": "0"} if recipe == "sobp" else {})
    path = spoilt(tmp_path / "model", stored)
    checked = 0

    def watch(module: Any, name: str) -> None:
        real = getattr(module, name)

        def call(w: Tensor, h: Tensor, fitted: Tensor, kept: Tensor, *more: Any) -> Any:
            nonlocal checked
            values, vectors = torch.linalg.eigh(h.double())
            # Its square root stands for inputs with this very Gram.
            x = (values.clamp_min(0).sqrt() * vectors).T * len(h) ** 0.5
            found = real(w, h, fitted, kept, *more)
            if found is not False:
                no_worse(w, x, fitted, kept, stored)
                checked += 1
            return found

        monkeypatch.setattr(module, name, call)

    watch(block, "output_error")
    watch(surgeon, "lowers_error")
    for samples, length in ((2, 8), (12, 24)):
        config = configured(
            path, f"out-{samples}", recipe=recipe, settings=settings, samples=samples, seq_len=length, ratio=0.35
        )
        streamprune.prune(config)
        for shard in config.out.glob("*.safetensors"):
            assert all(bool(torch.isfinite(each).all()) for each in load_file(shard).values())
        report = json.loads((config.out / "report.json").read_text())
        told = [site.get(name) for site in report["sites"] for name in REPORTED]
        assert max(each for each in told if each is not None) >= (1e-6 if undamped else 0.01)
    assert checked > 6 or "structure" in settings


REPORTED = ("damping", "target_damping", "compensation_damping")


@pytest.mark.parametrize(("recipe", "damping"), [("default", "0"), ("default", "0.01"), ("sobp", "0")])
def test_the_report_has_every_damping_that_was_used(
    recipe: str, damping: str, configured: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    took: dict[tuple[str, str], float] = {}

    def watch(module: Any, name: str, stage: Callable[[Tensor], str]) -> None:
        real = getattr(module, name)

        def call(*arguments: Any, **options: Any) -> Any:
            found = real(*arguments, **options)
            place = next(each for each in (*arguments, *options.values()) if isinstance(each, str))
            took[place, stage(arguments[0])] = found[1]
            return found

        monkeypatch.setattr(module, name, call)

    # Consumers are 48 and 40 wide, so that their Grams are told from those of what producers read.
    watch(block, "cholesky", lambda h: "target_damping" if len(h) in (48, 40) else "compensation_damping")
    watch(obs, "refit_as_stored", lambda w: "damping")
    path = make_tiny(tmp_path / "model", "llama", num_key_value_heads=4, num_attention_heads=4, head_dim=10)
    settings = {
        "damping": damping,
        "compensation_damping" if recipe == "sobp" else "fit_damping": "0.1" if recipe == "sobp" else damping,
    }
    config = configured(path, recipe=recipe, settings=settings, samples=2, seq_len=8)
    streamprune.prune(config)
    report = json.loads((config.out / "report.json").read_text())
    told = {
        (site["site"], name): site[name] for site in report["sites"] for name in REPORTED if site.get(name) is not None
    }
    assert told == took
    assert {name for _, name in told} == {*REPORTED} - ({"target_damping"} if recipe == "sobp" else set())
    # Eight tokens per sequence do not fill 40 and 48 columns; what rounding leaves of the rest may be positive by chance.
    raised = [each for each in told.values() if each > 0]
    assert all(each >= 1e-6 for each in raised) if damping == "0" else raised == [0.01] * len(told)
    assert len(raised) > len(told) / 2
    if recipe == "sobp":  # whose two dampings differ
        assert all(value >= 0.1 for (_, name), value in told.items() if name == "compensation_damping")
        assert all(value < 0.1 for (_, name), value in told.items() if name == "damping")


def test_the_surgeons_damping_is_told_where_it_was_raised(configured: Make, tmp_path: Path) -> None:
    path = spoilt(tmp_path / "model", torch.float32)
    settings = {"shots": "1", "damping": "0"}
    for more in ({}, {"update_rows": "on"}, {"structure": "2:4"}):
        config = configured(
            path, "-".join(("out", *more)), recipe="surgeon", settings=settings | more, samples=2, seq_len=8
        )
        streamprune.prune(config)
        sites = json.loads((config.out / "report.json").read_text())["sites"]
        assert all(site["damping"] >= 1e-6 for site in sites if site["kept"] < site["units"] or site.get("zeros"))
