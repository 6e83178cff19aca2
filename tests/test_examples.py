"""The examples decode as transformers does, and the code of docs/integrating.md runs."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM

from tests.tiny import tiny_model

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "python" / "examples"
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 1, 2, 4, 5], [3]]
ALIKE = [[4, 5, 6, 7, 8, 9, 1, 2, 4, 5], [4, 5, 6, 7, 8, 9, 1, 2, 7], [4, 5, 6, 7, 8, 9, 1, 2, 4]]
CHECKPOINTS = {
    "whole": ({}, {}),
    "sharded": ({}, {"max_shard_size": "20KB"}),
    "tied": ({"tie_word_embeddings": True}, {}),
    "one key head": ({"num_key_value_heads": 1}, {}),
}


@pytest.fixture(scope="module", autouse=True)
def setting():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def gpt_fast(setting):
    return importlib.import_module("gpt_fast")


@pytest.fixture(scope="module")
def paged(setting):
    return importlib.import_module("paged_engine")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """Checkpoints of a target and of a model that drafts for it."""
    target, draft = tmp_path_factory.mktemp("target"), tmp_path_factory.mktemp("draft")
    tiny_model("llama").save_pretrained(target)
    tiny_model("llama", seed=5).save_pretrained(draft)
    return target, draft


@pytest.fixture(scope="module")
def models(gpt_fast, folders):
    return [gpt_fast.load(folder) for folder in folders]


def greedy(folder: Path, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Texts that transformers makes of each prompt alone."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    options = {"max_new_tokens": new_tokens, "do_sample": False}
    return [model.generate(torch.tensor([row]), **options)[0].tolist() for row in prompts]


def command(name: str, *arguments: object) -> list[str]:
    """Lines that an example prints."""
    line = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def listed(tokens: list[int]) -> str:
    return ",".join(map(str, tokens))


@pytest.mark.parametrize("name", ["gpt_fast", "paged_engine"])
def test_examples_use_the_ops_alone(name):
    source = (EXAMPLES / f"{name}.py").read_text()
    imported = set(re.findall(r"^(?:from|import) (\w+)", source, re.M))
    assert "specdiff_kernels" in imported
    assert not imported & {"specdiff", "transformers"}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_gpt_fast_reads_checkpoints(gpt_fast, tmp_path, kind):
    config, saving = CHECKPOINTS[kind]
    tiny_model("llama", seed=2, **config).save_pretrained(tmp_path, **saving)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (kind == "sharded")
    texts, rate = gpt_fast.generate(gpt_fast.load(tmp_path), PROMPTS, 12)
    assert texts == greedy(tmp_path, PROMPTS, 12)
    assert rate == 1


@pytest.mark.parametrize("change", [{"model_type": "mistral"}, {"rope_scaling": {"type": "yarn"}}])
def test_gpt_fast_refuses_other_kinds(gpt_fast, folders, tmp_path, change):
    config = json.loads((folders[0] / "config.json").read_text())
    del config["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match="expected model type and rope type"):
        gpt_fast.load(tmp_path)


@pytest.mark.parametrize("drafts", ["another model", "the target"])
@pytest.mark.parametrize("k", [1, 4])
def test_gpt_fast_speculates_without_changing_the_text(gpt_fast, folders, models, drafts, k):
    target, other = models
    drafter = target if drafts == "the target" else other
    texts, rate = gpt_fast.generate(target, PROMPTS, 20, draft_model=drafter, k=k)
    assert texts == greedy(folders[0], PROMPTS, 20)
    assert rate == k + 1 if drafts == "the target" else 1 <= rate < k + 1


def test_gpt_fast_stops(gpt_fast, folders):
    target = gpt_fast.load(folders[0])
    plain = greedy(folders[0], PROMPTS, 20)
    stop = plain[0][8]
    target.config.stop_tokens = [stop]
    texts, _ = gpt_fast.generate(target, PROMPTS, 20, draft_model=target)
    for prompt, text, whole in zip(PROMPTS, texts, plain, strict=True):
        new = whole[len(prompt) :]
        assert text == prompt + new[: new.index(stop) + 1 if stop in new else 20]
    assert len(texts[0]) <= 9


def test_gpt_fast_rows_are_independent(gpt_fast, models):
    target, drafter = models
    options = {"draft_model": drafter, "temperature": 0.9}
    together, _ = gpt_fast.generate(target, PROMPTS, 16, seed=7, **options)
    alone = [
        gpt_fast.generate(target, [prompt], 16, seed=7 + b, **options)[0][0]
        for b, prompt in enumerate(PROMPTS)
    ]
    assert together == alone


def p_value(gpt_fast, folder: Path, drafter) -> float:
    """Of the first two tokens of 4000 texts, under the target's distribution at temperature 0.9."""
    model, rows, V = AutoModelForCausalLM.from_pretrained(folder), 4000, 8
    prompt = torch.tensor([1, 2, 3])
    after = torch.cat([prompt.expand(V, -1), torch.arange(V)[:, None]], 1)  # [V, 4]
    with torch.inference_mode():
        distribution = (model(after).logits[:, 2:].double() / 0.9).softmax(-1)  # [V, 2, V]
    expected = rows * distribution[:, 0].diagonal()[:, None] * distribution[:, 1]
    options = {"draft_model": drafter, "k": 2, "temperature": 0.9}
    target = gpt_fast.load(folder)
    texts, _ = gpt_fast.generate(target, [prompt.tolist()] * rows, 2, **options)
    pairs = torch.tensor(texts)[:, 3] * V + torch.tensor(texts)[:, 4]
    counts = pairs.bincount(minlength=V * V).double()
    rare = expected.flatten() < 5
    cells = [torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts, expected.flatten())]
    return chisquare(*(cell.numpy() for cell in cells)).pvalue


