"""Whole jobs on a disk that fails: at every operation, with every fault, the same command ends with the same bytes.

`scripts/faults` goes through all operations; otherwise a few are drawn of each.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import pytest
from conftest import contents
from faulty import AT, FAULTS, Fault, FaultyDisk, Stopped

import streamprune
from streamprune.commands.tune.run import TuneConfig
from streamprune.errors import DamageError, ResumeError, StreamPruneError
from streamprune.jobs.journal import Journal
from streamprune.system import disk, files

pytestmark = pytest.mark.slow

QUICK = 2
"""Operations tried per scenario and fault, unless `scripts/faults` asks for more."""

T = TypeVar("T")
Make = Callable[..., Any]
Tiny = Callable[..., Path]
SMALL: dict[str, Any] = {"samples": 3, "seq_len": 8}
SCENARIOS: dict[str, dict[str, Any]] = {
    "sobp, replacing": {},
    "default, refined": {"recipe": "default", "refine": 2, "settings": {"shots": "2"}},
    "surgeon, uniform, corrected": {
        "recipe": "surgeon",
        "layout": "uniform",
        "settings": {"shots": "3", "lora_steps": "1"},
    },
    "slimgpt, own text": {"recipe": "slimgpt", "calibration": "self"},
    "magnitude": {"recipe": "magnitude"},
    "tune, lora": {},
    "tune, free, distil": {},
    "compare": {"recipes": ["sobp", "wanda-sp"], "ratios": [0.4]},
}
"""Settings of each scenario besides `SMALL`."""


class Scenario:
    """A job in its own folder, run as often as needed, with its result's bytes."""

    def __init__(self, name: str, folder: Path, tiny: Tiny, configured: Make, text: Path) -> None:
        self.name, self.folder = name, folder
        self.graveyard = folder.with_name("graveyard")
        model = tiny("llama", num_hidden_layers=2)
        self.out = folder / "out"
        if name.startswith("tune"):
            # Two weights directories of one width are all that matters here.
            student = model
            if "free" in name:
                student = folder.with_name("student")
                streamprune.prune(replace(configured(model, recipe="magnitude"), out=student))
            self.config: Any = TuneConfig(
                model=student,
                out=self.out,
                text=text,
                method=name.rpartition(" ")[2],
                teacher=model if "distil" in name else None,
                samples=4,
                seq_len=8,
                steps=3,
                rank=2,
            )
        elif not self.compares:
            self.before = folder.with_name("before")
            """Make a finished result for the job to replace, if the scenario replaces one."""
            self.config = replace(configured(model, **{**SMALL, **SCENARIOS[name]}), out=self.out)
        self.model, self.text = model, text

    @cached_property
    def whole(self) -> tuple[list[str], dict[str, bytes]]:
        """(operations, result) of an undisturbed job."""
        self.fresh()
        watched = self.faulty()
        with disk.using(watched):
            self.run()
        found = self.result()
        assert found
        assert self.left_behind() == []
        return watched.operations, found

    def run(self) -> None:
        """The whole job, or what is left of it."""
        if self.name.startswith("tune"):
            streamprune.tune(self.config)
        elif self.compares:
            common = {**SMALL, "calibration": self.text, "round_to": 4, **SCENARIOS[self.name]}
            streamprune.compare(self.model, text=self.text, out=self.out, eval_seq_len=8, keep=True, **common)
        elif self.replaces:
            # Another --restart would start over a job that only waits to be published.
            journal = self.folder / "out.streamprune" / "journal.jsonl"
            begun = journal.exists() and Journal(journal, repair=False).header is not None
            streamprune.prune(self.config, restart=not begun)
        else:
            streamprune.prune(self.config)

    @property
    def compares(self) -> bool:
        """Whether the scenario is a comparison, whose OUT is not all or nothing."""
        return self.name.startswith("compare")

    @property
    def replaces(self) -> bool:
        """Whether this result replaces an older one."""
        return self.name.endswith("replacing")

    def check_out(self, expected: dict[str, bytes]) -> None:
        """After an error: OUT is as it was, or finished."""
        if self.replaces:
            assert contents(self.out) in (contents(self.before), expected)
        elif not self.compares:
            assert not self.out.exists() or contents(self.out) == expected

    def result(self) -> dict[str, bytes]:
        """Each file's bytes, without what the job spent."""
        found = contents(self.out)
        if self.compares:
            rows = json.loads(found["compare.json"])["rows"]
            kept = {name: data for name, data in found.items() if name.startswith("rows/")}
            return {
                **kept,
                "rows": json.dumps([(row["label"], row["ratio"], row["perplexity"]) for row in rows]).encode(),
            }
        return found

    def fresh(self) -> None:
        """Restore the state before the job."""
        for folder in (self.folder, self.graveyard):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        if self.replaces:
            if not self.before.exists():
                streamprune.prune(replace(self.config, out=self.before, seed=1))
            shutil.copytree(self.before, self.out)

    def left_behind(self) -> list[str]:
        """Files beside the result."""
        return sorted(path.name for path in self.folder.iterdir() if path != self.out)

    def faulty(self, fault: Fault | None = None, at: int = 0) -> FaultyDisk:
        """A disk for this job."""
        return FaultyDisk(self.folder, self.graveyard, fault, at)


