"""`specdiff bench`, run on a tiny Llama: files, a page, pictures, errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from specdiff.bench.machine import slug
from specdiff.cli.bench import counts, given, temperatures
from specdiff.cli.main import app

SMALL = ["--tokens", "5", "--prompts", "2", "--repetitions", "1"]


def bench(*arguments, code=0):
    result = CliRunner().invoke(app, ["bench", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def content(results: Path, name: str) -> dict:
    return json.loads((results / slug() / f"{name}.json").read_text())


def test_run(folder, tmp_path):
    options = ["--target", folder, "--method", "prompt-lookup", "--k", "1,2", *SMALL]
    result = bench("run", *options, "--results", tmp_path)
    assert "prompt-lookup" in result.stdout and "identical 2/2" in result.stdout
    found = content(tmp_path, "lengths")
    command = f"specdiff bench run --target {folder} --method prompt-lookup --task chat"
    assert found["command"].startswith(command) and "--k 1,2" in found["command"]
    assert [(c["k"], c["temperature"]) for c in found["cases"]] == [
        (k, T) for T in (0.0, 1.0) for k in (None, 1, 2)
    ]
    assert found["machine"]["cores"] and found["date"]


def test_what_figures_depend_on_is_in_the_command(folder, tmp_path):
    """So that a run in another dtype does not go on from this one's cases."""
    options = ["run", "--target", folder, "--method", "prompt-lookup,k=2", "--temperature", 0]
    bench(*options, "--no-accelerate", "--dtype", "bfloat16", *SMALL, "--results", tmp_path)
    command = content(tmp_path, "methods")["command"]
    assert command.endswith("--dtype bfloat16 --no-accelerate") and "results" not in command


def test_two_targets_are_one_file(folder, tmp_path):
    bench("run", "--target", folder, "--target", folder, "--method", "prompt-lookup,k=2",
          "--temperature", 0, *SMALL, "--results", tmp_path, "--name", "both")  # fmt: skip
    found = content(tmp_path, "both")
    assert found["target"] == "tiny-llama, tiny-llama"
    assert len(found["cases"]) == 4


def test_table2_and_figure2(folder, tmp_path, corpus):
    texts = ["--corpus", corpus, "--context", 30, *SMALL, "--results", tmp_path]
    bench("table2", "--target", folder, "--drafter", "prompt-lookup", "--standard", folder,
          "--task", "continue", *texts)  # fmt: skip
    found = content(tmp_path, "table2")
    assert [(c["method"], c["k"]) for c in found["cases"]] == [
        ("plain", None), ("tiny-llama", 5), ("prompt-lookup", 45)
    ]  # fmt: skip
    assert len(found["published"]) == 4 and "in place of" in found["stand_in"]
    bench("table2", "--target", folder, "--drafter", "prompt-lookup", "--task", "short",
          "--corpus", corpus, *SMALL, "--results", tmp_path)  # fmt: skip
    assert content(tmp_path, "appendix")["name"] == "appendix"
    bench("figure2", "--target", folder, "--drafter", "prompt-lookup", "--steps", "1,2", *texts)
    assert content(tmp_path, "figure2")["name"] == "figure2"


def test_report(folder, tmp_path):
    results, out, pictures = tmp_path / "r", tmp_path / "page.html", tmp_path / "pictures"
    bench("report", tmp_path, code=2)
    bench("run", "--target", folder, "--method", "prompt-lookup,k=2", "--temperature", 0, *SMALL,
          "--results", results)  # fmt: skip
    (results / "other.json").write_text('{"command": "python something"}')
    (found,) = results.rglob("methods.json")
    (results / "again.json").write_text(found.read_text())  # `--name again`, of the same kind
    (found.parent / ".methods.begun.json").write_text(found.read_text())
    (results / "list.json").write_text("[1]")
    (results / "other-cpu").mkdir()
    (results / "other-cpu" / "methods.json").write_text(found.read_text())
    result = bench("report", results, "--out", out, "--figures", pictures)
    page = out.read_text()
    assert "prompt-lookup" in page and "<svg" in page and "tiny-llama" in page
    names = {path.name for path in pictures.iterdir()}
    files = (f"{slug()}_methods", "other-cpu_methods", "again")
    stems = [name + kind for name in files for kind in ("", "_stages")]
    assert names == {f"{stem}.{end}" for stem in stems for end in ("png", "svg")}
    assert all(name in result.stdout for name in names)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            ["run", "--method", "parallel,q=1"],
            "expected options k=, steps=, rule=, model=",
        ),
        (["run", "--temperature", "hot"], "--temperature must be comma-separated numbers"),
        (["run", "--task", "poem"], "task must be one of chat"),
        (["run", "--batch", "3"], "must be in [1, 2], the number of prompts, got 3"),
        (["table2", "--task", "chat"], "one of summarise, continue, short, got chat"),
        (["controlled", "--target", "gpt5"], "target must be one of gpt2-xl"),
        (["controlled", "--task", "sumarise"], "one of summarise, continue, short, got sumarise"),
        (["run", "--target", "a/x", "--target", "b/x"], "a/x and b/x would both be called 'x'"),
    ],
)
def test_errors_are_one_line(options, reason, folder, tmp_path):
    if options[0] in ("run", "table2"):
        options = [*options, "--target", folder, *SMALL, "--results", tmp_path]
    result = bench(*options, code=2)
    assert reason in result.output and len(result.stderr.strip().splitlines()) == 1


def test_options_that_vary():
    assert counts("--k", "1, 4,auto", auto=True) == [1, 4, "auto"]
    assert temperatures("0,0.7") == [0.0, 0.7]
    assert given("run", target=["a", "b"], k=None, corpus_path=Path("c")) == (
        "specdiff bench run --target a --target b --corpus-path c"
    )


def test_an_unknown_task_is_refused_before_a_model_is_made():
    """Or else the model, which is unknown as well, would be."""
    refused = bench("controlled", "--target", "gpt5", "--task", "sumarise", code=2).output
    assert "got sumarise" in refused and "gpt5" not in refused
