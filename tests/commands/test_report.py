"""The report page: its figures are those of report.json, values are escaped, and missing parts are listed."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import contents
from safetensors.torch import load_file
from streamprune_cli import main

import streamprune
from streamprune.commands.report import charts
from streamprune.errors import ConfigError, ResourceError
from streamprune.jobs.names import job_folder
from streamprune.model.checkpoint import Checkpoint
from streamprune.pruning.curves import POINTS, sample
from streamprune.system import machine

Tiny = Callable[..., Path]
Make = Callable[..., streamprune.Config]

HOSTILE = '"><img src=x onerror=alert(1)>&<script>alert(2)<'


class Read(HTMLParser):
    """A parsed page: tags with attributes, table rows, tooltips."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.notes: list[str] = []
        self.words = ""
        self._cell = self._note = False
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self._cell = True
        elif tag == "title":
            self.notes.append("")
            self._note = True

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("td", "th")
        self._note = self._note and tag != "title"

    def handle_data(self, data: str) -> None:
        self.words += data
        if self._cell:
            self.rows[-1][-1] += data
        if self._note:
            self.notes[-1] += data

    def ids(self) -> set[str | None]:
        return {attributes.get("id") for _, attributes in self.tags}


@pytest.fixture(scope="module")
def pruned(tiny: Tiny, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result that tests only read."""
    out = tmp_path_factory.mktemp("report") / "pruned"
    streamprune.prune(
        streamprune.Config(model=tiny("llama"), out=out, ratio=0.3, calibration=text, samples=6, seq_len=24, round_to=4)
    )
    return out


@pytest.fixture(scope="module")
def read(pruned: Path, tmp_path_factory: pytest.TempPathFactory) -> Read:
    """The page of `pruned`."""
    page = tmp_path_factory.mktemp("page") / "page.html"
    assert streamprune.report(pruned, html=page) == page
    return Read(page)


@pytest.fixture(scope="module")
def report(pruned: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((pruned / "report.json").read_text())
    return found


@pytest.fixture
def copied(pruned: Path, tmp_path: Path) -> Path:
    """A copy that tests may change."""
    return Path(shutil.copytree(pruned, tmp_path / "copied"))


def change(out: Path, edit: Callable[[dict[str, Any]], Any], name: str = "report.json") -> Path:
    value = json.loads((out / name).read_text())
    edit(value)
    (out / name).write_text(json.dumps(value))
    return out


# Contents.


def test_figures_are_those_of_the_report(read: Read, report: dict[str, Any]) -> None:
    rows = {row[0]: row[1:] for row in read.rows}
    for site in report["sites"]:
        kept, total, share, error, *_ = rows[site["site"]]
        assert (int(kept), int(total)) == (site["kept"], site["units"])
        assert share == f"{site['kept'] / site['units']:.1%}"
        assert float(error) == pytest.approx(site["error"], abs=1e-6)
        block = site["site"].split(".")[1]
        assert f"block {block}: {site['kept']:,} of {site['units']:,} kept, {share}" in read.notes
    assert f"{report['ratio_blocks']:.2%}" in read.words
    removed = report["parameters_before"] - report["parameters_after"]
    assert f"{removed:,} of {report['parameters_before']:,} parameters removed" in read.words


def test_heights_of_bars_are_shares_kept(read: Read, report: dict[str, Any]) -> None:
    def heights(css: str) -> list[float]:
        return [float(a["height"] or 0) for tag, a in read.tags if tag == "rect" and a.get("class") == css]

    for kind in ("attention", "ffn"):
        shares = [site["kept"] / site["units"] for site in report["sites"] if site["site"].endswith(kind)]
        assert heights(kind) == pytest.approx([heights("track")[0] * share for share in shares], abs=0.11)


def test_the_page_has_every_setting_and_digest(read: Read, report: dict[str, Any]) -> None:
    def leaves(value: Any) -> list[Any]:
        if isinstance(value, (dict, list)):
            return [leaf for inner in (value.values() if isinstance(value, dict) else value) for leaf in leaves(inner)]
        return [value]

    cells = {part for row in read.rows for cell in row[1:] for part in (cell, *cell.split(" · "))}
    for leaf in [*leaves(report["job"]), report["plan"], report["batch"]]:
        assert ("—" if leaf is None else ("off", "on")[leaf] if isinstance(leaf, bool) else str(leaf)) in cells


def test_curves_are_those_of_the_file(pruned: Path, read: Read, report: dict[str, Any]) -> None:
    curves = json.loads((pruned / "curves.json").read_text())
    assert curves["label"] in read.words
    for site in report["sites"]:
        gone = site["units"] - site["kept"]
        cost = dict(map(tuple, curves["sites"][site["site"]]))[gone]
        assert f"{site['site']}: cut at {gone} of {site['units']}, where the next unit costs {cost:.3g}" in read.notes


def test_perplexity_is_that_of_evaluate(pruned: Path, tiny: Tiny, text: Path, tmp_path: Path) -> None:
    page = streamprune.report(pruned, against=tiny("llama"), text=text, seq_len=24, html=tmp_path / "page.html")
    dense, ours = (streamprune.evaluate(path, text, seq_len=24) for path in (tiny("llama"), pruned))
    words = Read(page).words
    assert f"{ours.perplexity:.2f}" in words
    assert f"{dense.perplexity:.2f} before, {ours.perplexity / dense.perplexity - 1:+.1%}" in words
    assert ours.protocol in words


def test_samples_are_greedy(pruned: Path, tiny: Tiny, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pruned)
    prompts = ["to be, or", "the sea"]
    page = streamprune.report(pruned, against=tiny("llama"), prompts=prompts, tokens=9, html=tmp_path / "page.html")
    words = Read(page).words
    for prompt in prompts:
        written = []
        for path in (tiny("llama"), pruned):
            model = streamprune.load(path)
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
            start = ids.shape[1]
            for _ in range(9):
                with torch.no_grad():
                    ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
                if int(ids[0, -1]) == 1:
                    break
            written.append(ids[0, start:].tolist())
            assert tokenizer.decode(written[-1], skip_special_tokens=True).strip() in words
        same = next(
            (k for k, pair in enumerate(zip(*written, strict=False)) if len(set(pair)) > 1), min(map(len, written))
        )
        assert f"Identical tokens at the start: {same} of {max(map(len, written))}." in words
    assert "which is the checkpoint that was pruned" in words


def test_samples_end_at_the_context(pruned: Path, tiny: Tiny, tmp_path: Path) -> None:
    endless = tiny("llama", eos_token_id=None)
    prompts = ["a" * 30, "b" * 60, "c"]
    html = tmp_path / "page.html"
    page = streamprune.report(pruned, against=endless, prompts=prompts, html=html)
    longest = [int(n) for n in re.findall(r"Identical tokens at the start: \d+ of (\d+)\.", Read(page).words)]
    assert longest == [34, 4, 48]
    shorter = tiny("llama", eos_token_id=None, max_position_embeddings=32)
    with pytest.raises(
        ConfigError,
        match=f"--tokens is 3 after a --prompt of length 30; the context of {re.escape(str(shorter))} is 32",
    ):
        streamprune.report(pruned, against=shorter, prompts=prompts[:1], tokens=3, html=html)


def test_another_dense_model_is_named_as_such(pruned: Path, tiny: Tiny, tmp_path: Path) -> None:
    page = streamprune.report(pruned, against=tiny("qwen3"), prompts=["a"], tokens=1, html=tmp_path / "page.html")
    assert "which is not the checkpoint that was pruned" in Read(page).words


def test_a_comparison_is_shown(pruned: Path, tiny: Tiny, text: Path, tmp_path: Path) -> None:
    found = streamprune.compare(
        tiny("llama"),
        ratios=[0.2, 0.4],
        recipes=["magnitude", "random"],
        text=text,
        eval_seq_len=24,
        out=tmp_path / "c",
    )
    for given in (tmp_path / "c", tmp_path / "c" / "compare.json"):
        read = Read(streamprune.report(pruned, comparison=given, html=tmp_path / "page.html"))
        rows = [row for row in read.rows if row[0] in ("dense", "magnitude", "random")]
        assert [(row[0], row[2]) for row in rows] == [(row.label, f"{row.perplexity:.2f}") for row in found.rows]
        assert found.protocol in read.words
    # An infinite perplexity.
    change(tmp_path / "c", lambda table: table["rows"][-1].update(perplexity=None), "compare.json")
    assert "∞" in Read(streamprune.report(pruned, comparison=tmp_path / "c", html=tmp_path / "page.html")).words


def scores(out: Path, place: Path, values: dict[str, list[float]], **changes: Any) -> Path:
    """Scores of a checkpoint as `eval --tasks --json` prints them, from the scores of documents by task."""
    tasks = {
        "results": {
            task: {
                "alias": task,
                "acc,none": float(np.mean(each)),
                "acc_stderr,none": float(np.std(each, ddof=1) / len(each) ** 0.5),
            }
            for task, each in values.items()
        },
        "documents": {task: len(each) for task, each in values.items()},
        "samples": {task: {"acc,none": each} for task, each in values.items()},
        "fingerprints": {task: f"{task} {len(each)}" for task, each in values.items()},
        "fewshot": dict.fromkeys(values, 0),
        "model": Checkpoint(out).identity(),
        "protocol": f"as for {place.stem}",
        **changes,
    }
    place.write_text(json.dumps({"tasks": tasks}))
    return place


def test_scores_before_and_after(pruned: Path, tiny: Tiny, tmp_path: Path) -> None:
    """The interval of a difference is that of a paired test; without the documents' scores, that of independent ones."""
    draw = np.random.default_rng(0)
    dense = (draw.random(50) < 0.7).astype(float)
    after = np.where(draw.random(50) < 0.8, dense, 0.0)
    before_file = scores(tiny("llama"), tmp_path / "before.json", {"sums": [*dense], "other": [1.0, 0.0, 1.0]})
    after_file = scores(pruned, tmp_path / "after.json", {"sums": [*after], "other": [1.0, 0.0, 1.0]})
    page = streamprune.report(pruned, scores=after_file, scores_against=before_file, html=tmp_path / "page.html")
    read = Read(page)
    d = after - dense
    expected = [
        f"{x.mean():{sign}.4g} ± {1.96 * x.std(ddof=1) / 50**0.5:.2g}"
        for x, sign in ((dense, ""), (after, ""), (d, "+"))
    ]
    assert ["sums", "acc", "50", *expected] in read.rows
    assert [row[-1] for row in read.rows if row[0] == "other"] == ["+0 ± 0"]
    assert abs(d.mean()) > 1.96 * d.std(ddof=1) / 50**0.5
    assert page.read_text().count('<td class="best">') == 1
    assert "as for before." in read.words
    assert "as for after." in read.words
    assert "The scores before are those of the checkpoint that was pruned" in read.words
    scores(pruned, after_file, {"sums": [*after], "other": [1.0, 0.0, 1.0]}, samples={})
    read = Read(streamprune.report(pruned, scores=after_file, scores_against=before_file, html=tmp_path / "page.html"))
    apart = 1.96 * (dense.var(ddof=1) / 50 + after.var(ddof=1) / 50) ** 0.5
    assert ["sums", "acc", "50", *expected[:2], f"{d.mean():+.4g} ± {apart:.2g}*"] in read.rows
    assert "the interval treats the two models as independent" in read.words
    read = Read(streamprune.report(pruned, scores=after_file, html=tmp_path / "page.html"))
    assert ["sums", "acc", "50", expected[1]] in read.rows
    assert "difference" not in read.words


def test_scores_of_one_model_only_are_shown(pruned: Path, tiny: Tiny, tmp_path: Path) -> None:
    """Without a difference; the same holds for groups, which may have other tasks then."""
    both = {"acc,none": 0.5, "acc_stderr,none": 0.1}
    given = {"sums": both, "all": both}
    before, after = (
        scores(
            model,
            tmp_path / f"{name}.json",
            {key: [1.0, 0.0] for key in ("sums", name)},
            results=given | {name: both, "sums": both | {f"{name},none": 2}},
        )
        for model, name in ((tiny("llama"), "before"), (pruned, "after"))
    )
    html = tmp_path / "page.html"
    read = Read(streamprune.report(pruned, scores=after, scores_against=before, html=html))
    value = "0.5 ± 0.2"
    found = [row for row in read.rows if row[0] in (*given, "before", "after") and len(row) == 6]
    assert found == [
        ["sums", "acc", "2", value, value, "+0 ± 0"],
        ["sums", "after", "2", "—", "2", "—"],
        ["sums", "before", "2", "2", "—", "—"],
        ["all", "acc", "—", value, value, "—"],
        ["after", "acc", "2", "—", value, "—"],
        ["before", "acc", "2", value, "—", "—"],
    ]
    assert "as independent" not in read.words
    read = Read(streamprune.report(pruned, scores=after, scores_against=after, html=html))
    assert ["all", "acc", "—", value, value, "+0 ± 0.28*"] in read.rows


def test_scores_that_do_not_fit_are_refused(pruned: Path, copied: Path, tiny: Tiny, tmp_path: Path) -> None:
    after, before = (tmp_path / f"{name}.json" for name in ("after", "before"))
    scores(pruned, after, {"sums": [1.0, 0.0]})
    (tmp_path / "text.json").write_text('{"perplexity": 3.0}')
    tasks = json.loads(after.read_text())["tasks"]
    del tasks["fewshot"]
    (tmp_path / "older.json").write_text(json.dumps({"tasks": tasks}))
    older = "which this version's streamprune eval --tasks ... --json did not print; run it again"
    for given, message in (
        ({"scores": tmp_path / "no.json"}, "which is not a file; streamprune eval --tasks"),
        ({"scores": tmp_path / "text.json"}, older),
        ({"scores": tmp_path / "older.json"}, older),
        ({"scores_against": after}, "it needs the scores of"),
        ({"scores": scores(tiny("llama"), before, {"sums": [1.0, 0.0]})}, "of another checkpoint than"),
        (
            {"scores": after, "scores_against": scores(pruned, tmp_path / "b", {"sums": [1.0] * 3})},
            "different documents",
        ),
        (
            {
                "scores": after,
                "scores_against": scores(pruned, tmp_path / "c", {"sums": [1.0, 0.0]}, fewshot={"sums": 5}),
            },
            r"of 'sums' are with 5 examples before and 0 after; use the same --num-fewshot",
        ),
        (
            {"scores": after, "scores_against": scores(pruned, tmp_path / "e", {"sums": [1.0, 0.0]}, fewshot={})},
            r"unexpected content \('sums'\)",
        ),
        ({"scores": scores(pruned, tmp_path / "d", {"sums": [1.0, 0.0]}, documents=[])}, "have unexpected content"),
    ):
        with pytest.raises(ConfigError, match=message):
            streamprune.report(copied, **given)
    assert contents(copied) == contents(pruned)


# Hostile and missing values.


def test_hostile_values_are_escaped(copied: Path, tiny: Tiny, text: Path, tmp_path: Path) -> None:
    out = copied.rename(tmp_path / HOSTILE.replace("/", ""))

    def spoil(report: dict[str, Any]) -> None:
        report["model"]["name"] = report["recipe"] = HOSTILE
        report["job"]["settings"][HOSTILE] = HOSTILE
        report["sites"][0]["site"] = f"blocks.0.ffn.{HOSTILE}"

    change(out, spoil)
    change(out, lambda curves: curves.update(label=HOSTILE), "curves.json")
    row = {"label": HOSTILE, "ratio": 0.0, "ratio_blocks": 0.0, "perplexity": 3.0, "parameters": 5, "seconds": 1.0}
    row["forward_equivalents"] = 1.0
    table = {
        "model": HOSTILE,
        "protocol": HOSTILE,
        "notes": [HOSTILE],
        "rows": [row, {**row, "ratio": 0.5, "ratio_blocks": 0.5}],
    }
    (tmp_path / "compare.json").write_text(json.dumps(table))
    page = streamprune.report(
        out,
        against=tiny("llama"),
        prompts=["a<b>c"],
        tokens=2,
        comparison=tmp_path / "compare.json",
        html=tmp_path / "page.html",
    )
    read = Read(page)
    tags = {tag for tag, _ in read.tags}
    assert not tags & {"img", "script", "b", "link", "iframe", "object", "base", "form"}
    assert not [name for _, attributes in read.tags for name in attributes if name.startswith("on") or name == "src"]
    assert all(a.get("href", "#").startswith("#") for _, a in read.tags)  # type: ignore[union-attr]
    assert read.words.count(HOSTILE) >= 10


def test_invalid_arguments_are_refused(pruned: Path, copied: Path, tiny: Tiny, tmp_path: Path) -> None:
    for given, message in (
        ({"out": tiny("llama")}, "has no report.json: it is not a result"),
        ({"out": tmp_path / "nothing"}, "has no report.json"),
        ({"html": tmp_path / "page.txt"}, r"page\.txt; its name must end in \.html"),
        ({"html": tmp_path / "no" / "page.html"}, "it must be a file in an existing directory"),
        ({"against": tiny("llama")}, "it needs prompts"),
        ({"comparison": tmp_path / "no"}, "which does not exist; streamprune compare writes it"),
        ({"prompts": ["  "]}, "it must have at least one token"),
        ({"prompts": ["a"], "tokens": 0}, "tokens is 0; it must be at least 1"),
        ({"prompts": ["a"], "tokens": 64}, "--tokens is 64 after a --prompt of length 1; the context of .* is 64"),
        ({"prompts": ["a" * 64]}, "--tokens is 48 after a --prompt of length 64; the context of .* is 64"),
        ({"tokens": 5}, "tokens is 5; it needs prompts"),
        ({"seq_len": 24}, "seq_len is 24; it needs a text"),
    ):
        with pytest.raises(ConfigError, match=message):
            streamprune.report(**{"out": copied, **given})
    assert contents(copied) == contents(pruned)


def test_samples_that_do_not_fit_are_refused_at_once(
    copied: Path, tiny: Tiny, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "available_memory", lambda device: 50_000)
    with pytest.raises(
        ResourceError, match=r"samples need all of .* in memory, about .* KiB; 48.8 KiB are free on cpu"
    ):
        streamprune.report(copied, against=tiny("llama"), prompts=["a"], text=text)
    assert not (copied / "report.html").exists()
    assert streamprune.report(copied) == copied / "report.html"


def test_a_job_under_way_is_sent_to_inspect(tiny: Tiny, configured: Make) -> None:
    config = configured(tiny("llama"))
    streamprune.plan_only(config)
    with pytest.raises(ConfigError, match="is not finished; streamprune status"):
        streamprune.report(config.out)


def test_missing_sections_are_listed(tiny: Tiny, configured: Make, tmp_path: Path) -> None:
    config = configured(tiny("llama"), recipe="magnitude")
    streamprune.prune(config)
    read = Read(streamprune.report(config.out))
    for piece in ("Reconstruction error", "Importance curves", "Comparison", "Tasks", "Samples", "Perplexity"):
        assert re.search(rf"{piece}: (none|not|the recipe (does not|computes none))", read.words), piece
    assert {"budget", "spent", "sites", "settings", "missing"} <= read.ids()
    assert not {"errors", "curves", "comparison", "tasks", "samples", "recovery"} & read.ids()


def test_zeros_instead_of_units(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "masked"
    settings = {"structure": "unstructured"}
    streamprune.prune(
        streamprune.Config(model=tiny("llama"), out=out, ratio=0.5, recipe="magnitude", settings=settings)
    )
    read = Read(streamprune.report(out))
    report = json.loads((out / "report.json").read_text())
    site = report["sites"][0]
    kept = site["weights"] - site["zeros"]
    assert f"block 0: {kept:,} of {site['weights']:,} kept, {kept / site['weights']:.1%}" in read.notes
    assert f"{report['zeros']:,} of {report['parameters_before']:,} parameters made zero" in read.words


def test_sites_of_a_mixture(copied: Path) -> None:
    def mix(report: dict[str, Any]) -> None:
        experts = [
            {**site, "site": f"{site['site']}.{expert}", "kept": site["kept"] - 4 * expert}
            for site in report["sites"]
            if site["site"].endswith("ffn")
            for expert in range(3)
        ]
        report["sites"] = [site for site in report["sites"] if site["site"].endswith("attention")] + experts

    before = {site["site"]: site for site in json.loads((copied / "report.json").read_text())["sites"]}
    read = Read(streamprune.report(change(copied, mix)))
    site = before["blocks.1.ffn"]
    kept = [site["kept"] - 4 * expert for expert in range(3)]
    shares = f"3 sites from {kept[-1] / 48:.1%} to {kept[0] / 48:.1%}"
    assert f"block 1: {sum(kept)} of 144 kept, {sum(kept) / 144:.1%}; {shares}" in read.notes
    assert sum(tag == "rect" and a.get("class") == "ffn" for tag, a in read.tags) == 3
    shown = CliRunner().invoke(main, ["inspect", str(copied)])
    assert shown.exit_code == 0
    assert "blocks.1.ffn.2" in shown.stdout


def test_a_tuned_model_shows_what_was_pruned(pruned: Path, tiny: Tiny, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned"
    streamprune.tune(
        streamprune.TuneConfig(
            model=pruned,
            out=out,
            text=text,
            method="distil",
            teacher=tiny("llama"),
            rank=2,
            steps=3,
            samples=4,
            seq_len=24,
        )
    )
    read = Read(streamprune.report(out, against=tiny("llama"), prompts=["a"], tokens=1))
    assert {"budget", "errors", "curves", "spent", "recovery", "sites", "settings"} <= read.ids()
    (row,) = [row for row in read.rows if row[0] == "distil"]
    assert row[1:3] == ["2", "3"]
    assert "which is the checkpoint that was pruned" in read.words
    assert "cost: loss per parameter" in CliRunner().invoke(main, ["inspect", str(out)]).stdout


def test_run_leaves_a_page_in_out_until_restart(tiny: Tiny, configured: Make, pruned: Path) -> None:
    config = configured(tiny("llama"), recipe="magnitude")
    streamprune.prune(config)
    page = streamprune.report(config.out)
    assert page == config.out / "report.html"
    assert streamprune.prune(config).resumed
    assert page.exists()
    assert not streamprune.prune(config, restart=True).resumed
    assert not page.exists()


# What a job records for it.


def weighed(recipe: str, site: str, findings: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the allocation goes by, from the survey's file."""
    costs = findings[f"{site}.{'importance' if recipe == 'sobp' else 'costs'}"].double()
    return costs if recipe == "default" else costs.sort().values


@pytest.mark.parametrize("recipe", ["default", "sobp", "surgeon"])
def test_curves_are_what_the_recipe_weighed(recipe: str, tiny: Tiny, configured: Make) -> None:
    settings = {"shots": "1"} if recipe == "surgeon" else {}
    config = configured(tiny("llama"), recipe=recipe, settings=settings)
    streamprune.plan_only(config)
    surveyed = {k: load_file(job_folder(config.out) / f"survey-{k:04}.safetensors") for k in range(3)}
    streamprune.prune(config)
    curves = json.loads((config.out / "curves.json").read_text())["sites"]
    report = json.loads((config.out / "report.json").read_text())
    assert set(curves) == {site["site"] for site in report["sites"]}
    parts = {
        site["site"]: site for block in streamprune.inspect(tiny("llama"))["model"]["blocks"] for site in block["sites"]
    }
    for name, points in curves.items():
        _, block, kind = name.split(".")
        expected = weighed(recipe, kind, surveyed[int(block)])
        if recipe == "surgeon":
            expected = expected / parts[name]["unit_parameters"]
        assert [k for k, _ in points] == list(range(len(expected)))
        assert [cost for _, cost in points] == pytest.approx(expected.tolist(), rel=1e-5)


def test_greedy_output_shows_attention_only(tiny: Tiny, configured: Make) -> None:
    config = configured(tiny("llama-biased"), recipe="greedy-output")
    streamprune.prune(config)
    curves = json.loads((config.out / "curves.json").read_text())
    assert set(curves["sites"]) == {f"blocks.{k}.attention" for k in range(3)}
    costs = [cost for _, cost in curves["sites"]["blocks.0.attention"]]
    assert costs == sorted(costs)


def test_curves_of_later_shots_continue_earlier_ones(tiny: Tiny, configured: Make) -> None:
    config = configured(tiny("llama"), recipe="default", settings={"shots": "2"}, blocks=(1, 3))
    streamprune.prune(config)
    curves = json.loads((config.out / "curves.json").read_text())["sites"]
    report = json.loads((config.out / "report.json").read_text())
    kept = {site["site"]: site["kept"] for site in report["sites"]}
    assert {name.split(".")[1] for name in curves} == {"1", "2"}
    begun = {name: points[0][0] for name, points in curves.items()}
    assert any(begun.values())
    for name, points in curves.items():
        units = 48 if "ffn" in name else 2
        assert begun[name] <= units - kept[name] < units
        assert points[-1][0] == units - 1


def test_samples_of_a_curve() -> None:
    costs = torch.arange(1000, dtype=torch.float64) ** 2
    points = sample(costs, 777)
    assert len(points) <= POINTS
    assert {0, 777, 999} <= {k for k, _ in points}
    assert all(cost == k**2 for k, cost in points)
    assert sample(torch.tensor([2.0]), 0) == [(0, 2.0)]


def test_blocks_record_time_and_memory(report: dict[str, Any]) -> None:
    assert [block["block"] for block in report["blocks"]] == [0, 1, 2]
    spent = sum(block["survey_seconds"] + block["prune_seconds"] for block in report["blocks"])
    assert 0 < spent < report["seconds"]
    assert max(block["host_bytes"] for block in report["blocks"]) <= report["peak_host_bytes"]


def test_each_lap_has_its_own_peak() -> None:
    peaks = machine.Peaks(torch.device("cpu"))
    peaks.lap()
    held = bytearray(200 << 20)
    held[:: 1 << 12] = b"x" * len(held[:: 1 << 12])
    del held
    high, low = peaks.lap(), peaks.lap()
    assert peaks.most()[0] >= high["host_bytes"]
    assert high["device_bytes"] is None
    if not low["own"]:
        pytest.skip("this kernel cannot reset the peak")
    assert low["host_bytes"] < high["host_bytes"] - (100 << 20)


def test_axes() -> None:
    axis = charts.linear("s", 7.3, "{:g}".format)
    assert [said for _, said in axis.ticks] == ["0", "2", "4", "6", "8"]
    assert axis.place(4) == pytest.approx(0.5)
    axis = charts.logarithmic("p", [0.0, 3e-7, 0.04], "{:g}".format)
    assert (axis.low, axis.high) == pytest.approx((2e-7, 0.05))
    assert axis.place(1e-4) == pytest.approx(math.log(1e-4 / 2e-7) / math.log(0.05 / 2e-7))
    assert axis.place(0.0) == 0
    for values in ([], [0.0], [5.0], [5.0, 5.1], [1e-300, 1e300], [1e-320], [1.0]):
        axis = charts.logarithmic("p", values, "{:g}".format)
        assert 0 < axis.low < axis.high
        assert axis.ticks
    names = [str(k) for k in range(126)]
    assert len(charts.positions("block", names).ticks) <= 10
    assert charts.linear("s", 0.0, str).high > 0


def test_the_command(copied: Path, tiny: Tiny, tmp_path: Path) -> None:
    arguments = f"report {copied} --against {tiny('llama')} --prompt a --prompt b --tokens 2 --json"
    done = CliRunner().invoke(main, arguments.split())
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"html": str(copied / "report.html")}
    for option in ("--out", "--html"):
        page = tmp_path / f"page{option}.html"
        done = CliRunner().invoke(main, ["report", str(copied), option, str(page), "--json"])
        assert json.loads(done.stdout) == {"html": str(page)}
        assert "<html" in page.read_text()
    assert "shows how to run OUT and what it weighs" in CliRunner().invoke(main, ["report", "--help"]).stdout
    refused = CliRunner().invoke(main, ["report", str(tiny("llama"))])
    assert refused.exit_code == 2
    assert "not a result of streamprune run or tune" in refused.stderr


def test_inspect_draws(pruned: Path, report: dict[str, Any]) -> None:
    shown = CliRunner().invoke(main, ["inspect", str(pruned)]).stdout
    for site in report["sites"]:
        row = next(line for line in shown.splitlines() if line.startswith(site["site"]))
        full = row.count("█") - row.partition(f"{site['error']:.4f}")[2].count("█")
        assert full == int(16 * site["kept"] / site["units"])
    assert "cost: loss per parameter" in shown
    assert "  ratio 0.3\n" in shown
    assert report["job"]["inputs"]["calibration"]["1"]["sha256"] in shown
    assert "host peak" in shown
    found = json.loads(CliRunner().invoke(main, ["inspect", str(pruned), "--json"]).stdout)
    assert set(found["job"]["curves"]["sites"]) == {site["site"] for site in report["sites"]}


def test_a_comparison_is_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "compare.json").write_text("{}")
    for command in ("inspect", "report"):
        done = CliRunner().invoke(main, [command, str(tmp_path)])
        assert done.exit_code in (1, 2)
        assert "contains a comparison (see compare.md)" in done.output
