"""Boundaries on disk: what goes in comes out, and what is not finite does not go in."""

from __future__ import annotations

import os
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from faulty import FaultyDisk

from streamprune.errors import DamageError, DiskError, NumericalError
from streamprune.stream.encoding import FLOAT8
from streamprune.stream.store import ActivationStore, file_bytes
from streamprune.system import disk, files
from streamprune.system.host import host_copy

CPU = torch.device("cpu")


def store_of(folder: Path, dtype: torch.dtype) -> ActivationStore:
    return ActivationStore(folder / "cache", (5, 3, 4), dtype, CPU, durable=False)


@pytest.mark.parametrize(("size", "dtype"), [(1, torch.float32), (2, torch.bfloat16), (7, torch.float16)])
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


def test_any_samples_in_any_order(tmp_path: Path) -> None:
    store = store_of(tmp_path, torch.float32)
    values = {name: torch.randn(5, 3, 4) for name in ("a", "b")}
    for name, value in values.items():
        with store.writing(name, "here") as write:
            write(value)
    chosen = [[4, 0, 2], [1], [3, 3]]
    for rows, (a, b) in zip(chosen, store.rows(iter(chosen), "a", "b"), strict=True):
        assert torch.equal(a, values["a"][rows])
        assert torch.equal(b, values["b"][rows])


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
    with pytest.raises(DamageError, match=r"a\.activations is missing or damaged"):
        list(store.each(2, "a"))
    with store.writing("a", "here") as write:
        write(torch.zeros(4, 3, 4))
    with pytest.raises(DamageError, match=r"a\.activations is missing or damaged"):
        list(store.each(2, "a"))


@pytest.mark.parametrize("place", [0, 50, -1, -17, "short", "long", "gone"])
def test_a_boundary_that_was_altered_is_not_used(place: int | str, tmp_path: Path) -> None:
    store = ActivationStore(tmp_path, (5, 3, 4), torch.float32, CPU, durable=True)
    filled(store, "a")
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    if isinstance(place, int):
        data[place] ^= 1
        path.write_bytes(data)
    elif place == "gone":
        path.unlink()
    else:
        path.write_bytes(data[:-1] if place == "short" else data[:60] + data)
    for other in (store, ActivationStore(tmp_path, (5, 3, 4), torch.float32, CPU, durable=True)):
        # What a footer says is not asked of what this process wrote itself.
        if other is not store or place in (0, 50, "long", "gone"):
            assert not other.intact("a")
            assert other.usable("a") == (other is store and place != "gone")
            with pytest.raises(DamageError, match="computed again"):
                list(other.each(2, "a"))


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


def filled(store: ActivationStore, name: str, size: int = 2, **options: bool) -> torch.Tensor:
    """Write a boundary of random numbers."""
    value = torch.randn(store.shape, generator=torch.Generator().manual_seed(len(name))).to(store.dtype)
    with store.writing(name, "here", **options) as write:
        for batch in store.batches(size):
            write(value[batch])
    return value


@pytest.mark.parametrize("memory", [0, 10**6])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, FLOAT8])
def test_what_is_read_is_what_the_stored_dtype_holds(stored: torch.dtype, memory: int, tmp_path: Path) -> None:
    store = ActivationStore(tmp_path, (5, 3, 4), torch.float32, CPU, durable=True, stored=stored, memory=memory)
    value = filled(store, "a")
    expected = store.encoding.decode(store.encoding.encode(value))
    assert expected.dtype == torch.float32
    for size in (1, 3, 5):  # whatever it was written by
        for batch, (found,) in store.each(size, "a"):
            assert torch.equal(found, expected[batch])
            assert torch.equal(store.read("a", batch), expected[batch])
    (path,) = tmp_path.iterdir()
    assert store.row_bytes == 3 * (4 * stored.itemsize + 4 * (stored == FLOAT8))
    assert path.stat().st_size == file_bytes(5, store.row_bytes) == 5 * store.row_bytes + 6 * 8


def test_more_than_the_stored_dtype_holds_is_said(tmp_path: Path) -> None:
    store = ActivationStore(tmp_path, (1, 1, 4), torch.float32, CPU, durable=False, stored=torch.float16)
    with pytest.raises(NumericalError, match="more than the 65504"), store.writing("a", "here") as write:
        write(torch.full((1, 1, 4), 7e4))
    with store.writing("a", "here") as write:
        write(torch.full((1, 1, 4), 6e4))


