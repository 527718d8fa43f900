"""The streamed model against transformers' own, forward and backward."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import reference
import torch
import torch.nn.functional as F
from conftest import TINY, shared

from streamprune.model.skeleton import Skeleton, open_skeleton
from streamprune.stream import sweep
from streamprune.stream.store import ActivationStore

CPU = torch.device("cpu")


def random_tokens(skeleton: Skeleton, samples: int, length: int) -> torch.Tensor:
    return torch.randint(skeleton.vocabulary, (samples, length), generator=torch.Generator().manual_seed(0))


def opened(path: Path, dtype: str, folder: Path, samples: int, length: int) -> tuple[Skeleton, ActivationStore]:
    skeleton = open_skeleton(path, CPU, dtype)
    return skeleton, ActivationStore(
        folder, (samples, length, skeleton.stream_width), skeleton.dtype, CPU, durable=False
    )


def streamed_loss(
    path: Path, folder: Path, *, dtype: str, samples: int, length: int, size: int
) -> tuple[float, torch.Tensor]:
    skeleton, store = opened(path, dtype, folder, samples, length)
    tokens = random_tokens(skeleton, samples, length)
    sweep.embed(skeleton, tokens, store, sweep.boundary("dense", 0), size)
    for _ in sweep.forward(skeleton, store, "dense", 0, len(skeleton), size):
        pass
    total, count = sweep.losses(skeleton, store, sweep.boundary("dense", len(skeleton)), tokens, size)
    assert count == samples * (length - 1)
    return total / count, tokens


def whole_loss(path: Path, tokens: torch.Tensor, dtype: torch.dtype) -> float:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, experts_implementation="eager")
    with torch.no_grad():
        logits = model(tokens).logits
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))


@pytest.mark.check("streamed = transformers' forward")
@pytest.mark.parametrize("name", TINY)
def test_streamed_forward_is_the_models_own(name: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    path = tiny(name)
    loss, tokens = streamed_loss(path, tmp_path, dtype="float64", samples=5, length=20, size=2)
    assert loss == pytest.approx(whole_loss(path, tokens, torch.float64), rel=1e-7)


@pytest.mark.parametrize(
    "name", ["docs-llama-7m", "stories260K", "babyllama-tok361-0.9M", "makemore-names-opt", "makemore-names-gpt2"]
)
def test_streamed_perplexity_of_trained_models(name: str, tmp_path: Path) -> None:
    path = shared("models", name)
    length = 16 if "names" in name else 96
    loss, tokens = streamed_loss(path, tmp_path, dtype="float32", samples=6, length=length, size=4)
    assert loss == pytest.approx(whole_loss(path, tokens, torch.float32), rel=1e-6)


def ignoring(tokens: torch.Tensor) -> torch.Tensor:
    """Labels that are ignored for two thirds of the tokens of each sequence, and for all but one of the first."""
    some = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1)) < 1 / 3
    some[0] = torch.arange(tokens.shape[1]) == 7
    return tokens.where(some, -100)


def autograd_mask_gradients(
    skeleton: Skeleton, path: Path, tokens: torch.Tensor, labels: torch.Tensor
) -> list[list[torch.Tensor]]:
    """∂loss/∂mask of the whole model in memory: a sequence's row of gradients per site.

    The loss is a sequence's sum, relative to the mean number of labels of a sequence that are not ignored.
    """
    model = reference.load(path)
    masks = []
    for index in range(len(skeleton)):
        for site, entry in skeleton.places(index):
            mask = torch.ones(site.units, dtype=skeleton.dtype, requires_grad=True)
            masks.append(mask)
            module = model.get_submodule(f"{skeleton.architecture.blocks}.{index}.{entry.consumer}")
            width = site.width
            module.register_forward_pre_hook(
                lambda m, a, mask=mask, width=width: (a[0] * mask.repeat_interleave(width),)
            )
    gradients = []
    mean = float((labels[:, 1:] != -100).sum()) / len(labels)
    for row, own in zip(tokens, labels, strict=True):
        logits = model(row[None]).logits
        loss = F.cross_entropy(logits[0, :-1], own[1:], ignore_index=-100, reduction="sum") / mean
        gradients.append(list(torch.autograd.grad(loss, masks)))
    return gradients


@pytest.mark.check("gradients = full autograd")
@pytest.mark.usefixtures("float64_norms")
@pytest.mark.parametrize(
    ("name", "size", "some"),
    [
        *((name, 3, False) for name in TINY),
        *((name, *rest) for name in ("llama", "mixtral") for rest in ((1, False), (3, True))),
    ],
)
def test_backward_sweep_is_full_autograd(
    name: str, size: int, some: bool, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """Also with labels that are ignored, of which sequences have different numbers."""
    path = tiny(name)
    skeleton, store = opened(path, "float64", tmp_path, 4, 18)
    tokens = random_tokens(skeleton, 4, 18)
    sweep.embed(skeleton, tokens, store, sweep.boundary("dense", 0), size)
    for _ in sweep.forward(skeleton, store, "dense", 0, len(skeleton), size):
        pass
    labels = ignoring(tokens) if some else tokens
    sweep.head_gradient(skeleton, store, labels, size)
    _, count = sweep.losses(skeleton, store, sweep.boundary("dense", len(skeleton)), labels, size)
    assert count == int((labels[:, 1:] != -100).sum())
    predictions = count / 4 if some else None
    found = {}
    for index, block in sweep.blocks(skeleton, range(len(skeleton) - 1, -1, -1)):
        stats = skeleton.statistics(index, frozenset({"mask-gradient"}))
        sweep.backward_block(skeleton, block, index, store, stats, size, predictions)
        found[index] = stats
    flat = [stat for index in range(len(skeleton)) for stat in found[index]]
    expected = autograd_mask_gradients(skeleton, path, tokens, labels)
    for position, stat in enumerate(each.mask for each in flat):
        assert stat is not None
        rows = torch.stack([gradients[position] for gradients in expected])
        torch.testing.assert_close(stat.squares, rows.square().sum(0), rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(stat.magnitudes, rows.abs().sum(0), rtol=1e-9, atol=1e-12)


def test_blocks_are_gone_when_they_are_let_go(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Without the garbage collector: a cycle would keep blocks alive and memory would follow the depth."""
    skeleton = open_skeleton(tiny("llama"), CPU, "float32")
    gc.disable()
    try:
        living: list[weakref.ref[object]] = []
        for _, block in sweep.blocks(skeleton, range(len(skeleton))):
            assert all(reference() is None for reference in living)
            twin = block.twin()
            living += [
                weakref.ref(block),
                weakref.ref(twin),
                weakref.ref(block.sublayers[0].layer.module("mlp.up_proj")),
            ]
            del block, twin
        assert all(reference() is None for reference in living)
    finally:
        gc.enable()


def test_half_precision_streams(tiny: Callable[..., Path], tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        path = tiny("llama", dtype)
        loss, tokens = streamed_loss(path, tmp_path / str(dtype), dtype=str(dtype)[6:], samples=3, length=16, size=2)
        assert loss == pytest.approx(whole_loss(path, tokens, dtype), rel=0.02)


def test_head_works_in_chunks(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = streamed_loss(tiny("llama"), tmp_path / "a", dtype="float64", samples=3, length=16, size=3)
    monkeypatch.setattr(sweep, "LOGIT_BYTES", 4 * 40 * 7)
    chunked, _ = streamed_loss(tiny("llama"), tmp_path / "b", dtype="float64", samples=3, length=16, size=3)
    assert chunked == pytest.approx(whole, rel=1e-12)


def test_store_reads_back_what_was_written(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        store = ActivationStore(tmp_path / str(dtype), (5, 3, 4), dtype, CPU, durable=True)
        x = torch.randn(5, 3, 4).to(dtype)
        with store.writing("a", "here") as write:
            for batch in store.batches(2):
                write(x[batch])
        for batch, (read,) in store.each(2, "a"):
            assert torch.equal(read, x[batch])
        assert torch.equal(store.read("a", slice(1, 4)), x[1:4])
