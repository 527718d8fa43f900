"""Whole jobs on the pretended device: nothing that a GPU would refuse, and the numbers of the CPU."""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import STRUCTURES, contents
from pretended import State, device
from pretended.tensor import loops
from safetensors.torch import load_file

import streamprune
from streamprune.commands.tune import lora
from streamprune.commands.tune import run as tuning
from streamprune.errors import DiskError
from streamprune.jobs.forecast import resources
from streamprune.jobs.forecast.memory import GramPlace
from streamprune.jobs.names import job_folder
from streamprune.model import block as model_block
from streamprune.model.block import Sublayer
from streamprune.recipes.registry import RECIPES
from streamprune.system import disk

Tiny = Callable[..., Path]
Make = Callable[..., streamprune.Config]
QUICK = {"default", "wanda-sp"}
TWO = {"num_hidden_layers": 2}
WHOLE = ("gpt2", "phi3", "gpt_oss", "deepseek_v3", "falcon-7b", "mixtral", "qwen3_5")
"""Structures through which a survey goes backward here."""
REAL = torch.cuda.is_available()


@pytest.fixture
def small(configured: Make, monkeypatch: pytest.MonkeyPatch) -> Make:
    """The `Config` of a job on two windows of 16 tokens, one per micro-batch, with whatever is changed; two per micro-batch if there are more."""

    def make(model: Path, out: str = "out", samples: int = 2, **changes: Any) -> streamprune.Config:
        monkeypatch.setitem(resources.BATCH_TOKENS, "cuda", 16 if samples == 2 else 32)
        return configured(model, out, **{"samples": samples, "seq_len": 16, "device": "cuda", **changes})

    return make


@contextmanager
def gpu() -> Iterator[State]:
    """The pretended device or, on a machine with one, a GPU, which fills no `State`."""
    with nullcontext(State(0, ())) if REAL else device() as state:
        yield state


def pruned(config: streamprune.Config) -> State:
    """Prune on the device; return what it saw."""
    with gpu() as state:
        streamprune.prune(config)
    report: dict[str, Any] = json.loads((config.out / "report.json").read_text(encoding="utf-8"))
    assert REAL or state.operations > 100
    assert report["peak_device_bytes"] > 0
    return state


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("recipe", [r if r in QUICK else pytest.param(r, marks=pytest.mark.slow) for r in RECIPES])
def test_every_recipe(recipe: str, tiny: Tiny, small: Make) -> None:
    changes: dict[str, Any] = {"recipe": recipe, "samples": 4}
    if recipe == "surgeon":
        changes |= {"settings": {"shots": "1"}}
    if recipe == "reap":
        changes |= {"experts": "0.25", "ratio": None}
    model = tiny("mixtral" if recipe == "reap" else "llama", **TWO)
    here = small(model, "cpu", **changes, device="cpu")
    streamprune.prune(here)
    config = small(model, **changes)
    pruned(config)
    ours, theirs = weights(config.out), weights(here.out)
    assert {name: each.shape for name, each in ours.items()} == {name: each.shape for name, each in theirs.items()}
    for name, each in ours.items():
        torch.testing.assert_close(each, theirs[name], rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        # Training goes backward through every structure, block by block and then all together; a survey, through whole models.
        *((name, {"recipe": "default", "refine": 1, "effort": "high"}) for name in STRUCTURES),
        *((name, {"recipe": "surgeon", "settings": {"shots": "1"}}) for name in WHOLE),
    ],
    ids=[*STRUCTURES, *(f"surgeon-{name}" for name in WHOLE)],
)
def test_every_structure(name: str, changes: dict[str, Any], tiny: Tiny, small: Make) -> None:
    config = small(tiny(name), samples=8, **changes)
    pruned(config)
    sites = json.loads((config.out / "report.json").read_text(encoding="utf-8"))["sites"]
    experts = [site.get("left_alone", False) for site in sites if site["site"].count(".") > 2]
    assert not experts or not all(experts)  # which see enough tokens


