"""An aim in place of a ratio: against brute force over all ratios, the same bytes as with that ratio, and resumed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ALPHABET, contents
from stopping import Make, Stop, Tiny, stopping_after

import streamprune
from streamprune.errors import CalibrationError, ConfigError
from streamprune.model.checkpoint import data_bytes
from streamprune.model.sizes import Sizes
from streamprune.model.skeleton import Skeleton, open_skeleton
from streamprune.model.tokenizer import IGNORED
from streamprune.pruning import aim, speed
from streamprune.pruning.block import BlockPruner
from streamprune.pruning.held_out import disjoint
from streamprune.pruning.job import Job
from streamprune.pruning.run import Run
from streamprune.pruning.shot import Shot
from streamprune.pruning.speed import Decoding
from streamprune.text.windows import Tokens, Windows, sample_windows

WIDE = {"hidden_size": 64, "intermediate_size": 256}


def card(model: Path, share: float, format: Any = "bf16", context: int = 64) -> int:
    """A size between nothing and the dense model's, with all that is fixed."""
    sizes = Sizes(open_skeleton(model, torch.device("cpu"), "auto"))
    dense = sizes.size({}, format, context)
    return dense.workspace + int(share * (dense.weights + dense.cache))


@pytest.mark.parametrize(
    ("recipe", "format", "changes", "monotone"),
    [
        ("magnitude", "bf16", {}, True),
        pytest.param("default", "bf16", {}, True, marks=pytest.mark.slow),
        pytest.param("default", "q8_0", {"round_to": 32}, True, marks=pytest.mark.slow),
        pytest.param("default", "q4_k_m", {}, False, marks=pytest.mark.slow),
        pytest.param("sobp", "bf16", {"layout": "uniform"}, True, marks=pytest.mark.slow),
    ],
)
def test_fit_is_the_least_ratio_that_fits(
    recipe: str, format: Any, changes: dict[str, Any], monotone: bool, tiny: Tiny, configured: Make
) -> None:
    model = tiny("llama", torch.bfloat16, **WIDE)
    size = card(model, 0.8, format)
    config = configured(model, recipe=recipe, ratio=None, fit=size, quant=format, **changes)
    job = Job(config, None)
    with job.opened(restart=False):
        Run(job).prepare()
        shot = Shot(job, 1)
        keeps, sizes = aim.plans(job.request, shot.sites, list, shot.survey), job.request.sizes
        fitting = [r for r in range(1, 1000) if sizes.size(keeps(r / 1000), format, 64).total <= size]
        line = shot.journalled("ratio")
    assert line is not None
    chosen = round(1000 * line["ratio"])
    assert chosen in fitting
    assert chosen - 1 not in fitting
    assert chosen == fitting[0] or not monotone
    assert 1 < chosen < 999


@pytest.mark.parametrize(("recipe", "changes"), [("default", {}), ("magnitude", {"ratio_of": "model"})])
def test_a_chosen_ratio_gives_the_bytes_of_that_ratio(
    recipe: str, changes: dict[str, Any], tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama", torch.bfloat16, **WIDE)
    size = card(model, 0.8)
    whole = streamprune.prune(configured(model, "whole", recipe=recipe, ratio=None, fit=size, **changes))
    given = configured(model, "given", recipe=recipe, ratio=whole.ratio_requested, **changes)
    streamprune.prune(given)
    assert weights(Path(whole.out)) == weights(given.out)
    assert whole.aim is not None
    assert whole.aim["weights"] == sum(data_bytes(path) for path in given.out.glob("*.safetensors"))
    assert whole.aim["weights"] + whole.aim["cache"] + whole.aim["workspace"] <= size
    stopped = configured(model, "stopped", recipe=recipe, ratio=None, fit=size, **changes)
    chosen = []
    monkeypatch.setattr(aim, "least", lambda meets, real=aim.least: chosen.append(real(meets)) or chosen[-1])
    while not stopped.out.exists():
        with stopping_after(2, monkeypatch):
            try:
                streamprune.prune(stopped)
            except Stop:
                continue
    assert contents(stopped.out) == contents(Path(whole.out))
    assert chosen == [whole.ratio_requested]
    assert streamprune.prune(stopped).ratio_requested == whole.ratio_requested


def weights(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name.endswith(".safetensors")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fit": 1 << 20}, r"with as little as can stay at every site takes .* of 1.0 MiB, .*: the aim cannot be met"),
        ({"fit": 1 << 40}, r"nothing has to go: .* as it is takes .* of weights"),
        ({"fit": 1 << 29, "ratio": 0.3}, r"ratio and fit are given; only one"),
        ({"fit": 1 << 29, "context": 65}, r"context is 65; the context of .* is 64"),
        ({"fit": 1 << 29, "quant": "q5_k"}, r"quant is 'q5_k'; it must be one of bf16"),
        ({"fit": 1 << 29, "quant": "fp8"}, r"quant is fp8; .* cannot be stored in it"),
        ({"fit": 1 << 29, "recipe": "surgeon"}, r"fit is given; recipe surgeon takes several shots"),
        (
            {"fit": 1 << 29, "recipe": "magnitude", "settings": {"structure": "2:4"}},
            r"recipe magnitude keeps all shapes",
        ),
        ({"perplexity_at_most": 0.1}, r"recipe sobp does not price the loss"),
        ({"perplexity_at_most": 0.1, "recipe": "default", "calibration": "self"}, r"and calibration is self"),
        ({"perplexity_at_most": -0.1}, r"perplexity_at_most is -0.1; it must be positive"),
        ({"speedup": 1.0}, r"speedup is 1; it must be above 1"),
        ({"speedup": 1e6}, r"decodes .* times as fast \(asked for 1e\+06\)"),
        ({}, r"give a ratio, experts by number or share, a plan file or one of fit"),
    ],
)
def test_aims_that_cannot_be_met_are_refused_before_work(
    changes: dict[str, Any], message: str, tiny: Tiny, configured: Callable[..., streamprune.Config]
) -> None:
    with pytest.raises(ConfigError, match=message):
        streamprune.prune(configured(tiny("llama"), **{"ratio": None, **changes}))


