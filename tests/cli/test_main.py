"""The command line, run on a tiny random Llama with a small tokenizer: no download."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.control import strip_control_codes
from typer.testing import CliRunner

from specdiff import Sampling, Stats, Step
from specdiff.cli.main import app
from specdiff.cli.options import cores
from specdiff.cli.report import DecodedRun, LiveText, TextStream, figures, median_run
from specdiff.models import encode
from specdiff.planning.costs import PLAIN, Costs, Plan, measure
from tests.operators import Operators
from tests.tiny import tiny_model, tiny_network

KEYS = [
    "text", "tokens", "target_forwards", "tokens_per_forward", "acceptance", "bias",
    "bias_per_token", "stage_ms",
    "tokens_per_second", "baseline_tokens_per_second", "speedup", "identical",
]  # fmt: skip
PROMPT = "the quick brown fox jumps over the"


def save_llama(folder: Path, tokenizer, *, vocab: int | None = None, nan: bool = False) -> str:
    model = tiny_model("llama", vocab=vocab or len(tokenizer))
    if nan:
        torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def target(tmp_path_factory, tiny_tokenizer) -> str:
    return save_llama(tmp_path_factory.mktemp("target"), tiny_tokenizer)


def free_drafts(decoder, prompts, *, batch, sampling, ks, steps) -> Costs:
    """In place of `measure`: rounds with and without drafts cost the same."""
    taken = (0,) if decoder.drafter.steps is None else steps
    plans = [PLAIN, *(Plan(k, T) for k in ks or (1, 2, 4) for T in taken if k >= T)]
    return Costs(batch, plans, [0.0] * len(plans), [1.0] * len(plans))


@pytest.fixture(autouse=True)
def costs(monkeypatch, tmp_path):
    """Kept for this test alone, and no matter of time."""
    monkeypatch.setenv("SPECDIFF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("specdiff.planning.costs.measure", free_drafts)


@pytest.fixture
def run(target):
    """Run `specdiff generate` on the tiny target."""

    def run(*args: str, drafter: str = "prompt-lookup"):
        options = ["--target", target, "--drafter", drafter, "--max-new-tokens", "24", *args]
        return CliRunner().invoke(app, ["generate", *options])

    return run


@pytest.fixture
def result(run):
    """The same with --json, and what it prints."""

    def result(*args: str, prompt: str | None = PROMPT, **options: str) -> dict:
        given_prompt = ["--prompt", prompt] if prompt is not None else []
        done = run("--json", *given_prompt, *args, **options)
        assert done.exit_code == 0, done.stderr
        return json.loads(done.stdout)  # refuses anything besides one object

    return result


def test_json_has_exactly_the_documented_keys(result):
    got = result()
    assert list(got) == KEYS
    assert got["tokens"] == 24
    assert got["tokens_per_forward"] == got["tokens"] / got["target_forwards"]
    assert set(got["stage_ms"]) >= {"draft", "target", "verify", "commit"}
    assert got["tokens_per_second"] > 0
    assert (got["baseline_tokens_per_second"], got["speedup"], got["identical"]) == (None,) * 3


def test_compare_is_identical_with_a_drafter_that_is_always_right(result, target):
    got = result("--compare", "--k", "3", drafter=target)
    assert got["identical"] is True
    assert got["acceptance"] == [1.0, 1.0, 1.0]
    assert got["target_forwards"] == 6  # 24 tokens, 3 + 1 a round
    ratio = got["tokens_per_second"] / got["baseline_tokens_per_second"]
    assert got["speedup"] == pytest.approx(ratio)
    assert got["text"] == result("--no-draft")["text"]


def test_no_draft_is_plain_decoding(result):
    got = result("--no-draft")
    assert got["acceptance"] == []
    assert got["target_forwards"] == got["tokens"] == 24


def test_trees_give_the_text_of_plain_decoding(result, tiny_tokenizer, tmp_path):
    V = len(tiny_tokenizer)
    tiny_network("parallel", torch.arange(0, V, 2), vocab=V).save(tmp_path)
    options = {"drafter": str(tmp_path)}
    assert result("--tree", "5", **options)["text"] == result("--no-draft")["text"]
    coupled = ("--rule", "coupled", "--temperature", "1")
    grown = result("--tree", "5", "--k", "2", *coupled, **options)["text"]
    assert grown == result("--no-draft", *coupled)["text"]
    assert result("--tree", "5", "--temperature", "1", **options)["tokens"] == 24


def test_models_are_accelerated_unless_told_otherwise(result):
    with Operators() as called:
        text = result("--no-accelerate")["text"]
    assert called.names and "specdiff.skinny_linear.default" not in called.names
    with Operators() as called:
        assert result()["text"] == text
    assert "specdiff.skinny_linear.default" in called.names


def test_k_and_steps_are_chosen_unless_given(result, target, monkeypatch):
    """Where drafts are free the longest is best."""
    assert len(result(drafter=target)["acceptance"]) == 4
    assert len(result("--k", "2", drafter=target)["acceptance"]) == 2
    asked = []

    def dear(decoder, prompts, *, ks, **options):
        asked.append(ks)
        costs = free_drafts(decoder, prompts, ks=ks, **options)
        return replace(costs, draft=[100.0 * plan.k for plan in costs.plans])

    monkeypatch.setattr("specdiff.planning.costs.measure", dear)
    other = "--no-accelerate"  # for which nothing is kept yet
    assert len(result(other, drafter=target)["acceptance"]) == 0 and asked == [None]
    assert len(result(other, "--k", "3", drafter=target)["acceptance"]) == 3
    assert asked == [None]  # nothing to choose, nothing to measure


def test_costs_are_measured_once(result, target, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "specdiff.planning.costs.measure",
        lambda *a, **o: calls.append(1) or free_drafts(*a, **o),
    )
    for count, args in ((1, []), (1, ["--seed", "3"]), (2, ["--temperature", "1"]), (2, [])):
        result(*args, drafter=target)
        assert len(calls) == count
    result("--no-draft")
    assert len(calls) == 2


def plan(target: str, *args: str):
    options = ["--target", target, "--drafter", target, "--tokens", "4", *args]
    return CliRunner().invoke(app, ["plan", *options])


def test_plan_predicts_and_measures(target, tmp_path):
    got = json.loads(plan(target, "--json", "--check", "2").stdout)
    assert [row["k"] for row in got["plans"]] == [4, 2, 1, 0]  # best first
    assert [row["measured_speed_up"] is not None for row in got["plans"]] == [
        True,
        True,
        False,
        False,
    ]
    assert (
        got["plans"][0]["speed_up"]
        == got["plans"][0]["tokens"]
        == 1 + 1 / 2 + 1 / 4 + 1 / 8 + 1 / 16
    )
    assert [need["speed_up"] for need in got["needs"]] == [2, 4, 8]
    assert got["needs"][2] == {"speed_up": 8, "acceptance": None, "draft": None}
    done = plan(target, "--check", "0", "--picture", str(tmp_path / "plans.svg"))
    assert done.exit_code == 0, done.stderr
    for text in ("predicted", "needed for a speed-up", "unreachable even", "1.94x"):
        assert text in done.stdout
    assert (tmp_path / "plans.svg").read_text().startswith("<?xml")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["plans.svg"]


def test_plan_with_the_real_clock(target, monkeypatch):
    monkeypatch.setattr("specdiff.planning.costs.measure", measure)
    got = json.loads(plan(target, "--json", "--check", "1", "--again").stdout)
    assert {row["k"] for row in got["plans"]} == {0, 1, 2, 3, 4, 6, 8}
    assert all(row["speed_up"] > 0 for row in got["plans"])
    best = next(row for row in got["plans"] if row["k"])
    assert best["measured_speed_up"] > 0 and best["tokens"] > 1.5  # it drafts for itself


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--drafter", "magic"], "unknown drafter 'magic'"),
        (["--check", "-1"], "--check must be at least 0, got -1"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--picture", "plan.xyz"], "--picture must end in .png or .svg, got plan.xyz"),
    ],
)
def test_errors_of_plan_are_one_line(target, args, message):
    expect_error(plan(target, *args), message)


def test_identical_is_null_when_sampling(result):
    got = result("--compare", "--temperature", "1", "--top-p", "0.9", "--top-k", "50")
    assert got["identical"] is None
    assert got["speedup"] > 0


def test_greedy_rule_is_greedy_at_any_temperature(result):
    got = result("--compare", "--temperature", "1", "--rule", "greedy")
    assert got["identical"] is True
    assert got["text"] == result()["text"]


@pytest.mark.parametrize("name", ["prompt-lookup", "itself"])
def test_coupled_text_is_that_of_no_draft(result, target, name):
    """With a prompt that repeats itself, so that both drafters propose something."""
    drafter = target if name == "itself" else name
    options = ["--rule", "coupled", "--temperature", "1", "--seed", "3"]
    got = result(*options, prompt=f"{PROMPT} {PROMPT}", drafter=drafter)
    plain = result(*options, "--no-draft", prompt=f"{PROMPT} {PROMPT}")
    assert got["text"] == plain["text"] and plain["acceptance"] == []
    proposed = got["acceptance"]
    assert proposed == [1.0] * 4 if name == "itself" else len(proposed) > 0
    assert got["text"] != result("--temperature", "1", "--seed", "3", prompt=f"{PROMPT} {PROMPT}")


def test_coupled_text_is_compared_at_any_temperature(result, target):
    got = result("--compare", "--rule", "coupled", "--temperature", "1", drafter=target)
    assert got["identical"] is True
    assert got["text"] != result()["text"]


def test_record_decides_which_draft_distributions_count(result, target):
    """A model accepts its own draws if their distribution counts, and not as bare guesses."""
    options = ["--temperature", "1", "--k", "3"]
    for args in ([], ["--record", "running-max"]):
        assert result(*options, *args, drafter=target)["acceptance"] == [1.0] * 3
    assert result(*options, "--record", "one-hot", drafter=target)["acceptance"][0] < 0.9


def test_sampled_drafts_are_judged_by_blocks_unless_told_otherwise(
    result, tiny_tokenizer, tmp_path
):
    """Drafts of another model, of which the two rules accept different ones."""
    other = str(tmp_path / "other")
    tiny_model("llama", vocab=len(tiny_tokenizer), seed=3).save_pretrained(other)
    options = ["--temperature", "5", "--k", "3", "--seed", "1"]
    default, block, token = (
        result(*options, *rule, drafter=other)
        for rule in ([], ["--rule", "block"], ["--rule", "token"])
    )
    assert default["text"] == block["text"] != token["text"]
    assert Sampling(0.7).rule == "block" and Sampling().rule == "token"


def test_lenience_accepts_more_and_says_what_it_spent(result, target):
    """The target's own drafts as bare guesses, so that leniency has something to give."""
    options = ["--temperature", "1", "--record", "one-hot", "--k", "3"]
    exact = result(*options, "--rule", "token", drafter=target)
    lenient = result(*options, "--lenience", "ensemble=0.2", "--compare", drafter=target)
    assert exact["bias"] == 0 and lenient["bias"] > 1
    assert lenient["bias_per_token"] == lenient["bias"] / lenient["tokens"]
    assert lenient["acceptance"][0] > exact["acceptance"][0]
    assert lenient["identical"] is None
    assert result(*options, "--lenience", "ensemble=1", drafter=target)["text"] == exact["text"]


