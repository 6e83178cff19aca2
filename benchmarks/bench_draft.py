"""Times a draft of SmolLM2's drafters, compared with a forward of the target over one token.

    python benchmarks/bench_draft.py

Only a round's drafting is timed, after a prefix of 100 tokens and 2 newly committed ones. A drafter
with a sequential head also drafts without it, in turns; the difference is the head's cost. At rank
r and Vd tokens, the head must read at least Vd r weights in bf16 per token: 2.1 MB at 128 and 8192.
Its budget is 0.4 ms per token on one thread.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
import typer
from machine import save
from rich.console import Console
from rich.progress import track
from rich.table import Table

from specdiff.drafters import Draws, News, load_drafter, weights_digest
from specdiff.loop.sampling import Sampling
from specdiff.loop.target import Target

DRAFTERS = ("parallel", "eagle", "block-diffusion")
LENGTHS = (1, 2, 4, 8)
PREFIX, NEWS, ROUNDS = 100, 2, 41
console = Console(width=110)


class Case:
    """A drafter after a prefix, at some K."""

    def __init__(
        self, target: Target, name: str, k: int, *, head: bool = True, prefix: int = PREFIX
    ) -> None:
        self.drafter: Any = load_drafter(name, target)
        self.drafter.correction = self.drafter.correction if head else None
        self.name, self.k, self.head, self.prefix = name, k, head, prefix
        width = (len(self.drafter.target_layers) + 1) * target.hidden_size
        generator = torch.Generator().manual_seed(0)
        self.states = torch.randn(1, prefix, width, generator=generator)
        self.tokens = torch.randint(target.vocab_size, (1, prefix), generator=generator)
        self.ms: list[float] = []

    @torch.inference_mode()
    def run(self) -> float:
        """ms of another draft."""
        drafter, one = self.drafter, torch.ones(1, dtype=torch.int64)
        drafter.start(1, self.prefix + NEWS + 1, Sampling(1.0))
        drafter.read(slice(0, 1), News(self.tokens, self.prefix * one, self.states))
        news = News(self.tokens[:, :NEWS], NEWS * one, self.states[:, :NEWS])
        start = time.perf_counter()
        drafter.draft(news, self.k, self.k * one, Draws(one, one))
        self.ms.append(1e3 * (time.perf_counter() - start))
        return self.ms[-1]

    @property
    def median(self) -> float:
        return statistics.median(self.ms[1:])


@torch.inference_mode()
def forward_ms(target: Target) -> float:
    cache = target.new_cache(1, PREFIX + 1)
    cache.set_lengths(torch.tensor([PREFIX]), PREFIX)
    start = time.perf_counter()
    target.forward(torch.tensor([[1000]]), cache)
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    """Print medians of interleaved rounds, on one thread and on two."""
    target, cases = Target.load("smollm2-135m", device="cpu"), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found = [Case(target, name, k) for name in DRAFTERS for k in LENGTHS]
        bare = {(c.name, c.k): Case(target, c.name, c.k, head=False) for c in found
                if c.drafter.correction is not None}  # fmt: skip
        forwards = []
        for _ in track(range(ROUNDS + 1), f"{threads} threads", console=console, transient=True):
            forwards.append(forward_ms(target))
            for case in (*found, *bare.values()):
                case.run()
        token = statistics.median(forwards[1:])
        for case in found:
            without = bare.get((case.name, case.k))
            cases.append(
                {
                    "drafter": case.name,
                    "weights": weights_digest(case.name),
                    "threads": threads,
                    "k": case.k,
                    "draft_ms": case.median,
                    "head_step_ms": without and (case.median - without.median) / case.k,
                    "target_ms": token,
                    "share": case.median / token,
                }
            )
    show(cases)
    content = {"command": "python benchmarks/bench_draft.py", "prefix": PREFIX, "cases": cases}
    console.print(f"saved {save('draft', content)}", soft_wrap=True)


def show(cases: list[dict[str, Any]]) -> None:
    table = Table(title="drafting beside a target forward of one token, ms")
    for name in ("drafter", "threads", "K", "draft", "head, a token", "target", "share"):
        table.add_column(name, justify="left" if name == "drafter" else "right")
    for c in cases:
        head = "" if c["head_step_ms"] is None else f"{c['head_step_ms']:.2f}"
        table.add_row(c["drafter"], str(c["threads"]), str(c["k"]), f"{c['draft_ms']:.2f}", head,
                      f"{c['target_ms']:.1f}", f"{c['share']:.3f}")  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
