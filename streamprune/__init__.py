"""streamprune: make a large language model structurally smaller, streaming it block by block.

`prune` is the main job, `compare` does it by several recipes, `evaluate`, `report` and `inspect` look at what came out,
`load` is transformers' `from_pretrained` for pruned checkpoints, `export_gguf` writes them for llama.cpp. Importing this
package teaches `AutoModelForCausalLM` to load them too. torch and transformers are imported when something needs them.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .model.registration import teach
from .version import __version__

if TYPE_CHECKING:
    from .bench import Bench, Width, bench, bench_widths
    from .compare import compare
    from .comparison import Comparison, Variant
    from .config import Config, TuneConfig
    from .errors import Stopped, StreamPruneError
    from .evaluate import Evaluation, evaluate
    from .export import Exported, export_gguf
    from .harness import Tasks, TaskScores, evaluate_tasks, find_tasks
    from .hub import load, resolve_model
    from .inspection import inspect
    from .methods import RECIPES
    from .model.architecture import ARCHITECTURES
    from .progress import Callback, Event, Progress
    from .ranks import Ranks, joined
    from .report.report import report
    from .run import Result, forecast_job, plan_only, prune
    from .status import Status, status
    from .stopping import asked_by_signals
    from .text import Source
    from .tune import Tuned, tune
    from .verification import Verification
    from .verify import verify

_HOME = {
    "bench": ("Bench", "Width", "bench", "bench_widths"),
    "compare": ("compare",),
    "comparison": ("Comparison", "Variant"),
    "config": ("Config", "TuneConfig"),
    "errors": ("Stopped", "StreamPruneError"),
    "evaluate": ("Evaluation", "evaluate"),
    "export": ("Exported", "export_gguf"),
    "harness": ("TaskScores", "Tasks", "evaluate_tasks", "find_tasks"),
    "hub": ("load", "resolve_model"),
    "inspection": ("inspect",),
    "methods": ("RECIPES",),
    "model.architecture": ("ARCHITECTURES",),
    "progress": ("Callback", "Event", "Progress"),
    "ranks": ("Ranks", "joined"),
    "report": ("report",),
    "run": ("Result", "forecast_job", "plan_only", "prune"),
    "status": ("Status", "status"),
    "stopping": ("asked_by_signals",),
    "text": ("Source",),
    "tune": ("Tuned", "tune"),
    "verification": ("Verification",),
    "verify": ("verify",),
}
"""The module that has each public name; the same as type checkers read above."""
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "ARCHITECTURES",
    "RECIPES",
    "Bench",
    "Callback",
    "Comparison",
    "Config",
    "Evaluation",
    "Event",
    "Exported",
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
    "prune",
    "report",
    "resolve_model",
    "status",
    "tune",
    "verify",
]


class _Package(ModuleType):
    """This package: `streamprune.status` is the function even after its module of the same name was imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULE and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in _MODULE:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f".{_MODULE[name]}", __name__), name)
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
teach()
