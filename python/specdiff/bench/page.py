"""HTML report of `specdiff bench`: tables, figures and the machine, in one self-contained file."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
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
    fastest,
    groups,
    heading,
    inner,
    machine,
    manner,
    measured,
    plain_number,
    said,
    sections,
    set_apart,
    setup,
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
    "methods": f"Speed-up over plain decoding of the same prompts; {WHISKERS}. A diamond is the "
    "speed-up of the rounds alone: tokens per forward over the mean cost of draft and target. It "
    "is no bound, since a bar is a median and includes reading the prompt.",
    "stages": "Time of each stage per target forward, in milliseconds.",
    "steps": f"Speed-up (left axis) and alpha (right axis) against T; {WHISKERS}.",
    "lengths": f"Speed-up and tokens per target forward against K; {WHISKERS}.",
    "batch": f"Speed-up and tokens per second against the batch size; {WHISKERS}.",
    "context": f"Speed-up and tokens per second against the prompt length; {WHISKERS}.",
}
SPEEDUPS = (
    "Each speed-up is the median over prompts and repetitions, with the 20th and 80th percentile. "
    "A method whose text is not the target's has none."
)
DASH, TIMES_SIGN = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"
ALPHA_K = f"alpha {TIMES_SIGN} K"
FIRST = 8  # number of draft positions whose acceptance is shown
CSS = """
:root { color-scheme: light dark; --ink: #1c1c1e; --paper: #ffffff; --soft: #5f6368;
  --line: #d9dce1; --band: #f2f4f7; --bad: #b3261e; --link: #0b57d0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e8; --paper: #17181b; --soft: #a3a7ae;
  --line: #3a3d44; --band: #23252a; --bad: #ff8a80; --link: #8ab4f8; } }
body { margin: 0 auto; padding: 1rem 1.25rem 3rem; max-width: 88rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 1rem 0 0.5rem; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 0.5rem; padding-top: 0.75rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.5rem 0 0.5rem; }
a { color: var(--link); }
p { margin: 0.5rem 0; }
code { font-size: 0.9em; overflow-wrap: anywhere; }
.source { color: var(--soft); font-size: 0.9rem; }
.stand-in { padding: 0.5rem 0.75rem; background: var(--band); border-left: 3px solid var(--link); }
table { border-collapse: collapse; font-size: 0.8125rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.35rem; text-align: left; border-bottom: 1px solid var(--line);
  overflow-wrap: break-word; }
thead th { vertical-align: bottom; color: var(--soft); font-weight: 600; }
.number { text-align: right; }
td.number:not([data-column^="accepted"]) { white-space: nowrap; }
.over { text-align: center; }
tbody tr.heading th { padding-top: 0.75rem; background: var(--band); }
tr.refused { color: var(--soft); }
tr.refused td.reason { font-style: italic; }
.bad { color: var(--bad); font-weight: 600; }
figure { margin: 1.25rem 0; }
.card { background: #ffffff; border: 1px solid var(--line); border-radius: 6px; padding: 0.75rem; }
.card svg { display: block; width: 100%; height: auto; margin: 0 auto; }
.card svg * { stroke-linejoin: round; stroke-linecap: butt; }
figcaption { color: var(--soft); font-size: 0.9rem; margin-top: 0.4rem; }
@media (max-width: 72rem) {  /* a row is a block, in which each cell says its column */
  main thead { display: none; }
  main :is(table, tbody, tr.heading, tr.heading th) { display: block; }
  main tr { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr));
    gap: 0.2rem 0.75rem; padding: 0.5rem 0.35rem; border-bottom: 1px solid var(--line); }
  main tr.heading { padding: 0; }
  main td[data-column] { border: 0; padding: 0; text-align: left; }
  main td:empty { display: none; }
  main :is(td:first-child, td.reason) { grid-column: 1 / -1; }
  main td:first-child { font-weight: 600; }
  main td:not(:first-child)::before { content: attr(data-column); display: block;
    color: var(--soft); font-size: 0.75rem; } }
