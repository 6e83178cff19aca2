"""Conversations: what is read, what is refused, and how they are divided."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from specdiff.training.conversations import (
    Conversations,
    frequent_ids,
    load_conversations,
    split,
    without,
)

SHIPPED = Path(__file__).parents[2] / "data"


def save(file: Path, **change) -> Path:
    """Two conversations of at most 4 tokens."""
    arrays = {
        "tokens": np.array([[5, 6, 7, 8], [5, 9, 0, 0]], np.uint16),
        "prompt_length": np.array([2, 1], np.int32),
        "length": np.array([4, 2], np.int32),
        "temperature": np.array([1.0, 0.7], np.float32),
    } | change
    np.savez(file, **{name: array for name, array in arrays.items() if array is not None})
    return file


def test_one_file(tmp_path):
    data = load_conversations(save(tmp_path / "some.npz"))
    assert [x.dtype for x in data] == [torch.int64] * 3
    assert [x.tolist() for x in data] == [[[5, 6, 7, 8], [5, 9, 0, 0]], [2, 1], [4, 2]]


def test_parts_are_padded_and_joined_in_order_of_name(tmp_path):
    save(tmp_path / "part-00000032.npz")
    wide = np.array([[1, 2, 3, 4, 5, 70_000]], np.int32)
    save(
        tmp_path / "part-00000000.npz",
        tokens=wide,
        prompt_length=np.array([1]),
        length=np.array([6]),
    )
    save(tmp_path / "other.npz")
    data = load_conversations(tmp_path)
    assert data.tokens.tolist() == [
        [1, 2, 3, 4, 5, 70_000],
        [5, 6, 7, 8, 0, 0],
        [5, 9, 0, 0, 0, 0],
    ]
    assert (data.prompt_length.tolist(), data.length.tolist()) == ([1, 2, 1], [6, 4, 2])


@pytest.mark.parametrize(
    ("file", "shape", "answers"),
    [
        ("smollm2_samples.npz", (2028, 400), 502_394),
        ("smollm2_self_samples.npz", (11_483, 448), 3_272_080),
    ],
)
def test_shipped_conversations(file, shape, answers):
    """As data/README.md says."""
    data = load_conversations(SHIPPED / file)
    assert data.tokens.shape == shape
    assert int((data.length - data.prompt_length).sum()) == answers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": None}, "lacks length; see data/README.md for the format"),
        ({"tokens": np.zeros((2, 4))}, "tokens in .* must hold integers, got float64"),
        ({"tokens": np.zeros(2, int)}, r"got shapes \(2,\), \(2,\), \(2,\)"),
        ({"length": np.array([4])}, r"got shapes \(2, 4\), \(2,\), \(1,\)"),
        ({"prompt_length": np.array([0, 1])}, "conversation 0 .* got 0, 4 and 4"),
        ({"prompt_length": np.array([2, 2])}, "conversation 1 .* got 2, 2 and 4"),
        ({"length": np.array([4, 5])}, "conversation 1 .* got 1, 5 and 4"),
    ],
)
def test_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load_conversations(save(tmp_path / "bad.npz", **change))


def test_nothing_is_unpickled(tmp_path):
    file = save(tmp_path / "bad.npz", tokens=np.array([[print], [print]], object))
    with pytest.raises(ValueError, match="cannot be loaded when allow_pickle=False"):
        load_conversations(file)


def test_neither_file_nor_parts(tmp_path):
    for path in (tmp_path, tmp_path / "none.npz"):
        with pytest.raises(ValueError, match=r"is neither an .*: make one with `specdiff sample-t"):
            load_conversations(path)
    (tmp_path / "text.npz").write_text("text")
    with pytest.raises(ValueError, match=r"text\.npz is not a readable \.npz file"):
        load_conversations(tmp_path / "text.npz")


@pytest.fixture
def data() -> Conversations:
    tokens = torch.tensor([[9, 9, 3, 3, 1], [9, 4, 4, 3, 7], [1, 5, 0, 0, 0]])
    return Conversations(tokens, torch.tensor([2, 1, 1]), torch.tensor([5, 4, 2]))


def test_frequent_ids_count_answers_alone(data):
    """Answers are 3 3 1, 4 4 3 and 5: 1 and 5 tie, 9 and 7 are not in them."""
    assert frequent_ids(data, 2, 10, []).tolist() == [3, 4]
    assert frequent_ids(data, 3, 10, []).tolist() == [1, 3, 4]
    assert frequent_ids(data, 3, 10, [8]).tolist() == [3, 4, 8]
    assert frequent_ids(data, 10, 10, [8]).tolist() == list(range(10))


def test_frequent_ids_out_of_range(data):
    with pytest.raises(ValueError, match=r"count must be in \[1, vocab_size = 10\], got 11"):
        frequent_ids(data, 11, 10, [])
    with pytest.raises(ValueError, match=r"count must be in \[2, vocab_size = 10\], got 1"):
        frequent_ids(data, 1, 10, [2, 3])
    with pytest.raises(ValueError, match=r"data has token 9, outside the vocabulary \[0, 9\)"):
        frequent_ids(data, 2, 9, [])


def answers(prompts: list[int]) -> Conversations:
    """A conversation for each prompt of one token, with answers that differ."""
    count = len(prompts)
    tokens = torch.stack((torch.tensor(prompts), torch.arange(count)), 1)
    return Conversations(tokens, torch.ones(count).long(), torch.full((count,), 2))


@pytest.mark.parametrize("share", [0.0, 1 / 32, 0.3, 0.999])
def test_split(share):
    """No prompt is on both sides, its hash alone decides, and one at least is on each."""
    data = answers([i % 200 for i in range(600)])
    train, out = split(data, share)
    assert sorted([*train.tolist(), *out.tolist()]) == list(range(600))
    known = {i: hashlib.sha256(i.to_bytes(2, "little")).digest() for i in range(200)}
    chances = {i: int.from_bytes(digest[:8], "big") / 2**64 for i, digest in known.items()}
    first, last = min(chances, key=chances.get), max(chances, key=chances.get)
    want = {i for i in known if i == first or (chances[i] < share and i != last)}
    assert {i % 200 for i in out.tolist()} == want and len(out) == 3 * len(want)
    if share == 1 / 32:
        assert want == {i for i, digest in known.items() if digest[0] < 8} and len(want) > 1
    large = answers([i + 100_000 for i in range(200)])
    assert len(split(large, share)[0]) + len(split(large, share)[1]) == 200


def test_split_out_of_range():
    with pytest.raises(ValueError, match=r"at least 2 different prompts, .* got 1"):
        split(answers([7, 7, 7]), 0.1)
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\), got 1"):
        split(answers([1, 2]), 1)


def test_without(data):
    """Prompts are 9 9, 9 and 1; the tokens behind a prompt do not count."""
    assert without({(9, 9), (7,)}, data, torch.tensor([2, 0, 1])).tolist() == [2, 1]
    assert without({(9,), (9, 9, 3), (1, 5)}, data, torch.tensor([0, 1, 2])).tolist() == [0, 2]
    with pytest.raises(ValueError, match=r"all prompts of the conversations are held out"):
        without({(9, 9), (1,)}, data, torch.tensor([0, 2]))