@pytest.mark.parametrize("rule", [[], ["--rule", "lenient"]])
def test_lenience_prints_its_budget_and_promises_nothing(run, target, rule):
    options = ["--prompt", PROMPT, "--compare", "--lenience", "additive=0.3", *rule]
    sampled = run(*options, "--temperature", "1", "--record", "one-hot", drafter=target).stdout
    assert "the text no longer follows" in sampled and "identical" not in sampled
    assert re.search(r"total variation spent +│ +[1-9]", sampled)
    assert re.search(r"per token +│ +0\.\d", sampled)
    greedy = run(*options, drafter=target).stdout
    assert re.search(r"total variation spent +│ +0\.0000 ", greedy)
    assert "no longer" not in greedy and "identical" not in greedy
    assert "variation" not in run("--prompt", PROMPT, drafter=target).stdout


def test_greedy_text_is_the_same_under_any_lenience(result, target):
    got = result("--lenience", "ensemble=0", drafter=target)
    assert (got["text"], got["bias"]) == (result()["text"], 0.0)


def test_seed_decides_sampled_text(result):
    texts = [result("--temperature", "1", "--seed", seed)["text"] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_batch_file_gives_a_text_for_each_line(result, tmp_path):
    file = tmp_path / "prompts"
    file.write_text(f"{PROMPT}\n\nthe lazy dog, 東京\n", encoding="utf-8")
    got = result("--batch-file", str(file), prompt=None)
    assert got["text"] == [result()["text"], result(prompt="the lazy dog, 東京")["text"]]
    assert got["tokens"] == 48
    file.write_text(PROMPT)
    assert result("--batch-file", str(file), prompt=None)["text"] == [result()["text"]]


def test_prints_the_text_and_a_table(run, result, target):
    done = run("--prompt", PROMPT, "--compare", drafter=target)
    assert done.exit_code == 0
    text = strip_control_codes(result()["text"])  # rich keeps bells and their like off the screen
    assert done.stdout.startswith(text + "\n")
    table = done.stdout.removeprefix(text)
    for row in (
        "tokens", "target forwards", "tokens per target forward", "conditional acceptance",
        "draft ms", "target ms", "verify ms", "commit ms", "tokens/s", "speed-up",
        "text identical to plain decoding",
    ):  # fmt: skip
        assert row in table


def test_batch_prints_each_text_under_its_prompt(run, result, tmp_path):
    file = tmp_path / "prompts"
    file.write_text(f"{PROMPT}\n[red] fox\n")
    out = run("--batch-file", str(file)).stdout
    for prompt in (PROMPT, "[red] fox"):
        below = out.split(f": {prompt} ", 1)[1].split("\n", 1)[1]
        assert below.startswith(strip_control_codes(result(prompt=prompt)["text"]) + "\n")


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "give either --prompt or --batch-file"),
        (["--prompt", "a", "--batch-file", "b"], "give either --prompt or --batch-file"),
        (["--prompt", ""], "--prompt is empty"),
        (["--prompt", " \n"], "--prompt is empty"),
        (["--batch-file", "/nowhere/prompts"], "No such file"),
        (["--prompt", "a", "--k", "0"], "--k must be auto or at least 1, got 0; .* use --no-draft"),
        (["--prompt", "a", "--k", "many"], "--k must be auto or at least 1, got many"),
        (["--prompt", "a", "--steps", "0"], "--steps must be auto or at least 1, got 0$"),
        (["--prompt", "a", "--k", "64"], "k must be below the target's context of 64 tokens"),
        (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0"),
        (["--prompt", "fox " * 70], "no room in the target's context of 64"),
        (["--prompt", "a", "--drafter", "magic"], "unknown drafter 'magic'; expected"),
        (["--prompt", "a", "--target", "magic"], "unknown target 'magic'; expected"),
        (["--prompt", "a", "--steps", "2"], "prompt-lookup has none"),
        (["--prompt", "a", "--temperature", "-1"], "temperature must be 0"),
        (["--prompt", "a", "--top-k", "0"], "top_k must be an integer of at least 1"),
        (["--prompt", "a", "--top-p", "2"], r"top_p must be in \(0, 1\]"),
        (["--prompt", "a", "--min-p", "-1"], r"min_p must be in \[0, 1\]"),
        (["--prompt", "a", "--threads", "0"], "--threads must be at least 1"),
        (["--prompt", "caf\udce9"], "--prompt is not UTF-8"),
        (["--prompt", "a", "--no-draft", "--compare"], "--compare is about drafts: leave it out"),
        (["--prompt", "a", "--no-draft", "--tree", "4"], "--tree is about drafts: leave it out"),
        (["--prompt", "a", "--tree", "4", "--rule", "block"], "rule 'block' judges chains alone"),
        (["--prompt", "a", "--tree", "0"], "tree must have at least 1 node, got 0"),
        (["--prompt", "a", "--record", "final"], "would bias the output: .* names no final_step"),
        (["--prompt", "a", "--record", "entangled"], "would bias the output: .* the drafter keeps"),
        (["--prompt", "a", "--rule", "coupled", "--record", "one-hot"], "uses no q, got 'one-hot'"),
        (["--prompt", "a", "--rule", "lenient"], "--rule lenient needs --lenience KIND=AMOUNT"),
        (
            ["--prompt", "a", "--rule", "token", "--lenience", "ensemble=1"],
            "--lenience implies --rule lenient, got --rule token",
        ),
        (["--prompt", "a", "--lenience", "ensemble=1", "--no-draft"], "--lenience is about drafts"),
        (["--prompt", "a", "--lenience", "ensemble"], "must be KIND=AMOUNT, .* got 'ensemble'"),
        (["--prompt", "a", "--lenience", "more=1"], "lenience.kind: expected one of lenience, add"),
        (["--prompt", "a", "--lenience", "ensemble=2"], "lenience.amount: expected a number in"),
    ],
)
def test_user_errors_are_one_line(run, args, message):
    expect_error(run(*args), message)