def test_a_shard_that_cannot_be_written_has_no_line(tiny: Tiny, small: Make) -> None:
    """It is written by a thread of its own, and the job resumes with the same bytes."""

    class Full(disk.Disk):
        def write(self, file: FileIO, data: memoryview) -> None:
            if threading.current_thread().name.startswith("behind"):
                raise OSError(errno.ENOSPC, "No space left on device")
            super().write(file, data)

    whole, stopped = (small(tiny("llama", **TWO), out, recipe="wanda-sp") for out in ("whole", "stopped"))
    pruned(whole)
    with gpu(), disk.using(Full()), pytest.raises(DiskError, match="No space left on device"):
        streamprune.prune(stopped)
    journal = (job_folder(stopped.out) / "journal.jsonl").read_text(encoding="utf-8")
    assert '"step": "shot-1/allocate"' in journal
    assert '"step": "shot-1/prune/' not in journal
    pruned(stopped)
    assert contents(stopped.out) == contents(whole.out)


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped products")
def test_experts_in_one_product(tiny: Tiny, small: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, forward and backward; the sums per expert, and weights that changed, are those of a job without it."""
    model, grouped = tiny("mixtral", torch.bfloat16, **TWO), list[int]()
    product = F.grouped_mm

    def counted(x: Any, weights: Any, **options: Any) -> Any:
        grouped.append(len(weights))
        return product(x, weights, **options)

    monkeypatch.setattr(F, "grouped_mm", counted)
    together, alone = (small(model, out, recipe="default", samples=12) for out in ("together", "alone"))
    pruned(together)
    # Each of 2 blocks takes its 6 micro-batches through 3 products in the 3 sweeps that run whole experts, at least.
    assert len(grouped) >= 2 * 6 * 3 * 3
    assert max(grouped) == 4
    grouped.clear()
    monkeypatch.setattr(model_block, "has_grouped_products", lambda device, dtype: False)
    pruned(alone)
    assert not grouped
    assert REAL or contents(together.out) == contents(alone.out)


def test_refinement_in_bfloat16(tiny: Tiny, small: Make) -> None:
    state = pruned(small(tiny("llama", torch.bfloat16, **TWO), effort=None, refine=4))
    # In 2 blocks 4 steps each wait for their loss and for their gradients; then 9 weights are copied.
    assert REAL or state.syncs["pruning/refine.py:refine"] == 2 * (4 * 2 + 9)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"activations": "float8", "memory_host": 1 << 12, "refine": 1}, id="float8"),
        pytest.param({"memory_host": 1 << 24}, marks=pytest.mark.slow, id="memory-host"),
        pytest.param({"recipe": "magnitude", "settings": {"structure": "2:4"}}, marks=pytest.mark.slow, id="2:4"),
        pytest.param(
            {"recipe": "surgeon", "settings": {"structure": "unstructured", "shots": "2"}},
            marks=pytest.mark.slow,
            id="unstructured",
        ),
        pytest.param({"calibration": "self"}, marks=pytest.mark.slow, id="self"),
        pytest.param({"calibration": "random-tokens"}, marks=pytest.mark.slow, id="random-tokens"),
        pytest.param({"layout": "uniform"}, marks=pytest.mark.slow, id="uniform"),
        pytest.param({"dtype": "float16"}, marks=pytest.mark.slow, id="float16"),
        pytest.param({"dtype": "float64"}, marks=pytest.mark.slow, id="float64"),
        pytest.param({"perplexity_at_most": 0.5, "ratio": None}, marks=pytest.mark.slow, id="perplexity"),
        pytest.param({"recipe": "greedy-output", "metric_samples": 2}, marks=pytest.mark.slow, id="greedy-output"),
    ],
)
def test_settings(changes: dict[str, Any], tiny: Tiny, small: Make) -> None:
    plain = {"recipe": "default", "effort": None if "refine" in changes else "low"}
    pruned(small(tiny("llama", **TWO), **{**plain, **changes}))


@pytest.mark.slow
@pytest.mark.parametrize("experts", ["3", "0.25:threshold"])
def test_whole_experts(experts: str, tiny: Tiny, small: Make) -> None:
    pruned(small(tiny("mixtral", **TWO), recipe="default", effort="high", ratio=None, experts=experts, samples=8))


@pytest.mark.parametrize(
    ("grams", "recipe"),
    [
        ("parked", "default"),
        pytest.param("host", "default", marks=pytest.mark.slow),
        pytest.param("host", "surgeon", marks=pytest.mark.slow),
    ],
)
def test_grams_on_the_host(
    grams: GramPlace, recipe: str, tiny: Tiny, small: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "GRAM_PLACES", (grams,))
    settings = {"shots": "1"} if recipe == "surgeon" else {}
    config = small(tiny("llama", **TWO), recipe=recipe, settings=settings)
    with gpu():
        assert streamprune.forecast_job(config).grams == grams
    pruned(config)


def test_evaluate_bench_and_report(tiny: Tiny, text: Path, small: Make, tmp_path: Path) -> None:
    model = tiny("llama", **TWO)
    here = streamprune.evaluate(model, text, seq_len=24, device="cpu")
    with gpu() as state:
        found = streamprune.evaluate(model, text, seq_len=24, device="cuda")
        streamprune.bench(model, prompt_tokens=4, new_tokens=2, repetitions=1, device="cuda")
    assert found.perplexity == pytest.approx(here.perplexity, rel=1e-4)
    assert set(state.syncs) <= {"model/outside.py:arguments"}
    config = small(model)
    with gpu():
        streamprune.prune(config)
        streamprune.report(
            config.out,
            html=tmp_path / "page.html",
            text=text,
            against=model,
            device="cuda",
            prompts=("abc def",),
            tokens=3,
        )
    assert (tmp_path / "page.html").is_file()


@pytest.mark.slow
def test_compare(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    with gpu():
        streamprune.compare(
            tiny("llama", **TWO),
            ratios=[0.3],
            recipes=["sobp", "magnitude"],
            text=text,
            eval_seq_len=24,
            out=tmp_path / "out",
            calibration=text,
            samples=2,
            seq_len=16,
            round_to=4,
            device="cuda",
        )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["distil", "lora"])
def test_tune(method: str, tiny: Tiny, text: Path, small: Make, tmp_path: Path) -> None:
    if method == "lora" and not lora.installed():
        pytest.skip("peft is not installed")
    model = tiny("llama", **TWO)
    config = small(model, "pruned", device="cpu", recipe="magnitude")
    streamprune.prune(config)
    changes = {"teacher": model} if method == "distil" else {}
    with gpu():
        streamprune.tune(
            streamprune.TuneConfig(
                model=config.out, out=tmp_path / "out", text=text, samples=2, seq_len=16, steps=2, rank=2, method=method,
                device="cuda", **changes,
            )
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(REAL, reason="a GPU counts nothing")
@pytest.mark.skipif(not lora.installed(), reason="peft is not installed")
def test_tuning_waits_for_the_loss_once_per_step(
    tiny: Tiny, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many micro-batches it has. transformers' masks wait once per forward pass."""
    found = []
    for size in (1, 4):
        monkeypatch.setattr(tuning, "training_batch", lambda memory, limit, size=size: size)
        config = streamprune.TuneConfig(
            model=tiny("llama", **TWO), out=tmp_path / f"{size}", text=text, samples=4, seq_len=16, steps=2, rank=2,
            batch=4, method="lora", device="cuda",
        )  # fmt: skip
        with gpu() as state:
            streamprune.tune(config)
        found.append(state.syncs["commands/tune/lora.py:train"])
    assert found[0] - found[1] == 2 * (4 - 1)


@pytest.mark.skipif(REAL, reason="a GPU counts nothing")
def test_the_tokens_of_all_experts_take_one_wait(tiny: Tiny, small: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    passes, mix = 0, Sublayer.mix

    def counted(self: Sublayer, *given: Any, **named: Any) -> Any:
        nonlocal passes
        passes += self.entry.experts is not None and loops.depth > 0
        return mix(self, *given, **named)

    monkeypatch.setattr(Sublayer, "mix", counted)
    state = pruned(small(tiny("mixtral", **TWO), effort="low", recipe="sobp"))
    assert state.syncs["model/block.py:_routed"] == passes > 0
