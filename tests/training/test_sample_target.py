"""Sampling from a tiny target: each conversation is `Decoder.generate`'s, however often killed."""

from __future__ import annotations

import copy
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from specdiff import Decoder, Sampling, Target
from specdiff.cli.main import app
from specdiff.drafters import PromptLookup
from specdiff.loop.session import Session
from specdiff.training import sample_target
from specdiff.training.conversations import load_conversations
from specdiff.training.held_out import messages
from specdiff.training.sample_target import (
    Job,
    SamplePlan,
    Sampler,
    adjacent,
    draw,
    part_size,
    sample_conversations,
)
from tests.replay import RecordedCapture
from tests.tiny import tiny_model

TEMPLATE = (
    "{{ '<s>chat ' }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}{{ ' answer: ' }}{% endif %}"
)
PROMPTS = [
    "the quick brown fox",
    "dog",
    "jumps over the lazy dog and then",
    "the other fox",
    "and",
]
END = 2


@pytest.fixture(scope="module")
def model(tiny_tokenizer) -> LlamaForCausalLM:
    """Ends its texts now and then."""
    model = tiny_model("llama", vocab=len(tiny_tokenizer), context=400, eos_token_id=END)
    with torch.no_grad():
        model.lm_head.weight *= 0.5
        model.lm_head.weight[END] *= 4
    return model


@pytest.fixture(scope="module")
def decoder(model) -> Decoder:
    return Decoder(Target(model))


@pytest.fixture
def chat(tiny_tokenizer, monkeypatch) -> PreTrainedTokenizerFast:
    monkeypatch.setattr(tiny_tokenizer, "chat_template", TEMPLATE)
    return tiny_tokenizer


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(sample_target, "WAVES", 2)


@pytest.fixture
def any_word(monkeypatch):
    """Is enough of a message: a random model writes few."""
    monkeypatch.setattr(sample_target, "LEAST_WORDS", 1)


@pytest.fixture
def lines(tmp_path) -> str:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join([*PROMPTS, "", " "]))
    return str(file)


def parts(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("part-*.npz"))}


