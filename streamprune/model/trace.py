"""Record what a block computes from what: one run on the meta device, operation by operation."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .block import fresh
from .upstream import plain_attention

ALIASES = {
    *("view", "_unsafe_view", "reshape", "clone", "_to_copy", "detach", "alias", "contiguous", "unsqueeze", "squeeze"),
    *("expand", "dropout", "native_dropout", "_reshape_alias", "lift_fresh"),
}
"""Operations that do not change values."""


class Unknown(Exception):
    """A block or a mixer does not have the form that a site needs."""


@dataclass(eq=False)
class Node:
    """A tensor of the recorded run, with what it was computed from."""

    operation: str
    shape: tuple[int, ...]
    inputs: tuple[Any, ...] = ()
    """Nodes and plain values."""
    call: Call | None = None
    """The module whose output it is."""
    inner: Node | None = None
    """The same tensor as computed inside that module."""
    name: str = ""
    """Name of a parameter or buffer of the block."""


@dataclass(eq=False)
class Call:
    """One call of a module."""

    name: str
    module: nn.Module
    given: dict[str, Any]
    """Arguments by parameter: nodes, and other values as they are."""
    first: str
    """The parameter that receives the hidden states."""
    raw: dict[str, Any]
    """The arguments themselves."""
    output: Node | None = None
    """The first tensor that it returns."""
    outputs: int = 0
    """Number of values that it returns; 0 if it returns a tensor alone."""

    @property
    def input(self) -> Node:
        node = self.given.get(self.first)
        if not isinstance(node, Node):
            raise Unknown(f"{self.name} does not read a tensor")
        return node


class _Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every operation on tensors, and the calls of all modules of a block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []
        self._nodes: dict[int, Node] = {}
        self._alive: list[Tensor] = []
        self._open: list[Call] = []
        self._hooks = []
        for name, tensor in (*block.named_parameters(), *block.named_buffers()):
            self._set(tensor, Node("given", tuple(tensor.shape), name=name))
        for name, module in block.named_modules():
            self._hooks.append(module.register_forward_pre_hook(self._entering(name), with_kwargs=True))
            self._hooks.append(module.register_forward_hook(self._leaving, with_kwargs=True))

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def node(self, value: Any) -> Any:
        """The node of a tensor; other values unchanged."""
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._nodes:
            self._set(value, Node("given", tuple(value.shape)))
        return self._nodes[id(value)]

    def _set(self, tensor: Tensor, node: Node) -> None:
        self._nodes[id(tensor)] = node
        self._alive.append(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tuple(self.node(value) for value in tree_leaves((args, kwargs or {})))
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._set(tensor, Node(func.overloadpacket.__name__, tuple(tensor.shape), given))
        return result

    def _entering(self, name: str) -> Any:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            names = [
                parameter.name
                for parameter in inspect.signature(module.forward).parameters.values()
                if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
            ]
            # Some versions wrap a forward so that its parameters have no names.
            names += map(str, range(len(names), len(args)))
            raw = {**dict(zip(names, args, strict=False)), **kwargs}
            first = next((key for key in raw if isinstance(raw[key], Tensor)), "")
            given = {key: self.node(value) for key, value in raw.items()}
            self._open.append(Call(name, module, given, first, raw))

        return enter

    def _leaving(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = self._open.pop()
        self.calls.append(call)
        call.outputs = len(output) if isinstance(output, tuple | list) else 0
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, Tensor):
                inner = self.node(tensor)
                self._set(tensor, Node("module", inner.shape, (call.given.get(call.first),), call, inner))
                call.output = call.output or self.node(tensor)


class Graph(NamedTuple):
    """One run of a block."""

    entered: Node
    """The block's input."""
    left: Node
    """Its output."""
    calls: list[Call]
    """The calls of its modules, in order."""
    arguments: Mapping[str, Any]
    """What it was given besides its input."""


def trace(block: nn.Module, arguments: Mapping[str, Any], width: int) -> Graph:
    """Run the block on the meta device.

    Raises Unknown if it does not run there: it reads values of tensors.
    """
    failure = Unknown("")
    # Attention in full shows its heads; some models only run with their own.
    for plain in (True, False):
        copied = copy.deepcopy(block).to("meta")  # its buffers may be elsewhere
        if plain:
            plain_attention(copied)
        given, recorded = fresh(arguments), _Trace(copied)
        x = torch.empty((1, 1, width), device="meta", dtype=next(block.parameters()).dtype)
        try:
            with torch.no_grad(), recorded:
                entered = recorded.node(x)
                y = copied(x, **given)
                left = recorded.node(y[0] if isinstance(y, tuple | list) else y)
            return Graph(entered, inside(left), recorded.calls, given)
        except Exception as error:
            failure = Unknown(str(error))
        finally:
            recorded.close()
    raise failure


def factor_of(node: Node) -> str | None:
    """Return the name of the single number of the block that a node is multiplied by, if it is."""
    tensors = [each for each in node.inputs if isinstance(each, Node)]
    if node.call is not None or node.operation not in ("mul", "mul_") or len(tensors) != 2:
        return None
    return next((each.name for each in tensors if each.name and all(size == 1 for size in each.shape)), None)


def leads(entered: Node, node: Node) -> bool:
    """Whether a node is the stream: the block's input, a sum with it, or a norm of such a sum."""
    node = resolve(node)
    if node is entered:
        return True
    if node.call is not None:
        return is_norm(node.call.module) and _adds(node.call.input) and leads(entered, node.call.input)
    return _adds(node) and any(leads(entered, term) for term, _ in expanded(node))


def _adds(node: Node) -> bool:
    return resolve(node).operation in ("add", "add_")


def expanded(node: Node, factor: float = 1.0) -> list[tuple[Node, float]]:
    """Return the terms of a sum with their factors, as resolved nodes."""
    node = resolve(node)
    if node.call is None:
        tensors = [each for each in node.inputs if isinstance(each, Node)]
        numbers = [each for each in node.inputs if isinstance(each, int | float) and not isinstance(each, bool)]
        if node.operation in ("add", "add_") and len(tensors) == 2 and not numbers:
            return [term for each in tensors for term in expanded(each, factor)]
        if node.operation in ("mul", "mul_") and len(tensors) == 1 and len(numbers) == 1:
            return expanded(tensors[0], factor * numbers[0])
    return [(node, factor)]


def resolve(node: Node) -> Node:
    """Step back over operations and modules that do not change values."""
    while True:
        if node.call is not None:
            assert node.inner is not None
            if any(True for _ in node.call.module.parameters()) or is_norm(node.call.module):
                return node
            node = node.inner
        elif node.operation == "copy_" and len(node.inputs) > 1 and isinstance(node.inputs[1], Node):
            node = node.inputs[1]  # the source
        elif node.operation in ALIASES and node.inputs and isinstance(node.inputs[0], Node):
            node = node.inputs[0]
        else:
            return node


def inside(node: Node) -> Node:
    """Step from a module's output to what computed it."""
    return node.inner if node.inner is not None else node


def is_norm(module: nn.Module) -> bool:
    shapes = [parameter.dim() for parameter in module.parameters()]
    return "norm" in type(module).__name__.lower() and all(dim <= 1 for dim in shapes)


def ancestors(node: Node, stop: set[int]) -> Iterator[Node]:
    """Yield what a node was computed from, itself first, inside modules too; nothing beyond the nodes whose identity is in `stop`."""
    waiting, seen = [node], set(stop)
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        before = (node.inner,) if node.inner is not None else node.inputs
        waiting += [each for each in before if isinstance(each, Node)]
