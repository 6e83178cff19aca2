"""The command line's own comparison on each of 16 fixed prompts: drafts against plain decoding.

    python benchmarks/bench_compare.py

Runs `specdiff generate --compare --json` once for each prompt, as a user would.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from typing import Annotated, Any

import typer
from machine import save
from rich.console import Console
from rich.progress import track

from specdiff.bench.held_out import messages
from specdiff.drafters import weights_digest

console = Console()


def main(
    drafter: Annotated[str, typer.Option(help="as of specdiff generate")] = "parallel",
    k: Annotated[str, typer.Option("--k", help="tokens drafted per round")] = "auto",
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
    tokens: Annotated[int, typer.Option(help="new tokens of each prompt")] = 48,
) -> None:
    """Print the median speed-up, and how many texts were identical."""
    options = ["--drafter", drafter, "--k", k, "--temperature", str(temperature)]
    options += ["--max-new-tokens", str(tokens), "--compare", "--json"]
    runs = []
    for prompt in track(messages("chat"), console=console, transient=True):
        runs.append(compare(["--prompt", prompt, *options]))
    speedups = [run["speedup"] for run in runs]
    content: dict[str, Any] = {
        "command": f"python benchmarks/bench_compare.py --drafter {drafter} --k {k} "
        f"--temperature {temperature:g} --tokens {tokens}",
        "drafter": drafter,
        "weights": weights_digest(drafter),
        "runs": f"specdiff generate {' '.join(options)} --prompt ...",
        "prompts": len(runs),
        "speedups": speedups,
        "median_speedup": statistics.median(speedups),
        "tokens_per_forward": [run["tokens_per_forward"] for run in runs],
        "identical": sum(bool(run["identical"]) for run in runs) if temperature == 0 else None,
    }
    console.print_json(json.dumps(content))
    console.print(f"saved {save('compare', content)}", soft_wrap=True)


def compare(options: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "specdiff", "generate", *options]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


if __name__ == "__main__":
    typer.run(main)
