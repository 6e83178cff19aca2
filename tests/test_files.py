"""Files that appear whole, also where two write them at once."""

from __future__ import annotations

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