def test_version_and_short_help():
    assert re.fullmatch(r"specdiff \d+\.\d+.*\n", CliRunner().invoke(app, ["--version"]).stdout)
    for command in ([], ["generate"], ["bench"], ["bench", "run"], ["models", "fetch"]):
        done = CliRunner().invoke(app, [*command, "-h"])
        assert done.exit_code == 0 and "Usage:" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_device_and_dtype(run, result, target):
    expect_error(run("--prompt", "a", "--device", "cuda"), "torch found no usable GPU; use --dev")
    assert result("--device", "cpu", "--dtype", "bfloat16")["tokens"] == 24
    expect_error(plan(target, "--device", "cuda"), "torch found no usable GPU")


def test_more_threads_than_there_are(run):
    before = torch.get_num_threads()
    try:
        done = run("--prompt", "a", "--threads", "100000")
        assert torch.get_num_threads() <= cores()
    finally:
        torch.set_num_threads(before)
    assert done.exit_code == 0
    assert re.search(r"--threads 100000: this machine has \d+, which are used", done.stderr)


def test_a_text_that_the_context_ends_is_announced(run):
    said = "texts end at the target's context of 64 tokens, before --max-new-tokens 100"
    assert said in run("--prompt", PROMPT, "--max-new-tokens", "100").stderr
    assert said not in run("--prompt", PROMPT).stderr


