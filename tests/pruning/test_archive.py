"""Surveys kept in a folder: the same bytes as with an own survey, and those of something else are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import contents
from stopping import Make, Stop, Tiny, stopping_after

import streamprune
from streamprune.errors import ConfigError, DamageError
from streamprune.pruning import archive


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["default", "sobp", "greedy-output"])
def test_a_kept_survey_gives_the_bytes_of_an_own_one(
    recipe: str, tiny: Tiny, configured: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, kept = tiny("llama"), tmp_path / "kept"
    alone = configured(model, "alone", recipe=recipe, ratio=0.4)
    expected = streamprune.prune(alone)
    streamprune.prune(configured(model, "first", recipe=recipe, ratio=0.2, survey=kept))
    # Whatever else is interrupted: a survey is there in full or not at all.
    others = [configured(model, f"other-{lines}", recipe=recipe, ratio=0.4, survey=kept) for lines in (2, 3, 5)]
    for lines, config in zip((2, 3, 5), others, strict=True):
        with stopping_after(lines, monkeypatch), pytest.raises(Stop):
            streamprune.prune(config)
        result = streamprune.prune(config)
        assert weights(config.out) == weights(alone.out)
        assert result.operations < expected.operations
    if recipe == "default":
        settings = {"target": "own", "compensate": "off", "fit_damping": "0.05"}  # which the survey does not read
        alone, other = (configured(model, name, recipe=recipe, settings=settings, effort="normal", **own) for name, own in (
            ("own", {}), ("reused", {"survey": kept})
        ))  # fmt: skip
        streamprune.prune(alone)
        streamprune.prune(other)
        assert weights(other.out) == weights(alone.out)


def test_a_survey_prices_last_units_whatever_may_go(tiny: Tiny, configured: Make, tmp_path: Path) -> None:
    model, kept, settings = tiny("llama"), tmp_path / "survey", {"recipe": "default", "ratio": 0.8}
    streamprune.prune(configured(model, "uniform", survey=kept, layout="uniform", **settings | {"ratio": 0.4}))
    streamprune.prune(
        configured(model, "off", survey=kept, **settings | {"ratio": 0.4, "settings": {"sublayers": "off"}})
    )
    alone, reused = configured(model, "alone", **settings), configured(model, "reused", survey=kept, **settings)
    streamprune.prune(alone)
    sites = json.loads((alone.out / "report.json").read_text())["sites"]
    assert any(site["kept"] == 0 for site in sites)
    streamprune.prune(reused)
    assert weights(reused.out) == weights(alone.out)


def test_a_survey_is_kept_whenever_the_job_stops(
    tiny: Tiny, configured: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    streamprune.prune(configured(model, "whole", survey=tmp_path / "whole-survey"))
    config = configured(model, "stopped", survey=tmp_path / "survey")
    while not config.out.exists():
        with stopping_after(2, monkeypatch):
            try:
                streamprune.prune(config)
            except Stop:
                assert (tmp_path / "survey" / "survey.json").is_file() or not config.out.exists()
    kept, whole = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("survey", "whole-survey")
    )
    assert kept == whole


@pytest.mark.parametrize("recipe", ["default", "greedy-output"])  # with a backward sweep, and without
def test_the_report_says_whose_survey_it_was(
    recipe: str, tiny: Tiny, configured: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the job is stopped between keeping its survey and the journal line about that."""
    first, second = (configured(tiny("llama"), out, recipe=recipe, survey=tmp_path / "kept") for out in ("one", "two"))

    def stopped(shot: Any) -> None:
        real(shot)
        raise Stop

    with monkeypatch.context() as patch:
        real = archive.keep
        patch.setattr(archive, "keep", stopped)
        with pytest.raises(Stop):
            streamprune.prune(first)
    said = []
    for config in (first, second):
        streamprune.prune(config)
        said.append(json.loads((config.out / "report.json").read_text())["surveyed_before"])
    assert said == [False, True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 11}, "settings.samples is 11 and was 12"),
        ({"seq_len": 23}, "settings.seq_len is 23 and was 24"),
        ({"seed": 1}, "settings.seed is 1 and was 0"),
        ({"dtype": "float64"}, 'settings.dtype is "float64" and was "float32"'),
        ({"recipe": "default"}, r"settings.recipe is .default. and was .sobp."),
        ({"settings": {"gradient": "abs"}}, 'settings.settings.gradient is "abs" and was "fisher"'),
        ({"calibration": "random-tokens"}, "inputs.calibration is"),
        ({"model": "qwen3"}, "inputs.model"),
    ],
)
def test_a_survey_of_something_else_is_refused(
    changes: dict[str, Any], message: str, tiny: Tiny, configured: Make, tmp_path: Path
) -> None:
    kept = tmp_path / "survey"
    streamprune.prune(configured(tiny("llama"), "first", survey=kept))
    model = tiny(changes.pop("model", "llama"))
    with pytest.raises(ConfigError, match=f"survey is .* taken otherwise: ({message})"):
        streamprune.prune(configured(model, survey=kept, **changes))
    assert not (tmp_path / "out").exists()


def test_a_damaged_survey_is_refused_and_a_foreign_folder(tiny: Tiny, configured: Make, tmp_path: Path) -> None:
    kept, model = tmp_path / "survey", tiny("llama")
    streamprune.prune(configured(model, "first", survey=kept))
    path = kept / "survey-0001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamageError, match=r"survey-0001.safetensors is missing or was changed"):
        streamprune.prune(configured(model, survey=kept))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"contains notes.txt, a file of something else"):
        streamprune.prune(configured(model, "third", survey=tmp_path / "mine"))


def weights(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name.endswith(".safetensors")}
