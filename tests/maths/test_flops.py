"""Counted operations: against hand counts, torch's own counter, and the shapes of whole models."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from stopping import Make, Tiny, force_boundaries, interrupted
from torch.utils.flop_counter import FlopCounterMode
from transformers.integrations import moe  # noqa: F401, registers its ops

import streamprune
from streamprune.jobs.config import Config
from streamprune.jobs.journal import Journal
from streamprune.jobs.meter import metered, totals
from streamprune.maths import greedy, refit
from streamprune.maths.flops import FlopCounter, counted, kind
from streamprune.model.skeleton import open_skeleton
from streamprune.stream import sweep
from streamprune.stream.store import ActivationStore
from streamprune.system.machine import Peaks


def count(work: Callable[[], object]) -> int:
    with FlopCounter() as counter:
        work()
    return counter.total


SPD = 2 * torch.eye(6) + torch.ones(6, 6)
L = torch.linalg.cholesky(SPD)
A, B, V = torch.ones(5, 7), torch.ones(7, 3), torch.ones(7)
ROWS, EXPERTS = torch.ones(8, 16, dtype=torch.bfloat16), torch.ones(3, 16, 32, dtype=torch.bfloat16)
ENDS = torch.tensor([2, 3, 8], dtype=torch.int32)
GROUPED = pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has none")


def grouped_by_fallback() -> torch.Tensor:
    rows, experts = (each.clone().requires_grad_() for each in (ROWS, EXPERTS))
    return torch.ops.transformers.grouped_mm_fallback(rows, experts, ENDS)


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (lambda: A @ B, 2 * 5 * 7 * 3),
        (lambda: torch.mm(A, B, out=torch.empty(5, 3)), 2 * 5 * 7 * 3),
        (lambda: torch.ones(5, 3).addmm_(A, B), 2 * 5 * 7 * 3),
        (lambda: torch.addmm(torch.ones(3), A, B), 2 * 5 * 7 * 3),
        (lambda: A.expand(4, 5, 7) @ B.expand(4, 7, 3), 4 * 2 * 5 * 7 * 3),
        (lambda: torch.baddbmm(torch.ones(3), A.expand(4, 5, 7), B.expand(4, 7, 3)), 4 * 2 * 5 * 7 * 3),
        (lambda: A @ V, 2 * 5 * 7),
        (lambda: V @ B, 2 * 7 * 3),
        (lambda: V @ V, 2 * 7),
        (lambda: torch.addmv(torch.ones(5), A, V), 2 * 5 * 7),
        pytest.param(lambda: F.grouped_mm(ROWS, EXPERTS, offs=ENDS), 2 * 8 * 16 * 32, marks=GROUPED),
        pytest.param(lambda: F.grouped_mm(ROWS.t(), ROWS, offs=ENDS), 2 * 8 * 16 * 16, marks=GROUPED),
        (lambda: torch.ops.transformers.grouped_mm_fallback(ROWS, EXPERTS, ENDS), 2 * 8 * 16 * 32),
        (lambda: grouped_by_fallback().sum().backward(), 3 * 2 * 8 * 16 * 32),
        (lambda: A * 2 + 1, 0),
        (lambda: torch.linalg.cholesky_ex(SPD), 72),
        (lambda: torch.linalg.cholesky(SPD.expand(4, 6, 6)), 4 * 72),
        (lambda: torch.cholesky_solve(torch.ones(6, 3), L), 2 * 36 * 3),
        (lambda: torch.linalg.solve_triangular(L, torch.ones(6, 3), upper=False), 36 * 3),
        (lambda: torch.linalg.solve_triangular(L, torch.ones(3, 6), upper=False, left=False), 36 * 3),
        (lambda: torch.linalg.solve(SPD, torch.ones(6)), 144 + 2 * 36),
        (lambda: torch.linalg.solve(SPD.expand(4, 6, 6), torch.ones(4, 6, 3)), 4 * (144 + 2 * 36 * 3)),
        (lambda: torch.linalg.solve_ex(SPD, torch.ones(6, 3)), 144 + 2 * 36 * 3),
    ],
)
def test_hand_counts(work: Callable[[], object], expected: int) -> None:
    assert count(work) == expected


def test_backward_of_a_linear() -> None:
    layer = torch.nn.Linear(7, 3)
    x = torch.ones(5, 7, requires_grad=True)
    # Forward, then the gradients of the weight and of the input.
    assert count(lambda: layer(x).sum().backward()) == 3 * (2 * 5 * 7 * 3)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_with_its_backward_is_torchs_own_count(causal: bool) -> None:
    q, k, v = (torch.randn(2, 3, 5, 4, requires_grad=True) for _ in range(3))

    def run() -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=causal).sum().backward()

    assert count(run) == 7 * (2 * 2 * 3 * 5 * 5 * 4)
    with (
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        FlopCounterMode(display=False) as torchs,
    ):
        F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    with FlopCounter() as ours:
        F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    assert ours.total == torchs.get_total_flops()


def test_grouped_queries_count_each_query_head() -> None:
    q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    with torch.no_grad():
        assert count(lambda: F.scaled_dot_product_attention(q, k, k, enable_gqa=True)) == 2 * (2 * 4 * 5 * 5 * 8)


def test_contexts_nest() -> None:
    with FlopCounter() as outer:
        A @ B
        with FlopCounter() as inner:
            A @ B
        A @ B
    assert inner.total == 210
    assert outer.total == 630


def test_kinds_are_told_apart_and_autograds_threads_with_them() -> None:
    x = torch.ones(5, 7, requires_grad=True)

    @kind("solving")
    def solve() -> None:
        A @ B
        with kind("sums"):
            A @ V
        A @ B

    with FlopCounter() as counter:
        y = x @ B
        solve()
        with kind("training"):
            y.sum().backward()
        A @ V
    assert counter.kinds == {"sweeps": 210 + 70, "sums": 70, "solving": 420, "training": 210, "writing": 0}
    assert counter.total == 980


def test_the_journal_adds_up(tmp_path: Path) -> None:
    for process in range(2):
        journal = Journal(tmp_path / "journal.jsonl")
        if not process:
            journal.append("start")
        with metered(journal, 0.0, Peaks(torch.device("cpu"))):
            A @ B
            journal.append("one")
            A @ B
            with kind("sums"):
                A @ B
            journal.append("two")
            A @ B  # lost
    assert [step["operations"] for step in journal.steps()] == 2 * [210, 420]
    assert totals(journal)["operations"] == 4 * 315
    assert totals(journal)["operations_by_kind"] == {
        "sweeps": 840,
        "sums": 420,
        "solving": 0,
        "training": 0,
        "writing": 0,
    }
    assert totals(journal)["seconds"] > 0


@pytest.mark.parametrize("name", TINY)
def test_a_streamed_forward_pass_is_what_the_shapes_say(name: str, tiny: Tiny, tmp_path: Path) -> None:
    device = torch.device("cpu")
    skeleton = open_skeleton(tiny(name), device, "float32")
    tokens = torch.arange(3 * 24).view(3, 24) % 40
    store = ActivationStore(tmp_path, (3, 24, skeleton.stream_width), skeleton.dtype, device, durable=False)
    sweep.embed(skeleton, tokens, store, "dense-0000-0", 2)
    with FlopCounter() as counter:
        for _ in sweep.forward(skeleton, store, "dense", 0, len(skeleton), 2):
            pass
        sweep.losses(skeleton, store, sweep.boundary("dense", len(skeleton)), tokens, 2)
    # What is left are rotary tables and, for one of them, a projection before the blocks.
    assert counter.total == pytest.approx(skeleton.forward_operations(3, 24), rel=0.02)


def test_a_job_says_what_it_took(tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny("llama")
    whole = configured(path, "whole")
    result = streamprune.prune(whole)
    report = json.loads((whole.out / "report.json").read_text())
    assert result.operations == report["operations"]
    forward = open_skeleton(path, torch.device("cpu"), "float32").forward_operations(12, 24)
    assert result.forward_equivalents == pytest.approx(result.operations / forward, abs=1e-4)
    # A survey of one forward and one backward pass, blocks seen once dense and twice pruned, and the solvers.
    assert 5 < result.forward_equivalents < 8
    assert 0 < report["seconds"] <= result.seconds
    # A job that was interrupted adds up; the finished result says the same again.
    config = configured(path, "resumed")
    interrupted(config, monkeypatch)
    again = streamprune.prune(config)
    assert again.resumed
    assert again.operations == result.operations
    assert streamprune.prune(config).operations == result.operations
    # Boundaries that are computed again are work too.
    force_boundaries(monkeypatch, 3)
    assert streamprune.prune(configured(path, "sparse")).operations > result.operations


def closed_form(config: Config, gradients: bool, survey: bool, measures: bool, dense: bool, aims: bool) -> float:
    """What the sweeps of one shot take: weights × tokens × passes, and attention's products over all pairs."""
    skeleton = open_skeleton(config.model, torch.device("cpu"), "float32")
    report = json.loads((config.out / "report.json").read_text())
    length = config.seq_len or 0
    tokens, total = config.samples * length, 0.0
    sites = skeleton.all_sites()
    for number, (site, told) in enumerate(zip(sites, report["sites"], strict=True)):
        *producers, consumer = (2 * weights for weights in site.linears)
        mixing = 4 * length * site.columns if site.kind == "attention" else 0
        forward = sum(producers) + consumer + mixing
        kept = told["kept"] / site.units
        aimed, last = aims and number > 0, number == len(sites) - 1
        total += forward * (survey + 2 * gradients) + 1.5 * mixing * gradients
        if measures and (kept < 1 or aimed):
            total += sum(producers) + mixing
        if dense and (aimed or not last):
            total += forward
        if (measures or dense) and not last:
            total += forward * kept
    head = 2 * 2 * skeleton.width * skeleton.vocabulary * config.samples * (length - 1)
    return total * tokens + head * gradients


