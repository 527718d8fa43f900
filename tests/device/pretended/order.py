"""Who knows of what: host threads and streams with vector clocks, events, and accesses that nothing orders."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, ClassVar


class Fault(AssertionError):
    """Something that is undefined, or an error, on a GPU."""


Clock = dict["Actor", int]


class Actor:
    """A host thread or a stream: does one thing after another. `clock` holds how far it knows each stream to be."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.clock: Clock = {}

    def __repr__(self) -> str:
        return self.name

    @property
    def time(self) -> int:
        """How many things it has done, or been told to do."""
        return self.clock.get(self, 0)

    def tick(self) -> int:
        self.clock[self] = self.time + 1
        return self.time

    def after(self, clock: Mapping[Actor, int]) -> None:
        """What it does from now on comes after all that `clock` holds."""
        for actor, time in clock.items():
            if self.clock.get(actor, 0) < time:
                self.clock[actor] = time

    def knows(self, actor: Actor, time: int) -> bool:
        return actor is self or self.clock.get(actor, 0) >= time


class Accesses:
    """The last write to a buffer and the last read of each stream since."""

    def __init__(self) -> None:
        self.written: tuple[Actor, int, Any] | None = None
        self.read: dict[Actor, tuple[int, Any]] = {}

    def add(self, actor: Actor, what: Any, *, write: bool) -> None:
        """Raise a Fault if nothing orders this access behind the ones that it must follow."""
        time = actor.time
        if self.written is not None and not actor.knows(*self.written[:2]):
            verb = "overwrites" if write else "reads"
            raise Fault(
                f"{what} on {actor} {verb} what {self.written[2]} on {self.written[0]} may not have written yet"
            )
        if not write:
            self.read[actor] = time, what
            return
        for reader, (then, reading) in self.read.items():
            if not actor.knows(reader, then):
                raise Fault(f"{what} on {actor} overwrites what {reading} on {reader} may not have read yet")
        self.written, self.read = (actor, time, what), {}

    def unordered(self, owner: Actor) -> dict[Actor, str]:
        """Accesses on streams whose end `owner` does not wait for."""
        found = {reader: str(what) for reader, (time, what) in self.read.items() if not owner.knows(reader, time)}
        if self.written is not None and not owner.knows(*self.written[:2]):
            found[self.written[0]] = str(self.written[2])
        return found


class Stream:
    """What `torch.cuda.Stream` does, as far as order goes. torch hands out 32 in turn."""

    POOL = 32
    made = 0
    actors: ClassVar[list[Actor]] = []

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        cls = type(self)
        if len(cls.actors) < self.POOL:
            cls.actors.append(Actor(f"stream {len(cls.actors) + 1}"))
        self.actor = cls.actors[cls.made % self.POOL]
        cls.made += 1

    @classmethod
    def default(cls) -> Stream:
        stream = cls.__new__(cls)
        stream.actor = Actor("the default stream")
        return stream

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def is_capturing(self) -> bool:
        return False  # no graphs

    def wait_event(self, event: Event) -> None:
        self.actor.after(thread().clock)
        self.actor.after(event.clock)

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(stream.record_event())

    def synchronize(self) -> None:
        thread().after(self.actor.clock)

    def query(self) -> bool:
        return thread().knows(self.actor, self.actor.time)


class Event:
    """What `torch.cuda.Event` does, as far as order goes. One that was never recorded is waited for at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.clock: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        actor = (stream or current()).actor
        actor.after(thread().clock)
        self.clock = dict(actor.clock)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current()).wait_event(self)

    def synchronize(self) -> None:
        thread().after(self.clock)

    def query(self) -> bool:
        return all(thread().knows(actor, time) for actor, time in self.clock.items())

    def elapsed_time(self, end: Event) -> float:
        return 1.0


_local = threading.local()
DEFAULT = Stream.default()


def thread() -> Actor:
    """The calling thread."""
    try:
        return _local.actor
    except AttributeError:
        _local.actor = Actor(threading.current_thread().name)
        return _local.actor


def current() -> Stream:
    """The calling thread's current stream."""
    return getattr(_local, "stream", DEFAULT)


class using:
    """What `torch.cuda.stream` does."""

    def __init__(self, stream: Stream | None) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        self.before = current()
        _local.stream = self.stream or self.before

    def __exit__(self, *_: object) -> None:
        _local.stream = self.before