_made: dict[str, Scenario] = {}


@pytest.fixture
def scenario(
    request: pytest.FixtureRequest,
    tiny: Tiny,
    configured: Make,
    text: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Scenario]:
    """A scenario by name, made once, so that it runs undisturbed only once."""
    if (name := request.param) not in _made:
        _made[name] = Scenario(name, tmp_path_factory.mktemp("scenario") / "work", tiny, configured, text)
    found = _made[name]
    found.fresh()
    yield found
    for folder in (found.folder, found.graveyard):
        shutil.rmtree(folder, ignore_errors=True)


def places(operations: list[str], fault: Fault, name: str) -> list[int]:
    """All operations for which the fault makes a difference, or a few of them."""
    found = [n for n, operation in enumerate(operations, start=1) if operation.split()[0] in AT[fault]]
    return drawn(found, QUICK, name)


def drawn(found: list[T], quick: int, seed: object) -> list[T]:
    """Every n-th of what could be tried: a few, or as many as `scripts/faults` asks for."""
    if every := os.environ.get("STREAMPRUNE_FAULTS"):
        return found[:: int(every)]
    few = random.Random(f"{seed}").sample(range(len(found)), min(quick, len(found)))
    return [found[place] for place in sorted(few)]


@pytest.mark.parametrize("scenario", SCENARIOS, indirect=True)
@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_fails_the_same_command_ends_with_the_same_bytes(scenario: Scenario, fault: Fault) -> None:
    operations, expected = scenario.whole
    happened = 0
    for at in places(operations, fault, f"{scenario.name} {fault}"):
        scenario.fresh()
        faulty = scenario.faulty(fault, at)
        where = f"{fault} at {at} of {len(operations)}: {operations[at - 1]}"
        try:
            with disk.using(faulty):
                scenario.run()
        except Stopped:
            pass
        except StreamPruneError as error:
            told = "No space left on device" if fault == "full" else "Input/output error"
            if told not in str(error):
                raise AssertionError(f"{where}: {error}") from error
            scenario.check_out(expected)
        happened += faulty.happened
        try:
            scenario.run()
        except StreamPruneError as error:
            raise AssertionError(f"{where}: then {error}") from error
        assert scenario.result() == expected, where
        assert scenario.left_behind() == [], where
    assert happened
    print(f"\n{scenario.name}: {fault} at {happened} of {len(operations)} operations, all survived")


# Files altered between two processes.


def stopped(scenario: Scenario, at: int) -> None:
    """Run the job and kill it before that operation."""
    scenario.fresh()
    with suppress(Stopped), disk.using(scenario.faulty("stop", at)):
        scenario.run()


def kept_for_itself(scenario: Scenario) -> list[Path]:
    """Complete files that the job would resume from, without the lock, the log and an older result."""
    older = (scenario.out, scenario.folder / "out.streamprune" / "replaced")
    found = [
        path
        for path in sorted(scenario.folder.rglob("*"))
        if path.is_file() and path.stat().st_size and not any(path.is_relative_to(folder) for folder in older)
    ]
    names = ("lock", "log.txt", "journal.jsonl")
    return [path for path in found if path.name not in names and not path.name.endswith(files.TEMPORARY)]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 4
    path.unlink()  # linked files have others' names as well
    path.write_bytes(data)


