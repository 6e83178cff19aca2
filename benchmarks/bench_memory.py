"""Measures the decoding loop's memory without the model: what it must keep, and its peak.

    python benchmarks/bench_memory.py [--target smollm2-135m]

The loop must keep keys and values, K + 1 rows of logits per sequence, and the rows that the draft
was drawn from. The rest is temporary memory of forwards and ops. A second part measures, on a model
of two narrow layers, whether memory grows over 10,000 rounds. A third measures what a process holds
with the model untouched and accelerated, each in a process of its own.
"""

from __future__ import annotations

import gc
import resource
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import torch
import typer
from machine import save
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from specdiff import Decoder, Session, Target, accelerate
from specdiff.bench.machine import peak_memory
from specdiff.drafters import PromptLookup, load_drafter

BATCHES = (1, 8)
SETTINGS = {"plain": (None, None), "K = 2": ("block-diffusion", 2), "K = 4": ("block-diffusion", 4)}
PROMPT, NEW, WATCHED = 100, 64, 6  # tokens, tokens, rounds
ROUNDS = 10_000
WAYS = {
    "untouched": lambda model: model,
    "accelerated, packed=False": lambda model: accelerate(model, packed=False),
    "accelerated": accelerate,
    'accelerated, packed="only"': lambda model: accelerate(model, packed="only"),
}
MB = 1e-6
console = Console(width=100)


def size_of(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def measure(decoder: Decoder, batch: int) -> dict[str, float]:
    """MB that the loop must keep, and the peak of a few rounds."""
    prompts = [list(range(1000 + b, 1000 + b + PROMPT)) for b in range(batch)]
    session = decoder.open(batch, PROMPT + NEW)
    session.admit(prompts, max_new_tokens=NEW)
    session.step()
    cache = size_of(*(x for layer in session.cache.layers for x in (layer.keys, layer.values)))
    with peak_memory(torch.device("cpu")) as peak:
        for _ in range(WATCHED):
            session.step()
    rounds = peak.megabytes or 0.0
    target, k = decoder.target, decoder.settings.k
    logits = MB * batch * (k + 1) * target.vocab_size * target.dtype.itemsize
    drafts = getattr(decoder.drafter, "head", None)
    pool = 0.0 if drafts is None else MB * batch * k * drafts.out_features * target.dtype.itemsize
    return {
        "cache": MB * cache,
        "logits": logits,
        "pool": pool,
        "rounds": rounds,
        "rest": rounds - logits - pool,
    }


def growth() -> dict[str, float]:
    """Live tensors, their bytes and the process's peak, before and after many rounds."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    decoder = Decoder(Target(LlamaForCausalLM(config)), PromptLookup(), 4)
    session = decoder.open(2, 250, block_size=16, stop_tokens=())
    rounds, seen = 0, []
    for most in (ROUNDS // 10, ROUNDS):
        while rounds < most:
            for place, free in enumerate(session.done):
                if free:
                    session.admit([[1, 2, 3]], first=place, max_new_tokens=200, seed=rounds)
            session.step()
            rounds += 1
        gc.collect()
        live = [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        seen.append((len(live), size_of(*live), resident * 1024))
    (_, _, early), (tensors, held, late) = seen
    return {
        "rounds": rounds,
        "tensors_before": seen[0][0],
        "tensors_after": tensors,
        "bytes_before": seen[0][1],
        "bytes_after": held,
        "resident_growth_mb": MB * (late - early),
        "free_blocks": blocks_left(session),
    }


def blocks_left(session: Session) -> str:
    """Free and held blocks, out of all blocks."""
    pages = session.cache.pages
    if pages is None:
        return "-"
    held = int((pages.tables >= 0).sum())
    return f"{int(pages.available) + held} of {len(pages.references)}"


def resident(target: str, way: str) -> dict[str, float]:
    """MB that this process holds after a forward, and the most that it ever held."""
    start = held()
    model = Target.load(target, device="cpu", accelerate=False).model
    with torch.no_grad():
        WAYS[way](model)(torch.arange(5)[None])
    gc.collect()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"model": held() - start, "process": held(), "peak": MB * 1024 * most}


def held() -> float:
    """Resident MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return MB * pages * resource.getpagesize()


def of_processes(target: str) -> dict[str, dict[str, float]]:
    """`resident` of each way."""
    found = {}
    for way in WAYS:
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            found[way] = process.submit(resident, target, way).result()
    return found


def main(
    target: Annotated[str, typer.Option(help="a known model's name, or a folder")] = "smollm2-135m",
) -> None:
    """Print peaks in MB by setting and batch, then the growth over 10,000 rounds."""
    processes = of_processes(target)
    held_by = Table(title="MB of a process with the model, after a forward")
    for heading in ("", "since the start", "in all", "peak"):
        held_by.add_column(heading, justify="right" if heading else "left")
    for way, case in processes.items():
        held_by.add_row(way, *(f"{x:.0f}" for x in case.values()))
    console.print(held_by)
    long = growth()
    seen = Target.load(target, device="cpu")
    cases = []
    table = Table(title=f"MB beyond the model, {PROMPT} + {NEW} tokens a row")
    for heading in ("", "B", "cache", "logits", "draft pool", "peak of a round", "the rest of it"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, (drafter, k) in SETTINGS.items():
        for batch in BATCHES:
            made = None if drafter is None else load_drafter(drafter, seen)
            case = measure(Decoder(seen, made, k), batch)
            cases.append({"setting": name, "k": k, "batch": batch, **case})
            table.add_row(name, str(batch), *(f"{x:.1f}" for x in case.values()))
    console.print(table)
    console.print(
        f"after {long['rounds']} rounds: {long['tensors_after']} live tensors of "
        f"{long['bytes_after']} bytes ({long['tensors_before']} of {long['bytes_before']} after a "
        f"tenth of them), peak of the process {long['resident_growth_mb']:+.1f} MB, "
        f"{long['free_blocks']} blocks accounted for"
    )
    content = {
        "command": "python benchmarks/bench_memory.py",
        "target": target,
        "cases": cases,
        "growth": long,
        "processes": processes,
    }
    console.print(f"saved {save('memory', content)}", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
