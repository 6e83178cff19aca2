"""The documentation's examples run, and its links lead somewhere."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

import specdiff
import specdiff_kernels
from tests.tiny import tiny_model

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCTESTED = [
    *sorted({f.__module__ for _, f in inspect.getmembers(specdiff_kernels, inspect.isfunction)}),
    "specdiff_kernels.pages",
    "specdiff_kernels.testing",
    "specdiff_kernels.testing.drafters",
    "specdiff_kernels.testing.mutants",
    "specdiff.drafters.noise",
    "specdiff.drafters.schedule",
    *(f"specdiff.theory.{part}" for part in ("chains", "estimate", "lenient", "speed")),
]


def test_readme_example(tiny_tokenizer):
    tiny_tokenizer.pad_token = tiny_tokenizer.unk_token
    model = tiny_model("llama", vocab=len(tiny_tokenizer))
    names: dict = {"model": model, "tokenizer": tiny_tokenizer}
    for code in re.findall(r"```python\n(.*?)```", README, re.S):
        exec(code, names)
    assert names["ids"].shape[0] == 2 and names["ids"].shape[1] > 20
    verified = names["verified"]  # by the block rule
    assert verified.emitted.shape == (names["B"], names["K"] + 1)
    assert torch.equal((verified.emitted >= 0).sum(-1), verified.accepted + 1)
    assert (verified.status == 0).all() and (names["draft"].tokens >= 0).all()


def test_conformance_example(capsys):
    names: dict = {}
    page = (ROOT / "docs" / "conformance.md").read_text()
    for code in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(code, names)
    assert names["verdict"].passed and "FAILED" not in capsys.readouterr().out


def test_theory_examples():
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "theory.md").read_text(), re.S):
        exec(code, names)
    assert names["estimate"].examined == 3 and names["estimate"].rejected == 1


@pytest.mark.parametrize("name", DOCTESTED)
def test_docstring_examples(name):
    names = {name: getattr(specdiff_kernels, name) for name in specdiff_kernels.__all__}
    names["torch"] = torch
    flags = doctest.ELLIPSIS
    result = doctest.testmod(importlib.import_module(name), extraglobs=names, optionflags=flags)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    paths = re.findall(r"`((?:csrc|tests|benchmarks|docs|data|build_tools|python)/[\w/.-]+)`", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [path for path in paths if not (ROOT / path).exists()]
    assert not missing


def anchors(page):
    """Names that a link may have behind #: each heading, in small letters, with - for a space."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_headings(page):
    links = re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text())
    assert all(anchor in anchors(page.parent / to if to else page) for to, anchor in links)


@pytest.mark.parametrize("command", re.findall(r"^make (\w+)", README, re.M))
def test_make_targets(command):
    assert re.search(rf"^{command}:", (ROOT / "Makefile").read_text(), re.M)


@pytest.mark.parametrize("module", [specdiff_kernels, specdiff])
def test_fields_of_public_records_say_what_they_are(module):
    """Not "Alias for field number 0": a dtype, a shape and a meaning."""
    records = [getattr(module, name) for name in module.__all__]
    records = [r for r in records if isinstance(r, type) and hasattr(r, "_fields")]
    bare = [
        f"{record.__name__}.{field}"
        for record in records
        for field in record._fields
        if getattr(record, field).__doc__.startswith("Alias for field")
    ]
    assert records and bare == []
