"""Times a target's forward over Q tokens after a cached prefix: unchanged, accelerated, with bf16.

    python benchmarks/bench_forward.py [--threads 1]

It first prints how acceleration changes the logits. One column has the difference between a token's
logits in a forward of 9 tokens and in a forward of its own. The others compare with the unchanged
model: the difference of the logits, and the mean KL divergence of the distributions.
"""

from __future__ import annotations

import statistics
import time
from typing import Annotated, Any

import torch
import typer
from machine import save
from rich.console import Console
from rich.table import Table
from torch import Tensor

from specdiff.loop.fast_layers import accelerate, restore
from specdiff.loop.target import Target

TOKENS = (1, 2, 3, 5, 9, 17)
PREFIX = 100
ROUNDS = 9
TEXT = (
    "A river begins where rain and melting snow gather on high ground. Small streams meet, cut "
    "valleys into the rock, and carry sand and clay towards the sea. Where the land is flat the "
    "river slows down, winds from side to side and drops what it carried. Towns grew beside such "
    "rivers, since they gave water, food and a road, and took them away again in a flood."
)
WAYS: dict[str, Any] = {
    "untouched": restore,
    "accelerated": accelerate,
    "accelerated, bf16": lambda model: accelerate(model, bf16=True),
}
console = Console(width=100)


@torch.inference_mode()
def logits(target: Target, ids: Tensor, width: int) -> Tensor:
    """Logits of ids [N] after the first 8, with `width` tokens per forward. -> [N - 8, V]"""
    cache = target.new_cache(1, len(ids))
    target.prefill(ids[None, :8], torch.tensor([8]), cache)
    rows = []
    for start in range(8, len(ids), width):
        chunk = ids[None, start : start + width]
        rows.append(target.forward(chunk, cache)[0][0])
        cache.set_lengths(torch.tensor([start + chunk.shape[1]]), start + chunk.shape[1])
    return torch.cat(rows)


@torch.inference_mode()
def forward_ms(target: Target, width: int) -> float:
    cache = target.new_cache(1, PREFIX + width)
    cache.set_lengths(torch.tensor([PREFIX]), PREFIX)
    tokens = torch.arange(1000, 1000 + width)[None]
    start = time.perf_counter()
    target.forward(tokens, cache)
    return 1e3 * (time.perf_counter() - start)


def main(
    target: Annotated[str, typer.Option(help="a known model's name, or a folder")] = "smollm2-135m",
    threads: Annotated[int, typer.Option(help="CPU threads")] = 1,
) -> None:
    """Print logit differences, then medians of interleaved rounds in ms per forward."""
    torch.set_num_threads(threads)
    seen = Target.load(target, device="cpu", accelerate=False)
    model = seen.model
    ids = torch.tensor(seen.tokenizer(TEXT)["input_ids"])
    differences = measure_differences(seen, ids)
    times: dict[tuple[str, int], list[float]] = {(way, q): [] for way in WAYS for q in TOKENS}
    for _ in range(ROUNDS + 1):
        for way, change in WAYS.items():
            change(model)
            forward_ms(seen, 1)  # rounds the weights again, if this way rounds them
            for q in TOKENS:
                times[way, q].append(forward_ms(seen, q))
    ms = {key: statistics.median(values[1:]) for key, values in times.items()}
    show(ms, threads)
    content = {
        "command": f"python benchmarks/bench_forward.py --threads {threads}",
        "target": target,
        "prefix": PREFIX,
        "differences": differences,
        "cases": [{"way": way, "tokens": q, "ms": value} for (way, q), value in ms.items()],
    }
    console.print(f"saved {save(f'forward_{threads}', content)}", soft_wrap=True)


def measure_differences(target: Target, ids: Tensor) -> dict[str, dict[str, float]]:
    table = Table(title=f"largest difference of {len(ids) - 8} tokens' logits")
    for heading in ("", "alone or among 9", "from untouched", "KL from untouched", "same argmax"):
        table.add_column(heading, justify="left" if not heading else "right")
    result = {}
    restore(target.model)
    base = logits(target, ids, 1)
    p = base.double().log_softmax(-1)
    for way, change in WAYS.items():
        change(target.model)
        alone, among = logits(target, ids, 1), logits(target, ids, 9)
        kl = (p.exp() * (p - alone.double().log_softmax(-1))).sum(-1).mean().item()
        row = {
            "alone_or_among_9": (alone - among).abs().max().item(),
            "from_untouched": (alone - base).abs().max().item(),
            "kl": kl,
            "same_argmax": (alone.argmax(-1) == base.argmax(-1)).float().mean().item(),
        }
        result[way] = row
        table.add_row(
            way, *(f"{x:.1e}" for x in list(row.values())[:3]), f"{row['same_argmax']:.3f}"
        )
    console.print(table)
    return result


def show(ms: dict[tuple[str, int], float], threads: int) -> None:
    table = Table(title=f"ms per forward, {threads} thread(s), and relative to one token's")
    table.add_column("tokens")
    for way in WAYS:
        table.add_column(way, justify="right")
    for q in TOKENS:
        table.add_row(str(q), *(f"{ms[w, q]:.1f} ({ms[w, q] / ms[w, 1]:.2f}x)" for w in WAYS))
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
