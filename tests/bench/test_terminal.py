"""The table of `specdiff bench` on a terminal."""

from __future__ import annotations

import io

from rich.console import Console

from specdiff.bench.terminal import table
from tests.bench import contents


def printed(content):
    console = Console(file=io.StringIO(), width=150, record=True, force_terminal=True)
    console.print(table(content))
    text = console.export_text(clear=False)
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines()
            if line.startswith("│")]  # fmt: skip
    return text, rows, console.export_text(styles=True)


def test_a_section_for_each_task_and_temperature():
    text, rows, _ = printed(contents.methods())
    headings = [row[0] for row in rows if not any(row[1:])]
    assert headings == [
        "chat, greedy, context = 39",
        "chat, temperature 1, context = 39",
        "summary, greedy, context = 339",
        "summary, temperature 1, context = 339",
    ]
    assert text.count("├") == 3 and "methods: smollm2-135m" in text
    assert rows[1] == ["plain", "", "", "28.0", "1.00x", "1.00", "", "", "identical 16/16"]
    assert rows[2] == ["block-diffusion", "4", "1", "31.4", "1.12x (1.01-1.23)", "2.00", "1.00",
                       "45 38 35 33", "identical 16/16"]  # fmt: skip
    assert rows[5] == ["prompt-lookup", "8", "", "28.0", "1.00x (0.90-1.10)", "1.64", "0.64",
                       "28 21 18 16", "identical 16/16"]  # fmt: skip
    assert rows[-1][-1] == "distribution BROKEN, z = 5.1"


def test_a_check_is_told_whole():
    """Also in the narrowest table that `specdiff bench` prints."""
    console = Console(file=io.StringIO(), width=110, record=True)
    case = contents.case(task="continue", temperature=1.0)
    console.print(table(contents.content("methods", [case])))
    assert "…" not in console.export_text()


def test_refused_rows_are_dim_and_say_why():
    _, rows, styled = printed(contents.methods())
    (at,) = (number for number, row in enumerate(rows) if row[0] == "sedd")
    assert rows[at][1:-1] == ["4", "4", "", "", "", "", ""]
    reason = " ".join(row[-1] for row in rows[at : at + 2])
    assert reason.startswith("refused: the drafter has <no> weights & no vocabulary")
    (line,) = (line for line in styled.splitlines() if "sedd" in line)
    assert "\x1b[2msedd" in line
    assert not any("\x1b[2m" in line for line in styled.splitlines() if "parallel" in line)


def test_what_a_sweep_varies_is_a_column():
    text, rows, _ = printed(contents.batch())
    assert "batch" in text.splitlines()[3]
    assert [row[3] for row in rows if row[0] == "parallel"] == ["1", "2", "4", "8"] * 2
    text, _, _ = printed(contents.steps())
    assert "batch" not in text and "context" not in text


def test_names_are_no_markup():
    case = contents.case("[bold]drafter[/bold]", task="[red]")
    cases = [case, contents.refused("[red]no[/red]", task="[red]")]
    text, rows, _ = printed(contents.content("methods", cases, stand_in="[dim]none[/dim]"))
    assert rows[0][0] == "[red], greedy" and rows[1][0] == "[bold]drafter[/bold]"
    assert rows[2][-1] == "refused: [red]no[/red]" and "[dim]none[/dim]" in text
