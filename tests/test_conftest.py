"""Fixtures that would not be missed if they did nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import reference
import torch


def test_each_conversion_to_float32_by_transformers_is_replaced(
    float64_norms: Counter[str], tiny: Callable[..., Path]
) -> None:
    for name in ("gemma2", "deepseek_v3"):
        model = reference.load(tiny(name, torch.float64), attn_implementation="eager")
        with torch.no_grad():
            model(torch.arange(8)[None])
    assert {function for function, count in float64_norms.items() if count} == {
        "to",
        "type",
        "float",
        "linear",
        "softmax",
    }


def test_conversions_by_other_code_are_not_replaced(float64_norms: Counter[str]) -> None:
    x = torch.ones(2, dtype=torch.float64)
    assert x.to(torch.float32).dtype == x.float().dtype == x.type(torch.float32).dtype == torch.float32
    assert torch.nn.functional.softmax(x, 0, dtype=torch.float32).dtype == torch.float32
    with pytest.raises(RuntimeError, match="dtype"):
        torch.nn.functional.linear(x, torch.ones(2, 2))
    assert not sum(float64_norms.values())
