"""benchmarks/traffic.py: the passes over boundaries, against jobs that count them."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from stopping import force_boundaries

import streamprune
from streamprune import Config
from streamprune.jobs.forecast.workload import Shapes
from streamprune.jobs.journal import Journal
from streamprune.model.site import Site
from streamprune.pruning.request import Request
from streamprune.recipes.allocation import Budget
from streamprune.recipes.default import Default
from streamprune.recipes.greedy_output import GreedyOutput
from streamprune.recipes.obs import ObsRecipe
from streamprune.recipes.plan import Plan, SitePlan
from streamprune.recipes.slimgpt import SlimGpt
from streamprune.recipes.sobp import Sobp
from streamprune.stream.store import ActivationStore

Make = Callable[..., Config]
Tiny = Callable[..., Path]
Counted = Callable[[Config], dict[str, list[Any]]]
ONE = 12 * 24 * 32 * 4
"""Bytes of one boundary of a `configured` job on a tiny model in float32."""


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import traffic

    return traffic


@pytest.fixture
def counted(traffic: Any, monkeypatch: pytest.MonkeyPatch) -> Counted:
    return partial(count, traffic.Passes, monkeypatch)


def count(passes: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, config: Config) -> dict[str, list[Any]]:
    """Run a job; return what it read and wrote up to each line of its journal, by the forecast's steps."""
    now, found = Counter[str](), dict[str, list[Any]]()
    real_read, real_writing, real_append = ActivationStore._read, ActivationStore.writing, Journal.append

    def read(self: ActivationStore, name: str, batch: slice) -> torch.Tensor:
        found = real_read(self, name, batch)
        now["read"] += batch.stop - batch.start
        return found

    @contextlib.contextmanager
    def writing(self: ActivationStore, name: str, place: str, *, passing: bool = False) -> Iterator[Any]:
        with real_writing(self, name, place, passing=passing) as write:

            def counting(batch: torch.Tensor) -> None:
                now["written"] += len(batch)
                now["passing"] += len(batch) * passing
                write(batch)

            yield counting

    def append(self: Journal, step: str, **data: Any) -> Any:
        name = step.split("/")[1] if "/" in step else step
        if now:
            made = passes(*(now[each] / config.samples for each in ("read", "written", "passing")))
            found.setdefault(name, []).append(made)
            now.clear()
        return real_append(self, step, **data)

    with monkeypatch.context() as patch:
        patch.setattr(ActivationStore, "_read", read)
        patch.setattr(ActivationStore, "writing", writing)
        patch.setattr(Journal, "append", append)
        streamprune.prune(config)
    return found


@pytest.fixture(autouse=True)
def every_site_loses_a_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(self: ObsRecipe[Any], sites: Sequence[Site], survey: Any, budget: Budget) -> Plan:
        return Plan({site.name: SitePlan(site.units - 1) for site in sites}, budget.ratio)

    for recipe in (Default, GreedyOutput, Sobp, SlimGpt):
        monkeypatch.setattr(recipe, "allocate", allocate)


@pytest.mark.parametrize(
    ("name", "recipe", "changes"),
    [
        ("llama", "default", {}),
        ("llama", "default", {"refine": 2}),
        ("llama", "default", {"settings": {"target": "own"}}),
        ("llama", "default", {"settings": {"compensate": "off"}}),
        ("llama", "sobp", {}),
        ("llama", "slimgpt", {}),
        ("llama", "greedy-output", {}),
        ("llama", "greedy-output", {"settings": {"recover": "before"}}),
        ("falcon", "default", {}),
        ("mixtral", "slimgpt", {}),
    ],
)
def test_the_forecast_counts_the_passes_of_each_block(
    name: str, recipe: str, changes: Any, tiny: Tiny, configured: Make, traffic: Any, counted: Counted
) -> None:
    config = configured(tiny(name), recipe=recipe, **changes)
    request = Request(config, None)
    expected = traffic.passes(Shapes(request.skeleton, request.workload))
    found = counted(config)
    assert found.keys() == expected.keys()
    found["backward"] = found.get("backward", [])[::-1]
    for step, blocks in expected.items():
        for each, wanted in zip(found[step], blocks, strict=True):
            assert (each.read, each.written, each.passing) == pytest.approx(
                (wanted.read, wanted.written, wanted.passing)
            )


def test_boundaries_that_are_not_kept_are_computed_again(
    tiny: Tiny, configured: Make, traffic: Any, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    force_boundaries(monkeypatch, 2)
    config = configured(tiny("llama"), recipe="default")
    request = Request(config, None)
    expected = traffic.passes(Shapes(request.skeleton, request.workload), 2)["backward"]
    assert sum(counted(config)["backward"], traffic.Passes()) == sum(expected, traffic.Passes())


def test_with_room_for_six_boundaries_only_the_survey_reads_from_disk(
    tiny: Tiny, configured: Make, counted: Counted
) -> None:
    config = configured(tiny("llama"), recipe="default", memory_host=6 * ONE)
    found = counted(config)
    assert not any(each.read for each in [*found["prune"], *found["forward"]])
    # The gradient and the youngest inputs are held.
    assert all(each.read <= 1 for each in found["backward"])
    fewer = counted(configured(tiny("llama"), "fewer", recipe="default", memory_host=4 * ONE))
    assert any(each.read for each in fewer["prune"])
