"""How many floating-point operations a piece of work takes, counted while it runs.

The convention is that of `torch.utils.flop_counter`: a multiplication and an addition are two operations,
matrix products count in full (attention over all T × T pairs, whatever its mask), elementwise work does not
count. Factorisations and solves, which torch's counter leaves out, count by their leading terms in Golub &
Van Loan, *Matrix Computations*.
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
"""What operations are for.

sweeps: the model's own forward and backward passes.
sums: Grams and whatever else is summed over tokens.
solving: factorisations, solves, removals, fits, errors: what is made of the sums.
training: refinement, corrections and tuning, their passes included.
writing: calibration tokens that the model writes.
"""
KINDS: tuple[Kind, ...] = get_args(Kind)

_running: list[Counter] = []
_kinds: list[Kind] = ["sweeps"]
"""The innermost last; for all threads, since autograd works in its own."""
_ATEN = torch.ops.aten

Formula = Callable[..., float]
"""(result, *arguments) of an op → its operations."""


def counting() -> Counter:
    """A context whose `total` is the operations that ran inside it, autograd's backward passes included.

    Contexts nest: an inner one's operations count in the outer one too.
    """
    return Counter()


@contextmanager
def kind(name: Kind) -> Iterator[None]:
    """A context, or a decorator, whose operations are of that kind, but for those of contexts further in."""
    _kinds.append(name)
    try:
        yield
    finally:
        _kinds.pop()


@contextmanager
def counted(operations: int) -> Iterator[None]:
    """A context whose work counts as that many operations, whatever runs inside: for loops of small ones.

    Looking at each costs a counter some 15 µs.
    """
    if not _running:
        yield
        return
    for counter in _running:
        counter.add(operations)
    with _disable_current_modes():
        yield


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up. Work of other threads is not seen, but for those that autograd runs itself."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kinds: dict[Kind, int] = dict.fromkeys(KINDS, 0)
        """Operations so far, by what they were for."""

    @property
    def total(self) -> int:
        """Operations so far."""
        return sum(self.kinds.values())

    def add(self, operations: int) -> None:
        """Count operations of the kind at hand."""
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
            # Whole numbers, so that parts add up to the same sum wherever they are cut.
            self.add(round(formula(result, *args)))
        return result


def _product(position: int) -> Formula:
    """A product whose left factor (..., m, k) is that argument."""
    return lambda result, *args: 2 * result.numel() * args[position].shape[-1]


def _grouped(result: Any, left: Tensor, right: Tensor, *rest: Any) -> float:
    """Products of groups of rows (tokens, k) with a matrix a group (groups, k, n), as a mixture's experts take them, or,
    where both are (·, tokens) and (tokens, ·), of groups of tokens."""
    inner = left.shape[-1] if left.dim() == right.dim() == 3 or result.dim() == 2 else left.shape[-1] / len(result)
    return float(2 * result.numel() * inner)


def _attention(products: int, query: int) -> Formula:
    """So many products of size (T, head) × (head, T) a query head; half of them have the values' head size.

    Grouped keys and values count as if each query head had its own.
    """

    def formula(result: Any, *args: Any) -> float:
        q, k, v = args[query : query + 3]
        pairs = q.shape[:-1].numel() * k.shape[-2]
        by_values = products // 2
        return float(2 * pairs * ((products - by_values) * q.shape[-1] + by_values * v.shape[-1]))

    return formula


def _cubes(factor: float) -> Formula:
    """`factor`·n³ for each square matrix (..., n, n)."""
    return lambda result, a, *rest: factor * a.numel() * a.shape[-1]


def _solve(triangles: int, factor: float = 0.0, matrix: int = 0) -> Formula:
    """So many triangular solves of n² operations a right-hand side, after a factorisation of `factor`·n³."""

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
    # Where torch has no grouped product for the device or the dtype.
    "transformers.grouped_mm_fallback": _grouped,
    "transformers.grouped_mm_fallback_backward": lambda result, left, right, *rest: float(
        4 * left.numel() * right.shape[-1]
    ),
}
"""Those of ops that a library registers when it is imported, by name."""


class _Formulas(dict[Any, Formula | None]):
    """By op; None for what does not count."""

    def __missing__(self, op: Any) -> Formula | None:
        self[op] = _OTHERS.get(str(op))
        return self[op]


# Ours stand before the registry's: those refuse grouped queries, and walk trees of arguments at every call.
_OURS: dict[Any, Formula] = {
    **{op: _registered(formula) for op, formula in flop_registry.items()},
    **{op: _product(0) for op in (_ATEN.mm, _ATEN.bmm, _ATEN.mv, _ATEN.dot)},
    **{op: _product(1) for op in (_ATEN.addmm, _ATEN.addmm_, _ATEN.baddbmm, _ATEN.baddbmm_, _ATEN.addmv, _ATEN.addmv_)},
    **({_ATEN._grouped_mm: _grouped} if hasattr(_ATEN, "_grouped_mm") else {}),
    **{getattr(_ATEN, name): _attention(2, query=0) for name in _FORWARD},
    # The scores once more, then the gradients of values, probabilities, queries and keys.
    **{getattr(_ATEN, f"{name}_backward"): _attention(5, query=1) for name in _FORWARD},
    _ATEN.linalg_cholesky_ex: _cubes(1 / 3),
    _ATEN.cholesky: _cubes(1 / 3),
    _ATEN.cholesky_inverse: _cubes(2 / 3),
    _ATEN.cholesky_solve: _solve(2, matrix=1),
    _ATEN.linalg_solve_triangular: _solve(1),
    _ATEN.triangular_solve: _solve(1, matrix=1),
    _ATEN._linalg_solve_ex: _solve(2, factor=2 / 3),
    _ATEN.linalg_lu_factor_ex: _cubes(2 / 3),
    _ATEN.linalg_lu_solve: _solve(2),
    _ATEN.linalg_inv_ex: _cubes(2.0),
    _ATEN._linalg_eigh: _cubes(9.0),
}
_FORMULAS = _Formulas(_OURS)
