"""Measure inference speed in transformers, pruned against dense, and compare it with the limit the removed work allows.

Both models are in memory and alternate in short rounds, so that other load on the machine affects both. The result is
the median over rounds of the ratio of their times.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, ResourceError
from ..jobs.forecast.memory import device_peak
from ..jobs.forecast.needs import Needs
from ..maths.flops import FlopCounter
from ..model.hub import resolve_model
from ..model.skeleton import Skeleton, open_skeleton
from ..model.upstream import cache_argument
from ..model.whole import load_whole
from ..system import machine
from ..system.progress import Progress, Silent
from ..system.units import format_bytes

PROMPT_TOKENS, NEW_TOKENS = 512, 64
"""Defaults of `bench`, if the models' context is long enough."""

MULTIPLES = (8, 16, 32, 64, 128, 256)
"""Values of `--round-to` that `bench_widths` tries."""

ROUND_SECONDS = 0.02
"""Least seconds per round of one width."""

CACHE_BYTES = 1 << 26
"""Least bytes of one width's weights, in several copies if necessary: more than most CPU caches hold."""


@dataclass(frozen=True)
class Phase:
    """Prefill or decoding of one model."""

    tokens: int
    """Tokens per round, of all sequences together."""
    operations: int
    """FLOPs per round, as `maths.flops` counts them."""
    bytes_read: int
    """Bytes read per round: at every step, all weights except looked-up embeddings, and the cached keys and values."""
    seconds: tuple[float, ...]
    """Seconds of each round."""
    tokens_per_second: float
    """Tokens per second in the median round."""


@dataclass(frozen=True)
class Speed:
    """Speed of one model."""

    path: str
    parameters: int
    prefill: Phase
    decode: Phase


@dataclass(frozen=True)
class SpeedUp:
    """Speed-up of one phase: time of the dense model over time of the pruned one."""

    rounds: tuple[float, ...]
    """Seconds dense / seconds pruned, of each round."""
    median: float
    """Median of `rounds`."""
    fastest: float
    """Ratio of the fastest rounds of the two models: the better estimate on a busy machine."""
    by_operations: float
    """Ratio of FLOPs, dense over pruned: the limit for prefill."""
    by_bytes: float
    """Ratio of bytes read, dense over pruned: the limit for decoding a few sequences."""
    achieved: float
    """`median` over the limit of the phase."""


@dataclass(frozen=True)
class Bench:
    """Result of `bench`."""

    model: Speed
    against: Speed | None
    prefill: SpeedUp | None
    """None without a model to compare with; the same holds for `decode`."""
    decode: SpeedUp | None
    protocol: str
    """How it was measured."""


@dataclass(frozen=True)
class Width:
    """Speed of the two matrix products of an FFN at one width, d → width → d."""

    width: int
    round_to: tuple[int, ...]
    """Values of `--round-to` that give this width; 1 for an odd width."""
    own: bool
    """Whether the model has this width."""
    operations: float
    """FLOPs relative to the model's own width."""
    prefill: float
    """Seconds relative to the model's own width, median over rounds; all tokens of the prompts at once."""
    decode: float
    """Seconds relative to the model's own width, median over rounds; one token per sequence."""


def bench(
    model: str | Path,
    against: str | Path | None = None,
    *,
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    batch: int = 1,
    repetitions: int = 5,
    threads: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    memory: int | None = None,
    progress: Progress | None = None,
) -> Bench:
    """Time prefill and decoding of a checkpoint directory, and compare it with another one if given.

    Runs random tokens through transformers' own forward with its key/value cache, after one warm-up round per model.

    Args:
        model: the pruned model.
        against: the dense model.
        prompt_tokens: tokens per prompt; None takes 512, or what `new_tokens` leaves of the shorter context.
        new_tokens: decoding steps after the prompt, one token each; None takes 64, or what `prompt_tokens` leaves of
            the shorter context, at most half of it.
        batch: sequences processed together.
        repetitions: number of rounds. The order of the two models alternates.
        threads: CPU threads; None leaves the number unchanged.
        memory: bytes that the device may use; None allows all free memory.

    Raises:
        CheckpointError, ConfigError: the model, the device or a number is unusable.
        ResourceError: the models do not fit in memory together.
    """
    progress = progress or Silent()
    where = machine.resolve_device(device)
    paths = [resolve_model(each, progress) for each in (model, against) if each is not None]
    _check(prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch=batch, repetitions=repetitions, threads=threads)
    skeletons = [open_skeleton(path, where, dtype) for path in paths]
    prompt_tokens, new_tokens = _fitting(skeletons, prompt_tokens, new_tokens)
    _require_memory(skeletons, batch, prompt_tokens + new_tokens, machine.memory_limits(where, memory))
    vocabulary = min(skeleton.vocabulary for skeleton in skeletons)
    prompts = torch.randint(vocabulary, (batch, prompt_tokens), generator=torch.Generator().manual_seed(0)).to(where)
    with _threads(threads) as used:
        progress.phase("bench", len(skeletons) + repetitions)
        runners = []
        for skeleton in skeletons:
            runners.append(_Runner(skeleton, prompts, new_tokens))
            progress.step(f"{skeleton.checkpoint.directory} loaded and warm")
        rounds: list[list[tuple[float, float]]] = [[] for _ in runners]
        for number in range(repetitions):
            order = list(range(len(runners)))
            for index in reversed(order) if number % 2 else order:
                rounds[index].append(runners[index].run())
            progress.step(f"round {number + 1}")
    speeds = [runner.speed(seconds) for runner, seconds in zip(runners, rounds, strict=True)]
    other = speeds[1] if len(speeds) > 1 else None
    return Bench(
        model=speeds[0],
        against=other,
        prefill=None if other is None else _speed_up(other.prefill, speeds[0].prefill, memory_bound=False),
        decode=None if other is None else _speed_up(other.decode, speeds[0].decode, memory_bound=True),
        protocol=(
            f"{batch} × {prompt_tokens} random tokens, then {new_tokens} steps with keys and values cached; medians of "
            f"{repetitions} round{'s' * (repetitions > 1)}"
            + (", models in turn" if other is not None else "")
            + f"; transformers on {where} in "
            f"{machine.dtype_name(skeletons[0].dtype)}"
            + (f", {used} thread{'s' * (used > 1)}" if where.type == "cpu" else "")
        ),
    )


