"""Figures of `specdiff bench`, drawn from its JSON files.

There is one function for each kind of figure. It takes the content of a file and returns a
matplotlib Figure, or None if nothing is left to draw: refused cases are left out. The same content
and matplotlib version give the same bytes. All functions raise ValueError if matplotlib is missing.

Example:
    >>> content = json.loads(Path("results/steps.json").read_text())
    >>> draw(content, Path("figures"))
    [PosixPath('figures/steps.png'), PosixPath('figures/steps.svg')]
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..files import write_atomically
from .reading import (
    PLAIN,
    Case,
    Content,
    failed,
    groups,
    heading,
    manner,
    measured,
    plain_number,
    said,
    set_apart,
    values,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE: dict[Any, Any] = {
    "svg.hashsalt": "specdiff",
    "text.parse_math": False,  # a "$" in a name is no formula
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}
GREY = "#777777"
COLOURS = {  # after Okabe and Ito, distinct for colour-blind readers
    PLAIN: GREY,
    "parallel": "#0072b2",
    "block-diffusion": "#009e73",
    "prompt-lookup": "#e69f00",
    "eagle": "#cc79a7",
    "sedd": "#d55e00",
    "mdlm": "#56b4e9",
}
SPARE = ("#882255", "#332288", "#999933", "#44aa99", "#000000")  # for other methods, in order
STAGES = {
    "draft": "#0072b2", "target": "#bbbbbb", "verify": "#d55e00", "commit": "#cc79a7",
    "host": "#e69f00",
}  # fmt: skip
MARKS = "o^sDvP*X"  # for temperatures in ascending order
DASHES = ("-", "-.", (0, (1, 1)))  # for the other settings in which lines differ
SPEEDUP, RATE = "speedup", "tokens_per_second"
LABELS = {
    SPEEDUP: "speed-up over plain decoding",
    RATE: "tokens per second",
    "tokens_per_forward": "tokens per target forward",
    "alpha": "alpha: share of drafted tokens accepted",
}
FORMATS = {"png": "Software", "svg": "Date"}  # format -> metadata key to leave out
Draw = Callable[[Content], "Figure | None"]


@contextmanager
def styled() -> Iterator[None]:
    """Context with the figures' matplotlib settings."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("a figure needs matplotlib: pip install matplotlib") from error
    with matplotlib.rc_context(STYLE):
        yield


def in_style(make: Draw) -> Draw:
    @wraps(make)
    def run(content: Content) -> Figure | None:
        with styled():
            return make(content)

    return run


def colours(content: Content) -> dict[str, str]:
    """Colour of each method. A known method has the same colour in every figure."""
    found = values(content["cases"], "method")
    others = [name for name in found if name not in COLOURS]
    return COLOURS | {name: SPARE[i % len(SPARE)] for i, name in enumerate(others)}


def blank(width: float, height: float) -> Figure:
    """An empty figure; width and height in inches."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))


# --- lines ----------------------------------------------------------------------------------------


class Line(NamedTuple):
    """Cases of one method and temperature, and the style of their line."""

    label: str
    cases: list[Case]
    look: dict[str, Any]


@in_style
def steps(content: Content) -> Figure | None:
    """Speed-up (left) and alpha (right) against T, like Figure 2 of SpecDiff (2408.05636)."""
    return sweep(content, "steps", "T, reverse steps of a draft", [SPEEDUP], right="alpha")


@in_style
def lengths(content: Content) -> Figure | None:
    """Speed-up and tokens per target forward against K."""
    label = "K, tokens drafted per round"
    return sweep(content, "k", label, [SPEEDUP, "tokens_per_forward"])


@in_style
def batch(content: Content) -> Figure | None:
    """Speed-up, and tokens per second with and without drafts, against the batch size."""
    return sweep(content, "batch", "batch size", [SPEEDUP, RATE])


@in_style
def context(content: Content) -> Figure | None:
    """Speed-up, and tokens per second with and without drafts, against the prompt's length."""
    return sweep(content, "context", "context, tokens in the prompt", [SPEEDUP, RATE])


