"""Tasks: prompts from texts that need no network."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from specdiff.bench.tasks import TASKS, prompts
from specdiff.download import is_fetched, model_folder
from specdiff.models import encode
from specdiff.training.corpora import SUMMARY
from specdiff.training.held_out import HELD_OUT, held_out_prompts, is_held_out, messages

DATA = Path(__file__).parents[2] / "data"
TARGET = "smollm2-135m"
OTHERWISE = ("011937b9", "040f77fe", "03a32ba6", "03be0a00")  # tokenised, when a user types them


def test_chat(tiny_tokenizer):
    found = prompts("chat", tiny_tokenizer, 16)
    assert len({tuple(ids) for ids in found}) == 16
    assert prompts("chat", tiny_tokenizer, 2) == found[:2]
    with pytest.raises(ValueError, match="has 16 prompts, not 17"):
        prompts("chat", tiny_tokenizer, 17)
    with pytest.raises(ValueError, match="own texts"):
        prompts("chat", tiny_tokenizer, 1, corpus="stdlib")


def digests(file: str) -> dict[str, list[int]]:
    """The different prompts of a file of conversations by their sha256, in its order."""
    with np.load(DATA / file, allow_pickle=False) as data:
        rows = zip(data["tokens"].astype("<u2"), data["prompt_length"], strict=True)
        found = [tokens[:length] for tokens, length in rows]
    return {hashlib.sha256(ids.tobytes()).hexdigest(): ids.tolist() for ids in found}


@pytest.fixture(scope="module")
def candidates() -> dict[str, list[int]]:
    """Prompts that are held out if their text gives the same tokens again."""
    known = digests("smollm2_samples.npz")
    own = digests("smollm2_self_samples.npz")
    return {said: ids for said, ids in own.items() if said < "08" and said not in known}


def held_out() -> dict[str, str]:
    records = map(json.loads, HELD_OUT.read_text(encoding="utf-8").splitlines())
    return {record["sha256"]: record["message"] for record in records}


def test_held_out(tiny_tokenizer):
    found = prompts("held-out", tiny_tokenizer, 64)
    assert len({tuple(ids) for ids in found}) == 64 and TASKS["held-out"].tokens == 128
    assert tiny_tokenizer.decode(found[0]) == "List ten facts about two brothers."
    assert prompts("held-out", tiny_tokenizer, 2) == found[:2]
    with pytest.raises(ValueError, match="has 64 prompts, not 65"):
        prompts("held-out", tiny_tokenizer, 65)
    with pytest.raises(ValueError, match="task 'held-out' has its own texts: omit the corpus"):
        prompts("held-out", tiny_tokenizer, 1, corpus="stdlib")


def test_held_out_prompts_are_the_first_by_their_hash(candidates):
    """In the order of the data; between them only what is tokenised otherwise is passed over."""
    first = list(candidates)[: 64 + len(OTHERWISE)]
    assert [said for said in first if not said.startswith(OTHERWISE)] == list(held_out())


@pytest.mark.skipif(not is_fetched(TARGET), reason="needs SmolLM2's tokenizer: make demo")
def test_held_out_messages_are_the_text_of_those_prompts(candidates):
    tokenizer = AutoTokenizer.from_pretrained(model_folder(TARGET), local_files_only=True)
    for said, message in held_out().items():
        assert encode(tokenizer, message) == candidates[said]
    others = [ids for said, ids in candidates.items() if said.startswith(OTHERWISE)]
    assert len(others) == len(OTHERWISE)
    for ids in others:
        message = tokenizer.decode(ids).split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
        assert encode(tokenizer, message) != ids


def test_messages_are_told_by_their_text(tiny_tokenizer):
    every = [*messages("chat"), *messages("held-out")]
    assert len(set(every)) == 80 and all(map(is_held_out, every))
    assert is_held_out(f" {every[0]}\n") and not is_held_out(every[0][1:])
    ids = held_out_prompts(tiny_tokenizer)
    assert ids >= {tuple(encode(tiny_tokenizer, text)) for text in every}
    assert ids >= {tuple(encode(tiny_tokenizer, text.strip())) for text in every}
    assert tuple(encode(tiny_tokenizer, "Why?")) not in ids


@pytest.mark.parametrize("name", ["summarise", "continue", "short"])
def test_other_texts_stand_in(name, tiny_tokenizer, corpus):
    found = prompts(name, tiny_tokenizer, 5, corpus=str(corpus))
    assert len({tuple(ids) for ids in found}) == 5
    assert max(map(len, found)) <= TASKS[name].context
    texts = [tiny_tokenizer.decode(ids) for ids in found]
    assert all("foxes" in text for text in texts)
    assert all(text.endswith(SUMMARY) == (name == "summarise") for text in texts)
    exact = prompts(name, tiny_tokenizer, 4, corpus=str(corpus), context=40)
    assert {len(ids) for ids in exact} == {40}


def test_long_documents_are_several_passages(tiny_tokenizer, tmp_path):
    for n in range(40):
        (tmp_path / f"{n}.txt").write_text(f"{n} " + "abcdefgh " * 400)
    few = prompts("continue", tiny_tokenizer, 12, corpus=str(tmp_path), context=50)
    assert len(few) == 12
    with pytest.raises(ValueError, match=r"of 50 tokens, not 100000: ask for fewer or shorter"):
        prompts("continue", tiny_tokenizer, 100000, corpus=str(tmp_path), context=50)


def test_the_papers_own_corpora_from_a_copy(tiny_tokenizer, tmp_path):
    """As `datasets` reads them, without the network."""
    rows = [{"article": f"{n} dogs.", "highlights": "Dogs.", "id": str(n)} for n in range(4)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "train.jsonl").write_text(json.dumps(rows[0]) + "\n")
    found = prompts("summarise", tiny_tokenizer, 4, path=tmp_path)
    assert [tiny_tokenizer.decode(ids) for ids in found] == [
        f"{n} dogs.{SUMMARY}" for n in range(4)
    ]


def test_an_unknown_task_is_named(tiny_tokenizer):
    with pytest.raises(
        ValueError, match="one of chat, held-out, summarise, continue, short, got 'poem'"
    ):
        prompts("poem", tiny_tokenizer, 1)
