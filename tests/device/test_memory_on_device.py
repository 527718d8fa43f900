"""Memory on a GPU: what is available, how much is planned with, and what happens where it is not enough."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import contents
from pretended import CUDA, Fault, device
from stopping import Stop, stopping_after

import streamprune
from streamprune.errors import ConfigError, ResourceError
from streamprune.jobs.folder import SMALLER
from streamprune.jobs.forecast.memory import GRAM_PLACES, RESERVE, Memory
from streamprune.jobs.forecast.resources import Resources, forecast
from streamprune.jobs.forecast.workload import Workload, pinned_bytes
from streamprune.jobs.names import job_folder
from streamprune.maths.order import any_kernel
from streamprune.model.skeleton import Skeleton, open_skeleton
from streamprune.pruning.block import BlockPruner
from streamprune.pruning.job import Job
from streamprune.stream import sweep
from streamprune.stream.copies import Copies
from streamprune.stream.encoding import Encoding
from streamprune.system import machine
from streamprune.system.ranks import Ranks

Tiny = Callable[..., Path]
Make = Callable[..., streamprune.Config]
MIB = 1 << 20


def test_cached_memory_is_available() -> None:
    with device(total=64 * MIB):
        assert machine.available_memory(CUDA) == 64 * MIB
        x = torch.empty(20 * MIB, dtype=torch.uint8, device=CUDA)
        assert machine.available_memory(CUDA) == 44 * MIB
        del x
        assert torch.cuda.mem_get_info()[0] == 44 * MIB
        assert machine.available_memory(CUDA) == 64 * MIB
        torch.cuda.set_per_process_memory_fraction(0.5)
        assert machine.available_memory(CUDA) == 32 * MIB


def test_the_limit_is_lifted_and_the_cache_emptied() -> None:
    with device(total=64 * MIB) as state:
        with machine.limit_memory(CUDA, 32 * MIB):
            assert state.memory.fraction == 0.5
            with machine.limit_memory(CUDA, 48 * MIB):  # no more than what holds already
                assert state.memory.fraction == 0.5
            torch.empty(20 * MIB, dtype=torch.uint8, device=CUDA)
            assert torch.cuda.memory_reserved() == 20 * MIB
        assert state.memory.fraction == 1
        assert torch.cuda.memory_reserved() == 0
        with pytest.raises(ResourceError, match="cuda:0 ran out of memory"), machine.limit_memory(CUDA, 8 * MIB):
            torch.empty(20 * MIB, dtype=torch.uint8, device=CUDA)
        assert state.memory.fraction == 1
        torch.cuda.set_per_process_memory_fraction(0.25)
        with machine.limit_memory(CUDA, None):
            assert state.memory.fraction == 0.25
        assert state.memory.fraction == 0.25


@pytest.mark.parametrize(("name", "strict"), [("llama", True), ("qwen3_5", False)])
def test_sums_of_a_job_have_a_fixed_order(
    name: str, strict: bool, tiny: Tiny, text: Path, configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing is without an ordered kernel, torch may raise, or attention's backward pass would have none."""

    def chosen() -> tuple[Any, ...]:
        on, lenient = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        return on, lenient, torch.utils.deterministic.fill_uninitialized_memory, os.environ.get(machine.WORKSPACE)

    monkeypatch.setenv(machine.WORKSPACE, "")
    monkeypatch.delenv(machine.WORKSPACE)
    usual, found, prune = chosen(), set(), BlockPruner.prune
    monkeypatch.setattr(BlockPruner, "prune", lambda *given: (found.add(chosen()), prune(*given))[1])
    with device(total=256 * MIB):
        streamprune.prune(configured(tiny(name), device="cuda", effort="low", samples=2, seq_len=16))
    assert found == {(True, not strict, False, ":4096:8")}
    assert chosen() == usual == (False, False, True, None)


