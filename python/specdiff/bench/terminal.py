"""Terminal tables of `specdiff bench`."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from .reading import (
    Case,
    Content,
    check,
    failed,
    heading,
    inner,
    plain_number,
    sections,
    times,
    values,
)

FIRST = 4  # number of draft positions whose acceptance is shown


def table(content: Content) -> Table:
    """Table of a content's cases, with a section for each target, task and temperature.

    Settings other than K and T get a column if they vary. Refused cases are dim and have the reason
    in the last column.

    Args:
        content: content of a result file of `specdiff bench`.

    Example:
        >>> Console().print(table(json.loads(Path("results/methods.json").read_text())))
    """
    more = inner(content)
    targets = values(content["cases"], "target")
    shown = Table(title=": ".join([content["name"], *targets[:1]][: 1 + (len(targets) == 1)]),
                  title_style="bold")  # fmt: skip
    shown.add_column("method", no_wrap=True)
    for name in ("K", "T", *more):
        shown.add_column(name, justify="right", no_wrap=True)
    for name in ("tokens/s", "speed-up", "tokens/\nforward", "alpha\nx K", "accepted,\n%"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("check", overflow="fold")
    for own in sections(content):
        shown.add_section()
        shown.add_row(Text(heading(content, own), style="bold"))
        for case in own:
            shown.add_row(*cells(case, more), style="dim" if case["refused"] else None)
    if content["stand_in"]:
        shown.caption = Text(content["stand_in"])
    return shown


def cells(case: Case, more: list[str]) -> list[Text]:
    settings = [case["method"], *(plain_number(case[name]) for name in ("k", "steps", *more))]
    if case["refused"]:
        return [Text(cell) for cell in (*settings, *[""] * 5, f"refused: {case['refused']}")]
    speedup, per_forward, alpha_k = case["speedup"], case["tokens_per_forward"], case["alpha_k"]
    figures = [
        f"{case['tokens_per_second']['median']:.1f}",
        "" if speedup is None else times(speedup),
        "" if per_forward is None else f"{per_forward:.2f}",
        "" if alpha_k is None else f"{alpha_k:.2f}",
        " ".join(f"{100 * share:.0f}" for share in (case["acceptance"] or [])[:FIRST]),
    ]
    found = Text(check(case), style="bold red" if failed(case) else "")
    return [*map(Text, settings + figures), found]
