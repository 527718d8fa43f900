"""The commands as a user types them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from conftest import ROOT
from streamprune_cli import main
from streamprune_cli.options import SIZE

import streamprune
from streamprune.model.checkpoint import Checkpoint
from streamprune.recipes.settings import SETTINGS

COMMANDS = sorted(main.commands)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


@pytest.fixture
def arguments(tiny: Callable[..., Path], text: Path, tmp_path: Path) -> list[str]:
    options = ["--ratio", "0.3", "--calibration", str(text), "--samples", "6", "--seq-len", "24", "--round-to", "4"]
    return [str(tiny("llama")), str(tmp_path / "out"), *options]


RESULT = (
    "out recipe ratio_requested ratio_blocks ratio_model ratio_missed aim parameters_before parameters_after zeros operations "
    "forward_equivalents operations_by_kind sweeps_per_shot tokens seconds peak_device_bytes peak_host_bytes bytes_read "
    "waited resumed"
)


def test_run_prints_one_object_and_nothing_else_on_stdout(
    arguments: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    forecast = json.loads(invoke("plan", arguments[0], *arguments[2:], "--json").stdout)
    main(["run", *arguments, "--json"], standalone_mode=False)
    stdout, stderr = capfd.readouterr()
    result = json.loads(stdout)
    assert list(result) == RESULT.split()
    assert result["out"] == str(tmp_path / "out")
    assert result["resumed"] is False
    assert result["ratio_missed"] is None
    assert "instead of" not in stderr
    # Progress: plain lines where stderr is no terminal.
    assert "survey: 6 of 6" in stderr
    assert "prune: 3 of 3" in stderr
    assert "\r" not in stderr
    # Check, forward, backward and prune sweeps; embeddings (the tied head) for check, embedding, head, the last block's refinement and
    # output, the final norm for check, head, refinement and output.
    sizes = {name: entry.nbytes for name, entry in Checkpoint(Path(arguments[0])).items()}
    blocks = sum(size for name, size in sizes.items() if ".layers." in name)
    norm = 32 * 4
    assert result["bytes_read"] == 4 * blocks + 5 * (sum(sizes.values()) - blocks - norm) + 4 * norm
    assert forecast["bytes_to_read"] == pytest.approx(result["bytes_read"], rel=0.05)
    again = invoke("run", *arguments, "--json")
    assert json.loads(again.stdout)["resumed"] is True


def test_plan_only(arguments: list[str], tmp_path: Path) -> None:
    path = Path(json.loads(invoke("run", *arguments, "--plan-only", "--json").stdout)["plan"])
    assert json.loads(path.read_text())["sites"]["blocks.0.ffn"]["keep"] <= 48
    job = json.loads(invoke("inspect", str(tmp_path / "out"), "--json").stdout)["job"]
    assert job["state"] == "interrupted"
    assert job["finished"][-1] == "shot-1/allocate"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", ["default", "magnitude", "surgeon"])
def test_plan_and_status_count_the_same_steps(recipe: str, arguments: list[str], tmp_path: Path) -> None:
    settings = ["--set", "shots=1"] if recipe == "surgeon" else []
    same = [*arguments[2:], "--recipe", recipe, *settings, "--json"]
    invoke("run", *arguments[:2], *same, "--plan-only")
    planned = invoke("plan", arguments[0], *same)
    status = invoke("status", str(tmp_path / "out"), "--json")
    assert json.loads(planned.stdout)["steps"] == json.loads(status.stdout)["total"]


def test_plan_forecasts(arguments: list[str]) -> None:
    result = invoke("plan", arguments[0], *arguments[2:], "--json")
    assert result.exit_code == 0
    forecast = json.loads(result.stdout)
    keys = {"device_bytes", "host_bytes", "disk_bytes", "bytes_to_read", "operations", "steps", "fits", "problems"}
    assert keys <= forecast.keys()
    assert forecast["fits"] is True
    tight = invoke("plan", arguments[0], *arguments[2:], "--memory", "20KB")
    assert tight.exit_code == 1
    assert "does not fit: the memory limit is 19.5 KiB" in tight.stdout
    fits = invoke("plan", arguments[0], *arguments[2:], "--quiet")
    assert (fits.exit_code, fits.output) == (0, "")
    tight = invoke("plan", arguments[0], *arguments[2:], "--memory", "20KB", "--quiet")
    assert [line.startswith("does not fit: ") for line in tight.stdout.splitlines()] == [True]


@pytest.fixture
def scarce(tiny: Callable[..., Path], text: Path, tmp_path: Path) -> list[str]:
    """A mixture of experts with so few tokens that no expert sees as many as it has channels."""
    options = ["--ratio", "0.3", "--calibration", str(text), "--samples", "2", "--seq-len", "8", "--round-to", "4"]
    return [str(tiny("mixtral")), str(tmp_path / "out"), *options, "--recipe", "wanda-sp"]


CAPPED = (
    r"removed 8\.21% of the blocks' parameters instead of 30\.00%: 12 of 12 experts keep all their channels, because fewer "
    r"calibration tokens reached them than they have channels \(blocks\.\d\.ffn\.\d: \d tokens, 24 channels\); "
    "raise --samples or --seq-len"
)


def test_a_missed_ratio_is_reported(scarce: list[str], tmp_path: Path) -> None:
    done = invoke("run", *scarce, "--json")
    assert done.exit_code == 0
    result = json.loads(done.stdout)
    assert (result["ratio_requested"], round(result["ratio_blocks"], 4)) == (0.3, 0.0821)
    assert re.fullmatch(CAPPED, result["ratio_missed"])
    assert done.stderr.splitlines()[-1] == f"streamprune: {tmp_path / 'out'}: {result['ratio_missed']}"
    assert json.loads((tmp_path / "out" / "report.json").read_text())["ratio_missed"] == result["ratio_missed"]
    assert result["ratio_missed"] in invoke("inspect", str(tmp_path / "out")).stdout
    # The finished result says so again, but not where only errors are wanted.
    assert result["ratio_missed"] in invoke("run", *scarce).stderr
    quiet = invoke("run", *scarce, "--quiet")
    assert (quiet.exit_code, quiet.stderr) == (0, "")


def test_strict_keeps_the_result_and_fails(scarce: list[str], tmp_path: Path) -> None:
    for more in ([], ["--quiet"]):  # the second finds the result of the first
        done = invoke("run", *scarce, "--strict", *more, "--json")
        assert done.exit_code == 1
        assert json.loads(done.stdout)["out"] == str(tmp_path / "out")
        assert re.search(CAPPED + "; the result is written, and --strict makes this a failure$", done.stderr.strip())
    assert streamprune.verify(tmp_path / "out").sound
    # With enough tokens nothing is missed.
    enough = invoke("run", *scarce, "--samples", "64", "--strict", "--restart")
    assert enough.exit_code == 0
    refused = invoke("run", *scarce, "--strict", "--plan-only")
    assert refused.exit_code == 2
    assert "--strict judges a result, and --plan-only makes none" in refused.stderr


def test_plan_knows_a_ratio_that_cannot_be_met(scarce: list[str]) -> None:
    same = [scarce[0], *scarce[2:]]
    known = (
        "can remove at most 8.21% of the blocks' parameters instead of 30.00%: of 16 calibration tokens at most 0 of a "
        "block's 4 experts can see as many as they have channels (24), and the other experts keep all their channels; "
        "raise --samples or --seq-len"
    )
    found = invoke("plan", *same)
    assert found.exit_code == 0
    assert f"misses its ratio: {known}" in found.stdout.splitlines()
    assert json.loads(invoke("plan", *same, "--json").stdout)["ratio_missed"] == known
    assert invoke("plan", *same, "--quiet").stdout == ""
    enough = invoke("plan", *same, "--samples", "64", "--json")
    assert json.loads(enough.stdout)["ratio_missed"] is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--recipe", "magnitude", "--seed", "0"], "--calibration, --samples, --seq-len, --seed"),
        (["--recipe", "random", "--seed", "1"], "--calibration, --samples, --seq-len"),
        (["--recipe", "magnitude", "--structure", "2:4"], "--calibration, --samples, --seq-len"),
        (["--recipe", "magnitude", "--refine", "1"], None),
        (["--recipe", "wanda-sp"], None),
    ],
)
def test_options_without_effect_are_named(
    given: list[str], said: str | None, arguments: list[str], tmp_path: Path
) -> None:
    recipe = given[1]
    note = [] if said is None else [f"streamprune: {recipe} reads no text here, so {said} changed nothing"]
    note += ["streamprune: shapes stay, so --round-to changed nothing"] * ("--structure" in given)

    def notes(*words: str) -> list[str]:
        done = invoke(*words, *given)
        assert done.exit_code == 0, done.output
        return [line for line in done.stderr.splitlines() if line.endswith("changed nothing")]

    assert notes("run", *arguments) == note
    assert notes("run", *arguments, "--quiet") == []
    assert notes("plan", arguments[0], *arguments[2:]) == note


def test_round_to_with_a_plan_is_named(arguments: list[str], tmp_path: Path) -> None:
    same = [*arguments, "--recipe", "magnitude"]
    plan = json.loads(invoke("run", *same, "--plan-only", "--json").stdout)["plan"]
    done = invoke("run", *same, "--plan", plan)
    assert done.exit_code == 0, done.output
    assert "streamprune: the plan decides the widths, so --round-to changed nothing" in done.stderr.splitlines()


def test_effort_beside_a_number_of_steps_is_named(arguments: list[str]) -> None:
    done = invoke("run", *arguments[:4], "--recipe", "magnitude", "--refine", "0", "--effort", "normal")
    assert done.exit_code == 0, done.output
    assert "streamprune: --refine gives the steps, so --effort changed nothing" in done.stderr.splitlines()


def test_defaults_without_effect_are_not_named(arguments: list[str]) -> None:
    done = invoke("run", *arguments[:4], "--recipe", "magnitude")
    assert done.exit_code == 0
    assert "changed nothing" not in done.stderr


@pytest.mark.parametrize(
    ("recipes", "said"),
    [
        ("magnitude,wanda-sp", None),
        (
            "magnitude,random",
            "magnitude reads no text here, random reads no text here, so --calibration, --samples, --seq-len changed nothing",
        ),
    ],
)
def test_compare_names_options_without_effect_on_any_recipe(
    recipes: str, said: str | None, arguments: list[str], text: Path, tmp_path: Path
) -> None:
    same = [arguments[0], *arguments[4:], "--ratios", "0.3", "--recipes", recipes, "--text", str(text)]
    done = invoke("compare", *same, "--out", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    found = [line for line in done.stderr.splitlines() if line.endswith("changed nothing")]
    assert found == ([] if said is None else [f"streamprune: {said}"])


def test_eval_and_inspect(arguments: list[str], text: Path, tmp_path: Path) -> None:
    assert "removed by default" in invoke("run", *arguments).stdout
    out = str(tmp_path / "out")
    measured = json.loads(invoke("eval", out, "--text", str(text), "--seq-len", "24", "--json").stdout)
    assert list(measured) == ["perplexity", "tokens", "seq_len", "bos", "loss_on", "windows", "protocol"]
    assert measured["tokens"] == 3000 // 24 * 23
    shown = invoke("eval", arguments[0], "--text", str(text)).stdout
    assert re.match(r"perplexity \d+\.\d+\n\(whole text tokenised", shown)
    looked = invoke("inspect", out)
    assert looked.exit_code == 0
    for part in ("streamprune_llama", "job: finished", "blocks.2.ffn"):
        assert part in looked.stdout
    found = json.loads(invoke("inspect", arguments[0], "--json").stdout)
    assert found["job"] is None
    assert [len(block["sites"]) for block in found["model"]["blocks"]] == [2, 2, 2]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example_and_is_in_the_readme(name: str) -> None:
    shown = invoke(name, "--help")
    assert shown.exit_code == 0
    assert re.search(rf"Examples?:\s+streamprune {name} ", shown.stdout)
    assert f"streamprune {name}" in (ROOT / "README.md").read_text()


def test_no_summary_is_cut_off_at_80_columns() -> None:
    shown = CliRunner().invoke(main, ["--help"], terminal_width=80).stdout
    listed = shown.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in listed] == COMMANDS
    for line in listed:
        assert not line.endswith("..."), line
        name, summary = line.strip().split(maxsplit=1)
        assert summary == str(main.commands[name].help).partition("\n")[0]


def test_every_option_has_help() -> None:
    for command in main.commands.values():
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert parameter.help, f"{command.name} {parameter.name}"


REQUIRED = {"ratios": "0.3", "recipes": "random", "text": "text.txt", "ratio": "0.3"}
SIZES = [
    (name, parameter.opts[0])
    for name, command in sorted(main.commands.items())
    for parameter in command.params
    if parameter.type is SIZE
]


def test_a_size_without_its_unit_is_refused() -> None:
    assert {option for _, option in SIZES} == {"--memory", "--memory-host", "--disk", "--fit"}
    for name, option in SIZES:
        words = [name, option, "12"]
        for parameter in main.commands[name].params:
            if parameter.param_type_name == "argument":
                words.append("nothing")
            elif parameter.name in REQUIRED:
                words += [parameter.opts[0], REQUIRED[parameter.name]]
        refused = invoke(*words)
        assert refused.exit_code == 2
        assert f"{option}: the size '12' has no unit and would be bytes; write it like 12GiB" in refused.stderr


def test_unknown_options_are_usage_errors() -> None:
    assert invoke("run").exit_code == 2
    assert invoke("run", "a", "b", "--ratio", "much").exit_code == 2
    assert invoke("prune").exit_code == 2


def test_public_names() -> None:
    assert sorted(streamprune.__all__) == streamprune.__all__ or set(streamprune.__all__) >= {"prune", "load", "Config"}
    for name in streamprune.__all__:
        assert hasattr(streamprune, name)


def test_every_setting_is_in_the_docs() -> None:
    documented = (ROOT / "docs" / "methods.md").read_text()
    assert list(SETTINGS) == [recipe.name for recipe in streamprune.RECIPES.values()]
    for name, settings in SETTINGS.items():
        assert f"`{name}`" in documented
        for field in fields(settings):
            assert f"`{field.name}`" in documented
            assert field.metadata["help"]
