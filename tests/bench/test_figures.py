"""Figures of `specdiff bench`: they show every number, nothing covers anything; their files."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex

from specdiff.bench import figures
from tests.bench import contents

CONTENTS = {
    "methods": contents.methods(),
    "steps": contents.steps(),
    "lengths": contents.lengths(),
    "batch": contents.batch(),
    "context": contents.context(),
    "table2": contents.table2(),
    "figure2": contents.steps("figure2"),
}


def chosen(content, **wanted):
    """The cases with these values that were not refused, in order."""
    kept = [case for case in content["cases"] if case["refused"] is None]
    return [case for case in kept if all(case[name] == value for name, value in wanted.items())]


def drawn_lines(axes):
    """x and y of the lines with points, by their labels."""
    found = {one.get_label(): one.lines[0].get_data() for one in axes.containers}
    return {label: (list(x), list(y)) for label, (x, y) in found.items()}


def whiskers(axes, label):
    """Their lower and upper ends, none if they are not drawn."""
    (container,) = (one for one in axes.containers if one.get_label() == label)
    return [tuple(segment[:, 1]) for bar in container.lines[2] for segment in bar.get_segments()]


def levels(axes):
    return {line.get_label(): line.get_ydata()[0] for line in axes.lines
            if line.get_linestyle() == ":"}  # fmt: skip


# --- lines ----------------------------------------------------------------------------------------


def test_steps_are_lines_of_speed_up_and_alpha():
    content = contents.steps()
    left, right = figures.steps(content).axes
    names = {0.0: "greedy", 1.0: "temperature 1"}
    for method, (temperature, manner) in itertools.product(("block-diffusion", "mdlm"),
                                                           names.items()):  # fmt: skip
        own = chosen(content, method=method, temperature=temperature)
        own = sorted((c for c in own if c["steps"] != "auto"), key=lambda case: case["steps"])
        label = f"{method}, {manner}"
        x, y = drawn_lines(left)[label]
        assert x == [1, 2, 4, 8] and y == [case["speedup"]["median"] for case in own]
        for ends, case in zip(whiskers(left, label), own, strict=True):
            assert ends == pytest.approx((case["speedup"]["p20"], case["speedup"]["p80"]))
        x, y = drawn_lines(right)[f"_{label}"]
        assert x == [1, 2, 4, 8] and y == [case["alpha"] for case in own]
    assert len(drawn_lines(left)) == len(drawn_lines(right)) == 4
    assert levels(left) == {
        "block-diffusion, greedy, T = auto": 1.55,
        "block-diffusion, temperature 1, T = auto": pytest.approx(1.35),
        "prompt-lookup, greedy": 0.95,
    }
    assert not levels(right)


def test_a_line_has_one_colour_and_mark_wherever_it_is_drawn():
    left, right = figures.steps(contents.steps()).axes
    looks = {}
    for axes in (left, right):
        for container in axes.containers:
            line = container.lines[0]
            look = to_hex(line.get_color()), line.get_marker()
            assert looks.setdefault(container.get_label().strip("_"), look) == look
    assert len(set(looks.values())) == 4
    assert looks["mdlm, greedy"][0] == looks["mdlm, temperature 1"][0] == figures.COLOURS["mdlm"]
    assert looks["mdlm, greedy"][1] == looks["block-diffusion, greedy"][1]


def test_what_else_differs_makes_lines_of_its_own():
    cases = [contents.case(speedup=1 + k * steps / 100, k=k, steps=steps)
             for k in (4, 8) for steps in (1, 2)]  # fmt: skip
    left, _ = figures.steps(contents.content("steps", cases)).axes
    found = drawn_lines(left)
    assert found["block-diffusion, greedy, K = 4"] == ([1, 2], [1.04, 1.08])
    assert found["block-diffusion, greedy, K = 8"] == ([1, 2], [1.08, 1.16])
    assert len({one.lines[0].get_linestyle() for one in left.containers}) == 2


def test_lengths_are_speed_up_and_tokens_per_forward():
    content = contents.lengths()
    speedups, tokens = figures.lengths(content).axes
    for method in ("parallel", "prompt-lookup"):
        own = chosen(content, method=method)
        label = f"{method}, greedy"
        assert drawn_lines(speedups)[label][1] == [case["speedup"]["median"] for case in own]
        x, y = drawn_lines(tokens)[label]
        assert x == [1, 2, 4, 8, 16] and y == [case["tokens_per_forward"] for case in own]
        assert whiskers(speedups, label) and not whiskers(tokens, label)
    assert [text.get_text() for text in tokens.get_xticklabels()] == ["1", "2", "4", "8", "16"]


def test_rates_show_plain_decoding_too():
    content = contents.batch()
    speedups, rates = figures.batch(content).axes
    drafted = {"parallel, greedy", "parallel, temperature 1"}
    assert set(drawn_lines(speedups)) == drafted
    assert set(drawn_lines(rates)) == drafted | {
        "plain decoding, greedy",
        "plain decoding, temperature 1",
    }
    own = chosen(content, method="plain", temperature=1.0)
    x, y = drawn_lines(rates)["plain decoding, temperature 1"]
    assert x == [1, 2, 4, 8] and y == [case["tokens_per_second"]["median"] for case in own]
    assert rates.get_ylim()[0] == 0


def test_each_task_has_panels_of_its_own():
    figure = figures.context(contents.context())
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["chat"] * 2 + ["summary"] * 2
    for axes in figure.axes:
        assert drawn_lines(axes)["prompt-lookup, greedy"][0] == [39.2, 130.4, 509.9, 1020.0]
        assert [t.get_text() for t in axes.get_xticklabels()] == ["39", "130", "510", "1020"]
    three = [contents.case(task=task, steps=1) for task in ("chat", "code", "summary")]
    figure = figures.steps(contents.content("steps", three))
    assert len(figure.axes) == 2 * len(three)  # each with its right axis


def test_all_points_and_whiskers_are_inside_of_the_limits():
    for name in ("steps", "lengths", "batch", "context"):
        for axes in getattr(figures, name)(CONTENTS[name]).axes:
            low, high = axes.get_ylim()
            left, right = axes.get_xlim()
            for label, (x, y) in drawn_lines(axes).items():
                ends = y + [end for pair in whiskers(axes, label) for end in pair]
                assert low < min(ends) and max(ends) < high and left < min(x) and max(x) < right


def test_close_ticks_are_left_out():
    assert figures.ticks([39.0, 40.2, 130.0]) == ([39.0, 130.0], ["39", "130"])


# --- bars -----------------------------------------------------------------------------------------


def test_methods_are_bars_by_task_and_temperature():
    content = contents.methods()
    figure = figures.methods(content)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [
        "chat, greedy, context = 39",
        "chat, temperature 1, context = 39",
        "summary, greedy, context = 339",
        "summary, temperature 1, context = 339",
    ]
    places = itertools.product(("chat", "summary"), (0.0, 1.0))
    for axes, (task, temperature) in zip(figure.axes, places, strict=True):
        own = [case for case in chosen(content, task=task, temperature=temperature)
               if case["method"] != "plain"]  # fmt: skip
        bars = axes.patches
        assert [bar.get_width() for bar in bars] == [case["speedup"]["median"] for case in own]
        assert [to_hex(bar.get_facecolor()) for bar in bars] == [
            figures.COLOURS[case["method"]] for case in own
        ]
        (ends,) = (one.lines[2][0] for one in axes.containers if hasattr(one, "lines"))
        for segment, case in zip(ends.get_segments(), own, strict=True):
            spread = case["speedup"]
            assert tuple(segment[:, 0]) == pytest.approx((spread["p20"], spread["p80"]))
        names = [label.get_text() for label in axes.get_yticklabels()]
        assert names == ["block-diffusion, K = 4, T = 1", "block-diffusion, K = auto, T = auto",
                         "parallel, K = 4", "prompt-lookup, K = 8"]  # fmt: skip
        (mark,) = (line for line in axes.lines if line.get_marker() == "d")
        assert list(mark.get_xdata()) == [own[1]["ceiling"]["speedup"]]
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert texts[0] == "1.12x" and texts[-1] == "1.30x, check FAILED"
    assert sum("FAILED" in text for text in texts) == 1


def test_methods_keep_their_colours_apart():
    names = [f"drafter-{i}" for i in range(len(figures.SPARE))]
    content = contents.content("methods", [contents.case(name) for name in ["parallel", *names]])
    colours = figures.colours(content)
    assert len({colours[name] for name in names} | set(figures.COLOURS.values())) == len(
        figures.COLOURS
    ) + len(names)
    assert colours["parallel"] == figures.COLOURS["parallel"]


def test_stages_are_stacked():
    content = contents.methods()
    axes = figures.stages(content).axes[0]
    own = chosen(content, task="chat", temperature=0.0)
    assert [one.get_label() for one in axes.containers] == list(figures.STAGES)
    at = [0.0] * len(own)
    for container in axes.containers:
        ms = [case["ms_per_forward"][container.get_label()] for case in own]
        assert [bar.get_x() for bar in container] == pytest.approx(at)
        assert [bar.get_width() for bar in container] == pytest.approx(ms)
        at = [a + b for a, b in zip(at, ms, strict=True)]
    assert [text.get_text() for text in axes.texts] == [f"{total:.3g} ms" for total in at]


def test_long_stages_are_told_in_whole_milliseconds():
    """And not as 1.82e+03."""
    cases = [
        contents.case(method, ms_per_forward={"draft": ms, "target": ms})
        for method, ms in (("a", 912.4), ("b", 88.3), ("c", 20.0), ("d", 1.5))
    ]
    (axes,) = figures.stages(contents.content("methods", cases)).axes
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["1825 ms", "177 ms", "40.0 ms", "3.00 ms"]


# --- what may not happen --------------------------------------------------------------------------


@pytest.mark.parametrize("name", figures.FIGURES)
def test_nothing_left_is_not_drawn(name, tmp_path):
    cases = [contents.case("plain", 1.0, ms_per_forward=None),
             contents.refused("no memory", steps=1)]  # fmt: skip
    content = contents.content(name, cases)
    assert figures.drawn(content) == {}
    assert figures.draw(content, tmp_path) == [] == list(tmp_path.iterdir())
    cases.append(contents.case(steps=1))
    assert figures.drawn(content)


@pytest.mark.parametrize("name", CONTENTS)
def test_no_text_lies_on_another_and_legends_cover_no_panel(name):
    for figure in figures.drawn(CONTENTS[name]).values():
        canvas = FigureCanvasAgg(figure)
        with figures.styled():
            canvas.draw()
        renderer = canvas.get_renderer()
        whole = figure.bbox.padded(1)
        texts = [text for text in drawn_texts(figure) if text.get_text()]
        assert len(texts) > 8
        boxes = [text.get_window_extent(renderer) for text in texts]
        for text, box in zip(texts, boxes, strict=True):
            assert whole.x0 <= box.x0 and box.x1 <= whole.x1, text.get_text()
            assert whole.y0 <= box.y0 and box.y1 <= whole.y1, text.get_text()
        for (one, a), (other, b) in itertools.combinations(zip(texts, boxes, strict=True), 2):
            assert not a.padded(-1).overlaps(b.padded(-1)), (one.get_text(), other.get_text())
        (legend,) = figure.legends
        for axes in figure.axes:
            assert not legend.get_window_extent(renderer).overlaps(axes.get_tightbbox(renderer))


def drawn_texts(figure):
    """Titles, labels, those of ticks inside of the limits, what stands in panels and legends."""
    for axes in figure.axes:
        yield axes._left_title
        yield from axes.texts
        for axis in (axes.xaxis, axes.yaxis):
            yield axis.label
            low, high = sorted(axis.get_view_interval())
            for at, tick in zip(axis.get_majorticklocs(), axis.get_major_ticks(), strict=True):
                labels = (tick.label1, tick.label2) if low <= at <= high else ()
                yield from (label for label in labels if label.get_visible())
    for legend in figure.legends:
        yield from legend.get_texts()


def test_names_are_no_formulas():
    content = contents.content("methods", [contents.case(r"$\no{formula$", task="$x_1$")])
    (axes,) = figures.methods(content).axes
    with figures.styled():
        FigureCanvasAgg(axes.figure).draw()
    assert axes.get_yticklabels()[0].get_text() == r"$\no{formula$, K = 4"


# --- files ----------------------------------------------------------------------------------------


def test_the_same_content_gives_the_same_bytes(tmp_path):
    for name in ("methods", "figure2", "context"):
        content = CONTENTS[name]
        paths = figures.draw(content, tmp_path / "a")
        assert [path.name for path in paths[:2]] == [f"{name}.png", f"{name}.svg"]
        for first, second in zip(paths, figures.draw(content, tmp_path / "b"), strict=True):
            drawn = first.read_bytes()
            assert drawn == second.read_bytes() and len(drawn) > 10_000
            assert drawn.startswith({".png": b"\x89PNG", ".svg": b"<?xml"}[first.suffix])
            assert b"dc:date" not in drawn
    assert {path.name for path in figures.draw(CONTENTS["methods"], tmp_path / "a")} == {
        "methods.png", "methods.svg", "methods_stages.png", "methods_stages.svg",
    }  # fmt: skip


def test_another_content_gives_other_bytes(tmp_path):
    content = contents.lengths()
    before = [path.read_bytes() for path in figures.draw(content, tmp_path)]
    content["cases"][1]["speedup"]["median"] += 0.05
    assert all(path.read_bytes() != old for path, old in
               zip(figures.draw(content, tmp_path), before, strict=True))  # fmt: skip


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    paths = figures.draw(contents.lengths(), tmp_path)
    before = [path.read_bytes() for path in paths]
    changed = contents.lengths()
    changed["cases"][1]["speedup"]["median"] += 0.05

    replace = os.replace

    def full(source, target):
        if Path(target).suffix == ".svg":
            raise OSError("no space left")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        figures.draw(changed, tmp_path)
    assert paths[0].read_bytes() != before[0] and paths[1].read_bytes() == before[1]
    assert sorted(tmp_path.iterdir()) == paths


@pytest.mark.parametrize("name", ["methods", "stages", "steps", "lengths", "batch", "context"])
def test_without_matplotlib(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"a figure needs matplotlib: pip install matplotlib$"):
        getattr(figures, name)(CONTENTS[name if name != "stages" else "methods"])
