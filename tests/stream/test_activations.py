"""Whole jobs with activations stored otherwise, or held in memory: what they decide, and what they must not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import contents
from stopping import stopping_after

import streamprune
from streamprune import Config
from streamprune.errors import ConfigError, ResourceError, ResumeError
from streamprune.jobs.names import job_folder
from streamprune.stream.store import ActivationStore

Make = Callable[..., Config]
Tiny = Callable[..., Path]
CPU = torch.device("cpu")
ONE = 12 * 24 * 32 * 4
"""Bytes of one boundary of a `configured` job on a tiny model in float32."""


def of_interest(folder: Path) -> dict[str, bytes]:
    """A result's bytes, but for those of the settings."""
    return {name: data for name, data in contents(folder).items() if name not in ("report.json", "README.md")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"), [("llama", {"recipe": "default", "refine": 2}), ("falcon", {}), ("mixtral", {})]
)
def test_held_in_memory_or_not_the_bytes_are_the_same(
    name: str, changes: dict[str, Any], tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 0
    real = ActivationStore._room

    def room(self: ActivationStore, size: int) -> Any:
        nonlocal most
        found = real(self, size)
        most = max(most, self.held_bytes + (size if found is not None else 0))
        assert self.held_bytes + (size if found is not None else 0) <= self.memory
        return found

    monkeypatch.setattr(ActivationStore, "_room", room)
    whole = configured(tiny(name), "whole", **changes)
    streamprune.prune(whole)
    assert most == 0
    for room_for in (1, 3, 50):
        config = configured(tiny(name), f"held{room_for}", memory_host=room_for * ONE, **changes)
        most = 0
        streamprune.prune(config)
        assert contents(config.out) == contents(whole.out)
        assert most >= min(room_for, 4) * ONE


@pytest.mark.parametrize("activations", ["auto", "float8"])
def test_stopped_after_every_line_with_and_without_memory_the_bytes_are_the_same(
    activations: str, tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"recipe": "default", "activations": activations, "samples": 3}
    path = tiny("llama", num_hidden_layers=2)
    whole = configured(path, "whole", **changes)
    streamprune.prune(whole)
    config = configured(path, "stopped", **changes)
    lives = 0
    while not config.out.exists():
        lives += 1
        # Every life has other memory: it is not the job's.
        lived = replace(config, memory_host=(0, ONE // 4, 10 * ONE)[lives % 3])
        with stopping_after(2 if lives == 1 else 1, monkeypatch):
            try:
                streamprune.prune(lived)
            except BaseException as error:
                assert type(error).__name__ == "Stop"  # noqa: PT017
    assert lives > 5
    assert contents(config.out) == contents(whole.out)


def test_the_stored_dtype_decides_the_bytes_and_the_disk(
    tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny("llama", torch.bfloat16)
    found, disk = {}, {}
    for name in ("auto", "bfloat16", "float32", "float8"):
        config = configured(path, name, activations=name)
        disk[name] = streamprune.forecast_job(config).disk_bytes
        streamprune.prune(config)
        found[name] = of_interest(config.out)
        report = json.loads((config.out / "report.json").read_text())
        said = {"auto": "bfloat16", "float32": "as computed"}.get(name, name)
        assert report["job"]["settings"]["activations"] == said
    assert found["auto"] == found["bfloat16"]
    assert len({str(each) for each in found.values()}) == 3
    assert disk["bfloat16"] == disk["auto"]
    assert disk["float32"] == pytest.approx(2 * disk["bfloat16"], rel=0.01)  # but for the checksums
    assert disk["float8"] == pytest.approx(disk["bfloat16"] / 2 * 36 / 32, rel=0.01)
    config = configured(path, "stopped", activations="float32")
    with stopping_after(5, monkeypatch):
        try:
            streamprune.prune(config)
        except BaseException as error:
            assert type(error).__name__ == "Stop"  # noqa: PT017
    with pytest.raises(ResumeError, match=r"settings\.activations is .bfloat16. and was .as computed."):
        streamprune.prune(replace(config, activations="auto"))


@pytest.mark.parametrize("stored", ["bfloat16", "float8"])
def test_what_is_rounded_changes_the_result_by_little(stored: str, tiny: Tiny, configured: Make, text: Path) -> None:
    path = tiny("llama")
    found = {}
    for name in ("float32", stored):
        config = configured(path, name, activations=name, ratio=0.2)
        streamprune.prune(config)
        found[name] = streamprune.evaluate(config.out, text, seq_len=24).perplexity
    assert found[stored] == pytest.approx(found["float32"], rel=0.02 if stored == "bfloat16" else 0.1)


@pytest.mark.parametrize("memory_host", [None, 10**8])
def test_an_evaluation_that_finds_room_writes_nothing(
    memory_host: int | None, tiny: Tiny, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streamprune.system import files

    written = []
    real = files.replacing
    monkeypatch.setattr(files, "replacing", lambda path, **o: (written.append(path), real(path, **o))[1])
    path = tiny("llama")
    measured = streamprune.evaluate(path, text, seq_len=24, memory_host=memory_host)
    assert bool(written) == (memory_host is None)
    assert measured == streamprune.evaluate(path, text, seq_len=24)
    rounded = streamprune.evaluate(path, text, seq_len=24, activations="float8")
    assert rounded.perplexity != measured.perplexity
    assert rounded.perplexity == pytest.approx(measured.perplexity, rel=0.05)
    assert rounded.protocol == f"{measured.protocol}, activations stored in float8"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activations": "int4"}, "activations is 'int4'; it must be one of auto, float64"),
        ({"activations": "float64"}, "activations is 'float64', which is more than the float32 they are computed in"),
        ({"memory_host": -1}, "memory_host is -1; it must be at least 0"),
    ],
)
def test_what_makes_no_sense_is_refused_before_any_work(
    changes: dict[str, Any], message: str, tiny: Tiny, configured: Make
) -> None:
    with pytest.raises(ConfigError, match=message):
        streamprune.prune(configured(tiny("llama"), **changes))
    assert not job_folder(configured(tiny("llama")).out).exists()


def test_more_memory_than_there_is_is_refused(tiny: Tiny, configured: Make, text: Path) -> None:
    config = configured(tiny("llama"), memory_host=2**60)
    for command in (streamprune.prune, streamprune.forecast_job):
        with pytest.raises(
            ResourceError, match=r"memory for activations is 1048576\.0 TiB; .* of host memory are free"
        ):
            command(config)
    with pytest.raises(ResourceError, match="memory for activations is"):
        streamprune.evaluate(config.model, text, seq_len=24, memory_host=2**60)


def test_the_plan_says_what_is_held(tiny: Tiny, configured: Make) -> None:
    def plans(recipe: str) -> list[tuple[int, int]]:
        configs = [configured(tiny("llama"), recipe=recipe, memory_host=n * ONE) for n in (0, 1, 2, 100)]
        return [(p.held_bytes // ONE, p.disk_bytes // ONE) for p in map(streamprune.forecast_job, configs)]

    # One stream: a block's input, what is between its sublayers, of which no journal line speaks, and its output.
    assert plans("wanda-sp") == [(0, 3), (1, 2), (2, 2), (3, 2)]
    # The survey's boundaries are all spoken of, and here they are the most.
    assert plans("sobp") == [(0, 6), (1, 6), (2, 6), (6, 6)]
