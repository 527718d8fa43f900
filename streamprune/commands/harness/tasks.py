"""Evaluate a streamed model on lm-evaluation-harness tasks, with prompts, tokens and metrics of its `hf` backend."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import CalibrationError, ConfigError, check_least, one_line
from ...model.hub import resolve_model
from ...model.tokenizer import Bos, bos_token, load_tokenizer
from ...system.progress import Progress, Silent

SCORED = ("multiple_choice", "loglikelihood", "loglikelihood_rolling")
"""Output types of tasks that need no generated text."""


@dataclass(frozen=True)
class TaskScores:
    """Result of `evaluate_tasks`."""

    results: dict[str, dict[str, Any]]
    """lm_eval's entries by task or group, such as ``"acc,none"`` and ``"acc_stderr,none"``."""
    documents: dict[str, int]
    """Number of documents scored, by task."""
    table: str
    """lm_eval's table of the results."""
    bos: bool
    """Whether a text begins with BOS."""
    protocol: str
    """How the tasks were evaluated."""


@dataclass(frozen=True)
class Tasks:
    """Tasks with their data loaded."""

    names: tuple[str, ...]
    manager: Any
    """lm_eval's TaskManager, with the tasks loaded."""
    limit: int | None
    """Documents per task; None for all."""
    num_fewshot: int | None
    """Examples before each document; None for the task's default."""


def find_tasks(
    names: Sequence[str], *, include_path: Path | None = None, limit: int | None = None, num_fewshot: int | None = None
) -> Tasks:
    """Look tasks up and load their data.

    Args:
        names: tasks, groups and tags of lm_eval and of the task files below `include_path`.
        limit: documents per task; None takes all.
        num_fewshot: examples before each document; None takes the task's default.

    Raises:
        ConfigError: lm_eval is not installed, a name is unknown, a task needs generated text, or `limit` or
            `num_fewshot` is out of range.
        CalibrationError: a task's data cannot be read.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("tasks need lm-evaluation-harness: pip install 'streamprune[harness]'")
    if not names:
        raise ConfigError("no tasks are named")
    check_least(1, limit=limit)
    check_least(0, num_fewshot=num_fewshot)
    if include_path is not None and not include_path.is_dir():
        raise ConfigError(f"include_path {include_path} is not a directory with task files in it")
    own = None if include_path is None else _manager(include_path, include_defaults=False)
    if own is not None and all(name in own.all_subtasks for name in names):
        manager = own
    else:
        if not (unknown := _missing([name for name in names if own is None or name not in own.all_tasks])):
            manager = _manager(include_path)
            unknown = [name for name in names if name not in manager.all_tasks]
        if unknown:
            where = "" if include_path is None else f" or below {include_path}"
            raise ConfigError(f"no task {unknown[0]!r} is among lm_eval's{where}; `lm_eval ls tasks` lists its own")
    try:
        with _quietly():
            loaded = manager.load(list(names))
    except Exception as error:
        raise CalibrationError(
            f"{', '.join(names)}: lm_eval cannot load these tasks and their data ({one_line(error, 300)})"
        ) from error
    for name, task in loaded["tasks"].items():
        if task.OUTPUT_TYPE not in SCORED:
            raise ConfigError(
                f"task {name!r} needs {task.OUTPUT_TYPE}; a streamed model only scores given text. "
                "With the model in memory: lm_eval --model hf"
            )
    # Load only once, although the evaluator asks the manager again.
    manager.load = lambda task_list: loaded
    return Tasks(tuple(names), manager, limit, num_fewshot)


def _manager(include_path: Path | None, **options: Any) -> Any:
    """Create lm_eval's TaskManager; without `include_defaults`, it skips lm_eval's own thousands of task files."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path and str(include_path), **options)


def _missing(names: Sequence[str]) -> list[str]:
    """Return the names that no task file of lm_eval contains as a word. This takes a second; lm_eval's index takes ten."""
    spec = importlib.util.find_spec("lm_eval")
    left = list(names)
    for place in (spec and spec.submodule_search_locations) or []:
        for folder, _, files in os.walk(Path(place, "tasks")):
            for file in files if left else ():
                data = Path(folder, file).read_bytes()
                left = [n for n in left if not re.search(rf"(?<![\w-]){re.escape(n)}(?![\w-])".encode(), data)]
    return left