def answers(folder: Path) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) of each conversation."""
    data = load_conversations(folder)
    rows = zip(*(x.tolist() for x in data), strict=True)
    return [(tokens[:start], tokens[start:end]) for tokens, start, end in rows]


def test_seeds_are_each_conversations_own():
    """And never change, or a run that is resumed later would mix two."""
    seeds = {
        draw(seed, i, what, attempt)
        for seed in range(5)
        for i in range(50)
        for what in ("answer", "message", "passage")
        for attempt in range(5)
    }
    assert len(seeds) == 5 * 50 * 3 * 5
    assert min(seeds) < 1 << 60 and max(seeds) >= 15 << 60 and max(seeds) < 1 << 64
    assert draw(0, 7, "answer") == 0xA0A21F78FA7059A6


class Replaying(Decoder):
    """As on a GPU: the host looks every third round, and rounds are replayed."""

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self.replays: list[RecordedCapture] = []

    def open(self, *args: Any, **options: Any) -> Session:
        self.replays.append(RecordedCapture())
        own = {"look_every": 3, "capture": self.replays[-1]}
        return super().open(*args, **(options | own))


class Watched(Decoder):
    """Shows the sessions that it opens to `watch`."""

    def __init__(self, target: Target, watch: Callable[[Session], None]) -> None:
        super().__init__(target)
        self.watch = watch

    def open(self, *args: Any, **options: Any) -> Session:
        session = super().open(*args, **options)
        self.watch(session)
        return session


@pytest.mark.parametrize("gpu", [False, True])
def test_answers_are_those_of_generate(decoder, tiny_tokenizer, lines, tmp_path, gpu):
    """Whatever the batch; prompts, temperatures and seeds belong to the conversation."""
    plan, used = SamplePlan(lines, 12, (1.0, 0.7, 0.0), seed=5), decoder
    if gpu:
        used = Replaying(decoder.target)
    totals = sample_conversations(used, tiny_tokenizer, tmp_path / "out", 14, plan, batch=3)
    if gpu:
        assert [replay.replayed > 0 for replay in used.replays] == [True] * 3
    got = answers(tmp_path / "out")
    assert [file[5:13] for file in parts(tmp_path / "out")] == ["00000000", "00000006", "00000012"]
    assert totals[:2] == (14, sum(len(answer) for _, answer in got))
    assert len({len(answer) for _, answer in got}) > 3  # rows left and came at different times
    assert len({len(prompt) for prompt, answer in got if len(prompt + answer) == 12}) > 2
    for i, (prompt, answer) in enumerate(got):
        assert prompt == tiny_tokenizer(PROMPTS[i % 5])["input_ids"]
        want = decoder.generate(
            prompt,
            max_new_tokens=12 - len(prompt),
            sampling=Sampling(plan.temperature(i)),
            seed=draw(5, i, "answer"),
        )
        assert answer == want.new_tokens[0]
        assert answer[-1] == END or len(prompt) + len(answer) == 12


def test_rows_are_admitted_together(model, chat, any_word, tmp_path):
    """A part begins with one prefill, and no place is free while a row waits."""
    admitted, free = [], []

    def watch(session):
        admit, step = session.admit, session.step

        def admitting(prompts, *, first, **options):
            admitted.append((first, len(prompts)))
            admit(prompts, first=first, **options)

        def stepping():
            free.append(sum(session.done))
            return step()

        session.admit, session.step = admitting, stepping

    decoder = Watched(Target(model), watch)
    sample_conversations(decoder, chat, tmp_path, 8, SamplePlan("self", 100), batch=4)
    assert admitted[0] == (0, 4) and sum(n for _, n in admitted) >= 16
    assert free == sorted(free)  # the batch runs empty at the part's end alone


def test_places_side_by_side():
    assert list(adjacent([])) == []
    assert list(adjacent([0, 1, 2, 5, 7, 8])) == [range(3), range(5, 6), range(7, 9)]


def test_parts_of_large_batches_are_fewer_batches(monkeypatch):
    monkeypatch.setattr(sample_target, "WAVES", 16)
    sizes = {1: 16, 16: 256, 127: 2032, 128: 2048, 130: 2080, 500: 2500, 512: 2048, 4096: 4096}
    assert {batch: part_size(batch) for batch in sizes} == sizes


def test_files_are_as_documented(decoder, tiny_tokenizer, lines, tmp_path):
    plan = SamplePlan(lines, 40, (1.0, 0.7))
    sample_conversations(decoder, tiny_tokenizer, tmp_path / "out", 3, plan, batch=2)
    with np.load(tmp_path / "out" / "part-00000000.npz", allow_pickle=False) as data:
        kinds = {name: (data[name].dtype, data[name].shape) for name in data}
        behind = np.arange(40) >= data["length"][:, None]
        assert (data["tokens"][behind] == 0).all() and behind.any()
        assert data["temperature"].tolist() == [1.0, np.float32(0.7), 1.0]
    assert kinds == {
        "tokens": (np.uint16, (3, 40)),
        "prompt_length": (np.int32, (3,)),
        "length": (np.int32, (3,)),
        "temperature": (np.float32, (3,)),
    }


def test_large_vocabularies_take_32_bits(tiny_tokenizer, lines, tmp_path):
    decoder = Decoder(Target(tiny_model("llama", vocab=70_000)))
    sample_conversations(
        decoder, tiny_tokenizer, tmp_path / "out", 4, SamplePlan(lines, 30), batch=2
    )
    assert load_conversations(tmp_path / "out").tokens.max() >= 1 << 16


def test_ranges_of_two_runs_are_one_run(decoder, tiny_tokenizer, lines, tmp_path):
    plan, options = SamplePlan(lines, 30, (1.0, 0.5), seed=1), {"batch": 2}
    sample_conversations(decoder, tiny_tokenizer, tmp_path / "a", 10, plan, **options)
    sample_conversations(decoder, tiny_tokenizer, tmp_path / "b", 6, plan, first=4, **options)
    sample_conversations(decoder, tiny_tokenizer, tmp_path / "b", 4, plan, **options)
    assert parts(tmp_path / "a") == parts(tmp_path / "b") and len(parts(tmp_path / "a")) == 3


@pytest.mark.parametrize("source", ["self", "lines"])
def test_resumed_run_gives_the_same_files(model, chat, any_word, lines, tmp_path, source):
    plan = SamplePlan("self" if source == "self" else lines, 100, (1.0, 0.7), seed=2)
    steps, fatal = [], []

    def watch(session):
        step = session.step

        def failing():
            steps.append(1)
            if len(steps) in fatal:
                raise KeyboardInterrupt
            return step()

        session.step = failing

    decoder = Watched(Target(model), watch)

    def run(folder: Path):
        return sample_conversations(decoder, chat, folder, 10, plan, batch=2)

    run(tmp_path / "a")
    most = len(steps)
    fatal += [most + most * 3 // 4, most + most * 3 // 4 + 3]
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "b")
    there = {file: file.stat().st_mtime_ns for file in (tmp_path / "b").glob("part-*")}
    assert 1 <= len(there) < 3
    totals = run(tmp_path / "b")
    assert parts(tmp_path / "a") == parts(tmp_path / "b")
    assert all(file.stat().st_mtime_ns == time for file, time in there.items())
    assert totals.conversations == 10 - 4 * len(there)
    assert run(tmp_path / "b").conversations == 0


SCRIPT = """
import sys
from specdiff.cli.main import app
from specdiff.training import sample_target
sample_target.WAVES = 2
app(sys.argv[1:])
"""


def test_killed_command_goes_on(model, tiny_tokenizer, lines, tmp_path):
    for thing in (model, tiny_tokenizer):
        thing.save_pretrained(tmp_path / "target")
    arguments = ["sample-target", "--target", tmp_path / "target", "--prompts", lines]
    arguments += ["--conversations", 20, "--batch", 2, "--max-length", 60, "--device", "cpu"]
    arguments = [str(argument) for argument in arguments]
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, *arguments, "--out", str(killed)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment) as process:
        until = time.monotonic() + 60
        while not parts(killed) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.stderr.read()
    assert 1 <= len(parts(killed)) < 5
    for folder in (killed, straight):
        done = CliRunner().invoke(app, [*arguments, "--out", str(folder)])
        assert done.exit_code == 0, done.output
    assert parts(killed) == parts(straight) and len(parts(straight)) == 5
    assert re.search(r"20 conversations sampled, 0 were there; \d+ answer tokens, .* tokens/s",
                     done.stdout)  # fmt: skip


def test_more_conversations_may_be_asked_for(decoder, tiny_tokenizer, lines, tmp_path):
    plan = SamplePlan(lines, 30)
    for count, sampled in ((5, 5), (3, 0), (7, 3), (9, 5)):
        totals = sample_conversations(decoder, tiny_tokenizer, tmp_path / "b", count, plan, batch=2)
        assert totals.conversations == sampled  # a part that is not full is sampled anew
    sample_conversations(decoder, tiny_tokenizer, tmp_path / "a", 9, plan, batch=2)
    assert parts(tmp_path / "a") == parts(tmp_path / "b")


# --- messages that the target writes


def test_target_writes_the_message(decoder, chat, monkeypatch, tmp_path):
    monkeypatch.setattr(sample_target, "LEAST_WORDS", 2)
    plan = SamplePlan("self", 120, (0.7,), seed=3)
    sample_conversations(decoder, chat, tmp_path, 3, plan, batch=2)
    before = chat("<s>chat user: ")["input_ids"]
    redrawn = 0
    for i, (prompt, answer) in enumerate(answers(tmp_path)):
        for attempt in range(100):
            message = decoder.generate(
                before,
                max_new_tokens=60 - len(before),
                sampling=Sampling(1.0),
                seed=draw(3, i, "message", attempt),
            ).new_tokens[0]
            said = chat.decode(message, skip_special_tokens=True).strip()
            whole = chat(f"<s>chat user: {said}</s> answer: ")["input_ids"]
            if message[-1] == END and len(re.findall(r"\w+", said)) >= 2 and len(whole) <= 60:
                break
            redrawn += 1
        assert prompt == whole
        want = decoder.generate(
            prompt,
            max_new_tokens=120 - len(prompt),
            sampling=Sampling(0.7),
            seed=draw(3, i, "answer"),
        )
        assert answer == want.new_tokens[0]
    assert redrawn


def test_no_message_can_be_used(decoder, chat, tmp_path, monkeypatch):
    monkeypatch.setattr(sample_target, "ATTEMPTS", 3)
    monkeypatch.setattr(sample_target, "LEAST_WORDS", 1000)
    with pytest.raises(ValueError, match="in 3 attempts the target wrote no message of 1000 words"):
        sample_conversations(decoder, chat, tmp_path, 1, SamplePlan("self", 60), batch=1)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "need a chat template, but there is none: use a file of prompts"),
        ("{% for m in messages %}{{ m['content'] }}</s>{% endfor %}", "with text before"),
        ("{% for m in messages %}<s>{{ m['content'] }}.{% endfor %}", "a special token after"),
        ("{% for m in messages %}<s>{{ m['content'] | upper }}</s>{% endfor %}", None),
        ("<s>{{ messages[0]['content'] | lower }}</s>", "got '<s>the-words"),
    ],
)
def test_templates_that_do_not_serve(
    decoder, tiny_tokenizer, tmp_path, monkeypatch, template, message
):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
    if message is None:
        sample_target.user_turn(tiny_tokenizer)
        return
    with pytest.raises(ValueError, match=message):
        sample_conversations(decoder, tiny_tokenizer, tmp_path, 1, SamplePlan("self", 60))


@pytest.mark.parametrize("task", ["chat", "held-out"])
def test_messages_that_decoding_is_measured_on_are_written_anew(decoder, chat, task):
    sampler = Sampler(decoder, chat, SamplePlan("self", 400), 1)
    before, end = sampler.turn
    said = min(messages(task), key=len)
    for text, attempt in ((said, 4), (f" {said}\n", 4), (said[1:], None)):
        written = [*before, *chat(text)["input_ids"], end]
        row = sampler.answer(Job(7, 3, before), written)
        assert row[:2] == (7, attempt)


def test_another_message_takes_the_place_of_one_that_is_held_out(
    decoder, chat, any_word, tmp_path, monkeypatch
):
    plan = SamplePlan("self", 100)
    sample_conversations(decoder, chat, tmp_path / "a", 4, plan, batch=2)
    was = [chat.decode(prompt) for prompt, _ in answers(tmp_path / "a")]
    (said,) = re.findall("user: (.*)</s>", was[1], re.S)
    monkeypatch.setattr(sample_target, "is_held_out", lambda text: text.strip() == said)
    sample_conversations(decoder, chat, tmp_path / "b", 4, plan, batch=2)
    now = [chat.decode(prompt) for prompt, _ in answers(tmp_path / "b")]
    assert [b == a for a, b in zip(was, now, strict=True)] == [True, False, True, True]


# --- passages of a corpus


@pytest.fixture
def corpus(tmp_path) -> str:
    """Documents whose words are not those of any other; some are held out."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for n in range(20):
        words = " ".join(f"{n}w{i}" for i in range(200))
        (folder / f"{n:02d}.txt").write_text(f"  {words}\n" if n else "")
    (folder / "long.txt").write_text("x" * 3000)
    return str(folder)


