"""The pretended device: each kind of fault is planted and caught, and what a GPU allows passes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pretended import CUDA, Fault, State, device

import streamprune
from streamprune.stream.copies import Copies, Cuda
from streamprune.stream.store import ActivationStore

MIB = 1 << 20


@pytest.fixture
def gpu() -> Iterator[State]:
    with device(total=64 * MIB) as state:
        yield state


def pinned(*shape: int) -> torch.Tensor:
    return torch.ones(shape).pin_memory()


# Places.


def test_host_and_device_do_not_mix(gpu: State) -> None:
    x = torch.ones(3, device=CUDA)
    with pytest.raises(Fault, match="mixes a host tensor"):
        x + torch.ones(3)
    with pytest.raises(Fault, match="mixes a host tensor"):
        torch.nn.functional.embedding(torch.tensor([0]), torch.ones(2, 3, device=CUDA))
    with pytest.raises(Fault, match="mixes a host tensor"):
        x.index_select(0, torch.tensor([0]))
    with pytest.raises(Fault, match="indexes a tensor on the host"):
        torch.ones(3)[torch.tensor([0], device=CUDA)]
    with pytest.raises(Fault, match="number on the host"):
        torch.addmm(torch.tensor(1.0), torch.ones(2, 2, device=CUDA), torch.ones(2, 2, device=CUDA))
    with pytest.raises(Fault, match=r"numpy\(\)"):
        x.numpy()


def test_numbers_and_indices_may_be_on_the_host(gpu: State) -> None:
    x = torch.arange(3.0, device=CUDA)
    assert (x + torch.tensor(1.0)).tolist() == [1, 2, 3]
    assert x[torch.tensor([2, 0])].tolist() == [2, 0]
    assert x[[2, 0]].tolist() == [2, 0]
    x[torch.tensor([1])] = 5.0
    assert x.tolist() == [0, 5, 2]
    assert (torch.tensor([4.0], device=CUDA) * 2).item() == 8


def test_autograd_autocast_and_dtypes(gpu: State) -> None:
    w = torch.nn.Parameter(torch.full((2, 2), 0.5, device=CUDA))
    with torch.autocast("cuda", torch.bfloat16):
        y = torch.nn.functional.linear(torch.ones(3, 2, device=CUDA), w)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert w.grad is not None
    assert w.grad.device == CUDA
    assert w.grad.tolist() == [[3, 3], [3, 3]]
    assert torch.nn.Linear(2, 2).to(CUDA).weight.device == CUDA


# Streams.


def test_reading_what_another_stream_has_not_written(gpu: State) -> None:
    stream, source = torch.cuda.Stream(), pinned(3)
    with torch.cuda.stream(stream):
        x = source.to(CUDA, non_blocking=True)
    with pytest.raises(Fault, match="may not have written yet"):
        x * 2


@pytest.mark.parametrize("how", ["event", "stream", "synchronize"])
def test_a_read_behind_the_write(how: str, gpu: State) -> None:
    stream, source = torch.cuda.Stream(), pinned(3)
    with torch.cuda.stream(stream):
        x = source.to(CUDA, non_blocking=True)
    if how == "event":
        torch.cuda.current_stream().wait_event(stream.record_event())
    elif how == "stream":
        torch.cuda.current_stream().wait_stream(stream)
    else:
        stream.synchronize()
    y = x * 2
    x.record_stream(torch.cuda.current_stream())
    assert y.tolist() == [2, 2, 2]


def test_an_event_from_before_the_write_orders_nothing(gpu: State) -> None:
    stream, source = torch.cuda.Stream(), pinned(3)
    early = stream.record_event()
    with torch.cuda.stream(stream):
        x = source.to(CUDA, non_blocking=True)
    torch.cuda.current_stream().wait_event(early)
    with pytest.raises(Fault, match="may not have written yet"):
        x * 2


def test_overwriting_what_another_stream_still_reads(gpu: State) -> None:
    stream, x, target = torch.cuda.Stream(), torch.ones(3, device=CUDA), pinned(3)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        target.copy_(x, non_blocking=True)
    with pytest.raises(Fault, match="may not have read yet"):
        x.add_(1)
    torch.cuda.current_stream().wait_stream(stream)
    x.add_(1)


def test_host_memory_that_a_copy_has_not_written(gpu: State) -> None:
    x, target = torch.full((3,), 7.0, device=CUDA), pinned(3)
    target.copy_(x, non_blocking=True)
    done = torch.cuda.current_stream().record_event()
    for use in (lambda: target + 1, lambda: target.numpy(), lambda: target.fill_(0)):
        with pytest.raises(Fault, match="may not have written yet"):
            use()
    done.synchronize()
    assert target.tolist() == [7, 7, 7]


def test_to_the_host_without_waiting(gpu: State) -> None:
    found = torch.ones(3, device=CUDA).to("cpu", non_blocking=True)
    with pytest.raises(Fault, match="may not have written yet"):
        found.sum()
    torch.cuda.synchronize()
    assert found.tolist() == [1, 1, 1]


@pytest.mark.parametrize("kind", ["pageable", "pinned"])
def test_a_source_that_is_changed_under_its_copy(kind: str) -> None:
    def change() -> None:
        source = pinned(3) if kind == "pinned" else torch.ones(3)
        kept = source.to(CUDA, non_blocking=True)
        with pytest.raises(Fault, match=f"changes {kind} memory"):
            source.add_(1)
        source.numpy()[0] = 5  # which no tensor operation sees
        del kept

    with pytest.raises(Fault, match=f"{kind} memory was changed"), device():
        change()


def test_a_source_that_goes_or_is_changed_later(gpu: State) -> None:
    source = torch.ones(3)
    kept = [source.to(CUDA, non_blocking=True), torch.ones(3).to(CUDA, non_blocking=True)]
    torch.cuda.synchronize()
    source.add_(1)
    assert kept[0].tolist() == [1, 1, 1]


# Waiting.


def store_of(folder: Path, samples: int = 4) -> ActivationStore:
    store = ActivationStore(folder, (samples, 2, 3), torch.float32, CUDA, durable=False)
    with store.writing("x", "a test") as write:
        for _ in range(samples):
            write(torch.ones(1, 2, 3, device=CUDA))
    return store


@pytest.mark.parametrize(
    "wait",
    [lambda x: x.sum().item(), lambda x: x.cpu(), lambda x: bool(x[0, 0, 0] > 0), lambda x: x[x > 0], torch.nonzero],
)
def test_waiting_inside_a_loop_over_micro_batches(wait: Callable[..., Any], tmp_path: Path) -> None:
    with device() as state:
        store = store_of(tmp_path)

        def loop() -> None:
            for _, (x,) in store.each(1, "x"):
                wait(x)

        with pytest.raises(Fault, match="makes the host wait for the device"):
            loop()
        assert not state.syncs
        wait(torch.ones(2, 2, 2, device=CUDA))  # outside


def test_allowed_places_are_counted(tmp_path: Path) -> None:
    with device(allowed=("?",)) as state:
        for _, (x,) in store_of(tmp_path).each(1, "x"):
            x.sum().item()
        assert state.syncs == {"?": 4}


# Memory.


def test_allocations_beyond_the_limit(gpu: State) -> None:
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        torch.empty(65 * MIB, dtype=torch.uint8, device=CUDA)
    torch.cuda.set_per_process_memory_fraction(0.5)
    kept = [torch.empty(30 * MIB, dtype=torch.uint8, device=CUDA)]
    with pytest.raises(torch.OutOfMemoryError):
        kept.append(torch.empty(3 * MIB, dtype=torch.uint8, device=CUDA))
    kept.clear()
    # What is cached goes before memory runs out.
    kept.append(torch.empty(32 * MIB, dtype=torch.uint8, device=CUDA))


def test_sizes_are_rounded_and_segments_cached(gpu: State) -> None:
    x = torch.empty(1, dtype=torch.uint8, device=CUDA)
    assert torch.cuda.memory_allocated() == 512
    assert torch.cuda.memory_reserved() == 2 * MIB
    y = torch.empty(2 * MIB, dtype=torch.uint8, device=CUDA)
    assert torch.cuda.memory_reserved() == 22 * MIB
    z = torch.empty(2 * MIB, dtype=torch.uint8, device=CUDA)  # split from the same segment
    assert torch.cuda.memory_reserved() == 22 * MIB
    assert torch.cuda.mem_get_info() == (42 * MIB, 64 * MIB)
    del x, y, z
    assert torch.cuda.memory_allocated() == 0
    assert torch.cuda.memory_reserved() == 22 * MIB
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == 0


def test_streams_do_not_share_memory(gpu: State) -> None:
    def use() -> None:
        torch.empty(20 * MIB, dtype=torch.uint8, device=CUDA)

    use()
    use()
    assert torch.cuda.memory_reserved() == 20 * MIB
    with torch.cuda.stream(torch.cuda.Stream()):
        use()
    assert torch.cuda.memory_reserved() == 40 * MIB


def test_memory_kept_for_a_stream_is_not_reused_before(gpu: State) -> None:
    stream, x = torch.cuda.Stream(), torch.empty(20 * MIB, dtype=torch.uint8, device=CUDA)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = x[:1] + 1
    x.record_stream(stream)
    del x
    z = torch.empty(20 * MIB, dtype=torch.uint8, device=CUDA)
    assert torch.cuda.memory_reserved() == 42 * MIB
    stream.synchronize()
    torch.empty(20 * MIB, dtype=torch.uint8, device=CUDA)
    assert torch.cuda.memory_reserved() == 42 * MIB
    del y, z


def test_memory_freed_while_another_stream_uses_it(gpu: State) -> None:
    stream, x = torch.cuda.Stream(), torch.ones(3, device=CUDA)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = x * 2
    del x
    gc.collect()
    with pytest.raises(Fault, match="no record_stream"):
        torch.ones(1, device=CUDA)
    stream.synchronize()
    del y


# Planted in the code: a job on the device shows that each of these lines is needed.


def no_keep(self: Cuda, tensor: torch.Tensor, stream: Any) -> None:
    pass


def unready(self: Copies, tensors: Any) -> Any:
    assert self._engine is not None
    here = [self._engine.copy(self._outward, tensor, to_host=True) for tensor in tensors]  # does not wait for computing
    done = self._outward.record_event()
    for tensor in tensors:
        self._engine.keep(tensor, self._outward)

    def take() -> list[torch.Tensor]:
        done.synchronize()
        return here

    return take


def untaken(self: Copies, tensors: Any) -> Any:
    assert self._engine is not None
    there = [self._engine.copy(self._inward, tensor, to_host=False) for tensor in tensors]
    return lambda: there  # computing does not wait for the copy


def early(self: Copies, tensors: Any) -> Any:
    assert self._engine is not None
    self._outward.wait_event(self._engine.current().record_event())
    here = [self._engine.copy(self._outward, tensor, to_host=True) for tensor in tensors]
    for tensor in tensors:
        self._engine.keep(tensor, self._outward)
    return lambda: here  # the host does not wait for the copy


@pytest.mark.parametrize(
    ("owner", "name", "wrong", "message"),
    [
        (Cuda, "keep", no_keep, "no record_stream"),
        (Copies, "inward", untaken, "may not have written yet"),
        (Copies, "outward", unready, "may not have written yet"),
        (Copies, "outward", early, "may not have written yet"),
    ],
    ids=["keep", "inward", "outward", "take"],
)
def test_faults_planted_in_copies(
    owner: Any, name: str, wrong: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def use() -> None:
        for _, (x,) in store_of(tmp_path).each(1, "x"):
            y = x * 2
            del x
            y += 1

    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises(Fault, match=message), device():
        use()


def test_a_planted_wait_in_a_sweep(
    tiny: Callable[..., Path], configured: Callable[..., streamprune.Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    from streamprune.maths.sums import SiteStatistics

    add = SiteStatistics.add

    def waiting(self: SiteStatistics, inputs: torch.Tensor | None, z: torch.Tensor, *arguments: Any) -> None:
        float(z.sum())
        add(self, inputs, z, *arguments)

    monkeypatch.setattr(SiteStatistics, "add", waiting)
    config = configured(tiny("llama"), device="cuda", effort="low", samples=4)
    with pytest.raises(Fault, match=r"in .*stream/sweep.py:_observed makes the host wait"), device():
        streamprune.prune(config)
