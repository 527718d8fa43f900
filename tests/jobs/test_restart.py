"""`--restart` leaves nothing of the earlier job behind, wherever that one kept it, and also when it is killed itself."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import contents

import streamprune
from streamprune import Config, TuneConfig
from streamprune.errors import CheckpointError, ConfigError, DiskError, ResumeError
from streamprune.jobs.caches import RECORD
from streamprune.jobs.folder import JobFolder
from streamprune.jobs.journal import FORMAT, Journal
from streamprune.jobs.names import job_folder
from streamprune.system import files

Make = Callable[..., Config]
Tiny = Callable[..., Path]


class Killed(BaseException):
    """As a kill: nothing that handles errors handles it."""


def killed_after(appends: int, work: Callable[[], Any]) -> None:
    """Do work that ends behind so many lines of any journal."""
    real, left = Journal.append, appends

    def append(self: Journal, step: str, **data: Any) -> Any:
        nonlocal left
        found = real(self, step, **data)
        left -= 1
        if not left:
            raise Killed
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "append", append)
        with pytest.raises(Killed):
            work()


EARLIER: list[dict[str, Any]] = [
    {"recipe": "default", "refine": 2},
    {"recipe": "slimgpt", "calibration": "self", "samples": 2, "seq_len": 6},
    {"recipe": "surgeon", "settings": {"shots": "3", "lora_steps": "2"}, "samples": 3},
]


@pytest.mark.slow
@pytest.mark.parametrize("appends", [3, 6, 9])
@pytest.mark.parametrize("changes", EARLIER, ids=lambda changes: changes["recipe"])
def test_whatever_was_there_is_gone(
    changes: dict[str, Any], appends: int, tiny: Tiny, configured: Make, tmp_path: Path
) -> None:
    path = tiny("llama")
    earlier = configured(path, cache=tmp_path / "elsewhere", **changes)
    killed_after(appends, lambda: streamprune.prune(earlier))
    assert list((tmp_path / "elsewhere").iterdir())
    later = configured(path, cache=tmp_path / "cache")
    killed_after(1, lambda: streamprune.prune(later, restart=True))
    # All that is there is the new job's.
    assert not list((tmp_path / "elsewhere").iterdir())
    names = {file.name for file in job_folder(later.out).iterdir()}
    assert names == {"journal.jsonl", "lock", RECORD}
    streamprune.prune(later)
    fresh = configured(path, "fresh")
    streamprune.prune(fresh)
    assert contents(later.out) == contents(fresh.out)
    assert (later.out / "log.txt").read_text().count(" streamprune ") == 1
    assert not list((tmp_path / "cache").iterdir())
    assert {file.name for file in tmp_path.iterdir()} == {"cache", "elsewhere", "fresh", "out"}


def test_a_restart_killed_at_any_removal_is_finished_by_the_next(
    tiny: Tiny, configured: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = tiny("llama"), (files.remove, files.remove_tree, files.empty_folder)
    later, stops = configured(path, cache=tmp_path / "cache"), 0
    while True:
        earlier = configured(path, recipe="default", cache=tmp_path / "elsewhere")
        killed_after(6, lambda job=earlier: streamprune.prune(job))  # type: ignore[misc]
        left = stops

        def stopping(remove: Callable[..., None]) -> Callable[..., None]:
            def removing(*arguments: Any) -> None:
                nonlocal left
                left -= 1
                if left < 0:
                    raise Killed
                remove(*arguments)

            return removing

        with monkeypatch.context() as patch:
            for function in real:
                patch.setattr(files, function.__name__, stopping(function))
            try:
                killed_after(1, lambda: streamprune.prune(later, restart=True))
                return
            except Killed:
                stops += 1
        try:
            streamprune.prune(later)
        except ResumeError:  # it was killed before the earlier job's journal went
            assert stops == 1
            streamprune.prune(later, restart=True)
        assert not list((tmp_path / "elsewhere").iterdir()), stops
        assert not list((tmp_path / "cache").iterdir()), stops
        assert not job_folder(later.out).exists()
        streamprune_files = {file.name for file in tmp_path.iterdir()}
        assert streamprune_files == {"cache", "elsewhere", "out"}
        for file in sorted(later.out.rglob("*"), reverse=True):
            file.unlink()
        later.out.rmdir()
        assert stops < 12


@pytest.mark.parametrize("appends", [2, 3])
def test_of_a_tuning(appends: int, tiny: Tiny, text: Path, tmp_path: Path) -> None:
    path = tiny("llama")

    def tune(rank: int, cache: str, **options: Any) -> None:
        given: dict[str, Any] = {
            "text": text,
            "steps": 2,
            "samples": 4,
            "seq_len": 24,
            "rate": 1e-3,
            "method": "distil",
        }
        config = TuneConfig(model=path, out=tmp_path / "out", teacher=path, rank=rank, cache=tmp_path / cache, **given)
        streamprune.tune(config, **options)

    killed_after(appends, lambda: tune(2, "elsewhere"))
    assert list((tmp_path / "elsewhere").iterdir())
    tune(4, "cache", restart=True)
    assert not [file for cache in ("cache", "elsewhere") for file in (tmp_path / cache).iterdir()]
    assert {file.name for file in tmp_path.iterdir()} == {"cache", "elsewhere", "out"}


def test_of_a_comparison(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    def compare(cache: str, **options: Any) -> None:
        streamprune.compare(
            tiny("llama"),
            ratios=[0.2],
            recipes=["sobp", "magnitude"],
            text=text,
            eval_seq_len=48,
            out=tmp_path / "out",
            calibration=text,
            samples=6,
            seq_len=24,
            round_to=4,
            cache=tmp_path / cache,
            **options,
        )

    # Behind its start, what is asked, the dense model, the row's begin, and two steps of the row.
    killed_after(7, lambda: compare("elsewhere"))
    names = sorted(folder.name.rpartition("-")[0] for folder in (tmp_path / "elsewhere").iterdir())
    assert names == ["out", "sobp-0.2.streamprune"]
    compare("cache", restart=True)
    assert not list((tmp_path / "elsewhere").iterdir())
    assert not list((tmp_path / "cache").iterdir())
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert names == ["compare.csv", "compare.json", "compare.md", "journal.jsonl", "log.txt", "surveys"]
    assert (tmp_path / "out" / "log.txt").read_text().count(" starts") == 1


def test_an_evaluation_that_was_killed_leaves_its_comparison_nothing(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    def compare() -> None:
        given: dict[str, Any] = {"recipes": ["magnitude"], "text": text, "eval_seq_len": 48, "out": tmp_path / "out"}
        streamprune.compare(tiny("llama"), ratios=[0.2], samples=6, seq_len=24, round_to=4, **given)

    killed_after(2, compare)
    (tmp_path / "out" / "cache" / "streamprune-eval-dead").mkdir(parents=True)
    (tmp_path / "out" / "compare.png.tmp").touch()
    compare()
    assert {"cache", "compare.png.tmp"}.isdisjoint(file.name for file in (tmp_path / "out").iterdir())


def test_another_job_under_way_is_left_alone_by_one_that_is_finished(tiny: Tiny, configured: Make) -> None:
    path = tiny("llama")
    finished, under_way = configured(path), configured(path, ratio=0.4)
    streamprune.prune(finished)
    killed_after(8, lambda: streamprune.prune(under_way, restart=True))
    assert streamprune.prune(finished).resumed
    assert streamprune.status(finished.out).state == "interrupted"
    assert streamprune.prune(under_way).resumed
    assert streamprune.status(finished.out).state == "finished"


def test_what_a_finished_job_had_no_time_to_clear_goes_with_the_next(
    tiny: Tiny, configured: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny("llama")

    def kill(*arguments: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(JobFolder, "clear", kill)
        with pytest.raises(Killed):
            streamprune.prune(configured(path, cache=tmp_path / "elsewhere"))
    assert list((tmp_path / "elsewhere").iterdir())
    # The same job by its settings, of which the cache is none.
    assert streamprune.prune(configured(path)).resumed
    assert not list((tmp_path / "elsewhere").iterdir())
    assert not job_folder(tmp_path / "out").exists()


def test_a_folder_of_somebody_else_beside_a_finished_result_stays(tiny: Tiny, configured: Make) -> None:
    config = configured(tiny("llama"))
    streamprune.prune(config)
    job_folder(config.out).mkdir()
    (job_folder(config.out) / "thesis.txt").write_text("all of it")
    assert streamprune.prune(config).resumed
    with pytest.raises(ConfigError, match=r"contains thesis\.txt"):
        streamprune.prune(config, restart=True)
    assert contents(job_folder(config.out)) == {"thesis.txt": b"all of it"}


@pytest.mark.parametrize("note", ["{", "[]", "{}", '{"folders": "/"}', '{"folders": [1]}'])
def test_a_damaged_note_is_refused(note: str, tiny: Tiny, configured: Make, tmp_path: Path) -> None:
    config = configured(tiny("llama"))
    killed_after(6, lambda: streamprune.prune(config))
    (job_folder(config.out) / RECORD).write_text(note)
    with pytest.raises((ResumeError, CheckpointError), match=RECORD.replace(".", r"\.")):
        streamprune.prune(config, restart=True)


def test_a_note_leads_to_no_folder_but_this_jobs(tiny: Tiny, configured: Make, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "precious").mkdir(parents=True)
    config = configured(tiny("llama"))
    killed_after(6, lambda: streamprune.prune(config))
    (job_folder(config.out) / RECORD).write_text(f'{{"folders": ["{other}", "{tmp_path}"]}}')
    streamprune.prune(config, restart=True)
    assert (other / "precious").is_dir()


@pytest.mark.parametrize(
    "edit", [f'"format": {FORMAT}, '.encode(), b'"step": "start", '], ids=["older version", "damaged"]
)
def test_a_journal_that_cannot_be_resumed_is_refused_and_restarts(edit: bytes, tiny: Tiny, configured: Make) -> None:
    config = configured(tiny("llama"))
    killed_after(3, lambda: streamprune.prune(config))
    path = job_folder(config.out) / "journal.jsonl"
    first, rest = path.read_bytes().split(b"\n", 1)
    text = first.partition(b" ")[2]
    assert edit in text
    text = text.replace(edit, b"")
    path.write_bytes(b"%08x %s\n" % (zlib.crc32(text), text) + rest)
    reason = "was written by another version of streamprune" if b"format" in edit else "line 1 is damaged"
    for work in (streamprune.prune, streamprune.plan_only):
        with pytest.raises(ResumeError, match=f"{reason}.*--restart"):
            work(config)
    with pytest.raises(ResumeError, match=reason):
        streamprune.status(config.out)
    assert not streamprune.prune(config, restart=True).resumed


@pytest.fixture
def replacing(tiny: Tiny, configured: Make) -> Config:
    """A job whose OUT holds a result of other settings."""
    config = configured(tiny("llama"), recipe="magnitude")
    streamprune.prune(replace(config, ratio=0.2))
    return config


@pytest.mark.parametrize("in_time", [True, False])
def test_a_result_that_cannot_appear_leaves_the_older_one(
    in_time: bool, replacing: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the older one has been moved, and only making that durable fails."""
    before = contents(replacing.out)
    with monkeypatch.context() as patch:
        patch.setattr(JobFolder, "_make_way", followed_by(DiskError("Input/output error"), in_time=in_time))
        with pytest.raises(DiskError, match="Input/output error; run the same command again to resume"):
            streamprune.prune(replacing, restart=True)
    assert contents(replacing.out) == before
    result = streamprune.prune(replacing)
    assert result.resumed
    assert result.ratio_requested == replacing.ratio
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("out")) == ["out"]


