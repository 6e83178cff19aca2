"""HTML report of `specdiff bench`: tables, figures and the machine, in one self-contained file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from ..files import write_atomically
from .figures import STAGES, drawn, image
from .reading import (
    PLAIN,
    Case,
    Content,
    check,
    failed,
    groups,
    heading,
    inner,
    machine,
    manner,
    measured,
    plain_number,
    said,
    sections,
    times,
    values,
    worded,
)

TITLES = {
    "methods": "Methods",
    "steps": "Reverse steps",
    "lengths": "Draft length",
    "batch": "Batch",
    "context": "Prompt length",
    "table2": "Table 2 of SpecDiff (arXiv 2408.05636)",
    "appendix": "Appendix of SpecDiff (arXiv 2408.05636)",
    "figure2": "Figure 2 of SpecDiff (arXiv 2408.05636)",
    "controlled": "Controlled acceptance",
}
WHISKERS = "whiskers: 20th to 80th percentile"
CAPTIONS = {  # kind of figure -> caption
    "methods": f"Speed-up over plain decoding of the same prompts; {WHISKERS}.",
    "stages": "Time of each stage per target forward, in milliseconds.",
    "steps": f"Speed-up (left axis) and alpha (right axis) against T; {WHISKERS}.",
    "lengths": f"Speed-up and tokens per target forward against K; {WHISKERS}.",
    "batch": f"Speed-up and tokens per second against the batch size; {WHISKERS}.",
    "context": f"Speed-up and tokens per second against the prompt length; {WHISKERS}.",
}
DASH, TIMES_SIGN = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"
ALPHA_K = f"alpha {TIMES_SIGN} K"
FIRST = 8  # number of draft positions whose acceptance is shown
CSS = """
:root { color-scheme: light dark; --ink: #1c1c1e; --paper: #ffffff; --soft: #5f6368;
  --line: #d9dce1; --band: #f2f4f7; --bad: #b3261e; --link: #0b57d0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e8; --paper: #17181b; --soft: #a3a7ae;
  --line: #3a3d44; --band: #23252a; --bad: #ff8a80; --link: #8ab4f8; } }
body { margin: 0 auto; padding: 1rem 1.25rem 3rem; max-width: 78rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 1rem 0 0.5rem; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 0.5rem; padding-top: 0.75rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.5rem 0 0.5rem; }
a { color: var(--link); }
nav a { margin-right: 1rem; white-space: nowrap; }
p { margin: 0.5rem 0; }
code { font-size: 0.9em; overflow-wrap: anywhere; }
.source { color: var(--soft); font-size: 0.9rem; }
.stand-in { padding: 0.5rem 0.75rem; background: var(--band); border-left: 3px solid var(--link); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.6rem; text-align: left; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
thead th { vertical-align: bottom; white-space: normal; color: var(--soft); font-weight: 600; }
.number { text-align: right; }
td:first-child { position: sticky; left: 0; background: var(--paper); }
.over { text-align: center; }
tbody tr.heading th { padding-top: 0.75rem; background: var(--band); }
tr.refused { color: var(--soft); }
tr.refused td.reason { white-space: normal; min-width: 16rem; font-style: italic; }
.bad { color: var(--bad); font-weight: 600; }
figure { margin: 1.25rem 0; }
.card { background: #ffffff; border: 1px solid var(--line); border-radius: 6px; padding: 0.75rem;
  overflow-x: auto; }
.card svg { display: block; width: 100%; min-width: 30rem; height: auto; margin: 0 auto; }
.card svg * { stroke-linejoin: round; stroke-linecap: butt; }
figcaption { color: var(--soft); font-size: 0.9rem; margin-top: 0.4rem; }
@media (max-width: 40rem) { body { padding: 0.5rem 0.75rem 2rem; } h1 { font-size: 1.4rem; }
  th, td { padding: 0.2rem 0.4rem; } }
@media print { body { max-width: none; } .scroll, .card { overflow: visible; } }
"""


def report(contents: Sequence[Content], path: Path) -> None:
    """Write one HTML file with the tables and figures of all contents.

    Args:
        contents: contents of result files of `specdiff bench`, in the order to show.
        path: path of the HTML file; its folder is created if missing.

    Raises:
        ValueError: matplotlib is not installed.

    Example:
        >>> files = sorted(Path("results").glob("*.json"))
        >>> report([json.loads(file.read_text()) for file in files], Path("results/index.html"))
    """
    numbered = [(f"part{number}", content) for number, content in enumerate(contents, 1)]
    links = [tag("a", escape(title(one)), href=f"#{anchor}") for anchor, one in numbered]
    body = [
        tag("h1", "specdiff bench"),
        tag("nav", "\n".join(links), aria_label="contents"),
        tag("main", *(section(content, anchor) for anchor, content in numbered)),
    ]
    head = (
        '<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"{tag('title', 'specdiff bench')}\n{tag('style', CSS)}\n"
    )
    page = tag("html", tag("head", "\n", head), "\n", tag("body", "\n", *body), "\n", lang="en")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, f"<!doctype html>\n{page}\n".encode())


def tag(name: str, *inside: str, **attributes: Any) -> str:
    """An HTML element. `inside` is HTML; attributes are escaped. `class_` stands for class."""
    words = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    line = "\n" if name in ("h1", "h2", "h3", "p", "tr", "figure", "section", "table") else ""
    return f"<{name}{words}>{''.join(inside)}</{name}>{line}"


def title(content: Content) -> str:
    return TITLES.get(content["name"], str(content["name"]))


def section(content: Content, anchor: str) -> str:
    """The section of one content."""
    parts = [tag("h2", escape(title(content)))]
    if content["stand_in"]:
        parts.append(tag("p", escape(content["stand_in"]), class_="stand-in"))
    parts.append(tag("p", tag("code", escape(content["command"])), class_="source"))
    source = f"{machine(content)}; {content['date']}."
    parts.append(tag("p", escape(source), class_="source"))
    if content.get("published"):
        parts += [tag("h3", "Published and measured"), scroll(beside_published(content))]
        parts.append(tag("h3", "All measurements"))
    parts += [tag("p", escape(shared(content)), class_="source"), scroll(cases_table(content))]
    for number, (kind, figure) in enumerate(drawn(content).items(), 1):
        svg = inline(image(figure, "svg").decode(), f"{anchor}-{number}-", CAPTIONS[kind])
        parts.append(tag("figure", tag("div", svg, class_="card"),
                         tag("figcaption", escape(CAPTIONS[kind]))))  # fmt: skip
    return tag("section", "\n", *parts, id=anchor)


def scroll(table: str) -> str:
    return tag("div", table, class_="scroll")


# --- cases ----------------------------------------------------------------------------------------


class Column(NamedTuple):
    head: str
    text: Callable[[Case], str]
    kind: str | None = "number"


def number(name: str, form: str = ".2f") -> Callable[[Case], str]:
    """Formatter of a figure, empty if a case lacks it."""
    return lambda case: "" if case[name] is None else format(case[name], form)


def rate(case: Case) -> str:
    found = case["tokens_per_second"]
    if found["p20"] == found["p80"]:
        return f"{found['median']:.1f}"
    return f"{found['median']:.1f} ({found['p20']:.1f}-{found['p80']:.1f})"


def acceptance(case: Case) -> str:
    shares = case["acceptance"] or []
    text = " ".join(f"{100 * share:.0f}" for share in shares[:FIRST])
    return f"{text} ..." if len(shares) > FIRST else text


def stage(name: str) -> Callable[[Case], str]:
    def text(case: Case) -> str:
        ms = (case["ms_per_forward"] or {}).get(name)
        return "" if ms is None else f"{ms:.2f}"

    return text


CHECK = Column("check", check, None)
FIGURES = (  # columns of cases that were not refused
    Column("tokens/s", rate),
    Column("speed-up", lambda case: times(case["speedup"]) if case["speedup"] else ""),
    CHECK,
    Column("tokens/ forward", number("tokens_per_forward")),
    Column("alpha", number("alpha")),
    Column(ALPHA_K, number("alpha_k")),
    Column("accepted by position, %", acceptance),
    *(Column(f"{name}, ms", stage(name)) for name in STAGES),
    Column("peak, MB", number("peak_mb", ".1f")),
    Column("ceiling", lambda case: f"{case['ceiling']['speedup']:.2f}x" if case["ceiling"] else ""),
)


def shared(content: Content) -> str:
    """The settings that all cases share, as a sentence."""
    words = {"target": "target {}", "rule": "rule {}", "batch": "batch {}", "prompts": "{} prompts",
             "context": "{} tokens per prompt", "new_tokens": "{} new tokens each"}  # fmt: skip
    parts = [
        text.format(plain_number(values(content["cases"], name)[0]))
        for name, text in words.items()
        if len(values(content["cases"], name)) == 1
    ]
    return ", ".join([*parts, f"{content['repetitions']} repetitions"]) + "."


def cases_table(content: Content) -> str:
    """Table of all cases, without unused columns. Refused cases have the reason."""
    extra = inner(content)
    names = [name for name in ("k", "steps") if values(content["cases"], name)] + extra
    settings = [Column("method", lambda case: case["method"], None), *map(setting, names)]
    used = [one for one in FIGURES if any(one.text(case) for case in measured(content))]
    figures = used or [CHECK]
    columns = settings + figures
    head = [tag("th", escape(one.head), class_=one.kind, scope="col") for one in columns]
    bodies = []
    for own in sections(content):
        over = tag("th", escape(heading(content, own)), colspan=len(head), scope="rowgroup")
        rows = [tag("tr", over, class_="heading")]
        rows += [row(case, settings, figures) for case in own]
        bodies.append(tag("tbody", "\n", *rows))
    return tag("table", tag("thead", tag("tr", *head)), *bodies)


def setting(name: str) -> Column:
    return Column(worded(name), lambda case: plain_number(case[name]))


def row(case: Case, settings: Sequence[Column], figures: Sequence[Column]) -> str:
    shown = settings if case["refused"] else [*settings, *figures]
    cells = [verdict(case) if one is CHECK else tag("td", escape(one.text(case)), class_=one.kind)
             for one in shown]  # fmt: skip
    if not case["refused"]:
        return tag("tr", *cells)
    reason = escape(f"refused: {case['refused']}")
    cells.append(tag("td", reason, colspan=len(figures), class_="reason"))
    return tag("tr", *cells, class_="refused")


def numbers(texts: Iterable[str]) -> list[str]:
    return [tag("td", escape(text), class_="number") for text in texts]


def verdict(case: Case) -> str:
    return tag("td", escape(check(case)), class_="bad" if failed(case) else None)


# --- Table 2 --------------------------------------------------------------------------------------


def product(one: dict[str, Any]) -> str:
    """alpha x K, of a measured case or as printed in the paper."""
    found = one["alpha_k"] if "alpha_k" in one else one["alpha"] * one["k"]
    return "" if found is None else f"{found:.2f}"


def speed(one: dict[str, Any]) -> str:
    found = one["speedup"]
    return "" if found is None else times(found) if isinstance(found, dict) else f"{found:.2f}x"


def role(one: dict[str, Any]) -> str:
    """Role of a drafter in a published row or a case: "standard" or "specdiff"."""
    return one.get("role") or one["method"]


COMPARED = {  # for published rows and for cases
    "K": lambda one: plain_number(one["k"]),
    "alpha": number("alpha"),
    ALPHA_K: product,
    "speed-up": speed,
}


def beside_published(content: Content) -> str:
    """The paper's Table 2 with the measured values beside the published ones.

    A published row without a case of its task, target and method has no measured values. A case
    without such a row, for example of another target, has no published values.
    """
    published = content["published"]
    cases = [case for case in content["cases"] if case["method"] != PLAIN]
    tasks = list(dict.fromkeys(one["task"] for one in [*published, *cases]))
    two = tag("th", "paper", class_="number", scope="col")
    two += tag("th", "measured", class_="number", scope="col")
    words = ["target", "drafter", "measured with"]
    head = [tag("th", word, rowspan=2, scope="col") for word in words]
    head += [tag("th", escape(name), colspan=2, class_="over", scope="colgroup")
             for name in COMPARED]  # fmt: skip
    head.append(tag("th", "check", rowspan=2, scope="col"))
    bodies = []
    for task in tasks:
        over = tag("th", escape(task), colspan=len(head) + len(COMPARED), scope="rowgroup")
        rows = [tag("tr", over, class_="heading")]
        places = groups((one for one in [*published, *cases] if one["task"] == task), "target")
        for (target,), own in places.items():
            for name in dict.fromkeys(map(role, own)):
                rows += compared(target, name, [one for one in own if role(one) == name])
        bodies.append(tag("tbody", "\n", *rows))
    lower = tag("tr", *[two] * len(COMPARED))
    return tag("table", tag("thead", tag("tr", *head), lower), *bodies)


def compared(target: str, name: str, own: Sequence[dict[str, Any]]) -> list[str]:
    """Rows of one task, target and role: the published row with each of the cases."""
    paper = next((one for one in own if "refused" not in one), None)
    cases: list[Case | None] = [one for one in own if "refused" in one]
    rows = []
    for case in cases or [None]:
        cells = [tag("td", escape(word)) for word in (target, name, measured_with(case))]
        refused = case["refused"] if case else None
        for text in COMPARED.values():
            pair = (paper, None if refused else case)
            cells += numbers(DASH if one is None else text(one) for one in pair)
        if refused:
            cells.append(tag("td", escape(f"refused: {refused}"), class_="reason"))
        else:
            cells.append(verdict(case) if case else tag("td"))
        rows.append(tag("tr", *cells, class_="refused" if refused else None))
    return rows


def measured_with(case: Case | None) -> str:
    if case is None:
        return ""
    return ", ".join([case["method"], *said(case, ["steps"]), manner(case["temperature"])])


# --- figures --------------------------------------------------------------------------------------


def inline(svg: str, prefix: str, label: str) -> str:
    """Prepare an SVG figure for embedding: unique ids, no external references.

    Args:
        svg: SVG as written by matplotlib.
        prefix: prefix of the ids, unique to the figure.
        label: description for screen readers.
    """
    box = re.search(r'<svg[^>]*\bviewBox="([^"]*)"[^>]*>', svg)
    if box is None:
        raise ValueError("svg: expected an <svg> element with a viewBox, as written by matplotlib")
    inside = svg[box.end() : svg.rindex("</svg>")]
    for unwanted in ("<!--.*?-->", "<metadata>.*?</metadata>", "<style.*?</style>"):
        inside = re.sub(unwanted, "", inside, flags=re.S)
    inside = re.sub(r'\bid="', f'id="{prefix}', inside)
    inside = re.sub(r'\b(?:xlink:)?href="#', f'href="#{prefix}', inside)
    inside = inside.replace("url(#", f"url(#{prefix}")
    width = float(box[1].split()[2])
    return tag("svg", inside, viewBox=box[1], role="img", aria_label=label,
               style=f"max-width: {width:g}pt")  # fmt: skip
