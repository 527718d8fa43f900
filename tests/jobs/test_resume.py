"""The decisions on resuming, given only the journal, the terms and the required files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from streamprune.errors import ConfigError, ResourceError, ResumeError
from streamprune.jobs import resume
from streamprune.jobs.journal import Journal
from streamprune.jobs.resume import RequiredFile
from streamprune.system.progress import Silent

TERMS: dict[str, Any] = {"job": {"settings": {"seed": 0}}, "cache": None, "plan": None, "shots": 2, "ranks": 1}


def line(plan: str, *, given: bool) -> dict[str, Any]:
    return {"plan": plan, "given": given}


@pytest.mark.parametrize(
    ("chosen", "given", "pruning", "decided"),
    [
        (None, None, False, "new"),
        (None, "a", False, "given"),
        (line("a", given=False), None, True, "recorded"),
        (line("a", given=False), "a", True, "recorded"),
        (line("a", given=True), "a", True, "recorded"),
        (line("a", given=False), "b", False, "given"),
        (line("a", given=True), "b", False, "given"),
        (line("a", given=False), "b", True, "plan is b; this job is pruning by a"),
        (line("a", given=True), "b", True, "plan is b; this job is pruning by a"),
        (line("a", given=True), None, False, "plan is not given; this job uses the plan a"),
    ],
)
def test_the_plan_in_force(chosen: dict[str, Any] | None, given: str | None, pruning: bool, decided: str) -> None:
    if " " in decided:
        with pytest.raises(ResumeError, match=decided):
            resume.plan_in_force(chosen, given, pruning=pruning)
    else:
        assert resume.plan_in_force(chosen, given, pruning=pruning) == decided


@pytest.mark.parametrize(
    ("then", "now", "message"),
    [
        (
            {"job": {"settings": {"seed": 1}}},
            {},
            r"/job contains a job with other settings: settings\.seed is 0 and was 1",
        ),
        ({"cache": "/c"}, {}, "cache is not given; this job was started with /c"),
        ({}, {"cache": "/c"}, "cache is /c; this job was started with none"),
        ({"plan": "a"}, {}, "plan is not given"),
        ({}, {"shots": 1}, "a plan is given, which takes one shot; this job was started in 2"),
        ({}, {"ranks": 4}, "4 processes share the samples; this job was started with 1"),
    ],
)
def test_other_terms_are_refused_with_both_values(then: dict[str, Any], now: dict[str, Any], message: str) -> None:
    with pytest.raises(ResumeError, match=f"{message}.*; --restart starts over"):
        resume.check_same(TERMS | then, TERMS | now, Path("/job"))


def test_equal_terms_and_a_plan_given_later_may_resume() -> None:
    resume.check_same(TERMS, TERMS, Path("/job"))
    resume.check_same(TERMS, TERMS | {"plan": "a"}, Path("/job"))
    # Tuning records neither plan nor shots.
    resume.check_same({"job": {}, "cache": None}, {"job": {}, "cache": None}, Path("/job"))


def test_results_of_other_jobs_are_refused() -> None:
    resume.refuse_other_result(Path("out"), {"job": TERMS["job"], "plan_given": None}, TERMS)
    resume.refuse_other_result(Path("out"), {"job": {}}, {"job": {}, "cache": None})
    with pytest.raises(ConfigError, match=r"a finished result of another job: settings is .* and was null"):
        resume.refuse_other_result(Path("out"), {"job": {}, "plan_given": None}, TERMS)
    with pytest.raises(ConfigError, match="a finished result by plan a, not None"):
        resume.refuse_other_result(Path("out"), {"job": TERMS["job"], "plan_given": "a"}, TERMS)


def test_only_a_limit_that_was_given_can_be_too_low() -> None:
    resume.check_memory(None, 10, 1000)
    resume.check_memory(1000, 1000, 1019)
    with pytest.raises(ResourceError, match=r"the memory limit is 1000 B; .* need 1021 B"):
        resume.check_memory(1000, 1000, 1021)


def test_steps_are_undone_until_all_files_are_there(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    for step in ("start", "forward/0", "forward/1", "allocate", "prune/0"):
        journal.append(step)
    asked: list[list[str]] = []

    def required() -> Iterator[RequiredFile]:
        steps = [entry["step"] for entry in journal.steps()]
        asked.append(steps)
        yield RequiredFile(Path("plan"), "allocate", lambda: "prune/0" not in steps)
        yield RequiredFile(Path("survey"), "forward/1", lambda: "forward/1" not in steps)

    resume.rewind_to_existing(journal, required, Silent())
    assert [len(steps) for steps in asked] == [4, 2, 1]
    assert [entry["step"] for entry in Journal(journal.path).steps()] == ["forward/0"]


def test_a_new_job_requires_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append("start")
    resume.rewind_to_existing(journal, lambda: [RequiredFile(Path("x"), "start", lambda: False)], Silent())
    assert journal.header is not None
