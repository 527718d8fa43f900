"""Infer the sublayers of a block from transformers' own modules: what reads what, and which rows belong to a unit.

Two observations, neither of which reads weights:

1. The block runs once on the meta device while every operation is recorded (`trace`). The graph shows which modules add to
   the residual stream, with which factor, and between which norms.
2. A mixer runs with random numbers in place of the outputs of its linears, once in full and once with some units removed
   (`trial`). The rows of a unit are found when what is left of the consumer's input does not change.

A sublayer whose form is not known, or whose units cannot be removed, has no site. A block whose parts do not add up to its
output is a single sublayer without a site.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .architectures import Producer, Removal, SublayerEntry
from .block import fresh, is_linear, linear_shape, stand_in
from .experts import experts_of
from .modeling_streamprune import remove_sublayer
from .trace import (
    ALIASES,
    Call,
    Graph,
    Node,
    Unknown,
    ancestors,
    expanded,
    factor_of,
    is_norm,
    leads,
    resolve,
    trace,
)
from .trial import Trial

WHOLE = SublayerEntry(kind="block", mixer=("",), whole=True)


def infer(
    block: nn.Module,
    arguments: Mapping[str, Any],
    width: int,
    tried: Mapping[str, Any],
    shares: Collection[str] = frozenset(),
) -> tuple[SublayerEntry, ...]:
    """Return the sublayers of a block, in execution order.

    Args:
        block: transformers' module on the meta device.
        arguments: what the model's forward passes to it besides the hidden states, on the meta device, for one token.
        width: residual width, d.
        tried: the same arguments for one sequence of `TOKENS` tokens, on the CPU, floating-point tensors in float32.
        shares: arguments through which the block gives something to later blocks: what receives them must stay as it is.
    """
    experts = experts_of(block)
    stand_in(block, list(experts))
    try:
        graph = trace(block, arguments, width)
        entries = tuple(
            entry
            if entry.whole or {*shares} & {argument for _, argument in entry.arguments}
            else _with_sites(block, entry, branch, graph.calls, experts, width, tried)
            for entry, branch in _arranged(block, graph, experts)
        )
        return tuple(replace(entry, removal=_removal(block, entry, entries, arguments, width)) for entry in entries)
    except Unknown:
        return (WHOLE,)
    finally:
        for name, module in experts.items():
            block.set_submodule(name, module)


def _removal(
    block: nn.Module,
    entry: SublayerEntry,
    entries: Sequence[SublayerEntry],
    arguments: Mapping[str, Any],
    width: int,
) -> Removal | None:
    """Return how a sublayer goes as a whole; None if the block does not run without it.

    Mixtures stay: experts, and the shared experts beside them, keep their last unit.
    """
    if entry.consumer is None or entry.experts is not None:
        return None
    seat = entry.mixer[0] if _within(entry.consumer, entry.mixer[0]) else entry.consumer
    has_bias = block.get_submodule(entry.consumer)._parameters.get("bias") is not None
    linears = [name for name in entry.mixer if name != seat]
    norms = []
    if entry.branch_norm:
        constant = has_bias or "bias" in block.get_submodule(entry.branch_norm)._parameters
        if constant and entry.inner_norm:
            return None  # the norm of what stays is part of what goes
        if not (constant or entry.inner_norm):
            norms.append(entry.branch_norm)  # it gives zero for zero
    if entry.norm and sum(other.norm == entry.norm for other in entries) == 1:
        norms.append(entry.norm)
    returned = list[int]()

    def count(module: nn.Module, inputs: Any, output: Any) -> None:
        returned.append(len(output) if isinstance(output, tuple) else 0)

    def run(block: nn.Module) -> torch.Size:
        x = torch.empty((1, 1, width), device="meta", dtype=next(block.parameters()).dtype)
        with torch.no_grad():
            y = block(x, **fresh(arguments))
        found: Tensor = y[0] if isinstance(y, tuple | list) else y
        return found.shape

    try:
        copied = copy.deepcopy(block).to("meta")
        copied.get_submodule(seat).register_forward_hook(count)
        shape = run(copied)
    except Exception:
        return None  # a block may raise anything if it reads values of tensors
    # Some blocks read their norm's weight.
    for kept in range(len(norms) + 1):
        bias = f"{entry.consumer}.bias".removeprefix(f"{seat}.") if has_bias else None
        found = Removal(seat, returned[0], bias, (*linears, *norms[: len(norms) - kept]))
        copied = copy.deepcopy(block).to("meta")
        remove_sublayer(copied, seat, **found.arguments(entry.kind))
        with suppress(Exception):
            if run(copied) == shape:
                return found
    return None


def _with_sites(
    block: nn.Module,
    entry: SublayerEntry,
    branch: Node,
    calls: Sequence[Call],
    experts: Mapping[str, nn.Module],
    width: int,
    tried: Mapping[str, Any],
) -> SublayerEntry:
    """Return an entry with its sites; unchanged if there are none that can be removed."""
    inside = [name for name in experts if _within(name, entry.mixer[-1])]
    if entry.experts is not None:
        mixture = replace(entry, producers=_producers(experts[entry.experts]))
        return _routed(block, mixture, experts, width, tried)
    try:
        if inside:
            return _mixture(block, entry, calls, inside, experts, width, tried)
        for candidate in _candidates(block, entry, branch, calls):
            if (found := Trial(block, candidate, width, tried).removed()) is not None:
                return found
    except Unknown:
        if entry.beside is not None:
            raise
    return entry


def _arranged(block: nn.Module, graph: Graph, experts: Collection[str]) -> Iterator[tuple[SublayerEntry, Node]]:
    """Yield the sublayers whose outputs add up to the block's output, without their sites, each with its branch.

    What follows the last one of known form is left to the block itself. Raises Unknown if there is none of known form.
    """
    states: list[set[int]] = [{id(graph.entered)}]  # the terms of the stream before each sublayer
    arranged = list[tuple[SublayerEntry, Node]]()
    try:
        _arrange(block, graph, experts, states, arranged)
    except Unknown:
        arranged.append((_rest(graph, states[-1], [entry for entry, _ in arranged]), graph.left))
    yield from arranged


def _rest(graph: Graph, state: set[int], before: Sequence[SublayerEntry]) -> SublayerEntry:
    """Return the entry of what a block computes from the stream with the terms `state`, after the sublayers `before`.

    Raises Unknown if it reads anything else, or if the sublayers before do not simply add to the stream.
    """
    sums = _sums_of(graph, state)
    read = [*ancestors(graph.left, sums)]
    own = [
        call
        for call in graph.calls
        if any(node.call is call for node in read) and any(True for _ in call.module.parameters())
    ]
    silent = _silent(before, graph.calls)
    simple = all(entry.sum_norm is None and entry.sum_scale is None for entry in before)
    if (
        not (before and sums and own and simple)
        or graph.entered in read
        or {call.name for call in own} & {*dict(silent)}
    ):
        raise Unknown("something else contributes to the output")
    return replace(WHOLE, mixer=tuple(call.name for call in own), silent=silent)


def _arrange(
    block: nn.Module,
    graph: Graph,
    experts: Collection[str],
    states: list[set[int]],
    arranged: list[tuple[SublayerEntry, Node]],
) -> None:
    """Append the sublayers to `arranged`, and the terms of the stream after each to `states`, up to where Unknown is raised."""
    entered, left, calls, arguments = graph
    order = {id(call): number for number, call in enumerate(calls)}
    used = set[str]()
    for terms, after in _sums(entered, left):
        if after is not None and len(terms) != 1:
            raise Unknown("a norm follows several additions")
        found = list[tuple[Node, Node, float, str | None]]()
        for term, scale in terms:
            branch, norm_call = resolve(term), None
            if branch.call is not None and is_norm(branch.call.module):
                norm_call, branch = branch.call, resolve(branch.call.input)
            elif branch.call is not None and branch.inner is not None:
                last = resolve(branch.inner)
                if last.call is not None and is_norm(last.call.module) and not is_linear(branch.call.module):
                    norm_call = last.call
            if norm_call is not None and scale == 1.0 and _pair(norm_call.input, experts):
                found.append((resolve(term), term, scale, None))
                continue
            if branch.call is None or not any(True for _ in branch.call.module.parameters()):
                raise Unknown(f"{branch.operation} adds to the stream")
            found.append((branch, term, scale, norm_call.name if norm_call else None))
        for branch, term, scale, branch_norm in sorted(found, key=lambda each: order[id(each[0].call)]):
            call = branch.call
            assert call is not None
            sum_norm = after.call.name if after is not None and after.call is not None else None
            sum_scale = factor_of(after) if after is not None else None
            if is_norm(call.module):
                two = _beside(block, graph, states[-1], [entry for entry, _ in arranged], call, experts)
                for entry, output in two:
                    own = entry if entry.aside else replace(entry, sum_norm=sum_norm, sum_scale=sum_scale)
                    arranged.append((own, output))
                states.append({id(after)} if after is not None else states[-1] | {id(branch)})
                continue
            mixer, first = _chain(block, call)
            if used & set(mixer):
                raise Unknown(f"{call.name} adds to the stream twice")
            used.update(mixer)
            source, norm, factor = first.input, None, 1.0
            if _terms(entered, source) not in states:
                if len(expanded(source)) == 1:
                    ((source, factor),) = expanded(source)
                read = resolve(source)
                if read.call is None or not is_norm(read.call.module):
                    raise Unknown(f"{call.name} reads neither the stream nor a norm of it")
                source, norm = read.call.input, read.call.name
            seen, gained = _terms(entered, source), {id(after)} if after is not None else {id(resolve(term))}
            entry = SublayerEntry(
                kind="attention" if _heads(branch, first) else "ffn",
                mixer=mixer,
                arguments=_passed(first, arguments),
                norm=norm,
                factor=factor,
                branch_norm=branch_norm,
                sum_norm=sum_norm,
                sum_scale=sum_scale,
                scale=scale,
                parallel=seen == states[0] and len(states) > 1,
            )
            if seen in (states[-1], states[0]):
                arranged.append((entry, branch))
                states.append(gained if after is not None else states[-1] | gained)
                continue
            # It may be an FFN beside a mixture of experts that reads the same input: its shared experts.
            if not arranged:
                raise Unknown(f"{call.name} reads something else than the stream")
            before, branch_before = arranged[-1]
            pair = [(before, branch_before), (entry, branch)]
            if not any(_within(name, before.mixer[0]) for name in experts):
                pair.reverse()
            (mixture, output), (other, _) = pair
            same = replace(other, mixer=mixture.mixer, arguments=mixture.arguments) == mixture
            if seen != states[-2] or not same or not any(_within(name, mixture.mixer[0]) for name in experts):
                raise Unknown(f"{call.name} reads an earlier state of the stream")
            arranged[-1] = replace(mixture, beside=other.mixer[0]), output
            states[-1] |= gained


def _pair(node: Node, experts: Collection[str]) -> tuple[Call, Call, Call, Call] | None:
    """Return the calls of an FFN, its norm, experts and their norm, if a node is the sum of the two norms."""
    found = []
    for term, factor in expanded(node):
        if factor != 1.0 or term.call is None or not is_norm(term.call.module):
            return None
        inner: Any = term.call.input
        while inner.call is None and inner.operation in ALIASES:
            inner = inner.inputs[0]
        if inner.call is None:
            return None
        found.append((inner.call, term.call))
    found.sort(key=lambda each: each[0].name in experts)
    if len(found) != 2 or [call.name in experts for call, _ in found] != [False, True]:
        return None
    return *found[0], *found[1]


def _beside(
    block: nn.Module,
    graph: Graph,
    state: set[int],
    before: Sequence[SublayerEntry],
    joint: Call,
    names: Collection[str],
) -> list[tuple[SublayerEntry, Node]]:
    """Return an FFN and the experts beside it, which the block itself calls: the norm `joint` of the sum of both is added.

    Both read norms of the stream with the terms `state`, after the sublayers `before`.
    """
    entered, _, calls, arguments = graph
    pair = _pair(joint.input, names)
    assert pair is not None
    ffn, ffn_norm, experts, experts_norm = pair
    assert ffn.output is not None
    assert joint.output is not None
    routing = [node for key in ("index", "weights") if isinstance(node := experts.given.get(key), Node)]
    sums = {id(entered), *_sums_of(graph, state)}
    routers = [
        node.call.name
        for each in routing
        for node in ancestors(each, sums)
        if node.call is not None and any(True for _ in node.call.module.parameters())
    ]
    mixer, first = _chain(block, ffn)
    reads = []
    for call in (first, experts):
        read = resolve(call.input)
        if read.call is None or not is_norm(read.call.module) or _terms(entered, read.call.input) != state:
            raise Unknown(f"{call.name} reads no norm of the stream")
        reads.append(read.call.name)
    if len(routing) != 2 or not routers:
        raise Unknown("the experts have no router")
    beside = SublayerEntry(
        kind="ffn",
        mixer=mixer,
        arguments=_passed(first, arguments),
        norm=reads[0],
        branch_norm=ffn_norm.name,
        aside=True,
    )
    router = min(routers, key=len)
    mixture = SublayerEntry(
        kind="ffn",
        mixer=(router,),
        norm=reads[1],
        branch_norm=experts_norm.name,
        joint_norm=joint.name,
        experts=experts.name,
        consumer="down_proj",
        chosen=routing[0].shape[-1],
        router=router,
        silent=_silent([*before, beside], calls),
    )
    return [(beside, ffn.output), (mixture, joint.output)]


def _sums_of(graph: Graph, terms: set[int]) -> set[int]:
    """Return the identities of the nodes that are the sum of certain terms."""
    entered, left = graph.entered, graph.left
    return {id(node) for node in ancestors(left, {id(entered)}) if _terms(entered, node) == terms}


def _silent(entries: Sequence[SublayerEntry], calls: Sequence[Call]) -> tuple[tuple[str, int], ...]:
    """Return the modules that sublayers consist of, except norms before them, each with the number of values that it returns."""
    outputs = {call.name: call.outputs for call in calls}
    names = [
        name
        for entry in entries
        for name in (
            *((entry.experts,) if entry.silent else entry.mixer),
            *(entry.branch_norm, entry.beside, entry.joint_norm),
        )
        if name
    ]
    return tuple((name, outputs[name]) for name in names)


def _sums(entered: Node, node: Node) -> list[tuple[list[tuple[Node, float]], Node | None]]:
    """Return what is added to the stream up to `node`, in order.

    Groups of terms, each with a factor; and the norm of the group's sum, or its product with a parameter, if there is one.
    """
    node = resolve(node)
    if node is entered:
        return []
    summed = node.call.input if node.call is not None and is_norm(node.call.module) else None
    if factor_of(node):
        summed = next((each for each in node.inputs if isinstance(each, Node) and not each.name), None)
    if summed is not None and leads(entered, summed):
        groups = _sums(entered, summed)
        if not groups or groups[-1][1] is not None:
            raise Unknown("a norm of the stream alone")
        *earlier, last = groups[-1][0]
        if factor_of(node) and earlier:
            return [*groups[:-1], (earlier, None), ([last], node)]
        return [*groups[:-1], (groups[-1][0], node)]
    terms = expanded(node)
    base = [(term, factor) for term, factor in terms if leads(entered, term)]
    if len(base) != 1 or base[0][1] != 1.0:
        raise Unknown("the output is not a sum with the input")
    return [*_sums(entered, base[0][0]), ([each for each in terms if each[0] is not base[0][0]], None)]


def _terms(entered: Node, node: Node) -> set[int]:
    """Return the identities of the terms of a sum, through the stream; those of a norm of the stream are the norm's own."""
    return {id(term) for term, _ in expanded(node)}


