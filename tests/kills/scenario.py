"""What is run and killed: commands on tiny models, with what of their results must be the same to the byte."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from conftest import ALPHABET, contents, make_tiny

from .life import Forked, Life, Torchrun

SMALL = ["--samples", "16", "--seq-len", "32", "--round-to", "4", "--ratio", "0.3"]
ROW = ("label", "ratio", "ratio_blocks", "parameters", "perplexity", "log_gap")
"""What a row of a comparison owes to nothing but its settings."""


@dataclass(frozen=True)
class Inputs:
    """What the commands read."""

    model: Path
    text: Path

    @classmethod
    def make(cls, folder: Path) -> Inputs:
        """A random model of six blocks, and random letters."""
        folder.mkdir(parents=True, exist_ok=True)
        text = folder / "text.txt"
        text.write_text("".join(random.Random(0).choices(ALPHABET, k=3000)))
        return cls(make_tiny(folder / "model", "llama", num_hidden_layers=6), text)


Make = Callable[[Inputs], list[str]]


@dataclass(frozen=True)
class Scenario:
    """A command, given without OUT's place, which is ``out`` in its working directory."""

    name: str
    arguments: Make
    result: Callable[[Path], dict[str, bytes]] = contents
    life: Callable[[list[str], Path], Life] = field(default=Forked)
    before: Make | None = None
    """Another command on the same OUT, killed or not, that this one's ``--restart`` throws away."""


def run(*options: str, calibrated: bool = True) -> Make:
    """``streamprune run`` with the options that are common to all."""
    return lambda inputs: [
        "run",
        str(inputs.model),
        "out",
        *SMALL,
        *(["--calibration", str(inputs.text)] if calibrated else []),
        *options,
    ]


def tune(*options: str) -> Make:
    """``streamprune tune``, with the model itself as a teacher where one is wanted."""

    def make(inputs: Inputs) -> list[str]:
        teacher = ["--teacher", str(inputs.model)] if "distil" in options else []
        common = ["--text", str(inputs.text), "--samples", "8", "--seq-len", "32", "--rank", "2", "--rate", "1e-3"]
        return ["tune", str(inputs.model), "out", *common, *teacher, *options]

    return make


def compare(*options: str) -> Make:
    """``streamprune compare`` of two recipes at two ratios."""
    return lambda inputs: [
        "compare",
        str(inputs.model),
        *("--out", "out", "--text", str(inputs.text), "--calibration", str(inputs.text), "--eval-seq-len", "48"),
        *("--ratios", "0.2,0.4", "--recipes", "sobp,default", *SMALL[:6], *options),
    ]


def table(out: Path) -> dict[str, bytes]:
    """Of a comparison: its rows' checkpoints, where they were kept, and figures."""
    found = {f"{row.name}/{name}": data for row in out.glob("rows/*") for name, data in contents(row).items()}
    rows = json.loads((out / "compare.json").read_text())["rows"]
    return {**found, "rows": json.dumps([[row[name] for name in ROW] for row in rows]).encode()}


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("sobp", run("--recipe", "sobp")),
        Scenario("default", run("--refine", "8")),
        Scenario("uniform", run("--layout", "uniform", "--cache", "cache")),
        Scenario("surgeon", run("--recipe", "surgeon", "--samples", "6", "--set", "shots=3", "--set", "lora_steps=4")),
        Scenario(
            "slimgpt",
            run(
                *("--recipe", "slimgpt", "--calibration", "self", "--layout", "uniform"),
                *("--samples", "4", "--seq-len", "12"),
                calibrated=False,
            ),
        ),
        Scenario("lora", tune("--method", "lora", "--steps", "100")),
        Scenario("distil", tune("--method", "distil", "--steps", "12", "--cache", "cache")),
        Scenario("compare", compare("--keep"), result=table),
        Scenario("compare-cache", compare("--cache", "cache"), result=table),
        Scenario("torchrun", run("--cache", "cache"), life=Torchrun),
        Scenario(
            "restart",
            run("--recipe", "sobp", "--cache", "cache"),
            before=run("--recipe", "surgeon", "--set", "shots=2", "--set", "lora_steps=2", "--cache", "other"),
        ),
        Scenario("restart-compare", compare("--cache", "cache"), result=table, before=compare("--cache", "other")),
    )
}
