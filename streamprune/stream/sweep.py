"""Run forward and backward sweeps over the blocks, with the weights of one block at a time.

Boundaries are named by stream, block and sublayer: `dense-0003-0` is the input of block 3 in the dense
model, `dense-0003-1` the input of that block's second sublayer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import CheckpointError, NumericalError
from ..maths.flops import kind
from ..maths.refit import accumulator, advice, all_finite
from ..maths.sampling import sample
from ..maths.sums import SiteStatistics
from ..model.block import Block, Mixed, Sublayer
from ..model.proof import prove
from ..model.skeleton import Skeleton
from ..model.tokenizer import IGNORED
from ..system.host import checksum, return_freed_memory, tensor_bytes
from ..system.progress import Progress, rest
from ..system.ranks import ALONE, Ranks
from ..system.threads import prefetch, read_ahead
from .copies import Copies, Taken
from .store import ActivationStore

LOGIT_BYTES = 1 << 28  # bytes of float32 logits that the head computes at a time


def boundary(stream: str, block: int, sublayer: int = 0) -> str:
    """Return the name of the input of a sublayer of a block."""
    return f"{stream}-{block:04}-{sublayer}"


def blocks(skeleton: Skeleton, order: Iterable[int]) -> Iterator[tuple[int, Block]]:
    """Iterate over blocks with their weights in the given order, reading the next block while one is in use.

    With `Skeleton.copies_ahead`, the next block's weights are also copied to the device meanwhile.
    """
    copies = Copies.of(skeleton.device)

    def load(index: int) -> tuple[dict[str, Tensor], Taken]:
        weights = skeleton.read_block(index)
        return weights, copies.inward(list(weights.values()) if skeleton.copies_ahead else [])

    for index, (weights, take) in read_ahead(skeleton.device, order, skeleton.announce_block, load):
        built = [skeleton.build_block(index, weights, dict(zip(weights, take(), strict=False)))]
        del weights, take
        # Keep no reference here, and let the caller delete its own: the old block is freed before the next is built.
        yield index, built.pop()
        return_freed_memory()


def check_weights(skeleton: Skeleton, progress: Progress, ranks: Ranks = ALONE) -> dict[str, int]:
    """Read all weights once, distributed over the ranks, to find NaN and Inf before the long computation starts.

    Returns the checksums of the tensors that this rank read, by tensor name, as `Checkpoint.changed` takes them.

    Raises:
        CheckpointError: a tensor holds NaN, Inf or a value outside the computing dtype's range, or see `model.proof.prove`.
    """
    prove(skeleton)
    groups = [list(skeleton.block_names(index).values()) for index in range(len(skeleton))]
    groups += [
        [name] for name in {*skeleton.outside.embed_names(), *skeleton.outside.head_names(), *skeleton.carried_names()}
    ]
    groups = [group for number, group in enumerate(groups) if ranks.mine(number)]
    progress.phase("check weights", len(groups))
    names = [name for group in groups for name in group]
    left = {group[-1] for group in groups}
    sums = {}
    for name, tensor in prefetch(names, skeleton.checkpoint.read):
        sums[name] = checksum(tensor_bytes(tensor))
        if not all_finite(tensor):
            raise CheckpointError(f"{skeleton.checkpoint.directory}: tensor {name!r} holds NaN or Inf")
        most = torch.finfo(skeleton.dtype).max
        if torch.finfo(tensor.dtype).max > most and not all_finite(tensor.to(skeleton.dtype)):
            raise CheckpointError(
                f"{skeleton.checkpoint.directory}: tensor {name!r} holds more than {most:g}, where "
                f"{str(skeleton.dtype).removeprefix('torch.')} ends, which is computed in{advice(skeleton.dtype)}"
            )
        if name in left:
            progress.step(name)
            rest(progress)
    return sums


def embed(skeleton: Skeleton, tokens: Tensor, store: ActivationStore, name: str, size: int) -> None:
    """Write the first block's input for `tokens` (samples, length) int64, in micro-batches of `size` sequences."""
    with skeleton.embedding() as embedding, store.writing(name, "the embedding") as write:
        for batch in store.batches(size):
            write(embedding(tokens[batch].to(skeleton.device)))


