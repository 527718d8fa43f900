"""The device's memory, as torch's caching allocator deals it out: segments per stream and size, split and merged."""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field

import torch

from .order import Actor, Clock

UNIT = 512
SMALL, SMALL_SEGMENT = 1 << 20, 2 << 20
LARGE, LARGE_SEGMENT = 10 << 20, 20 << 20
"""c10/cuda/CUDACachingAllocator: allocations up to `SMALL` share small segments, those below `LARGE` share large ones."""


def rounded(size: int, unit: int) -> int:
    return -(-size // unit) * unit


@dataclass(eq=False)
class Segment:
    """Memory from the driver. `free` holds (offset, size) of the parts that nobody has, in order."""

    size: int
    stream: Actor
    small: bool
    free: list[tuple[int, int]] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        return self.free == [(0, self.size)]


@dataclass(eq=False)
class Part:
    """An allocation."""

    segment: Segment
    begin: int
    size: int


class Allocator:
    """Bytes of a device with `total`, of which others take `taken` and torch at most `fraction` of the total."""

    def __init__(self, total: int, taken: int = 0) -> None:
        self.total, self.taken, self.fraction = total, taken, 1.0
        self.segments: list[Segment] = []
        self.waiting: list[tuple[Part, Clock]] = []  # freed parts and what must be done before they are reused
        self.allocated = self.most_allocated = self.reserved = self.most_reserved = 0

    @property
    def free(self) -> int:
        return self.total - self.taken - self.reserved

    def allocate(self, nbytes: int, stream: Actor, host: Actor) -> Part:
        """Raises torch.OutOfMemoryError as torch does: not before cached segments are given back."""
        size = rounded(nbytes, UNIT)
        self._return(host.clock)
        part = self._fit(size, stream) or self._segment(size, stream)
        if part is None:
            self._return(None)
            self.empty_cache()
            part = self._fit(size, stream) or self._segment(size, stream)
        if part is None:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {nbytes} bytes. GPU 0 has a total capacity of {self.total} bytes of "
                f"which {self.free} are free; {self.allocated} bytes are allocated and {self.reserved - self.allocated} are cached"
            )
        self.allocated += part.size
        self.most_allocated = max(self.most_allocated, self.allocated)
        return part

    def release(self, part: Part, after: Clock) -> None:
        """Free a part; streams other than its own may still use it until `after`."""
        self.allocated -= part.size
        if after:
            self.waiting.append((part, after))
        else:
            self._free(part)

    def empty_cache(self) -> None:
        self.segments = [segment for segment in self.segments if not segment.empty]
        self.reserved = sum(segment.size for segment in self.segments)

    def reset_peaks(self) -> None:
        self.most_allocated, self.most_reserved = self.allocated, self.reserved

    def _return(self, known: Clock | None) -> None:
        """Free the parts that are no longer in use, as far as the host knows; all of them once it waits (None)."""
        waiting, self.waiting = self.waiting, []
        for part, after in waiting:
            if known is None or all(known.get(actor, 0) >= time for actor, time in after.items()):
                self._free(part)
            else:
                self.waiting.append((part, after))

    def _free(self, part: Part) -> None:
        free = part.segment.free
        insort(free, (part.begin, part.size))
        merged: list[tuple[int, int]] = []
        for begin, size in free:
            if merged and sum(merged[-1]) == begin:
                merged[-1] = merged[-1][0], merged[-1][1] + size
            else:
                merged.append((begin, size))
        part.segment.free = merged

    def _fit(self, size: int, stream: Actor) -> Part | None:
        small = size <= SMALL
        fitting = [
            (length, begin, segment)
            for segment in self.segments
            if segment.stream is stream and segment.small == small
            for begin, length in segment.free
            if length >= size
        ]
        if not fitting:
            return None
        length, begin, segment = min(fitting, key=lambda each: each[:2])
        if length - size < UNIT or (not small and length - size <= SMALL):
            size = length  # too little is left to split
        segment.free.remove((begin, length))
        if length > size:
            insort(segment.free, (begin + size, length - size))
        return Part(segment, begin, size)

    def _segment(self, size: int, stream: Actor) -> Part | None:
        """A part of a new segment; None if the device, or what torch may use of it, has no room for one."""
        wanted = SMALL_SEGMENT if size <= SMALL else LARGE_SEGMENT if size < LARGE else rounded(size, SMALL_SEGMENT)
        if wanted > self.free or self.reserved + wanted > self.fraction * self.total:
            return None
        self.segments.append(Segment(wanted, stream, size <= SMALL, [(0, wanted)]))
        self.reserved += wanted
        self.most_reserved = max(self.most_reserved, self.reserved)
        return self._fit(size, stream)
