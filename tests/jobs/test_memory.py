"""The forecast: micro-batches within the limit, and refusals that say what would do."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny

import streamprune
from streamprune.errors import ConfigError, ResourceError
from streamprune.jobs.forecast.memory import Memory
from streamprune.jobs.forecast.resources import forecast
from streamprune.jobs.forecast.workload import Workload
from streamprune.maths.live import LiveBytes
from streamprune.model import dry_run
from streamprune.model import skeleton as skeleton_module
from streamprune.model.outside import Outside
from streamprune.model.skeleton import open_skeleton
from streamprune.pruning.job import Job
from streamprune.recipes.plan import Plan
from streamprune.stream.store import file_bytes
from streamprune.system import machine
from streamprune.system.units import format_bytes, parse_bytes

WORKLOAD = Workload(samples=64, length=64, text=True, survey=frozenset({"mask-gradient"}), gram=True, compensates=True)


def test_micro_batches_grow_with_the_memory(tiny: Callable[..., Path]) -> None:
    skeleton = open_skeleton(tiny("llama"), torch.device("cpu"), "float32")
    sizes = []
    for limit in (2**20, 2**21, 2**22, 2**23, 2**30):
        resources = forecast(skeleton, WORKLOAD, device_limit=limit, disk_limit=2**40)
        assert not resources.problems
        assert resources.device_bytes <= limit
        sizes.append((resources.batch, resources.backward_batch))
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


def test_too_little_memory_says_how_much_is_needed(tiny: Callable[..., Path]) -> None:
    skeleton = open_skeleton(tiny("llama"), torch.device("cpu"), "float32")
    resources = forecast(skeleton, WORKLOAD, device_limit=1000, disk_limit=2**40)
    with pytest.raises(ResourceError, match=r"memory limit is 1000 B; .* needs [\d.]+ KiB") as caught:
        resources.require()
    match = re.search(r"needs ([\d.]+ KiB)", str(caught.value))
    assert match is not None
    enough = parse_bytes(match[1]) + 100
    assert not forecast(skeleton, WORKLOAD, device_limit=enough, disk_limit=2**40).problems


@pytest.mark.parametrize("eager", [True, False])
def test_attention_maps_count_where_they_are_written_out(
    eager: bool, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    skeleton = open_skeleton(tiny("gemma2"), torch.device("cpu"), "float32")
    # transformers decides, one version like this and another like that.
    monkeypatch.setattr(Outside, "writes_maps", eager)

    def more_with_a_sequence_more(length: int) -> int:
        memory = Memory(skeleton, Workload(samples=8, length=length, text=True, rank=8))
        return memory.in_memory(2) - memory.in_memory(1)

    # As many numbers as there are pairs of tokens.
    assert (more_with_a_sequence_more(64) > 2 * more_with_a_sequence_more(32)) == eager


def test_result_and_activations_share_a_disk(
    tiny: Callable[..., Path], configured: Callable[..., streamprune.Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    from streamprune.system import files

    config = configured(tiny("llama"))
    resources = streamprune.forecast_job(config)
    monkeypatch.setattr(files, "free_bytes", lambda folder: resources.disk_bytes + resources.output_bytes - 1)
    with pytest.raises(ResourceError, match="the result and the activations may need"):
        streamprune.prune(config)


def test_boundaries_are_thinned_out_when_disk_is_short(tiny: Callable[..., Path]) -> None:
    skeleton = open_skeleton(tiny("llama", num_hidden_layers=12), torch.device("cpu"), "float32")
    one = file_bytes(64, 64 * 32 * 4)
    roomy = forecast(skeleton, WORKLOAD, device_limit=2**40, disk_limit=100 * one)
    assert roomy.boundary_every == 1
    assert roomy.disk_bytes == 15 * one
    tight = forecast(skeleton, WORKLOAD, device_limit=2**40, disk_limit=11 * one)
    assert tight.boundary_every > 1
    assert tight.disk_bytes <= 11 * one
    assert tight.bytes_to_read > roomy.bytes_to_read
    too_little = forecast(skeleton, WORKLOAD, device_limit=2**40, disk_limit=3 * one)
    assert "activations need" in too_little.problems[0]


@pytest.mark.parametrize("every", [1, 2, 3, 5])
def test_disk_never_exceeds_the_forecast(
    every: int,
    tiny: Callable[..., Path],
    configured: Callable[..., streamprune.Config],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from stopping import force_boundaries

    from streamprune.stream.store import ActivationStore

    config = configured(tiny("llama", num_hidden_layers=5))
    job_resources = streamprune.forecast_job(config)
    one = file_bytes(12, 24 * 32 * 4)
    kept = (5 - 1) // every + 1
    limit = max(6, kept + (every if every > 1 else 1) + 2) * one
    if every == 1:
        assert job_resources.disk_bytes == limit
    force_boundaries(monkeypatch, every)
    most = 0
    real = ActivationStore.writing

    def watched(self: ActivationStore, name: str, place: str, **options: bool):  # type: ignore[no-untyped-def]
        nonlocal most
        inodes = {p.stat().st_ino: p.stat().st_size for p in self.folder.iterdir()}
        # Plus the one about to be written.
        most = max(most, sum(inodes.values()) + one)
        return real(self, name, place, **options)

    monkeypatch.setattr(ActivationStore, "writing", watched)
    streamprune.prune(config)
    assert most <= limit


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * 2**30),
        ("1.5 KB", 1500),
        ("800mb", 8 * 10**8),
        ("1000000", 10**6),
        ("12B", 12),
        ("2G", 2**31),
        ("1TiB", 2**40),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GB", "12 parsecs", "1e9", "0", "0.0001B"])
def test_not_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match="size"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["12", "0.5", "999999"])
def test_small_sizes_need_a_unit(text: str) -> None:
    with pytest.raises(ConfigError, match=f"the size '{text}' has no unit and would be bytes; write it like {text}GiB"):
        parse_bytes(text)


def test_sizes_for_people() -> None:
    assert [format_bytes(b) for b in (0, 1536, 3 * 2**30, 5 * 2**41)] == ["0 B", "1.5 KiB", "3.0 GiB", "10.0 TiB"]


def test_running_out_of_memory_is_said_not_traced() -> None:
    device = torch.device("cpu")
    with pytest.raises(ResourceError, match="cpu ran out of memory"), machine.limit_memory(device, None):
        torch.empty(1 << 60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="something else"), machine.limit_memory(device, None):
        raise RuntimeError("something else")


def test_a_control_groups_own_limit_counts_without_what_the_kernel_can_drop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = machine._control_groups
    for version, proc, top, limit, used in (
        ("v1", "7:memory:/job/inner\n0::/x\n", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
        ("v2", "0::/job/inner\n", "", "memory.max", "memory.current"),
    ):
        root = tmp_path / version
        for path, most in (("", "max"), ("job", "900"), ("job/inner", "700")):
            group = root / top / path
            group.mkdir(parents=True, exist_ok=True)
            (group / limit).write_text(f"{most}\n")
            (group / used).write_text("600\n")
            (group / "memory.stat").write_text("anon 100\ninactive_file 300\nactive_file 150\n")
        (root / "cgroup").write_text(proc)
        groups = list(real(root / "cgroup", root))
        assert [group.name for group, _, _ in groups][:2] == ["inner", "job"]
        monkeypatch.setattr(machine, "_control_groups", lambda groups=groups: iter(groups))
        assert machine._host_available() == 700 - (600 - 450)


@pytest.mark.parametrize("place", ["device", "parked", "host"])
def test_grams_on_the_host_take_from_the_device_what_they_give_to_the_host(
    place: str, tiny: Callable[..., Path]
) -> None:
    skeleton = open_skeleton(tiny("llama"), torch.device("cpu"), "float32")
    shapes = Memory(skeleton, WORKLOAD)
    shapes.on_cpu = False  # as for a GPU
    whole = shapes.demands(1, 1, "device")["re-fitting one ffn site"]
    asked = shapes.demands(1, 1, place)["re-fitting one ffn site"]  # type: ignore[arg-type]
    moved = {"device": 0, "parked": whole.sums, "host": whole.sums + whole.solving}[place]
    assert asked.host - whole.host == moved
    assert asked.sums + asked.solving == whole.sums + whole.solving - moved


@pytest.mark.parametrize("layout", ["free", "uniform"])
@pytest.mark.parametrize(
    ("recipe", "settings", "sites"),
    [
        ("slimgpt", {}, "all"),
        ("wanda-sp", {}, "all"),
        ("greedy-output", {}, "all"),
        ("greedy-output", {"heads": "second-moment"}, "all"),
        ("greedy-output", {"heads": "similarity", "tau": "0"}, "ffn"),
        ("greedy-output", {"heads": "similarity", "tau": "0.001"}, "none"),
        ("sobp", {}, "none"),
        ("surgeon", {"shots": "1"}, "none"),
    ],
)
def test_what_stays_is_known_before_any_work_where_no_survey_decides(
    recipe: str,
    settings: dict[str, str],
    sites: str,
    layout: str,
    tiny: Callable[..., Path],
    configured: Callable[..., Any],
) -> None:
    model = tiny("llama", intermediate_size=96)
    config = configured(model, recipe=recipe, settings=settings, layout=layout, samples=4, seq_len=8)
    job = Job(config, None)
    foreseen, units = job.request.keeps, {site.name: site.units for site in job.request.sites}
    assert set(foreseen) == {site.name for site in job.request.sites if sites == "all" or site.kind == sites}
    path = streamprune.plan_only(config)
    plan = Plan.read(path)
    for name, most in foreseen.items():
        # A survey that has no say in the number may still leave a step to others.
        assert plan[name].keep <= most <= units[name]
        assert sites == "ffn" or plan[name].keep == most
    assert not foreseen or sum(foreseen.values()) < sum(units[name] for name in foreseen)
    given = Job(replace(config, out=config.out.with_name("given"), plan=path), None)
    assert given.request.keeps == {name: site.keep for name, site in plan.items()}


MIXERS: dict[str, dict[str, Any]] = {"qwen3_5": {}, "nemotron_h": {"chunk_size": 64}, "lfm2": {}, "falcon-rw": {}}
"""Kinds of model with mixers of unknown form, at a length at which activations outweigh the state."""


@pytest.mark.parametrize("name", MIXERS)
def test_mixers_of_unknown_form_take_no_more_than_forecast(name: str, tiny: Callable[..., Path]) -> None:
    length = 512
    path = tiny(name, max_position_embeddings=length, **MIXERS[name])
    skeleton = open_skeleton(path, torch.device("cpu"), "float32")
    memory = Memory(skeleton, Workload(samples=4, length=length, text=True, survey=frozenset({"mask-gradient"})))
    unknown = [
        index
        for index, sublayers in enumerate(memory.sublayers)
        if any(sublayer.measured is not None for sublayer in sublayers)
    ]
    assert unknown
    for index in unknown:
        block = skeleton.build_block(index, skeleton.read_block(index))
        x, arguments = torch.randn(2, length, skeleton.width), skeleton.arguments(2, length)[index]
        with torch.no_grad(), LiveBytes() as forward:
            block(x, arguments)
        x.requires_grad_()
        with LiveBytes() as backward:
            block(x, arguments).sum().backward()
        foreseen = 2 * length * max(map(memory._forward_token, memory.sublayers[index]))
        assert forward.peak <= foreseen <= 4 * forward.peak
        foreseen = 2 * length * sum(map(memory._backward_token, memory.sublayers[index]))
        assert backward.peak <= foreseen <= 6 * backward.peak


@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_runs_on_the_meta_device(name: str, tiny: Callable[..., Path]) -> None:
    skeleton = open_skeleton(tiny(name), torch.device("cpu"), "float32")
    for index in range(len(skeleton)):
        measured = skeleton.measured(index, 24)
        assert measured is not None
        assert all(each.operations > 0 and 0 < each.peak <= each.total for each in measured)


def test_a_mixer_that_reads_values_has_a_generous_bound(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    skeleton = open_skeleton(tiny("nemotron_h"), torch.device("cpu"), "float32")
    blind = open_skeleton(skeleton.checkpoint.directory, torch.device("cpu"), "float32")
    known = Memory(skeleton, WORKLOAD).passing(1)

    def read(*_: Any, **__: Any) -> None:
        torch.empty(1, device="meta").item()

    monkeypatch.setattr(dry_run, "run", read)
    assert blind.measured(0, 64) is None
    assert Memory(blind, WORKLOAD).passing(1) > known

    def broken(*_: Any, **__: Any) -> None:
        raise TypeError("an error of ours")

    monkeypatch.setattr(dry_run, "run", broken)
    skeleton._ran.clear()
    with pytest.raises(TypeError, match="ours"):
        skeleton.measured(0, 64)


def test_blocks_are_tried_once_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran, run = [], dry_run.run
    monkeypatch.setattr(skeleton_module, "_RAN", OrderedDict())
    monkeypatch.setattr(dry_run, "run", lambda *arguments: ran.append(arguments) or run(*arguments))
    for changes, expected in (({"num_hidden_layers": 2}, 2), ({"num_hidden_layers": 2, "rms_norm_eps": 0.02}, 4)):
        path = make_tiny(tmp_path / str(expected), "llama", head_dim=10, **changes)
        for _ in range(2):
            skeleton = open_skeleton(path, torch.device("cpu"), "float32")
        assert len(ran) == expected
    assert skeleton.places(0) == skeleton.places(0) != skeleton.places(1)


def test_no_stream_passes_the_last_sublayer_even_without_a_site(tiny: Callable[..., Path]) -> None:
    skeleton = open_skeleton(tiny("nemotron_h"), torch.device("cpu"), "float32")
    # As if the form of the last mixer, a Mamba, was not known.
    skeleton.entries[-1] = tuple(replace(entry, consumer=None) for entry in skeleton.entries[-1])
    skeleton._places.clear()
    measured = skeleton.measured(3, 24)
    assert measured is not None
    consumers = sum(2 * site.linears[-1] * 8 * 24 for site in skeleton.all_sites())
    once = forecast(
        skeleton,
        Workload(samples=8, length=24, text=True, gram=True),
        device_limit=2**40,
        disk_limit=2**40,
    ).operations_by_kind["sweeps"]
    # Up to the consumers for the Grams, then all but the last sublayer.
    assert once == 2 * skeleton.block_operations(8, 24) - consumers - 8 * measured[0].operations