@pytest.mark.parametrize("restart", [True, False])
def test_killed_between_two_results_the_older_one_is_put_back(
    restart: bool, replacing: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(replacing.out)
    with monkeypatch.context() as patch:
        patch.setattr(JobFolder, "_make_way", followed_by(Killed()))
        with pytest.raises(Killed):
            streamprune.prune(replacing, restart=True)
        assert not replacing.out.exists()
    with monkeypatch.context() as patch:
        patch.setattr(JobFolder, "_start", killed)
        with pytest.raises(Killed):
            streamprune.prune(replacing, restart=restart)
    assert contents(replacing.out) == before
    assert streamprune.prune(replacing, restart=restart).ratio_requested == replacing.ratio


def followed_by(error: BaseException, *, in_time: bool = False) -> Callable[[JobFolder], None]:
    """Making way, behind which nothing can be published; or which itself fails at its end."""
    real = JobFolder._make_way

    def make_way(self: JobFolder) -> None:
        real(self)
        if in_time:
            raise error
        publish = files.publish

        def failing(staging: Path, target: Path) -> None:
            files.publish = publish
            raise error

        files.publish = failing

    return make_way


def killed(*arguments: Any) -> None:
    raise Killed


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["config.json", "*.safetensors"])
def test_a_lost_file_of_an_earlier_shot_is_made_again(
    lost: str, tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second shot cannot even be opened without it."""
    path, real = tiny("llama"), Journal.append
    config = configured(path, recipe="default", settings={"shots": "2"})

    def append(self: Journal, step: str, **data: Any) -> Any:
        found = real(self, step, **data)
        if step.endswith("prune/0") and any(line["step"].endswith("finished") for line in self.steps()):
            raise Killed
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", append)
        with pytest.raises(Killed):
            streamprune.prune(config)
    (earlier,) = (
        each for each in job_folder(config.out).iterdir() if each.is_dir() and (each / "config.json").is_file()
    )
    next(iter(sorted(earlier.glob(lost)))).unlink()
    streamprune.prune(config)
    fresh = configured(path, "fresh", recipe="default", settings={"shots": "2"})
    streamprune.prune(fresh)
    assert contents(config.out) == contents(fresh.out)
