"""A model without its blocks: what runs before, between and after them, by the model's own forward.

No masking or position code is duplicated here: embeddings, positions and masks are what the blocks' places are given.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import CheckpointError, NumericalError, one_line
from ..maths.flops import counted
from ..maths.order import any_kernel
from ..maths.refit import advice, all_finite
from . import dry_run, side_inputs, upstream
from .architectures import Architecture, family_of
from .block import Arguments, place
from .checkpoint import Checkpoint
from .dry_run import matrix_elements
from .names import CONFIG
from .side_inputs import Part, Shared, SideInputs
from .trial import TOKENS


class Outside:
    """The model of a checkpoint with its blocks taken out.

    Args:
        checkpoint: holds the weights, by the model's names.
        model: transformers' model on the meta device; its blocks are replaced.
        model_type: of the model.
        blocks: path of the list of blocks in `model`.
        config: of the text model.
        wrapped: whether the text model is part of a larger one.
        device, dtype: where and in which dtype to compute.

    Raises:
        CheckpointError: the model passes something to its blocks besides hidden states and positions.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: Any,
        *,
        model_type: str,
        blocks: str,
        config: Any,
        wrapped: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.checkpoint, self.device, self.dtype = checkpoint, device, dtype
        self._where = f"{checkpoint.directory}/{CONFIG}"
        self._config, self._ties, self._renamed = config, upstream.ties_head(model), family_of(model_type).stored
        self._arguments: OrderedDict[tuple[int, int, int, bool], list[Arguments]] = OrderedDict()
        templates = [*model.get_submodule(blocks).children()]
        self._slots = [upstream.Recorder(block) for block in templates]
        self._base = model.get_submodule(blocks.rpartition(".")[0])
        model.set_submodule(blocks, nn.ModuleList(self._slots))
        held = [id(parameter) for block in templates for parameter in block.parameters()]
        if len({*held}) < len(held):
            raise CheckpointError(
                f"{self._where}: the blocks of {model_type} models share weights: this is not supported"
            )
        order = self._called(model_type, blocks)
        before, behind = order[: order.index("first")], order[len(order) - order[::-1].index("last") :]
        self.architecture = self._arranged(model, model_type, blocks, before, behind)
        used = (*self.architecture.embed, *self.architecture.final, self.architecture.head)
        self._embed = _present(model, self.architecture.embed)
        self._after = _present(model, (*self.architecture.final, self.architecture.head))
        self.carried = {
            name: tuple(tensor.shape)
            for name, tensor in model.state_dict().items()
            if not name.startswith(tuple(f"{path}." for path in (*used, blocks)))
        }
        """Shapes of the tensors that take no part in computing text, such as those of a vision tower, by name."""
        self.linears = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and not name.startswith(f"{blocks}.")
        ]
        """Names of the linears outside the blocks."""
        for name in {*behind} - {*before}:  # they only follow the blocks
            model.set_submodule(name, nn.Identity())
        self.side_inputs = self._find_side_inputs(templates, f"{self._where}: the blocks of {model_type} models")
        """What each block reads besides hidden states, and gives to later blocks."""
        # The rest of the model is its head, including any post-processing of logits.
        passed = blocks.partition(".")[0] if wrapped else self.architecture.base
        model.set_submodule(passed, upstream.PassThrough(model.get_submodule(passed)))
        self._head = model

    def _called(self, model_type: str, blocks: str) -> list[str]:
        """Return the paths of the modules beside the blocks in the order of their calls, with the first block as "first" and the
        last one as "last".
        """
        base, _, leaf = blocks.rpartition(".")
        own = {f"{base}.{name}": module for name, module in self._base.named_children() if name != leaf}
        if found := [name for name, _ in self._base.named_parameters(recurse=False)]:
            raise CheckpointError(
                f"{self._where}: {model_type} models have {found[0]} beside their blocks, which is not supported"
            )
        order: list[str] = []
        watched = {**own, "first": self._slots[0], "last": self._slots[-1]}
        hooks = [
            module.register_forward_pre_hook(lambda *_, name=name: order.append(name))
            for name, module in watched.items()
        ]
        embed = {name: module for name, module in own.items() if any(True for _ in module.parameters())}
        ids, failure = torch.zeros((1, 1), dtype=torch.int64, device=self.device), None
        try:
            for outputs in (0, 1, 2, 3):
                order.clear()
                for slot in self._slots:
                    slot.outputs = outputs
                try:
                    with torch.no_grad(), counted(0), self._filled(embed, self._blank):
                        self._base(input_ids=ids, use_cache=False)
                except Exception as error:
                    failure = failure or error  # the model takes what blocks return in another form
                    continue
                width = int(self._config.hidden_size)
                if all(slot.hidden is not None and slot.hidden.shape == (1, 1, width) for slot in self._slots):
                    break
            else:
                raise CheckpointError(
                    f"{self._where}: the blocks of {model_type} models do not pass on hidden states alone"
                    + (f" ({one_line(failure, 200)})" if failure else "")
                ) from failure
        finally:
            for hook in hooks:
                hook.remove()
        given = [dict(slot.arguments) for slot in self._slots]
        with torch.no_grad(), counted(0), self._filled(embed, self._varied):
            self._base(input_ids=ids + 1, use_cache=False)
        self._dependent: list[list[str]] = [[] for _ in self._slots]
        """Names of the arguments of each block that depend on the tokens."""
        for slot, before, names in zip(self._slots, given, self._dependent, strict=True):
            for name, value in slot.arguments.items():
                what = f"the blocks of {model_type} models read {name}, which"
                if any(isinstance(each, upstream.Returned) for each in tree_leaves(value)):
                    raise CheckpointError(f"{self._where}: {what} earlier blocks return: this is not supported")
                if not _differ(before.get(name), value):
                    continue
                if not (isinstance(value, Tensor) and value.is_floating_point() and value.shape[:-1] == ids.shape):
                    raise CheckpointError(f"{self._where}: {what} depends on the tokens: this is not supported")
                names.append(name)
        return order

    def _find_side_inputs(self, blocks: Sequence[nn.Module], what: str) -> list[SideInputs]:
        """Give columns of the stream to all that blocks read of the tokens, or put into mappings. `what` names the blocks in errors."""
        d = width = int(self._config.hidden_size)
        arguments, places, known = self.collect(1, TOKENS), dict[int, Part](), dict[tuple[str, Any], Shared]()
        found = list[SideInputs]()

        def part(shape: Sequence[int]) -> Part:
            nonlocal width
            each = Part(width, tuple(shape))
            width = each.columns.stop
            return each

        maps = any(isinstance(value, MutableMapping) for given in arguments for value in given.values())
        sharing = [*dry_run.sharing(blocks, arguments, TOKENS, d)] if maps else [({}, set())] * len(blocks)
        for index, (given, names) in enumerate(zip(arguments, self._dependent, strict=True)):
            for name in names:
                if id(given[name]) not in places:  # blocks that receive the same tensor share its columns
                    places[id(given[name])] = part(given[name].shape[2:])
            shared = tuple(known.values())
            values = {pair: each for pair, each in sharing[index][0].items() if _is_read(pair, sharing[index + 1 :])}
            for (name, key), tensors in values.items():
                shapes = [tuple(each.shape) if isinstance(each, Tensor) else () for each in tensors]
                if any(len(shape) != 4 or (shape[0], shape[2]) != (1, TOKENS) for shape in shapes):
                    raise CheckpointError(f"{what} share {name}, whose form is not known: this is not supported")
                known[name, key] = Shared(name, key, tuple(part((heads, size)) for _, heads, _, size in shapes))
            written = tuple(known[pair] for pair in values)
            found.append(SideInputs(d, 0, tuple((name, places[id(given[name])]) for name in names), shared, written))
        return [replace(each, width=width) for each in found]

    @staticmethod
    def _arranged(
        model: Any, model_type: str, blocks: str, before: Sequence[str], behind: Sequence[str]
    ) -> Architecture:
        """Return where the parts of the model are, from the modules called before and behind the blocks."""
        paths = {module: name for name, module in model.named_modules()}
        tokens, head = paths[model.get_input_embeddings()], paths[model.get_output_embeddings()]
        weighted = [name for name in dict.fromkeys(before) if any(True for _ in model.get_submodule(name).parameters())]
        return Architecture(
            model_type,
            blocks,
            embed=(tokens, *(name for name in weighted if name != tokens)),
            final=tuple(dict.fromkeys(behind)),
            head=head,
            family=family_of(model_type),
        )

    @property
    def writes_maps(self) -> bool:
        """Whether attention computes its maps in full, because the architecture only has eager attention."""
        return upstream.attention(self._base.config) == "eager"

    def arguments(self, sequences: int, tokens: int, past: int = 0, *, maps: bool = False) -> list[Arguments]:
        """Return the arguments that the model's forward passes to each block for a batch (sequences, tokens), except side inputs.

        Args:
            past: number of preceding tokens in the cache.
            maps: for `Sublayer.attend`, which needs all masks in full.

        Raises:
            NumericalError: the rotary embeddings hold NaN or Inf. Attention might still return finite numbers.
        """
        key = sequences, tokens, past, maps
        if key not in self._arguments:
            found: list[Arguments] = [
                {name: value for name, value in given.items() if name not in names}  # the stream has them
                for given, names in zip(self.collect(*key), self._dependent, strict=True)
            ]
            # Blocks of the same kind share their tables.
            given = [tree_leaves(arguments.get("position_embeddings")) for arguments in found]
            tables = {table for each in given for table in each if isinstance(table, Tensor)}
            if not all(all_finite(torch.view_as_real(t) if t.is_complex() else t) for t in tables):
                raise NumericalError(
                    f"{self.checkpoint.directory}: the rotary embedding of positions {past} to {past + tokens - 1} holds "
                    f"NaN or Inf{advice(self.dtype)}"
                )
            self._arguments[key] = found
            while len(self._arguments) > 4:
                self._arguments.popitem(last=False)
        return self._arguments[key]

    def collect(self, sequences: int, tokens: int, past: int = 0, maps: bool = False) -> list[Arguments]:
        """Return the same with arguments that depend on the tokens, without checks, and without keeping them."""
        attention = upstream.eager_attention(self._base.config) if maps else nullcontext()
        # Not counted, because results are cached and a repeat depends on earlier calls.
        with attention, counted(0), self._filled(self._embed, self._blank):
            self._embedded(torch.zeros((sequences, tokens), dtype=torch.int64, device=self.device), past)
        return [slot.arguments for slot in self._slots]

    @contextmanager
    def embedding(self) -> Iterator[Callable[..., Tensor]]:
        """Yield a function from token ids (sequences, tokens) int64 to the first block's input (sequences, tokens, width).

        It is the stream: hidden states and side inputs, see `side_inputs`. Its second argument is the number of preceding
        tokens, 0 by default.
        """
        with self._filled(self._embed, self._read):
            yield self._streamed

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Yield a function from the last block's output (..., width) to logits (..., vocabulary)."""
        with self._filled(self._after, self._read):
            yield self._logits

    @torch.no_grad()
    def try_head(self, width: int) -> None:
        """Run the head on the meta device; see `dry_run.run`."""
        dtype = next(self._after[self.architecture.head].parameters()).dtype
        self._logits(torch.empty((1, 1, width), device="meta", dtype=dtype))

    def head_elements(self) -> int:
        """Return the number of weights in the matrices behind the blocks."""
        return sum(matrix_elements(module) for module in self._after.values())

    def stored_name(self, name: str) -> str:
        """Return the name in the checkpoint of a tensor of the model."""
        stored = name
        for ours, theirs in self._renamed:
            stored = stored.replace(ours, theirs)
        return name if name in self.checkpoint or stored not in self.checkpoint else stored

    @property
    def head_weight(self) -> str:
        """The checkpoint's name of the head's weight."""
        return self.stored_name(f"{self.architecture.head}.weight")

    @property
    def embedding_weight(self) -> str:
        return f"{self.architecture.embed[0]}.weight"

    @cached_property
    def tied(self) -> bool:
        """Whether the head shares the embedding's weight. As in transformers, a stored head that differs is not tied."""
        if not self._ties:
            return False
        if self.head_weight not in self.checkpoint:
            return True
        head, embedding = self.checkpoint[self.head_weight], self.checkpoint[self.embedding_weight]
        return head.shape == embedding.shape and torch.equal(
            self.checkpoint.read(self.head_weight), self.checkpoint.read(self.embedding_weight)
        )

    def embed_names(self) -> list[str]:
        """Return the checkpoint's names of the tensors before the blocks."""
        return [name for *_, name in self._leaves(self._embed)]

    def head_names(self) -> list[str]:
        """Return the checkpoint's names of the tensors after the blocks; a tied head is not included."""
        names = [name for *_, name in self._leaves(self._after)]
        return [name for name in names if name != self.head_weight or not self.tied]

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors before and after the blocks, by stored name; the head is always included."""
        leaves = [*self._leaves(self._embed), *self._leaves(self._after)]
        return {name: tuple(tensor.shape) for _, _, tensor, name in leaves}

    def _logits(self, hidden: Tensor) -> Tensor:
        hidden = self.side_inputs[-1].hidden(hidden)
        *final, _ = self._after.values()
        for module in final:
            hidden = module(hidden)
        found: Tensor = self._head(inputs_embeds=hidden.reshape(1, -1, hidden.shape[-1]), use_cache=False).logits
        return found.view(*hidden.shape[:-1], -1)

    def _streamed(self, ids: Tensor, past: int = 0) -> Tensor:
        hidden = self._embedded(ids, past)
        given = [slot.arguments for slot in self._slots]
        for slot in self._slots:
            slot.arguments = {}
        return side_inputs.first(hidden, self.side_inputs, given)

    def _embedded(self, ids: Tensor, past: int = 0) -> Tensor:
        cache = {upstream.cache_argument(type(self._base).forward): upstream.Past(past)} if past else {}
        with torch.no_grad(), any_kernel():  # positions count the ones of a mask
            self._base(input_ids=ids, use_cache=False, **cache)
        hidden = self._slots[0].hidden
        for slot in self._slots:
            slot.hidden = None
        assert hidden is not None
        return hidden

    def _varied(self, name: str, like: Tensor) -> Tensor:
        """Return a tensor of the shape of another, each row of which has the same numbers, different from other rows."""
        if like.dim() < 2:
            return torch.ones(like.shape, device=self.device, dtype=self.dtype)
        rows = torch.arange(len(like), device=self.device).to(self.dtype)
        return rows.view(-1, *[1] * (like.dim() - 1)).expand(like.shape)

    def _read(self, name: str, like: Tensor) -> Tensor:
        if name == self.head_weight and self.tied:
            name = self.embedding_weight
        return self.checkpoint.read(name).to(self.device, self.dtype)

    def _blank(self, name: str, like: Tensor) -> Tensor:
        """Return zeros of a tensor's shape, expanded from one element so that they take no memory."""
        return torch.zeros((), device=self.device, dtype=self.dtype).expand(like.shape)

    @contextmanager
    def _filled(self, modules: dict[str, nn.Module], source: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
        leaves = self._leaves(modules)
        try:
            for module, leaf, tensor, name in leaves:
                place(module, leaf, source(name, tensor))
            yield
        finally:
            for module, leaf, tensor, _ in leaves:
                place(module, leaf, tensor)

    def _leaves(self, modules: dict[str, nn.Module]) -> list[tuple[nn.Module, str, Tensor, str]]:
        """Return the tensors of modules: module, name inside it, the tensor, and its name in the checkpoint."""
        return [
            (module, leaf, tensor, self.stored_name(f"{path}.{leaf}"))
            for path, module in modules.items()
            for leaf, tensor in module.state_dict().items()
        ]


def _is_read(pair: Any, later: Sequence[tuple[Mapping[Any, Any], Collection[Any]]]) -> bool:
    """Return whether later blocks read an entry of a mapping before one replaces it; see `dry_run.sharing`."""
    for put, read in later:
        if pair in read:
            return True
        if pair in put:
            break
    return False


def _differ(one: Any, other: Any) -> bool:
    """Return whether the tensors in two values of an argument differ."""
    return any(
        isinstance(now, Tensor) and not (isinstance(then, Tensor) and _same(then, now))
        for then, now in zip(tree_leaves(one), tree_leaves(other), strict=False)
    )


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())


def _present(model: nn.Module, paths: tuple[str, ...]) -> dict[str, nn.Module]:
    """Return the modules at `paths`, by path, except those that the config omits."""
    found = {}
    for path in paths:
        parent, _, leaf = path.rpartition(".")
        module = getattr(model.get_submodule(parent), leaf)
        if module is not None:
            found[path] = module
    return found