@pytest.mark.parametrize(
    ("recipe", "settings", "shape"),
    [
        ("default", {}, (True, True, True, True, True)),
        ("default", {"weighted": "off", "compensate": "off", "target": "own"}, (False, True, True, False, False)),
        ("sobp", {}, (True, True, True, True, False)),
        ("slimgpt", {}, (False, False, True, False, False)),
        ("greedy-output", {}, (False, True, True, True, True)),
        ("surgeon", {"shots": "1"}, (True, True, False, False, False)),
        ("wanda-sp", {}, (False, False, True, False, False)),
        ("random", {}, (False, False, False, False, False)),
    ],
)
def test_no_pass_is_made_twice_and_the_forecast_knows(
    recipe: str, settings: dict[str, str], shape: tuple[bool, ...], tiny: Tiny, configured: Make
) -> None:
    # Enough heads for shares to be what was asked for.
    path = tiny("llama", num_attention_heads=8, num_key_value_heads=8, head_dim=4)
    config = configured(path, recipe=recipe, settings=settings, round_to=1)
    expected = streamprune.forecast_job(config)
    result = streamprune.prune(config)
    kinds = result.operations_by_kind
    # What is left are rotary tables.
    assert kinds["sweeps"] == pytest.approx(closed_form(config, *shape), rel=2e-3)
    assert result.sweeps_per_shot is not None
    assert result.sweeps_per_shot <= (8 if shape[0] else 4)
    assert sum(kinds.values()) == result.operations
    assert kinds["training"] == kinds["writing"] == 0
    # Which sites lose nothing, and are passed by, is known afterwards.
    for name in ("sweeps", "sums"):
        assert expected.operations_by_kind[name] == pytest.approx(kinds[name], rel=0.15)


