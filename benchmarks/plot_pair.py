"""Draws the figures of a real pair in docs/theory.md, from the published results.

    pip install matplotlib
    python benchmarks/plot_pair.py              # writes docs/figures/*.png and *.svg

The same results and matplotlib version give the same bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from plot_theory import FIGURES, MARKS
from tables import result

from specdiff.bench.figures import COLOURS, STYLE, save

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
    for temperature, (mark, name) in TEMPERATURES.items():
        axes.plot([], [], mark, color="grey", label=name)
        for drafter, colour in drafters.items():
            own = [c for c in cases if (c["drafter"], c["temperature"]) == (drafter, temperature)]
            axes.plot([c["predicted"] for c in own], [c["speedup"] for c in own], mark,
                      color=colour)  # fmt: skip
            for c in own:
                text = f"{c['k']}" + (f"·{c['steps']}" if c["steps"] else "")
                axes.annotate(text, (c["predicted"], c["speedup"]), xytext=(4, 3), fontsize=8,
                              textcoords="offset points", color=colour)  # fmt: skip
    for drafter, colour in drafters.items():
        axes.plot([], [], "s", color=colour, label=drafter)
    axes.set(xlim=ends, ylim=ends, xlabel="predicted speed-up over plain decoding",
             ylabel="measured speed-up")  # fmt: skip
    axes.legend(title="marks: K, or K·T", loc="upper left")
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
    for kind, (colour, mark) in MARKS.items():
        own = [case for case in data["cases"] if case["kind"] == kind]
        axes.plot([c["rejection"] for c in own], [c["bias"] for c in own], mark, color=colour,
                  label=kind)  # fmt: skip
        for c in own:
            axes.annotate(f"{c['amount']:g}", (c["rejection"], c["bias"]), xytext=(6, 4),
                          textcoords="offset points", fontsize=9, color=colour)  # fmt: skip
    axes.set(xlim=(0, 1.15 * tv), ylim=(0, 1.15 * tv), xlabel="rejected, of the examined tokens",
             ylabel="bias: total variation spent, an examined token")  # fmt: skip
    axes.legend()
    return figure


if __name__ == "__main__":
    main()