@torch.no_grad()
def advance(skeleton: Skeleton, block: Block, index: int, store: ActivationStore, stream: str, size: int) -> None:
    """Run a block on its stored input and store the result, the input of the next block."""
    source, target = boundary(stream, index), boundary(stream, index + 1)
    with store.writing(target, f"block {index}") as write:
        for _, (x,) in store.each(size, source):
            write(block(x, skeleton.arguments(x.shape[0], x.shape[1])[index]))


def forward(skeleton: Skeleton, store: ActivationStore, stream: str, start: int, stop: int, size: int) -> Iterator[int]:
    """Run blocks `start` to `stop` (exclusive); yield each index once the block's output is in the store."""
    for index, block in blocks(skeleton, range(start, stop)):
        advance(skeleton, block, index, store, stream, size)
        del block
        yield index


def losses(skeleton: Skeleton, store: ActivationStore, name: str, labels: Tensor, size: int) -> tuple[float, int]:
    """Return the sum of negative log-likelihoods in nats, and the number of predictions that count.

    Args:
        name: boundary of the last block's output.
        labels: (samples, length) int64: the tokens, or `IGNORED`. The first of a window is not predicted.
        size: sequences per micro-batch.
    """
    dtype = accumulator(skeleton.dtype)
    summed = torch.zeros((), dtype=torch.float64, device=skeleton.device)  # read once: reading waits for the device
    with skeleton.head() as head, torch.no_grad():
        for batch, (hidden,) in store.each(size, name):
            for h, y in _predictions(hidden, labels[batch].to(skeleton.device), vocabulary=skeleton.vocabulary):
                summed += F.cross_entropy(head(h).to(dtype), y, reduction="sum", ignore_index=IGNORED).double()
    total, count = float(summed), int((labels[:, 1:] != IGNORED).sum())
    if total != total or total == float("inf"):
        raise NumericalError(f"the head gives NaN or Inf{advice(skeleton.dtype)}")
    return total, count


def head_gradient(
    skeleton: Skeleton, store: ActivationStore, labels: Tensor, size: int, *, uniform: Tensor | None = None
) -> None:
    """Write ∂loss/∂(last block's output); the loss is the *sum* of a sequence's negative log-likelihoods.

    The sum instead of the mean keeps gradients within float16's range. The statistics normalise later.

    Args:
        labels: (samples, length) int64: the tokens, or `IGNORED` for those that have no loss.
        size: sequences per micro-batch.
        uniform: (samples, length) float64 in [0, 1). If given, the labels that are not ignored are instead drawn from the
            model's own distribution with these numbers. The covariance of the gradients is then the Fisher information,
            not the empirical Fisher.
    """
    last, dtype = len(skeleton), accumulator(skeleton.dtype)
    with skeleton.head() as head, store.writing(boundary("gradient", last), "the head's gradient") as write:
        for batch, (hidden,) in store.each(size, boundary("dense", last)):
            parts = []
            given = [each[batch].to(skeleton.device) for each in (labels, uniform) if each is not None]
            for h, y, *u in _predictions(hidden, *given, vocabulary=skeleton.vocabulary):
                h.requires_grad_()
                logits = head(h).to(dtype)
                for each in u:
                    y = y.where(y == IGNORED, sample(logits.detach(), each))
                loss = F.cross_entropy(logits, y, reduction="sum", ignore_index=IGNORED)
                parts.append(torch.autograd.grad(loss, h)[0])
            predicted = torch.cat(parts).view(hidden.shape[0], -1, hidden.shape[2])
            gradient = F.pad(predicted, (0, 0, 0, 1))  # the last token predicts nothing
            write(gradient)


