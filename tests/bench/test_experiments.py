"""Grids, the paper's tables, and results that outlive an interruption."""

from __future__ import annotations

import json
import os

import pytest
import torch
from transformers import GPT2Config

from specdiff.bench import shapes
from specdiff.bench.experiments import Grid, run
from specdiff.bench.kept import CONDITION, Kept
from specdiff.bench.methods import parse
from specdiff.bench.paper import PUBLISHED, Shape, called, controlled, figure2, stand_in, table2
from specdiff.drafters.ddit import DDiT, DDiTConfig
from specdiff.loop.fast_layers import linear


@pytest.fixture(scope="module")
def sedd(tmp_path_factory, tiny_tokenizer):
    """Folder of a tiny SEDD."""
    folder = tmp_path_factory.mktemp("drafters") / "tiny-sedd"
    torch.manual_seed(0)
    network = DDiT(DDiTConfig(len(tiny_tokenizer), 16, 1, 2, 8, length=64))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    network.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("varied", "kind"),
    [
        ({}, "methods"),
        ({"ks": [2, 4]}, "lengths"),
        ({"steps": [1, 2]}, "steps"),
        ({"batches": [1, 2]}, "batch"),
        ({"contexts": [16, 32]}, "context"),
        ({"ks": [2, 4], "steps": [1, 2]}, "methods"),
    ],
)
def test_kind(varied, kind):
    assert Grid([parse("plain")], **varied).kind == kind


def test_all_combinations(models, corpus):
    grid = Grid(
        [parse("prompt-lookup")], ["continue", "short"], [0.0, 1.0], ks=[1, 2], batches=[1, 2],
        contexts=[8, 12], tokens=4, count=2, repetitions=1, corpus=str(corpus),
    )  # fmt: skip
    cases = run(grid, models)["cases"]
    seen = [(c["task"], c["context"], c["temperature"], c["batch"], c["k"]) for c in cases]
    assert len(seen) == len(set(seen)) == 2 * 2 * 2 * 2 * 3
    assert all(case["refused"] is None and case["check"]["passed"] for case in cases)


def test_an_interrupted_run_goes_on(models, tmp_path):
    """Measured cases are not measured again, unless by another command."""
    grid = Grid([parse("prompt-lookup,k=2")], temperatures=[0.0, 1.0], tokens=4, count=2,
                repetitions=1)  # fmt: skip

    def stop(cases):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(grid, models, kept=Kept(tmp_path, "methods", "command"), show=stop)
    kept, shown = Kept(tmp_path, "methods", "command"), []
    measured = list(kept.cases)
    assert {case["temperature"] for case in measured} == {0.0}
    content = run(grid, models, kept=kept, show=shown.extend)
    assert shown == content["cases"] and content["cases"][: len(measured)] == measured
    path = kept.finish(content)
    assert json.loads(path.read_text())["cases"] == content["cases"] and not kept.part.exists()
    assert {case["temperature"] for case in content["cases"]} == {0.0, 1.0}
    assert set(CONDITION) <= set(content["cases"][0])

    Kept(tmp_path, "methods", "command").add(content["cases"][:2])
    assert Kept(tmp_path, "methods", "another command").cases == []
    assert len(Kept(tmp_path, "methods", "command").cases) == 2
    begun = json.loads(kept.part.read_text())
    kept.part.write_text(json.dumps(begun | {"machine": begun["machine"] | {"cores": 999}}))
    assert Kept(tmp_path, "methods", "command").cases == []


def test_table2(models, corpus, sedd, folder):
    grid = Grid([], ["summarise", "short"], [1.0], tokens=6, count=2, repetitions=1,
                corpus=str(corpus))  # fmt: skip
    content = table2(models, sedd, str(folder), grid, None, 2)
    rows = [(c["task"], c["method"], c["k"], c["steps"]) for c in content["cases"]]
    assert rows == [
        (task, *row)
        for task, k in (("summarise", 40), ("short", 30))
        for row in (("plain", None, None), ("tiny-llama", 5, None), ("tiny-sedd", k, 2))
    ]
    refused = {c["method"]: c["refused"] for c in content["cases"] if c["refused"]}
    assert refused == {}
    assert [row["alpha"] for row in content["published"]][:2] == [0.80, 0.89]
    assert [case["role"] for case in content["cases"]] == [None, "standard", "specdiff"] * 2
    assert {row["task"] for row in content["published"]} == {"summarise", "short"}
    assert "tiny-llama in place of" in content["stand_in"] and "texts" in content["stand_in"]
    with pytest.raises(ValueError, match="got chat"):
        table2(models, sedd, None, Grid([], ["chat"]), None)


