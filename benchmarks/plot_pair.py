"""Draws the figures of a real pair in docs/theory.md, from the published results.

    pip install matplotlib
    python benchmarks/plot_pair.py              # writes docs/figures/*.png and *.svg

The same results and matplotlib version give the same bytes.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from plot_theory import FIGURES, MARKS
from tables import result

from specdiff.bench.figures import COLOURS, STYLE, save

Label = tuple[str, float, float, str]  # text, x, y, colour
TEMPERATURES = {0.0: ("o", "greedy"), 1.0: ("^", "temperature 1")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FIGURES, help="folder for the figures")
    draw(parser.parse_args().out)


def draw(folder: Path) -> None:
    """Write both figures to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        save(predicted(), folder / "predicted")
        save(lenience(), folder / "lenience_pair")


def predicted() -> Figure:
    """Measured speed-up against the speed-up predicted from costs and acceptance."""
    cases = [case for case in result("planner")["cases"] if case["predicted"] is not None]
    drafters = {name: COLOURS[name] for name in dict.fromkeys(case["drafter"] for case in cases)}
    figure = Figure(figsize=(6.4, 5), layout="constrained")
    axes = figure.add_subplot()
    values = [case[name] for case in cases for name in ("predicted", "speedup")]
    ends = [min(values) - 0.05, max(values) + 0.05]
    axes.plot(ends, ends, color="grey", linewidth=1, label="as predicted")
    labels: list[Label] = []
    for temperature, (mark, name) in TEMPERATURES.items():
        axes.plot([], [], mark, color="grey", label=name)
        for drafter, colour in drafters.items():
            own = [c for c in cases if (c["drafter"], c["temperature"]) == (drafter, temperature)]
            axes.plot([c["predicted"] for c in own], [c["speedup"] for c in own], mark,
                      color=colour)  # fmt: skip
            for c in own:
                text = f"{c['k']}" + (f"·{c['steps']}" if c["steps"] else "")
                labels.append((text, c["predicted"], c["speedup"], colour))
    for drafter, colour in drafters.items():
        axes.plot([], [], "s", color=colour, label=drafter)
    axes.set(xlim=ends, ylim=ends, xlabel="predicted speed-up over plain decoding",
             ylabel="measured speed-up")  # fmt: skip
    axes.legend(title="marks: K, or K·T", loc="upper left")
    write_beside(axes, labels, [(end, end) for end in ends])
    return figure


def lenience() -> Figure:
    """Bias against rejections, per examined token."""
    data = result("lenience")
    figure = Figure(figsize=(6.4, 5), layout="constrained")
    axes = figure.add_subplot()
    (exact,) = (case for case in data["cases"] if case["kind"] == "exact")
    tv = exact["rejection"]
    axes.plot([0, tv], [tv, 0], color="black", linewidth=1,
              label="bias + P(rejection) = the exact rule's")  # fmt: skip
    axes.plot([tv], [0], "*", color="black", markersize=12, label="exact", clip_on=False)
    labels: list[Label] = []
    for kind, (colour, mark) in MARKS.items():
        own = [case for case in data["cases"] if case["kind"] == kind]
        axes.plot([c["rejection"] for c in own], [c["bias"] for c in own], mark, color=colour,
                  label=kind)  # fmt: skip
        labels += [(f"{c['amount']:g}", c["rejection"], c["bias"], colour) for c in own]
    axes.set(xlim=(0, 1.15 * tv), ylim=(0, 1.15 * tv), xlabel="rejected, of the examined tokens",
             ylabel="bias: total variation spent, an examined token")  # fmt: skip
    axes.legend()
    write_beside(axes, labels, [(0, tv), (tv, 0)])
    return figure


def write_beside(axes: Axes, labels: Sequence[Label], line: Sequence[tuple[float, float]]) -> None:
    """Write a text beside each point, clear of all points, other texts, the legend and a line.

    A text that finds no room close to its point stands farther away, joined to it by a thin line.
    """
    renderer = FigureCanvasAgg(axes.figure).get_renderer()
    axes.figure.draw_without_rendering()  # then the panel has its place
    to_pixels, point = axes.transData.transform, axes.figure.dpi / 72
    taken = [axes.get_legend().get_window_extent(renderer)]
    taken += [around(to_pixels((x, y)), 8 * point, 8 * point) for _, x, y, _ in labels]
    taken += [around(at, 1, 1) for at in np.linspace(*to_pixels(line), 500)]
    for text, x, y, colour in labels:
        look = {"ha": "center", "va": "center", "fontsize": 8, "color": colour}
        measured = axes.text(x, y, text, **look)
        size = measured.get_window_extent(renderer).size
        measured.remove()
        for far, turn in itertools.product((5, 15, 25, 35), range(16)):
            angle = math.pi * (1 / 4 + turn / 8)
            aside = np.array([math.cos(angle), math.sin(angle)]) * (far * point + size / 2)
            box = around(to_pixels((x, y)) + aside, *size)
            inside = all(axes.bbox.fully_contains(*corner) for corner in (box.p0, box.p1))
            if inside and not box.count_overlaps(taken):
                break
        taken.append(box)
        joined = {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 4}
        axes.annotate(text, (x, y), xytext=aside / point, textcoords="offset points", **look,
                      arrowprops=joined if far > 5 else None)  # fmt: skip


def around(centre: Sequence[float], width: float, height: float) -> Bbox:
    return Bbox.from_bounds(centre[0] - width / 2, centre[1] - height / 2, width, height)


if __name__ == "__main__":
    main()
