"""Tasks: prompts from texts that need no network."""

from __future__ import annotations

import json

import pytest

from specdiff.bench.tasks import TASKS, prompts
from specdiff.training.corpora import SUMMARY


def test_chat(tiny_tokenizer):
    found = prompts("chat", tiny_tokenizer, 16)
    assert len({tuple(ids) for ids in found}) == 16
    assert prompts("chat", tiny_tokenizer, 2) == found[:2]
    with pytest.raises(ValueError, match="has 16 prompts, not 17"):
        prompts("chat", tiny_tokenizer, 17)
    with pytest.raises(ValueError, match="own texts"):
        prompts("chat", tiny_tokenizer, 1, corpus="stdlib")


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
    with pytest.raises(ValueError, match="one of chat, summarise, continue, short, got 'poem'"):
        prompts("poem", tiny_tokenizer, 1)
