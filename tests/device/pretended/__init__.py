"""A CUDA device in all but silicon, for tests.

`device` makes torch believe in one GPU. Tensors on it hold numbers of the CPU; streams, events, the caching allocator, pinned
memory and waiting are modelled, and what would be an error or a race raises `Fault`. Python only, in the same process.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
from collections.abc import Iterable, Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from streamprune.maths import flops
from streamprune.stream.copies import Copies
from streamprune.stream.store import ActivationStore

from .order import DEFAULT, Event, Fault, Stream, current, thread, using
from .tensor import CUDA, Mode, OnDevice, State, loops

__all__ = ["CUDA", "Fault", "OnDevice", "State", "device"]

ALLOWED = (
    "model/outside.py:arguments",  # transformers' masks, once per shape
    "maths/sums.py:_add_product",  # Grams that are summed on the host
    "model/block.py:_routed",  # the tokens of an expert
    "maths/sampling.py:sample",  # labels from logits that are NaN would index beyond the vocabulary
    "pruning/refine.py:refine",  # the loss of a micro-batch
    "commands/tune/lora.py:train",  # the loss of a step
)
"""Places that may wait for the device inside a loop over micro-batches."""


with torch.device("cpu"):
    torch.empty(
        0
    )  # from now on torch remembers which functions take a default device: its own, not those of `_patches`


@contextlib.contextmanager
def device(total: int = 8 << 30, allowed: Iterable[str] = ALLOWED) -> Iterator[State]:
    """Make torch see one CUDA device with `total` bytes. Raises a Fault at the end that nothing raised before.

    Args:
        allowed: see `ALLOWED`. `State.syncs` counts them.
    """
    state = State.here = State(total, allowed)
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, State, "here", None)
        loops.depth = 0
        for module, name, value in _patches(state):
            stack.enter_context(mock.patch.object(module, name, value))
        stack.enter_context(Mode())
        yield state
        synchronize()
        state.collect()
        state.check()


def synchronize(*_: Any) -> None:
    """What `torch.cuda.synchronize` does."""
    for actor in (DEFAULT.actor, *Stream.actors):
        thread().after(actor.clock)
    assert State.here is not None
    State.here.settle()


def _patches(state: State) -> Iterator[tuple[Any, str, Any]]:
    """Yield (module, name, value) of all that a driver would provide, and of what ties host threads together."""
    properties = SimpleNamespace(total_memory=state.memory.total, name="pretended", major=9, minor=0)

    def limit(fraction: float, device: Any = None) -> None:
        state.memory.fraction = fraction

    def settling(method: Any) -> Any:
        def wait(self: Any) -> None:
            method(self)
            state.settle()

        return wait

    cuda = torch.cuda
    values: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: properties.name,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (properties.major, properties.minor),
        "mem_get_info": lambda device=None: (state.collect().free, state.memory.total),
        "memory_allocated": lambda device=None: state.collect().allocated,
        "memory_reserved": lambda device=None: state.collect().reserved,
        "max_memory_allocated": lambda device=None: state.memory.most_allocated,
        "max_memory_reserved": lambda device=None: state.memory.most_reserved,
        "reset_peak_memory_stats": lambda device=None: state.collect().reset_peaks(),
        "set_per_process_memory_fraction": limit,
        "get_per_process_memory_fraction": lambda device=None: state.memory.fraction,
        "get_rng_state": lambda device=None: torch.empty(0, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
        "manual_seed_all": lambda seed: None,
        "empty_cache": lambda: (synchronize(), state.collect().empty_cache()),
        "synchronize": synchronize,
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda device=None: current(),
        "default_stream": lambda device=None: DEFAULT,
        "stream": using,
    }
    yield from ((cuda, name, value) for name, value in values.items())
    yield torch.accelerator, "synchronize", synchronize
    yield torch.accelerator, "current_stream", values["current_stream"]
    yield Copies, "of", classmethod(cache(Copies.of.__func__.__wrapped__))  # no streams of another device
    for kind in (Stream, Event):
        yield kind, "synchronize", settling(kind.synchronize)
    yield torch, "tensor", _tensor(torch.tensor)
    yield torch, "autocast", _Autocast
    yield torch, "is_autocast_enabled", lambda device="cuda": _Autocast.dtypes[-1] is not None and device == "cuda"
    yield torch.Tensor, "data", _data(torch.Tensor.data)
    yield torch.Tensor, "numpy", _numpy(state, torch.Tensor.numpy)
    # Counted work steps out of all modes, which would leave this one too.
    yield flops, "_disable_current_modes", contextlib.nullcontext
    yield ActivationStore, "each", _looping(ActivationStore.each)
    yield concurrent.futures.ThreadPoolExecutor, "submit", _submit(concurrent.futures.ThreadPoolExecutor.submit)
    yield concurrent.futures.Future, "result", _result(concurrent.futures.Future.result)


def _tensor(original: Any) -> Any:
    def tensor(data: Any, *, device: Any = None, **kwargs: Any) -> torch.Tensor:
        made = original(data, **kwargs)
        return made if device is None else made.to(device)

    return tensor


def _data(original: Any) -> property:
    """`Tensor.data`. A plain tensor that is given one on the device becomes one, as on a GPU."""

    def put(self: torch.Tensor, value: torch.Tensor) -> None:
        if isinstance(value, OnDevice) and not isinstance(self, OnDevice):
            torch.utils.swap_tensors(self, OnDevice(value.host, value.buffer))
        else:
            original.__set__(self, value)

    return property(original.__get__, put)


def _numpy(state: State, original: Any) -> Any:
    def numpy(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, OnDevice):
            raise Fault("numpy() of a tensor on cuda:0")
        state.host_access("numpy()", [self], write=False)
        return original(self, *args, **kwargs)

    return numpy


def _looping(original: Any) -> Any:
    def each(*args: Any) -> Iterator[Any]:
        for item in original(*args):
            kept = [item]
            del item
            loops.depth += 1
            try:
                yield kept.pop()
            finally:
                loops.depth -= 1

    return each


def _submit(original: Any) -> Any:
    """What a thread is given comes after all that the giver knows; it runs in the mode, as CUDA is for all threads."""

    def submit(self: Any, task: Any, /, *args: Any, **kwargs: Any) -> Any:
        known = dict(thread().clock)

        def work() -> Any:
            thread().after(known)
            try:
                with Mode():
                    return task(*args, **kwargs)
            finally:
                future.known = dict(thread().clock)

        started = threading.Event()
        future: Any = None

        def wait_for_future() -> Any:
            started.wait()
            return work()

        future = original(self, wait_for_future)
        started.set()
        return future

    return submit


def _result(original: Any) -> Any:
    """Whoever takes the result of a task knows what the task knew."""

    def result(self: Any, timeout: float | None = None) -> Any:
        try:
            return original(self, timeout)
        finally:
            thread().after(getattr(self, "known", {}))

    return result


class _Autocast(TorchFunctionMode):
    """`torch.autocast` for the device: products in `dtype`. Others are torch's own."""

    dtypes: ClassVar[list[torch.dtype | None]] = [None]
    own = torch.autocast
    products: ClassVar[set[Any]] = {
        torch.nn.functional.linear,
        torch.matmul,
        torch.Tensor.matmul,
        torch.Tensor.__matmul__,
        torch.bmm,
    }
    products |= {torch.mm, torch.addmm, torch.baddbmm, torch.nn.functional.scaled_dot_product_attention}

    def __new__(cls, device_type: str, *args: Any, **kwargs: Any) -> Any:
        return super().__new__(cls) if device_type == "cuda" else cls.own(device_type, *args, **kwargs)

    def __init__(self, device_type: str, dtype: torch.dtype = torch.float16, enabled: bool = True, **_: Any) -> None:
        super().__init__()
        self.dtype = dtype if enabled else None

    def __enter__(self) -> Any:
        self.dtypes.append(self.dtype)
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        self.dtypes.pop()
        super().__exit__(*args)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, dtype = kwargs or {}, self.dtypes[-1]
        if func in self.products and dtype is not None:

            def cast(value: Any) -> Any:
                return value.to(dtype) if isinstance(value, OnDevice) and value.dtype == torch.float32 else value

            return func(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})
        return func(*args, **kwargs)
