"""The published tables are what the results say, and two results can be compared."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(BENCHMARKS)
    import compare as comparison
    import plot_pair
    import tables


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_pages_agree_with_the_results(page):
    text = page.read_text()
    assert text == tables.rendered(text), "run `python benchmarks/tables.py`"
    assert text.count("<!-- table ") == len(tables.PLACE.findall(text))


def test_every_table_is_published_with_its_source():
    pages = "".join(page.read_text() for page in tables.PAGES)
    for name, table in tables.TABLES.items():
        assert f"<!-- table {name} -->" in pages
        assert re.search(r"`(python|make|specdiff) .*`; .+; \d{4}-\d\d-\d\d\.$", table()[-1])


def test_a_changed_figure_is_noticed(monkeypatch):
    page = ROOT / "README.md"
    changed = tables.result("verify")
    changed["cases"][0]["ms"]["specdiff cpp"] *= 2
    own = tables.result
    monkeypatch.setattr(tables, "result", lambda name: changed if name == "verify" else own(name))
    assert tables.rendered(page.read_text()) != page.read_text()


def test_the_planner_is_as_good_as_the_pages_say():
    """Within 5 % of the best fixed K and T, and of plain decoding by 3 % with random weights."""
    cases = tables.result("planner")["cases"]
    for planned in (case for case in cases if case["k"] is None):
        own = ("drafter", "temperature")
        fixed = [c["speedup"] for c in cases if c["k"] and all(c[x] == planned[x] for x in own)]
        assert planned["speedup"] >= 0.95 * max([1.0, *fixed])
        assert fixed or planned["speedup"] >= 0.97
    assert sum(case["k"] is None for case in cases) == 8
    foretold = [c["predicted"] / c["speedup"] for c in cases if c["predicted"]]
    assert max(abs(ratio - 1) for ratio in foretold) < 0.13  # docs/theory.md


def test_an_unknown_table_is_named():
    with pytest.raises(SystemExit, match="table 'speed': expected one of verify, "):
        tables.rendered("<!-- table speed -->\n<!-- end -->")


def compare(tmp_path, before, after, *options):
    paths = [tmp_path / "before.json", tmp_path / "after.json"]
    for path, content in zip(paths, (before, after), strict=True):
        path.write_text(json.dumps(content))
    command = [sys.executable, BENCHMARKS / "compare.py", *paths, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def case(k, ms, speedup):
    return {"drafter": "d", "k": k, "temperature": 0.0, "ms": {"draft": ms}, "speedup": speedup}


def test_compare(tmp_path):
    """A slower time and a smaller speed-up are worse; cases are matched by their settings."""
    old = {"machine": {"cores": 2}, "cases": [case(2, 1.0, 2.0), case(4, 3.0, 1.0)]}
    moved = {"cases": [case(4, 3.0, 1.0), case(2, 1.05, 1.95)]}
    same = compare(tmp_path, old, moved)
    assert same.returncode == 0 and "4 figures compared, 0 worse" in same.stdout
    assert compare(tmp_path, old, moved, "--within", "0.01").returncode == 1
    for worse in (case(2, 1.5, 2.0), case(2, 1.0, 1.5)):
        found = compare(tmp_path, old, {"cases": [worse, case(4, 3.0, 1.0)]})
        assert found.returncode == 1 and "4 figures compared, 1 worse" in found.stdout
    faster = compare(tmp_path, old, {"cases": [case(2, 0.5, 2.0), case(8, 1.0, 1.0)]})
    assert faster.returncode == 0 and "better" in faster.stdout
    assert "4 in one file only" in faster.stdout
    nothing = compare(tmp_path, old, {"cases": []})
    assert nothing.returncode == 2 and "no figure in common" in nothing.stderr


def test_compare_knows_what_is_better():
    """A median is of times or of speeds, as the key before it says."""
    spread = {"median": 2.0, "p20": 1.0, "p80": 3.0}
    found = dict(comparison.figures({"speedup": spread, "ms": {"draft": 1.0}, "x": spread}))
    assert {path: comparison.better(path) for path in found} == {
        ("speedup", "median"): 1, ("speedup", "p20"): 1, ("speedup", "p80"): 1,
        ("ms", "draft"): -1, ("x", "median"): -1,
    }  # fmt: skip


def test_pictures_are_drawn_from_the_results(tmp_path):
    """The same bytes each time, from the published figures."""
    plot_pair.draw(tmp_path / "a")
    plot_pair.draw(tmp_path / "b")
    for name in ("predicted.png", "predicted.svg", "lenience_pair.png", "lenience_pair.svg"):
        drawn = (tmp_path / "a" / name).read_bytes()
        assert len(drawn) > 10_000 and drawn == (tmp_path / "b" / name).read_bytes()
        assert f"figures/{name}" in (ROOT / "docs" / "theory.md").read_text()
        assert (ROOT / "docs" / "figures" / name).is_file()


def test_what_specdiff_bench_published_has_its_pictures():
    """All that `specdiff bench report` draws is there, and the pages show it."""
    drawn = {path.name for path in (ROOT / "docs" / "figures" / "bench").iterdir()}
    pages = "".join(page.read_text() for page in tables.PAGES)
    shown = set(re.findall(r"\(figures/bench/(\S+)\)", pages))
    contents = [json.loads(file.read_text()) for file in tables.PUBLISHED.glob("*.json")]
    made = [c for c in contents if c.get("command", "").startswith("specdiff bench")]
    assert shown <= drawn and len(made) >= 8
    for content in made:
        expected = {f"{content['name']}.{end}" for end in ("png", "svg")}
        assert expected <= drawn, "run `specdiff bench report benchmarks/results --figures ...`"
        assert not any(case["check"] and not case["check"]["passed"] for case in content["cases"])