def test_model_without_template_continues_passages(decoder, tiny_tokenizer, corpus, tmp_path):
    sample_conversations(
        decoder, tiny_tokenizer, tmp_path / "o", 40, SamplePlan(corpus, 100), batch=8
    )
    documents = list(sample_target.read_texts(corpus, "train"))
    assert len(documents) < 21
    starts = set()
    for i, (prompt, _) in enumerate(answers(tmp_path / "o")):
        text, document = tiny_tokenizer.decode(prompt), documents[i % len(documents)]
        assert (text in document or (text, document) == (".", "")) and len(prompt) <= 50
        starts.add(document.find(text))
    assert len(starts) > 10


def test_passages_come_under_an_instruction(decoder, chat, corpus, tmp_path):
    sample_conversations(decoder, chat, tmp_path / "o", 24, SamplePlan(corpus, 300), batch=8)
    used = set()
    for prompt, _ in answers(tmp_path / "o"):
        text = chat.decode(prompt)
        asked = [s for s in sample_target.INSTRUCTIONS if f"user: {s.split('{')[0]}" in text]
        assert len(asked) == 1 and text.endswith("</s> answer: ") and len(prompt) <= 150
        used.add(asked[0])
    assert used == set(sample_target.INSTRUCTIONS)


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_another_passage_takes_the_place_of_one_that_is_held_out(
    decoder, tiny_tokenizer, corpus, monkeypatch, template
):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
    sampler = Sampler(decoder, tiny_tokenizer, SamplePlan(corpus, 300), 1)
    text = (Path(corpus) / "07.txt").read_text()
    (first, ids), (second, others) = (sampler.asked(5, text, attempt) for attempt in (0, 1))
    assert first != second and sampler.passage(5, text) == ids
    monkeypatch.setattr(sample_target, "is_held_out", lambda text: text == first)
    assert sampler.passage(5, text) == others


