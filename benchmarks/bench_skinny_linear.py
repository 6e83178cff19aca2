"""Times the linear layers of a model on M rows: skinny_linear against torch.

    python benchmarks/bench_skinny_linear.py [--threads 1]

Every weight of a SmolLM2-135M forward is read once (538 MB in fp32, far more than the caches), in
the model's order. There are two floors: the weights must be read, timed as torch.sum of each
weight, and N K M products must be computed. Ratios are to the best single-row path in fp32. The
kernel is called as by an accelerated layer, with weights packed beforehand or used in place.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from machine import save
from rich.console import Console
from rich.progress import track
from rich.table import Table

from specdiff_kernels import PackedWeight, pack_weight, skinny_linear
from specdiff_kernels.ops.skinny_linear import unchecked

D, KV, MLP, LAYERS, VOCAB = 576, 192, 1536, 30, 49152
LAYER = [(D, D), (KV, D), (KV, D), (D, D), (MLP, D), (MLP, D), (D, MLP)]  # [N, K]
ROWS = (1, 2, 3, 5, 9, 17)
ROUNDS = 9


def main(threads: Annotated[int, typer.Option(help="CPU threads")] = 1) -> None:
    """Print medians of interleaved rounds, in ms per pass over all weights."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    weights = [torch.randn(shape) * 0.02 for shape in LAYER * LAYERS + [(VOCAB, D)]]
    packed = [pack_weight(weight) for weight in weights]
    halves = [pack_weight(weight, torch.bfloat16) for weight in weights]
    paths: dict[str, Callable[[dict[int, torch.Tensor]], Any]] = {
        "packed": lambda x: [unchecked(x[w.packs.shape[1]], w, None) for w in packed],
        "where they lie": lambda x: [unchecked(x[w.shape[1]], w, None) for w in weights],
        "packed, bf16": lambda x: [unchecked(x[w.packs.shape[1]], w, None) for w in halves],
        "torch F.linear": lambda x: [F.linear(x[w.shape[1]], w) for w in weights],
    }
    check(weights, packed, halves)
    times: dict[tuple[str, int], list[float]] = {(p, m): [] for p in paths for m in ROWS}
    reading = []
    inputs = {m: {k: torch.randn(m, k) for k in (D, MLP)} for m in ROWS}
    with torch.inference_mode():
        for _ in track(range(ROUNDS + 1), "measuring", transient=True):
            reading.append(seconds(lambda: [weight.sum() for weight in weights]))
            for m in ROWS:
                for name, run in paths.items():
                    times[name, m].append(seconds(lambda: run(inputs[m])))  # noqa: B023
    check(weights, packed, halves)
    ms = {key: 1e3 * statistics.median(values[1:]) for key, values in times.items()}
    floor = 1e3 * statistics.median(reading[1:])
    show(ms, floor, list(paths), threads)
    cases = [{"path": p, "rows": m, "ms": value} for (p, m), value in ms.items()]
    command = f"python benchmarks/bench_skinny_linear.py --threads {threads}"
    content = {"command": command, "reading_ms": floor, "cases": cases}
    Console().print(f"saved {save(f'skinny_linear_{threads}', content)}", soft_wrap=True)


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def check(*paths: Sequence[torch.Tensor | PackedWeight]) -> None:
    """Check every path to fp32 rounding."""
    for weight in itertools.chain(*(path[:7] for path in paths)):
        rows = weight
        if isinstance(weight, PackedWeight):
            rows = weight.packs.transpose(1, 2).flatten(0, 1)[: weight.rows]
        x = torch.randn(5, rows.shape[1])
        exact = x.double() @ rows.double().T
        error = (skinny_linear(x, weight) - exact).abs().max()
        if error > 1e-4 * exact.abs().max():
            raise SystemExit(f"wrong by {error:.2e} at {list(rows.shape)} {rows.dtype}")


def show(ms: dict[tuple[str, int], float], floor: float, paths: list[str], threads: int) -> None:
    count = LAYERS * sum(n * k for n, k in LAYER) + VOCAB * D
    best = min(ms[name, 1] for name in paths if "bf16" not in name)
    table = Table(
        title=f"ms per pass over {4 * count / 1e6:.0f} MB of weights, {threads} thread(s); reading "
        f"them alone {floor:.1f} ms"
    )
    table.add_column("rows")
    for name in paths:
        table.add_column(name, justify="right")
    for m in ROWS:
        table.add_row(str(m), *(f"{ms[p, m]:.1f} ({ms[p, m] / best:.2f}x)" for p in paths))
    rates = (count * (2 if "bf16" in p else 4) / ms[p, 1] / 1e6 for p in paths)
    table.add_row("GB/s, 1 row", *(f"{rate:.1f}" for rate in rates))
    products = (count * ROWS[-1] / ms[p, ROWS[-1]] / 1e6 for p in paths)
    table.add_row(f"G products/s, {ROWS[-1]} rows", *(f"{rate:.0f}" for rate in products))
    Console(width=110).print(table)


if __name__ == "__main__":
    typer.run(main)
