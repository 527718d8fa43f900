"""Counts of operations and bytes against shapes and torch's own counter; nothing here looks at a clock."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from streamprune_cli import main
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

import streamprune
from streamprune.commands.bench import CACHE_BYTES, Runner, weight_bytes
from streamprune.errors import ConfigError, ResourceError
from streamprune.model.skeleton import open_skeleton
from streamprune.system import machine
from streamprune.system.units import format_bytes

Tiny = Callable[..., Path]
BATCH, PROMPT, NEW = 2, 12, 5


@pytest.fixture(scope="module")
def pruned(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "out"
    streamprune.prune(streamprune.Config(model=tiny("llama"), out=out, ratio=0.4, recipe="magnitude", round_to=4))
    return out


def measured(path: Path, against: Path | None = None, **changes: Any) -> streamprune.Bench:
    sizes = {"prompt_tokens": PROMPT, "new_tokens": NEW, "batch": BATCH, "repetitions": 2}
    return streamprune.bench(path, against, **{**sizes, **changes})


def shapes(path: Path) -> tuple[int, int, int, int]:
    """Elements of all linears but the head's, attention's columns, keys and values a token, and elements of the head."""
    model = streamprune.load(path)
    skeleton = open_skeleton(path, torch.device("cpu"), "float32")
    head = model.get_output_embeddings().weight
    linears = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module.weight is not head
    )
    attention = [site for site in skeleton.all_sites() if site.kind == "attention"]
    pairs = sum(2 * site.units * site.head_width for site in attention)
    return linears, sum(site.columns for site in attention), pairs, head.numel()


DENSE = [
    "llama",
    "llama-biased",
    "mistral",
    "qwen2",
    "qwen3",
    "granite",
    "olmo2",
    "gpt2",
    "gpt_neox",
    "opt",
    "opt-350m",
]
"""Those whose every weight is that of a linear, and whose caches hold the keys and values of groups."""


@pytest.mark.parametrize("name", [*DENSE, "pruned"])
def test_operations_and_bytes_are_what_the_shapes_say(name: str, tiny: Tiny, pruned: Path) -> None:
    path = pruned if name == "pruned" else tiny(name)
    linears, columns, pairs, head = shapes(path)
    found = measured(path).model
    assert found.prefill.tokens == BATCH * PROMPT
    assert found.decode.tokens == BATCH * NEW
    # Rotary tables come on top.
    expected = BATCH * (PROMPT * 2 * linears + 4 * PROMPT**2 * columns + 2 * head)
    assert found.prefill.operations == pytest.approx(expected, rel=0.03)
    if name not in ("mistral", "qwen2"):  # whose windows let keys and values go
        lengths = range(PROMPT + 1, PROMPT + NEW + 1)
        expected = sum(BATCH * (2 * linears + 4 * length * columns + 2 * head) for length in lengths)
        assert found.decode.operations == pytest.approx(expected, rel=0.03)
        weights = weight_bytes(streamprune.load(path, dtype=torch.float32))
        assert found.prefill.bytes_read == weights + 4 * BATCH * PROMPT * pairs
        assert found.decode.bytes_read == sum(weights + 4 * BATCH * length * pairs for length in lengths)


def test_operations_are_torchs_own_count(pruned: Path) -> None:
    model = streamprune.load(pruned)
    prompts = torch.zeros((BATCH, PROMPT), dtype=torch.int64)
    with (
        torch.no_grad(),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        FlopCounterMode(display=False) as torchs,
    ):
        model(input_ids=prompts, use_cache=True, logits_to_keep=1)
    assert measured(pruned).model.prefill.operations == torchs.get_total_flops()


@pytest.mark.parametrize(("name", "looked_up"), [("llama", 0), ("llama-biased", 40 * 32), ("gpt2", 64 * 32)])
def test_looked_up_embeddings_are_not_read(name: str, looked_up: int, tiny: Tiny) -> None:
    model = streamprune.load(tiny(name), dtype=torch.bfloat16)
    assert weight_bytes(model) == 2 * (model.num_parameters() - looked_up)


def test_what_removed_work_allows(tiny: Tiny, pruned: Path) -> None:
    found = measured(pruned, tiny("llama"), repetitions=3)
    assert found.against is not None
    assert found.model.parameters < found.against.parameters
    for gain, ours, dense, limit in (
        (found.prefill, found.model.prefill, found.against.prefill, "by_operations"),
        (found.decode, found.model.decode, found.against.decode, "by_bytes"),
    ):
        assert gain is not None
        assert gain.by_operations == dense.operations / ours.operations > 1
        assert gain.by_bytes == dense.bytes_read / ours.bytes_read > 1
        assert gain.rounds == tuple(a / b for a, b in zip(dense.seconds, ours.seconds, strict=True))
        assert gain.median == sorted(gain.rounds)[1]
        assert gain.fastest == min(dense.seconds) / min(ours.seconds)
        assert gain.achieved == gain.median / getattr(gain, limit)


def test_models_take_turns(tiny: Tiny, pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    honest = Runner.run

    def run(self: Runner) -> None:
        order.append("pruned" if self.path == pruned else "dense")
        honest(self)

    monkeypatch.setattr(Runner, "run", run)
    measured(pruned, tiny("llama"), repetitions=3)
    assert order == ["pruned", "dense", "dense", "pruned", "pruned", "dense"]


def test_both_compute_what_generate_would(pruned: Path) -> None:
    prompts = torch.randint(40, (BATCH, PROMPT), generator=torch.Generator().manual_seed(0))
    runner = Runner(open_skeleton(pruned, torch.device("cpu"), "float32"), prompts, NEW)
    model = streamprune.load(pruned)
    mask = torch.ones_like(prompts)
    written = model.generate(
        prompts, attention_mask=mask, max_new_tokens=NEW + 1, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(torch.cat([tokens for _, tokens in runner.steps()], 1), written[:, PROMPT:])


def test_threads_are_given_back(pruned: Path) -> None:
    before = torch.get_num_threads()
    assert measured(pruned, threads=2).protocol.endswith("2 threads")
    assert torch.get_num_threads() == before


def test_widths_that_other_roundings_would_give(pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["streamprune.commands.bench"], "CACHE_BYTES", CACHE_BYTES >> 10)
    monkeypatch.setattr(sys.modules["streamprune.commands.bench"], "ROUND_SECONDS", 0.0)
    skeleton = open_skeleton(pruned, torch.device("cpu"), "float32")
    widths = sorted(site.columns for site in skeleton.all_sites() if site.kind == "ffn")
    own = widths[1]
    tried = streamprune.bench_widths(pruned, prompt_tokens=8, repetitions=3)
    assert [each.width for each in tried if each.own] == [own]
    assert [each.width for each in tried] == sorted(each.width for each in tried)
    assert sorted(multiple for each in tried for multiple in each.round_to) == [1, 8, 16, 32, 64, 128, 256]
    for each in tried:
        assert each.operations == each.width / own
        assert all(
            each.width % multiple == 0 and each.width - own < multiple for multiple in each.round_to if multiple > 1
        )
        assert each.width % 2 == 1 or 1 not in each.round_to
        if each.own:
            assert each.prefill == each.decode == 1.0


def test_what_cannot_be_measured_is_refused(tiny: Tiny, pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Limits are those of the whole process.
    monkeypatch.setattr(machine, "base_bytes", lambda: 0)
    for name in ("prompt_tokens", "new_tokens", "batch", "repetitions", "threads"):
        with pytest.raises(ConfigError, match=f"{name} is 0; it must be at least 1"):
            measured(pruned, **{name: 0})
    with pytest.raises(
        ConfigError, match=r"--prompt-tokens 60 and --new-tokens 5 make 65 tokens; the context of .* is 64"
    ):
        measured(pruned, prompt_tokens=60)
    with pytest.raises(
        ResourceError, match=r"limit is 97.7 KiB; .* in float32, .* KiB and .* KiB and .*--dtype bfloat16"
    ):
        measured(pruned, tiny("llama"), memory=100_000)
    assert measured(pruned, memory=400_000).against is None
    # What is held: weights, keys and values.
    _, _, pairs, _ = shapes(pruned)
    held = 4 * (streamprune.load(pruned).num_parameters() + BATCH * (PROMPT + NEW) * pairs)
    with pytest.raises(ResourceError, match=re.escape(f"{pruned} {format_bytes(held)} and")):
        measured(pruned, memory=100_000)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "context", "expected"),
    [
        ({}, 2048, (512, 64)),
        ({}, 512, (448, 64)),
        ({}, 64, (32, 32)),
        ({"prompt_tokens": 60}, 64, (60, 4)),
        ({"new_tokens": 60}, 64, (4, 60)),
        ({"prompt_tokens": 700}, 2048, (700, 64)),
    ],
)
def test_what_was_not_given_fits_the_context(
    given: dict[str, int], context: int, expected: tuple[int, int], tiny: Tiny
) -> None:
    found = measured(
        tiny("llama", max_position_embeddings=context), **{"prompt_tokens": None, "new_tokens": None, **given}
    )
    assert (found.model.prefill.tokens, found.model.decode.tokens) == (BATCH * expected[0], BATCH * expected[1])


def test_the_shorter_context_counts(tiny: Tiny, pruned: Path) -> None:
    longer = tiny("llama", max_position_embeddings=256)
    for found in (measured(pruned, longer, prompt_tokens=None), measured(longer, pruned, prompt_tokens=None)):
        assert found.model.prefill.tokens == BATCH * (64 - NEW)
    with pytest.raises(ConfigError, match=f"the context of {re.escape(str(pruned))} is 64"):
        measured(longer, pruned, prompt_tokens=100)


def test_the_command(tiny: Tiny, pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["streamprune.commands.bench"], "CACHE_BYTES", CACHE_BYTES >> 10)
    sizes = ["--prompt-tokens", "8", "--new-tokens", "2", "--repetitions", "2"]
    words = ["bench", str(pruned), "--against", str(tiny("llama")), *sizes, "--widths"]
    found = json.loads(CliRunner().invoke(main, [*words, "--json"]).stdout)
    assert list(found) == ["model", "against", "prefill", "decode", "protocol", "widths"]
    assert len(found["decode"]["rounds"]) == 2
    shown = CliRunner().invoke(main, words).stdout.splitlines()
    assert shown[0].split()[:3] == ["tokens", "per", "second"]
    assert [line.split()[0] for line in shown[1:3]] == ["prefill", "decode"]
    assert any("(now)" in line for line in shown)
    # Without sizes, those that the context of 64 leaves.
    fitting = CliRunner().invoke(main, ["bench", str(pruned), "--repetitions", "1", "--widths", "--json"])
    assert json.loads(fitting.stdout)["protocol"].startswith("1 × 32 random tokens, then 32 steps")
    alone = CliRunner().invoke(main, ["bench", str(pruned), *sizes])
    assert alone.exit_code == 0
    assert "speed-up" not in alone.stdout
    refused = CliRunner().invoke(main, ["bench", str(pruned), *sizes, "--batch", "0"])
    assert refused.exit_code == 2
    assert "batch is 0" in refused.stderr
