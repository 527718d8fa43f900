"""Inference speed in transformers, dense against pruned, beside what the removed work would allow.

Both models are in memory and take turns in short rounds, so that what else the machine does falls on both; what counts is the
median over rounds of their ratio.
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
from ..maths.flops import counting
from ..model.hub import resolve_model
from ..model.skeleton import Skeleton, open_skeleton
from ..model.upstream import cache_argument
from ..model.whole import load_whole
from ..system import machine
from ..system.progress import Progress, Silent
from ..system.units import format_bytes

PROMPT_TOKENS, NEW_TOKENS = 512, 64
"""What `bench` takes unless told otherwise, where the models' context is long enough."""

MULTIPLES = (8, 16, 32, 64, 128, 256)
"""Values of `--round-to` that `bench_widths` tries."""

ROUND_SECONDS = 0.02
"""What a round of one width takes at least."""

CACHE_BYTES = 1 << 26
"""A width's weights take at least this much, in several copies if they must: more than most caches hold."""


@dataclass(frozen=True)
class Phase:
    """Prefill or decoding of one model."""

    tokens: int
    """Of all sequences together, in one round."""
    operations: int
    """Floating-point operations of a round, as `maths.operations` counts them."""
    bytes_read: int
    """Of a round: all weights but looked-up embeddings, at every step, and the keys and values there are."""
    seconds: tuple[float, ...]
    """Of each round."""
    tokens_per_second: float
    """In the median round."""


@dataclass(frozen=True)
class Speed:
    """One model."""

    path: str
    parameters: int
    prefill: Phase
    decode: Phase


@dataclass(frozen=True)
class SpeedUp:
    """One phase, dense over pruned."""

    rounds: tuple[float, ...]
    """Seconds dense / seconds pruned, round by round."""
    median: float
    fastest: float
    """Of each one's fastest round: on a busy machine the better guess."""
    by_operations: float
    """What the removed operations would allow: prefill's limit."""
    by_bytes: float
    """What the bytes that are no longer read would allow: the limit of decoding a few sequences."""
    achieved: float
    """The median over what that phase's limit allows."""


@dataclass(frozen=True)
class Bench:
    """What was measured, and how."""

    model: Speed
    against: Speed | None
    prefill: SpeedUp | None
    """None without a model to compare with, as `decode`."""
    decode: SpeedUp | None
    protocol: str


@dataclass(frozen=True)
class Width:
    """The two products of an FFN at one width, d → width → d."""

    width: int
    round_to: tuple[int, ...]
    """Values of `--round-to` that would have given it; 1 for an odd width."""
    own: bool
    """Whether the model has it."""
    operations: float
    """Over those at the model's own width."""
    prefill: float
    """Seconds over those at the model's own width, the median over rounds; all tokens of the prompts at once."""
    decode: float
    """The same with one token a sequence."""


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
    """Time a checkpoint directory, against another if one is given: a forward pass over prompts, then token by token.

    Random tokens, transformers' own forward with its cache of keys and values, one round of each to warm up.

    Args:
        model: the pruned one.
        against: the dense one.
        prompt_tokens: tokens of each prompt; None takes 512, or what the shorter context leaves beside `new_tokens`.
        new_tokens: decoding steps after the prompt, one token each; None takes 64, or what `prompt_tokens` leaves of
            the shorter context, at most half of it.
        batch: sequences at once.
        repetitions: rounds; the two models change places after each.
        threads: of the CPU; None leaves them as they are.
        memory: bytes the device may use; None takes what is free.

    Raises:
        CheckpointError, ConfigError: unusable model, device or number.
        ResourceError: the models do not fit in memory together.
    """
    progress = progress or Silent()
    where = machine.resolve_device(device)
    paths = [resolve_model(each, progress) for each in (model, against) if each is not None]
    _check(prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch=batch, repetitions=repetitions, threads=threads)
    skeletons = [open_skeleton(path, where, dtype) for path in paths]
    prompt_tokens, new_tokens = _fitting(skeletons, prompt_tokens, new_tokens)
    _require_memory(skeletons, batch, prompt_tokens + new_tokens, machine.room(where, memory))
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
    """What other values of `--round-to` would have given: an FFN's products at the next multiples above a model's width.

    Measured on random weights at the median width of the model's FFNs, all widths in turn.

    Raises:
        CheckpointError, ConfigError: unusable model, device or number.
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
    """A model in memory, with what a round of it computes and reads."""

    def __init__(self, skeleton: Skeleton, prompts: Tensor, new_tokens: int) -> None:
        self.path = skeleton.checkpoint.directory
        self.prompts, self.new_tokens = prompts, new_tokens
        self.model = load_whole(self.path, skeleton.dtype).to(prompts.device)
        weights = weight_bytes(self.model)
        with counting() as counter:
            cache, token = self._prefill()
            self.prefill_operations = counter.total
            self.prefill_bytes = weights + cache_bytes(cache)
            self.decode_bytes = 0
            for _ in range(new_tokens):
                token = self._step(cache, token)
                self.decode_bytes += weights + cache_bytes(cache)
            self.decode_operations = counter.total - self.prefill_operations

    def run(self) -> tuple[float, float]:
        """Seconds of prefill and of all steps after it."""
        start = self._now()
        cache, token = self._prefill()
        middle = self._now()
        for _ in range(self.new_tokens):
            token = self._step(cache, token)
        return middle - start, self._now() - middle

    def speed(self, seconds: Sequence[tuple[float, float]]) -> Speed:
        """What those rounds come to."""
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
    """Bytes of weights that a step reads: all of them, but embeddings only where they are the head too."""
    read = {
        parameter
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    return sum(parameter.nbytes for parameter in read)


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values that a transformers cache holds."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def _fitting(skeletons: Sequence[Skeleton], prompt_tokens: int | None, new_tokens: int | None) -> tuple[int, int]:
    """Prompt and new tokens, those that were not given chosen to fit the shortest context.

    Raises:
        ConfigError: those that were given do not fit.
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
    """Refuse models that are not in memory together, with keys, values and what passes through."""
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
    """So many threads of the CPU, while open."""
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
    """The median over rounds."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


@torch.no_grad()
def _width_seconds(skeleton: Skeleton, widths: Sequence[int], tokens: int, repetitions: int) -> dict[int, list[float]]:
    """Seconds of the two products by width, round by round."""
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
    """Seconds of one pass x → width → d, over several with other weights."""

    def work(times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            for up, down in pairs:
                y = nn.functional.linear(nn.functional.linear(x, up), down)
        if y.is_cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / (times * len(pairs))

    return work
