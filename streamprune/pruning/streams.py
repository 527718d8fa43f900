"""The two streams of activations that the prune sweep moves: the dense model's, and that of the model pruned so far."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

from torch import Tensor

from ..model.block import Arguments, Block, Sublayer
from ..model.skeleton import Skeleton
from ..stream.store import ActivationStore
from ..stream.sweep import advance, boundary

DENSE, PRUNED = "dense", "pruned"


@dataclass(frozen=True)
class Place:
    """A sublayer of the model."""

    block: int
    position: int
    last: bool
    """Whether it is the last of its block."""

    @property
    def entry(self) -> tuple[int, int]:
        """Block and sublayer whose input it reads."""
        return self.block, self.position

    @property
    def next(self) -> Place:
        """The sublayer after it in the block."""
        return Place(self.block, self.position + 1, last=False)

    @property
    def exit(self) -> tuple[int, int]:
        """Block and sublayer whose input it gives."""
        return (self.block + 1, 0) if self.last else (self.block, self.position + 1)


@dataclass(frozen=True)
class Streams:
    """Which streams the prune sweep moves, through which blocks, and how they are read and written.

    Each token passes each sublayer once on the dense stream and twice on the pruned one: once to sum H, once to advance.
    """

    skeleton: Skeleton
    store: ActivationStore
    batch: int
    """Sequences per micro-batch."""
    moving: tuple[str, ...]
    window: range
    """Blocks that may change. Those before it only pass the stream on; those after it are not run."""

    def into(self, index: int) -> tuple[str, ...]:
        """Streams that block `index` needs in the store: one up to the window's first block, where they part."""
        if index >= self.window.stop:
            return ()
        return self.moving if index > self.window.start else self.moving[:1]

    def part(self, index: int) -> None:
        """At the window's first block, begin the dense stream as the pruned one."""
        if index == self.window.start and DENSE in self.moving:
            self.store.link(boundary(PRUNED, index), boundary(DENSE, index))

    def pass_by(self, block: Block, index: int) -> None:
        """Advance the streams that a later block needs past a whole block, unless a refined block has moved one already."""
        for stream in self.into(index + 1):
            if boundary(stream, index + 1) not in self.store:
                advance(self.skeleton, block, index, self.store, stream, self.batch)

    def drop(self, index: int, *, sublayer: int = 0) -> None:
        """Remove the inputs of a sublayer that is done."""
        for stream in (DENSE, PRUNED):
            self.store.remove(boundary(stream, index, sublayer))

    def read(
        self, places: Mapping[str, tuple[int, int]], here: Place, *, parallel: bool
    ) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        """Read streams in micro-batches.

        Args:
            places: for each stream, the block and sublayer whose input is read.
            parallel: whether what entered the block is read as well.

        Yields:
            For each stream x (sequences, tokens, width) and what entered the block (sequences, tokens, width): x itself unless
            `parallel`.
        """
        names = {
            stream: (boundary(stream, *place), boundary(stream, here.block) if parallel else boundary(stream, *place))
            for stream, place in places.items()
        }
        wanted = list(dict.fromkeys(name for pair in names.values() for name in pair))
        for _, read in self.store.each(self.batch, *wanted):
            found = dict(zip(wanted, read, strict=True))
            yield {stream: (found[x], found[entered]) for stream, (x, entered) in names.items()}

    def writing(self, stream: str, sub: Sublayer, here: Place) -> AbstractContextManager[Callable[[Tensor], None]]:
        """A context that writes a sublayer's output; the journal does not mention outputs inside a block."""
        return self.store.writing(boundary(stream, *here.exit), f"{sub.name} ({stream})", passing=not here.last)

    def arguments(self, sub: Sublayer, x: Tensor, here: Place) -> Arguments:
        """What the block's modules take besides hidden states, for the stream `x` (sequences, tokens, width)."""
        return sub.given(x, self.skeleton.arguments(x.shape[0], x.shape[1])[here.block])

    def advance(
        self, owners: Mapping[str, Sequence[Sublayer]], here: Place, waiting: Sequence[str], also: Sequence[str]
    ) -> Generator[dict[str, tuple[Tensor, Tensor]], None, None]:
        """Move the streams past a sublayer, except those that have moved already; then remove its input.

        Args:
            owners: the sublayers of the block on each stream.
            waiting: streams that stay where they are.
            also: streams to yield. One that has moved already is only read.

        Yields:
            For each micro-batch, each stream's x (sequences, tokens, width) after the sublayer, and what entered the block.
        """
        moving = [s for s in self.moving if s not in waiting and boundary(s, *here.exit) not in self.store]
        places = dict.fromkeys(moving, here.entry) | {s: here.exit for s in also if s not in moving}
        parallel = any(sub.entry.parallel for sub in owners[PRUNED])
        with ExitStack() as stack:
            sub = owners[PRUNED][here.position]
            writers = {s: stack.enter_context(self.writing(s, sub, here)) for s in moving}
            for read in self.read(places, here, parallel=parallel) if moving else ():
                for s in moving:
                    x, entered = read[s]
                    arguments = self.skeleton.arguments(x.shape[0], x.shape[1])[here.block]
                    read[s] = owners[s][here.position](x, entered, arguments), entered
                    writers[s](read[s][0])
                yield read
        if here.position:
            self.drop(here.block, sublayer=here.position)
