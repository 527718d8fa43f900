"""All decisions on resuming a job: is OUT its result, may it resume, which plan is in force, which steps are repeated.

A job only describes itself: its terms, its models, and the files that its next step reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import ConfigError, ResourceError, ResumeError
from ..model.skeleton import Skeleton
from ..stream.store import ActivationStore
from ..system.progress import Progress
from ..system.ranks import Ranks
from ..system.units import format_bytes
from .forecast.memory import SLACK
from .journal import Entry, Journal

Terms = Mapping[str, Any]
"""What must be unchanged on resume, as the journal's first line records it. ``job``: settings, inputs and versions;
``cache``: the folder given for activations. Pruning jobs add ``plan`` (digest of the plan given), ``shots``, ``ranks``."""

RESTART = "--restart starts over"


@dataclass(frozen=True)
class RequiredFile:
    """A file that the next step of a job reads."""

    path: Path
    step: str
    """Prefix of the name of the first step to repeat, with all later ones, if the file is missing or damaged."""
    intact: Callable[[], bool]


# Finished jobs.


def refuse_other_result(out: Path, report: Entry, terms: Terms) -> None:
    """Raise ConfigError if OUT, with this report, is not the result of a job with these terms."""
    reason = first_difference(report["job"], terms["job"])
    reason = reason and f"of another job: {reason}"
    if not reason and report.get("plan_given") != terms.get("plan"):
        reason = f"by plan {report['plan_given']}, not {terms['plan']}"
    if reason:
        raise ConfigError(f"OUT is {out}, a finished result {reason}; --restart replaces it")


def replaces_out(start: Entry | None, terms: Terms) -> bool:
    """Whether a started job is this one and was told to replace an earlier result in OUT."""
    return start is not None and start["replaces"] and is_same(start, terms)


def is_same(start: Entry, terms: Terms) -> bool:
    """Whether a started job has these settings, inputs and versions."""
    return first_difference(start["job"], terms["job"]) is None


# Started jobs.


def check_same(start: Entry, terms: Terms, folder: Path) -> None:
    """Raise ResumeError if the job in `folder` was started with other terms."""
    refuse_difference(f"{folder} contains a job", start["job"], terms["job"])
    then, now = start.get, terms.get
    for differs, reason in (
        (
            then("cache") != now("cache"),
            f"cache is {now('cache') or 'not given'}; this job was started with {then('cache') or 'none'}",
        ),
        # A plan may be given later, after --plan-only; it cannot be withdrawn.
        (then("plan") and not now("plan"), "plan is not given; this job was started with one"),
        (
            then("shots") != now("shots"),
            f"a plan is given, which takes one shot; this job was started in {then('shots')}",
        ),
        (
            then("ranks") != now("ranks"),
            f"{now('ranks')} processes share the samples; this job was started with {then('ranks')}",
        ),
    ):
        if differs:
            raise ResumeError(f"{reason}; {RESTART}")


def check_sources(start: Entry, sources: Sequence[Skeleton], ranks: Ranks) -> None:
    """Raise ResumeError if a model's tensor has changed since the job was started. Reads files written to since."""
    for skeleton, then in zip(sources, start["sources"], strict=True):
        checkpoint = skeleton.checkpoint
        if name := ranks.broadcast(lambda c=checkpoint, then=then: c.changed(**then)):  # type: ignore[misc]
            raise ResumeError(
                f"{checkpoint[name].shard}: tensor {name!r} has changed since the job was started; {RESTART}"
            )


def check_tokens(start: Entry, tokens: str) -> None:
    """Raise ResumeError if the fingerprint of the windows is another one than when the job was started."""
    if start.get("tokens", tokens) != tokens:
        raise ResumeError(
            f"the text gives tokens {tokens}; this job was started with {start['tokens']} (the chat template may write the "
            f"date, say); {RESTART}"
        )


def check_memory(asked: int | None, limit: int, needed: int) -> None:
    """Raise ResourceError if the micro-batches of a started job, which fix the order of sums, no longer fit.

    Args:
        asked: bytes given as the limit; None accepts whatever the job was started with.
        limit: bytes that the device may use.
        needed: bytes that count towards the limit at the job's peak.
    """
    if asked is not None and limit * SLACK < needed:
        free = f", of which {format_bytes(limit)} are free" if limit < asked else ""
        raise ResourceError(
            f"the memory limit is {format_bytes(asked)}{free}; this job was started with micro-batches that need "
            f"{format_bytes(needed)}; {RESTART}"
        )


def plan_in_force(chosen: Entry | None, given: str | None, *, pruning: bool) -> Literal["given", "recorded", "new"]:
    """Decide which plan a shot prunes by: the one given, the one that its journal records, or a new one.

    Args:
        chosen: the journal's line of the plan; None if there is none yet.
        given: digest of the plan given.
        pruning: whether blocks have been pruned by the recorded plan.

    Raises:
        ResumeError: the plan would change under pruned blocks, or the one given earlier is missing.
    """
    if given is None and chosen is not None and chosen["given"]:
        raise ResumeError(f"plan is not given; this job uses the plan {chosen['plan']}; {RESTART}")
    if given is not None and chosen is not None and chosen["plan"] != given and pruning:
        raise ResumeError(f"plan is {given}; this job is pruning by {chosen['plan']}; {RESTART}")
    if given is not None and (chosen is None or chosen["plan"] != given):
        return "given"
    return "new" if chosen is None else "recorded"


def rewind_to_existing(
    journal: Journal, required_files: Callable[[], Iterable[RequiredFile]], progress: Progress
) -> None:
    """Undo steps of earlier processes until all files that the next step reads are intact on every rank."""
    while any(journal.steps()) and any(found := journal.ranks.gather(_first_missing(required_files(), progress))):
        path, step = next(each for each in found if each is not None)
        progress.say(f"{path} is missing or damaged; repeating the job from {step}")
        journal.rewind(step)


def _first_missing(required_files: Iterable[RequiredFile], progress: Progress) -> tuple[Path, str] | None:
    progress.phase("check files", 1)
    # One by one: what is required may be known only if the files before it are intact.
    for file in required_files:
        if not file.intact():
            return file.path, file.step
    progress.step("intact")
    return None


def ensure(store: ActivationStore, name: str, write: Callable[[], None]) -> None:
    """Write activations again unless they are usable, for those that need no journal line withdrawn."""
    if not store.usable(name):
        write()


def refuse_difference(what: str, then: Any, now: Any, place: str = "") -> None:
    """Raise ResumeError if the settings of `what` were `then` and are `now`, which are JSON values."""
    if difference := first_difference(then, now, place):
        raise ResumeError(f"{what} with other settings: {difference}; {RESTART}")


def first_difference(then: Any, now: Any, place: str = "") -> str | None:
    """Describe the first field in which two JSON values differ, with both values; None if they are equal."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted(then.keys() | now.keys()):
            inner = f"{place}.{key}" if place else key
            if found := first_difference(then.get(key), now.get(key), inner):
                return found
        return None
    # Compare as JSON, so that a value read back equals the value written.
    before, after = json.dumps(then), json.dumps(now)
    if before == after:
        return None
    before, after = (text if len(text) <= 60 else text[:57] + "..." for text in (before, after))
    return f"{place} is {after} and was {before}"