def test_a_comparison_without_drafts_claims_no_speed_up(run, result, monkeypatch):
    """Both runs are plain decoding then, and their ratio is noise."""

    def no_drafts(decoder, prompts, **options) -> Costs:
        costs = free_drafts(decoder, prompts, **options)
        return replace(costs, draft=[9.0 * plan.k for plan in costs.plans])

    monkeypatch.setattr("specdiff.planning.costs.measure", no_drafts)
    got = result("--compare")
    assert got["speedup"] is None and got["baseline_tokens_per_second"] > 0
    shown = run("--prompt", PROMPT, "--compare").stdout
    assert "with drafts" in shown and "no draft made" in shown


def test_block_diffusion_drafter_of_another_target(run):
    expect_error(
        run("--prompt", "a", drafter="block-diffusion"), "load a drafter trained for this target"
    )


def test_vocabulary_mismatch(run, tmp_path, tiny_tokenizer):
    other = save_llama(tmp_path / "other", tiny_tokenizer, vocab=310)
    expect_error(run("--prompt", "a", drafter=other), "vocabulary has 310 tokens .* 290")


def test_nan_logits(run, tmp_path, tiny_tokenizer):
    broken = save_llama(tmp_path / "broken", tiny_tokenizer, nan=True)
    expect_error(run("--prompt", "a", "--target", broken), "NaN")


