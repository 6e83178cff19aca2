"""The page of `specdiff bench`: what stands in it, that it is sound HTML, and stands alone."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from specdiff.bench import figures, page
from tests.bench import contents

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """The elements and rows of a page; complains about tags that are not closed in order."""

    def __init__(self, html):
        super().__init__()
        self.open, self.ids, self.links, self.rows, self.sections = [], [], [], [], []
        self.text = ""
        self.tags = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.note(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            fields = dict(attrs)
            self.rows[-1].append(["", fields.get("class"), int(fields.get("colspan", 1)), fields])

    def handle_startendtag(self, tag, attrs):
        self.note(tag, attrs)

    def note(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, attrs)
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href", "data", "action", "srcset", "poster"):
                self.links.append(value)
            self.links += re.findall(r"url\(([^)]*)\)", value or "")

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> after {self.open[-3:]}"

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1][0] += data

    def cells(self, method):
        """The rows that begin with `method`."""
        return [[cell[0] for cell in row] for row in self.rows if row[0][0] == method]


@pytest.fixture(scope="module")
def every():
    return [contents.methods(), contents.steps(), contents.lengths(), contents.batch(),
            contents.context(), contents.table2(), contents.methods()]  # fmt: skip


@pytest.fixture(scope="module")
def html(every, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "index.html"
    page.report(every, path)
    assert [file.name for file in path.parent.iterdir()] == ["index.html"]
    return path.read_text()


@pytest.fixture
def one(tmp_path):
    """Makes a page of one content and reads it, below the summary."""

    def read(content):
        page.report([content], tmp_path / "one.html")
        html = (tmp_path / "one.html").read_text()
        return Page(html[html.index("<main>") : html.index("</main>")] + "</main>")

    return read


def summary(contents, tmp_path):
    """What stands above the sections."""
    page.report(contents, tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    return Page(html[html.index("<header>") : html.index("</header>")] + "</header>")


def test_it_is_sound(html, every):
    read = Page(html)
    assert html.startswith("<!doctype html>\n<html lang=")
    assert read.tags.count("section") == len(every)
    assert read.tags.count("svg") == sum(len(figures.drawn(content)) for content in every)
    assert len(read.ids) == len(set(read.ids)) > len(every)


def test_it_stands_alone(html):
    read = Page(html)
    assert len(read.links) > 100
    assert {link[:1] for link in read.links} == {"#"}
    assert {link[1:] for link in read.links} <= set(read.ids)
    assert (
        "http" not in html
        and "@import" not in html
        and not {"script", "link", "img"} & set(read.tags)
    )


def test_the_summary_names_the_fastest_of_each_task_and_temperature(tmp_path):
    slow = contents.content("lengths", [contents.case(speedup=0.9)], stand_in="others")
    none = contents.content("batch", [contents.refused("no memory")])
    read = summary([contents.methods(), contents.batch(), slow, none], tmp_path)
    assert "Machine: Some CPU <x86> & Co, 2 cores." in read.text
    assert "Target: smollm2-135m." in read.text
    compared = "block-diffusion; parallel; prompt-lookup; sedd."
    assert f"Compared with plain decoding: {compared}" in read.text
    assert [[cell[0] for cell in row] for row in read.rows] == [
        ["task", "fastest method", "speed-up"],
        ["Methods"],
        ["chat, greedy, context = 39", "parallel, K = 4", "1.22x (1.10-1.34)"],
        ["chat, temperature 1, context = 39", "parallel, K = 4", "1.07x (0.96-1.18)"],
        ["summary, greedy, context = 339", "prompt-lookup, K = 8", "1.60x (1.44-1.76)"],
        # prompt-lookup is faster, but its check failed
        ["summary, temperature 1, context = 339", "parallel, K = 4", "1.37x (1.23-1.51)"],
        ["Batch, smollm2-135m, 1"],
        ["chat, greedy", "parallel, K = 4, batch = 1", "1.30x (1.17-1.43)"],
        ["chat, temperature 1", "parallel, K = 4, batch = 1", "1.20x (1.08-1.32)"],
        ["Draft length; with stand-ins"],
        ["chat, greedy", "plain decoding; then block-diffusion, K = 4", "0.90x (0.81-0.99)"],
        ["Batch, smollm2-135m, 2"],
        ["chat, greedy", "no method has figures", ""],
    ]  # fmt: skip


def test_no_two_links_have_one_name(html, every):
    names = re.findall(r'<a href="#(\w+)">(.*?)</a>', html)
    assert len(names) == len(dict(names)) == len({name for _, name in names}) == len(every)


def test_cells_say_their_column(html):
    """On narrow screens, where the heads of columns are not shown."""
    cells = [cell for row in Page(html).rows for cell in row if cell[3].get("scope") is None]
    assert len(cells) > 500
    for _, kind, _, fields in cells:
        assert fields.get("data-column") or kind == "reason"


def test_rows_are_as_wide_as_their_table(html):
    for table in re.findall(r"<table>.*?</table>", html, re.S):
        head, *rows = Page(table).rows
        wide = sum(cell[2] for cell in head)
        if any("rowspan" in cell[3] for cell in head):
            lower = rows.pop(0)
            assert len(lower) == sum(cell[2] for cell in head if "rowspan" not in cell[3])
        assert rows and {sum(cell[2] for cell in row) for row in rows} == {wide}


def test_where_it_is_from(html, every):
    read = Page(html)
    for content in every:
        assert content["command"] in read.text
        assert read.text.count(page.TITLES[content["name"]]) >= 2  # in the summary and above
    assert read.text.count("2026-11-28") == len(every)
    assert read.text.count("Some CPU <x86> & Co, 2 cores, AVX2") == len(every)
    assert read.text.count("<stands> in for other-neo & its drafter") == 1


def test_cases(one):
    read = one(contents.methods())
    head = [cell[0] for cell in read.rows[0]]
    assert head == ["method", "K", "T", "tokens/s", "speed-up", "check", "tokens/ forward",
                    "alpha", "alpha × K", "accepted by position, %", "draft, ms",  # noqa: RUF001
                    "target, ms", "verify, ms", "commit, ms", "host, ms", "peak, MB",
                    "rounds alone"]  # fmt: skip
    first = dict(zip(head, read.cells("block-diffusion")[0], strict=True))
    assert first["K"] == "4" and first["T"] == "1" and first["speed-up"] == "1.12x (1.01-1.23)"
    assert first["tokens/s"] == "31.4 (30.1-32.6)" and first["tokens/ forward"] == "2.00"
    assert first["accepted by position, %"] == "45 38 35 33" and first["rounds alone"] == ""
    assert first["check"] == "identical 16/16" and first["target, ms"] == "33.00"
    auto = dict(zip(head, read.cells("block-diffusion")[1], strict=True))
    assert auto["K"] == "auto" and auto["rounds alone"] == "1.30x"
    assert dict(zip(head, read.cells("plain")[0], strict=True))["speed-up"] == "1.00x"
    last = read.cells("prompt-lookup")[-1]
    assert "distribution BROKEN, z = 5.1" in last
    assert [cell[1] for row in read.rows for cell in row if "BROKEN" in cell[0]] == ["bad"]
    assert ["sedd", "4", "4", "refused: the drafter has <no> weights & no vocabulary"] in (
        read.cells("sedd")
    )
    headings = [row[0][0] for row in read.rows if len(row) == 1]
    assert headings == [
        "chat, greedy, context = 39",
        "chat, temperature 1, context = 39",
        "summary, greedy, context = 339",
        "summary, temperature 1, context = 339",
    ]
    assert "target smollm2-135m, rule token, batch 1, 16 prompts, 32 new tokens each" in read.text


def test_numbers_are_aligned_right(html):
    for row in Page(html).rows:
        for text, kind, *_ in row:
            if re.fullmatch(r"[\d.]+x?( \([\d.-]+\))?|auto", text):
                assert kind == "number", text


def test_only_columns_in_use(one):
    bare = contents.case(alpha=0.5, steps=None, alpha_k=None, acceptance=None, ms_per_forward=None,
                         peak_mb=None, check=None)  # fmt: skip
    read = one(contents.content("methods", [bare]))
    assert [cell[0] for cell in read.rows[0]] == [
        "method", "K", "tokens/s", "speed-up", "tokens/ forward", "alpha",
    ]  # fmt: skip
    read = one(contents.batch())
    assert "batch" in [cell[0] for cell in read.rows[0]]
    rules = [contents.case(rule=rule) for rule in ("token", "block")]
    assert "rule" in [cell[0] for cell in one(contents.content("methods", rules)).rows[0]]


def test_all_refused(one):
    read = one(contents.content("steps", [contents.refused("no memory", steps=2)]))
    assert read.cells("block-diffusion") == [["block-diffusion", "4", "2", "refused: no memory"]]
    assert "svg" not in read.tags


def test_a_text_that_differs(one):
    check = {"kind": "identical", "passed": False, "texts": 16, "identical": 15, "z": None}
    read = one(contents.content("methods", [contents.case(check=check)]))
    assert "DIFFERS, identical 15/16" in read.cells("block-diffusion")[0]


def test_published_values_stand_beside_the_measured_ones(one):
    content = contents.table2()
    rows = [[cell[0] for cell in row] for row in one(content).rows]
    dash = page.DASH
    assert rows[0] == ["target", "drafter", "measured with", "K", "alpha",
                       "alpha × K", "speed-up", "check"]  # fmt: skip  # noqa: RUF001
    assert rows[1] == ["paper", "measured"] * 4
    assert rows[2:9] == [
        ["cnn-dailymail"],
        ["some-xl", "standard", "autoregressive, temperature 1",
         "10", dash, "0.90", dash, "9.00", dash, "3.10x", dash, "refused: no checkpoint"],
        ["some-xl", "specdiff", "mdlm, T = 10, temperature 1",
         "40", "40", "0.89", "0.31", "35.60", "12.40", "7.59x", "1.75x (1.57-1.93)",
         "distribution, z = 0.7"],
        ["openwebtext"],
        ["other-neo", "specdiff", "",
         "30", dash, "0.87", dash, "26.10", dash, "6.43x", dash, ""],
        ["smollm2-135m", "specdiff", "block-diffusion, T = 1, greedy",
         dash, "4", dash, "0.25", dash, "1.00", dash, "1.17x (1.05-1.29)", "identical 16/16"],
        ["method", "K", "T", "tokens/s", "speed-up", "check", *rows[8][6:]],
    ]  # fmt: skip


def test_everything_is_escaped(one, tmp_path):
    evil = "<script>alert(\"x\")</script> & 'y'"
    cases = [
        contents.case(evil, task=evil, target=evil, rule=evil),
        contents.refused(evil, method=evil, task=evil, target=evil, rule="other"),
    ]
    row = {"task": evil, "target": evil, "method": evil, "k": 4, "alpha": 0.5, "speedup": 2.0}
    content = contents.content("table2", cases, published=[row], stand_in=evil, command=evil,
                               date=evil)  # fmt: skip
    content["machine"] = {**contents.MACHINE, "python": evil, "gpu": {"name": evil}}
    for read in (one(content), summary([content], tmp_path)):
        assert "script" not in read.tags
        assert read.text.count(evil) > 4


def test_names_of_figures_stay_inside(one):
    """A name could bring an id, a reference or a comment's end into an inlined figure."""
    name = 'a --> <b id="x" href="#y"> url(#z)'
    read = one(contents.content("methods", [contents.case(name)]))
    assert "b" not in read.tags and not {"#y", "#z"} & set(read.links)