# --- what is refused


def test_prompts_that_decoding_is_measured_on_are_refused(decoder, tiny_tokenizer, tmp_path):
    said = messages("chat")[0]
    (tmp_path / "lines").write_text(f"a fox\n\n {said} \nthe dog\n{messages('held-out')[0]}")
    with pytest.raises(ValueError, match=r"lines holds prompts that .* in line 3, 5:"):
        sample_conversations(
            decoder, tiny_tokenizer, tmp_path / "o", 1, SamplePlan(str(tmp_path / "lines"), 100)
        )
    assert not (tmp_path / "o").exists()
    (tmp_path / "texts").mkdir()
    for n in range(20):
        (tmp_path / "texts" / f"{n}.txt").write_text(f"{said}\n")
    with pytest.raises(
        ValueError, match=r"the document 'Why is the sky blue.*': remove the document"
    ):
        sample_conversations(
            decoder, tiny_tokenizer, tmp_path / "o", 1, SamplePlan(str(tmp_path / "texts"), 200)
        )


def test_other_settings_are_refused(decoder, model, tiny_tokenizer, lines, tmp_path):
    sample_conversations(decoder, tiny_tokenizer, tmp_path / "o", 2, SamplePlan(lines, 30), batch=2)

    def again(plan, batch=2, decoder=decoder):
        sample_conversations(decoder, tiny_tokenizer, tmp_path / "o", 2, plan, batch=batch)

    with pytest.raises(ValueError, match="was made with seed 0, not 1: use the same settings"):
        again(SamplePlan(lines, 30, seed=1))
    with pytest.raises(ValueError, match=r"was made with temperatures \[1.0\], not \[0.0\]"):
        again(SamplePlan(lines, 30, (0.0,)))
    with pytest.raises(ValueError, match="was made with batch 2, not 3"):
        again(SamplePlan(lines, 30), batch=3)
    other = Decoder(Target(tiny_model("llama", vocab=model.config.vocab_size, seed=1)))
    with pytest.raises(ValueError, match="was made with target '"):
        again(SamplePlan(lines, 30), decoder=other)
    merged = copy.deepcopy(model)  # as where a LoRA is merged: the head is the old one
    merged.model.layers[0].self_attn.q_proj.weight.data += 0.01
    with pytest.raises(ValueError, match="was made with target '"):
        again(SamplePlan(lines, 30), decoder=Decoder(Target(merged)))
    again(SamplePlan(lines, 30))
    Path(lines).write_text("\n".join(PROMPTS[::-1]))
    with pytest.raises(ValueError, match="was made with prompt_file '"):
        again(SamplePlan(lines, 30))