@pytest.mark.parametrize("memory", [0, 10**6])
def test_an_error_of_the_writer_reaches_whoever_writes(
    memory: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = ActivationStore(tmp_path, (5, 3, 4), torch.float32, CPU, durable=True, memory=memory)
    older = filled(store, "a")

    full = FaultyDisk(tmp_path, tmp_path_factory.mktemp("graves"), "full", 3)
    with disk.using(full), pytest.raises(DiskError, match=r"cannot write .*a.activations: No space left on device"):
        filled(store, "a", size=1)
    assert full.operations[:3] == ["create a.activations.tmp", "write a.activations.tmp", "write a.activations.tmp"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.activations"]
    assert torch.equal(store.read("a", slice(0, 5)), older)
    assert store.held_bytes == (memory and 5 * 3 * 4 * 4)


ONE = 5 * 3 * 4 * 4


@pytest.mark.parametrize("room", [0, 2, 4])
def test_memory_holds_the_youngest_and_no_more_than_it_may(room: int, tmp_path: Path) -> None:
    store = ActivationStore(tmp_path, (5, 3, 4), torch.float32, CPU, durable=True, memory=room * ONE + ONE - 1)
    values = {}
    for name in ("a", "bb", "ccc"):
        values[name] = filled(store, name)
        assert store.held_bytes <= store.memory
    assert store.held_bytes == min(room, 3) * ONE
    # All are on the disk; what is held is read from the memory.
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["a", "bb", "ccc"]
    for name, value in values.items():
        assert torch.equal(store.read(name, slice(0, 5)), value)
    held = [name for name in values if not damaged(store, tmp_path / f"{name}.activations", values[name])]
    assert held == ["a", "bb", "ccc"][3 - min(room, 3) :]


def test_a_boundary_goes_to_disk_while_host_memory_is_short(tmp_path: Path) -> None:
    store = ActivationStore(tmp_path, (5, 3, 4), torch.float32, CPU, durable=True, memory=10 * ONE)
    for free, held in ((ONE - 1, 0), (ONE, ONE)):
        store.spare = partial(int, free)
        value = filled(store, "a", passing=True)
        assert store.held_bytes == held
        assert store.path("a").exists() == (not held)
        assert torch.equal(store.read("a", slice(0, 5)), value)
    # Of what is being filled, a part is not taken yet.
    for free, held in ((2 * ONE - 1, 2), (2 * ONE, 3)):
        store.spare = partial(int, free)
        with store.writing("b", "here", passing=True) as write:
            filled(store, "c", passing=True)
            write(torch.zeros(5, 3, 4))
        assert store.held_bytes == held * ONE
        store.keep_only({"a"})


def test_nothing_keeps_a_micro_batch_alive(tmp_path: Path) -> None:
    store = store_of(tmp_path, torch.float32)
    filled(store, "a")
    for reading in (store.each(2, "a"), store.rows([[0, 3], [1]], "a")):
        read = next(iter(reading))
        (x,) = read[1] if isinstance(read, tuple) else read
        alive = weakref.ref(x)
        del read, x
        assert alive() is None


def damaged(store: ActivationStore, path: Path, value: torch.Tensor) -> bool:
    """Whether what is read is the file's."""
    path.write_bytes(bytes(path.stat().st_size))
    try:
        return not torch.equal(store.read(path.stem, slice(0, 5)), value)
    except DamageError:
        return True


def test_what_passes_stays_in_memory_and_is_not_thrown_out(tmp_path: Path) -> None:
    store = ActivationStore(tmp_path, (5, 3, 4), torch.float32, CPU, durable=True, memory=2 * ONE)
    kept = filled(store, "kept")
    passing = {name: filled(store, name, passing=True) for name in ("p", "pp")}
    assert "p" in store
    assert [path.stem for path in tmp_path.iterdir()] == ["kept"]
    more = filled(store, "more"), filled(store, "passing too", passing=True)  # no room but on the disk
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["kept", "more", "passing too"]
    assert store.held_bytes == 2 * ONE
    for name, value in {**passing, "kept": kept, "more": more[0], "passing too": more[1]}.items():
        assert torch.equal(store.read(name, slice(0, 5)), value)
    store.remove("p")
    assert "p" not in store
    assert store.held_bytes == ONE
    # An older file of what is held now would be read by whoever comes after.
    assert torch.equal(filled(store, "passing too", passing=True), store.read("passing too", slice(0, 5)))
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["kept", "more"]
    store.keep_only({"pp"})
    assert store.held_bytes == ONE
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("memory", [0, 10**6])
def test_a_second_name_is_the_same_boundary(memory: int, tmp_path: Path) -> None:
    store = ActivationStore(tmp_path, (5, 3, 4), torch.float32, CPU, durable=True, memory=memory)
    value = filled(store, "a")
    filled(store, "other")
    store.link("a", "other")
    store.link("a", "new")
    store.remove("a")
    assert "a" not in store
    for name in ("other", "new"):
        assert torch.equal(store.read(name, slice(0, 5)), value)
        assert (tmp_path / f"{name}.activations").stat().st_size == file_bytes(5, 3 * 4 * 4)
    assert store.held_bytes == (memory and ONE)


def test_what_lasts_goes_to_the_disk_as_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what passes is never waited for."""
    monkeypatch.setattr(files, "SYNC_BYTES", 100)
    sizes: list[int] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda d: (sizes.append(os.fstat(d).st_size), real(d))[1])
    store = ActivationStore(tmp_path, (5, 3, 4), torch.float32, CPU, durable=True)
    sizes.clear()
    filled(store, "a", size=1)
    assert sizes[:2] == [3 * 48, file_bytes(5, 48)]  # at 144 bytes, and at the end, with its checksums
    sizes.clear()
    filled(store, "b", passing=True)
    assert sizes == []