def bench_widths(
    model: str | Path,
    *,
    prompt_tokens: int = 512,
    batch: int = 1,
    repetitions: int = 5,
    threads: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> list[Width]:
    """Time an FFN's matrix products at the widths that other values of `--round-to` give.

    The widths are the next multiples from the median FFN width of the model upwards. Weights are random, and all widths
    take turns.

    Raises:
        CheckpointError, ConfigError: the model, the device or a number is unusable.
    """
    where = machine.resolve_device(device)
    _check(prompt_tokens=prompt_tokens, batch=batch, repetitions=repetitions, threads=threads)
    skeleton = open_skeleton(resolve_model(model), where, dtype)
    own = statistics.median_low(site.columns for site in skeleton.all_sites() if site.kind == "ffn")
    widths: dict[int, tuple[int, ...]] = {own: ()}
    for multiple in (1, *MULTIPLES):
        width = own + 1 - own % 2 if multiple == 1 else -(-own // multiple) * multiple
        widths[width] = (*widths.get(width, ()), multiple)
    with _threads(threads):
        prefill = _width_seconds(skeleton, list(widths), batch * prompt_tokens, repetitions)
        decode = _width_seconds(skeleton, list(widths), batch, repetitions)
    return [
        Width(
            width=width,
            round_to=multiples,
            own=width == own,
            operations=width / own,
            prefill=_ratio(prefill[width], prefill[own]),
            decode=_ratio(decode[width], decode[own]),
        )
        for width, multiples in sorted(widths.items())
    ]


class _Runner:
    """A model in memory, with the FLOPs and bytes read of one round."""

    def __init__(self, skeleton: Skeleton, prompts: Tensor, new_tokens: int) -> None:
        self.path = skeleton.checkpoint.directory
        self.prompts, self.new_tokens = prompts, new_tokens
        self.model = load_whole(self.path, skeleton.dtype).to(prompts.device)
        weights = weight_bytes(self.model)
        with FlopCounter() as counter:
            cache, token = self._prefill()
            self.prefill_operations = counter.total
            self.prefill_bytes = weights + cache_bytes(cache)
            self.decode_bytes = 0
            for _ in range(new_tokens):
                token = self._step(cache, token)
                self.decode_bytes += weights + cache_bytes(cache)
            self.decode_operations = counter.total - self.prefill_operations

    def run(self) -> tuple[float, float]:
        """Run one round; return the seconds of prefill and of all decoding steps."""
        start = self._now()
        cache, token = self._prefill()
        middle = self._now()
        for _ in range(self.new_tokens):
            token = self._step(cache, token)
        return middle - start, self._now() - middle

    def speed(self, seconds: Sequence[tuple[float, float]]) -> Speed:
        """Summarise the rounds, given as (prefill, decode) seconds."""
        prefill, decode = zip(*seconds, strict=True)
        return Speed(
            path=str(self.path),
            parameters=self.model.num_parameters(),
            prefill=_phase(self.prompts.numel(), self.prefill_operations, self.prefill_bytes, prefill),
            decode=_phase(len(self.prompts) * self.new_tokens, self.decode_operations, self.decode_bytes, decode),
        )

    @torch.no_grad()
    def _prefill(self) -> tuple[Any, Tensor]:
        found = self.model(input_ids=self.prompts, use_cache=True, logits_to_keep=1)
        return found[cache_argument(type(self.model).forward)], found.logits[:, -1:].argmax(-1)

    @torch.no_grad()
    def _step(self, cache: Any, token: Tensor) -> Tensor:
        given = {cache_argument(type(self.model).forward): cache}
        found: Tensor = self.model(input_ids=token, use_cache=True, **given).logits
        return found[:, -1:].argmax(-1)

    def _now(self) -> float:
        if self.prompts.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of weights that a step reads: all weights, but embeddings only if they are also the head."""
    read = {
        parameter
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    return sum(parameter.nbytes for parameter in read)


def cache_bytes(cache: Any) -> int:
    """Return the bytes of the keys and values that a transformers cache holds."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def _fitting(skeletons: Sequence[Skeleton], prompt_tokens: int | None, new_tokens: int | None) -> tuple[int, int]:
    """Return prompt and new tokens; numbers that are not given are chosen to fit the shortest context.

    Raises:
        ConfigError: the given numbers do not fit.
    """
    shortest = min(skeletons, key=lambda each: each.context or sys.maxsize)
    context = shortest.context
    if context is None:
        return prompt_tokens or PROMPT_TOKENS, new_tokens or NEW_TOKENS
    new = new_tokens or max(1, min(NEW_TOKENS, context // 2, context - (prompt_tokens or 0)))
    prompt = prompt_tokens or max(1, min(PROMPT_TOKENS, context - new))
    if prompt + new > context:
        raise ConfigError(
            f"--prompt-tokens {prompt} and --new-tokens {new} make {prompt + new} tokens; the context of "
            f"{shortest.checkpoint.directory} is {context}"
        )
    return prompt, new


def _check(**numbers: int | None) -> None:
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")


def _require_memory(skeletons: Sequence[Skeleton], batch: int, length: int, room: dict[str, int]) -> None:
    """Check that all models fit in memory together, with their keys, values and activations.

    Raises:
        ResourceError: they do not fit.
    """
    sizes, passing = [], 0
    for skeleton in skeletons:
        pairs = sum(2 * site.units * site.head_width for site in skeleton.all_sites())
        sizes.append(skeleton.dtype.itemsize * (skeleton.parameters() + batch * length * pairs))
        needs = Needs(samples=batch, length=length, text=True, prunes=False)
        passing = max(passing, device_peak(skeleton, needs, batch, 1))
    limit = room["device_limit"]
    if sum(sizes) + passing + (room["base"] if skeletons[0].device.type == "cpu" else 0) > limit:
        each = " and ".join(
            f"{skeleton.checkpoint.directory} {format_bytes(size)}"
            for skeleton, size in zip(skeletons, sizes, strict=True)
        )
        raise ResourceError(
            f"the memory limit is {format_bytes(limit)}; with its weights and {batch} × {length} keys and values in "
            f"{machine.dtype_name(skeletons[0].dtype)}, {each} and {format_bytes(passing)} for activations must be in "
            "memory together" + ("; --dtype bfloat16 takes less" if skeletons[0].dtype.itemsize > 2 else "")
        )


@contextmanager
def _threads(count: int | None) -> Iterator[int]:
    """Use `count` CPU threads inside the context; yield the number in use."""
    usual = torch.get_num_threads()
    torch.set_num_threads(count or usual)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(usual)


def _phase(tokens: int, operations: int, bytes_read: int, seconds: Sequence[float]) -> Phase:
    return Phase(tokens, operations, bytes_read, tuple(seconds), tokens / statistics.median(seconds))


def _speed_up(dense: Phase, pruned: Phase, *, memory_bound: bool) -> SpeedUp:
    median = _ratio(dense.seconds, pruned.seconds)
    by_operations = dense.operations / pruned.operations
    by_bytes = dense.bytes_read / pruned.bytes_read
    return SpeedUp(
        rounds=tuple(d / p for d, p in zip(dense.seconds, pruned.seconds, strict=True)),
        median=median,
        fastest=min(dense.seconds) / min(pruned.seconds),
        by_operations=by_operations,
        by_bytes=by_bytes,
        achieved=median / (by_bytes if memory_bound else by_operations),
    )


def _ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Return the median over rounds of the ratio."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


@torch.no_grad()
def _width_seconds(skeleton: Skeleton, widths: Sequence[int], tokens: int, repetitions: int) -> dict[int, list[float]]:
    """Return the seconds of the two products in each round, by width."""
    options: dict[str, Any] = {"device": skeleton.device, "dtype": skeleton.dtype}
    x = torch.randn(tokens, skeleton.width, **options)
    works, times = {}, {}
    for width in widths:
        copies = -(-CACHE_BYTES // (2 * width * skeleton.width * skeleton.dtype.itemsize))
        pairs = [
            (torch.randn(width, skeleton.width, **options), torch.randn(skeleton.width, width, **options))
            for _ in range(copies)
        ]
        works[width] = _products(x, pairs)
        works[width](1)
        times[width] = 1 + int(ROUND_SECONDS / (copies * works[width](1)))
    seconds: dict[int, list[float]] = {width: [] for width in widths}
    for number in range(repetitions):
        for width in reversed(widths) if number % 2 else widths:
            seconds[width].append(works[width](times[width]))
    return seconds


def _products(x: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> Callable[[int], float]:
    """Return a function that times passes x → width → d over several weight pairs: mean seconds per pass.

    Args:
        x: (tokens, d).
        pairs: weights (width, d) and (d, width).
    """

    def work(times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            for up, down in pairs:
                y = nn.functional.linear(nn.functional.linear(x, up), down)
        if y.is_cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / (times * len(pairs))

    return work
