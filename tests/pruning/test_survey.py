"""What a survey sums at each site, compared with transformers' whole model with hooks and full autograd, in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import reference
import torch
from conftest import REPRESENTATIVE, STRUCTURES, TINY
from torch import Tensor

from streamprune.maths.sums import SiteStatistics, Statistic
from streamprune.model.skeleton import Skeleton, open_skeleton
from streamprune.stream import sweep
from streamprune.stream.store import ActivationStore

pytestmark = pytest.mark.usefixtures("float64_norms")
CPU = torch.device("cpu")
SAMPLES, LENGTH = 4, 18
Tiny = Callable[..., Path]


def opened(path: Path, folder: Path, size: int = 3) -> tuple[Skeleton, ActivationStore, Tensor]:
    """Return a skeleton, a store with the embedded tokens, and the tokens."""
    skeleton = open_skeleton(path, CPU, "float64")
    store = ActivationStore(folder, (SAMPLES, LENGTH, skeleton.stream_width), skeleton.dtype, CPU, durable=False)
    tokens = torch.randint(skeleton.vocabulary, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
    sweep.embed(skeleton, tokens, store, sweep.boundary("dense", 0), size)
    return skeleton, store, tokens


def backward(
    path: Path, folder: Path, *wanted: Statistic, size: int = 3, ignored: Tensor | None = None
) -> tuple[list[SiteStatistics], Tensor]:
    """Return the statistics of each site, in order, from a forward and a backward sweep; and the tokens.

    Where `ignored` (samples, length) bool is true, tokens have no loss.
    """
    skeleton, store, tokens = opened(path, folder, size)
    for _ in sweep.forward(skeleton, store, "dense", 0, len(skeleton), size):
        pass
    labels = tokens if ignored is None else tokens.masked_fill(ignored, -100)
    sweep.head_gradient(skeleton, store, labels, size)
    predictions = None if ignored is None else float((labels[:, 1:] != -100).sum()) / SAMPLES
    found: list[SiteStatistics] = []
    for index, block in sweep.blocks(skeleton, range(len(skeleton) - 1, -1, -1)):
        stats = skeleton.statistics(index, frozenset(wanted))
        sweep.backward_block(skeleton, block, index, store, stats, size, predictions)
        found = stats + found
    return found, tokens


def forward(
    path: Path, folder: Path, *wanted: Statistic, size: int = 3
) -> tuple[list[SiteStatistics], ActivationStore]:
    """Return the statistics of each site from a forward sweep, and the store afterwards."""
    skeleton, store, _ = opened(path, folder, size)
    found = []
    for index, block in sweep.blocks(skeleton, range(len(skeleton))):
        stats = skeleton.statistics(index, frozenset(wanted))
        sweep.survey_block(skeleton, block, index, store, stats, size)
        found += stats
    return found, store


def whole(path: Path) -> tuple[reference.Any, list[reference.Place]]:
    model = reference.load(path)
    return model, reference.places(model, open_skeleton(path, CPU, "float64").all_sites())


def close(found: object, expected: Tensor, tokens: int = SAMPLES * LENGTH) -> None:
    """Check that a Gram's mean over `tokens` is `expected`, to the precision of float64."""
    from streamprune.maths.sums import Gram

    assert isinstance(found, Gram)
    assert found.tokens == tokens
    torch.testing.assert_close(found.mean("here")[0], expected, rtol=1e-8, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.parametrize("name", STRUCTURES)
def test_factors_are_full_autograds(name: str, tiny: Tiny, tmp_path: Path) -> None:
    path = tiny(name, torch.float64)
    found, tokens = backward(path, tmp_path, "factors")
    model, places = whole(path)
    for stat, place in zip(found, places, strict=True):
        names = [*place.producers, place.consumer]
        inputs = reference.capture(model, [*(place.producers[:1] or [place.reader]), place.consumer], tokens)
        gradients = reference.output_gradients(model, names, tokens)
        close(stat.inputs, reference.gram(inputs[0]))
        close(stat.gram, reference.gram(inputs[-1]))
        reached = (inputs[-1] != 0).any(dim=1)  # the tokens that a router sends to an expert
        close(stat.gradient, reference.gram(gradients[-1][reached]), int(reached.sum()))
        split = [part for i, g in enumerate(gradients[:-1]) for part in place.split(g, i, dim=1)]
        assert len(split) == len(place.site.linears) - 1
        for gram, gradient in zip(stat.producers, split, strict=True):
            close(gram, reference.gram(gradient[reached]), int(reached.sum()))
        assert stat.mask is None
        assert stat.divergence is None


def test_gradients_of_some_tokens_are_of_their_mean_loss(tiny: Tiny, tmp_path: Path) -> None:
    """A Gram of gradients, times the tokens, is that of all positions per prediction that counts."""
    path = tiny("llama", torch.float64)
    ignored = torch.rand(SAMPLES, LENGTH, generator=torch.Generator().manual_seed(1)) < 0.6
    found, tokens = backward(path, tmp_path, "factors", ignored=ignored)
    model, places = whole(path)
    count = int((~ignored[:, 1:]).sum())
    for stat, place in zip(found, places, strict=True):

        def labels(logits: Tensor) -> Tensor:
            return tokens.masked_fill(ignored, -100)[:, 1:]

        names = [*place.producers, place.consumer]
        gradients = reference.output_gradients(model, names, tokens, labels=labels)
        (inputs,) = reference.capture(model, [place.consumer], tokens)
        close(stat.gram, reference.gram(inputs))
        close(stat.gradient, reference.gram(gradients[-1]) * SAMPLES * (LENGTH - 1) / count)


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_grams_alone_are_those_among_the_factors(name: str, tiny: Tiny, tmp_path: Path) -> None:
    path = tiny(name, torch.float64)
    together, _ = backward(path, tmp_path / "a", "factors")
    alone, _ = backward(path, tmp_path / "b", "gram")
    gradients, _ = backward(path, tmp_path / "c", "gradient-gram")
    for each, gram, gradient in zip(together, alone, gradients, strict=True):
        assert each.gram and each.gradient and gram.gram and gradient.gradient  # noqa: PT018
        assert torch.equal(each.gram.mean("here")[0], gram.gram.mean("here")[0])
        assert torch.equal(each.gradient.mean("here")[0], gradient.gradient.mean("here")[0])
        assert gram.gradient is None
        assert gradient.gram is None
        assert not any(gram.producers)
        assert not any(gradient.producers)


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_a_survey_without_gradients_finds_the_same_and_moves_the_stream_alike(
    name: str, tiny: Tiny, tmp_path: Path
) -> None:
    path = tiny(name, torch.float64)
    expected, _ = backward(path, tmp_path / "a", "factors")
    found, store = forward(path, tmp_path / "b", "gram", "divergence")
    for stat, each in zip(found, expected, strict=True):
        assert stat.gram is not None
        assert each.gram is not None
        torch.testing.assert_close(stat.gram.mean("here")[0], each.gram.mean("here")[0], rtol=1e-12, atol=1e-12)
        assert stat.gram.tokens == each.gram.tokens
    skeleton, plain, _ = opened(path, tmp_path / "c")
    for index in sweep.forward(skeleton, plain, "dense", 0, len(skeleton), 3):
        after = sweep.boundary("dense", index + 1)
        assert torch.equal(store.read(after, slice(0, SAMPLES)), plain.read(after, slice(0, SAMPLES)))


@pytest.mark.parametrize("name", TINY)
def test_attention_maps_are_transformers_own(name: str, tiny: Tiny, tmp_path: Path) -> None:
    path = tiny(name, torch.float64)
    skeleton, store, tokens = opened(path, tmp_path)
    model = reference.load(path, attn_implementation="eager")
    with torch.no_grad():
        expected = (each for each in model(tokens, output_attentions=True).attentions if each is not None)
    x = store.read(sweep.boundary("dense", 0), slice(0, SAMPLES))
    for index, block in sweep.blocks(skeleton, range(len(skeleton))):
        sublayer = block.sublayers[0]
        if sublayer.entry.kind != "attention":
            x = block(x, skeleton.arguments(SAMPLES, LENGTH)[index])
            continue
        if name == "gemma2" and index and not skeleton.outside.writes_maps:
            pytest.skip(
                "before 5.21 transformers left out gemma2's cap where attention is not eager, so that streams differ"
            )
        given = sublayer.given(x, skeleton.arguments(SAMPLES, LENGTH, maps=True)[index])
        maps = sublayer.attend(sublayer.normed(x), given)
        # transformers' eager softmax is float32 inside, whatever the model.
        torch.testing.assert_close(maps, next(expected), rtol=1e-5, atol=1e-7)
        if skeleton.config.model_type == "falcon" and skeleton.config.alibi:
            break  # its eager attention adds the slopes twice, so from here on the two models differ
        x = block(x, skeleton.arguments(SAMPLES, LENGTH)[index])


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_divergence_is_that_of_the_whole_models_maps(name: str, tiny: Tiny, tmp_path: Path) -> None:
    path = tiny(name, torch.float64)
    found, _ = forward(path, tmp_path / "a", "divergence")
    again, tokens = backward(path, tmp_path / "b", "divergence", "mask-gradient")
    model = reference.load(path, attn_implementation="eager")
    with torch.no_grad():
        maps = model(tokens, output_attentions=True).attentions
    for stat, other, p in zip(found[::2], again[::2], maps, strict=True):
        assert stat.divergence is not None
        assert other.divergence is not None
        expected = reference.divergence(p)
        torch.testing.assert_close(stat.divergence.mean(), expected, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(other.divergence.mean(), expected, rtol=1e-5, atol=1e-7)
    assert all(stat.divergence is None for stat in found[1::2])