def test_the_papers_own_models_are_no_stand_in():
    assert stand_in("gpt2-xl", "drafters/sedd-small", None) is None
    assert "sedd" not in str(stand_in("GPT2-XL", "sedd", "sotu"))


def test_a_target_is_called_as_its_folder_is():
    row = PUBLISHED[2]
    assert row.target == "gpt-neo-2.7b"
    assert called(row, "gpt-neo-2.7B")["target"] == "gpt-neo-2.7B"
    assert called(row, "gpt2-xl")["target"] == "gpt-neo-2.7b"


def test_published():
    """The paper's Table 2 has two rows for each pair of task and target."""
    assert len(PUBLISHED) == 12 == len({row[:3] for row in PUBLISHED})
    assert max(PUBLISHED, key=lambda row: row.speedup).speedup == 8.73


def test_figure2(models, corpus, sedd):
    grid = Grid([], ["continue"], [1.0], steps=[1, 2], tokens=6, count=2, repetitions=1,
                corpus=str(corpus))  # fmt: skip
    content = figure2(models, sedd, grid, 4)
    assert content["name"] == "figure2"
    assert [(c["method"], c["k"], c["steps"]) for c in content["cases"]] == [
        ("plain", None, None), ("tiny-sedd", 4, 1), ("tiny-sedd", 4, 2)
    ]  # fmt: skip


def test_controlled(monkeypatch):
    """Two layers of width 64 in place of GPT-2 XL's: alpha comes out as it was set."""
    small = {"vocab_size": 300, "n_positions": 256, "n_head": 2, "eos_token_id": None}
    target, gpt2 = (GPT2Config(n_embd=n, n_layer=m, **small) for n, m in ((64, 2), (32, 1)))
    monkeypatch.setitem(shapes.TARGETS, "gpt2-xl", target)
    monkeypatch.setitem(shapes.DRAFTERS, "gpt2", gpt2)
    monkeypatch.setitem(shapes.DRAFTERS, "sedd-small", DDiTConfig(300, 16, 1, 2, 8, length=128))
    shape = Shape("gpt2-xl", torch.float32, torch.device("cpu"))
    content = controlled(
        shape, ["summarise"], [1, 2], context=12, tokens=120, count=3, repetitions=1
    )
    cases = {(c["method"], c["steps"]): c for c in content["cases"]}
    assert list(cases) == [
        ("plain", None), ("gpt2, share", None), ("gpt2, each", None),
        ("sedd-small, share", 1), ("sedd-small, share", 2),
        ("sedd-small, each", 1), ("sedd-small, each", 2),
    ]  # fmt: skip
    assert all(c["refused"] is None and c["check"]["identical"] == 3 for c in cases.values())
    # the same tokens are stumbled at, however many steps it took
    assert cases["sedd-small, each", 1]["alpha"] == cases["sedd-small, each", 2]["alpha"]
    each, share = cases["sedd-small, each", 1], cases["sedd-small, share", 1]
    assert abs(sum(each["acceptance"][:1]) - 0.89) < 0.15
    assert share["tokens_per_forward"] > 20 > each["tokens_per_forward"] > 4
    assert [row["k"] for row in content["published"]] == [5, 40]
    assert content["stand_in"].startswith("random weights")
    assert "packed" not in content["stand_in"]


def test_copies_of_a_target_that_would_not_fit_are_not_made(monkeypatch):
    """And the results say so."""
    tiny = GPT2Config(vocab_size=300, n_positions=64, n_embd=64, n_head=2, n_layer=2)
    monkeypatch.setitem(shapes.TARGETS, "gpt2-xl", tiny)
    sysconf = os.sysconf
    size = Shape("gpt2-xl", torch.float32, torch.device("cpu")).target.model.get_memory_footprint()
    for memory, packed in ((3 * size, True), (2 * size, False)):
        found = {"SC_PHYS_PAGES": memory, "SC_PAGE_SIZE": 1}
        monkeypatch.setattr(
            os, "sysconf", lambda name, found=found: found.get(name) or sysconf(name)
        )
        shape = Shape("gpt2-xl", torch.float32, torch.device("cpu"))
        assert shape.packed is packed
        assert ("gpt2-xl without packed copies" in shape.stand_in) is not packed
        forwards = [vars(module).get("forward") for module in shape.target.model.modules()]
        copies = [f.args[1] for f in forwards if f is not None and f.func is linear]
        assert len(copies) > 8 and all((copy is not None) is packed for copy in copies)
