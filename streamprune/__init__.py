"""streamprune: make a large language model structurally smaller, streaming it block by block.

`prune` is the main job, `compare` does it by several recipes, `evaluate`, `report` and `inspect` look at what came out,
`load` is transformers' `from_pretrained` for pruned checkpoints, `export_gguf` writes them for llama.cpp. Importing this
package teaches `AutoModelForCausalLM` to load them too.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bench import Bench, Width, bench, bench_widths
from .compare import Variant, compare
from .comparison import Comparison
from .config import Config, TuneConfig
from .errors import Stopped, StreamPruneError
from .evaluate import Evaluation, evaluate
from .export import Exported, export_gguf
from .harness import Tasks, TaskScores, evaluate_tasks, find_tasks
from .hub import resolve_model
from .inspection import inspect
from .methods import RECIPES
from .model.architecture import ARCHITECTURES
from .model.modeling_streamprune import register
from .progress import Callback, Event, Progress
from .ranks import Ranks, joined
from .report import report
from .run import Result, forecast_job, plan_only, prune
from .status import Status, status
from .stopping import asked_by_signals
from .text import Source
from .tune import Tuned, tune
from .verification import Verification
from .verify import verify
from .version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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

for _model_type in ARCHITECTURES:
    register(_model_type)


def load(path: str | Path, **options: Any) -> PreTrainedModel:
    """A checkpoint directory or a name on the hub, pruned or dense, as a transformers model; `options` go to `from_pretrained`.

    Neither code of the checkpoint's own nor pickles are loaded, unless `options` ask for it.

    Raises:
        CheckpointError: `path` is neither.
    """
    from transformers import AutoModelForCausalLM

    careful = {"trust_remote_code": False, "use_safetensors": True, **options}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(resolve_model(path), **careful)
    return model