def test_arguments_out_of_range(decoder, tiny_tokenizer, lines, tmp_path):
    def run(plan=None, count=4, decoder=decoder, **options):
        sample_conversations(
            decoder, tiny_tokenizer, tmp_path / "o", count, plan or SamplePlan(lines, 30), **options
        )

    (tmp_path / "empty").write_text("\n")
    (tmp_path / "long").write_text("fox " * 40)
    for message, arguments in {
        "conversations and batch must be at least 1, got 0 and 16": {"count": 0},
        "first must be a multiple of 4, the size .* batch 2, got 2": {"first": 2, "batch": 2},
        "max_length must be at most 400, the target's context": {"plan": SamplePlan(lines, 401)},
        "decoder must have no drafter": {"decoder": Decoder(decoder.target, PromptLookup())},
        "empty is empty, expected one prompt": {"plan": SamplePlan(str(tmp_path / "empty"), 30)},
        "prompts must be self, a file .*, or one of sotu, .* got 'magic'": {
            "plan": SamplePlan("magic", 30)
        },
        "'fox fox .* leaves no room": {"plan": SamplePlan(str(tmp_path / "long"), 30)},
    }.items():
        with pytest.raises(ValueError, match=message):
            run(**arguments)
    with pytest.raises(ValueError, match="max_length must be at least 4, got 3"):
        SamplePlan(max_length=3)
    with pytest.raises(ValueError, match="temperatures must hold at least one"):
        SamplePlan(temperatures=())
    with pytest.raises(ValueError, match=r"temperature must be 0 .* got -1"):
        SamplePlan(temperatures=(1.0, -1.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "1,hot"], "--temperature must be numbers .* got '1,hot'"),
        (["--max-length", "3"], "max_length must be at least 4"),
        (["--target", "magic"], "unknown target 'magic'"),
        *([] if torch.cuda.is_available() else [(["--device", "cuda"], "no usable GPU")]),
    ],
)
def test_command_says_what_is_wrong_in_one_line(tmp_path, arguments, message):
    required = ["sample-target", "--out", str(tmp_path / "o"), "--conversations", "2"]
    done = CliRunner().invoke(app, [*required, "--target", "none", *arguments])
    assert done.exit_code == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")
    assert re.search(message, done.stderr)


def test_command_takes_temperatures_repeated_or_in_a_list(model, chat, any_word, tmp_path):
    for thing in (model, chat):
        thing.save_pretrained(tmp_path / "target")
    for options in (["--temperature", "1,0"], ["--temperature", "1", "--temperature", "0"]):
        arguments = ["--target", str(tmp_path / "target"), "--out", str(tmp_path / "o")]
        arguments += ["--conversations", "3", "--batch", "2", "--max-length", "100"]
        done = CliRunner().invoke(app, ["sample-target", *arguments, "--device", "cpu", *options])
        assert done.exit_code == 0, done.output
    assert "0 conversations sampled, 3 were there" in done.stdout
    with np.load(tmp_path / "o" / "part-00000000.npz", allow_pickle=False) as data:
        assert data["temperature"].tolist() == [1.0, 0.0, 1.0]
