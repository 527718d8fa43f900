"""Count floating-point operations while code runs.

Follows the convention of `torch.utils.flop_counter`: a multiply-add is two operations, matrix products count in full
(attention over all T × T pairs, whatever its mask), and elementwise operations do not count. Factorisations and solves,
which torch's counter ignores, count by their leading terms in Golub & Van Loan, *Matrix Computations*. `FlopCounter`
takes about 15 µs per op, torch's `FlopCounterMode` about 85 µs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)
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

_kinds: list[Kind] = ["sweeps"]
"""Stack of open `kind` contexts, innermost last. Shared by all threads, since autograd runs in its own."""


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
    """Count a fixed number of operations for this context, whatever runs inside: faster for many small ops."""
    counters = [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, FlopCounter)]
    if not counters:
        yield
        return
    for counter in counters:
        counter.kinds[_kinds[-1]] += operations
    with _disable_current_modes():
        yield


class FlopCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context that adds up the operations of its thread by kind, including autograd's. Contexts nest."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kinds: dict[Kind, int] = dict.fromkeys(KINDS, 0)
        """Operations so far, by kind."""

    @property
    def total(self) -> int:
        return sum(self.kinds.values())

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        op = func.overloadpacket
        if (formula := _FORMULAS.get(str(op))) is not None:
            # Rounded to integers, so that the total does not depend on how the work is split.
            self.kinds[_kinds[-1]] += round(formula(result, *args))
        elif op in flop_registry:
            self.kinds[_kinds[-1]] += flop_registry[op](*args, out_val=result)
        return result


Formula = Callable[..., float]
"""Maps (result, *arguments) of an op to its number of operations."""


def _product(position: int) -> Formula:
    """Matrix product whose left factor (..., m, k) is argument `position`."""
    return lambda result, *args: 2 * result.numel() * args[position].shape[-1]


def _grouped(result: Any, left: Any, right: Any, *rest: Any) -> float:
    """Grouped matrix product: groups of rows of (tokens, k) times one matrix per group (groups, k, n), as in a mixture of
    experts; or (m, tokens) times (tokens, n) per group of tokens."""
    inner = left.shape[-1] if left.dim() == right.dim() == 3 or result.dim() == 2 else left.shape[-1] / len(result)
    return float(2 * result.numel() * inner)


def _attention(products: int, query: int) -> Formula:
    """Attention with `products` matrix products (T, head_dim) × (head_dim, T) per query head.

    ``products // 2`` of these have the head_dim of the values. Keys and values may have fewer heads, which torch's own
    formula rejects in older releases. `query` is the position of the query argument.
    """

    def formula(result: Any, *args: Any) -> float:
        q, k, v = args[query : query + 3]
        widths = (products - products // 2) * q.shape[-1] + products // 2 * v.shape[-1]
        return float(2 * q.shape[:-1].numel() * k.shape[-2] * widths)

    return formula


def _solve(matrix: int, cubes: float, triangles: int = 0) -> Formula:
    """A factorisation of ``cubes · n³`` per matrix, then `triangles` triangular solves of n² per right-hand side.

    `matrix` is the position of the argument (..., n, n).
    """

    def formula(result: Any, *args: Any) -> float:
        n, x = args[matrix].shape[-1], result[0] if isinstance(result, tuple) else result
        return float(n * (cubes * args[matrix].numel() + triangles * x.numel()))

    return formula


_ATTENTION = [
    f"aten._scaled_dot_product_{name}"
    for name in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
]
_ATTENTION += ["aten._scaled_dot_product_fused_attention_overrideable"]

_FORMULAS: dict[str, Formula] = {
    **dict.fromkeys(("aten.mm", "aten.bmm", "aten.mv", "aten.dot"), _product(0)),
    **dict.fromkeys((f"aten.{op}{_}" for op in ("addmm", "baddbmm", "addmv") for _ in ("", "_")), _product(1)),
    "aten._grouped_mm": _grouped,
    # transformers' own, used where torch has no grouped product for the device or dtype.
    "transformers.grouped_mm_fallback": _grouped,
    "transformers.grouped_mm_fallback_backward": lambda _, left, right, *rest: 4.0 * left.numel() * right.shape[-1],
    **dict.fromkeys(_ATTENTION, _attention(2, query=0)),
    # Recomputed scores, then the gradients of values, probabilities, queries and keys.
    **dict.fromkeys((f"{op}_backward" for op in _ATTENTION), _attention(5, query=1)),
    "aten.linalg_cholesky_ex": _solve(0, 1 / 3),
    "aten.cholesky_solve": _solve(1, 0, 2),
    "aten.linalg_solve_triangular": _solve(0, 0, 1),
    "aten._linalg_solve_ex": _solve(0, 2 / 3, 2),
}
"""Formulas by op. Those of torch's registry serve for all other ops; they traverse the argument tree on every call."""
