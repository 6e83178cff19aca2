"""Admission of one long prompt beside rows under way, with an autoregressive drafter.

    python benchmarks/bench_admit.py

The drafter reads the prompt either in its own row (`Drafter.read`), or as news of the next draft,
which is a forward over all rows. The two ways take turns.
"""

from __future__ import annotations

import statistics
import time

import torch
from machine import save
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from specdiff import Decoder, Target
from specdiff.drafters import Autoregressive
from specdiff.loop.session import Session

ROWS, PROMPT, TURNS = 32, 1000, 7
SMALL = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 8192}
console = Console()


def session(target: Target, drafter: Autoregressive) -> Session:
    """A session with a short prompt in every row but one, whose first round is over."""
    made = Decoder(target, drafter, 4).open(ROWS, PROMPT + 100, stop_tokens=())
    made.admit([[1, 2, 3]] * (ROWS - 1), max_new_tokens=90)
    made.step()
    return made


def seconds(target: Target, *, reads: bool) -> float:
    """Time of the admission and of the round after it."""
    drafter = Autoregressive(target.model)
    drafter.reads = reads
    rows, prompt = session(target, drafter), [5 + i % 1000 for i in range(PROMPT)]
    start = time.perf_counter()
    rows.admit([prompt], first=ROWS - 1, max_new_tokens=20)
    rows.step()
    return time.perf_counter() - start


def main() -> None:
    """Medians of turns."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **SMALL, num_attention_heads=3, num_key_value_heads=3, max_position_embeddings=2048
    )
    target = Target(LlamaForCausalLM(config))
    times: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(1 + TURNS):
        for reads, taken in times.items():
            found = seconds(target, reads=reads)
            if turn:
                taken.append(found)
    own, news = (statistics.median(times[reads]) for reads in (True, False))
    console.print(f"{ROWS} rows, a prompt of {PROMPT} tokens: {own:.3f} s in its own row, "
                  f"{news:.3f} s as news of all rows, {news / own:.1f}x")  # fmt: skip
    content = {"command": "python benchmarks/bench_admit.py", "rows": ROWS, "prompt": PROMPT,
               "model": SMALL, "own_row_s": own, "all_rows_s": news}  # fmt: skip
    console.print(f"saved {save('admit', content)}", soft_wrap=True)


if __name__ == "__main__":
    main()
