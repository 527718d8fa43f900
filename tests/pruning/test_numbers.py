"""NaN and Inf, planted wherever they can arise, give one line that names the block, exit code 1, and no OUT."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner, Result
from conftest import edit_tensors, make_tiny
from streamprune_cli import main
from torch import Tensor, nn

from streamprune.commands.tune import lora
from streamprune.errors import NumericalError
from streamprune.maths.descent import Descent
from streamprune.maths.refit import output_error
from streamprune.maths.sampling import sample
from streamprune.maths.slimgpt import batched_group_removal, dynamic_group_removal
from streamprune.maths.sums import Gram, HeadDivergence, MaskGradient
from streamprune.model.block import Sublayer
from streamprune.model.skeleton import Skeleton
from streamprune.pruning import block, refine
from streamprune.recipes import masks, obs, surgeon
from streamprune.recipes.obs import best
from streamprune.recipes.registry import RECIPES
from streamprune.stream import sweep

CPU = torch.device("cpu")
MEASURING = ["default", "sobp", "slimgpt", "greedy-output", "surgeon", "wanda-sp"]
"""Recipes that read text."""
SETTINGS = {"surgeon": ["--set", "shots=1"]}
Run = Callable[..., Result]
Hook = Callable[[Tensor], Tensor]
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks, an untied head, biases."""
    return make_tiny(tmp_path_factory.mktemp("model"), "llama-biased", num_hidden_layers=2)


@pytest.fixture
def run(model: Path, text: Path, tmp_path: Path) -> Run:
    """A small `streamprune run`."""

    def invoke(recipe: str, *more: str, source: Path = model, calibration: str = str(text)) -> Result:
        arguments = ["run", str(source), str(tmp_path / "out"), "--calibration", calibration, "--recipe", recipe]
        arguments += ["--ratio", "0.3", "--samples", "4", "--seq-len", "24", "--round-to", "1", "--restart"]
        return CliRunner().invoke(main, [*arguments, *SETTINGS.get(recipe, []), *more])

    return invoke


def stopped(result: Result, folder: Path, *words: str) -> None:
    """Check for one line on stderr with all `words`, exit code 1, no traceback, and nothing in OUT."""
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    lines = [line for line in result.stderr.splitlines() if line.startswith("streamprune: ")]
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0], lines[0]
    assert "Traceback" not in result.output
    assert not (folder / "out").exists()


