"""Measure inference speed in transformers, pruned against dense, and compare it with the limit the removed work allows.

Both models are in memory and alternate in short rounds, so that other load on the machine affects both. The result is
the median over rounds of the ratio of their times.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.benchmark import set_torch_threads, timer

from ..errors import ConfigError, ResourceError, check_least
from ..jobs.forecast.memory import Memory
from ..jobs.forecast.workload import Workload
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
    """Of each round."""
    tokens_per_second: float
    """In the median round."""


@dataclass(frozen=True)
class Speed:
    path: str
    parameters: int
    prefill: Phase
    decode: Phase


@dataclass(frozen=True)
class SpeedUp:
    """Speed-up of one phase: all ratios are dense over pruned."""

    rounds: tuple[float, ...]
    """Ratio of the seconds of each round."""
    median: float
    fastest: float
    """Ratio of the fastest rounds of the two models: the better estimate on a busy machine."""
    by_operations: float
    """Ratio of FLOPs: the limit for prefill."""
    by_bytes: float
    """Ratio of bytes read: the limit for decoding a few sequences."""
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
    """Whether the model has this width. The other figures are relative to the model's own width."""
    operations: float
    """FLOPs."""
    prefill: float
    """Seconds, median over rounds; all tokens of the prompts at once."""
    decode: float
    """Seconds, median over rounds; one token per sequence."""


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
    check_least(
        1, prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch=batch, repetitions=repetitions, threads=threads
    )
    skeletons = [open_skeleton(path, where, dtype) for path in paths]
    prompt_tokens, new_tokens = _fitting(skeletons, prompt_tokens, new_tokens)
    _require_memory(skeletons, batch, prompt_tokens + new_tokens, machine.memory_limits(where, memory))
    vocabulary = min(skeleton.vocabulary for skeleton in skeletons)
    prompts = torch.randint(vocabulary, (batch, prompt_tokens), generator=torch.Generator().manual_seed(0)).to(where)
    with set_torch_threads(threads or torch.get_num_threads()):
        used = torch.get_num_threads()
        progress.phase("bench", len(skeletons) + repetitions)
        runners = []
        for skeleton in skeletons:
            runners.append(Runner(skeleton, prompts, new_tokens))
            progress.step(f"{skeleton.checkpoint.directory} loaded and warm")
        for number in range(repetitions):
            for runner in reversed(runners) if number % 2 else runners:
                runner.run()
            progress.step(f"round {number + 1}")
    ours, other = runners[0].speed(), runners[1].speed() if len(runners) > 1 else None
    return Bench(
        model=ours,
        against=other,
        prefill=_speed_up(other.prefill, ours.prefill, memory_bound=False) if other else None,
        decode=_speed_up(other.decode, ours.decode, memory_bound=True) if other else None,
        protocol=(
            f"{batch} × {prompt_tokens} random tokens, then {new_tokens} steps with keys and values cached; medians of "
            f"{repetitions} round{'s' * (repetitions > 1)}{', models in turn' * (other is not None)}; transformers on "
            f"{where} in {machine.dtype_name(skeletons[0].dtype)}"
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
    check_least(1, prompt_tokens=prompt_tokens, batch=batch, repetitions=repetitions, threads=threads)
    skeleton = open_skeleton(resolve_model(model), where, dtype)
    own = statistics.median_low(site.columns for site in skeleton.all_sites() if site.kind == "ffn")
    widths: dict[int, tuple[int, ...]] = {own: ()}
    for multiple in (1, *MULTIPLES):
        width = own + 1 - own % 2 if multiple == 1 else -(-own // multiple) * multiple
        widths[width] = (*widths.get(width, ()), multiple)
    with set_torch_threads(threads or torch.get_num_threads()):
        prefill, decode = (
            _relative_seconds(skeleton, [*widths], tokens, repetitions) for tokens in (batch * prompt_tokens, batch)
        )
    found = zip(widths.items(), prefill, decode, strict=True)
    return sorted(
        (Width(width, multiples, width == own, width / own, *seconds) for (width, multiples), *seconds in found),
        key=lambda each: each.width,
    )


class Runner:
    """A model in memory, with the FLOPs and bytes read of one round, counted in a first round that also warms it up."""

    def __init__(self, skeleton: Skeleton, prompts: Tensor, new_tokens: int) -> None:
        self.path, self.prompts, self.new_tokens = skeleton.checkpoint.directory, prompts, new_tokens
        self.model = load_whole(self.path, skeleton.dtype).to(prompts.device)
        self._seconds: list[tuple[float, float]] = []
        weights, operations, read = weight_bytes(self.model), [], []
        with FlopCounter() as counter:
            for cache, _ in self.steps():
                operations.append(counter.total)
                read.append(weights + sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers))
        self._operations = operations[0], operations[-1] - operations[0]
        self._bytes_read = read[0], sum(read[1:])

    @torch.no_grad()
    def steps(self) -> Iterator[tuple[Any, Tensor]]:
        """Run prefill, then each decoding step; yield the cache and the next tokens (batch, 1) after each."""
        name, cache, tokens = cache_argument(type(self.model).forward), None, self.prompts
        for _ in range(1 + self.new_tokens):
            found = self.model(input_ids=tokens, use_cache=True, logits_to_keep=1, **{name: cache})
            cache, tokens = found[name], found.logits[:, -1:].argmax(-1)
            yield cache, tokens

    def run(self) -> None:
        """Time one round: prefill, and all decoding steps together."""
        steps, start = self.steps(), timer()
        next(steps)
        middle = timer()
        for _ in steps:
            pass
        self._seconds.append((middle - start, timer() - middle))

    def speed(self) -> Speed:
        tokens = self.prompts.numel(), len(self.prompts) * self.new_tokens
        columns = zip(tokens, self._operations, self._bytes_read, zip(*self._seconds, strict=True), strict=True)
        prefill, decode = (
            Phase(count, operations, read, seconds, count / statistics.median(seconds))
            for count, operations, read, seconds in columns
        )
        return Speed(str(self.path), self.model.num_parameters(), prefill, decode)


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of weights that a step reads: all weights, but embeddings only if they are also the head."""
    modules = [module for module in model.modules() if not isinstance(module, nn.Embedding)]
    return sum(weight.nbytes for weight in {p for module in modules for p in module.parameters(recurse=False)})


def _fitting(skeletons: Sequence[Skeleton], prompt_tokens: int | None, new_tokens: int | None) -> tuple[int, int]:
    """Return prompt and new tokens; numbers that are not given are chosen to fit the shortest context."""
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


def _require_memory(skeletons: Sequence[Skeleton], batch: int, length: int, room: dict[str, int]) -> None:
    """Check that all models fit in memory together, with their keys, values and activations."""
    total, held, workload = 0, [], Workload(samples=batch, length=length, text=True, prunes=False)
    for skeleton in skeletons:
        pairs = sum(2 * site.units * site.head_width for site in skeleton.all_sites())
        size = skeleton.dtype.itemsize * (skeleton.parameters() + batch * length * pairs)
        total += size
        held.append(f"{skeleton.checkpoint.directory} {format_bytes(size)}")
    passing = max(Memory(skeleton, workload).device_peak(batch, 1) for skeleton in skeletons)
    limit, base = room["device_limit"], room["base"] if skeletons[0].device.type == "cpu" else 0
    if total + passing + base > Memory(skeletons[0], workload).plannable(limit):
        raise ResourceError(
            f"the memory limit is {format_bytes(limit)}; with its weights and {batch} × {length} keys and values in "
            f"{machine.dtype_name(skeletons[0].dtype)}, {' and '.join(held)} and {format_bytes(passing)} for activations "
            "must be in memory together" + "; --dtype bfloat16 takes less" * (skeletons[0].dtype.itemsize > 2)
        )


def _speed_up(dense: Phase, pruned: Phase, *, memory_bound: bool) -> SpeedUp:
    rounds = tuple(d / p for d, p in zip(dense.seconds, pruned.seconds, strict=True))
    median, by_operations = statistics.median(rounds), dense.operations / pruned.operations
    by_bytes = dense.bytes_read / pruned.bytes_read
    return SpeedUp(
        rounds=rounds,
        median=median,
        fastest=min(dense.seconds) / min(pruned.seconds),
        by_operations=by_operations,
        by_bytes=by_bytes,
        achieved=median / (by_bytes if memory_bound else by_operations),
    )


@torch.no_grad()
def _relative_seconds(skeleton: Skeleton, widths: Sequence[int], tokens: int, repetitions: int) -> list[float]:
    """Return the seconds of an FFN's two products, d → width → d, relative to the first width: medians over rounds."""
    options: dict[str, Any] = {"device": skeleton.device, "dtype": skeleton.dtype}
    d, x = skeleton.width, torch.randn(tokens, skeleton.width, **options)

    def mean_seconds(pairs: list[tuple[Tensor, Tensor]], times: int) -> float:
        start = timer()
        for _ in range(times):
            for up, down in pairs:
                F.linear(F.linear(x, up), down)
        return (timer() - start) / (times * len(pairs))

    timed = []
    for width in widths:
        copies = -(-CACHE_BYTES // (2 * width * d * skeleton.dtype.itemsize))
        pairs = [(torch.randn(width, d, **options), torch.randn(d, width, **options)) for _ in range(copies)]
        mean_seconds(pairs, 1)  # warm up
        timed.append((pairs, 1 + int(ROUND_SECONDS / (copies * mean_seconds(pairs, 1)))))
    seconds: list[list[float]] = [[] for _ in widths]
    for number in range(repetitions):
        for index in reversed(range(len(widths))) if number % 2 else range(len(widths)):
            seconds[index].append(mean_seconds(*timed[index]))
    return [statistics.median(a / b for a, b in zip(each, seconds[0], strict=True)) for each in seconds]
