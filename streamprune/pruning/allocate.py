"""The plan of a shot: the one given, the one that the journal records, or a new one from the recipe."""

from __future__ import annotations

from functools import partial

from ..errors import ResumeError
from ..jobs.resume import plan_in_force
from ..recipes.plan import Plan
from ..system import files
from .aim import reached, settle
from .block import tokens_seen
from .shot import Shot


def allocate(shot: Shot) -> Plan:
    """Return the plan to prune by, and journal it if it is new. Raises ResumeError if it or its file was changed meanwhile."""
    settle(shot)
    job, chosen, plan = shot.job, shot.journalled("allocate"), shot.job.request.given_plan
    source = plan_in_force(chosen, job.terms["plan"], pruning=bool(shot.steps("prune/")))
    if source == "recorded":
        assert chosen is not None
        plan = Plan.read(job.plan_path)
        if plan.digest() != chosen["plan"]:
            raise ResumeError(
                f"{job.plan_path} was changed; pass a copy of it with --plan, or remove it to make it again"
            )
        return plan
    if plan is None:
        able = partial(reached, survey=shot.survey, alike=shot.experts_alike, whole=shot.budget.experts)
        allocated = shot.ranks.broadcast(
            lambda: job.request.allocate(shot.sites, able, shot.survey, shot.budget).to_json()
        )
        plan = Plan.parse(allocated, "the plan")
        stay = [site for site in shot.sites if plan[site.name].keep]
        able_to = able(stay)
        for site in (site for site in stay if site not in able_to):
            shot.progress.say(f"{site.name} saw {tokens_seen(site, shot.survey)} tokens and is left alone")
    plan.check(shot.sites, "the plan")
    if shot.ranks.first:
        files.write_text(job.plan_path, plan.to_json())
    shot.record("allocate", plan=plan.digest(), given=source == "given")
    return plan
