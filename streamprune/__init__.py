"""streamprune: prune large language models structurally, streaming one transformer block at a time.

`prune` is the main job and `compare` runs it with several recipes. `evaluate`, `report` and `inspect` examine the result.
`load` loads pruned checkpoints like transformers' `from_pretrained`; `export_gguf` writes them for llama.cpp.

Importing this package also registers pruned checkpoints with `AutoModelForCausalLM`. torch and transformers are imported
only when they are needed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .model.registration import teach
from .system.version import __version__

if TYPE_CHECKING:
    from .commands.bench import Bench, Width, bench, bench_widths
    from .commands.compare.run import compare
    from .commands.compare.table import Comparison, Variant
    from .commands.evaluate import Evaluation, evaluate
    from .commands.export.gguf import Exported, export_gguf
    from .commands.harness.tasks import Tasks, TaskScores, evaluate_tasks, find_tasks
    from .commands.inspect import inspect
    from .commands.report.report import report
    from .commands.status import Status, status
    from .commands.tune.run import Tuned, tune
    from .errors import Stopped, StreamPruneError
    from .jobs.config import Config, TuneConfig
    from .model.architectures import FAMILIES
    from .model.hub import load, resolve_model
    from .model.verify import Verification, verify
    from .pruning.preview import Outcome, Preview, preview
    from .pruning.result import Result
    from .pruning.run import forecast_job, plan_only, prune
    from .recipes.registry import RECIPES
    from .system.progress import Callback, Event, Progress
    from .system.ranks import Ranks, joined
    from .system.signals import asked_by_signals
    from .text.source import Source

_HOME = {
    "commands.bench": ("Bench", "Width", "bench", "bench_widths"),
    "commands.compare.run": ("compare",),
    "commands.compare.table": ("Comparison", "Variant"),
    "commands.evaluate": ("Evaluation", "evaluate"),
    "commands.export.gguf": ("Exported", "export_gguf"),
    "commands.harness.tasks": ("TaskScores", "Tasks", "evaluate_tasks", "find_tasks"),
    "commands.inspect": ("inspect",),
    "commands.report.report": ("report",),
    "commands.status": ("Status", "status"),
    "commands.tune.run": ("Tuned", "tune"),
    "errors": ("Stopped", "StreamPruneError"),
    "jobs.config": ("Config", "TuneConfig"),
    "model.architectures": ("FAMILIES",),
    "model.hub": ("load", "resolve_model"),
    "model.verify": ("Verification", "verify"),
    "pruning.preview": ("Outcome", "Preview", "preview"),
    "pruning.result": ("Result",),
    "pruning.run": ("forecast_job", "plan_only", "prune"),
    "recipes.registry": ("RECIPES",),
    "system.progress": ("Callback", "Event", "Progress"),
    "system.ranks": ("Ranks", "joined"),
    "system.signals": ("asked_by_signals",),
    "text.source": ("Source",),
}
"""Maps each module to the public names it defines. Must match the `TYPE_CHECKING` imports above."""
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "FAMILIES",
    "RECIPES",
    "Bench",
    "Callback",
    "Comparison",
    "Config",
    "Evaluation",
    "Event",
    "Exported",
    "Outcome",
    "Preview",
    "Progress",
    "Ranks",
    "Result",
    "Source",
    "Status",
    "Stopped",
    "StreamPruneError",
    "TaskScores",
    "Tasks",
    "TuneConfig",
    "Tuned",
    "Variant",
    "Verification",
    "Width",
    "__version__",
    "asked_by_signals",
    "bench",
    "bench_widths",
    "compare",
    "evaluate",
    "evaluate_tasks",
    "export_gguf",
    "find_tasks",
    "forecast_job",
    "inspect",
    "joined",
    "load",
    "plan_only",
    "preview",
    "prune",
    "report",
    "resolve_model",
    "status",
    "tune",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


teach()
