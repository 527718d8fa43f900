"""Tensors that claim ``cuda:0`` and hold numbers of the CPU, and what each operation on them does to the pretended device.

To torch's C++ they are on a `lazy` device, for which autograd needs no driver; to Python they are on ``cuda:0``.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import streamprune

from .memory import Allocator, Part
from .order import Accesses, Actor, Clock, Fault, current, thread

CUDA = torch.device("cuda:0")
PACKAGE = f"{Path(streamprune.__file__).parent}/"
aten = torch.ops.aten


class Buffer:
    """A storage on the device: where it is, and who reads and writes it."""

    def __init__(self, state: State, nbytes: int) -> None:
        self.owner = current().actor
        self.accesses = Accesses()
        self.kept: Clock = {}  # streams of `record_stream`
        self.part: Part | None = None
        self.state = state
        self.part = state.collect().allocate(nbytes, self.owner, thread())

    def __del__(self) -> None:
        if self.part is not None:
            self.state.freed(self.part, self.owner, self.accesses, self.kept)


class OnDevice(Tensor):
    """A tensor on the pretended device. `host` holds its numbers."""

    host: Tensor
    buffer: Buffer | None
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: Tensor, buffer: Buffer | None) -> OnDevice:
        made: OnDevice = torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device="lazy:0",
        )
        # In this order: the buffer goes first, or another thread may be given the same memory and find the old buffer there.
        made.buffer, made.host = buffer, host
        return made

    def __init__(self, host: Tensor, buffer: Buffer | None) -> None:
        pass

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def __repr__(self) -> str:
        return f"OnDevice({tuple(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        # Tensor's own would copy `host` and `buffer` too.
        copied = memo[id(self)] = self.detach().clone()
        if isinstance(self, torch.nn.Parameter):
            copied = memo[id(self)] = torch.nn.Parameter(copied, self.requires_grad)
        return copied

    def __getitem__(self, index: Any) -> Tensor:
        # torch would copy lists to the device below all that can be caught.
        parts = index if isinstance(index, tuple) else (index,)
        return super().__getitem__(tuple(torch.tensor(part) if isinstance(part, list) else part for part in parts))

    def get_device(self) -> int:
        return 0

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def record_stream(self, stream: Any) -> None:
        if self.buffer is not None:
            self.buffer.kept[stream.actor] = stream.actor.time

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (state := State.here) is None:
            raise Fault(f"{func} on a tensor of a device that is gone")
        return state.run(func, args, kwargs or {})


class Pending:
    """A copy between host and device that the host has not waited for."""

    def __init__(self, host: Tensor, value: Tensor, *, to_host: bool) -> None:
        actor = current().actor
        # A tensor of its own, so that the storage's references tell whether anyone else has one.
        self.host, self.value, self.to_host, self.pinned = host.detach(), value, to_host, is_pinned(host)
        self.actor, self.time = actor, actor.time

    @property
    def unused(self) -> bool:
        """Whether only this copy still holds its host memory."""
        storage = self.host.untyped_storage()
        return torch._C._storage_Use_Count(storage._cdata) <= 2

    def done(self) -> None:
        if self.to_host:
            self.host.copy_(self.value)
        elif not torch.equal(_raw(self.host), _raw(self.value)):
            kind = "pinned" if self.pinned else "pageable"
            raise Fault(f"{kind} memory was changed while a copy on {self.actor} may still read it")


class State:
    """All that the device knows. `here` is the one in use."""

    here: State | None = None

    def __init__(self, total: int, allowed: Iterable[str]) -> None:
        self.memory = Allocator(total)
        self.allowed = set(allowed)
        self.buffers: weakref.WeakValueDictionary[int, Buffer] = weakref.WeakValueDictionary()
        self.pending: dict[int, list[Pending]] = {}
        self.gone: deque[tuple[Part, Clock]] = deque()  # freed since the last operation, by whatever thread
        self.faults: list[Fault] = []  # found where nothing can be raised
        self.syncs: dict[str, int] = {}  # inside loops over micro-batches, by place
        self.operations = 0
        self.lock = threading.RLock()

    # Memory.

    def freed(self, part: Part, owner: Actor, accesses: Accesses, kept: Clock) -> None:
        """The last tensor of a buffer is gone: its own stream may reuse the memory for what comes next."""
        for actor, what in accesses.unordered(owner).items():
            if actor not in kept:
                self.faults.append(
                    Fault(f"memory of {owner} was freed that {what} on {actor} may still use: no record_stream")
                )
        self.gone.append((part, {actor: actor.time for actor in kept if actor is not owner}))

    def collect(self) -> Allocator:
        """The memory, once what was freed is returned to it."""
        with self.lock:
            while self.gone:
                self.memory.release(*self.gone.popleft())
        return self.memory

    def check(self) -> None:
        """Raise a fault that was found where nothing could be raised."""
        if self.faults:
            raise self.faults.pop(0)

    def wrap(self, host: Tensor) -> tuple[OnDevice, bool]:
        """A tensor on the device with these numbers, and whether its memory is new."""
        storage = host.untyped_storage()
        if not (place := storage.data_ptr()):
            return OnDevice(host, None), False
        buffer = self.buffers.get(place)
        if new := buffer is None:
            buffer = self.buffers[place] = Buffer(self, storage.nbytes())
        return OnDevice(host, buffer), new

    # Order.

    def access(self, func: Any, reads: Iterable[Buffer], writes: Iterable[Buffer]) -> None:
        """One piece of work on the current stream. Its launch follows all that the launching thread knows."""
        self.check()
        actor, what = current().actor, func
        actor.after(thread().clock)
        actor.tick()
        for buffer in reads:
            buffer.accesses.add(actor, what, write=False)
        for buffer in writes:
            buffer.accesses.add(actor, what, write=True)

    def start(self, host: Tensor, value: Tensor, *, to_host: bool) -> None:
        """A copy that the host does not wait for."""
        for each in [each for listed in self.pending.values() for each in listed]:
            if each.unused:
                self._finish(each)
        copy = Pending(host, value, to_host=to_host)
        if to_host:
            self.host_access("a copy", [host], write=True)
            _raw(host).fill_(0xFF)
        self.pending.setdefault(host.untyped_storage().data_ptr(), []).append(copy)

    def settle(self) -> None:
        """End the copies of which the calling thread knows that they are done."""
        if not self.pending:
            return
        with self.lock:
            for each in [each for listed in self.pending.values() for each in listed]:
                if thread().knows(each.actor, each.time):
                    self._finish(each)

    def _finish(self, copy: Pending) -> None:
        place = copy.host.untyped_storage().data_ptr()
        self.pending[place].remove(copy)
        if not self.pending[place]:
            del self.pending[place]
        with _disable_current_modes():
            copy.done()

    def host_access(self, what: Any, tensors: Iterable[Tensor], *, write: bool) -> None:
        """The host reads or writes memory of its own."""
        if not self.pending:
            return
        self.settle()
        for tensor in tensors:
            for copy in self.pending.get(tensor.untyped_storage().data_ptr(), ()):
                if copy.to_host:
                    raise Fault(f"{what} uses host memory that a copy on {copy.actor} may not have written yet")
                if write:
                    kind = "pinned" if copy.pinned else "pageable"
                    raise Fault(f"{what} changes {kind} memory that a copy on {copy.actor} may still read")

    def wait(self, what: Any) -> None:
        """The host waits for the current stream."""
        thread().after(current().actor.clock)
        self.settle()
        places = list(_places())
        if loops.depth or LOOPS & {*places}:
            place = next((place for place in places if place in self.allowed), None)
            if place is None:
                raise Fault(
                    f"{what} in {places[0]} makes the host wait for the device inside a loop over micro-batches"
                )
            self.syncs[place] = self.syncs.get(place, 0) + 1

    # Operations.

    def run(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Carry out one operation that has tensors on the device, asks for some, or may meet a copy in progress."""
        ours: list[OnDevice] = []
        host: list[Tensor] = []

        def inward(value: Any) -> Any:
            if isinstance(value, OnDevice):
                ours.append(value)
                return value.host
            if isinstance(value, Tensor):
                host.append(value)
            return value

        asked = kwargs.get("device")
        with self.lock:
            if func is aten.copy_.default:
                return self._copy(*args, **kwargs)
            if func is aten._to_copy.default:
                return self._to_copy(*args, **kwargs)
            inside = [_each(inward, value) for value in args]
            named = {name: _each(inward, value) for name, value in kwargs.items() if name != "pin_memory"}
            if not ours and not is_ours(asked):
                return self._on_host(func, args, kwargs, host)
            self.operations += 1
            how = _traits(func)
            if how.unordered and any(each.is_floating_point() for each in ours) and _strict():
                raise Fault(f"{func} has no kernel with a fixed order")
            if host or how.indexed:
                self._check_places(func, args, host, bool(ours))
            if how.waits or (how.indexed and any(each.dtype == torch.bool for each in ours)):
                self.access(func, {each.buffer for each in ours if each.buffer}, ())
                self.wait(func)
            used = {each.buffer for each in ours if each.buffer is not None}
            changed: set[Buffer] = set()
            if how.writes or how.views:
                written = {id(each) for name in how.writes for each in _tensors(_argument(func, args, kwargs, name))}
                passed = {id(each) for name in how.views for each in _tensors(_argument(func, args, kwargs, name))}
                changed = {each.buffer for each in ours if id(each) in written and each.buffer is not None}
                used = {each.buffer for each in ours if id(each) not in passed | written and each.buffer is not None}
            if "device" in kwargs and (asked is None or is_ours(asked)):
                named["device"] = torch.device("cpu")
            if func is aten.mm.dtype:  # half-precision products with float32 sums: CUDA has them, the CPU has not
                left, right, dtype = inside
                result = left.to(dtype) @ right.to(dtype)
            else:
                result = func(*inside, **named)
            if asked is not None and not is_ours(asked):
                return result  # a factory for another device, such as meta
            new: list[Buffer] = []

            def outward(value: Any) -> Any:
                if not isinstance(value, Tensor) or isinstance(value, OnDevice):
                    return value
                if how.writes or how.views:
                    for each in ours:
                        if each.host is value:
                            return each
                wrapped, fresh = self.wrap(value)
                if fresh and wrapped.buffer is not None:
                    new.append(wrapped.buffer)
                return wrapped

            wrapped = _each(outward, result)
            if used or changed or new:
                self.access(func, used, [*changed, *new])
            return wrapped

    def _on_host(self, func: Any, args: Any, kwargs: Mapping[str, Any], host: list[Tensor]) -> Any:
        if func is aten.is_pinned.default:
            return is_pinned(args[0])
        if func is aten._pin_memory.default:
            copied = args[0].clone()
            pin(copied)
            return copied
        if self.pending and host:
            how = _traits(func)
            written = [each for name in how.writes for each in _tensors(_argument(func, args, kwargs, name))]
            passed = {id(each) for name in how.views for each in _tensors(_argument(func, args, kwargs, name))}
            self.host_access(func, written, write=True)
            self.host_access(func, [each for each in host if id(each) not in passed], write=False)
        if kwargs.get("pin_memory"):
            made = func(*args, **{**kwargs, "pin_memory": False})
            pin(made)
            return made
        return func(*args, **kwargs)

    def _check_places(self, func: Any, args: Any, host: list[Tensor], ours: bool) -> None:
        """Raise where tensors of the host meet those of the device, except as torch allows."""
        allowed: set[int] = set()
        if func in INDEXED:
            if not isinstance(args[0], OnDevice):
                raise Fault(f"{func} indexes a tensor on the host by one on the device")
            allowed = {id(each) for each in _tensors(args[1])}
        for each in host:
            if id(each) not in allowed and each.dim() > 0 and ours and each.device.type == "cpu":
                raise Fault(f"{func} mixes a host tensor {tuple(each.shape)} of {each.dtype} with tensors on cuda:0")
            if ours and each.dim() == 0 and func in PRODUCTS:
                raise Fault(f"{func} takes a number on the host where it needs one on cuda:0")

    def _to_copy(self, source: Tensor, **kwargs: Any) -> Tensor:
        asked, waits = kwargs.pop("device", None), not kwargs.pop("non_blocking", False)
        kwargs.pop("pin_memory", None)
        if asked is not None and not is_ours(asked) and torch.device(asked).type != "cpu":
            numbers = _numbers(source)
            return aten._to_copy.default(numbers, device=asked, **kwargs)
        there = isinstance(source, OnDevice)
        goal = there if asked is None else is_ours(asked)
        if not there and not goal:
            self.host_access("a copy", [source], write=False)
            return aten._to_copy.default(source, device=asked, **kwargs)
        value = aten._to_copy.default(_numbers(source), device=torch.device("cpu"), **kwargs)
        return self._across(source, value, there, goal, waits)

    def _across(self, source: Tensor, value: Tensor, there: bool, goal: bool, waits: bool) -> Tensor:
        """The end of a conversion whose numbers are `value`."""
        self.operations += 1
        used = {source.buffer} - {None} if isinstance(source, OnDevice) else set()
        if not goal:
            self.access("a copy to the host", used, ())
            if waits:
                self.wait("a copy to the host")
            else:
                self.start(value, value.clone(), to_host=True)
            return value
        if not there:
            self.host_access("a copy to the device", [source], write=False)
        wrapped, _ = self.wrap(value)
        self.access("a copy on the device" if there else "a copy to the device", used, {wrapped.buffer} - {None})
        if not there and waits:
            thread().after(current().actor.clock)
            self.settle()
        elif not there:
            self.start(source, source.clone(), to_host=False)
        return wrapped

    def _copy(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        there, goal = isinstance(source, OnDevice), isinstance(target, OnDevice)
        numbers = _numbers(source)
        used = {source.buffer} - {None} if isinstance(source, OnDevice) else set()
        if not there and not goal:
            self.host_access("a copy", [target], write=True)
            self.host_access("a copy", [source], write=False)
            target.copy_(source)
        elif not goal:
            self.operations += 1
            self.access("a copy to the host", used, ())
            if non_blocking:
                self.start(target, numbers.to(target.dtype, copy=True), to_host=True)
            else:
                self.wait("a copy to the host")
                self.host_access("a copy", [target], write=True)
                target.copy_(numbers)
        else:
            self.operations += 1
            assert isinstance(target, OnDevice)
            if not there:
                self.host_access("a copy to the device", [source], write=False)
            target.host.copy_(numbers)
            self.access("a copy to the device", used, {target.buffer} - {None})
            if not there and not non_blocking and source.dim():
                thread().after(current().actor.clock)
                self.settle()
            elif not there and source.dim():
                self.start(source, source.clone(), to_host=False)
        return target


class Mode(TorchDispatchMode):
    """Catches factories on the device and what happens to host memory. Every thread of a job enters it."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled, and its wrapper costs more than many operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        state = State.here
        assert state is not None
        if OnDevice not in types and not state.pending and func not in PINNING:
            if not kwargs:
                return func(*args)
            if not kwargs.get("pin_memory") and not is_ours(kwargs.get("device")):
                return func(*args, **kwargs)
        return state.run(func, args, kwargs or {})


LOOPS = {"pruning/refine.py:refine", "commands/tune/lora.py:train"}
"""Functions that loop over micro-batches by themselves."""


class _Loops(threading.local):
    depth = 0


loops = _Loops()
"""How many loops over micro-batches the calling thread is in."""

WAITING = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.unique_dim.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor,
}
"""What returns to the host, or has a shape that depends on the numbers."""
UNORDERED = {
    aten.cumsum.default,
    aten.cumsum_.default,
    aten.cumsum.out,
    aten.histc.default,
    aten.kthvalue.default,
    aten.median.dim,
    aten.put_.default,
}
"""What CUDA has no kernel for whose sums, or whose choice among equals, have a fixed order."""
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._unsafe_index.Tensor}
PINNING = {aten.is_pinned.default, aten._pin_memory.default}
PRODUCTS = {aten.mm.default, aten.bmm.default, aten.addmm.default, aten.mv.default, aten.dot.default}


def _strict() -> bool:
    """Whether CUDA raises an error for what is `UNORDERED`."""
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


def is_ours(device: Any) -> bool:
    return device is not None and torch.device(device).type in ("cuda", "lazy")


_pinned: weakref.WeakSet[Any] = weakref.WeakSet()
"""Storages in pinned memory. Their Python objects live as long as they do."""


def pin(tensor: Tensor) -> None:
    _pinned.add(tensor.untyped_storage())


def is_pinned(tensor: Tensor) -> bool:
    return tensor.untyped_storage() in _pinned


def _each(change: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to a value of an operator's arguments or results or, in a list or tuple, to each."""
    if isinstance(value, (list, tuple)):
        return (
            [_each(change, each) for each in value]
            if isinstance(value, list)
            else tuple([_each(change, each) for each in value])
        )
    return change(value)


def _numbers(value: Any) -> Any:
    return value.host if isinstance(value, OnDevice) else value


def _raw(tensor: Tensor) -> Tensor:
    """The bytes of a tensor that is dense in some order of its dimensions, as a flat view."""
    if tensor.numel() == 0:
        return torch.empty(0, dtype=torch.uint8)
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(order).view(-1).view(torch.uint8) if tensor.dim() else tensor.view(1).view(torch.uint8)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)


def _argument(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], name: tuple[int, str]) -> Any:
    place, key = name
    return args[place] if place < len(args) else kwargs.get(key)


class _Traits(NamedTuple):
    """What an operation does. Arguments are given as (position, name)."""

    writes: tuple[tuple[int, str], ...]
    views: tuple[tuple[int, str], ...]
    """Arguments of which it returns a view."""
    waits: bool
    indexed: bool
    unordered: bool


@cache
def _traits(func: Any) -> _Traits:
    aliased = [(place, each) for place, each in enumerate(func._schema.arguments) if each.alias_info is not None]
    writes, views = (
        tuple((place, each.name) for place, each in aliased if each.alias_info.is_write == wanted)
        for wanted in (True, False)
    )
    return _Traits(writes, views, func in WAITING, func in INDEXED, func in UNORDERED)


def _places() -> Iterator[str]:
    """The functions of streamprune on the stack, innermost first, as ``room/file.py:function``."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if (path := frame.f_code.co_filename).startswith(PACKAGE):
            path = path[len(PACKAGE) :]
            if path not in ("maths/flops.py", "model/modeling_streamprune.py"):
                yield f"{path}:{frame.f_code.co_name}"
        frame = frame.f_back
    yield "?"
