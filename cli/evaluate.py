"""`streamprune eval`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from . import options, show


@click.command("eval")
@click.argument("model", type=options.DIRECTORY)
@click.option("--text", metavar=options.TEXT, help="Text to measure perplexity on, whole and in order.")
@click.option("--seq-len", type=int, help="Tokens per window.  [default: 2048, or the model's context if shorter]")
@click.option("--tasks", metavar="A,B,...", help="Tasks, groups or tags of lm-evaluation-harness.")
@click.option("--include-path", type=options.DIRECTORY, metavar="DIR", help="Folder with more task files.")
@click.option("--limit", type=int, metavar="N", help="Score the first N documents of each task.  [default: all]")
@click.option("--num-fewshot", type=int, metavar="N", help="Examples before each document.  [default: the task's own]")
@options.machine_options
@options.output_options
def evaluate(
    model: Path,
    text: str | None,
    seq_len: int | None,
    tasks: str | None,
    include_path: Path | None,
    limit: int | None,
    num_fewshot: int | None,
    as_json: bool,
    quiet: bool,
    **chosen: Any,
) -> None:
    """Measure perplexity and task scores, streamed block by block.

    MODEL is a checkpoint directory or a hub name, dense or pruned. Tasks, their prompts and metrics are those of
    lm-evaluation-harness (`pip install 'streamprune[harness]'`), which also loads their data.

    Examples:

      streamprune eval llama-2-5b --text wiki-test.txt --seq-len 2048

      streamprune eval llama-2-49b --tasks arc_easy,piqa --memory 24GiB
    """
    import streamprune
    from streamprune.errors import ConfigError

    if text is None and tasks is None:
        raise ConfigError("nothing to measure: give --text TEXT, --tasks A,B or both")
    for option, value, other, needed in (
        ("--seq-len", seq_len, "--text", text),
        ("--include-path", include_path, "--tasks", tasks),
        ("--limit", limit, "--tasks", tasks),
        ("--num-fewshot", num_fewshot, "--tasks", tasks),
    ):
        if value is not None and needed is None:
            raise ConfigError(f"{option} {value} needs {other}")
    machine = options.machine(**chosen)
    found: dict[str, Any] = {}
    lines: list[str] = []
    # First, since an unknown name is found in a second, before torch is imported.
    wanted = tasks and streamprune.find_tasks(
        [name.strip() for name in tasks.split(",") if name.strip()],
        include_path=include_path,
        limit=limit,
        num_fewshot=num_fewshot,
    )
    options.begin(model, texts=[text])
    with show.progress(quiet) as progress:
        if text is not None:
            measured = streamprune.evaluate(model, text, seq_len=seq_len, progress=progress, **machine)
            found |= asdict(measured)
            lines += [f"perplexity {measured.perplexity:.4f}", f"({measured.protocol})"]
        if wanted:
            scored = streamprune.evaluate_tasks(model, wanted, progress=progress, **machine)
            found["tasks"] = {"results": scored.results, "documents": scored.documents, "protocol": scored.protocol}
            lines += [*scored.table.rstrip().splitlines(), f"({scored.protocol})"]
    show.result(found, as_json, lines)
