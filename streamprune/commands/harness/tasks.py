"""Evaluate a streamed model on lm-evaluation-harness tasks, with prompts, tokens and metrics of its `hf` backend."""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import importlib.util
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ...errors import CalibrationError, ConfigError, check_least, one_line
from ...model.hub import resolve_model
from ...model.tokenizer import Bos, bos_token, load_tokenizer
from ...system.progress import Progress, Silent
from ...system.strict_json import read_json

GENERATED = "generate_until"
"""Output type of tasks that need generated text. The others score given text."""
ALTERING = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1.0, "num_beams": 1}
"""Settings of generation_config.json that change what transformers' `generate` writes greedily, and the values that do not."""


@dataclass(frozen=True)
class TaskScores:
    """Result of `evaluate_tasks`."""

    results: dict[str, dict[str, Any]]
    """lm_eval's entries by task or group, such as ``"acc,none"`` and ``"acc_stderr,none"``."""
    documents: dict[str, int]
    """Number of documents scored, by task."""
    samples: dict[str, dict[str, list[float]]]
    """The score of each document, by task and metric, for metrics that are the mean over documents."""
    fingerprints: dict[str, str]
    """Digest of each task's documents in their order."""
    fewshot: dict[str, int]
    """Number of examples before each document, by task."""
    model: dict[str, Any]
    """Fingerprint of the checkpoint, see `Checkpoint.identity`."""
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
    apply_chat_template: bool
    """Whether prompts are conversations, written as the model's chat template does."""
    system_instruction: str | None
    """Text before each prompt, or the system's turn of a conversation."""
    confirm_run_unsafe_code: bool
    """Whether code that a model writes may be run."""
    most: dict[str, int]
    """Most tokens of an answer, by task that needs generated text."""


def find_tasks(
    names: Sequence[str],
    *,
    include_path: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    system_instruction: str | None = None,
    confirm_run_unsafe_code: bool = False,
) -> Tasks:
    """Look tasks up and load their data.

    Args:
        names: tasks, groups and tags of lm_eval and of the task files below `include_path`.
        limit: documents per task; None takes all.
        num_fewshot: examples before each document; None takes the task's default.
        apply_chat_template: write prompts as conversations in the model's chat template.
        system_instruction: text before each prompt, or the system's turn of a conversation.
        confirm_run_unsafe_code: allow tasks that run code which the model has written, such as humaneval.

    Raises:
        ConfigError: lm_eval is not installed, a name is unknown, a task samples its text or runs code without confirmation,
            or `limit` or `num_fewshot` is out of range.
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
    most = {}
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) and not confirm_run_unsafe_code:
            raise ConfigError(
                f"task {name!r} runs code that the model writes, on this machine and without a sandbox; "
                "--confirm-run-unsafe-code allows it"
            )
        if task.OUTPUT_TYPE == GENERATED:
            from .streamed import check_generation

            most[name] = check_generation(name, task.config.generation_kwargs)
    # Load only once, although the evaluator asks the manager again.
    manager.load = lambda task_list: loaded
    return Tasks(
        names=tuple(names),
        manager=manager,
        limit=limit,
        num_fewshot=num_fewshot,
        apply_chat_template=apply_chat_template,
        system_instruction=system_instruction,
        confirm_run_unsafe_code=confirm_run_unsafe_code,
        most=most,
    )


def _manager(include_path: Path | None, **options: Any) -> Any:
    """Create lm_eval's TaskManager; without `include_defaults`, it skips lm_eval's own thousands of task files."""
    from lm_eval.tasks import TaskManager

    if include_path is None:
        return copy.copy(_standard())
    return TaskManager(include_path=str(include_path), **options)


@cache
def _standard() -> Any:
    """lm_eval's TaskManager of its own tasks, whose index takes ten seconds; for copies, whose `load` is replaced."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


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
    resume: Path | None = None,
    activations: str | None = None,
    memory_host: int | None = None,
    progress: Progress | None = None,
) -> TaskScores:
    """Score a checkpoint directory, dense or pruned, on tasks of lm-evaluation-harness, streamed block by block.

    Prompts, tokens, truncation and metrics are those of lm_eval's `hf` backend. One sweep over the blocks serves all
    log-likelihoods of one type, from all tasks. Text is generated greedily: in memory if the model fits, otherwise with one
    sweep per token for as many prompts as the disk has room for.

    Args:
        tasks: names, or the result of `find_tasks`.
        bos: whether a text begins with BOS; ``auto`` does as the tokenizer does. ``on`` and ``off`` are lm_eval's option
            ``add_bos_token``. lm_eval has BOS before an empty context in any case.
        memory: bytes that the device may use; None allows all free memory.
        cache: folder for activations during the run; None takes the system's temporary folder.
        resume: folder in which generated answers are kept, so that a later call with the same arguments resumes there.
        activations, memory_host: as in `evaluate`.

    Raises:
        CheckpointError, CalibrationError, ConfigError: the model, a task or the device is unusable.
        ResourceError: there is too little memory or disk.
        NumericalError: the computation produces NaN or Inf.
        Stopped: `progress` asked to stop. Without `resume`, nothing is kept of an unfinished evaluation.
    """
    found = tasks if isinstance(tasks, Tasks) else find_tasks(tasks)
    if resume is not None and not found.most:
        raise ConfigError(f"resume is {resume}; only generated answers are kept, and no task needs any")
    from ...model.skeleton import open_skeleton
    from ...system import machine

    skeleton = open_skeleton(resolve_model(model, progress), machine.resolve_device(device), dtype)
    tokenizer = load_tokenizer(skeleton.checkpoint.directory, skeleton.vocabulary)
    first = bos_token(tokenizer, bos, skeleton.checkpoint.directory)
    from lm_eval import simple_evaluate
    from lm_eval.utils import make_table

    from .answers import check_answers
    from .streamed import StreamedModel

    if found.apply_chat_template and getattr(tokenizer, "chat_template", None) is None:
        raise ConfigError(f"{skeleton.checkpoint.directory} has no chat template, which apply-chat-template needs")
    streamed = StreamedModel(
        skeleton,
        tokenizer,
        memory=memory,
        cache=cache,
        resume=resume,
        activations=activations,
        memory_host=memory_host,
        progress=progress or Silent(),
        bos=bos,
    )
    if found.most:
        check_answers(skeleton)
        streamed.check_room(max(found.most.values()))
    with _quietly():
        outcome = simple_evaluate(
            model=streamed,
            tasks=list(found.names),
            task_manager=found.manager,
            limit=found.limit,
            num_fewshot=found.num_fewshot,
            apply_chat_template=found.apply_chat_template,
            system_instruction=found.system_instruction,
            confirm_run_unsafe_code=found.confirm_run_unsafe_code,
        )
    table = make_table(outcome)
    if outcome.get("groups"):
        table += "\n" + make_table(outcome, "groups")
    return TaskScores(
        results=outcome["results"],
        documents={name: counts["effective"] for name, counts in outcome["n-samples"].items()},
        samples={name: _samples(each, outcome["results"][name]) for name, each in outcome["samples"].items()},
        fingerprints={name: _fingerprint(each) for name, each in outcome["samples"].items()},
        fewshot={name: outcome["n-shot"][name] for name in outcome["samples"]},
        model=skeleton.checkpoint.identity(),
        table=table,
        bos=first is not None,
        protocol=(
            f"lm_eval {importlib.metadata.version('lm_eval')}"
            + ("" if found.limit is None else f", the first {found.limit} documents of each task")
            + f"; texts {'without' if first is None else 'that begin with'} BOS"
            + ("; prompts in the chat template" if found.apply_chat_template else "")
            + ("" if found.system_instruction is None else f" after {found.system_instruction!r}")
            + (_decoding(skeleton.checkpoint.directory) if found.most else "")
            + f"; sequences of at most {streamed.max_length} tokens"
            + f"; computed in {machine.dtype_name(skeleton.dtype)}"
        ),
    )


