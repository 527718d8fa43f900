"""Boundaries on disk: what goes in comes out, and what is not finite does not go in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from streamprune import files
from streamprune.errors import NumericalError, ResumeError
from streamprune.host import host_copy
from streamprune.stream.store import ActivationStore

CPU = torch.device("cpu")


def store_of(folder: Path, dtype: torch.dtype) -> ActivationStore:
    return ActivationStore(folder / "cache", (5, 3, 4), dtype, CPU, durable=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 2, 5, 7])
def test_several_boundaries_side_by_side(dtype: torch.dtype, size: int, tmp_path: Path) -> None:
    store = store_of(tmp_path, dtype)
    values = {name: torch.randn(5, 3, 4).to(dtype) for name in ("a", "b")}
    for name, value in values.items():
        with store.writing(name, "here") as write:
            for batch in store.batches(size):
                write(value[batch])
    for batch, (a, b) in store.each(size, "a", "b"):
        assert torch.equal(a, values["a"][batch])
        assert torch.equal(b, values["b"][batch])


def test_large_finite_values_are_written(tmp_path: Path) -> None:
    """Their sum overflows; they do not."""
    store = store_of(tmp_path, torch.float16)
    value = torch.full((5, 3, 4), 6e4, dtype=torch.float16)
    with store.writing("a", "here") as write:
        write(value)
    assert torch.equal(store.read("a", slice(0, 5)), value)


@pytest.mark.parametrize("bad", [[float("nan")], [float("inf")], [float("inf"), -float("inf")]])
def test_what_is_not_finite_is_refused_and_nothing_stays(bad: list[float], tmp_path: Path) -> None:
    store = store_of(tmp_path, torch.float32)
    value = torch.zeros(5, 3, 4)
    value.view(-1)[: len(bad)] = torch.tensor(bad)
    with pytest.raises(NumericalError, match="block 3 gives NaN or Inf"), store.writing("a", "block 3") as write:
        write(value)
    assert not list((tmp_path / "cache").iterdir())


def test_a_boundary_that_is_missing_or_cut_short_is_said(tmp_path: Path) -> None:
    store = store_of(tmp_path, torch.float32)
    with pytest.raises(ResumeError, match="missing or cut short"):
        list(store.each(2, "a"))
    with store.writing("a", "here") as write:
        write(torch.zeros(4, 3, 4))
    with pytest.raises(ResumeError, match="missing or cut short"):
        list(store.each(2, "a"))


@pytest.mark.parametrize("shape", [(0, 3), (3,), (1024, 700)])
def test_host_copy_is_a_rounded_copy(shape: tuple[int, ...]) -> None:
    """The last is large enough for pages of its own."""
    value = torch.randn(shape)
    copy = host_copy(value, torch.bfloat16)
    assert torch.equal(copy, value.to(torch.bfloat16))
    value.zero_()
    assert copy.numel() == 0 or bool(copy.any())


def test_a_link_takes_its_targets_place_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_text("new")
    target.write_text("old")

    class Stop(BaseException): ...

    def stop(*_: object) -> None:
        raise Stop

    for name in ("link", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(files.os, name, stop)
            with pytest.raises(Stop):
                files.link(source, target)
        assert target.read_text() == "old"
    for _ in range(2):  # the second time both are one file
        files.link(source, target)
        assert target.samefile(source)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]