def test_inlined_ids_are_prefixed_together():
    svg = ('<?xml version="1.0"?><svg viewBox="0 0 10 20" width="10pt"><metadata>http</metadata>'
           '<defs><style>*{}</style><path id="a"/></defs><!-- id="a" --><use xlink:href="#a"/>'
           '<g clip-path="url(#a)"/></svg>')  # fmt: skip
    assert page.inline(svg, "p-", "a <label>") == (
        '<svg viewBox="0 0 10 20" role="img" aria-label="a &lt;label&gt;" style="max-width: 10pt">'
        '<defs><path id="p-a"/></defs><use href="#p-a"/><g clip-path="url(#p-a)"/></svg>'
    )
    with pytest.raises(ValueError, match="svg: expected an <svg> element with a viewBox"):
        page.inline("<svg></svg>", "p-", "")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"new/page\.html has no folder: make .*/new, or "):
        page.report([contents.lengths()], tmp_path / "new" / "page.html")
    assert list(tmp_path.iterdir()) == []


def test_the_same_contents_give_the_same_page(every, html, tmp_path):
    page.report(every, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == html


def test_an_exception_leaves_the_old_page(tmp_path, monkeypatch):
    path = tmp_path / "index.html"
    page.report([contents.lengths()], path)
    before = path.read_bytes()

    def fails(*_, **options):
        raise OSError("no space left")

    for place in ("matplotlib.figure.Figure.savefig", "os.replace", "pathlib.Path.write_bytes"):
        with monkeypatch.context() as patch:
            patch.setattr(place, fails)
            with pytest.raises(OSError, match="no space left"):
                page.report([contents.batch()], path)
        assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