def evaluate_tasks(
    model: str | Path,
    tasks: Tasks | Sequence[str],
    *,
    bos: Bos = "auto",
    device: str = "auto",
    dtype: str = "auto",
    memory: int | None = None,
    cache: Path | None = None,
    activations: str | None = None,
    memory_host: int | None = None,
    progress: Progress | None = None,
) -> TaskScores:
    """Score a checkpoint directory, dense or pruned, on tasks of lm-evaluation-harness, streamed block by block.

    Prompts, tokens, truncation and metrics are those of lm_eval's `hf` backend. One sweep over the blocks serves all
    requests of one type, from all tasks.

    Args:
        tasks: names, or the result of `find_tasks`.
        bos: whether a text begins with BOS; ``auto`` does as the tokenizer does. ``on`` and ``off`` are lm_eval's option
            ``add_bos_token``. lm_eval has BOS before an empty context in any case.
        memory: bytes that the device may use; None allows all free memory.
        cache: folder for activations during the run; None takes the system's temporary folder.
        activations, memory_host: as in `evaluate`.

    Raises:
        CheckpointError, CalibrationError, ConfigError: the model, a task or the device is unusable.
        ResourceError: there is too little memory or disk.
        NumericalError: the computation produces NaN or Inf.
        Stopped: `progress` asked to stop. Nothing is kept of an unfinished evaluation.
    """
    found = tasks if isinstance(tasks, Tasks) else find_tasks(tasks)
    from ...model.skeleton import open_skeleton
    from ...system import machine

    skeleton = open_skeleton(resolve_model(model, progress), machine.resolve_device(device), dtype)
    tokenizer = load_tokenizer(skeleton.checkpoint.directory, skeleton.vocabulary)
    first = bos_token(tokenizer, bos, skeleton.checkpoint.directory)
    from lm_eval import simple_evaluate
    from lm_eval.utils import make_table

    from .streamed import StreamedModel

    streamed = StreamedModel(
        skeleton,
        tokenizer,
        memory=memory,
        cache=cache,
        activations=activations,
        memory_host=memory_host,
        progress=progress or Silent(),
        bos=bos,
    )
    with _quietly():
        outcome = simple_evaluate(
            model=streamed,
            tasks=list(found.names),
            task_manager=found.manager,
            limit=found.limit,
            num_fewshot=found.num_fewshot,
            log_samples=False,
        )
    table = make_table(outcome)
    if outcome.get("groups"):
        table += "\n" + make_table(outcome, "groups")
    return TaskScores(
        results=outcome["results"],
        documents={name: counts["effective"] for name, counts in outcome["n-samples"].items()},
        table=table,
        bos=first is not None,
        protocol=(
            f"lm_eval {importlib.metadata.version('lm_eval')}"
            + ("" if found.limit is None else f", the first {found.limit} documents of each task")
            + f"; texts {'without' if first is None else 'that begin with'} BOS"
            + f"; sequences of at most {streamed.max_length} tokens"
            + f"; computed in {machine.dtype_name(skeleton.dtype)}"
        ),
    )


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence lm_eval's progress bars and log, and skip its slow queries about the machine and the git repository."""
    from lm_eval import evaluator
    from lm_eval.api import model, task

    logger = logging.getLogger("lm_eval")
    level = logger.level
    muted: list[tuple[Any, str, Any]] = [
        (task, "tqdm", lambda items, *_, **__: items),
        (model, "tqdm", lambda items, *_, **__: items),
        (evaluator, "get_git_commit_hash", lambda: None),
        (evaluator, "add_env_info", lambda results: None),
    ]
    usual = [(module, name, getattr(module, name)) for module, name, _ in muted if hasattr(module, name)]
    logger.setLevel(logging.ERROR)
    for module, name, silent in muted:
        setattr(module, name, silent)
    try:
        yield
    finally:
        logger.setLevel(level)
        for module, name, value in usual:
            setattr(module, name, value)
