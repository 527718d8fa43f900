"""Exact greedy removal, compared with the plain loop and with one factorisation and inverse of the same matrix.

*Exact*: `streamprune.maths.greedy.greedy_removal` as recipes call it, including its factorisation and ``WᵀW``. *Plain*:
the loop as written in docs/methods.md and the SoBP paper, with `W` and `P` updated in full at every step, including its
factorisation. `plain_in_place_seconds` is the same loop without temporaries (`addmm_`): a few steps are timed and
extrapolated. *Cholesky and inverse*: `torch.linalg.cholesky` and `torch.cholesky_inverse`. All run in one process on
one random Gram of correlated inputs.

Two checks show that the removal orders agree. `same_order`: in float64, all steps at a smaller size.
`same_order_timed`: in the timed size and dtype, for the steps that the plain loop ran (the length of the common prefix;
rounding may swap near ties).

    python benchmarks/greedy.py                      the target: n = 11008, 30 %, float32; about 30 minutes on 2 cores, 5 GB of memory
    python benchmarks/greedy.py --plain-steps 20     20 steps of the plain loop timed and extrapolated: about 3 minutes
    python benchmarks/greedy.py --n 8192 --width 128 --ratio 0.5 --plain-steps 4
    python benchmarks/greedy.py --device cuda --n 28672 --rows 8192 --plain-steps 20
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from streamprune.maths.greedy import greedy_removal
from streamprune.maths.refit import unit_columns

DAMPING = 0.01
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def problem(n: int, rows: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return W (rows, n) and H (n, n), the Gram of inputs with a decaying spectrum and channels of very different scale."""
    generator = torch.Generator().manual_seed(0)
    tokens, factors = 2 * n, min(n, 1024)
    mix = torch.randn(factors, n, generator=generator) / (1 + torch.arange(factors)).sqrt()[:, None]
    size = torch.rand(n, generator=generator) + 0.1
    h = torch.zeros(n, n, dtype=dtype, device=device)
    for _ in range(0, tokens, 1024):
        x = torch.randn(1024, factors, generator=generator) @ mix + torch.randn(1024, n, generator=generator)
        x = (x * size).to(device, dtype)
        h.addmm_(x.T, x, alpha=1 / tokens)
    return torch.randn(rows, n, generator=generator).to(device, dtype), h


def inverse(h: Tensor) -> Tensor:
    """Compute P (n, n) with LAPACK's routines."""
    damped = h.clone()
    damped.diagonal().add_(DAMPING * h.diagonal().mean())
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))


