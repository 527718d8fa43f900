"""Count floating-point operations while code runs.

Follows the convention of `torch.utils.flop_counter`: a multiply-add is two operations, matrix products count in full
(attention over all T × T pairs, whatever its mask), and elementwise operations do not count. Factorisations and solves,
which torch's counter ignores, count by their leading terms in Golub & Van Loan, *Matrix Computations*.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import flop_registry

Kind = Literal["sweeps", "sums", "solving", "training", "writing"]
"""Purpose of an operation.

sweeps: forward and backward passes of the model.
sums: Grams and other sums over tokens.
solving: everything computed from the sums: factorisations, solves, removals, fits, errors.
training: refinement, correction and tuning, including their forward and backward passes.
writing: generation of calibration text by the model.
"""
KINDS: tuple[Kind, ...] = get_args(Kind)

_running: list[Counter] = []
_kinds: list[Kind] = ["sweeps"]
"""Stack of open `kind` contexts, innermost last. Shared by all threads, since autograd runs in its own."""
_ATEN = torch.ops.aten

Formula = Callable[..., float]
"""Maps (result, *arguments) of an op to its number of operations."""


def counting() -> Counter:
    """Return a context that counts the operations run inside it, including autograd's backward passes.

    Contexts nest: the operations of an inner context count in the outer one too.
    """
    return Counter()


@contextmanager
def kind(name: Kind) -> Iterator[None]:
    """Context or decorator that attributes operations to a kind, except those in nested `kind` contexts."""
    _kinds.append(name)
    try:
        yield
    finally:
        _kinds.pop()


@contextmanager
def counted(operations: int) -> Iterator[None]:
    """Count a fixed number of operations for this context, whatever runs inside. For loops of small operations.

    Dispatching an operation through a counter costs about 15 µs.
    """
    if not _running:
        yield
        return
    for counter in _running:
        counter.add(operations)
    with _disable_current_modes():
        yield


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up operations by kind. It does not see other threads, except those of autograd."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kinds: dict[Kind, int] = dict.fromkeys(KINDS, 0)
        """Operations so far, by kind."""

    @property
    def total(self) -> int:
        """Operations so far."""
        return sum(self.kinds.values())

    def add(self, operations: int) -> None:
        """Add operations of the current kind."""
        self.kinds[_kinds[-1]] += operations

    def __enter__(self) -> Counter:
        _running.append(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        _running.remove(self)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = _FORMULAS[func.overloadpacket]
        if formula is not None:
            # Rounded to integers, so that the total does not depend on how the work is split.
            self.add(round(formula(result, *args)))
        return result


def _product(position: int) -> Formula:
    """Matrix product whose left factor (..., m, k) is argument `position`."""
    return lambda result, *args: 2 * result.numel() * args[position].shape[-1]


def _grouped(result: Any, left: Tensor, right: Tensor, *rest: Any) -> float:
    """Grouped matrix product: groups of rows of (tokens, k) times one matrix per group (groups, k, n), as in a mixture of
    experts; or (m, tokens) times (tokens, n) per group of tokens."""
    inner = left.shape[-1] if left.dim() == right.dim() == 3 or result.dim() == 2 else left.shape[-1] / len(result)
    return float(2 * result.numel() * inner)


def _attention(products: int, query: int) -> Formula:
    """Attention with `products` matrix products (T, head_dim) × (head_dim, T) per query head.

    Of these, ``products // 2`` have the head_dim of the values. Grouped keys and values count as if each query head had its own.
    `query` is the position of the query argument.
    """

    def formula(result: Any, *args: Any) -> float:
        q, k, v = args[query : query + 3]
        pairs = q.shape[:-1].numel() * k.shape[-2]
        by_values = products // 2
        return float(2 * pairs * ((products - by_values) * q.shape[-1] + by_values * v.shape[-1]))

    return formula


def _cubes(factor: float) -> Formula:
    """``factor · n³`` per square matrix (..., n, n)."""
    return lambda result, a, *rest: factor * a.numel() * a.shape[-1]


def _solve(triangles: int, factor: float = 0.0, matrix: int = 0) -> Formula:
    """A factorisation of ``factor · n³``, then `triangles` triangular solves of n² operations per right-hand side."""

    def formula(result: Any, *args: Any) -> float:
        x: Tensor = result if isinstance(result, Tensor) else result[0]
        a: Tensor = args[matrix]
        return factor * a.numel() * a.shape[-1] + float(triangles * x.numel() * a.shape[-1])

    return formula


def _registered(formula: Callable[..., int]) -> Formula:
    return lambda result, *args: formula(*args, out_val=result)


_FORWARD = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)

_OTHERS: dict[str, Formula] = {
    # Used where torch has no grouped product for the device or dtype.
    "transformers.grouped_mm_fallback": _grouped,
    "transformers.grouped_mm_fallback_backward": lambda result, left, right, *rest: float(
        4 * left.numel() * right.shape[-1]
    ),
}
"""Formulas of ops that other libraries register on import, by op name."""


class _Formulas(dict[Any, Formula | None]):
    """Formulas by op; None for ops that do not count."""

    def __missing__(self, op: Any) -> Formula | None:
        self[op] = _OTHERS.get(str(op))
        return self[op]


_NAMED: dict[str, Formula] = {
    **dict.fromkeys(("mm", "bmm", "mv", "dot"), _product(0)),
    **dict.fromkeys(("addmm", "addmm_", "baddbmm", "baddbmm_", "addmv", "addmv_"), _product(1)),
    "_grouped_mm": _grouped,
    **dict.fromkeys(_FORWARD, _attention(2, query=0)),
    # Recomputed scores, then the gradients of values, probabilities, queries and keys.
    **dict.fromkeys((f"{name}_backward" for name in _FORWARD), _attention(5, query=1)),
    "linalg_cholesky_ex": _cubes(1 / 3),
    "cholesky": _cubes(1 / 3),
    "cholesky_inverse": _cubes(2 / 3),
    "cholesky_solve": _solve(2, matrix=1),
    "linalg_solve_triangular": _solve(1),
    "triangular_solve": _solve(1, matrix=1),
    "_linalg_solve_ex": _solve(2, factor=2 / 3),
    "linalg_lu_factor_ex": _cubes(2 / 3),
    "linalg_lu_solve": _solve(2),
    "linalg_inv_ex": _cubes(2.0),
    "_linalg_eigh": _cubes(9.0),
}
"""Formulas by the name of an op of torch's. Not every release has every op: torch 2.14 has no `cholesky`."""

# Ours replace those of torch's registry, which reject grouped queries and traverse the argument tree on every call.
_OURS: dict[Any, Formula] = {
    **{op: _registered(formula) for op, formula in flop_registry.items()},
    **{getattr(_ATEN, name): formula for name, formula in _NAMED.items() if hasattr(_ATEN, name)},
}
_FORMULAS = _Formulas(_OURS)
