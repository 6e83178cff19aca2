"""Times a target's forward over Q tokens after a cached prefix: unchanged, accelerated, with bf16.

    python benchmarks/bench_forward.py [--threads 1] [--prefix 100]

Each way has a model of its own, which stays in memory as it does for a user: weights are packed
once, before anything is timed. Within a round the ways take turns, and each round begins with
another. A turn begins with a forward that is not timed. Reading is a turn too: torch.sum over as
many bytes as the weights have in fp32, in huge pages, and over half of them, as bf16 has. Further
turns are a draft by the default drafter, and in rounds of their own a prompt.

It first prints how acceleration changes the logits. One column has the difference between a token's
logits in a forward of 9 tokens and in a forward of its own, or "same bits". The others compare with
the unchanged model: the difference of the logits, and the mean KL divergence of the distributions.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bench_draft import Case
from machine import save
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from specdiff.bench.machine import description
from specdiff.drafters import SHIPPED, weights_digest
from specdiff.loop.fast_layers import accelerate
from specdiff.loop.memory import Store
from specdiff.loop.target import Target
from specdiff_kernels import _C

TARGET = "smollm2-135m"
TOKENS = (1, 2, 3, 5, 9, 17, 33)
PREFIX = 100
ROUNDS, DROPPED = 15, 3
PROMPT, PROMPT_ROUNDS = 1000, 5  # of which the first is dropped
K = 4  # of the draft
PIECES = 32  # tensors that are read
TEXT = (
    "A river begins where rain and melting snow gather on high ground. Small streams meet, cut "
    "valleys into the rock, and carry sand and clay towards the sea. Where the land is flat the "
    "river slows down, winds from side to side and drops what it carried. Towns grew beside such "
    "rivers, since they gave water, food and a road, and took them away again in a flood."
)
WAYS: dict[str, Callable[[Any], Any]] = {
    "untouched": lambda model: model,
    "accelerated": accelerate,
    "accelerated, bf16": lambda model: accelerate(model, bf16=True),
}
Turn = Callable[[], dict[Any, float]]  # -> ms of each thing that it times
console = Console(width=110)


class Way:
    """A target with a cache that holds a prefix."""

    def __init__(self, target: Target, prefix: int) -> None:
        self.target, self.prefix = target, prefix
        self.tokens = torch.arange(max(PROMPT, prefix))[None] % target.vocab_size
        self.cache = target.new_cache(1, prefix + max(TOKENS))
        with torch.inference_mode():
            counts = torch.tensor([prefix])
            target.prefill(self.tokens[:, :prefix], counts, self.cache)

    @torch.inference_mode()
    def forwards(self) -> dict[int, float]:
        """ms of a forward, by its tokens."""
        self.forward_ms(1)  # what other ways left in the processor's caches is not its cost
        return {q: self.forward_ms(q) for q in TOKENS}

    def forward_ms(self, width: int) -> float:
        tokens = self.tokens[:, :width]
        start = time.perf_counter()
        self.target.forward(tokens, self.cache)
        return 1e3 * (time.perf_counter() - start)

    @torch.inference_mode()
    def prompt(self) -> dict[int, float]:
        """ms of reading a prompt into an empty cache, by its tokens."""
        count = min(PROMPT, self.target.context_limit)
        cache = self.target.new_cache(1, count)
        start = time.perf_counter()
        self.target.prefill(self.tokens[:, :count], torch.tensor([count]), cache)
        return {count: 1e3 * (time.perf_counter() - start)}


class Reading:
    """As many bytes in huge pages as a target's parameters have in fp32, each counted once."""

    def __init__(self, target: Target) -> None:
        self.count = sum(parameter.numel() for parameter in target.model.parameters())
        whole = Store().take((self.count,), torch.float32).fill_(1)  # memory never written is none
        self.pieces = whole.tensor_split(PIECES)

    def times(self) -> dict[str, float]:
        return {"all": self.ms(PIECES), "half": self.ms(PIECES // 2)}

    def ms(self, pieces: int) -> float:
        start = time.perf_counter()
        for piece in self.pieces[:pieces]:
            piece.sum()
        return 1e3 * (time.perf_counter() - start)


def main(
    target: Annotated[str, typer.Option(help="a known model's name, or a folder")] = TARGET,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 1,
    prefix: Annotated[int, typer.Option(min=1, help="cached tokens before the forward's")] = PREFIX,
) -> None:
    """Print logit differences, then medians of interleaved rounds in ms per forward."""
    torch.set_num_threads(threads)
    targets = {}
    for way, change in WAYS.items():
        targets[way] = Target.load(target, device="cpu", accelerate=False)
        change(targets[way].model)
    if prefix + max(TOKENS) > (limit := targets["untouched"].context_limit):
        most = limit - max(TOKENS)
        raise typer.BadParameter(f"--prefix must be at most {most} for this target, got {prefix}")
    ids = torch.tensor(targets["untouched"].tokenizer(TEXT)["input_ids"])
    content = {
        "command": command(target, threads, prefix),
        "target": target,
        "prefix": prefix,
        "isa": _C.isa(),
        "differences": measure_differences(targets, ids),
        **measure(targets, prefix, next(iter(SHIPPED)) if target == TARGET else None),
    }
    show(content)
    name = "_".join(["forward", str(threads), *others(target, prefix)])
    console.print(f"saved {save(name, content)}", soft_wrap=True)


def command(target: str, threads: int, prefix: int) -> str:
    """The command line: the threads, and what is not the default."""
    given = {"--target": (target, TARGET), "--prefix": (prefix, PREFIX)}
    more = "".join(f" {name} {now}" for name, (now, usual) in given.items() if now != usual)
    return f"python benchmarks/bench_forward.py --threads {threads}{more}"


def others(target: str, prefix: int) -> Iterator[str]:
    """Parts of a result's name that keep it apart from the published one."""
    if target != TARGET:
        yield Path(target).name
    if prefix != PREFIX:
        yield f"prefix_{prefix}"


def measure_differences(targets: dict[str, Target], ids: Tensor) -> dict[str, dict[str, float]]:
    table = Table(title=f"largest difference of {len(ids) - 8} tokens' logits")
    for heading in ("", "alone or among 9", "from untouched", "KL from untouched", "same argmax"):
        table.add_column(heading, justify="left" if not heading else "right")
    result = {}
    base = logits(targets["untouched"], ids, 1)
    p = base.double().log_softmax(-1)
    for way, target in targets.items():
        alone, among = logits(target, ids, 1), logits(target, ids, 9)
        kl = (p.exp() * (p - alone.double().log_softmax(-1))).sum(-1).mean().item()
        row = {
            "alone_or_among_9": (alone - among).abs().max().item(),
            "from_untouched": (alone - base).abs().max().item(),
            "kl": kl,
            "same_argmax": (alone.argmax(-1) == base.argmax(-1)).float().mean().item(),
        }
        result[way] = row
        own, *changes = (f"{x:.1e}" for x in list(row.values())[:3])
        if torch.equal(alone.view(torch.int32), among.view(torch.int32)):
            own = "same bits"
        table.add_row(way, own, *changes, f"{row['same_argmax']:.3f}")
    console.print(table)
    return result


@torch.inference_mode()
def logits(target: Target, ids: Tensor, width: int) -> Tensor:
    """Logits of ids [N] after the first 8, with `width` tokens per forward. -> f32 [N - 8, V]"""
    cache = target.new_cache(1, len(ids))
    target.prefill(ids[None, :8], torch.tensor([8]), cache)
    rows = []
    for start in range(8, len(ids), width):
        chunk = ids[None, start : start + width]
        rows.append(target.forward(chunk, cache)[0][0])
        cache.set_lengths(torch.tensor([start + chunk.shape[1]]), start + chunk.shape[1])
    return torch.cat(rows)


def measure(targets: dict[str, Target], prefix: int, drafter: str | None) -> dict[str, Any]:
    """Time all ways, reading, and the draft of a drafter, if there is one."""
    ways = {way: Way(target, prefix) for way, target in targets.items()}
    reading = Reading(targets["untouched"])
    turns: dict[str, Turn] = {way: own.forwards for way, own in ways.items()}
    turns["reading"] = reading.times
    if drafter is not None:
        case = Case(targets["accelerated"], drafter, K, prefix=prefix)
        turns["draft"] = lambda: {K: case.run()}
    ms = medians(turns, ROUNDS, DROPPED)
    prompts = medians({way: own.prompt for way, own in ways.items()}, PROMPT_ROUNDS, 1)
    found: dict[str, Any] = {
        "reading_mb": 4 * reading.count / 1e6,
        "reading_ms": ms["reading", "all"],
        "reading_half_ms": ms["reading", "half"],
        "cases": [{"way": w, "tokens": q, "ms": ms[w, q]} for w in ways for q in TOKENS],
        "prompt": [{"way": w, "tokens": n, "ms": value} for (w, n), value in prompts.items()],
    }
    if drafter is not None:
        draft, token = ms["draft", K], ms["accelerated", 1]
        found["draft"] = {
            "drafter": drafter,
            "weights": weights_digest(drafter),
            "k": K,
            "ms": draft,
            "share": draft / token,
        }
    return found


def medians(turns: dict[str, Turn], rounds: int, dropped: int) -> dict[tuple[str, Any], float]:
    """Medians over rounds after the first, of which each begins with another turn."""
    times: dict[tuple[str, Any], list[float]] = {}
    names = list(turns)
    for number in track(range(rounds), "measuring", console=console, transient=True):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            for key, ms in turns[name]().items():
                times.setdefault((name, key), []).append(ms)
    return {key: statistics.median(values[dropped:]) for key, values in times.items()}


def show(content: dict[str, Any]) -> None:
    ms = {(c["way"], c["tokens"]): c["ms"] for c in content["cases"]}
    read = {way: content["reading_half_ms" if "bf16" in way else "reading_ms"] for way in WAYS}
    machine = description()
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    table = Table(
        title=f"ms per forward after {content['prefix']} tokens, {threads}, and relative to one "
        f"token's; reading is of {content['reading_mb']:.0f} MB, and of half of it for bf16"
    )
    table.add_column("tokens")
    for way in WAYS:
        table.add_column(way, justify="right")
    table.add_row("reading", *(f"{read[way]:.1f}" for way in WAYS))
    table.add_row("1 / reading", *(f"{ms[way, 1] / read[way]:.2f}x" for way in WAYS))
    for q in TOKENS:
        table.add_row(str(q), *(f"{ms[w, q]:.1f} ({ms[w, q] / ms[w, 1]:.2f}x)" for w in WAYS))
    prompts = {c["way"]: c for c in content["prompt"]}
    count = prompts["untouched"]["tokens"]
    table.add_row(f"prompt of {count}", *(f"{prompts[way]['ms']:.0f}" for way in WAYS))
    console.print(table)
    if "draft" in content:
        draft = content["draft"]
        console.print(
            f"A draft of {draft['k']} tokens by {draft['drafter']!r} takes {draft['ms']:.2f} ms, "
            f"{draft['share']:.3f} of an accelerated forward of one token."
        )
    console.print(
        f"{machine['processor']['model name']}, {machine['cores']} cores, {threads}; instructions: "
        f"{content['isa']} of the kernels, {machine['torch_cpu_capability']} of torch",
        highlight=False,
    )
    for line in comparison(content):
        console.print(line, highlight=False)


def comparison(content: dict[str, Any]) -> Iterator[str]:
    """Time accelerated relative to untouched, and wherever that is not less."""
    ms = {(c["way"], f"{c['tokens']} new"): c["ms"] for c in content["cases"]}
    ms |= {(c["way"], f"a prompt of {c['tokens']}"): c["ms"] for c in content["prompt"]}
    ratios = {(way, what): value / ms["untouched", what] for (way, what), value in ms.items()}
    own = ", ".join(f"{what} {r:.2f}x" for (way, what), r in ratios.items() if way == "accelerated")
    yield f"accelerated / untouched, by tokens: {own}"
    slower = [f"{way}, {what} ({r:.2f}x)" for (way, what), r in ratios.items() if r >= 1.005]
    if slower:
        yield f"ACCELERATION IS SLOWER THAN UNTOUCHED: {'; '.join(slower)}"


if __name__ == "__main__":
    typer.run(main)