def sweep(
    content: Content, setting: str, label: str, quantities: Sequence[str], right: str | None = None
) -> Figure | None:
    """Plot `quantities` against a setting, with a panel for each quantity, target and task.

    A method whose setting is not a number (such as "auto") is a dotted horizontal line.
    """
    panels = {
        place: own
        for place, own in groups(measured(content), "target", "task").items()
        if any(is_number(case[setting]) for case in own if case["method"] != PLAIN)
    }
    if not panels:
        return None
    columns = len(quantities) if len(quantities) > 1 else min(2, len(panels))
    rows = -(-len(panels) * len(quantities) // columns)
    figure = blank(7 if columns == 1 else 11, (5 if right else 4) * rows + 1)
    places = iter(figure.subplots(rows, columns, squeeze=False).flat)
    several = len({target for target, _ in panels}) > 1
    for (target, task), own in panels.items():
        for quantity in quantities:
            axes = next(places)
            panel(axes, lines(content, own, setting), setting, quantity, right)
            axes.set_title(f"{target}, {task}" if several else task, loc="left")
            axes.set_xlabel(label)
    for axes in places:
        axes.remove()
    legend(figure, 1 + columns, lambda label: (not label.startswith("plain"), label))
    return figure


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def lines(content: Content, cases: Sequence[Case], setting: str) -> list[Line]:
    """One line for each method, temperature and other combination of settings."""
    every = measured(content)
    keys = ("method", "temperature")
    more = set_apart(every, ("target", "task", *keys, setting))
    colour = colours(content)
    marks = dict(zip(sorted({0.0, *values(every, "temperature")}), MARKS, strict=False))
    kinds = list(groups((case for case in every if case["method"] != PLAIN), *more))
    found = []
    for (method, temperature, *others), own in groups(cases, *keys, *more).items():
        kind = kinds.index(tuple(others)) if method != PLAIN else 0
        look = {"color": colour[method], "marker": marks.get(temperature, "."),
                "linestyle": DASHES[kind % len(DASHES)]}  # fmt: skip
        name = "plain decoding" if method == PLAIN else method
        words = [name, manner(temperature), *said(own[0], more)]
        found.append(Line(", ".join(words), own, look))
    return found


def panel(
    axes: Axes, lines: Sequence[Line], setting: str, quantity: str, right: str | None
) -> None:
    """Plot one quantity of the lines, and `right` dashed on the right axis."""
    drafted = [line for line in lines if line.cases[0]["method"] != PLAIN]
    shown = lines if quantity == RATE else drafted
    x = sorted({case[setting] for line in shown for case in line.cases if is_number(case[setting])})
    axes.set_xscale("log", base=2)
    axes.set(xlim=(x[0] / 1.2, x[-1] * 1.2), ylabel=LABELS[quantity])
    axes.set_xticks(*ticks(x))
    axes.minorticks_off()
    if quantity != RATE:
        axes.axhline(1.0, color=GREY, linewidth=1, label="plain decoding")
    ends = trace(axes, shown, setting, quantity)
    reach(axes, ends, 0.0 if quantity == RATE else 1.0)
    if right is None:
        return
    low, high = axes.get_ylim()
    axes.set_ylim(bottom=max(0.0, low - 0.7 * (high - low)))  # `right` is drawn below
    axes.set_ylabel(f"{LABELS[quantity]} (solid)")
    other = axes.twinx()
    other.set_ylabel(f"{LABELS[right]} (dashed)")
    other.spines["right"].set_visible(True)
    other.grid(False)
    hollow = {"linestyle": (0, (4, 2)), "markerfacecolor": "white", "linewidth": 1}
    dashed = [line._replace(label=f"_{line.label}", look=line.look | hollow) for line in drafted]
    most = max(trace(other, dashed, setting, right, levels=False), default=0.0)
    other.set_ylim(0, 2.2 * most or 1.0)
    other.set_yticks([tick for tick in other.get_yticks() if tick <= 1.2 * most])


def trace(
    axes: Axes, lines: Sequence[Line], setting: str, quantity: str, levels: bool = True
) -> list[float]:
    """Draw lines with whiskers from the 20th to the 80th percentile, shifted a little sideways.

    Returns:
        the values that the axis must include; matplotlib does not see them in shifted lines.
    """
    from matplotlib.transforms import ScaledTranslation

    ends: list[float] = []
    for number, line in enumerate(lines):
        seen = [case for case in line.cases if case[quantity] is not None]
        points = sorted((c for c in seen if is_number(c[setting])), key=lambda c: c[setting])
        if points:
            aside = min(4, 20 / len(lines)) / 72 * (number - (len(lines) - 1) / 2)  # inches
            moved = axes.transData + ScaledTranslation(aside, 0, axes.figure.dpi_scale_trans)
            middle, low, high = spreads(points, quantity)
            whiskers = (low, high) if any(low + high) else None
            axes.errorbar([case[setting] for case in points], middle, yerr=whiskers,
                          label=line.label, transform=moved, markersize=6, elinewidth=1, capsize=2,
                          **line.look)  # fmt: skip
            ends += [y - d for y, d in zip(middle, low, strict=True)]
            ends += [y + d for y, d in zip(middle, high, strict=True)]
        for case in seen if levels else ():
            if not is_number(case[setting]):
                (level,), _, _ = spreads([case], quantity)
                label = ", ".join([line.label, *said(case, [setting])])
                axes.plot([0.015, 0.985], [level, level], transform=axes.get_yaxis_transform(),
                          label=label, **line.look | {"linestyle": ":"})  # fmt: skip
                ends.append(level)
    return ends


def reach(axes: Axes, ends: Sequence[float], base: float) -> None:
    """Set limits that include `ends` and `base`. A lowest value of 0 gets no margin."""
    low, high = min(base, *ends), max(base, *ends)
    margin = 0.06 * (high - low) or 0.1
    axes.set_ylim(0 if low == 0 else low - margin, high + margin)


def spreads(cases: Sequence[Case], quantity: str) -> tuple[list[float], list[float], list[float]]:
    """Medians, and their distances to the 20th and 80th percentile (0 if unknown)."""
    found = [case[quantity] for case in cases]
    found = [dict.fromkeys(("median", "p20", "p80"), x) if is_number(x) else x for x in found]
    below = [max(0.0, one["median"] - one["p20"]) for one in found]
    above = [max(0.0, one["p80"] - one["median"]) for one in found]
    return [one["median"] for one in found], below, above


def ticks(x: Sequence[float]) -> tuple[list[float], list[str]]:
    """Ticks at the values. Of values less than a tenth apart, only the first gets a tick."""
    kept: list[float] = []
    for value in x:
        if not kept or value > 1.1 * kept[-1]:
            kept.append(value)
    return kept, [plain_number(value) for value in kept]


def legend(figure: Figure, columns: int, order: Callable[[str], Any] | None = None) -> None:
    """One legend below all panels, without duplicates."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    names = sorted(found, key=order) if order else list(found)
    figure.legend([found[name] for name in names], names, loc="outside lower center",
                  ncols=columns)  # fmt: skip


# --- bars -----------------------------------------------------------------------------------------


@in_style
def methods(content: Content) -> Figure | None:
    """Speed-up over plain decoding, with a bar for each method."""
    cases = [c for c in measured(content) if c["method"] != PLAIN and c["speedup"] is not None]
    colour = colours(content)

    def bars(axes: Axes, own: Sequence[Case]) -> None:
        middle, low, high = spreads(own, SPEEDUP)
        axes.barh(range(len(own)), middle, xerr=(low, high), height=0.7,
                  color=[colour[case["method"]] for case in own],
                  error_kw={"elinewidth": 1.2, "capsize": 3})  # fmt: skip
        axes.axvline(1.0, color="#333333", linewidth=1, linestyle="--", zorder=1.5,
                     label="plain decoding")  # fmt: skip
        rounds = {y: case["ceiling"][SPEEDUP] for y, case in enumerate(own) if case["ceiling"]}
        if rounds:
            axes.plot(list(rounds.values()), list(rounds), "d", color="black", mfc="white",
                      label="rounds alone, mean of all prompts", zorder=4)  # fmt: skip
        for y, case in enumerate(own):
            bad = failed(case)
            beside(axes, y, f"{middle[y]:.2f}x" + (", check FAILED" if bad else ""), bad)

    return barred(content, cases, bars, LABELS[SPEEDUP])


@in_style
def stages(content: Content) -> Figure | None:
    """Time of each stage, per target forward."""
    cases = [case for case in measured(content) if case["ms_per_forward"]]
    names = [name for name in STAGES if any(name in case["ms_per_forward"] for case in cases)]

    def bars(axes: Axes, own: Sequence[Case]) -> None:
        left = [0.0] * len(own)
        for name in names:
            ms = [case["ms_per_forward"].get(name, 0.0) for case in own]
            axes.barh(range(len(own)), ms, left=left, height=0.7, color=STAGES[name],
                      label=name)  # fmt: skip
            left = [a + b for a, b in zip(left, ms, strict=True)]
        for y, total in enumerate(left):
            digits = 2 if total < 10 else 1 if total < 100 else 0
            beside(axes, y, f"{total:.{digits}f} ms")

    return barred(content, cases, bars, "milliseconds per target forward")


def beside(axes: Axes, y: float, text: str, bad: bool = False) -> None:
    """Write text to the right of the panel, clear of whiskers and marks."""
    axes.text(1.015, y, text, transform=axes.get_yaxis_transform(), va="center", fontsize=9.5,
              color="#b3261e" if bad else "black")  # fmt: skip


def barred(
    content: Content,
    cases: Sequence[Case],
    bars: Callable[[Axes, Sequence[Case]], None],
    label: str,
) -> Figure | None:
    """Panels of horizontal bars, one for each target, task and temperature, on the same scale."""
    panels = groups(cases, "target", "task", "temperature")
    if not panels:
        return None
    heights = [len(own) + 0.4 for own in panels.values()]
    figure = blank(8, 0.32 * sum(heights) + 0.5 * len(panels) + 1)
    places = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)
    keys = ("target", "task", "temperature", "method", "k", "steps")
    more = set_apart(cases, keys)
    for axes, own in zip(places.flat, panels.values(), strict=True):
        bars(axes, own)
        names = [", ".join([c["method"], *said(c, ("k", "steps", *more))]) for c in own]
        axes.set_yticks(range(len(own)), names)
        axes.set_ylim(len(own) - 0.3, -0.7)
        axes.tick_params(axis="y", length=0)
        axes.grid(False, axis="y")
        axes.set_axisbelow(True)
        axes.set_title(heading(content, own), loc="left", fontsize=11)
    axes.set_xlim(left=0)
    axes.set_xlabel(label)
    legend(figure, len(STAGES))
    return figure


# --- files ----------------------------------------------------------------------------------------

FIGURES: dict[str, tuple[Draw, ...]] = {  # name of a content -> its figures, the main one first
    "methods": (methods, stages),
    "steps": (steps,),
    "lengths": (lengths,),
    "batch": (batch,),
    "context": (context,),
    "table2": (methods,),
    "appendix": (methods,),
    "figure2": (steps,),
    "controlled": (methods, stages),
}


def drawn(content: Content) -> dict[str, Figure]:
    """The figures of a content by kind, such as "stages"."""
    found = {make.__name__: make(content) for make in FIGURES.get(content["name"], ())}
    return {kind: figure for kind, figure in found.items() if figure is not None}


def draw(content: Content, folder: Path, name: str | None = None) -> list[Path]:
    """Write the figures of a content as PNG and SVG.

    Args:
        content: content of a result file of `specdiff bench`.
        folder: created if missing.
        name: file name of the main figure; others are called `<name>_<kind>`. None: the content's
            name.

    Returns:
        the files; empty if nothing is left to draw.

    Raises:
        ValueError: matplotlib is not installed.
    """
    paths, name = [], name or content["name"]
    for kind, figure in drawn(content).items():
        main = kind == FIGURES[content["name"]][0].__name__
        paths += save(figure, folder / (name if main else f"{name}_{kind}"))
    return paths


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write `stem`.png and `stem`.svg atomically, without dates."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = []
    for kind in FORMATS:
        paths.append(stem.with_name(f"{stem.name}.{kind}"))
        write_atomically(paths[-1], image(figure, kind))
    return paths


def image(figure: Figure, kind: str) -> bytes:
    """The bytes of a figure in a format, "png" or "svg"."""
    into = io.BytesIO()
    with styled():
        figure.savefig(into, format=kind, dpi=150, metadata={FORMATS[kind]: None})
    return into.getvalue()
