"""Activations as bytes and back: exactly, rounded once, or within the bound that eight bits have."""

from __future__ import annotations

import pytest
import torch

from streamprune.errors import ConfigError
from streamprune.stream.encoding import FLOAT8, Encoding, token_bytes
from streamprune.system.machine import resolve_activations

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("computing", DTYPES)
def test_what_comes_back_was_rounded_once(computing: torch.dtype, stored: torch.dtype) -> None:
    width = 7
    x = torch.randn(3, 5, width, dtype=torch.float64).to(computing)
    encoding = Encoding(width, computing, stored)
    raw = encoding.encode(x)
    assert (raw.shape, raw.dtype) == ((3, 5, token_bytes(width, stored)), torch.uint8)
    assert torch.equal(encoding.decode(raw), x.to(stored).to(computing))


@pytest.mark.parametrize(("width", "computing"), [(1, torch.float32), *((256, dtype) for dtype in DTYPES)])
def test_float8_is_off_by_a_sixteenth_or_by_little_of_the_tokens_largest(width: int, computing: torch.dtype) -> None:
    """Tokens as different as gradients are, and values within a token too."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 50, width, dtype=torch.float64, generator=generator)
    x = x * 10.0 ** torch.empty_like(x[..., :1]).uniform_(-4, 4, generator=generator)
    x = (x * 10.0 ** torch.empty_like(x).uniform_(-3, 0, generator=generator)).to(computing)
    encoding = Encoding(width, computing, FLOAT8)
    raw = encoding.encode(x)
    assert raw.shape == (4, 50, width + 4)
    wrong = (encoding.decode(raw).double() - x.double()).abs()
    scale = x.double().abs().amax(-1, keepdim=True) / 448
    # Of the computing dtype itself: the division, and the multiplication on the way back.
    eps = max(torch.finfo(computing).eps, torch.finfo(torch.float32).eps)
    slack = 4 * eps * x.double().abs() + (2**-24 if computing == torch.float16 else 0)
    assert bool((wrong <= torch.maximum(x.double().abs() / 16, scale / 2**10) + slack).all())
    # One scale for all tokens would lose the small ones.
    assert bool(((encoding.decode(raw).abs().amax(-1) > 0) == (x.abs().amax(-1) > 0)).all())


def test_float8_of_zeros_and_of_very_small_numbers() -> None:
    encoding = Encoding(4, torch.float32, FLOAT8)
    x = torch.zeros(2, 3, 4)
    x[0, 0, 1] = 1e-44
    back = encoding.decode(encoding.encode(x))
    assert bool(torch.isfinite(back).all())
    assert not back[1].any()


@pytest.mark.parametrize("stored", [*DTYPES, FLOAT8])
@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
def test_what_is_not_finite_tells(bad: float, stored: torch.dtype) -> None:
    encoding = Encoding(4, torch.float32, stored)
    x = torch.randn(2, 3, 4)
    assert bool(torch.isfinite(encoding.telling(encoding.encode(x))).all())
    x[1, 2, 3] = bad
    assert not bool(torch.isfinite(encoding.telling(encoding.encode(x))).all())


@pytest.mark.parametrize(
    ("name", "computing", "stored", "expected"),
    [
        ("auto", torch.float32, torch.bfloat16, torch.bfloat16),
        ("auto", torch.bfloat16, torch.bfloat16, torch.bfloat16),
        ("auto", torch.float64, torch.bfloat16, torch.float64),
        ("auto", torch.float32, torch.float16, torch.float32),
        ("auto", torch.float16, torch.float16, torch.float16),
        ("auto", torch.float32, torch.float32, torch.float32),
        ("auto", torch.float64, torch.float64, torch.float64),
        ("float32", torch.float32, torch.bfloat16, torch.float32),
        ("float8", torch.bfloat16, torch.bfloat16, FLOAT8),
    ],
)
def test_what_is_chosen(name: str, computing: torch.dtype, stored: torch.dtype, expected: torch.dtype) -> None:
    assert resolve_activations(name, computing, stored) == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("int8", "activations is 'int8'; it must be one of auto, float64"),
        ("float32", "more than the bfloat16 they are"),
    ],
)
def test_what_makes_no_sense_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_activations(name, torch.bfloat16, torch.bfloat16)
