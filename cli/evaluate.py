"""`streamprune eval`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

import streamprune
from streamprune.errors import ConfigError

from . import options, show


@click.command("eval")
@click.argument("model", type=options.PATH)
@options.text_option
@options.seq_len_option()
@options.bos_option
@options.cut_options
@click.option("--tasks", metavar="A,B,...", help="Tasks, groups or tags of lm-evaluation-harness.")
@click.option("--include-path", type=options.PATH, metavar="DIR", help="Folder with more task files.")
@click.option("--limit", type=int, metavar="N", help="Score the first N documents of each task.  [default: all]")
@click.option("--num-fewshot", type=int, metavar="N", help="Examples before each document.  [default: the task's own]")
@click.option(
    "--apply-chat-template", is_flag=True, help="Write prompts as conversations in the model's chat template."
)
@click.option(
    "--system-instruction", metavar="TEXT", help="Text before each prompt, or the system's turn of conversations."
)
@click.option(
    "--confirm-run-unsafe-code",
    is_flag=True,
    help="Allow tasks that run code which the model writes, such as humaneval.",
)
@click.option(
    "--resume", type=options.PATH, metavar="DIR", help="Keep generated answers in DIR; the same command resumes there."
)
@options.machine_options
@options.output_options
def evaluate(
    model: Path, text: str | None, seq_len: int | None, tasks: str | None, as_json: bool, quiet: bool, **chosen: Any
) -> None:
    """Measure perplexity and task scores, streamed block by block.

    MODEL is a checkpoint directory, a GGUF file or a hub name, dense or pruned. Tasks, their prompts and metrics are those of
    lm-evaluation-harness (`pip install 'streamprune[harness]'`), which also loads their data.

    Examples:

      streamprune eval llama-2-5b --text wiki-test.txt --seq-len 2048

      streamprune eval llama-2-49b --tasks arc_easy,piqa --memory 24GiB

      streamprune eval OUT --tasks gsm8k,ifeval --apply-chat-template --json > after.json
    """
    names = (
        "include_path",
        "limit",
        "num_fewshot",
        "apply_chat_template",
        "system_instruction",
        "confirm_run_unsafe_code",
    )
    # `in (None, False)` would drop 0, which equals False.
    of_tasks = {name: value for name in names if (value := chosen.pop(name)) is not None and value is not False}
    if text is None and tasks is None:
        raise ConfigError("nothing to measure: give --text TEXT, --tasks A,B or both")
    of_text = {name: chosen.pop(name) for name in ("windows", "loss_on")}
    if seq_len is not None and text is None:
        raise ConfigError(f"--seq-len {seq_len} needs --text")
    for name, value in of_text.items():
        if value not in ("anywhere", "all") and text is None:
            raise ConfigError(f"--{name.replace('_', '-')} {value} needs --text")
    for name, value in of_tasks.items():
        if tasks is None:
            raise ConfigError(f"--{name.replace('_', '-')}{'' if value is True else f' {value}'} needs --tasks")
    resume = chosen.pop("resume")
    if resume is not None and tasks is None:
        raise ConfigError(f"--resume {resume} needs --tasks")
    # First, since an unknown name is found in a second, before torch is imported.
    named = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    wanted = None if tasks is None else streamprune.find_tasks(named, **of_tasks)
    found: dict[str, Any] = {}
    lines: list[str] = []
    options.begin(model, texts=[text])
    with show.progress(quiet) as progress:
        if text is not None:
            measured = streamprune.evaluate(model, text, seq_len=seq_len, progress=progress, **of_text, **chosen)
            found |= asdict(measured)
            lines += [f"perplexity {measured.perplexity:.4f}", f"({measured.protocol})"]
        if wanted is not None:
            scored = streamprune.evaluate_tasks(model, wanted, progress=progress, resume=resume, **chosen)
            found["tasks"] = {name: value for name, value in asdict(scored).items() if name != "table"}
            lines += [*scored.table.rstrip().splitlines(), f"({scored.protocol})"]
    show.result(found, as_json, lines)
