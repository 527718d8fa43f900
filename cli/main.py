"""The click group, and the one place where errors become messages and exit codes."""

from __future__ import annotations

import os
from typing import Any

import click

from streamprune.errors import StreamPruneError

from . import bench, compare, evaluate, export, inspect, plan, report, run, show, status, streams, tune, verify

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True}
RESUMED = ("run", "tune", "compare")
"""Commands that resume; the others start again."""


class Group(click.Group):
    """Turns the project's errors into one line on stderr; the exit codes are in docs/batch.md."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            show.tell(f"{where}{error.strerror or error}{_advice(ctx)}")
            streams.give_up_stdout()
            ctx.exit(1)
        except KeyboardInterrupt:
            show.tell(f"interrupted{_advice(ctx)}")
            ctx.exit(130)
        except StreamPruneError as error:
            if not error.reported:
                show.tell(str(error))
            ctx.exit(error.exit_code)


def _advice(ctx: click.Context) -> str:
    return "; run the same command again to resume" if ctx.invoked_subcommand in RESUMED else ""


@click.group(cls=Group, context_settings=SETTINGS)
@click.version_option(package_name="streamprune")
def main() -> None:
    """Make a large language model structurally smaller, streaming it one block at a time.

    No training run. Peak memory depends on the block size, not the model size. Interrupted jobs resume.

    Example:

      streamprune run llama-70b llama-49b --ratio 0.3 --calibration text.txt
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Set before torch is loaded: threads that spin while they wait for one another starve on a machine that others use too.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Set before the first GPU allocation: otherwise blocks of differing sizes fragment its memory.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    streams.hide_warnings()
    streams.repair()


for command in (
    run.run,
    plan.plan,
    compare.compare,
    tune.tune,
    evaluate.evaluate,
    export.export,
    bench.bench,
    status.status,
    verify.verify,
    report.report,
    inspect.inspect,
):
    main.add_command(command)
