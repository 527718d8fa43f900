"""Low-rank corrections, compared with full autograd and across kills."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from conftest import STRUCTURES, contents
from safetensors.torch import load_file, save_file
from stopping import interrupted
from transformers import AutoModelForCausalLM

import streamprune
from streamprune.jobs.journal import Journal
from streamprune.jobs.names import JOURNAL
from streamprune.maths.descent import normalised, seeded
from streamprune.model.skeleton import open_skeleton
from streamprune.model.tokenizer import IGNORED
from streamprune.pruning import request
from streamprune.pruning.correct import Corrector
from streamprune.pruning.job import Job
from streamprune.pruning.refine import Refinement
from streamprune.stream import sweep
from streamprune.stream.store import ActivationStore
from streamprune.system.progress import Callback
from streamprune.text.windows import Windows

Make = Callable[..., streamprune.Config]
Tiny = Callable[..., Path]


def changed(path: Path, out: Path) -> Path:
    """Copy a checkpoint with other weights in its blocks."""
    shutil.copytree(path, out)
    for file in out.glob("*.safetensors"):
        tensors, generator = load_file(file), torch.Generator().manual_seed(2)
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and tensor.dim() >= 2 and re.search(r"\.\d+\.", name):
                tensor += 0.02 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        save_file(tensors, file, metadata={"format": "pt"})
    return out


def even(gradient: torch.Tensor) -> torch.Tensor:
    """A gradient with rows, then columns, of a mean square of 1."""
    for row in gradient:
        row /= row.square().mean().sqrt() if row.any() else 1
    for column in gradient.T:
        column /= column.square().mean().sqrt() if column.any() else 1
    return gradient


def plain(
    path: Path, windows: Windows, corrector: Corrector, how: Refinement, dense: Path | None = None
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Take the same steps on the whole model in memory; return each trained parameter by its full name, and the losses.

    At low rank, these are the weights of linears, (out, in).
    """
    tokens, losses = windows.tokens, []
    teacher = None if dense is None else reference.load(dense)
    epochs = [torch.randperm(len(tokens), generator=seeded(how.seed, number)) for number in range(8)]
    model = reference.load(path)
    model.requires_grad_(False)
    skeleton = corrector.skeleton
    updates: dict[str, torch.nn.Parameter] = {}
    for index in range(len(skeleton)):
        descent = corrector.descent(0, index, skeleton.build_block(index, skeleton.read_block(index)))
        assert descent is not None
        updates |= {f"{skeleton.architecture.blocks}.{index}.{name}": each for name, each in descent.weights.items()}
    if how.rank is None:
        updates = {name: model.get_parameter(name).requires_grad_() for name in updates}
    names = [name[:-2] for name in updates if name.endswith(".u")]
    base = {name: reference.weight_of(model.get_submodule(name)).detach().clone() for name in names}

    def weights() -> dict[str, torch.Tensor]:
        return {name: base[name] + updates[f"{name}.u"] @ updates[f"{name}.v"] for name in names}

    sizes = dict.fromkeys(updates, 1.0)
    if how.rank is None:
        for index in range(len(skeleton)):
            own = [name for name in updates if name.startswith(f"{skeleton.architecture.blocks}.{index}.")]
            entries = torch.cat([updates[name].detach().flatten() for name in own])
            sizes |= dict.fromkeys(own, float(entries.square().mean() / skeleton.width) ** 0.5)

    optimiser = torch.optim.Adam(updates.values(), lr=how.rate, betas=(0.9, 0.95))
    for step in range(how.steps):
        rate = how.rate * (1 - step / how.steps)
        generator = torch.Generator().manual_seed(how.seed * 1_000_003 + step)
        chosen = torch.randperm(len(tokens), generator=generator)[:8]
        if teacher is not None:
            chosen = torch.cat(epochs)[step * how.sequences :][: how.sequences]
        rows = tokens[chosen]
        turned = {name: type(model.get_submodule(name)).__name__ == "Conv1D" for name in names}
        changed = {f"{name}.weight": w.T if turned[name] else w for name, w in weights().items()}
        logits = torch.func.functional_call(model, changed, (rows,)).logits
        labels = windows.labels[chosen]
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        if teacher is not None:
            with torch.no_grad():
                p = teacher(rows).logits.log_softmax(-1)
            each = F.kl_div(logits.log_softmax(-1), p, log_target=True, reduction="none").sum(-1)
            counts = labels.roll(-1, dims=1) != IGNORED  # the last token: if the first counts, and so all do
            loss = each[counts].mean()
        losses.append(float(loss.detach()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.param_groups[0]["lr"] = rate
        if how.rank is not None:
            optimiser.step()
            continue
        for name, parameter in updates.items():
            if parameter.grad is not None and parameter.grad.any():
                parameter.data -= rate * sizes[name] * even(parameter.grad)
    return {name: each.detach() for name, each in (weights() if names else updates).items()}, losses


@pytest.mark.usefixtures("float64_norms")
@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("imitates", [False, True])
def test_steps_are_those_of_full_autograd(name: str, imitates: bool, tiny: Tiny, tmp_path: Path) -> None:
    path = tiny(name, torch.float64)
    skeleton = open_skeleton(path, torch.device("cpu"), "float64")
    tokens = torch.randint(skeleton.vocabulary, (11, 12), generator=torch.Generator().manual_seed(5))
    how = Refinement(3, seed=3, batch=3, rate=1e-2, rank=2, sequences=8)
    if imitates:
        how = replace(how, rate=0.05, rank=None, sequences=4)
    other = changed(path, tmp_path / "dense") if imitates else None
    dense = None if other is None else open_skeleton(other, torch.device("cpu"), "float64")
    windows = Windows(tokens, tokens.clone())
    windows.labels[1::2, :4] = IGNORED
    corrector = Corrector(skeleton, windows, tmp_path / "work", how, range(len(skeleton)), {}, dense)
    steps = list(corrector.steps(0))
    assert [step for step, *_ in steps] == [0, 1, 2]
    expected, losses = plain(path, windows, corrector, how, other)
    assert [loss for *_, loss in steps] == (pytest.approx(losses, rel=1e-6) if imitates else [None] * 3)
    for index in range(len(skeleton)):
        block = skeleton.build_block(index, skeleton.read_block(index))
        place, before = f"{skeleton.architecture.blocks}.{index}", dict(block.weights)
        corrector.absorb(block, index)
        own = {name.removeprefix(f"{place}.") for name in expected if name.startswith(f"{place}.")}
        if imitates:
            routers = tuple(f"{each.entry.router}." for each in block.sublayers if each.entry.router)
            assert own == {name for name in before if before[name].dim() == 2 and not name.startswith(routers)}
            for inner in own:
                torch.testing.assert_close(block.weights[inner], expected[f"{place}.{inner}"], rtol=1e-6, atol=1e-9)
        else:
            own = {f"{name}.weight" for name in own}
            for sub in block.prunables:
                for inner in (*sub.producers, sub.consumer):
                    torch.testing.assert_close(sub.weight(inner), expected[f"{place}.{inner}"], rtol=1e-6, atol=1e-9)
                    change = block.weights[f"{inner}.weight"] - before[f"{inner}.weight"]
                    assert torch.linalg.matrix_rank(change, rtol=1e-8) == 2
        for inner in before.keys() - own:
            assert torch.equal(block.weights[inner], before[inner])


def test_a_normalised_gradient_has_even_rows_and_columns_and_keeps_what_is_zero() -> None:
    gradient = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradient[1] *= 1e-6
    gradient[3], gradient[:, 2] = 0, 0
    found = normalised(gradient)
    assert not found[3].any()
    assert not found[:, 2].any()
    torch.testing.assert_close(found.square().mean(0)[[0, 1, 3, 4, 5, 6]], torch.ones(6, dtype=torch.float64))
    rows = found.square().mean(1)[[0, 1, 2, 4]]
    assert float(rows.max() / rows.min()) < 3
    assert torch.equal(found.sign(), gradient.sign())
    torch.testing.assert_close(normalised(gradient.float() * 1e-30).double(), found, rtol=1e-4, atol=1e-5)


def test_blocks_outside_the_window_stay_as_they_are(tiny: Tiny, configured: Make) -> None:
    path = tiny("llama")
    settings = {"shots": "2", "lora_steps": "2"}
    config = configured(path, recipe="surgeon", ratio=0.1, settings=settings, blocks=(1, 2))
    streamprune.prune(config)
    before, after = (dict(streamprune.load(each).named_parameters()) for each in (path, config.out))
    changed = {name.split(".")[2] for name in after if not torch.equal(before[name], after[name]) and "layers" in name}
    assert changed == {"1"}


@pytest.mark.parametrize(
    "given",
    [
        {"recipe": "surgeon", "settings": {"structure": "2:4", "shots": "2", "lora_steps": "2"}},
        {"recipe": "magnitude", "settings": {"structure": "2:4"}, "effort": "high", "refine": 0, "samples": 3},
    ],
)
def test_zeros_stay_zero(given: dict[str, Any], tiny: Tiny, configured: Make) -> None:
    config = configured(tiny("llama"), ratio=0.5, **given)
    streamprune.prune(config)
    model = streamprune.load(config.out)
    for name, parameter in model.named_parameters():
        if "proj" in name:
            assert bool(((parameter.view(-1, 4) == 0).sum(dim=1) == 2).all()), name


def losses_of(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A list to which every step towards the dense model's predictions adds its loss from now on."""
    losses, real = list[float](), sweep.imitation_gradient

    def watched(*arguments: Any) -> float:
        losses.append(real(*arguments))
        return losses[-1]

    monkeypatch.setattr(sweep, "imitation_gradient", watched)
    return losses


def test_gradients_of_the_predictions_stay_within_float16(tiny: Tiny, tmp_path: Path) -> None:
    """Those of a mean over many tokens do not."""
    path, found = tiny("llama", torch.float32), list[torch.Tensor]()
    for dtype in ("float32", "float16"):
        skeleton = open_skeleton(path, torch.device("cpu"), dtype)
        shape, last = (32, 2048, skeleton.stream_width), len(skeleton)
        generator = torch.Generator().manual_seed(0)
        given, noise = (torch.randn(shape, generator=generator).to(skeleton.dtype) for _ in range(2))
        store = ActivationStore(tmp_path / dtype, shape, skeleton.dtype, skeleton.device, durable=False)
        with store.writing(sweep.boundary("dense", last), "here") as write:
            write(given)
        sweep.imitation_gradient(
            skeleton, store, iter([given + noise / 16]), 32, torch.ones(32, 2048, dtype=torch.bool)
        )
        ((_, (gradient,)),) = store.each(32, sweep.boundary("gradient", last))
        found.append(gradient.float())
    assert float((found[1] - found[0]).norm() / found[0].norm()) < 0.02


@pytest.mark.parametrize(
    "given",
    [
        {"recipe": "magnitude", "refine": 0},  # reads text for this alone
        {"recipe": "default", "settings": {"shots": "2"}},  # only the last shot's
        {"recipe": "magnitude", "settings": {"structure": "2:4"}, "ratio": 0.5},
        {"recipe": "default", "perplexity_at_most": 0.9, "ratio": None},
        {"dtype": "float16"},
        {"blocks": (1, 2), "ratio": 0.1},
    ],
)
def test_the_predictions_approach_those_of_the_dense_model(
    given: dict[str, Any], tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = losses_of(monkeypatch)
    config = configured(tiny("llama"), effort="high", **given)
    streamprune.prune(config)
    assert len(losses) == 24  # of a window, which are 12
    assert sum(losses[12:]) < sum(losses[:12])
    assert json.loads((config.out / "report.json").read_text())["imitation"] == [
        sum(losses[:2]) / 2,
        sum(losses[-2:]) / 2,
    ]


def test_a_step_of_a_large_model_takes_more_windows(
    tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(tiny("llama"), effort="high")
    size = Job(config, None).skeleton.block_parameters()
    for limit, sequences, steps in ((size, 1, 24), (size - 1, 4, 6)):
        monkeypatch.setattr(request, "IMITATION_SMALL", limit)
        job = Job(config, None)
        how = job.request.correction(1)
        assert how is not None
        assert (how.sequences, how.steps) == (sequences, steps)
        assert (job.request.workload.correction_sequences, job.request.workload.corrects) == (sequences, steps)
    losses = losses_of(monkeypatch)
    streamprune.prune(config)
    assert len(losses) == 6


def passages(windows: Windows) -> list[set[tuple[int, ...]]]:
    """The runs of 12 tokens of each window."""
    return [{tuple(row[i : i + 12]) for i in range(len(row) - 11)} for row in windows.tokens.tolist()]


def test_all_blocks_are_trained_on_windows_that_were_not_calibrated_on(
    tiny: Tiny, configured: Make, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, real = list[Windows](), Corrector.__init__

    def watched(self: Corrector, skeleton: Any, windows: Windows, *rest: Any) -> None:
        given.append(windows)
        real(self, skeleton, windows, *rest)

    monkeypatch.setattr(Corrector, "__init__", watched)
    config = configured(tiny("llama"), effort="high")
    streamprune.prune(config)
    job = Job(replace(config, out=tmp_path / "again"), None)
    assert torch.equal(given[0].tokens, job.other_windows.tokens)
    used, trained = set[tuple[int, ...]]().union(*passages(job.windows)), passages(job.other_windows)
    assert len(trained) == 24
    assert all(len(each & used) <= len(each) / 8 for each in trained)
    # A text of hardly more than one window has no other ones.
    short, said = tmp_path / "short.txt", list[str]()
    short.write_text(text.read_text()[:40])
    listener = Callback(lambda event: said.append(event.message))
    job = Job(configured(tiny("llama"), effort="high", calibration=short), listener)
    assert torch.equal(job.other_windows.tokens, job.windows.tokens)
    assert any("12 of the 12 windows for training all blocks together" in message for message in said)


def test_experts_of_a_stock_checkpoint_stay_fused(tiny: Tiny, configured: Make) -> None:
    config = configured(tiny("gpt_oss"), recipe="default", effort="high", ratio=None, experts="3", samples=3)
    streamprune.prune(config)
    names = {name for file in config.out.glob("*.safetensors") for name in load_file(file)}
    assert "model.layers.0.mlp.experts.gate_up_proj" in names
    AutoModelForCausalLM.from_pretrained(config.out)


SURGEON = {"recipe": "surgeon", "settings": {"shots": "2", "lora_steps": "3"}}


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        *(pytest.param(SURGEON, steps, marks=pytest.mark.slow) for steps in (1, 9, 17, 24, 30)),
        ({"effort": "high", "samples": 3}, 16),
        pytest.param(
            {"effort": "high", "recipe": "default", "perplexity_at_most": 0.9, "ratio": None, "samples": 3},
            20,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_an_interrupted_correction_ends_with_the_same_bytes(
    given: dict[str, Any], steps: int, tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(tiny("llama"), **given)
    whole = replace(config, out=config.out.with_name("whole"))
    streamprune.prune(whole)
    interrupted(config, monkeypatch, steps)
    (journal,) = config.out.parent.glob(f"*{config.out.name}*/{JOURNAL}")
    done = len(list(Journal(journal, repair=False).steps("shot-1/correct/")))
    taken = losses_of(monkeypatch)
    streamprune.prune(config)
    assert contents(config.out) == contents(whole.out)
    if "effort" in given:
        assert 0 < done < 6
        assert len(taken) == 6 - done  # no step is taken again
    assert json.loads((config.out / "report.json").read_text())["shots"] == (1 if "effort" in given else 2)