def divergence(
    skeleton: Skeleton,
    head: Callable[[Tensor], Tensor],
    given: Tensor,
    wanted: Tensor,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compare the predictions that two outputs of the last block lead to.

    Args:
        head: the skeleton's, see `Skeleton.head`.
        given, wanted: (sequences, tokens, width) float.
        counts: which tokens' predictions count, see `predicting`; None for all.

    Returns:
        The Kullback-Leibler divergence KL(p ‖ q), () in nats, the mean over the tokens that count: p are the predictions that follow
        from `wanted`, q those from `given`. And its gradient with respect to `given`.
    """
    dtype = accumulator(skeleton.dtype)
    rows, aims = (each.detach().flatten(0, 1) for each in (given, wanted))
    weights = torch.full((len(rows),), 1 / len(rows), dtype=dtype, device=given.device)
    if counts is not None:
        weights = counts.flatten().to(given.device, dtype)
        weights = weights / weights.sum().clamp(min=1)
    total, gradients = torch.zeros((), dtype=dtype, device=given.device), []
    chunk = max(1, LOGIT_BYTES // (4 * skeleton.vocabulary))
    for h, aim, weight in zip(*(torch.split(each, chunk) for each in (rows, aims, weights)), strict=True):
        with torch.enable_grad():
            logits = head(h.requires_grad_().to(skeleton.dtype)).to(dtype)
        with torch.no_grad():
            target = head(aim.to(skeleton.dtype)).to(dtype)
            q, p = logits.softmax(-1), target.softmax(-1)
            # Each row's log-sum-exp: its largest logit less the logarithm of that one's probability.
            normal, wanted_normal = (x.amax(-1) - y.amax(-1).log() for x, y in ((logits, q), (target, p)))
            total += (torch.linalg.vecdot(p, target.sub_(logits)) + normal - wanted_normal) @ weight
        # Exactly zero where both are the same. The gradient of the sum keeps float16's range.
        gradients.append(torch.autograd.grad(logits, h, q.sub_(p))[0] * weight[:, None])
        del logits, target, q, p  # before those of the next tokens
    return total, torch.cat(gradients).view_as(given)


def predicting(labels: Tensor) -> Tensor:
    """Return which tokens predict one that counts: of labels (sequences, tokens), a bool of the same shape.

    The last token of a sequence predicts one that is not there; it counts if all others do.
    """
    after = labels[:, 1:] != IGNORED
    return torch.cat([after, after.all(dim=1, keepdim=True)], dim=1)


def imitation_gradient(
    skeleton: Skeleton, store: ActivationStore, wanted: Iterator[Tensor], size: int, counts: Tensor
) -> float:
    """Write ∂loss/∂(last block's output); the loss is the *sum* of `divergence` over the tokens that count; return its mean over them.

    Args:
        wanted: the last block's output of the model to imitate, (sequences, tokens, width) for each micro-batch.
        size: sequences per micro-batch.
        counts: which tokens' predictions count (sequences, tokens) bool, of all sequences, see `predicting`.
    """
    last, total = len(skeleton), torch.zeros((), dtype=torch.float64, device=skeleton.device)
    with skeleton.head() as head, store.writing(boundary("gradient", last), "the head's gradient") as write:
        for (rows, (given,)), aim in zip(store.each(size, boundary("dense", last)), wanted, strict=True):
            tokens = int(counts[rows].sum())
            # The mean's gradient is beyond float16's range; the sum's is not.
            mean, gradient = divergence(skeleton, head, given.to(accumulator(skeleton.dtype)), aim, counts[rows])
            total += mean.double() * tokens
            write((gradient * tokens).to(given.dtype))
    return float(total) / max(1, int(counts.sum()))


@torch.no_grad()
def survey_block(
    skeleton: Skeleton, block: Block, index: int, store: ActivationStore, stats: Sequence[SiteStatistics], size: int
) -> None:
    """Run `advance` on the dense stream and add to the forward statistics, one entry of `stats` per site."""
    source, target = boundary("dense", index), boundary("dense", index + 1)
    with store.writing(target, f"block {index}") as write:
        for batch, (x,) in store.each(size, source):
            entered = x
            for sublayer, own in _by_sublayer(block, stats):
                mixed, _ = _observed(skeleton, sublayer, index, sublayer.source(x, entered), own, batch)
                x = sublayer.output(x, mixed)
            write(x)


def backward_block(
    skeleton: Skeleton,
    block: Block,
    index: int,
    store: ActivationStore,
    stats: Sequence[SiteStatistics],
    size: int,
    predictions: float | None = None,
) -> None:
    """Propagate the gradient from a block's output to its input, recomputing the block from its stored input.

    Each of `stats`, one per site, receives the activations and gradients of its site.

    Args:
        predictions: mean number of predictions of a sequence that count; None if all do.
    """
    scale = store.shape[1] - 1.0 if predictions is None else predictions
    # Grams of gradients are means over all tokens, and the loss is a mean over the predictions that count.
    root = ((store.shape[1] - 1) / scale) ** 0.5

    def scaled(gradient: Tensor) -> Tensor:
        return gradient if root == 1 else gradient * root

    with store.writing(boundary("gradient", index), f"the gradient of block {index}") as write:
        for batch, (x, dy) in store.each(size, boundary("dense", index), boundary("gradient", index + 1)):
            with torch.enable_grad():
                x.requires_grad_()
                y, passed, wanted = x, [], [x]
                for sublayer, own in _by_sublayer(block, stats):
                    mixed, given = _observed(skeleton, sublayer, index, sublayer.source(y, x), own, batch)
                    o = sublayer.consume(mixed)
                    y = sublayer.join(y, o, mixed.taken)
                    if own:
                        passed.append((sublayer, own, mixed, [len(each) for each in given]))
                        wanted += [o, *mixed.z, *(p for each in given for p in each)]
                gradients = iter(torch.autograd.grad(y, wanted, dy))
            del y
            write(next(gradients))
            for sublayer, own, mixed, counts in passed:
                do = scaled(next(gradients))
                if own[0].sample is not None:
                    own[0].sample.add_gradients(batch, do)
                dz = [next(gradients) for _ in mixed.z]
                dp = [[scaled(next(gradients)) for _ in range(count)] for count in counts]
                read, origins = mixed.split(do), mixed.origins()
                for number, (prunable, stat) in enumerate(zip(sublayer.prunables, own, strict=True)):
                    parts = [
                        part
                        for i, g in enumerate(dp[number] if counts else ())
                        for part in prunable.split(i, g, dim=g.dim() - 1)
                    ]
                    z = mixed.z[number].detach()
                    stat.add_gradients(z, dz[number], read[number], parts, scale, origins[number])


def _by_sublayer(block: Block, stats: Sequence[SiteStatistics]) -> Iterator[tuple[Sublayer, list[SiteStatistics]]]:
    each = iter(stats)
    for sublayer in block.sublayers:
        yield sublayer, [next(each) for _ in sublayer.prunables]


def _observed(
    skeleton: Skeleton, sublayer: Sublayer, index: int, x: Tensor, stats: Sequence[SiteStatistics], batch: slice
) -> tuple[Mixed, list[list[Tensor]]]:
    """Return the consumers' inputs and, if wanted, the producers' outputs (one list per site); add to the statistics.

    `x` (sequences, tokens, width) is the sublayer's input before its norm, of the sequences `batch`; `stats` has one entry per site
    of the sublayer.
    """
    arguments = sublayer.given(x, skeleton.arguments(x.shape[0], x.shape[1])[index])
    given: list[list[Tensor]] = []
    u = sublayer.normed(x)
    if not stats:
        return sublayer.mix(u, arguments), given
    if any(stats[0].producers):
        mixed, given = sublayer.produce(u, arguments)
    else:
        mixed = sublayer.mix(u, arguments)
    with torch.no_grad():
        if stats[0].sample is not None:
            stats[0].sample.add(batch, x.detach())
        maps = None
        if stats[0].divergence is not None:
            # Compute attention a second time: transformers' eager maps serve the statistics only.
            with kind("sums"):
                full = skeleton.arguments(x.shape[0], x.shape[1], maps=True)[index]
                maps = sublayer.attend(u, sublayer.given(x, full))
        read = mixed.split(u.detach()) if stats[0].inputs is not None else [None] * len(stats)
        for number, (stat, origin) in enumerate(zip(stats, mixed.origins(), strict=True)):
            stat.add(read[number], mixed.z[number].detach(), maps, origin)
            if stat.norm is not None:
                factor = mixed.factors[number] if mixed.factors else None
                stat.norm.add(sublayer.prunables[number].consume(mixed.z[number].detach(), factor))
    return mixed, given


def _predictions(hidden: Tensor, *labels: Tensor, vocabulary: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield hidden states (chunk, d) with the labels (chunk,) they predict, in chunks that bound the logits' memory."""
    flat = hidden[:, :-1].reshape(-1, hidden.shape[2])
    targets = [each[:, 1:].reshape(-1) for each in labels]
    chunk = max(1, LOGIT_BYTES // (4 * vocabulary))
    for begin in range(0, len(flat), chunk):
        part = slice(begin, begin + chunk)
        yield flat[part].detach(), *(each[part] for each in targets)