@pytest.mark.parametrize("effort", ["normal", "high"])
def test_training_and_writing_are_kinds_of_their_own(effort: str, tiny: Tiny, configured: Make) -> None:
    path = tiny("llama", num_attention_heads=8, num_key_value_heads=8, head_dim=4, vocab_size=400)  # a head that counts
    changes = {"recipe": "wanda-sp", "samples": 3, "seq_len": 8, "round_to": 1}
    plain = streamprune.prune(configured(path, "plain", **changes)).operations_by_kind
    config = configured(path, "more", **changes, calibration="self", refine=4, effort=effort)
    expected = streamprune.forecast_job(config).operations_by_kind
    found = streamprune.prune(config).operations_by_kind
    # The dense stream and a refined block's own pass are sweeps.
    assert found["sweeps"] > plain["sweeps"]
    for name in ("training", "writing"):
        assert plain[name] == 0
        # Writing goes over no more keys than there are yet.
        assert 0.8 * expected[name] < found[name] < 1.1 * expected[name]


def test_a_recipe_without_text_computes_next_to_nothing(tiny: Tiny, configured: Make) -> None:
    result = streamprune.prune(configured(tiny("llama"), recipe="magnitude", seq_len=500))
    assert result.operations == result.forward_equivalents == 0


def test_a_stated_figure_stands_for_what_runs_inside() -> None:
    a = torch.ones(4, 4)
    with FlopCounter() as outer, FlopCounter() as inner:
        with counted(7):
            _ = a @ a
        _ = a @ a
    assert inner.total == outer.total == 7 + 2 * 4**3
    with counted(7):
        _ = a @ a


@pytest.mark.parametrize(("n", "width", "count", "block"), [(1500, 1, 256, 64), (960, 24, 30, 48)])
def test_greedy_removal_counts_what_it_does(
    n: int, width: int, count: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(n + 200, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p, v = torch.linalg.inv(x.T @ x).contiguous(), torch.eye(n, dtype=torch.float64)
    found = []
    for looking in (False, True):
        if looking:
            monkeypatch.setattr(greedy, "counted", lambda stated: nullcontext())
        with FlopCounter() as work:
            greedy.removal(p.clone(), v.clone(), width=width, count=count, block=block, place="here")
        found.append(work.total)
    assert found[0] == pytest.approx(found[1], rel=0.02)


def test_the_default_recipe_factors_each_gram_once(
    tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, sizes = refit.cholesky_, list[int]()

    def watched(a: torch.Tensor) -> bool:
        sizes.append(len(a))
        return real(a)

    path = tiny("llama")
    widths = {
        site.columns for site in open_skeleton(path, torch.device("cpu"), "float32").all_sites() if site.kind == "ffn"
    }
    (width,) = widths
    config = configured(path, recipe="default", ratio=0.3, settings={"fit_damping": "0.01"})
    monkeypatch.setattr(refit, "cholesky_", watched)
    result = streamprune.prune(config)
    report = json.loads((Path(result.out) / "report.json").read_text())
    ffn = [site for site in report["sites"] if site["site"].endswith("ffn")]
    assert all(site["kept"] < width for site in ffn)
    # For the costs of the survey, and for the target and what goes together; re-fitting factors what is left.
    assert sizes.count(width) == 2 * len(ffn)