def _samples(samples: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return the score of each document in order, by metric as in `result`, for metrics that are their mean."""
    found: dict[str, list[float]] = {}
    for sample in sorted(samples, key=lambda sample: int(sample["doc_id"])):
        for metric in sample["metrics"]:
            if isinstance(value := sample.get(metric), (bool, int, float)):
                found.setdefault(f"{metric},{sample['filter']}", []).append(float(value))
    return {
        name: values
        for name, values in found.items()
        if isinstance(mean := result.get(name), (int, float)) and math.isclose(sum(values) / len(values), mean)
    }


def _fingerprint(samples: Sequence[Mapping[str, Any]]) -> str:
    """Return the SHA-256 of the digests of all documents, in their order."""
    hashes = {int(sample["doc_id"]): sample["doc_hash"] for sample in samples}
    return hashlib.sha256("".join(hashes[number] for number in sorted(hashes)).encode()).hexdigest()


def _decoding(directory: Path) -> str:
    """Describe, for the protocol, how text is generated: without what the model's own settings would change."""
    path = directory / "generation_config.json"
    own = read_json(path) if path.is_file() else {}
    left = [f"{name} {own[name]}" for name, usual in ALTERING.items() if own.get(name) not in (None, usual)]
    return "; greedy decoding" + (f", without the {', '.join(left)} of generation_config.json" if left else "")


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
    muted = [(module, name, silent) for module, name, silent in muted if hasattr(module, name)]
    usual = [(module, name, getattr(module, name)) for module, name, _ in muted]
    logger.setLevel(logging.ERROR)
    for module, name, silent in muted:
        setattr(module, name, silent)
    try:
        yield
    finally:
        logger.setLevel(level)
        for module, name, value in usual:
            setattr(module, name, value)
