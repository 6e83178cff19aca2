"""Files that appear whole, also where two write them at once."""

from __future__ import annotations

import codecs
import errno
import os

import pytest
import torch

from specdiff import files


def test_models_that_differ_in_one_layer_are_told_apart():
    first, second = (torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in "ab")) for _ in "ab")
    second.load_state_dict(first.state_dict())
    assert files.model_digest(first) == files.model_digest(second)
    with torch.no_grad():
        second[0].weight[0, 0] += 1
    assert files.model_digest(first) != files.model_digest(second)


def test_two_writers_do_not_meet(tmp_path, monkeypatch):
    """One writes the whole file while another is about to move its own into place."""
    path, replace = tmp_path / "costs.json", os.replace

    def late(source, target):
        monkeypatch.setattr(os, "replace", replace)
        files.write_atomically(path, b"another's")
        assert path.read_bytes() == b"another's"
        replace(source, target)

    monkeypatch.setattr(os, "replace", late)
    files.write_atomically(path, b"mine")
    assert path.read_bytes() == b"mine" and list(tmp_path.iterdir()) == [path]


def test_a_writer_that_fails_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "costs.json"
    path.write_bytes(b"before")

    def full(source, target):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        files.write_atomically(path, b"after")
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"", []),
        (b"\n", [""]),
        (b"a\nb", ["a", "b"]),
        (b"a\r\nb\rc\n", ["a", "b", "c"]),
        (b"a\n\n b \n", ["a", "", " b "]),
        (codecs.BOM_UTF8 + "é\n".encode(), ["é"]),
        ("a\ufeff\n".encode(), ["a\ufeff"]),
        *((f"a{end}b".encode(), [f"a{end}b"]) for end in "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"),
    ],
)
def test_only_newlines_end_a_line(tmp_path, data, lines):
    (tmp_path / "lines.txt").write_bytes(data)
    assert files.read_lines(tmp_path / "lines.txt") == lines


def test_another_encoding_is_told_with_its_line(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_bytes(codecs.BOM_UTF8 + b"a\r\nb\rcaf\xe9\n")
    with pytest.raises(ValueError, match=r"lines\.txt is not UTF-8: line 3 has the byte 0xe9"):
        files.read_lines(path)


@pytest.mark.parametrize("names", [(), ("source",), ("source", None, "target")])
def test_an_error_names_the_file_that_was_to_be_written(tmp_path, monkeypatch, names):
    """Not the temporary one, or none."""
    path, full = tmp_path / "costs.json", (errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fails(source, target):
        raise OSError(*full, *names)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="No space left") as raised:
        files.write_atomically(path, b"after")
    assert str(raised.value) == str(OSError(*full, str(path)))


def test_the_first_difference_of_settings_is_told(tmp_path):
    files.keep_settings(tmp_path, {"seed": 1, "drafter": {"kind": "eagle", "heads": 2}})
    with pytest.raises(ValueError, match=r"was made with drafter\.heads 2, not 4: use the same"):
        files.keep_settings(tmp_path, {"seed": 1, "drafter": {"kind": "eagle", "heads": 4}})
