"""Experts of one width run together: in one product each, where torch has a kernel for that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from streamprune.model import block as model_block
from streamprune.model.block import Block
from streamprune.model.skeleton import Skeleton, open_skeleton

Tiny = Callable[..., Path]
NAMES = ("mixtral", "qwen2_moe", "llama4", "gpt_oss")  # also with shared experts, all tokens for each, and biases
CPU = torch.device("cpu")
KERNEL = pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped products")


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the weights of all grouped products, which are taken from now on."""
    found, grouped = list[tuple[int, ...]](), F.grouped_mm

    def counted(x: Tensor, weights: Tensor, **options: Any) -> Tensor:
        found.append(tuple(weights.shape))
        return grouped(x, weights, **options)

    monkeypatch.setattr(model_block, "has_grouped_products", lambda device, dtype: True)
    monkeypatch.setattr(F, "grouped_mm", counted)
    return found


@contextmanager
def one_by_one() -> Iterator[None]:
    """As if torch had no grouped products."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_block, "has_grouped_products", lambda device, dtype: False)
        yield


def same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def opened(path: Path) -> Skeleton:
    return open_skeleton(path, CPU, "float32")


def mixture(skeleton: Skeleton) -> Block:
    """The first block that has experts."""
    index = next(n for n in range(len(skeleton)) if any(site.expert is not None for site in skeleton.sites(n)))
    return skeleton.build_block(index, skeleton.read_block(index))


def run(skeleton: Skeleton, block: Block) -> tuple[Tensor, Tensor]:
    """Return a block's output and the gradient of its squares, for the same input each time."""
    x = torch.randn(2, 16, skeleton.stream_width, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = block(x, skeleton.arguments(2, 16)[block.sublayers[0].block])
    return y.detach(), torch.autograd.grad(y.square().sum(), x)[0]


def narrower(block: Block, numbers: tuple[int, ...]) -> None:
    """Remove the first four units of some experts."""
    for number in numbers:
        prunable = next(each for each in block.prunables if each.site.expert == number)
        kept = torch.arange(4, prunable.site.units)
        prunable.shrink(kept, prunable.weight(prunable.consumer)[:, 4:])


@KERNEL
@pytest.mark.parametrize("name", NAMES)
def test_grouped_products_are_those_of_single_experts(name: str, tiny: Tiny, products: list[tuple[int, ...]]) -> None:
    skeleton = opened(tiny(name))
    together = mixture(skeleton)
    with one_by_one():
        expected = run(skeleton, mixture(skeleton))
    assert not products
    same(run(skeleton, together), expected)
    experts = [each for each in together.prunables if each.site.expert is not None]
    biased = any(each.bias(linear) is not None for each in experts for linear in (*each.producers, each.consumer))
    assert bool(products) != biased
    assert {shape[0] for shape in products} <= {len(experts)}


@KERNEL
def test_experts_of_two_widths_take_two_products_each(tiny: Tiny, products: list[tuple[int, ...]]) -> None:
    """Also where all were of one width before, and some weights have changed since, of which a twin knows nothing."""
    skeleton = opened(tiny("mixtral"))
    together = mixture(skeleton)
    with one_by_one():
        alone = mixture(skeleton)
    whole = run(skeleton, together)
    twin = together.twin()
    for block in (together, alone):
        narrower(block, (0, 2))
    assert all(map(torch.equal, run(skeleton, twin), whole))
    with one_by_one():
        expected = run(skeleton, alone)
    products.clear()
    same(run(skeleton, together), expected)
    assert len(products) == 6
    assert {shape[0] for shape in products} == {2}


@KERNEL
def test_the_weights_of_experts_are_parts_of_what_is_multiplied(tiny: Tiny, products: list[tuple[int, ...]]) -> None:
    """They take no memory of their own, and go with what they are parts of."""
    skeleton = opened(tiny("mixtral"))
    block = mixture(skeleton)
    run(skeleton, block)
    layer = block.sublayers[1].layer
    held = {layer.tensor(f"{each.consumer}.weight").untyped_storage().data_ptr() for each in block.prunables[1:]}
    assert len(held) == 1
    assert len(layer._stacks) == 3
    block.sublayers[1].release()
    assert not layer._stacks


@KERNEL
def test_experts_that_are_watched_or_trained_run_one_by_one(tiny: Tiny, products: list[tuple[int, ...]]) -> None:
    skeleton = opened(tiny("mixtral"))
    block = mixture(skeleton)
    plain = run(skeleton, block)[0]
    products.clear()
    updates = block.updates(2, torch.float32, torch.Generator().manual_seed(0))
    for name, each in updates.items():
        if name.endswith(".u"):
            each.data.normal_(generator=torch.Generator().manual_seed(1))
    read: list[str] = []
    with block.reading(lambda name, x: read.append(name)):
        assert torch.equal(run(skeleton, block)[0], plain)
    assert sum(".experts." in name for name in read) == 12
    with block.updated(updates):
        changed = run(skeleton, block)[0]
    block.absorb(updates)
    assert not products
    torch.testing.assert_close(run(skeleton, block)[0], changed, rtol=1e-3, atol=1e-3)
    assert products
    products.clear()
    with block.training(torch.float32):
        run(skeleton, block)
    assert not products


@KERNEL
def test_fewer_experts_take_smaller_products(tiny: Tiny, products: list[tuple[int, ...]]) -> None:
    skeleton = opened(tiny("mixtral"))
    block = mixture(skeleton)
    with one_by_one():
        alone = mixture(skeleton)
        alone.sublayers[1].keep_experts([1, 2, 3])
        expected = run(skeleton, alone)
    run(skeleton, block)
    block.sublayers[1].keep_experts([1, 2, 3])
    products.clear()
    same(run(skeleton, block), expected)
    assert {shape[0] for shape in products} == {3}


@KERNEL
def test_experts_that_took_the_numbers_of_others(tiny: Tiny, products: list[tuple[int, ...]]) -> None:
    skeleton = opened(tiny("mixtral"))
    found = []
    for again in (False, True):
        block = mixture(skeleton)
        narrower(block, (2, 3))
        if again:
            run(skeleton, block)
        block.sublayers[1].keep_experts([2, 3])
        found.append(run(skeleton, block)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["qwen2_moe", "llama4"])
def test_only_the_chosen_experts_run(name: str, tiny: Tiny) -> None:
    """Routed ones, or the shared ones alone; the others get no tokens."""
    skeleton = opened(tiny(name))
    block = mixture(skeleton)
    sublayer, x = block.sublayers[1], torch.randn(1, 8, skeleton.stream_width)
    given = sublayer.normed(x), sublayer.given(x, skeleton.arguments(1, 8)[sublayer.block])
    whole, shared = sublayer.mix(*given), len(sublayer.prunables) - 1
    assert sublayer.prunables[shared].site.expert is None
    for chosen in ([1], [shared], [0, shared]):
        mixed = sublayer.mix(*given, chosen=chosen)
        for number, z in enumerate(mixed.z):
            torch.testing.assert_close(z, whole.z[number] if number in chosen else torch.empty_like(z[:0]))
        assert [len(rows) for rows in mixed.rows] == [len(whole.rows[n]) if n in chosen else 0 for n in range(shared)]
    assert len(whole.split(x)) == len(whole.origins()) == shared + 1
    assert whole.split(x)[shared] is x


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_a_mixture_is_trained_with_products_in_bfloat16(name: str, tiny: Tiny) -> None:
    """As refinement does it: weights in float32, products in bfloat16."""
    skeleton = open_skeleton(tiny(name, torch.bfloat16), CPU, "bfloat16")
    block = mixture(skeleton)
    x = torch.randn(2, 16, skeleton.stream_width).bfloat16()
    arguments = skeleton.arguments(2, 16)[block.sublayers[0].block]
    with block.training(torch.float32) as weights, torch.autocast("cpu", torch.bfloat16):
        block(x, arguments).square().sum().backward()
        assert all(each.grad is not None for name, each in weights.items() if ".experts." in name)