def _chain(block: nn.Module, call: Call) -> tuple[tuple[str, ...], Call]:
    """Return the modules that compute a branch, in order, and the first one's call: several if the last is a bare linear."""
    if not is_linear(call.module):
        return (call.name,), call
    names, node = [call.name], call.input
    while True:
        # Modules without weights, such as activations, count here.
        while node.call is None and node.operation in ALIASES:
            node = node.inputs[0]
        if node.call is None:
            raise Unknown(f"{call.name} reads a plain operation")
        if any(True for _ in node.call.module.parameters()) or not isinstance(
            node.call.module, nn.Dropout | nn.Identity
        ):
            names.insert(0, node.call.name)
        if is_linear(node.call.module):
            return tuple(names), node.call
        node = node.call.input


def _passed(call: Call, arguments: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return which of the block's arguments a mixer receives: its parameter, and the block's argument.

    Other values, such as flags, are found by their names alone. Raises Unknown if it receives a tensor that the block computed.
    """
    found = []
    for name, value in call.raw.items():
        if name == call.first:
            continue
        same = [key for key, each in arguments.items() if each is value]
        tensors = any(isinstance(each, Tensor) for each in tree_leaves(value))
        if tensors and not same:
            raise Unknown(f"{call.name} receives {name}, which the block computes")
        if name in arguments and (name in same or value is None):
            found.append((name, name))
        elif tensors or isinstance(value, MutableMapping):
            found.append((name, same[0]))
    return tuple(found)


def _heads(branch: Node, first: Call) -> int:
    """Number of query heads of a mixer, whose first module's call is given; 0 if it does not normalise products of tokens by a softmax."""
    stop = {id(node) for node in first.given.values() if isinstance(node, Node)}
    for node in ancestors(branch, stop):
        attention = "scaled_dot_product" in node.operation or node.operation in ("_softmax", "_safe_softmax")
        if attention and node.call is None and len(node.shape) in (3, 4):
            return node.shape[-3]  # of one sequence
    return 0


def _mixture(
    block: nn.Module,
    entry: SublayerEntry,
    calls: Sequence[Call],
    inside: Sequence[str],
    experts: Mapping[str, nn.Module],
    width: int,
    tried: Mapping[str, Any],
) -> SublayerEntry:
    """Return the entry of a mixture of experts."""
    if len(inside) != 1 or len(entry.mixer) != 1:
        raise Unknown("several lists of experts")
    mixer, name = entry.mixer[0], inside[0]
    children = [each for each in calls if each.name.rpartition(".")[0] == mixer and each.name != name]
    children += [each for each in calls if each.name == entry.beside]
    shared, router = None, None
    for call in children:
        linears = [module for module in call.module.modules() if is_linear(module)]
        if len(linears) > 1 and not is_linear(call.module):
            if shared is not None:
                raise Unknown("several shared experts")
            own = SublayerEntry(kind="ffn", mixer=(call.name,))
            assert call.output is not None
            shared = _with_sites(block, own, call.output, calls, {}, width, tried)
            if shared.consumer is None:
                raise Unknown("the shared experts have another form")
        elif router is None and any(True for _ in call.module.parameters()):
            router = call.name
    found = replace(
        entry,
        experts=name,
        producers=_producers(experts[name]),
        consumer="down_proj",
        router=router,
        shared=shared,
    )
    chosen = Trial(block, found, width, tried).chosen()
    if chosen is None:
        raise Unknown("the experts' outputs are not simply added")
    found = replace(found, chosen=chosen)
    return _routed(block, found, experts, width, tried)


def _routed(
    block: nn.Module, entry: SublayerEntry, experts: Mapping[str, nn.Module], width: int, tried: Mapping[str, Any]
) -> SublayerEntry:
    """Return the entry of a mixture with what its experts take with them if they go as a whole; unchanged if they cannot."""
    assert entry.experts is not None
    number = len(experts[entry.experts].get_parameter("down_proj"))
    return Trial(block, entry, width, tried).routing(number) or entry


def _producers(experts: nn.Module) -> tuple[Producer, ...]:
    return (*([Producer("gate_proj")] if "gate_up_proj" in experts._parameters else []), Producer("up_proj"))


def _candidates(block: nn.Module, entry: SublayerEntry, output: Node, calls: Sequence[Call]) -> Iterator[SublayerEntry]:
    """Yield entries with a consumer and rows of its units, likelier ones first; `output` is the mixer's."""
    own = [call for call in calls if any(_within(call.name, mixer) for mixer in entry.mixer)]
    first = next(call for call in own if call.name == entry.mixer[0])
    last = _consumer(output)
    columns, mixed = linear_shape(last.module)[1], last.input
    linears = {call.name: call for call in own if is_linear(call.module) and call is not last}
    # A linear that another one reads gives no rows of units, but a latent that all units share.
    read = {
        each.call.name
        for call in linears.values()
        for each in ancestors(call.input, {id(first.input)})
        if each.call is not None and each.call.name in linears
    }
    used = {each.call.name for each in ancestors(mixed, {id(first.input)}) if each.call is not None}
    final = [call for name, call in linears.items() if name not in read and name in used]
    start = resolve(first.input)
    heads = _heads(output, first)
    found = replace(entry, consumer=last.name)
    if last.name in found.mixer:
        found = replace(found, mixer=tuple(name for name in found.mixer if name != last.name))
    direct = {call.name for call in final if resolve(call.input) is start}
    for units in _unit_counts(block, found, columns, heads, final):
        head, width = columns // heads if heads else 0, columns // units
        if not heads and units < columns:
            yield from _recurrent(block, replace(found, kind="linear", width=width), columns, units, final)
            continue
        options = [[Producer(call.name, parts) for parts in _parts(call.module, units, width, head)] for call in final]
        for picked in product(*options):
            whole = replace(
                found,
                width=width,
                head=head,
                producers=tuple(each for each in picked if each.name in direct),
                repeats=bool(heads) and units < heads and len(final) == 1 and not picked[0].parts,
            )
            latent = tuple(each for each in picked if each.name not in direct)
            for vectors in _vectors(block, found, columns, units, head, heads):
                yield replace(whole, vectors=(*latent, *vectors))


def _recurrent(
    block: nn.Module, entry: SublayerEntry, columns: int, units: int, final: Sequence[Call]
) -> Iterator[SublayerEntry]:
    """Yield entries of linear attention or a state space model: a unit is a key head, or group, with its value heads.

    Everything with rows of units goes by `vectors`: projections are fused in ways that recipes do not know.
    """
    mixer: Any = block.get_submodule(entry.mixer[0])
    heads = [getattr(mixer, name, 0) for name in ("num_v_heads", "num_heads")]
    tensors = {call.name: linear_shape(call.module)[0] for call in final}
    for name, parameter in mixer.named_parameters():
        path, size = f"{entry.mixer[0]}.{name}", len(parameter)
        owner = path.rpartition(".")[0]
        module = block.get_submodule(owner)
        if is_linear(module):
            continue
        if isinstance(module, nn.Conv1d) and size >= columns:
            tensors[owner] = size
        elif parameter.dim() == 1 and (size == columns or size in heads):
            tensors[owner if owner != entry.mixer[0] else path] = size
    options = [
        [Producer(name, parts) for parts in _fused(size, columns // units, units, heads)]
        for name, size in tensors.items()
    ]
    for picked in product(*options):
        yield replace(entry, vectors=picked)


def _fused(rows: int, width: int, units: int, heads: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the ways in which rows may be those of units, in a projection that fuses values with keys and queries or states."""
    found: list[tuple[int, ...]] = [()] if rows % units == 0 else []
    for values, more in ((1, 0), *((2, each) for each in heads if each)):
        keys, rest = divmod(rows - values * width * units - more, 2)
        if keys > 0 and not rest and keys % units == 0 and more % units == 0:
            gates = (more // units,) if more else ()
            found.append((*[width] * values, keys // units, keys // units, *gates))
            found.append((keys // units, keys // units, *[width] * values, *gates))
    return found


def _within(name: str, path: str) -> bool:
    return name == path or name.startswith(f"{path}.")


def _consumer(output: Node) -> Call:
    """Return the call of the linear whose output is a mixer's output, but for a factor."""
    node, factor = output, 1.0
    while node.call is not None and not is_linear(node.call.module):
        assert node.inner is not None
        terms = expanded(node.inner)
        if len(terms) != 1:
            raise Unknown("the mixer's output is a sum")
        ((node, each),) = terms
        factor *= each
    if node.call is None:
        raise Unknown("the mixer's last step is not a linear")
    if factor != 1.0 and getattr(node.call.module, "bias", None) is not None:
        raise Unknown("a factor on the mixer's output, bias included")
    return node.call


def _unit_counts(block: nn.Module, entry: SublayerEntry, columns: int, heads: int, final: Sequence[Call]) -> list[int]:
    """Return the numbers of units to try: an FFN's channels, or the key/value heads that the modules suggest."""
    mixer: Any = block.get_submodule(entry.mixer[0])
    if not heads:
        groups = [getattr(mixer, name, None) for name in ("num_k_heads", "n_groups")]
        return [*(each for each in groups if type(each) is int and each > 1 and columns % each == 0), columns]
    if columns % heads:
        raise Unknown("the consumer does not read whole heads")
    config = getattr(mixer, "config", None)
    keys = [linear_shape(call.module)[0] for call in final if call.name.rpartition(".")[2] in ("k_proj", "key", "wk")]
    size = getattr(mixer, "head_dim", None) or getattr(mixer, "head_size", None) or columns // heads
    tried: list[Any] = [rows // size for rows in keys]
    for owner in (mixer, config):
        for name in ("num_key_value_heads", "num_kv_heads"):
            with suppress(Exception):  # a config whose fields differ between blocks may refuse
                tried.append(getattr(owner, name, None))
    if [linear_shape(call.module)[0] for call in final] == [columns]:
        tried.insert(0, heads)  # queries alone: keys and values are another block's
    whole = [each for each in (*tried, heads) if type(each) is int and each > 0 and heads % each == 0]
    return list(dict.fromkeys(whole))


def _parts(linear: nn.Module, units: int, width: int, head: int) -> list[tuple[int, ...]]:
    """Return the ways in which the rows of a producer may be those of the units; `width` and `head` are columns per unit and head."""
    rows = linear_shape(linear)[0]
    found: list[tuple[int, ...]] = []
    if head and rows == units * (width + 2 * head):
        found.append((width, head, head))
    if head and rows == 2 * units * head and head != width:
        found.append((head, head))
    if not head and rows == 2 * units * width:
        found.append((width, width))
    if rows % units == 0:
        found.append(())
    return found


def _vectors(
    block: nn.Module, entry: SublayerEntry, columns: int, units: int, head: int, heads: int
) -> list[tuple[Producer, ...]]:
    """Return sets of parameters besides the linears' that may have rows of the units."""
    sizes = {columns, units * head, heads, units} - {0, 1}
    found, shared = list[Producer](), list[Producer]()
    for mixer in entry.mixer:
        inside = block.get_submodule(mixer)
        for name, parameter in inside.named_parameters():
            path = f"{mixer}.{name}"
            owner = block.get_submodule(path.rpartition(".")[0])
            if is_linear(owner) or parameter.dim() != 1 or len(parameter) not in sizes:
                continue
            each = path.rpartition(".")[0] if is_norm(owner) else path
            (shared if len(parameter) == head else found).append(Producer(each))
    one, two = tuple(dict.fromkeys(found)), tuple(dict.fromkeys([*found, *shared]))
    return list(dict.fromkeys([one, two, ()]))
