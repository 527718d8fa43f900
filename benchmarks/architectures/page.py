"""docs/architectures.md from the rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import scope

STATUSES = {
    "works": "every sublayer is pruned, and everything agrees",
    "partly": "everything agrees; the modules named pass through unpruned, and calibration runs through them",
    "refused": "streamprune refuses the model before any work, with the reason",
    "failed": "pruning fails or disagrees: a fault",
    "unbuilt": "transformers cannot make the checkpoint here",
}


def counts(rows: Mapping[str, Mapping[str, Any]], listed: Mapping[str, str]) -> str:
    """Return the totals as a Markdown table: by status, for text models and wrappers."""
    lines = ["| | text | wrapper | all |", "|---|--:|--:|--:|"]
    for status in STATUSES:
        found = [listed[name] for name, row in rows.items() if row["status"] == status]
        lines.append(f"| {status} | {found.count('text')} | {found.count('wrapper')} | {len(found)} |")
    kinds = [listed[name] for name in rows]
    lines.append(f"| all | {kinds.count('text')} | {kinds.count('wrapper')} | {len(kinds)} |")
    return "\n".join(lines)


def page(rows: Mapping[str, Mapping[str, Any]], listed: Mapping[str, str], date: str) -> str:
    """Return the page as Markdown."""
    versions = next(iter(rows.values()))["versions"]
    named = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "code")
    meanings = "\n".join(f"- **{status}**: {meaning}." for status, meaning in STATUSES.items())
    table = [line(rows[name], kind) for name, kind in sorted(listed.items())]
    left_out = "\n".join(f"- `{name}`: {why}" for name, why in sorted(scope.BY_NAME.items()))
    rules = "\n".join(f"- {rule}" for rule in scope.RULES[1:])
    return f"""# Architectures

Written by `scripts/architectures` on {date} with {named}. For each model type it makes a
tiny random checkpoint with a config as found on the hub, and

1. evaluates it streamed, which must give the loss of transformers on the same tokens,
2. prunes 25 % with `sobp` (less where most of a block passes through), then every site by a quarter with a plan,
3. lets one of the routed experts of each block go as a whole (`--experts`),
4. evaluates the results streamed and loads them in a process that cannot import streamprune: losses and logits must
   agree.

"Agree" means a relative difference below 1e-5 in float32. `wrapper` is a model for images and text, whose text model
is pruned. [checks.md](checks.md) lists what tests check further for one model of each structure.

{counts(rows, listed)}

{meanings}

Sites: `attention` is softmax attention, `linear` a mixer with linear attention or a state space, `ffn` a feed-forward
network (also one shared beside experts), `experts` those that a router chooses. A number of whole experts in each block gives a
checkpoint that transformers loads as it is (`stock`), or one in the free layout (`free`); where none can go, there is a dash.

| `model_type` | | status | sites | fewer experts | passes through, or why not |
|---|---|---|---|---|---|
{chr(10).join(table)}

## Left out

{scope.RULES[0]}

{rules}:

{left_out}
"""


def line(row: Mapping[str, Any], kind: str) -> str:
    """Return a type's line of the table."""
    sites = ", ".join(row.get("sites", {})) if row["status"] in ("works", "partly") else ""
    through = list(row.get("through", ()))
    single = [f"{name} (one unit per block)" for name in row.get("single", ()) if through]
    why = ", ".join(f"`{name}`" for name in through) + ("; " + ", ".join(single) if single else "")
    if "error" in row:
        why = str(row["error"]).partition("; supported are")[0].replace("|", "\\|")
        why = f"{row['step']}: {why}" if row["status"] == "failed" else why
    return f"| `{row['type']}` | {kind} | {row['status']} | {sites} | {row.get('fewer', '')} | {why} |"