@pytest.mark.parametrize(
    "content, message",
    [(b"\n \n", "is empty"), (b"caf\xe9\n", "prompts is not UTF-8: line 1 has the byte 0xe9")],
)
def test_bad_batch_file(run, tmp_path, content, message):
    (tmp_path / "prompts").write_bytes(content)
    expect_error(run("--batch-file", str(tmp_path / "prompts")), message)


def test_forced_backend_that_does_not_exist(run, monkeypatch):
    monkeypatch.setenv("SPECDIFF_BACKEND", "abacus")
    expect_error(run("--prompt", "a"), "abacus")


def expect_error(done, message: str) -> None:
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert re.search(message, lines[0])


def test_unknown_model_name():
    done = CliRunner().invoke(app, ["models", "fetch", "magic"])
    expect_error(done, "unknown model 'magic'; expected one of smollm2-135m")


def test_models_list(monkeypatch, tmp_path):
    monkeypatch.setenv("SPECDIFF_HOME", str(tmp_path))
    assert "not fetched" in CliRunner().invoke(app, ["models", "list"]).stdout
    folder = tmp_path / "models" / "smollm2-135m"
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).touch()
    assert str(folder) in CliRunner().invoke(app, ["models", "list"]).stdout


def test_help_does_not_wait_for_torch():
    code = "import sys, specdiff.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_chat_template_unless_raw(tiny_tokenizer, monkeypatch):
    template = (
        "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}fox{% endif %}"
    )
    plain = tiny_tokenizer("dog")["input_ids"]
    assert encode(tiny_tokenizer, "dog", raw=False) == plain
    monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
    assert encode(tiny_tokenizer, "dog", raw=True) == plain
    fox = tiny_tokenizer("fox")["input_ids"]
    assert encode(tiny_tokenizer, "dog", raw=False) == [1, *plain, 2, *fox]


