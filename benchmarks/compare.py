"""Compares two result files: which figures became faster or slower.

    python benchmarks/compare.py BEFORE.json AFTER.json [--within 0.1]

It compares figures of the same name: times in ms, where smaller is better, and others such as
speed-ups and tokens per second, where larger is better. The exit status is 1 if a figure is worse
by more than the share `--within`. On a busy machine, two runs of the same code differ by a tenth.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

# smaller is better if a key of the figure's path is one of these
SMALLER = ("ms", "ms_per_forward", "median")
# larger is better if a key begins or ends like this
LARGER = ("speedup", "ratio", "tokens_per", "gb_per_s")
MEASURED = ("identical", "emitted", "rounds", "count", "fastest_other")  # results, not settings
console = Console()


def figures(content: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], float]]:
    """Every figure with its path of keys. A case in a list is named by its settings."""
    if isinstance(content, dict):
        for key, value in content.items():
            if key != "machine":
                yield from figures(value, (*path, key))
    elif isinstance(content, list):
        for number, item in enumerate(content):
            yield from figures(item, (*path, name_of(item, number)))
    elif isinstance(content, float) and better(path) is not None:
        yield path, content


def name_of(item: Any, number: int) -> str:
    """The settings of a case: its strings and integers, also one level down, except counts."""
    if not isinstance(item, dict):
        return str(number)
    inner = [value for value in item.values() if isinstance(value, dict)]
    flat = {key: value for part in (item, *inner) for key, value in part.items()}
    settings = (
        f"{key} {value}"
        for key, value in flat.items()
        if key == "temperature" or (isinstance(value, str | int) and key not in MEASURED)
    )
    return ", ".join(settings) or str(number)


def better(path: tuple[str, ...]) -> int | None:
    """1 if a larger figure is better, -1 if a smaller one is, None if it is neither."""
    if any(key.startswith(LARGER) or key.endswith(LARGER) for key in path):
        return 1
    return -1 if any(key in SMALLER for key in path) else None


def main(
    before: Annotated[Path, typer.Argument(help="results of a benchmark", exists=True)],
    after: Annotated[Path, typer.Argument(help="later results of the same benchmark", exists=True)],
    within: Annotated[float, typer.Option(help="share by which figures may be worse")] = 0.1,
) -> None:
    """Print every figure that changed by more than `within`. Fail if one is worse."""
    old, new = (dict(figures(json.loads(path.read_text()))) for path in (before, after))
    common = [path for path in old if path in new]
    if not common:
        typer.echo(f"{before} and {after} have no figure in common", err=True)
        raise typer.Exit(2)
    table, worse = Table("figure", "before", "after", "after / before", ""), 0
    for path in common:
        if old[path] == new[path]:
            continue
        ratio = new[path] / old[path] if old[path] else float("inf")
        gain = ratio if better(path) == 1 else 1 / ratio if ratio else float("inf")
        if 1 / (1 + within) <= gain <= 1 + within:
            continue
        worse += gain < 1
        verdict = "[red]worse[/red]" if gain < 1 else "[green]better[/green]"
        values = (f"{x:.3g}" for x in (old[path], new[path]))
        table.add_row(" / ".join(path[1:] or path), *values, f"{ratio:.2f}x", verdict)
    if table.row_count:
        console.print(table)
    alone = old.keys() ^ new.keys()
    for path in sorted(alone):
        console.print(f"in one file only: {' / '.join(path[1:] or path)}", style="dim")
    console.print(f"{len(common)} figures compared, {worse} worse; {len(alone)} in one file only")
    raise typer.Exit(1 if worse else 0)


if __name__ == "__main__":
    typer.run(main)