def test_speedup_follows_the_table(tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    # Matrix products take a second per element and one more per matrix.
    monkeypatch.setattr(
        Decoding, "_time", lambda self, shapes: float(sum(1 + rows * columns for rows, columns in shapes))
    )
    model = tiny("llama", torch.bfloat16, **WIDE)
    config = configured(model, recipe="magnitude", ratio=None, speedup=1.4)
    result = streamprune.prune(config)
    before, after = (open_skeleton(path, torch.device("cpu"), "auto") for path in (model, config.out))

    def seconds(skeleton: Skeleton) -> float:
        head = 1 + skeleton.vocabulary * skeleton.width
        return head + sum(len(site.linears) + sum(site.linears) for site in skeleton.all_sites())

    assert result.aim is not None
    assert result.aim["reached"] == pytest.approx(seconds(before) / seconds(after), abs=1e-4)
    assert result.aim["reached"] >= 1.4
    smaller = configured(model, "smaller", recipe="magnitude", ratio=result.ratio_requested - 0.001)
    streamprune.prune(smaller)
    assert seconds(before) / seconds(open_skeleton(smaller.out, torch.device("cpu"), "auto")) < 1.4


def test_the_table_is_measured(tiny: Tiny) -> None:
    decoding = Decoding(open_skeleton(tiny("llama", torch.bfloat16, **WIDE), torch.device("cpu"), "float32"))
    half = {site.name: site.units // 2 for site in decoding.sites}
    assert 0 < decoding.seconds(half) < decoding.seconds({}) < 1
    assert decoding.speed_up({}) == 1


def test_tiny_matrices_are_timed_in_few_copies(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    decoding, made, ones = Decoding(open_skeleton(tiny("llama"), torch.device("cpu"), "float32")), [], torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, **options: made.append(shape) or ones(*shape, **options))
    assert decoding._time([(8, 8)]) > 0
    assert len(made) == speed.MOST_COPIES + 1  # and the vector
    made.clear()
    decoding._time([(4096, 4096)])
    assert len(made) == 2


LONG = {"samples": 4, "seq_len": 24}


def letters(tmp_path: Path) -> Path:
    path = tmp_path / "long.txt"
    path.write_text("".join(random.Random(1).choices(ALPHABET, k=20000)))
    return path


def test_held_out_windows_share_few_passages() -> None:
    tokens = Tokens.join(
        [(ids, ids) for ids in [torch.randint(1000, (4000,), generator=torch.Generator().manual_seed(0))]]
    )
    used, drawn = (sample_windows(tokens, count, 40, seed, "it") for count, seed in ((20, 0), (64, 1)))
    drawn = Windows(drawn.tokens, drawn.tokens.where(torch.arange(64)[:, None] != 5, IGNORED))

    def passages(window: torch.Tensor) -> set[tuple[int, ...]]:
        return {tuple(window[i : i + 16].tolist()) for i in range(25)}

    def share(number: int, known: set[tuple[int, ...]]) -> float:
        return len(passages(drawn.tokens[number]) & known) / 25

    calibrated = set[tuple[int, ...]]().union(*map(passages, used.tokens))
    clear = [number for number in range(64) if share(number, calibrated) <= 1 / 8]
    assert 5 in clear
    clear.remove(5)
    assert len(clear) < 60  # some share too much
    apart, seen = list[int](), set[tuple[int, ...]]()
    for number in clear:
        if share(number, seen) <= 1 / 8:
            apart.append(number)
            seen |= passages(drawn.tokens[number])
    overlapping = [number for number in clear if number not in apart]
    assert 12 < len(apart) < len(apart) + 3 < len(clear)
    assert overlapping[0] < apart[11]
    for count, wanted in ((12, apart[:12]), (len(apart) + 3, apart + overlapping[:3])):
        assert torch.equal(disjoint(drawn, used, count, "it").tokens, drawn.tokens[wanted])
    with pytest.raises(CalibrationError, match=r"it has too little text beside the calibration windows: \d+ of 60"):
        disjoint(drawn, used, 60, "it")


def test_perplexity_is_predicted_then_measured(tiny: Tiny, configured: Make, tmp_path: Path) -> None:
    model = tiny("llama", **WIDE)
    common = {"recipe": "default", "calibration": letters(tmp_path), **LONG}
    config = configured(model, ratio=None, perplexity_at_most=0.02, **common)
    result = streamprune.prune(config)
    found = result.aim
    assert found is not None
    assert "tried" not in found
    assert found["predicted"] <= math.log(1.02)
    assert math.log(found["perplexity"] / found["dense_perplexity"]) <= math.log(1.02)
    windows = Job(config, None).held_out.tokens
    for path, measured in ((model, found["dense_perplexity"]), (config.out, found["perplexity"])):
        with torch.no_grad():
            loss = streamprune.load(path)(windows, labels=windows).loss
        assert measured == pytest.approx(math.exp(float(loss)), rel=1e-4)
    given = configured(model, "given", ratio=result.ratio_requested, **common)
    streamprune.prune(given)
    assert weights(config.out) == weights(given.out)


def test_a_ratio_that_held_out_windows_refuse_is_tried_smaller(
    tiny: Tiny, configured: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here perplexity rises five times as fast as the costs predict."""
    model = tiny("llama", **WIDE)
    dense = open_skeleton(model, torch.device("cpu"), "auto")
    blocks = dense.block_parameters()

    def predicted(recipe: Any, sites: Any, survey: Any, keeps: Any) -> float:
        return 0.004 * sum((site.units - keeps[site.name]) * site.unit_parameters for site in sites) / blocks

    def measured(skeleton: Skeleton, *_: Any) -> float:
        return 40 * math.exp(0.02 * (1 - skeleton.block_parameters() / blocks))

    monkeypatch.setattr(aim, "predicted_loss", predicted)
    monkeypatch.setattr(aim, "perplexity", measured)
    common = {"recipe": "default", "calibration": letters(tmp_path), "ratio": None, **LONG}
    whole = configured(model, "whole", perplexity_at_most=0.002, **common)
    result = streamprune.prune(whole)
    assert result.aim is not None
    tried = result.aim["tried"]
    assert 1 <= len(tried) < aim.TRIES
    assert all(aim.rise(each) > math.log(1.002) for each in tried)
    ratios = [*(each["ratio"] for each in tried), result.ratio_requested]
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[0] > 0.45
    assert ratios[1] == pytest.approx(0.1, abs=0.02)
    assert aim.rise(result.aim) <= math.log(1.002)
    stopped = configured(model, "stopped", perplexity_at_most=0.002, **common)
    while not stopped.out.exists():
        with stopping_after(2, monkeypatch):
            try:
                streamprune.prune(stopped)
            except Stop:
                continue
    assert contents(stopped.out) == contents(whole.out)
    monkeypatch.setattr(aim, "perplexity", lambda skeleton, *_: 40.0 + (skeleton.block_parameters() < blocks))
    with pytest.raises(
        ConfigError, match=r"no ratio is predicted to .* 0.20%; ratio 0.\d+ raises perplexity on 4 .* 2.50%"
    ):
        streamprune.prune(configured(model, "never", perplexity_at_most=0.002, **common))


def test_micro_batches_that_a_refused_try_halved_are_whole_again(
    tiny: Tiny, configured: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prune sweep of the first ratio runs out of memory; its journal lines go, and with them the smaller sizes."""
    given: list[int] = []
    prune = BlockPruner.prune

    def scarce(self: BlockPruner, *arguments: Any) -> Any:
        assert self.streams is not None
        given.append(self.streams.batch)
        if len(given) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return prune(self, *arguments)

    def predicted(recipe: Any, sites: Any, survey: Any, keeps: Any) -> float:
        return 0.2 * sum((site.units - keeps[site.name]) * site.unit_parameters for site in sites) / blocks

    model = tiny("llama", **WIDE, num_hidden_layers=2)
    blocks = open_skeleton(model, torch.device("cpu"), "auto").block_parameters()
    monkeypatch.setattr(BlockPruner, "prune", scarce)
    monkeypatch.setattr(aim, "predicted_loss", predicted)
    perplexities = iter([40.0, 60.0, 40.0])  # dense, refused, accepted
    monkeypatch.setattr(aim, "perplexity", lambda *_: next(perplexities))
    config = configured(
        model, recipe="default", effort="low", calibration=letters(tmp_path), ratio=None, perplexity_at_most=0.1, **LONG
    )
    result = streamprune.prune(config)
    assert result.aim is not None
    assert len(result.aim["tried"]) == 1
    whole = LONG["samples"]
    assert given == [whole, *[whole // 2] * 2, *[whole] * 2]