@media (max-width: 40rem) { body { padding: 0.5rem 0.75rem 2rem; } h1 { font-size: 1.4rem; } }
@media print { body { max-width: none; } }
"""


def report(contents: Sequence[Content], path: Path) -> None:
    """Write one HTML file with a summary, and the tables and figures of all contents.

    Args:
        contents: contents of result files of `specdiff bench`, in the order to show.
        path: path of the HTML file.

    Raises:
        ValueError: the path is a folder or its folder is missing; matplotlib is not installed.

    Example:
        >>> files = sorted(Path("results").glob("*.json"))
        >>> report([json.loads(file.read_text()) for file in files], Path("results/index.html"))
    """
    if path.is_dir():
        raise ValueError(f"--out must be a file, got the folder {path}")
    if not path.parent.is_dir():
        raise ValueError(f"{path} has no folder: make {path.parent}, or give another --out")
    parts = [
        Part(f"part{number}", title, content)
        for number, (title, content) in enumerate(zip(titles(contents), contents, strict=True), 1)
    ]
    body = [
        tag("header", tag("h1", "specdiff bench"), *summary(parts)),
        tag("main", *map(section, parts)),
    ]
    head = (
        '<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"{tag('title', 'specdiff bench')}\n{tag('style', CSS)}\n"
    )
    page = tag("html", tag("head", "\n", head), "\n", tag("body", "\n", *body), "\n", lang="en")
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


class Part(NamedTuple):
    """A content, with the id and the title of its section."""

    anchor: str
    title: str
    content: Content


def titles(contents: Sequence[Content]) -> list[str]:
    """A title for each content, followed by its target and a number where two would be the same."""
    found = [TITLES.get(one["name"], str(one["name"])) for one in contents]
    found = [
        f"{title}, {one['target']}" if found.count(title) > 1 else title
        for title, one in zip(found, contents, strict=True)
    ]
    return [
        f"{title}, {found[:n].count(title) + 1}" if found.count(title) > 1 else title
        for n, title in enumerate(found)
    ]


def summary(parts: Sequence[Part]) -> list[str]:
    """What was measured where, and the fastest method under each condition, with links."""
    contents = [part.content for part in parts]
    cases = [case for content in contents for case in content["cases"]]
    facts = {
        "Machine": "; ".join(dict.fromkeys(map(machine, contents))),
        "Target": "; ".join(values(cases, "target")),
        "Compared with plain decoding": "; ".join(
            name for name in values(cases, "method") if name != PLAIN
        ),
    }
    told = [tag("p", f"{name}: {escape(text)}.") for name, text in facts.items()]
    told.append(tag("p", SPEEDUPS))
    heads = ("task", "fastest method", "speed-up")
    bodies = []
    for part in parts:
        link = tag("a", escape(part.title), href=f"#{part.anchor}")
        more = "; with stand-ins" if part.content["stand_in"] else ""
        over = tag("th", f"{link}{more}", colspan=len(heads), scope="rowgroup")
        rows = [tag("tr", over, class_="heading")]
        for own in sections(part.content):
            best = fastest(own)
            cells = [heading(part.content, own), winner(own, best), speed(best) if best else ""]
            kinds = (None, None, "number")
            rows.append(tag("tr", *map(cell, heads, cells, kinds)))
        bodies.append(tag("tbody", "\n", *rows))
    head = tag("tr", *(tag("th", name, scope="col") for name in heads))
    return [*told, tag("table", tag("thead", head), *bodies)]


def winner(own: Sequence[Case], best: Case | None) -> str:
    """The fastest method in words; plain decoding too may be that."""
    if best is None:
        return "no method has figures"
    words = said(best, ("k", "steps", *set_apart(own, ("method", "k", "steps"))))
    name = ", ".join([best["method"], *words])
    return name if best["speedup"]["median"] > 1 else f"plain decoding; then {name}"


def section(part: Part) -> str:
    """The section of one content."""
    anchor, title, content = part
    parts = [tag("h2", escape(title))]
    if content["stand_in"]:
        parts.append(tag("p", escape(content["stand_in"]), class_="stand-in"))
    parts.append(tag("p", tag("code", escape(content["command"])), class_="source"))
    source = f"{setup(content)}; {content['date']}."
    parts.append(tag("p", escape(source), class_="source"))
    if content.get("published"):
        parts += [tag("h3", "Published and measured"), beside_published(content)]
        parts.append(tag("h3", "All measurements"))
    parts += [tag("p", escape(shared(content)), class_="source"), cases_table(content)]
    for number, (kind, figure) in enumerate(drawn(content).items(), 1):
        svg = inline(image(figure, "svg").decode(), f"{anchor}-{number}-", CAPTIONS[kind])
        parts.append(tag("figure", tag("div", svg, class_="card"),
                         tag("figcaption", escape(CAPTIONS[kind]))))  # fmt: skip
    return tag("section", "\n", *parts, id=anchor)


def cell(column: str, text: str, kind: str | None = None) -> str:
    """A cell that says its column, for narrow screens."""
    return tag("td", escape(text), class_=kind, data_column=column)


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


def speed(one: dict[str, Any]) -> str:
    found = one["speedup"]
    return "" if found is None else times(found) if isinstance(found, dict) else f"{found:.2f}x"


CHECK = Column("check", check, None)
FIGURES = (  # columns of cases that were not refused
    Column("tokens/s", rate),
    Column("speed-up", speed),
    CHECK,
    Column("tokens/ forward", number("tokens_per_forward")),
    Column("alpha", number("alpha")),
    Column(ALPHA_K, number("alpha_k")),
    Column("accepted by position, %", acceptance),
    *(Column(f"{name}, ms", stage(name)) for name in STAGES),
    Column("peak, MB", number("peak_mb", ".1f")),
    Column("rounds alone", lambda case: speed(case["ceiling"]) if case["ceiling"] else ""),
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
    cells = [verdict(case) if one is CHECK else cell(one.head, one.text(case), one.kind)
             for one in shown]  # fmt: skip
    if not case["refused"]:
        return tag("tr", *cells)
    reason = escape(f"refused: {case['refused']}")
    cells.append(tag("td", reason, colspan=len(figures), class_="reason"))
    return tag("tr", *cells, class_="refused")


def verdict(case: Case) -> str:
    return cell(CHECK.head, check(case), "bad" if failed(case) else None)


# --- Table 2 --------------------------------------------------------------------------------------


def product(one: dict[str, Any]) -> str:
    """alpha x K, of a measured case or as printed in the paper."""
    found = one["alpha_k"] if "alpha_k" in one else one["alpha"] * one["k"]
    return "" if found is None else f"{found:.2f}"


def role(one: dict[str, Any]) -> str:
    """Role of a drafter in a published row or a case: "standard" or "specdiff"."""
    return one.get("role") or one["method"]


WORDS = ("target", "drafter", "measured with")
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
    head = [tag("th", word, rowspan=2, scope="col") for word in WORDS]
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
        cells = list(map(cell, WORDS, (target, name, measured_with(case))))
        refused = case["refused"] if case else None
        for head, text in COMPARED.items():
            for where, one in (("paper", paper), ("measured", None if refused else case)):
                told = DASH if one is None else text(one)
                cells.append(cell(f"{head}, {where}", told, "number"))
        if refused:
            cells.append(tag("td", escape(f"refused: {refused}"), class_="reason"))
        else:
            cells.append(verdict(case) if case else cell(CHECK.head, ""))
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
