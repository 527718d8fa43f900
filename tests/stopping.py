"""Interrupt jobs after a number of journal lines, and recompute their calibration windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import streamprune
from streamprune import Config
from streamprune.jobs.journal import Journal
from streamprune.model.tokenizer import load_tokenizer
from streamprune.text import windows as calibration

Make = Callable[..., Config]
Tiny = Callable[..., Path]


def windows(config: Config, path: Path) -> torch.Tensor:
    assert config.calibration is not None
    tokenizer = load_tokenizer(path)
    tokens = calibration.tokenize(tokenizer, config.calibration, 40)
    return calibration.sample_windows(
        tokens, config.samples, config.seq_len or 0, config.seed, config.calibration
    ).tokens


class Stop(BaseException):
    """Stands for a kill: the project catches no BaseException for good."""


@contextmanager
def stopping_after(appends: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Raise Stop after this many journal lines."""
    real, count = Journal.append, 0

    def append(self: Journal, step: str, **data: Any) -> Any:
        nonlocal count
        entry = real(self, step, **data)
        count += 1
        if count == appends:
            raise Stop
        return entry

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", append)
        yield


def force_boundaries(monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    from streamprune.pruning import job

    real = job.forecast
    monkeypatch.setattr(job, "forecast", lambda *a, **k: replace(real(*a, **k), boundary_every=every))


def interrupted(config: Config, monkeypatch: pytest.MonkeyPatch, appends: int = 8) -> None:
    with stopping_after(appends, monkeypatch), pytest.raises(Stop):
        streamprune.prune(config)