def plain(
    w: Tensor, h: Tensor, width: int, steps: int, in_place: bool = False
) -> tuple[list[int], list[float], float, float]:
    """Run the first steps of the plain loop: units, costs, seconds before the loop and in it."""
    start = now(w.device)
    w, p = w.clone(), inverse(h)
    begun = now(w.device)
    units = h.shape[0] // width
    gone = torch.zeros(units, dtype=torch.bool, device=w.device)
    order, costs = [], []
    for _ in range(steps):
        if width == 1:
            cost = w.square().sum(dim=0) / p.diagonal()
        else:
            blocks = p.view(units, width, units, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()
            blocks[gone] = torch.eye(width, dtype=p.dtype, device=p.device)
            columns = w.view(-1, units, width).transpose(0, 1)
            cost = torch.linalg.solve(blocks, columns.mT @ columns).diagonal(dim1=1, dim2=2).sum(dim=1)
        u = int(cost.masked_fill(gone, torch.inf).argmin())
        order.append(u)
        costs.append(float(cost[u]))
        gone[u] = True
        c = slice(u * width, (u + 1) * width)
        right = torch.linalg.solve(p[c, c], p[c])  # (P_uu)⁻¹ P_u:
        if in_place:
            w.addmm_(w[:, c].clone(), right, alpha=-1)
            p.addmm_(p[:, c].clone(), right, alpha=-1)
        else:
            w -= w[:, c] @ right
            p -= p[:, c] @ right
    return order, costs, begun - start, now(w.device) - begun


def now(device: torch.device) -> float:
    """Return the time in seconds after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(work: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """Return the result of `work` and its seconds."""
    start = now(device)
    result = work()
    return result, now(device) - start


def closed_form(w: Tensor, h: Tensor, gone: Tensor) -> float:
    """Return ``tr(W_S ([P]_SS)⁻¹ W_Sᵀ)``, the cost of removing S with the optimal refit."""
    p = inverse(h)[gone][:, gone]
    return float(torch.trace(w[:, gone] @ torch.linalg.solve(p, w[:, gone].T)))


def check(n: int, width: int, ratio: float) -> dict[str, Any]:
    """Run both loops completely, in float64 at a smaller size."""
    n -= n % width
    count = min(max(1, round(ratio * n / width)), n // width - 1)
    w, h = problem(n, max(8, n // 3), torch.float64, torch.device("cpu"))
    order, costs = greedy_removal(w, h, width=width, count=count, damping=DAMPING, place="check")
    expected, paid, _, _ = plain(w, h, width, count)
    joint = closed_form(w, h, unit_columns(order, width))
    return {
        "same_order": order.tolist() == expected,
        "same_order_n": n,
        "same_order_count": count,
        "same_order_dtype": "float64",
        "costs_differ": float((costs / torch.tensor(paid, dtype=torch.float64) - 1).abs().max()),
        "costs_differ_from_closed_form": abs(float(costs.sum()) / joint - 1),
    }


def common(a: list[int], b: list[int]) -> int:
    """Return the length of the common prefix of two lists."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    device, dtype, width = torch.device(options.device), DTYPES[options.dtype], options.width
    count = round(options.ratio * (options.n // width))
    say(f"checking orders at n = {options.check_n} in float64")
    result = check(options.check_n, width, options.ratio)
    w, h = problem(options.n, options.rows, dtype, device)
    say("Cholesky factorisation and inverse")
    cholesky_inverse = min(timed(lambda: inverse(h), device)[1] for _ in range(2))
    say("exact")
    (order, costs), exact = timed(
        lambda: greedy_removal(w, h, width=width, count=count, damping=DAMPING, place="benchmark"), device
    )
    steps = min(count, options.plain_steps or count)
    say(f"plain: {steps} of {count} steps")
    plain_order, plain_costs, before, loop = plain(w, h, width, steps)
    few = min(count, steps, 20)
    _, _, before_in_place, loop_in_place = plain(w, h, width, few, in_place=True)
    plain_seconds, in_place_seconds = before + loop * count / steps, before_in_place + loop_in_place * count / few
    agreed = common(order.tolist(), plain_order)
    return {
        "n": options.n,
        "rows": options.rows,
        "width": width,
        "count": count,
        "dtype": options.dtype,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "plain_seconds": plain_seconds,
        "plain_steps_timed": steps,
        "plain_in_place_seconds": in_place_seconds,
        "plain_in_place_steps_timed": few,
        "exact_seconds": exact,
        "cholesky_inverse_seconds": cholesky_inverse,
        "plain_over_exact": plain_seconds / exact,
        "plain_in_place_over_exact": in_place_seconds / exact,
        "exact_over_cholesky_inverse": exact / cholesky_inverse,
        **result,
        "same_order_timed": agreed,
        "total_costs_differ": float(costs[:steps].double().sum()) / sum(plain_costs) - 1,
    }


def report(result: dict[str, Any]) -> str:
    """Return the report as text."""
    scaled = (
        ""
        if result["plain_steps_timed"] == result["count"]
        else f", scaled up from {result['plain_steps_timed']} steps"
    )
    return "\n".join(
        [
            f"n = {result['n']}, {result['rows']} rows, {result['count']} units of {result['width']} removed, {result['dtype']}, "
            f"{result['device']}, {result['threads']} threads",
            f"exact                  {result['exact_seconds']:10.2f} s",
            f"plain                  {result['plain_seconds']:10.2f} s   {result['plain_over_exact']:.1f} × exact{scaled}",
            f"plain, in place        {result['plain_in_place_seconds']:10.2f} s   {result['plain_in_place_over_exact']:.1f} × exact, "
            f"scaled up from {result['plain_in_place_steps_timed']} steps",
            f"Cholesky and inverse   {result['cholesky_inverse_seconds']:10.2f} s   exact is "
            f"{result['exact_over_cholesky_inverse']:.2f} × that",
            f"same order in float64 at n = {result['same_order_n']}: {result['same_order']}, costs within {result['costs_differ']:.1e}",
            f"same order here: the first {result['same_order_timed']} of {result['plain_steps_timed']}; total costs differ by "
            f"{result['total_costs_differ']:+.1e}",
        ]
    )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=11008, help="columns; default: %(default)s")
    parser.add_argument("--rows", type=int, default=4096, help="of W; default: %(default)s")
    parser.add_argument("--width", type=int, default=1, help="columns per unit; default: %(default)s")
    parser.add_argument("--ratio", type=float, default=0.3, help="of the units to remove; default: %(default)s")
    parser.add_argument("--plain-steps", type=int, help="of the plain loop to time and scale up; default: all")
    parser.add_argument(
        "--check-n", type=int, default=768, help="columns of the check in float64; default: %(default)s"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    units = options.n // options.width if options.width > 0 else 0
    if units < 2 or options.n % options.width:
        parser.error(f"--n is {options.n} and --width {options.width}: n must be a multiple of width, and hold 2 units")
    if not 1 <= round(options.ratio * units) < units:
        parser.error(f"--ratio is {options.ratio}: of {units} units it must remove at least one, and not all")
    if options.plain_steps is not None and options.plain_steps < 1:
        parser.error(f"--plain-steps is {options.plain_steps}; it must be at least 1")
    if options.check_n < 2 * options.width:
        parser.error(f"--check-n is {options.check_n}; it must hold 2 units of {options.width}")
    if options.threads:
        torch.set_num_threads(options.threads)
    result = measure(options)
    print(json.dumps(result) if options.json else report(result))


if __name__ == "__main__":
    main()