def test_gpt_fast_samples_the_targets_distribution(gpt_fast, tmp_path, monkeypatch):
    tiny_model("llama", vocab=8).save_pretrained(tmp_path / "target")
    tiny_model("llama", vocab=8, seed=5).save_pretrained(tmp_path / "draft")
    drafter = gpt_fast.load(tmp_path / "draft")
    assert p_value(gpt_fast, tmp_path / "target", drafter) > 1e-3

    honest = gpt_fast.Drafter.draft
    monkeypatch.setattr(
        gpt_fast.Drafter, "draft", lambda *args: (d := honest(*args))._replace(rows=d.rows.flip(1))
    )
    assert p_value(gpt_fast, tmp_path / "target", drafter) < 1e-9  # records of other positions


def test_gpt_fast_command(folders):
    target, draft = folders
    prompts = [part for prompt in PROMPTS for part in ("--prompt-ids", listed(prompt))]
    *texts, rate = command(
        "gpt_fast.py", "--model", target, "--draft", draft, *prompts, "--new-tokens", 12
    )
    assert texts == [listed(text) for text in greedy(target, PROMPTS, 12)]
    assert re.fullmatch(r"\d\.\d\d tokens per target forward", rate)


def test_gpt_fast_prints_text(gpt_fast, tmp_path, tiny_tokenizer, monkeypatch, capsys):
    tiny_model("llama", vocab=290, seed=3).save_pretrained(tmp_path)
    line = [
        "gpt_fast.py",
        "--model",
        str(tmp_path),
        "--prompt",
        "the lazy fox",
        "--new-tokens",
        "9",
    ]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit):
        gpt_fast.main()
    assert "pass --prompt-ids" in capsys.readouterr().err

    tiny_tokenizer.save_pretrained(tmp_path)
    gpt_fast.main()
    text = greedy(tmp_path, [tiny_tokenizer.encode("the lazy fox")], 9)[0]
    shown = tiny_tokenizer.decode(text, skip_special_tokens=True)
    assert capsys.readouterr().out == f"{shown}\n1.00 tokens per target forward\n"


def check_blocks(pages) -> int:
    """References count table entries, and every block is held or free. -> the most references"""
    held = pages.tables[pages.tables >= 0].long()
    counted = held.bincount(minlength=len(pages.references))
    assert counted.tolist() == pages.references.tolist()
    free = pages.free[: int(pages.available)].tolist()
    assert sorted(free + held.unique().tolist()) == list(range(len(pages.references)))
    return int(counted.max())


