"""Measures tokens per target forward of SmolLM2's drafters, on prompts that were not trained on.

    python benchmarks/bench_drafters.py [--quick]

Each setting decodes the messages of the tasks "chat" (16) and "held-out", once greedily and at
temperature 1 with several seeds. Tokens per forward depend neither on the machine nor on the batch,
so rows are decoded in a batch. Every round has K drafted tokens. For sampled text, block
verification accepts more tokens than the token rule. The standard error is that of a ratio of sums
over prompts, with the seeds of a prompt pooled. `identical` counts greedy texts equal to plain
decoding's; a text may differ where two logits are within a model's rounding.
"""

from __future__ import annotations

from collections import deque
from typing import Annotated, Any, NamedTuple

import torch
import typer
from machine import save
from rich.console import Console
from rich.progress import track
from rich.table import Table

from specdiff.bench.tasks import prompts as read_prompts
from specdiff.drafters import load_drafter, weights_digest
from specdiff.loop.decoder import Decoder
from specdiff.loop.sampling import Sampling
from specdiff.loop.target import Target

SETTINGS = [("parallel", 8, "token"), ("parallel", 8, "block"), ("parallel", 4, "block")]
SETTINGS += [("eagle", 4, "block")]
PLACES = 4  # rows in a batch
console = Console()


class Text(NamedTuple):
    """Result of decoding a prompt with one seed."""

    prompt: int
    seed: int
    new: list[int]
    forwards: int


def main(
    target: Annotated[str, typer.Option(help="a known model's name, or a folder")] = "smollm2-135m",
    parallel: Annotated[str, typer.Option(help="a drafter")] = "parallel",
    eagle: Annotated[str, typer.Option(help="a drafter")] = "eagle",
    tokens: Annotated[int, typer.Option(help="new tokens of each prompt")] = 128,
    seeds: Annotated[int, typer.Option(help="seeds of each prompt at temperature 1")] = 4,
    held_out: Annotated[int, typer.Option(help="prompts of the task held-out")] = 64,
    quick: Annotated[bool, typer.Option(help="8 tokens for 4 prompts; not saved")] = False,
) -> None:
    """Measure every setting. Takes well over an hour on two cores."""
    shared = Target.load(target)
    folders = {"parallel": parallel, "eagle": eagle}
    cases = []
    for task, count in (("chat", 16), ("held-out", held_out)):
        ids = read_prompts(task, shared.tokenizer, 4 if quick else count)
        for temperature in (0.0, 1.0):
            many, new = (1 if temperature == 0 else seeds), (8 if quick else tokens)
            cases += measure(shared, folders, task, ids, temperature, new, many)
    console.print(table(cases))
    if not quick:
        content = {
            "command": command({"target": target, **folders}, tokens, seeds, held_out),
            "target": target,
            "new_tokens": tokens,
            "cases": cases,
        }
        console.print(f"saved {save('drafters', content, shared.device)}", soft_wrap=True)


def command(models: dict[str, str], tokens: int, seeds: int, held_out: int) -> str:
    """The command line that was invoked: the numbers, and the models that are not the default."""
    numbers = {"--tokens": tokens, "--seeds": seeds, "--held-out": held_out}
    usual = {"target": "smollm2-135m", "parallel": "parallel", "eagle": "eagle"}
    other = {f"--{name}": model for name, model in models.items() if model != usual[name]}
    given = " ".join(f"{option} {value}" for option, value in {**numbers, **other}.items())
    return f"python benchmarks/bench_drafters.py {given}"


def measure(
    target: Target,
    folders: dict[str, str],
    task: str,
    prompts: list[list[int]],
    temperature: float,
    tokens: int,
    seeds: int,
) -> list[dict[str, Any]]:
    """One case for each setting."""
    options: tuple[Any, ...] = (prompts, temperature, tokens, seeds)
    plain = decode(Decoder(target), *options) if temperature == 0 else None
    title = f"{task}, temperature {temperature:g}"
    cases = []
    for name, K, rule in track(SETTINGS, title, console=console, transient=True):
        decoder = Decoder(target, load_drafter(folders[name], target), K, rule)
        texts = decode(decoder, *options)
        gained, error = ratio(texts)
        identical = plain and sum(a.new == b.new for a, b in zip(texts, plain, strict=True))
        cases.append(
            {
                "task": task,
                "prompts": len(prompts),
                "seeds": seeds,
                "drafter": name,
                "weights": weights_digest(folders[name]),
                "K": K,
                "rule": rule,
                "temperature": temperature,
                "tokens_per_forward": gained,
                "standard_error": error,
                "identical": identical,
            }
        )
    return cases


def decode(
    decoder: Decoder, prompts: list[list[int]], temperature: float, tokens: int, seeds: int
) -> list[Text]:
    """Decode every prompt with every seed. A finished row is replaced by the next at once."""
    waiting = deque((p, s) for s in range(seeds) for p in range(len(prompts)))
    rows = min(PLACES, len(waiting))
    longest = max(map(len, prompts)) + tokens
    session = decoder.open(rows, longest, sampling=Sampling(temperature), look_every=1)
    places: list[tuple[int, int] | None] = [None] * rows
    forwards, texts = [0] * rows, []
    while waiting or any(place is not None for place in places):
        for b, place in enumerate(places):
            if place is not None and session.done[b]:
                texts.append(Text(*place, session.texts[b][len(prompts[place[0]]) :], forwards[b]))
                places[b] = None
            if places[b] is None and waiting:
                prompt, seed = places[b] = waiting.popleft()
                session.admit([prompts[prompt]], first=b, max_new_tokens=tokens, seed=seed)
                forwards[b] = 0
        if any(place is not None for place in places):
            for b, new in enumerate(session.step().tokens):
                forwards[b] += bool(new)
    return sorted(texts)


def ratio(texts: list[Text]) -> tuple[float, float]:
    """Tokens per forward over all texts, and its standard error with prompts as the sample
    (Cochran, Sampling Techniques, section 6.4)."""
    sums: dict[int, list[int]] = {}
    for text in texts:
        own = sums.setdefault(text.prompt, [0, 0])
        own[0] += len(text.new)
        own[1] += text.forwards
    tokens, forwards = torch.tensor(list(sums.values()), dtype=torch.float64).T
    value, n = tokens.sum() / forwards.sum(), len(tokens)
    spread = ((tokens - value * forwards) ** 2).sum() * n / max(1, n - 1)
    return float(value), float(spread.sqrt() / forwards.sum())


def table(cases: list[dict[str, Any]]) -> Table:
    result = Table(title="tokens per target forward")
    kinds = list(dict.fromkeys((case["task"], case["temperature"]) for case in cases))
    for heading in ("drafter", "K", "rule"):
        result.add_column(heading)
    for task, temperature in kinds:
        mode = "greedy" if temperature == 0 else f"temperature {temperature:g}"
        result.add_column(f"{task}, {mode}", justify="right")
    for name, K, rule in SETTINGS:
        row = {
            (case["task"], case["temperature"]): case
            for case in cases
            if (case["drafter"], case["K"], case["rule"]) == (name, K, rule)
        }
        cells = [
            f"{row[kind]['tokens_per_forward']:.2f} ± {row[kind]['standard_error']:.2f}"
            for kind in kinds
        ]
        result.add_row(name, str(K), rule, *cells)
    return result


if __name__ == "__main__":
    typer.run(main)
