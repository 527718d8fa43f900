"""Comparisons: the table against single runs, its files, resuming, refusals, and the interpolation by hand."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from click.testing import Result as Outcome
from conftest import contents
from stopping import Stop, Tiny
from streamprune_cli import main

import streamprune
from streamprune import Comparison, Variant
from streamprune.commands.compare import table as comparison
from streamprune.commands.compare.table import Row, ratio_at, reach
from streamprune.errors import ConfigError, DamageError, ResumeError
from streamprune.jobs.config import Config
from streamprune.jobs.names import job_folder
from streamprune.recipes.allocation import largest_unit
from streamprune.system import machine
from streamprune.system import progress as progress_module

Compare = Callable[..., Comparison]
SHARED = {"samples": 6, "seq_len": 24, "round_to": 4}


@pytest.fixture
def scored(text: Path, tmp_path: Path) -> Path:
    """A few windows of text to measure on."""
    path = tmp_path / "scored.txt"
    path.write_text(text.read_text()[:200])
    return path


@pytest.fixture
def compare(tiny: Tiny, text: Path, scored: Path, tmp_path: Path) -> Compare:
    """A small comparison into `out`, with whatever is changed."""

    def run(**changes: Any) -> Comparison:
        given: dict[str, Any] = {
            "ratios": [0.2, 0.4],
            "recipes": ["sobp", "magnitude"],
            "text": scored,
            "eval_seq_len": 24,
            "out": tmp_path / "out",
            "calibration": text,
            **SHARED,
        }
        return streamprune.compare(tiny("llama"), **{**given, **changes})

    return run


class Watched(progress_module.Silent):
    """Keeps the phases; stops at one whose name begins so."""

    def __init__(self, stop: str | None = None, steps: int = 0) -> None:
        self.stop, self.left = stop, steps
        self.phases: list[str] = []

    def phase(self, name: str, total: int, done: int = 0) -> None:
        self.phases.append(name)
        if name == self.stop and self.left == 0:
            raise Stop

    def step(self, note: str = "") -> None:
        if self.phases[-1] == self.stop:
            self.left -= 1
            if self.left == 0:
                raise Stop


def numbers(found: Comparison) -> list[dict[str, Any]]:
    """The rows without what differs from run to run."""
    measured = ("seconds", "peak_host_bytes", "peak_device_bytes", "out")
    return [{k: v for k, v in row.items() if k not in measured} for row in found.as_dict()["rows"]]


def test_rows_are_what_single_runs_give(compare: Compare, tiny: Tiny, text: Path, scored: Path, tmp_path: Path) -> None:
    watched = Watched()
    found = compare(
        recipes=["sobp", Variant("plain", "sobp", {"refine": "off"}), "magnitude"],
        ratios=[0.2, 0.4],
        keep=True,
        progress=watched,
    )
    assert [(row.label, row.ratio) for row in found.rows] == [
        ("dense", 0.0),
        *((label, ratio) for label in ("sobp", "plain", "magnitude") for ratio in (0.2, 0.4)),
    ]
    assert list(dict.fromkeys(phase.partition(": ")[0] for phase in watched.phases))[::3] == [
        "row 1 of 7, dense",
        "row 4 of 7, plain at 0.2",
        "row 7 of 7, magnitude at 0.4",
    ]
    dense, row = found.rows[0], found.rows[4]
    assert dense.perplexity == streamprune.evaluate(tiny("llama"), scored, seq_len=24).perplexity
    config = Config(
        model=tiny("llama"),
        out=tmp_path / "single",
        ratio=0.4,
        recipe="sobp",
        settings={"refine": "off"},
        calibration=text,
        **SHARED,  # type: ignore[arg-type]
    )
    single = streamprune.prune(config)
    # All rows but the first one have its survey, which a setting of later stages does not change.
    (survey,) = (tmp_path / "out" / "surveys").iterdir()
    later = streamprune.prune(replace(config, out=tmp_path / "later", survey=survey))
    assert [row.surveyed for row in found.rows] == [False, False, True, True, True, False, False]
    assert row.perplexity == streamprune.evaluate(config.out, scored, seq_len=24).perplexity
    assert row.log_gap == pytest.approx(math.log(row.perplexity / dense.perplexity), abs=1e-12)
    assert (row.parameters, row.ratio_blocks) == (single.parameters_after, single.ratio_blocks)
    assert 0 < row.operations == later.operations < single.operations
    assert row.forward_equivalents == later.forward_equivalents
    assert [line[-1].endswith("+") for line in found.cells()[1:]] == [row.surveyed for row in found.rows]
    assert found.notes[-1] == "Costs with a + leave out the first survey, which an earlier row had taken."
    assert found.rows[2].perplexity != row.perplexity
    assert row.peak_host_bytes is not None
    assert row.seconds > 0
    assert row.out is not None
    assert contents(Path(row.out)) == contents(config.out)


def test_the_files_agree(compare: Compare, tmp_path: Path) -> None:
    found = compare(recipes=["sobp", "m=magnitude"], perplexities=[50.0])
    out = tmp_path / "out"
    names = {path.name for path in out.iterdir()}
    assert names == {"journal.jsonl", "log.txt", "surveys", "compare.json", "compare.csv", "compare.md"}
    stored = json.loads((out / "compare.json").read_text())
    assert stored == json.loads(json.dumps(found.as_dict()))
    with (out / "compare.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(stored["rows"]) == 5
    for line, row in zip(table, stored["rows"], strict=True):
        assert line.keys() == row.keys()
        for name in ("perplexity", "ratio_blocks", "parameters", "operations", "log_gap"):
            assert float(line[name]) == row[name]
        assert line["label"] == row["label"]
    markdown = (out / "compare.md").read_text()
    for row in found.cells():
        assert f"| {' | '.join(row)} |" in markdown
    assert "| ratio at perplexity | 50 |" in markdown
    assert "- m: recipe `magnitude`" in markdown


STOPS = [
    ("row 1 of 3, dense: evaluate", 2),
    ("row 2 of 3, sobp at 0.4: prune", 2),
    ("row 2 of 3, sobp at 0.4: evaluate", 0),
    ("row 3 of 3, magnitude at 0.4: check weights", 1),
]


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on(compare: Compare, tmp_path: Path) -> None:
    whole = compare(ratios=[0.4], out=tmp_path / "whole")
    for number, (phase, steps) in enumerate(STOPS):
        out = tmp_path / f"out{number}"
        with pytest.raises(Stop):
            compare(ratios=[0.4], out=out, progress=Watched(phase, steps))
        assert not (out / "compare.json").exists()
        watched = Watched()
        found = compare(ratios=[0.4], out=out, progress=watched)
        assert numbers(found) == numbers(whole)
        # Finished rows are not touched again.
        place = phase.partition(": ")[0]
        assert all(int(name.split()[1]) >= int(place.split()[1]) for name in watched.phases)
        assert not (out / "rows").exists()


def test_ratios_and_recipes_can_be_added(compare: Compare, tmp_path: Path) -> None:
    compare(ratios=[0.2], recipes=["magnitude"])
    watched = Watched()
    found = compare(progress=watched)
    assert not any("magnitude at 0.2" in name or "dense" in name for name in watched.phases)
    assert numbers(found) == numbers(compare(out=tmp_path / "whole"))


def test_rows_say_whether_they_took_the_survey(compare: Compare, tmp_path: Path) -> None:
    """Whatever was there when they began: here one is stopped in its survey, and another goes before it then."""
    with pytest.raises(Stop):
        compare(ratios=[0.4], recipes=["sobp"], progress=Watched("row 2 of 2, sobp at 0.4: survey", 2))
    found = compare(ratios=[0.2, 0.4], recipes=["sobp"])
    assert [row.surveyed for row in found.rows] == [False, False, True]
    (survey,) = (tmp_path / "out" / "surveys").iterdir()
    next(survey.glob("*.safetensors")).write_bytes(b"damaged")
    with pytest.raises(DamageError, match=rf"was changed; remove {survey} to take the survey again"):
        compare(ratios=[0.2, 0.3, 0.4], recipes=["sobp"])
    shutil.rmtree(survey)
    found = compare(ratios=[0.2, 0.3, 0.4], recipes=["sobp"])
    assert [row.surveyed for row in found.rows] == [False, False, False, True]


def test_large_surveys_are_not_kept(compare: Compare, tmp_path: Path) -> None:
    found = compare(ratios=[0.2, 0.3], recipes=[Variant("surgeon", "surgeon", {"shots": "1"})])
    assert not any(row.surveyed for row in found.rows)
    assert not (tmp_path / "out" / "surveys").exists()


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"seed": 3}, r"sobp-0\.2\.settings\.seed is 3 and was 0"),
    ({"recipes": [Variant("sobp", "sobp", {"damping": "0.1"})]}, r"settings\.damping is 0\.1 and was 0\.01"),
    ({"recipes": ["sobp=wanda-sp"]}, r"settings\.recipe is .wanda-sp. and was .sobp."),
    ({"eval_seq_len": 20}, r"eval_seq_len is 20 and was 24"),
    ({"bos": "on"}, r"bos is true and was false"),
    ({"dtype": "float64"}, r"dtype is .float64. and was .float32."),
]


@pytest.mark.slow
def test_changed_settings_are_refused(compare: Compare, tmp_path: Path) -> None:
    compare(ratios=[0.2], recipes=["sobp"])
    before = (tmp_path / "out" / "compare.json").read_bytes()
    for change, message in CHANGES:
        with pytest.raises(ResumeError, match=message):
            compare(ratios=[0.2], **{"recipes": ["sobp"], **change})
        assert (tmp_path / "out" / "compare.json").read_bytes() == before
    # One change of a row's job, and one of the comparison.
    fresh = compare(ratios=[0.2], restart=True, seed=3, eval_seq_len=20, recipes=["sobp"])
    assert len(fresh.rows) == 2


@pytest.mark.slow
def test_changed_texts_are_refused(compare: Compare, scored: Path, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        compare(progress=Watched("row 2 of 5, sobp at 0.2: prune", 1))
    other = tmp_path / "other.txt"
    other.write_text(scored.read_text()[1:])
    with pytest.raises(ResumeError, match=r"text\.1\.sha256 is .* and was"):
        compare(text=other)
    with pytest.raises(ResumeError, match=r"sobp-0\.2\.inputs\.calibration\.1\.sha256 is .* and was"):
        compare(calibration=other)
    compare()


def test_kept_checkpoints_load_and_stay(compare: Compare, tmp_path: Path) -> None:
    found = compare(keep=True, ratios=[0.2], tensor_parallel=2)
    assert found.settings["tensor_parallel"] == 2
    for row in found.rows[1:]:
        assert row.out is not None
        assert streamprune.load(row.out).num_parameters() == row.parameters
        assert not job_folder(Path(row.out)).exists()
    again = compare(ratios=[0.2], tensor_parallel=2)
    assert again.rows == found.rows
    assert again.rows[1].out is not None
    compare(ratios=[0.2], tensor_parallel=2, restart=True)
    assert not (tmp_path / "out" / "rows").exists()


@pytest.mark.parametrize("layout", ["free", "uniform"])
def test_budgets_agree_to_within_a_step(layout: str, compare: Compare, tiny: Tiny) -> None:
    from streamprune.pruning.job import Job

    found = compare(layout=layout, recipes=["sobp", "magnitude", "wanda-sp"], ratios=[0.5])
    job = Job(Config(model=tiny("llama"), out=Path("x"), recipe="sobp", ratio=0.3, layout=layout, round_to=4), None)  # type: ignore[arg-type]
    step = largest_unit(job.request.sites, job.request.budget())
    # A key/value group: 16 columns of o_proj and 16 + 8 + 8 rows of 32.
    assert step == (3 if layout == "uniform" else 1) * (16 + 32) * 32
    left = [row.parameters for row in found.rows if row.ratio == 0.5]
    assert len(left) == 3
    assert max(left) - min(left) <= step
    assert found.notes == ()


def test_budgets_further_apart_are_said(compare: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    real = sys.modules["streamprune.commands.compare.run"].prune

    def off(config: Config, **options: Any) -> streamprune.Result:
        result: streamprune.Result = real(config, **options)
        return replace(result, ratio_blocks=result.ratio_blocks + (0.1 if config.recipe == "sobp" else 0.0))

    monkeypatch.setattr(sys.modules["streamprune.commands.compare.run"], "prune", off)
    found = compare(ratios=[0.4])
    assert len(found.notes) == 1
    assert found.notes[0].startswith("At ratio 0.4 the recipes removed between")
    assert "the largest step, 1,536." in found.notes[0]


def test_peaks_begin_anew_or_it_is_said(compare: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.ones(1 << 26)  # 256 MiB, gone at once
    before = machine.peak_host_bytes()
    if machine.reset_peaks(torch.device("cpu")):
        assert machine.peak_host_bytes() < before - (100 << 20)
    monkeypatch.setattr(machine, "reset_peaks", lambda device: False)
    found = compare(ratios=[0.4], recipes=["magnitude", "random"])
    assert found.notes == ("Host peaks include earlier work of the same process: magnitude-0.4, random-0.4.",)


def row(label: str, ratio: float, perplexity: float) -> Row:
    return Row(label=label, recipe=label, ratio_blocks=ratio, parameters=1, perplexity=perplexity)


def test_interpolation_by_hand() -> None:
    rows = [row("dense", 0, 10.0), row("a", 0.4, 160.0), row("a", 0.2, 20.0), row("b", 0.3, 10 * math.e)]
    found = {(entry.label, entry.perplexity): entry for entry in reach(rows, [20, 10 * math.sqrt(2), 80, 200, 5, 10])}
    assert found["a", 20].ratio == pytest.approx(0.2)
    assert found["a", 10 * math.sqrt(2)].ratio == pytest.approx(0.1)  # half of the way in logarithms
    assert found["a", 80].ratio == pytest.approx(0.2 + 0.2 * 2 / 3)  # two of three doublings
    assert found["b", 10 * math.sqrt(2)].ratio == pytest.approx(0.3 * math.log(2) / 2)
    assert found["a", 80].text == "0.3333"
    assert (found["a", 200].ratio, found["a", 200].text) == (None, ">0.4")
    assert (found["b", 80].ratio, found["b", 80].text) == (None, ">0.3")
    assert (found["a", 5].ratio, found["a", 5].text) == (None, "<0")
    assert found["b", 10].ratio == 0


def test_the_first_crossing_counts_and_a_broken_model_is_beyond_all() -> None:
    assert ratio_at([(0, 1.0), (0.2, 3.0), (0.3, 1.5), (0.5, 4.0)], 2.0) == pytest.approx(0.1)
    assert ratio_at([(0, 1.0), (0.2, 1.0), (0.3, 1.5)], 1.25) == pytest.approx(0.25)
    assert ratio_at([(0, 1.0), (0.2, 2.0), (0.3, math.inf)], 3.0) == 0.2
    found = Comparison("m", "o", "p", {}, (row("dense", 0, 2.0), row("a", 0.2, math.inf)), (), ())
    assert found.as_dict()["rows"][1]["perplexity"] is None
    json.dumps(found.as_dict(), allow_nan=False)


@pytest.fixture
def command(tiny: Tiny, text: Path, scored: Path, tmp_path: Path) -> Callable[..., Outcome]:
    """`streamprune compare` with small settings and whatever else is given."""

    def invoke(
        *more: str, ratios: str = "0.2", recipes: str = "magnitude", scored: Path = scored, calibration: Path = text
    ) -> Outcome:
        given = ["--ratios", ratios, "--recipes", recipes, "--text", str(scored), "--calibration", str(calibration)]
        given += ["--out", str(tmp_path / "out"), "--samples", "6", "--seq-len", "24", "--round-to", "4"]
        return CliRunner().invoke(main, ["compare", str(tiny("llama")), *given, "--eval-seq-len", "24", *more])

    return invoke


def test_the_command_prints_a_table_or_one_object(command: Callable[..., Outcome]) -> None:
    shown = command("--set", "plain.refine=off", "--perplexity", "60", recipes="sobp,plain=sobp")
    assert shown.exit_code == 0, shown.output
    lines = shown.stdout.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["recipe", "dense", "sobp", "plain"]
    assert lines[5].split() == ["ratio", "at", "perplexity", "60"]
    assert "row 3 of 3, plain at 0.2: prune: 3 of 3" in shown.stderr
    again = command("--set", "plain.refine=off", "--json", recipes="sobp,plain=sobp")
    found = json.loads(again.stdout)
    assert [entry["settings"] for entry in found["rows"]] == [{}, {}, {"refine": "off"}]
    assert f"{found['rows'][2]['perplexity']:.4f}" in lines[3]


@pytest.mark.parametrize(
    ("arguments", "keywords", "message"),
    [
        ([], {"ratios": "0.2,much"}, "--ratios '0.2,much': write numbers separated by commas"),
        ([], {"ratios": "0.2,1.5"}, "ratio is 1.5; it must be in (0, 1)"),
        ([], {"ratios": "0.2,0.97"}, "ratio is 0.97; this model can lose at most"),
        ([], {"ratios": "0.2,0.20"}, "ratio 0.2 is given twice"),
        ([], {"recipes": "sobp,magic"}, "recipe is 'magic'; it must be one of default, sobp"),
        ([], {"recipes": "sobp,sobp"}, "recipe sobp is given twice"),
        ([], {"recipes": "sobp,"}, "label is ''; it must consist of letters, digits, - and _"),
        ([], {"recipes": "a.b=sobp"}, "label is 'a.b'; it must consist of letters"),
        ([], {"recipes": "dense=sobp"}, "label is 'dense', which is reserved for the unpruned model"),
        (["--set", "damping=1"], {"recipes": "sobp"}, "--set 'damping': write it as label.name=value"),
        (["--set", "wanda.damping=1"], {"recipes": "sobp"}, "there is no 'wanda' among the recipes; there are sobp"),
        (["--set", "sobp.damping=low"], {"recipes": "sobp"}, "setting damping = 'low': it must be a number"),
        (["--set", "magnitude.damping=1"], {}, "recipe magnitude has no setting 'damping'; it has structure"),
        (["--perplexity", "1"], {}, "perplexity is 1; it must be above 1 and finite"),
        (["--eval-seq-len", "1"], {}, "seq_len is 1; it must be at least 2"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: list[str], keywords: dict[str, Any], message: str, command: Callable[..., Outcome], tmp_path: Path
) -> None:
    refused(command(*arguments, **keywords), 2, message, tmp_path)


def refused(outcome: Outcome, code: int, message: str, folder: Path) -> None:
    assert outcome.exit_code == code, outcome.output
    lines = [line for line in outcome.stderr.splitlines() if line.startswith("streamprune: ")]
    assert len(lines) == 1, outcome.stderr
    assert message in lines[0]
    assert not (folder / "out").exists()


def test_unusable_texts_and_too_little_memory(command: Callable[..., Outcome], tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short")
    for scored, message in ((short, "one window needs 24"), (tmp_path / "nowhere", "cannot read the text")):
        refused(command(scored=scored), 1, message, tmp_path)
        refused(command(calibration=scored, recipes="magnitude,sobp"), 1, message, tmp_path)
    refused(command("--memory", "20KB"), 1, "the memory limit is 19.5 KiB", tmp_path)


def test_a_folder_of_something_else_is_refused(command: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("")
    outcome = command("--restart")
    assert outcome.exit_code == 2
    assert "which contains thesis.txt, a file that streamprune compare did not write" in outcome.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_the_model_may_write_the_calibration(compare: Compare) -> None:
    dense, *pruned = compare(calibration="self", ratios=[0.3], recipes=["sobp", "wanda-sp"]).rows
    assert [row.perplexity for row in pruned] != [dense.perplexity] * 2


@pytest.mark.parametrize("given", ["models/../models/tiny", "absolute"])
def test_the_default_folder_is_in_the_current_one(
    given: str, tiny: Tiny, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").symlink_to(tiny("llama"))
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    model = str(tmp_path / "models" / "tiny") if given == "absolute" else f"../{given}"
    words = ["--ratios", "0.3", "--recipes", "random", "--text", str(text), "--eval-seq-len", "24"]
    done = CliRunner().invoke(main, ["compare", model, *words])
    assert done.exit_code == 0, done.output
    assert (
        done.stderr.splitlines()[0]
        == f"streamprune: the table and the pruned checkpoints go to {here / 'tiny-compare'}"
    )
    assert (here / "tiny-compare" / "compare.json").is_file()
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["tiny"]


def test_a_plot_without_matplotlib_is_refused_before_any_work(
    command: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        comparison.importlib.util, "find_spec", lambda name, *more: None if name == "matplotlib" else real(name, *more)
    )
    refused(command("--plot"), 2, "pip install 'streamprune[plot]'", tmp_path)


def test_the_plot(compare: Compare, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    compare(plot=True)
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_no_recipes_or_ratios() -> None:
    for ratios, recipes in (([], ["sobp"]), ([0.3], [])):
        with pytest.raises(ConfigError, match="were given"):
            streamprune.compare("m", ratios=ratios, recipes=recipes, text="t")