@pytest.fixture
def checked_engine(paged):
    """Makes engines that fail a write to a block that another row holds as well."""

    class OwnBlocksOnly(paged.PagedCache):
        def update(self, layer, positions, k, v):
            block = self.pages.tables.gather(1, positions // self.pages.block_size)
            assert (self.pages.references[block[block >= 0].long()] == 1).all()
            return super().update(layer, positions, k, v)

    def make(model, **options):
        engine = paged.Engine(model, **options)
        engine.cache = OwnBlocksOnly(model, engine.pages)
        return engine

    return make


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_engine_decodes_each_request_as_if_alone(
    paged, folders, models, checked_engine, temperature
):
    options = {"block_size": 4, "longest": 26, "temperature": temperature}
    prompts = [*ALIKE, ALIKE[0][:8], [4, 5, 6, 7, 8, 9, 3, 3], *PROMPTS]

    def requests():
        return [paged.Request(prompt, 8 + b, seed=b) for b, prompt in enumerate(prompts)]

    alone = [
        checked_engine(models[0], rows=1, blocks=8, **options).run([request])[0]
        for request in requests()
    ]
    engine = checked_engine(models[0], rows=3, blocks=12, **options)
    step, most = engine.step, []
    engine.step = lambda: (step(), most.append(check_blocks(engine.pages)))
    assert engine.run(requests()) == alone
    if temperature == 0:
        assert alone == [greedy(folders[0], [p], 8 + b)[0] for b, p in enumerate(prompts)]
    assert max(most) > 1  # a prefix was shared
    assert check_blocks(engine.pages) == 0
    assert int(engine.pages.available) == 12


def test_engine_shares_what_would_not_fit_twice(paged, models):
    """Three requests of 13 positions, 8 of them alike: 4 + 2 + 2 blocks of 4."""

    def most_together(prompts):
        engine = paged.Engine(models[0], rows=3, blocks=8, block_size=4, longest=16)
        step, together = engine.step, []
        engine.step = lambda: (together.append(len(engine.running)), step())
        engine.run([paged.Request(prompt, 14 - len(prompt)) for prompt in prompts])
        return max(together)

    assert most_together(ALIKE) == 3
    assert most_together([[b, *prompt[1:]] for b, prompt in enumerate(ALIKE)]) == 2


def test_engine_stops_and_gives_back(paged, gpt_fast, folders):
    target = gpt_fast.load(folders[0])
    plain = greedy(folders[0], ALIKE, 12)
    fourth = [text[len(prompt) + 3] for text, prompt in zip(plain, ALIKE, strict=True)]
    target.config.stop_tokens = fourth
    engine = paged.Engine(target, rows=2, blocks=12, block_size=4, longest=26)
    texts = engine.run([paged.Request(prompt, 12) for prompt in ALIKE])
    for prompt, text, whole in zip(ALIKE, texts, plain, strict=True):
        assert text == whole[: len(text)]
        assert len(text) <= len(prompt) + 4 and text[-1] in fourth
    assert int(engine.pages.available) == 12


def test_engine_refuses_what_never_fits(paged, models):
    options = {"block_size": 4, "longest": 12}
    with pytest.raises(ValueError, match="14 tokens does not fit an engine of 2 blocks of 4"):
        paged.Engine(models[0], rows=2, blocks=2, **options).run([paged.Request([1] * 6, 8)])


def test_engine_command(folders):
    prompts = [part for prompt in ALIKE for part in ("--prompt-ids", listed(prompt))]
    *texts, blocks = command(
        "paged_engine.py", "--model", folders[0], *prompts, "--new-tokens", 12, "--blocks", 9
    )
    assert texts == [listed(text) for text in greedy(folders[0], ALIKE, 12)]
    assert blocks == "9 of 9 blocks are free"


def test_page_on_integrating():
    torch.manual_seed(0)
    names: dict = {}
    for code in re.findall(
        r"```python\n(.*?)```", (ROOT / "docs/integrating.md").read_text(), re.S
    ):
        exec(code, names)
    # three ways to the same greedy texts
    assert names["session"].texts == names["texts"]
    assert names["generated"].tolist() == names["texts"][:1]
    assert [len(text) for text in names["texts"]] == [21, 18]
    # a recorded draft
    assert (names["verified"].status == 0).all()
    # pages
    assert int(names["missing"]) == 0 and names["start"] == 8
    assert (names["out"].status == 0).all() and names["round"].min() > 0
    # a tree
    assert names["tree"].parents[0, 1] == -1 and names["judged"].path[0, :3].tolist() == [0, 2, -1]
    assert names["judged"].emitted[0, 0] == names["tree"].tokens[0, 1]
    assert names["committed"].kept.tolist() == [2]
    assert names["kv"][0, 1, 1, 19:24, 0].tolist() == [19, 20, 22, 22, 23]
