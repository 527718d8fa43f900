"""streamprune: make a large language model structurally smaller, streaming it block by block.

`prune` is the main job, `compare` does it by several recipes, `evaluate` and `inspect` look at what came out, `load` is transformers'
`from_pretrained` for pruned checkpoints. Importing this package teaches `AutoModelForCausalLM` to load them too.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .compare import Variant, compare
from .comparison import Comparison
from .config import Config, TuneConfig
from .errors import CheckpointError, Stopped, StreamPruneError
from .evaluate import Evaluation, evaluate
from .inspection import inspect
from .methods import RECIPES
from .model.architecture import ARCHITECTURES
from .model.modeling_streamprune import register
from .progress import Callback, Event, Progress
from .run import Result, forecast_job, plan_only, prune
from .status import Status, status
from .stopping import asked_by_signals
from .tune import Tuned, tune
from .version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel


__all__ = [
    "ARCHITECTURES",
    "RECIPES",
    "Callback",
    "Comparison",
    "Config",
    "Evaluation",
    "Event",
    "Progress",
    "Result",
    "Status",
    "Stopped",
    "StreamPruneError",
    "TuneConfig",
    "Tuned",
    "Variant",
    "__version__",
    "asked_by_signals",
    "compare",
    "evaluate",
    "forecast_job",
    "inspect",
    "load",
    "plan_only",
    "prune",
    "status",
    "tune",
]

for _model_type in ARCHITECTURES:
    register(_model_type)


def load(path: str | Path, **options: Any) -> PreTrainedModel:
    """A checkpoint directory, pruned or dense, as a transformers model; `options` go to `from_pretrained`.

    Raises:
        CheckpointError: `path` is not a directory.
    """
    from transformers import AutoModelForCausalLM

    if not Path(path).is_dir():
        raise CheckpointError(f"{path} is not a directory with a model in it")
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(Path(path), **options)
    return model