def test_a_workspace_with_which_sums_vary_is_refused(
    tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(machine.WORKSPACE, ":4096:2:16:8")
    with (
        device(),
        pytest.raises(ConfigError, match="CUBLAS_WORKSPACE_CONFIG is ':4096:2:16:8'; a job on a GPU takes :4096:8"),
    ):
        streamprune.prune(configured(tiny("llama"), device="cuda"))


def test_what_has_no_ordered_kernel_is_refused_unless_it_is_exact() -> None:
    with device(), machine.deterministic(CUDA, strict=True):
        x = torch.ones(2, 3, device=CUDA)
        with pytest.raises(Fault, match="cumsum"):
            x.cumsum(-1)
        with any_kernel():
            x.cumsum(-1)
        with pytest.raises(Fault, match="cumsum"):
            x.cumsum(-1)
    with device(), machine.deterministic(CUDA, strict=False):
        torch.ones(2, 3, device=CUDA).cumsum(-1)


def test_the_second_job_of_a_process_has_as_much_memory(tiny: Tiny, text: Path, configured: Make) -> None:
    with device(total=256 * MIB) as state:
        streamprune.prune(configured(tiny("llama", num_hidden_layers=2), device="cuda", samples=2, seq_len=16))
        gc.collect()
        assert torch.cuda.memory_reserved() <= 4 * MIB  # of tensors that are not collected yet
        assert machine.available_memory(CUDA) == 256 * MIB - torch.cuda.memory_allocated() >= 255 * MIB
        streamprune.evaluate(tiny("llama", num_hidden_layers=2), text, seq_len=24, device="cuda")
        assert state.memory.most_reserved < 128 * MIB


def test_all_sweeps_and_stores_share_two_streams(tiny: Tiny, configured: Make) -> None:
    from pretended.order import Stream

    with device():
        before = Stream.made
        streamprune.prune(configured(tiny("llama", num_hidden_layers=2), device="cuda", samples=2, seq_len=16))
        assert Stream.made - before == 2
        assert Copies.of(CUDA) is Copies.of(torch.device("cuda:0"))


WORKLOAD = Workload(samples=64, length=64, text=True, survey=frozenset({"mask-gradient"}), gram=True, compensates=True)


@pytest.fixture
def skeleton(tiny: Tiny) -> Skeleton:
    """A model that claims to be on a GPU; nothing is computed."""
    found = open_skeleton(tiny("llama"), torch.device("cpu"), "float32")
    found.device = CUDA
    return found


def test_a_margin_is_left(skeleton: Skeleton) -> None:
    for limit in (RESERVE + MIB, RESERVE + 4 * MIB, RESERVE + 64 * MIB):
        found = forecast(skeleton, WORKLOAD, device_limit=limit, disk_limit=2**40)
        assert not found.problems
        assert found.device_bytes <= (limit - RESERVE) * 15 / 16
    memory = Memory(skeleton, WORKLOAD)
    for peak in (1, 1000, 2**34 + 7):
        assert memory.plannable(memory.limit_for(peak)) >= peak > memory.plannable(memory.limit_for(peak) - 2)
    needed = memory.limit_for(min(memory.device_peak(1, 1, place) for place in GRAM_PLACES))
    assert not forecast(skeleton, WORKLOAD, device_limit=needed, disk_limit=2**40).problems
    assert forecast(skeleton, WORKLOAD, device_limit=needed - 2, disk_limit=2**40).problems


def test_host_memory_beside_a_gpu(skeleton: Skeleton) -> None:
    limits: dict[str, Any] = {"device_limit": 2**40, "disk_limit": 2**40, "base": 1000}
    plenty = forecast(skeleton, WORKLOAD, **limits, host_limit=2**40)
    assert not plenty.problems
    memory = Memory(skeleton, WORKLOAD)
    least = memory.host_peak(1, 1, "device") + 1000
    found = forecast(skeleton, WORKLOAD, **limits, host_limit=least)
    assert not found.problems
    assert found.batch == 1 < plenty.batch
    assert found.backward_batch == 1 < plenty.backward_batch  # whose micro-batches pass through host memory, too
    assert found.host_bytes <= least
    (problem,) = forecast(skeleton, WORKLOAD, **limits, host_limit=least - 1).problems
    assert "of host memory are free" in problem
    assert "memory-host" not in problem
    (problem,) = forecast(skeleton, WORKLOAD, **limits, host_limit=least, memory_host=2**20).problems
    assert "a smaller --memory-host takes less" in problem


def test_pinned_memory_is_a_power_of_two(skeleton: Skeleton) -> None:
    assert [pinned_bytes(size) for size in (0, 1, 4096, 4097)] == [0, 1, 4096, 8192]
    held = {}
    for stored in (torch.float32, torch.float8_e4m3fn):
        work = Workload(samples=64, length=64, text=True, prunes=False, activations=stored)
        held[stored] = [Memory(skeleton, work).host_peak(size, 1, "device") for size in (1, 2)]
        assert Encoding(32, torch.float32, stored).token_bytes * 64 in (8192, 64 * 36)
    # 8192 bytes of float32 a row; 64 tokens of 32 bytes and a scale are 2304, for which 4096 are taken.
    assert held[torch.float32][1] - held[torch.float32][0] == 10 * 8192
    assert held[torch.float8_e4m3fn][1] - held[torch.float8_e4m3fn][0] == 10 * 4096


def test_the_head_of_the_last_blocks_refinement_is_foreseen(tiny: Tiny, configured: Make) -> None:
    model = tiny("llama", vocab_size=1 << 14, num_hidden_layers=2)
    config = configured(model, device="cuda", recipe="magnitude", refine=1, samples=2, seq_len=64)
    with device(total=1 << 30):
        foreseen = streamprune.forecast_job(config).device_bytes
        assert 0.8 * foreseen < streamprune.prune(config).peak_device_bytes <= foreseen
        first = configured(
            model, "first", device="cuda", recipe="magnitude", refine=1, samples=2, seq_len=64, blocks=(0, 1)
        )
        assert streamprune.forecast_job(first).device_bytes < 0.5 * foreseen


# A device with less memory than planned.


def shrinking(monkeypatch: pytest.MonkeyPatch, size: int, where: str) -> list[int]:
    """Let a sweep's steps run out of memory for micro-batches above `size`; return the sizes of all that it was given."""
    given: list[int] = []
    functions: dict[str, Any] = {"survey": (sweep, "survey_block", 5), "prune": (BlockPruner, "prune", None)}
    owner, name, place = functions[where]
    original = getattr(owner, name)

    def scarce(*arguments: Any) -> Any:
        given.append(arguments[place] if place is not None else arguments[0].streams.batch)
        if given[-1] > size:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return original(*arguments)

    monkeypatch.setattr(owner, name, scarce)
    return given


@pytest.mark.parametrize("where", ["survey", "prune"])
def test_micro_batches_are_halved_once(
    where: str, tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {"survey": "greedy-output", "prune": "default"}[where]

    def config(out: str) -> streamprune.Config:
        return configured(tiny("llama"), out, recipe=recipe, effort="low", samples=12)

    with monkeypatch.context() as patch:
        given = shrinking(patch, 6, where)
        streamprune.prune(config("whole"))
    assert given == [12, 6, 6, 6]
    report = json.loads((config("whole").out / "report.json").read_text(encoding="utf-8"))
    assert report["batch"] == 6
    log = (config("whole").out / "log.txt").read_text(encoding="utf-8")
    assert "ran out of memory" in log
    assert "12 to 6" in log
    # Stopped after every line, and resumed where there is enough memory: the same bytes.
    stopped = config("stopped")
    with monkeypatch.context() as patch:
        shrinking(patch, 6, where)
        journal = job_folder(stopped.out) / "journal.jsonl"
        while not journal.exists() or SMALLER not in journal.read_text(encoding="utf-8"):
            with pytest.raises(Stop), stopping_after(1, monkeypatch):
                streamprune.prune(stopped)
    streamprune.prune(stopped)
    assert contents(stopped.out) == contents(config("whole").out)


@pytest.mark.parametrize("where", ["survey", "prune"])
def test_a_second_time_is_an_error(where: str, tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = {"survey": "greedy-output", "prune": "default"}[where]
    given = shrinking(monkeypatch, 3, where)
    with pytest.raises(ResourceError, match="ran out of memory: CUDA out of memory"):
        streamprune.prune(configured(tiny("llama"), recipe=recipe, effort="low", samples=12))
    assert given == [12, 6]


def test_a_device_with_less_memory_than_planned(tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator itself refuses, and the smaller micro-batch fits."""
    monkeypatch.setattr(Memory, "plannable", lambda self, limit: 1 << 40)

    def peak(samples: int, total: int = 1 << 30) -> int:
        config = configured(
            tiny("llama"), f"out-{samples}-{total}", device="cuda", recipe="wanda-sp", samples=samples, seq_len=64
        )
        with device(total) as state:
            streamprune.prune(config)
        report = json.loads((config.out / "report.json").read_text(encoding="utf-8"))
        assert report["batch"] == (samples if total == 1 << 30 else samples // 2)
        return state.memory.most_reserved

    half, whole = peak(96), peak(192)
    assert peak(192, (half + whole) // 2) <= (half + whole) // 2


def used(job: Job) -> Resources:
    """Forecast a job and take over the sizes."""
    found = job.forecast()
    job.use({name: getattr(found, name) for name in ("batch", "backward_batch", "grams", "boundary_every")})
    return found


def test_activations_take_host_memory_that_no_step_needs(
    tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the sizes of micro-batches are those without."""
    model, free = tiny("llama"), 0
    monkeypatch.setattr(machine, "_host_available", lambda: free * 10 // 9 + 1)
    with device():
        for asked, most in ((None, None), (0, 0), (MIB, MIB)):
            free = 1 << 34
            job = Job(configured(model, device="cuda", memory_host=asked), None)
            found = used(job)
            assert job.room["memory_host"] == ((1 << 33) if most is None else most)
            assert (found.held_bytes > 0) == (most != 0)
        alone = found.demands
        steps = max(each["host"] for each in alone.values())
        free = steps + 1000
        job = Job(configured(model, device="cuda"), None)
        found = used(job)
        assert not found.problems
        assert found.held_bytes == pytest.approx(1000, abs=10)
        assert max(each["host"] for each in found.demands.values()) == steps
        assert job.room["memory_host"] == pytest.approx(1000, abs=10)


def test_activations_leave_host_memory_to_what_other_jobs_have_taken_since(
    tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    with device():
        job = Job(configured(tiny("llama"), device="cuda", samples=2, seq_len=16), None)
        found = used(job)
        steps = max(each["host"] for each in found.demands.values())
        one = 2 * job.store.row_bytes
        for free, held in ((steps + one - 1, 0), (steps + one, one)):
            monkeypatch.setattr(machine, "available_memory", lambda device, free=free: free)
            with job.store.writing("a", "here") as write:
                write(torch.zeros(2, 16, 32, device=CUDA))
            assert job.store.held_bytes == held


def test_every_rank_holds_what_the_poorest_can(tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each from what all have, with one collective; and the sizes are those without."""
    poor: dict[str, int] = {}
    gathered: list[Any] = []

    def gather(self: Ranks, value: dict[str, int]) -> list[dict[str, int]]:
        gathered.append(value)
        return [value, {**value, **poor}]

    monkeypatch.setattr(Ranks, "gather", gather)
    with device():
        config = configured(tiny("llama"), device="cuda")
        alone = Job(replace(config, memory_host=0), None).forecast()
        steps = max(each["host"] for each in alone.demands.values())
        base = 1 << 40  # the other rank's, which takes more by itself
        without = set()
        for free in (steps, steps + 1000):
            poor.update(base=base, host_limit=base + free)
            gathered.clear()
            job = Job(config, None)
            job.room["host_limit"] = job.room["base"] + base + steps + (1 << 34)
            found = job.forecast()
            assert len(gathered) == 1
            assert not found.problems
            assert found.held_bytes == free - steps
            without.add(found.host_bytes - found.held_bytes)
            sizes = [(each.batch, each.backward_batch, each.boundary_every, each.disk_bytes) for each in (found, alone)]
            assert sizes[0] == sizes[1]
        assert len(without) == 1
