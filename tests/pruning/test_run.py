"""Whole jobs, compared with a plain in-memory implementation, across kills, and with everything a user may change."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from conftest import TINY, contents, edit_tensors, make_tiny
from stopping import Make, Stop, Tiny, force_boundaries, interrupted, stopping_after, windows

import streamprune
from streamprune import Config
from streamprune.errors import CalibrationError, ConfigError, DamageError, ResourceError, ResumeError
from streamprune.jobs.forecast import resources
from streamprune.jobs.journal import Journal
from streamprune.jobs.names import job_folder
from streamprune.model.skeleton import open_skeleton
from streamprune.pruning import run
from streamprune.pruning.block import site_generator
from streamprune.pruning.job import Job
from streamprune.pruning.request import idle
from streamprune.recipes.plan import Plan
from streamprune.system.threads import Behind, Value


@pytest.mark.check("SoBP = plain float64 implementation")
@pytest.mark.usefixtures("float64_norms")
@pytest.mark.parametrize("name", TINY)
def test_sobp_is_the_plain_implementation(name: str, tiny: Tiny, configured: Make) -> None:
    path = tiny(name, torch.float64)
    config = configured(path, dtype="float64", ratio=0.35)
    result = streamprune.prune(config)
    sites = open_skeleton(path, torch.device("cpu"), "float64").all_sites()
    tokens = windows(config, path)
    expected = reference.sobp(path, tokens, sites, ratio=0.35, round_to=4)
    report = json.loads((config.out / "report.json").read_text())
    assert {site["site"]: site["kept"] for site in report["sites"]} == {
        name: len(units) for name, units in expected.kept.items()
    }
    if name in ("llama", "mistral", "qwen2", "qwen3", "gpt2", "opt"):
        assert any(len(expected.kept[site.name]) < site.units for site in sites if site.kind == "attention")
    pruned = streamprune.load(config.out, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(pruned(tokens).logits, expected.pruned(tokens).logits, rtol=1e-8, atol=1e-8)
    assert result.parameters_before - result.parameters_after == expected.removed
    assert pruned.num_parameters() == result.parameters_after


@pytest.mark.check("shrunk = zero-masked")
@pytest.mark.parametrize(
    ("name", "recipe"),
    [*((name, "magnitude") for name in TINY), ("llama", "wanda-sp"), ("mixtral", "wanda-sp"), ("llama", "random")],
)
def test_baselines_are_the_masked_dense_model(name: str, recipe: str, tiny: Tiny, configured: Make) -> None:
    path = tiny(name)
    config = configured(path, recipe=recipe, ratio=0.35)
    streamprune.prune(config)
    skeleton = open_skeleton(path, torch.device("cpu"), "float32")
    masked = reference.load(path).float()
    pruned, apart = streamprune.load(config.out, dtype=torch.float32), reference.load(config.out).float()
    gone = 0
    for index in range(len(skeleton)):
        for entry, site in [(entry, site) for site, entry in skeleton.places(index)]:
            module = f"{skeleton.architecture.blocks}.{index}.{entry.consumer}"
            w, left = (reference.weight_of(model.get_submodule(module)) for model in (masked, apart))
            # Columns are identified by their values, which these recipes do not change.
            column = {tuple(w[:, c].tolist()): c for c in range(w.shape[1])}
            stays = [column[tuple(left[:, c].tolist())] for c in range(left.shape[1])]
            assert stays == sorted(stays)
            assert len({c // site.width for c in stays}) * site.width == len(stays)
            mask = torch.zeros(w.shape[1])
            mask[stays] = 1
            gone += w.shape[1] - len(stays)
            with torch.no_grad():
                w.mul_(mask)
            (place,) = reference.places(masked, [site])
            reference.forget(masked, place, sorted({c // site.width for c in stays}))
    assert gone > 0
    ids = torch.arange(40)[None, :30]
    with torch.no_grad():
        torch.testing.assert_close(pruned(ids).logits, masked(ids).logits, rtol=1e-4, atol=1e-4)


def test_magnitude_needs_no_text_and_random_follows_the_seed(tiny: Tiny, configured: Make) -> None:
    path = tiny("llama")
    streamprune.prune(configured(path, "m", recipe="magnitude", calibration=Path("nowhere.txt")))
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        streamprune.prune(configured(path, out, recipe="random", seed=seed))
    a, b, c = (contents(configured(path, out).out) for out in "abc")
    assert a == b
    assert {name: data for name, data in a.items() if "safetensors" in name} != {
        name: data for name, data in c.items() if "safetensors" in name
    }


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_5"])
def test_every_site_has_its_own_random_numbers(name: str, tiny: Tiny) -> None:
    skeleton = open_skeleton(tiny(name), torch.device("cpu"), "float32")
    blocks = [skeleton.build_block(index, skeleton.read_block(index)) for index in range(len(skeleton))]
    prunables = [prunable for block in blocks for prunable in block.prunables]
    attention = next(prunable for prunable in prunables if prunable.site.kind == "attention")
    beside = copy.copy(attention)  # as in Falcon H1
    beside.site = replace(attention.site, kind="linear")
    draws = [site_generator(3, each.site, each.number).initial_seed() for each in (*prunables, beside)]
    assert len({*draws}) == len(draws)
    assert site_generator(3, attention.site, attention.number).initial_seed() == 2 * (
        3 * 1_000_003 + attention.site.block
    )


def test_ablations_reach_the_maths(tiny: Tiny, configured: Make) -> None:
    path = tiny("llama")
    shards = set()
    for number, switches in enumerate(
        [
            {},
            {"refine": "off"},
            {"reconstruct": "off"},
            {"compensate": "off"},
            {"gradient": "abs"},
            {"head_weight": "0"},
        ]
    ):
        config = configured(path, f"out{number}", settings=switches, ratio=0.35)
        streamprune.prune(config)
        shards.add(tuple(data for name, data in contents(config.out).items() if name.endswith("safetensors")))
    assert len(shards) == 6


def test_global_selection_alone_keeps_the_plans_units(tiny: Tiny, configured: Make) -> None:
    path = tiny("llama")
    switches = {"refine": "off", "reconstruct": "off", "compensate": "off"}
    config = configured(path, settings=switches)
    plan = Plan.read(streamprune.plan_only(config))
    streamprune.prune(config)
    dense, pruned = streamprune.load(path), streamprune.load(config.out)
    for index in range(3):
        units = plan[f"blocks.{index}.ffn"].units
        assert units is not None
        before = dense.get_submodule(f"model.layers.{index}.mlp.down_proj").weight
        after = pruned.get_submodule(f"model.layers.{index}.mlp.down_proj").weight
        assert torch.equal(after, before[:, list(units)])


SHOTS: dict[str, Any] = {"recipe": "default", "settings": {"shots": "2"}, "refine": 3, "blocks": (1, 3)}
"""A job with several shots, a window and refinement."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("depth", "every", "changes"),
    [
        (4, 2, {}),
        (3, 1, {**SHOTS, "samples": 3}),
        (3, 1, {"recipe": "greedy-output", "metric_text": "random-tokens", "metric_samples": 5, "blocks": (0, 2)}),
    ],
)
def test_stopped_after_every_journal_line_the_bytes_are_the_same(
    depth: int, every: int, changes: dict[str, Any], tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny("qwen3", num_hidden_layers=depth)
    if every > 1:
        force_boundaries(monkeypatch, every)
    whole = configured(path, "whole", **changes)
    streamprune.prune(whole)
    expected = contents(whole.out)
    # One journal line per process: a new process continues after each line.
    config = configured(path, "stopped", **changes)
    lives = 0
    while not config.out.exists():
        lives += 1
        with stopping_after(2 if lives == 1 else 1, monkeypatch):
            try:
                result = streamprune.prune(config)
            except Stop:
                continue
            assert result.resumed
    assert lives > (14 if depth == 4 else 8)
    assert contents(config.out) == expected
    # After the last line the folder may be left behind; the same command clears it and changes nothing.
    assert streamprune.prune(config).resumed
    assert not job_folder(config.out).exists()
    assert contents(config.out) == expected


@pytest.mark.check("killed half-way and resumed: same bytes")
@pytest.mark.parametrize("name", TINY)
def test_stopped_half_way_the_bytes_are_the_same(
    name: str, tiny: Tiny, pruned: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(tiny(name), recipe="default")
    for appends in (6, 7):  # in the survey, and behind the first block
        with stopping_after(appends, monkeypatch), pytest.raises(Stop):
            streamprune.prune(config)
    assert streamprune.prune(config).resumed
    assert contents(config.out) == contents(pruned(name))


def test_sparse_boundaries_change_nothing(tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny("llama", num_hidden_layers=4)
    streamprune.prune(configured(path, "all"))
    for every in (3, 4):  # 2 where jobs are stopped after every journal line
        with monkeypatch.context() as patch:
            force_boundaries(patch, every)
            streamprune.prune(configured(path, f"sparse{every}"))
        assert contents(configured(path, "all").out) == contents(configured(path, f"sparse{every}").out)


@contextmanager
def stopping_at(instant: int, monkeypatch: pytest.MonkeyPatch, *, before: bool) -> Iterator[list[str]]:
    """Stop right before or after so many renames and links; yield those that were made."""
    made: list[str] = []

    def counted(name: str) -> Callable[..., None]:
        real = getattr(os, name)

        def call(source: Any, target: Any) -> None:
            made.append(name)
            if len(made) == instant and before:
                raise Stop
            real(source, target)
            if len(made) == instant and not before:
                raise Stop

        return call

    with monkeypatch.context() as patch:
        for name in ("replace", "link"):
            patch.setattr(os, name, counted(name))
        yield made


@pytest.mark.slow
def test_stopped_at_any_rename_the_bytes_are_the_same(
    tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny("llama", num_hidden_layers=2)

    def job(out: str) -> Config:
        return configured(path, out, samples=3, recipe="default", settings={"shots": "2"}, refine=2)

    with stopping_at(0, monkeypatch, before=True) as made:
        streamprune.prune(job("whole"))
    expected = contents(job("whole").out)
    for instant in range(1, len(made), 11):
        config = job(f"stopped{instant}")
        for before in (True, False):
            with stopping_at(instant, monkeypatch, before=before), suppress(Stop):
                streamprune.prune(config)
        streamprune.prune(config)
        assert contents(config.out) == expected


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"ratio": 0.4}, r"settings\.ratio is 0\.4 and was 0\.3"),
    ({"seed": 7}, r"settings\.seed is 7 and was 0"),
    ({"samples": 13}, r"settings\.samples is 13 and was 12"),
    ({"recipe": "wanda-sp"}, r"settings\.recipe is .wanda-sp. and was .sobp."),
    ({"settings": {"damping": "0.1"}}, r"settings\.settings\.damping is 0\.1 and was 0\.01"),
    ({"layout": "uniform"}, r"settings\.layout is .uniform. and was .free."),
    ({"dtype": "float64"}, r"settings\.dtype is .float64. and was .float32."),
    ({"round_to": 8}, r"settings\.round_to is 8 and was 4"),
]


def test_a_changed_setting_is_refused_with_both_values(
    tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny("llama")
    interrupted(configured(path), monkeypatch)
    for change, message in CHANGES:
        with pytest.raises(ResumeError, match=message):
            streamprune.prune(configured(path, **change))
    assert streamprune.prune(configured(path)).resumed  # the job is as it was


def test_changed_text_and_model_are_refused(
    tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tiny("llama")
    interrupted(configured(path), monkeypatch)
    other = tmp_path / "other.txt"
    other.write_text("abc " * 500)
    with pytest.raises(ResumeError, match=r"inputs\.calibration\.1\.sha256 is .* and was"):
        streamprune.prune(configured(path, calibration=other))
    with pytest.raises(ResumeError, match=r"inputs\.model\.config is .* and was"):
        streamprune.prune(configured(tiny("llama", num_hidden_layers=4)))


def test_changed_weights_of_the_same_shape_are_refused(
    configured: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = make_tiny(tmp_path / "model", "llama")
    config = configured(path)
    interrupted(config, monkeypatch)
    edit_tensors(path, lambda tensors: [tensor.mul_(1.5) for tensor in tensors.values()])
    with pytest.raises(ResumeError, match=r"inputs\.model\.shards"):
        streamprune.prune(config)
    streamprune.prune(config, restart=True)
    edit_tensors(path, lambda tensors: [tensor.mul_(1.5) for tensor in tensors.values()])
    with pytest.raises(ConfigError, match=r"another job: inputs\.model\.shards"):
        streamprune.prune(config)


def test_one_cache_folder_serves_two_jobs_of_one_name(
    tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tiny("llama")
    jobs = [
        configured(path, f"{folder}/out", seed=seed, cache=tmp_path / "cache") for folder, seed in (("a", 0), ("b", 5))
    ]
    for config in jobs:
        config.out.parent.mkdir()
        interrupted(config, monkeypatch, appends=14)
    for config in jobs:
        streamprune.prune(config)
        fresh = configured(path, f"fresh{config.seed}", seed=config.seed)
        streamprune.prune(fresh)
        assert contents(config.out) == contents(fresh.out)
    assert list((tmp_path / "cache").iterdir()) == []


def test_equal_settings_in_other_words_are_equal(tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny("llama")
    interrupted(configured(path, settings={"refine": "off"}), monkeypatch)
    streamprune.prune(configured(path, settings={"refine": "no", "compensate": "on"}))


def test_an_interrupted_restart_goes_on(tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny("llama")
    streamprune.prune(configured(path))
    before = contents(configured(path).out)
    changed = configured(path, ratio=0.4)
    with stopping_after(10, monkeypatch), pytest.raises(Stop):
        streamprune.prune(changed, restart=True)
    # The old result stays until the new one is complete.
    assert contents(changed.out) == before
    result = streamprune.prune(changed)
    assert result.resumed
    streamprune.prune(configured(path, "fresh", ratio=0.4))
    assert contents(changed.out) == contents(configured(path, "fresh").out)


def test_a_restart_that_is_refused_loses_nothing(
    tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tiny("llama")
    interrupted(configured(path), monkeypatch)
    with pytest.raises(CalibrationError):
        streamprune.prune(configured(path, calibration=tmp_path / "typo.txt"), restart=True)
    assert streamprune.prune(configured(path)).resumed


def test_a_given_plan_cannot_go_again(
    tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tiny("llama")
    plan = tmp_path / "plan.json"
    plan.write_bytes(streamprune.plan_only(configured(path, "planned")).read_bytes())
    config = configured(path, plan=plan)
    interrupted(config, monkeypatch, appends=3)
    with pytest.raises(ResumeError, match="plan is not given; this job was started with one"):
        streamprune.prune(configured(path))
    streamprune.prune(config)
    with pytest.raises(ConfigError, match="a finished result by plan"):
        streamprune.prune(configured(path))


@pytest.mark.parametrize("appends", [4, 18])
def test_a_plan_is_no_way_on_for_a_job_of_several_shots(
    appends: int, tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tiny("llama")
    plan = tmp_path / "plan.json"
    plan.write_bytes(streamprune.plan_only(configured(path, "planned", recipe="default")).read_bytes())
    config = configured(path, recipe="default", settings={"shots": "2"})
    interrupted(config, monkeypatch, appends)
    with pytest.raises(ResumeError, match="a plan is given, which takes one shot; this job was started in 2"):
        streamprune.prune(replace(config, plan=plan))
    streamprune.prune(config)


def test_out_may_be_the_working_directory(tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(tiny("llama"))
    config.out.mkdir()
    monkeypatch.chdir(config.out)
    streamprune.prune(replace(config, out=Path()))
    assert (config.out / "config.json").exists()


def test_other_machine_settings_may_change(tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny("llama")
    streamprune.prune(configured(path, "whole"))
    interrupted(configured(path), monkeypatch)
    streamprune.prune(configured(path, memory=2**32, disk=2**33))
    assert contents(configured(path).out) == contents(configured(path, "whole").out)


def test_less_memory_than_the_job_was_started_for_is_refused(
    tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny("llama")
    interrupted(configured(path), monkeypatch)
    with pytest.raises(
        ResourceError, match=r"memory limit is 48.8 KiB; this job was started with micro-batches that need"
    ):
        streamprune.prune(configured(path, memory=50_000))
    streamprune.prune(configured(path))


def test_leftovers_without_a_journal_are_not_built_on(tiny: Tiny, configured: Make) -> None:
    config = configured(tiny("llama"), layout="uniform")
    stale = job_folder(config.out) / "out"
    stale.mkdir(parents=True)
    (stale / "modeling_streamprune.py").write_text("stale")
    streamprune.prune(config)
    assert "modeling_streamprune.py" not in contents(config.out)


def test_restart_throws_away_what_was_there(tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny("llama")
    interrupted(configured(path), monkeypatch)
    streamprune.prune(configured(path, ratio=0.4), restart=True)
    finished = configured(path, ratio=0.4)
    assert streamprune.prune(finished).resumed
    with pytest.raises(ConfigError, match=r"finished result of another job: settings\.ratio is 0\.3 and was 0\.4"):
        streamprune.prune(configured(path))
    streamprune.prune(configured(path), restart=True)
    streamprune.prune(configured(path, "fresh"))
    assert contents(configured(path).out) == contents(configured(path, "fresh").out)
    assert sorted(p.name for p in configured(path).out.parent.iterdir()) == ["fresh", "out"]


def test_what_a_kill_left_half_written_is_no_obstacle(
    tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(tiny("llama"))
    interrupted(config, monkeypatch)
    for name in ("plan.json.tmp", "survey-0001.safetensors.tmp", "calibration.safetensors.tmp"):
        (job_folder(config.out) / name).write_text("half")
    assert not streamprune.prune(config, restart=True).resumed
    assert not job_folder(config.out).exists()


def test_foreign_out_is_never_touched(tiny: Tiny, configured: Make) -> None:
    config = configured(tiny("llama"))
    config.out.mkdir()
    (config.out / "thesis.txt").write_text("all of it")
    for restart in (False, True):
        with pytest.raises(ConfigError, match="already exists and was not written by streamprune"):
            streamprune.prune(config, restart=restart)
    assert contents(config.out) == {"thesis.txt": b"all of it"}
    (config.out / "thesis.txt").unlink()
    streamprune.prune(config)  # an empty folder is fine


def test_two_jobs_at_once_are_refused(tiny: Tiny, configured: Make) -> None:
    config = configured(tiny("llama"))
    with Job(config, None).opened(restart=False), pytest.raises(ResumeError, match="another process"):
        streamprune.prune(config)
    streamprune.prune(config)


def test_plan_is_written_edited_and_followed(tiny: Tiny, configured: Make, tmp_path: Path) -> None:
    path = tiny("llama")
    config = configured(path)
    written = streamprune.plan_only(config)
    plan = json.loads(written.read_text())
    plan["sites"]["blocks.1.ffn"] = {"keep": 20}
    plan["sites"]["blocks.0.attention"] = {"keep": 1}
    edited = tmp_path / "edited.json"
    edited.write_text(json.dumps(plan))
    followed = replace(config, ratio=None, plan=edited)
    streamprune.prune(followed)
    report = json.loads((config.out / "report.json").read_text())
    kept = {site["site"]: site["kept"] for site in report["sites"]}
    assert kept["blocks.1.ffn"] == 20
    assert kept["blocks.0.attention"] == 1
    with pytest.raises(ConfigError, match=r"ratio is 0\.4; the plan .* was made for 0\.3"):
        streamprune.prune(replace(followed, ratio=0.4))


def test_plan_then_run_is_run(tiny: Tiny, configured: Make) -> None:
    path = tiny("llama")
    streamprune.plan_only(configured(path, "a"))
    streamprune.prune(configured(path, "a"))
    streamprune.prune(configured(path, "b"))
    assert contents(configured(path, "a").out) == contents(configured(path, "b").out)


def test_a_plan_cannot_change_once_pruning_began(
    tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tiny("llama")
    config = configured(path)
    plan = tmp_path / "plan.json"
    plan.write_bytes(streamprune.plan_only(config).read_bytes())
    interrupted(config, monkeypatch, appends=2)
    data = json.loads(plan.read_text())
    data["sites"]["blocks.1.ffn"] = {"keep": 16}
    plan.write_text(json.dumps(data))
    with pytest.raises(ResumeError, match="this job is pruning by"):
        streamprune.prune(replace(config, plan=plan))
    streamprune.prune(config)


def test_budget_of_blocks_and_model_is_reported(tiny: Tiny, configured: Make) -> None:
    path = tiny("llama")
    result = streamprune.prune(configured(path, ratio=0.25))
    skeleton = open_skeleton(path, torch.device("cpu"), "float32")
    removed = result.parameters_before - result.parameters_after
    assert result.ratio_blocks == removed / skeleton.block_parameters()
    assert result.ratio_model == removed / result.parameters_before
    assert abs(result.ratio_blocks - 0.25) * skeleton.block_parameters() < 4 * 96


def test_without_calibration_the_built_in_sample_is_used_and_said(configured: Make) -> None:
    from conftest import EXAMPLE

    said: list[str] = []

    config = configured(EXAMPLE, calibration=None, samples=2, recipe="wanda-sp")
    streamprune.prune(config, progress=streamprune.Callback(lambda event: said.append(event.message)))
    assert any("built-in English sample" in message for message in said)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["default", "surgeon", "greedy-output", "wanda-sp"])
def test_where_grams_are_changes_nothing_where_the_device_is_the_host(
    recipe: str, tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny("llama")
    settings = {"shots": "1"} if recipe == "surgeon" else {}
    results = []
    for place in resources.GRAM_PLACES:
        with monkeypatch.context() as patch:
            patch.setattr(resources, "GRAM_PLACES", (place,))
            config = configured(path, place, recipe=recipe, settings=settings)
            assert streamprune.forecast_job(config).grams == place
            streamprune.prune(config)
        results.append({name: data for name, data in contents(config.out).items() if name.endswith(".safetensors")})
    assert results[0] == results[1] == results[2]


def test_an_unknown_recipe_is_refused_from_python(tiny: Callable[..., Path], tmp_path: Path) -> None:
    config = Config(model=tiny("llama"), out=tmp_path / "out", ratio=0.3, recipe="magic")
    for call in (streamprune.prune, streamprune.plan_only, streamprune.forecast_job, idle):
        with pytest.raises(ConfigError, match="recipe is 'magic'; it must be one of default, sobp"):
            call(config)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {}),
        ("llama", {"refine": 2}),
        ("llama", {"blocks": (1, 2), "ratio": 0.1}),
        ("falcon", {}),
        ("mixtral", {}),
        ("lfm2", {"refine": 2}),
    ],
)
def test_a_shard_is_begun_with_final_weights(
    name: str, changes: dict[str, Any], tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where it is written while the streams pass the block."""

    class AtOnce(Behind[Value]):
        def start(self, task: Callable[[], Value]) -> None:
            digest = task()
            super().start(lambda: digest)

    later, now = (configured(tiny(name), out, recipe="default", **changes) for out in ("later", "now"))
    streamprune.prune(later)
    monkeypatch.setattr(run, "Behind", AtOnce)
    streamprune.prune(now)
    assert contents(now.out) == contents(later.out)


@pytest.mark.parametrize("name", ["dense-0001-0", "dense-0000-0", "gradient-0002-0"])
def test_an_input_damaged_within_a_process_is_computed_again(
    name: str, tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the backward sum, once. A gradient is not."""
    whole, damaged = (
        configured(tiny("llama", num_hidden_layers=2), out, recipe="default", samples=2, seq_len=16)
        for out in ("whole", "damaged")
    )
    streamprune.prune(whole)
    real, times = Journal.append, [0]

    def append(self: Journal, step: str, **data: Any) -> Any:
        if step.endswith("/head"):
            (path,) = damaged.out.parent.rglob(f"{name}.activations")
            content = bytearray(path.read_bytes())
            content[0] ^= 1
            path.write_bytes(content)
            times[0] += 1
        return real(self, step, **data)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", append)
        if name.startswith("gradient"):
            with pytest.raises(DamageError, match=f"{name}.activations is missing or damaged"):
                streamprune.prune(damaged)
        else:
            streamprune.prune(damaged)
            assert "inputs are checked" in (damaged.out / "log.txt").read_text(encoding="utf-8")
    assert times == [1]
    streamprune.prune(damaged)
    assert contents(damaged.out) == contents(whole.out)