def decode(tokenizer, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True)


@given(tokens=st.lists(st.integers(0, 289), max_size=40))
def test_streamed_pieces_make_the_text(tiny_tokenizer, tokens):
    stream = TextStream(tiny_tokenizer)
    pieces = [stream.push(token) for token in tokens]
    assert "".join(pieces) + stream.flush() == decode(tiny_tokenizer, tokens)


def test_characters_are_streamed_whole(tiny_tokenizer):
    text = "fox 🦊 東京"
    tokens = tiny_tokenizer(text)["input_ids"]
    assert len(tokens) > len(text)
    stream = TextStream(tiny_tokenizer)
    pieces = [stream.push(token) for token in tokens]
    assert "".join(pieces) == text
    assert "🦊" in pieces


def test_accepted_tokens_are_coloured_and_shown_at_once(tiny_tokenizer, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, color_system="standard")
    live = LiveText(console, tiny_tokenizer, ["prompt"])
    drafted, own = (tiny_tokenizer(text)["input_ids"] for text in ("fox", "!"))
    step = Step([drafted + own], [len(drafted)], [len(drafted)], [False], Stats())
    live(step)
    coloured = "".join(f"\x1b[32m{tiny_tokenizer.decode([t])}\x1b[0m" for t in drafted)
    assert screen.getvalue() == coloured + "!"
    live.legend()
    assert "\x1b[32mdrafted and accepted\x1b[0m" in screen.getvalue()


def test_no_color(tiny_tokenizer, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    screen = io.StringIO()
    live = LiveText(Console(file=screen, force_terminal=True), tiny_tokenizer, ["prompt"])
    tokens = tiny_tokenizer("fox")["input_ids"]
    live(Step([tokens], [len(tokens)], [len(tokens)], [True], Stats()))
    live.legend()
    assert screen.getvalue() == "fox\n"


def run_of(seconds: float, tokens: list[int]) -> DecodedRun:
    stats = Stats(target_forwards=2, row_forwards=2, tokens=len(tokens), drafted=1)
    stats.seconds["target"] = seconds
    return DecodedRun([tokens], stats)


def test_figures_come_from_the_median_runs():
    fast = median_run([run_of(s, [1, 2, 3, 4]) for s in (9.0, 2.0, 1.0)])
    plain = median_run([run_of(s, [1, 2, 3, 4]) for s in (4.0, 5.0, 3.0)])
    got = figures(fast, "text", plain, same=True)
    assert got["tokens_per_second"] == 2.0
    assert got["baseline_tokens_per_second"] == 1.0
    assert got["speedup"] == 2.0
    assert got["identical"] is True


def test_different_text_is_not_called_identical():
    got = figures(run_of(1, [1, 2]), "text", run_of(1, [1, 3]), same=True)
    assert got["identical"] is False