def cut_short(path: Path) -> None:
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[: len(data) // 2])


HARMS: dict[str, Callable[[Path], None]] = {"vanished": Path.unlink, "flipped": flip, "cut short": cut_short}


@pytest.mark.parametrize("scenario", [name for name in SCENARIOS if not name.startswith("compare")], indirect=True)
@pytest.mark.parametrize("harm", HARMS)
def test_what_was_altered_is_noticed_and_made_anew(scenario: Scenario, harm: str) -> None:
    operations, expected = scenario.whole
    lines = [n for n, operation in enumerate(operations, start=1) if operation == "open journal.jsonl"]
    lines = drawn(lines[len(lines) // 4 :], 1, f"{scenario.name} {harm}")  # there are few files at first
    altered = 0
    for at in lines:
        stopped(scenario, at)
        for victim in drawn(kept_for_itself(scenario), 2, at):
            stopped(scenario, at)
            HARMS[harm](victim)
            altered += 1
            where = f"{victim.relative_to(scenario.folder)} {harm} before {at} of {len(operations)}"
            if victim.name == "plan.json":
                # A readable plan may be an edited one, which must not be discarded.
                with suppress(ResumeError):
                    scenario.run()
                victim.unlink(missing_ok=True)
            # Damage found only on reading is repaired by the next run.
            with suppress(DamageError):
                scenario.run()
            scenario.run()
            assert scenario.result() == expected, where
            assert scenario.left_behind() == [], where
    assert altered
    print(f"\n{scenario.name}: {altered} files {harm}, all made anew")


@pytest.mark.parametrize("scenario", ["compare"], indirect=True)
@pytest.mark.parametrize("harm", HARMS)
def test_a_row_that_was_altered_before_it_was_measured_is_pruned_again(
    scenario: Scenario, harm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, expected = scenario.whole
    scenario.fresh()
    real = Journal.append

    def append(self: Journal, step: str, **data: Any) -> Any:
        found = real(self, step, **data)
        if step == "prune/sobp-0.4":
            raise Stopped
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", append)
        with pytest.raises(Stopped):
            scenario.run()
    HARMS[harm](largest_shard(scenario.out / "rows" / "sobp-0.4"))
    scenario.run()
    assert scenario.result() == expected


def largest_shard(model: Path) -> Path:
    return max(model.glob("*.safetensors"), key=lambda path: path.stat().st_size)


def test_a_source_that_changes_underneath_is_noticed(tiny: Tiny, configured: Make, tmp_path: Path) -> None:
    """Anywhere in the weights, also outside the samples that identify a model."""
    model = Path(shutil.copytree(tiny("llama", num_hidden_layers=2), tmp_path / "model"))
    graves, shard = tmp_path / "graves", largest_shard(model)
    graves.mkdir()
    config = configured(model, **SMALL)
    before = shard.read_bytes()
    whole = FaultyDisk(config.out.parent, graves)
    with disk.using(whole):
        streamprune.prune(config)
    expected = contents(config.out)
    for number, part in enumerate((0.3, 0.5, 0.77, 0.999)):
        config = replace(config, out=tmp_path / f"stopped{number}")
        with suppress(Stopped), disk.using(FaultyDisk(config.out, graves, "stop", whole.count // 2)):
            streamprune.prune(config)
        data = bytearray(before)
        data[int(part * len(data))] ^= 1
        shard.write_bytes(data)
        with pytest.raises(ResumeError, match=rf"{shard.name}.* was|has changed since the job was started"):
            streamprune.prune(config)
        # A copy has another modification time and the same bytes.
        shard.write_bytes(before)
        assert streamprune.prune(config).resumed
        assert contents(config.out) == expected
        shutil.rmtree(graves)
        graves.mkdir()


def test_a_source_that_changes_while_it_is_used_gives_no_result(
    tiny: Tiny, configured: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Path(shutil.copytree(tiny("llama", num_hidden_layers=2), tmp_path / "model"))
    config = configured(model, **SMALL)
    real = Journal.append

    def append(self: Journal, step: str, **data: Any) -> Any:
        if step == "shot-1/prune/0":
            flip(largest_shard(model))
        return real(self, step, **data)

    monkeypatch.setattr(Journal, "append", append)
    with pytest.raises(ResumeError, match="has changed since the job was started"):
        streamprune.prune(config)
    assert not config.out.exists()


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        ("sobp", {}),
        ("default", {}),
        ("surgeon", {"shots": "3"}),
        ("surgeon", {"shots": "2", "lora_steps": "2"}),
        ("surgeon", {"shots": "2", "structure": "unstructured"}),
        ("surgeon", {"shots": "1", "structure": "2:4"}),
        ("magnitude", {"structure": "unstructured"}),
    ],
)
@pytest.mark.parametrize("size", [{"samples": 48, "seq_len": 48}, {"samples": 2, "seq_len": 8}], ids=["much", "little"])
def test_no_more_disk_than_the_plan_said(
    size: dict[str, int], recipe: str, settings: dict[str, str], tiny: Tiny, configured: Make, tmp_path: Path
) -> None:
    model = tiny("llama", hidden_size=64, intermediate_size=256, num_hidden_layers=3)
    config = configured(model, recipe=recipe, settings=settings, **size)
    planned = streamprune.forecast_job(config)
    work, graves = tmp_path / "work", tmp_path / "graves"
    work.mkdir()
    graves.mkdir()
    watched = FaultyDisk(work, graves)
    with disk.using(watched):
        streamprune.prune(replace(config, out=work / "out"))
    told = planned.disk_bytes + planned.output_bytes
    # Journal, log, plan, and what is copied beside the weights.
    assert told / 2 < watched.most < told + 200_000, (watched.most, planned.disk_bytes, planned.output_bytes)
