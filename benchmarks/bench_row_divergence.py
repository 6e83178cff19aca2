"""Times a drafter's loss on one thread: row_divergence against plain torch.

    python benchmarks/bench_row_divergence.py

The loss is tv + kl. Plain torch is autograd over the obvious fp32 expression. Timed are the forward
alone, without gradients, and the forward with the backward to the draft's logits. The floor is to
read both rows once and to write the gradient. (A backward reads only the target's logits of tokens
that can be drafted, but with scattered ids these touch nearly all cache lines.) For comparison, the
bandwidth of torch summing logits is reported.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from machine import save
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from specdiff_kernels import row_divergence

CASES = ((256, 49152, 8192), (64, 50257, 50257))  # N, V, D
ROUNDS = 15
OURS, TORCH = "row_divergence", "plain torch"
PASSES = ("forward", "forward + backward")

Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def main() -> None:
    """Print medians of interleaved rounds, in ms."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cases = [measure(*case) for case in CASES]
    bandwidth = sum_bandwidth()
    show(cases, bandwidth)
    command = "python benchmarks/bench_row_divergence.py"
    content = {"command": command, "sum_gb_per_s": bandwidth, "cases": cases}
    Console().print(f"saved {save('row_divergence', content)}")


def ours(target: Tensor, draft: Tensor, ids: Tensor | None) -> Tensor:
    row = row_divergence(target, draft, ids)
    return (row.tv + row.kl).sum()


def plain(target: Tensor, draft: Tensor, ids: Tensor | None) -> Tensor:
    """tv + kl in plain torch. It keeps only the target's probabilities of draftable tokens."""
    log_q = draft.log_softmax(-1)
    with torch.no_grad():
        log_p = target.log_softmax(-1)
        log_p = log_p if ids is None else log_p[:, ids]
        p = log_p.exp()
    tv = (log_q.exp() - p).clamp(min=0).sum(-1)
    return (tv + (p * (log_p - log_q)).sum(-1)).sum()


def measure(N: int, V: int, D: int) -> dict[str, Any]:
    """One entry of the results."""
    target = torch.randn(N, V) * 3
    ids = None if D == V else torch.randperm(V)[:D].sort().values
    draft = (target if ids is None else target[:, ids]) + torch.randn(N, D)
    losses = {OURS: ours, TORCH: plain}
    check(target, draft, ids)
    seconds: dict[tuple[str, str], list[float]] = {(n, p): [] for n in losses for p in PASSES}
    for _ in track(range(ROUNDS + 1), f"N={N} V={V} D={D}", transient=True):
        for name, loss in losses.items():
            for which in PASSES:
                start = time.perf_counter()
                run(loss, which, target, draft, ids)
                seconds[name, which].append(time.perf_counter() - start)
    check(target, draft, ids)
    floor = {PASSES[0]: 4 * N * (V + D), PASSES[1]: 4 * N * (2 * (V + D) + D)}
    passes = {}
    for which in PASSES:
        ms = {name: 1e3 * statistics.median(seconds[name, which][1:]) for name in losses}
        passes[which] = {
            "ms": ms,
            "ratio": ms[TORCH] / ms[OURS],
            "floor_mb": floor[which] / 1e6,
            "floor_gb_per_s": floor[which] / ms[OURS] / 1e6,
        }
    return {"N": N, "V": V, "D": D, "rounds": ROUNDS, "passes": passes}


def run(loss: Loss, which: str, target: Tensor, draft: Tensor, ids: Tensor | None) -> None:
    if which == PASSES[0]:
        with torch.no_grad():
            loss(target, draft, ids)
        return
    draft = draft.detach().requires_grad_()
    loss(target, draft, ids).backward()


def check(target: Tensor, draft: Tensor, ids: Tensor | None) -> None:
    """Check value and gradient of both on the first rows, to fp32 rounding."""
    rows = slice(0, 4)
    for loss in (ours, plain):
        have, want = (
            value_and_gradient(loss, target[rows], draft[rows], ids),
            value_and_gradient(plain, target[rows].double(), draft[rows].double(), ids),
        )
        for x, exact in zip(have, want, strict=True):
            error = (x - exact).abs().max()
            if not error <= 1e-5 * exact.abs().max():
                raise SystemExit(f"{loss.__name__} is wrong by {error:.2e}")


def value_and_gradient(loss: Loss, target: Tensor, draft: Tensor, ids: Tensor | None) -> tuple:
    draft = draft.detach().requires_grad_()
    value = loss(target, draft, ids)
    return value.detach(), torch.autograd.grad(value, draft)[0]


def sum_bandwidth() -> float:
    """GB/s at which torch sums logits, an upper bound of the speed."""
    logits = torch.randn(256, 49152)
    seconds = []
    for _ in range(30):
        start = time.perf_counter()
        logits.sum()
        seconds.append(time.perf_counter() - start)
    return 4 * logits.numel() / statistics.median(seconds) / 1e9


def show(cases: list[dict[str, Any]], bandwidth: float) -> None:
    table = Table(
        title=f"tv + kl, fp32 logits, one thread: ms (torch sums at {bandwidth:.1f} GB/s)"
    )
    for column in ("N, V, D", "", OURS, TORCH, "torch / ours", "floor MB", "floor GB/s"):
        table.add_column(column, justify="left" if column in ("N, V, D", "") else "right")
    for case in cases:
        for which, entry in case["passes"].items():
            table.add_row(
                f"{case['N']}, {case['V']}, {case['D']}",
                which,
                *(f"{entry['ms'][name]:.1f}" for name in (OURS, TORCH)),
                f"{entry['ratio']:.1f}x",
                f"{entry['floor_mb']:.0f}",
                f"{entry['floor_gb_per_s']:.1f}",
            )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
