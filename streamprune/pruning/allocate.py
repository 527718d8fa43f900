"""The plan of a shot: the one in force, the one given, or a new one from the recipe."""

from __future__ import annotations

from ..errors import ResumeError
from ..model.site import Site
from ..recipes.plan import Plan
from ..system import files
from .block import left_alone, tokens_seen
from .shot import Shot


def allocate(shot: Shot) -> Plan:
    """Return the plan to prune by, and journal it if it is new.

    Raises:
        ResumeError: the job uses another plan than the one given, or its plan file was changed.
    """
    job, chosen = shot.job, shot.journalled("allocate")
    if job.request.given_plan is not None:
        if chosen is None or chosen["plan"] != job.request.given_plan.digest():
            if chosen is not None and shot.steps("prune/"):
                raise ResumeError(
                    f"plan is {job.request.given_plan.digest()}; this job is pruning by {chosen['plan']}; --restart starts over"
                )
            return _choose(shot, job.request.given_plan, given=True)
    elif chosen is not None and chosen["given"]:
        raise ResumeError(f"plan is not given; this job uses the plan {chosen['plan']}; --restart starts over")
    elif chosen is None:
        allocated = shot.ranks.broadcast(
            lambda: job.request.allocate(shot.sites, _reached(shot), shot.survey, shot.budget).to_json()
        )
        return _choose(shot, Plan.parse(allocated, "the plan"), given=False)
    plan = Plan.read(job.plan_path)
    if plan.digest() != chosen["plan"]:
        raise ResumeError(f"{job.plan_path} was changed; pass a copy of it with --plan, or remove it to make it again")
    return plan


def _reached(shot: Shot) -> list[Site]:
    """All sites except experts that saw fewer tokens than they have channels: those keep everything."""
    survey, sites = shot.survey, []
    for site in shot.sites:
        seen = tokens_seen(site, survey)
        if seen is not None and left_alone(site, seen, alike=shot.experts_alike):
            shot.progress.say(f"{site.name} saw {seen} tokens and is left alone")
        else:
            sites.append(site)
    return sites


def _choose(shot: Shot, plan: Plan, *, given: bool) -> Plan:
    """Put a plan in force: check it, write it and journal it."""
    plan.check(shot.sites, "the plan")
    if shot.ranks.first:
        files.write_text(shot.job.plan_path, plan.to_json())
    shot.record("allocate", plan=plan.digest(), given=given)
    return plan