def planted(x: Tensor, value: float) -> Tensor:
    """Return a copy of `x` with one number replaced."""
    copy = x.detach().clone(memory_format=torch.contiguous_format)
    copy.view(-1)[copy.numel() // 2] = value
    return copy


def changed(folder: Path, name: str, value: float, dtype: torch.dtype = torch.float32) -> Path:
    """Make a tiny checkpoint with one number of one tensor replaced."""
    make_tiny(folder, "llama-biased", dtype, num_hidden_layers=2)

    def change(tensors: dict[str, Tensor]) -> None:
        if name in tensors:
            tensors[name] = planted(tensors[name], value)

    edit_tensors(folder, change)
    return folder


def plant_at(monkeypatch: pytest.MonkeyPatch, method: str, place: str, value: float) -> None:
    """Make a method of one sublayer return `value` among its numbers."""
    real = getattr(Sublayer, method)

    def call(self: Sublayer, *arguments: Any) -> Any:
        found = real(self, *arguments)
        return planted(found, value) if self.name == place else found

    monkeypatch.setattr(Sublayer, method, call)


# Activations and gradients.


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("method", ["normed", "consume"])
@pytest.mark.parametrize("recipe", MEASURING)
def test_activations(
    recipe: str, method: str, value: float, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_at(monkeypatch, method, "blocks.1.attention", value)
    result = run(recipe)
    stopped(result, tmp_path, "NaN or Inf")
    assert "block 1 gives" in result.stderr or "blocks.1.attention" in result.stderr


@pytest.mark.parametrize("recipe", ["default", "sobp", "surgeon"])
def test_gradients(recipe: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Sublayer.consume

    def consume(self: Sublayer, mixed: Any) -> Tensor:
        o = real(self, mixed)
        if o.requires_grad and self.name == "blocks.1.ffn":
            o.register_hook(lambda gradient: planted(gradient, torch.inf))
        return o

    monkeypatch.setattr(Sublayer, "consume", consume)
    stopped(run(recipe), tmp_path, "the gradient of block 1 gives NaN or Inf")


def test_the_heads_gradient_and_what_it_draws(run: Run, tmp_path: Path) -> None:
    # Finite weights with logits that are not finite.
    path = changed(tmp_path / "model", "lm_head.weight", 3e38)
    edit_tensors(path, lambda tensors: [t.fill_(100) for name, t in tensors.items() if name == "model.norm.weight"])
    stopped(run("sobp", source=path), tmp_path, "the head's gradient gives NaN or Inf")
    stopped(run("default", source=path), tmp_path, "the head gives NaN or Inf")
    stopped(run("wanda-sp", calibration="self", source=path), tmp_path, "the head gives NaN or Inf")


def test_a_draw_from_what_is_no_distribution() -> None:
    for value in (torch.nan, torch.inf):
        logits = torch.zeros(3, 5, dtype=torch.float16)
        logits[1, 2] = value
        with pytest.raises(NumericalError, match="the head gives NaN or Inf; float16 ends at 65504"):
            sample(logits, torch.full((3,), 0.5, dtype=torch.float64))


# Sums.


@pytest.mark.slow
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("recipe", MEASURING)
def test_every_gram_of_a_job(
    recipe: str, value: float, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Feed one bad number to each Gram in turn and to nothing else; then to each of the cross sums."""
    make, add = Gram.__init__, Gram.add
    made: list[Gram] = []
    bad: tuple[int, bool] | None = None

    def numbering(self: Gram, *arguments: Any, **options: Any) -> None:
        make(self, *arguments, **options)
        made.append(self)

    def feeding(self: Gram, x: Tensor, y: Tensor | None = None, **options: Any) -> None:
        if bad is not None and len(made) > bad[0] and made[bad[0]] is self:
            x, y = (x, planted(y, value)) if bad[1] and y is not None else (planted(x, value), y)
        add(self, x, y, **options)

    monkeypatch.setattr(Gram, "__init__", numbering)
    monkeypatch.setattr(Gram, "add", feeding)
    path = make_tiny(tmp_path / "one", "llama-biased", num_hidden_layers=1)
    assert run(recipe, source=path).exit_code == 0
    shutil.rmtree(tmp_path / "out")
    crossed = [number for number, each in enumerate(made) if each.c is not None and value != 1e30]
    assert len(made) >= {"slimgpt": 2, "wanda-sp": 2, "sobp": 2, "greedy-output": 4}.get(recipe, 5)
    for number, cross in [(number, False) for number in range(len(made))] + [(number, True) for number in crossed]:
        bad, made = (number, cross), []
        stopped(run(recipe, source=path), tmp_path, "blocks.0.", "the Gram holds NaN or Inf")


def test_mask_gradients_and_attention_maps(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    masks_add, maps_add = MaskGradient.add, HeadDivergence.add
    monkeypatch.setattr(MaskGradient, "add", lambda self, x, g, *more: masks_add(self, x, planted(g, torch.inf), *more))
    monkeypatch.setattr(HeadDivergence, "add", lambda self, maps: maps_add(self, planted(maps, torch.nan)))
    stopped(run("sobp"), tmp_path, "block 1: the survey's attention.importance is NaN or Inf")
    stopped(run("greedy-output"), tmp_path, "block 0: the survey's attention.divergence is NaN or Inf")


@pytest.mark.parametrize("recipe", ["default", "sobp", "surgeon", "greedy-output"])
def test_findings(recipe: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = RECIPES[recipe].digest

    def digest(self: Any, surveyed: Any) -> dict[str, Tensor]:
        return {name: planted(each, torch.nan) for name, each in real(self, surveyed).items()}

    monkeypatch.setattr(RECIPES[recipe], "digest", digest)
    stopped(run(recipe), tmp_path, "the survey's", "is NaN or Inf")


# Weights, scores and solutions.


@pytest.mark.parametrize("recipe", [*MEASURING, "magnitude", "random"])
def test_weights(recipe: str, run: Run, tmp_path: Path) -> None:
    path = changed(tmp_path / "model", UP, torch.nan)
    stopped(run(recipe, source=path), tmp_path, f"tensor '{UP}' holds NaN or Inf")


def test_weights_beyond_the_computing_dtype(run: Run, tmp_path: Path) -> None:
    path = changed(tmp_path / "model", UP, 1e30, torch.bfloat16)
    words = f"tensor '{UP}' holds more than 65504, where float16 ends, which is computed in; float16 ends at 65504, and --dtype"
    stopped(run("slimgpt", "--dtype", "float16", source=path), tmp_path, words)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ((), "the units' scores hold NaN or Inf"),
        (("--set", "structure=2:4"), "the weights' costs hold NaN or Inf"),
        (("--set", "structure=unstructured"), "the weights' costs hold NaN or Inf"),
    ],
)
def test_scores_that_overflow(more: tuple[str, ...], words: str, run: Run, tmp_path: Path) -> None:
    path = changed(tmp_path / "model", UP, 1e25)
    stopped(run("magnitude", *more, source=path), tmp_path, f"blocks.1.ffn: {words}")


def test_a_score_of_nan_is_not_the_highest() -> None:
    for value in (torch.nan, torch.inf):
        with pytest.raises(NumericalError, match=r"blocks\.3\.ffn: the units' scores"):
            best(torch.tensor([1.0, value, 2.0]), 1, "blocks.3.ffn")
    assert best(torch.tensor([1.0, -torch.inf, 2.0]), 1, "here").tolist() == [2]
    for value in (torch.nan, -torch.nan, torch.inf):
        costs = torch.tensor([[1.0, 2.0, value, 4.0]])
        for structure in ("unstructured", "2:4"):
            with pytest.raises(NumericalError, match=r"blocks\.3\.ffn: the weights' costs"):
                masks.mask(costs, 2, structure, "blocks.3.ffn")
            with pytest.raises(NumericalError, match=r"blocks\.3\.ffn: the weights' costs"):
                masks.histograms([costs], structure, "blocks.3.ffn")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_batched_removal_of_weights_that_cannot_be_squared(value: float) -> None:
    w, h = torch.ones(3, 8), torch.eye(8)
    w[1, 5] = value
    with pytest.raises(NumericalError, match=r"blocks\.3\.ffn: the weights hold NaN or Inf"):
        dynamic_group_removal(w, h, count=2, damping=0.01, place="blocks.3.ffn", last=1)
    with pytest.raises(NumericalError, match=r"blocks\.3\.ffn: the weights hold NaN or Inf"):
        batched_group_removal(w, h, width=2, count=1, damping=0.01, place="blocks.3.ffn")


@pytest.mark.parametrize(
    ("recipe", "module", "name", "words"),
    [
        ("default", block, "fit", "blocks.0.ffn: the fit to the target is not finite"),
        ("greedy-output", block, "fit", "blocks.0.ffn: the fit to the target is not finite"),
        ("sobp", block, "compensation", ": the new weights of mlp.gate_proj are not finite"),
        ("sobp", obs, "refit_as_stored", ".ffn: the new weights of mlp.down_proj are not finite"),
        ("slimgpt", obs, "refit_as_stored", "are not finite in their stored dtype"),
        ("surgeon", surgeon.Surgeon, "_updated", "are not finite in their stored dtype"),
    ],
)
def test_solutions(
    recipe: str, module: Any, name: str, words: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(module, name)

    def solve(*arguments: Any) -> Any:
        found = real(*arguments)
        return (planted(found[0], torch.inf), *found[1:]) if isinstance(found, tuple) else planted(found, torch.inf)

    monkeypatch.setattr(module, name, solve)
    stopped(run(recipe), tmp_path, words)


def test_an_error_that_is_no_number_is_not_told_as_none() -> None:
    w, h = torch.tensor([[1e15, -1e15]] * 2), torch.full((2, 2), 1e30)  # infinity less infinity
    assert output_error(w, h, w / 2, torch.tensor([0, 1])) != 0.0


# Training.


def rootless(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same loss, but its gradient is NaN."""

    def call(y: Tensor, target: Tensor, **options: Any) -> Tensor:
        return loss(y, target, **options) + (y.sum() * 0).abs().sqrt() * 0

    return call


@contextmanager
def lossless(skeleton: Skeleton, index: int) -> Iterator[Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """A block's loss in refinement that is zero, but whose gradient is NaN."""
    yield lambda output, target, counts: (torch.zeros(()), torch.full_like(output, torch.nan))


def test_a_gradient_that_is_no_number(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refine, "_loss", lossless)
    words = ("block 0: the gradient of ", "holds NaN or Inf at step 0")
    stopped(run("magnitude", "--refine", "3"), tmp_path, *words)


@pytest.mark.parametrize("method", ["distil", "lora"])
def test_tuning(method: str, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if method == "lora" and not lora.installed():
        pytest.skip("peft is not installed")

    def tune(source: Path = model) -> Result:
        arguments = ["tune", str(source), str(tmp_path / "out"), "--text", str(text), "--method", method]
        arguments += ["--samples", "4", "--seq-len", "16", "--steps", "3", "--restart"]
        return CliRunner().invoke(main, [*arguments, *(["--teacher", str(model)] if method == "distil" else [])])

    with monkeypatch.context() as patch:
        patch.setattr(refine, "_loss", lossless)
        patch.setattr(F, "cross_entropy", rootless(F.cross_entropy))
        place = "block 0" if method == "distil" else "lora"
        stopped(tune(), tmp_path, f"{place}: the gradient of ", "holds NaN or Inf at step 0")
    # Finite weights with activations that are not finite.
    path = changed(tmp_path / "model", "model.layers.1.post_attention_layernorm.weight", 3e38)
    edit_tensors(path, lambda tensors: [t.mul_(1e5) for name, t in tensors.items() if name == UP])
    stopped(tune(path), tmp_path, "block 1", "NaN or Inf" if method == "lora" else "the refinement's loss is")


def test_steps_name_the_weight_whose_gradient_is_no_number() -> None:
    weights = {name: nn.Parameter(torch.ones(2)) for name in ("one.u", "two.v")}
    descent = Descent(weights, steps=4, rate=0.1, place="block 3")
    for weight in weights.values():
        weight.grad = torch.full((2,), 3e38)  # whose sum overflows, which is no fault
    descent.step()
    weights["one.u"].grad = torch.zeros(2)
    weights["two.v"].grad = torch.tensor([1.0, torch.nan])
    with pytest.raises(NumericalError, match=r"block 3: the gradient of two\.v holds NaN or Inf at step 1"):
        descent.step()
    assert descent.done == 1


# Measuring.


def test_evaluation(model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate(source: Path, *more: str) -> Result:
        return CliRunner().invoke(main, ["eval", str(source), "--text", str(text), "--seq-len", "24", *more])

    with monkeypatch.context() as patch:
        plant_at(patch, "consume", "blocks.1.ffn", torch.nan)
        stopped(evaluate(model), tmp_path, "block 1 gives NaN or Inf")
    for name, place in (("model.embed_tokens.weight", "the embedding"), ("model.norm.weight", "the head")):
        path = make_tiny(tmp_path / place, "llama-biased")
        edit_tensors(path, lambda tensors, name=name: [t.fill_(torch.nan) for n, t in tensors.items() if n == name])
        stopped(evaluate(path), tmp_path, f"{place} gives NaN or Inf")
    # The values overflow float16 but not the other dtypes.
    path = changed(tmp_path / "model", UP, 6e4, torch.float16)
    edit_tensors(path, lambda tensors: [t.mul_(100) for name, t in tensors.items() if "layers.1.mlp.gate" in name])
    assert evaluate(path).exit_code == 0
    words = "block 1 gives NaN or Inf; float16 ends at 65504, and --dtype bfloat16 or float32 far beyond"
    stopped(evaluate(path, "--dtype", "float16"), tmp_path, words)


@pytest.mark.parametrize("recipe", MEASURING)
def test_float16_that_overflows_says_what_to_do(recipe: str, run: Run, tmp_path: Path) -> None:
    path = changed(tmp_path / "model", UP, 6e4, torch.float16)
    edit_tensors(path, lambda tensors: [t.mul_(100) for name, t in tensors.items() if "layers.1.mlp.gate" in name])
    result = run(recipe, "--dtype", "float16", source=path)
    stopped(result, tmp_path, "float16 ends at 65504, and --dtype bfloat16 or float32 far beyond")
    assert "block 1" in result.stderr or "blocks.1.ffn" in result.stderr
    assert run(recipe, source=path).exit_code == 0


def test_a_head_that_overflows_is_told_while_measuring(tmp_path: Path, text: Path) -> None:
    path = changed(tmp_path / "model", "lm_head.weight", 3e38)
    edit_tensors(path, lambda tensors: [t.fill_(100) for name, t in tensors.items() if name == "model.norm.weight"])
    result = CliRunner().invoke(main, ["eval", str(path), "--text", str(text), "--seq-len", "24"])
    stopped(result, tmp_path, "the head gives NaN or Inf")


def test_sums_of_finite_numbers_that_overflow_are_no_fault() -> None:
    # The check for NaN and Inf takes a sum.
    sums = Gram(2, cross=3, device=CPU, dtype=torch.float32)
    sums.h[:], sums.tokens = torch.eye(2) * 3e38, 1
    assert sums.c is not None
    sums.c[:] = 3e38
    h, c = sums.mean("here")
    assert bool(torch.isfinite(h).all())
    assert c is not None
    assert sweep.all_finite(c)
