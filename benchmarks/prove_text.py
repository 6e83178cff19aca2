"""Text decoded with drafts against text decoded a token at a time, token by token.

    python benchmarks/prove_text.py [--tokens 1280] [--prompts 40] [--threads 2]

The messages of the tasks "chat" and "held-out" are prompts as chats first, then as plain texts.
Each is continued beyond stop tokens, so that all texts have the same length. Plain decoding takes
one prompt at a time, over a dense cache. The shipped parallel drafter must give the same tokens by
chains of 4 and by trees of 12 nodes, alone and among 4, with a dense and a paged cache: greedily,
and at temperature 1 under the coupled rule with the same seeds. After a text's first difference,
its other tokens count as unequal. The gap is that of the two largest logits there, which for greedy
text tells a near tie.

It takes some ten minutes. The same command resumes where it was stopped, at the
last finished setting, unless the code has changed. Exit status 1: a text differs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product, zip_longest
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from machine import RESULTS
from rich.console import Console
from rich.progress import track
from rich.table import Table

import specdiff
import specdiff_kernels
from specdiff.bench.checks import next_logits
from specdiff.bench.kept import Kept
from specdiff.drafters import SHIPPED, Drafter, load_drafter, weights_digest
from specdiff.files import digest
from specdiff.loop.decoder import Decoder
from specdiff.loop.sampling import Sampling
from specdiff.loop.stats import Stats
from specdiff.loop.target import Target
from specdiff.models import encode
from specdiff.training.held_out import messages
from specdiff_kernels import _C

TARGET, DRAFTER = "smollm2-135m", next(iter(SHIPPED))
BLOCK = 16  # positions in a block of a paged cache
CODE = (".py", ".so", ".safetensors")
Texts = list[list[int]]
console = Console(width=110)


@dataclass(frozen=True)
class Setting:
    """How texts are decoded. k: None is plain decoding; tree: None has chains for drafts."""

    temperature: float
    k: int | None = None
    tree: int | None = None
    batch: int = 1
    block_size: int | None = None

    @property
    def rule(self) -> str:
        return "token" if self.temperature == 0 else "coupled"

    @property
    def plain(self) -> Setting:
        """How the texts are decoded that these have to equal."""
        return Setting(self.temperature)

    def __str__(self) -> str:
        manner = "greedy" if self.temperature == 0 else f"temperature {self.temperature:g}"
        if self == self.plain:
            return f"{manner}, plain"
        cache = "dense" if self.block_size is None else "paged"
        tree = "" if self.tree is None else f", tree of {self.tree}"
        return f"{manner}, K = {self.k}{tree}, batch {self.batch}, {cache}"


SETTINGS = [
    Setting(temperature, *draft, batch, block_size)
    for temperature, draft, batch, block_size in product(
        (0.0, 1.0), ((4, None), (8, 12)), (1, 4), (None, BLOCK)
    )
]


def main(
    tokens: Annotated[int, typer.Option(min=1, help="new tokens of a setting, at least")] = 1280,
    prompts: Annotated[int, typer.Option(min=1, help="prompts, 160 at most")] = 40,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 2,
) -> None:
    """Compare every setting with plain decoding, and fail if any text differs."""
    torch.set_num_threads(threads)
    target = Target.load(TARGET, device="cpu")
    drafter = load_drafter(DRAFTER, target)
    ids = list(encoded(target.tokenizer))
    if prompts > len(ids):
        raise typer.BadParameter(f"--prompts must be at most {len(ids)}, got {prompts}")
    new = -(-tokens // prompts)
    command = f"python benchmarks/prove_text.py --tokens {tokens} --prompts {prompts}"
    kept = Kept(RESULTS, f"text_{threads}", f"{command} --threads {threads}")
    cases = prove(target, drafter, ids[:prompts], new, kept)
    console.print(table(cases))
    path = kept.finish(
        {
            "target": TARGET,
            "drafter": DRAFTER,
            "weights": weights_digest(DRAFTER),
            "isa": _C.isa(),
            "prompts": prompts,
            "new_tokens": new,
            "tokens": sum(case["tokens"] for case in cases),
            "equal": sum(case["equal"] for case in cases),
            "cases": cases,
        }
    )
    console.print(f"saved {path}", soft_wrap=True)
    sys.exit(0 if all(case["equal"] == case["tokens"] for case in cases) else 1)


def encoded(tokenizer: Any) -> Iterator[list[int]]:
    """Token ids of all messages, as chats and then as plain texts."""
    for raw, task in product((False, True), ("chat", "held-out")):
        for message in messages(task):
            yield encode(tokenizer, message, raw)


def prove(
    target: Target,
    drafter: Drafter,
    prompts: Texts,
    new_tokens: int,
    kept: Kept,
    settings: Sequence[Setting] = SETTINGS,
) -> list[dict[str, Any]]:
    """A case for each setting; those that this code has compared before are not decoded again."""
    code = code_digest()
    kept.cases = [case for case in kept.cases if case["code"] == code]
    done = {case["setting"]: case for case in kept.cases}

    def keep(setting: Setting, case: dict[str, Any]) -> None:
        done[str(setting)] = {"setting": str(setting), "code": code, **case}
        kept.add([done[str(setting)]])

    for setting in settings:
        if str(setting) in done:
            continue
        if str(setting.plain) not in done:
            keep(setting.plain, {"texts": decode(target, None, prompts, new_tokens, setting.plain)})
        plain = done[str(setting.plain)]["texts"]
        keep(setting, compare(target, drafter, prompts, new_tokens, setting, plain))
    return [done[str(setting)] for setting in settings]


def compare(
    target: Target,
    drafter: Drafter,
    prompts: Texts,
    new_tokens: int,
    setting: Setting,
    plain: Texts,
) -> dict[str, Any]:
    """Decode with drafts, and compare with the new tokens of plain decoding."""
    stats = Stats()
    found = decode(target, drafter, prompts, new_tokens, setting, stats)
    differences = []
    equal = 0
    for number, (text, expected) in enumerate(zip(found, plain, strict=True)):
        at = first_difference(text, expected)
        equal += len(expected) if at is None else at
        if at is not None:
            before = [*prompts[number], *expected[:at]]
            best = next_logits(target, before, 1)[0].topk(2).values
            differences.append({"text": number, "token": at, "gap": float(best[0] - best[1])})
    return {
        **asdict(setting),
        "rule": setting.rule,
        "tokens": sum(map(len, plain)),
        "equal": equal,
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "differences": differences,
    }


def decode(
    target: Target,
    drafter: Drafter | None,
    prompts: Texts,
    new_tokens: int,
    setting: Setting,
    stats: Stats | None = None,
) -> Texts:
    """New tokens of each prompt, whose seed is its number. Counts of drafts go into `stats`."""
    drafter = None if setting.k is None else drafter
    decoder = Decoder(target, drafter, setting.k, setting.rule, tree=setting.tree)
    texts: Texts = []
    starts = range(0, len(prompts), setting.batch)
    for start in track(starts, str(setting), console=console, transient=True):
        rows = range(start, min(start + setting.batch, len(prompts)))
        done = decoder.generate(
            [prompts[row] for row in rows],
            max_new_tokens=new_tokens,
            sampling=Sampling(setting.temperature),
            seed=list(rows),
            stop_tokens=(),
            block_size=setting.block_size,
        )
        texts += done.new_tokens
        if stats is not None:
            stats.drafted += done.stats.drafted
            stats.accepted += done.stats.accepted
    return texts


def first_difference(text: Sequence[int], expected: Sequence[int]) -> int | None:
    """Where two texts part, or one of them ends."""
    pairs = enumerate(zip_longest(text, expected))
    return next((at for at, (a, b) in pairs if a != b), None)


def code_digest() -> str:
    """Of all code of the two packages, and of the shipped weights."""
    folders = (Path(package.__file__ or "").parent for package in (specdiff, specdiff_kernels))
    files = (file for folder in folders for file in sorted(folder.rglob("*")))
    return digest(*(file.read_bytes() for file in files if file.suffix in CODE))


def table(cases: list[dict[str, Any]]) -> Table:
    result = Table(title="text decoded with drafts, compared with plain decoding's")
    for heading in ("setting", "drafted", "accepted", "tokens", "equal", "first difference"):
        result.add_column(heading, justify="right" if heading != "setting" else "left")
    for case in cases:
        counts = (f"{case[name]:,}" for name in ("drafted", "accepted", "tokens", "equal"))
        first = next(iter(case["differences"]), None)
        where = first and f"text {first['text']}, token {first['token']}: gap {first['gap']:.1e}"
        result.add_row(case["setting"], *counts, where or "none")
    return result


if __name__ == "__main__":
    typer.run(main)
