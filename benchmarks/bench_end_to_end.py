"""SmolLM2-135M-Instruct with and without a drafter, on 16 fixed prompts.

    python benchmarks/bench_end_to_end.py [--quick]

Every setting decodes every prompt; the settings take turns on each prompt, in an order that
rotates, so that a slow moment of the machine strikes all of them. A speed-up is the median over the
prompts of tokens per second relative to plain decoding of that prompt by the same implementation,
with the same accelerated linear layers, and to unmodified transformers.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from machine import save
from rich.console import Console
from rich.progress import track
from rich.table import Table

from specdiff.cpu import accelerate
from specdiff.decoder import Decoder, Stats
from specdiff.drafters import load_drafter
from specdiff.models import load_target
from specdiff.sampling import Sampling
from specdiff.target import Target

DRAFTERS = {"block-diffusion": (2, 4, 8), "parallel": (2, 4, 8), "prompt-lookup": (4, 8)}
PROMPTS = Path(__file__).with_name("prompts.txt")
PLAIN = "plain"
TRANSFORMERS = "transformers generate"
console = Console(width=max(140, Console().width))


class Run(NamedTuple):
    """One prompt decoded once."""

    tokens: list[int]
    seconds: float
    stats: Stats | None = None


@dataclass
class Setting:
    """A way to decode, and what it has decoded so far."""

    name: str
    decode: Callable[[list[int], int, int], tuple[list[int], Stats | None]]
    runs: list[Run] = field(default_factory=list)

    def run(self, prompt: list[int], tokens: int, seed: int) -> Run:
        start = time.perf_counter()
        new, stats = self.decode(prompt, tokens, seed)
        return Run(new, time.perf_counter() - start, stats)


def main(
    target: Annotated[str, typer.Option(help="a known model, or a folder")] = "smollm2-135m",
    tokens: Annotated[int, typer.Option(help="new tokens of each prompt")] = 32,
    quick: Annotated[bool, typer.Option(help="24 tokens, one K each; not saved")] = False,
) -> None:
    """Tokens per target forward, acceptance and speed-up, greedy and at temperature 1."""
    untouched, tokenizer = load_target(target)
    model = accelerate(load_target(target)[0])
    texts = PROMPTS.read_text().splitlines()
    if quick:
        tokens = 24
    prompts = [chat(tokenizer, text) for text in texts]
    cases = []
    for temperature in (0.0, 1.0):
        settings = make_settings(model, untouched, temperature, quick)
        measure(settings, prompts, tokens, f"temperature {temperature:g}")
        console.print(table(settings, temperature))
        cases += [summary(setting, settings, temperature) for setting in settings]
    if not quick:
        content = {
            "command": f"python benchmarks/bench_end_to_end.py --tokens {tokens}",
            "target": target,
            "prompts": len(prompts),
            "new_tokens": tokens,
            "cases": cases,
        }
        console.print(f"saved {save('end_to_end', content)}", soft_wrap=True)


def chat(tokenizer: Any, text: str) -> list[int]:
    messages = [{"role": "user", "content": text}]
    full = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(full, add_special_tokens=False).input_ids


def make_settings(model: Any, untouched: Any, temperature: float, quick: bool) -> list[Setting]:
    """Plain decoding with and without `accelerate`, transformers, then every drafter at every K."""
    target, sampling = Target(model), Sampling(temperature)
    settings = [
        Setting(PLAIN, ours(Decoder(target), sampling)),
        Setting(f"{PLAIN}, not accelerated", ours(Decoder(Target(untouched)), sampling)),
        Setting(TRANSFORMERS, theirs(untouched, sampling)),
    ]
    for name, ks in DRAFTERS.items():
        try:
            drafter = load_drafter(name, target)
        except ValueError as error:
            console.print(f"not measured: {name}: {error}", style="dim")
            continue
        for k in ks[:1] if quick else ks:
            decoder = Decoder(target, drafter, k)
            settings.append(Setting(f"{name} K={k}", ours(decoder, sampling)))
    return settings


def ours(decoder: Decoder, sampling: Sampling) -> Callable:
    def decode(prompt: list[int], tokens: int, seed: int) -> tuple[list[int], Stats]:
        result = decoder.generate(prompt, max_new_tokens=tokens, sampling=sampling, seed=seed)
        return result.new_tokens[0], result.stats

    return decode


def theirs(model: Any, sampling: Sampling) -> Callable:
    """Unmodified transformers with its own cache."""

    def decode(prompt: list[int], tokens: int, seed: int) -> tuple[list[int], None]:
        torch.manual_seed(seed)
        ids = torch.tensor([prompt])
        how: dict[str, Any] = {"do_sample": False}
        if not sampling.greedy:
            how = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            pad_token_id=model.generation_config.eos_token_id,
            **how,
        )
        return out[0, len(prompt) :].tolist(), None

    return decode


def measure(settings: list[Setting], prompts: list[list[int]], tokens: int, title: str) -> None:
    for setting in settings:
        setting.run(prompts[0], 4, 0)  # warm up
    for number, prompt in enumerate(track(prompts, title, console=console, transient=True)):
        turn = number % len(settings)
        for setting in settings[turn:] + settings[:turn]:
            setting.runs.append(setting.run(prompt, tokens, number))


def speedup(setting: Setting, plain: Setting) -> float:
    pairs = zip(setting.runs, plain.runs, strict=True)
    rates = [(len(a.tokens) / a.seconds) / (len(b.tokens) / b.seconds) for a, b in pairs]
    return statistics.median(rates)


def summary(setting: Setting, settings: list[Setting], temperature: float) -> dict[str, Any]:
    plain = settings[0]
    (transformers,) = (s for s in settings if s.name == TRANSFORMERS)
    pairs = list(zip(setting.runs, plain.runs, strict=True))
    result: dict[str, Any] = {
        "setting": setting.name,
        "temperature": temperature,
        "emitted": sum(len(run.tokens) for run in setting.runs),
        "tokens_per_second": sum(len(run.tokens) for run in setting.runs)
        / sum(run.seconds for run in setting.runs),
        "speedup": speedup(setting, plain),
        "speedup_over_transformers": speedup(setting, transformers),
        "identical": sum(a.tokens == b.tokens for a, b in pairs) if temperature == 0 else None,
    }
    stats = [run.stats for run in setting.runs if run.stats is not None]
    if stats:
        forwards = sum(s.target_forwards for s in stats)
        result["tokens_per_forward"] = result["emitted"] / forwards
        result["acceptance"] = pooled_acceptance(stats)
        result["ms_per_forward"] = {
            stage: sum(s.stage_ms[stage] for s in stats) / forwards
            for stage in ("draft", "target", "verify", "commit")
        }
    return result


def pooled_acceptance(stats: list[Stats]) -> list[float]:
    """By draft position: share accepted, among those whose predecessors were all accepted."""
    width = max(len(s.examined_at) for s in stats)
    accepted, examined = ([0] * width for _ in range(2))
    for s in stats:
        for i, (a, e) in enumerate(zip(s.accepted_at, s.examined_at, strict=True)):
            accepted[i] += a
            examined[i] += e
    return [a / e for a, e in zip(accepted, examined, strict=True)]


def table(settings: list[Setting], temperature: float) -> Table:
    plain = settings[0]
    mode = "greedy" if temperature == 0 else f"temperature {temperature:g}"
    count, threads = len(plain.runs), torch.get_num_threads()
    result = Table(title=f"{mode}: {count} prompts, batch 1, {threads} threads")
    speeds = ("tokens/s", "speed-up", "over transformers")
    for heading in ("setting", *speeds, "tokens/forward", "draft + verify ms"):
        result.add_column(heading, justify="left" if heading == "setting" else "right")
    result.add_column("conditional acceptance by position")
    if temperature == 0:
        result.add_column("identical text", justify="right")
    for setting in settings:
        row = summary(setting, settings, temperature)
        cells = [setting.name, f"{row['tokens_per_second']:.1f}", f"{row['speedup']:.2f}x"]
        cells.append(f"{row['speedup_over_transformers']:.2f}x")
        if "tokens_per_forward" in row:
            ms = row["ms_per_forward"]
            cells += [f"{row['tokens_per_forward']:.2f}", f"{ms['draft'] + ms['verify']:.2f}"]
            cells.append(" ".join(f"{a:.2f}" for a in row["acceptance"]))
        else:
            cells += ["1", "-", ""]
        if temperature == 0:
            cells.append(f"{row['identical']}/{count}")
        result.add_row(*cells)
    return result


if __name__ == "__main__":
    typer.run(main)
